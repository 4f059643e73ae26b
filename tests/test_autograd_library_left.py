"""What the autograd library (csrc/autograd) must leave to the Functions in Python it leaves."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftfast import functional as F
from peftfast.functional import lora, node
from peftfast.kernels import launch as launches
from peftfast.ops import native, replay
from tests.support.autograd_calls import (
    BF16,
    WEIGHT,
    A,
    B,
    N,
    fresh,
    layer,
    made,
    settle,
)

pytestmark = pytest.mark.skipif(not native.autograd_available()[0], reason=native.autograd_available()[1])


@pytest.fixture(autouse=True)
def by_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto")


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


def test_what_no_kernel_follows_is_refused_as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the public function would not have taken it to the definition."""
    x = fresh()
    monkeypatch.setattr(lora, "by_definition", lambda: False)
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
