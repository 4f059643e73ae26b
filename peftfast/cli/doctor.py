"""``python -m peftfast doctor``: what this machine has, what serves each operator, and whether each is right.

Standard library only at module level, and every probe is guarded: the command is for the machine where something is
broken, torch included. A value of the environment is shown only where its name is PEFTFAST_* or TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..ops.dispatch import Implementation, Operator
    from .checks import Case

PACKAGES = ("peftfast", "torch", "triton", "bitsandbytes", "peft", "transformers", "numpy")
# What peftfast and its build read; another PEFTFAST_* name is most likely a typing mistake.
KNOWN_VARIABLES = (
    "PEFTFAST_AUTOGRAD",
    "PEFTFAST_BACKEND",
    "PEFTFAST_BUILD",
    "PEFTFAST_CPU_ISA",
    "PEFTFAST_CUDA_ARCHITECTURES",
    "PEFTFAST_LORA_PRODUCT",
    "PEFTFAST_NF4_PRODUCT",
    "PEFTFAST_REPLAY",
)
BENCHMARKS_VARIABLE = "PEFTFAST_COMMIT"  # of benchmarks/machine.py, which may run the doctor
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
NVIDIA_SMI_SECONDS = 10


@dataclass
class Check:
    """One run of one implementation. ``error`` is the largest difference from the definition, None if it did not run."""

    case: str
    error: float | None
    allowed: float
    passed: bool
    reason: str = ""

    @property
    def severity(self) -> float:
        """How near the error is to its budget, or how far over it; the worst is what the table shows."""
        if self.error is None:
            return math.inf
        return self.error / self.allowed if self.allowed else self.error


@dataclass
class ImplementationResult:
    """``state``: "serves", "could serve" or "does not serve", with the reason of the last two."""

    backend: str
    state: str
    reason: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool | None:
        return all(check.passed for check in self.checks) if self.checks else None


@dataclass
class OperatorResult:
    name: str
    device: str
    serves: str | None
    implementations: list[ImplementationResult]


@dataclass
class Diagnosis:
    """All that is printed. ``problems`` make the exit code 1, ``warnings`` do not."""

    versions: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    gpus: list[dict[str, str]] = field(default_factory=list)
    peft: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    operators: list[OperatorResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The object that --json prints."""
        result = {"ok": self.ok, "platform": platform.platform(), **dataclasses.asdict(self)}
        for row, operator in zip(result["operators"], self.operators, strict=True):
            for entry, implementation in zip(row["implementations"], operator.implementations, strict=True):
                entry["passed"] = implementation.passed
        return result


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:
        return f"unreadable ({describe(error)})"


def _probe_environment(diagnosis: Diagnosis) -> None:
    for name, value in sorted(os.environ.items()):
        if name.startswith("PEFTFAST_") or name == INTERPRETER_VARIABLE:
            diagnosis.environment[name] = value
        if name.startswith("PEFTFAST_") and name not in (*KNOWN_VARIABLES, BENCHMARKS_VARIABLE):
            diagnosis.warnings.append(f"{name}: peftfast reads no such variable, only {', '.join(KNOWN_VARIABLES)}")
    interpret = os.environ.get(INTERPRETER_VARIABLE, "")
    if interpret not in ("", "0", "1"):
        diagnosis.warnings.append(f"{INTERPRETER_VARIABLE}: expected 0 or 1, got {interpret!r}: taken as 0")
    build = os.environ.get("PEFTFAST_BUILD", "")
    if {name.strip() for name in build.split(",")} - {"", "none", "cpu", "cuda"}:
        diagnosis.warnings.append(f"PEFTFAST_BUILD: expected none, cpu, cuda or cpu,cuda, got {build!r}")


def _driver_rows() -> list[dict[str, str]]:
    """GPUs as the driver lists them, which works when torch does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(("name", "capability", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def _probe_gpus(diagnosis: Diagnosis, torch: Any) -> None:
    listed = _driver_rows()
    diagnosis.gpus = listed
    if torch is None:
        return
    try:
        if not torch.cuda.is_available():
            if listed:
                why = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
                diagnosis.warnings.append(f"the driver lists a GPU, but torch {torch.__version__} {why}")
            return
        driver = listed[0]["driver"] if listed else "unknown"
        diagnosis.gpus = [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "driver": driver,
            }
            for index in range(torch.cuda.device_count())
        ]
        if os.environ.get(INTERPRETER_VARIABLE) == "1":
            diagnosis.warnings.append(f"{INTERPRETER_VARIABLE}=1 interprets the Triton kernels although there is a GPU")
    except Exception as error:
        diagnosis.problems.append(f"torch finds a GPU and cannot ask it: {describe(error)}")


def _probe_peft(diagnosis: Diagnosis) -> None:
    version = diagnosis.versions.get("peft")
    result: dict[str, Any] = {"version": version, "tested": None, "inside": None, "reason": ""}
    diagnosis.peft = result
    if version is None:
        result["reason"] = "PEFT is not installed: peftfast.patch has nothing to patch"
        return
    try:
        from packaging.specifiers import SpecifierSet

        result["tested"] = str(importlib.import_module("peftfast.integrations.peft_versions").TESTED_PEFT)
        result["inside"] = SpecifierSet(result["tested"]).contains(version, prereleases=True)
    except Exception as error:
        result["reason"] = f"the tested range cannot be read: {describe(error)}"
        return
    if not result["inside"]:
        result["reason"] = f"PEFT {version} is outside the tested range {result['tested']}: layers stay stock"
        diagnosis.warnings.append(result["reason"])


def _probe_backends(diagnosis: Diagnosis) -> None:
    from ..ops import backends, native

    def ask(name: str, question: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, reason = question()
        except Exception as error:
            ok, reason = False, describe(error)
            diagnosis.problems.append(f"{name}: {reason}")
        diagnosis.backends[name] = {"available": ok, "reason": reason}

    ask("CPU library", native.cpu_available)
    ask("CUDA library", native.cuda_available)
    ask("autograd library", native.autograd_available)
    ask("Triton", backends.triton_available)
    cpu = diagnosis.backends["CPU library"]
    cpu["isa"] = native.cpu_isa() if cpu["available"] else None


def _probe_requested_backend(diagnosis: Diagnosis, operators: dict[str, Any]) -> None:
    """A backend asked for by name must exist in this process: anything else is an error at the first call."""
    from ..ops.dispatch import BACKEND_VARIABLE, requested_backend

    try:
        requested = requested_backend()
    except ValueError as error:
        diagnosis.problems.append(str(error))
        return
    if requested is None:
        return
    rows = [row for operator in operators.values() for row in operator.implementations if row.backend == requested]
    if not rows:
        diagnosis.problems.append(f"{BACKEND_VARIABLE}={requested} was asked for, but no operator has it")
    for row in rows:
        ok, reason = row.available()
        if not ok:
            diagnosis.problems.append(f"{BACKEND_VARIABLE}={requested} was asked for but is missing: {reason}")
            return


def _check(implementation: Implementation, case: Case, device: str) -> Check:
    from .checks import run_case

    try:
        return Check(case.name, *run_case(implementation, case, device))
    except Exception as error:
        return Check(case.name, None, max(case.allowed), False, describe(error))


def _examine(operator: Operator, cases: list[Case], device: str) -> OperatorResult:
    from .checks import arguments_on

    refusal, chosen = "", None
    try:
        chosen = operator.select(*arguments_on(cases[0], device))
    except Exception as error:
        refusal = describe(error)
    results = []
    for implementation, ok, reason in operator.verdicts(*arguments_on(cases[0], device)):
        row = ImplementationResult(implementation.backend, "does not serve", reason)
        if implementation is chosen:
            row.state, row.reason = "serves", ""
        elif ok:
            row.state, row.reason = "could serve", f"{chosen.backend} serves" if chosen else refusal
        if ok:
            row.checks = [_check(implementation, case, device) for case in cases]
        results.append(row)
    return OperatorResult(operator.name, device, chosen.backend if chosen else None, results)


def _judge(result: OperatorResult) -> Iterator[str]:
    if result.serves is None:
        yield f"{result.name} on {result.device}: nothing serves it"
    for row in result.implementations:
        wrong = [check.case for check in row.checks if not check.passed]
        if wrong:
            where = f"{result.name} on {result.device}: {row.backend}"
            yield f"{where} fails in {len(wrong)} of {len(row.checks)} cases ({'; '.join(wrong)})"


def _probe_operators(diagnosis: Diagnosis, torch: Any) -> None:
    from ..ops import OPERATORS
    from .checks import cases

    _probe_backends(diagnosis)
    _probe_requested_backend(diagnosis, OPERATORS)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    failures: dict[str, list[str]] = {}
    for device in ("cpu", *(f"cuda:{index}" for index in range(count))):
        table = cases(device)
        for name, operator in OPERATORS.items():
            if name not in table:
                diagnosis.warnings.append(f"{name} on {device}: not checked, there is no case for this operator")
                continue
            try:
                result = _examine(operator, table[name], device)
            except Exception as error:
                failures.setdefault(describe(error), []).append(f"{name} on {device}")
                continue
            diagnosis.operators.append(result)
            diagnosis.problems += _judge(result)
    diagnosis.problems += [f"{', '.join(names)}: {reason}" for reason, names in failures.items()]


def diagnose() -> Diagnosis:
    """Run every probe. Does not raise: a probe that fails is a problem with its reason."""
    diagnosis = Diagnosis()
    diagnosis.versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    _probe_environment(diagnosis)
    torch: Any = None
    try:
        torch = importlib.import_module("torch")
        torch.zeros(1)
    except Exception as error:
        torch = None
        diagnosis.problems.append(f"torch cannot be used: {describe(error)}")
    _probe_gpus(diagnosis, torch)
    _probe_peft(diagnosis)
    if torch is not None:
        try:
            _probe_operators(diagnosis, torch)
        except Exception as error:
            diagnosis.problems.append(f"peftfast's operators cannot be used: {describe(error)}")
    return diagnosis


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    rows = [(name, version or "not installed") for name, version in diagnosis.versions.items()]
    for gpu in diagnosis.gpus:
        rows.append(("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, driver {gpu['driver']}"))
    if not diagnosis.gpus:
        rows.append(("GPU", "none found"))
    peft = diagnosis.peft
    rows.append(("PEFT tested", peft["reason"] or f"{peft['version']} is inside {peft['tested']}"))
    for name, backend in diagnosis.backends.items():
        isa = backend.get("isa")
        available = f"available, {isa}" if isa else "available"
        rows.append((name, available if backend["available"] else f"not available: {backend['reason']}"))
    return rows + list(diagnosis.environment.items())


def _operator_rows(operators: list[OperatorResult]) -> Iterator[tuple[str, ...]]:
    yield "operator", "device", "backend", "", "check", "error", "allowed", "worst case", ""
    for operator in operators:
        name, device = operator.name, operator.device
        for row in operator.implementations:
            cells, reason = ("", "", "", ""), row.reason
            if row.checks:
                worst = max(row.checks, key=lambda check: check.severity)
                error = "none" if worst.error is None else f"{worst.error:.1e}" if worst.error else "0"
                allowed = f"{worst.allowed:.1e}" if worst.allowed else "0"
                cells = ("pass" if row.passed else "FAIL", error, allowed, worst.case)
                reason = worst.reason or reason
            yield name, device, row.backend, row.state, *cells, reason
            name, device = "", ""


def render(diagnosis: Diagnosis) -> str:
    """The report for people: facts, a table with a line for each implementation, warnings and problems."""
    lines = list(_table([*_facts(diagnosis)]))
    if diagnosis.operators:
        lines += ["", *_table(list(_operator_rows(diagnosis.operators)))]
        lines += [
            "",
            "error: largest difference from the definition, in the case nearest to what is allowed; 0 is bit for bit",
        ]
    lines += [f"warning: {text}" for text in diagnosis.warnings]
    lines += [f"problem: {text}" for text in diagnosis.problems]
    lines.append("ok" if diagnosis.ok else f"{len(diagnosis.problems)} problem(s)")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: a string stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: what follows ``doctor`` on the command line: nothing or ``--json``.

    Returns:
        0 if something serves every operator and every available implementation agrees with the definition, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m peftfast doctor", description="Examine this machine and the operators."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    # A package that prints while it is imported must not spoil the object.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose()
    print(json.dumps(_finite(diagnosis.to_dict()), indent=2) if options.json else render(diagnosis))
    return 0 if diagnosis.ok else 1
