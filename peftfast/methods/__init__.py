"""Named methods from the literature, each a recipe over the families; imported when first asked for."""

import importlib
from typing import Any

_MODULES = {
    "AdapterHandle": ".handle",
    "S2FT": ".s2ft",
    "SpIEL": ".spiel",
    "load_shira": ".shira",
    "methods": ".registry",
    "save_shira": ".shira",
}

__all__ = ["AdapterHandle", "S2FT", "SpIEL", "load_shira", "methods", "save_shira"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
