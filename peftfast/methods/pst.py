"""PST: a weight that grows sparse while it is tuned, by scores of its own magnitude and of low-rank matrices that data train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Runtime, Targets
from .composed import ComposedLinear
from .registry import Paper, at_least_one, probability, register


@dataclass(frozen=True)
class Options:
    """total_steps: of the training. weight_rank, mask_rank: of the low-rank change of the weight and of its scores. weight_beta,
    mask_alpha1, mask_alpha2: factors of the change, of the low-rank scores and of those of rows and columns. sparsity: part of each
    weight that is 0 in the end, initial_sparsity at first. initial_warmup, final_warmup: parts of the training before it rises and
    after it has risen."""

    total_steps: int = 1000
    weight_rank: int = 8
    weight_beta: float = 1.0
    mask_rank: int = 8
    mask_alpha1: float = 1.0
    mask_alpha2: float = 1.0
    sparsity: float = 0.9
    initial_sparsity: float = 0.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3

    def __post_init__(self) -> None:
        for name in ("total_steps", "weight_rank", "mask_rank"):
            at_least_one(name, getattr(self, name))
        for name in ("sparsity", "initial_sparsity", "initial_warmup", "final_warmup"):
            probability(name, getattr(self, name))
        if self.initial_warmup + self.final_warmup >= 1:
            raise ValueError(f"final_warmup: expected less than 1 with initial_warmup, got {self.final_warmup!r}")

    def sparsity_at(self, step: int) -> float:
        """After ``step`` steps: cubic from the initial to the final between the warm-ups."""
        start, end = self.initial_warmup * self.total_steps, (1 - self.final_warmup) * self.total_steps
        if step <= start:
            return self.initial_sparsity
        if step > end:
            return self.sparsity
        left = 1 - (step - start) / (end - start)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * left**3


class _Keep(torch.autograd.Function):
    """1 for all but the ``count`` lowest scores, of equal ones the first; the gradient of the mask is that of the scores."""

    @staticmethod
    def forward(scores: Tensor, count: int) -> Tensor:
        if count == 0:
            return torch.ones_like(scores)
        flat = scores.reshape(-1)
        bar = torch.kthvalue(flat, count).values  # without sorting all of them
        below, equal = flat < bar, flat == bar
        lowest = below | (equal & (equal.cumsum(0) <= count - below.sum()))
        return (~lowest).to(scores.dtype).reshape(scores.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class PSTLinear(ComposedLinear):
    """y = x (m ∘ V)ᵀ, V = W + beta U_w V_w; m = 1 but for the lowest scores |V| + alpha1 A B + alpha2 (R + C)."""

    pruned: Tensor

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        n, k, self.options = self.out_features, self.in_features, options
        self.weight_U, self.weight_V = (
            self.new_parameter(n, options.weight_rank),
            self.new_parameter(options.weight_rank, k),
        )
        self.mask_A, self.mask_B = self.new_parameter(n, options.mask_rank), self.new_parameter(options.mask_rank, k)
        self.mask_R, self.mask_C = self.new_parameter(n), self.new_parameter(k)
        nn.init.normal_(self.weight_U)
        nn.init.normal_(self.mask_A)
        self.register_buffer("pruned", torch.tensor(0, dtype=torch.int64))
        self.prune(options.initial_sparsity)

    def prune(self, sparsity: float) -> None:
        """Let that part of the weight be 0 from now on."""
        self.count = int(self.in_features * self.out_features * sparsity)
        self.pruned.fill_(self.count)

    def changed(self) -> Tensor:
        """V ``[N, K]``."""
        return self.dense_weight() + self.options.weight_beta * (self.weight_U @ self.weight_V)

    def scores(self, changed: Tensor) -> Tensor:
        """Of each entry of V ``[N, K]``."""
        by_data = self.options.mask_alpha1 * (self.mask_A @ self.mask_B)
        return changed.abs() + by_data + self.options.mask_alpha2 * (self.mask_R[:, None] + self.mask_C)

    def composed(self) -> Tensor:
        changed = self.changed()
        mask: Tensor = _Keep.apply(self.scores(changed), self.count)  # type: ignore[no-untyped-call]
        return mask * changed

    def after_load(self) -> None:
        self.count = int(self.pruned)


class PSTRuntime(Runtime):
    """Raises the sparsity with the steps."""

    def __init__(self, layers: list[PSTLinear], options: Options) -> None:
        self.layers, self.options = layers, options

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        for layer in self.layers:
            layer.prune(self.options.sparsity_at(step))

    def state_dict(self) -> dict[str, Any]:
        return {"counts": [layer.count for layer in self.layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for layer, count in zip(self.layers, state["counts"], strict=True):
            layer.count = count
            layer.pruned.fill_(count)


@register(
    "pst",
    paper=Paper("Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", "Li et al.", 2022, "2205.11005"),
    formula="y = x (m * V)^T, V = W + beta U_w V_w; m = 0 on the lowest |V| + alpha1 A B + alpha2 (R + C), a part of each weight "
    "that "
    "rises with the cube of time; gradients pass straight through to the scores",
    options=Options,
    reduces_to="torch's product with a masked weight",
    kind="moving",
    fused="nothing: torch finds the lowest scores and puts the mask on at each forward",
    choices="As in the authors' code: U_w and A begin normal, the other matrices at 0; the magnitude of V in the scores has a "
    "gradient "
    "too; the lowest scores are taken in each weight by itself. The model keeps its shapes and its dense weights: merge() leaves "
    "zeros in a dense weight. Files hold the matrices and the count of zeros.",
    demo={"sparsity": 0.5},
    learning_rate=2e-4,  # U_w is normal: at ten times that the first steps move a weight by a seventh of its size
)
def build(targets: Targets, options: Options) -> PSTRuntime:
    layers: list[PSTLinear] = []

    def make(name: str, linear: nn.Linear) -> PSTLinear:
        layers.append(PSTLinear(linear, options))
        return layers[-1]

    targets.replace(make)
    return PSTRuntime(layers, options)
