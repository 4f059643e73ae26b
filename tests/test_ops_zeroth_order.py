"""The zeroth-order operators: registration, contracts, and each backend bit for bit the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.reference import zeroth_order as definition
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.zo_checks import (
    LINEAR_TELLING,
    NF4_LINEAR_TELLING,
    TELLING,
    LinearCase,
    NF4LinearCase,
    ZoCase,
    bits,
    check_linear,
    check_nf4_linear,
    check_perturb,
    nf4_arguments,
    random_cases,
    terms_of,
    weights_of,
)

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)
SEED, EPS = torch.tensor([-9], device=DEVICE), torch.tensor([1e-2], device=DEVICE)


def perturb_arguments(case: ZoCase) -> tuple[Any, ...]:
    weights = [weight.nan_to_num(posinf=1.0) for weight in weights_of(case)]
    ids, offsets = list(range(len(weights))), list(case.offsets[: len(weights)])
    return (weights, [], *terms_of(case), ids, offsets, case.rademacher)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_opcheck(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    utilities = ("test_schema", "test_faketensor")
    for case in (TELLING[0], TELLING[3]):
        opcheck(ops.perturb_.overload, perturb_arguments(case), test_utils=utilities)
    opcheck(ops.perturbation.overload, (SEED, (5, 7), 3, 9, False, BF16), test_utils=utilities)
    weight = torch.randn(6, 8, device=DEVICE)
    opcheck(ops.perturbed_pair.overload, (weight, SEED, EPS, EPS, 1, 0, True), test_utils=utilities)
    x, bias = torch.randn(3, 8, device=DEVICE), torch.randn(6, device=DEVICE)
    opcheck(
        linear_ops.zo_linear.overload, (x, x + 1, weight, bias, bias, SEED, EPS, None, 1, False), test_utils=utilities
    )
    for nf4_case in NF4_LINEAR_TELLING[:2]:
        opcheck(linear_ops.zo_nf4_linear.overload, nf4_arguments(nf4_case), test_utils=utilities)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_perturb(first: int) -> None:
    for case in random_cases(120, seed=3)[first : first + 40]:
        check_perturb(case)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_perturb_telling(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    for case in TELLING:
        check_perturb(case)


@pytest.mark.interpreter
def test_perturb_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in random_cases(14, seed=4):
        check_perturb(case)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_one_definition_everywhere(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """z alone, z in place, z of a pair, z of two terms: the same z in every form, for every element and odd size."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    one = torch.ones(1, device=DEVICE)
    for rademacher in (False, True):
        for size, offset in ((1, 0), (7, 0), (1031, 5)):
            z = ops.perturbation(SEED, (size,), 3, offset, rademacher, F32)
            right = definition.perturbation(SEED, (size,), 3, offset, rademacher, F32)
            assert torch.equal(bits(z), bits(right))
            weight = torch.full((size,), 0.25, device=DEVICE)
            plus, minus = ops.perturbed_pair(weight, SEED, one, None, 3, offset, rademacher)
            assert torch.equal(plus, weight + z) and torch.equal(minus, weight - z)
            moved = weight.clone()
            ops.perturb_([moved], [], SEED, one, None, None, None, [3], [offset], rademacher)
            assert torch.equal(moved, plus)
            seeds, twice = torch.cat((SEED, SEED)), torch.tensor([1.0, -2.0], device=DEVICE)
            ops.perturb_([moved], [weight], seeds, twice, None, None, None, [3], [offset], rademacher)
            assert torch.equal(moved, weight + z - 2 * z)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_linear(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    more = (
        LinearCase(1, 1, 4, F16),
        LinearCase(33, 50, 200, BF16, rademacher=True),
        LinearCase(130, 7, 12, BF16),
    )
    for case in (*LINEAR_TELLING, *more):
        check_linear(case)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_nf4_linear(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    # One row, rows of two tiles, and for Triton rows and widths that are left to scratch.
    more = (
        NF4LinearCase(1, 70, 128, BF16, rademacher=True, data=20),
        NF4LinearCase(33, 34, 64, F16, nested=False, of_scales=True, data=21),
        NF4LinearCase(130, 9, 64, BF16, data=22),
        NF4LinearCase(7, 33, 65, BF16, nested=False, of_scales=True, data=23),
    )
    for case in (*NF4_LINEAR_TELLING, *more):
        check_nf4_linear(case)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
def test_nothing_to_do(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    empty = torch.empty(0, 4, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    ops.perturb_([], [], SEED, one, None, None, None, [], [], False)
    ops.perturb_([empty], [], SEED, one, None, one, SEED, [0], [0], False)
    assert ops.perturbation(SEED, (0, 3), 0, 0, False, F32).shape == (0, 3)
    weight = torch.ones(3, 4, device=DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    ops.perturb_([weight], [], none, none.float(), None, None, None, [0], [0], False)
    assert torch.equal(weight, torch.ones_like(weight))
    plus, minus = linear_ops.zo_linear(empty, empty, weight, None, None, SEED, EPS, None, 0, False)
    assert plus.shape == minus.shape == (0, 3)
    plus, minus = linear_ops.zo_nf4_linear(*nf4_arguments(NF4LinearCase(M=0)))
    assert plus.shape == minus.shape == (0, 37)
    for dtype in (F32, BF16):  # nothing to sum over leaves the biases
        x, weight = (torch.empty(rows, 0, dtype=dtype, device=DEVICE) for rows in (2, 3))
        bias = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device=DEVICE)
        plus, minus = linear_ops.zo_linear(x, x, weight, bias, -bias, SEED, EPS, None, 0, False)
        assert torch.equal(plus, bias.expand(2, 3)) and torch.equal(minus, -plus)


def test_float64_runs_on_the_definition() -> None:
    weight = torch.randn(9, dtype=torch.float64, device=DEVICE)
    before = weight.clone()
    ops.perturb_([weight], [], SEED, EPS, None, None, None, [0], [0], False)
    assert torch.equal(weight, definition.perturbed(before, SEED, EPS, None, None, None, 0, 0, False))
    assert (weight != before).all()


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    w, one = torch.zeros(2, 4, device=DEVICE), torch.ones(1, device=DEVICE)

    def perturb(**changes: Any) -> Callable[[], Any]:
        given: dict[str, Any] = {
            "tensors": [w],
            "sources": [],
            "seeds": SEED,
            "coefficients": one,
            "decay": None,
            "thresholds": None,
            "rounding_seed": None,
            "tensor_ids": [0],
            "offsets": [0],
            "rademacher": False,
        }
        return lambda: ops.perturb_(*(given | changes).values())

    def linear(**changes: Any) -> Callable[[], Any]:
        given: dict[str, Any] = {
            "x_plus": w,
            "x_minus": w,
            "weight": torch.zeros(3, 4, device=DEVICE),
            "bias_plus": None,
            "bias_minus": None,
            "seed": SEED,
            "eps": one,
            "threshold": None,
            "tensor_id": 0,
            "rademacher": False,
        }
        return lambda: linear_ops.zo_linear(*(given | changes).values())

    def packed(**changes: Any) -> Callable[[], Any]:
        names = (
            *("x_plus", "x_minus", "packed", "absmax", "code", "block_size", "shape", "nested_absmax", "nested_code"),
            *("nested_offset", "bias_plus", "bias_minus", "seed", "eps", "threshold", "id", "rademacher", "scales"),
        )
        given = dict(zip(names, nf4_arguments(NF4LinearCase()), strict=True))
        return lambda: linear_ops.zo_nf4_linear(*(given | changes).values())

    return {
        "packed bytes": ("packed: expected", packed(packed=SEED)),
        "packed shape": ("shape: expected .N, K", packed(shape=(37, 2, 96))),
        "packed scales": ("absmax: expected float32 block maxima", packed(scales=True)),
        "packed x": ("x_minus: expected", packed(x_minus=w)),
        "packed x dtype": ("x_plus: expected a floating", packed(x_plus=w.int())),
        "packed eps": ("eps: expected", packed(eps=one.half())),
        "packed threshold": ("threshold: expected", packed(threshold=one.repeat(2))),
        "packed seed": ("seed: expected", packed(seed=one)),
        "packed id": ("tensor_id: expected", packed(id=-1)),
        "packed bias": ("expected both or none", packed(bias_plus=None)),
        "lengths": ("sources, tensor_ids, offsets: expected 1", perturb(tensor_ids=[])),
        "sources": ("sources, tensor_ids, offsets: expected 1", perturb(sources=[w, w])),
        "dtype": ("tensors, sources: expected contiguous torch.float32", perturb(sources=[w.half()])),
        "integers": ("tensors, sources: expected", perturb(tensors=[w.int()])),
        "strides": ("tensors, sources: expected contiguous", perturb(tensors=[w.T])),
        "device": ("expected all on", perturb(sources=[w.to("meta")])),
        "numel": ("sources: expected 8 elements", perturb(sources=[w[:1]])),
        "seeds": ("seeds: expected contiguous int64", perturb(seeds=one)),
        "seeds dim": ("seeds: expected contiguous int64", perturb(seeds=SEED[0])),
        "coefficients": ("coefficients: expected 1 contiguous float32", perturb(coefficients=one.repeat(2))),
        "coefficients apart": (
            "coefficients: expected 2 contiguous float32",
            perturb(seeds=SEED.repeat(2), coefficients=one.repeat(4)[::2]),
        ),
        "coefficients dtype": ("coefficients: expected 1 contiguous float32", perturb(coefficients=one.double())),
        "decay": ("decay: expected 1", perturb(decay=one.half())),
        "thresholds": ("thresholds: expected 1", perturb(thresholds=one.repeat(2))),
        "rounding_seed": ("seed: expected one int64", perturb(rounding_seed=one)),
        "ids": ("tensor_id: expected", perturb(tensor_ids=[-1])),
        "offsets": ("offset: expected", perturb(offsets=[2**62 + 1])),
        "perturbation seed": ("seed: expected", lambda: ops.perturbation(one, (2,), 0, 0, False, F32)),
        "perturbation dtype": ("dtype: expected", lambda: ops.perturbation(SEED, (2,), 0, 0, False, torch.int64)),
        "pair eps": ("eps: expected", lambda: ops.perturbed_pair(w, SEED, one.double(), None, 0, 0, False)),
        "pair weight": ("weight: expected", lambda: ops.perturbed_pair(w.T, SEED, one, None, 0, 0, False)),
        "linear weight": ("weight: expected", linear(weight=w[0])),
        "linear x": ("x_minus: expected torch.float32", linear(x_minus=w[:, :3])),
        "linear x dtype": ("x_plus: expected torch.float32", linear(x_plus=w.half())),
        "linear rows": ("x_plus, x_minus: expected as many rows", linear(x_minus=w[:1])),
        "linear one bias": ("expected both or none", linear(bias_plus=w[0, :3])),
        "linear bias": ("bias_minus: expected", linear(bias_plus=w[0, :3], bias_minus=w[0])),
        "linear threshold": ("threshold: expected", linear(threshold=one.half())),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_contract(name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_a_failed_call_writes_nothing() -> None:
    first, second = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)
    with pytest.raises(RuntimeError):
        ops.perturb_([first, second.half()], [], SEED, EPS, None, None, None, [0, 1], [0, 0], False)
    with pytest.raises(RuntimeError):
        ops.perturb_([first, second], [], SEED, EPS, None, None, None, [0, -1], [0, 0], False)
    assert torch.equal(first, torch.ones_like(first))
