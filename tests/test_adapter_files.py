"""save_adapter and load_adapter: PEFT's files, written and read without PEFT, interoperable both ways."""

import copy
import json
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftfast
from peftfast.nn import LoRALinear, LoRANF4Linear

K, N = 64, 128


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Part(), Part())
        self.up = nn.Linear(K, 3)  # a name that ends as others do

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.parts(x))


def base(four_bit: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model()
    if four_bit:
        for part in model.parts:
            for name in ("up", "down"):
                old = getattr(part, name)
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, quant_type="nf4", compute_dtype=torch.float32
                )
                new.load_state_dict(old.state_dict())
                new.support_avx512bf16_for_cpu = False
                setattr(part, name, new.to("cpu"))
    return model


def adapt(model: Model, paths: dict[str, dict]) -> Model:
    for path, options in paths.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRALinear.from_linear(model.get_submodule(path), **options))
    return stir(model)


def stir(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


X = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
ALL = ("parts.0.up", "parts.0.down", "parts.1.up", "parts.1.down")
# What a directory must be able to say. The last: two layers of different rank and alpha, one of whose names ends as a third's.
OPTIONS = {
    "plain": dict.fromkeys(ALL, {"r": 4, "lora_alpha": 8}),
    "rslora": dict.fromkeys(ALL, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": dict.fromkeys(ALL, {"r": 4, "use_dora": True}),
    "lora_bias": dict.fromkeys(ALL, {"r": 4, "lora_bias": True, "lora_dropout": 0.1}),
    "one name": {"up": {"r": 3}},
    "patterns": {"up": {"r": 2, "lora_alpha": 3.5}, "parts.0.up": {"r": 4}, "parts.1.down": {"r": 6, "lora_alpha": 30}},
    "mixed rules": {"parts.0.up": {"r": 4, "use_rslora": True}, "parts.1.up": {"r": 4}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    model = adapt(base(), OPTIONS[name]).eval()
    peftfast.save_adapter(model, tmp_path / "a", base_model_name_or_path="some/base")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"
    adapted = [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert sorted(adapted) == sorted(f"base_model.model.{path}" for path in OPTIONS[name])
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)
    # And PEFT's own files of it say the same tensors by the same names.
    loaded.save_pretrained(tmp_path / "b")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


PEFT_OPTIONS = {
    "plain": {"target_modules": ["parts.0.up", "down"]},
    "rslora": {"target_modules": ["down"], "use_rslora": True},
    "dora": {"target_modules": ["down"], "use_dora": True},
    "lora_bias": {"target_modules": ["down"], "lora_bias": True, "lora_dropout": 0.1},
    "patterns": {"target_modules": ["up", "down"], "rank_pattern": {"parts.1.up": 2}, "alpha_pattern": {"down": 40}},
    "string": {"target_modules": r".*parts\.\d\.up"},
}


@pytest.mark.parametrize("name", PEFT_OPTIONS)
def test_loads_what_peft_saved(name: str, tmp_path: Path) -> None:
    stock = stir(peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=8, **PEFT_OPTIONS[name]))).eval()
    stock.save_pretrained(tmp_path)
    model = base()
    assert peftfast.load_adapter(model, tmp_path) is model
    model.eval()
    torch.testing.assert_close(model(X), stock(X), rtol=1e-5, atol=1e-5)
    assert {n for n, m in model.named_modules() if isinstance(m, LoRALinear)} == {
        n.removeprefix("base_model.model.") for n, m in stock.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    if name == "lora_bias":
        assert model.parts[0].down.lora_dropout == 0.1


def test_both_ways_on_4_bits(tmp_path: Path) -> None:
    quantised = base(four_bit=True)
    quantised.is_loaded_in_4bit = True
    stock = stir(peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules=["parts.0.up", "down"]))).eval()
    stock.save_pretrained(tmp_path / "a")
    model = peftfast.load_adapter(base(four_bit=True), tmp_path / "a").eval()
    assert isinstance(model.parts[0].down, LoRANF4Linear)
    torch.testing.assert_close(model(X), stock(X), rtol=1e-5, atol=1e-5)
    peftfast.save_adapter(model, tmp_path / "b")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ba")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_second_load_fills_the_layers(tmp_path: Path) -> None:
    model = adapt(base(), OPTIONS["plain"]).eval()
    peftfast.save_adapter(model, tmp_path)
    other = adapt(base(), OPTIONS["plain"]).eval()
    layer = other.parts[0].up
    with torch.no_grad():
        layer.lora_B.zero_()
    peftfast.load_adapter(other, tmp_path)
    assert other.parts[0].up is layer
    assert torch.equal(other(X), model(X))
    # Saved again over itself: the same bytes.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    peftfast.save_adapter(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_weight_without_its_first_components_takes_no_other_adapter(method: str, tmp_path: Path) -> None:
    peftfast.save_adapter(adapt(base(), OPTIONS["plain"]), tmp_path)
    model = base()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    peftfast.adapt(model, method, r=config["r"], lora_alpha=float(config["lora_alpha"]), target_modules=["up", "down"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^model: parts.0.*its weight lacks what its adapter began as"):
        peftfast.load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_goes_on_after_a_load(tmp_path: Path) -> None:
    peftfast.save_adapter(adapt(base(), OPTIONS["plain"]), tmp_path)
    model = peftfast.load_adapter(base(), tmp_path)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and n.startswith("parts")} == {
        "lora_A",
        "lora_B",
    }


def test_a_factor_that_layers_share_is_written_twice(tmp_path: Path) -> None:
    model = adapt(base(), {"parts.0.up": {"r": 4}, "parts.1.up": {"r": 4}})
    model.parts[1].up.lora_A = model.parts[0].up.lora_A
    peftfast.save_adapter(model, tmp_path)
    x = torch.randn(5, K)
    assert torch.equal(peftfast.load_adapter(base(), tmp_path)(x), model(x))


@pytest.mark.parametrize("method", ["sara", "id3", "rosa", "mos"])
def test_a_base_of_another_shape_changes_nothing(method: str, tmp_path: Path) -> None:
    """Flat positions of a sparse delta would fit into a larger weight, as others'; the message names the layer."""
    model = base()
    peftfast.adapt(model, method, target_modules=["down"])
    peftfast.save_adapter(model, tmp_path)
    other = base()
    other.parts[1].down = nn.Linear(2 * N, K)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="^directory: parts.1.down: expected a layer of"):
        peftfast.load_adapter(other, tmp_path)
    assert [type(m) for m in other.modules()] == [type(m) for m in before.modules()]
    for one, same in zip(other.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, same) and one.requires_grad


def test_options_beside_a_saved_head_are_refused_first(tmp_path: Path) -> None:
    model = base()
    peftfast.adapt(model, "lora", target_modules=["down"], modules_to_save=["up"])
    peftfast.save_adapter(model, tmp_path)
    x = torch.randn(5, K)
    assert torch.equal(peftfast.load_adapter(base(), tmp_path)(x), model(x))  # "up" is a path here, not the end of one
    edited(tmp_path, lora_alpha=0)
    other = base()
    with pytest.raises(ValueError, match="^lora_alpha: expected"):
        peftfast.load_adapter(other, tmp_path)
    assert not any(isinstance(module, LoRALinear) for module in other.modules())
    assert all(parameter.requires_grad for parameter in other.parameters())


def classifier(labels: int = 3) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=99, num_labels=labels, **sizes)).eval()


CLASSIFIERS = {
    "lora": (peft.LoraConfig, {"r": 4, "init_lora_weights": False}),
    "pissa": (peft.LoraConfig, {"r": 4, "init_lora_weights": "pissa"}),
    "adalora": (peft.AdaLoraConfig, {"total_step": 10}),
    "vera": (peft.VeraConfig, {"r": 4}),
    "shira": (peft.ShiraConfig, {"r": 2}),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_peft(name: str, tmp_path: Path) -> None:
    """PEFT writes the names of both heads that a classifier may have, and again where a config is used twice."""
    kind, options = CLASSIFIERS[name]
    config = kind(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    tokens = torch.arange(3, 21).reshape(2, 9)
    for _ in range(2):
        stock = peft.get_peft_model(classifier(), config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = stock(tokens).logits
        stock.save_pretrained(tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"].count("score") == 2
        model = peftfast.load_adapter(classifier(), tmp_path / "a").eval()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)
        peftfast.save_adapter(model, tmp_path / "b")
        again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "b").eval()
        torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-6)
    # A name without a module is passed over only where the file holds nothing of it.
    rewritten(tmp_path / "a", lambda t: t.update({"base_model.model.score.weight": torch.ones(3, 32)}))
    other = classifier()
    with pytest.raises(ValueError, match="modules_to_save: the model has no score"):
        peftfast.load_adapter(other, tmp_path / "a")


@pytest.mark.parametrize("method", ["lora", "lora-xs", "vera"])
def test_a_head_of_another_size_changes_nothing(method: str, tmp_path: Path) -> None:
    model = classifier()
    peftfast.adapt(model, method, r=4, target_modules=["query"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.dense.weight.add_(1.0)
    peftfast.save_adapter(model, tmp_path)
    other = classifier(labels=5)
    with pytest.raises(ValueError, match="^directory: .*modules_to_save: classifier: expected the tensors"):
        peftfast.load_adapter(other, tmp_path)
    before = classifier(labels=5).state_dict()
    assert other.state_dict().keys() == before.keys() and all(
        parameter.requires_grad for parameter in other.parameters()
    )
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


class Patches(nn.Module):
    """A layer whose name other modules' end in: a convolution's, as timm has it, and a container's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 2, 2)})
        self.attn = nn.ModuleDict({"proj": nn.Linear(8, 8)})
        self.head = nn.ModuleDict({"proj": nn.Sequential(nn.GELU())})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head["proj"](self.attn["proj"](self.patch["proj"](x).flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "shira", "poly"])
@pytest.mark.parametrize("outer", [False, True])
def test_names_that_other_modules_end_in(method: str, outer: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Outside, the path of the layer itself is the end of another's.
    stock = nn.ModuleDict({"proj": nn.Linear(8, 8), "rest": Patches()}) if outer else Patches()
    model = copy.deepcopy(stock)
    path = "proj" if outer else "attn.proj"
    peftfast.adapt(model, method, target_modules=path, **({} if method == "adalora" else {"r": 2}))
    peftfast.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path)
    adapted = [name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "base_layer")]
    assert adapted == [path]


def edited(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


WEIGHTS = "adapter_model.safetensors"
A0 = "base_model.model.parts.0.up.lora_A.weight"
BROKEN = {
    "IA3": (lambda f: edited(f, peft_type="IA3"), ValueError, "expected peft_type LORA, got 'IA3'"),
    "no rank": (lambda f: edited(f, r=None), ValueError, "r: expected a number, got None"),
    "bias": (lambda f: edited(f, bias="all"), ValueError, "bias='all' is not served"),
    "rank": (lambda f: edited(f, r=8), ValueError, r"lora_A: expected the shape \(8, .*, got \(4, "),
    "pattern of ranks": (
        lambda f: edited(f, rank_pattern={"up": 3}),
        ValueError,
        r"lora_A: expected the shape \(3, 64\)",
    ),
    "alpha": (lambda f: edited(f, lora_alpha=float("nan")), ValueError, "lora_alpha: expected a number, got nan"),
    "dropout": (lambda f: edited(f, lora_dropout="0.1"), ValueError, "lora_dropout: expected a number in"),
    "regex": (lambda f: edited(f, alpha_pattern={"(": 3}), ValueError, r"alpha_pattern: '\(' is no regular expression"),
    "list": (lambda f: edited(f, alpha_pattern=["up"]), ValueError, "alpha_pattern: expected patterns and numbers"),
    "alphas": (
        lambda f: edited(f, alpha_pattern={"up": "8"}),
        ValueError,
        "alpha_pattern: up: expected a number, got '8'",
    ),
    "heads": (lambda f: edited(f, modules_to_save="up"), ValueError, "modules_to_save: expected a list of names"),
    "dora": (lambda f: edited(f, use_dora=True), ValueError, "parts.0.down has no lora_magnitude_vector"),
    "no targets": (
        lambda f: edited(f, peft_type="PEFTFAST", peftfast_method="vera", target_modules=None),
        ValueError,
        "target_modules: expected a list of paths, got None",
    ),
    "no method": (lambda f: edited(f, peft_type="PEFTFAST"), ValueError, "peftfast_method: expected a method's name"),
    "own options": (
        lambda f: edited(f, peft_type="PEFTFAST", peftfast_method="vera", peftfast_options=[1]),
        ValueError,
        "peftfast_options: expected names and values",
    ),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, f"{WEIGHTS}: expected a whole safetensors"),
    "torn weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        ValueError,
        f"{WEIGHTS}: expected a whole safetensors",
    ),
    "integers": (
        lambda f: rewritten(f, lambda t: t.update({A0: t[A0].to(torch.int8)})),
        ValueError,
        "lora_A.weight: expected a floating tensor, got torch.int8",
    ),
    "scalar": (
        lambda f: rewritten(f, lambda t: t.update({A0: torch.ones(())})),
        ValueError,
        r"lora_A: expected .*, got \(\)",
    ),
    "corda": (lambda f: edited(f, init_lora_weights="corda"), ValueError, "init_lora_weights='corda'"),
    "head": (lambda f: edited(f, modules_to_save=["up"]), ValueError, "modules_to_save"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "is not JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "no adapter_model.safe"),
    "a stranger": (lambda f: rewritten(f, lambda t: t.update(other=torch.ones(1))), ValueError, "other is no part of"),
    "half": (lambda f: rewritten(f, lambda t: t.pop(A0)), ValueError, "parts.0.up has no lora_A"),
    "shape": (
        lambda f: rewritten(f, lambda t: t.update({A0: torch.ones(4, 3)})),
        ValueError,
        "lora_A: expected the shape",
    ),
    "name": (
        lambda f: rewritten(
            f, lambda t: t.update({k.replace("parts.0", "gone"): t.pop(k) for k in list(t) if ".0.up." in k})
        ),
        ValueError,
        "has a layer gone.up",
    ),
    "kind": (
        lambda f: rewritten(
            f, lambda t: t.update({k.replace("parts.0.up", "parts"): t.pop(k) for k in list(t) if ".0.up." in k})
        ),
        TypeError,
        "parts: expected a linear layer, got Sequential",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_changes_nothing(name: str, tmp_path: Path) -> None:
    spoil, error, message = BROKEN[name]
    peftfast.save_adapter(adapt(base(), OPTIONS["plain"]), tmp_path)
    spoil(tmp_path)
    model = base()
    with pytest.raises(error, match=message):
        peftfast.load_adapter(model, tmp_path)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base().parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flags_are_as_they_were_whatever_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peftfast.save_adapter(adapt(base(), OPTIONS["plain"]), tmp_path)
    model = base()
    model.up.weight.requires_grad_(False)
    made = LoRALinear.from_linear

    def stopped(layer: nn.Module, **options: object) -> LoRALinear:
        if layer is model.parts[1].down:
            raise KeyboardInterrupt
        return made(layer, **options)

    monkeypatch.setattr(LoRALinear, "from_linear", stopped)
    with pytest.raises(KeyboardInterrupt):
        peftfast.load_adapter(model, tmp_path)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["up.weight"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        peftfast.save_adapter("model", tmp_path)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        peftfast.load_adapter("model", tmp_path)
    with pytest.raises(ValueError, match="found none"):
        peftfast.save_adapter(base(), tmp_path)
    with pytest.raises(ValueError, match="a single one"):
        peftfast.save_adapter(LoRALinear(4, 4), tmp_path)
    dropouts = adapt(base(), {"parts.0.up": {"lora_dropout": 0.1}, "parts.0.down": {"lora_dropout": 0.2}})
    with pytest.raises(ValueError, match="one lora_dropout, but parts.0.up has 0.1 and parts.0.down has 0.2"):
        peftfast.save_adapter(dropouts, tmp_path)
    merged = adapt(base(), OPTIONS["plain"])
    merged.parts[1].up.merge()
    with pytest.raises(RuntimeError, match="parts.1.up is merged"):
        peftfast.save_adapter(merged, tmp_path)
    assert not list(tmp_path.iterdir())
    peftfast.save_adapter(adapt(base(), OPTIONS["plain"]), tmp_path)
    other = adapt(base(), OPTIONS["rslora"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="scaling 2, but the model's layer has"):
        peftfast.load_adapter(other, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
