"""Activations as matrices, and results in the activations' shape."""

from collections.abc import Sequence

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """``[..., N]`` as ``[M, N]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous y in another shape, for a Function's result. Not a view of it: autograd refuses to write into a view that a Function
    gives, as ``nn.ReLU(inplace=True)`` behind a layer does."""
    return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)


def unviewed(y: Tensor) -> Tensor:
    """The library's product of a 3-D x with a bias is a view of a matrix: no view, for the same reason."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y
