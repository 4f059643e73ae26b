"""What patch tells: one row a layer, a table of them, and each reason once in the log."""

from __future__ import annotations

import collections
import logging
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger("peftfast")
logged: set[str] = set()


def log_once(reason: str) -> None:
    if reason not in logged:
        logged.add(reason)
        logger.warning("an adapter layer runs stock: %s", reason)


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer.

    Attributes:
        name: its path in the model.
        layer: what it is, as in ``"lora.Linear4bit"``.
        kernel: what serves it when fused, as in ``"nf4 + lora [cpu avx512]"``; empty when stock.
        reason: why it is stock; empty when fused.
        patched: whether its class is exchanged now.
        note: what patch set beside the class, if anything.
        together: the layers that get the same tensor, and run in one call with this one where that pays (``configs.lora.group_pays``:
            on a CPU seldom) and nothing keeps them apart. Empty before the first forward, which shows them.
    """

    name: str
    layer: str
    kernel: str
    reason: str
    patched: bool
    note: str = ""
    together: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class MLPReport:
    """One gated MLP, down(act(gate) * up), that holds an adapter layer.

    Attributes:
        name: its path in the model. module: its class. form: its forward, as in ``"down_proj(act_fn(gate_proj) * up_proj)"``.
        activation: "silu", "gelu", "gelu_tanh" or "relu"; empty where it is none of them.
        patched: whether its class is exchanged now.
        reason: why its own forward runs; empty when the product is fused.
        kept: why the product is kept for the backward, though it is fused; empty when it is not kept.
    """

    name: str
    module: str
    form: str
    activation: str
    patched: bool
    reason: str
    kept: str = ""

    @property
    def fused(self) -> bool:
        return self.patched and not self.reason


def _product(row: MLPReport) -> str:
    if row.reason:
        return f"stock: {row.reason}"
    if not row.patched:
        return "not patched"
    return f"{row.activation}, {f'the product is kept: {row.kept}' if row.kept else 'neither activation nor product is kept'}"


def _served(row: LayerReport) -> str:
    if not row.fused:
        return f"stock: {row.reason}"
    beside = " and ".join(name.rpartition(".")[2] for name in row.together)
    return f"{row.kernel}, in a group with {beside}" if beside else row.kernel


@dataclass(frozen=True)
class PatchReport:
    """The layers of a model, fused and stock, and its gated MLPs. Printed, it is a table."""

    layers: tuple[LayerReport, ...]
    mlps: tuple[MLPReport, ...] = ()

    @property
    def fused(self) -> dict[str, str]:
        """Path of each fused layer -> its kernel."""
        return {row.name: row.kernel for row in self.layers if row.fused}

    @property
    def stock(self) -> dict[str, str]:
        """Path of each stock layer -> the reason."""
        return {row.name: row.reason for row in self.layers if not row.fused}

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The layers that get one tensor and may run together, in the order of the model; known after the first forward."""
        found = {tuple(sorted((row.name, *row.together))): None for row in self.layers if row.together}
        order = {row.name: i for i, row in enumerate(self.layers)}
        return [tuple(sorted(group, key=order.__getitem__)) for group in found]

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> how many layers it keeps stock, the most frequent first."""
        return dict(collections.Counter(self.stock.values()).most_common())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fused": len(self.fused),
            "stock": len(self.stock),
            "reasons": self.reasons,
            "groups": [list(group) for group in self.groups],
            "layers": [asdict(row) for row in self.layers],
            "mlps": [asdict(row) for row in self.mlps],
        }

    def __str__(self) -> str:
        if not self.layers:
            return "peftfast: no PEFT adapter layer found"
        unpatched = sum(row.fused and not row.patched for row in self.layers)
        lines = [f"peftfast: {len(self.fused)} adapter layers fused, {len(self.stock)} stock"]
        if unpatched:
            lines[0] += f" ({unpatched} not patched yet: peftfast.patch(model))"
        rows = [("layer", "type", "runs on")]
        rows += [(row.name, row.layer, _served(row)) for row in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines += [f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {kernel}" for name, kind, kernel in rows]
        products = collections.Counter((row.module, row.form, _product(row)) for row in self.mlps)
        lines += [f"  {count} x {module}, {form}: {how}" for (module, form, how), count in products.items()]
        notes = collections.Counter(row.note for row in self.layers if row.note)
        lines += [f"  {count} x {note}" for note, count in notes.items()]
        return "\n".join(lines)
