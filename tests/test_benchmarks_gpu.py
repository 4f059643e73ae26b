"""``make gpu``: a stage that fails or hangs does not stop the others, and what was measured until then is there."""

import json
import re
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, gpu, product, record, registry, run
from benchmarks.gpu import Context, Stage

ORIGIN = {"commit": "abc", "device": "cpu"}


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def stage(name: str, *texts: str, limit: int = 60, **options: Any) -> Stage:
    return Stage(name, limit, lambda _: [python(text) for text in texts], **options)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    return Context("cpu", work, 1, quick=True)


def states(context: Context, *stages: Stage, seconds: float = 60) -> dict[str, gpu.Outcome]:
    found = gpu.run_stages(stages, context, context.work.parent, seconds, ORIGIN)
    return {outcome.stage: outcome for outcome in found}


def test_a_failure_does_not_stop_the_others(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    result = context.work / "run.json"
    found = states(
        context,
        stage("breaks", "print('first'); raise SystemExit(3)", "print('second')"),
        stage("hangs", "import time; print('before'); time.sleep(60)", limit=1),
        stage("cannot", "raise SystemExit(1)", needs=lambda _: "no CUDA device"),
        Stage(
            "measures",
            60,
            lambda _: [python(f"import os; open({str(result)!r}, 'w').write(os.environ['PLANTED'])")],
            environment=lambda _: {"PLANTED": "{}"},
        ),
        Stage("absent", 60, lambda _: [["/nowhere/no-such-program"]]),
    )
    assert {name: outcome.state for name, outcome in found.items()} == {
        "breaks": "failed",
        "hangs": "stopped",
        "cannot": "left out",
        "measures": "passed",
        "absent": "failed",
    }
    assert "exit status 3" in found["breaks"].reason and "second" in found["breaks"].last_lines
    assert found["hangs"].seconds < 20 and "before" in found["hangs"].last_lines
    assert "No such file" in found["absent"].reason
    out = context.work.parent
    files = {path.name for path in out.iterdir() if path.is_file()}
    assert files == {"summary.json", "summary.txt", "run.json", "logs.tar.gz"} and len(files) <= gpu.MOST_FILES
    summary = (out / "summary.txt").read_text()
    assert "3 of 5 stages failed" in summary and "--- hangs" in summary and "--- measures" not in summary
    assert json.loads((out / "summary.json").read_text())["machine"] == ORIGIN
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert {"breaks.log", "hangs.log", "run.json"} <= set(archive.getnames())


def test_the_children_of_a_stopped_stage_end_with_it(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    mark = context.work / "mark"
    grandchild = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert states(context, stage("hangs", text, limit=1))["hangs"].state == "stopped"
    time.sleep(4)
    assert not mark.exists()


def test_a_stage_gets_what_is_left_of_the_whole(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    found = states(context, stage("long", "import time; time.sleep(30)"), stage("late", "print(1)"), seconds=1)
    assert found["long"].state == "stopped"
    assert found["late"].state == "left out" and found["late"].reason == "no time left"


def test_the_stages_as_they_are(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [s.name for s in gpu.STAGES][:3] == ["build", "doctor", "tests"]
    for found in gpu.STAGES:
        if not found.needs(context):
            assert all(
                command and all(isinstance(word, str) for word in command) for command in found.commands(context)
            )
    assert {s.name for s in gpu.STAGES if s.needs(context)} == {"sanitizer", "product", "nf4-product", "dram", "plots"}
    with monkeypatch.context() as bare:
        bare.setattr(gpu.importlib.util, "find_spec", lambda name: None)
        missing = {s.name: reason for s in gpu.STAGES if "not installed" in (reason := s.needs(context))}
    assert missing == {
        "tests": "pytest is not installed",
        "host": "peft is not installed",
        "suite": "pytest is not installed",
    }
    # Every command of a benchmark is one that its parser takes, and none can outlast the tool that cuts the whole off.
    on_gpu = replace(context, device="cuda", quick=False)
    for name, parse in (
        ("bench", run.parser()),
        ("dram", run.parser()),
        ("verify", run.parser()),
        ("end-to-end", end_to_end.parser()),
        ("product", product.parser()),
        ("nf4-product", product.parser()),
    ):
        (command,) = next(s for s in gpu.STAGES if s.name == name).commands(on_gpu)
        parse.parse_args(command[3:])
    assert set(gpu.COUNTED) <= set(registry.load())
    assert all(s.limit_s <= gpu.WHOLE_S for s in gpu.STAGES) and gpu.WHOLE_S + 3 * gpu.GRACE_S < 600
    (bench,) = next(s for s in gpu.STAGES if s.name == "bench").commands(context)
    assert "lora_linear" in bench and not set(product.OPS) & set(bench)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.architecture() == "90a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert gpu.architecture() == "86"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    both = {"PEFTFAST_BUILD": "cpu,cuda", "PEFTFAST_CUDA_ARCHITECTURES": "86"}
    assert gpu._build_environment(on_gpu) == both
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert gpu._build_environment(on_gpu) == {"PEFTFAST_BUILD": "cpu"}


def test_what_uses_a_gpu_is_tested_first() -> None:
    context = Context("cuda", Path("."), 3, quick=False)
    own, more = ([word for word in command if word.startswith("tests")] for command in gpu._pytest(context, True))
    assert own == ["tests/test_gpu.py", "tests/test_gpu_sparse_delta.py"]
    assert {"tests/test_mezo.py", "tests/test_triton_lora.py"} <= set(more) and not set(own) & set(more)
    first = [*own, *more]
    ((_, _, _, *rest),) = gpu._pytest(context, False)
    others = {word for word in rest if word.startswith("tests")}
    every = {str(path.relative_to(gpu.ROOT)) for path in (gpu.ROOT / "tests").glob("test_*.py")}
    assert not others & set(first) and others | set(first) == every
    assert "tests/test_nvcc_gate.py" in others
    for path in every:  # what is marked for a GPU is where it is looked for
        if re.search(r"mark\.gpu\b", (gpu.ROOT / path).read_text()):
            assert path in first, path


@pytest.mark.parametrize("option", ["--kernel-name-exclude arg: ... kernel_substring | kns", ""])
def test_the_sanitizer_leaves_torch_s_own_kernels_alone(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """Where it can: an option that it does not know would be the end of it."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout=option)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    commands = gpu._sanitizer(Context("cuda", Path("."), 3, quick=False))
    assert asked == [["compute-sanitizer", "--help"]]
    assert [command[2] for command in commands] == ["memcheck", "racecheck", "synccheck"]
    assert [command[-2:] for command in commands] == [["peftfast", "doctor"]] * 3
    assert all(("kns=_ZN2at" in command) == bool(option) for command in commands)


def test_failures_are_written_as_they_happen(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the tests below are not this worker's
    made = gpu.ROOT / "tests" / "test_made_to_fail.py"
    made.write_text("def test_fails():\n    assert 1 == 2, 'seen in time'\n")
    environment = gpu._tests_environment(context, "tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(made)]
    try:
        found = states(context, Stage("tests", 60, lambda _: [command], environment=lambda _: environment))["tests"]
    finally:
        made.unlink()
    assert found.state == "failed"
    assert (
        "test_fails" in (failures := (context.work / "tests-failures.log").read_text()) and "seen in time" in failures
    )
    with tarfile.open(context.work.parent / "logs.tar.gz") as archive:
        assert "tests-failures.log" in archive.getnames()


def test_a_stage_is_asked_to_end_as_it_understands(context: Context) -> None:
    text = "import time\ntry:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    print('asked')"
    found = states(context, stage("tests", text, limit=2, ask=gpu.signal.SIGINT))["tests"]
    assert found.state == "stopped" and "asked" in found.last_lines and found.seconds < 8


def test_commands_share_the_time_of_their_stage(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    found = states(context, stage("tools", "import time; time.sleep(30)", "print('second ran')", limit=4))["tools"]
    assert found.state == "stopped" and "second ran" in found.last_lines and found.seconds < 10


def test_a_benchmark_that_was_stopped_is_no_failure(context: Context) -> None:
    found = states(context, stage("bench", f"raise SystemExit({gpu.STOPPED})"))["bench"]
    assert found.state == "stopped" and found.reason == "not all was measured"


@pytest.mark.slow
def test_the_command_leaves_what_record_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--out", str(out), "--stages", "end-to-end", "--device", "cpu", "--quick", "--commit", "abc123"]
    assert gpu.main(words) == 0, capsys.readouterr().out
    (report,) = record.end_to_end_in(out)
    assert report["machine"]["commit"] == "abc123"
    assert not (out / "work").exists()
    readme = tmp_path / "README.md"
    readme.write_text(f"{record.BEGIN}\n{record.END}\n")
    filed = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert record.main([str(out), *filed]) == 0
    assert "One training step, tiny" in readme.read_text() and "peftfast" in readme.read_text()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(readme)])
