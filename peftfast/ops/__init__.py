"""Operators of the ``peftfast`` namespace of torch.library, and the tables that choose their implementations."""

from . import lora, lora_dora, lora_terms, nf4, nf4_linear, philox, sparse_adamw, sparse_delta, zeroth_order
from .dispatch import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for module in (philox, nf4, nf4_linear, lora, lora_terms, lora_dora, sparse_delta, sparse_adamw, zeroth_order)
    for operator in vars(module).values()
    if isinstance(operator, Operator)
}

__all__ = [
    "OPERATORS",
    "Operator",
    "lora",
    "lora_dora",
    "lora_terms",
    "nf4",
    "nf4_linear",
    "philox",
    "sparse_adamw",
    "sparse_delta",
    "zeroth_order",
]
