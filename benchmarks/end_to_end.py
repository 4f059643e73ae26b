"""One training step of a Llama-shaped model: tokens a second, peak memory, launches, and the losses of all arms in one picture.

``python -m benchmarks.end_to_end --model small --method lora qlora --out FILE.json`` builds the model from its configuration
with random weights and trains it on real text: stock PEFT (with bitsandbytes under qlora), peftfast on the same model, and the
frozen model's forward and dX. The arms of a method take their steps in turn, each from the same seed; stock takes part twice, to
show the noise.
"""

import argparse
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftfast.cli import measure as step_memory

from . import activity, limits, llama, machine, timing
from .arms import ARMS, BASELINE, METHODS, Arm, Batch, Problem, Trainee, Unavailable
from .end_to_end_report import plot, print_report
from .run import DTYPES, SELF_PAIR, terminate_as_interrupt

KIND, SCHEMA = "end_to_end", 1
WARM_UP = 3
# Largest difference between the losses of an arm and of stock, over the first loss, that still counts as lying on each other. Stock
# with 16-bit adapters and stock with float32 ones were 0.04 % apart over 12 steps of `small` (Zen 5, 2026-11-21); eight times the
# scaling is 4 % apart after six steps of `tiny`.
APART = 0.01
DEFAULTS = {"cpu": ("small", 1, 256), "cuda": ("llama3-8b", 1, 2048)}


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog=f"python -m {__package__}.end_to_end", description=__doc__)
    parse.add_argument("--model", choices=tuple(llama.SIZES), help="default: small on a CPU, llama3-8b on a GPU")
    parse.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parse.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parse.add_argument("--arm", nargs="+", metavar="NAME", help="only these arms")
    parse.add_argument("--rows", type=int, help="sequences in a batch")
    parse.add_argument("--length", type=int, help="tokens of a sequence")
    parse.add_argument("--steps", type=int, default=20, help=f"steps of each arm, the first {WARM_UP} untimed")
    parse.add_argument("--rank", type=int, default=16)
    parse.add_argument(
        "--dropout", type=float, default=0.0, help="masks differ between stock and peftfast, and so do losses"
    )
    parse.add_argument("--density", type=float, default=0.01)
    parse.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parse.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every arm")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1: timed by processor time, which a busy machine does not lengthen; more by the wall)",
    )
    parse.add_argument(
        "--sequential", action="store_true", help="one arm in memory at a time, not all of a method in turn"
    )
    parse.add_argument("--quick", action="store_true", help="the tiny model, few steps")
    parse.add_argument("--out", type=Path, metavar="FILE.json", help="the numbers; the picture is written beside it")
    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parse = parser()
    args = parse.parse_args(argv)
    model, rows, length = DEFAULTS[torch.device(args.device).type]
    if args.quick:
        model, rows, length = "tiny", 1, 64
        args.steps = min(args.steps, 8)
    args.model, args.rows, args.length = args.model or model, args.rows or rows, args.length or length
    for name, low in (("layers", 1), ("rows", 1), ("length", 2), ("steps", WARM_UP + 1), ("rank", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            parse.error(f"--{name}: expected at least {low}, got {value}")
    if not 0 <= args.dropout < 1:
        parse.error(f"--dropout: expected a probability in [0, 1), got {args.dropout}")
    if not 0 < args.density <= 1:
        parse.error(f"--density: expected a part in (0, 1], got {args.density}")
    known = {arm.name for arm in ARMS if arm.method in args.method}
    if unknown := sorted(set(args.arm or ()) - known):
        parse.error(f"--arm: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        parse.error(f"--out: no folder {args.out.resolve().parent}")
    return args


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@dataclass
class Runner:
    """An arm at work: what its steps have shown so far."""

    arm: Arm
    name: str
    trainee: Trainee
    peak: int | None = None
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch, device: str, timed: bool) -> None:
        clock = time.perf_counter if device.startswith("cuda") else timing.cpu_clock(torch.get_num_threads())
        _synchronise(device)
        start = clock()
        loss = self.trainee.step(batch)
        _synchronise(device)
        if timed:
            self.seconds.append(clock() - start)
        self.losses.append(loss)

    def warm_up(self, order: Sequence[Batch], device: str) -> None:
        """The first steps, and the peak of memory in them above what is in use with the model loaded: gradients, optimiser states and
        whatever else a step leaves behind count."""

        def run() -> None:
            for batch in order[:WARM_UP]:
                self.step(batch, device, timed=False)

        self.peak = step_memory.peak_above(step_memory.memory_in_use(device), device, run)

    def row(self, problem: Problem, order: Sequence[Batch]) -> dict[str, Any]:
        p20, p50, p80 = timing.quantiles(self.seconds)
        losses = [float(loss) for loss in self.losses]
        found = activity.measure(lambda: self.trainee.step(order[-1]), problem.device)
        return {
            "method": self.arm.method,
            "arm": self.name,
            "role": self.arm.role if self.name == self.arm.name else "",
            "trains": self.arm.trains,
            "dropout": problem.dropout,
            **{"p20": p20, "p50": p50, "p80": p80, "steps": len(self.seconds)},
            "tokens_per_second": problem.rows * problem.length / p50,
            "model_bytes": llama.nbytes(self.trainee.model),
            "peak_bytes": self.peak,
            "launches": None if found is None else found.launches,
            "busy": None if found is None else min(1.0, found.busy_s / p50),
            "fused": self.trainee.fused,
            "losses": losses,
        }


def cost(problem: Problem, method: str) -> int:
    """Operations that a step cannot do without: two passes through every linear layer, and the products of causal attention over half a
    square, two forward and four backward. A step of MeZO is two forwards."""
    size, block = problem.size, problem.size.block
    layers = problem.layers or size.layers
    tokens = problem.rows * problem.length
    attention = layers * 2 * tokens * problem.length * block.heads * block.head_dim
    forward = 2 * tokens * size.linear_elements(problem.layers) + attention
    return 2 * forward if method == "mezo" else 2 * forward + attention


def compare_losses(rows: list[dict[str, Any]]) -> None:
    """``loss_gap``: the largest difference from the baseline's losses, over the first loss; ``apart`` where that is too much. MeZO's z
    differs from stock's, so there only the first loss, before any update, is compared."""
    for row in rows:
        reference = next((r for r in rows if r["method"] == row["method"] and r["role"] == BASELINE), None)
        row["loss_gap"], row["apart"] = None, False
        if reference is None or row is reference or not row["trains"] or not row["losses"]:
            continue
        pairs = list(zip(row["losses"], reference["losses"], strict=False))
        if row["method"] == "mezo":
            pairs = pairs[:1]
        gap = max(abs(a - b) for a, b in pairs) / abs(reference["losses"][0])
        row["loss_gap"] = gap
        row["apart"] = not gap <= (APART if not row["dropout"] else float("inf"))


class Session:
    """The rows of a run, method by method."""

    def __init__(self, args: argparse.Namespace, progress: Callable[[str], None]) -> None:
        self.args, self.progress = args, progress
        dtype = getattr(torch, DTYPES[args.dtype])
        fields = (args.rows, args.length, args.rank, args.dropout, args.density, args.device)
        self.problem = Problem(args.model, args.layers, *fields, dtype, args.checkpointing)
        self.order = list(llama.batches(args.steps, args.rows, args.length, args.device))
        self.limits = limits.measure(args.device, [DTYPES[args.dtype]])
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.stopped = False

    def _start(self, arm: Arm, name: str) -> Runner | None:
        """An arm after its warm-up, or None where it cannot take part."""
        self.progress(f"{arm.method}: {name}")
        reason = arm.missing()
        try:
            if not reason:
                runner = Runner(arm, name, arm.build(self.problem))
                runner.warm_up(self.order, self.args.device)
                return runner
        except Unavailable as error:
            reason = str(error)
        except Exception as error:  # an arm that fails is named, and the others are measured
            reason = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        self.left_out.append({"method": arm.method, "arm": name, "reason": reason})
        return None

    def _free(self) -> None:
        gc.collect()
        if self.args.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _finish(self, runners: Sequence[Runner]) -> None:
        """The timed steps, in turn, the order turning by one each step."""
        for i, batch in enumerate(self.order[WARM_UP:]):
            turn = i % len(runners)
            for runner in (*runners[turn:], *runners[:turn]):
                runner.step(batch, self.args.device, timed=True)
        self.rows += [runner.row(self.problem, self.order) for runner in runners]

    def method(self, method: str) -> None:
        chosen = [arm for arm in ARMS if arm.method == method and (not self.args.arm or arm.name in self.args.arm)]
        plan = [(arm, arm.name) for arm in chosen]
        plan += [(arm, arm.name + SELF_PAIR) for arm in chosen if arm.role == BASELINE]
        if self.args.sequential:
            for arm, name in plan:
                if (runner := self._start(arm, name)) is not None:
                    self._finish([runner])
                    del runner
                    self._free()
        else:
            runners = [runner for arm, name in plan if (runner := self._start(arm, name)) is not None]
            if runners:
                self._finish(runners)
        self._free()

    def run(self) -> None:
        try:
            for method in self.args.method:
                self.method(method)
        except KeyboardInterrupt:  # the methods until then are reported
            self.stopped = True

    def set_limits(self) -> None:
        """Measured again: another process may have held the machine down at one end of the run."""
        dtype = DTYPES[self.args.dtype]
        self.limits = limits.best(self.limits, limits.measure(self.args.device, [dtype]))
        for row in self.rows:
            row["limit_s"] = cost(self.problem, row["method"]) / self.limits.rates[dtype]
            row["percent_of_limit"] = 100 * row["limit_s"] / row["p50"]


def execute(args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    description = machine.describe(args.device, args.threads)
    session = Session(args, progress)
    session.run()
    session.set_limits()
    compare_losses(session.rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "machine": {**description, "load_at_end": machine.load_average()},
        "limits": {"bandwidth": session.limits.bandwidth, "rates": session.limits.rates},
        "settings": settings,
        "stopped": session.stopped,
        "left_out": session.left_out,
        "noise": noise(session.rows),
        "arms": session.rows,
    }


def noise(rows: Sequence[dict[str, Any]]) -> float | None:
    """The largest of: how far the two of a self-pair are apart; the median spread of an arm's steps."""
    if not rows:
        return None
    found = [statistics.median((row["p80"] - row["p20"]) / row["p50"] for row in rows)]
    times = {(row["method"], row["arm"]): row["p50"] for row in rows}
    for (method, arm), again in times.items():
        once = times.get((method, arm.removesuffix(SELF_PAIR)))
        if once is not None:
            found.append(abs(once - again) / min(once, again))
    return max(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where an arm of peftfast's fails or its losses do not lie on stock's; 2 for bad arguments; 130 when stopped."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    args = parse_arguments(argv)
    try:
        from tqdm import tqdm
    except ImportError:
        progress: Callable[[str], None] = lambda _: None  # noqa: E731
    else:
        taking_part = [arm for arm in ARMS if arm.method in args.method and (not args.arm or arm.name in args.arm)]
        total = len(taking_part) + sum(arm.role == BASELINE for arm in taking_part)
        bar = tqdm(total=total, unit="arm", file=sys.stderr, disable=None)

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

    with terminate_as_interrupt():
        report = execute(args, progress)
    print_report(report)
    if args.out is not None:
        machine.write_json(args.out, report)
        print(f"written to {args.out}")
        try:
            print(plot(report, args.out.with_suffix(".png")) if report["arms"] else "no picture: no arm was measured")
        except ImportError:
            print("no picture: matplotlib is not installed")
    if report["stopped"]:
        return 130
    failed = [e for e in report["left_out"] if e["arm"].startswith("peftfast") and e["reason"].startswith("failed")]
    return 1 if failed or any(row["apart"] for row in report["arms"] if row["arm"].startswith("peftfast")) else 0


if __name__ == "__main__":
    sys.exit(main())
