"""SketchTune: a weight compressed into a few values a row, which are trained while their places stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Targets, Unsuitable
from .composed import ComposedLinear
from .passes import second_moments
from .registry import Paper, above_zero, at_least_one, register


@dataclass(frozen=True)
class Options:
    """bits: 2^bits values in a table, 1 to 8. groups: tables a row. iterations: of the clustering. exponent: p of the weights of
    errors, d^-p with d from the inverse Hessian of calibration data; 0: all alike, and no data. damping: part of its mean diagonal
    that is added to the Hessian."""

    bits: int = 4
    groups: int = 1
    iterations: int = 20
    exponent: float = 4.0
    damping: float = 0.1

    def __post_init__(self) -> None:
        at_least_one("groups", self.groups)
        at_least_one("iterations", self.iterations)
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise ValueError(f"bits: expected 1 to 8, got {self.bits!r}")
        above_zero("damping", self.damping)
        if not 0.0 <= self.exponent < float("inf"):
            raise ValueError(f"exponent: expected a number of at least 0, got {self.exponent!r}")


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
def cluster(rows: Tensor, values: int, iterations: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k-means of each row ``[P, Q]`` by itself, begun at its quantiles: (table ``[P, values]`` ascending, codes uint8 ``[P, Q]``).
    ``weights`` ``[P, Q]``, at least 0: of the squared errors."""
    ordered = rows.sort(1).values
    at = ((torch.arange(values, device=rows.device) + 0.5) * rows.shape[1] / values).long().clamp(max=rows.shape[1] - 1)
    table = ordered[:, at].contiguous()
    weights = torch.ones_like(rows) if weights is None else weights
    for _ in range(iterations):
        codes = _nearest(rows, table)
        totals = torch.zeros_like(table).scatter_add_(1, codes, weights)
        sums = torch.zeros_like(table).scatter_add_(1, codes, weights * rows)
        new = torch.where(totals > 0, sums / torch.where(totals > 0, totals, 1), table)
        if torch.equal(new, table):
            break
        table = new.sort(1).values
    return table, _nearest(rows, table).to(torch.uint8)


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    return torch.searchsorted(((table[:, 1:] + table[:, :-1]) / 2).contiguous(), rows.contiguous())


def inverse_root(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(order, U): the inputs ``[K]`` by falling second moments, and ``[K, K]``, upper triangular, of Uᵀ U = H⁻¹ in that order. H is the
    second moment of x with ``damping`` of its mean diagonal added, and 1 where x is always 0."""
    hessian = moment.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    return order, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


@torch.no_grad()
def assign(weight: Tensor, table: Tensor, order: Tensor, root: Tensor, block: int = 128) -> Tensor:
    """Codes uint8 ``[N, K]`` of ``weight`` in ``table`` ``[N, groups, values]``, input by input in that order: each takes its nearest
    value, and the inputs after it make up for the error as they best can, by the inverse Hessian's ``root``."""
    work = weight.to(root.dtype)[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    inputs = weight.shape[1]
    groups = (order // (inputs // table.shape[1])).tolist()
    middles = ((table[..., 1:] + table[..., :-1]) / 2).to(work.dtype).contiguous()
    values = table.to(work.dtype)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = torch.zeros(weight.shape[0], end - start, dtype=work.dtype, device=weight.device)
        for k in range(start, end):
            group = groups[k]
            code = torch.searchsorted(middles[:, group].contiguous(), work[:, k : k + 1].contiguous())
            codes[:, k] = code[:, 0].to(torch.uint8)
            error = (work[:, k : k + 1] - values[:, group].gather(1, code)) / root[k, k]
            work[:, k:end] -= error * root[k, k:end]
            errors[:, k - start] = error[:, 0]
        work[:, end:] -= errors @ root[start:end, end:]
    return codes[:, order.argsort()]


class SketchTuneLinear(ComposedLinear):
    """y = x W'ᵀ with W'[n, k] = table[n, g(k), codes[n, k]]; ``table`` ``[N, groups, 2^bits]`` is trained, ``codes`` uint8
    are fixed."""

    codes: Tensor

    def __init__(self, linear: nn.Linear, options: Options, moment: Tensor | None = None) -> None:
        super().__init__(linear)
        if self.in_features % options.groups:
            raise Unsuitable(f"its {self.in_features} inputs do not divide into {options.groups} groups")
        rows = self.dense_weight().reshape(self.out_features * options.groups, -1)
        weights = None
        if moment is not None:
            order, root = inverse_root(moment, options.damping)
            weights = torch.empty_like(moment[0], dtype=root.dtype)
            weights[order] = root.diagonal().pow(-options.exponent)
            weights = weights.to(rows)
            weights = (weights / weights.mean()).reshape(options.groups, -1).repeat(self.out_features, 1)
        table, codes = cluster(rows, 2**options.bits, options.iterations, weights)
        if moment is not None:
            codes = assign(self.dense_weight(), table.reshape(self.out_features, options.groups, -1), order, root)
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
    choices="As the authors' LeanQuant makes them, with the damping of their command: the table of a row by a k-means that weighs "
    "errors by d^-4, d the diagonal of the upper Cholesky factor of the inverse Hessian, then the codes input by input, those of "
    "large second moments first, later inputs making up for earlier errors; the k-means begins at the row's quantiles. With a "
    "damping of 0.01 few inputs may take a row's whole table, and the others' weights are cut off. exponent=0 is a plain k-means "
    "without data. The base weight stays in the model beside them.",
    exact=False,
    reads_data=True,
    demo={"groups": 2},
    learning_rate=5e-4,
)
def build(targets: Targets, options: Options) -> None:
    data = options.exponent > 0 and not targets.restoring
    found = second_moments(targets, "sketchtune: inputs") if data else {}
    targets.replace(lambda name, linear: SketchTuneLinear(linear, options, found.get(name)))
