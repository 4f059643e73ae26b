"""SketchTune: a weight compressed into a few values a row, which are trained while their places stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets, Unsuitable
from .composed import ComposedLinear
from .registry import Paper, at_least_one, register


@dataclass(frozen=True)
class Options:
    """bits: 2^bits values in a table, 1 to 8. groups: tables a row. iterations: of the clustering."""

    bits: int = 4
    groups: int = 1
    iterations: int = 20

    def __post_init__(self) -> None:
        at_least_one("groups", self.groups)
        at_least_one("iterations", self.iterations)
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise ValueError(f"bits: expected 1 to 8, got {self.bits!r}")


class _Lookup(torch.autograd.Function):
    """table[row, code]; the gradient of a value is the sum over its places, in a fixed order."""

    @staticmethod
    def forward(table: Tensor, codes: Tensor) -> Tensor:
        return table.gather(1, codes.long())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.values = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        sums = [torch.where(codes == value, gradient, 0).sum(1) for value in range(ctx.values)]
        return torch.stack(sums, 1), None


@torch.no_grad()
def cluster(rows: Tensor, values: int, iterations: int) -> tuple[Tensor, Tensor]:
    """k-means of each row ``[P, Q]`` by itself, begun at its quantiles: (table ``[P, values]`` ascending, codes uint8 ``[P, Q]``)."""
    ordered = rows.sort(1).values
    at = ((torch.arange(values, device=rows.device) + 0.5) * rows.shape[1] / values).long().clamp(max=rows.shape[1] - 1)
    table = ordered[:, at].contiguous()
    for _ in range(iterations):
        codes = _nearest(rows, table)
        counts = torch.zeros_like(table).scatter_add_(1, codes, torch.ones_like(rows))
        sums = torch.zeros_like(table).scatter_add_(1, codes, rows)
        new = torch.where(counts > 0, sums / counts.clamp_min(1), table)
        if torch.equal(new, table):
            break
        table = new.sort(1).values
    return table, _nearest(rows, table).to(torch.uint8)


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    return torch.searchsorted(((table[:, 1:] + table[:, :-1]) / 2).contiguous(), rows.contiguous())


class SketchTuneLinear(ComposedLinear):
    """y = x W'ᵀ with W'[n, k] = table[n, g(k), codes[n, k]]; ``table`` ``[N, groups, 2^bits]`` is trained, ``codes`` uint8
    are fixed."""

    codes: Tensor

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        if self.in_features % options.groups:
            raise Unsuitable(f"its {self.in_features} inputs do not divide into {options.groups} groups")
        rows = self.dense_weight().reshape(self.out_features * options.groups, -1)
        table, codes = cluster(rows, 2**options.bits, options.iterations)
        self.table = nn.Parameter(table.reshape(self.out_features, options.groups, -1))
        self.register_buffer("codes", codes.reshape(self.out_features, self.in_features))

    def composed(self) -> Tensor:
        table = self.table.flatten(0, 1)
        found: Tensor = _Lookup.apply(table, self.codes.reshape(table.shape[0], -1))  # type: ignore[no-untyped-call]
        return found.reshape(self.out_features, self.in_features)


@register(
    "sketchtune",
    paper=Paper(
        "Sketch to Adapt: Fine-Tunable Sketches for Efficient LLM Adaptation", "Zhang et al.", 2024, "2410.06364"
    ),
    formula="y = x W'^T, W'[n, k] = table[n, g(k), code[n, k]]; the table [N, groups, 2^bits] trained, the codes fixed",
    options=Options,
    reduces_to="torch's product with a looked-up weight",
    kind="layer",
    fused="nothing: torch looks the weight up at each forward and sums the table's gradient, value by value in a fixed order",
    choices="The table and the codes come from a plain k-means of each row, begun at its quantiles; the paper weights the "
    "errors by the "
    "inverse of a Hessian from calibration data. The base weight stays in the model beside them.",
    exact=False,
    demo={"groups": 2},
    learning_rate=1e-3,
)
def build(targets: Targets, options: Options) -> None:
    targets.replace(lambda name, linear: SketchTuneLinear(linear, options))
