"""Optimisers, each imported when first asked for."""

import importlib
from typing import Any

_MODULES = {
    "MeZO": ".mezo",
    "SparseAdamW": ".sparse_adamw",
    "SparseSM3": ".sparse_sm3",
    "replay": ".seed_log",
    "trainable_scales": ".quantised",
}

__all__ = ["MeZO", "SparseAdamW", "SparseSM3", "replay", "trainable_scales"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
