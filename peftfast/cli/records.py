"""Reading JSON lines, in the formats that TRL reads: texts, conversations, prompts with completions; or texts with a label."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

Label = int | str

# Kind of a file -> the keys of each line.
KINDS = {
    "label": ("text", "label"),
    "text": ("text",),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
}
EXPECTED = (
    'expected {"text": "..."}, {"text": "...", "label": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}'
)
MESSAGE = 'expected a list of {"role": "...", "content": "..."}'


@dataclass(frozen=True)
class Records:
    """What a file holds.

    Attributes:
        kind: "text", "label", "messages" or "prompt".
        rows: for each line its text; its messages; or the pair of prompt and completion, both strings or both lists of messages.
        labels: the label of each line, if the kind is "label".
        names: all labels in order.
    """

    kind: str
    rows: tuple[Any, ...]
    labels: tuple[Label, ...] | None
    names: tuple[Label, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The lines' texts, for the kinds that have them."""
        return self.rows if self.kind in ("text", "label") else ()

    def class_indices(self) -> list[int]:
        """The label of each text as its index in ``names``."""
        index = {name: k for k, name in enumerate(self.names)}
        return [index[label] for label in self.labels or ()]


def read(path: Path) -> Records:
    """All lines of a UTF-8 file, blank ones passed over.

    Raises:
        UserError: the file is missing, unreadable or without lines; a line is not what it should be (named with its number); lines
            of two kinds, or labels of two types, or a single class.
    """
    if not path.is_file():
        raise UserError(f"--data: no file {path}" if not path.exists() else f"--data: {path} is not a file")
    rows: list[Any] = []
    labels: list[Label] = []
    kind, first = "", 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                found, row, label = _record(line, where)
                if not kind:
                    kind, first = found, number
                elif found != kind:
                    raise UserError(f"{where}: {_difference(found, kind, first)}")
                if label is not None:
                    if labels and type(label) is not type(labels[0]):
                        raise UserError(
                            f"{where}: label {label!r}, but line {first} has {labels[0]!r}; expected all whole numbers or all strings"
                        )
                    labels.append(label)
                rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {path} is not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror}") from None
    if not rows:
        raise UserError(f"--data: {path} is empty; expected one JSON object on each line")
    names = tuple(sorted(set(labels)))  # type: ignore[type-var]
    if len(names) == 1:
        raise UserError(f"--data: every line of {path} has the label {names[0]!r}; expected at least two classes")
    return Records(kind, tuple(rows), tuple(labels) or None, names)


def _difference(found: str, kind: str, first: int) -> str:
    if {found, kind} == {"text", "label"}:
        now, before = ("no label", "has one") if found == "text" else ("a label", "has none")
        return f"{now}, but line {first} {before}; expected it on all lines or on none"
    now, before = (", ".join(KINDS[name]) for name in (found, kind))
    return f"{now}, but line {first} has {before}; expected one kind of line in a file"


def _record(line: str, where: str) -> tuple[str, Any, Label | None]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: not JSON ({reason}); {EXPECTED}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {EXPECTED}, got {_shortened(value)}")
    for kind, keys in KINDS.items():
        if set(value) == set(keys):
            return kind, *_READERS[kind](value, where)
    unknown = sorted(set(value) - {key for keys in KINDS.values() for key in keys})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {EXPECTED}")
    if "prompt" in value or "completion" in value:
        missing = sorted({"prompt", "completion"} - set(value))
        if missing:
            raise UserError(f'{where}: "{missing[0]}": it is missing; {EXPECTED}')
    if "text" not in value and "messages" not in value:
        raise UserError(f'{where}: "text": expected a string that is not empty, it is missing')
    raise UserError(f"{where}: {', '.join(sorted(value))} on one line; {EXPECTED}")


def _text(value: dict[str, Any], where: str) -> tuple[str, Label | None]:
    return _string(value["text"], "text", where), None


def _labelled(value: dict[str, Any], where: str) -> tuple[str, Label]:
    text, label = _string(value["text"], "text", where), value["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise UserError(f'{where}: "label": expected a string or a whole number, got {_shortened(label)}')
    return text, _whole(label, "label", where) if isinstance(label, str) else label


def _conversation(value: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], None]:
    return _messages(value["messages"], "messages", where), None


def _pair(value: dict[str, Any], where: str) -> tuple[tuple[Any, Any], None]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise UserError(
            f'{where}: "prompt" and "completion": expected two strings or two lists of messages, got one of each'
        )
    read_one = _messages if isinstance(prompt, list) else _string
    return (read_one(prompt, "prompt", where), read_one(completion, "completion", where)), None


_READERS: dict[str, Any] = {"text": _text, "label": _labelled, "messages": _conversation, "prompt": _pair}


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}: "{key}": expected a string that is not empty, got {_shortened(value)}')
    return _whole(value, key, where)


def _whole(value: str, key: str, where: str) -> str:
    """A string as it is. JSON may escape half of a character, as where a text was cut within one, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ord(value[error.start])
        raise UserError(f'{where}: "{key}": expected Unicode text, got half of a character: \\u{half:x}') from None
    return value


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "{key}": {MESSAGE}, got {_shortened(value)}')
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))):
            raise UserError(f'{where}: "{key}": {MESSAGE}, got {_shortened(message)} in it')
        for name in ("role", "content"):
            _whole(message[name], name, where)
    return value


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
