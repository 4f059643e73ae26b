"""Dropout masks of the definition, kept: a check asks for one mask up to ten times, for the definition in several precisions and its
gradients, and Philox in torch's int64 tensors is most of the time of a small case."""

from collections import OrderedDict

import torch
from torch import Tensor

from peftfast.reference import philox

MOST, LARGEST = 64, 2**18  # masks, and elements of one


def keep() -> None:
    """Let :func:`peftfast.reference.philox.dropout_mask` remember what it has made of plain tensors on a CPU."""
    make = philox.dropout_mask
    known: OrderedDict[tuple[int, int, int, float], Tensor] = OrderedDict()

    def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
        if type(seed) is not Tensor or not seed.is_cpu or rows * columns > LARGEST or _watched():
            return make(seed, rows, columns, p)
        key = int(seed), rows, columns, p
        if key not in known:
            known[key] = make(seed, rows, columns, p)
            if len(known) > MOST:
                known.popitem(last=False)
        return known[key]

    philox.dropout_mask = dropout_mask


def _watched() -> bool:
    """Whether operations are traced, counted or transformed, so that one left out would be missed."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
