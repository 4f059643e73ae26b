"""Measure operators: ``python -m benchmarks.run --op lora_linear --shapes llama3-8b --mode fwd bwd --out FILE.json``.

Without arguments: everything that fits this device, in minutes. ``--quick``: one small shape, a minute or two of one core.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import gc
import itertools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import dram, limits, machine, memory, registry, shapes, table, timing
from .registry import MODES, Case, Op, Provider, Work
from .verify import Check, Gate

SCHEMA = 1
SIZES = ("m", "n", "k", "rank", "density", "adapters")
KEY = ("op", "provider", "shape", *SIZES, "dtype", "dropout", "device", "mode")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What a run without options measures. A CPU multiplies a thousand times slower than a GPU.
DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "cpu": {"shapes": ["1024", "2048"], "tokens": [128]},
    "cuda": {"shapes": ["llama3-8b"], "tokens": [2048, 8192]},
    "quick": {"shapes": ["1024"], "tokens": [128]},
}
SELF_PAIR = " again"
# What two processes differ by that one cannot see of itself: where its memory lies. Two runs of --quick on a quiet machine (Zen 5, one
# thread, 164 rows, 2026-11-21) were apart by up to 5.1 % more than their spreads and self-pairs say, all but six rows by nothing.
# Longer rows average over more of it. On a GPU this has not been measured.
BETWEEN_PROCESSES = {("cpu", True): 0.05, ("cpu", False): 0.02, ("cuda", True): 0.02, ("cuda", False): 0.01}


def parser(step: str = "run", description: str | None = __doc__) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog=f"python -m {__package__}.{step}", description=description)
    parse.add_argument("--op", nargs="+", metavar="NAME", help="operators; default: all (see --list)")
    parse.add_argument(
        "--provider", nargs="+", metavar="NAME", help="providers, with * and ?; default: all that are here"
    )
    parse.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help=f"squares, N, NxK, {', '.join(shapes.MODELS)}, MODEL:layer"
    )
    parse.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parse.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parse.add_argument("--rank", nargs="+", type=int, default=[16])
    parse.add_argument("--tokens", nargs="+", type=int, help="rows of x")
    parse.add_argument("--dropout", nargs="+", type=float, default=[0.1])
    parse.add_argument("--density", nargs="+", type=float, default=[0.01], help="part of the weight that is trained")
    parse.add_argument("--adapters", nargs="+", type=int, default=[8], help="adapters in one batch")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument(
        "--warm",
        action="store_true",
        help="CPU: the same inputs in every call, found in the caches as a layer just loaded has left them; else they rotate. The "
        "limit beside them stays the memory's, which caches pass",
    )
    parse.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1: timed by processor time, which a busy machine does not lengthen; more by the wall)",
    )
    parse.add_argument("--seconds", type=float, help="spent on one row (default 0.2; 0.05 with --quick)")
    parse.add_argument(
        "--quick",
        action="store_true",
        help="one small shape, few rounds, no torch.compile: a minute or two of one core",
    )
    parse.add_argument("--dram", action="store_true", help="count the bytes that each row moves, with ncu (CUDA)")
    parse.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin no case after so many; the rows are kept",
    )
    parse.add_argument("--dram-limit", type=float, default=dram.LIMIT_S, metavar="SECONDS", help="for ncu")
    parse.add_argument("--verify-only", action="store_true", help="the error gate without timing")
    parse.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows and where they come from")
    parse.add_argument("--list", action="store_true", help="operators, their providers, and which are missing here")
    return parse


def parse_arguments(argv: Sequence[str] | None, parse: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parse = parse or parser()
    args = parse.parse_args(argv)
    ops = registry.load()
    defaults = DEFAULTS["quick" if args.quick else torch.device(args.device).type]
    args.op = args.op or list(ops)
    args.tokens = args.tokens or defaults["tokens"]
    if unknown := [name for name in args.op if name not in ops]:
        parse.error(f"--op: expected some of {', '.join(ops)}, got {', '.join(unknown)}")
    names = {provider.name for name in args.op for provider in ops[name].providers}
    for pattern in args.provider or ():
        if not fnmatch.filter(names, pattern):
            parse.error(f"--provider: expected some of {', '.join(sorted(names))}, got {pattern}")
    try:
        args.shapes = [shape for text in args.shapes or defaults["shapes"] for shape in shapes.parse(text)]
    except ValueError as error:
        parse.error(f"--shapes: {error}")
    for name, low in (("rank", 1), ("tokens", 1), ("adapters", 1), ("threads", 1)):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < low:
            parse.error(f"--{name}: expected at least {low}, got {values}")
    if not all(0 <= p < 1 for p in args.dropout):
        parse.error(f"--dropout: expected probabilities in [0, 1), got {args.dropout}")
    if not all(0 < density <= 1 for density in args.density):
        parse.error(f"--density: expected parts in (0, 1], got {args.density}")
    if args.warm and torch.device(args.device).type != "cpu":
        parse.error("--warm: a CPU's inputs alone are timed in its caches")
    if args.seconds is None:
        args.seconds = 0.05 if args.quick else 0.2
    if args.out is not None and not args.out.resolve().parent.is_dir():
        parse.error(f"--out: no folder {args.out.resolve().parent}")
    return args


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else ""


def problems(op: Op, args: argparse.Namespace) -> Iterator[Case]:
    """The distinct cases of an operator, without a mode: sizes that it does not have are 0."""
    sizes = itertools.product(
        args.shapes,
        args.dtype,
        args.tokens if op.tokens else [0],
        args.rank if op.ranked else [0],
        args.dropout if op.dropped else [0.0],
        args.density if op.sparse else [0.0],
        args.adapters if op.routed else [0],
    )
    seen = set()
    for shape, dtype, m, rank, p, density, adapters in sizes:
        size = (m, shape.n, shape.k, rank, DTYPES[dtype], p)
        case = Case(op.name, shape.name, *size, args.device, "", density, adapters)
        if case not in seen and not (op.name == "dropout_mask" and p == 0):
            seen.add(case)
            yield case


def why_left_out(provider: Provider, case: Case, args: argparse.Namespace, default_backend: str) -> str:
    """Why a provider that was asked for is not measured, or nothing."""
    reason = provider.missing() or provider.refuses(case)
    named = args.provider and provider.name in args.provider
    if not reason and args.quick and provider.slow_start:
        reason = "compiles for seconds: left out by --quick"
    if not reason and args.quick and not named and provider.name.endswith("reference"):
        reason = "the definition: left out by --quick"
    if not reason and provider.backend == default_backend and not named:
        reason = f"what peftfast runs here anyway ({default_backend})"
    return reason


def default_backend(provider_names: Sequence[Provider], case: Case) -> str:
    """The first backend that serves this case: what peftfast without a name runs on."""
    return next((p.backend for p in provider_names if p.backend and not p.missing() and not p.refuses(case)), "")


class Run:
    """Rows as they are measured, with what was left out and why."""

    def __init__(self, args: argparse.Namespace, progress: Callable[[str], None]) -> None:
        self.args, self.progress = args, progress
        self.rows: list[dict[str, Any]] = []
        self.stopped = False
        self.left_out: dict[tuple[str, str, str], None] = {}
        self.limits = limits.measure(args.device, [DTYPES[name] for name in args.dtype])
        self.calibration = limits.Calibration(args.device)
        cuda = args.device.startswith("cuda")
        self.clock = "CUDA events" if cuda else "processor time" if args.threads == 1 else "wall"
        self.settings = timing.Settings(args.threads, args.seconds, 0.002 if args.quick else 0.005)

    def providers(self, op: Op, case: Case) -> list[Provider]:
        backend = default_backend(op.providers, case)
        kept = []
        for provider in op.providers:
            if self.args.provider and not any(fnmatch.fnmatch(provider.name, p) for p in self.args.provider):
                continue
            reason = why_left_out(provider, case, self.args, backend)
            if reason:
                self.left_out[op.name, provider.name, reason] = None
            else:
                kept.append(provider)
        return kept

    def problem(self, op: Op, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        inputs = op.inputs(case, generator)
        gate = Gate(op, case, inputs)
        modes = [mode for mode in op.modes if mode in self.args.mode]
        checks: dict[str, dict[str, Check]] = {mode: {} for mode in modes}
        providers = self.providers(op, case)
        for provider in providers:
            self.progress(f"{op.name} {case.shape}: {provider.name}")
            try:
                found = {fwd: gate.check(provider, fwd) for fwd in {mode == "fwd" for mode in modes}}
                for mode in modes:
                    checks[mode][provider.name] = found[mode == "fwd"]
            except Exception as error:  # a provider that fails is named, and the others are measured
                self.left_out[op.name, provider.name, f"failed: {type(error).__name__}: {first_line(error)}"] = None
        del gate
        timed = [p for p in providers if any(p.name in found and found[p.name].ok for found in checks.values())]
        works: dict[str, list[Work]] = {}
        if not self.args.verify_only:
            first = op.cost(dataclasses.replace(case, mode="fwd"), registry.WHOLE)
            copies = 1 if self.args.warm else timing.copies_for(first.bytes, case.device)
            sets = [inputs, *(registry.copy_inputs(inputs) for _ in range(copies - 1))]
            pair = next((p for p in timed if p.name == op.baseline), timed[0] if timed else None)
            for provider in timed:
                with provider.active():
                    works[provider.name] = [provider.build(case, each) for each in sets]
                    if provider is pair:
                        works[provider.name + SELF_PAIR] = [provider.build(case, each) for each in sets]
        for mode in modes:
            self.progress(f"{op.name} {case.shape}: {mode}")
            self._mode(op, dataclasses.replace(case, mode=mode), providers, works, checks[mode])
        self.calibration.sample()

    def _mode(
        self,
        op: Op,
        case: Case,
        providers: list[Provider],
        works: dict[str, list[Work]],
        checks: dict[str, Check],
    ) -> None:
        by_name = {provider.name: provider for provider in providers}
        runners, looked_at = {}, {}
        pair = ""
        for name, built in works.items():
            provider = by_name[name.removesuffix(SELF_PAIR)]
            if provider.name in checks and checks[provider.name].ok:
                with provider.active():
                    runners[name] = timing.Runner([work.step(case.mode) for work in built], provider.active)
                if name.endswith(SELF_PAIR):
                    pair = provider.name
                else:
                    looked_at[name] = built[0], provider.active
        taken = memory.measure(looked_at, case.mode, case.device) if looked_at else {}
        times = timing.measure(runners, case.device, self.settings)
        self_pair = None
        if pair:
            first, second = times[pair].p50, times[pair + SELF_PAIR].p50
            self_pair = abs(first - second) / min(first, second)
        nothing = {"peak_bytes": None, "saved_bytes": None, "scratch_bytes": None}
        for name, provider in by_name.items():
            if name in checks:
                row = self._row(op, provider, case, checks[name], times.get(name), self_pair)
                self.rows.append({**row, **taken.get(name, nothing), "copies": len(works.get(name, ()))})
        gc.collect()

    def _row(
        self, op: Op, provider: Provider, case: Case, check: Check, time: timing.Timing | None, self_pair: float | None
    ) -> dict[str, Any]:
        cost = op.cost(case, provider.computes)
        return {
            **dataclasses.asdict(case),
            "provider": provider.name,
            "computes": provider.computes,
            "p20": time.p20 if time else None,
            "p50": time.p50 if time else None,
            "p80": time.p80 if time else None,
            "rounds": time.rounds if time else 0,
            "calls_a_round": time.calls if time else 0,
            "graph": time.graph if time else False,
            "preempted": time.preempted if time else 0,
            "note": time.note if time else "",
            "spread": time.spread if time else None,
            "self_pair": self_pair,
            "noise": None,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "dram_bytes": None,
            "limit_s": None,
            "bound": "",
            "percent_of_limit": None,
            "error": check.error,
            "budget": check.budget,
            "worst_result": check.result,
            "checked_at_dropout": check.dropout,
            "within_budget": check.ok,
        }

    def report(self, whole: bool = True) -> dict[str, Any]:
        """Everything, as it is written to a file. A row's noise is the largest of its own spread, the difference between the two halves
        of its case's self-pair, the drift of the machine over the run, and what processes differ by. Not ``whole``: between two cases,
        marked as stopped there, by what was measured until then alone."""
        if whole:
            self.calibration.sample()
            self.limits = limits.best(self.limits, limits.measure(self.args.device, list(self.limits.rates)))
        drift = self.calibration.drift()
        between = BETWEEN_PROCESSES[torch.device(self.args.device).type, self.args.quick]
        for row in self.rows:
            seconds, row["bound"] = self.limits.seconds(registry.Cost(row["bytes"], row["flops"]), row["dtype"])
            row["limit_s"] = seconds
            if row["p50"] is not None:
                row["noise"] = max(row["spread"], row["self_pair"] or 0.0, drift, between)
                row["percent_of_limit"] = 100 * seconds / row["p50"]
        description = machine.describe(self.args.device, self.args.threads)
        return {
            "schema": SCHEMA,
            "machine": {
                **description,
                "warm": self.args.warm,
                "load_at_end": machine.load_average(),
                "allocator": timing.keep_heap_warm(),
            },
            "limits": dataclasses.asdict(self.limits),
            "drift": drift,
            "settings": {"seconds_a_row": self.settings.row_s, "quick": self.args.quick, "clock": self.clock},
            "stopped": self.stopped or not whole,
            "left_out": [dict(zip(("op", "provider", "reason"), key, strict=True)) for key in self.left_out],
            "rows": self.rows,
        }


def print_list(ops: dict[str, Op], args: argparse.Namespace) -> None:
    for name in args.op:
        print(f"{name}: {ops[name].summary}; modes {', '.join(ops[name].modes)}")
        case = next(problems(ops[name], args), None)
        for provider in ops[name].providers:
            reason = provider.missing() or (provider.refuses(case) if case else "")
            print(f"    {provider.name}{f'  (not here: {reason})' if reason else ''}")


def print_report(report: dict[str, Any]) -> None:
    print(table.report(report["rows"]))
    device, cpu, bounds = report["machine"]["gpu"], report["machine"]["cpu"], report["limits"]
    name = device["name"] if device else f"{cpu['name']}, {cpu['threads']} threads, {cpu['isa']}"
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s {dtype}" for dtype, rate in bounds["rates"].items())
    print(f"\n{name}; limits measured in this run: {bounds['bandwidth'] / 1e9:.4g} GB/s copying, {rates}")
    print(f"drift of the machine {100 * report['drift']:.1f} %; load {report['machine']['load_at_start']}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report["left_out"]:
        reasons.setdefault((entry["provider"], entry["reason"]), []).append(entry["op"])
    for (provider, reason), names in reasons.items():
        print(f"left out: {provider} ({', '.join(names)}): {reason}")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for."""
    ops = registry.OPS
    cases = [(ops[name], case) for name in args.op for case in problems(ops[name], args)]
    # Every operator at one size before any at the next: a run that is stopped has all of them.
    sizes = [(shape.name, shape.n, shape.k) for shape in args.shapes]
    cases.sort(key=lambda pair: sizes.index((pair[1].shape, pair[1].n, pair[1].k)))
    if args.device == "cpu":
        timing.keep_heap_warm()
    torch.set_num_threads(args.threads)
    try:
        from tqdm import tqdm
    except ImportError:
        bar = None
    else:
        bar = tqdm(total=len(cases), unit="case", file=sys.stderr, mininterval=0.2, disable=None)
    with timing.side_stream(args.device):
        session = Run(args, bar.set_description if bar is not None else lambda _: None)
        begun = time.monotonic()
        try:
            for op, case in cases:
                if session.rows and time.monotonic() - begun > args.limit:
                    session.stopped = True
                    break
                session.problem(op, case)
                if bar is not None:
                    bar.update()
                if args.out is not None:  # what ends this process without asking leaves the rows until here
                    machine.write_json(args.out, session.report(whole=False))
        except KeyboardInterrupt:  # what was measured until then is reported
            session.stopped = True
        if bar is not None:
            bar.close()
        return session.report()


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a time limit) ends a run as Ctrl-C does: with what was measured until then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None, parse: argparse.ArgumentParser | None = None) -> int:
    """Exit status: 0; 1 where a provider of peftfast's is over its budget or fails; 2 for bad arguments; 130 where it was stopped, the
    rows until then written."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # bitsandbytes asks for a kernel from the hub when it is imported on a CPU with AVX512-BF16, and warns that it has none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    args = parse_arguments(argv, parse)
    if args.list:
        print_list(registry.OPS, args)
        return 0
    with terminate_as_interrupt():
        report = execute(args)
    if args.dram:
        dram.add(report, args)
    print_report(report)
    if args.out is not None:
        machine.write_json(args.out, report)
        print(f"written to {args.out}")
    if report["stopped"]:
        print(f"stopped: {len(report['rows'])} rows were measured", file=sys.stderr)
        return 130
    ours = [row for row in report["rows"] if row["provider"].startswith("peftfast") and not row["within_budget"]]
    failed = [
        e for e in report["left_out"] if e["provider"].startswith("peftfast") and e["reason"].startswith("failed")
    ]
    return 1 if ours or failed else 0


if __name__ == "__main__":
    sys.exit(main())
