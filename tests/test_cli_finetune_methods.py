"""``finetune --method spiel`` and ``mezo``: what they write, that they learn, that a resumed run has the bits of one that was never
stopped, and the options that are refused."""

import argparse
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftfast.__main__ import main
from peftfast.cli import checkpoint, finetune, finetune_mezo, finetune_spiel
from peftfast.cli.errors import UserError
from peftfast.optim import MeZO, replay
from peftfast.optim.seed_log import MAGIC, read
from tests.test_cli_finetune import (  # noqa: F401
    command,
    environment,
    error_line,
    labelled,
    llama,
    texts,
)
from tests.test_cli_finetune_resume import adapter, same, stopped_at

# Accumulation over batches of unequal numbers of tokens, a schedule, and moves of the support before and after the stop.
COMMON = (
    "--max-steps",
    "9",
    "--save-steps",
    "3",
    "--r",
    "2",
    "--gradient-accumulation-steps",
    "2",
    "--warmup-steps",
    "2",
)
COMMON += ("--per-device-train-batch-size", "2", "--lr-scheduler-type", "linear")
SPIEL = (
    "--method",
    "spiel",
    "--learning-rate",
    "1e-2",
    "--reselection-steps",
    "5",
    "--selection-accumulation-steps",
    "3",
)
MEZO = ("--method", "mezo", "--learning-rate", "1e-3", "--lora-dropout", "0.1", "--zo-directions", "2")


def loaded(base: Path, directory: Path, auto: str = "AutoModelForCausalLM", **settings):
    import transformers
    from peft import PeftModel

    return PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(str(base), **settings), str(directory))


# Resume


@pytest.mark.parametrize(
    ("options", "steps"),
    [(SPIEL, (3, 6)), ((*SPIEL, "--load_in_4bit"), (6,)), (MEZO, (3,))],
    ids=["spiel", "spiel 4-bit", "mezo"],
)
def test_resumed_is_as_never_stopped(llama, texts, tmp_path, monkeypatch, capsys, full, options, steps):  # noqa: F811
    """Stopped among the steps that choose the next support; with --full where it has just moved, too."""
    through = tmp_path / "through"
    assert main(command(llama, texts, through, *COMMON, *options)) == 0
    for step in steps if full else steps[-1:]:
        out = tmp_path / f"stopped at {step}"
        argv = command(llama, texts, out, *COMMON, *options)
        stopped_at(step, monkeypatch, argv)
        assert checkpoint.marker(out)["step"] == step
        assert not same(adapter(out), adapter(through))
        capsys.readouterr()
        assert main([*argv, "--resume"]) == 0
        assert f"resumed from step {step}" in capsys.readouterr().out
        assert same(adapter(out), adapter(through))
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in through.iterdir())
        if options is MEZO:
            assert (out / finetune_mezo.SEEDS).read_bytes() == (through / finetune_mezo.SEEDS).read_bytes()


def test_a_checkpoint_holds_the_state_of_the_method(llama, texts, tmp_path, monkeypatch):  # noqa: F811
    """Beside what the Trainer keeps; and no dense weight of the base."""
    for options, name in ((SPIEL, finetune_spiel.STATE), (MEZO, finetune_mezo.SEEDS)):
        out = tmp_path / name
        stopped_at(3, monkeypatch, command(llama, texts, out, *COMMON, *options))
        kept = {path.name for path in (out / checkpoint.FOLDER).iterdir()}
        assert {name, "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= kept
        assert "model.safetensors" not in kept
        state = torch.load(out / checkpoint.FOLDER / "optimizer.pt", weights_only=True)
        assert state["mezo"]["steps"] == 3 if options is MEZO else state["state"]


# SpIEL


def test_spiel_gives_a_shira_adapter_that_moved(llama, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert main(command(llama, texts, out, *COMMON, *SPIEL, "--eval-split", "0.25", "--max-steps", "15")) == 0
    said = capsys.readouterr().out
    assert "14 sparse layers" in said and "held out: 6 lines" in said
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", finetune.PLOT}
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("SHIRA", 2, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(llama)

    # The support is no longer the random one that the run began with, which is drawn by the seed.
    begun = tmp_path / "begun"
    assert main(command(llama, texts, begun, *COMMON, *SPIEL, "--max-steps", "1", "--learning-rate", "1e-9")) == 0
    supports = [{k: v for k, v in adapter(d).items() if k.endswith("shira_indices")} for d in (begun, out)]
    kept = sum(
        torch.isin(_flat(supports[1][key]), _flat(supports[0][key])).sum().item() / supports[0][key].shape[1]
        for key in supports[0]
    ) / len(supports[0])
    assert kept < 0.5, kept

    # Stock PEFT computes what was trained here: base weights with the deltas added.
    model = loaded(llama, out).eval()
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        got = model(tokens).logits
        for name, delta in adapter(out).items():
            if name.endswith("shira_weight"):
                layer = model.get_submodule(name.removesuffix(".shira_weight"))
                rows, columns = adapter(out)[name.replace("shira_weight", "shira_indices")].long()
                layer.base_layer.weight[rows, columns] += delta
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, got, rtol=1e-5, atol=1e-6)


def _flat(indices: torch.Tensor) -> torch.Tensor:
    return indices[0].long() * 100_000 + indices[1].long()


def test_spiel_learns(llama, texts, tmp_path, capsys):  # noqa: F811
    argv = command(llama, texts, tmp_path / "out", "--method", "spiel", "--r", "4", "--learning-rate", "1e-2")
    assert main([*argv, "--max-steps", "30", "--logging-steps", "1", "--reselection-steps", "10"]) == 0
    losses = _losses(capsys.readouterr().out)
    assert losses[-1] < losses[0] - 0.8, losses


def _losses(said: str) -> list[float]:
    import ast

    rows = [ast.literal_eval(line) for line in said.splitlines() if line.startswith("{'loss'")]
    return [float(row["loss"]) for row in rows]


@pytest.mark.parametrize("more", [(), ("--load_in_4bit", "--dtype", "bfloat16")], ids=["dense", "4-bit bf16"])
def test_spiel_classifies_and_peft_loads_the_head(llama, labelled, tmp_path, capsys, more):  # noqa: F811
    out = tmp_path / "out"
    argv = command(
        llama, labelled, out, "--method", "spiel", "--r", "4", "--max-steps", "25", "--learning-rate", "1e-2"
    )
    assert main([*argv, "--eval-split", "0.25", "--per_device_train_batch_size", "4", *more]) == 0
    assert "accuracy 100.0 %" in capsys.readouterr().out
    saved = adapter(out)
    assert saved["base_model.model.score.weight"].dtype == torch.float32
    model = loaded(llama, out, "AutoModelForSequenceClassification", num_labels=2, dtype=torch.float32)
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, saved["base_model.model.score.weight"])


def test_a_spiel_adapter_merges(llama, texts, tmp_path, capsys):  # noqa: F811
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert main(command(llama, texts, out, *COMMON, *SPIEL)) == 0
    assert main(["merge", "--adapter", str(out), "--out", str(merged), "--dtype", "float32", "--device", "cpu"]) == 0
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = loaded(llama, out).eval()(tokens).logits
        got = AutoModelForCausalLM.from_pretrained(str(merged)).eval()(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# MeZO


def test_mezo_gives_a_lora_adapter_and_its_seeds_give_it_again(llama, texts, tmp_path, monkeypatch):  # noqa: F811
    """The log that the run leaves, over a stop and a resume, replayed on the adapter that it began with."""
    out = tmp_path / "out"
    argv = command(llama, texts, out, *COMMON, *MEZO)
    begun = {}
    adapt = finetune_mezo.MeZOMethod.adapt

    def adapt_and_keep(self, *args):
        model = adapt(self, *args)
        begun.setdefault("state", {name: p.detach().clone() for name, p in model.named_parameters()})
        begun["model"] = model
        return model

    monkeypatch.setattr(finetune_mezo.MeZOMethod, "adapt", adapt_and_keep)
    stopped_at(6, monkeypatch, argv)
    assert main([*argv, "--resume"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        finetune.PLOT,
        finetune_mezo.SEEDS,
    }
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = begun["model"]
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(final[name], begun["state"][name]) for name in final if name not in trained)
    assert any(not torch.equal(final[name], begun["state"][name]) for name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(begun["state"][name])
    assert replay(out / finetune_mezo.SEEDS, model) == 9
    assert all(torch.equal(p, final[name]) for name, p in model.named_parameters())
    loaded(llama, out)


def test_mezo_runs_no_backward_and_learns(llama, labelled, tmp_path, capsys, monkeypatch):  # noqa: F811
    def backward(*args, **kwargs):
        raise AssertionError("a backward ran")

    monkeypatch.setattr(torch.autograd, "backward", backward)
    argv = command(
        llama, labelled, tmp_path / "out", "--method", "mezo", "--learning-rate", "1e-2", "--logging-steps", "1"
    )
    assert main([*argv, "--max-steps", "30", "--zo-eps", "1e-2", "--zo-directions", "4", "--zo_clip", "5"]) == 0
    losses = _losses(capsys.readouterr().out)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0], losses


def test_a_mezo_step_is_the_one_of_the_whole_batch(llama, texts, tmp_path):  # noqa: F811
    """Micro-batches of unequal numbers of tokens: as in the Trainer, the loss is of all tokens, not the mean of the micro-batches'."""
    rows = [{"text": "the quick fox " * (1 + 3 * (k % 4))} for k in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = []
    for size, accumulation in ((4, 1), (1, 4)):
        out = tmp_path / str(size)
        argv = command(llama, tmp_path / "rows.jsonl", out, "--method", "mezo", "--max-steps", "2", "--r", "2")
        argv += ["--learning-rate", "1e-2", "--zo-eps", "1e-1", "--per-device-train-batch-size", str(size)]
        assert main([*argv, "--gradient-accumulation-steps", str(accumulation)]) == 0
        saved.append(adapter(out))
    one, parts = saved
    moved = max(value.abs().max() for name, value in one.items() if "lora_B" in name)
    gap = max((one[name] - parts[name]).abs().max() for name in one)
    assert moved > 1e-4 and gap < 1e-3 * moved, (moved, gap)


def test_a_loss_that_is_not_finite_is_one_line(llama, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    argv = command(
        llama, texts, out, "--method", "mezo", "--max-steps", "6", "--save-steps", "1", "--learning-rate", "1e30"
    )
    assert main(argv) == 2
    line = error_line(capsys)
    assert "finite" in line and "--learning_rate" in line


# Options


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--zo-eps", "1e-3"), ["--zo_eps", "mezo", "not of lora"]),
        (("--method", "mezo", "--zo-eps", "0"), ["--zo-eps", "expected a number above 0, got '0'"]),
        (("--method", "spiel", "--lora-alpha", "3"), ["--lora_alpha", "not of spiel"]),
        (("--method", "spiel", "--use-rslora"), ["--use_rslora", "not of spiel"]),
        (("--method", "mezo", "--gradient-checkpointing"), ["--gradient_checkpointing", "no backward"]),
        (("--method", "mezo", "--max-grad-norm", "1"), ["--max_grad_norm", "--zo_clip"]),
        (("--method", "mezo", "--optim", "sgd"), ["--optim", "not with --method mezo"]),
        (("--method", "spiel", "--optim", "sgd"), ["--optim", "not with --method spiel"]),
        (("--method", "spiel", "--optim-args", "a=1"), ["--optim_args", "not with --method spiel"]),
        (("--method", "spiel", "--r", "60"), ["r = 60", "smaller --r"]),
        (("--method", "spiel", "--reselection-steps", "5"), ["--selection_accumulation_steps", "fewer", "got 5"]),
    ],
)
def test_options_that_do_not_go_together(llama, texts, tmp_path, capsys, more, said):  # noqa: F811
    assert main(command(llama, texts, tmp_path / "out", "--max-steps", "1", *more)) == 2
    line = error_line(capsys)
    for fragment in said:
        assert fragment in line, line
    assert not (tmp_path / "out").exists()


def _mezo(folder: Path) -> tuple[finetune_mezo.MeZOMethod, MeZO]:
    method = finetune_mezo.MeZOMethod()
    method._given = argparse.Namespace(zo_eps=0.25, zo_directions=3, zo_clip=5.0)
    method.begin(folder, None)
    args = SimpleNamespace(learning_rate=0.5, weight_decay=0.125, seed=7)
    return method, method.make_optimizer(_net(), args)


def test_mezo_is_given_the_options(tmp_path: Path) -> None:
    _, optimizer = _mezo(tmp_path)
    header, _ = read(tmp_path / finetune_mezo.SEEDS)
    assert (optimizer.eps, optimizer.directions, optimizer.clip) == (0.25, 3, 5.0)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.5, 0.125)}
    assert header["directions"] == 3 and optimizer._step_seeds(0)[0] == 7


@pytest.mark.parametrize("end", ["save_state", "finish"])
def test_a_last_loss_that_is_not_finite_is_no_result(end: str, tmp_path: Path) -> None:
    """It would be named at the next step, which does not come."""
    method, optimizer = _mezo(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    optimizer.step(lambda: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="finite"):
        getattr(method, end)(out)
    assert not list(out.iterdir())


# The log of a run that is resumed


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))


def _groups(net: torch.nn.Module) -> list[dict]:
    named = list(net.named_parameters())
    return [{"params": named[:2], "lr": 1e-2}, {"params": named[2:], "lr": 2e-2}]


def _steps(optimizer: MeZO, net: torch.nn.Module, count: int) -> None:
    x = torch.arange(8.0).reshape(2, 4)
    for _ in range(count):
        optimizer.param_groups[1]["lr"] *= 0.5  # a record of its own in the log
        optimizer.step(lambda: net(x).square().mean())
    optimizer.check()


def test_a_resumed_log_cuts_off_what_came_after_the_state(tmp_path):
    net, path = _net(), tmp_path / "log"
    optimizer = MeZO(_groups(net), eps=1e-2, seed=3, directions=2, log=path)
    _steps(optimizer, net, 3)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    upto = path.read_bytes()
    _steps(optimizer, net, 2)
    through = path.read_bytes()
    assert len(through) == len(upto) + 2 * 3 * 16

    def resumed(written: bytes, taken: dict | None = None) -> MeZO:
        path.write_bytes(written)
        net.load_state_dict(weights)
        again = MeZO(_groups(net), eps=1e-2, seed=8, directions=2)
        again.load_state_dict(state if taken is None else taken)
        again.resume_log(path)
        return again

    for written in (upto, through, through[:-7], upto + through[len(upto) : len(upto) + 5]):
        again = resumed(written)
        assert path.read_bytes() == upto
        _steps(again, net, 2)
        assert path.read_bytes() == through
    base = _net()
    assert replay(path, base) == 5
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), net.parameters(), strict=True))
    with pytest.raises(ValueError, match="1 steps are missing"):
        resumed(upto[:-1])
    other = MeZO(_groups(_net()), eps=1e-2, seed=4, directions=2)
    with pytest.raises(ValueError, match="of another run: its seed"):
        other.resume_log(path)
    with pytest.raises(ValueError, match="of another run: its eps"):
        MeZO(_groups(_net()), eps=1e-1, seed=3, directions=2).resume_log(path)
    header, _ = read(path)
    (size,) = struct.unpack("<q", path.read_bytes()[len(MAGIC) : len(MAGIC) + 8])
    assert header["steps"] == 0 and size > 0
