"""A choice that an environment variable makes, asked at every call of a layer."""

import os
from typing import Any

_environment: Any = getattr(os.environ, "_data", os.environ)  # os.environ decodes at every question


class Choice:
    """``choice()`` gives the value of ``variable``, or the first of ``choices`` where it is not set.

    Raises:
        ValueError: it is none of ``choices``.
    """

    def __init__(self, variable: str, choices: tuple[str, ...]) -> None:
        self.variable, self.choices = variable, choices
        self._key: Any = os.environ.encodekey(variable) if _environment is not os.environ else variable

    def __call__(self) -> str:
        if not _environment.get(self._key):
            return self.choices[0]
        name = os.environ[self.variable]
        if name not in self.choices:
            raise ValueError(f"{self.variable}: expected one of {', '.join(self.choices)}, got {name!r}")
        return name
