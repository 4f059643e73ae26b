"""The doctor finds a planted fault, speaks where torch is broken, and tells nothing of the environment that is not its own."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfast import ops
from peftfast.cli import checks, doctor

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120


@pytest.fixture(autouse=True, scope="module")
def cases_once() -> Iterator[None]:
    """The definitions' results of all operators, which each report computes: half a second. Who runs a case copies its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "cases", functools.cache(checks.cases))
        yield


def run(*arguments: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with no variable of peftfast's but those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEFTFAST_")}
    search = os.pathsep.join(map(str, [path, ROOT] if path else [ROOT]))
    environment |= {"PYTHONPATH": search, "TRITON_INTERPRET": "0", **variables}
    command = [sys.executable, "-m", "peftfast", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Examine these operators alone: an interpreted kernel takes up to half a second a case."""
    monkeypatch.setattr(ops, "OPERATORS", {name: ops.OPERATORS[name] for name in names})


def replace_implementations(monkeypatch: pytest.MonkeyPatch, name: str, *implementations: Any) -> None:
    only(monkeypatch, name)
    monkeypatch.setattr(ops.OPERATORS[name], "implementations", implementations)


def definition_of(name: str) -> Any:
    return next(row for row in ops.OPERATORS[name].implementations if row.backend == "reference")


def report(capsys: pytest.CaptureFixture[str], expected_exit: int) -> dict[str, Any]:
    capsys.readouterr()
    assert doctor.main(["--json"]) == expected_exit
    return json.loads(capsys.readouterr().out)


def test_a_sound_machine_in_json() -> None:
    done = run("--json", SOME_TOKEN="hunter2", PEFTFAST_SPEED="9")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True and found["problems"] == []
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "triton", "bitsandbytes", "peft", "transformers", "numpy"} <= found["versions"].keys()
    assert found["environment"] == {"PEFTFAST_SPEED": "9", "TRITON_INTERPRET": "0"}
    assert "hunter2" not in done.stdout + done.stderr
    assert any("PEFTFAST_SPEED" in text for text in found["warnings"])
    assert found["peft"]["inside"] is True
    assert set(found["backends"]) == {"CPU library", "CUDA library", "autograd library", "Triton"}
    assert {row["name"] for row in found["operators"] if row["device"] == "cpu"} == set(ops.OPERATORS)
    for row in found["operators"]:
        serving = [entry for entry in row["implementations"] if entry["state"] == "serves"]
        assert [entry["backend"] for entry in serving] == [row["serves"]]
        for entry in row["implementations"]:
            assert entry["passed"] is (None if entry["state"] == "does not serve" else True)
            assert entry["state"] == "serves" or entry["reason"]
            assert all(check["error"] <= check["allowed"] for check in entry["checks"])


def test_the_table_names_every_operator_and_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "dropout_mask", "nf4_quantize")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "dropout_mask", "nf4_quantize", "triton", "reference", "pass"):
        assert name in text
    assert text.splitlines()[-1] == "ok"


def test_every_operator_has_a_case() -> None:
    assert set(checks.cases("cpu")) == set(ops.OPERATORS)


@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_every_implementation_passes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that only a GPU or the interpreter has among them: a case that is wrong itself is found here, not on the first GPU."""
    only(monkeypatch, name)
    for operator in report(capsys, 0)["operators"]:
        for entry in operator["implementations"]:
            assert entry["passed"] or entry["state"] == "does not serve", entry


@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_a_wrong_implementation(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sound = definition_of(name)
    written = checks.cases("cpu")[name][0].written

    def wrong(*arguments: Any) -> Any:
        results = sound.run(*arguments)
        last = arguments[written] if written is not None else results[-1] if isinstance(results, tuple) else results
        corner = last[(-1,) * last.dim()]
        corner.copy_(~corner if corner.dtype == torch.bool else corner + 1)
        return results

    replace_implementations(monkeypatch, name, dataclasses.replace(sound, backend="cpu", run=wrong), sound)
    found = report(capsys, 1)
    assert [entry["passed"] for entry in found["operators"][0]["implementations"]] == [False, True]
    assert any(text.startswith(f"{name} on cpu: cpu fails in") for text in found["problems"])


@pytest.mark.parametrize("fault", ["raises", "dtype", "nan"])
def test_other_faults(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sound = definition_of("lora_shrink")

    def wrong(*arguments: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("planted")
        result = sound.run(*arguments)
        return result.double() if fault == "dtype" else torch.full_like(result, float("nan"))

    replace_implementations(monkeypatch, "lora_shrink", dataclasses.replace(sound, run=wrong))
    found = report(capsys, 1)
    (entry,) = found["operators"][0]["implementations"]
    assert entry["passed"] is False
    for check in entry["checks"]:
        assert check["error"] == (None if fault == "raises" else "inf")
        assert check["reason"] == ("RuntimeError: planted" if fault == "raises" else "")


def test_nothing_serves_an_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = dataclasses.replace(definition_of("philox_words"), available=lambda: (False, "planted"))
    replace_implementations(monkeypatch, "philox_words", missing)
    found = report(capsys, 1)
    assert "philox_words on cpu: nothing serves it" in found["problems"]
    assert found["operators"][0]["implementations"][0]["reason"] == "planted"


def test_a_requested_backend_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = definition_of("dropout_mask")
    missing = dataclasses.replace(sound, backend="triton", available=lambda: (False, "planted"))
    replace_implementations(monkeypatch, "dropout_mask", missing, sound)
    assert report(capsys, 0)["ok"] is True
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    assert "PEFTFAST_BACKEND=triton was asked for but is missing: planted" in report(capsys, 1)["problems"]


@pytest.mark.parametrize("value", ["tpu", "cuda"])
def test_a_backend_that_no_operator_has(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_implementations(monkeypatch, "dropout_mask", definition_of("dropout_mask"))
    monkeypatch.setenv("PEFTFAST_BACKEND", value)
    assert any("PEFTFAST_BACKEND" in text and value in text for text in report(capsys, 1)["problems"])


def test_an_unknown_instruction_set() -> None:
    done = run("--json", PEFTFAST_CPU_ISA="sse")
    assert done.returncode == 1
    assert any("PEFTFAST_CPU_ISA" in text and "sse" in text for text in json.loads(done.stdout)["problems"])


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_broken_torch(tmp_path: Path, form: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('planted: libtorch.so is missing')\n")
    done = run(*([form] if form else []), path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "torch cannot be used: ImportError: planted: libtorch.so is missing" in done.stdout
    assert importlib.metadata.version("torch") in done.stdout  # what is installed is told by its metadata
    if form:
        assert json.loads(done.stdout)["operators"] == []


def test_only_the_standard_library_at_module_level() -> None:
    program = (
        "import sys; before = set(sys.modules); import peftfast.cli.doctor; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'peftfast'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
