"""The end-to-end step as a table and as a picture: losses of all arms in one panel, tokens a second with the limit under it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import table
from .arms import BASELINE

HEADER = (
    *("method", "arm", "a step", "tokens/s", "of limit", "against stock", "model MiB", "peak above it MiB"),
    *("launches", "busy", "loss first, last", "gap", "fused"),
)


def cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    stock = next((r for r in rows if r["method"] == row["method"] and r["role"] == BASELINE), None)
    ratio = f"{stock['p50'] / row['p50']:.2f}x" if stock is not None else ""
    busy = "" if row["busy"] is None else f"{100 * row['busy']:.0f} %"
    gap = "" if row["loss_gap"] is None else f"{100 * row['loss_gap']:.2g} %{' APART' if row['apart'] else ''}"
    return (
        *(row["method"], row["arm"], table.time(row["p50"]), f"{row['tokens_per_second']:.4g}"),
        *(f"{row['percent_of_limit']:.0f} %", ratio, table.size(row["model_bytes"]), table.size(row["peak_bytes"])),
        *("" if row["launches"] is None else str(row["launches"]), busy),
        *(f"{row['losses'][0]:.4f}, {row['losses'][-1]:.4f}", gap),
        "" if row["fused"] is None else "{} of {}".format(*row["fused"]),
    )


def title(report: dict[str, Any]) -> str:
    gpu, cpu, settings = report["machine"]["gpu"], report["machine"]["cpu"], report["settings"]
    name = gpu["name"] if gpu else f"{cpu['name']}, {cpu['threads']} threads, {cpu['isa']}"
    layers = f" cut to {settings['layers']} layers" if settings["layers"] else ""
    text = f"{settings['model']}{layers}, {settings['rows']} x {settings['length']} tokens, {settings['dtype']}, r={settings['rank']}"
    text += f", dropout {settings['dropout']:g}" if settings["dropout"] else ""
    return f"{text}{', checkpointing' if settings['checkpointing'] else ''}; {name}"


def print_report(report: dict[str, Any]) -> None:
    rows = report["arms"]
    print(table.aligned(HEADER, [cells(row, rows) for row in rows]))
    print(f"\n{title(report)}")
    if report["noise"] is not None:
        print(f"noise of a step's time {100 * report['noise']:.1f} %; load {report['machine']['load_at_start']}")
    for entry in report["left_out"]:
        print(f"left out: {entry['method']}, {entry['arm']}: {entry['reason']}")


def plot(report: dict[str, Any], path: Path) -> Path:
    """The losses of all arms of a method in one panel, and their tokens a second with the limit under it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row["method"] for row in report["arms"]))
    figure, axes = pyplot.subplots(2, len(methods), figsize=(5.0 * len(methods), 7.4), squeeze=False)
    tokens = report["settings"]["rows"] * report["settings"]["length"]
    for column, method in enumerate(methods):
        members = [row for row in report["arms"] if row["method"] == method]
        losses, speeds = axes[0][column], axes[1][column]
        for i, row in enumerate(row for row in members if row["trains"]):
            # The later, the thinner: curves that lie on each other all show.
            losses.plot(row["losses"], lw=max(1.0, 6.0 - 1.3 * i), alpha=0.8, label=row["arm"])
        losses.set(title=f"{method}: loss", xlabel="step")
        losses.legend(fontsize=7)
        losses.grid(True, alpha=0.25)
        ordered = sorted(members, key=lambda row: row["tokens_per_second"])
        speeds.barh([row["arm"] for row in ordered], [row["tokens_per_second"] for row in ordered], color="#1f77b4")
        for i, row in enumerate(ordered):
            speeds.plot([tokens / row["p80"], tokens / row["p20"]], [i, i], "k-", lw=1.5)
        if members:
            speeds.axvline(tokens / members[0]["limit_s"], color="k", ls="--", label="limit of the matrix unit")
            speeds.legend(fontsize=7)
        speeds.set(xlabel="tokens a second", title=f"{method}: speed")
    figure.suptitle(title(report), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
