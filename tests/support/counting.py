"""What a call does, seen from the dispatcher: the operators it makes and the tensors that it leaves for its backward."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Views and allocations compute nothing; fill_ is the poison that the tests put into empty tensors.
_FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "expand",
    "fill_",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "t",
    "transpose",
    "unsqueeze",
    "view",
    "_unsafe_view",
}


class Calls(TorchDispatchMode):
    """``with Calls() as calls``: ``calls.compute`` counts the computing operators by name. What a peftfast operator does inside is not
    seen: it counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.compute[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves inside the block."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Storage address -> bytes, of distinct storages that are not empty."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
