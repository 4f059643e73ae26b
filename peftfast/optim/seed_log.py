"""A run as its seeds: 16 bytes a direction and step, from which the weights come back bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import math
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

logger = logging.getLogger("peftfast")

MAGIC = b"peftfast seeds 1\n"
# Seed, g, lr of the first group. A g of infinity: the loss was not finite and the step changed nothing. A g of NaN is no direction: the
# seed is the number of another group, whose lr is from here on the third field.
RECORD = struct.Struct("<qff")


@dataclass(frozen=True)
class Step:
    """Seeds of the directions, their projected gradients (None: the step changed nothing), and the lr of each group, float32."""

    seeds: list[int]
    scalars: list[float] | None
    lrs: list[float]


class SeedLog:
    """The file of a run, appended to. A record is written whole or, if the machine stops in between, dropped when read."""

    def __init__(self, file: BinaryIO, lrs: list[float], decays: list[float]) -> None:
        self._file, self._lrs, self._decays = file, lrs, decays

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> SeedLog:
        """Raises ValueError where there is a file already: a log belongs to one run from one set of weights."""
        try:
            file = open(path, "xb")
        except FileExistsError:
            raise ValueError(f"log: {path} exists already") from None
        text = json.dumps(header).encode()
        file.write(MAGIC + struct.pack("<q", len(text)) + text)
        file.flush()
        return cls(file, [group["lr"] for group in header["groups"]], _decays_of(header))

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any], taken: int) -> SeedLog:
        """Go on with a log whose run is resumed after ``taken`` steps; what was appended beyond these is cut off.

        Args:
            header: of the resumed run; its rates and its count of steps may be other ones than at the beginning.

        Raises:
            ValueError: the log is of another run, or ends before.
        """
        begun, steps = read(path)
        mine = json.loads(json.dumps(header))
        if _run_of(begun) != _run_of(mine):
            other = next(k for k in _run_of(mine) if _run_of(begun).get(k) != _run_of(mine)[k])
            raise ValueError(f"log: {path} is of another run: its {other} differs")
        lrs, size, missing = [group["lr"] for group in begun["groups"]], 0, taken - begun["steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a torn last record lies beyond what is kept, or steps are missing
            for step in itertools.islice(steps, max(missing, 0)):
                changed = sum(a != b for a, b in zip(lrs[1:], step.lrs[1:], strict=True))
                size += (begun["directions"] + changed) * RECORD.size
                lrs, missing = list(step.lrs), missing - 1
        if missing:
            raise ValueError(f"log: {path} does not end where the run goes on: {abs(missing)} steps are missing")
        file = open(path, "r+b")
        file.seek(len(MAGIC))
        (length,) = struct.unpack("<q", file.read(8))
        file.truncate(len(MAGIC) + 8 + length + size)
        file.seek(0, 2)
        return cls(file, lrs, _decays_of(begun))

    def check_decays(self, decays: list[float]) -> None:
        """Raises ValueError where the groups' weight decays are not those of the header, the only ones that a replay knows."""
        if decays != self._decays:
            raise ValueError(
                f"weight_decay: expected {self._decays} of the groups, as when the log was begun, which holds no other, got {decays}"
            )

    def append(self, step: Step) -> None:
        records = []
        for index in range(1, len(step.lrs)):
            if step.lrs[index] != self._lrs[index]:
                records.append(RECORD.pack(index, math.nan, step.lrs[index]))
        self._lrs = list(step.lrs)
        for k, seed in enumerate(step.seeds):
            scalar = math.inf if step.scalars is None else step.scalars[k]
            records.append(RECORD.pack(seed, scalar, step.lrs[0]))
        self._file.write(b"".join(records))
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()


def _decays_of(header: dict[str, Any]) -> list[float]:
    return [group["weight_decay"] for group in header["groups"]]


def _run_of(header: dict[str, Any]) -> dict[str, Any]:
    """What of a header is the same from beginning to end."""
    groups = [{k: v for k, v in group.items() if k != "lr"} for group in header["groups"]]
    return {k: v for k, v in header.items() if k != "steps"} | {"groups": groups}


def read(path: str | Path) -> tuple[dict[str, Any], Iterator[Step]]:
    """(header, steps). A torn or foreign last record ends the steps, with a warning.

    Raises:
        ValueError: not a log, or one whose header is torn.
    """
    data = Path(path).read_bytes()
    start = len(MAGIC) + 8
    if not data.startswith(MAGIC) or len(data) < start:
        raise ValueError(f"{path}: not a log of seeds")
    (size,) = struct.unpack("<q", data[len(MAGIC) : start])
    if size < 0 or len(data) < start + size:
        raise ValueError(f"{path}: the header is torn")
    header = json.loads(data[start : start + size])
    return header, _steps(str(path), header, data[start + size :])


def _steps(path: str, header: dict[str, Any], records: bytes) -> Iterator[Step]:
    from .mezo import SEED_STEP

    whole = len(records) // RECORD.size * RECORD.size
    torn = len(records) - whole
    count, taken = header["directions"], header["steps"]
    lrs = [group["lr"] for group in header["groups"]]
    pending: list[tuple[int, float]] = []
    for seed, scalar, lr in RECORD.iter_unpack(records[:whole]):
        if math.isnan(scalar):
            if not 0 < seed < len(lrs):
                torn += RECORD.size
                break
            lrs[seed] = lr
            continue
        expected = (header["seed"] + (taken * count + len(pending)) * SEED_STEP) % (1 << 64)
        if seed % (1 << 64) != expected:  # the seeds follow one another: what does not was never written by the run
            torn += RECORD.size
            break
        lrs[0] = lr
        pending.append((seed, scalar))
        if len(pending) == count:
            ok = all(math.isfinite(one) for _, one in pending)
            yield Step([one for one, _ in pending], [one for _, one in pending] if ok else None, list(lrs))
            pending = []
            taken += 1
    if torn or pending:
        warnings.warn(f"{path}: the last record is torn and was dropped", RuntimeWarning, stacklevel=3)


@torch.no_grad()
def replay(path: str | Path, params: nn.Module | Iterable[Any], *, steps: int | None = None) -> int:
    """Take the steps of a log (``MeZO(..., log=path)``) again, on the weights that the run began with: the same bits at the end.

    Args:
        path: the log. A torn last record is dropped with a warning.
        params: the module, or the parameters in the run's order; names, shapes and dtypes must be those of the header.
        steps: how many to take, from 0; all if not given, or if there are fewer.

    Returns:
        How many were taken.

    Raises:
        TypeError, ValueError: not a log, other parameters than the run's, or no such number of steps; before anything is written.
    """
    from .mezo import MeZO

    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise TypeError(f"steps: expected an int or None, got {type(steps).__name__}")
    if steps is not None and steps < 0:
        raise ValueError(f"steps: expected an int from 0, got {steps}")
    header, records = read(path)
    if header["mode"] != "exact":
        raise ValueError(f"{path}: a run with mode='inplace' drifts and cannot be replayed from its seeds")
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else _named(params)
    wanted = []
    for entry in header["parameters"]:
        tensor = named.get(entry["name"])
        if tensor is None:
            raise ValueError(f"{path}: params: no parameter {entry['name']}")
        got = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        if got != [entry["shape"], entry["dtype"]]:
            raise ValueError(f"{path}: params: {entry['name']}: expected {entry['shape']} {entry['dtype']}, got {got}")
        wanted.append((entry["name"], tensor))
    groups, first = [], 0
    for group in header["groups"]:
        members = wanted[first : first + group["count"]]
        first += group["count"]
        groups.append({"params": members, "lr": group["lr"], "weight_decay": group["weight_decay"]})
    window = header["window"]
    optimizer = MeZO(
        groups,
        eps=header["eps"],
        distribution=header["distribution"],
        directions=header["directions"],
        momentum=header["momentum"],
        momentum_window=window if header["momentum"] else None,
        stochastic_rounding=header["stochastic_rounding"],
        rank=header["rank"],
        seed=header["seed"],
    )
    return optimizer._replay(header, records, steps)


def _named(params: Iterable[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for item in params:
        name, tensor = item if isinstance(item, tuple) else (str(len(found)), item)
        found[name] = tensor
    return found
