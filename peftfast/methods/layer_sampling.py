"""LISA and OwLore: a few blocks of a model are trained at a time, drawn anew every so many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import Runtime, Targets
from .galore import GaLore
from .passes import chosen_rows, visit_inputs, wide
from .registry import Paper, above_zero, at_least_one, register
from .scores import blocks_of
from .whole import train_weights


class LayerSampler:
    """Within this context only some of the given groups of parameters are trained: ``active`` of them, drawn without replacement every
    ``interval`` steps.

    ::

        with LayerSampler({"0": block0.parameters(), ...}, active=2, interval=20) as sampler:
            for batch in data:
                model(**batch).loss.backward()
                optimizer.step()
                sampler.step(optimizer)
                optimizer.zero_grad()

    A frozen parameter has ``requires_grad`` False and no gradient, so that no time and no memory goes into its gradient, and its
    optimiser's states are dropped when it leaves. Leaving the context gives back the flags. Parameters in no group are left alone.

    Args:
        groups: name -> parameters, such as those of a block.
        active: how many are trained at a time. interval: optimiser steps between draws.
        weights: name -> how likely a group is against others, at least 0; all alike if not given.
        seed: of the draws.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        *,
        active: int = 2,
        interval: int = 20,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        at_least_one("active", active)
        at_least_one("interval", interval)
        if active > len(self.groups):
            raise ValueError(f"active: expected at most the {len(self.groups)} groups, got {active}")
        given = {name: 1.0 if weights is None else float(weights.get(name, -1.0)) for name in self.groups}
        if any(not 0.0 <= weight < float("inf") for weight in given.values()):
            raise ValueError("weights: expected a finite number of at least 0 for every group")
        # Of weights of zero, or fewer others than are drawn, each is a little likely all the same.
        floor = max(max(given.values()), 1.0) * 1e-6
        self.weights = torch.tensor([max(weight, floor) for weight in given.values()], dtype=torch.float64)
        self.active, self.interval = active, interval
        self.completed_steps = 0
        self.chosen: list[str] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def __enter__(self) -> LayerSampler:
        self._flags = [(p, p.requires_grad) for parameters in self.groups.values() for p in parameters]
        self.draw()
        return self

    def __exit__(self, *_: Any) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def draw(self, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
        """Choose anew; the names of the groups that are trained now, in order."""
        numbers = torch.multinomial(self.weights, self.active, generator=self._generator).tolist()
        names = list(self.groups)
        self._activate([names[number] for number in sorted(numbers)], optimizer)
        return self.chosen

    def _activate(self, chosen: list[str], optimizer: torch.optim.Optimizer | None) -> None:
        self.chosen = chosen
        for name, parameters in self.groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in chosen)
                if name not in chosen:
                    parameter.grad = None
                    if optimizer is not None:
                        optimizer.state.pop(parameter, None)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """After an optimiser's step; whether other groups were drawn."""
        self.completed_steps += 1
        if self.completed_steps % self.interval:
            return False
        self.draw(optimizer)
        return True

    def state_dict(self) -> dict[str, Any]:
        """To go on from: what is trained, the count of steps and the generator."""
        return {
            "completed_steps": self.completed_steps,
            "chosen": list(self.chosen),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of :meth:`state_dict`."""
        self.completed_steps = state["completed_steps"]
        self._generator.set_state(state["generator"])
        self._activate(list(state["chosen"]), None)


class SamplingRuntime(Runtime):
    """Draws when the optimiser is made, which must know every parameter, and then by steps."""

    def __init__(self, sampler: LayerSampler, kind: type[GaLore] | None, **options: Any) -> None:
        self.sampler, self.kind, self.options = sampler, kind, options

    def resting(self) -> list[nn.Parameter]:
        return [p for parameters in self.sampler.groups.values() for p in parameters]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer
        if self.kind is None:
            made = torch.optim.AdamW(groups)
        else:
            made = self.kind([{**groups[0], **self.options}, *({**group, "rank": None} for group in groups[1:])])
        self.sampler.draw()
        return made

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.sampler.step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


@dataclass(frozen=True)
class LISAOptions:
    """active: blocks trained at a time. interval: steps between draws. seed: of the draws."""

    active: int = 2
    interval: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("active", self.active)
        at_least_one("interval", self.interval)


def _groups(targets: Targets) -> dict[str, list[nn.Parameter]]:
    layers: dict[str, Any] = targets.replacements
    blocks = blocks_of(list(layers))
    groups = {block: [layers[name].weight for name in names] for block, names in blocks.items() if block}
    if not groups:
        reasons = "; ".join(sorted(set(targets.skipped.values()))) or "they lie below no numbered module"
        raise ValueError(f"target_modules: {targets.method.name} finds no blocks among the layers: {reasons}")
    return groups


@register(
    "lisa",
    paper=Paper(
        "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        "Pan et al.",
        2024,
        "2403.17919",
    ),
    formula="every `interval` steps `active` of the blocks are drawn, evenly; only they and what lies outside blocks are trained",
    options=LISAOptions,
    reduces_to="torch's own layers",
    kind="optimiser",
    fused="nothing: frozen weights cost no gradient and no optimiser's state",
    operation=LayerSampler,
    choices="A block is the layers below a numbered module; of it the chosen layers' weights are trained. Embeddings and head "
    "are trained at "
    "every step where modules_to_save names them. States are dropped when a block is left. The optimiser draws first when it is made.",
    demo={"interval": 5},
    learning_rate=3e-4,
)
def build_lisa(targets: Targets, options: LISAOptions) -> Runtime:
    train_weights(targets)
    sampler = LayerSampler(_groups(targets), active=options.active, interval=options.interval, seed=options.seed)
    return SamplingRuntime(sampler, None)


@dataclass(frozen=True)
class OwLoreOptions(LISAOptions):
    """active, interval, seed: as in LISA. outlier: M, an entry is an outlier above M times the mean. rank, update_interval, scale: of
    GaLore on what is trained."""

    active: int = 5
    interval: int = 50
    outlier: float = 13.0
    rank: int = 128
    update_interval: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero("outlier", self.outlier)
        at_least_one("rank", self.rank)
        at_least_one("update_interval", self.update_interval)
        above_zero("scale", self.scale)


def outlier_ratios(targets: Targets, outlier: float) -> dict[str, float]:
    """Name of layer -> part of the entries of |W[n, k]| ||x[:, k]|| that are above ``outlier`` times their mean, x of all batches."""
    sums: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, batch: dict[str, Any]) -> None:
        found = wide(chosen_rows(x, batch)).square().sum(0)
        sums[name] = found if name not in sums else sums[name].add_(found)

    visit_inputs(targets, f"{targets.method.name}: outliers", visit)
    found = {}
    for name, linear in targets.modules.items():
        scores = wide(linear.weight.detach()).abs() * sums[name].sqrt() if name in sums else torch.zeros(1)
        found[name] = float((scores > outlier * scores.mean()).double().mean())
    return found


@register(
    "owlore",
    paper=Paper(
        "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for LLM Fine-tuning",
        "Li, Yin, Gao, Liu",
        2024,
        "2405.18380",
    ),
    formula="as LISA, a block drawn in proportion to its part of outliers |W[n, k]| ||x_k|| > M mean, and stepped by GaLore",
    options=OwLoreOptions,
    reduces_to="torch's own layers, products and SVD",
    kind="optimiser",
    fused="nothing: frozen weights cost no gradient and no optimiser's state",
    operation=LayerSampler,
    choices="A block's part of outliers is the mean of its layers'. Draws are without replacement; a block without outliers "
    "keeps a millionth "
    "of the likelihood. States and projection of a block are dropped when it is left. rank, update_interval and scale are "
    "GaLore's; the authors' code has 256, 100 and 1.",
    reads_data=True,
    demo={"active": 2, "interval": 5, "rank": 16, "scale": 1.0},
    learning_rate=1e-3,
)
def build_owlore(targets: Targets, options: OwLoreOptions) -> Runtime:
    ratios = {} if targets.restoring else outlier_ratios(targets, options.outlier)
    train_weights(targets)
    blocks = blocks_of(list(targets.replacements))
    weights = {block: sum(ratios.get(name, 0.0) for name in names) / len(names) for block, names in blocks.items()}
    sampler = LayerSampler(
        _groups(targets), active=options.active, interval=options.interval, weights=weights, seed=options.seed
    )
    given = {"rank": options.rank, "update_interval": options.update_interval, "scale": options.scale}
    return SamplingRuntime(sampler, GaLore, **given)
