"""torch.empty as a trap: filled with NaN, or 0xAA.. for integers, when peftfast's own code asks for it."""

import sys

import pytest
import torch
from torch import Tensor

_CALLERS = ("peftfast.", "tests.test_poison")


def _fill(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta" or type(tensor) is not Tensor:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max - 85)


def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.empty and torch.empty_like for callers inside peftfast, kernels included; everyone else gets the real one."""
    for name, traced in (
        ("empty", torch.ops.aten.empty.memory_format),
        ("empty_like", torch.ops.aten.empty_like.default),
    ):
        real = getattr(torch, name)

        def poisoned(*args, _real=real, _traced=traced, **kwargs):  # type: ignore[no-untyped-def]
            if (
                torch.compiler.is_compiling()
            ):  # dynamo, which looks functions up by identity, no longer knows the real one
                return _traced(args if isinstance(args[0], int) else args[0], **kwargs)
            tensor = _real(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _fill(tensor) if caller.startswith(_CALLERS) else tensor

        monkeypatch.setattr(torch, name, poisoned)
