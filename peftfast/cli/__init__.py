"""The commands behind ``python -m peftfast``. Standard library only until a command runs."""

from .errors import UserError

__all__ = ["UserError"]
