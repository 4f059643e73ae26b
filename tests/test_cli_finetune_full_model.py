"""``finetune --method mezo --full_model``: a model's directory, the seeds that give it again, resume, and what is refused. And the one
device that every method trains on."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftfast.__main__ import main
from peftfast.cli import checkpoint, finetune
from peftfast.optim import replay
from tests.test_cli_finetune import (  # noqa: F401
    command,
    environment,
    error_line,
    labelled,
    llama,
    texts,
)
from tests.test_cli_finetune_resume import stopped_at

FULL = ("--method", "mezo", "--full_model", "--learning-rate", "1e-3", "--max-steps", "6", "--save-steps", "2")
FULL += ("--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "2")


def weights(directory: Path, **settings) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(str(directory), **settings).state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_is_as_never_stopped_and_the_seeds_give_the_model(  # noqa: PLR0913
    llama,  # noqa: F811
    texts,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    dtype,
):
    given = {"dtype": getattr(torch, dtype)}
    through, out = tmp_path / "through", tmp_path / "out"
    assert main(command(llama, texts, through, *FULL, "--dtype", dtype, "--eval-split", "0.25")) == 0
    said = capsys.readouterr().out
    assert "full model, " in said and f"model in {through}" in said and "held out: 6 lines" in said
    argv = command(llama, texts, out, *FULL, "--dtype", dtype, "--eval-split", "0.25")
    stopped_at(4, monkeypatch, argv)
    assert checkpoint.marker(out)["step"] == 4
    assert main([*argv, "--resume"]) == 0
    names = {path.name for path in through.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert {"config.json", "model.safetensors", "tokenizer.json", checkpoint.SEEDS, finetune.PLOT} <= names
    assert "adapter_config.json" not in names and checkpoint.FOLDER not in names
    whole, resumed, base = (weights(directory, **given) for directory in (through, out, llama))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(not torch.equal(whole[name], base[name]) for name in whole if whole[name].dim() > 1)
    assert (out / checkpoint.SEEDS).read_bytes() == (through / checkpoint.SEEDS).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(str(llama), **given)
    assert replay(out / checkpoint.SEEDS, model) == 6
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(str(out)).vocab_size == AutoTokenizer.from_pretrained(str(llama)).vocab_size


def test_a_classifier_keeps_its_names(llama, labelled, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert main(command(llama, labelled, out, *FULL, "--max-steps", "2")) == 0
    model = AutoModelForSequenceClassification.from_pretrained(str(out))
    assert sorted(model.config.id2label.values()) == ["dates", "network"]
    assert json.loads((out / finetune.LABEL_NAMES).read_text()) == list(model.config.id2label.values())


def test_only_a_model_of_its_own_is_replaced(llama, texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, argv = tmp_path / "out", command(llama, texts, tmp_path / "out", *FULL, "--max-steps", "2")
    stopped_at(2, monkeypatch, argv)
    assert main(argv) == 2
    line = error_line(capsys)
    assert "holds a trained model already" in line and "--resume goes on" in line
    assert main([*argv, "--overwrite"]) == 0
    assert main([*argv, "--resume"]) == 2
    assert "is over" in error_line(capsys)
    assert main([*argv, "--overwrite"]) == 0
    before = (out / "model.safetensors").read_bytes()
    (out / checkpoint.SEEDS).unlink()  # now it is a model as any other
    capsys.readouterr()
    assert main([*argv, "--overwrite"]) == 2
    assert "holds files and no adapter" in error_line(capsys)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--full_model",), ["--full_model", "is of --method mezo", "not of lora"]),
        (("--method", "mezo", "--full-model", "--lora-alpha", "3"), ["--lora_alpha", "not of mezo with --full_model"]),
        (("--method", "mezo", "--full-model", "--r", "3"), ["--r", "every parameter"]),
        (("--method", "mezo", "--full-model", "--target-modules", "q_proj"), ["--target_modules", "every parameter"]),
        (("--method", "mezo", "--full-model", "--load-in-4bit"), ["--load_in_4bit", "cannot be moved"]),
    ],
)
def test_options_that_do_not_go_together(llama, texts, tmp_path, capsys, more, said):  # noqa: F811
    assert main(command(llama, texts, tmp_path / "out", "--max-steps", "1", *more)) == 2
    line = error_line(capsys)
    for fragment in said:
        assert fragment in line, line
    assert not (tmp_path / "out").exists()


# One device


def test_several_gpus_are_not_split_over(llama, texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As TrainingArguments count them where two GPUs are seen: the Trainer would wrap the model in DataParallel."""
    seen = []
    set_up = transformers.TrainingArguments.__post_init__

    def two(self):
        set_up(self)
        self._n_gpu = 2

    inner = transformers.Trainer._wrap_model

    def wrap(self, model, *args, **settings):
        seen.append(inner(self, model, *args, **settings))
        return seen[-1]

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", two)
    monkeypatch.setattr(transformers.Trainer, "_wrap_model", wrap)
    assert main(command(llama, texts, tmp_path / "out", "--max-steps", "1", "--r", "2")) == 0
    assert "one of 2 GPUs; CUDA_VISIBLE_DEVICES" in capsys.readouterr().out
    assert seen and not any(isinstance(model, torch.nn.DataParallel) for model in seen)


def test_another_gpu_than_the_first_is_chosen_by_the_environment(llama, texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    argv = command(llama, texts, tmp_path / "out")
    assert main([*argv[:-1], "cuda:1"]) == 2
    assert "CUDA_VISIBLE_DEVICES=1" in error_line(capsys) and not (tmp_path / "out").exists()
