"""How cost grows: time over one size on log axes, the others fixed, with the fitted slope (1: in proportion) in the legend.

``python -m benchmarks.growth --over rank --out FOLDER [run's options]`` measures a sweep, over sizes of its own choice where the
options name none, and writes growth-<size>.json beside the pictures; ``growth FILE.json --over rank`` takes the rows of a run with
several sizes. It writes growth-<size>-<operator>.png and prints the slopes.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, run, table
from .plot import COLOURS

SIZES = {
    "m": "M, rows of x",
    "nk": "N K, elements of the weight",
    "rank": "rank",
    "density": "density of the support",
    "adapters": "adapters in one batch",
}
FIXED = {
    over: tuple(name for name in run.SIZES if name not in ({"n", "k"} if over == "nk" else {over})) for over in SIZES
}
# What a sweep measures on a CPU and on a GPU where run's options do not say.
SWEEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "m": {
        "cpu": ("--tokens", "16", "32", "64", "128", "256", "512"),
        "cuda": ("--tokens", "16", "64", "256", "1024", "4096", "16384"),
    },
    "nk": {
        "cpu": ("--shapes", "256", "512", "1024", "2048"),
        "cuda": ("--shapes", "1024", "2048", "4096", "8192"),
    },
    "rank": {name: ("--rank", "4", "8", "16", "32", "64", "128") for name in ("cpu", "cuda")},
    "density": {name: ("--density", "0.001", "0.003", "0.01", "0.03", "0.1") for name in ("cpu", "cuda")},
    "adapters": {name: ("--adapters", "1", "2", "4", "8", "16", "32") for name in ("cpu", "cuda")},
}
ELSEWHERE = {"cpu": ("--shapes", "1024", "--tokens", "128"), "cuda": ("--shapes", "4096", "--tokens", "4096")}
FEWEST_POINTS = 3


def size_of(row: dict[str, Any], over: str) -> float:
    return row["n"] * row["k"] if over == "nk" else row.get(over, 0)


def curves(report: dict[str, Any], over: str) -> dict[tuple[Any, ...], list[tuple[float, float]]]:
    """(size, seconds) in order of size, for each operator, mode, provider and everything else that is fixed."""
    fixed = FIXED[over]
    found: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in report["rows"]:
        if row["p50"] is not None and size_of(row, over):
            key = (
                row["op"],
                row["mode"],
                row["provider"],
                row["dtype"],
                row["dropout"],
                *(row.get(name, 0) for name in fixed),
            )
            found.setdefault(key, {})[size_of(row, over)] = row["p50"]
    return {key: sorted(points.items()) for key, points in found.items() if len(points) >= FEWEST_POINTS}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of log time over log size."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    middle, level = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - middle) ** 2 for x in xs)
    return sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / across


def plot(report: dict[str, Any], over: str, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    found, written = curves(report, over), []
    for op in dict.fromkeys(key[0] for key in found):
        panels = list(dict.fromkeys((key[1], *key[3:]) for key in found if key[0] == op))
        figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.6), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            for key, points in found.items():
                if key[0] == op and (key[1], *key[3:]) == panel:
                    label = f"{key[2]}: slope {slope(points):.2f}"
                    axis.plot(*zip(*points, strict=True), marker="o", color=COLOURS.get(key[2], "0.6"), label=label)
            axis.set(xscale="log", yscale="log", xlabel=SIZES[over], ylabel="seconds")
            mode, dtype, dropout, *sizes = panel
            fixed = [f"{name}={size:g}" for name, size in zip(FIXED[over], sizes, strict=True) if size]
            axis.set_title(", ".join([mode, dtype, *fixed, f"dropout {dropout:g}"]), fontsize=9)
            axis.grid(True, which="both", alpha=0.25)
            axis.legend(fontsize=7)
        figure.suptitle(op, fontsize=10)
        figure.tight_layout()
        written.append(folder / f"growth-{over}-{op}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def operators(over: str) -> list[str]:
    """Those that have the size."""
    ops = run.registry.load()
    has = {
        "m": lambda op: op.tokens,
        "nk": lambda op: True,
        "rank": lambda op: op.ranked,
        "density": lambda op: op.sparse,
        "adapters": lambda op: op.routed,
    }[over]
    return [name for name, op in ops.items() if has(op)]


def sweep(over: str, options: Sequence[str]) -> dict[str, Any]:
    """The rows of run's over several sizes; ``options`` are run's and come before the sweep's own."""
    given = {word.split("=")[0] for word in options if word.startswith("--")}
    device = run.parser().parse_args(list(options)).device.split(":")[0]
    extra = [] if "--op" in given else ["--op", *operators(over)]
    for words in (SWEEPS[over][device], ELSEWHERE[device][:2], ELSEWHERE[device][2:], ("--seconds", "0.15")):
        if words[0] not in given:
            given.add(words[0])
            extra += words
    return run.execute(run.parse_arguments([*options, *extra]))


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(growth's own words, run's): an option takes the words after it along, the first words of all are a file."""
    own: list[str] = []
    options: list[str] = []
    taker = own
    for word in words:
        if word.startswith("-"):
            taker = own if word.split("=")[0] in ("--over", "--out", "-h", "--help") else options
        taker.append(word)
    return own, options


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("file", nargs="?", type=Path, metavar="FILE.json")
    parse.add_argument("--over", choices=tuple(SIZES), required=True)
    parse.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the file; a sweep needs one")
    own, options = split(sys.argv[1:] if argv is None else argv)
    args = parse.parse_args(own)
    if args.file is not None and options:
        parse.error(f"run's options are for a sweep, and {args.file} is measured already: {' '.join(options)}")
    if args.file is not None and not args.file.is_file():
        parse.error(f"no file {args.file}")
    if args.file is None and args.out is None:
        parse.error("a sweep needs --out FOLDER")
    if args.file is None:
        if not operators(args.over):
            parse.error(f"no operator here has {SIZES[args.over]}")
        with run.terminate_as_interrupt():
            report = sweep(args.over, options)
        args.out.mkdir(parents=True, exist_ok=True)
        machine.write_json(args.out / f"growth-{args.over}.json", report)
    else:
        report = json.loads(args.file.read_text())
    found = curves(report, args.over)
    if not found:
        parse.error(f"no provider has {FEWEST_POINTS} sizes of {args.over} with everything else equal")
    header = ("operator", "mode", "provider", "slope", "sizes")
    rows = [(*key[:3], f"{slope(p):.2f}", " ".join(f"{x:g}" for x, _ in p)) for key, p in found.items()]
    print(table.aligned(header, rows))
    for path in plot(report, args.over, args.out or args.file.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
