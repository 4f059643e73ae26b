"""What the commands share in reading their arguments: one-line errors, checked numbers, packages and devices."""

import argparse
import importlib.metadata
import importlib.util
import logging
import math
import os
import shlex
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a UserError: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def integer(lowest: int, below: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``lowest``, and below ``below``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value < below:
            span = f"of at least {lowest}" + ("" if math.isinf(below) else f" and below {below}")
            raise argparse.ArgumentTypeError(f"expected a whole number {span}, got {text!r}")
        return value

    return read


def number(lowest: float, below: float = math.inf, *, above_lowest: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number in [lowest, below), or in (lowest, below)."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (lowest <= value < below) or (above_lowest and value == lowest):
            span = f"{'above' if above_lowest else 'of at least'} {lowest:g}"
            span += "" if math.isinf(below) else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"expected a number {span}, got {text!r}")
        return value

    return read


def require(command: str, packages: Mapping[str, str]) -> None:
    """Every importable name in ``packages`` (name -> what to ask pip for) is installed, of a version that this admits, or a UserError
    names all that are not."""
    missing = [asked for name, asked in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{command} needs {', '.join(missing)}, which {verb} not installed: {_pip_install(missing)}")
    others = {asked: found for asked in packages.values() if (found := _other_version(asked))}
    if others:
        told = ", ".join(f"{asked} ({found} is installed)" for asked, found in others.items())
        raise UserError(f"{command} needs {told}: {_pip_install(list(others))}")


def _other_version(asked: str) -> str:
    """The version that is installed where ``asked``, as in "transformers>=5", does not admit it; else an empty string."""
    from packaging.requirements import Requirement

    requirement = Requirement(asked)
    if not requirement.specifier:
        return ""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:  # on the path, and not by pip
        return ""
    return "" if requirement.specifier.contains(found, prereleases=True) else found


def _pip_install(packages: list[str]) -> str:
    return shlex.join(["pip", "install", *packages])


def writable_directory(option: str, path: Path) -> Path:
    """``path``, made if need be and tried by writing into it; a UserError says why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write into {path}: {error.strerror or error}") from None
    return path


def creatable(option: str, path: Path) -> None:
    """Whether ``path`` could be made, or replaced, tried by a directory in the nearest one above it that is there; nothing is left.

    Raises:
        UserError: it could not.
    """
    nearest = next(above for above in path.absolute().parents if above.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".peftfast-", dir=nearest))
    except OSError as error:
        raise UserError(f"{option}: cannot write into {nearest}: {error.strerror or error}") from None


def first_line(error: BaseException) -> str:
    """An error's message as one line, for messages of other libraries that run over several: the first, and what a colon at its end
    announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announces = len(lines) > 1 and lines[0].endswith(":")
    return " ".join(lines[: 1 + announces]) if lines else type(error).__name__


def device_name(requested: str) -> str:
    """A torch device that exists here: "auto" is cuda where there is one, else cpu. Imports torch."""
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {requested!r}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UserError(
                f"--device: {requested!r} asked for, but torch {torch.__version__} finds {count} CUDA devices"
            )
    return requested


def quiet_libraries() -> None:
    """No notices from the Hugging Face libraries; called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT 0.21 asks transformers 5 by a name that it is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # bitsandbytes asks for a kernel from the hub when it is imported on a CPU with AVX512-BF16, and warns that it has none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
