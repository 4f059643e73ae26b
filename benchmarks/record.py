"""File what was measured: ``python -m benchmarks.record FILE.json`` (or a folder of them, as ``make gpu`` leaves it) writes
results/<device>/<operator>.json, and end_to_end-<model>.json, each with commit, versions, driver, clocks and threads, and renews the
README's tables from all that is filed. A run that was stopped is filed only with ``--stopped``.

The tables stand between the two markers below; a README without them is left as it is.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import end_to_end_report, machine, table
from .machine import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/record.py -->", "<!-- benchmarks: end -->"
COLUMNS = ("peftfast", "torch", "torch.compile", "peft", "peft:16bit", "bitsandbytes")


def reports_in(path: Path) -> list[dict[str, Any]]:
    """The files of run's at ``path``; other JSON is passed over."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = [json.loads(file.read_text()) for file in files]
    return [report for report in found if isinstance(report, dict) and {"machine", "limits", "rows"} <= set(report)]


def end_to_end_in(path: Path) -> list[dict[str, Any]]:
    """The files of end_to_end's at ``path``."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = [json.loads(file.read_text()) for file in files]
    return [report for report in found if isinstance(report, dict) and {"machine", "limits", "arms"} <= set(report)]


def file_report(report: dict[str, Any], results: Path) -> list[Path]:
    """One file an operator; a newer run of an operator on a device replaces the older. One file a model for the end-to-end step."""
    folder = results / machine.slug(report["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    if "arms" in report:
        path = folder / f"end_to_end-{report['settings']['model']}.json"
        machine.write_json(path, report)
        return [path]
    written = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        part = {
            **report,
            "left_out": [entry for entry in report["left_out"] if entry["op"] == op],
            "rows": [row for row in report["rows"] if row["op"] == op],
        }
        written.append(folder / f"{op}.json")
        machine.write_json(written[-1], part)
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
        stamp = f"{origin['date'][:10]}, load {origin['load_at_start'] or 0:.1f}"
        heading = f"`{op}`, {'forward and backward' if mode == 'full' else 'one call'}, {name}, torch {origin['versions']['torch']}, "
        heading += (
            f"commit {(origin['commit'] or 'unknown')[:10]}{' with changes' if origin['dirty'] else ''}, {stamp}:"
        )
        yield f"{heading}\n\n{table.markdown(('case', *columns, 'peftfast: of limit, noise'), lines)}"


def _end_to_end_blocks(results: Path) -> Iterator[str]:
    for path in sorted(results.glob("*/end_to_end-*.json")):
        (report,) = end_to_end_in(path)
        origin = report["machine"]
        columns = [i for i, name in enumerate(end_to_end_report.HEADER) if name not in ("loss first, last",)]
        lines = [end_to_end_report.cells(row, report["arms"]) for row in report["arms"]]
        used = [i for i in columns if any(line[i] for line in lines)]
        stamp = f"commit {(origin['commit'] or 'unknown')[:10]}, {origin['date'][:10]}"
        heading = f"One training step, {end_to_end_report.title(report)}, {stamp}, noise {100 * report['noise']:.1f} %:"
        shown = table.markdown([end_to_end_report.HEADER[i] for i in used], [[line[i] for i in used] for line in lines])
        yield f"{heading}\n\n{shown}"


def renew_readme(readme: Path, results: Path) -> bool:
    """Whether the tables were written."""
    text = readme.read_text() if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return False
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    blocks = [*_end_to_end_blocks(results), *_blocks(results)]
    readme.write_text(f"{head}{BEGIN}\n\n" + "".join(f"{block}\n\n" for block in blocks) + f"{END}{tail}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parse.add_argument("source", type=Path, metavar="FILE.json|FOLDER")
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parse.add_argument("--stopped", action="store_true", help="file a run that was stopped, too")
    args = parse.parse_args(argv)
    if not args.source.exists():
        parse.error(f"nothing at {args.source}")
    reports = [*reports_in(args.source), *end_to_end_in(args.source)]
    if not reports:
        parse.error(f"no results of benchmarks.run or benchmarks.end_to_end in {args.source}")
    if not args.stopped and any(report.get("stopped") for report in reports):
        parse.error(f"{args.source} holds a run that was stopped: --stopped files what it measured until then")
    for report in reports:
        for path in file_report(report, args.results):
            print(path)
    done = renew_readme(args.readme, args.results)
    print(f"tables in {args.readme} renewed" if done else f"{args.readme} has no markers: left as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
