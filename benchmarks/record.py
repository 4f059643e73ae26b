"""File what was measured: ``python -m benchmarks.record FILE.json`` (or a folder of them) writes results/<device>/<operator>.json, each
with commit, versions, driver, clocks and threads, and renews the README's tables from all that is filed.

The tables stand between the two markers below; a README without them is left as it is.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import machine, table
from .machine import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/record.py -->", "<!-- benchmarks: end -->"
COLUMNS = ("peftfast", "torch", "torch.compile", "peft", "peft:16bit", "bitsandbytes")


def reports_in(path: Path) -> list[dict[str, Any]]:
    """The files of run's at ``path``; other JSON is passed over."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = [json.loads(file.read_text()) for file in files]
    return [report for report in found if isinstance(report, dict) and {"machine", "limits", "rows"} <= set(report)]


def file_report(report: dict[str, Any], results: Path) -> list[Path]:
    """One file an operator; a newer run of an operator on a device replaces the older."""
    folder = results / machine.slug(report["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        part = {
            **report,
            "left_out": [entry for entry in report["left_out"] if entry["op"] == op],
            "rows": [row for row in report["rows"] if row["op"] == op],
        }
        written.append(folder / f"{op}.json")
        written[-1].write_text(json.dumps(part, indent=1) + "\n")
    return written


def _blocks(results: Path) -> Iterator[str]:
    for path in sorted(results.glob("*/*.json")):
        (report,) = reports_in(path) or [None]
        if report is None or not report["rows"]:
            continue
        origin, op = report["machine"], report["rows"][0]["op"]
        gpu, cpu = origin["gpu"], origin["cpu"]
        name = gpu["name"] if gpu else f"{cpu['name']}, {cpu['threads']} threads"
        mode = "full" if any(row["mode"] == "full" for row in report["rows"]) else "fwd"
        groups = table.group([row for row in report["rows"] if row["mode"] == mode])
        present = {row["provider"] for rows in groups.values() for row in rows}
        columns = [column for column in COLUMNS if column in present]
        lines = []
        for members in groups.values():
            by_name = {row["provider"]: row for row in members}
            case = members[0]
            sizes = [f"{case['shape']} {case['n']}x{case['k']}", f"M={case['m']}" if case["m"] else "", case["dtype"]]
            cells = [", ".join(part for part in sizes if part)]
            for column in columns:
                row = by_name.get(column)
                cells.append("" if row is None else table.time(row["p50"]) if row["p50"] else "over budget")
            ours = by_name.get("peftfast")
            shown = ours is not None and ours["p50"] is not None
            cells.append(f"{ours['percent_of_limit']:.0f} %, ± {100 * ours['noise']:.0f} %" if shown else "")
            lines.append(cells)
        heading = f"`{op}`, {'forward and backward' if mode == 'full' else 'one call'}, {name}, torch {origin['versions']['torch']}, "
        heading += f"commit {(origin['commit'] or 'unknown')[:10]}{' with changes' if origin['dirty'] else ''}, {origin['date'][:10]}:"
        yield f"{heading}\n\n{table.markdown(('case', *columns, 'peftfast: of limit, noise'), lines)}"


def renew_readme(readme: Path, results: Path) -> bool:
    """Whether the tables were written."""
    text = readme.read_text() if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return False
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n\n" + "".join(f"{block}\n\n" for block in _blocks(results)) + f"{END}{tail}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parse.add_argument("source", type=Path, metavar="FILE.json|FOLDER")
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parse.parse_args(argv)
    if not args.source.exists():
        parse.error(f"nothing at {args.source}")
    reports = reports_in(args.source)
    if not reports:
        parse.error(f"no results of benchmarks.run in {args.source}")
    for report in reports:
        for path in file_report(report, args.results):
            print(path)
    done = renew_readme(args.readme, args.results)
    print(f"tables in {args.readme} renewed" if done else f"{args.readme} has no markers: left as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
