"""Everything that a machine with a GPU can say about this tree, in one command: ``python -m benchmarks.gpu --out DIR`` (``make gpu``).

Stages, in this order, each also alone by ``--stages``: build (csrc for the GPU at hand), doctor, tests (the files that use a GPU),
sanitizer (compute-sanitizer over one small call of every operator), verify, bench, end-to-end, plots, host (what a layer costs the
host), product and nf4-product (the product kernels' candidates and the other ways beside the library: ``python -m benchmarks.product
--from DIR/product.json --write``, and the same of nf4_product.json, make tables of them), dram (bytes by ncu) and suite (the other
tests). A stage that fails or runs out of its time does not stop the others; the summary says which. DIR holds at most eight files:
summary.json and summary.txt, the results that ``python -m benchmarks.record DIR`` files, and two archives, logs.tar.gz and
plots.tar.gz. CONTRIBUTING.md says how the stages are shared out where a machine can be had for minutes only.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import machine, product, registry, table
from .machine import COMMIT_VARIABLE, ROOT

WHOLE_S = 540  # the whole run; a stage gets its own limit or what is left, whichever is less
GRACE_S = 8  # between asking a stage to stop and killing it: a benchmark writes its rows then
STOPPED = 130  # the exit status of a benchmark that was stopped, its rows written
KEPT_LINES = 15
MOST_FILES = 8
_PRODUCTS = ["--shapes", "4096", "8192", "llama3-8b:gate+up", "llama3-8b:down", "--tokens", "2048", "8192"]
# What record files. The gate's rows and ncu's are in the logs' archive: they would replace the timed rows of the same operators.
RESULTS = "run.json", "product.json", "nf4_product.json", "end_to_end.json"


@dataclass(frozen=True)
class Context:
    """What the commands of the stages depend on. ``work``: where they write; ``workers`` of the test run; ``seconds`` of the stage."""

    device: str
    work: Path
    workers: int
    quick: bool
    seconds: float = WHOLE_S

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]


@dataclass(frozen=True)
class Stage:
    """``commands`` run one after another, each with an equal share of the time that is left; ``needs`` says why the stage cannot run
    here, or nothing; ``ask``: the signal that asks a command to end."""

    name: str
    limit_s: int
    commands: Callable[[Context], list[list[str]]]
    needs: Callable[[Context], str] = lambda _: ""
    environment: Callable[[Context], dict[str, str]] = lambda _: {}
    ask: signal.Signals = signal.SIGTERM


def architecture() -> str:
    """nvcc's name of the GPU at hand: Hopper with its own instructions, which no other runs."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def _build(context: Context) -> list[list[str]]:
    return [context.python("setup.py", "--quiet", "build_ext", "--inplace")]


def _build_environment(context: Context) -> dict[str, str]:
    compiles = context.cuda and torch.version.cuda is not None and shutil.which("nvcc") is not None
    if not compiles or torch.cuda.get_device_capability() < (8, 0):  # setup.py's oldest
        return {"PEFTFAST_BUILD": "cpu"}
    return {"PEFTFAST_BUILD": "cpu,cuda", "PEFTFAST_CUDA_ARCHITECTURES": architecture()}


def uses_gpu(path: Path) -> bool:
    """Whether a test file has anything on a GPU, by itself or through the checks that it shares."""
    text = path.read_text()
    shared = [
        ROOT / "tests" / "support" / f"{name}.py" for name in re.findall(r"tests\.support(?:\.| import )(\w+)", text)
    ]
    return any(
        re.search(r"\bDEVICE\b|[\"']cuda[\"']|mark\.gpu\b", one)
        for one in (text, *(helper.read_text() for helper in shared if helper.is_file()))
    )


def _pytest(context: Context, on_gpu: bool) -> list[list[str]]:
    """The tests of what only a GPU has come first, in a command of their own: they are not to wait for slow ones that need none."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if uses_gpu(path) == on_gpu]
    own = [path for path in files if path.name.startswith("test_gpu")]
    options = ["--durations=15", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(context.workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", "120"]
    parts = (own, [path for path in files if path not in own])
    return [
        context.python("-m", "pytest", "-q", *options, *(str(path.relative_to(ROOT)) for path in part))
        for part in parts
        if part
    ]


def _needs_pytest(context: Context) -> str:
    if not (ROOT / "tests").is_dir():
        return "no tests: an installed package"
    return "" if importlib.util.find_spec("pytest") is not None else "pytest is not installed"


def _tests_environment(context: Context, name: str) -> dict[str, str]:
    # The failures as they happen: a run that is cut off has not come to its summary.
    failures = {"TEST_FAILURES_FILE": str(context.work / f"{name}-failures.log")}
    return {**failures, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def _said_by(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return ""


def _sanitizer(context: Context) -> list[list[str]]:
    """torch's own kernels, by which the doctor computes what is expected, are not watched: they would be most of the time."""
    known = _said_by(["compute-sanitizer", "--help"])
    watched = ["--error-exitcode", "9", "--target-processes", "all", "--print-limit", "20"]
    if "--kernel-name-exclude" in known and "kns" in known:
        watched += ["--kernel-name-exclude", "kns=_ZN2at"]
    return [
        ["compute-sanitizer", "--tool", tool, *watched, *context.python("-m", "peftfast", "doctor")]
        for tool in ("memcheck", "racecheck", "synccheck")
    ]


def _needs_sanitizer(context: Context) -> str:
    if not context.cuda:
        return "no CUDA device"
    return "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"


def _sizes(context: Context) -> list[str]:
    if context.quick:
        return ["--quick"]
    if not context.cuda:
        return ["--shapes", "1024", "--tokens", "128", "--seconds", "0.1"]
    return ["--shapes", "4096", "llama3-8b:gate+up", "--tokens", "4096", "--seconds", "0.15"]


def _device(context: Context) -> list[str]:
    return ["--device", context.device]


def _verify(context: Context) -> list[list[str]]:
    # Odd and prime sizes too: what is timed is not all that has to be right.
    sizes = ["--shapes", "1024", "1027x1013", "--tokens", "128", "67", "--rank", "16", "7"]
    dtypes = [
        "--dtype",
        "bf16",
        "fp32",
        *(["fp16"] if context.cuda else []),
    ]  # a CPU multiplies fp16 twenty times slower
    ours = ["--provider", "peftfast", "peftfast:*"]
    command = context.python("-m", "benchmarks.verify", *_device(context), *sizes, *dtypes, *ours)
    return [[*command, "--out", str(context.work / "verify.json")]]


def _bench(context: Context) -> list[list[str]]:
    others = [name for name in registry.load() if name not in product.OPS]  # which have a stage of their own
    command = context.python("-m", "benchmarks.run", *_device(context), *_sizes(context), "--op", *others)
    # It ends by itself, with a case still to finish and the limits to measure again.
    limit = f"{max(1.0, context.seconds - 25):.0f}"
    return [[*command, "--limit", limit, "--out", str(context.work / "run.json")]]


# What is bound by memory, one call of each. Whole layers are sums of these and of the library's products.
COUNTED = (
    *("lora_shrink", "lora_expand", "lora_weight_grad", "lora_dy_grads", "nf4_dequantize", "nf4_quantize"),
    *("nf4_linear_m1", "sparse_delta_dvalues", "sparse_adamw", "perturb_gaussian"),
)


def _product(context: Context) -> list[list[str]]:
    sizes = ["--shapes", "4096", "--tokens", "2048"] if context.quick else _PRODUCTS
    rate = ["--dropout", "0.1", "--seconds", "0.05" if context.quick else "0.1"]
    command = context.python("-m", "benchmarks.product", *_device(context), *sizes, *rate)
    return [[*command, "--out", str(context.work / "product.json")]]


def _nf4_product(context: Context) -> list[list[str]]:
    sizes = ["4096"] if context.quick else ["4096", "llama3-8b:gate+up", "llama3-8b:k+v"]
    tokens = ["--tokens", "64", "1024"] if context.quick else []
    rate = ["--dropout", "0.1", "--seconds", "0.03", "--limit", f"{max(1.0, context.seconds - 15):.0f}"]
    command = context.python(
        "-m", "benchmarks.product", "--table", "nf4_product", *_device(context), "--shapes", *sizes
    )
    return [[*command, *tokens, *rate, "--out", str(context.work / "nf4_product.json")]]


def _needs_cuda(context: Context) -> str:
    return "" if context.cuda else "no CUDA device"


def _dram(context: Context) -> list[list[str]]:
    few = [
        "--shapes",
        "4096",
        "--tokens",
        "4096",
        "--seconds",
        "0.02",
        "--mode",
        "fwd",
        "--provider",
        "peftfast",
        "peftfast:*",
    ]
    command = context.python("-m", "benchmarks.run", *_device(context), "--op", *COUNTED, *few)
    half = f"{max(1.0, context.seconds / 2 - 5):.0f}"
    return [[*command, "--dram", "--limit", half, "--dram-limit", half, "--out", str(context.work / "dram.json")]]


def _needs_peft(context: Context) -> str:
    return "" if importlib.util.find_spec("peft") is not None else "peft is not installed"


def _needs_ncu(context: Context) -> str:
    if not context.cuda:
        return "no CUDA device"
    return "" if shutil.which("ncu") else "ncu is not on PATH"


def _end_to_end(context: Context) -> list[list[str]]:
    command = context.python(
        "-m", "benchmarks.end_to_end", *_device(context), "--out", str(context.work / "end_to_end.json")
    )
    # A quarter of the blocks: every arm of a method fits beside the others, and the step is the whole model's but for the head.
    return [[*command, "--quick"] if context.quick else [*command, *(("--layers", "8") if context.cuda else ())]]


def _plots(context: Context) -> list[list[str]]:
    return [
        context.python("-m", "benchmarks.plot", str(context.work / "run.json"), "--out", str(context.work / "plots"))
    ]


def _needs_rows(context: Context) -> str:
    return "" if (context.work / "run.json").is_file() else "the stage bench left no rows"


def _needs_sources(context: Context) -> str:
    return "" if (ROOT / "setup.py").is_file() else "no sources: an installed package is built already"


STAGES = (
    Stage("build", 150, _build, _needs_sources, _build_environment),
    Stage("doctor", 120, lambda context: [context.python("-m", "peftfast", "doctor")]),
    Stage(
        "tests", 300, lambda c: _pytest(c, True), _needs_pytest, lambda c: _tests_environment(c, "tests"), signal.SIGINT
    ),
    Stage("sanitizer", 150, _sanitizer, _needs_sanitizer, lambda _: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    Stage("verify", 90, _verify),
    Stage("bench", 300, _bench),
    Stage("end-to-end", 180, _end_to_end),
    Stage("plots", 40, _plots, _needs_rows),
    Stage("host", 40, lambda context: [context.python("-m", "benchmarks.host")], _needs_peft),
    Stage("product", 120, _product, _needs_cuda),
    Stage("nf4-product", 180, _nf4_product, _needs_cuda),
    Stage("dram", 150, _dram, _needs_ncu),
    Stage(
        "suite",
        360,
        lambda c: _pytest(c, False),
        _needs_pytest,
        lambda c: _tests_environment(c, "suite"),
        signal.SIGINT,
    ),
)


@dataclass
class Outcome:
    """``state``: passed, failed, stopped (at its time limit) or left out."""

    stage: str
    state: str
    seconds: float
    reason: str = ""
    last_lines: str = ""


def _stop(process: "subprocess.Popen[bytes]", ask: signal.Signals = signal.SIGTERM) -> None:
    """Ask the stage's whole process group to end, then make it."""
    for number in (ask, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    process.wait()


def _answers_an_interrupt() -> None:
    """A command in the background of a shell ignores SIGINT, and so would what it starts: pytest could not be asked to end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_stage(stage: Stage, context: Context, seconds: float) -> Outcome:
    """Run a stage's commands within ``seconds``; all they print goes to <stage>.log in the work folder."""
    started = time.monotonic()
    if reason := stage.needs(context):
        return Outcome(stage.name, "left out", 0.0, reason)
    if seconds <= 0:
        return Outcome(stage.name, "left out", 0.0, "no time left")
    log = context.work / f"{stage.name}.log"
    state, reason = "passed", ""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **stage.environment(context)}
    commands = stage.commands(replace(context, seconds=seconds))
    with open(log, "wb") as output:
        for i, command in enumerate(commands):
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            share = max(0.1, (seconds - (time.monotonic() - started)) / (len(commands) - i))
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_answers_an_interrupt,
                )
            except OSError as error:
                state, reason = "failed", f"{command[0]}: {error.strerror}"
                continue
            found, why = "", ""
            try:
                status = process.wait(share)
                if status == STOPPED:
                    found, why = "stopped", "not all was measured"
                elif status:
                    found, why = "failed", f"exit status {status}: {shlex.join(command)[-100:]}"
            except subprocess.TimeoutExpired:
                _stop(process, stage.ask)
                found, why = "stopped", f"not done after {share:.0f} s"
            except BaseException:
                _stop(process)
                raise
            if found:
                # The commands after it still run: what racecheck finds does not hang on memcheck.
                state = found if state != "failed" else state
                reason = f"{reason}{'; ' if reason else ''}{why}"
    lines = log.read_text(errors="replace").splitlines()[-KEPT_LINES:]
    return Outcome(stage.name, state, time.monotonic() - started, reason, "\n".join(line[:300] for line in lines))


def _archive(path: Path, members: Sequence[Path]) -> None:
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w:gz") as archive:
        for member in members:
            archive.add(member, member.name)
    part.replace(path)


def save(out: Path, work: Path, outcomes: Sequence[Outcome], origin: dict[str, Any], seconds: float) -> None:
    """Renew DIR after each stage: what is cut off later has left everything until then."""
    summary = {"machine": origin, "seconds": seconds, "stages": [asdict(outcome) for outcome in outcomes]}
    machine.write_json(out / "summary.json", summary)
    (out / "summary.txt").write_text(text(outcomes, seconds) + "\n")
    for name in RESULTS:
        if (work / name).is_file():
            shutil.copyfile(work / name, out / name)
    _archive(out / "logs.tar.gz", sorted(p for p in work.glob("*.*") if p.suffix in (".log", ".json")))
    if pictures := sorted([*work.glob("*.png"), *work.glob("plots/*.png")]):
        _archive(out / "plots.tar.gz", pictures)


def text(outcomes: Sequence[Outcome], seconds: float) -> str:
    rows = [(o.stage, o.state, f"{o.seconds:.0f} s", o.reason) for o in outcomes]
    bad = [o for o in outcomes if o.state in ("failed", "stopped")]
    tails = [f"\n--- {o.stage}: the end of its log\n{o.last_lines}" for o in bad]
    verdict = f"{len(bad)} of {len(outcomes)} stages failed" if bad else "every stage that ran passed"
    return "\n".join(
        (table.aligned(("stage", "state", "took", "why"), rows), f"{verdict}; {seconds:.0f} s in all", *tails)
    )


def run_stages(
    stages: Sequence[Stage], context: Context, out: Path, whole_s: float, origin: dict[str, Any]
) -> list[Outcome]:
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for stage in stages:
        left = whole_s - (time.monotonic() - started)
        print(f"{stage.name}: at most {max(0, min(stage.limit_s, left)):.0f} s", flush=True)
        outcome = run_stage(stage, context, min(stage.limit_s, left))
        outcomes.append(outcome)
        print(f"{stage.name}: {outcome.state} after {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        save(out, context.work, outcomes, origin, time.monotonic() - started)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a stage failed or was stopped; 2 for bad arguments."""
    names = [stage.name for stage in STAGES]
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    parse.add_argument(
        "--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=f"some of {', '.join(names)}"
    )
    parse.add_argument(
        "--commit", help="the revision to stamp results with, where the tree has no repository beside it"
    )
    parse.add_argument("--seconds", type=float, default=WHOLE_S, help="for all stages together")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument(
        "--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="of the test run"
    )
    parse.add_argument("--quick", action="store_true", help="one small size in the benchmarks")
    args = parse.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parse.error(f"--out: {args.out} is not a folder")
    if args.commit:
        os.environ[COMMIT_VARIABLE] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="peftfast-gpu-"))  # beside DIR: what a cut leaves in DIR is what was saved
    context = Context(args.device, work, args.workers, args.quick)
    origin = machine.describe(args.device, torch.get_num_threads())
    if not context.cuda:
        print("no CUDA device: the stages run on the CPU, and those that need one are left out")
    try:
        outcomes = run_stages(
            [s for s in STAGES if s.name in args.stages], context, args.out.resolve(), args.seconds, origin
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n" + (args.out / "summary.txt").read_text(), end="")
    kept = sorted(path.name for path in args.out.iterdir() if path.is_file())
    print(f"in {args.out}: {', '.join(kept)}")
    if len(kept) > MOST_FILES:
        print(
            f"{len(kept)} files: more than the {MOST_FILES} that a run leaves; the folder held others", file=sys.stderr
        )
    return 1 if any(outcome.state in ("failed", "stopped") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
