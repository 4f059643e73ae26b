"""Reading a safetensors file."""

from __future__ import annotations

import os

from torch import Tensor


def read_tensors(argument: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The file's tensors on the CPU.

    Raises:
        ValueError: not a safetensors file, or a torn one; ``argument`` and the file are named. OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{argument}: {path}: expected a whole safetensors file: {error}") from None
