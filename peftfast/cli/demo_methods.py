"""``python -m peftfast demo --method NAME``: the demo's task by any method that :func:`peftfast.adapt` knows, beside LoRA.

Both arms train the dense encoder (float32), each with its own adapter's budget, and the same new head, and see the same batches in the
same order.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import torch

from ..methods.adapting import AdapterHandle, adapt
from ..methods.registry import Method, get, methods
from . import arms as training
from . import atomic, classifier, measure
from .demo_sparse import table
from .errors import UserError

if TYPE_CHECKING:
    from .demo import Run

HEAD = "classifier"
DATA_BATCHES = 8  # what an initialisation that reads data goes over


def check(name: str) -> None:
    """UserError unless the demo can train a method of that name."""
    try:
        method = get(name)
    except ValueError as error:
        raise UserError(f"--method: {str(error).removeprefix('method: ')}") from None
    if method.build is None:
        trained = ", ".join(name for name, one in methods().items() if one.build)
        raise UserError(f"--method: {name} is not put on a model; those that are: {trained}")


def demo_options(method: Method, steps: int) -> dict[str, Any]:
    """The options of the demo's run: those that the method gives for it, and how many steps there will be."""
    options = dict(method.demo)
    if "total_steps" in method.defaults():
        options["total_steps"] = steps
    return options


def build(
    method: Method, directory: str, labels: int, device: str, seed: int, steps: int, data: list[training.Batch]
) -> training.Arm:
    """An arm ready for its first step. The same seed gives the same head everywhere."""
    torch.manual_seed(seed)
    model: Any = classifier.load(directory, num_labels=labels, quantised=False, device=device)
    handle = adapt(
        model,
        method.name,
        modules_to_save=[HEAD],
        batches=data if method.reads_data else None,
        **demo_options(method, steps),
    )
    optimiser = handle.optimizer(method.learning_rate, head_lr=training.HEAD_LEARNING_RATE)
    warmup = max(1, round(training.WARMUP_PART * steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    torch.manual_seed(seed)
    state = training._random_state(device)
    recipe = training.Recipe(method.name, adapters=True)
    return training.Arm(recipe, model, device, optimiser, schedule, state, handle=handle)


def probed(arm: training.Arm, batch: training.Batch, steps: int) -> tuple[int | None, int, int]:
    """(peak of a step above the loaded model, bytes saved for backward, trained adapter parameters); the arm has taken steps then."""
    mark = measure.memory_in_use(arm.device)

    def run() -> None:
        for _ in range(steps):
            arm.step(batch)

    peak = measure.peak_above(mark, arm.device, run)
    handle: AdapterHandle = arm.handle
    return peak, measure.saved_for_backward(arm.model, lambda: arm.model(**batch).loss), handle.trainable


def run(demo: Run) -> int:
    """Train both arms, print the table, write results.json and the adapter."""
    from ..integrations.adapter_files import save_adapter
    from .demo import bars

    chosen = [get("lora"), get(demo.options.method)][demo.options.method == "lora" :]
    demo._data()
    demo._print_setting()
    arguments = demo._build_arguments()
    order = demo._batches(demo.steps)
    data = demo._batches(min(DATA_BATCHES, demo.steps))
    largest = max(order, key=lambda batch: batch["input_ids"].numel())
    arms: list[training.Arm] = []
    rows: list[dict[str, Any]] = []
    for method in chosen:
        build(method, *arguments, 1, data).step(largest)  # what libraries allocate once a process
        peak, saved, trained = probed(build(method, *arguments, demo.steps, data), largest, demo.probe_steps)
        rows.append({"arm": method.name, "peak_bytes": peak, "saved_bytes": saved, "trained": trained})
        arms.append(build(method, *arguments, demo.steps, data))
        print(arms[-1].handle, flush=True)
    with bars([method.name for method in chosen], demo.steps) as advance:
        training.train(arms, order, lambda step, arm: advance(arms.index(arm), arm.losses[-1]))
    evaluation = training.evaluation_batches(demo.held_out, demo.tokenizer, demo.options.max_length, demo.device)
    for row, arm in zip(rows, arms, strict=True):
        row["accuracy"] = training.accuracy(arm.logits(evaluation), evaluation)
        row.update(final_loss=arm.final_loss, milliseconds=arm.milliseconds, losses=arm.losses)
    demo.results.update(method=demo.options.method, arms=rows)
    numbers, adapter = demo.out / "results.json", demo.out / "adapter"
    atomic.replace_file(numbers, (json.dumps(demo.results, indent=1) + "\n").encode())
    print(table(rows, demo.options.quick))
    where = f"\nnumbers {numbers}"
    with contextlib.suppress(RuntimeError):  # what is no adapter, or has to be put back in order first
        save_adapter(arms[-1].model, adapter)
        where += f", adapter {adapter}"
    print(where)
    return 0
