"""Reading a safetensors file."""

from __future__ import annotations

import os

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
