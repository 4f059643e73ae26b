"""What finetune learns from: texts, conversations, prompts with completions; its passed-on flags; models by their name on the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peftfast.__main__ import main
from peftfast.cli import UserError, finetune, models, records
from peftfast.cli.texts import IGNORED, Encoder
from tests.support.forked import forking
from tests.test_cli_finetune import (  # noqa: F401
    ROOT,
    command,
    environment,
    error_line,
    llama,
    save_tokenizer,
    texts,
    write_lines,
)

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    loaded = AutoTokenizer.from_pretrained(str(directory))
    loaded.pad_token = loaded.eos_token
    loaded.chat_template = TEMPLATE
    return loaded


def data(tmp_path: Path, *rows: dict) -> records.Records:
    return records.read(write_lines(tmp_path / "data.jsonl", list(rows)))


def encoded(tokenizer, found: records.Records, max_length: int = 200, **options: bool) -> list[dict]:
    options = {"completion_only": True, "assistant_only": False} | options
    return Encoder(tokenizer, found, max_length, **options).encode(range(len(found.rows))).rows


def said(tokenizer, ids: list[int]) -> str:
    """The text without its spaces, which this byte-level tokenizer does not put back."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u0120", "")


def learnt(tokenizer, row: dict) -> str:
    return said(tokenizer, [token for token in row["labels"] if token != IGNORED])


QUESTION = {"role": "user", "content": "the quick fox?"}
ANSWER = {"role": "assistant", "content": "the lazy dog"}


def test_a_text_is_learnt_whole_and_ended(tokenizer, tmp_path):
    (row,) = encoded(tokenizer, data(tmp_path, {"text": "the quick fox"}))
    assert row["labels"] == row["input_ids"] and learnt(tokenizer, row) == "thequickfox</s>"


def test_a_completion_is_learnt_alone_or_with_its_prompt(tokenizer, tmp_path):
    found = data(tmp_path, {"prompt": "the quick ", "completion": "fox"})
    (row,) = encoded(tokenizer, found)
    assert said(tokenizer, row["input_ids"]) == "thequickfox</s>" and learnt(tokenizer, row) == "fox</s>"
    (row,) = encoded(tokenizer, found, completion_only=False)
    assert learnt(tokenizer, row) == "thequickfox</s>"


def test_a_conversation(tokenizer, tmp_path):
    found = data(tmp_path, {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})
    (row,) = encoded(tokenizer, found)
    text = "<s>user:thequickfox?<s>assistant:thelazydog</s>" * 2
    assert said(tokenizer, row["input_ids"]) == text and row["labels"] == row["input_ids"]
    (row,) = encoded(tokenizer, found, assistant_only=True)
    assert said(tokenizer, row["input_ids"]) == text
    assert learnt(tokenizer, row) == "thelazydog</s>" * 2


def test_a_prompt_of_messages(tokenizer, tmp_path):
    (row,) = encoded(tokenizer, data(tmp_path, {"prompt": [QUESTION], "completion": [ANSWER]}))
    assert learnt(tokenizer, row) == "thelazydog</s>"


def test_trl_learns_from_the_same_tokens(tokenizer, tmp_path):
    """The same file through TRL's SFTTrainer: the same ids and the same labels."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    files: dict[str, tuple[dict, dict]] = {
        "text": ({"text": "the quick fox"}, {}),
        "completion": ({"prompt": "the quick ", "completion": "fox"}, {}),
        "whole": ({"prompt": "the quick ", "completion": "fox"}, {"completion_only_loss": False}),
        "messages": ({"messages": [QUESTION, ANSWER]}, {}),
        "assistant": ({"messages": [QUESTION, ANSWER]}, {"assistant_only_loss": True}),
        "prompt of messages": ({"prompt": [QUESTION], "completion": [ANSWER]}, {}),
    }
    for name, (row, options) in files.items():
        ours = Encoder(
            tokenizer,
            data(tmp_path, row),
            200,
            completion_only=options.get("completion_only_loss", True),
            assistant_only=options.get("assistant_only_loss", False),
        )
        settings = trl.SFTConfig(
            output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, max_length=200, **options
        )
        trainer = trl.SFTTrainer(
            LlamaForCausalLM(config),
            settings,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        theirs = next(iter(trainer.get_train_dataloader()))
        batch = ours.collate(ours.encode([0]).rows)
        assert batch["input_ids"].tolist() == theirs["input_ids"].tolist(), name
        assert batch["labels"].tolist() == theirs["labels"].tolist(), name


@pytest.mark.parametrize(
    ("rows", "options", "template", "error"),
    [
        ([{"messages": [QUESTION]}], {"assistant_only": True}, UNMARKED, "marks nothing as generated"),
        ([{"messages": [QUESTION]}], {}, None, "no chat template"),
        ([{"prompt": [QUESTION], "completion": [ANSWER]}], {}, None, "no chat template"),
        ([{"messages": [QUESTION]}], {}, "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            [{"prompt": "the quick fox jumps", "completion": "fox"}],
            {"max_length": 2},
            TEMPLATE,
            "nothing to learn from",
        ),
        (
            [{"prompt": [QUESTION], "completion": [ANSWER]}],
            {},
            "{{ 'abcdef' if messages[1:] else 'stuvwxyz' }}",
            "be told apart",
        ),
    ],
)
def test_what_cannot_be_encoded_is_named(rows, options, template, error, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=error):
        encoded(tokenizer, data(tmp_path, *rows), **options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, '"messages": expected a list'),
        ({"messages": [{"role": "user"}]}, '"messages": expected a list'),
        ({"prompt": "a"}, '"completion": it is missing'),
        ({"prompt": "a", "completion": [ANSWER]}, "two strings or two lists"),
        ({"prompt": "a", "completion": ""}, '"completion": expected a string'),
        ({"text": "a", "messages": [QUESTION]}, "messages, text on one line"),
    ],
)
def test_a_broken_line_is_named(row, said, tmp_path):
    with pytest.raises(UserError, match=said):
        data(tmp_path, row)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (r'{"text": "cut \ud83d"}', "text"),
        (r'{"text": "a", "label": "\udc00"}', "label"),
        (r'{"prompt": "a", "completion": "\udfff"}', "completion"),
        (r'{"messages": [{"role": "user", "content": "\ud800 b"}]}', "content"),
    ],
)
def test_half_a_character_is_named(line, key, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(r'{"text": "whole \ud83d\ude00"}' + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf'line 2: "{key}": expected Unicode text, got half of a character: \\ud'):
        records.read(path)


def test_kinds_do_not_mix(tmp_path):
    with pytest.raises(UserError, match="line 2: prompt, completion, but line 1 has text"):
        data(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "b"})


def test_dora_on_conversations(llama, tmp_path, capsys):  # noqa: F811
    """From the command line, with a template in a file and flags that only TrainingArguments knows."""
    rows = write_lines(tmp_path / "chat.jsonl", [{"messages": [QUESTION, ANSWER]}] * 8)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat_template_path", str(template), "--assistant_only_loss", "--method", "dora", "--max-steps", "2")
    passed_on = ("--optim", "sgd", "--dataloader-num-workers=0", "--adam_beta2", "0.9")
    out = tmp_path / "out"
    assert main(command(llama, rows, out, *options, *passed_on, "--use_rslora")) == 0
    assert "learnt from: the assistant's messages only" in capsys.readouterr().out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"]
    assert any("magnitude" in name for name in load_file(out / "adapter_model.safetensors"))
    assert (out / finetune.PLOT).read_bytes().startswith(b"\x89PNG")


def test_passed_on_flags_are_checked():
    assert finetune.training_arguments(["--optim", "sgd", "--adam-beta2=0.5"]) == {"optim": "sgd", "adam_beta2": 0.5}
    for flags, said in (
        (["--learning_rat", "1"], "unrecognized argument --learning_rat; did you mean --learning_rate"),
        (["--output_dir", "x"], "--output_dir: set by this command, by --out"),
        (["--adam_beta2", "x"], "adam"),
        (["--optim", "sgd", "stray"], "stray"),
    ):
        with pytest.raises(UserError, match=said):
            finetune.training_arguments(flags)


def test_passed_on_flags_are_refused_before_anything_is_written(llama, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert main(command(llama, texts, out, "--optim", "no-such-optimiser")) == 2
    assert "no-such-optimiser" in error_line(capsys)
    assert main(command(llama, texts, out, "--save_strategy", "no")) == 2
    assert "--save_strategy" in error_line(capsys)
    assert not out.exists()


@pytest.mark.slow
def test_a_model_by_its_name(llama, texts, tmp_path):  # noqa: F811
    """From the hub's cache, without a network; the adapter names the model and not the cache."""
    assert (
        models.is_hub_name("owner/name") and not models.is_hub_name(str(llama)) and not models.is_hub_name("tests/gone")
    )
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    variables = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    argv = command("owner/name", texts, tmp_path / "out", "--max-steps", "1")
    program = "import runpy, sys\nsys.argv = ['peftfast', *{}]\nrunpy.run_module('peftfast', run_name='__main__')"
    with forking("peft", "transformers.trainer", environment=os.environ | variables) as process:
        status, said = process.run(program.format(argv), tmp_path)
        assert status == 0, said
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "owner/name"
        status, said = process.run(program.format([*argv, "--model", "owner/other", "--overwrite"]), tmp_path)
        assert status == 2 and "owner/other is no directory here, and the hub does not give it" in said


@pytest.mark.slow
def test_names_of_classes_are_utf8_in_any_locale(llama, tmp_path):  # noqa: F811
    rows = [{"text": f"the fox {k}", "label": ("\u65e5\u672c", "\u00e9")[k % 2]} for k in range(4)]
    argv = command(llama, write_lines(tmp_path / "data.jsonl", rows), tmp_path / "out", "--max-steps", "1")
    variables = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    environ = os.environ | variables
    done = subprocess.run([sys.executable, "-m", "peftfast", *argv], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = (tmp_path / "out" / finetune.LABEL_NAMES).read_text(encoding="utf-8")
    assert json.loads(names) == ["\u00e9", "\u65e5\u672c"]


def test_a_loss_that_is_not_finite_leaves_no_adapter_of_it(llama, texts, tmp_path, capsys):  # noqa: F811
    argv = command(
        llama, texts, tmp_path / "out", "--max-steps", "3", "--learning_rate", "1e38", "--max_grad_norm", "0"
    )
    assert main([*argv, "--optim", "sgd"]) == 2
    assert "is not finite at step 3: lower --learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
