"""What data-parallel workers tell each other: the run's seed once, and the differences of losses at each step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Exchange:
    """One worker's end. Without a group every answer is the worker's own."""

    def __init__(self, process_group: Any) -> None:
        self._active = process_group is not None and process_group is not False
        if self._active and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("process_group: torch.distributed is not initialised")
        self._group = None if process_group is True else process_group
        self._size = torch.distributed.get_world_size(self._group) if self._active else 1

    def agree_on(self, seed: int, names: Sequence[str], shapes: Sequence[torch.Size]) -> int:
        """The first worker's seed, for all.

        Raises:
            ValueError: the workers train other parameters, or in another order.
        """
        if not self._active:
            return seed
        digest = hashlib.sha256(
            repr([(name, tuple(shape)) for name, shape in zip(names, shapes, strict=True)]).encode()
        )
        answers: list[Any] = [None] * self._size
        torch.distributed.all_gather_object(answers, (seed, digest.hexdigest()), group=self._group)
        if len({digest for _, digest in answers}) != 1:
            raise ValueError("params: the workers do not train the same parameters in the same order")
        return answers[0][0]

    def gather(self, differences: Tensor) -> Tensor:
        """``[directions, micro-batches]`` of this worker -> those of all, rank after rank."""
        if not self._active:
            return differences
        every = [torch.empty_like(differences) for _ in range(self._size)]
        torch.distributed.all_gather(every, differences.contiguous(), group=self._group)
        return torch.cat(every, dim=1)
