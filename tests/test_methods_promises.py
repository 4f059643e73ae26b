"""What `adapt` promises of every method alike: clear errors before anything is changed, merging that touches nothing else, an optimiser
that knows all that is trained, states that go where the layers are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.methods import flora, loraprune
from peftfast.methods.increlora import IncreLoRARuntime
from peftfast.methods.registry import get, methods
from peftfast.nn import LoRALinear, NF4Linear
from tests.support.method_checks import Mlp, adapted, batches, stir

ADAPTED = [name for name, method in methods().items() if method.build is not None]
TARGETS = ["up", "down"]


# Options


def wrong_kinds() -> list[tuple[str, str, Any]]:
    """A value of another kind, and one that is no finite number, for every option of every method."""
    found = []
    for name in ADAPTED:
        for option, default in get(name).defaults().items():
            found.append((name, option, {} if isinstance(default, str | tuple) else "x"))
            if isinstance(default, bool):
                found.append((name, option, 1))
            elif isinstance(default, float):
                found += [(name, option, float("nan")), (name, option, float("inf"))]
    return found


def test_options_of_another_kind_are_named() -> None:
    model = Mlp(torch.float32)
    before = dict(model.named_modules())
    for name, option, value in wrong_kinds():
        given = {"n_adapters": 2} if name == "meteora" else {}
        with pytest.raises((TypeError, ValueError), match=option) as error:
            peftfast.adapt(model, name, target_modules=TARGETS, batches=batches(1), **{**given, option: value})
        assert "expected" in str(error.value), (name, option, value, str(error.value))
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_a_negative_deviation_is_named() -> None:
    with pytest.raises(ValueError, match="init_std: expected"):
        adapted("lora-xs", init_std=-1.0)


def test_a_whole_number_serves_as_a_number() -> None:
    assert adapted("lora", r=4, lora_alpha=8).options.lora_alpha == 8
    assert adapted("mola", experts=[2, 2], top_k=1).options.experts == (2, 2)
    assert adapted("pissa", r=4, lora_alpha=4, niter=None).options.niter is None


# What is adapted


def test_targets_and_saved_modules_are_named() -> None:
    for given, kind, match in (
        ({"target_modules": 3}, TypeError, "target_modules: expected names"),
        ({"target_modules": None}, TypeError, "target_modules: expected names"),
        ({"target_modules": ["up", 2]}, TypeError, "target_modules: expected names"),
        ({"target_modules": []}, ValueError, "target_modules: expected names"),
        ({"target_modules": "((up"}, ValueError, "target_modules: .* is no regular expression"),
        ({"target_modules": TARGETS, "exclude_modules": 1}, TypeError, "exclude_modules: expected names"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save: expected a sequence"),
        ({"modules_to_save": ["tail"]}, ValueError, "modules_to_save: the model has no module 'tail'"),
    ):
        model = Mlp()
        with pytest.raises(kind, match=match):
            peftfast.adapt(model, "lora", **{"target_modules": TARGETS, **given})
        assert type(model.up) is nn.Linear and model.up.weight.requires_grad


def test_a_model_with_adapters_is_refused_wherever_they_are() -> None:
    """A second method would freeze the first one's and leave them out of its files."""
    inner = nn.Sequential(Mlp(), nn.Linear(3, 3))
    peftfast.adapt(inner[0], "lora-xs", target_modules=["up"], r=4)
    with pytest.raises(ValueError, match=r"adapted already, by lora-xs \(0\)"):
        peftfast.adapt(inner, "lora", target_modules=["1"])
    for layer in (
        LoRALinear.from_linear,
        lambda linear: peftfast.nn.SparseDeltaLinear.from_linear(linear, density=0.1),
    ):
        model = Mlp()
        model.up = layer(model.up)
        with pytest.raises(ValueError, match="up is an adapter layer already"):
            peftfast.adapt(model, "vera", target_modules=["down"])
        assert type(model.down) is nn.Linear


def test_4_bit_layers_alone_are_refused_with_the_reason() -> None:
    for name in ("lq-lora", "eora"):
        with pytest.raises(ValueError, match="this one is in 4 bits"):
            adapted(name, dtype=torch.float32, four_bit=True, data=1, r=4)


# Merging


class Tied(nn.Module):
    """An embedding, and a head on its very weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body = nn.Embedding(24, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 24, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(ids))))


IDS = torch.arange(24).view(4, 6)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "lora-xs", "vera", "ssf", "mask-tuning", "flora"])
def test_merging_leaves_a_tied_embedding_alone(name: str) -> None:
    model = Tied()
    handle = peftfast.adapt(model, name, target_modules=["body", "head"], **{"r": 4} if hasattr_r(name) else {})
    stir(handle, 0.2)
    words, expected = model.words.weight.detach().clone(), model(IDS)
    names = set(model.state_dict())
    handle.merge()
    assert torch.equal(model.words.weight, words)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert {name.rpartition(".")[2] for name in set(model.state_dict()) - names} <= {"bias"}  # SSF's shift
    handle.unmerge()
    assert torch.equal(model(IDS), expected) and set(model.state_dict()) == names


def hasattr_r(name: str) -> bool:
    return "r" in get(name).defaults()


def test_what_is_written_in_place_is_not_merged_into_a_tied_weight() -> None:
    model = Tied()
    handle = peftfast.adapt(model, "shira", target_modules=["body", "head"], r=2)
    with pytest.raises(RuntimeError, match="weight of head is tied to that of words"):
        handle.merge()
    assert not any(layer.merged for layer in handle.layers.values())


@pytest.mark.parametrize("name", ["galore", "lisa"])
def test_a_tied_weight_is_not_trained_whole(name: str, tmp_path: Path) -> None:
    """Its embedding would be trained as well, which no file holds."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([Tied()])})
    options = {"rank": 4} if name == "galore" else {"active": 1}
    handle = peftfast.adapt(model, name, target_modules=["body", "head"], **options)
    assert list(handle.layers) == ["blocks.0.body"]
    assert handle.skipped == {"blocks.0.head": "its weight is tied to that of blocks.0.words"}


@pytest.mark.parametrize("name", ["rosa", "dsee"])
def test_unloading_keeps_the_low_rank_term(name: str) -> None:
    handle = adapted(name, r=4)
    stir(handle, 0.2)
    batch = batches(1)[0]
    expected = handle.model(**batch).logits
    model = handle.merge_and_unload()
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lora-xs", "ssf"])
def test_what_is_cast_while_merged_is_cast_after(name: str) -> None:
    handle = adapted(name, dtype=torch.float32)
    stir(handle)
    handle.merge()
    handle.model.bfloat16()
    handle.unmerge()
    assert {parameter.dtype for parameter in handle.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["hydra", "hut", "l4q", "lora-xs"])
def test_a_model_that_is_cast_computes_and_trains(name: str) -> None:
    """What was trained in float32 and is cast with the model, as for inference in 16 bits."""
    handle = adapted(name, dtype=torch.float32)
    stir(handle)
    batch = batches(1, torch.float32)[0]
    expected = handle.model.eval()(**batch).logits
    handle.model.bfloat16()
    output = handle.model(**batches(1, torch.bfloat16)[0])
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - expected).norm() < 0.1 * expected.norm()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.adapter_parameters())


@pytest.mark.parametrize("kind", ["masked", "convolution"])
def test_a_layer_cast_while_merged_is_cast_after(kind: str) -> None:
    layer: Any
    if kind == "masked":
        layer = loraprune.MaskedLoRALinear(nn.Linear(16, 8), loraprune.Options())
        layer.row_mask[1:4] = 0.0
    else:
        layer = flora.FLoRAConv2d(nn.Conv2d(4, 6, 3), flora.Options())
        nn.init.normal_(layer.core)
    before = [one.detach().clone() for one in (layer.weight, layer.bias)]
    shared = layer.bias
    layer.merge()
    assert not torch.equal(layer.weight, before[0]) and (kind != "masked" or not torch.equal(layer.bias, before[1]))
    assert torch.equal(shared, before[1])  # another layer's too
    layer.bfloat16()
    layer.unmerge()
    assert torch.equal(layer.weight, before[0].bfloat16()) and torch.equal(layer.bias, before[1].bfloat16())


def test_ssf_merges_into_4_bits_without_a_bias() -> None:
    handle = adapted("ssf", dtype=torch.float32, four_bit=True)
    assert handle.layers["down"].bias is None
    stir(handle)
    handle.merge()
    assert handle.layers["down"].bias.dtype == torch.float32
    handle.unmerge()
    assert handle.layers["down"].bias is None


# Training


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("name", ["lisa", "owlore"])
def test_a_second_optimiser_knows_all_blocks(name: str) -> None:
    """The blocks that rest for now are trained later: a copy's optimiser, or one made anew, must have them."""
    model = Blocks()
    kind = {"active": 1, "interval": 1, **({"rank": 4} if name == "owlore" else {})}
    data = {"batches": [{"x": torch.randn(4, 16)}]} if name == "owlore" else {}
    handle = peftfast.adapt(model, name, target_modules=[str(i) for i in range(3)], **data, **kind)
    count = handle.trainable
    handle.optimizer(1e-2)
    assert handle.trainable == count == 3 * 16 * 16
    twin = copy.deepcopy(model)
    own = twin.peftfast_handle
    optimiser = own.optimizer(1e-2)
    assert len(optimiser.param_groups[0]["params"]) == 3
    before = [layer.weight.detach().clone() for layer in twin.layers]
    for _ in range(12):
        twin(torch.randn(4, 16)).square().sum().backward()
        optimiser.step()
        own.step(optimiser)
        optimiser.zero_grad()
    assert all(not torch.equal(layer.weight, old) for layer, old in zip(twin.layers, before, strict=True))
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model.layers, before, strict=True))


def test_dylora_is_evaluated_at_its_whole_rank() -> None:
    """Whatever was drawn for the next step: what files hold is the whole."""
    handle = adapted("dylora", r=6, lora_alpha=12.0)
    stir(handle)
    batch = batches(1)[0]
    handle.model.eval()
    expected = handle.model(**batch).logits
    drawn = []
    for _ in range(6):
        handle.step()
        drawn.append(handle.layers["up"].drawn)
        assert torch.equal(handle.model(**batch).logits, expected)
    assert min(drawn) < 6
    handle.model.train()
    assert not torch.equal(handle.model(**batch).logits, expected)
    handle.runtime.set_rank(2)
    handle.model.eval()
    assert not torch.equal(handle.model(**batch).logits, expected)


@pytest.mark.parametrize("name", ["shira", "hft", "lt-sft", "sara", "id3"])
def test_a_sparse_method_beside_something_else_than_float32(name: str) -> None:
    """SparseAdamW holds float32: a head in bfloat16 and a model in float64 are stepped by AdamW."""
    given = {"r": 4} if name == "shira" else {}
    whole = adapted(name, data=1 if name == "lt-sft" else 0, **given)
    assert type(whole.optimizer(1e-3)) is torch.optim.AdamW
    data = {"batches": batches(1, torch.bfloat16)} if name == "lt-sft" else {}
    model = Mlp(torch.bfloat16)
    handle = peftfast.adapt(model, name, target_modules=TARGETS, modules_to_save=["head"], **data, **given)
    optimiser = handle.optimizer(1e-2)
    before = model.head.weight.detach().clone()
    model(**batches(1, torch.bfloat16)[0]).loss.backward()
    optimiser.step()
    handle.step(optimiser)
    assert not torch.equal(model.head.weight, before)


def test_sara_in_4_bits_goes_on_in_its_second_half() -> None:
    """The smallest weights of a 4-bit layer are all 0: a threshold of 0 would freeze whatever has moved."""
    handle = adapted("sara", dtype=torch.float32, four_bit=True, density=0.05, rank_weight=0.0, total_steps=2)
    assert isinstance(handle.layers["up"], NF4Linear)
    stir(handle, 1e-4)
    handle.step()
    assert not any(bool(mask.any()) for mask in handle.runtime.frozen.values())


@pytest.mark.parametrize("name", ["mola", "loramoe", "meteora"])
def test_routers_losses_need_a_graph(name: str) -> None:
    """Reentrant checkpointing runs its first forward without gradients: the loss says so, where it was left out or stale."""
    given = {"meteora": {"n_adapters": 2, "train_adapters": True}, "mola": {"experts": (2, 2)}}.get(name, {})
    handle = adapted(name, **given)
    batch = batches(1)[0]

    def forward() -> Tensor:
        if name != "meteora":
            return handle.model(**batch).loss
        with handle.runtime.tasks(torch.zeros(len(batch["x"]), dtype=torch.int64)):
            return handle.model(**batch).loss

    with torch.no_grad():
        forward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        handle.loss()
    forward()
    assert float(torch.as_tensor(handle.loss()).detach()) > 0
    handle.model.eval()
    with torch.no_grad():
        forward()
    assert handle.loss() == 0.0


def states(name: str) -> tuple[Any, Any]:
    options = {
        "adalora": {"init_r": 4, "target_r": 2, "total_steps": 8, "tfinal": 2},
        "increlora": {"interval": 1, "top_h": 1},
        "triadapt-lora": {"interval": 1},
        "spiel": {"r": 2, "reselection_steps": 4, "accumulation_steps": 2},
        "id3": {"every": 1},
    }[name]
    made = []
    for _ in range(2):
        handle = adapted(name, dtype=torch.float32, **options)
        made.append((handle, handle.optimizer(1e-2)))
    handle, optimiser = made[0]
    for batch in batches(4 if name == "spiel" else 3, torch.float32):
        (handle.model(**batch).loss + handle.loss()).backward()
        if name == "spiel" and handle.completed_steps == 3:
            break  # amid a phase: candidates are there
        optimiser.step()
        handle.step(optimiser)
        optimiser.zero_grad()
    return handle, made[1][0]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in tensors_of(one)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("name", ["adalora", "increlora", "triadapt-lora", "spiel", "id3"])
def test_a_state_read_to_the_cpu_goes_where_the_layers_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a checkpoint that is read by torch.load(map_location="cpu") for a model on a GPU; the meta device stands for that here."""
    handle, other = states(name)
    state = handle.state_dict()
    assert tensors_of(state["runtime"])
    ages = getattr(other.runtime, "ages", None)
    names = {id(parameter): name for name, parameter in other.model.named_parameters()}
    other.model.to("meta")  # which makes new parameters, where a GPU keeps them
    if ages is not None:
        ages.parameters = [other.model.get_parameter(names[id(parameter)]) for parameter in ages.parameters]
    monkeypatch.setattr(IncreLoRARuntime, "_set_scored", lambda runtime: None)  # it reads ranks, which meta has not
    other.load_state_dict(state)
    found = tensors_of(other.state_dict()["runtime"])
    assert found and all(tensor.is_meta for tensor in found)


# Compiling


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["hft", "poly", "mixlora"])
def test_one_graph(name: str) -> None:
    """No value of a tensor is asked for in a forward or a backward; of Poly also in evaluation, where it mixes each task once."""

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(torch.tanh(self.up_proj(x)))

    options = {} if name == "hft" else {"r": 2}
    results = []
    for compiled in (False, True):
        model = FFN()
        torch.manual_seed(1)
        handle = peftfast.adapt(model, name, target_modules=["up_proj", "down_proj"], **options)
        stir(handle)
        model.train(name != "poly")
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        y = call(torch.linspace(-1, 1, 3 * 4 * 32).view(3, 4, 32))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in handle.adapter_parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
