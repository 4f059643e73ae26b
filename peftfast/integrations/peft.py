"""PEFT's LoRA layers on fused kernels, by exchanging the class of each layer object.

A swapped layer tests its guards at every call and runs PEFT's own forward when one of them holds, so nothing has to be undone
when a weight is moved, an adapter disabled or a hook added. Imported only where PEFT is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from ..functional.dora import forget_norms
from ..nn.hooks import overridden, swap_class
from . import bitsandbytes as bnb
from . import peft_groups, peft_merge
from .patch_report import LayerReport, PatchReport
from .peft_call import VERDICT, active_names
from .peft_guards import FSDP, forget_backends, kernel_name, why_stock
from .peft_versions import adapter_layers, name_of

logger = logging.getLogger("peftfast")

_RESTORE = "_peftfast_restore"  # on a patched layer: what unpatch puts back on the base layer


class _Fused:
    """Mixed in before PEFT's class: the forward that asks the guards."""

    _stock_name: str
    _peftfast_grouped = True

    def _get_name(self) -> str:
        return self._stock_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, _Fused):  # bound before unpatch and kept, as accelerate's hooks keep a module's forward
            return type(self).forward(self, x, *args, **kwargs)
        return peft_groups.forward(self, super().forward, x, args, kwargs)  # type: ignore[misc]

    # PEFT writes the base weight behind its version counter, whose row norms DoRA keeps: merged, and where factors are initialised.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with _norms_forgotten(self):
            super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        with _norms_forgotten(self):
            super().unmerge()  # type: ignore[misc]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with _norms_forgotten(self):
            super().update_layer(*args, **kwargs)  # type: ignore[misc]


@contextlib.contextmanager
def _norms_forgotten(layer: Any) -> Iterator[None]:
    try:
        yield
    finally:
        forget_norms(layer.get_base_layer().weight)


class FusedLinear(_Fused, peft_lora.Linear):
    """``peft.tuners.lora.Linear`` with the fused forward."""

    _stock_name = "Linear"


_SWAPS: dict[type, type] = {peft_lora.Linear: FusedLinear}

if hasattr(peft_lora, "Linear4bit"):

    class FusedLinear4bit(_Fused, peft_lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` with the fused forward, and merged on its own device."""

        _stock_name = "Linear4bit"

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            with _norms_forgotten(self):
                peft_merge.merge(self, super(_Fused, self).merge, safe_merge, adapter_names)

        def unmerge(self) -> None:
            with _norms_forgotten(self):
                peft_merge.unmerge(self, super(_Fused, self).unmerge)

    _SWAPS[peft_lora.Linear4bit] = FusedLinear4bit

_UNSWAPS = {fused: stock for stock, fused in _SWAPS.items()}


def _fused_class(module: nn.Module) -> type | None:
    """The fused class a layer has now. Not its type alone: fully_shard derives a class of its own from it."""
    return next((kind for kind in type(module).__mro__ if kind in _UNSWAPS), None)


def _why_not_swapped(module: nn.Module) -> str:
    """Why a layer's class is not one that can be exchanged, or an empty string."""
    if _fused_class(module) is not None or type(module) in _SWAPS:
        return "forward is overridden on the layer itself" if overridden(module) else ""
    if isinstance(module, FSDP):
        return "wrapped by fully_shard before patching: patch first"
    return f"no fused form of PEFT's {name_of(type(module))}"


def patch(model: nn.Module, groups: bool = True) -> None:
    """Exchange the class of every layer that has a fused one. A layer whose guards hold is exchanged too: they are asked again at
    each call, and may have gone by then. With ``groups`` layers that get the same tensor run together."""
    for _, module in adapter_layers(model):
        if type(module) not in _SWAPS or _why_not_swapped(module):
            continue
        base = module.base_layer
        forget_norms(base.weight)  # what PEFT did to it before
        if getattr(base, bnb.REPACK_FLAG, False):
            module.__dict__[_RESTORE] = {bnb.REPACK_FLAG: getattr(base, bnb.REPACK_FLAG)}
            setattr(base, bnb.REPACK_FLAG, False)
        swap_class(module, _SWAPS[type(module)])
    if groups:
        peft_groups.install(model)
    else:
        peft_groups.remove(model)


def unpatch(model: nn.Module) -> None:
    peft_groups.remove(model)
    for _, module in adapter_layers(model):
        fused, base = _fused_class(module), getattr(module, "base_layer", None)
        if fused is None:
            continue
        if fused is not type(module):
            logger.warning("unpatch: a layer that fully_shard has wrapped keeps its fused class")
            continue
        for name, value in module.__dict__.pop(_RESTORE, {}).items():
            setattr(base, name, value)
        module.__dict__.pop(VERDICT, None)
        module.__dict__.pop(peft_merge.UNMERGED, None)
        forget_norms(getattr(base, "weight", None))
        swap_class(module, _UNSWAPS[fused])


def report(model: nn.Module) -> PatchReport:
    forget_backends()
    rows = []
    layers = adapter_layers(model)
    named = {id(module): name for name, module in layers}
    beside: dict[int, tuple[str, ...]] = {}
    for members in peft_groups.groups_of(model):
        for member in members:
            beside[id(member)] = tuple(
                named[id(other)] for other in members if other is not member and id(other) in named
            )
    for name, module in layers:
        fused = _fused_class(module)
        stock = type(module) if fused is None else _UNSWAPS[fused]
        reason = _why_not_swapped(module)
        names = [] if reason else active_names(module)
        reason = reason or why_stock(module, names)
        rows.append(
            LayerReport(
                name=name,
                layer=name_of(stock),
                kernel="" if reason else kernel_name(module, names),
                reason=reason,
                patched=fused is not None,
                note=bnb.REPACK_NOTE if _RESTORE in module.__dict__ else "",
                together=() if reason else beside.get(id(module), ()),
            )
        )
    return PatchReport(tuple(rows))
