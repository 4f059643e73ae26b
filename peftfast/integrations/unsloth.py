"""Recognising a model that Unsloth has patched, without importing Unsloth.

Unsloth binds functions of its own to module objects (``forward`` of an MLP, ``apply_qkv`` and ``apply_o`` of an attention) and
exchanges the forward of model classes; they read the adapters' weights by attribute and do not call the adapter layers at all, so
exchanging these layers' classes would change nothing and the report would promise what does not happen.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

REASON = "Unsloth has patched this model: left alone"
_PACKAGES = ("unsloth", "unsloth_zoo")
_ATTRIBUTES = ("forward", "apply_qkv", "apply_o")


def _is_unsloths(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in _PACKAGES


def why_left_alone(model: nn.Module) -> str:
    """The reason, or an empty string. Costs a dictionary look-up where Unsloth was never imported."""
    if not any(name in sys.modules for name in _PACKAGES):
        return ""
    for module in model.modules():
        own = [module.__dict__[name] for name in _ATTRIBUTES if name in module.__dict__]
        if any(map(_is_unsloths, [*own, type(module).forward])):
            return REASON
    return ""
