"""Supports that are chosen before the training: LT-SFT by a first full training, SPT by sensitivity, HFT by halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import SparsePattern
from ..functional.sparse_pattern import smallest_index_dtype
from ..nn import LoRALinear, SparseDeltaLinear
from .adapting import Runtime, Targets, Unsuitable
from .passes import fisher
from .registry import Paper, above_zero, at_least_one, register
from .scores import blocks_of, dense_only, top_of_all, with_gradients
from .sparse import SparseRuntime


def _density(value: Any) -> None:
    if not isinstance(value, float) or not 0.0 < value <= 1.0:
        raise ValueError(f"density: expected a part in (0, 1], got {value!r}")


def _sparse_on(positions: dict[str, Tensor], name: str, linear: nn.Linear) -> SparseDeltaLinear:
    at = positions[name]
    if at.numel() == 0:
        raise Unsuitable("none of its weights is among the chosen")
    shape = (linear.out_features, linear.in_features)
    return SparseDeltaLinear.from_linear(linear, indices=smallest_index_dtype(at, shape))


def _any_support(name: str, linear: nn.Linear) -> SparseDeltaLinear:
    """A layer that takes the support of a file."""
    return SparseDeltaLinear.from_linear(linear, density=1 / (linear.in_features * linear.out_features))


@dataclass(frozen=True)
class LTSFTOptions:
    """density: part of all weights that is trained. search_lr, search_epochs: of the first training, over the data that adapt is given.
    l1_weight: of the mean |W - W0| in it."""

    density: float = 0.01
    search_lr: float = 5e-5
    search_epochs: int = 1
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        _density(self.density)
        above_zero("search_lr", self.search_lr)
        at_least_one("search_epochs", self.search_epochs)
        if not 0.0 <= self.l1_weight < float("inf"):
            raise ValueError(f"l1_weight: expected a number of at least 0, got {self.l1_weight!r}")


@register(
    "lt-sft",
    paper=Paper(
        "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", "Ansell, Ponti, Korhonen, Vulić", 2021, "2110.07560"
    ),
    formula="y = x (W + S)^T, S on the weights that a first, full training moves most; then they begin at W again",
    options=LTSFTOptions,
    reduces_to="sparse_delta",
    kind="layer",
    fused="the layer's gradient of its values, and AdamW over them; the first training is torch's AdamW on the dense weights",
    choices="The first training is in the model's own mode, over the batches given to adapt. The largest |W1 - W0| are taken "
    "over all layers "
    "together. l1_weight is of the mean over the chosen weights and of the first training alone; the authors' code divides by all "
    "weights of the "
    "model and can have one in the second too. Composition of saved deltas: lt-sft-composition.",
    reads_data=True,
    demo={"density": 0.05, "search_lr": 1e-4},
    learning_rate=5e-3,
)
def build_lt_sft(targets: Targets, options: LTSFTOptions) -> Runtime:
    if targets.restoring:
        targets.replace(_any_support)
        return SparseRuntime()
    dense_only(targets)
    if not targets.modules:
        return SparseRuntime()
    weights = {name: linear.weight for name, linear in targets.modules.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    count = sum(weight.numel() for weight in weights.values())
    optimizer = torch.optim.AdamW(weights.values(), lr=options.search_lr, weight_decay=0.0)

    def each(batch: dict[str, Any]) -> None:
        loss = targets.model(**batch).loss
        if options.l1_weight:
            moved = torch.stack([(weight - before[name]).abs().sum() for name, weight in weights.items()]).sum()
            loss = loss + options.l1_weight * moved / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        for _ in range(options.search_epochs):
            with_gradients(targets, "lt-sft: first training", each)
        scores = {name: (weight.detach() - before[name]).abs() for name, weight in weights.items()}
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
    positions = top_of_all(scores, options.density)
    targets.replace(lambda name, linear: _sparse_on(positions, name, linear))
    return SparseRuntime()


@dataclass(frozen=True)
class SPTOptions:
    """density: part of all weights that is sensitive. r, lora_alpha: of a layer with at least r (N + K) of them, tuned by LoRA.
    structured: the names of these layers, found from the data where none is given."""

    density: float = 0.01
    r: int = 8
    lora_alpha: float = 8.0
    structured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _density(self.density)
        at_least_one("r", self.r)
        above_zero("lora_alpha", self.lora_alpha)


@register(
    "spt",
    paper=Paper("Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", "He et al.", 2023, "2303.08566"),
    formula="s = sum of g^2 over examples; layers with at least r (N + K) of the largest s have W + (alpha / r) B A, the "
    "others W + S on theirs",
    options=SPTOptions,
    reduces_to="sparse_delta and lora, layer by layer",
    kind="layer",
    fused="both kinds of layer; AdamW over all values",
    choices="The threshold between the two kinds is LoRA's own count, as in the paper; the authors' commands take a tenth of it. "
    "The sensitivity is the squared gradient of each "
    "example (in their code of each batch), a step of "
    "descent's first-order change of the loss. options.structured holds which layers became LoRA's.",
    reads_data=True,
    demo={"density": 0.05, "r": 16, "lora_alpha": 16.0},
)
def build_spt(targets: Targets, options: SPTOptions) -> Runtime:
    def lora(name: str, linear: nn.Linear) -> LoRALinear:
        return LoRALinear.from_linear(linear, r=options.r, lora_alpha=options.lora_alpha)

    if targets.restoring:
        targets.replace(lambda name, linear: (lora if name in options.structured else _any_support)(name, linear))
        return Runtime()
    scores = fisher(targets, "spt: sensitivity")
    positions = top_of_all({name: scores[name] for name in targets.modules}, options.density)

    def structured(name: str, linear: nn.Linear) -> bool:
        if options.structured:
            return name in options.structured
        return positions[name].numel() >= options.r * (linear.in_features + linear.out_features)

    found = tuple(name for name, linear in targets.modules.items() if structured(name, linear))
    object.__setattr__(options, "structured", found)  # what the files must say
    targets.replace(lambda name, linear: lora(name, linear) if name in found else _sparse_on(positions, name, linear))
    return Runtime()


@dataclass(frozen=True)
class HFTOptions:
    """seed: of the random choice. chosen: names of the layers that are trained, drawn where none is given."""

    seed: int = 0
    chosen: tuple[str, ...] = ()


@register(
    "hft",
    paper=Paper("HFT: Half Fine-Tuning for Large Language Models", "Hui et al.", 2024, "2404.18466"),
    formula="y = x (W + D)^T with a whole D for half of the layers of each kind in each block, x W^T for the others",
    options=HFTOptions,
    reduces_to="sparse_delta, structured (all rows)",
    kind="layer",
    fused="the gradient as one dense product; AdamW over the values, the weights as they were kept",
    choices="A kind is the layers of one module, such as an attention's projections. Of an odd number the half is rounded up "
    "and down by "
    "turns. The choice is made once; the paper's rounds are trainings, merged one after the other. Norms and embeddings are left as "
    "they are: modules_to_save trains them whole.",
    learning_rate=5e-4,
)
def build_hft(targets: Targets, options: HFTOptions) -> Runtime:
    if options.chosen:
        chosen = set(options.chosen)
    else:
        chosen = set(halves(list(targets.modules), torch.Generator().manual_seed(options.seed)))
        object.__setattr__(options, "chosen", tuple(name for name in targets.modules if name in chosen))

    def make(name: str, linear: nn.Linear) -> SparseDeltaLinear:
        if name not in chosen:
            raise Unsuitable("of the half that is not trained")
        shape = (linear.out_features, linear.in_features)
        return SparseDeltaLinear.from_linear(linear, indices=SparsePattern.from_rows(range(shape[0]), shape))

    targets.replace(make)
    return SparseRuntime()


def halves(names: list[str], generator: torch.Generator) -> list[str]:
    """Half of the names of each group, a group being the layers of one parent module in one block; odd groups round by turns."""
    found: list[str] = []
    up = True
    for inside in blocks_of(names).values():
        groups: dict[str, list[str]] = {}
        for name in inside:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        for group in groups.values():
            count = (len(group) + up) // 2
            up = up if len(group) % 2 == 0 else not up
            found += [group[i] for i in torch.randperm(len(group), generator=generator)[:count].tolist()]
    return found
