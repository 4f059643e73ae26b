"""Which rows got slower beyond the noise that both runs state.

``python -m benchmarks.compare OLD.json NEW.json`` compares two files of run's; ``compare OLD.json [run's options]`` a file with a
run made now; ``compare --base REV [run's options]`` this tree with a git revision: both are measured by this tree's benchmarks, in the
order base, tree, tree, base, so that a drift of the machine falls on both; ``compare --recorded [run's options]`` this tree with
what is filed for this device under results/. Exit status 1 where a row got slower or lost its speed.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peftfast

from . import machine, record, table
from .machine import ROOT
from .run import KEY

Report = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One row in both runs; times in seconds, None where a row has no speed."""

    row: dict[str, Any]
    before: float | None
    after: float | None
    noise: float

    @property
    def slowdown(self) -> float:
        """after / before - 1."""
        return self.after / self.before - 1 if self.before and self.after else 0.0

    @property
    def slower(self) -> bool:
        return self.slowdown > self.noise

    @property
    def faster(self) -> bool:
        return bool(self.before and self.after) and self.before / self.after - 1 > self.noise

    @property
    def lost(self) -> bool:
        """It had a speed and is over its error budget now."""
        return self.before is not None and not self.row["within_budget"]


def rows_by_key(report: Report) -> dict[tuple[Any, ...], dict[str, Any]]:
    # Rows filed before a size was added do not have it: 0, as where an operator has none.
    return {tuple(row.get(name, 0) for name in KEY): row for row in report["rows"]}


def compare(old: Report, new: Report) -> list[Change]:
    """The rows that both reports have. The noise of a change is the sum of what both state."""
    before = rows_by_key(old)
    changes = []
    for key, row in rows_by_key(new).items():
        if key in before:
            noise = (before[key]["noise"] or 0.0) + (row["noise"] or 0.0)
            changes.append(Change(row, before[key]["p50"], row["p50"], noise))
    return changes


def merge(first: Report, second: Report) -> Report:
    """Two runs of one tree as one: the mean of the medians, and noise of at least half their difference."""
    others = rows_by_key(second)
    rows = []
    for key, row in rows_by_key(first).items():
        other = others.get(key)
        if other is None or row["p50"] is None or other["p50"] is None:
            rows.append(row)
            continue
        middle = statistics.fmean((row["p50"], other["p50"]))
        noise = max(row["noise"], other["noise"], abs(row["p50"] - other["p50"]) / 2 / middle)
        rows.append({**row, "p50": middle, "noise": noise})
    return {**first, "rows": rows}


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` in a temporary folder, with its CPU library where this tree has one."""
    with tempfile.TemporaryDirectory(prefix="peftfast-base-") as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(ROOT))
        subprocess.run((*git, "worktree", "add", "--quiet", "--detach", str(tree), revision), check=True)
        try:
            libraries = sorted((ROOT / "peftfast").glob("_*.so"))
            unchanged = subprocess.run((*git, "diff", "--quiet", revision, "--", "csrc", "setup.py")).returncode == 0
            if unchanged:
                for library in libraries:
                    shutil.copy2(library, tree / "peftfast")
            elif libraries:
                built = ",".join(library.name[1:].split(".")[0] for library in libraries)
                command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
                subprocess.run(command, cwd=tree, env={**os.environ, "PEFTFAST_BUILD": built}, check=True)
            yield tree
        finally:
            subprocess.run((*git, "worktree", "remove", "--force", str(tree)), check=True)


def measure(package_root: Path, arguments: Sequence[str]) -> Report:
    """A run of these benchmarks, in a process of its own, on the peftfast that lies in ``package_root``."""
    with tempfile.TemporaryDirectory(prefix="peftfast-bench-") as folder:
        # A folder that holds the benchmarks and nothing else: python -m puts it before every other on the path.
        (Path(folder) / "benchmarks").symlink_to(Path(__file__).resolve().parent, target_is_directory=True)
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.run", *arguments, "--out", str(out)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(package_root)}, stdout=subprocess.PIPE, text=True
        )
        if not out.is_file():
            raise SystemExit(f"{' '.join(command)} gave no result (exit status {done.returncode})\n{done.stdout}")
        return json.loads(out.read_text())


def against_revision(revision: str, arguments: Sequence[str]) -> tuple[Report, Report]:
    if not (ROOT / ".git").exists():
        raise SystemExit(f"--base needs a git checkout, and {ROOT} is none")
    with worktree(revision) as tree:
        runs = [measure(root, arguments) for root in (tree, ROOT, ROOT, tree)]
    return merge(runs[0], runs[3]), merge(runs[1], runs[2])


def recorded(report: Report, results: Path = record.RESULTS) -> Report:
    """What is filed under ``results`` for the device of ``report``, all operators together; their rows may be of several commits."""
    folder = results / machine.slug(report["machine"])
    found = record.reports_in(folder) if folder.is_dir() else []
    if not found:
        raise SystemExit(f"nothing is filed for this device: expected results in {folder}")
    return {**found[0], "rows": [row for each in found for row in each["rows"]]}


def text(changes: Sequence[Change], everything: bool = False) -> str:
    """The rows that changed, the slowest first."""
    shown = [c for c in changes if everything or c.slower or c.faster or c.lost]
    cells = []
    for change in sorted(shown, key=lambda c: (not c.lost, -c.slowdown)):
        verdict = "OVER BUDGET" if change.lost else "SLOWER" if change.slower else "faster" if change.faster else "same"
        times = [table.time(value) if value is not None else "no speed" for value in (change.before, change.after)]
        ratio = f"{change.slowdown:+.1%}" if change.before and change.after else ""
        cells.append((verdict, table.title(change.row), change.row["provider"], *times, ratio, f"{change.noise:.1%}"))
    counts = f"{len(changes)} rows in both runs: {sum(c.slower for c in changes)} slower beyond noise, "
    counts += f"{sum(c.faster for c in changes)} faster, {sum(c.lost for c in changes)} over their error budget"
    header = ("", "case", "provider", "before", "after", "change", "noise")
    return f"{table.aligned(header, cells)}\n{counts}" if cells else counts


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="OLD, or OLD and NEW")
    parse.add_argument("--base", metavar="REV", help="a git revision to measure this tree against")
    parse.add_argument("--recorded", action="store_true", help="compare with the results filed for this device")
    parse.add_argument("--all", action="store_true", help="print unchanged rows too")
    # Files and compare's own options come first; from the first other option on, everything is run's.
    own, rest = [], list(sys.argv[1:] if argv is None else argv)
    while rest and (not rest[0].startswith("-") or rest[0] in ("--base", "--recorded", "--all", "-h", "--help")):
        own.append(rest.pop(0))
        if own[-1] == "--base" and rest:
            own.append(rest.pop(0))
    args = parse.parse_args(own)
    for path in args.files:
        if not path.is_file():
            parse.error(f"no file {path}")
    if args.recorded and args.base is None and not args.files:
        new = measure(Path(peftfast.__file__).resolve().parents[1], rest)
        old = recorded(new)
    elif args.recorded:
        parse.error("--recorded stands alone, before run's options")
    elif args.base is not None and not args.files:
        old, new = against_revision(args.base, rest)
    elif args.base is None and len(args.files) == 2 and not rest:
        old, new = (json.loads(path.read_text()) for path in args.files)
    elif args.base is None and len(args.files) == 1:
        old, new = json.loads(args.files[0].read_text()), measure(Path(peftfast.__file__).resolve().parents[1], rest)
    else:
        parse.error("expected OLD.json NEW.json, or OLD.json and run's options, or --base REV and run's options")
    changes = compare(old, new)
    print(text(changes, args.all))
    if not changes:
        parse.error("the two runs have no row in common")
    return 1 if any(change.slower or change.lost for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
