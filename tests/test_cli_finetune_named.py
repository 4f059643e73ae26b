"""finetune --method NAME for the methods of peftfast.adapt: trained, written, resumed, and bad input."""

import json

import pytest
import torch
from safetensors.torch import load_file

import peftfast
from peftfast.__main__ import main
from peftfast.cli.finetune_named import _value
from tests.test_cli_finetune import command, environment, error_line, labelled, llama, texts  # noqa: F401
from tests.test_cli_finetune_resume import OPTIONS, stopped_at


def tensors(folder):  # type: ignore[no-untyped-def]
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora-xs", "pissa", "eva"])
def test_resumed_is_as_never_stopped(llama, texts, tmp_path, monkeypatch, capsys, method):  # noqa: F811
    """A core of its own files, an initialisation that changes the weight, one that reads data."""
    through, out = tmp_path / "through", tmp_path / "out"
    more = ("--method", method, "--r", "4", "--learning_rate", "1e-2")
    assert main(command(llama, texts, through, *OPTIONS, *more)) == 0
    assert f"{method}(r=4" in capsys.readouterr().out
    argv = command(llama, texts, out, *OPTIONS, *more)
    stopped_at(4, monkeypatch, argv)
    assert main([*argv, "--resume"]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    first, second = tensors(through), tensors(out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = base(input_ids=ids).logits
    after = peftfast.load_adapter(base, out)(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-4
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama) and config["task_type"] == "CAUSAL_LM"


def test_replay_goes_on_where_it_stopped(llama, texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    """I-LoRA's penalty runs the model inside the Trainer's step; its buffer, draws and slow adapter are in the checkpoint."""
    through, out = tmp_path / "through", tmp_path / "out"
    more = ("--method", "i-lora", "--r", "4", "--method-option", "task_steps=3", "--method-option", "on=hidden")
    assert main(command(llama, texts, through, *OPTIONS, *more)) == 0
    argv = command(llama, texts, out, *OPTIONS, *more)
    stopped_at(4, monkeypatch, argv)
    assert main([*argv, "--resume"]) == 0
    first, second = tensors(through), tensors(out)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], first[name.replace("slow", "lora")]) for name in first if "slow_B" in name)


def test_merged_into_the_base(llama, texts, tmp_path, capsys):  # noqa: F811
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    more = ("--method", "lora-xs", "--r", "8", "--learning_rate", "0.1", "--max-steps", "3")
    assert main(command(llama, texts, adapter, *more)) == 0
    assert main(["merge", "--adapter", str(adapter), "--out", str(out), "--dtype", "float32"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain = base(input_ids=ids).logits
    expected = peftfast.load_adapter(base, adapter)(input_ids=ids).logits
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    assert (expected - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_with_its_head(llama, labelled, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    argv = command(llama, labelled, out, "--method", "vera", "--max-steps", "2", "--method-option", "d_initial=0.2")
    assert main([*argv, "--r", "8"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "VERA" and config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    assert config["d_initial"] == 0.2 and "base_model.model.score.weight" in tensors(out)


def test_bad_input_is_one_line(llama, texts, tmp_path, capsys):  # noqa: F811
    def refused(*more: str) -> str:
        assert main(command(llama, texts, tmp_path / "out", *more)) == 2
        return error_line(capsys)

    assert "no option 'rank'; it has r, lora_alpha" in refused("--method", "pissa", "--method-option", "rank=3")
    assert "expected NAME=VALUE, got 'r'" in refused("--method", "pissa", "--method-option", "r")
    assert "r: expected an int of at least 1, got 0.5" in refused("--method", "pissa", "--method-option", "r=0.5")
    assert "vera has no option 'lora_alpha'" in refused("--method", "vera", "--lora-alpha", "3")
    assert "--method-option: lora has options of the command's own" in refused("--method-option", "r=3")
    assert "--optim: not with --method vera" in refused("--method", "vera", "--optim", "sgd")
    assert "--adam_beta2: expected a number of at least 0 and below 1" in refused(
        "--method", "vera", "--adam_beta2", "1.5"
    )
    assert "--adam_beta1: not with --method mezo" in refused("--method", "mezo", "--adam_beta1", "0.5")
    assert "no method 'lora-sx'; did you mean lora-xs" in refused("--method", "lora-sx")
    assert "rank 128 is more than its smaller side" in refused("--method", "pissa")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora-xs", "galore", "shira"])
def test_adams_numbers_reach_the_method_s_optimiser(llama, texts, tmp_path, method):  # noqa: F811
    """AdamW, one of the method's own, and SparseAdamW. Without betas and with a large epsilon the step is the gradient's, and tiny."""
    adam = ("--adam_beta1", "0", "--adam_beta2", "0", "--adam_epsilon", "1e6")
    given = {"lora-xs": ("r=4", "init_std=0"), "galore": ("rank=4",), "shira": ("r=4",)}[method]
    folders = tmp_path / "usual", tmp_path / "still"
    for out, more in zip(folders, ((), adam), strict=True):
        argv = command(llama, texts, out, "--method", method, "--max-steps", "1", "--learning_rate", "1e-2", *more)
        assert main([*argv, *(word for one in given for word in ("--method-option", one))]) == 0
    usual, still = map(tensors, folders)
    assert usual.keys() == still.keys()
    apart = max((usual[name].float() - still[name].float()).abs().max().item() for name in usual)
    assert apart > 5e-4  # Adam's first step is the rate itself, or GaLore's scale of it


def test_numbers_of_steps_are_held_against_the_run_s(llama, texts, tmp_path, capsys):  # noqa: F811
    def options(tinit: int, *more: str) -> list[str]:
        given = ("--method-option", f"tinit={tinit}", "--method-option", "tfinal=1")
        return command(llama, texts, tmp_path / "out", "--method", "adalora", *given, *more)

    assert main(options(2, "--max-steps", "3")) == 2
    assert "--method-option: tinit: expected less than total_steps - tfinal = 2, got 2" in error_line(capsys)
    assert main(options(1000, "--num_train_epochs", "1")) == 2  # the steps are counted once the records are read
    assert "--method-option: tinit: expected less than total_steps - tfinal = " in error_line(capsys)
    assert not (tmp_path / "out").exists()
    assert main(options(1, "--max-steps", "3")) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["tinit"], config["tfinal"], config["total_step"]) == (1, 1, 3)


def test_values_of_options() -> None:
    assert [_value(text) for text in ("3", "0.5", "true", "False", "none", "ipm", "1e-3")] == [
        3,
        0.5,
        True,
        False,
        None,
        "ipm",
        1e-3,
    ]
