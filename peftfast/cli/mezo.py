"""``python -m peftfast demo --method mezo``: the task learnt by forward passes alone, beside what backpropagation takes for a step.

The noise of MeZO's estimate grows with the number of parameters that it moves at once, times the gradient's norm. The new head has few
thousand parameters and most of what can be learnt at the beginning; the encoder has millions, near where they should be. So they take
steps by turns, each with its own optimiser. While the head takes its step the encoder stands still, and one forward of it serves all of
the head's directions, whose own forwards are 4,000 multiplications a text: the head can afford 64 a step.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arms, atomic, classifier, demo, docstrings, measure
from .arms import Batch

STEPS, QUICK_STEPS = 2000, 6
SEEDS, QUICK_SEEDS = 3, 1
BATCH_SIZE, MAX_LENGTH = 8, 16
HELD_OUT, QUICK_HELD_OUT = 256, 32
PROBE_STEPS, QUICK_PROBE_STEPS = 12, 6  # rounds of turns
TURNS = ("head", "head", "encoder")
AIM = 0.8  # of the loss at the start
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "SEQ_CLS"}


@dataclass(frozen=True)
class Part:
    """How MeZO moves one part of the model: rates fall to zero along a line."""

    lr: float
    eps: float
    directions: int = 1


# The head alone on the encoder's fixed features, batches of 8, held-out loss after 1,333 steps over its start: one direction at 3e-3
# 0.95 (1,000 steps), 32 at 2e-2 0.77, 64 at 3e-2 0.70, at 6e-2 0.72.
HEAD = Part(lr=4e-2, eps=1e-2, directions=64)
# Whole runs at seeds 0, 1 and 2, loss over start and behind it the same with the encoder put back. Full model: 0.729 (0.735), 0.722
# (0.737), 0.741 (0.758). LoRA: 0.729 (0.732), 0.722 (0.723), 0.740 (0.740); with 7e-4 0.722 (0.739), 0.725
# (0.725), 0.743 (0.745); with 2e-3 1.00 at seed 0. So the head does nearly all of it, as the estimate at the top has it.
ENCODER = {"LoRA": Part(lr=2e-4, eps=1e-3), "full model": Part(lr=3e-5, eps=1e-3)}


def build(kind: str, directory: str, device: str, seed: int) -> nn.Module:
    """The encoder with a new head, without dropout, in float32; with ``LoRA`` only adapters and head are trained."""
    torch.manual_seed(seed)
    model: nn.Module = classifier.load(
        directory, num_labels=len(docstrings.LABELS), quantised=False, device=device, dropout=False
    )
    if kind == "LoRA":
        from peft import LoraConfig, get_peft_model

        import peftfast

        model = get_peft_model(model, LoraConfig(**LORA))  # type: ignore[arg-type]
        peftfast.patch(model)
    return model.eval()


def parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """What is trained: the head, and the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        "head": [pair for pair in named if "classifier" in pair[0]],
        "encoder": [pair for pair in named if "classifier" not in pair[0]],
    }


class Learner:
    """A model and its two optimisers, which take ``steps`` steps by turns, each on a batch of its own."""

    def __init__(self, kind: str, model: Any, seed: int, steps: int) -> None:
        from ..optim import MeZO

        self.model, self.steps, self.taken = model, steps, 0
        self.inner = model.get_base_model() if kind == "LoRA" else model
        self.parts = {"head": HEAD, "encoder": ENCODER[kind]}
        self.optimisers = {
            name: MeZO(
                members,
                lr=self.parts[name].lr,
                eps=self.parts[name].eps,
                directions=self.parts[name].directions,
                distribution="rademacher",
                seed=seed + k,
            )
            for k, (name, members) in enumerate(parts(model).items())
        }

    def step(self, batch: Batch) -> Tensor:
        """The next turn's step; the mean loss of its evaluations."""
        name = TURNS[self.taken % len(TURNS)]
        optimiser = self.optimisers[name]
        optimiser.param_groups[0]["lr"] = self.parts[name].lr * (1 - min(self.taken / self.steps, 1.0))
        self.taken += 1
        if name == "encoder":
            return optimiser.step(lambda: self.model(**batch).loss)
        with torch.no_grad():
            pooled = self.inner.pooled(batch["input_ids"], batch["attention_mask"])
        return optimiser.step(lambda: self.inner.judged(pooled, batch["labels"]).loss)

    def check(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.check()


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Batch) -> float:
    return float(model(**batch).loss)


@torch.no_grad()
def swap(members: list[tuple[str, nn.Parameter]], values: list[Tensor]) -> None:
    """Exchange the parameters' values with ``values``."""
    for (_, parameter), value in zip(members, values, strict=True):
        kept = parameter.clone()
        parameter.copy_(value)
        value.copy_(kept)


Step = Callable[[], Any]


def probe(device: str, build_step: Callable[[], Step], steps: int, rehearse: bool) -> tuple[float, int | None]:
    """(seconds of the mean step, peak of memory above the loaded model) of a fresh model's first steps, what the optimiser then
    allocates and keeps among it. With ``rehearse`` a copy that is thrown away goes first and takes what the libraries allocate once."""
    if rehearse:
        build_step()()
    step = build_step()
    seconds: list[float] = []

    def run() -> None:
        for _ in range(steps):
            start = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)

    mark = measure.memory_in_use(device)
    peak = measure.peak_above(mark, device, run)
    return statistics.fmean(seconds), peak


def costs(kind: str, directory: str, device: str, seed: int, largest: Batch, quick: bool) -> dict[str, Any]:
    """Steps a second and peak memory of MeZO's steps, a round of turns after the other, and of backpropagation with AdamW."""

    def forward_step() -> Step:
        learner = Learner(kind, build(kind, directory, device, seed), seed, STEPS)
        return lambda: learner.step(largest)

    def backward_step() -> Step:
        model = build(kind, directory, device, seed)
        adam = torch.optim.AdamW([p for members in parts(model).values() for _, p in members], lr=1e-5)

        def step() -> None:
            model(**largest).loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)

        return step

    steps = QUICK_PROBE_STEPS if quick else PROBE_STEPS
    forward_seconds, peak = probe(device, forward_step, steps, not quick)
    backward_seconds, backward_peak = probe(device, backward_step, steps, not quick)
    return {
        "steps_per_second": 1 / forward_seconds,
        "peak_bytes": peak,
        "backward_steps_per_second": 1 / backward_seconds,
        "backward_peak_bytes": backward_peak,
    }


def learn(kind: str, directory: str, device: str, seed: int, order: list[Batch], evaluation: Batch) -> dict[str, Any]:
    """One run: the held-out loss at its start and end, and with the encoder put back to its start and the head as trained."""
    model = build(kind, directory, device, seed)
    members = parts(model)["encoder"]
    start = [p.detach().clone() for _, p in members]
    before = held_out_loss(model, evaluation)
    learner = Learner(kind, model, seed, len(order))
    curve = []
    with demo.bars([f"MeZO, {kind}, seed {seed}"], len(order)) as advance:
        for batch in order:
            curve.append(learner.step(batch).item())
            advance(0, curve[-1])
    learner.check()
    after = held_out_loss(model, evaluation)
    swap(members, start)  # which now holds what was learnt
    return {
        "parameters": kind,
        "seed": seed,
        "trained": sum(p.numel() for group in parts(model).values() for _, p in group),
        "loss_before": before,
        "loss_after": after,
        "loss_without_encoder": held_out_loss(model, evaluation),
        "encoder_moved": sum(int((value != p.detach()).sum()) for (_, p), value in zip(members, start, strict=True)),
        "losses": curve,
    }


def main(options: argparse.Namespace, directory: str, device: str, out: Path) -> int:
    """Both kinds of parameters by MeZO at each seed, and steps of AdamW on the same for comparison. 0 when every loss fell."""
    from transformers import AutoTokenizer

    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    size = options.batch_size or BATCH_SIZE
    length = min(options.max_length, MAX_LENGTH)
    seeds = [options.seed + k for k in range(QUICK_SEEDS if options.quick else SEEDS)]
    examples, held = docstrings.split(docstrings.collect())
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    held = held[:: max(1, len(held) // (QUICK_HELD_OUT if options.quick else HELD_OUT))]
    evaluation = arms.encode(held, tokenizer, length, device)
    print(
        f"MeZO, {steps} steps of {size} texts of at most {length} tokens on {device}, seeds {', '.join(map(str, seeds))}; "
        f"one batch of {len(held)} held-out texts",
        flush=True,
    )
    orders = {seed: arms.batches(examples, tokenizer, size, steps, length, seed, device) for seed in seeds}
    largest = max(itertools.chain(*orders.values()), key=lambda batch: batch["input_ids"].numel())
    rows: list[dict[str, Any]] = []
    for kind in ENCODER:
        cost = costs(kind, directory, device, seeds[0], largest, options.quick)
        for seed in seeds:
            rows.append(learn(kind, directory, device, seed, orders[seed], evaluation) | cost)
            print(row_text(rows[-1]), flush=True)
    results = {
        "steps": steps,
        "batch_size": size,
        "max_length": length,
        "seeds": seeds,
        "device": device,
        "rows": rows,
        "versions": demo.versions(),
    }
    numbers = out / "mezo.json"
    atomic.replace_file(numbers, (json.dumps(results, indent=1) + "\n").encode())
    print(table(rows))
    print(f"\nnumbers {numbers}")
    if options.quick:
        print("quick: too few steps to learn or to time anything; run it without --quick for that")
        return 0
    return 0 if all(map(fell, rows)) else 1


def fell(row: dict[str, Any]) -> bool:
    return bool(row["loss_after"] <= AIM * row["loss_before"])


def row_text(row: dict[str, Any]) -> str:
    part, without = (row[name] / row["loss_before"] for name in ("loss_after", "loss_without_encoder"))
    verdict = "fell" if fell(row) else "did not fall"
    return (
        f"{row['parameters']}, seed {row['seed']}: held-out loss {row['loss_before']:.3f} -> {row['loss_after']:.3f}, "
        f"{part:.3f} of its start ({without:.3f} with the encoder as it was); {verdict} by a fifth"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Loss, speed and memory of each kind of parameters and seed, MeZO's beside those of backpropagation with AdamW."""

    def megabytes(value: int | None) -> str:
        return "unknown" if value is None else f"{value / 1e6:.1f} MB"

    lines = [("parameters", "seed", "held-out loss", "of start", "steps/s", "AdamW's", "peak above model", "AdamW's")]
    for row in rows:
        lines.append(
            (
                f"{row['parameters']} ({row['trained'] / 1e6:.2f} M)",
                str(row["seed"]),
                f"{row['loss_before']:.3f} -> {row['loss_after']:.3f}",
                f"{row['loss_after'] / row['loss_before']:.2f}",
                f"{row['steps_per_second']:.2f}",
                f"{row['backward_steps_per_second']:.2f}",
                megabytes(row["peak_bytes"]),
                megabytes(row["backward_peak_bytes"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
