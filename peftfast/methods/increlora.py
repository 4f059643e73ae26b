"""IncreLoRA: layers begin at a small rank, and those of the largest importance get more, up to a budget that all share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Runtime, Targets, Unsuitable, is_four_bit
from .factored import FactoredLinear, Factors
from .growing import OwnAge, largest
from .registry import Paper, above_zero, at_least_one, probability, register

RESERVED = 1e-5  # the fixed singular value of a component that learns in advance


@dataclass(frozen=True)
class Options:
    """init_r: rank at first. target_r: average rank at the end. max_r: a layer's room. lora_alpha: scaling is lora_alpha / rank.
    top_h: layers that grow at a time. incre_r: by how much. interval: steps between. warmup: steps before the first.
    advance: whether the next components learn before they are needed. beta1, beta2: of the running means of importance and
    uncertainty. orth_reg_weight: of the penalty."""

    init_r: int = 1
    target_r: int = 8
    max_r: int = 32
    lora_alpha: float = 16.0
    top_h: int = 8
    incre_r: int = 1
    interval: int = 10
    warmup: int = 0
    advance: bool = True
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("init_r", "target_r", "max_r", "top_h", "incre_r", "interval"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)
        for name in ("beta1", "beta2"):
            probability(name, getattr(self, name))
        if not self.init_r <= self.target_r <= self.max_r:
            raise ValueError(f"target_r: expected init_r to max_r, {self.init_r} to {self.max_r}, got {self.target_r}")
        if self.warmup < 0 or self.orth_reg_weight < 0:
            raise ValueError("warmup and orth_reg_weight: expected at least 0")


class IncreLoRALinear(FactoredLinear):
    """y = x (W + (alpha / rank) B diag(E) A)ᵀ with room for max_r components, of which the first ``rank`` are in use and ``reserve``
    more learn with a fixed E. Both counts are data: a rank that changes compiles nothing."""

    rank: Tensor
    reserve: Tensor
    position: Tensor

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        if is_four_bit(linear):
            raise Unsuitable("IncreLoRA's importance needs the gradient of a dense weight")
        super().__init__(linear)
        room = options.max_r + options.incre_r
        self.lora_alpha = options.lora_alpha
        self.lora_A, self.lora_E = self.new_parameter(room, self.in_features), self.new_parameter(room, 1)
        self.lora_B = self.new_parameter(self.out_features, room)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        device = self.weight.device
        self.register_buffer("rank", torch.tensor(options.init_r, device=device))
        self.register_buffer("reserve", torch.tensor(options.incre_r if options.advance else 0, device=device))
        self.register_buffer("position", torch.arange(room, device=device), persistent=False)
        self.scored = True
        self.score: Tensor | None = None

    def singular_values(self) -> Tensor:
        """E as it acts, ``[room, 1]``, the scaling included."""
        position = self.position[:, None]
        fixed = torch.where(position < self.rank + self.reserve, RESERVED, 0.0).to(self.lora_E.dtype)
        acting = torch.where(position < self.rank, self.lora_E, fixed)
        return acting * (self.lora_alpha / (self.rank + 1e-5)).to(acting.dtype)

    def factors(self) -> Factors:
        weight = None
        if self.training and self.scored and torch.is_grad_enabled():
            # Its gradient is that of the whole update, of which the score is made; it is freed as soon as that is done.
            weight = self.base_layer.weight.detach().requires_grad_()
            weight.register_post_accumulate_grad_hook(self._take_score)
        return Factors(self.lora_A * self.singular_values(), self.lora_B, weight=weight)

    @torch.no_grad()
    def _take_score(self, weight: Tensor) -> None:
        gradient: Any = weight.grad
        update = self.lora_B @ (self.lora_A * self.singular_values())
        self.score = (update * gradient).abs().sum() / update.numel() ** 0.5
        weight.grad = None


class IncreLoRARuntime(Runtime):
    """Importance, growth and penalty."""

    def __init__(self, layers: dict[str, nn.Module], options: Options) -> None:
        self.layers: dict[str, Any] = layers
        self.options = options
        self.means: dict[str, Tensor] = {}
        self.uncertainties: dict[str, Tensor] = {}
        parts = ("lora_A", "lora_E", "lora_B")
        self.ages = OwnAge([getattr(layer, part) for layer in self.layers.values() for part in parts])
        self._set_scored()

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> rank now."""
        return {path: int(layer.rank) for path, layer in self.layers.items()}

    def _left(self) -> int:
        return self.options.target_r * len(self.layers) - sum(self.ranks.values())

    def _set_scored(self) -> None:
        for layer in self.layers.values():
            layer.scored = self._left() > 0

    def loss(self) -> Tensor | None:
        """orth_reg_weight times the mean of ||A Aᵀ - I|| and ||Bᵀ B - I|| over the components in use and in reserve."""
        if not self.options.orth_reg_weight:
            return None
        terms = []
        for layer in self.layers.values():
            used = layer.position < layer.rank + layer.reserve
            both = used[:, None] & used
            for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
                identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
                terms.append(torch.linalg.norm(torch.where(both, gram - identity, torch.zeros_like(gram))))
        return self.options.orth_reg_weight * torch.stack(terms).mean()

    @torch.no_grad()
    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.ages.correct(step, optimizer)
        given = self.options
        if next(iter(self.layers.values())).scored:
            self._observe()
            if step > given.warmup and step % given.interval == 0:
                self._grow(step)
        self.ages.remember()

    def _observe(self) -> None:
        for path, layer in self.layers.items():
            if layer.score is not None:
                zero = torch.zeros_like(layer.score)
                self.means[path] = self.means.get(path, zero).lerp(layer.score, 1 - self.options.beta1)
                away = (layer.score - self.means[path]).abs()
                self.uncertainties[path] = self.uncertainties.get(path, zero).lerp(away, 1 - self.options.beta2)

    def _grow(self, step: int) -> None:
        given, left = self.options, self._left()
        scores = {path: self.means[path] * self.uncertainties[path] for path in self.means}
        rooms = {path: int(self.layers[path].rank) + given.incre_r <= given.max_r for path in scores}
        for path in largest(scores, min(given.top_h, -(-left // given.incre_r)), rooms):
            layer = self.layers[path]
            position = layer.position
            first = layer.rank.clone()
            layer.rank += given.incre_r
            grown = (position >= first) & (position < layer.rank)
            layer.lora_E.masked_fill_(grown[:, None], RESERVED if given.advance else 0.0)
            self.ages.born(layer.lora_E, grown[:, None], step)
            fresh = (position >= layer.rank) & (position < layer.rank + layer.reserve) if given.advance else grown
            self.ages.born(layer.lora_A, fresh[:, None], step)
            self.ages.born(layer.lora_B, fresh[None], step)
        self._set_scored()
        if self._left() <= 0:
            for layer in self.layers.values():
                layer.reserve.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "uncertainties": self.uncertainties, "ages": self.ages.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means, self.uncertainties = (
            {path: one.to(self.layers[path].lora_E.device) for path, one in state[name].items()}
            for name in ("means", "uncertainties")
        )
        self.ages.load_state_dict(state["ages"])
        self._set_scored()


@register(
    "increlora",
    paper=Paper(
        "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
        "Zhang et al.",
        2023,
        "2308.12043",
    ),
    formula="y = x (W + (alpha / rank) B diag(E) A)^T; every interval the top_h layers of largest score get incre_r more: I u, "
    "I the running mean of sum |dW * dL/dW| / sqrt(N K), u that of its distance from I",
    options=Options,
    reduces_to="lora with A' = diag(E) A at max_r",
    kind="moving",
    fused="the layer, forward and backward, at the largest rank; while it grows also the dense gradient that importance is made of",
    choices="A layer has room for max_r components, so that shapes, compiled code and the optimiser's states stay; components not "
    "in use count among the trained numbers and have no gradient. A grown component steps as under an Adam of its own age. The layers "
    "of largest score grow, ties by order. The learning rate is not warmed up again for them. The penalty is of all components of a "
    "layer together; the authors' code takes "
    "each grown piece by itself.",
    exact=False,
    demo={"max_r": 32, "target_r": 16, "init_r": 4, "incre_r": 2, "top_h": 18, "interval": 2},
    learning_rate=5e-3,
)
def build(targets: Targets, options: Options) -> Runtime:
    targets.replace(lambda name, linear: IncreLoRALinear(linear, options))
    return IncreLoRARuntime(targets.replacements, options)
