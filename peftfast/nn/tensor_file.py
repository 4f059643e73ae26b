"""What is read from a safetensors file, and what can be written to one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..extras import imported


def read_tensors(user: str, argument: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The file's tensors on the CPU, for ``user``, a public function.

    Raises:
        ValueError: not a safetensors file, or a torn one; ``argument`` and the file are named. OSError: it cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = imported("safetensors", user)
    try:
        return imported("safetensors.torch", user).load_file(path)  # type: ignore[no-any-return]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{argument}: {path}: expected a whole safetensors file: {error}") from None


def written_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous. A tensor that two names share is there twice: safetensors refuses shared storage."""
    form = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}
