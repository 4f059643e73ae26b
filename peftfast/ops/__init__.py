"""Operators of the ``peftfast`` namespace of torch.library, and the tables that choose their implementations."""

from . import lora, nf4, nf4_linear, philox
from .dispatch import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for module in (philox, nf4, nf4_linear, lora)
    for operator in vars(module).values()
    if isinstance(operator, Operator)
}

__all__ = ["OPERATORS", "Operator", "lora", "nf4", "nf4_linear", "philox"]
