"""VeRA: one random pair of frozen factors for all layers, two trained vectors each; files are PEFT's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import AdapterHandle, Targets
from .factored import FactoredLinear, Factors
from .registry import Paper, PeftFiles, at_least_one, probability, register

PREFIX = "base_model.model."
SHARED = "vera"


@dataclass(frozen=True)
class Options:
    """r: rank of the shared factors. d_initial: where d begins. projection_prng_key: seed of the factors, which are those that
    PEFT draws from it. vera_dropout: probability."""

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    vera_dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        probability("vera_dropout", self.vera_dropout)


class Projections(nn.Module):
    """The frozen factors: vera_A ``[r, largest K]``, vera_B ``[largest N, r]``, both Kaiming-uniform (a = 0), float32."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, columns: int, rows: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (r, columns)), ("vera_B", (rows, r))):
            bound = math.sqrt(6 / shape[1])
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=generator))


class VeRALinear(FactoredLinear):
    """y = x (W + diag(b) B diag(d) A)ᵀ with the shared B and A cut to the layer's size; b ``[N]``, from 0, and d ``[r]`` are
    trained."""

    def __init__(self, linear: nn.Linear, options: Options, projections: Projections) -> None:
        super().__init__(linear, dropout=options.vera_dropout)
        self.__dict__["projections"] = projections  # the model's own, see Targets.share
        self.vera_lambda_b = self.new_parameter(self.out_features)
        self.vera_lambda_d = self.new_parameter(options.r)
        nn.init.constant_(self.vera_lambda_d, options.d_initial)

    def factors(self) -> Factors:
        shared: Projections = self.__dict__["projections"]
        dtype = self.vera_lambda_d.dtype
        a = shared.vera_A[:, : self.in_features].to(dtype)
        b = shared.vera_B[: self.out_features].to(dtype)
        return Factors(a, self.vera_lambda_b[:, None] * b * self.vera_lambda_d)


def _write(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from ..integrations.adapter_files import targets_of

    options: Options = handle.options
    config = {
        "r": options.r,
        "target_modules": targets_of(handle.model, list(handle.layers)),
        "projection_prng_key": options.projection_prng_key,
        "save_projection": True,
        "vera_dropout": options.vera_dropout,
        "d_initial": options.d_initial,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "task_type": None,
        "inference_mode": True,
    }
    shared: Any = handle.model.get_submodule(f"peftfast_shared.{SHARED}")
    tensors = {"base_model.vera_A": shared.vera_A, "base_model.vera_B": shared.vera_B}
    for path, layer in handle.layers.items():
        tensors[f"{PREFIX}{path}.vera_lambda_b"] = layer.vera_lambda_b  # type: ignore[assignment]
        tensors[f"{PREFIX}{path}.vera_lambda_d"] = layer.vera_lambda_d  # type: ignore[assignment]
    return config, tensors


def _read(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    end = ".vera_lambda_b"
    names = [key.removesuffix(end).removeprefix(PREFIX) for key in tensors if key.endswith(end)]
    if not names:
        raise ValueError("directory: no vera_lambda_b among the tensors")
    if config.get("fan_in_fan_out") or config.get("bias", "none") != "none":
        raise ValueError("directory: fan_in_fan_out and a trained bias are not served")
    known = ("r", "d_initial", "projection_prng_key", "vera_dropout")
    return {name: config[name] for name in known if name in config}, names


@torch.no_grad()
def _fill(handle: AdapterHandle, tensors: dict[str, Tensor]) -> None:
    own = _write(handle)[1]
    optional = {"base_model.vera_A", "base_model.vera_B"}
    if set(own) - optional != set(tensors) - optional:
        raise ValueError(f"directory: expected the tensors {sorted(own)[:4]} .., got {sorted(tensors)[:4]} ..")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"directory: {name}: expected the shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


@register(
    "vera",
    paper=Paper("VeRA: Vector-based Random Matrix Adaptation", "Kopiczko, Blankevoort, Asano", 2023, "2310.11454"),
    formula="y = x (W + diag(b) B diag(d) A)^T; A, B random, frozen and shared by all layers; b [N], from 0, and d [r] trained",
    options=Options,
    reduces_to="lora with B' = diag(b) B diag(d); nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer, forward and backward, on B'; the product with the diagonals (r N) is torch's. x is not saved for backward",
    peft="VeraConfig",
    files=PeftFiles("VERA", _write, _read, _fill),
    choices="A and B are as large as the largest adapted layer and cut for the others, and drawn as PEFT draws them.",
    demo={"r": 256},
    learning_rate=2e-2,
)
def build(targets: Targets, options: Options) -> None:
    modules = list(targets.modules.values())
    columns, rows = max(m.in_features for m in modules), max(m.out_features for m in modules)
    shared = Projections(options.r, columns, rows, options.projection_prng_key).to(modules[0].weight.device)
    targets.share(SHARED, shared)
    targets.replace(lambda name, linear: VeRALinear(linear, options, shared))
