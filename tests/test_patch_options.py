"""Every option of PEFT's LoRA layer on the fused path: forward and every gradient equal to PEFT's own in float32, and the verdict of
the guards follows what changes."""

import copy
import inspect
import threading
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import peftfast
from peftfast.functional.dora import row_gain
from peftfast.integrations import patch_report, peft_call, peft_guards
from tests.test_patch import Block, K, adapted, layer_free, layer_of, relative, run, stir

X = torch.randn(6, K, generator=torch.Generator().manual_seed(3))


def with_second(**options: Any) -> peft.PeftModel:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=7, lora_alpha=3, target_modules=["up", "down"], **options))
    return model


def active(*names: str) -> Any:
    def build() -> peft.PeftModel:
        model = with_second()
        model.base_model.set_adapter(list(names))
        return model

    return build


def three() -> peft.PeftModel:
    model = with_second(lora_bias=False, use_rslora=True)
    model.add_adapter("third", peft.LoraConfig(r=1, lora_bias=True, target_modules=["up"]))
    model.base_model.set_adapter(["third", "default", "second"])
    return model


OPTIONS = {
    "plain": lambda: adapted(),
    "rslora": lambda: adapted(use_rslora=True, r=16),
    "lora_bias": lambda: adapted(lora_bias=True, target_modules=["up"]),
    "dora": lambda: adapted(use_dora=True),
    "dora of high rank": lambda: adapted(use_dora=True, r=40),
    "rank 1": lambda: adapted(r=1),
    "prime rank": lambda: adapted(r=127),
    "one of two": active("second"),
    "two active": active("default", "second"),
    "two active, other order": active("second", "default"),
    "three active": three,
}


def frozen(model: nn.Module, name: str) -> nn.Module:
    for key, parameter in model.named_parameters():
        if name in key:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("freeze", ["", "lora_A", "lora_B", "lora_magnitude"])
@pytest.mark.parametrize("option", OPTIONS)
def test_agrees_with_peft_in_float32(option: str, freeze: str) -> None:
    if freeze == "lora_magnitude" and not option.startswith("dora"):
        pytest.skip("no magnitude to freeze")
    model = stir(OPTIONS[option]())
    for parameter in model.parameters():  # not where DoRA starts, gains of 1
        if parameter.dim() == 1 and parameter.requires_grad:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
    if freeze:
        frozen(model, freeze)
    stock = run(model, X)
    report = peftfast.patch(model)
    assert not report.stock
    for _ in range(2):  # by the guards, then by their remembered verdict
        patched = run(model, X)
        assert stock.keys() == patched.keys()
        for name in stock:
            assert relative(patched[name], stock[name]) < 1e-5, name


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 5, K), torch.randn(2, 3, 5, K), torch.randn(K), X.T.contiguous().T],
    ids=["3-D", "4-D", "1-D", "transposed"],
)
def test_shapes_of_x(x: torch.Tensor) -> None:
    for options in ({}, {"use_dora": True}):
        model = stir(adapted(**options))
        stock = run(model, x)
        peftfast.patch(model)
        patched = run(model, x)
        for name in stock:
            assert patched[name].shape == stock[name].shape
            assert relative(patched[name], stock[name]) < 1e-5, name


def test_dora_with_dropout_follows_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layer with peftfast's mask in the place of its own: the same formula."""
    from peftfast.functional import lora_multi
    from peftfast.reference import philox

    model = stir(adapted(use_dora=True, lora_dropout=0.5, target_modules=["up"]))
    seed = torch.tensor([1234])

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return philox.dropout(x.reshape(-1, K), seed, 0.5).reshape(x.shape)

    twin = copy.deepcopy(model)
    layer_of(twin).lora_dropout["default"] = Masked()
    stock = run(twin, X)
    peftfast.patch(model)
    monkeypatch.setattr(lora_multi, "_draw_seeds", lambda x, ps, given: seed)
    monkeypatch.setattr("peftfast.functional.lora.draw_seed", lambda x, count=1: seed)
    patched = run(model, X)
    for name in stock:
        assert relative(patched[name], stock[name]) < 1e-5, name


@pytest.mark.parametrize("option", ["dora", "two active"])
def test_4bit(option: str) -> None:
    model = adapted(four_bit=True, use_dora=option == "dora")
    if option != "dora":
        model.add_adapter("second", peft.LoraConfig(r=7, target_modules=["up", "down"]))
        model.base_model.set_adapter(["default", "second"])
    stir(model)
    stock = run(model, X)
    assert not peftfast.patch(model).stock
    patched = run(model, X)
    for name in stock:
        assert patched[name].dtype == stock[name].dtype, name
        assert relative(patched[name], stock[name]) < 0.02, name


NAMES = ["second", "__base__", "default", "default", "second", "__base__"]


@pytest.mark.parametrize("leading", [(6,), (6, 5)])
def test_mixed_batch_agrees_with_peft(leading: tuple[int, ...]) -> None:
    """Layer by layer, since PEFT's model takes adapter_names for inference only; with gradients."""
    model = with_second()
    model.add_adapter("third", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["down"]))
    stir(model)
    for parameter in model.parameters():
        parameter.requires_grad_("lora_" in "".join(n for n, p in model.named_parameters() if p is parameter))
    twin = copy.deepcopy(model)
    peftfast.patch(model)
    results = []
    for one in (twin, model):
        layer = layer_of(one)
        x = torch.randn(*leading, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x, adapter_names=["third", *NAMES[1:]])
        y.square().sum().backward()
        found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
        results.append({"y": y.detach(), "x": x.grad} | found)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert relative(results[1][name], value) < 1e-5, name


def test_a_batch_is_not_kept_from_the_kernels_by_an_adapter_that_it_does_not_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = with_second()
    model.add_adapter("third", peft.LoraConfig(r=3, use_dora=True, target_modules=["up"]))
    stir(model).eval()
    twin = copy.deepcopy(model)
    patch_report.logged.clear()
    peftfast.patch(model)
    with torch.no_grad():
        expected = layer_of(twin)(X, adapter_names=NAMES)
        assert relative(layer_of(model)(X, adapter_names=NAMES), expected) < 1e-5
    assert not caplog.records


def test_mixed_batch_through_the_model() -> None:
    model = stir(with_second()).eval()
    twin = copy.deepcopy(model)
    peftfast.patch(model)
    with torch.no_grad():
        assert relative(model(X, adapter_names=NAMES), twin(X, adapter_names=NAMES)) < 1e-5
        nothing = ["__base__"] * 6
        assert torch.equal(model(X, adapter_names=nothing), twin(X, adapter_names=nothing))
    with pytest.raises(ValueError, match="adapter_names"):
        layer_of(model)(X, adapter_names=["default"])


def changes() -> dict[str, Any]:
    """What may happen to a patched layer between two calls."""

    def replace_a(layer: LoraLayer) -> None:
        layer.lora_A["default"] = nn.Linear(K, 4, bias=False)

    def replace_weight(layer: LoraLayer) -> None:
        layer.base_layer.weight = nn.Parameter(torch.randn(128, K), requires_grad=False)

    def in_place(layer: LoraLayer) -> None:
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2.0)

    def data(layer: LoraLayer) -> None:
        layer.base_layer.weight.data = torch.randn(128, K)

    def scaling(layer: LoraLayer) -> None:
        layer.set_scale("default", 5.0)

    def add_variant(layer: LoraLayer) -> None:
        if "config" in inspect.signature(LoraLayer.update_layer).parameters:
            layer.update_layer("default", 4, lora_alpha=8, config=peft.LoraConfig(use_dora=True, r=4))
        else:  # PEFT 0.18
            options = {"lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False, "use_dora": True}
            layer.update_layer("default", 4, lora_alpha=8, **options)

    return {
        "hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda m, a, y: y * 2),
        "hook on B": lambda layer: layer.lora_B["default"].register_forward_hook(lambda m, a, y: y * 2),
        "pre-hook on the dropout": lambda layer: layer.lora_dropout["default"].register_forward_pre_hook(
            lambda m, a: (a[0] * 2,)
        ),
        "forward of the base": lambda layer: setattr(
            layer.base_layer, "forward", lambda x: x.new_ones(*x.shape[:-1], 128)
        ),
        "another A": replace_a,
        "another weight": replace_weight,
        "other values": in_place,
        "other data": data,
        "another scale": scaling,
        "a variant": add_variant,
        "another base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(K, 128)),
        "no bias": lambda layer: setattr(layer.base_layer, "bias", None),
        "merged": lambda layer: layer.merge(),
        "disabled": lambda layer: layer.enable_adapters(False),
        "another active one": lambda layer: layer.set_adapter(["second"]),
        "both active": lambda layer: layer.set_adapter(["default", "second"]),
    }


@pytest.mark.parametrize("change", changes())
def test_the_remembered_verdict_follows(change: str) -> None:
    model = stir(with_second())
    twin = copy.deepcopy(model)
    peftfast.patch(model)
    for one in (model, twin):
        layer_of(one)(X)
        assert (peft_call.VERDICT in layer_of(one).__dict__) == (one is model)
        torch.manual_seed(0)
        changes()[change](layer_of(one))
    for _ in range(2):
        assert relative(layer_of(model)(X), layer_of(twin)(X)) < 1e-5


def test_dora_after_merging_and_unmerging() -> None:
    model = stir(adapted(use_dora=True))
    peftfast.patch(model)
    before = model(X)
    layer = layer_of(model)
    layer.merge()
    layer(X)
    layer.unmerge()
    assert relative(model(X), before) < 1e-5
    assert relative(model(X), layer_free(model, X)) < 1e-5


def test_moves_and_casts_are_noticed() -> None:
    model = stir(adapted())
    peftfast.patch(model)
    model(X)
    model.to(torch.bfloat16)
    y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16 and relative(y, layer_free(model, X.bfloat16())) < 0.03
    model.float()
    assert relative(model(X), layer_free(model, X)) < 1e-5


def test_copies_do_not_share_a_verdict() -> None:
    model = stir(adapted())
    peftfast.patch(model)
    model(X)
    twin = copy.deepcopy(model)
    assert layer_of(twin).__dict__[peft_call.VERDICT] is None
    with torch.no_grad():
        layer_of(twin).lora_B["default"].weight.zero_()
    assert not torch.equal(twin(X), model(X))
    peftfast.unpatch(model)
    assert peft_call.VERDICT not in layer_of(model).__dict__


def _replica(module: Any) -> Any:
    """As nn.DataParallel makes one, with twice the parameters: its own modules, and tensors that are no parameters any more."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter * 2)
    return made


@pytest.mark.parametrize("option", ["plain", "dora", "two active"])
def test_a_replica_does_not_share_a_verdict(option: str) -> None:
    stock = stir(OPTIONS[option]())
    patched = copy.deepcopy(stock)
    peftfast.patch(patched)
    gradients = []
    for model in (stock, patched):
        for _ in range(3):
            model(X)
        _replica(model)(X).square().sum().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 3
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 1e-5, name


def test_threads() -> None:
    """One model called by several threads while another switches its adapter: every answer is one of the two."""
    model = stir(with_second()).eval()
    peftfast.patch(model)
    expected = []
    for name in ("default", "second"):
        model.set_adapter(name)
        expected.append(layer_of(model)(X))
    assert not torch.allclose(*expected, rtol=1e-2, atol=1e-2)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(200):
            y = layer_of(model)(X)
            # A thread's first product may run on another number of cores than the main thread's: one rounding apart.
            if not any(torch.allclose(y, one, rtol=1e-5, atol=1e-5) for one in expected):
                wrong.append("an answer of neither adapter")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for i in range(100):
        layer_of(model).set_adapter(("default", "second")[i % 2])
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_adapter_that_is_added_while_the_guards_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does that loads one in another thread while requests run."""
    model = stir(with_second()).eval()
    peftfast.patch(model)
    layer, expected = layer_of(model), layer_of(model)(X)

    def add() -> None:
        name = f"other {len(layer.scaling)}"
        layer.scaling[name], layer.lora_A._modules[name] = 1.0, layer.lora_A["second"]

    class Types(frozenset[type]):
        def isdisjoint(self, others: Iterable[Any]) -> bool:
            add()
            return super().isdisjoint(others)

    class Name(str):
        def __hash__(self) -> int:
            add()
            return super().__hash__()

    monkeypatch.setattr(peft_guards, "_TENSORS", Types(peft_guards._TENSORS))
    assert torch.equal(layer(X), expected)
    found = layer(X, adapter_names=[Name("default") for _ in X])
    assert relative(found, expected) < 1e-5


def test_a_switch_while_the_guards_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict that is remembered is of the adapter that was active when its names were read."""
    model = stir(with_second())
    twin = copy.deepcopy(model)
    peftfast.patch(model)
    layer, guards = layer_of(model), peft_call.why_stock

    def switched(*given: Any) -> str:
        layer.set_adapter("second")
        return guards(*given)

    monkeypatch.setattr(peft_call, "why_stock", switched)
    layer(X)
    monkeypatch.undo()
    layer_of(twin).set_adapter("second")
    assert relative(layer(X), layer_of(twin)(X)) < 1e-5


INFERRED = {
    **OPTIONS,
    "mixed": with_second,
    "4-bit": lambda: adapted(four_bit=True),
    "4-bit dora": lambda: adapted(four_bit=True, use_dora=True),
}


@pytest.mark.parametrize("option", INFERRED)
def test_training_after_inference_mode(option: str) -> None:
    """Nothing that is kept from call to call is an inference tensor, which no backward could use."""
    model = stir(INFERRED[option]())
    peftfast.patch(model)
    names = {"adapter_names": NAMES} if option == "mixed" else {}
    layer = layer_of(model)
    with torch.inference_mode():
        layer(X, **names)
    x = X.clone().requires_grad_()
    layer(x, **names).sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.compiled
@pytest.mark.parametrize("option", ["dora", "two active"])
def test_compiles_fullgraph(option: str) -> None:
    model = stir(OPTIONS[option]())
    peftfast.patch(model)
    eager = run(model, X)
    graph = run(torch.compile(model, fullgraph=True, backend="aot_eager"), X)
    for name, value in eager.items():
        assert relative(graph[f"_orig_mod.{name}" if name not in ("x", "y") else name], value) < 1e-4, name


@pytest.mark.compiled
@pytest.mark.parametrize("option", ["dora", "two active"])
def test_a_merged_model_compiles_fullgraph(option: str) -> None:
    model = stir(OPTIONS[option]())
    peftfast.patch(model)
    expected = model(X)
    model.merge_adapter()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))
    model.unmerge_adapter()
    assert relative(model(X), expected) < 1e-5


def test_block_is_what_the_names_say() -> None:
    assert isinstance(layer_of(adapted()).base_layer, nn.Linear) and Block().up.in_features == K


def test_dora_begins_where_the_base_is() -> None:
    """B is 0: the norm that DoRA divides by is the magnitude to the bit, on rows long enough for the low-rank identity too."""
    linear = torch.nn.Linear(300, 200)
    weight = linear.weight.detach()
    magnitude = torch.linalg.norm(weight, dim=1)
    a, b = torch.randn(8, 300), torch.zeros(200, 8)
    assert torch.equal(row_gain(weight, a, b, 2.0, magnitude, torch.float32), torch.ones(200))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "4-bit"])
def test_dora_s_first_output_is_the_base_s_to_the_bit(kind: str, p: float) -> None:
    """With the base's bias in it, which the gain does not multiply; under dropout too, and as PEFT's."""
    model = adapted(four_bit=kind == "4-bit", use_dora=True, lora_dropout=p)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = model.to(dtype) if kind != "4-bit" else model
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(8), dtype=torch.float32).to(dtype)
    layer = layer_of(model)
    if kind == "bfloat16":
        # Its magnitude is rounded to 16 bits: a gain of 1 is 1 only where the norm is so too.
        with torch.no_grad():
            layer.base_layer.weight.copy_(torch.eye(K).roll(3, 1).repeat(2, 1) * 2.0)
        layer.lora_magnitude_vector["default"].weight.data = torch.linalg.norm(
            layer.base_layer.weight.float(), dim=1
        ).to(dtype)
    with torch.no_grad():
        layer.base_layer.bias.normal_()
    expected = layer.base_layer(x)
    peftfast.patch(model)
    assert peftfast.report(model).reasons == {}
    assert torch.equal(layer(x), expected)
