"""Several adapted layers of one input as one module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .hooks import hooked
from .lora import LoRALinear


class LoRALinears(nn.ModuleList):
    """Several :class:`LoRALinear` of one x, as q, k, v or gate, up: called with x it gives what they give one by one, by
    :func:`peftfast.functional.lora_linears`: one pass over x for all, and one dX that is never added up by autograd.

    A ModuleList, so that each layer stays what it is: its parameters lie under its index, and it can be called, merged or read alone.
    Layers that differ in training or in compute dtype, and merged ones, are run alone; so are all where one has a hook or a forward of
    its own.

    Args:
        layers: at least one, of the same in_features.
    """

    def __init__(self, layers: Iterable[LoRALinear]) -> None:
        layers = list(layers)
        if not layers or not all(isinstance(layer, LoRALinear) for layer in layers):
            raise TypeError(f"layers: expected LoRALinear layers, got {[type(layer).__name__ for layer in layers]}")
        if len({layer.in_features for layer in layers}) > 1:
            raise ValueError(f"layers: expected the same in_features, got {[layer.in_features for layer in layers]}")
        super().__init__(layers)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        layers: list[Any] = list(self)
        kinds = {(layer.training, layer._compute_dtype()) for layer in layers}
        if len(kinds) > 1 or any(
            layer.merged or hooked(layer) or type(layer).forward is not LoRALinear.forward for layer in layers
        ):
            return tuple(layer(input) for layer in layers)
        ((training, compute_dtype),) = kinds
        projections = [
            F.Projection(
                layer._base(),
                layer.lora_A,
                layer.lora_B,
                scaling=layer.scaling,
                bias=layer.bias,
                lora_bias=layer.lora_bias,
                magnitude=layer.lora_magnitude_vector,
                dropout_p=layer.lora_dropout,
            )
            for layer in layers
        ]
        return F.lora_linears(input, projections, training=training, compute_dtype=compute_dtype)
