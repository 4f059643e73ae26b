"""PEFT's LoRA layers on fused kernels, by exchanging the class of each layer object.

A swapped layer tests its guards at every call and runs PEFT's own forward when one of them holds, so nothing has to be undone
when a weight is moved, an adapter disabled or a hook added. Imported only where PEFT is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import peft
import torch
from packaging.specifiers import SpecifierSet
from peft.tuners import lora as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import functional as F
from ..nn.nf4 import is_bitsandbytes_4bit
from ..ops import lora as lora_ops
from ..ops import native
from ..ops import nf4 as nf4_ops
from ..ops.backends import FLOAT_DTYPES
from . import bitsandbytes as bnb
from .patch_report import LayerReport, PatchReport

logger = logging.getLogger("peftfast")

TESTED_PEFT = ">=0.21,<0.22"
_RESTORE = "_peftfast_restore"  # on a patched layer: what unpatch puts back on the base layer
_logged: set[str] = set()

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _FSDP: tuple[type, ...] = (FSDPModule,)
    _DTENSOR: tuple[type, ...] = (DTensor,)
else:
    _FSDP = _DTENSOR = ()


class _Fused:
    """Mixed in before PEFT's class: the forward that asks the guards."""

    _stock_name: str

    def _get_name(self) -> str:
        return self._stock_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Not guards but PEFT's own states, in which its forward is the right one and nothing is lost.
        if args or kwargs or self.disable_adapters or self.merged or not self._names():  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        reason = _why_stock(self) or _why_stock_for(self, x)
        if reason:
            _log_once(reason)
            return super().forward(x)  # type: ignore[misc]
        return _fused_forward(self, x)

    def _names(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]  # type: ignore[attr-defined]


class FusedLinear(_Fused, peft_lora.Linear):
    """``peft.tuners.lora.Linear`` with the fused forward."""

    _stock_name = "Linear"


_SWAPS: dict[type, type] = {peft_lora.Linear: FusedLinear}

if hasattr(peft_lora, "Linear4bit"):

    class FusedLinear4bit(_Fused, peft_lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` with the fused forward."""

        _stock_name = "Linear4bit"

    _SWAPS[peft_lora.Linear4bit] = FusedLinear4bit

_UNSWAPS = {fused: stock for stock, fused in _SWAPS.items()}


def _log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("an adapter layer runs stock: %s", reason)


@functools.cache
def _peft_version_reason() -> str:
    if SpecifierSet(TESTED_PEFT, prereleases=True).contains(peft.__version__):
        return ""
    return f"PEFT {peft.__version__} is outside the tested versions {TESTED_PEFT}"


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _parameter_reason(name: str, parameter: Tensor | None) -> str:
    if parameter is None:
        return ""
    if hasattr(parameter, "ds_id"):
        return f"{name} is partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta:
        return f"{name} is on the meta device: offloaded, or not loaded yet"
    if isinstance(parameter, _DTENSOR):
        return f"{name} is a DTensor"
    return ""


def _why_stock(layer: Any) -> str:
    """Why this layer runs PEFT's forward whatever its input is, or an empty string. Ordered from the layer inwards."""
    if _peft_version_reason():
        return _peft_version_reason()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1:
        return "several active adapters"
    base = layer.base_layer
    four_bit = is_bitsandbytes_4bit(base)
    if not four_bit and type(base) is not nn.Linear:
        return f"the base layer is {type(base).__module__.partition('.')[0]}'s {type(base).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the weight is stored transposed"
    if _hooked(base):
        return "a hook on the base layer"
    reason = _parameter_reason("the base weight", base.weight) or _parameter_reason("the base bias", base.bias)
    if reason:
        return reason
    if four_bit:
        reason = bnb.why_not_served(base)
        if reason:
            return reason
    for name in names:
        if name in layer.lora_variant:
            variant = layer.lora_variant[name]
            kind = variant if isinstance(variant, type) else type(variant)
            return f"the PEFT variant {kind.__name__.removesuffix('Variant')} has no fused form"
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
            return "lora_A, lora_B or lora_dropout is not PEFT's own module"
        if _hooked(a) or _hooked(b) or _hooked(dropout):
            return "a hook on lora_A, lora_B or lora_dropout"
        for part, module in (("lora_A", a), ("lora_B", b)):
            reason = _parameter_reason(part, module.weight) or _parameter_reason(f"{part}'s bias", module.bias)
            if reason:
                return reason
            if module.weight.device != base.weight.device:
                return f"{part} is on {module.weight.device}, the base weight on {base.weight.device}"
            if module.weight.dtype not in FLOAT_DTYPES:
                return f"{part} is {module.weight.dtype}"
        if a.bias is not None:
            return "lora_A has a bias"
    if not four_bit and base.weight.dtype not in FLOAT_DTYPES:
        return f"the base weight is {base.weight.dtype}"
    return _backend_reason(base.weight.device, four_bit)


def _why_stock_for(layer: Any, x: Tensor) -> str:
    """Why this input is not served, or an empty string."""
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        return f"an input of {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
    weight = layer.base_layer.weight
    if x.device != weight.device:
        return f"an input on {x.device}, the base weight on {weight.device}"
    if not is_bitsandbytes_4bit(layer.base_layer):
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
            return f"an input of {x.dtype} on a weight of {weight.dtype}"
    if isinstance(x, _DTENSOR):
        return "an input that is a DTensor"
    return ""


def _probe_arguments(device: torch.device) -> dict[Any, tuple[Any, ...]]:
    """The smallest call of each operator on a path, to ask its table with."""
    a = torch.empty((1, 8), device=device)
    s = torch.empty((1, 1), device=device)
    uint8 = torch.empty((32, 1), dtype=torch.uint8, device=device)
    one = torch.empty(1, device=device)
    table = torch.empty(16, device=device)
    return {
        lora_ops.lora_shrink: (a, a, None, 0.0, 1.0, torch.bfloat16),
        lora_ops.lora_expand_: (a, s, a.T, None, None, 0.0, 1.0),
        lora_ops.lora_weight_grad: (s, a, None, 0.0, 1.0, torch.float32),
        lora_ops.lora_dy_grads: (a, s, a.T, 1.0, torch.float32),
        nf4_ops.nf4_dequantize_out: (uint8, one, table, 64, (64,), None, None, None, torch.empty(64, device=device)),
    }


def _backends(device: torch.device, four_bit: bool) -> tuple[dict[str, None], str]:
    """The backends that a layer's operators run on (in order, without repeats), and why one of them has no fused form here."""
    used: dict[str, None] = {}
    for operator, arguments in _probe_arguments(device).items():
        if operator is nf4_ops.nf4_dequantize_out and not four_bit:
            continue
        chosen = operator.select(*arguments).backend
        if chosen == "reference":
            reasons = [f"{row.backend}: {reason}" for row, ok, reason in operator.verdicts(*arguments) if not ok]
            return (
                used,
                f"no fused implementation of {operator.name} ({'; '.join(reasons) or 'reference was asked for'})",
            )
        used[chosen] = None
    return used, ""


@functools.cache
def _cached_backend_reason(device: torch.device, four_bit: bool) -> str:
    return _backends(device, four_bit)[1]


def _backend_reason(device: torch.device, four_bit: bool) -> str:
    # What is installed does not change during a process; the environment's choice may, between tests, and report asks anew.
    return _cached_backend_reason(device, four_bit)


def _kernel_name(layer: Any) -> str:
    device, four_bit = layer.base_layer.weight.device, is_bitsandbytes_4bit(layer.base_layer)
    used = [f"cpu {native.cpu_isa()}" if name == "cpu" else name for name in _backends(device, four_bit)[0]]
    return f"{'nf4 + ' if four_bit else ''}lora [{', '.join(used)}]"


def _fused_forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    (name,) = layer._names()
    four_bit = is_bitsandbytes_4bit(base)
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return F.lora_linear(
        x,
        bnb.weight_of(base) if four_bit else base.weight,
        a.weight,
        b.weight,
        scaling=layer.scaling[name],
        bias=base.bias,
        lora_bias=b.bias,
        dropout_p=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        training=dropout.training,
        compute_dtype=bnb.compute_dtype_for(base, x) if four_bit else None,
    )


def _adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _fused_class(module: nn.Module) -> type | None:
    """The fused class a layer has now. Not its type alone: fully_shard derives a class of its own from it."""
    return next((kind for kind in type(module).__mro__ if kind in _UNSWAPS), None)


def _why_not_swapped(module: nn.Module) -> str:
    """Why a layer's class is not one that can be exchanged, or an empty string."""
    if _fused_class(module) is not None or type(module) in _SWAPS:
        return "forward is overridden on the layer itself" if "forward" in module.__dict__ else ""
    if isinstance(module, _FSDP):
        return "wrapped by fully_shard before patching: patch first"
    family = type(module).__module__.removeprefix("peft.tuners.").split(".")[0]
    return f"no fused form of PEFT's {family}.{type(module).__name__}"


def patch(model: nn.Module) -> None:
    """Exchange the class of every layer that has a fused one. A layer whose guards hold is exchanged too: they are asked again at
    each call, and may have gone by then."""
    for _, module in _adapter_layers(model):
        if type(module) not in _SWAPS or _why_not_swapped(module) or _peft_version_reason():
            continue
        base = module.base_layer
        if getattr(base, bnb.REPACK_FLAG, False):
            module.__dict__[_RESTORE] = {bnb.REPACK_FLAG: getattr(base, bnb.REPACK_FLAG)}
            setattr(base, bnb.REPACK_FLAG, False)
        module.__class__ = _SWAPS[type(module)]


def unpatch(model: nn.Module) -> None:
    for _, module in _adapter_layers(model):
        fused, base = _fused_class(module), getattr(module, "base_layer", None)
        if fused is None:
            continue
        if fused is not type(module):
            logger.warning("unpatch: a layer that fully_shard has wrapped keeps its fused class")
            continue
        for name, value in module.__dict__.pop(_RESTORE, {}).items():
            setattr(base, name, value)
        module.__class__ = _UNSWAPS[fused]


def report(model: nn.Module) -> PatchReport:
    _cached_backend_reason.cache_clear()
    rows = []
    for name, module in _adapter_layers(model):
        fused = _fused_class(module)
        stock = type(module) if fused is None else _UNSWAPS[fused]
        family = stock.__module__.removeprefix("peft.tuners.").split(".")[0]
        reason = _why_not_swapped(module) or _why_stock(module)
        rows.append(
            LayerReport(
                name=name,
                layer=f"{family}.{stock.__name__}",
                kernel="" if reason else _kernel_name(module),
                reason=reason,
                patched=fused is not None,
                note=bnb.REPACK_NOTE if _RESTORE in module.__dict__ else "",
            )
        )
    return PatchReport(tuple(rows))
