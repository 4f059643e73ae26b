"""Zeroth order on a 4-bit base: the block scales as parameters (QZO, arXiv 2505.13430)."""

from __future__ import annotations

from torch import nn

from ..nn.nf4 import NF4Linear, unnested


def trainable_scales(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Make the block scales of every :class:`peftfast.nn.NF4Linear` in ``module`` float32 parameters named ``absmax``.

    What the layers compute does not change, nor do the keys of their state_dict; double quantisation of the scales is undone, since a
    byte cannot move by ε. The parameters do not require grad (decoding has no backward): give the result to :class:`MeZO`.

    Returns:
        (name, parameter) pairs: ``MeZO(trainable_scales(model), ...)``.

    Raises:
        TypeError: not a module. ValueError: there is no such layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    found = []
    for name, layer in module.named_modules():
        if not isinstance(layer, NF4Linear):
            continue
        if "absmax" not in layer._parameters:
            weight = unnested(layer.nf4)
            for field in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
                layer._buffers.pop(field)
            layer.absmax = nn.Parameter(weight.absmax.clone(), requires_grad=False)
            for field in ("nested_absmax", "nested_code", "nested_offset"):
                layer.register_buffer(field, None, persistent=False)
        found.append((f"{name}.absmax" if name else "absmax", layer._parameters["absmax"]))
    if not found:
        raise ValueError("module: expected at least one NF4Linear, found none")
    return found  # type: ignore[return-value]
