"""``finetune`` on several workers, as torchrun starts them: together they do what one does with their batches, write once, and go on
from a checkpoint. Two processes, gloo, CPU."""

import inspect
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from peftfast.__main__ import main
from peftfast.cli import checkpoint, workers
from peftfast.cli.errors import UserError
from tests.support.forked import Forked, forking
from tests.test_cli_finetune import (  # noqa: F401
    ROOT,
    command,
    environment,
    error_line,
    labelled,
    llama,
    texts,
    write_lines,
)
from tests.test_cli_finetune_resume import adapter, same

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs torch.distributed and fork"
)

# Each worker is a fork, with a file of its own for what it says. `before` runs in each first.
PROGRAM = """
import os, sys, torch
from pathlib import Path
rank = 0 if os.fork() else 1
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
torch.set_num_threads(1)
if rank == 1:
    said = os.open("said_by_1.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
from peftfast.__main__ import main
from peftfast.cli import finetune
exec(BEFORE)
status = 1
try:
    status = main(ARGV)
finally:
    sys.stdout.flush(), sys.stderr.flush()
    if rank == 1:
        os._exit(status)
other = os.waitstatus_to_exitcode(os.wait()[1])
assert other == status, (status, other)
sys.exit(status)
"""
ALONE = """
import sys, torch
torch.set_num_threads(1)
from peftfast.__main__ import main
sys.exit(main"""
# Keeps what --out holds after the second step, as a kill would leave it.
KEEP = """
import shutil
save = finetune.Job.save
def save_and_keep(self, now, *args, **kwargs):
    save(self, now, *args, **kwargs)
    if now == 2 and not rank:
        shutil.copytree(self.options.out, "kept")
finetune.Job.save = save_and_keep
"""
THE_FIRST_WRITES = """
if rank:
    from peftfast.cli import atomic
    atomic.replace_directory = None
"""
# How many steps a method is told that there will be.
TOTAL = """
count = finetune.Job._total_steps
def shown(self):
    print("total", count(self))
    return count(self)
finetune.Job._total_steps = shown
"""
# It keeps room for every gradient, of which MeZO has none.
NO_DDP = "torch.nn.parallel.DistributedDataParallel.__init__ = None\n"
TWICE = "once = main\nmain = lambda argv: once(argv) or once([*argv, '--overwrite'])\n"
SAY_THE_HELD_OUT = """
run = finetune.Job.run
def run_and_say(self, learn, held_out):
    run(self, learn, held_out)
    with torch.no_grad():
        each = [float(self.model(**self.encoder.collate([row])).loss) for row in self.encoder.encode(held_out).rows]
    print(f"held out: {len(each)} lines, loss {sum(each) / len(each):.4f}")
finetune.Job.run = run_and_say
"""
# Another stream of random numbers on each.
APART = """
from transformers import Trainer
begin = Trainer._inner_training_loop
def seeded(self, *args, **kwargs):
    torch.manual_seed(100 + rank)
    return begin(self, *args, **kwargs)
Trainer._inner_training_loop = seeded
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    kept = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with forking("torch", "transformers", "peft", "bitsandbytes", "peftfast.cli.finetune_job", environment=kept) as one:
        yield one


def on_two(forked: Forked, folder: Path, argv: list[str], before: str = "") -> tuple[int, str, str]:
    """(exit status of both, what the first said, what the second said)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, said = forked.run(f"PORT, ARGV, BEFORE = {str(port)!r}, {argv!r}, {before!r}\n{PROGRAM}", folder)
    return status, said, (folder / "said_by_1.txt").read_text()


def steps(batch: int, *more: str) -> tuple[str, ...]:
    """Four of them: two thirds of an epoch of 24 lines, in batches of four for one worker or of two for each."""
    return (
        "--num-train-epochs",
        "0.66",
        "--per-device-train-batch-size",
        str(batch),
        "--r",
        "2",
        "--logging-steps",
        "1",
        *more,
    )


METHODS = {
    "lora": ("--lora-dropout", "0", "--learning-rate", "1e-3"),
    "qlora": ("--lora-dropout", "0", "--learning-rate", "1e-3"),
    "spiel": ("--learning-rate", "1e-3"),  # whose moves the first worker's gradients begin
    "mezo": ("--learning-rate", "1e-3", "--seed", "5"),
    "lora-xs": ("--learning-rate", "1e-3"),
}


@pytest.mark.parametrize(
    "method", [one if one in ("lora", "mezo") else pytest.param(one, marks=pytest.mark.full) for one in METHODS]
)
def test_two_are_one_with_the_batches_of_both(llama, texts, tmp_path, forked, method):  # noqa: F811
    options = ("--method", method, *METHODS[method])
    status, one = forked.run(f"{ALONE}({command(llama, texts, tmp_path / 'one', *steps(4), *options)!r}))", tmp_path)
    assert status == 0, one
    argv = command(llama, texts, tmp_path / "two", *steps(2), *options, "--save-steps", "2")
    more = NO_DDP if method == "mezo" else ""
    status, said, other = on_two(forked, tmp_path, argv, THE_FIRST_WRITES + TOTAL + more)
    assert status == 0, said + other
    assert "loss" not in other and said.count("adapter in") == 1
    assert "total 4\n" in said and "over 4 steps" in said
    losses = [[float(found) for found in re.findall(r"'loss': '([\d.]+)'", text)] for text in (one, said)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=2e-3)
    found, expected = adapter(tmp_path / "two"), adapter(tmp_path / "one")
    tolerance = {"rtol": 1e-3, "atol": 1e-4 if method == "qlora" else 1e-5}
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], **tolerance, msg=key)
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_classifier_learns_from_the_mean_of_a_step(llama, labelled, tmp_path, forked):  # noqa: F811
    """Its loss is the mean of a batch whatever the Trainer tells it: neither workers nor batches of a step multiply it."""
    options = ("--max-steps", "3", "--r", "2", "--logging-steps", "2", "--lora-dropout", "0", "--eval-split", "0.2")
    batches = ("--per-device-train-batch-size", "4")
    status, one = forked.run(f"{ALONE}({command(llama, labelled, tmp_path / 'one', *options, *batches)!r}))", tmp_path)
    assert status == 0, one
    batches = ("--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2")
    status, two, other = on_two(forked, tmp_path, command(llama, labelled, tmp_path / "two", *options, *batches))
    assert status == 0, two + other
    losses = [[float(found) for found in re.findall(r"'loss': '([\d.]+)'", text)] for text in (one, two)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=2e-3)
    over = [float(re.findall(r"^loss ([\d.]+) over 3 steps", text, re.M)[0]) for text in (one, two)]
    assert over[1] == pytest.approx(over[0], abs=2e-4)
    assert one.splitlines()[-1].startswith("held out: 5 lines, loss")
    assert two.splitlines()[-1] == one.splitlines()[-1]


def test_held_out_loss_is_that_of_one(llama, tmp_path, forked):  # noqa: F811
    """Lines of many tokens and of few, whose number is not a multiple of the workers': the mean over lines, each line once."""
    lines = write_lines(tmp_path / "uneven.jsonl", [{"text": "fox " * (1 + 5 * (k % 4))} for k in range(12)])
    options = ("--max-steps", "1", "--r", "2", "--eval-split", "0.25", "--per-device-train-batch-size", "1")
    status, said, other = on_two(forked, tmp_path, command(llama, lines, tmp_path / "out", *options), SAY_THE_HELD_OUT)
    assert status == 0, said + other
    found, expected = (line for line in said.splitlines() if line.startswith("held out: 3 lines, loss"))
    assert found == expected


@pytest.mark.full
def test_twice_in_one_process(llama, texts, tmp_path, forked):  # noqa: F811
    argv = command(llama, texts, tmp_path / "out", "--max-steps", "1", "--r", "2", "--ddp_timeout", "20")
    status, said, other = on_two(forked, tmp_path, argv, TWICE)
    assert status == 0 and said.count("adapter in") == 2, said + other


def test_workers_that_cannot_meet_are_told(llama, texts, tmp_path, forked):  # noqa: F811
    argv = command(llama, texts, tmp_path / "out", "--ddp_backend", "nccl")
    status, said, other = on_two(forked, tmp_path, argv)
    assert status == 2, said + other
    assert said.startswith("error: the workers cannot begin together: ") and "nccl" in said
    assert len(said.splitlines()) == len(other.splitlines()) == 1


# transformers 5.17 loads the optimiser's state onto "cpu:0", which torch.load does not know; on GPUs it finds its device.
@pytest.mark.skipif(
    "map_location = self.args.device if" in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers does not resume on several CPUs",
)
@pytest.mark.parametrize("method", ["lora", "spiel", pytest.param("mezo", marks=pytest.mark.full)])
def test_resumed_is_as_never_stopped(llama, texts, tmp_path, capsys, forked, method):  # noqa: F811
    """Each worker finds its own random numbers again: masks of dropout are drawn from other streams on each."""
    options = ["--method", method, *METHODS[method], *steps(2), "--save-steps", "2"]
    options += {
        "lora": ("--lora-dropout", "0.2"),
        "spiel": ("--reselection-steps", "2", "--selection-accumulation-steps", "1"),
        "mezo": ("--lora-dropout", "0.2"),
    }[method]
    argv = command(llama, texts, tmp_path / "through", *options)
    status, said, other = on_two(forked, tmp_path, argv, APART + KEEP)
    assert status == 0, said + other
    out = tmp_path / "kept"
    argv = command(llama, texts, out, *options)
    marker = checkpoint.marker(out)
    assert marker["step"] == 2 and {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= marker["files"].keys()
    assert main([*argv, "--resume"]) == 2
    assert "a training with 2 workers, not 1" in error_line(capsys)
    status, said, other = on_two(forked, tmp_path, [*argv, "--resume"], APART)
    assert status == 0 and "resumed from step 2" in said, said + other
    assert same(adapter(out), adapter(tmp_path / "through"))


def test_workers_that_differ_are_told(llama, texts, tmp_path, forked):  # noqa: F811
    """IST chooses layers by each worker's own losses."""
    argv = command(llama, texts, tmp_path / "out", *steps(2), "--method", "ist", "--save-steps", "2")
    status, said, other = on_two(forked, tmp_path, argv)
    assert status == 2
    assert "error: --method ist: step 2: expected the same weights on all workers, got others in" in said
    assert "error on worker 1: --method ist" in other
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_by_torchrun(llama, texts, tmp_path):  # noqa: F811
    options = ["--lora_r" if one == "--r" else one for one in steps(2)]
    argv = command(llama, texts, tmp_path / "out", *options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peftfast"]
    done = subprocess.run(
        [*launch, *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter in") == 1 and (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("option", ["--fsdp", "--deepspeed"])
def test_engines_that_shard_are_refused(llama, texts, tmp_path, capsys, option):  # noqa: F811
    assert main(command(llama, texts, tmp_path / "out", option, "full_shard")) == 2
    assert f"{option}: each worker keeps the whole model" in error_line(capsys)


def test_engines_of_accelerate_launch_are_refused(llama, texts, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(command(llama, texts, tmp_path / "out")) == 2
    assert "ACCELERATE_USE_FSDP: each worker keeps the whole model" in error_line(capsys)


def told(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    for name in workers.TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_each_worker_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    told(monkeypatch, WORLD_SIZE=8, RANK=6, LOCAL_RANK=2)
    assert (workers.count(), workers.number(), workers.first()) == (8, 6, False)
    assert workers.device("cuda") == "cuda:2" and workers.device("cpu") == "cpu"
    told(monkeypatch, WORLD_SIZE=1, RANK=0, LOCAL_RANK=0)  # accelerate compares: cuda alone would be another device
    assert workers.count() == 1 and workers.device("cuda") == "cuda:0"
    told(monkeypatch, WORLD_SIZE=8, RANK=5, LOCAL_RANK=5)
    with pytest.raises(UserError, match="worker 6 of this machine has no GPU, torch finds 4"):
        workers.device("cuda")


def test_alone_without_a_launcher(monkeypatch):
    """Schedulers leave a WORLD_SIZE in the surroundings of a process that nobody meets."""
    told(monkeypatch, WORLD_SIZE=8)
    assert (workers.count(), workers.number(), workers.first(), workers.device("cuda")) == (1, 0, True, "cuda")
    with workers.together("cpu", {}):  # accelerate would look for the seven others
        assert "WORLD_SIZE" not in os.environ
    assert os.environ["WORLD_SIZE"] == "8"
