"""merge: the merged model gives what base and adapter gave, in bf16 and in 4 bits, and is what was written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftfast.__main__ import main
from peftfast.cli import merge
from tests.test_cli_finetune import (  # noqa: F401
    command,
    environment,
    error_line,
    labelled,
    llama,
    texts,
    tree,
    write_lines,
)


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):  # noqa: F811
    """A trained adapter of each method."""
    folder = tmp_path_factory.mktemp("adapters")
    rows = write_lines(folder / "texts.jsonl", [{"text": f"the quick fox {k} jumps"} for k in range(8)])
    for method in ("lora", "qlora", "dora"):
        options = ("--method", method, "--max-steps", "3", "--learning-rate", "1e-2", "--lora-alpha", "32")
        assert main(command(llama, rows, folder / method, *options)) == 0
    return folder


TOKENS = torch.tensor([[1, 5, 60, 70, 33, 9]])


def logits(directory: Path, **options) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(str(directory), **options).eval()(TOKENS).logits.float()


def adapted_logits(llama: Path, adapter: Path) -> torch.Tensor:  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(llama)), str(adapter)).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_gives_what_the_adapter_gave(llama, adapters, tmp_path, capsys, method, dtype):  # noqa: F811
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapters / method), "--out", str(out), "--dtype", dtype]) == 0
    assert "bit for bit" in capsys.readouterr().out
    weights = load_file(out / "model.safetensors")
    assert not any("lora" in name for name in weights)
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    expected = adapted_logits(llama, adapters / method)
    assert relative(expected, logits(llama)) > 0.05  # the adapter says something
    assert relative(logits(out, dtype=torch.float32), expected) < (1e-5 if dtype == "float32" else 1e-2)
    # The tokenizer goes with it.
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_in_4_bits(llama, adapters, tmp_path):  # noqa: F811
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapters / "lora"), "--out", str(out), "--four-bit"]) == 0
    weights = load_file(out / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert any("quant_state.bitsandbytes__nf4" in name for name in weights)
    # What 4 bits cost the merged model, and nothing else: the same as quantising the merged bf16 model.
    dense = tmp_path / "dense"
    assert main(["merge", "--adapter", str(adapters / "lora"), "--out", str(dense)]) == 0
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    expected = AutoModelForCausalLM.from_pretrained(str(dense), quantization_config=settings, device_map={"": "cpu"})
    again = AutoModelForCausalLM.from_pretrained(str(out), device_map={"": "cpu"})
    ours, theirs = again.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_qlora_adapter_goes_into_what_it_was_trained_on(llama, adapters, tmp_path):  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    argv = ["merge", "--adapter", str(adapters / "qlora"), "--dtype", "float32"]
    assert main([*argv, "--out", str(tmp_path / "four"), "--four-bit-base"]) == 0
    assert main([*argv, "--out", str(tmp_path / "full")]) == 0
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(str(llama), quantization_config=settings, device_map={"": "cpu"})
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, str(adapters / "qlora")).eval()
    with torch.no_grad():
        trained = model(TOKENS).logits
    assert relative(logits(tmp_path / "four"), trained) < 1e-4
    assert relative(logits(tmp_path / "full"), trained) > 1e-2
    assert "quantization_config" not in json.loads((tmp_path / "four" / "config.json").read_text())


def test_a_classifier(llama, labelled, tmp_path):  # noqa: F811
    from transformers import AutoModelForSequenceClassification

    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    assert main(command(llama, labelled, adapter, "--max-steps", "2", "--learning-rate", "1e-2")) == 0
    assert main(["merge", "--adapter", str(adapter), "--out", str(out)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(str(out))
    assert model.config.id2label == {0: "dates", 1: "network"}
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, saved.bfloat16())


@pytest.mark.parametrize("kind", ["LoraConfig", "VeraConfig", "ShiraConfig"])
def test_a_classifier_that_peft_trained(tmp_path, kind):
    """Whose file names no classes, and whose head is more than one layer."""
    import peft
    from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaModel

    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(vocab_size=99, **sizes)).save_pretrained(str(base))
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=5)
    model = peft.get_peft_model(model, getattr(peft, kind)(task_type="SEQ_CLS", r=2, target_modules=["query"])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = model(TOKENS).logits
    model.save_pretrained(str(adapter))
    argv = ["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(out), "--dtype", "float32"]
    assert main(argv) == 0
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained(str(out)).eval()(TOKENS).logits
    assert merged.shape == (1, 5) and relative(merged, expected) < 1e-5


def test_what_has_no_merged_form_is_one_line(llama, tmp_path, capsys):  # noqa: F811
    from peft import PolyConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(llama))
    get_peft_model(base, PolyConfig(r=2, n_splits=1, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    argv = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--model", str(llama)]
    capsys.readouterr()  # what loading the base for the test itself shows
    assert main(argv) == 2
    assert "--adapter: it cannot be merged: task_ids" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_layers_that_share_a_tensor_lack_none(llama, tmp_path):  # noqa: F811
    """Its file holds VB-LoRA's bank of vectors once, and PEFT calls it missing for each layer."""
    from peft import VBLoRAConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(llama))
    options = {
        "num_vectors": 8,
        "vector_length": 16,
        "target_modules": ["q_proj", "v_proj"],
        "init_vector_bank_bound": 1.0,
    }
    model = get_peft_model(base, VBLoRAConfig(**options))
    model.save_pretrained(tmp_path / "adapter")
    argv = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main([*argv, "--model", str(llama)]) == 0
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    assert relative(expected, logits(llama)) > 1e-3
    assert relative(logits(tmp_path / "out"), expected) < 1e-5


def test_refusals_write_nothing(llama, adapters, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "merged"
    good = ["merge", "--adapter", str(adapters / "lora"), "--out", str(out)]
    assert main(good) == 0
    nameless = tmp_path / "nameless"
    shutil.copytree(adapters / "lora", nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    ill = tmp_path / "ill"
    shutil.copytree(adapters / "lora", ill)
    tensors = load_file(ill / "adapter_model.safetensors")
    save_file(
        {k: v[:, :3].clone() if "lora_A" in k else v for k, v in tensors.items()}, ill / "adapter_model.safetensors"
    )
    partial = tmp_path / "partial"
    shutil.copytree(adapters / "lora", partial)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, partial / "adapter_model.safetensors")
    shallow = tmp_path / "shallow"
    shutil.copytree(llama, shallow)
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = {}
    for name in ("cut", "bare", "pickled"):
        shutil.copytree(adapters / "lora", tmp_path / name)
        weights[name] = tmp_path / name / "adapter_model.safetensors"
    weights["cut"].write_bytes(weights["cut"].read_bytes()[:-100])
    weights["bare"].unlink()
    weights["pickled"].unlink()
    weights["pickled"].with_suffix(".bin").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "merged")
    shaped = {"numbered": {"base_model_name_or_path": 5}, "ranked": {"r": "x"}, "typed": {"peft_type": ["LORA"]}}
    for name, entries in shaped.items():
        shutil.copytree(adapters / "lora", tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | entries))
    for name, contents in (("cut-labels", '["a",'), ("one-label", "5")):
        shutil.copytree(adapters / "lora", tmp_path / name)
        (tmp_path / name / "label_names.json").write_text(contents)
    cases = [
        ([*good[:-1], str(tmp_path / "link")], ["--out", "link", "not a directory"]),
        (good, ["--out", "--overwrite"]),
        (["merge", "--adapter", str(tmp_path), "--out", str(out)], ["--adapter", "no adapter_config.json"]),
        (["merge", "--adapter", str(nameless), "--out", str(tmp_path / "x")], ["--model", "names no base model"]),
        ([*good[:-1], str(tmp_path / "full"), "--overwrite"], ["--out", "no model"]),
        ([*good, "--overwrite", "--model", str(tmp_path / "gone")], ["--model", "does not exist"]),
        ([*good[:-1], str(llama), "--overwrite"], ["--out", "is the adapter's base"]),
        (
            ["merge", "--adapter", str(ill), "--out", str(out), "--overwrite"],
            ["--adapter", "no usable adapter", "size mismatch for base_model", "copying a param with shape"],
        ),
        (
            [*good, "--overwrite", "--model", str(shallow)],
            ["--adapter", "not of the base", str(shallow), "no place for 14"],
        ),
        (
            ["merge", "--adapter", str(partial), "--out", str(out), "--overwrite"],
            ["not of the base", "lacks 1 tensors"],
        ),
    ]
    new = str(tmp_path / "new" / "merged")
    for name, said in (("cut", str(weights["cut"])), ("bare", "no adapter_model.safetensors or adapter_model.bin in")):
        cases.append((["merge", "--adapter", str(tmp_path / name), "--out", new], ["--adapter", said]))
    for name, said in (
        ("numbered", "--model: the adapter"),
        ("ranked", "no usable adapter"),
        ("typed", "no usable adapter"),
        ("cut-labels", "label_names.json is not JSON"),
        ("one-label", "label_names.json: expected a list"),
    ):
        again = ["merge", "--adapter", str(tmp_path / name), "--out", str(out), "--overwrite"]
        cases.append((again, [said, str(tmp_path / name)]))
    cases.append((["merge", "--adapter", str(tmp_path / "pickled"), "--out", str(out), "--overwrite"], ["--adapter"]))
    before = tree(tmp_path)
    for argv, said in cases:
        capsys.readouterr()
        assert main(argv) == 2, argv
        line = error_line(capsys)
        for fragment in said:
            assert fragment in line, line
        assert tree(tmp_path) == before


def test_failed_checks_leave_out_as_it_was(llama, adapters, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A merge that computes something else, and a file that is not what was written."""
    from peft.tuners import lora

    out = tmp_path / "merged"
    argv = ["merge", "--adapter", str(adapters / "lora"), "--out", str(out)]
    with monkeypatch.context() as patch:
        delta = lora.Linear.get_delta_weight
        patch.setattr(lora.Linear, "get_delta_weight", lambda *args: 0.5 * delta(*args))
        assert main(argv) == 2
        assert "changes the logits" in error_line(capsys)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        copy = merge._copy_tokenizer

        def spoil(directory, new):
            copy(directory, new)
            weights = load_file(new / "model.safetensors")
            weights["model.norm.weight"][3] += 1
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})

        patch.setattr(merge, "_copy_tokenizer", spoil)
        capsys.readouterr()
        assert main(argv) == 2
        assert "model.norm.weight the first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_began_in_4_bits(llama, tmp_path, capsys) -> None:  # noqa: F811
    """LoftQ's makes up for what its base lost: it is merged into that base."""
    from transformers import AutoModelForCausalLM

    import peftfast

    model = AutoModelForCausalLM.from_pretrained(str(llama))
    handle = peftfast.adapt(model, "loftq", r=4, lora_alpha=4.0, loftq_iter=1)
    with torch.no_grad():
        expected = handle.model.eval()(TOKENS).logits
    peftfast.save_adapter(model, tmp_path / "adapter")
    argv = ["merge", "--model", str(llama), "--adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    for more in ((), ("--four-bit-base",)):
        out = tmp_path / f"merged{len(more)}"
        assert main([*argv, "--out", str(out), *more]) == 0
        assert relative(logits(out), expected) < 1e-5
    assert relative(adapted_logits(llama, tmp_path / "adapter"), expected) > 1e-3


OF_METHODS = {
    # PEFT cuts AdaLoRA's layers to the ranks that are left, once.
    "adalora": ("init_r=6", "target_r=4", "tinit=1", "tfinal=1"),
    # Their files hold a weight in 4 bits, into which the sum would not go without rounding it anew.
    "lq-lora": ("r=4",),
    "finequant": ("r=4",),
    "loftq": ("r=4", "loftq_iter=3"),
}


@pytest.mark.parametrize("method", OF_METHODS)
def test_an_adapter_of_a_method(llama, texts, tmp_path, capsys, method) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM

    import peftfast

    given = [word for option in OF_METHODS[method] for word in ("--method-option", option)]
    options = ("--method", method, "--max-steps", "4", "--learning-rate", "1e-2", *given)
    assert main(command(llama, texts, tmp_path / "adapter", *options)) == 0
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(out), "--dtype", "float32"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    if method == "adalora":
        expected = adapted_logits(llama, tmp_path / "adapter")
    else:
        model = peftfast.load_adapter(AutoModelForCausalLM.from_pretrained(str(llama)), tmp_path / "adapter").eval()
        with torch.no_grad():
            expected = model(TOKENS).logits
    assert relative(logits(out), expected) < 1e-4


def test_what_a_killed_merge_left_is_swept_up(llama, adapters, tmp_path, monkeypatch):  # noqa: F811
    """Into 4 bits the whole model lies once more beside --out, dense, under a name that the next run knows."""
    out = tmp_path / "merged"
    argv = ["merge", "--adapter", str(adapters / "lora"), "--out", str(out), "--four-bit"]

    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    load = merge.models.load
    with monkeypatch.context() as patch:
        patch.setattr(merge.atomic, "_remove", lambda *folders: None)  # as where nothing more runs
        patch.setattr(merge.models, "load", lambda *a, **k: killed() if k["four_bit"] else load(*a, **k))
        with pytest.raises(Killed):
            main(argv)
    left = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert left == [".merged.dense", ".merged.new"]
    assert main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
