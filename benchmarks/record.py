"""File what was measured: ``python -m benchmarks.record FILE.json`` (or a folder of them, as ``make gpu`` leaves it) writes
results/<device>/<operator>.json, and end_to_end-<model>.json, each with commit, versions, driver, clocks and threads, and renews
results/README.md, which holds every table and what was not measured, and the README's tables. A run that was stopped is filed only
with ``--stopped``.

The README's tables stand between the two markers below; a README without them is left as it is.
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
COLUMNS = ("peftfast", "torch", "torch.compile", "peft", "peft:16bit", "bitsandbytes", "frozen")
# What the README shows: whole layers, and each family's one pass that users know by name.
SHOWN = ("lora_linear", "qlora_linear", "nf4_dequantize", "sparse_delta_linear", "perturb_gaussian")


def _reports(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = [json.loads(file.read_text()) for file in files]
    return [report for report in found if isinstance(report, dict) and keys <= set(report)]


def reports_in(path: Path) -> list[dict[str, Any]]:
    """The files of run's at ``path``; other JSON is passed over."""
    return _reports(path, {"machine", "limits", "rows"})


def end_to_end_in(path: Path) -> list[dict[str, Any]]:
    """The files of end_to_end's at ``path``."""
    return _reports(path, {"machine", "limits", "arms"})


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
            "left_out": [entry for entry in report["left_out"] if entry["op"] in (op, "all")],
            "rows": [row for row in report["rows"] if row["op"] == op],
        }
        written.append(folder / f"{op}.json")
        machine.write_json(written[-1], part)
    return written


def device_name(origin: dict[str, Any]) -> str:
    gpu, cpu = origin["gpu"], origin["cpu"]
    if gpu:
        return str(gpu["name"])
    warm = ", inputs in the caches" if origin.get("warm") else ""
    return f"{cpu['name']}, {cpu['isa']}, {cpu['threads']} thread{'s' if cpu['threads'] > 1 else ''}{warm}"


def stamp(origin: dict[str, Any]) -> str:
    commit = f"commit {(origin['commit'] or 'unknown')[:10]}{' with changes' if origin['dirty'] else ''}"
    return (
        f"torch {origin['versions']['torch']}, {commit}, {origin['date'][:10]}, load {origin['load_at_start'] or 0:.1f}"
    )


def _case(row: dict[str, Any]) -> str:
    parts = [
        f"{row['shape']} {row['n']}x{row['k']}" if not row["shape"].startswith("square") else f"{row['n']}x{row['k']}"
    ]
    parts += [f"M={row['m']}"] if row["m"] else []
    parts += [f"r={row['rank']}"] if row["rank"] else []
    parts += [f"density {row['density']:g}"] if row.get("density") else []
    parts += [f"{row['adapters']} adapters"] if row.get("adapters") else []
    return ", ".join([*parts, row["dtype"], *([f"dropout {row['dropout']:g}"] if row["dropout"] else [])])


def operator_block(report: dict[str, Any]) -> str:
    """Forward and backward where an operator has one, else its one call: a line a case, a column a provider."""
    origin, op = report["machine"], report["rows"][0]["op"]
    mode = "full" if any(row["mode"] == "full" for row in report["rows"]) else "fwd"
    groups = table.group([row for row in report["rows"] if row["mode"] == mode])
    present = {row["provider"] for rows in groups.values() for row in rows}
    columns = [column for column in COLUMNS if column in present]
    columns += sorted(name for name in present - set(COLUMNS) if not name.startswith(("peftfast:", "reference")))
    lines = []
    for members in groups.values():
        by_name = {row["provider"]: row for row in members}
        cells = [_case(members[0])]
        for column in columns:
            row = by_name.get(column)
            cells.append("" if row is None else table.time(row["p50"]) if row["p50"] else "over budget")
        ours = by_name.get("peftfast")
        shown = ours is not None and ours["p50"] is not None
        cells.append(f"{ours['percent_of_limit']:.0f} %, ± {100 * ours['noise']:.0f} %" if shown else "")
        lines.append(cells)
    what = "forward and backward" if mode == "full" else "one call"
    heading = f"`{op}`, {what}; {device_name(origin)}; {stamp(origin)}:"
    return f"{heading}\n\n{table.markdown(('case', *columns, 'peftfast: of limit, noise'), lines)}"


def end_to_end_block(report: dict[str, Any]) -> str:
    header = end_to_end_report.HEADER
    lines = [end_to_end_report.cells(row, report["arms"]) for row in report["arms"]]
    used = [i for i, name in enumerate(header) if name != "loss first, last" and any(line[i] for line in lines)]
    noise = f"noise {100 * report['noise']:.1f} %" if report["noise"] is not None else "no noise known"
    heading = f"One training step, {end_to_end_report.title(report)}; {stamp(report['machine'])}, {noise}:"
    return f"{heading}\n\n{table.markdown([header[i] for i in used], [[line[i] for i in used] for line in lines])}"


def blocks(results: Path, only: Sequence[str] | None = None) -> Iterator[str]:
    """The tables of all that is filed, whole steps first; ``only``: some operators."""
    for path in sorted(results.glob("*/end_to_end-*.json")):
        for report in end_to_end_in(path):
            if report["arms"]:
                yield end_to_end_block(report)
    for path in sorted(results.glob("*/*.json")):
        for report in reports_in(path):
            if report["rows"] and (only is None or report["rows"][0]["op"] in only):
                yield operator_block(report)


def not_measured(results: Path) -> Iterator[str]:
    """A line for each provider or arm that a filed run left out, with the reason, and for each that was over its error budget."""
    gpus = 0
    for path in sorted(results.glob("*/*.json")):
        for report in [*reports_in(path), *end_to_end_in(path)]:
            name = device_name(report["machine"])
            gpus += report["machine"]["gpu"] is not None
            for entry in report["left_out"]:
                who = (
                    f"{entry['method']}, {entry['arm']}" if "arm" in entry else f"`{entry['op']}`, {entry['provider']}"
                )
                yield f"- {name}: {who}: {entry['reason']}"
            for row in report.get("rows", ()):
                if not row["within_budget"]:
                    yield f"- {name}: {table.title(row)}, {row['provider']}: over its error budget"
    if not gpus:
        yield "- Nothing has been measured on a GPU: no file under this folder is of one."


INTRODUCTION = """# What was measured

Written by `python -m benchmarks.record` from the files beside it, one folder a device, one file an operator and one a model for the
end-to-end step. Each file holds its rows with the 20th and 80th percentile, the error against float64, the machine's own limits
measured in the same run, versions, commit and load. `python -m benchmarks.compare --recorded` measures this tree against them.
"""


def renew(results: Path) -> Path:
    """Write results/README.md anew from all that is filed."""
    lines = list(dict.fromkeys(not_measured(results)))
    text = [INTRODUCTION, *(f"{block}\n" for block in blocks(results)), "## Not measured\n", "\n".join(lines)]
    path = results / "README.md"
    path.write_text("\n".join(text) + "\n")
    return path


def renew_readme(readme: Path, results: Path) -> bool:
    """Whether the tables were written."""
    text = readme.read_text() if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return False
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    shown = "".join(f"{block}\n\n" for block in blocks(results, SHOWN))
    readme.write_text(f"{head}{BEGIN}\n\n{shown}{END}{tail}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    print(renew(args.results))
    done = renew_readme(args.readme, args.results)
    print(f"tables in {args.readme} renewed" if done else f"{args.readme} has no markers: left as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
