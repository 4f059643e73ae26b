"""The GPU as a configuration sees it, and the table of measured configurations that may exist for it."""

import functools
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

_FOLDER = Path(__file__).parent

Config = TypeVar("Config")


@dataclass(frozen=True)
class Device:
    """What the heuristics ask of a GPU. The defaults suit one that nobody has named: nothing here ever raises for a
    new model.

    Attributes:
        name: as the driver gives it, "NVIDIA H200".
        capability: compute capability, (9, 0).
        multiprocessors: how many programs run at once is a multiple of this.
    """

    name: str = ""
    capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 108

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may ask for; for a capability not listed, what its generation has at
        least."""
        known = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
        return 1024 * known.get(self.capability, 99 if self.capability >= (8, 0) else 64)

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton multiplies on tensor cores here. Below compute capability 8.0 it makes products of scalar multiply-adds, whose
        operands do not fit into registers (triton 3.7.1, compiled for sm_75)."""
        return self.capability >= (8, 0)

    @property
    def small(self) -> bool:
        """Whether a multiprocessor has sm_89's shared memory, as sm_86 and sm_120, or less: a program of 64 KiB is alone there."""
        return self.shared_memory < 160 * 1024

    @property
    def roomy(self) -> bool:
        """sm_90 and sm_100: sums of a warp group's products stay in its registers, and shared memory holds the tiles of many programs,
        which the copy engine may bring."""
        return self.capability >= (9, 0) and not self.small

    @property
    def crowded(self) -> bool:
        """sm_120, where ptxas spills 8 or 16 bytes of tiles that fit everywhere else (triton 3.7.1, 2026-11-22)."""
        return self.capability >= (10, 0) and self.small

    @property
    def slug(self) -> str:
        """The name of the device's table: lower case, everything else than letters and digits a hyphen."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def parts(programs: int, steps: int, device: Device, each: int = 4) -> int:
    """Into how many parts the sum of ``steps`` blocks that a program makes is cut, so that ``each`` programs for a multiprocessor, or
    nearly, share it; a part has at least two steps. Not more than that: with one program beyond, all wait for one multiprocessor's
    fifth."""
    return max(1, min(each * device.multiprocessors // max(1, programs), steps // 2))


def measured(device: Device, op: str, key: str, kind: type[Config], folder: Path = _FOLDER) -> Config | None:
    """The configuration of ``op`` for ``key`` in ``<slug>.json``, or None where there is no table or no such entry.

    A table maps op to key to the fields of ``kind``; a field left out keeps its default.

    Raises:
        ValueError: the file is not such a table. The message names the file and the entry.
    """
    if not device.slug:
        return None
    path = folder / f"{device.slug}.json"
    entry = _table(path).get(op, {}).get(key)
    if entry is None:
        return None
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not set(entry) <= known:
        raise ValueError(
            f"{path}: {op} / {key}: unknown fields {sorted(set(entry) - known)}, expected some of {sorted(known)}"
        )
    try:
        return kind(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {op} / {key}: {error}") from error


@functools.cache
def _table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected an object of operators, got {type(table).__name__}")
    for op, entries in table.items():
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(f"{path}: {op}: expected an object that maps a key to the fields of a configuration")
    return table


def require_powers_of_two(config: object, *names: str) -> None:
    """Raise ValueError where one of the named fields is not a positive power of two, which is all that Triton takes."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise ValueError(f"{name}: expected a power of two, got {value!r}")


def require_at_least(config: object, **least: int) -> None:
    """Raise ValueError where one of the named fields is not an integer of at least so much."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name}: expected an integer of at least {smallest}, got {value!r}")


def bucket(value: int, buckets: tuple[int, ...]) -> int:
    """The smallest of ascending ``buckets`` that holds ``value``, or the largest."""
    return next((limit for limit in buckets if value <= limit), buckets[-1])
