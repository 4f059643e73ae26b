"""Killed and resumed: the checkpoint that is whole is found, and going on from it gives the adapter of a run that was never stopped."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftfast.__main__ import main
from peftfast.cli import checkpoint, finetune
from tests.test_cli_finetune import (  # noqa: F401
    ROOT,
    command,
    environment,
    error_line,
    llama,
    texts,
    whole,
    write_lines,
)

# Dropout, a schedule, a warm-up and accumulation: each is state that a resumed run must find again.
OPTIONS = ("--max-steps", "8", "--save-steps", "2", "--lora-dropout", "0.2", "--warmup-steps", "2")
OPTIONS += ("--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "2", "--learning-rate", "5e-3")


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Stop(Exception):
    pass


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Run until the checkpoint of ``step`` is in place, and no further."""
    save = finetune.Job.save

    def save_and_stop(self, now, *args, **kwargs):
        save(self, now, *args, **kwargs)
        if now >= step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Job, "save", save_and_stop)
        with pytest.raises(Stop):
            main(argv)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_resumed_is_as_never_stopped(llama, texts, tmp_path, monkeypatch, capsys, method):  # noqa: F811
    through = tmp_path / "through"
    assert main(command(llama, texts, through, *OPTIONS, "--method", method)) == 0
    out = tmp_path / "out"
    argv = command(llama, texts, out, *OPTIONS, "--method", method)
    stopped_at(4, monkeypatch, argv)
    assert json.loads((out / checkpoint.FOLDER / checkpoint.MARKER).read_text())["step"] == 4
    assert not same(adapter(out), adapter(through))
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    assert same(adapter(out), adapter(through))
    # Over: no checkpoint is left, and nothing is to be resumed.
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in through.iterdir())
    assert main([*argv, "--resume"]) == 2
    assert "is over" in error_line(capsys)


@pytest.mark.parametrize("method", ["lora", *(pytest.param(one, marks=pytest.mark.full) for one in ("spiel", "mezo"))])
def test_killed_while_training_and_resumed(llama, texts, tmp_path, capsys, method):  # noqa: F811
    """SIGKILL between two saves, in a process of its own."""
    out = tmp_path / "out"
    argv = command(llama, texts, out, "--max-steps", "100000", "--save-steps", "1", "--r", "2", "--method", method)
    process = subprocess.Popen(
        [sys.executable, "-m", "peftfast", *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    said = process.communicate()[1]
    whole(out)
    checkpoint.check(out, overwrite=False, resume=True)
    step = checkpoint.marker(out)["step"]
    assert step >= 1, said
    # A run of that many steps, and one more from the checkpoint on: --max_steps may be another one.
    argv = command(llama, texts, out, "--max-steps", str(step + 1), "--save-steps", "1", "--r", "2", "--method", method)
    argv.append("--resume")
    assert main(argv) == 0
    assert f"resumed from step {step}" in capsys.readouterr().out
    assert not (out / checkpoint.FOLDER).exists()


def test_resume_without_anything_begins(llama, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert main(command(llama, texts, out, "--max-steps", "1", "--resume")) == 0
    assert "resumed" not in capsys.readouterr().out
    whole(out)


@pytest.fixture
def halted(llama, texts, tmp_path, monkeypatch):  # noqa: F811
    """(arguments, directory) of a training that stopped at step 1."""
    out = tmp_path / "out"
    argv = command(llama, texts, out, "--max-steps", "2", "--save-steps", "1")
    stopped_at(1, monkeypatch, argv)
    return argv, out


def spoil_marker(out: Path) -> None:
    (out / checkpoint.FOLDER / checkpoint.MARKER).unlink()


def spoil_marker_text(out: Path) -> None:
    path = out / checkpoint.FOLDER / checkpoint.MARKER
    path.write_bytes(path.read_bytes()[:-9])


def spoil_optimizer(out: Path) -> None:
    """Without a word the Trainer would go on with an optimiser and a schedule that begin again."""
    (out / checkpoint.FOLDER / "optimizer.pt").unlink()


def spoil_random_state(out: Path) -> None:
    path = out / checkpoint.FOLDER / "rng_state.pth"
    path.write_bytes(path.read_bytes()[:20])


def test_what_cannot_be_resumed_is_refused(halted, llama, tmp_path, capsys):  # noqa: F811
    """One halted training, and each way in which it is not the one that is asked for."""
    argv, out = halted
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    other_data = write_lines(tmp_path / "other.jsonl", [{"text": "other words"}] * 4)
    other_model, elsewhere = tmp_path / "other", tmp_path / "elsewhere"
    for folder in (other_model, elsewhere):
        shutil.copytree(llama, folder)
    weights = {name: weight + 0.01 for name, weight in load_file(other_model / "model.safetensors").items()}
    save_file(weights, other_model / "model.safetensors", metadata={"format": "pt"})
    cases = [
        ([*argv], None, ["holds an adapter already", "--resume", "--overwrite"]),
        ([*argv, "--resume", "--overwrite"], None, ["--resume", "--overwrite"]),
        ([*argv, "--resume", "--r", "4"], None, ["--r 16, not of 4"]),
        ([*argv, "--resume", "--optim", "sgd"], None, ["extra"]),
        ([*argv, "--resume", "--data", str(other_data)], None, ["another --data"]),
        ([*argv, "--resume", "--model", str(other_model)], None, ["another --model"]),
        ([*argv, "--resume"], spoil_marker, ["not whole", checkpoint.MARKER]),
        ([*argv, "--resume"], spoil_marker_text, ["not whole"]),
        ([*argv, "--resume"], spoil_optimizer, ["not whole", "optimizer.pt", "is missing"]),
        ([*argv, "--resume"], spoil_random_state, ["not whole", "rng_state.pth", "has 20 bytes of"]),
    ]
    for asked, spoil, said in cases:
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        if spoil is not None:
            spoil(out)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(asked) == 2, asked
        line = error_line(capsys)
        for fragment in said:
            assert fragment in line, line
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    assert main([*argv, "--resume", "--model", str(elsewhere)]) == 0  # the same base, wherever it lies
