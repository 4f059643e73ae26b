"""Operators of the ``peftfast`` namespace of torch.library, and the tables that choose their implementations."""

from types import ModuleType

from . import (
    gated_activation,
    lora,
    lora_dora,
    lora_library,
    lora_product,
    lora_terms,
    nf4,
    nf4_linear,
    nf4_product,
    philox,
    sparse_adamw,
    sparse_delta,
    sparse_dequantize,
    zeroth_order,
    zeroth_order_linear,
)
from .dispatch import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for module in list(vars().values())
    if isinstance(module, ModuleType)
    for operator in vars(module).values()
    if isinstance(operator, Operator)
}

__all__ = [
    "OPERATORS",
    "Operator",
    "gated_activation",
    "lora",
    "lora_dora",
    "lora_library",
    "lora_product",
    "lora_terms",
    "nf4",
    "nf4_linear",
    "nf4_product",
    "philox",
    "sparse_adamw",
    "sparse_delta",
    "sparse_dequantize",
    "zeroth_order",
    "zeroth_order_linear",
]
