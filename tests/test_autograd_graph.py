"""The autograd library's nodes in the graph: saved tensors, hooks, checkpoints, threads, and what they hold."""

import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftfast import functional as F
from peftfast.functional import lora, lora_group, lora_projections, node
from peftfast.ops import native
from tests.support.autograd_calls import (
    BF16,
    WEIGHT,
    A,
    B,
    K,
    N,
    R,
    calls,
    factors,
    fresh,
    in_python,
    layer,
    made,
    projections,
    settle,
)

pytestmark = pytest.mark.skipif(not native.autograd_available()[0], reason=native.autograd_available()[1])


@pytest.fixture(autouse=True)
def by_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto")


def test_the_node_is_the_graph_s_as_any_other() -> None:
    def seen() -> list[Any]:
        x = fresh(2, 3, K)
        for _ in range(3):
            y = layer(x, bias=torch.zeros(N))
        kind = [y.grad_fn.name(), y.is_leaf, y._is_view(), y._version, y.output_nr, y.grad_fn.metadata]
        after = [(None if one is None else one.name(), number) for one, number in y.grad_fn.next_functions]
        told: list[Any] = []
        y.grad_fn.register_prehook(lambda dys: told.append([tuple(dy.shape) for dy in dys]))
        y.grad_fn.register_hook(lambda dxs, dys: told.append([None if dx is None else tuple(dx.shape) for dx in dxs]))
        edge = torch.autograd.graph.get_gradient_edge(y)
        through = torch.autograd.grad((y * 2).sum(), [edge], retain_graph=True)[0]
        unused = torch.autograd.grad(
            y.sum(), [x, torch.ones(1, requires_grad=True)], allow_unused=True, retain_graph=True
        )[1]
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()
        return [*kind, after, told, through.unique().tolist(), unused, x.grad.tolist()]

    with in_python():
        expected = seen()
    with made(2, 3):  # the gradient of the edge asks for nothing of the node
        assert seen() == expected
    assert str(layer(fresh(2, 3, K), bias=torch.zeros(N))).endswith("grad_fn=<LoRALinearFunctionBackward>)")


def test_a_result_may_be_written_into() -> None:
    def grad() -> Tensor:
        x = fresh(2, 3, K)
        nn.ReLU(inplace=True)(layer(x, bias=torch.ones(N))).sum().backward()
        return x.grad  # type: ignore[return-value]

    with in_python():
        expected = grad()
    grad()
    with made(2, 2):
        assert torch.equal(grad(), expected) and torch.equal(grad(), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_weight_that_is_written_is_noticed(dora: bool) -> None:
    """DoRA saves the detached weight, a view that the recorded call makes anew."""
    weight, x = WEIGHT.clone(), fresh()
    options = {"magnitude": torch.ones(N)} if dora else {}
    settle(lambda: F.lora_linear(x, weight, A, B, **options))
    with made(1, 0):
        y = F.lora_linear(x, weight, A, B, **options)
        weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_parameter_s_data_may_be_another_by_the_backward() -> None:
    def grads() -> list[Any]:
        a, b = factors()
        x = fresh()
        settle(lambda: F.lora_linear(x, WEIGHT, a, b))
        found = []
        for data in (b.detach() * 3, b.detach().T.contiguous().T, b.detach().to(BF16)):
            y = F.lora_linear(x, WEIGHT, a, b)
            b.data = data
            found += torch.autograd.grad(y.sum(), [x, a])
            b.data = b.detach().float().contiguous()
        return found

    with in_python():
        expected = grads()
    with made(4, 4):
        found = grads()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "kept in bfloat16": (lambda one: one.to(BF16), lambda one: one.float() if one.is_floating_point() else one.long()),
    "given as float64": (lambda one: one, lambda one: one.double()),
    "given transposed": (lambda one: one, lambda one: one.t().contiguous().t() if one.dim() == 2 else one),
    "given sparse": (lambda one: one, lambda one: one.to_sparse()),
    "given on another device": (lambda one: one, lambda one: one.to("meta")),
    "given shorter": (lambda one: one, lambda one: one[:1]),
    "given as nothing": (lambda one: one, lambda one: None),
    "not given": (lambda one: one, lambda one: {}[one]),
    "not kept": (lambda one: {}[one], lambda one: one),
}


@pytest.mark.parametrize("name", HOOKS)
def test_saved_tensors_go_through_hooks(name: str) -> None:
    def outcome() -> Any:
        x = fresh()
        try:
            with torch.autograd.graph.saved_tensors_hooks(*HOOKS[name]):
                y = layer(x)
            return torch.autograd.grad(y.square().sum(), [x, A, B])
        except Exception as error:
            return type(error), str(error).splitlines()[0]

    with in_python():
        expected = outcome()
    settle(lambda: layer(fresh()))
    before = calls()
    for _ in range(3):
        found = outcome()
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert calls()[0] - before[0] == 3


def test_parameters_that_hooks_give_elsewhere_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their addresses are new at every step, as those of saved tensors that wait on another device are."""
    asked: list[Any] = []
    function = lora_projections.by_library
    own = node.Function(function._function, addressed=True)
    real = own._record_backward
    monkeypatch.setattr(own, "_record_backward", lambda *args: asked.append(args) or real(*args))
    own._choose()
    monkeypatch.setattr(function, "call", own.call)
    monkeypatch.setattr(function, "general", own.general)
    call, wanted = projections()
    held = []
    for _ in range(5):
        x = fresh()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: one.clone()):
            ys = call(x)
        torch.autograd.grad(ys, [x, *wanted], [torch.ones_like(y) for y in ys])
        held.append([torch.empty(N, R) for _ in range(7)])  # what was freed is taken
    assert len(asked) == 1
    assert own.native.counts()["backwards"] == 4


def test_checkpoints_of_both_kinds() -> None:
    def grads(reentrant: bool) -> list[Any]:
        found = []
        for _ in range(3):
            x = fresh()
            torch.manual_seed(3)
            y = checkpoint(
                lambda one: layer(layer(one, dropout_p=0.3) @ WEIGHT, dropout_p=0.3), x, use_reentrant=reentrant
            )
            found += [y.detach(), *torch.autograd.grad(y.sum(), [x, A])] if not reentrant else [y.detach()]
            if reentrant:
                A.grad = None
                y.sum().backward()
                found += [x.grad, A.grad]
        return found

    for reentrant in (False, True):
        with in_python():
            expected = grads(reentrant)
        before = calls()
        found = grads(reentrant)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert calls()[0] > before[0] and calls()[1] > before[1]


def test_nothing_is_kept_of_a_call() -> None:
    gc.collect()
    gc.disable()
    try:
        references = None
        for k in range(40):
            x = fresh(7, K)
            y = layer(x, dropout_p=0.1)
            y.sum().backward(retain_graph=k % 2 == 0)
            with contextlib.suppress(RuntimeError):
                torch.autograd.grad(layer(x).sum(), [x], create_graph=True)
            dead = [weakref.ref(one) for one in (x, y, x.grad)]
            del x, y
            assert [one() for one in dead] == [None] * 3
            if k == 5:
                references = [sys.getrefcount(one) for one in (WEIGHT, A, B)]
        assert references == [sys.getrefcount(one) for one in (WEIGHT, A, B)]
    finally:
        gc.enable()


def test_gradients_are_taken_without_a_copy() -> None:
    addresses: dict[int, int] = {}
    for k in range(4):
        a, b = factors()
        x = fresh()
        for one in (x, a, b):
            one.register_hook(lambda grad, key=id(one): addresses.update({key: grad.data_ptr()}))  # type: ignore[misc]  # noqa: B008
        with made(k > 0, k > 0):
            F.lora_linear(x, WEIGHT, a, b).sum().backward()
        assert all(one.grad.data_ptr() == addresses[id(one)] for one in (x, a, b))  # type: ignore[union-attr]


def test_a_graph_that_two_threads_go_through() -> None:
    x = fresh()
    settle(lambda: layer(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: (time.sleep(2e-4), one)[1]):
        y = layer(x)
    expected = torch.autograd.grad(y.sum(), [x], retain_graph=True)[0]
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(y.sum(), [x], retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60 and all(torch.equal(one, expected) for one in found)


def test_a_hook_may_go_through_the_node_that_asks_it() -> None:
    """Nothing is locked while a saved tensor is asked for. A thread of its own, so that the test ends in any case."""
    x = fresh()
    settle(lambda: layer(x))
    asked: list[Tensor] = []

    def unpack(saved: Tensor) -> Tensor:
        if not asked:
            asked.append(saved)
            with torch.enable_grad():
                torch.autograd.grad(y.sum(), [x], retain_graph=True)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(lambda one: one, unpack):
        y = layer(x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y.sum(), [x])), daemon=True)
    with made(0, 2):
        thread.start()
        thread.join(10)
        assert len(found) == 1


def test_a_group_s_unused_projection_has_no_gradient() -> None:
    call, wanted = projections()

    def outcome(used: tuple[int, ...]) -> list[Any]:
        x = fresh()
        ys = call(x)
        return list(torch.autograd.grad(sum(ys[i].square().sum() for i in used), [x, *wanted], allow_unused=True))

    patterns = [(0,), (1, 2), (0, 1, 2)]
    with in_python():
        expected = [outcome(used) for used in patterns]
    outcome((0,))
    with made(6, 6):
        for _ in range(2):
            for used, wanted_grads in zip(patterns, expected, strict=True):
                for one, other in zip(outcome(used), wanted_grads, strict=True):
                    assert (one is None and other is None) or torch.equal(one, other)
    assert lora_group.by_library is not lora.by_library


class _Stopped(torch.autograd.Function):
    """Gives its first argument no gradient at all."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(one.clone() for one in args)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *dys[1:])


@pytest.mark.parametrize("way", ["library", "python"])
@pytest.mark.parametrize("kind", ["layer", "gated layer", "gated product"])
def test_a_result_without_a_gradient_gives_none(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own operators: an optimiser moves a parameter whose gradient is zeros, by its decay and its moments."""
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto" if way == "library" else "python")
    a, b = factors()
    gate, up = fresh(5, K), fresh(5, K, seed=6)
    run: dict[str, Callable[[], Tensor]] = {
        "layer": lambda: F.lora_linear(gate, WEIGHT, a, b),
        "gated layer": lambda: F.lora_gated_linear(gate, up, WEIGHT, a, b),
        "gated product": lambda: F.gated_activation(gate, up),
    }
    for _ in range(4):
        other = torch.ones(2, requires_grad=True)
        stopped, kept = _Stopped.apply(run[kind](), other)
        (stopped.sum() + kept.sum()).backward()
        assert other.grad is not None
        assert [one.grad for one in (gate, up, a, b)] == [None] * 4
    (run[kind]() * 2).sum().backward()
    assert gate.grad is not None
