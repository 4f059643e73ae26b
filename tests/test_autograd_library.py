"""Calls that the autograd library (csrc/autograd) makes are those of the Functions in Python; what it must leave to them it leaves."""

import contextlib
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peftfast import functional as F
from peftfast.functional import lora, lora_group, lora_projections, node
from peftfast.functional.nf4_product import shared_dequantization
from peftfast.kernels import launch as launches
from peftfast.ops import native, replay

pytestmark = pytest.mark.skipif(not native.autograd_available()[0], reason=native.autograd_available()[1])
BF16 = torch.bfloat16
N, K, R = 24, 32, 4


@pytest.fixture(autouse=True)
def by_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto")


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTFAST_AUTOGRAD", "python")
        before = calls()
        yield
        assert calls() == before


def calls() -> tuple[int, int]:
    """Forward and backward calls that the library has made, of all Functions."""
    counted = [one.native.counts() for one in node.known() if one.native]
    return sum(one["forwards"] for one in counted), sum(one["backwards"] for one in counted)


@contextlib.contextmanager
def made(forwards: int, backwards: int) -> Iterator[None]:
    """Exactly so many calls within the block are the library's."""
    before = calls()
    yield
    after = calls()
    assert (after[0] - before[0], after[1] - before[1]) == (forwards, backwards)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(randn(R, K, seed=seed + 1, dtype=dtype)), nn.Parameter(randn(N, R, seed=seed + 2, dtype=dtype))


WEIGHT, (A, B) = randn(N, K), factors()


def layer(x: Tensor, **options: Any) -> Tensor:
    return F.lora_linear(x, WEIGHT, A, B, scaling=1.5, **options)


def settle(call: Callable[[], Any]) -> None:
    """Two times: seen, and recorded."""
    for _ in range(2):
        out = call()
        (out if isinstance(out, Tensor) else sum(one.sum() for one in out)).sum().backward()


def fresh(*shape: int, seed: int = 5) -> Tensor:
    return randn(*(shape or (5, K)), seed=seed).requires_grad_()


Options = tuple[Callable[..., Any], list[Tensor]]


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


def _projections(general: bool = False) -> Options:
    own = [factors(seed=4 * i) for i in range(3)]
    ps = [
        F.Projection(randn(N, K, seed=i), a, b, 0.5 + i, dropout_p=0.3, seed=torch.tensor([i]))
        for i, (a, b) in enumerate(own)
    ]
    if general:
        own[0][0].requires_grad_(False)
    wanted = [one for pair in own for one in pair if one.requires_grad]
    return lambda x: F.lora_linears(x, ps), wanted


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
    "projections": _projections,
    "projections of which one A is frozen": lambda: _projections(general=True),
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


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


WATCHERS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": SeesOperators,
    "a mode of functions": SeesFunctions,
    "two modes of functions": lambda: _both(torch.device("cpu"), SeesFunctions()),
    "the profiler": lambda: torch.autograd.profiler.profile(),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", dtype=BF16),
    "forward-mode differentiation": forward_ad.dual_level,
}


@contextlib.contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_watches_single_operators_sees_python(watcher: str) -> None:
    x = fresh()
    for _ in range(3):
        y = layer(x)
        y.sum().backward()
    waiting = layer(x)
    # A forward under autocast has turned it off by then, and torch.autograd.backward leaves the modes of functions.
    seen = {"autocast": (2, 0), "a mode of functions": (0, 3), "two modes of functions": (0, 3)}
    with made(*seen.get(watcher, (0, 0))), WATCHERS[watcher]():
        for _ in range(3):
            y = layer(x).sum()
            if watcher != "forward-mode differentiation":
                torch.autograd.backward([y])
                torch.autograd.backward([waiting.sum()], retain_graph=True)  # a node of the library's
    with made(1, 1):
        layer(x).sum().backward()


def test_what_no_kernel_follows_is_refused_as_in_python() -> None:
    x = fresh()
    settle(lambda: layer(x))
    with made(0, 0):
        for transform in (torch.func.grad(lambda one: layer(one).sum()), torch.func.vmap(layer)):
            with pytest.raises(RuntimeError, match="setup_context"):
                transform(x.detach())
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            layer(forward_ad.make_dual(x.detach(), x.detach()))
    with made(1, 0), pytest.raises(RuntimeError, match="create_graph=True: peftfast"):
        torch.autograd.grad(layer(x).sum(), [x], create_graph=True)


def test_a_default_device_is_no_watcher_and_nothing_is_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU beside ``torch.set_default_device("cuda")``."""
    monkeypatch.undo()  # a default device is for torch's own torch.empty
    torch.utils._device._device_constructors.cache_clear()
    x, magnitude = fresh(), torch.ones(N)
    try:
        for k in range(3):
            with torch.device("meta"), made(k > 0, k > 0):
                assert torch.empty(1).is_meta
                y = F.lora_linear(x, WEIGHT, A, B, magnitude=magnitude)
                y.sum().backward()
                assert y.device.type == "cpu"
    finally:
        torch.utils._device._device_constructors.cache_clear()


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
    call, wanted = _projections()
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
    """A batch of sequences is seen as rows, and rows of 4-bit weights are many: both of tensors that are inferred and of others."""
    weight = F.nf4_quantize(randn(64, K))
    b = randn(64, R, seed=2).requires_grad_()
    x = randn(3, 30, K)
    with torch.inference_mode():
        inferred = x.clone()

    def call(given: Tensor) -> Tensor:
        return F.lora_linear(given, weight, A, b, dropout_p=0.1, seed=3)

    ways: list[Callable[[], Tensor]] = [lambda: call(x)]
    ways += [torch.inference_mode()(lambda: call(inferred)), torch.inference_mode()(lambda: call(x))]
    ways += [torch.no_grad()(lambda: call(inferred))]
    with in_python():
        expected = [way() for way in ways]
    for first in range(len(ways)):
        replay.forget()
        order = ways[first:] + ways[:first]
        [way() for way in order[:1] * 2]
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


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class Counts(Saves):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x.exp())
        return x * 1, x.argmax(), None

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Tensor:
        return dy * ctx.saved_tensors[0]


class Hides(Saves):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.own = {"exp": x.exp()}
        return x * 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.own["exp"]


class Views(Saves):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x * 1
        ctx.save_for_backward(x.exp())
        return y[:]


REFUSED = [(Saves, "hold itself"), (Counts, "no gradient"), (Hides, "an attribute of ctx"), (Views, "a view")]


@pytest.mark.parametrize("kind, refusal", REFUSED)
def test_functions_that_are_not_held(kind: Any, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    real = replay.Recorder.refuse
    monkeypatch.setattr(replay.Recorder, "refuse", lambda self, reason: (refused.append(reason), real(self, reason)))
    function = node.Function(kind)
    gc.collect()
    for k in range(4):
        x = fresh(3, seed=k)
        y = function.apply(x)
        y = y if isinstance(y, Tensor) else y[0]
        y.sum().backward()
        assert torch.equal(x.grad, x.detach().exp())  # type: ignore[arg-type]
        alive = weakref.ref(y)
        del y
        assert alive() is None
    assert any(refusal in one for one in refused)
    assert function.native.counts()["recorded"] == 0


def test_errors_are_the_functions_own() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, when: str) -> Tensor:
            ctx.when = when
            if when == "forward":
                raise LookupError(when)
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            if ctx.when == "backward":
                raise LookupError(ctx.when)
            return dy[:1] * 2, None

    function = node.Function(Fails)
    for _ in range(4):
        with pytest.raises(LookupError, match="forward"):
            function.apply(fresh(), "forward")
        with pytest.raises(LookupError, match="backward"):
            function.apply(fresh(), "backward").sum().backward()
        with pytest.raises(RuntimeError, match="FailsBackward returned an invalid gradient at index 0"):
            function.apply(fresh(), "").sum().backward()
    with pytest.raises(TypeError):
        function.apply(fresh(), when="")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_call_that_has_no_memory_for_a_recording_is_left_to_python(where: str) -> None:
    tried: list[str] = []

    def work(here: str, given: Tensor) -> Tensor:
        if launches.recording():
            tried.append(here)
            if here == where:
                raise torch.OutOfMemoryError("full")
        return given * 2

    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return work("forward", x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return work("backward", dy)

    function = node.Function(Large)
    for _ in range(5):
        x = fresh()
        function.apply(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))  # type: ignore[arg-type]
    counts = function.native.counts()
    assert (counts["forwards"], counts["backwards"]) == ((0, 0) if where == "forward" else (4, 0))
    assert tried == (["forward"] if where == "forward" else ["forward", "backward"])  # once


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
    call, wanted = _projections()
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
    call, wanted = _projections()

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
