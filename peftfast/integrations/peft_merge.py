"""Merging into a patched 4-bit layer on the layer's own device, and taking the merge back exactly.

PEFT dequantises the whole weight, adds, carries the sum to the CPU and quantises it there; to unmerge it subtracts and quantises once
more, so that the weight that comes back is not the weight that was. Here the bytes that PEFT's merge gives come from
``functional.nf4_merging``, in slabs and without leaving the device, and the packed weight of before is kept beside the merged one
(0.52 bytes an element, while the layer is merged), so that unmerging restores it to the bit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..functional.nf4_merging import merged_weight
from ..nn.nf4 import is_bitsandbytes_4bit
from ..ops.backends import FLOAT_DTYPES
from . import bitsandbytes as bnb
from .patch_report import log_once
from .peft_guards import _parameter_reason

UNMERGED = "_peftfast_unmerged"  # in a merged layer's __dict__: what unmerging puts back


@dataclass
class Unmerged:
    """The base layer of before the first merge, and what the last one wrote: where that is no longer in place, nothing is restored.
    ``bias`` is None while no merge has written it."""

    weight: Any
    bias: Tensor | None
    names: list[str]
    written: Any = None

    def holds(self, layer: Any) -> bool:
        return (
            layer.base_layer.weight is self.written
            and self.names == list(layer.merged_adapters)
            and all(name in layer.lora_A for name in self.names)
        )


def _why_stock(layer: Any, names: list[str]) -> str:
    """Why PEFT's own merge has to serve these adapters, or an empty string."""
    base = layer.base_layer
    reason = "" if is_bitsandbytes_4bit(base) else "the base layer is no 4-bit layer"
    reason = reason or _parameter_reason("the base weight", base.weight) or bnb.why_not_served(base)
    if reason:
        return reason
    for name in names:
        if name in layer.lora_variant:
            return f"merging the PEFT variant {type(layer.lora_variant[name]).__name__.removesuffix('Variant')}"
        for part, module in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
            weight = module.weight
            reason = "" if type(module) is nn.Linear else f"{part} is not PEFT's own module"
            reason = reason or _parameter_reason(part, weight) or _parameter_reason(f"{part}'s bias", module.bias)
            if reason:
                return reason
            if weight.device != base.weight.device or weight.dtype not in FLOAT_DTYPES:
                return f"{part} is {weight.dtype} on {weight.device}"
    return ""


def merge(layer: Any, stock: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """PEFT's ``merge``: adapter after adapter, each quantised before the next is added, as PEFT has it.

    ``lora_B``'s bias is merged as it is computed, times the scaling; PEFT 0.21 forgets the scaling there.
    """
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]
    if not names:
        return
    reason = _why_stock(layer, names)
    if reason:
        log_once(f"{reason}, so PEFT's own 4-bit merge runs")
        stock(safe_merge=safe_merge, adapter_names=names)
        return
    for name in names:
        if layer.lora_bias[name] and layer.base_layer.bias is None:
            raise RuntimeError(f"merge: the lora_bias of {name} needs a base bias, and the base layer has none")
    warnings.warn(
        "Merge lora module to 4-bit linear may get different generations due to rounding errors.", stacklevel=3
    )
    for name in names:
        _merge_one(layer, name, safe_merge)


@torch.no_grad()
def _merge_one(layer: Any, name: str, safe_merge: bool) -> None:
    base, scaling = layer.base_layer, float(layer.scaling[name])
    kept = layer.__dict__.get(UNMERGED)
    if not layer.merged_adapters:
        kept = Unmerged(base.weight, None, [])
    elif kept is not None and not kept.holds(layer):
        kept = None  # someone else has merged as well: what came before that is not known
    old, nf4 = base.weight, bnb.weight_of(base)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    new = merged_weight(nf4, a, b, scaling, finite=safe_merge)
    bias = None
    if layer.lora_bias[name]:
        bias = base.bias + (layer.lora_B[name].bias * scaling).to(base.bias.dtype)
    if new is None or (safe_merge and bias is not None and not bool(bias.isfinite().all())):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
    # As PEFT's, the new weight states the dtype of the sum, in which the next merge dequantises it.
    dtype = torch.promote_types(nf4.dtype, torch.promote_types(a.dtype, b.dtype))
    base.weight = replace(new, dtype=dtype).to_bitsandbytes(old.dtype)
    _hand_state(base, old, base.weight)
    if bias is not None:
        if kept is not None and kept.bias is None:
            kept.bias = base.bias.detach().clone()
        base.bias.data = bias
    layer.merged_adapters.append(name)
    if kept is not None:
        kept.names, kept.written = list(layer.merged_adapters), base.weight
        layer.__dict__[UNMERGED] = kept
    else:
        layer.__dict__.pop(UNMERGED, None)


def _hand_state(base: Any, old: Any, new: Any) -> None:
    """The quantisation state where bitsandbytes keeps it a second time: on the module that the parameter names, if any."""
    new.module = getattr(old, "module", None)
    for module in (new.module, base):
        if module is not None and getattr(module, "quant_state", None) is not None:
            module.quant_state = new.quant_state


@torch.no_grad()
def unmerge(layer: Any, stock: Any) -> None:
    """PEFT's ``unmerge``, to the bytes of before the merge where they were kept; PEFT's own where they were not."""
    kept = layer.__dict__.pop(UNMERGED, None)
    base = layer.base_layer
    if kept is None or not layer.merged_adapters or not kept.holds(layer):
        if layer.merged_adapters:
            log_once("the weight of before the merge is not known, so PEFT's own 4-bit unmerge runs")
        stock()
        return
    merged = base.weight
    same = kept.weight.device == merged.device
    base.weight = kept.weight if same else kept.weight.to(merged.device)
    _hand_state(base, merged, base.weight)
    if kept.bias is not None:
        base.bias.data = kept.bias.to(base.bias.device)
    layer.merged_adapters.clear()
