"""Patched models that leave: an unpatched layer whose forward someone kept, an adapter that is unloaded, PEFT's hot swapping."""

import pickle
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import peftfast
from peftfast.configs import gated_activation as configs
from tests.support.gated_blocks import MLP, adapted, check_same, inputs, step


@pytest.fixture(autouse=True)
def every_product_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "gated_pays", lambda *_: True)


def test_a_forward_that_was_bound_before_unpatch_is_the_stock_one_after() -> None:
    """accelerate keeps a module's bound forward on the module."""
    model = adapted()
    expected = step(model)
    peftfast.patch(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    check_same(step(model), expected)
    peftfast.unpatch(model)
    check_same(step(model), expected, 1e-12)
    remove_hook_from_submodules(model)
    check_same(step(model), expected, 1e-12)


def test_a_shira_forward_that_was_bound_before_unpatch() -> None:
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(64, 32)), peft.ShiraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 64)
    expected = model(x)
    peftfast.patch(model)
    forward = model.base_model.model[0].forward
    peftfast.unpatch(model)
    assert torch.equal(forward(x), expected)


def test_unpatch_takes_the_norms_of_dora_from_the_weight() -> None:
    options = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(256, 32)), options)
    weight = model.base_model.model[0].base_layer.weight
    before = pickle.dumps(weight)
    peftfast.patch(model)
    model(torch.randn(3, 256))
    assert vars(weight)  # they are kept there
    peftfast.unpatch(model)
    assert not vars(weight) and pickle.dumps(weight) == before


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("first", ["pickled", "called"])
def test_an_unloaded_model_is_a_plain_one(way: str, first: str) -> None:
    """Its files name nothing of peftfast, and its modules are of their own class again."""
    model = adapted()
    peftfast.patch(model)
    step(model)
    plain = getattr(model, way)()
    if first == "pickled":
        data = pickle.dumps(plain)
        assert b"peftfast" not in data
        copy = pickle.loads(data)
        assert type(copy.blocks[0]) is MLP and torch.equal(copy(inputs()), plain(inputs()))
    plain(inputs())
    assert [type(block) for block in plain.blocks] == [MLP] * 2


def test_hot_swapped_adapters(tmp_path: Any) -> None:
    """Scalings become tensors, ranks are padded."""
    other = adapted(r=3, lora_alpha=5)
    other.save_pretrained(tmp_path)
    ours, theirs = adapted(), adapted()
    peftfast.patch(ours)
    check_same(step(ours), step(theirs))
    for model in (ours, theirs):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    check_same(step(ours), step(theirs))
    for model in (ours, theirs):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    check_same(step(ours), step(theirs))
    assert all("tensor" in reason for reason in peftfast.report(ours).stock.values())
    for model in (ours, theirs):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    check_same(step(ours), step(theirs))
