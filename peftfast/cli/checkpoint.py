"""The output directory of a fine-tuning: a PEFT adapter or a model and, until the training is over, what is needed to go on with it.

``OUT`` is replaced whole at each save (:mod:`.atomic`), so that the result and the state beside it are always of one step. The state
lies in ``OUT/checkpoint``: a checkpoint of transformers' Trainer and, written last, ``complete.json``, which says that the rest is
whole, of which step it is and of which command, and how many bytes each file has. Without that marker a checkpoint is not read, nor
with other files than it names: the Trainer goes on without an optimiser's state where that has been lost in a copy, and says nothing.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from . import arguments, atomic
from .errors import UserError

FOLDER, MARKER = "checkpoint", "complete.json"
SEEDS = "run.seeds"  # MeZO's log of the run: 16 bytes a direction and step
# Options that may change from one start of a training to the next; under any other it would be another training.
FREE = {"out", "overwrite", "resume", "device", "logging_steps", "save_steps", "max_steps", "num_train_epochs"}


def check(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Whether ``out`` may be written to.

    Raises:
        UserError: it is a file or holds something else, it holds an adapter that was not to be replaced, or there is nothing whole to
            resume from.
    """
    atomic.recover(out)
    if not os.path.lexists(out):  # a link that leads nowhere is there
        arguments.creatable("--out", out)
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"--out: {out} is not a directory")
    arguments.creatable("--out", out)
    if _result(out):
        begun = (out / FOLDER).is_dir()
        if resume:
            if not begun:
                raise UserError(f"--resume: the training in {out} is over; --overwrite begins another")
            marker(out)
        elif not overwrite:
            also = "--resume goes on with it, " if begun else ""
            raise UserError(f"--out: {out} holds {_result(out)} already; {also}--overwrite replaces it")
    elif any(out.iterdir()):
        raise UserError(f"--out: {out} holds files and no adapter; expected a new, an empty or an adapter's directory")


def _result(out: Path) -> str:
    """What a run left in ``out``, or "". A model is told from any other, which is never replaced, by its log or its checkpoint."""
    if (out / "adapter_config.json").exists():
        return "an adapter"
    ours = (out / SEEDS).exists() or (out / FOLDER / MARKER).exists()
    return "a trained model" if ours and (out / "config.json").exists() else ""


def marker(out: Path) -> dict[str, Any]:
    """What the marker of ``out``'s checkpoint says. Raises UserError where there is none, or none that can be read."""
    path = out / FOLDER / MARKER
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        step = said["step"]
        files = said.get("files", {})  # markers had none at first
        assert isinstance(step, int) and isinstance(said["options"], dict) and isinstance(files, dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"--resume: the checkpoint in {out} is not whole: no {MARKER} in {out / FOLDER}") from None
    there = _sizes(out / FOLDER)
    for name, size in files.items():
        if there.get(name) != size:
            found = f"has {there[name]} bytes of {size}" if name in there else "is missing"
            raise UserError(f"--resume: the checkpoint in {out} is not whole: {name} in {out / FOLDER} {found}")
    return said


def _sizes(folder: Path) -> dict[str, int]:
    """Path within ``folder`` -> bytes, of every file but the marker."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def fingerprint(options: argparse.Namespace, data: Path, model: Path) -> dict[str, Any]:
    """What must be the same for a training to go on: the options, the contents of the data file, and the base's weights."""
    kept = {name: _plain(value) for name, value in vars(options).items() if name not in FREE | {"data", "model"}}
    return kept | {"data": hashlib.sha256(data.read_bytes()).hexdigest(), "model": _weights(model)}


def _weights(model: Path) -> str:
    """A digest of a directory's files of weights, wherever it lies: of their names and sizes, and of a megabyte at either end, since to
    read all of a large model takes as long as to load it."""
    digest, part = hashlib.sha256(), 2**20
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(part))
            file.seek(max(0, size - part))
            digest.update(file.read(part))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict)) or value is None else str(value)


def check_same(out: Path, wanted: dict[str, Any]) -> int:
    """The step to resume from. Raises UserError where the checkpoint is of a training under other options."""
    said = marker(out)
    before, now = said["options"], json.loads(json.dumps(wanted))
    then, here = before.get("workers", 1), now.get("workers", 1)
    if then != here:
        raise UserError(
            f"--resume: the checkpoint in {out} is of a training with {then} workers, not {here}; expected as many"
        )
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            if name in ("data", "model"):
                raise UserError(
                    f"--resume: the checkpoint in {out} is of another --{name}: its contents are not the same"
                )
            raise UserError(
                f"--resume: the checkpoint in {out} is of --{name} {before.get(name)}, not of {now.get(name)}; "
                "expected the same options"
            )
    return int(said["step"])


def write_marker(folder: Path, step: int, options: dict[str, Any]) -> None:
    """Last of all files of a checkpoint, after the others are on the disk."""
    atomic.flush(folder)
    said = {"step": step, "options": options, "files": _sizes(folder)}
    atomic.replace_file(folder / MARKER, (json.dumps(said, indent=1) + "\n").encode())
