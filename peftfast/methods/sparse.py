"""Sparse deltas by name: SHiRA, SpIEL and S2FT as they stand in this folder, and RoSA's sparse and low-rank pair."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import RoSALinear, SparseDeltaLinear
from ..optim import SparseAdamW
from .adapting import AdapterHandle, Runtime, Targets, Unsuitable, is_four_bit
from .registry import Paper, PeftFiles, above_zero, at_least_one, one_of, register
from .s2ft import S2FT
from .shira import CONFIG, WEIGHTS, load_shira, save_shira
from .spiel import SpIEL


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SparseRuntime(Runtime):
    """SparseAdamW over the deltas' values: states of the active weights alone. AdamW where something else than float32 is trained
    beside them, as a head in bfloat16 or a model in float64."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        return SparseAdamW(groups) if _all_float32(groups) else None


def _all_float32(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.dtype == torch.float32 for group in groups for parameter in group["params"])


@dataclass(frozen=True)
class ShiraOptions:
    """r: each layer trains r (N + K) weights, LoRA's count at rank r. seed: of the random support."""

    r: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)


def _layers(targets: Targets, r: int, seed: int) -> None:
    generator = _generator(seed)

    def make(name: str, linear: nn.Linear) -> SparseDeltaLinear:
        n, k = linear.out_features, linear.in_features
        if r * (n + k) > n * k:
            raise Unsuitable(f"r (N + K) = {r * (n + k)} weights are more than it has")
        return SparseDeltaLinear.from_linear(linear, density=r * (n + k) / (n * k), generator=generator)

    targets.replace(make)


def _write_shira(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        save_shira(handle.model, folder)
        config = json.loads((Path(folder) / CONFIG).read_text())
        return config, load_file(Path(folder) / WEIGHTS)


def _read_shira(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    end = ".shira_weight"
    names = [key.removesuffix(end).removeprefix("base_model.model.") for key in tensors if key.endswith(end)]
    return {"r": config["r"]}, names


def _fill_shira(handle: AdapterHandle, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / WEIGHTS)
        (Path(folder) / CONFIG).write_text(json.dumps({"peft_type": "SHIRA"}))
        load_shira(handle.model, folder)


@register(
    "shira",
    paper=Paper("Sparse High Rank Adapters", "Bhardwaj et al.", 2024, "2406.13175"),
    formula="y = x (W + S)^T, S sparse with r (N + K) entries at fixed random places",
    options=ShiraOptions,
    reduces_to="sparse_delta",
    kind="layer",
    fused="the layer's gradient of its values, and AdamW over them",
    peft="ShiraConfig",
    files=PeftFiles("SHIRA", _write_shira, _read_shira, _fill_shira),
    choices="Of the paper's masks the random one, which is PEFT's default; the places are drawn by torch's generator from the seed.",
    demo={"r": 16},
    learning_rate=5e-3,
)
def build_shira(targets: Targets, options: ShiraOptions) -> Runtime:
    _layers(targets, options.r, options.seed)
    return SparseRuntime()


@dataclass(frozen=True)
class SpielOptions(ShiraOptions):
    """r, seed: as in SHiRA. total_steps: of the training. data_parallel: whether the workers of torch.distributed's default group train
    this model together; None warns where there are several. The rest: see :class:`peftfast.methods.SpIEL`."""

    r: int = 64
    total_steps: int = 1000
    reselection_steps: int = 20
    accumulation_steps: int = 5
    initial_rate: float = 0.2
    schedule: str = "linear"
    data_parallel: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data_parallel, bool | None):
            raise TypeError(f"data_parallel: expected True, False or None, got {self.data_parallel!r}")
        for name in ("total_steps", "reselection_steps", "accumulation_steps"):
            at_least_one(name, getattr(self, name))
        above_zero("initial_rate", self.initial_rate)
        one_of("schedule", self.schedule, ("linear", "cosine"))


class SpielRuntime(Runtime):
    """Moves the supports behind each step of the optimiser that :meth:`optimizer` made."""

    def __init__(self, layers: dict[str, nn.Module], options: SpielOptions) -> None:
        self.layers, self.options = layers, options
        self.method: SpIEL | None = None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = SparseAdamW(groups)
        given = self.options
        layers: list[Any] = list(self.layers.values())
        self.method = SpIEL(
            layers,
            made,
            total_steps=given.total_steps,
            reselection_steps=given.reselection_steps,
            accumulation_steps=given.accumulation_steps,
            initial_rate=given.initial_rate,
            schedule=given.schedule,
            process_group=given.data_parallel,
        )
        return made

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if self.method is None:
            raise RuntimeError("spiel: its optimiser is made by handle.optimizer(), before the first step")
        self.method.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.method is None else self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            if self.method is None:
                raise RuntimeError("spiel: call handle.optimizer() before the state is loaded")
            self.method.load_state_dict(state)


@register(
    "spiel",
    paper=Paper("Scaling Sparse Fine-Tuning to Large Language Models", "Ansell et al.", 2024, "2401.16405"),
    formula="y = x (W + S)^T; every reselection_steps the smallest |S| are dropped and the largest accumulated gradients grown",
    options=SpielOptions,
    reduces_to="sparse_delta",
    kind="moving",
    fused="the layer's gradient of its values, AdamW over them, the search for candidates without a dense gradient",
    choices="SpIEL-AG. The count of active weights is LoRA's at rank r in each layer.",
    demo={"r": 16},
    learning_rate=5e-3,
)
def build_spiel(targets: Targets, options: SpielOptions) -> Runtime:
    _layers(targets, options.r, options.seed)
    return SpielRuntime(targets.replacements, options)


@dataclass(frozen=True)
class S2ftOptions:
    """head_ratio, channel_ratio: parts of the head groups and FFN channels that are trained. seed: of the random choice."""

    head_ratio: float = 0.05
    channel_ratio: float = 0.02
    seed: int = 0


class S2ftRuntime(SparseRuntime):
    """Keeps the permutation: ``s2ft.restore()`` undoes it, and files hold the deltas where they belong without it."""

    def __init__(self, s2ft: S2FT | None) -> None:
        self.s2ft = s2ft

    def file_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, (pattern, values) in self.s2ft.restored().items() if self.s2ft is not None else ():
            tensors |= {f"{path}.delta_indices": pattern.indices, f"{path}.delta_values": values}
        return tensors


@register(
    "s2ft",
    paper=Paper(
        "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
        "Yang et al.",
        2024,
        "2412.06289",
    ),
    formula="y = x (W + S)^T, S dense on the columns of some heads (o) and channels (down), side by side after a permutation",
    options=S2ftOptions,
    reduces_to="sparse_delta, structured",
    kind="layer",
    fused="the gradient as one product with a slice of x, the only part of x that is kept",
    choices="Heads and channels are drawn at random, the same number in each block; the authors' code draws them from all blocks "
    "together. "
    "target_modules is not used: the layers are the output layers of attention and "
    "FFN. Files hold the places before the permutation, which handle.runtime.s2ft.restore() undoes in the model.",
    demo={"head_ratio": 4 / 12, "channel_ratio": 160 / 1536},
    learning_rate=1e-3,
)
def build_s2ft(targets: Targets, options: S2ftOptions) -> Runtime:
    if targets.restoring:
        targets.replace(lambda name, linear: SparseDeltaLinear.from_linear(linear, density=1 / linear.weight.numel()))
        return S2ftRuntime(None)
    s2ft = S2FT(
        targets.model,
        head_ratio=options.head_ratio,
        channel_ratio=options.channel_ratio,
        generator=_generator(options.seed),
    )
    targets.replacements.update(s2ft.layers)
    return S2ftRuntime(s2ft)


@dataclass(frozen=True)
class RosaOptions:
    """r, lora_alpha: of the low-rank part, scaling lora_alpha / r. density: part of the weights that is sparse. seed: of its places."""

    r: int = 16
    lora_alpha: float = 16.0
    density: float = 0.006
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a part in (0, 1], got {self.density!r}")


@register(
    "rosa",
    paper=Paper(
        "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", "Nikdan et al.", 2024, "2401.04679"
    ),
    formula="y = x (W + S + (alpha / r) B A)^T, S sparse",
    options=RosaOptions,
    reduces_to="sparse_delta, and torch's own products for the low-rank part",
    kind="layer",
    fused="the sparse part's gradient of its values; the low-rank part is two products of torch",
    choices="The places of S are random here; the paper takes those of the largest gradients after a warm-up of the low-rank part.",
    demo={"r": 8, "lora_alpha": 8.0, "density": 0.04},
)
def build_rosa(targets: Targets, options: RosaOptions) -> None:
    generator = _generator(options.seed)

    def make(name: str, linear: nn.Linear) -> RoSALinear:
        if is_four_bit(linear):
            raise Unsuitable("RoSA's layer takes a dense weight, not one in 4 bits")
        return RoSALinear.from_linear(
            linear, r=options.r, lora_alpha=options.lora_alpha, density=options.density, generator=generator
        )

    targets.replace(make)
