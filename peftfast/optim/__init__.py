"""Optimisers, each imported when first asked for."""

import importlib
from typing import Any

_MODULES = {"SparseAdamW": ".sparse_adamw", "MeZO": ".mezo"}

__all__ = ["MeZO", "SparseAdamW"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
