"""The versions of PEFT whose layers are known. The rest of the integration names parts of PEFT that another version may lack, so this
is asked first, and alone where the answer is no."""

from __future__ import annotations

from typing import Any

import peft
from packaging.specifiers import SpecifierSet
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .patch_report import LayerReport, PatchReport

TESTED_PEFT = ">=0.18,<0.22"


def peft_version_reason() -> str:
    if SpecifierSet(TESTED_PEFT, prereleases=True).contains(peft.__version__):
        return ""
    return f"PEFT {peft.__version__} is outside the tested versions {TESTED_PEFT}"


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def name_of(kind: type) -> str:
    """What a report calls a class of PEFT's, as in ``"lora.Linear4bit"``."""
    return f"{kind.__module__.removeprefix('peft.tuners.').split('.')[0]}.{kind.__name__}"


def report_of_stock(model: nn.Module, reason: str) -> PatchReport:
    """The report where every layer is stock, for one reason."""
    rows = (LayerReport(name, name_of(type(layer)), "", reason, False) for name, layer in adapter_layers(model))
    return PatchReport(tuple(rows))
