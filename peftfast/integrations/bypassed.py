"""Recognising a model whose adapter layers are not called, as Unsloth and axolotl's LoRA kernels make it, without importing either.

Both bind functions of their own to module objects (``forward`` of an MLP, ``apply_qkv`` and ``apply_o`` of an attention), and Unsloth
exchanges the forward of model classes too; these functions read the adapters' weights by attribute and do not call the adapter layers,
so that exchanging these layers' classes would change nothing and the report would promise what does not happen. axolotl switches its
kernels on by itself where a configuration says nothing of them.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_UNSLOTH = "Unsloth has patched this model: left alone"
_AXOLOTL = (
    "axolotl's LoRA kernels are on in this model: left alone (lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel: false)"
)
_REASONS = {"unsloth": _UNSLOTH, "unsloth_zoo": _UNSLOTH, "axolotl": _AXOLOTL}
_ATTRIBUTES = ("forward", "apply_qkv", "apply_o", "apply_in_proj_fused", "apply_out_proj")


def _reason(function: Any) -> str:
    """Why a function that a module runs calls no adapter layers, or an empty string."""
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    if package == "axolotl":
        # axolotl's original_apply_qkv and other forwards of it call the layers; an embedding holds none that would be fused.
        name = str(getattr(function, "__name__", ""))
        if not name.startswith("apply_") or name == "apply_lora_embedding":
            return ""
    return _REASONS.get(package, "")


def why_left_alone(model: nn.Module) -> str:
    """The reason, or an empty string. Costs a dictionary look-up where neither was ever imported."""
    if not any(name in sys.modules for name in _REASONS):
        return ""
    for module in model.modules():
        own = [module.__dict__[name] for name in _ATTRIBUTES if name in module.__dict__]
        for function in (*own, type(module).forward):
            reason = _reason(function)
            if reason:
                return reason
    return ""
