"""What data-parallel workers tell each other: MeZO's the run's seed once and the differences of losses at each step, SpIEL's where a
support may grow and the gradients there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


class Exchange:
    """One worker's end. Without a group every answer is the worker's own."""

    def __init__(self, process_group: Any) -> None:
        self.active = process_group is not None and process_group is not False
        if self.active and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("process_group: torch.distributed is not initialised")
        self._group = None if process_group is True else process_group
        self._size = torch.distributed.get_world_size(self._group) if self.active else 1

    def agree_on(self, seed: int, names: Sequence[str], shapes: Sequence[torch.Size]) -> int:
        """The first worker's seed, for all.

        Raises:
            ValueError: the workers train other parameters, or in another order.
        """
        if not self.active:
            return seed
        digest = hashlib.sha256(
            repr([(name, tuple(shape)) for name, shape in zip(names, shapes, strict=True)]).encode()
        )
        answers: list[Any] = [None] * self._size
        torch.distributed.all_gather_object(answers, (seed, digest.hexdigest()), group=self._group)
        if len({digest for _, digest in answers}) != 1:
            raise ValueError("params: the workers do not train the same parameters in the same order")
        return answers[0][0]

    def check_same(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Compare the workers' tensors by sums of their bits; waits for the device.

        Raises:
            ValueError: they differ.
        """
        if not self.active or not tensors:
            return
        # NCCL takes tensors of a GPU alone, beside which a few may lie on the CPU.
        device = next((tensor.device for tensor in tensors if not tensor.is_cpu), tensors[0].device)
        sums = torch.stack([_sum_of_bits(tensor.detach()).to(device) for tensor in tensors])
        every = [torch.empty_like(sums) for _ in range(self._size)]
        torch.distributed.all_gather(every, sums, group=self._group)
        differ = torch.stack([other != every[0] for other in every]).any(dim=0).tolist()
        if any(differ):
            listed = [name for name, one in zip(names, differ, strict=True) if one]
            raise ValueError(
                f"params: expected the same weights on all workers, got others in {', '.join(listed[:4])}"
                + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
                + "; seed alike, or broadcast the first worker's"
            )

    def gather(self, differences: Tensor) -> Tensor:
        """``[directions, micro-batches]`` of this worker -> those of all, rank after rank."""
        if not self.active:
            return differences
        every = [torch.empty_like(differences) for _ in range(self._size)]
        torch.distributed.all_gather(every, differences.contiguous(), group=self._group)
        return torch.cat(every, dim=1)

    def of_the_first_(self, tensor: Tensor) -> None:
        """The first worker's tensor, for all, in place."""
        if self.active:
            torch.distributed.broadcast(tensor, group=self._group, group_src=0)

    def mean_(self, tensor: Tensor) -> None:
        """The mean of the workers' tensors, in place, the same bits for all."""
        if self.active:
            torch.distributed.all_reduce(tensor, group=self._group)
            tensor /= self._size
