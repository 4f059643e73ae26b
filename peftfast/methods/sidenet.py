"""Networks beside a frozen transformer: its blocks run without a graph, and what is trained reads what they give."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets


class Running:
    """What the blocks of a model hand on during the forward pass that is under way; nothing of it is copied or saved."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.features: list[Tensor] = []

    def begin(self) -> None:
        """A forward pass begins."""
        self.state, self.features = None, []

    def __getstate__(self) -> dict[str, Any]:
        return {"state": None, "features": []}


class BesideBlock(nn.Module):
    """A frozen block, ``base_layer``, of which a method reads what it gives. A method overrides :meth:`beside`.

    Attributes:
        number: of the block, from 0. last: whether it is the model's last. running: shared by the model's blocks.
    """

    number: int
    last: bool
    running: Running

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.base_layer = block
        self.number, self.last = 0, False
        self.__dict__["running"] = Running()

    def __getattr__(self, name: str) -> Any:
        # Models ask their blocks for what they are, such as a kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def beside(self, hidden: Tensor, out: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        """What stands in the place of the block's output, None: the output itself.

        Args:
            hidden, out: what the block got and gave ``[..., d]``, without a graph.
            arguments, named: the block's other arguments.
        """
        raise NotImplementedError

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            found = self.base_layer(hidden, *arguments, **named)
        out = found[0] if isinstance(found, tuple) else found
        if self.number == 0:
            self.running.begin()
        replaced = self.beside(hidden.detach(), out.detach(), arguments, named)
        if self.last:
            self.running.begin()
        if replaced is None:
            return found
        replaced = replaced.to(out.dtype)
        return (replaced, *found[1:]) if isinstance(found, tuple) else replaced


def factory_of(block: nn.Module) -> dict[str, Any]:
    """Device and dtype of what is trained beside a block: float64 beside float64, else float32."""
    like = next(p for p in block.parameters() if p.is_floating_point())
    return {"device": like.device, "dtype": torch.float64 if like.dtype == torch.float64 else torch.float32}


def call_side(side: nn.Module, state: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """A side block on ``state``, with the arguments of the block that it stands beside, keys and values in the same cache.

    Raises:
        ValueError: tokens before these are in a cache that has no room for the side block's.
    """

    def taken(value: Any) -> Any:
        if hasattr(value, "get_seq_length"):  # a cache
            return value if _make_room(value, side, state.shape[1]) else None
        return _as(value, state.dtype)

    found = side(state, *map(taken, arguments), **{name: taken(value) for name, value in named.items()})
    return found[0] if isinstance(found, tuple) else found


def _make_room(cache: Any, side: nn.Module, tokens: int) -> bool:
    """A place in the model's cache for a side block's keys and values, behind those of all blocks: so they are reordered and cut off
    with them. False: a cache that does not simply grow, with nothing in it before these tokens."""
    from transformers.cache_utils import DynamicLayer

    modules: list[Any] = list(side.modules())
    index = max((int(module.layer_idx) for module in modules if hasattr(module, "layer_idx")), default=-1)
    layers = getattr(cache, "layers", None)
    if index < 0 or layers is None or any(type(layer) is not DynamicLayer for layer in layers):
        if int(cache.get_seq_length()) > tokens:
            raise ValueError(
                "past_key_values: a side network needs a DynamicCache of full attention, or use_cache=False"
            )
        return False
    while len(layers) <= index:
        layers.append(DynamicLayer())
    return True


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, such as masks and rotary angles, in the side network's dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_as(one, dtype) for one in value) if isinstance(value, tuple) else value


FOR_EACH_HEAD = ("position_bias", "alibi")  # T5's and MPT's, BLOOM's
WIDTHS = ("hidden_size", "intermediate_size", "ffn_dim", "num_attention_heads", "num_key_value_heads")


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


def transformer_blocks(targets: Targets) -> tuple[Any, list[str]]:
    """The model's config and the paths of its blocks, the longest run of numbered modules of one class.

    Raises:
        ValueError: no model of transformers.
    """
    names = block_names(targets.model)
    config = getattr(targets.model, "config", None)
    if config is None or not names or not hasattr(config, "num_attention_heads"):
        raise ValueError("model: expected a transformer of transformers, with a config and a list of blocks")
    return config, names


def block_names(model: nn.Module) -> list[str]:
    """Paths of the longest run of numbered modules of one class, empty where there is none."""
    best: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best) and len({type(one) for one in module}) == 1:
            best = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
    return best


def side_block(block: nn.Module, config: Any, number: int, count: int) -> nn.Module:
    """A block of the same class, drawn at random by transformers' rules, with ``config``'s widths. ``count``: of the model's blocks,
    behind whose keys and values in a cache its own go.

    Raises:
        ValueError: a block is given a number for each of the model's heads, of which the side block has fewer.
    """
    given = next((name for name in FOR_EACH_HEAD if name in inspect.signature(type(block).forward).parameters), None)
    if given is not None:
        raise ValueError(
            f"model: {type(block).__name__} is given {given}, of each of the model's heads, which a side block of fewer cannot take"
        )
    takes = inspect.signature(type(block).__init__).parameters
    made: nn.Module = type(block)(config, layer_idx=number) if "layer_idx" in takes else type(block)(config)
    for module in made.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = count + number  # type: ignore[assignment]
    return made


def put_beside(targets: Targets, names: list[str], make: Callable[[int, nn.Module], BesideBlock]) -> None:
    """``make(number, block)`` in the place of each block."""
    running = Running()
    for number, name in enumerate(names):
        made = make(number, targets.model.get_submodule(name))
        made.number, made.last = number, number == len(names) - 1
        made.__dict__["running"] = running
        targets.replacements[name] = made
