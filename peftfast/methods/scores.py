"""Which weights of a model's layers matter most, from gradients over data: for the methods that choose a support by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .adapting import Targets, is_four_bit


def top_of_all(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Name -> flat positions, int64 ascending, of the largest part ``density`` of all scores together, at least one; of equal ones the
    first."""
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    count = max(1, round(density * flat.numel()))
    at = torch.sort(flat, descending=True, stable=True).indices[:count].sort().values
    found, start = {}, 0
    for name, score in scores.items():
        low, high = torch.searchsorted(at, torch.tensor([start, start + score.numel()], device=at.device)).tolist()
        found[name] = at[low:high] - start
        start += score.numel()
    return found


def dense_only(targets: Targets) -> None:
    """Skip the layers in 4 bits, whose weights have no gradient."""
    for name, linear in list(targets.modules.items()):
        if is_four_bit(linear):
            targets.skip(name, "a weight in 4 bits has no gradient")


def with_gradients(targets: Targets, title: str, each: Callable[[dict[str, Any]], None]) -> None:
    """Call ``each(batch)`` for the data's batches, with the layers' weights requiring gradients in the meantime."""
    weights = [linear.weight for linear in targets.modules.values()]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in targets.data(title):
                each(batch)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def blocks_of(names: Iterator[str] | list[str]) -> dict[str, list[str]]:
    """Path of a block -> names of its layers: a block is a path up to its first number ("encoder.layer.3"); "" for layers in none."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        found.setdefault("" if at is None else ".".join(parts[: at + 1]), []).append(name)
    return found
