"""``python -m peftfast doctor``: what this machine has, which implementation serves each operator, and whether each is right.

Standard library only at module level, and every probe is guarded: the command is for the machine where something is broken, torch
included. A value of the environment is shown only where its name is PEFTFAST_* or TRITON_INTERPRET.
"""

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
from typing import Any

PACKAGES = ("peftfast", "torch", "triton", "bitsandbytes", "peft", "transformers", "numpy")
# What peftfast and its build read; another PEFTFAST_* name is most likely a typing mistake.
KNOWN_VARIABLES = ("PEFTFAST_BACKEND", "PEFTFAST_BUILD", "PEFTFAST_CPU_ISA", "PEFTFAST_CUDA_ARCHITECTURES")
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
NVIDIA_SMI_SECONDS = 10

# Awkward on purpose: no side is a multiple of 8 or of a block, and 131 * 127 elements in blocks of 64 are an odd count in 260
# blocks, one of them short, so that double quantisation has a second group of maxima.
M, N, K, R = 5, 43, 67, 3
NF4_SHAPE = (131, 127)
NF4_BLOCK_SIZE = 64
DROPOUT_P = 0.3


@dataclass
class Check:
    """One run of one implementation. ``error`` is the largest absolute difference from the definition; None if it did not run."""

    case: str
    error: float | None
    allowed: float
    passed: bool
    reason: str = ""


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


@dataclass(frozen=True)
class Case:
    """A call of an operator: its arguments on the CPU, what the definition gives, and the budget.

    ``expected`` and ``allowed`` have one entry for each result; allowed 0 means equal, bit for bit. The results of an operator that
    writes are its argument number ``written``.
    """

    name: str
    arguments: tuple[Any, ...]
    expected: tuple[Any, ...]
    allowed: tuple[float, ...]
    written: int | None = None


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:
        return f"unreadable ({_describe(error)})"


def _probe_environment(diagnosis: Diagnosis) -> None:
    for name, value in sorted(os.environ.items()):
        if name.startswith("PEFTFAST_") or name == INTERPRETER_VARIABLE:
            diagnosis.environment[name] = value
        if name.startswith("PEFTFAST_") and name not in KNOWN_VARIABLES:
            diagnosis.warnings.append(f"{name} is not a variable that peftfast reads ({', '.join(KNOWN_VARIABLES)} are)")
    interpret = os.environ.get(INTERPRETER_VARIABLE, "")
    if interpret not in ("", "0", "1"):
        diagnosis.warnings.append(f"{INTERPRETER_VARIABLE}: expected 0 or 1, got {interpret!r}; only 1 turns the interpreter on")
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
        diagnosis.problems.append(f"torch finds a GPU and cannot ask it: {_describe(error)}")


def _probe_peft(diagnosis: Diagnosis) -> None:
    version = diagnosis.versions.get("peft")
    result: dict[str, Any] = {"version": version, "tested": None, "inside": None, "reason": ""}
    diagnosis.peft = result
    if version is None:
        result["reason"] = "PEFT is not installed: peftfast.patch has nothing to patch"
        return
    try:
        from packaging.specifiers import SpecifierSet

        result["tested"] = str(importlib.import_module("peftfast.integrations.peft").TESTED_PEFT)
        result["inside"] = SpecifierSet(result["tested"]).contains(version, prereleases=True)
    except Exception as error:
        result["reason"] = f"the tested range cannot be read: {_describe(error)}"
        return
    if not result["inside"]:
        result["reason"] = f"PEFT {version} is outside the tested range {result['tested']}: patched layers run their stock forward"
        diagnosis.warnings.append(result["reason"])


def _probe_backends(diagnosis: Diagnosis) -> None:
    from ..ops import backends, native

    def ask(name: str, question: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, reason = question()
        except Exception as error:
            ok, reason = False, _describe(error)
            diagnosis.problems.append(f"{name}: {reason}")
        diagnosis.backends[name] = {"available": ok, "reason": reason}

    ask("CPU library", native.cpu_available)
    ask("CUDA library", native.cuda_available)
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
        diagnosis.problems.append(f"{BACKEND_VARIABLE}={requested} was asked for, but no operator has such an implementation")
    for row in rows:
        ok, reason = row.available()
        if not ok:
            diagnosis.problems.append(f"{BACKEND_VARIABLE}={requested} was asked for but is missing: {reason}")
            return


def _exact(name: str, arguments: tuple[Any, ...], expected: Any, written: int | None = None) -> Case:
    expected = expected if isinstance(expected, tuple) else (expected,)
    return Case(name, arguments, expected, (0.0,) * len(expected), written)


def _philox_cases(torch: Any) -> dict[str, list[Case]]:
    from ..reference import philox

    seed = torch.tensor([-(2**61) + 12345], dtype=torch.int64)
    mask = (seed, M, K, DROPOUT_P)
    words = (seed, 2**32 - 3, 9, 5, philox.STREAM_DROPOUT)  # a counter that carries into its high word
    return {
        "dropout_mask": [_exact("bool", mask, philox.dropout_mask(*mask))],
        "philox_words": [_exact("words", words, philox.philox_words(*words))],
    }


def _nf4_cases(torch: Any, random: Any) -> dict[str, list[Case]]:
    from ..reference import nf4

    code = nf4.code_table("nf4", torch.device("cpu"))
    weight = torch.randn(NF4_SHAPE, generator=random)
    quantise = (weight, NF4_BLOCK_SIZE, code)
    packed, absmax = nf4.nf4_quantize(*quantise)
    bytes_, nested_absmax, offset = nf4.nest_absmax(absmax)
    nested_code = nf4.nested_code_table(torch.device("cpu"))
    cases = []
    for name, maxima, nested in (
        ("one level", absmax, (None, None, None)),
        ("double", bytes_, (nested_absmax, nested_code, offset)),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            storage = (packed, maxima, code, NF4_BLOCK_SIZE, NF4_SHAPE)
            out = torch.full(NF4_SHAPE, math.nan, dtype=dtype)
            expected = nf4.nf4_dequantize(*storage, dtype, *nested)
            cases.append(_exact(f"{name}, {_short(dtype)}", (*storage, *nested, out), expected, written=len(storage) + 3))
    return {"nf4_quantize": [_exact("nf4", quantise, (packed, absmax))], "nf4_dequantize_out": cases}


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _budgeted(
    torch: Any, name: str, definition: Callable[..., Any], arguments: tuple[Any, ...], written: int | None = None
) -> Case:
    """The contract on numbers: twice the error of the composed torch ops in that dtype, plus one rounding of the largest value."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        return torch.float64 if isinstance(value, torch.dtype) else value

    asked = arguments if written is None else (*arguments, arguments[written].dtype)
    composed, exact = definition(*asked), definition(*map(widen, asked))
    composed, exact = (r if isinstance(r, tuple) else (r,) for r in (composed, exact))
    allowed = tuple(
        2 * (float((c.double() - e).abs().max()) + torch.finfo(c.dtype).eps / 2 * float(e.abs().max()))
        for c, e in zip(composed, exact, strict=True)
    )
    return Case(name, arguments, exact, allowed, written)


def _lora_cases(torch: Any, random: Any) -> dict[str, list[Case]]:
    from ..reference import lora

    def normal(dtype: Any, *shape: int) -> Any:
        return torch.randn(shape, generator=random).to(dtype)

    seed = torch.tensor([987654321], dtype=torch.int64)
    cases: dict[str, list[Case]] = {}
    # The second is QLoRA after prepare_model_for_kbit_training: float32 x and adapters, products in bfloat16.
    for outer, compute in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        name = _short(compute) if outer == compute else f"{_short(outer)} in {_short(compute)}"
        x, a, b = normal(outer, M, K), normal(outer, R, K), normal(outer, N, R)
        s, ds, dy, bias = normal(compute, M, R), normal(compute, M, R), normal(compute, M, N), normal(outer, N)
        expand = (normal(compute, M, N), s, b, bias, seed, DROPOUT_P, 0.5)
        for operator, arguments, definition, written in (
            ("lora_shrink", (x, a, seed, DROPOUT_P, 0.5, compute), lora.lora_shrink, None),
            ("lora_expand", (*expand, outer), lora.lora_expand, None),
            ("lora_expand_", expand, lora.lora_expand, 0),
            ("lora_weight_grad", (ds, x, seed, DROPOUT_P, 0.5, outer), lora.lora_weight_grad, None),
            ("lora_dy_grads", (dy, s, b, 0.5, outer), lora.lora_dy_grads, None),
        ):
            case = _budgeted(torch, name, definition, arguments, written)
            cases.setdefault(operator, []).append(case)
    return cases


def _cases(torch: Any) -> dict[str, list[Case]]:
    random = torch.Generator().manual_seed(0)
    return {**_philox_cases(torch), **_nf4_cases(torch, random), **_lora_cases(torch, random)}


def _moved(torch: Any, case: Case, device: str) -> tuple[Any, ...]:
    """Fresh arguments on the device: an operator that writes must not write into the case."""
    return tuple(
        value.to(device, copy=True) if isinstance(value, torch.Tensor) else value for value in case.arguments
    )


def _largest_error(torch: Any, result: Any, expected: Any) -> float:
    """Infinite where the shapes differ or exactly one of the two is not finite."""
    result = result.detach().cpu()
    if result.shape != expected.shape:
        return math.inf
    if torch.equal(result, expected):
        return 0.0
    return float(torch.nan_to_num((result.double() - expected.double()).abs(), nan=math.inf).max())


def _run_check(torch: Any, implementation: Any, case: Case, device: str) -> Check:
    arguments = _moved(torch, case, device)
    try:
        results = implementation.run(*arguments)
        if case.written is not None:
            results = arguments[case.written]
        results = results if isinstance(results, tuple) else (results,)
        errors = [_largest_error(torch, r, e) for r, e in zip(results, case.expected, strict=True)]
    except Exception as error:
        return Check(case.name, None, max(case.allowed), False, _describe(error))
    # Of several results, the one nearest to or farthest over its budget is shown.
    _, error, allowed = max((e / a if a else e, e, a) for e, a in zip(errors, case.allowed, strict=True))
    return Check(case.name, error, allowed, all(e <= a for e, a in zip(errors, case.allowed, strict=True)))


def _examine(torch: Any, operator: Any, cases: list[Case], device: str) -> OperatorResult:
    refusal = ""
    try:
        chosen = operator.select(*_moved(torch, cases[0], device))
    except Exception as error:
        chosen, refusal = None, _describe(error)
    results = []
    for implementation, ok, reason in operator.verdicts(*_moved(torch, cases[0], device)):
        if implementation is chosen:
            state, reason = "serves", ""
        elif ok:
            state, reason = "could serve", refusal or f"{chosen.backend} serves"
        else:
            state = "does not serve"
        row = ImplementationResult(implementation.backend, state, reason)
        if ok:
            row.checks = [_run_check(torch, implementation, case, device) for case in cases]
        results.append(row)
    return OperatorResult(operator.name, device, chosen.backend if chosen else None, results)


def _devices(torch: Any) -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def _probe_operators(diagnosis: Diagnosis, torch: Any) -> None:
    from ..ops import OPERATORS

    _probe_backends(diagnosis)
    _probe_requested_backend(diagnosis, OPERATORS)
    table = _cases(torch)
    for device in _devices(torch):
        for name, operator in OPERATORS.items():
            if name not in table:
                diagnosis.warnings.append(f"{name}: the doctor has no case for this operator, it was not checked")
                continue
            try:
                result = _examine(torch, operator, table[name], device)
            except Exception as error:
                diagnosis.problems.append(f"{name} on {device}: {_describe(error)}")
                continue
            diagnosis.operators.append(result)
            if result.serves is None:
                diagnosis.problems.append(f"{name} on {device}: nothing serves it")
            for row in result.implementations:
                if row.passed is False:
                    failed = ", ".join(check.case for check in row.checks if not check.passed)
                    diagnosis.problems.append(f"{name} on {device}: {row.backend} differs from the definition ({failed})")


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
        diagnosis.problems.append(f"torch cannot be used: {_describe(error)}")
    _probe_gpus(diagnosis, torch)
    _probe_peft(diagnosis)
    if torch is not None:
        try:
            _probe_operators(diagnosis, torch)
        except Exception as error:
            diagnosis.problems.append(f"peftfast's operators cannot be used: {_describe(error)}")
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
    yield "operator", "device", "backend", "", "check", "error", "allowed", ""
    for operator in operators:
        name, device = operator.name, operator.device
        for row in operator.implementations:
            check, error, allowed, reason = "", "", "", row.reason
            if row.checks:
                worst = max(row.checks, key=_severity)
                check = "pass" if row.passed else "FAIL"
                error = "none" if worst.error is None else f"{worst.error:.1e}" if worst.error else "0"
                allowed = f"{worst.allowed:.1e}" if worst.allowed else "0"
                reason = f"{worst.case}: {worst.reason}" if worst.reason else reason
            yield name, device, row.backend, row.state, check, error, allowed, reason
            name, device = "", ""


def _severity(check: Check) -> float:
    if check.error is None:
        return math.inf
    return check.error / check.allowed if check.allowed else check.error


def render(diagnosis: Diagnosis) -> str:
    """The report for people: facts, a table with a line for each implementation, warnings and problems."""
    lines = list(_table([*_facts(diagnosis)]))
    if diagnosis.operators:
        lines += ["", *_table(list(_operator_rows(diagnosis.operators)))]
        lines += ["", "error: the largest difference from the definition over dtypes, at the case nearest its allowance; 0 is equal"]
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
    parser = argparse.ArgumentParser(prog="python -m peftfast doctor", description="Examine this machine and every operator.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    # A package that prints while it is imported must not spoil the object.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose()
    print(json.dumps(_finite(diagnosis.to_dict()), indent=2) if options.json else render(diagnosis))
    return 0 if diagnosis.ok else 1
