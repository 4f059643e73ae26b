"""The picture of a demo run: what each arm's loss did, and how far stock and patched are apart without dropout."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = ("#7f7f7f", "#d95f02", "#1b6ca8", "#4d9221")
# Single losses of a batch of 32 jump by 0.3; the mean over ten steps shows the course.
_WINDOW = 10


def _running_mean(values: Sequence[float]) -> list[float]:
    return [
        sum(values[max(0, k + 1 - _WINDOW) : k + 1]) / len(values[max(0, k + 1 - _WINDOW) : k + 1])
        for k in range(len(values))
    ]


def draw(training: Mapping[str, Sequence[float]], overlap: Mapping[str, Sequence[float]], difference: float) -> bytes:
    """A PNG of two panels: the losses of the arms, and those of the runs without dropout one upon the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for colour, (name, losses) in zip(_COLOURS, training.items(), strict=False):
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        left.plot(steps, _running_mean(losses), color=colour, linewidth=1.8, label=name)
    left.set_title(f"Training loss, mean over {_WINDOW} steps")
    styles: tuple[dict[str, Any], ...] = ({"linewidth": 4.0, "alpha": 0.45}, {"linewidth": 1.2, "linestyle": "--"})
    for colour, style, (name, losses) in zip(_COLOURS[1:], styles, overlap.items(), strict=False):
        right.plot(range(1, len(losses) + 1), losses, color=colour, label=name, **style)
    right.set_title(f"Without dropout: apart by {difference:.1e} at most")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("cross-entropy")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
