"""Environment variables that choose between kernels, asked at every call of a layer."""

import os
from typing import Any

# os.environ encodes and decodes at every question: its own dictionary answers ten times faster.
_environment: Any = getattr(os.environ, "_data", os.environ)
_keys: list[Any] = []


def watch(variable: str) -> Any:
    """The variable's key for :func:`raw`; :func:`settings` tells its values apart from now on."""
    key = os.environ.encodekey(variable) if _environment is not os.environ else variable  # type: ignore[attr-defined]
    if key not in _keys:
        _keys.append(key)
    return key


def raw(key: Any) -> Any:
    """The variable's value as os.environ keeps it, or None."""
    return _environment.get(key)


def settings() -> tuple[Any, ...]:
    """All that the environment says to the choice of kernels."""
    return tuple([_environment.get(key) for key in _keys])


class Choice:
    """``choice()`` gives the value of ``variable``, or the first of ``choices`` where it is not set.

    Raises:
        ValueError: it is none of ``choices``.
    """

    def __init__(self, variable: str, choices: tuple[str, ...]) -> None:
        self.variable, self.choices = variable, choices
        self._key = watch(variable)

    def __call__(self) -> str:
        if not _environment.get(self._key):
            return self.choices[0]
        name = os.environ[self.variable]
        if name not in self.choices:
            raise ValueError(f"{self.variable}: expected one of {', '.join(self.choices)}, got {name!r}")
        return name
