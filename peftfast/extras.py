"""Packages that peftfast does without until somebody asks for what needs them: the error then names the package and the extra."""

import importlib
from typing import Any

# Package -> the extras of pyproject.toml that bring it.
EXTRAS = {"peft": ("methods", "peft"), "safetensors": ("methods", "peft"), "scipy": ("methods",)}


def missing(user: str, package: str) -> ModuleNotFoundError:
    extras = " or ".join(f"[{name}]" for name in EXTRAS.get(package, ()))
    brought = f" (peftfast's extra {extras} brings it)" if extras else ""
    return ModuleNotFoundError(
        f"{user} needs {package}, which is not installed: pip install {package}{brought}", name=package
    )


def imported(module: str, user: str) -> Any:
    """The module, for ``user``, a public function.

    Raises:
        ModuleNotFoundError: its package is not installed; the message names ``user``, the package and the extra.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise missing(user, package) from None
