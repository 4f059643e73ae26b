"""Entry into other libraries' models. Importing this imports none of them."""

from __future__ import annotations

import dataclasses
import sys
import warnings

from torch import nn

from . import bypassed
from .patch_report import LayerReport, MLPReport, PatchReport, log_once

__all__ = ["LayerReport", "MLPReport", "PatchReport", "patch", "report", "unpatch"]


def _peft_is_loaded() -> bool:
    # A model can hold PEFT layers only if PEFT made them in this process.
    return "peft.tuners.tuners_utils" in sys.modules


def _unknown_version() -> str:
    """Why no layer of the installed PEFT is known, or an empty string."""
    from .peft_versions import peft_version_reason

    return peft_version_reason()


def patch(model: nn.Module, *, strict: bool = False, groups: bool = True, gated: bool = True) -> PatchReport:
    """Run the adapter layers of a PEFT model on fused kernels: in place, reversible by :func:`unpatch`, idempotent.

    The class of each layer object is exchanged, and the modules that hold several of them are watched by two hooks: parameters, names,
    state_dict, isinstance, merging, saving stay PEFT's. A layer that cannot be served keeps its stock forward, and the report says why.

    Args:
        model: any module that holds PEFT layers.
        strict: raise instead of leaving a layer stock.
        groups: let layers of one block that get the same tensor (q, k, v; gate, up) run together, as the first forwards show them: one
            pass over x for all, forward and backward. Two hooks are set on each block. False: each layer runs alone.
        gated: form the product of a gated MLP, down(act(gate) * up), in one pass and keep neither it nor act(gate) for the backward, in
            every module whose forward is that by its code and that holds an adapter layer. Its class is exchanged too.

    Returns:
        The report, as :func:`report` gives it.

    Raises:
        TypeError: not a module. RuntimeError: ``strict``, and a layer stays stock; nothing is changed then.

    Warns:
        UserWarning: the model holds no adapter layer, or its functions do not call them: Unsloth has patched it, or axolotl's LoRA
            kernels are on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    before = report(model)
    if not before.layers:
        warnings.warn("peftfast.patch: no PEFT adapter layer found in this model", UserWarning, stacklevel=2)
        return before
    if strict and before.stock:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in before.stock.items())
        raise RuntimeError(f"peftfast.patch(strict=True): these layers would stay stock:\n{lines}")
    reason = bypassed.why_left_alone(model)
    if reason:
        warnings.warn(f"peftfast.patch: {reason}", UserWarning, stacklevel=2)
        return before
    if not _unknown_version():
        from . import peft, peft_gated_mlp, shira

        peft.patch(model, groups)
        shira.patch(model)
        if gated:
            peft_gated_mlp.patch(model)
        else:
            peft_gated_mlp.unpatch(model)
    after = report(model)
    for row in after.layers:
        # A layer whose class is not exchanged asks no guards when it is called.
        if row.reason and not row.patched:
            log_once(row.reason)
    return after


def unpatch(model: nn.Module) -> None:
    """Give every layer that :func:`patch` exchanged its stock class back, and undo what patch set beside it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if _peft_is_loaded() and not _unknown_version():
        from . import peft, peft_gated_mlp, shira

        peft_gated_mlp.unpatch(model)
        peft.unpatch(model)
        shira.unpatch(model)


def report(model: nn.Module) -> PatchReport:
    """What each adapter layer of the model runs on now, or would after :func:`patch`, and why the others are stock. Recomputed at
    every call, as the layers' own guards are: weights move after patching. Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not _peft_is_loaded():
        return PatchReport(())
    unknown = _unknown_version()
    if unknown:
        from .peft_versions import report_of_stock

        return report_of_stock(model, unknown)
    from . import peft, peft_gated_mlp, shira

    rows = shira.report_rows(model)
    layers = tuple(rows.get(row.name, row) for row in peft.report(model).layers)
    reason = bypassed.why_left_alone(model)
    if reason:
        layers = tuple(dataclasses.replace(row, kernel="", reason=row.reason or reason) for row in layers)
        return PatchReport(layers)
    return PatchReport(layers, peft_gated_mlp.report(model))
