"""``python -m peftfast demo --method shira | spiel | s2ft``: the demo's task by a sparse delta, beside LoRA.

All arms have equally many trained adapter parameters, train the dense encoder (float32) and the same new head, and see the same batches
in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..methods import S2FT, SpIEL
from ..nn import SparseDeltaLinear
from ..optim import SparseAdamW
from . import arms as training
from . import atomic, classifier, measure

if TYPE_CHECKING:
    from .demo import Run

RANK = training.LORA["r"]
LEARNING_RATES = {"lora": 2e-3, "shira": 5e-3, "spiel": 5e-3, "s2ft": 1e-3}
HEAD_RATIO, CHANNEL_RATIO = 4 / 12, 160 / 1536  # of MiniLM: 288 columns of 384 rows a layer, LoRA's count at rank 16


@dataclass(frozen=True)
class Sparse:
    """An arm: its name in the table, the kind of adapter, and whether peftfast's kernels run it."""

    name: str
    kind: str
    patched: bool = True


ARMS = {
    "shira": (
        Sparse("LoRA, peftfast", "lora"),
        Sparse("SHiRA, stock PEFT", "shira", patched=False),
        Sparse("SHiRA, peftfast", "shira"),
    ),
    "spiel": (Sparse("LoRA, peftfast", "lora"), Sparse("SpIEL-AG, peftfast", "spiel")),
    "s2ft": (Sparse("LoRA, peftfast", "lora"), Sparse("S2FT, peftfast", "s2ft")),
}


class MovingAdamW(SparseAdamW):
    """SparseAdamW with SpIEL's step behind its own."""

    method: SpIEL | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        if self.method is not None:
            self.method.step()
        return loss


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("classifier")]


def _sparse_layers(model: nn.Module, seed: int) -> None:
    """Every linear layer of the encoder with as many active weights as LoRA has there."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in _linears(model):
        n, k = linear.weight.shape
        density = RANK * (n + k) / (n * k)
        layer = SparseDeltaLinear.from_linear(linear, density=density, resident=True, generator=generator)
        model.set_submodule(name, layer)


def build(arm: Sparse, directory: str, labels: int, device: str, seed: int, steps: int) -> training.Arm:
    """The arm ready for its first step. The same seed gives the same head everywhere."""
    torch.manual_seed(seed)
    model: Any = classifier.load(directory, num_labels=labels, quantised=False, device=device)
    report = None
    if arm.kind in ("lora", "shira"):
        from peft import LoraConfig, ShiraConfig, get_peft_model

        import peftfast

        if arm.kind == "lora":
            config: Any = LoraConfig(**training.LORA, lora_dropout=0.0)
        else:
            targets = [name for name, _ in _linears(model)]
            config = ShiraConfig(r=RANK, target_modules=targets, task_type="SEQ_CLS", random_seed=seed)
        model = get_peft_model(model, config)
        report = peftfast.patch(model) if arm.patched else None
    else:
        model.requires_grad_(False)
        if arm.kind == "spiel":
            _sparse_layers(model, seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            S2FT(model, head_ratio=HEAD_RATIO, channel_ratio=CHANNEL_RATIO, generator=generator)
        model.classifier.requires_grad_(True)
    optimiser = _optimiser(arm, model, steps)
    warmup = max(1, round(training.WARMUP_PART * steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    torch.manual_seed(seed)
    state = training._random_state(device)
    return training.Arm(training.Recipe(arm.name, adapters=True), model, device, optimiser, schedule, state, report)


def _optimiser(arm: Sparse, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "classifier" not in name], "lr": LEARNING_RATES[arm.kind]},
        {"params": [p for name, p in trained if "classifier" in name], "lr": training.HEAD_LEARNING_RATE},
    ]
    if arm.kind in ("lora", "shira"):
        return torch.optim.AdamW(groups, weight_decay=0.0)
    optimiser = MovingAdamW(groups)
    if arm.kind == "spiel":
        optimiser.method = SpIEL(model, optimiser, total_steps=steps)
    return optimiser


def _probed(
    arm: Sparse, arguments: tuple[str, int, str, int], batch: training.Batch, steps: int
) -> tuple[Any, int, int]:
    """(peak of a step above the loaded model, bytes saved for backward, trained adapter parameters) of a copy that is thrown away."""
    copy = build(arm, *arguments, steps)
    mark = measure.memory_in_use(copy.device)

    def run() -> None:
        for _ in range(steps):
            copy.step(batch)

    peak = measure.peak_above(mark, copy.device, run)
    saved = measure.saved_for_backward(copy.model, lambda: copy.model(**batch).loss)
    trained = sum(p.numel() for n, p in copy.model.named_parameters() if p.requires_grad and "classifier" not in n)
    return peak, saved, trained


def run(demo: Run) -> int:
    """Train the arms, print the table, write results.json."""
    demo._data()
    demo._print_setting()
    arguments = demo._build_arguments()
    order = demo._batches(demo.steps)
    largest = max(order, key=lambda batch: batch["input_ids"].numel())
    chosen, arms, rows = ARMS[demo.options.method], [], []
    for recipe in chosen:
        build(recipe, *arguments, 1).step(largest)  # what libraries allocate once a process
        peak, saved, trained = _probed(recipe, arguments, largest, demo.probe_steps)
        rows.append({"arm": recipe.name, "peak_bytes": peak, "saved_bytes": saved, "trained": trained})
        arms.append(build(recipe, *arguments, demo.steps))
    from .demo import bars

    with bars([recipe.name for recipe in chosen], demo.steps) as advance:
        training.train(arms, order, lambda step, arm: advance(arms.index(arm), arm.losses[-1]))
    evaluation = training.evaluation_batches(demo.held_out, demo.tokenizer, demo.options.max_length, demo.device)
    for row, arm in zip(rows, arms, strict=True):
        row["accuracy"] = training.accuracy(arm.logits(evaluation), evaluation)
        row.update(final_loss=arm.final_loss, milliseconds=arm.milliseconds, losses=arm.losses)
    demo.results.update(method=demo.options.method, arms=rows)
    numbers = demo.out / "results.json"
    atomic.replace_file(numbers, (json.dumps(demo.results, indent=1) + "\n").encode())
    print(table(rows, demo.options.quick))
    print(f"\nnumbers {numbers}")
    return 0


def table(rows: list[dict[str, Any]], quick: bool) -> str:
    from .demo import megabytes

    lines = [("", "held-out accuracy", "final loss", "ms per step", "peak memory", "saved for backward", "trained")]
    lines += [
        (
            row["arm"],
            f"{100 * row['accuracy']:.1f} %",
            f"{row['final_loss']:.3f}",
            f"{row['milliseconds']:.0f}",
            megabytes(row["peak_bytes"]),
            megabytes(row["saved_bytes"]),
            f"{row['trained']:,}",
        )
        for row in rows
    ]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    text.append(
        "trained: adapter parameters, the head's not counted; peak memory: of a step on the largest batch, above the model"
    )
    if quick:
        text.append("quick: too few steps to learn or to time anything; run it without --quick for that")
    return "\n".join(text)
