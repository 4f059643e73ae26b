"""QST: a small network beside a frozen 4-bit one, trained on its activations without a backward pass through it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets
from .registry import Paper, at_least_one, register


@dataclass(frozen=True)
class Options:
    """reduction: how many times narrower the side network is. r: rank of the factors that narrow a hidden state."""

    reduction: int = 16
    r: int = 16

    def __post_init__(self) -> None:
        at_least_one("reduction", self.reduction)
        at_least_one("r", self.r)


class _Running:
    """The side network's hidden state of the forward pass that is under way."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"state": None}


class QSTBlock(nn.Module):
    """A frozen block, and the side network's step on what it gives.

    h_i = (1 - sigmoid(gate)) narrow(f_i) + sigmoid(gate) h_{i-1}, and h_i goes through ``side``, a block of the same class
    with its widths
    divided; f_i is the frozen block's output. ``narrow`` is two matrices, ``down`` ``[r, d]`` and ``up_small`` ``[d /
    reduction, r]``. The last
    block gives mix · f + (1 - mix) widen(h) in the place of f, with ``mix`` 1 at first.
    """

    def __init__(
        self, block: nn.Module, side: nn.Module, options: Options, width: int, like: Tensor, last: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.side, self.last = block, side, last
        factory: dict[str, Any] = {
            "device": like.device,
            "dtype": torch.float64 if like.dtype == torch.float64 else torch.float32,
        }
        small = width // options.reduction
        self.side.to(**factory)
        self.down = nn.Parameter(torch.randn(options.r, width, **factory) / width**0.5)
        self.up_small = nn.Parameter(torch.randn(small, options.r, **factory) / options.r**0.5)
        self.gate = nn.Parameter(torch.zeros((), **factory))
        if last:
            self.widen = nn.Parameter(torch.randn(width, small, **factory) / small**0.5)
            self.mix = nn.Parameter(torch.ones((), **factory))
        self.__dict__["running"] = _Running()
        self.__dict__["first"] = False

    running: _Running

    def __getattr__(self, name: str) -> Any:
        # Models ask their blocks for what they are, such as a kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            found = self.base_layer(hidden, *arguments, **named)
        out = found[0] if isinstance(found, tuple) else found
        frozen = out.detach().to(self.down.dtype)
        narrow = frozen @ self.down.T @ self.up_small.T
        before = None if self.first else self.running.state
        keep = torch.sigmoid(self.gate)
        # The first has no state before it: what it narrows stands for both.
        state = narrow if before is None else (1 - keep) * narrow + keep * before
        given = {name: _as(value, self.down.dtype) for name, value in named.items()}
        # Keys and values of the side network are not cached: generate with use_cache=False.
        given = {name: value for name, value in given.items() if name not in ("past_key_values", "past_key_value")}
        if "use_cache" in given:
            given["use_cache"] = False
        side = self.side(state, *(_as(value, self.down.dtype) for value in arguments), **given)
        state = side[0] if isinstance(side, tuple) else side
        if not self.last:
            self.running.state = state
            return found
        self.running.state = None
        mixed = (self.mix * frozen + (1 - self.mix) * (state @ self.widen.T)).to(out.dtype)
        return (mixed, *found[1:]) if isinstance(found, tuple) else mixed


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, such as masks and rotary angles, in the side network's dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_as(one, dtype) for one in value) if isinstance(value, tuple) else value


WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def narrow_config(config: Any, reduction: int) -> Any:
    """A transformers config with its widths divided; the size of a head stays, so that rotary angles fit.

    Raises:
        ValueError: a width does not divide.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name in WIDTHS:
        value = getattr(config, name, None)
        if value is None:
            continue
        if name == "num_key_value_heads":
            setattr(small, name, max(1, value // reduction))
            continue
        if value % reduction:
            raise ValueError(f"reduction: {name} = {value} does not divide by {reduction}")
        setattr(small, name, value // reduction)
    if small.hidden_size % small.num_attention_heads:
        raise ValueError(f"reduction: {small.hidden_size} do not divide into {small.num_attention_heads} heads")
    return small


def _blocks(model: nn.Module) -> list[str]:
    """The longest run of numbered modules of one class."""
    best: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best) and len({type(one) for one in module}) == 1:
            best = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
    return best


def _side(block: nn.Module, config: Any, number: int) -> nn.Module:
    takes = inspect.signature(type(block).__init__).parameters
    made: nn.Module = type(block)(config, layer_idx=number) if "layer_idx" in takes else type(block)(config)
    return made


@register(
    "qst",
    paper=Paper(
        "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models",
        "Zhang et al.",
        2024,
        "2401.07159",
    ),
    formula="h_i = side_i((1 - sigmoid(g_i)) narrow(f_i) + sigmoid(g_i) h_{i-1}); out = mix f_L + (1 - mix) widen(h_L), mix = "
    "1 at first",
    options=Options,
    reduces_to="nf4 in the frozen model, which has no backward; torch's products in the side network",
    kind="layer",
    fused="the frozen 4-bit model's forward; the side network is transformers' own blocks at a fraction of the width",
    choices="A side block is one of the model's own class, drawn at random by transformers' rules, its widths divided and the "
    "size of its heads "
    "kept. A hidden state is narrowed by two matrices of rank r. The first block's state before it is its own narrowed "
    "output. Beside a "
    "frozen embedding nothing below the final norm has a graph. For models of transformers; generate with use_cache=False. "
    "target_modules is not used: the blocks are the model's.",
    modules=(nn.Module,),
    demo={"reduction": 4},
)
def build(targets: Targets, options: Options) -> None:
    config = getattr(targets.model, "config", None)
    names = _blocks(targets.model)
    if config is None or not names or not hasattr(config, "num_attention_heads"):
        raise ValueError("model: expected a transformer of transformers, with a config and a list of blocks")
    small = narrow_config(config, options.reduction)
    running = _Running()
    for number, name in enumerate(names):
        block = targets.model.get_submodule(name)
        like = next(p for p in block.parameters() if p.is_floating_point())
        made = QSTBlock(block, _side(block, small, number), options, config.hidden_size, like, number == len(names) - 1)
        made.__dict__.update(running=running, first=number == 0)
        targets.replacements[name] = made
