"""QST: a small network beside a frozen 4-bit one, trained on its activations without a backward pass through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets
from .registry import Paper, at_least_one, register
from .sidenet import BesideBlock, call_side, factory_of, narrow_config, put_beside, side_block, transformer_blocks


@dataclass(frozen=True)
class Options:
    """reduction: how many times narrower the side network is. r: rank of the factors that narrow a hidden state."""

    reduction: int = 16
    r: int = 16

    def __post_init__(self) -> None:
        at_least_one("reduction", self.reduction)
        at_least_one("r", self.r)


class QSTBlock(BesideBlock):
    """A frozen block, and the side network's step on what it gives.

    h_i = (1 - sigmoid(gate)) narrow(f_i) + sigmoid(gate) h_{i-1}, and h_i goes through ``side``, a block of the same class
    with its widths
    divided; f_i is the frozen block's output. ``narrow`` is two matrices, ``down`` ``[r, d]`` and ``up_small`` ``[d /
    reduction, r]``. The last
    block gives mix · f + (1 - mix) widen(h) in the place of f, with ``mix`` 1 at first.
    """

    def __init__(self, block: nn.Module, side: nn.Module, options: Options, width: int, last: bool) -> None:
        super().__init__(block)
        self.side = side
        factory = factory_of(block)
        small = width // options.reduction
        self.side.to(**factory)
        self.down = nn.Parameter(torch.randn(options.r, width, **factory) / width**0.5)
        self.up_small = nn.Parameter(torch.randn(small, options.r, **factory) / options.r**0.5)
        self.gate = nn.Parameter(torch.zeros((), **factory))
        if last:
            self.widen = nn.Parameter(torch.randn(width, small, **factory) / small**0.5)
            self.mix = nn.Parameter(torch.ones((), **factory))

    def beside(self, hidden: Tensor, out: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        frozen = out.to(self.down.dtype)
        narrow = frozen @ self.down.T @ self.up_small.T
        before = self.running.state
        keep = torch.sigmoid(self.gate)
        # The first has no state before it: what it narrows stands for both.
        state = narrow if before is None else (1 - keep) * narrow + keep * before
        state = call_side(self.side, state, arguments, named)
        if not self.last:
            self.running.state = state
            return None
        return self.mix * frozen + (1 - self.mix) * (state @ self.widen.T)


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
    "kept. A hidden state is narrowed by two matrices of rank r. Gate and mix are numbers, as in the paper, g = 0 at first; in the "
    "authors' code they are vectors, g = 0.5 at first, the first block's state before it is the narrowed embedding (here its own "
    "narrowed output), and the side network has a last norm and is mixed in behind the model's. Beside a "
    "frozen embedding nothing below the final norm has a graph. For models of transformers; what the side network caches in "
    "generation lies behind the model's own layers in the same DynamicCache. target_modules is not used: the blocks are the model's.",
    modules=(nn.Module,),
    demo={"reduction": 4},
)
def build(targets: Targets, options: Options) -> None:
    config, names = transformer_blocks(targets)
    small = narrow_config(config, options.reduction)

    def make(number: int, block: nn.Module) -> QSTBlock:
        side = side_block(block, small, number, len(names))
        return QSTBlock(block, side, options, config.hidden_size, number == len(names) - 1)

    put_beside(targets, names, make)
