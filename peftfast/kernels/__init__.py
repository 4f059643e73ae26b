"""Triton kernels: in a checkout they lie in the folder ``kernels`` beside the package, in a wheel here."""

from pathlib import Path

_folder = Path(__file__).resolve().parents[2] / "kernels"
if _folder.is_dir() and _folder.parent.joinpath("pyproject.toml").is_file():
    __path__.append(str(_folder))
