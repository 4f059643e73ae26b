"""What a layer's or a method's options are checked by."""

from __future__ import annotations

from typing import Any


def at_least_one(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def probability(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")


def above_zero(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def finite(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float("-inf") < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``valid``."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in valid):
        raise ValueError(f"{name}: expected one of {valid}, got {value!r}")
