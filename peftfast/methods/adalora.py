"""AdaLoRA: singular triplets whose singular values are pruned by importance to a budget that the layers share. Files are PEFT's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import AdapterHandle, Runtime, Targets
from .factored import FactoredLinear, Factors
from .registry import Paper, PeftFiles, above_zero, at_least_one, probability, register

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_E", "lora_B")
MASK = "rank_mask"


@dataclass(frozen=True)
class Options:
    """PEFT's, but for total_steps (total_step there). init_r, target_r: rank of each layer at first, and on average at the end.
    lora_alpha: scaling is lora_alpha / init_r. tinit, tfinal: steps before and after the pruning. deltaT: steps between two prunings.
    beta1, beta2: of the running means of sensitivity and uncertainty. orth_reg_weight: of the penalty."""

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("init_r", "target_r", "deltaT", "total_steps"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name in ("beta1", "beta2"):
            probability(name, getattr(self, name))
            above_zero(name, getattr(self, name))
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a number of steps, got {value!r}")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight: expected at least 0, got {self.orth_reg_weight!r}")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r: expected at most init_r = {self.init_r}, got {self.target_r}")
        if self.tinit >= self.total_steps - self.tfinal:
            raise ValueError(
                f"tinit: expected less than total_steps - tfinal = {self.total_steps - self.tfinal}, got {self.tinit}"
            )


class AdaLoRALinear(FactoredLinear):
    """y = x (W + s B diag(E) A)ᵀ. The rank of the product stays init_r: a pruned triplet is a zero in E, so that shapes, compiled code
    and the optimiser's states stay what they are."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear, dropout=options.lora_dropout)
        r = options.init_r
        self.scaling = options.lora_alpha / (r + 1e-5)  # as in the authors' code and PEFT
        self.lora_A, self.lora_E = self.new_parameter(r, self.in_features), self.new_parameter(r, 1)
        self.lora_B = self.new_parameter(self.out_features, r)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def factors(self) -> Factors:
        return Factors(self.lora_A * self.lora_E, self.lora_B, self.scaling)


class AdaLoRARuntime(Runtime):
    """Importance, budget and masks. ``masks``: path -> bool ``[init_r]`` of the last pruning; empty before it."""

    def __init__(self, layers: dict[str, nn.Module], options: Options) -> None:
        self.layers: dict[str, Any] = layers
        self.options = options
        self.means: dict[str, Tensor] = {}
        self.uncertainties: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def budget(self, step: int) -> tuple[int, bool]:
        """Triplets that all layers together may have after ``step``, and whether that step prunes: constant, then falling with the cube
        of what is left, then constant."""
        given = self.options
        first, last = given.init_r * len(self.layers), given.target_r * len(self.layers)
        end = given.total_steps - given.tfinal
        if step <= given.tinit:
            return first, False
        if step > end:
            return last, True
        left = 1 - (step - given.tinit) / (end - given.tinit)
        return int((first - last) * left**3 + last), step % given.deltaT == 0

    def loss(self) -> Tensor | None:
        """orth_reg_weight times the mean of ||A Aᵀ - I|| and ||Bᵀ B - I|| over all layers."""
        if not self.options.orth_reg_weight:
            return None
        terms = []
        for layer in self.layers.values():
            for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
                terms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)))
        return self.options.orth_reg_weight * torch.stack(terms).mean()

    @torch.no_grad()
    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        end = self.options.total_steps - self.options.tfinal
        if step < end:
            self._observe()
        if step <= end:
            budget, prunes = self.budget(step)
            if prunes or step == end:
                self._prune(budget)
            if step == end:
                self.means, self.uncertainties = {}, {}
        else:
            self._apply()

    def _observe(self) -> None:
        """Running means of |p dp| and of its distance from that mean."""
        given = self.options
        for path, layer in self.layers.items():
            for part in PARTS:
                parameter, name = getattr(layer, part), f"{path}.{part}"
                if parameter.grad is None:
                    raise RuntimeError("adalora: call handle.step before the gradients are cleared")
                sensitivity = (parameter * parameter.grad).abs()
                zero = torch.zeros_like(sensitivity)
                mean = self.means.get(name, zero).lerp(sensitivity, 1 - given.beta1)
                self.means[name] = mean
                self.uncertainties[name] = self.uncertainties.get(name, zero).lerp(
                    (sensitivity - mean).abs(), 1 - given.beta2
                )

    def scores(self, path: str) -> Tensor:
        """Importance of a layer's triplets ``[init_r]``: E's, and the mean over a row of A and a column of B."""
        a, e, b = (self.means[f"{path}.{part}"] * self.uncertainties[f"{path}.{part}"] for part in PARTS)
        return e[:, 0] + a.mean(1) + b.mean(0)

    def _prune(self, budget: int) -> None:
        dropped = self.options.init_r * len(self.layers) - budget
        if dropped == 0 or not self.means:
            return
        scores = {path: self.scores(path) for path in self.layers}
        threshold = torch.kthvalue(torch.cat(list(scores.values())), dropped).values
        self.masks = {path: score > threshold for path, score in scores.items()}
        self._apply()

    def _apply(self) -> None:
        for path, mask in self.masks.items():
            self.layers[path].lora_E.masked_fill_(~mask[:, None], 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "uncertainties": self.uncertainties, "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def beside(kept: dict[str, Tensor]) -> dict[str, Tensor]:
            """Each on the device of the layer whose path its name is, or begins with."""
            parts = tuple(f".{part}" for part in PARTS)
            layers = {n: self.layers[n.rpartition(".")[0] if n.endswith(parts) else n] for n in kept}
            return {name: tensor.to(layers[name].lora_E.device) for name, tensor in kept.items()}

        self.means, self.uncertainties, self.masks = (
            beside(state[name]) for name in ("means", "uncertainties", "masks")
        )


def _write(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from ..integrations.adapter_files import targets_of

    given, masks = handle.options, handle.runtime.masks  # type: ignore[attr-defined]
    tensors: dict[str, Tensor] = {}
    for path, layer in handle.layers.items():
        kept = masks.get(path, slice(None))
        for part in PARTS:
            value = getattr(layer, part).detach()
            tensors[f"{PREFIX}{path}.{part}"] = value[:, kept] if part == "lora_B" else value[kept]
    config = {
        "task_type": None,
        "inference_mode": True,
        "target_modules": targets_of(handle.model, list(handle.layers)),
        "init_r": given.init_r,
        "target_r": given.target_r,
        "lora_alpha": given.lora_alpha,
        "lora_dropout": given.lora_dropout,
        "tinit": given.tinit,
        "tfinal": given.tfinal,
        "deltaT": given.deltaT,
        "beta1": given.beta1,
        "beta2": given.beta2,
        "orth_reg_weight": given.orth_reg_weight,
        "total_step": given.total_steps,
        "rank_pattern": {f"{path}.lora_E": mask.tolist() for path, mask in masks.items()} or None,
        "bias": "none",
        "init_lora_weights": True,
    }
    return config, tensors


def _read(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    renamed = {"total_steps": "total_step"}
    options = {
        name: config[renamed.get(name, name)]
        for name in Options.__dataclass_fields__
        if renamed.get(name, name) in config
    }
    for name, accepted in {"fan_in_fan_out": (False,), "bias": ("none",)}.items():
        if name in config and config[name] not in accepted:
            raise ValueError(f"directory: {name}={config[name]!r} is not served; expected {accepted[0]!r}")
    end = ".lora_E"
    names = [key.removesuffix(end).removeprefix(PREFIX) for key in tensors if key.endswith(end)]
    for key, kept in (config.get("rank_pattern") or {}).items():
        path = key.removesuffix(".default").removesuffix(end)
        tensors[f"{PREFIX}{path}.{MASK}"] = torch.tensor(kept, dtype=torch.bool)  # for _fill, which sees tensors alone
    return options, names


@torch.no_grad()
def _fill(handle: AdapterHandle, tensors: dict[str, Tensor]) -> None:
    """Triplets that the file has go to their places; the others keep a zero in E."""
    runtime: Any = handle.runtime
    r = handle.options.init_r
    for path, layer in handle.layers.items():
        parts = {part: tensors[f"{PREFIX}{path}.{part}"] for part in PARTS}
        rank = parts["lora_E"].shape[0]
        pattern = tensors.get(f"{PREFIX}{path}.{MASK}")
        mask = torch.ones(r, dtype=torch.bool) if pattern is None else pattern
        if mask.shape != (r,) or int(mask.sum()) != rank:
            raise ValueError(f"directory: {path}: expected {int(mask.sum())} triplets of {r}, got {rank}")
        layer.lora_E.zero_()  # type: ignore[operator, union-attr]
        for part, value in parts.items():
            own: Any = getattr(layer, part)
            chosen = own[:, mask] if part == "lora_B" else own[mask]
            if chosen.shape != value.shape:
                raise ValueError(f"directory: {path}.{part}: expected {tuple(chosen.shape)}, got {tuple(value.shape)}")
            if part == "lora_B":
                own[:, mask] = value.to(own)
            else:
                own[mask] = value.to(own)
        if pattern is not None:
            runtime.masks[path] = mask.to(layer.lora_E.device)  # type: ignore[union-attr, arg-type]


@register(
    "adalora",
    paper=Paper(
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "Zhang et al.", 2023, "2303.10512"
    ),
    formula="y = x (W + (alpha / init_r) B diag(E) A)^T, E pruned by importance to a falling budget; "
    "loss + w mean(||A A^T - I||, ||B^T B - I||)",
    options=Options,
    reduces_to="lora with A' = diag(E) A; nf4 + lora on a 4-bit base",
    kind="moving",
    fused="the layer, forward and backward, at rank init_r; diag(E) A, the penalty and the scores are torch's",
    peft="AdaLoraConfig",
    files=PeftFiles("ADALORA", _write, _read, _fill),
    choices="As PEFT computes it. The penalty is handle.loss(). A step whose budget is the first one prunes nothing, "
    "where PEFT fails. A "
    "pruned triplet stays in memory with a zero in E, and files leave it out.",
    demo={"init_r": 24, "target_r": 16, "lora_alpha": 24.0, "orth_reg_weight": 0.1},
    learning_rate=5e-3,
)
def build(targets: Targets, options: Options) -> Runtime:
    targets.replace(lambda name, linear: AdaLoRALinear(linear, options))
    return AdaLoRARuntime(targets.replacements, options)
