"""Two kinds of pictures from a file of run's: speed against size with the limit drawn in, and a roofline.

``python -m benchmarks.plot FILE.json [--out FOLDER]`` writes <operator>.png for each operator and roofline.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In this order and these colours everywhere; the rest follows in grey.
COLOURS = {
    "peftfast": "#d62728",
    "peftfast:cuda": "#8c2d04",
    "peftfast:triton": "#ff7f0e",
    "peftfast:cpu": "#e377c2",
    "torch": "#1f77b4",
    "torch.compile": "#17becf",
    "peft": "#2ca02c",
    "peft:16bit": "#98df8a",
    "bitsandbytes": "#9467bd",
    "frozen": "#7f7f7f",
    "reference": "#bcbd22",
    "peftfast:reference": "#c49c94",
    "torch dropout": "#1f77b4",
    "torch bernoulli": "#17becf",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ON_ROOFLINE = ("peftfast", "torch", "torch.compile", "peft", "bitsandbytes", "frozen")


def _speed(row: dict[str, Any], seconds: float, flops: bool) -> float:
    return (row["flops"] if flops else row["bytes"]) / seconds / 1e9


def _heading(mode: str, dtype: str, m: int, rank: int, dropout: float, density: float, adapters: int) -> str:
    parts = [mode, dtype, *([f"M={m}"] if m else []), *([f"r={rank}"] if rank else [])]
    parts += [*([f"density {density:g}"] if density else []), *([f"{adapters} adapters"] if adapters else [])]
    return ", ".join([*parts, *([f"dropout {dropout:g}"] if dropout else [])])


def _bars(axis: Any, rows: Sequence[dict[str, Any]], flops: bool, limit: float) -> None:
    """One size only: a bar for each provider, the fastest on top."""
    timed = sorted((row for row in rows if row["p50"] is not None), key=lambda row: -row["p50"])
    names = [row["provider"] for row in timed]
    labels = [
        name if row["computes"] == "whole" else f"{name} (no adapter)" for name, row in zip(names, timed, strict=True)
    ]
    colours = [COLOURS.get(name, "0.6") for name in names]
    axis.barh(labels, [_speed(row, row["p50"], flops) for row in timed], color=colours)
    for i, row in enumerate(timed):
        axis.plot([_speed(row, row["p80"], flops), _speed(row, row["p20"], flops)], [i, i], "k-", lw=1.2)
    axis.axvline(limit, color="k", ls="--", label="limit of this machine")
    axis.set_xlim(left=0)
    axis.set_xlabel("GFLOP/s" if flops else "GB/s")


def _places(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """Where each N x K stands on the axis: at N K, those of one product side by side."""
    shapes = sorted({(row["n"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape))
    found: dict[tuple[int, int], float] = {}
    for n, k in shapes:
        beside = sum(1 for other in found if other[0] * other[1] == n * k)
        found[n, k] = n * k * 1.3**beside
    return found


def _series(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["dtype"], row["m"], row["rank"], row["dropout"], row.get("density", 0), row.get("adapters", 0)


def plot_op(op: str, rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """One panel for each mode and each dtype, M, rank and dropout: GFLOP/s where the matrix unit sets the limit, else GB/s."""
    from matplotlib import pyplot

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["mode"], *_series(row)), []).append(row)
    modes = list(dict.fromkeys(key[0] for key in panels))
    lines = -(-len(panels) // len(modes))
    figure, axes = pyplot.subplots(lines, len(modes), figsize=(5.2 * len(modes), 3.9 * lines), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    filled = dict.fromkeys(modes, 0)
    for (mode, *series), members in panels.items():
        axis = axes[filled[mode]][modes.index(mode)]
        filled[mode] += 1
        axis.set_visible(True)
        # The whole operator's limit: a provider of the frozen part alone has its own, lower one.
        whole = [row for row in members if row["computes"] == "whole"] or members
        flops = all(row["bound"] == "matrix" for row in whole)
        places = _places(members)
        sizes = {places[row["n"], row["k"]]: _speed(row, row["limit_s"], flops) for row in whole}
        if len(sizes) == 1:
            _bars(axis, members, flops, *sizes.values())
            axis.set_title(_heading(mode, *series), fontsize=9)
            continue
        axis.plot(sorted(sizes), [sizes[size] for size in sorted(sizes)], "k--", label="limit of this machine")
        names = {row["provider"] for row in members}
        for name in [*(name for name in COLOURS if name in names), *sorted(names - set(COLOURS))]:
            timed = [row for row in members if row["provider"] == name and row["p50"] is not None]
            timed.sort(key=lambda row: places[row["n"], row["k"]])
            if not timed:
                continue
            label = name if timed[0]["computes"] == "whole" else f"{name} (no adapter)"
            middle = [_speed(row, row["p50"], flops) for row in timed]
            low = [value - _speed(row, row["p80"], flops) for value, row in zip(middle, timed, strict=True)]
            high = [_speed(row, row["p20"], flops) - value for value, row in zip(middle, timed, strict=True)]
            x = [places[row["n"], row["k"]] for row in timed]
            bars = [[max(0.0, value) for value in side] for side in (low, high)]
            axis.errorbar(x, middle, bars, marker="o", ms=4, capsize=2, color=COLOURS.get(name, "0.6"), label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(list(places.values()), [f"{n}x{k}" for n, k in places], rotation=30, ha="right", fontsize=7)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel("N x K, along N K" if op != "dropout_mask" else "N x K of the layer")
        axis.set_ylabel("GFLOP/s" if flops else "GB/s")
        axis.set_title(_heading(mode, *series), fontsize=9)
        axis.grid(True, which="both", alpha=0.25)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(f"{op}: {title}", fontsize=10)
    figure.tight_layout(rect=(0, 0.02 + 0.12 / lines, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_roofline(report: dict[str, Any], path: Path, title: str) -> None:
    """Operations a second over operations a byte, both counted by formula; the roof is what this machine was measured at."""
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["p50"] is not None and row["flops"] and row["provider"] in ON_ROOFLINE]
    if not rows:
        return
    figure, axis = pyplot.subplots(figsize=(8.5, 5.5))
    intensities = [row["flops"] / row["bytes"] for row in rows]
    reach = (min(intensities) / 2, max(intensities) * 2)
    bandwidth = report["limits"]["bandwidth"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        rate = report["limits"]["rates"][dtype]
        knee = rate / bandwidth
        xs = sorted({reach[0], min(max(knee, reach[0]), reach[1]), reach[1]})
        axis.plot(xs, [min(rate, x * bandwidth) / 1e9 for x in xs], "k-", lw=1.2)
        axis.annotate(f"{dtype} {rate / 1e9:.0f} GFLOP/s", (reach[1], rate / 1e9), ha="right", va="bottom", fontsize=8)
    axis.annotate(
        f"{bandwidth / 1e9:.0f} GB/s", (reach[0], reach[0] * bandwidth / 1e9), ha="left", va="top", fontsize=8
    )
    kinds = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    for row, intensity in zip(rows, intensities, strict=True):
        marker = MARKERS[kinds.index((row["op"], row["mode"])) % len(MARKERS)]
        hollow = "none" if kinds.index((row["op"], row["mode"])) >= len(MARKERS) else COLOURS[row["provider"]]
        speed = row["flops"] / row["p50"] / 1e9
        axis.plot(intensity, speed, marker, ms=6, color=COLOURS[row["provider"]], mfc=hollow, alpha=0.8, ls="none")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.grid(True, which="both", alpha=0.25)
    for i, (op, mode) in enumerate(kinds):
        fill = "none" if i >= len(MARKERS) else "0.3"
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="0.3", mfc=fill, ls="none", label=f"{op} {mode}")
    for name in ON_ROOFLINE:
        if any(row["provider"] == name for row in rows):
            axis.plot([], [], "-", lw=4, color=COLOURS[name], label=name)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.set_title(f"roofline: {title}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write every picture of a report; the paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    machine = report["machine"]
    gpu, cpu = machine["gpu"], machine["cpu"]
    title = gpu["name"] if gpu else f"{cpu['name']}, {cpu['threads']} threads, {cpu['isa']}"
    title += f", {(machine['commit'] or 'no commit')[:10]}{' and changes' if machine['dirty'] else ''}"
    written = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        written.append(folder / f"{op}.png")
        plot_op(op, [row for row in report["rows"] if row["op"] == op], written[-1], title)
    plot_roofline(report, folder / "roofline.png", title)
    return [*written, *([folder / "roofline.png"] if (folder / "roofline.png").is_file() else [])]


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog=f"python -m {__package__}.plot", description=__doc__)
    parse.add_argument("file", type=Path, metavar="FILE.json")
    parse.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the file")
    args = parse.parse_args(argv)
    if not args.file.is_file():
        parse.error(f"no file {args.file}")
    for path in plot(json.loads(args.file.read_text()), args.out or args.file.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
