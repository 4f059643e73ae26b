"""Operations on saved deltas: compressing, composing and localising what a fine-tuning changed.

A dense delta is a dictionary name of parameter -> tensor, what :func:`task_vector` gives; a sparse one is a dictionary path of layer
-> (indices, values), what :func:`read_sparse` reads from an adapter's files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..extras import imported
from .registry import Paper, above_zero, at_least_one, register

Deltas = Mapping[str, Tensor]


class Sparse(NamedTuple):
    """Flat positions in a weight, ascending, and the values there."""

    indices: Tensor
    values: Tensor


def task_vector(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """tuned - base for every floating tensor of two state dicts, in float32 at least.

    Raises:
        ValueError: other names or shapes.
    """
    if set(base) != set(tuned):
        raise ValueError(f"tuned: expected the tensors of base, got {sorted(set(base) ^ set(tuned))[:4]} in one only")
    found = {}
    for name, tensor in base.items():
        if tensor.shape != tuned[name].shape:
            raise ValueError(f"{name}: expected the shape {tuple(tensor.shape)}, got {tuple(tuned[name].shape)}")
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            found[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
    return found


@torch.no_grad()
def apply_(model: nn.Module, deltas: Mapping[str, Tensor | Sparse], scale: float = 1.0) -> None:
    """Add ``scale`` times the deltas to a model's parameters, in place. A sparse delta's name is that of the layer, or of its weight.

    Raises:
        ValueError: a name or a shape that the model has not; nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    known = []
    for name, delta in deltas.items():
        parameter = parameters.get(name) if name in parameters else parameters.get(f"{name}.weight")
        if parameter is None:
            raise ValueError(f"deltas: the model has no parameter {name}")
        if isinstance(delta, Sparse):
            if delta.indices.numel() and int(delta.indices.max()) >= parameter.numel():
                raise ValueError(f"{name}: positions beyond a weight of {tuple(parameter.shape)}")
        elif delta.shape != parameter.shape:
            raise ValueError(f"{name}: expected the shape {tuple(parameter.shape)}, got {tuple(delta.shape)}")
        known.append((parameter, delta))
    for parameter, delta in known:
        if isinstance(delta, Sparse):
            flat, at = parameter.view(-1), delta.indices.long()
            flat[at] = (flat[at].to(delta.values.dtype) + scale * delta.values).to(flat.dtype)
        else:
            parameter.add_((scale * delta).to(parameter.dtype))


def read_sparse(directory: str | os.PathLike[str]) -> dict[str, Sparse]:
    """The sparse deltas of an adapter that ``peftfast.save_adapter`` wrote for a method over SparseDeltaLinear.

    Raises:
        ValueError: the file holds none.
    """
    load = imported("safetensors.torch", "read_sparse").load
    from ..integrations.adapter_files import PREFIX, WEIGHTS

    tensors = load((Path(directory) / WEIGHTS).read_bytes())
    ends = ".delta_indices", ".delta_values"
    found = {
        key.removesuffix(ends[0]).removeprefix(PREFIX): Sparse(tensor, tensors[key.removesuffix(ends[0]) + ends[1]])
        for key, tensor in tensors.items()
        if key.endswith(ends[0])
    }
    if not found:
        raise ValueError(f"directory: expected sparse deltas, got {sorted(tensors)[:4]}")
    return found


@dataclass(frozen=True)
class NoOptions:
    """None."""


@register(
    "lt-sft-composition",
    paper=Paper(
        "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", "Ansell, Ponti, Korhonen, Vulić", 2021, "2110.07560"
    ),
    formula="W + S_task + S_language: sparse deltas of separate trainings, added",
    options=NoOptions,
    reduces_to="sparse_delta's files",
    kind="deltas",
    fused="nothing: sorting and adding of the active weights, once",
)
def compose(deltas: Sequence[Mapping[str, Sparse]]) -> dict[str, Sparse]:
    """The sum of sparse deltas of one base, on the union of their supports: what a task's and a language's fine-tuning come to.

    Raises:
        ValueError: none given.
    """
    if not deltas:
        raise ValueError("deltas: expected at least one")
    found = {}
    for name in dict.fromkeys(name for one in deltas for name in one):
        parts = [one[name] for one in deltas if name in one]
        indices, places = torch.unique(torch.cat([part.indices.long() for part in parts]), return_inverse=True)
        dtype = torch.promote_types(parts[0].values.dtype, torch.float32)
        values, start = torch.zeros(indices.numel(), dtype=dtype), 0
        for part in parts:  # positions are distinct within a part: plain writes, in the order given
            at = places[start : start + part.indices.numel()]
            values[at] += part.values.to(dtype)
            start += part.indices.numel()
        found[name] = Sparse(indices.to(parts[0].indices.dtype), values)
    return found


@dataclass(frozen=True)
class ComPEFTOptions:
    """density: part of the delta that is kept. alpha: times the deviation of the delta is the kept magnitude."""

    density: float = 0.2
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _part("density", self.density)
        above_zero("alpha", self.alpha)


def _part(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: expected a part in (0, 1], got {value!r}")


@register(
    "compeft",
    paper=Paper(
        "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
        "Yadav, Choshen, Raffel, Bansal",
        2023,
        "2311.13171",
    ),
    formula="t -> alpha std(t) sign(t) where |t| is among the largest density of all entries, else 0",
    options=ComPEFTOptions,
    reduces_to="sparse_delta's ternary files (peftfast.methods.compact)",
    kind="deltas",
    fused="nothing: one selection over the delta",
    choices="The largest entries and the deviation are of all tensors together. alpha and density are tuned on held-out data "
    "by the caller.",
)
def compeft(deltas: Deltas, *, density: float = 0.2, alpha: float = 1.0) -> dict[str, Tensor]:
    """A delta (of an adapter's parameters or a model's) as signs times one scale; ``compact.compress(..., kept_as="ternary")`` stores
    such a tensor without loss.

    Raises:
        ValueError: an option out of range, or no tensor.
    """
    ComPEFTOptions(density, alpha)
    if not deltas:
        raise ValueError("deltas: expected at least one tensor")
    flat = torch.cat(
        [tensor.detach().reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in deltas.values()]
    )
    count = max(1, round(density * flat.numel()))
    kept = torch.zeros_like(flat)
    at = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
    kept[at] = alpha * flat.std(correction=0) * torch.sign(flat[at])
    parts = kept.split([tensor.numel() for tensor in deltas.values()])
    return {name: part.reshape(deltas[name].shape).clone() for name, part in zip(deltas, parts, strict=True)}


@dataclass(frozen=True)
class BreadcrumbsOptions:
    """beta: part of the smallest magnitudes of each tensor that is dropped. gamma: above this part of them the largest are dropped too.
    alpha: of the sum."""

    beta: float = 0.85
    gamma: float = 0.993
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < self.gamma <= 1.0:
            raise ValueError(f"beta, gamma: expected 0 <= beta < gamma <= 1, got {self.beta!r}, {self.gamma!r}")
        above_zero("alpha", self.alpha)


@register(
    "model-breadcrumbs",
    paper=Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Davari, Belilovsky",
        2023,
        "2312.06795",
    ),
    formula="W + alpha sum_t m_t * t, m_t layer by layer 0 on the smallest beta and the largest 1 - gamma of |t|, else 1",
    options=BreadcrumbsOptions,
    reduces_to="deltas of whole weights",
    kind="deltas",
    fused="nothing: one selection to a tensor",
    choices="Ranks are counted in each tensor: of n entries in ascending order those numbered from round(beta n) up to "
    "round(gamma n) stay.",
)
def breadcrumbs(
    tasks: Sequence[Deltas], *, beta: float = 0.85, gamma: float = 0.993, alpha: float = 0.3
) -> dict[str, Tensor]:
    """The delta of a model that can do all tasks, from each one's :func:`task_vector`.

    Raises:
        ValueError: an option out of range, no task, or tasks of other tensors.
    """
    BreadcrumbsOptions(beta, gamma, alpha)
    if not tasks or any(set(task) != set(tasks[0]) for task in tasks):
        raise ValueError("tasks: expected at least one delta, all of the same tensors")
    merged: dict[str, Tensor] = {}
    for task in tasks:
        for name, tensor in task.items():
            flat = tensor.detach().reshape(-1)
            order = torch.sort(flat.abs(), stable=True).indices
            stays = order[round(beta * flat.numel()) : round(gamma * flat.numel())]
            trimmed = torch.zeros_like(flat)
            trimmed[stays] = alpha * flat[stays]
            merged[name] = merged[name] + trimmed.view_as(tensor) if name in merged else trimmed.view_as(tensor)
    return merged


@dataclass(frozen=True)
class SkillOptions:
    """density: part of the weights in the first region. steps, lr: of the search by gradient descent. start: first logit magnitude."""

    density: float = 0.01
    steps: int = 100
    lr: float = 1e7
    start: float = 10.0

    def __post_init__(self) -> None:
        _part("density", self.density)
        at_least_one("steps", self.steps)
        above_zero("lr", self.lr)
        above_zero("start", self.start)


@register(
    "skill-localisation",
    paper=Paper(
        "Task-Specific Skill Localization in Fine-tuned Language Models",
        "Panigrahi, Saunshi, Zhao, Arora",
        2023,
        "2302.06600",
    ),
    formula="min over S of loss(W + g * t), g = g0 (1 - sigmoid(S)) + (1 - g0) sigmoid(S), g0 the largest |t|; the region is g > 1/2",
    options=SkillOptions,
    reduces_to="deltas of whole weights",
    kind="deltas",
    fused="nothing: torch's functional_call with masked deltas",
    choices="S begins at -start everywhere, so that the first region is g0; plain gradient descent with a large rate, as "
    "sigmoid is flat "
    "there. The mask is rounded at 1/2 at the end. g0 is taken over all tensors together.",
)
def skill_localisation(
    model: nn.Module,
    deltas: Deltas,
    batches: Iterable[dict[str, Any]],
    *,
    density: float = 0.01,
    steps: int = 100,
    lr: float = 1e7,
    start: float = 10.0,
) -> dict[str, Tensor]:
    """The region of a fine-tuning that carries its skill: bool masks, True where the delta is to be grafted onto the base.

    Args:
        model: the base, unchanged. deltas: :func:`task_vector`'s of the fine-tuned one, or some of its tensors.
        batches: dictionaries of the model's arguments with labels, gone over again until ``steps`` are done.

    Returns:
        Name -> mask; ``{name: mask * deltas[name]}`` given to :func:`apply_` is the graft.

    Raises:
        ValueError: an option out of range, no batch, or a tensor that the model has not.
    """
    SkillOptions(density, steps, lr, start)
    given = list(batches)
    if not given:
        raise ValueError("batches: expected at least one, got none")
    own = dict(model.named_parameters())
    missing = [name for name in deltas if name not in own or own[name].shape != deltas[name].shape]
    if missing or not deltas:
        raise ValueError(f"deltas: expected tensors of the model's parameters, got {missing[:4] or 'none'}")
    from .scores import top_of_all

    chosen = top_of_all({name: delta.abs() for name, delta in deltas.items()}, density)
    first = {}
    for name, delta in deltas.items():
        mask = torch.zeros(delta.numel(), dtype=delta.dtype, device=delta.device)
        mask[chosen[name]] = 1.0
        first[name] = mask.view_as(delta)
    logits = {name: torch.full_like(delta, -start).requires_grad_(True) for name, delta in deltas.items()}

    def mask_of(name: str) -> Tensor:
        moved = torch.sigmoid(logits[name])
        return first[name] * (1 - moved) + (1 - first[name]) * moved

    for step in range(steps):
        whole = {
            name: (own[name].detach() + mask_of(name) * delta).to(own[name].dtype) for name, delta in deltas.items()
        }
        loss = torch.func.functional_call(model, whole, (), given[step % len(given)]).loss
        gradients = torch.autograd.grad(loss, list(logits.values()))
        with torch.no_grad():
            for logit, gradient in zip(logits.values(), gradients, strict=True):
                logit -= lr * gradient
    with torch.no_grad():
        return {name: mask_of(name) > 0.5 for name in deltas}
