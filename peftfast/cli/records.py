"""Reading JSON lines: ``{"text": ..., "label": ...}`` on every line to classify, ``{"text": ...}`` to go on writing."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

Label = int | str


@dataclass(frozen=True)
class Records:
    """The texts of a file and, if it is for classification, the label of each and all labels in order."""

    texts: tuple[str, ...]
    labels: tuple[Label, ...] | None
    names: tuple[Label, ...]

    def class_indices(self) -> list[int]:
        """The label of each text as its index in ``names``."""
        index = {name: k for k, name in enumerate(self.names)}
        return [index[label] for label in self.labels or ()]


def read(path: Path) -> Records:
    """All lines of a UTF-8 file, blank ones passed over.

    Raises:
        UserError: the file is missing, unreadable or without lines; a line is not what it should be (named with its number); lines
            with and without a label, or labels of two types, or a single class.
    """
    if not path.is_file():
        raise UserError(f"--data: no file {path}" if not path.exists() else f"--data: {path} is not a file")
    texts: list[str] = []
    labels: list[Label] = []
    first: int | None = None
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                text, label = _record(line, where)
                if first is None:
                    first = number
                elif (label is None) != (not labels):
                    now, before = ("no label", "has one") if label is None else ("a label", "has none")
                    raise UserError(f"{where}: {now}, but line {first} {before}; expected it on all lines or on none")
                if labels and type(label) is not type(labels[0]):
                    raise UserError(
                        f"{where}: label {label!r}, but line {first} has {labels[0]!r}; expected all whole numbers or all strings"
                    )
                texts.append(text)
                if label is not None:
                    labels.append(label)
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {path} is not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror}") from None
    if not texts:
        raise UserError(f"--data: {path} is empty; expected one JSON object on each line")
    names = tuple(sorted(set(labels)))  # type: ignore[type-var]
    if len(names) == 1:
        raise UserError(f"--data: every line of {path} has the label {names[0]!r}; expected at least two classes")
    return Records(tuple(texts), tuple(labels) or None, names)


def _record(line: str, where: str) -> tuple[str, Label | None]:
    expected = 'expected {"text": "...", "label": ...} or {"text": "..."}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: not JSON ({reason}); {expected}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {expected}, got {_shortened(value)}")
    unknown = sorted(set(value) - {"text", "label"})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {expected}")
    text = value.get("text")
    if not isinstance(text, str) or not text.strip():
        came = f"got {_shortened(text)}" if "text" in value else "it is missing"
        raise UserError(f'{where}: "text": expected a string that is not empty, {came}')
    if "label" not in value:
        return text, None
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise UserError(f'{where}: "label": expected a string or a whole number, got {_shortened(label)}')
    return text, label


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def split(count: int, part: float, seed: int) -> tuple[list[int], list[int]]:
    """(to learn from, to evaluate on): indices in ascending order, chosen by the seed alone; neither is empty when part > 0.

    Raises:
        UserError: fewer than two records, and a part is to be held out.
    """
    if not part:
        return list(range(count)), []
    if count < 2:
        raise UserError(f"--eval-split: {count} line in the file cannot be split")
    held_out = set(random.Random(seed).sample(range(count), min(count - 1, max(1, round(part * count)))))
    return [k for k in range(count) if k not in held_out], sorted(held_out)
