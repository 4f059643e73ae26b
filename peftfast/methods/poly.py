"""Poly and its multi-head form: a row's LoRA is a mixture of skills that its task weighs. Files are PEFT's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from .. import functional as F
from .adapting import AdapterHandle, Runtime, Targets, Unsuitable
from .factored import FactoredLinear
from .registry import Paper, PeftFiles, at_least_one, register
from .routing import TaskRuntime, Tasks
from .transformed import Unmergeable

PREFIX = "base_model.model."
NAMES = {"poly_lora_A": "poly_lora_A", "poly_lora_B": "poly_lora_B", "poly_router.module_logits": "module_logits"}


@dataclass(frozen=True)
class Options:
    """PEFT's. r: rank of a skill. n_tasks, n_skills: as they say. n_splits: heads of the routing, 1 in Poly."""

    r: int = 8
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            at_least_one(name, getattr(self, name))


@dataclass(frozen=True)
class HeadOptions(Options):
    """As Poly's, with more than one head."""

    n_splits: int = 4


class PolyLinear(Unmergeable, FactoredLinear):  # type: ignore[misc]
    """y = x (W + B_t A_t / r)ᵀ for a row of task t; head q of A_t is Σ_s w_tqs A_qs, of B_t the same with B.

    poly_lora_A ``[heads, skills, K / heads, r]``, poly_lora_B ``[heads, skills, r, N / heads]``, module_logits
    ``[tasks, heads skills]``.
    An example's factors are mixed once (skills r (N + K)), and all examples run through the several-adapters kernel,
    rows naming theirs.
    """

    def __init__(self, linear: nn.Linear, options: Options, current: Tasks) -> None:
        super().__init__(linear)
        heads, skills, r = options.n_splits, options.n_skills, options.r
        if self.in_features % heads or self.out_features % heads:
            raise Unsuitable(f"its sides are no multiples of n_splits = {heads}")
        self.r, self.tasks = r, options.n_tasks
        self.__dict__["current"] = current
        self.poly_lora_A = self.new_parameter(heads, skills, self.in_features // heads, r)
        self.poly_lora_B = self.new_parameter(heads, skills, r, self.out_features // heads)
        self.module_logits = self.new_parameter(options.n_tasks, heads * skills)
        bound = 1 / math.sqrt(self.in_features // heads)  # of Kaiming with a = sqrt(5)
        nn.init.uniform_(self.poly_lora_A, -bound, bound)
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def mixed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A ``[len(ids), r, K]`` and B ``[len(ids), N, r]`` of the tasks ``ids``; in training each with noise of its own."""
        heads, skills = self.poly_lora_A.shape[:2]
        logits = self.module_logits[ids].view(-1, heads, skills)
        if self.training:
            one = torch.ones((), dtype=logits.dtype, device=logits.device)
            weights = RelaxedBernoulli(one, logits=logits).rsample()
        else:
            weights = logits.sigmoid()
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("bqs,qsdr->brqd", weights, self.poly_lora_A).reshape(len(ids), self.r, self.in_features)
        b = torch.einsum("bqs,qsrd->bqdr", weights, self.poly_lora_B).reshape(len(ids), self.out_features, self.r)
        return a, b

    def forward(self, input: Tensor) -> Tensor:
        ids = self.__dict__["current"].of(input, self.tasks)
        if ids is None:
            if self.tasks > 1:
                raise ValueError("task_ids: several tasks: call the model in `with handle.runtime.tasks(task_ids):`")
            ids = torch.zeros(input.shape[0], dtype=torch.int64, device=input.device)
        rows = torch.arange(len(ids), device=input.device)
        if not self.training and not torch.compiler.is_compiling():  # whose shapes may not depend on values
            ids, rows = ids.unique(return_inverse=True)
        adapters = [F.Adapter(a, b, 1.0 / self.r) for a, b in zip(*self.mixed(ids), strict=True)]
        base = self.base_layer
        return F.multi_lora_linear(
            input,
            base.nf4 if self.four_bit else base.weight,
            adapters,
            rows,
            bias=base.bias,
            training=self.training,
            compute_dtype=base.compute_dtype if self.four_bit else None,
        )


def _write(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from ..integrations.adapter_files import targets_of

    given = handle.options
    config = {
        "task_type": None,
        "inference_mode": True,
        "target_modules": targets_of(handle.model, list(handle.layers)),
        "r": given.r,
        "n_tasks": given.n_tasks,
        "n_skills": given.n_skills,
        "n_splits": given.n_splits,
        "poly_type": "poly",
        "init_weights": True,
    }
    return config, {
        f"{PREFIX}{path}.{name}": getattr(layer, own)
        for path, layer in handle.layers.items()
        for name, own in NAMES.items()
    }


def _read(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    if config.get("poly_type", "poly") != "poly":
        raise ValueError(f"directory: poly_type={config['poly_type']!r} is not served; expected 'poly'")
    end = ".poly_lora_A"
    names = [key.removesuffix(end).removeprefix(PREFIX) for key in tensors if key.endswith(end)]
    return {name: config[name] for name in Options.__dataclass_fields__ if name in config}, names


@torch.no_grad()
def _fill(handle: AdapterHandle, tensors: dict[str, Tensor]) -> None:
    for path, layer in handle.layers.items():
        for name, attribute in NAMES.items():
            own, value = getattr(layer, attribute), tensors[f"{PREFIX}{path}.{name}"]
            if own.shape != value.shape:
                raise ValueError(f"directory: {path}.{name}: expected {tuple(own.shape)}, got {tuple(value.shape)}")
            own.copy_(value)


_FUSED = "the layer with every example's own adapter, forward and backward; the mixing of skills is torch's"
_CHOICES = (
    "As PEFT computes it, with its noise in training (a relaxed Bernoulli of temperature 1 for each example). "
    "handle.runtime.tasks(task_ids) names the rows' tasks; with one task it is not needed."
)


@register(
    "poly",
    paper=Paper("Combining Modular Skills in Multitask Learning", "Ponti et al.", 2022, "2202.13914"),
    formula="y = x (W + B_t A_t / r)^T for a row of task t, A_t = sum_s w_ts A_s and B_t = sum_s w_ts B_s, w_t the "
    "normalised sigmoid of Z_t",
    options=Options,
    reduces_to="lora with rows naming adapters; nf4 + lora on a 4-bit base",
    kind="layer",
    fused=_FUSED,
    peft="PolyConfig",
    files=PeftFiles("POLY", _write, _read, _fill),
    choices=_CHOICES,
)
def build(targets: Targets, options: Options) -> Runtime:
    current = Tasks()
    targets.replace(lambda name, linear: PolyLinear(linear, options, current))
    return TaskRuntime(current)


@register(
    "poly-mhr",
    paper=Paper("Multi-Head Adapter Routing for Cross-Task Generalization", "Caccia et al.", 2022, "2211.03831"),
    formula="as poly, with w_tqs for each of n_splits blocks q of A's and of B's features",
    options=HeadOptions,
    reduces_to="lora with rows naming adapters; nf4 + lora on a 4-bit base",
    kind="layer",
    fused=_FUSED,
    peft="PolyConfig(n_splits=4)",
    files=PeftFiles("POLY", _write, _read, _fill),
    choices=_CHOICES + " A file of PEFT's is read as poly with its n_splits.",
)
def build_mhr(targets: Targets, options: HeadOptions) -> Runtime:
    return build(targets, options)
