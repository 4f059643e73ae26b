"""The testing helpers themselves: a helper that cannot fail proves nothing."""

import types

import pytest
import torch
import triton
import triton.language as tl

from peftfast.ops import lora as ops
from tests.support.budget import assert_within_budget
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.lora_checks import CHECKS, TELLING
from tests.support.mutants import Mutant, plant

EXACT = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rounded(dtype: torch.dtype) -> torch.Tensor:
    return EXACT.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_takes_one_rounding_and_no_more(dtype: torch.dtype) -> None:
    composed = rounded(dtype)
    assert_within_budget("as composed", composed, composed, EXACT)
    largest = EXACT.abs().argmax()
    off = composed.clone()
    off.view(-1)[largest] *= 1 + 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget("four units in the last place", off, composed, EXACT)


def test_budget_finds_one_planted_error_anywhere() -> None:
    composed = rounded(torch.float32)
    for index in (0, 599, 1199):
        off = composed.clone()
        off.view(-1)[index] += 1e-5
        with pytest.raises(AssertionError, match="off: error .* over the budget"):
            assert_within_budget("off", off, composed, EXACT)


def test_budget_refuses_nan_infinity_and_other_shapes() -> None:
    composed = rounded(torch.float32)
    for value in (float("nan"), float("inf")):
        off = composed.clone()
        off[3, 4] = value
        with pytest.raises(AssertionError, match="1 of 1200 values are not finite"):
            assert_within_budget("off", off, composed, EXACT)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget("off", composed.T, composed, EXACT)
    assert_within_budget("nothing", composed[:0], composed[:0], EXACT[:0])


def module(name: str, source: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(source, made.__dict__)
    return made


FORGETFUL = """
import torch

def copy(x):
    out = torch.empty(x.shape, dtype=x.dtype)
    out[:-1] = x[:-1]
    return out

def copy_like(x):
    out = torch.empty_like(x)
    out[:-1] = x[:-1]
    return out
"""


@pytest.mark.parametrize("name", ["copy", "copy_like"])
def test_a_forgotten_element_is_nan(name: str) -> None:
    kernel = getattr(module("tests.test_poison_kernel", FORGETFUL), name)
    composed = rounded(torch.float32)
    with pytest.raises(AssertionError, match="30 of 1200 values are not finite"):
        assert_within_budget("forgetful", kernel(composed), composed, EXACT)
    integers = kernel(torch.zeros(4, dtype=torch.uint8))
    assert integers[-1] == 170
    assert kernel(torch.zeros(4, dtype=torch.bool))[-1]


def test_every_floating_dtype_is_poisoned() -> None:
    make = module("peftfast.kernels.planted", "import torch\ndef make(dtype): return torch.empty(3, dtype=dtype)").make
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert make(dtype).isnan().all()


def test_poison_reaches_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that leaves a row of its output as it was allocated fails the operator's own check."""
    forgetful = module("peftfast.planted", FORGETFUL)
    plant(monkeypatch, Mutant("forgets a row", ops.lora_shrink, lambda run, *given: forgetful.copy(run(*given).cpu())))
    with pytest.raises(AssertionError, match="not finite"):
        CHECKS["lora_shrink"](TELLING[0])


def test_calls_count_what_computes() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with Calls() as calls:
        torch.empty(3)
        y = torch.nn.functional.linear(x.view(3, 4), w)
        (y.T.reshape(15) * 2).sum()
    assert calls.compute == {"mm": 1, "clone": 1, "mul": 1, "sum": 1}


def test_saved_tensors_are_seen() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with saved_tensors() as saved:
        (x * x).exp()
    assert {x.untyped_storage().data_ptr()} < storages(saved).keys() and len(storages(saved)) == 2


@triton.jit
def _plus_one(x):
    return x + tl.full((), 1, tl.int32)


@triton.jit
def _count_kernel(target_ptr, fails: tl.constexpr):
    offs = tl.arange(0, 4)
    value = _plus_one(_plus_one(offs))
    tl.static_assert(not fails)
    tl.store(target_ptr + offs, value.to(tl.int64))


@pytest.mark.interpreter
def test_the_quickened_interpreter_leaves_the_language_as_it_was() -> None:
    """Between launches, also after one that failed."""
    before = {name: getattr(tl, name) for name in ("load", "store", "arange", "range", "static_assert")}
    target = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        _count_kernel[(1,)](target, fails=False)
        assert target.tolist() == [2, 3, 4, 5]
        with pytest.raises(triton.runtime.errors.InterpreterError):
            _count_kernel[(1,)](target, fails=True)
        assert {name: getattr(tl, name) for name in before} == before
