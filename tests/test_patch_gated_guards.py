"""Gated MLPs under patch are left alone where anything differs, and served again when it is as before."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.configs import gated_activation as configs
from peftfast.integrations import mlp_form, peft_gated_mlp
from tests.support.gated_blocks import (
    MLP,
    Branch,
    Counts,
    Flag,
    Scaled,
    Stores,
    Twice,
    adapted,
    block_of,
    check_same,
    inputs,
    pair,
    step,
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(autouse=True)
def every_product_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "gated_pays", lambda *_: True)


# What must bring the stock forward back, and what must not; each is undone by what it returns.
def _hook(on: Callable[[Any], Any], kind: str = "register_forward_hook") -> Callable[[Any], Callable[[], None]]:
    def disturb(model: Any) -> Callable[[], None]:
        handle = getattr(on(block_of(model)), kind)(lambda *_: None)
        return handle.remove

    return disturb


def _set(name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    def disturb(model: Any) -> Callable[[], None]:
        block = block_of(model)
        before = getattr(block, name)
        setattr(block, name, value)
        return lambda: setattr(block, name, before)

    return disturb


def _forward_on_the_object(model: Any) -> Callable[[], None]:
    block = block_of(model)
    block.forward = types.MethodType(lambda self, x: MLP.forward(self, x), block)
    return lambda: block.__dict__.pop("forward")


def _global_hook(model: Any) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def _disabled(part: str) -> Callable[[Any], Callable[[], None]]:
    def disturb(model: Any) -> Callable[[], None]:
        layer = getattr(block_of(model), part)
        layer.enable_adapters(False)
        return lambda: layer.enable_adapters(True)

    return disturb


def _merged(model: Any) -> Callable[[], None]:
    layer = block_of(model).down
    layer.merge()
    return layer.unmerge


def _replaced(model: Any) -> Callable[[], None]:
    forward = MLP.forward
    MLP.forward = lambda self, x: forward(self, x)
    return lambda: setattr(MLP, "forward", forward)


def _hidden(name: str, value: Any, on_class: bool = False) -> Callable[[Any], Callable[[], None]]:
    """Python finds an attribute of the object's __dict__, or of its class, before a module of that name."""

    def disturb(model: Any) -> Callable[[], None]:
        block = block_of(model)
        if not on_class:
            block.__dict__[name] = value
            return lambda: block.__dict__.pop(name)
        setattr(MLP, name, staticmethod(value))
        return lambda: delattr(MLP, name)

    return disturb


STOCK: dict[str, Callable[[Any], Callable[[], None]]] = {
    "a hook on act": _hook(lambda block: block.act),
    "a backward hook on act": _hook(lambda block: block.act, "register_full_backward_hook"),
    "another act": _set("act", nn.Tanh()),
    "an act in place": _set("act", nn.SiLU(inplace=True)),
    "forward on the object": _forward_on_the_object,
    "a hook on all": _global_hook,
    "another class's forward": _replaced,
    "act hidden": _hidden("act", torch.tanh),
    "gate hidden": _hidden("gate", lambda x: torch.cat([x, x], -1)),
    "act hidden by the class": _hidden("act", torch.tanh, on_class=True),
    "up hidden by the class": _hidden("up", lambda x: torch.cat([x, x], -1), on_class=True),
    "gate disabled": _disabled("gate"),
    "down disabled": _disabled("down"),
    "down merged": _merged,
}
SERVED: dict[str, tuple[Callable[[Any], Callable[[], None]], tuple[int, int]]] = {
    "a hook on the block": (_hook(lambda block: block), (2, 0)),
    "a backward hook on the block": (_hook(lambda block: block, "register_full_backward_hook"), (2, 0)),
    "a hook on gate": (_hook(lambda block: block.gate), (2, 0)),
    "a hook on up's base": (_hook(lambda block: block.up.base_layer), (2, 0)),
    "a hook on down": (_hook(lambda block: block.down), (1, 1)),
    "a hook on down's A": (_hook(lambda block: block.down.lora_A["default"]), (1, 1)),
    "another known act": (_set("act", nn.ReLU()), (2, 0)),
    "gate without adapter": (lambda model: _set("gate", block_of(model).gate.base_layer)(model), (2, 0)),
    "down without adapter": (lambda model: _set("down", block_of(model).down.base_layer)(model), (1, 1)),
}


@pytest.mark.parametrize("what", [*STOCK, *SERVED])
def test_disturbances(what: str, counts: Counts) -> None:
    """Values are those of the same disturbed model with stock MLPs; and all is as before when the disturbance is gone."""
    ours, theirs = pair()
    disturb, expected = (STOCK[what], (1, 0)) if what in STOCK else SERVED[what]
    if what in ("a hook on all", "another class's forward") or "by the class" in what:
        expected = (0, 0)
    undo = disturb(ours)
    found: list[dict[str, Tensor]] = []
    assert counts.during(lambda: found.append(step(ours))) == expected
    if what in STOCK and what != "forward on the object":
        assert peftfast.report(ours).mlps[0].reason
    undo()
    undo = disturb(theirs)
    check_same(found[0], step(theirs))
    undo()
    assert counts.during(lambda: check_same(step(ours), step(theirs))) == (2, 0)


def test_hooks_of_the_members_run_once() -> None:
    model = adapted()
    seen: list[str] = []
    block = block_of(model)
    for name in ("gate", "up", "down"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    block.register_forward_hook(lambda *_: seen.append("block"))
    peftfast.patch(model)
    model(inputs())
    assert seen == ["gate", "up", "down", "block"]


def test_odd_calls_go_to_the_stock_forward(counts: Counts) -> None:
    model = adapted()
    peftfast.patch(model)
    block, x = block_of(model), inputs().tanh()
    expected = block(x)
    assert counts.during(lambda: block(x=x)) == (0, 0)
    torch.testing.assert_close(block(x=x), expected)
    with pytest.raises(TypeError):
        block(x, x)
    with pytest.raises(TypeError):
        block()
    wide = adapted().double()
    peftfast.patch(wide)
    assert counts.during(lambda: wide(inputs().double())) == (0, 0)


class Noticing(MLP):
    kinds: list[type] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Noticing.kinds.append(cls)


def test_a_class_that_counts_its_children_is_left_alone(counts: Counts) -> None:
    model = adapted(Noticing)
    report = peftfast.patch(model)
    assert not Noticing.kinds and type(block_of(model)) is Noticing
    assert "inherit" in report.mlps[0].reason and "inherit" in str(report)
    assert counts.during(lambda: step(model)) == (0, 0)


class Shadowing(MLP):
    act = staticmethod(torch.tanh)  # found before the member of that name


class LooksUp(MLP):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("up" if name == "gate" else name)


@pytest.mark.parametrize("kind", [Shadowing, LooksUp])
def test_members_that_are_found_elsewhere(kind: type, counts: Counts) -> None:
    model = adapted(kind)
    expected = step(model)
    peftfast.patch(model)
    assert type(block_of(model)) is kind
    assert counts.during(lambda: check_same(step(model), expected)) == (0, 0)


def test_a_forward_set_before_patching_is_left_alone(counts: Counts) -> None:
    """As Liger sets it on the module object."""
    model = adapted()
    block = block_of(model)
    block.forward = types.MethodType(lambda self, x: self.down(torch.tanh(self.gate(x)) * self.up(x)), block)
    report = peftfast.patch(model)
    assert type(block) is MLP and report.mlps[0].reason == "forward is overridden on the module itself"
    assert counts.during(lambda: step(model)) == (1, 0)


@pytest.mark.parametrize("kind", [Branch, Flag, Stores, Scaled, Twice])
def test_modules_of_another_form_keep_their_class(kind: type) -> None:
    model = adapted(kind)
    report = peftfast.patch(model)
    assert type(block_of(model)) is kind and not report.mlps


GUARDS: dict[str, tuple[str, Any, str]] = {
    "hooks": ("hooked", lambda module: False, "a hook on act"),
    "the forward": ("Form.holds", lambda self, function: True, "another class's forward"),
    "the state": ("why_not", lambda module, stock, form: "", "down disabled"),
    "the activation": ("_activation", lambda form, act: "silu", "another act"),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_planted_faults_in_the_guards_are_noticed(guard: str, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fault, what = GUARDS[guard]
    if name == "Form.holds":
        monkeypatch.setattr(mlp_form.Form, "holds", fault)
    else:
        monkeypatch.setattr(peft_gated_mlp, name, fault)
    forward = MLP.forward
    try:
        with pytest.raises(AssertionError):
            test_disturbances(what, counts)
    finally:
        MLP.forward = forward  # type: ignore[method-assign]
