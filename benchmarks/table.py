"""Rows as text: aligned for a terminal, or Markdown for the README."""

from collections.abc import Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return "\n".join((line(header), "|" + "---|" * len(header), *(line(row) for row in rows)))


def time(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.2f}"


HEADER = ("provider", "median", "20-80 %", "of limit", "noise", "error/budget", "saved MiB", "peak MiB", "scratch MiB")
DRAM = "DRAM MiB"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row under :data:`HEADER`. Over budget, no speed is shown."""
    error = f"{row['error'] / row['budget']:.2f}" if row["budget"] else "inf"
    if row["p50"] is None:
        shown = ("over budget" if not row["within_budget"] else "not timed", "", "", "")
    else:
        spread = f"{time(row['p20'])} - {time(row['p80'])}"
        shown = (time(row["p50"]), spread, f"{row['percent_of_limit']:.1f} %", f"{100 * row['noise']:.1f} %")
    memory = (size(row["saved_bytes"]), size(row["peak_bytes"]), size(row["scratch_bytes"]))
    return (row["provider"], *shown, error, *memory)


def title(row: dict[str, Any]) -> str:
    text = f"{row['op']} {row['mode']}  {row['shape']} N={row['n']} K={row['k']}"
    text += f" M={row['m']}" if row["m"] else ""
    text += f" r={row['rank']}" if row["rank"] else ""
    text += f" density {row['density']:g}" if row.get("density") else ""
    text += f" {row['adapters']} adapters" if row.get("adapters") else ""
    text += f" {row['dtype']}"
    return text + (f" dropout {row['dropout']:g}" if row["dropout"] else "")


def group(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    return groups


def report(rows: Sequence[dict[str, Any]]) -> str:
    """One block a problem and mode, its providers from the fastest to the slowest."""
    blocks = []
    for heading, members in group(rows).items():
        limit = members[0]
        text = f"{heading}; limit {time(limit['limit_s'])} ({limit['bound']})"
        ordered = sorted(members, key=lambda row: (row["p50"] is None, row["p50"] or 0))
        header, lines = HEADER, [cells(row) for row in ordered]
        if any(row.get("dram_bytes") is not None for row in ordered):
            text += f", {size(limit['bytes'])} MiB"
            header = (*HEADER, DRAM)
            lines = [(*line, size(row.get("dram_bytes"))) for line, row in zip(lines, ordered, strict=True)]
        blocks.append(f"{text}\n{aligned(header, lines)}")
    return "\n\n".join(blocks)
