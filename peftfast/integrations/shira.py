"""PEFT's SHiRA layers (arXiv 2406.13175) on fused kernels, by exchanging the class of each layer object, as ``peft.py`` does for LoRA.

Stock SHiRA clones the weight in every forward, keeps the clone for the backward and forms a dense gradient of it. Here the delta is
patched into a copy that lives during each product, or for a few rows is a product of its own beside the base's, and the gradient is
formed on the support. The base is never written, files are PEFT's. Imported only where PEFT is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from peft.tuners.shira.layer import Linear as StockLinear
from torch import Tensor, nn

from .. import functional as F
from ..functional.derivatives import transformed
from ..functional.sparse_delta import apart_rows
from ..functional.sparse_pattern import SparsePattern, smallest_index_dtype
from ..nn.hooks import hooked, overridden, swap_class
from ..nn.nf4 import is_bitsandbytes_4bit
from ..ops import native, sparse_dequantize
from ..ops import sparse_delta as sparse_ops
from ..ops.backends import FLOAT_DTYPES
from . import bitsandbytes as bnb
from .patch_report import LayerReport, log_once
from .peft import _RESTORE
from .peft_guards import DTENSOR, FSDP, TRANSFORMED, _parameter_reason, dense_reason, input_reason
from .peft_versions import adapter_layers

logger = logging.getLogger("peftfast")

_PATTERNS = "_peftfast_patterns"  # on a patched layer: adapter -> (indices as PEFT holds them, their version, pattern or reason)


class FusedLinear(StockLinear):
    """``peft.tuners.shira.Linear`` with the fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(
            self, FusedLinear
        ):  # bound before unpatch and kept, as accelerate's hooks keep a module's forward
            return type(self).forward(self, x, *args, **kwargs)
        # Not guards but PEFT's own states, in which its forward is the right one and nothing is lost.
        if args or kwargs or self.disable_adapters or self.merged or not _names(self):
            return super().forward(x, *args, **kwargs)
        tracing = not torch.compiler.is_compiling() and transformed()
        reason = TRANSFORMED if tracing else _why_stock(self) or _why_stock_for(self, x)
        if reason:
            log_once(reason)
            return super().forward(x)
        return _fused_forward(self, x)

    def _get_name(self) -> str:
        return "Linear"


def _names(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.shira_weight]


def _pattern(layer: Any, name: str) -> SparsePattern | str:
    """The adapter's support, or why it is none. Made once, and again when PEFT's indices are another tensor or were written."""
    indices, device = layer.shira_indices.get(name), layer.shira_weight[name].device
    if indices is None:
        return "an adapter without indices: its file is not loaded yet"
    known = layer.__dict__.setdefault(_PATTERNS, {})
    entry = known.get(name)
    if entry is not None and entry[0] is indices and entry[1] == indices._version and entry[3] == device:
        return entry[2]
    shape = torch.Size((layer.out_features, layer.in_features))
    found: SparsePattern | str
    try:
        if bool((indices < 0).any()) or bool((indices >= indices.new_tensor(shape)[:, None]).any()):
            raise ValueError("indices beyond the weight")
        flat = indices[0].to(device, torch.int64) * shape[1] + indices[1].to(device)
        found = SparsePattern(smallest_index_dtype(flat, shape), shape)
    except (TypeError, ValueError) as error:
        found = f"SHiRA {error}"
    known[name] = (indices, indices._version, found, device)
    return found


def _why_stock(layer: Any) -> str:
    """Why this layer runs PEFT's forward whatever its input is, or an empty string."""
    names = _names(layer)
    if len(names) > 1:
        return "several active adapters"
    base = layer.base_layer
    four_bit = is_bitsandbytes_4bit(base)
    if not four_bit and type(base) is not nn.Linear:
        return f"the base layer is {type(base).__module__.partition('.')[0]}'s {type(base).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the weight is stored transposed"
    # Before the hooks: DeepSpeed and accelerate set some of their own where the weight is not there.
    reason = _parameter_reason("the base weight", base.weight) or _parameter_reason("the base bias", base.bias)
    if reason:
        return reason
    if hooked(base):
        return "a hook on the base layer"
    reason = bnb.why_not_served(base) if four_bit else dense_reason("the base weight", base.weight)
    reason = reason or dense_reason("the base bias", base.bias)
    if reason:
        return reason
    if not four_bit and base.weight.dtype not in FLOAT_DTYPES:
        return f"the base weight is {base.weight.dtype}"
    for name in names:
        values = layer.shira_weight[name]
        reason = _parameter_reason("shira_weight", values) or dense_reason("shira_weight", values)
        if reason:
            return reason
        if values.dtype not in FLOAT_DTYPES:
            return f"shira_weight is {values.dtype}"
        if values.device != base.weight.device:
            return f"shira_weight is on {values.device}, the base weight on {base.weight.device}"
        pattern = _pattern(layer, name)
        if isinstance(pattern, str):
            return pattern
        if pattern.count != values.numel():
            return f"{values.numel()} values for {pattern.count} indices"
    return _backend_reason(base.weight.device, four_bit)


def _weight_dtype(base: Any) -> torch.dtype:
    """What stock decodes or reads the base weight as."""
    return bnb.quant_state(base).dtype if is_bitsandbytes_4bit(base) else base.weight.dtype


def _why_stock_for(layer: Any, x: Tensor) -> str:
    """Why this input is not served, or an empty string."""
    base = layer.base_layer
    reason = input_reason(base, x)
    if reason:
        return reason
    dtype = _weight_dtype(base)
    if not torch.is_autocast_enabled(x.device.type) and x.dtype != dtype:
        return f"an input of {x.dtype} on a weight of {dtype}"
    if isinstance(x, DTENSOR):
        return "an input that is a DTensor"
    return ""


def _backends(device: torch.device, four_bit: bool) -> tuple[dict[str, None], str]:
    """The backends that a layer's operators run on, and why one of them has no fused form here."""
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    one, index, values = empty((1, 1)), empty(1, dtype=torch.int32), empty(1)
    probes: list[tuple[Any, tuple[Any, ...]]] = [
        (sparse_ops.sparse_delta_patch, (one, index, values)),
        (sparse_ops.sparse_delta_dvalues, (one, one, index, torch.float32)),
    ]
    if four_bit:
        packed, table = empty((32, 1), dtype=torch.uint8), empty(16)
        delta = (index, values, empty(2, dtype=torch.int32), 64, torch.float32)
        stored = (packed, values, table, 64, (64,), None, None, None)
        probes.append((sparse_dequantize.sparse_delta_dequantize, (*stored, *delta)))
    used: dict[str, None] = {}
    for operator, arguments in probes:
        chosen = operator.select(*arguments).backend
        if chosen == "reference":
            reasons = [f"{row.backend}: {reason}" for row, ok, reason in operator.verdicts(*arguments) if not ok]
            listed = "; ".join(reasons) or "reference was asked for"
            return used, f"no fused implementation of {operator.name} ({listed})"
        used[chosen] = None
    return used, ""


@functools.cache
def _backend_reason(device: torch.device, four_bit: bool) -> str:
    return _backends(device, four_bit)[1]


def _kernel_name(layer: Any) -> str:
    """The kernels of many rows and, where few rows have one of their own, that."""
    base = layer.base_layer
    four_bit = is_bitsandbytes_4bit(base)
    used = [f"cpu {native.cpu_isa()}" if n == "cpu" else n for n in _backends(base.weight.device, four_bit)[0]]
    kernel = f"{'nf4 + ' if four_bit else ''}sparse_delta [{', '.join(used)}]"
    pattern = _pattern(layer, _names(layer)[0]) if _names(layer) else ""
    if isinstance(pattern, str):
        return kernel
    block_size = bnb.quant_state(base).blocksize if four_bit else None
    rows = apart_rows(base.weight.device.type, pattern, block_size, _weight_dtype(base))
    beside = "nf4_linear + " if four_bit else ""
    return f"{kernel}, up to {rows} rows {beside}sparse_delta_product_" if rows else kernel


def _fused_forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    (name,) = _names(layer)
    pattern = _pattern(layer, name)
    if isinstance(pattern, str):
        raise RuntimeError(pattern)
    values, scale = layer.shira_weight[name], layer.scaling[name]
    return F.sparse_delta_linear(
        x,
        # PEFT takes the weight's data: the weight has no gradient, be it trained or not.
        bnb.weight_of(base) if is_bitsandbytes_4bit(base) else base.weight.detach(),
        pattern,
        values if scale == 1.0 else values * scale,
        base.bias if base.bias is None or base.bias.dtype == x.dtype else base.bias.to(x.dtype),
    )


def _is_shira(module: nn.Module) -> bool:
    return isinstance(module, StockLinear)


def _why_not_swapped(module: nn.Module) -> str:
    if overridden(module):
        return "forward is overridden on the layer itself"
    if isinstance(module, FusedLinear) or type(module) is StockLinear:
        return ""
    if isinstance(module, FSDP):
        return "wrapped by fully_shard before patching: patch first"
    return f"no fused form of PEFT's shira.{type(module).__name__}"


def patch(model: nn.Module) -> None:
    """Exchange the class of every SHiRA layer. One whose guards hold is exchanged too: they are asked again at each call."""
    for _, module in adapter_layers(model):
        if type(module) is not StockLinear or _why_not_swapped(module):
            continue
        base: Any = module.base_layer
        if getattr(base, bnb.REPACK_FLAG, False):
            module.__dict__[_RESTORE] = {bnb.REPACK_FLAG: getattr(base, bnb.REPACK_FLAG)}
            setattr(base, bnb.REPACK_FLAG, False)
        swap_class(module, FusedLinear)


def unpatch(model: nn.Module) -> None:
    for _, module in adapter_layers(model):
        if not isinstance(module, FusedLinear):
            continue
        if type(module) is not FusedLinear:
            logger.warning("unpatch: a layer that fully_shard has wrapped keeps its fused class")
            continue
        for name, value in module.__dict__.pop(_RESTORE, {}).items():
            setattr(module.base_layer, name, value)
        module.__dict__.pop(_PATTERNS, None)
        swap_class(module, StockLinear)


def report_rows(model: nn.Module) -> dict[str, LayerReport]:
    """Path of each SHiRA layer -> its row."""
    _backend_reason.cache_clear()
    rows = {}
    for name, module in adapter_layers(model):
        if _is_shira(module):
            reason = _why_not_swapped(module) or _why_stock(module)
            rows[name] = LayerReport(
                name=name,
                layer="shira.Linear",
                kernel="" if reason else _kernel_name(module),
                reason=reason,
                patched=isinstance(module, FusedLinear),
                note=bnb.REPACK_NOTE if _RESTORE in module.__dict__ else "",
            )
    return rows
