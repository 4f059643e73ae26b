"""How often autograd Functions ran, each once a call, whether by its own forward or by the library's recording of it."""

from collections.abc import Callable
from typing import Any

import pytest

from peftfast.functional import lora, lora_gated, lora_group, lora_projections
from peftfast.functional.gated_activation import by_library as gated_product
from peftfast.functional.node import known

BY_LIBRARY = [gated_product, *[one.by_library for one in (lora, lora_gated, lora_group, lora_projections)]]


def calls_by_library() -> tuple[int, int]:
    """Forward and backward calls that the autograd library has made, of all Functions."""
    counted = [one.native.counts() for one in known() if one.native is not None]
    return sum(one["forwards"] for one in counted), sum(one["backwards"] for one in counted)


def count(monkeypatch: pytest.MonkeyPatch, functions: Any, ran: Callable[[Any, Any], None]) -> None:
    """Tell ``ran`` each Function of ``functions`` that runs and what it gives."""
    inside: list[Any] = []

    def counted(plain: Any, function: Any) -> Any:
        def call(*args: Any) -> Any:
            outermost = function not in inside
            inside.append(function)
            try:
                found = plain(*args)
            finally:
                inside.pop()
            if outermost:
                ran(function, found)
            return found

        return call

    for function in functions:
        monkeypatch.setattr(function, "forward", staticmethod(counted(function.forward, function)))
    for entry in BY_LIBRARY:
        if entry._function in functions:
            entry._choose()  # which its first call would do in the place of what counts
            for name in ("call", "general"):
                monkeypatch.setattr(entry, name, counted(getattr(entry, name), entry._function))
