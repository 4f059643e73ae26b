"""Groups where a block's forward is not all there is: parts of it under a checkpoint, layers that are replaced, siblings whose
backward passes are apart, and backward passes under autocast."""

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfast
from peftfast.configs import lora as configs
from peftfast.integrations import peft_groups
from tests.support.patched_blocks import (
    Counts,
    adapted,
    attention,
    check_same,
    groups_in,
    inputs,
    patched_pair,
    stack_of,
    step,
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(autouse=True)
def groups_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "group_pays", lambda *_: True)


def with_forward(model: nn.Module, forward: Any) -> nn.Module:
    for block in stack_of(model).blocks:
        block.forward = lambda x, block=block: forward(block, x)
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("part", "dropout"), [("qkv", 0.0), ("qkv", 0.3), ("q", 0.0), ("k", 0.0)])
def test_a_part_of_a_block_under_a_checkpoint(part: str, reentrant: bool, dropout: float) -> None:
    """Its recomputation runs outside of the block's forward, where nothing is shared: so must it have run the first time."""

    def forward(block: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x)

        def run(names: str) -> Any:
            def some(x: Tensor) -> tuple[Tensor, ...]:
                found = []
                for name in names:
                    found.append(getattr(block, name)(x))
                    torch.rand(3)
                return tuple(found)

            return some

        if part == "qkv":
            q, k, v = checkpoint(run("qkv"), x, use_reentrant=reentrant)
        else:
            found = {n: checkpoint(run(n), x, use_reentrant=reentrant) if n == part else run(n)(x) for n in "qkv"}
            q, k, v = (found[n][0] for n in "qkv")
        return block.o(torch.tanh(k) * torch.sigmoid(v)) + q

    grouped, alone = (with_forward(one, forward) for one in patched_pair(warm=0, lora_dropout=dropout))
    for seed in range(5):
        check_same(step(grouped, seed=seed), step(alone, seed=seed))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_replaced_layers_are_gone_at_once(four_bit: bool, merged: bool, no_collector: None) -> None:
    """With their adapters and, in 4 bits, the weight of before the merge: no block keeps them, nor a hook."""
    model = adapted(four_bit)
    peftfast.patch(model)
    step(model)
    step(model)
    layer = attention(model).k
    held = [weakref.ref(layer), weakref.ref(layer.lora_A["default"].weight)]
    if four_bit and merged:
        held.append(weakref.ref(layer.base_layer.weight))
    del layer
    model.zero_grad()
    base = model.merge_and_unload() if merged else model.unload()
    assert [one() for one in held] == [None] * len(held)
    assert not any(peft_groups._BLOCK in module.__dict__ for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert base(inputs()).isfinite().all()


def test_a_layer_that_is_replaced_ends_its_group_alone(counts: Counts) -> None:
    grouped, alone = patched_pair()
    for model in (grouped, alone):
        attention(model).v = attention(model).v.base_layer
    assert [len(group.members) for group in groups_in(grouped)] == [3]
    assert counts.during(lambda: check_same(step(grouped), step(alone)))[1] == 1


def test_siblings_on_a_leaf_keep_a_graph_each() -> None:
    """There is no graph behind x that a second backward pass would find freed."""

    def forward(block: Any, x: Tensor) -> Any:
        return SimpleNamespace(q=block.q(x), k=block.k(x))

    models = [with_forward(one, forward) for one in patched_pair(blocks=1, warm=0)]
    for _ in range(3):
        grads = []
        for model in models:
            model.zero_grad()
            x = inputs()
            heads = model(x)
            heads.q.square().sum().backward()
            heads.k.square().sum().backward()
            named = attention(model).named_parameters()
            grads.append({"x": x.grad} | {n: p.grad for n, p in named if p.grad is not None})
            del heads
        check_same(*grads)


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_under_autocast_is_that_without(dtype: torch.dtype, groups: bool) -> None:
    """Its products are of the dtype that the forward had."""
    model = adapted(blocks=1).to(dtype)
    peftfast.patch(model, groups=groups)
    x = inputs().detach().to(dtype).requires_grad_()
    attention(model)(x)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        y = attention(model)(x)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            y.backward(torch.ones_like(y))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        del y
    assert found[0].keys() == found[1].keys() and any(".k." in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len(groups_in(model)) == groups and all(group.together for group in groups_in(model))
