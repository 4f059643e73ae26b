"""LQ-LoRA: a 4-bit part and a low-rank part found in turns, weighted by Fisher information, the bits of each layer by an integer
programme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing
from ..nn import LoRALinear
from .adapting import Targets, Unsuitable, is_four_bit
from .initialised import check_rank, dense_weight, placeholder, quantised_lora, scaling_of
from .loftq import decoded
from .lora import LoRAOptions
from .passes import fisher
from .registry import Paper, above_zero, at_least_one, register
from .spectral import truncated_svd

BLOCKS = (32, 64, 128, 256, 512, 1024)
SMALLEST_WEIGHT = 1e-6  # of the mean, for rows and columns that no gradient reached


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r, lora_alpha, lora_dropout: as in LoRA. budget: bits a weight, over all layers. use_fisher: weigh errors by it, which reads
    data.
    iterations: of quantising and SVD, at most; they end where the error grows. cost_iterations: the same while costs are compared."""

    r: int = 64
    lora_alpha: float = 64.0
    budget: float = 4.25
    use_fisher: bool = True
    iterations: int = 10
    cost_iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("budget", self.budget)
        at_least_one("iterations", self.iterations)
        at_least_one("cost_iterations", self.cost_iterations)


def bits(block_size: int, double_quant: bool) -> float:
    """Storage of NF4 in bits a weight: 4, and a block's maximum in float32, or in a byte with a float32 for 256 of them."""
    return 4 + (8 + 32 / 256 if double_quant else 32) / block_size


CONFIGURATIONS = tuple((block, nested) for block in BLOCKS for nested in (True, False))


def weighted_svd(matrix: Tensor, weights: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(L1 ``[N, r]``, L2 ``[r, K]``) of the product nearest ``matrix`` where errors are weighted by ``weights`` ``[N, K]``, taken
    as the product of the roots of their row and column means."""
    if weights is None or not bool(weights.any()):
        u, s, v = truncated_svd(matrix, rank)
        return u * s.sqrt(), s.sqrt()[:, None] * v
    least = weights.mean() * SMALLEST_WEIGHT
    rows = (weights.mean(1, keepdim=True) + least).sqrt()
    columns = (weights.mean(0, keepdim=True) + least).sqrt()
    u, s, v = truncated_svd(rows * matrix * columns, rank)
    return u * s.sqrt() / rows, s.sqrt()[:, None] * v / columns


def decompose(
    weight: Tensor, weights: Tensor | None, rank: int, block_size: int, double_quant: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(L1, L2, what NF4 is to hold, weighted squared error) of weight ≈ NF4(..) + L1 L2, the best of the iterations."""
    best: tuple[Tensor, Tensor, Tensor, float] | None = None
    quantised = torch.zeros_like(weight)
    for _ in range(iterations):
        left, right = weighted_svd(weight - quantised, weights, rank)
        rest = weight - left @ right
        quantised = decoded(rest, block_size, double_quant)
        wrong = (rest - quantised).square()
        error = float((wrong if weights is None else wrong * weights).sum(dtype=torch.float64))
        if best is not None and error >= best[3]:
            break
        best = left, right, rest, error
    if best is None:
        raise ValueError("iterations: expected at least 1")
    return best


def assign(costs: list[list[float]], storage: list[list[float]], budget: float) -> list[int]:
    """One configuration a layer, by number, of the least summed cost with a summed storage of at most ``budget``: an integer linear
    programme, by scipy's HiGHS.

    Raises:
        ModuleNotFoundError: scipy is not installed. ValueError: no choice fits into the budget.
    """
    import numpy as np

    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ModuleNotFoundError:
        raise missing("lq-lora", "scipy") from None

    cost, bytes_ = np.asarray(costs), np.asarray(storage)
    layers, kinds = cost.shape
    one_each = np.kron(np.eye(layers), np.ones((1, kinds)))
    found = milp(
        c=cost.ravel() / max(float(np.abs(cost).max()), 1e-300),
        constraints=[
            LinearConstraint(bytes_.reshape(1, -1) / max(budget, 1e-300), -np.inf, 1.0),
            LinearConstraint(one_each, 1, 1),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        least = float(bytes_.min(1).sum())
        raise ValueError(f"budget: {budget:.0f} bits are fewer than any choice takes, {least:.0f} at least")
    return [int(k) for k in found.x.reshape(layers, kinds).argmax(1)]


@register(
    "lq-lora",
    paper=Paper(
        "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
        "Guo et al.",
        2023,
        "2311.12023",
    ),
    formula="y = x (Q + s B A)^T; min ||F^(1/2) * (W - Q - s B A)|| by turns: weighted SVD of W - Q, Q = NF4(W - s B A); block "
    "sizes by a programme: least summed error within the budget of bits",
    options=Options,
    reduces_to="nf4 + lora",
    kind="initialisation",
    fused="quantisation, and the layer, forward and backward",
    choices="Configurations are those that NF4's kernels store: 4 bits, blocks of 32 to 1024, maxima in float32 or nested, 4.01 to "
    "5 bits a weight; the paper's 2, 3 and 8 bits are not served. SVDs are exact, and the best iteration is kept. An example of the "
    "Fisher information is an entry of the first dimension of a layer's input. Costs are taken after cost_iterations. Files hold Q.",
    exact=False,
    reads_data=True,
    demo={"r": 16, "lora_alpha": 16.0, "iterations": 2},
    learning_rate=1e-3,
)
def build(targets: Targets, options: Options) -> None:
    if targets.restoring:
        targets.replace(lambda name, linear: _empty(linear, options))
        return
    for name, module in list(targets.modules.items()):
        if is_four_bit(module):
            targets.skip(name, "lq-lora starts from the weight before it is quantised, and this one is in 4 bits")
            continue
        try:
            check_rank(module, options.r)
        except Unsuitable as reason:
            targets.skip(name, str(reason))
    found: dict[str, Any] = fisher(targets, "lq-lora: Fisher information") if options.use_fisher else {}
    costs, storage, total = [], [], 0
    for name, module in targets.progress(list(targets.modules.items()), "lq-lora: costs"):
        weight = dense_weight(module).float()
        row = [
            decompose(weight, found.get(name), options.r, block, nested, options.cost_iterations)[3]
            for block, nested in CONFIGURATIONS
        ]
        costs.append(row)
        storage.append([bits(block, nested) * weight.numel() for block, nested in CONFIGURATIONS])
        total += weight.numel()
    if not targets.modules:
        return
    chosen = dict(zip(targets.modules, assign(costs, storage, options.budget * total), strict=True))

    def make(name: str, linear: nn.Linear) -> LoRALinear:
        block, nested = CONFIGURATIONS[chosen[name]]
        weight = dense_weight(linear).float()
        left, right, rest, _ = decompose(weight, found.get(name), options.r, block, nested, options.iterations)
        return quantised_lora(linear, rest, options, right, left / scaling_of(options), block, nested)

    targets.replace(make)


def _empty(linear: Any, options: Options) -> LoRALinear:
    if is_four_bit(linear):
        return placeholder(linear, options)
    a = torch.zeros(options.r, linear.in_features)
    return quantised_lora(
        linear, dense_weight(linear), options, a, torch.zeros(linear.out_features, options.r), 64, True
    )
