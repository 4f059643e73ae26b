"""Fine-tuning from the command line: both tasks, both methods, what is written, bad input, and interruption."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftfast.__main__ import main
from peftfast.cli import UserError, demo, finetune, records
from tests.support.forked import Forked, Running, forking

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ("transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no signals to send, and no fork")
VOCABULARY = 300


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for its process is undone after each test."""
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def save_tokenizer(directory: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    lines = ["the quick brown fox", "jumps over the lazy dog"] * 10
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(directory))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama-shaped causal model of 0.1 M parameters with its tokenizer, which has no padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama")
    save_tokenizer(directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(directory))
    return directory


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_lines(tmp_path / "texts.jsonl", [{"text": f"the quick fox {k} jumps"} for k in range(24)])


@pytest.fixture
def labelled(tmp_path) -> Path:
    pairs = [("open a socket and connect", "network"), ("parse the date and time", "dates")]
    rows = [{"text": f"{text} number {k}", "label": label} for k in range(12) for text, label in pairs]
    return write_lines(tmp_path / "labelled.jsonl", rows)


def command(model: Path | str, data: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# What it makes


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_causal_model(llama, texts, tmp_path, capsys, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out" / "adapter"
    # Both spellings of an option, one of them given twice.
    options = (
        "--method",
        method,
        "--max_steps",
        "4",
        "--save-steps",
        "2",
        "--eval_split",
        "0.25",
        "--learning-rate",
        "1e-3",
    )
    assert main(command(llama, texts, out, *options, "--lora_alpha", "8", "--lora-alpha", "32")) == 0
    said = capsys.readouterr().out
    assert "14 adapter layers fused, 0 stock" in said
    assert "held out: 6 lines" in said

    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == {*adapter, finetune.PLOT}
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (16, 32, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(llama)
    saved = load_file(out / "adapter_model.safetensors")
    assert len(saved) == 28
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(llama)), str(out))
    with torch.no_grad():
        tokens = torch.tensor([[1, 5, 6, 7]])
        adapted = model(tokens).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(tokens).logits)


def test_the_seed_decides_the_adapter(llama, texts, tmp_path):
    saved = []
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        assert main(command(llama, texts, tmp_path / name, "--max-steps", "3", "--seed", seed)) == 0
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    one, again, other = saved
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_constant_rate_is_warmed_up_to(llama, texts, tmp_path):
    """transformers' own "constant" begins at the whole rate, whatever the warm-up: the first step of one begins at nothing."""
    out = tmp_path / "out"
    more = ("--max-steps", "1", "--lr_scheduler_type", "constant", "--learning-rate", "1e-2")
    assert main(command(llama, texts, out, *more, "--warmup_steps", "4")) == 0
    tensors = load_file(out / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert main(command(llama, texts, out, *more, "--overwrite")) == 0
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_classifier_on_real_weights(labelled, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    directory, out = demo.model_directory(), tmp_path / "adapter"
    options = ("--method", "qlora", "--max_steps", "6", "--eval-split", "0.25", "--learning_rate", "2e-3", "--r", "4")
    assert main(command(directory, labelled, out, *options)) == 0
    assert "held out: 6 lines" in capsys.readouterr().out
    assert json.loads((out / finetune.LABEL_NAMES).read_text()) == ["dates", "network"]
    saved = load_file(out / "adapter_model.safetensors")
    # 36 linear layers of the encoder and its pooler, and the head.
    assert sum("lora_A" in name for name in saved) == 37
    assert saved["base_model.model.classifier.weight"].shape == (2, 384)
    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    model = PeftModel.from_pretrained(base, str(out))
    assert torch.equal(
        model.base_model.model.classifier.modules_to_save["default"].weight, saved["base_model.model.classifier.weight"]
    )


def test_a_causal_model_classifies(llama, labelled, tmp_path, capsys):
    """The head of a Llama reads the last word, so it must know the padding, which its tokenizer does not name."""
    out = tmp_path / "adapter"
    options = (
        "--target-modules",
        "q_proj",
        "v_proj",
        "--max-steps",
        "2",
        "--gradient-checkpointing",
        "--method",
        "qlora",
    )
    assert main(command(llama, labelled, out, *options)) == 0
    assert "4 adapter layers fused, 0 stock" in capsys.readouterr().out
    saved = load_file(out / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in saved) == 4
    assert "base_model.model.score.weight" in saved


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_new_pooler_is_saved_whole(labelled, tmp_path, method):
    """A checkpoint without a pooler gets a random one at every load: an adapter of it would be worth nothing."""
    from transformers import BertConfig, BertModel

    directory, out = tmp_path / "bert", tmp_path / "adapter"
    save_tokenizer(directory, unk_token="<unk>", pad_token="<unk>")
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(str(directory))
    assert main(command(directory, labelled, out, "--max-steps", "2", "--method", method)) == 0
    saved = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.bert.pooler.dense.weight" in saved
    assert not any("lora" in name for name in saved if "pooler" in name)
    assert sum("lora_A" in name for name in saved) == 6


def test_an_adapter_is_replaced_only_when_asked(llama, texts, labelled, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert main(command(llama, labelled, out, "--max-steps", "1")) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(command(llama, texts, out, "--max-steps", "1")) == 2
    line = error_line(capsys)
    assert str(out) in line and "--overwrite" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(command(llama, texts, out, "--max-steps", "1", "--overwrite")) == 0
    assert not (out / finetune.LABEL_NAMES).exists()


# Interruption


# The command as it starts in a process of its own. A suite that was started in the background hands down a SIGINT that is ignored.
BEGUN = """
import os, runpy, signal, sys, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ |= {"TMPDIR": FOLDER, "OMP_NUM_THREADS": "1"}
tempfile.tempdir = None
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.argv = ["peftfast", *ARGUMENTS]
runpy.run_module("peftfast", run_name="__main__")
"""


@pytest.fixture(scope="module")
def trainings() -> Iterator[Forked]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with forking("peft", "transformers.trainer", *LLAMA, environment=environment) as process:
        yield process


def start(trainings: Forked, folder: Path, model: Path, data: Path, out: Path) -> Running:
    """A training without end that saves at every step, after its first save; what it says it writes into ``folder``."""
    endless = command(model, data, out, "--max-steps", "1000000", "--save-steps", "1", "--logging-steps", "1000000")
    given = f"FOLDER, ARGUMENTS = {str(data.parent)!r}, {endless!r}\n"
    running = trainings.start(given + BEGUN, folder)
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:
        assert Path("/proc", str(running.process)).exists() or sys.platform != "linux", running.wait()[1]
        time.sleep(0.05)
    time.sleep(0.3)
    return running


def whole(adapter: Path) -> None:
    json.loads((adapter / "adapter_config.json").read_text())
    assert len(load_file(adapter / "adapter_model.safetensors")) == 28


@needs_fork
def test_a_kill_leaves_the_last_adapter_whole(trainings, llama, texts, tmp_path, tmp_path_factory):
    out = tmp_path / "adapter"
    running = start(trainings, tmp_path_factory.mktemp("said"), llama, texts, out)
    os.kill(running.process, signal.SIGKILL)
    status, said = running.wait()
    assert status == -signal.SIGKILL, said
    whole(out)


@needs_fork
@pytest.mark.parametrize(
    ("sent", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_the_last_adapter_whole_and_says_where(
    trainings, llama, texts, tmp_path, tmp_path_factory, sent, status, word
):
    """Ctrl+C, and what a batch system sends: nothing is left beside the adapter, nor in the folder for temporary files."""
    out = tmp_path / "adapter"
    running = start(trainings, tmp_path_factory.mktemp("said"), llama, texts, out)
    os.kill(running.process, sent)
    ended, said = running.wait()
    assert ended == status, said
    assert said.splitlines()[-1] == word
    assert str(out) in said and "Traceback" not in said
    whole(out)
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor"))
    assert left == ["adapter", "texts.jsonl"]


# Bad input


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', '{"text": '], ["line 2", "not JSON", '{"text": "..."']),
        (['{"text": "a"}', "", "[1]"], ["line 3", "got [1]"]),
        (['{"label": 1}'], ["line 1", '"text"', "missing"]),
        (['{"text": 3}'], ["line 1", '"text"', "got 3"]),
        (['{"text": "  "}'], ["line 1", "not empty"]),
        (['{"text": "a", "lable": 1}'], ["line 1", "unknown key 'lable'"]),
        (['{"text": "a", "label": 0.5}'], ["line 1", '"label"', "0.5"]),
        (['{"text": "a", "label": true}'], ["line 1", '"label"', "true"]),
        (['{"text": "a", "label": null}'], ["line 1", '"label"', "null"]),
        (['{"text": "a", "label": 1}', '{"text": "b"}'], ["line 2", "no label", "line 1"]),
        (['{"text": "a"}', '{"text": "b", "label": 1}'], ["line 2", "a label", "line 1"]),
        (['{"text": "a", "label": 1}', '{"text": "b", "label": "1"}'], ["line 2", "'1'", "line 1"]),
        (['{"text": "a", "label": 1}', '{"text": "b", "label": 1}'], ["at least two classes"]),
        (["[" * 100_000], ["line 1", "not JSON"]),
        ([""], ["empty"]),
    ],
)
def test_a_broken_data_file_is_named(tmp_path, lines, said):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        records.read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for fragment in said:
        assert fragment in message


def test_a_data_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="data.jsonl is not UTF-8"):
        records.read(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        records.read(tmp_path)


def test_labels_keep_their_order(tmp_path):
    numbers = [{"text": "a", "label": label} for label in (10, 2, 10, -1)]
    read = records.read(write_lines(tmp_path / "numbers.jsonl", numbers))
    assert read.names == (-1, 2, 10)
    assert read.class_indices() == [2, 1, 2, 0]


def test_the_split_is_by_seed_and_never_empty():
    assert records.split(10, 0.0, 0) == (list(range(10)), [])
    learn, held_out = records.split(10, 0.3, 0)
    assert len(held_out) == 3 and sorted(learn + held_out) == list(range(10))
    assert records.split(10, 0.3, 0) == (learn, held_out)
    assert len(records.split(3, 0.01, 0)[1]) == 1
    assert len(records.split(2, 0.99, 0)[0]) == 1
    with pytest.raises(UserError, match="--eval-split"):
        records.split(1, 0.5, 0)


def case_model_missing(llama, tmp_path):
    return {"model": tmp_path / "nowhere"}, ["--model", str(tmp_path / "nowhere"), "does not exist"]


def case_model_is_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("")
    return {"model": tmp_path / "file"}, ["--model", "is not a directory"]


def case_no_config(llama, tmp_path):
    (tmp_path / "hollow").mkdir()
    return {"model": tmp_path / "hollow"}, ["--model", str(tmp_path / "hollow"), "config.json"]


def copied(llama: Path, tmp_path: Path, *, without: tuple[str, ...] = ()) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in llama.iterdir():
        if path.name not in without:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def case_broken_config(llama, tmp_path):
    model = copied(llama, tmp_path)
    (model / "config.json").write_text("{")
    return {"model": model}, ["--model", "no usable config", str(model)]


def case_unknown_architecture(llama, tmp_path):
    model = copied(llama, tmp_path)
    (model / "config.json").write_text('{"model_type": "no-such-model"}')
    return {"model": model}, ["--model", "no usable config", "no-such-model"]


def case_a_config_with_a_field_of_another_type(llama, tmp_path):
    model = copied(llama, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    return {"model": model}, ["--model", "no usable config", "hidden_size"]


def case_a_tokenizers_config_that_is_a_list(llama, tmp_path):
    model = copied(llama, tmp_path)
    (model / "tokenizer_config.json").write_text("[]")
    return {"model": model}, ["--model", "no usable tokenizer", str(model)]


def case_no_tokenizer(llama, tmp_path):
    model = copied(llama, tmp_path, without=("tokenizer.json", "tokenizer_config.json"))
    return {"model": model}, ["--model", "no usable tokenizer", str(model)]


def case_no_weights(llama, tmp_path):
    model = copied(llama, tmp_path, without=("model.safetensors",))
    return {"model": model}, ["--model", "no usable model", str(model)]


def case_cut_weights(llama, tmp_path):
    model = copied(llama, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return {"model": model}, ["--model", "no usable model", str(model)]


def case_weights_of_less(llama, tmp_path):
    model = copied(llama, tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {"model": model}, ["--model", "no weights for model.layers.1.mlp.up_proj"]


def case_data_missing(llama, tmp_path):
    return {"data": tmp_path / "nowhere.jsonl"}, ["--data", "nowhere.jsonl"]


def case_broken_line(llama, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\noops\n')
    return {"data": tmp_path / "broken.jsonl"}, ["broken.jsonl, line 2", "not JSON"]


def case_unknown_target(llama, tmp_path):
    return {"more": ("--target-modules", "q_proj", "qkv")}, [
        "--target-modules",
        "'qkv'",
        "gate_proj",
        "q_proj",
        "up_proj",
    ]


def case_target_is_no_linear(llama, tmp_path):
    return {"more": ("--target-modules", "embed_tokens")}, ["--target-modules", "'embed_tokens'", "q_proj"]


def case_out_is_a_file(llama, tmp_path):
    (tmp_path / "taken").write_text("precious")
    return {"out": tmp_path / "taken"}, ["--out", "taken", "not a directory"]


def case_out_is_a_link_that_leads_nowhere(llama, tmp_path):
    """Found before the training and not where its result is to be put in place."""
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "adapter")
    return {"out": tmp_path / "link"}, ["--out", "link", "not a directory"]


def case_a_seed_that_is_too_large(llama, tmp_path):
    return {"more": ("--seed", str(2**32))}, ["--seed", "below 4294967296"]


def case_evaluations_of_nothing(llama, tmp_path):
    return {"more": ("--eval_strategy", "epoch")}, ["TrainingArguments", "eval_strategy"]


def case_checkpointing_that_a_method_cannot_have(llama, tmp_path):
    more = ("--method", "mosa", "--gradient-checkpointing", "--method-option", "reg_weight=0.1")
    return {"more": more}, ["--method mosa", "reg_weight", "checkpointing"]


def case_reentrant_checkpointing_under_routers(llama, tmp_path):
    more = ("--method", "mola", "--method-option", "experts=(2, 2)", "--gradient-checkpointing")
    more += ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}')
    return {"more": more}, ["--method mola", "use_reentrant=False"]


def case_a_chat_template_that_is_no_text(llama, tmp_path):
    (tmp_path / "template").write_bytes(b"\xff\xfe\x00")
    return {"more": ("--chat_template_path", str(tmp_path / "template"))}, ["--chat_template_path", "utf-8"]


def case_out_holds_something_else(llama, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    return {"out": tmp_path / "full", "more": ("--overwrite",)}, ["--out", "full", "no adapter"]


def case_out_below_a_file(llama, tmp_path):
    (tmp_path / "taken").write_text("precious")
    return {"out": tmp_path / "taken" / "adapter"}, ["--out", "cannot write", str(tmp_path / "taken")]


def case_out_where_nothing_can_be_made(llama, tmp_path):
    return {"out": Path("/proc/adapter")}, ["--out", "cannot write into /proc"]


def case_unknown_device(llama, tmp_path):
    return {"more": ("--device", "gpu")}, ["--device", "'gpu'"]


def case_rank_of_zero(llama, tmp_path):
    return {"more": ("--r", "0")}, ["--r", "at least 1", "'0'"]


def case_dropout_of_one(llama, tmp_path):
    return {"more": ("--lora-dropout", "1")}, ["--lora-dropout", "below 1", "'1'"]


def case_unknown_method(llama, tmp_path):
    return {"more": ("--method", "qlroa")}, ["--method", "no method 'qlroa'", "peftfast methods"]


CASES = [value for name, value in sorted(globals().items()) if name.startswith("case_")]


def tree(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_bad_input_gets_one_line_and_writes_nothing(case, llama, texts, tmp_path, capsys):
    given, said = case(llama, tmp_path)
    before = tree(tmp_path)
    out = given.get("out", tmp_path / "out")
    argv = command(given.get("model", llama), given.get("data", texts), out, "--max-steps", "1", *given.get("more", ()))
    assert main(argv) == 2
    line = error_line(capsys)
    for fragment in said:
        assert fragment in line, line
    assert tree(tmp_path) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a directory in which nobody can write is asked")
def test_out_is_tried_before_the_model_is_loaded(llama, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune.Job, "prepare", lambda self: pytest.fail("loaded"))
    assert main(command(llama, texts, Path("/proc/some/adapter"), "--max-steps", "1")) == 2
    assert "--out: cannot write into /proc" in error_line(capsys)


def test_the_help_shows_each_default():
    """The parser's own, where it has one; a method's where the parser leaves it to the method."""
    methods = finetune.METHODS
    shown = {action.dest: (action.help or "") % vars(action) for action in finetune.parser()._actions}
    in_words = {"device": "cuda where there is one", "eval_split": "none", "target_modules": "all-linear"}
    for name, default in vars(finetune.parser().parse_args(["--model=a", "--data=b", "--out=c"])).items():
        if name not in ("model", "data", "out") and not (default is None or isinstance(default, bool)):
            value = in_words.get(name) or (default if isinstance(default, str) else f"{default:g}")
            assert re.search(rf"default(:|,) {re.escape(value)}\b", shown[name]), name
    for name in ("zo_eps", "zo_directions"):
        assert f"default: {methods['mezo'].options[name]:g}" in shown[name]
    for name in ("reselection_steps", "selection_accumulation_steps", "initial_reselection_rate"):
        assert f"default: {methods['spiel'].options[name]:g}" in shown[name]


def test_an_encoder_is_no_causal_model(texts, tmp_path, capsys):
    assert main(command(demo.model_directory(), texts, tmp_path / "out", "--max-steps", "1")) == 2
    line = error_line(capsys)
    assert "no weights for" in line and "causal" in line
    assert not (tmp_path / "out").exists()


def test_a_method_without_its_package_is_named(llama, texts, tmp_path, capsys, monkeypatch):
    from peftfast.cli import arguments

    find = arguments.importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    assert main(command(llama, texts, tmp_path / "out", "--method", "qlora")) == 2
    line = error_line(capsys)
    assert "qlora" in line and "pip install bitsandbytes" in line
    assert not (tmp_path / "out").exists()
