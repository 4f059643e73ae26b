"""BA-LoRA: PiSSA with three penalties on the model's outputs, against drift from the pretrained model, collapse and
noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import pissa
from .adapting import AdapterHandle, Targets
from .passes import wide
from .registry import Paper, above_zero, at_least_one, one_of, probability, register
from .watching import Watching, inputs_of, logits_of

IGNORED = -100  # the label of tokens that no loss counts


@dataclass(frozen=True)
class Options(pissa.PissaOptions):
    """r, lora_alpha, lora_dropout, niter: as of pissa. lambda1, lambda2, lambda3: weights of consistency, diversity
    and the singular values. form: "nlg", penalties on distributions over tokens; "nlu", on a classifier's logits;
    "auto" by their shape. temperature: of the distributions whose divergence is taken. top_k_entropy: of the largest
    logits alone, 0: of all. svd_k: how many singular values are to hold the most. svd_norm: against what, "frobenius"
    or "nuclear". schedule: lambda1 falls to a tenth, the others set in. warmup_ratio, ramp_ratio: parts of the
    training before they do, and over which. total_steps: of the training."""

    lambda1: float = 0.025
    lambda2: float = 0.005
    lambda3: float = 0.005
    form: str = "auto"
    temperature: float = 2.0
    top_k_entropy: int = 20
    svd_k: int = 10
    svd_norm: str = "frobenius"
    schedule: bool = True
    warmup_ratio: float = 0.2
    ramp_ratio: float = 0.05
    total_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda1", "lambda2", "lambda3"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        one_of("form", self.form, ("auto", "nlg", "nlu"))
        one_of("svd_norm", self.svd_norm, ("frobenius", "nuclear"))
        one_of("schedule", self.schedule, (True, False))
        above_zero("temperature", self.temperature)
        for name in ("svd_k", "total_steps"):
            at_least_one(name, getattr(self, name))
        if self.top_k_entropy:
            at_least_one("top_k_entropy", self.top_k_entropy)
        for name in ("warmup_ratio", "ramp_ratio"):
            probability(name, getattr(self, name))


def singular_values(matrix: Tensor, count: int) -> Tensor:
    """The ``count`` largest singular values of ``matrix`` ``[M, D]``, ascending, with their gradient: that of ||uᵀ
    matrix|| at the singular vector u, which may be held fixed since the norm is stationary there."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    with torch.no_grad():
        vectors = torch.linalg.eigh(small @ small.T).eigenvectors[:, -count:]
    return torch.linalg.vector_norm(vectors.T @ small, dim=1)


def concentration(logits: Tensor, count: int, norm: str) -> Tensor:
    """Minus the part of the norm of ``logits`` ``[M, D]`` that its ``count`` largest singular values hold."""
    shorter = min(logits.shape)
    if norm == "nuclear":
        values = singular_values(logits, shorter)
        return -values[-count:].sum() / values.sum().clamp_min(1e-8)
    return -singular_values(logits, min(count, shorter)).sum() / torch.linalg.matrix_norm(logits).clamp_min(1e-8)


def classifier_terms(logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(consistency, diversity) of a classifier's logits ``[M, D]``: the mean square of the difference of the
    normalised rows; the squares of the covariances of different classes, over D, 0 for a single row."""
    consistency = functional.mse_loss(functional.normalize(logits, dim=-1), functional.normalize(before, dim=-1))
    if logits.shape[0] < 2:
        return consistency, torch.zeros_like(consistency)
    centred = logits - logits.mean(0)
    covariance = centred.T @ centred / (logits.shape[0] - 1)
    different = covariance - torch.diag(covariance.diagonal())
    return consistency, different.square().sum() / logits.shape[1]


def token_terms(logits: Tensor, before: Tensor, temperature: float, top: int) -> tuple[Tensor, Tensor]:
    """(consistency, diversity) of tokens' logits ``[M, D]``, means over the M: T² KL(before || now) at temperature T;
    minus the entropy of the ``top`` largest logits' distribution, of all with 0."""
    now, then = functional.log_softmax(logits / temperature, -1), functional.log_softmax(before / temperature, -1)
    consistency = temperature**2 * (then.exp() * (then - now)).sum(-1).mean()
    chosen = functional.log_softmax(logits.topk(min(top, logits.shape[-1]), -1).values if top else logits, -1)
    return consistency, (chosen.exp() * chosen).sum(-1).mean()


class BALoRARuntime(Watching):
    """The penalties. ``pretrained``: name -> what each trained parameter was when the model was adapted."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.pretrained: dict[str, Tensor] = {}
        self.done = 0

    def attach(self, handle: AdapterHandle) -> None:
        super().attach(handle)
        self.pretrained = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> tuple[float, float, float]:
        """lambda1, lambda2 and lambda3 of the step that comes."""
        given = self.options
        if not given.schedule:
            return given.lambda1, given.lambda2, given.lambda3
        part = min(1.0, self.done / given.total_steps)
        first = given.lambda1 * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))
        start, ramp = int(given.warmup_ratio * given.total_steps), max(1, int(given.ramp_ratio * given.total_steps))
        focus = min(1.0, max(0.0, (self.done - start) / ramp))
        return first, focus * given.lambda2, focus * given.lambda3

    def penalty(self, logits: Tensor, before: Tensor, labels: Any = None) -> Tensor:
        """Of logits ``[.., D]`` against the pretrained model's; of labels of the same leading shape, -100 leaves a
        token out."""
        given = self.options
        classifier = logits.dim() == 2 if given.form == "auto" else given.form == "nlu"
        flat, other = (wide(one).reshape(-1, one.shape[-1]) for one in (logits, before))
        if not classifier and isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
            keep = labels.reshape(-1) != IGNORED
            flat, other = flat[keep], other[keep]
        if not flat.numel():
            return logits.sum() * 0.0
        if classifier:
            consistency, diversity = classifier_terms(flat, other)
        else:
            consistency, diversity = token_terms(flat, other, given.temperature, given.top_k_entropy)
        first, second, third = self.weights()
        total = first * consistency + second * diversity
        return total + third * concentration(flat, given.svd_k, given.svd_norm) if third else total

    def loss(self) -> Tensor | None:
        """The penalty of the last training pass; the pretrained model's logits are those of a pass with the initial
        parameters."""
        seen = self.take()
        if seen is None:
            return None
        own = dict(self.model.named_parameters())
        self.pretrained = {name: tensor.to(own[name].device) for name, tensor in self.pretrained.items()}
        before = self.run(seen.args, inputs_of(seen.kwargs, self.model), parameters=self.pretrained)
        return self.penalty(logits_of(seen.output), logits_of(before), seen.kwargs.get("labels"))

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.done = step

    def state_dict(self) -> dict[str, Any]:
        return {"pretrained": self.pretrained, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pretrained, self.done = dict(state["pretrained"]), state["done"]


@register(
    "ba-lora",
    paper=Paper(
        "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models",
        "Chang, Chang, Wu",
        2024,
        "2408.04556",
    ),
    formula="y as pissa; loss + l1 T^2 KL(p0 || p) - l2 H(p) - l3 (s_1 + .. + s_k) / ||Z|| of the logits Z with "
    "singular values s; of a classifier l1 MSE(z / |z|, z0 / |z0|) + l2 sum over i != j of Cov(Z)_ij^2 / D in the "
    "place of the first two",
    options=Options,
    reduces_to="lora; nf4 + lora on a 4-bit base",
    kind="initialisation",
    fused="the layer, forward and backward; a second pass without gradients gives the pretrained model's logits; the "
    "penalties are torch's",
    choices="Weights, temperature, entropy of the 20 largest logits, schedule and norm are those of the authors' run "
    "of LLaMA-2-7B. Their earlier code for classifiers has 1e-4, 3e-4, 1e-4, the 3 largest singular values and the "
    "nuclear norm. The pretrained model is the adapted one with what was trained put back to its initial values, a "
    "new head's too, in evaluation mode; no second model is held. Singular values come from the Gram matrix's "
    "eigenvectors. Files as for pissa.",
    demo={"r": 16, "lora_alpha": 16.0, "svd_k": 3},
    learning_rate=5e-4,
)
def build(targets: Targets, options: Options) -> BALoRARuntime:
    pissa.build(targets, options)
    return BALoRARuntime(options)
