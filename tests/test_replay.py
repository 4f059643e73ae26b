"""Replayed calls (peftfast.ops.replay) give what the calls themselves give, and what may not be replayed is not."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast import functional as F
from peftfast import ops
from peftfast.functional.node import known
from peftfast.kernels import launch as launches
from peftfast.ops import replay
from peftfast.ops.replay import Recording, Replayed

pytestmark = pytest.mark.interpreter
F32 = torch.float32


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels on CPU tensors are replayed as a GPU's are."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)


def recordings() -> list[Recording]:
    return [one for each in replay._all for one in each.recordings.values() if isinstance(one, Recording)]


@pytest.fixture(params=["library", "python"])
def autograd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether whole Functions are replayed by the autograd library or their parts by Python."""
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "auto" if request.param == "library" else "python")
    return request.param  # type: ignore[no-any-return]


def calls_by_library() -> int:
    """Forward and backward calls that the autograd library has made."""
    return sum(sum(one.native.counts()[which] for which in ("forwards", "backwards")) for one in known() if one.native)


@contextlib.contextmanager
def replays() -> Iterator[list[Recording]]:
    """The recordings that are used within the block, those of the autograd library left out."""
    used: list[Recording] = []
    real = Recording.__call__

    def watched(self: Recording, flat: list[Any], stream: Any) -> Any:
        used.append(self)
        return real(self, flat, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recording, "__call__", watched)
        yield used


def layer(seed: int, dropout: float = 0.0, quantised: bool = False, shape: tuple[int, ...] = (5,)) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    weight: Any = torch.randn(24, 64, generator=draw)
    return {
        "x": torch.randn(*shape, 64, generator=draw).requires_grad_(),
        "weight": F.nf4_quantize(weight) if quantised else weight,
        "lora_a": torch.randn(3, 64, generator=draw).requires_grad_(),
        "lora_b": torch.randn(24, 3, generator=draw).requires_grad_(),
        "bias": torch.randn(24, generator=draw),
        "lora_bias": torch.randn(24, generator=draw).requires_grad_(),
        "dropout_p": dropout,
        "seed": torch.tensor([seed]) if dropout else None,
        "scaling": 1.5,
    }


def outcome(call: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """Results and gradients."""
    found = call(**given)
    ys = list(found) if isinstance(found, tuple | list) else [found]
    torch.manual_seed(7)
    tensors = [one for one in given.values() if isinstance(one, Tensor) and one.requires_grad]
    for projection in given.get("projections", ()):
        tensors += [one for one in vars(projection).values() if isinstance(one, Tensor) and one.requires_grad]
    grads = torch.autograd.grad(ys, tensors, [torch.randn_like(y) for y in ys])
    return [*[y.detach() for y in ys], *grads]


def group(seed: int, dropout: float = 0.0, quantised: bool = False) -> dict[str, Any]:
    """Three projections on parameters that stay where they are, as a model's do: kernels find them by their addresses."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 64, generator=draw).requires_grad_()
    return {"x": x, "projections": _projections(dropout, quantised)}


_kept: dict[Any, Any] = {}


def _projections(dropout: float, quantised: bool) -> list[F.Projection]:
    if (dropout, quantised) not in _kept:
        draw = torch.Generator().manual_seed(3)
        made = []
        for n, r in ((24, 3), (16, 2), (8, 4)):
            weight: Any = torch.randn(n, 64, generator=draw)
            a = torch.nn.Parameter(torch.randn(r, 64, generator=draw))
            b = torch.nn.Parameter(torch.randn(n, r, generator=draw))
            weight = F.nf4_quantize(weight) if quantised else weight
            seed = torch.tensor([n]) if dropout else None
            made.append(F.Projection(weight, a, b, 0.5 + r, dropout_p=dropout, seed=seed))
        _kept[dropout, quantised] = made
    return _kept[dropout, quantised]  # type: ignore[no-any-return]


def gated(seed: int) -> dict[str, Any]:
    given = layer(seed)
    draw = torch.Generator().manual_seed(seed + 50)
    gate, up = (torch.randn(5, 64, generator=draw).requires_grad_() for _ in range(2))
    del given["x"]
    return {"gate": gate, "up": up, **given}


def expect_like_plain(
    call: Callable[..., Any], make: Callable[[int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, least: int
) -> list[Recording]:
    """Three calls on data of their own, of which the last is replayed, are what they are without replay, bit for bit. Of what
    Python replays there are at least so many; the library replays a forward and a backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTFAST_REPLAY", "never")
        expected = [outcome(call, make(seed)) for seed in (1, 2, 3)]
    with replays() as used:
        for seed, wanted in zip((1, 2, 3), expected, strict=True):
            given = make(seed)
            before, made = len(used), calls_by_library()
            for found, want in zip(outcome(call, given), wanted, strict=True):
                assert torch.equal(found, want), seed
    if os.environ["PEFTFAST_AUTOGRAD"] == "python":
        assert len(used) - before >= least  # the last of them
        assert calls_by_library() == made
    else:
        assert (len(used) - before, calls_by_library() - made) == (0, 2)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer(
    dropout: float, quantised: bool, replaying: None, autograd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (2, 40) if quantised else (2, 3)  # more rows than the few that are decoded on the way
    expect_like_plain(F.lora_linear, lambda seed: layer(seed, dropout, quantised, shape), monkeypatch, least=2)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_group(
    dropout: float, quantised: bool, replaying: None, autograd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_like_plain(F.lora_linears, lambda seed: group(seed, dropout, quantised), monkeypatch, least=2)


def test_the_end_of_a_gated_mlp(replaying: None, autograd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_like_plain(F.lora_gated_linear, gated, monkeypatch, least=3)


def test_an_operator_in_place(replaying: None) -> None:
    s, w = torch.randn(4, 2), torch.randn(8, 2)
    with torch.no_grad(), replays() as used:
        for _ in range(3):
            base = torch.randn(4, 8)
            expected = base + 2.0 * s @ w.T
            ops.lora.lora_expand_(base, s, w, None, None, 0.0, 2.0)
            torch.testing.assert_close(base, expected)
    assert len(used) == 1


X, W = torch.arange(32.0).reshape(4, 8).sin(), torch.arange(16.0).reshape(2, 8).cos()


def shrink(x: Tensor = X, w: Tensor = W, scaling: Any = 1.0, dtype: torch.dtype = F32, seed: Any = None) -> Tensor:
    with torch.no_grad():
        return ops.lora.lora_shrink(x, w, seed, 0.5, scaling, dtype)


def shifted(tensor: Tensor) -> Tensor:
    """The same values at an address that 16 does not divide."""
    room = torch.empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


DIFFERENT: dict[str, Callable[[], dict[str, Any]]] = {
    "rows": lambda: {"x": X[:3].clone()},
    "strides": lambda: {"x": X.T.contiguous().T},
    "row stride": lambda: {"x": torch.cat([X, X], 1)[:, :8]},
    "alignment": lambda: {"x": shifted(X)},
    "dtype": lambda: {"x": X.half()},
    "result's dtype": lambda: {"dtype": torch.float16},
    "scaling": lambda: {"scaling": 2.0},
    "sign of nothing": lambda: {"scaling": -0.0},
    "dropout": lambda: {"seed": torch.tensor([3])},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_other_arguments_are_another_call(what: str, replaying: None) -> None:
    if what == "sign of nothing":
        for _ in range(3):
            shrink(scaling=0.0)
    else:
        for _ in range(3):
            shrink()
    different = DIFFERENT[what]()
    with replays() as used:
        found = shrink(**different)
    assert not used
    replay.forget()
    assert torch.equal(found, shrink(**different))
    assert torch.equal(found.signbit(), shrink(**different).signbit())


def test_other_values_of_a_variable_are_another_call(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        shrink()
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    with replays() as used:
        shrink()
    assert not used
    monkeypatch.setenv("PEFTFAST_REPLAY", "sometimes")
    with pytest.raises(ValueError, match="PEFTFAST_REPLAY: expected one of auto, never, got 'sometimes'"):
        shrink()


def test_a_parameter_given_another_place_is_another_call(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of addresses of a group's adapters is made for them where they lie."""
    for seed in (1, 2, 3):
        outcome(F.lora_linears, group(seed))
    given = group(4)
    for projection in given["projections"]:
        projection.lora_a.data = projection.lora_a.data + 1.0
    found = outcome(F.lora_linears, given)
    monkeypatch.setenv("PEFTFAST_REPLAY", "never")
    for one, want in zip(found, outcome(F.lora_linears, given), strict=True):
        assert torch.equal(one, want)


def watched_by_a_mode() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return Mode()


WATCHERS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": watched_by_a_mode,
    "the profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "autocast": lambda: torch.autocast("cpu"),
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("who", WATCHERS)
def test_watchers_see_single_operators(who: str, replaying: None) -> None:
    for _ in range(3):
        shrink()
    with torch.no_grad(), WATCHERS[who](), replays() as used:
        ops.lora.lora_shrink(X, W, None, 0.5, 1.0, F32)
    assert not used
    with replays() as used:
        shrink()
    assert len(used) == 1


@pytest.mark.compiled
@pytest.mark.parametrize("what", ["layer", "group", "gated"])
def test_a_compiler_sees_one_graph(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a call under torch.compile asks none of what only eager mode can answer."""
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)
    call, make = {
        "layer": (F.lora_linear, layer),
        "group": (F.lora_linears, group),
        "gated": (F.lora_gated_linear, gated),
    }[what]
    given = make(1)
    expected = outcome(call, given)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, want in zip(outcome(compiled, given), expected, strict=True):
        torch.testing.assert_close(found, want)


def calls(function: Callable[..., Any], *args: Any) -> Replayed:
    replayed = Replayed(function)
    with torch.no_grad():
        for _ in range(3):
            replayed(*args)
    return replayed


ELSEWHERE = torch.ones(3)
REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a tensor from elsewhere": (lambda x: x + ELSEWHERE, (torch.ones(3),)),
    "a tensor made of values": (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), (torch.ones(3),)),
    "a value for the host": (lambda x: x * x.sum().item(), (torch.ones(3),)),
    "one tensor twice": (lambda x, y: x + y, (ELSEWHERE, ELSEWHERE)),
    "work on another stream": (lambda x: launches.unrepeatable("a side stream") or x + 1, (torch.ones(3),)),
    "another call's addresses": (
        lambda x: launches.constant(ELSEWHERE, x.clone()) or x + ELSEWHERE,
        (torch.ones(3),),
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_recording_cannot_hold(why: str, replaying: None) -> None:
    function, args = REFUSED[why]
    assert list(calls(function, *args).recordings.values()) == [replay._NEVER]


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "arg", [object(), float("nan"), torch.empty(0), Subclass(), torch.ones(2, 2).to_sparse(), {"a": 1}, 1j]
)
def test_what_is_no_argument_to_record(arg: Any, replaying: None) -> None:
    assert not calls(lambda x, y: x + 1, torch.ones(3), arg).recordings


def test_results_of_every_kind(replaying: None) -> None:
    def function(x: Tensor, several: list[Tensor], scale: float) -> Any:
        first, second = torch.cat(several).split([2, len(several[1])])
        kept = x.mul_(scale)
        return first, None, second.t(), kept

    replayed = Replayed(function)
    for step in range(4):
        x, several = torch.full((3,), float(step + 1)), [torch.rand(2), torch.rand(4)]
        with torch.no_grad():
            first, nothing, second, kept = replayed(x, several, 2.0)
        assert nothing is None and kept is x and torch.equal(x, torch.full((3,), 2.0 * (step + 1)))
        assert torch.equal(first, several[0]) and torch.equal(second, several[1])
    assert [one.operators for one in recordings()] == [4]


def test_memory_is_fresh_and_let_go(replaying: None) -> None:
    with torch.no_grad():
        results = [shrink() for _ in range(6)]
    assert len({one.data_ptr() for one in results}) == len(results)
    held = [value for one in recordings() for value in one._rest if isinstance(value, Tensor)]
    assert not held


def test_a_function_that_has_seen_many_begins_again(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_RECORDINGS", 4)
    replayed = Replayed(lambda x: x + 1)
    with torch.no_grad():
        for size in range(1, 12):
            for _ in range(2):
                assert torch.equal(replayed(torch.ones(size)), torch.full((size,), 2.0))
            assert len(replayed.recordings) <= 4


MUTANTS = {
    "alignment": ("address & 15", "0"),
    "strides": ("arg.stride()", "()"),
    "sign": ("math.copysign(1.0, arg)", "0"),
    "scaling": ("key += (float, arg,", "key += (float, 0,"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_signature_that_forgets_is_found(mutant: str, replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    source = inspect.getsource(replay.signature)
    old, new = MUTANTS[mutant]
    assert old in source
    namespace = dict(vars(replay))
    exec("from __future__ import annotations\n" + source.replace(old, new), namespace)
    monkeypatch.setattr(replay, "signature", namespace["signature"])
    caught = {"alignment": "alignment", "strides": "strides", "sign": "sign of nothing", "scaling": "scaling"}[mutant]
    with pytest.raises(AssertionError):
        test_other_arguments_are_another_call(caught, None)


COMPILED = """
import json, torch
torch.set_num_threads(1)
from benchmarks.host import pretended_driver, layer
from peftfast.functional.node import known
from peftfast.ops import replay
x = torch.randn(2, 16, dtype=torch.bfloat16).requires_grad_()
dy = torch.randn(2, 16, dtype=torch.bfloat16)

def plain(value, tensors):
    if isinstance(value, int) and value > 2**20:  # an address, as the autograd library hands it over: no size here is as large
        return tensors.get(value, "memory of the call's own")
    if isinstance(value, torch.Tensor) and tensors.get(value.data_ptr()) is None:
        return "memory of the call's own"
    if isinstance(value, torch.Tensor):
        return tensors.get(value.data_ptr(), [str(value.dtype), list(value.shape), value.data_ptr() % 16])
    return value if isinstance(value, (int, float, type(None))) else str(value)

found = []
with pretended_driver() as driver:
    own = layer("peftfast", 0.1, "cpu")
    tensors = {one.data_ptr(): name for name, one in own.named_parameters()} | {x.data_ptr(): "x", dy.data_ptr(): "dy"}
    for step in range(5):
        driver.stream = 7 + step
        with driver.watched() as seen:
            own(x).backward(dy)
        found.append([(name, grid, [plain(one, tensors) for one in args]) for name, grid, args in seen])
    import triton
    used = []
    real = replay.Recording.__call__
    replay.Recording.__call__ = lambda self, *rest: used.append(self) or real(self, *rest)
    calls = lambda: [sum(one.native.counts()[which] for one in known() if one.native) for which in ("forwards", "backwards")]
    steps = calls()
    own(x)
    plainly = len(used), calls()[0] - steps[0]
    hook = lambda *_: None
    triton.knobs.runtime.launch_enter_hook.add(hook)
    own(x)
    hooked = len(used) - plainly[0], calls()[0] - steps[0] - plainly[1]
    triton.knobs.runtime.launch_enter_hook.remove(hook)
print(json.dumps([found, steps, plainly, hooked]))
"""


def test_compiled_kernels_are_launched_with_the_same_arguments(autograd: str) -> None:
    """Compiled for sm_90, launched by a driver that writes down what it is given: a replayed step is the step itself."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("PEFTFAST_BACKEND", None)
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found, steps, plainly, hooked = json.loads(run.stdout.splitlines()[-1])
    assert len(found[0]) == 5
    if autograd == "library":
        assert steps == [4, 4] and (plainly, hooked) == ([0, 1], [0, 0])
    else:
        assert steps == [0, 0] and (plainly, hooked) == ([1, 0], [0, 0])
    for step in found[1:]:
        assert step == found[0]
