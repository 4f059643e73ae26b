"""MoSA ("Split & Merge"): an adapter is split into parts that do not overlap; a step trains one of them, evaluation
takes all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapting import Targets
from .factored import Factors
from .low_rank import LowRankLinear
from .passes import wide
from .registry import Paper, above_zero, at_least_one, one_of, register
from .watching import Watching, inputs_of, logits_of


@dataclass(frozen=True)
class Options:
    """r: rank. lora_alpha: scaling is lora_alpha / r. parts: how many A and B are split into. share: which of them is
    not split, "down" for A, "up" for B, "none". reg_weight: of the divergence of two draws' predictions; with 0 there
    is no second pass. seed: of the split and the draws."""

    r: int = 16
    lora_alpha: float = 16.0
    parts: int = 4
    share: str = "down"
    reg_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)
        at_least_one("parts", self.parts)
        one_of("share", self.share, ("down", "up", "none"))
        if not 0.0 <= self.reg_weight < float("inf"):
            raise ValueError(f"reg_weight: expected at least 0, got {self.reg_weight!r}")


class MoSALinear(LowRankLinear):
    """y = x (W + s (M_b ∘ B) (M_a ∘ A))ᵀ in training, W + s B A in evaluation. ``owner_A`` ``[r, K]`` and ``owner_B``
    ``[N, r]`` say of which part an entry is, and ``drawn`` ``[2]`` which part of A and of B acts: a draw is data, so
    that it compiles nothing."""

    owner_A: Tensor | None
    owner_B: Tensor | None
    drawn: Tensor

    def __init__(self, linear: nn.Module, options: Options, generator: torch.Generator) -> None:
        super().__init__(linear, options.r, options.lora_alpha)
        self.parts = options.parts
        split = {"down": "B", "up": "A", "none": "AB"}[options.share]
        for name, matrix in (("A", self.lora_A), ("B", self.lora_B)):
            count = matrix.numel()
            owner = torch.randperm(count, generator=generator) * options.parts // count
            owner = owner.reshape(matrix.shape).to(matrix.device, torch.uint8 if options.parts < 256 else torch.int64)
            self.register_buffer(f"owner_{name}", owner if name in split else None)
        self.register_buffer("drawn", torch.zeros(2, dtype=torch.int64, device=self.weight.device), persistent=False)

    def part(self, name: str) -> Tensor:
        """A or B with zeros in all parts but the drawn one."""
        matrix: Tensor = getattr(self, f"lora_{name}")
        owner: Tensor | None = getattr(self, f"owner_{name}")
        if owner is None:
            return matrix
        return torch.where(owner == self.drawn["AB".index(name)], matrix, torch.zeros_like(matrix))

    def factors(self) -> Factors:
        if self.training:
            return Factors(self.part("A"), self.part("B"), self.scaling)
        return Factors(self.lora_A, self.lora_B, self.scaling)

    def merged_weight(self) -> Tensor:
        return torch.addmm(self.dense_weight(), self.lora_B, self.lora_A, alpha=self.scaling)


class MoSARuntime(Watching):
    """Draws parts before each training pass, and compares the predictions of two draws."""

    def __init__(self, layers: dict[str, nn.Module], options: Options, generator: torch.Generator) -> None:
        super().__init__()
        self.layers: list[Any] = list(layers.values())
        self.options, self._generator = options, generator
        self.wants_output = options.reg_weight > 0

    def draw(self) -> None:
        """Another part of each layer's A and B."""
        parts = torch.randint(self.options.parts, (len(self.layers), 2), generator=self._generator)
        for layer, chosen in zip(self.layers, parts, strict=True):
            layer.drawn.copy_(chosen)

    def starting(self, model: nn.Module) -> None:
        if model.training:
            self.draw()

    def loss(self) -> Tensor | None:
        """reg_weight times half the sum of both divergences between the last pass's predictions and those of another
        draw."""
        seen = self.take()
        if seen is None or not self.options.reg_weight:
            return None
        if getattr(self.model, "is_gradient_checkpointing", False):
            # It computes the first pass again when the second draw's masks stand in the layers.
            raise ValueError("reg_weight: expected 0 with gradient checkpointing, which cannot keep two draws apart")
        self.draw()
        other = logits_of(self.run(seen.args, inputs_of(seen.kwargs, self.model), training=True))
        logits = logits_of(seen.output)
        one, two = (torch.log_softmax(wide(z).reshape(-1, z.shape[-1]), -1) for z in (logits, other))
        apart = functional.kl_div(one, two.detach(), reduction="batchmean", log_target=True)
        apart = apart + functional.kl_div(two, one.detach(), reduction="batchmean", log_target=True)
        return self.options.reg_weight * apart / 2

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


@register(
    "mosa",
    paper=Paper("MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", "Zhang et al.", 2023, "2312.02923"),
    formula="y = x (W + (alpha / r) (M * B) A)^T in training, M one of `parts` random masks that do not overlap; all "
    "of B in evaluation; loss + w (KL(p1 || p2) + KL(p2 || p1)) / 2 of two draws",
    options=Options,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward; masks are put on by torch; with the divergence a step is two passes",
    choices='First published as "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training". Of '
    "its adapters the LoRA form. "
    "As in the authors' code A is shared, a mask is a random quarter of B, the target of each divergence is held "
    "fixed, scaling is 1 and the sum of the parts is not rescaled. Parts are drawn once a pass for each layer; "
    "gradient checkpointing, which could not keep two draws apart, needs reg_weight=0.",
    demo={"r": 16, "lora_alpha": 16.0},
)
def build(targets: Targets, options: Options) -> MoSARuntime:
    generator = torch.Generator().manual_seed(options.seed)
    targets.replace(lambda name, linear: MoSALinear(linear, options, generator))
    return MoSARuntime(targets.replacements, options, generator)
