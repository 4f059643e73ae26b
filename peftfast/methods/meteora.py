"""MeteoRA: LoRA adapters that exist already, and routers that learn which of them each token takes in each layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..nn.tensor_file import read_tensors
from .adapting import Targets
from .registry import Paper, above_zero, at_least_one, register
from .routing import ExpertLinear, Recorded, TaskRuntime, Tasks, mixture, router_of

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Options:
    """adapters: directories of PEFT LoRA adapters, frozen; empty: n_adapters untrained ones. n_adapters: how many
    there are; 0: as many as
    directories. r: largest rank among them. lora_alpha: of untrained ones, scaling lora_alpha / r. top_k: adapters a token takes.
    train_adapters: whether they are trained too. gate_loss: weight of the routers' cross-entropy."""

    adapters: tuple[str, ...] = ()
    n_adapters: int = 0
    r: int = 8
    lora_alpha: float = 16.0
    top_k: int = 2
    train_adapters: bool = False
    gate_loss: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str):
            raise ValueError(f"adapters: expected a sequence of directories, got {self.adapters!r}")
        object.__setattr__(self, "adapters", tuple(str(one) for one in self.adapters))
        count = self.n_adapters or len(self.adapters)
        at_least_one("n_adapters", count)
        if self.adapters and count != len(self.adapters):
            raise ValueError(f"n_adapters: expected {len(self.adapters)}, one a directory, got {self.n_adapters}")
        object.__setattr__(self, "n_adapters", count)
        for name in ("r", "top_k"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)
        if self.top_k > count:
            raise ValueError(f"top_k: expected at most n_adapters = {count}, got {self.top_k}")
        if self.gate_loss < 0:
            raise ValueError(f"gate_loss: expected at least 0, got {self.gate_loss!r}")


class MeteoRALinear(ExpertLinear, Recorded):
    """y = x Wᵀ + b + Σ_{j of the top k} g_j s_j B_j A_j x, g the softmax of R x over the top k, R ``[adapters, K]`` trained."""

    def __init__(self, linear: nn.Linear, options: Options, current: Tasks) -> None:
        super().__init__(linear, options.n_adapters, options.r, options.lora_alpha / options.r)
        self.top_k = options.top_k
        self.__dict__["current"] = current
        for factor in (self.lora_A, self.lora_B):
            factor.requires_grad_(options.train_adapters)
        self.router = router_of(self, options.n_adapters)

    @torch.no_grad()
    def take(self, number: int, a: Tensor, b: Tensor, scaling: float) -> None:
        """Adapter ``number`` of A ``[r', K]`` and B ``[N, r']``; the rest of the rank is zeros. ValueError: they do not fit."""
        rank = a.shape[0]
        if rank > self.lora_A.shape[1]:
            raise ValueError(
                f"r: expected at least the largest rank among the adapters, {rank}, got {self.lora_A.shape[1]}"
            )
        if a.shape[1] != self.in_features or tuple(b.shape) != (self.out_features, rank):
            raise ValueError(
                f"adapters: expected factors of [{self.out_features}, {self.in_features}], got {tuple(b.shape)}, {tuple(a.shape)}"
            )
        self.lora_A[number].zero_()[:rank] = a
        self.lora_B[number].zero_()[:, :rank] = (scaling / self.scaling) * b

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.in_features)
        logits = functional.linear(x.to(self.router.dtype), self.router)
        top = logits.topk(self.top_k, dim=-1)
        ids = self.__dict__["current"].of(input, len(self.router)) if self.training else None
        if ids is not None:
            if self.recording():
                self.__dict__["record"] = (logits, ids.repeat_interleave(len(x) // len(ids)))
        return mixture(self, x, top.values.softmax(-1), top.indices).reshape(*input.shape[:-1], -1)


class MeteoRARuntime(TaskRuntime):
    """gate_loss times the mean over layers and tokens of the cross-entropy of R x with the rows' tasks, where they are named."""

    def __init__(self, layers: list[Recorded], current: Tasks, weight: float) -> None:
        super().__init__(current)
        self.layers, self.weight = layers, weight

    def loss(self) -> Tensor | None:
        found = [record for layer in self.layers if (record := layer.taken()) is not None]
        if not found or not self.weight:
            return None
        return self.weight * torch.stack([functional.cross_entropy(*record) for record in found]).mean()


def _load(layers: dict[str, nn.Module], adapters: tuple[str, ...]) -> None:
    """The factors of the directories; a layer that one does not adapt gets zeros."""
    from peft import LoraConfig

    from ..integrations.adapter_files import _of_pattern

    for number, directory in enumerate(adapters):
        folder = Path(directory)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"adapters: no {name} in {folder}")
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"adapters: {folder}: expected peft_type LORA, got {kind!r}")
        config = LoraConfig.from_pretrained(str(folder))
        if config.use_dora or config.lora_bias:
            raise ValueError(f"adapters: {folder}: DoRA and LoRA biases are not served")
        tensors, used = read_tensors("adapt", "adapters", folder / "adapter_model.safetensors"), 0
        for path, layer in layers.items():
            a, b = (tensors.get(f"{PREFIX}{path}.lora_{part}.weight") for part in "AB")
            if a is None or b is None:
                a, b = torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1)  # type: ignore[arg-type, call-overload]
            else:
                used += 1
            alpha = _of_pattern(config.alpha_pattern, path, config.lora_alpha)
            layer.take(number, a, b, alpha / a.shape[0] ** (0.5 if config.use_rslora else 1))  # type: ignore[operator]
        if not used:
            raise ValueError(f"adapters: {folder} has none of the layers that are adapted")


@register(
    "meteora",
    paper=Paper(
        "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", "Xu, Lai, Huang", 2024, "2405.13053"
    ),
    formula="y = x W^T + b + sum over the top k adapters of g_j s_j B_j A_j x, g = softmax of the top k of R x; loss + w CE(R x, task)",
    options=Options,
    reduces_to="lora with rows naming adapters, or one factor of all adapters with gates between A and B; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="one adapter a token, or weights small beside the adapters: the several-adapters kernel; else the adapters "
    "are two products of torch",
    choices="Only the routers are trained, without biases; files hold the adapters too, at the largest rank. The "
    "cross-entropy with the rows' "
    "tasks (adapter numbers, by handle.runtime.tasks) is the mean over layers and tokens with weight 1. A layer that "
    "an adapter does not "
    "have gets zeros for it. The demo has no adapters to embed and trains 4 of its own along with the routers.",
    demo={"n_adapters": 4, "r": 4, "lora_alpha": 8.0, "train_adapters": True},
)
def build(targets: Targets, options: Options) -> TaskRuntime:
    current = Tasks()
    targets.replace(lambda name, linear: MeteoRALinear(linear, options, current))
    if options.adapters and not targets.restoring:
        _load(targets.replacements, options.adapters)
    layers = [layer for layer in targets.replacements.values() if isinstance(layer, Recorded)]
    return MeteoRARuntime(layers, current, options.gate_loss)
