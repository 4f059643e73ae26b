"""Models whose modules have accelerate's hooks, as a ``device_map`` of several devices sets them; hooks on layers that are replaced."""

import copy
import types
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from torch import nn

import peftfast
from peftfast.nn import LoRALinear, SparseDeltaLinear
from peftfast.nn.hooks import replace
from tests.support import distributed_worker as worker
from tests.support.gated_blocks import Counts, adapted, block_of, check_same, step

LAYERS = 14  # seven projections of two decoder layers
HERE = {"": "cpu"}


def tokens(device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, worker.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3)).to(device)


def trained(model: Any, times: int = 3, device: str = "cpu") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the last of some passes; from the second on layers run in groups where they do."""
    for _ in range(times):
        model.zero_grad()
        loss = model(input_ids=tokens(device), labels=tokens(device)).loss
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        assert torch.equal(grad, expected[1][name]), name


class CountedAlign(AlignDevicesHook):
    """Another hook than accelerate's own, by its type."""


@pytest.fixture(autouse=True)
def every_product_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfast.configs import gated_activation, lora

    monkeypatch.setattr(gated_activation, "gated_pays", lambda *_: True)
    monkeypatch.setattr(lora, "group_pays", lambda *_: True)


@pytest.mark.parametrize("four_bit", [None, "uint8"])
def test_a_spread_model_runs_fused(four_bit: str | None) -> None:
    """The base first, then PEFT, as from_pretrained and get_peft_model do it: bit for bit what the model without hooks computes, in
    groups and gated MLPs as there."""
    plain = worker.llama(four_bit)
    peftfast.patch(plain)
    expected = trained(plain)
    model = worker.llama(four_bit, HERE)
    report = peftfast.patch(model)
    assert len(report.fused) == LAYERS and not report.stock, report
    assert [row.reason for row in report.mlps] == ["", ""]
    check_equal(trained(model), expected)
    now = peftfast.report(model)
    assert len(now.groups) == len(peftfast.report(plain).groups) == 4
    peftfast.unpatch(model)
    assert not [module for module in model.modules() if "peftfast" in type(module).__module__]
    torch.testing.assert_close(trained(model)[0], expected[0], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("patched_first", [False, True])
def test_spread_after_peft(patched_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on PEFT's layers and on gated MLPs too, which run around the fused forward."""
    expected = step(adapted())
    counts = Counts(monkeypatch)
    model = adapted()
    if patched_first:
        peftfast.patch(model)
    dispatch_model(model, device_map=HERE, force_hooks=True)
    assert all("forward" in module.__dict__ for module in block_of(model).modules() if list(module.parameters()))
    report = peftfast.patch(model)
    assert len(report.fused) == 6 and all(row.patched and not row.reason for row in report.mlps), report
    assert counts.during(lambda: check_same(step(model), expected)) == (2, 0)
    copied = copy.deepcopy(model)
    assert counts.during(lambda: check_same(step(copied), expected)) == (2, 0)
    peftfast.unpatch(model)
    assert counts.during(lambda: check_same(step(model), expected)) == (0, 0)
    peftfast.patch(model)
    remove_hook_from_submodules(model)  # accelerate leaves bound methods behind
    assert not peftfast.patch(model).stock
    assert counts.during(lambda: check_same(step(model), expected)) == (2, 0)
    peftfast.unpatch(model)
    assert counts.during(lambda: check_same(step(model), expected)) == (0, 0)


class Doubles(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2.0


def test_hooks_that_do_more_run_stock() -> None:
    """Whatever is not known to leave a call alone is called, also when it comes after the first calls, and the way back."""
    model = adapted()
    dispatch_model(model, device_map=HERE, force_hooks=True)
    peftfast.patch(model)
    expected = step(model)
    gate = block_of(model).gate
    base = gate.base_layer
    row = "base_model.model.blocks.0.gate"
    for hook in (Doubles(), CountedAlign("cpu"), CpuOffload("cpu"), AlignDevicesHook("meta"), AlignDevicesHook(0)):
        kept = base._hf_hook
        base._hf_hook = hook  # as where a hook's kind is another: the forward of accelerate asks for it at each call
        assert peftfast.report(model).stock == {row: "a hook on the base layer"}, hook
        base._hf_hook = kept
    assert not peftfast.report(model).stock
    remove_hook_from_module(base)
    check_same(step(model), expected)
    add_hook_to_module(base, Doubles())
    assert peftfast.report(model).stock == {row: "a hook on the base layer"}
    stock = adapted()
    add_hook_to_module(block_of(stock).gate.base_layer, Doubles())
    check_same(step(model), step(stock))
    base.forward = lambda x: x  # no longer accelerate's
    assert peftfast.report(model).stock == {row: "a hook on the base layer"}
    gate.forward = lambda x: x
    assert peftfast.report(model).stock == {row: "forward is overridden on the layer itself"}


def test_shira_on_a_spread_model() -> None:
    def made(spread: bool) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
        if spread:
            dispatch_model(net, device_map=HERE, force_hooks=True)
        model: Any = peft.get_peft_model(net, peft.ShiraConfig(r=2, target_modules=["0", "1"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "shira" in name:
                nn.init.normal_(parameter)
        return model

    x = torch.randn(3, 64)
    plain, model = made(False), made(True)
    expected = made(False)(x)
    assert len(peftfast.patch(plain).fused) == len(peftfast.patch(model).fused) == 2
    assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(model(x), expected)
    dispatch_model(model, device_map=HERE, force_hooks=True)
    peftfast.unpatch(model)
    assert len(peftfast.patch(model).fused) == 2
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("method", ["lora", "lora-xs", "ssf", "hut", "spiel"])
def test_adapted_layers_take_the_hooks_along(method: str) -> None:
    """They see each call once and see the new layer's output; their handles remove them; merged layers have them too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    dispatch_model(model, device_map=HERE, force_hooks=True)
    seen: list[tuple[str, torch.Tensor]] = []
    before = model[0].register_forward_pre_hook(lambda module, args: seen.append(("before", args[0])))
    named = model[0].register_forward_hook(lambda m, args, kwargs, y: seen.append(("after", y)), with_kwargs=True)
    backward = model[0].register_full_backward_hook(lambda module, dx, dy: seen.append(("backward", dy[0])))
    options = {"r": 4} if method in ("lora", "lora-xs", "spiel") else {}
    handle = peftfast.adapt(model, method, target_modules=["0", "2"], **options)
    assert isinstance(model[0]._hf_hook, AlignDevicesHook)
    x = torch.randn(4, 64, requires_grad=True)
    outputs: list[torch.Tensor] = []
    last = model[0].register_forward_hook(lambda module, args, y: outputs.append(y))
    model(x).sum().backward()
    assert [what for what, _ in seen] == ["before", "after", "backward"]
    assert torch.equal(seen[1][1], outputs[0])
    copy.deepcopy(model)(x)
    seen.clear()
    plain = handle.merge_and_unload()
    assert isinstance(plain[0]._hf_hook, AlignDevicesHook)
    plain(x)
    assert [what for what, _ in seen] == ["before", "after"] and len(outputs) == 3
    for one in (before, named, backward, last):
        one.remove()
    seen.clear()
    plain(x).sum().backward()
    assert not seen and len(outputs) == 3 and not plain[0]._forward_hooks_with_kwargs


@pytest.mark.parametrize("method", ["id3", "pela"])
def test_a_methods_own_hooks_do_not_outlive_it(method: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    handle = peftfast.adapt(model, method, target_modules=["0", "2"])
    assert any(module._forward_hooks for module in model.modules())
    plain = handle.merge_and_unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_hooks_return_where_files_do_not_fit(tmp_path: Any) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))

    handle = peftfast.adapt(made(), "lora-xs", r=4, target_modules=["0", "1"])
    peftfast.save_adapter(handle.model, tmp_path)
    other = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48))
    calls: list[int] = []
    other[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((ValueError, RuntimeError)):
        peftfast.load_adapter(other, tmp_path)
    assert type(other[0]) is nn.Linear
    other(torch.randn(2, 64))
    assert calls == [1]


def test_a_forward_set_on_a_layer_is_not_lost() -> None:
    """Another layer on its weight would not run it."""
    linear = nn.Linear(64, 32)
    add_hook_to_module(linear, AlignDevicesHook("cpu"))
    LoRALinear.from_linear(linear)
    remove_hook_from_module(linear)  # which leaves the class's forward on the object, bound
    LoRALinear.from_linear(linear)
    add_hook_to_module(linear, Doubles())
    for kind in (LoRALinear, SparseDeltaLinear):
        with pytest.raises(TypeError, match="accelerate's Doubles is on it"):
            kind.from_linear(linear)
    remove_hook_from_module(linear)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    for kind in (LoRALinear, SparseDeltaLinear):
        with pytest.raises(TypeError, match="forward is overridden on the layer itself"):
            kind.from_linear(linear)
    model = nn.Sequential(linear, nn.Linear(32, 64))
    handle = peftfast.adapt(model, "lora", target_modules=["0", "1"])
    assert handle.skipped == {"0": "forward is overridden on the layer itself"} and list(handle.layers) == ["1"]


def test_compiled_on_a_spread_model() -> None:
    """Where the fused path runs, accelerate's hooks on the layers below it do not break the graph."""
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    for layer in net:
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    assert len(peftfast.patch(model).fused) == 2
    x = torch.randn(4, 64)
    expected = model.base_model.model[0](x)
    compiled = torch.compile(model.base_model.model[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_a_new_layers_own_hooks_stay() -> None:
    """Beside those of the layer before it."""
    model = nn.Sequential(nn.Linear(4, 4))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("before"))
    layer = nn.Linear(4, 4)
    own = layer.register_forward_hook(lambda *_: calls.append("own"))
    replace(model, "0", layer)
    model(torch.randn(2, 4))
    assert model[0] is layer and sorted(calls) == ["before", "own"]
    own.remove()
    calls.clear()
    copy.deepcopy(model)(torch.randn(2, 4))
    assert calls == ["before"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("four_bit", [None, "uint8"])
def test_spread_over_two_gpus(four_bit: str | None) -> None:
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    where |= {"model.rotary_emb": 0, "lm_head": 1}
    stock, model = worker.llama(four_bit, where), worker.llama(four_bit, where)
    assert len(peftfast.patch(model).fused) == LAYERS
    loss, grads = trained(stock, device="cuda:0")
    found, found_grads = trained(model, device="cuda:0")
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0.0)
    for name, grad in found_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-5, msg=name)


SWIFTS_CALLS: list[Any] = []


def keep_device_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    SWIFTS_CALLS.append(self)
    return self.forward_origin(args[0].to(self.weight.device), *args[1:], **kwargs)


keep_device_forward.__module__ = "swift.tuners.peft"


def as_swift_makes(model: nn.Module) -> nn.Module:
    """ms-swift gives every lora_A and lora_B a forward that brings x to the weight's device."""
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.forward_origin = module.forward
            module.forward = types.MethodType(keep_device_forward, module)
    return model


@pytest.mark.parametrize("four_bit", [None, "uint8"])
def test_a_model_as_ms_swift_makes_it_runs_fused(four_bit: str | None) -> None:
    plain, model = worker.llama(four_bit), as_swift_makes(worker.llama(four_bit))
    trained(model)
    assert SWIFTS_CALLS  # the forward is the one that stock layers call
    peftfast.patch(plain)
    report = peftfast.patch(model)
    assert len(report.fused) == LAYERS and not report.stock, report
    SWIFTS_CALLS.clear()
    expected = trained(plain)
    check_equal(trained(model), expected)
    check_equal(trained(copy.deepcopy(model)), expected)
    assert not SWIFTS_CALLS
    peftfast.unpatch(model)
    trained(model)
    assert SWIFTS_CALLS


@pytest.mark.parametrize("what", ["another forward", "another package", "around a hook", "of another module"])
def test_a_forward_that_only_resembles_ms_swifts_is_run(what: str) -> None:
    model = as_swift_makes(worker.llama(None))
    peftfast.patch(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if what == "another forward":
        a.forward = types.MethodType(lambda self, x: self.forward_origin(x) * 2, a)
    elif what == "another package":
        made: dict[str, Any] = {"__name__": "swifter.tuners"}
        exec("def keep_device_forward(self, x):\n    return self.forward_origin(x)", made)
        a.forward = types.MethodType(made["keep_device_forward"], a)
    elif what == "around a hook":
        a.forward_origin = types.MethodType(lambda self, x: x @ self.weight.T * 2, a)
    else:
        a.forward = b.forward
    assert list(peftfast.report(model).reasons.values()) == [1]
