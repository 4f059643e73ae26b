"""Calls that the autograd library (csrc/autograd) makes are those of the Functions in Python, and others are other calls."""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast import functional as F
from peftfast.functional import node
from peftfast.functional.nf4_product import shared_dequantization
from peftfast.ops import native, replay
from tests.support.autograd_calls import (
    BF16,
    WEIGHT,
    A,
    B,
    K,
    N,
    Options,
    R,
    calls,
    factors,
    fresh,
    in_python,
    layer,
    made,
    projections,
    randn,
    settle,
)

pytestmark = pytest.mark.skipif(not native.autograd_available()[0], reason=native.autograd_available()[1])


@pytest.fixture(autouse=True)
def by_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto")


def _layer(dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, **options: Any) -> Options:
    a, b = factors(adapter or dtype)
    given = {
        name: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in options.items()
    }
    weight = given.pop("weight", WEIGHT.to(dtype))
    if isinstance(weight, str):
        weight = F.nf4_quantize(randn(64, K))
        b = nn.Parameter(randn(64, R, seed=2))
    wanted = [a, b, *[one for one in given.values() if isinstance(one, Tensor) and one.requires_grad]]
    return lambda x: F.lora_linear(x.to(dtype), weight, a, b, scaling=0.5, **given), wanted


def _frozen_a() -> Options:
    a, b = factors()
    a.requires_grad_(False)
    return lambda x: F.lora_linear(x.detach(), WEIGHT, a, b), [b]


def _trained_weight() -> Options:
    a, b = factors()
    weight, bias = nn.Parameter(randn(N, K)), nn.Parameter(randn(N))
    return lambda x: F.lora_linear(x, weight, a, b, bias=bias), [a, b, weight, bias]


def _gated() -> Options:
    a, b = factors()
    return lambda x: F.lora_gated_linear(x, x * 2, WEIGHT, a, b, activation="gelu"), [a, b]


OPTIONS: dict[str, Callable[[], Options]] = {
    "plain": _layer,
    "biases": lambda: _layer(bias=randn(N), lora_bias=randn(N).requires_grad_()),
    "dropout": lambda: _layer(dropout_p=0.4, seed=torch.tensor([7])),
    "bfloat16": lambda: _layer(BF16),
    "bfloat16 with float32 adapters": lambda: _layer(BF16, torch.float32),
    "float64, which the definition serves": lambda: _layer(torch.float64),
    "4 bits": lambda: _layer(weight="nf4"),
    "DoRA": lambda: _layer(magnitude=(randn(N).abs() + 1).requires_grad_()),
    "frozen A and x": _frozen_a,
    "a trained weight": _trained_weight,
    "projections": projections,
    "projections of which one A is frozen": lambda: projections(general=True),
    "a gated product": lambda: (lambda x: F.gated_activation(x, x + 1), []),
    "a gated layer": _gated,
}


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K)])
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients_are_those_of_python(name: str, shape: tuple[int, ...]) -> None:
    call, wanted = OPTIONS[name]()

    def outcome(seed: int) -> list[Tensor]:
        x = fresh(*shape, seed=seed)
        found = call(x)
        ys = [found] if isinstance(found, Tensor) else list(found)
        inputs = wanted if name.startswith("frozen") else [x, *wanted]
        grads = torch.autograd.grad(ys, inputs, [randn(*y.shape, seed=9, dtype=y.dtype) for y in ys])
        return [*[y.detach() for y in ys], *grads]

    with in_python():
        expected = [outcome(seed) for seed in (1, 2, 3)]
    found = [outcome(1)]
    with made(2, 2):
        found += [outcome(2), outcome(3)]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            assert (one.dtype, one.stride(), one.is_contiguous()) == (
                other.dtype,
                other.stride(),
                other.is_contiguous(),
            )


def test_another_way_is_another_call() -> None:
    """What the keys must tell apart, with the same shapes throughout."""
    x, other = fresh(), WEIGHT.T.contiguous().T
    variants: list[Callable[[], Tensor]] = [
        lambda: layer(x),
        lambda: layer(x[:, ::1].T.contiguous().T),
        lambda: F.lora_linear(x, other, A, B, scaling=1.5),
        lambda: F.lora_linear(x, WEIGHT, A, B, scaling=2.5),
        lambda: F.lora_linear(x, WEIGHT, A.detach(), B, scaling=1.5),
        lambda: layer(x.detach()),
        lambda: layer(x[:1].expand(5, K)),
        lambda: layer(fresh(5, K + 1)[:, 1:]),
        lambda: F.lora_linear(x, WEIGHT[:1].expand(N, K), A, B, scaling=-0.0),
        lambda: F.lora_linear(x, WEIGHT[:1].expand(N, K), A, B, scaling=0.0),
    ]

    def outcome(call: Callable[[], Tensor]) -> list[Any]:
        y = call()
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, A, B], allow_unused=True)]

    with in_python():
        expected = [outcome(call) for call in variants]
    for k in range(3):
        with made(*[0 if k == 0 else len(variants)] * 2):
            found = [outcome(call) for call in variants]
        for ours, theirs in zip(found, expected, strict=True):
            for one, two in zip(ours, theirs, strict=True):
                assert (one is None and two is None) or torch.equal(one, two)


def test_a_recording_is_given_no_tensor_twice() -> None:
    """It tells its arguments apart by their identity: the same one again comes as another tensor on the same memory."""
    x, w = torch.randn(3), torch.nn.Parameter(torch.randn(3))
    flat: list[Any] = []
    node._apart([x, 1.0, (x, w), w], flat, set())
    tensors = [one for one in flat if isinstance(one, torch.Tensor)]
    assert len({id(one) for one in tensors}) == 4 and [type(one) for one in tensors] == [
        type(x),
        type(x),
        type(w),
        type(w),
    ]
    assert [one.data_ptr() for one in tensors] == [one.data_ptr() for one in (x, x, w, w)]


def test_inference_and_training_share_recordings() -> None:
    frozen = [one.detach() for one in (A, B)]
    for adapter, backwards in ((frozen, 0), ([A, B], 2)):
        with torch.inference_mode():
            inferred = [F.lora_linear(fresh().detach(), WEIGHT, *adapter) for _ in range(3)]
        assert all(one.is_inference() for one in inferred)
        with made(2, backwards):
            for _ in range(2):
                y = F.lora_linear(fresh().detach(), WEIGHT, *adapter)
                assert not y.is_inference() and y.requires_grad == (backwards > 0)
                if backwards:
                    y.sum().backward()
                    assert not A.grad.is_inference()  # type: ignore[union-attr]
    with torch.inference_mode():
        x = torch.ones(5, K)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            layer(x)


def test_views_have_no_versions_in_inference_mode() -> None:
    """The factors are transposed where the compute dtype is not that of x, and a batch of sequences is seen as rows."""
    b = randn(64, R, seed=2).requires_grad_()
    x = randn(3, 30, K)
    with torch.inference_mode():
        inferred = x.clone()

    def call(weight: Any, given: Tensor) -> Tensor:
        return F.lora_linear(given, weight, A, b, dropout_p=0.1, seed=3, compute_dtype=BF16)

    for weight in (F.nf4_quantize(randn(64, K)), randn(64, K)):
        ways: list[Callable[[], Tensor]] = [functools.partial(call, weight, x)]
        ways += [torch.inference_mode()(functools.partial(call, weight, given)) for given in (inferred, x)]
        ways += [torch.no_grad()(functools.partial(call, weight, inferred))]
        with in_python():
            expected = [way() for way in ways]
        for first in range(len(ways)):
            replay.forget()
            for _ in range(2):  # recorded by another mode each time
                ways[first]()
            with made(len(ways), 0):
                for way, one in zip(ways, expected, strict=True):
                    y = way()
                    assert torch.equal(y, one) and y.is_inference() == one.is_inference()


def test_needs_are_told_where_no_graph_is_recorded() -> None:
    """As torch tells them: shared_dequantization takes one route by them, which a checkpoint's two forwards must both take."""
    told: list[Any] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            told.append(ctx.needs_input_grad)
            return x * 2

    function = node.Function(Doubled)
    with torch.no_grad():
        for _ in range(3):
            assert not function.apply(fresh()).requires_grad
    assert told == [(True,)] * 2 and function.native.counts()["forwards"] == 2
    weight, a, b = F.nf4_quantize(randn(64, 64)), randn(R, 64, seed=1), nn.Parameter(randn(64, R, seed=2))
    seed = torch.tensor([1])
    with shared_dequantization(), torch.no_grad():
        ys = [F.lora_linear(fresh(80, 64), weight, a, b, dropout_p=0.1, seed=seed) for _ in range(3)]
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])


def test_arguments_of_every_kind() -> None:
    """Those that no recording holds, and those that are alike but for their kind."""

    class Names(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Tensor:
            return torch.full((2,), float(len(repr(given))))

    class Text(str):
        pass

    nested: Any = ()
    for _ in range(50):
        nested = (nested,)
    function = node.Function(Names)
    kinds: list[tuple[Any, ...]] = [
        (), (1,), (1.0,), (True,), (None,), ("1",), (Text("11"),), (2**70,), (-(2**63),), (float("nan"),), (0.0,), (-0.0,), ([],),
        ((),), ([1],), ((1,), 1), (((1,), 1),), (torch.float32,), (torch.Size([1]),), (nested,), tuple(range(65)), tuple(range(64)),
    ]  # fmt: skip
    for _ in range(3):
        for given in kinds:
            assert function.apply(*given).tolist() == [float(len(repr(given)))] * 2, given


def test_one_parameter_in_two_places() -> None:
    square = nn.Parameter(randn(8, 8))

    def outcome(tied: bool) -> list[Tensor]:
        a, b = (square, square) if tied else (nn.Parameter(square.detach() * 2), nn.Parameter(square.detach() * 3))
        x = fresh(8, 8)
        y = F.lora_linear(x, square, a, b)
        return [
            y.detach(),
            *torch.autograd.grad(y.square().sum(), list({id(one): one for one in (x, square, a, b)}.values())),
        ]

    with in_python():
        expected = [outcome(True), outcome(False)]
    outcome(True)
    with made(4, 4):
        for _ in range(2):
            for tied, wanted in zip((True, False), expected, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(outcome(tied), wanted, strict=True))


@pytest.mark.interpreter
def test_a_parameter_beside_its_detached_self(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels find the factors of several adapters by a table of their addresses, of which the key holds those of parameters alone."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)
    frozen = nn.Parameter(randn(R, K, seed=1), requires_grad=False)
    x, bs = randn(5, K), [factors(seed=i)[1] for i in range(2)]

    def results(second: Tensor) -> tuple[Tensor, ...]:
        own = [F.Projection(WEIGHT, a, b) for a, b in zip((frozen, second), bs, strict=True)]
        return tuple(y.detach() for y in F.lora_linears(x, own))

    for _ in range(2):
        results(frozen.detach())
    other = randn(R, K, seed=9)
    found = results(other)
    expected = F.lora_linear(x, WEIGHT, other, bs[1]).detach()
    assert torch.allclose(found[1], expected, atol=1e-4)


def test_a_variable_that_changes_while_calls_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks for Python just as the library is told the number of what was so far."""

    class Interrupted(dict[Any, int]):
        def setdefault(self, key: Any, default: Any = None) -> Any:
            os.environ["PEFTFAST_AUTOGRAD"] = "python"
            return super().setdefault(key, default)

    x = fresh()
    settle(lambda: layer(x))
    layer(x)
    monkeypatch.setattr(node, "_numbers", Interrupted(node._numbers))
    monkeypatch.setenv("PEFTFAST_REPLAY", "auto")  # another value: the number is asked for
    with made(0, 0):
        for _ in range(4):
            layer(x).sum().backward()


def test_threads_that_call_while_recordings_are_dropped() -> None:
    call, wanted = projections()
    xs = [fresh(rows, K, seed=rows).detach() for rows in (5, 7)]

    def outcome(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        ys = call(x)
        return list(torch.autograd.grad((ys[0] * layer(x)).sum() + ys[1].sum(), [x, A, *wanted[:4]]))

    with in_python():
        expected = [outcome(x) for x in xs]
    wrong: list[Any] = []
    until, threads_of_torch = time.monotonic() + 1.0, torch.get_num_threads()

    def work(which: int) -> None:
        try:
            torch.set_num_threads(threads_of_torch)  # a new thread has its own number, and another order of summation
            while time.monotonic() < until:
                found = outcome(xs[which])
                wrong.extend(
                    which for one, other in zip(found, expected[which], strict=True) if not torch.equal(one, other)
                )
        except BaseException as error:
            wrong.append(error)

    def drop() -> None:
        while time.monotonic() < until:
            replay.forget()
            time.sleep(0.005)

    before, switch = calls(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(k % 2,)) for k in range(4)] + [threading.Thread(target=drop)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong
    assert calls()[0] > before[0] and calls()[1] > before[1]
