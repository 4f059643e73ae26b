"""Every method of ``peftfast.adapt`` on the demo's task: ``python -m benchmarks.methods`` trains each for a few steps and writes
docs/methods.md from what it found.

A method's row is kept in the results file as soon as it is there, and a method that has one is not run again: an interrupted run goes
on where it stopped. All see the same batches; adapters have the budget that the method gives for the demo, the head is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine

ROOT = Path(__file__).resolve().parents[1]
_CHECKOUT = (ROOT / "docs").is_dir()  # from a wheel: where one stands
RESULTS = Path(__file__).resolve().parent / "results" / "methods.json" if _CHECKOUT else Path("methods.json")
PAGE = ROOT / "docs" / "methods.md" if _CHECKOUT else Path("methods.md")
STEPS, BATCH_SIZE, HELD_OUT, PROBE_STEPS = 20, 16, 300, 2


def read(path: Path) -> dict[str, Any]:
    """{"setting": ..., "rows": {method: row}}, empty where there is no file yet."""
    if not path.is_file():
        return {"setting": {}, "rows": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def trained(task: Any, name: str, order: list[Any], data: list[Any], held_out: int) -> dict[str, Any]:
    """A method's row: accuracy, losses, time of a step, memory and the count of trained numbers."""
    from peftfast.cli import arms as training
    from peftfast.cli import demo_methods
    from peftfast.methods.registry import get

    method, given = get(name), task._build_arguments()
    largest = max(order, key=lambda batch: batch["input_ids"].numel())
    probe = demo_methods.build(method, *given, steps=len(order), data=data)
    peak, saved, count = demo_methods.probed(probe, largest, PROBE_STEPS)
    del probe
    arm = demo_methods.build(method, *given, steps=len(order), data=data)
    training.train([arm], order)
    rows = task.held_out[:: max(1, len(task.held_out) // held_out)]
    evaluation = training.evaluation_batches(rows, task.tokenizer, task.options.max_length, task.device)
    return {
        "accuracy": training.accuracy(arm.logits(evaluation), evaluation),
        "final_loss": arm.final_loss,
        "milliseconds": arm.milliseconds,
        "peak_bytes": peak,
        "saved_bytes": saved,
        "trained": count,
        "layers": len(arm.handle.layers),
        "options": {**method.defaults(), **demo_methods.demo_options(method, len(order))},
        "learning_rate": method.learning_rate,
        "losses": arm.losses,
    }


def run(options: argparse.Namespace) -> int:
    """Train what has no row yet; 1 where a method failed, with its error on stderr and its row left out."""
    import torch

    from peftfast.cli import arguments, demo
    from peftfast.methods.registry import methods

    arguments.quiet_libraries()
    results = read(options.out)
    chosen = [name for name, method in methods().items() if method.build is not None]
    if options.only:
        unknown = sorted(set(options.only.split(",")) - set(chosen))
        if unknown:
            print(f"error: --only: no method {unknown[0]}", file=sys.stderr)
            return 2
        chosen = [name for name in chosen if name in options.only.split(",")]
    setting = {"steps": options.steps, "batch_size": options.batch_size, "held_out": options.held_out, "seed": 0}
    known = {key: results["setting"].get(key) for key in setting}
    if results["rows"] and known != setting and not options.again:
        print(f"error: {options.out} was run with {known}: run with the same, or give --again", file=sys.stderr)
        return 2
    task = demo.Run(
        argparse.Namespace(
            steps=options.steps, quick=False, batch_size=options.batch_size, max_length=64, seed=0, device="auto"
        ),
        demo.model_directory(),
        arguments.device_name("auto"),
        options.out.parent,
    )
    task._data()
    order, data = task._batches(options.steps), task._batches(min(8, options.steps))
    results["setting"] = {**setting, **machine.describe(task.device, torch.get_num_threads())}
    failed = []
    for number, name in enumerate(chosen, 1):
        if name in results["rows"] and not options.again:
            continue
        try:
            row = trained(task, name, order, data, options.held_out)
        except Exception as error:  # one method that fails leaves the others their rows
            failed.append(name)
            print(f"{number}/{len(chosen)} {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        results["rows"][name] = row
        machine.write_json(options.out, results)
        print(
            f"{number}/{len(chosen)} {name}: {100 * row['accuracy']:.1f} %, loss {row['final_loss']:.3f}, "
            f"{row['milliseconds']:.0f} ms a step, {row['trained']:,} trained",
            flush=True,
        )
    return 1 if failed else 0


INTRODUCTION = """# Methods

What of the literature `peftfast.adapt(model, "NAME", target_modules=...)` puts on a model, or stands as an optimiser or an operation on
saved deltas. `python -m peftfast methods NAME` tells the same of one; `demo --method NAME` trains it beside LoRA. This page is
written by `python -m benchmarks.methods`.
"""


def page(results: dict[str, Any]) -> str:
    """The text of docs/methods.md: a table of results, then a section a method."""
    from peftfast.cli.methods import described
    from peftfast.methods.registry import methods
    from peftfast.methods.unserved import UNSERVED

    rows, setting = results["rows"], results["setting"]
    entries = [described(method) for method in methods().values()]
    adapters = [one for one in entries if methods()[one["name"]].build is not None]
    if rows:
        processor = setting.get("gpu") or setting.get("cpu") or {"name": "a processor that the file does not name"}
        threads = f", {processor['threads']} threads" if "threads" in processor else ""
        measured = (
            f"Each row: {setting['steps']} steps of {setting['batch_size']} docstrings on all-MiniLM-L6-v2 (float32), the demo's task "
            f"of ten classes, accuracy on {setting['held_out']} held-out texts, with options and learning rate as below; "
            f"one run on {processor['name']}{threads} at a load of {setting.get('load_at_start', 0):.1f}: where other work ran, times "
            "are rough. So few steps say that a method learns and what it costs, not which is best. "
            "Peak: of a step on the largest batch, above the loaded model."
        )
    else:
        measured = "Nothing has been measured yet."
    lines = [INTRODUCTION, "## On the demo's task\n", f"{measured}\n"]
    lines += [
        "| method | trained | accuracy | final loss | ms a step | peak | saved for backward |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in adapters:
        lines.append(f"| [{one['name']}](#{one['name']}) | {_cells(rows.get(one['name']))} |")
    for one in entries:
        lines += ["", *_section(one, rows.get(one["name"]))]
    lines += ["", "## Not served", ""]
    lines += [f"- {name}: {reason}" for name, reason in UNSERVED.items()]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured | | | | |"
    peak = "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
    return (
        f"{row['trained']:,} | {100 * row['accuracy']:.1f} % | {row['final_loss']:.3f} | {row['milliseconds']:.0f} | {peak} | "
        f"{row['saved_bytes'] / 1e6:.0f} MB"
    )


def _section(one: dict[str, Any], row: dict[str, Any] | None) -> list[str]:
    where = f", [arXiv {one['arxiv']}](https://arxiv.org/abs/{one['arxiv']})" if one["arxiv"] else ""
    options = ", ".join(f"`{name}={value!r}`" for name, value in one["options"].items()) or "none"
    lines = [
        f"### {one['name']}",
        "",
        f"{one['paper']} ({one['authors']}, {one['year']}{where}). {one['kind'].capitalize()}.",
        "",
        "```",
        one["formula"],
        "```",
        "",
        f"- Options: {options}",
        f"- Reduces to: {one['reduces_to']}",
        f"- Fused: {one['fused']}",
        f"- In PEFT: {'`' + one['peft'] + '`' if one['peft'] else 'no'}",
    ]
    if one["reads_data"]:
        lines.append("- Reads data before training: `batches=`")
    if not one["exact_at_step_0"]:
        lines.append("- Step 0 differs from the base")
    if one["choices"]:
        lines.append(f"- Chosen here: {one['choices']}")
    if row is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in row["options"].items())
        lines.append(f"- Measured with: {given}; learning rate {row['learning_rate']:g}")
    return lines


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog=f"python -m {__package__}.methods", description=__doc__)
    parse.add_argument("--out", type=Path, default=RESULTS, help="results file, continued if it is there (%(default)s)")
    parse.add_argument("--page", type=Path, default=PAGE, help="what is written from it (%(default)s)")
    parse.add_argument("--only", help="names with commas between")
    parse.add_argument("--again", action="store_true", help="run what has a row too")
    parse.add_argument("--page-only", action="store_true", help="write the page from the results there are")
    parse.add_argument("--steps", type=int, default=STEPS)
    parse.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parse.add_argument("--held-out", type=int, default=HELD_OUT, help="texts that accuracy is taken on")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    status = 0 if options.page_only else run(options)
    if status != 2:
        options.page.write_text(page(read(options.out)), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
