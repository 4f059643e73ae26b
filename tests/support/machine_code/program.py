"""A kernel as run.cpp reads it: nvdisasm's listing, operand by operand."""

import re
import struct

from tests.support.sass import Code, Instruction

_REGISTER = re.compile(r"([-~!+]?)(\|?)(U?R)(\d+|Z)(\.H0_H0|\.H1_H1|\.64)?\|?")
_PREDICATE = re.compile(r"(!?)(U?)P(\d|T)")
_CONSTANT = re.compile(r"([-~]?)(\|?)c\[0x0\]\[(?:(U?)R(\d+)\+?)?(0x[0-9a-f]+)?\]\|?")
_INTEGER = re.compile(r"-?0x[0-9a-f]+")
_NUMBER = re.compile(r"[-+]?(INF|QNAN|SNAN|[\d.]+(e[-+]?\d+)?)")
_ZERO = {"R": 255, "UR": 63}
_NEGATED, _INVERTED, _ABSOLUTE, _WIDE = 1, 2, 4, 8


def _index(kind: str, number: str) -> int:
    return _ZERO[kind] if number == "Z" else int(number)


def _field(
    kind: str, value: int = 0, flags: int = 0, half: int = -1, index: int = -1, uniform: int = -1, name=""
) -> str:
    return f"{kind} {flags} {half} {index} {uniform} {value} {name}"


def _address(text: str) -> str:
    base, uniform, offset, flags = 255, 63, 0, 0
    for part in text.split("+"):
        if _INTEGER.fullmatch(part):
            offset += int(part, 16)
        elif match := re.fullmatch(r"(U?R)(\d+|Z)(\.64)?", part):
            flags |= _WIDE if match[3] else 0
            if match[1] == "R":
                base = _index("R", match[2])
            else:
                uniform = _index("UR", match[2])
        else:
            raise ValueError(f"an address: {text}")
    return _field("A", offset, flags, index=base, uniform=uniform)


def operand(text: str) -> str:
    """One operand in the fields of run.cpp's operand_of."""
    text = text.replace(".reuse", "").strip()
    sign = {"-": _NEGATED, "~": _INVERTED, "!": _INVERTED}
    if match := re.fullmatch(r"gdesc\[UR(\d+)\](.*)", text):
        return _field("D", index=int(match[1]), name=match[2])
    if match := re.fullmatch(r"(?:desc\[\w+\])?\[(.*)\]", text):
        return _address(match[1])
    if match := _CONSTANT.fullmatch(text):
        place = {} if match[4] is None else {"uniform" if match[3] else "index": int(match[4])}
        flags = sign.get(match[1], 0) | (_ABSOLUTE if match[2] else 0)
        return _field("C", int(match[5] or "0", 16), flags, **place)
    if match := _PREDICATE.fullmatch(text):
        return _field(
            "Q" if match[2] else "P", flags=sign.get(match[1], 0), index=7 if match[3] == "T" else int(match[3])
        )
    if match := _REGISTER.fullmatch(text):
        half = {".H0_H0": 0, ".H1_H1": 1}.get(match[5], -1)
        flags = sign.get(match[1], 0) | (_ABSOLUTE if match[2] else 0)
        return _field(match[3][0], 0, flags, half, _index(match[3], match[4]))
    if _INTEGER.fullmatch(text):
        return _field("I", int(text, 16) & 0xFFFFFFFF)
    if match := _NUMBER.fullmatch(text):
        number = float(text.replace("QNAN", "nan").replace("SNAN", "nan"))
        return _field("F", int.from_bytes(struct.pack("<f", number), "little"))
    return _field("N", name=re.sub(r"\s", "", text))


def _operands(one: Instruction) -> list[str]:
    """Commas separate them, but those within brackets; a label behind a register has none before it."""
    parts = re.split(r",(?![^\[]*\])", re.sub(r"(\S) `\(", r"\1, `(", one.operands))
    return [operand(part) for part in parts if part.strip()]


def program_text(code: Code) -> str:
    """A kernel, an instruction a line: address, text, name, guard, the number of the one that it branches to,
    operands; tabs between."""
    lines = []
    for one in code.instructions:
        label = re.search(r"`\(([^)]*)\)", one.operands)
        target = code.labels.get(label[1], -1) if label else -1
        guard = operand(one.predicate.removeprefix("@")) if one.predicate else "-"
        text = re.sub(r"\s+", " ", f"{one.predicate} {one.name} {one.operands}").strip()
        lines.append("\t".join([str(one.at), text, one.name, guard, str(target), *_operands(one)]))
    return "\n".join(lines)
