"""``python -m peftfast methods``: what of the literature can be put on a model by name."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from . import arguments
from .errors import UserError


def parser() -> arguments.Parser:
    parse = arguments.Parser(
        prog="python -m peftfast methods",
        description="Lists the methods that peftfast.adapt(model, NAME) puts on a model, or tells all of one.",
    )
    parse.add_argument("name", nargs="?", help="one method, with its formula, options and what was chosen")
    parse.add_argument("--json", action="store_true", help="as JSON")
    return parse


def described(method: Any) -> dict[str, Any]:
    """A method's entry as plain values."""
    from ..methods.registry import KINDS

    paper = method.paper
    return {
        "name": method.name,
        "paper": paper.title,
        "authors": paper.authors,
        "year": paper.year,
        "arxiv": paper.arxiv,
        "formula": method.formula,
        "options": {
            name: value if isinstance(value, int | float | str | None) else str(value)
            for name, value in method.defaults().items()
        },
        "reduces_to": method.reduces_to,
        "kind": KINDS[method.kind],
        "fused": method.fused,
        "peft": method.peft,
        "choices": method.choices,
        "reads_data": method.reads_data,
        "exact_at_step_0": method.exact,
    }


def main(argv: Sequence[str]) -> int:
    """Print the list or one entry. UserError: no method of that name."""
    options = parser().parse_args(argv)
    arguments.require("methods", {"torch": "torch"})
    from ..methods.registry import get, methods

    if options.name is None:
        entries = [described(method) for method in methods().values()]
    else:
        try:
            entries = [described(get(options.name))]
        except ValueError as error:
            raise UserError(str(error).removeprefix("method: ")) from None
    if options.json:
        print(json.dumps(entries if options.name is None else entries[0], indent=1, ensure_ascii=False))
    elif options.name is None:
        print(table(entries))
    else:
        print(whole(entries[0]))
    return 0


def table(entries: list[dict[str, Any]]) -> str:
    """A line a method: name, paper, what it reduces to, PEFT's class."""
    rows = [("method", "paper", "reduces to", "in PEFT")]
    rows += [
        (
            one["name"],
            f"{textwrap.shorten(one['paper'], 60, placeholder=' ...')} ({one['year']}{', ' + one['arxiv'] if one['arxiv'] else ''})",
            textwrap.shorten(one["reduces_to"], 40, placeholder=" ..."),
            one["peft"] or "-",
        )
        for one in entries
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]
    return "\n".join(
        [
            lines[0],
            "-" * max(map(len, lines)),
            *lines[1:],
            "",
            f"{len(entries)} methods; one of them: python -m peftfast methods NAME",
        ]
    )


def whole(one: dict[str, Any]) -> str:
    """All that is known of a method."""
    paper = f"{one['paper']} ({one['authors']}, {one['year']}{', arXiv ' + one['arxiv'] if one['arxiv'] else ''})"
    options = ", ".join(f"{name}={value!r}" for name, value in one["options"].items())
    rows = [
        ("paper", paper),
        ("formula", one["formula"]),
        ("kind", one["kind"]),
        ("options", options or "none"),
        ("reduces to", one["reduces_to"]),
        ("fused", one["fused"]),
        ("in PEFT", one["peft"] or "no"),
        ("data", "needs batches" if one["reads_data"] else "none"),
        (
            "step 0",
            "computes what the base computes" if one["exact_at_step_0"] else "differs from the base, see choices",
        ),
    ]
    if one["choices"]:
        rows.append(("choices", one["choices"]))
    lines = [one["name"]]
    for title, text in rows:
        lines.append(
            textwrap.fill(
                text, 110, initial_indent=f"  {title:<11}", subsequent_indent=" " * 13, break_on_hyphens=False
            )
        )
    return "\n".join(lines)
