"""How cost grows: time over one size on log axes, the others fixed, with the fitted slope (1: in proportion) in the legend.

``python -m benchmarks.growth FILE.json --over m|nk|rank [--out FOLDER]``, on a run with several ``--tokens``, ``--shapes`` or
``--rank``; writes growth-<size>-<operator>.png and prints the slopes.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import table
from .plot import COLOURS

SIZES = {"m": "M, rows of x", "nk": "N K, elements of the weight", "rank": "rank"}
FIXED = {"m": ("n", "k", "rank"), "nk": ("m", "rank"), "rank": ("m", "n", "k")}
FEWEST_POINTS = 3


def size_of(row: dict[str, Any], over: str) -> int:
    return row["n"] * row["k"] if over == "nk" else row[over]


def curves(report: dict[str, Any], over: str) -> dict[tuple[Any, ...], list[tuple[int, float]]]:
    """(size, seconds) in order of size, for each operator, mode, provider and everything else that is fixed."""
    fixed = FIXED[over]
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in report["rows"]:
        if row["p50"] is not None and size_of(row, over):
            key = (
                row["op"],
                row["mode"],
                row["provider"],
                row["dtype"],
                row["dropout"],
                *(row[name] for name in fixed),
            )
            found.setdefault(key, {})[size_of(row, over)] = row["p50"]
    return {key: sorted(points.items()) for key, points in found.items() if len(points) >= FEWEST_POINTS}


def slope(points: Sequence[tuple[int, float]]) -> float:
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
            fixed = [f"{name}={size}" for name, size in zip(FIXED[over], sizes, strict=True) if size]
            axis.set_title(", ".join([mode, dtype, *fixed, f"dropout {dropout:g}"]), fontsize=9)
            axis.grid(True, which="both", alpha=0.25)
            axis.legend(fontsize=7)
        figure.suptitle(op, fontsize=10)
        figure.tight_layout()
        written.append(folder / f"growth-{over}-{op}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parse.add_argument("file", type=Path, metavar="FILE.json")
    parse.add_argument("--over", choices=tuple(SIZES), required=True)
    parse.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the file")
    args = parse.parse_args(argv)
    if not args.file.is_file():
        parse.error(f"no file {args.file}")
    report = json.loads(args.file.read_text())
    found = curves(report, args.over)
    if not found:
        parse.error(f"no provider has {FEWEST_POINTS} sizes of {args.over} with everything else equal")
    header = ("operator", "mode", "provider", "slope", "sizes")
    rows = [(*key[:3], f"{slope(p):.2f}", " ".join(str(x) for x, _ in p)) for key, p in found.items()]
    print(table.aligned(header, rows))
    for path in plot(report, args.over, args.out or args.file.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
