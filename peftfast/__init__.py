"""Fused kernels for parameter-efficient fine-tuning: ``report = peftfast.patch(model)`` on a PEFT model, modules and functions
for everyone else.

The names are resolved when first used: ``python -m peftfast doctor`` must run where ``import torch`` fails.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional, nn, optim
    from .functional import SparsePattern
    from .integrations import PatchReport, patch, report, unpatch
    from .integrations.adapter_files import load_adapter, save_adapter
    from .methods.adapting import adapt

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "SparsePattern",
    "__version__",
    "adapt",
    "functional",
    "load_adapter",
    "nn",
    "optim",
    "patch",
    "report",
    "save_adapter",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in ("functional", "nn", "optim"):
        return importlib.import_module(f".{name}", __name__)
    if name == "SparsePattern":
        return importlib.import_module(".functional", __name__).SparsePattern
    if name == "adapt":
        return importlib.import_module(".methods.adapting", __name__).adapt
    if name in ("load_adapter", "save_adapter"):
        return getattr(importlib.import_module(".integrations.adapter_files", __name__), name)
    if name in __all__:
        return getattr(importlib.import_module(".integrations", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
