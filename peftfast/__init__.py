"""Fused kernels for parameter-efficient fine-tuning: ``report = peftfast.patch(model)`` on a PEFT model, modules and functions
for everyone else."""

from . import functional, nn
from .integrations import PatchReport, patch, report, unpatch

__version__ = "0.1.0"

__all__ = ["PatchReport", "__version__", "functional", "nn", "patch", "report", "unpatch"]
