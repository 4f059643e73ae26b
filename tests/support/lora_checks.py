"""Each LoRA operator against its definition, as functions of a case: what test_ops_lora runs and what the mutants must fail."""

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfast.ops import lora as ops
from peftfast.reference import lora as definition
from tests.support.budget import assert_within_budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# x, adapters, compute dtype. The first is QLoRA's after prepare_model_for_kbit_training.
DTYPES = (
    (F32, F32, BF16),
    (F32, F32, F32),
    (BF16, F32, BF16),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F16, F32, F16),
    (F32, BF16, BF16),
    (BF16, F32, F32),
)
LAYOUTS = ("plain", "plain", "transposed", "wide", "spaced")


@dataclass(frozen=True)
class Case:
    """One set of options; ``layout`` is the strides of every matrix, ``data`` seeds the values and the mask."""

    M: int = 33
    K: int = 67
    N: int = 45
    R: int = 5
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)
    p: float = 0.1
    scaling: float = 1.5
    seeded: bool = True
    bias: bool = True
    layout: str = "plain"
    data: int = 0

    @property
    def seed(self) -> Tensor | None:
        return torch.tensor([0x5EED << 40 | self.data], device=DEVICE) if self.seeded else None


# Two cases that together show every fault: float32, where small ones stand out, and the first case to be fast. Widths are no
# multiples of eight, so that counters straddle nothing by accident.
TELLING = (
    Case(),
    Case(dtypes=DTYPES[0], p=0.5, data=1),
    Case(p=0.0, seeded=False, data=2),
    Case(p=0.999, R=16, data=3),
)


# Ranks at which the order of a float32 sum over R begins to show.
LARGE_RANKS = tuple(Case(M=16, K=40, N=64, R=R, p=0.0, seeded=False, bias=False) for R in (129, 256, 512))
# Widths of one to three, where torch's product is a dot product summed in many parts: a sum in one part over R or over rows would
# exceed twice its error (by 1.4 and 1.2 on AVX-512 with torch 2.13, 2026-11, before the kernels summed in parts).
NARROW = (
    ("lora_expand", Case(M=16, N=3, R=256, p=0.0, seeded=False, bias=False)),
    ("lora_expand_", Case(M=16, N=3, R=256, p=0.0, seeded=False, bias=False)),
    ("lora_weight_grad", Case(M=130, K=1, R=65, p=0.0, seeded=False)),
)


def random_cases(count: int, seed: int, largest: int) -> list[Case]:
    """Seeded random cases: rows of 0 and 1, primes, both sides of powers of two, up to ``largest``."""
    draw = random.Random(seed)
    rows = [size for size in (0, 1, 2, 5, 7, 16, 17, 31, 64, 65, 127, 130) if size <= largest]
    widths = [size for size in (1, 3, 5, 8, 13, 16, 31, 33, 64, 67, 96, 127, 131, 257, 320) if size <= largest]
    ranks = [size for size in (1, 2, 4, 7, 8, 13, 16, 17, 32, 33, 64, 65, 129) if size <= largest]
    return [
        Case(
            M=draw.choice(rows),
            K=draw.choice(widths),
            N=draw.choice(widths),
            R=draw.choice(ranks),
            dtypes=draw.choice(DTYPES),
            p=draw.choice((0.0, 0.05, 0.1, 0.5, 0.9, 1.0)),
            scaling=draw.choice((1.0, 0.25, 2.0, 1.7)),
            seeded=draw.random() < 0.8,
            bias=draw.random() < 0.5,
            layout=draw.choice(LAYOUTS),
            data=index,
        )
        for index in range(count)
    ]


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """Normal values under the strides of a plain tensor, a transposed one, a slice of a wider one or every second column."""
    if layout == "transposed":
        values = torch.randn(columns, rows, generator=generator).T
    elif layout == "wide":
        values = torch.randn(rows, columns + 5, generator=generator)[:, 3 : 3 + columns]
    elif layout == "spaced":
        values = torch.randn(rows, 2 * columns, generator=generator)[:, ::2]
    else:
        values = torch.randn(rows, columns, generator=generator)
    strides = values.stride()
    size = sum((length - 1) * stride for length, stride in zip(values.shape, strides, strict=True)) + 1
    storage = torch.empty(max(size, 1), dtype=dtype, device=DEVICE)
    if layout == "wide" and dtype.itemsize == 2:
        # Where the processor has AMX, torch's own products of 16 bits read past the end of a row, and multiply that with zero: a NaN
        # there spoils them (torch 2.13, stock layers too). What is not ours to read stays finite, and wrong.
        storage.fill_(3e4)
    return storage.as_strided(values.shape, strides).copy_(values) if values.numel() else values.to(DEVICE, dtype)


def double(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


# What a check compares: name -> (actual, composed, exact).
Results = dict[str, tuple[Tensor, Tensor, Tensor]]
FEW, DATA_SETS = 64, 16


def check_results(case: Any, results_of: Callable[[Any], Results], values: int = 0) -> None:
    """Every result of a case within the budget. Where a result has few values, the roundings of the composed one may by luck cancel
    in all of them; sixteen data sets are then one comparison, of the largest error of all. So are as many as give ``values`` of each.
    Interpreted, where a data set takes seconds, as many as give few values no longer, and the others where those were without luck."""
    results = [results_of(case)]
    fewest = min((actual.numel() for actual, _, _ in results[0].values() if actual.numel()), default=FEW)
    sets = max(DATA_SETS if fewest < FEW else 1, -(-values // fewest))

    def compare(count: int) -> None:
        results.extend(
            results_of(dataclasses.replace(case, data=case.data + 1000 * i)) for i in range(len(results), count)
        )
        for name in results[0]:
            pooled = [torch.stack(values) for values in zip(*(result[name] for result in results), strict=True)]
            try:
                assert_within_budget(name, *pooled)
            except AssertionError as error:
                raise AssertionError(f"{error}; {case}") from None

    if sets > 1 and not values and interpreted():
        with contextlib.suppress(AssertionError):
            return compare(min(sets, -(-FEW // fewest)))
    compare(sets)


def interpreted() -> bool:
    """Whether Triton's interpreter is what is tested."""
    return os.environ.get("PEFTFAST_BACKEND") == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def _dtype(actual: Tensor, dtype: torch.dtype) -> Tensor:
    assert actual.dtype == dtype, f"{actual.dtype}, expected {dtype}"
    return actual


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + case.data)


def _shrink_results(case: Case) -> Results:
    generator = _generator(case)
    wide, narrow, compute = case.dtypes
    x, w = (matrix(rows, case.K, t, case.layout, generator) for rows, t in ((case.M, wide), (case.R, narrow)))
    composed = definition.lora_shrink(x, w, case.seed, case.p, case.scaling, compute)
    exact = definition.lora_shrink(*double(x, w), case.seed, case.p, case.scaling, F64)
    actual = ops.lora_shrink(x, w, case.seed, case.p, case.scaling, compute)
    return {"lora_shrink": (_dtype(actual, compute), composed, exact)}


def _expand_arguments(case: Case, base_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = _generator(case)
    _, narrow, compute = case.dtypes
    s = matrix(case.M, case.R, compute, case.layout, generator)
    w = matrix(case.N, case.R, narrow, case.layout, generator)
    base = matrix(case.M, case.N, base_dtype, case.layout, generator)
    base.mul_(case.scaling * case.R**0.5)  # as large as the product
    bias = matrix(1, case.N, narrow, case.layout, generator)[0] if case.bias else None
    return base, s, w, bias


def _expand_results(case: Case) -> Results:
    """Base in the compute dtype and out in x's, and the other way round."""
    results = {}
    for base_dtype, dtype in ((case.dtypes[2], case.dtypes[0]), (case.dtypes[0], case.dtypes[2])):
        tensors = _expand_arguments(case, base_dtype)
        options = (case.seed, case.p, case.scaling)
        composed = definition.lora_expand(*tensors, *options, dtype)
        exact = definition.lora_expand(*double(*tensors), *options, F64)
        actual = ops.lora_expand(*tensors, *options, dtype)
        results[f"lora_expand {base_dtype} to {dtype}"] = (_dtype(actual, dtype), composed, exact)
    return results


def _expand__results(case: Case) -> Results:
    results = {}
    for dtype in {case.dtypes[0], case.dtypes[2]}:
        tensors = _expand_arguments(case, dtype)
        options = (case.seed, case.p, case.scaling)
        composed = definition.lora_expand(*tensors, *options, dtype)
        exact = definition.lora_expand(*double(*tensors), *options, F64)
        ops.lora_expand_(*tensors, *options)
        results[f"lora_expand_ {dtype}"] = (tensors[0], composed, exact)
    return results


def _weight_grad_results(case: Case) -> Results:
    generator = _generator(case)
    wide, narrow, compute = case.dtypes
    ds = matrix(case.M, case.R, compute, case.layout, generator)
    x = matrix(case.M, case.K, wide, case.layout, generator)
    composed = definition.lora_weight_grad(ds, x, case.seed, case.p, case.scaling, narrow)
    exact = definition.lora_weight_grad(*double(ds, x), case.seed, case.p, case.scaling, F64)
    actual = ops.lora_weight_grad(ds, x, case.seed, case.p, case.scaling, narrow)
    return {"lora_weight_grad": (_dtype(actual, narrow), composed, exact)}


def _dy_grads_results(case: Case) -> Results:
    generator = _generator(case)
    _, narrow, compute = case.dtypes
    dy = matrix(case.M, case.N, compute, case.layout, generator)
    s = matrix(case.M, case.R, compute, case.layout, generator)
    b = matrix(case.N, case.R, narrow, case.layout, generator)
    composed = definition.lora_dy_grads(dy, s, b, case.scaling, narrow)
    exact = definition.lora_dy_grads(*double(dy, s, b), case.scaling, F64)
    actual = ops.lora_dy_grads(dy, s, b, case.scaling, narrow)
    return {
        "lora_dy_grads ds": (_dtype(actual[0], compute), composed[0], exact[0]),
        "lora_dy_grads db": (_dtype(actual[1], narrow), composed[1], exact[1]),
    }


RESULTS = {
    "lora_shrink": _shrink_results,
    "lora_expand": _expand_results,
    "lora_expand_": _expand__results,
    "lora_weight_grad": _weight_grad_results,
    "lora_dy_grads": _dy_grads_results,
}
CHECKS: dict[str, Callable[[Case], None]] = {
    name: functools.partial(check_results, results_of=results_of) for name, results_of in RESULTS.items()
}


def check_cancellation(dtype: torch.dtype, adapter: torch.dtype, R: int = 1) -> None:
    """dS = dy b where its terms cancel to a thousandth, as a rank of 1 has it in training now and then, and dA and dX behind it. Their
    errors are one rounding of what dS is, not of what it is made of: sums are float32, and are rounded once. What the roundings of dy
    itself, before it came here, make of such a dA is no error of these passes: PEFT's own layer has it as well."""
    generator = torch.Generator().manual_seed(R)
    b = matrix(640, R, dtype, "plain", generator).to(adapter)  # in the compute dtype the products have no rounding of b
    dy = matrix(40, 640, F32, "plain", generator)
    wide = b.double()
    # All but a thousandth of dy's part along b is taken away; the rounding of dy gives some of it back.
    along = (dy.double() @ wide) @ torch.linalg.inv(wide.T @ wide) @ wide.T
    dy = (dy.double() - (1 - 1e-3) * along).to(dtype)
    x, s = matrix(40, 96, dtype, "plain", generator), matrix(40, R, dtype, "plain", generator)
    terms, exact = dy.double().abs() @ wide.abs(), dy.double() @ wide
    assert (terms / exact.abs()).median() > 100
    one = torch.finfo(dtype).eps / 2
    allowed = one * exact.abs() + 16 * torch.finfo(F32).eps * terms
    alone = ops.lora_shrink(dy, b.T, None, 0.0, 1.0, dtype)
    ds, _ = ops.lora_dy_grads(dy, s, b, 1.0, adapter)
    for found in (alone, ds):
        assert ((found.double() - exact).abs() <= allowed).all(), "dS is rounded where its terms are large"
    da = ops.lora_weight_grad(ds, x, None, 0.0, 1.0, adapter).double()
    expected = exact.T @ x.double()
    bound = allowed.T @ x.double().abs() + torch.finfo(adapter).eps * expected.abs() + 1e-6 * expected.abs().max()
    assert ((da - expected).abs() <= bound).all(), "dA"


def _one_hot(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Row r holds its only one at column (5 r + 1) mod columns."""
    index = (torch.arange(rows) * 5 + 1) % columns
    return torch.nn.functional.one_hot(index, columns).to(DEVICE, dtype)


def _same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and torch.equal(actual, expected), (
        f"{name}: {(actual != expected).sum().item()} of {expected.numel()} values are not rounded to nearest even"
    )


def check_rounding(name: str, dtype: torch.dtype) -> None:
    """Sums of one term: the only rounding is the result's, so the result is known bit for bit. The budget of :data:`CHECKS`, a
    comparison of largest errors, allows a truncation; this does not."""
    wide = matrix(24, 40, F32, "plain", torch.Generator().manual_seed(5))
    picked = wide[:, (torch.arange(9) * 5 + 1) % 40]
    if name == "lora_shrink":
        _same_bits(name, ops.lora_shrink(wide, _one_hot(9, 40, F32), None, 0.0, 2.0, dtype), (2 * picked).to(dtype))
    elif name == "lora_expand":
        nothing, w = wide.new_zeros(24, 3), wide.new_ones(40, 3)
        _same_bits(name, ops.lora_expand(wide, nothing, w, None, None, 0.0, 1.0, dtype), wide.to(dtype))
    elif name == "lora_expand_":
        # Factors of few bits: float32 holds the sum exactly, so that the result's rounding is again the only one.
        base, s, w = torch.ones_like(wide, dtype=dtype), _one_hot(24, 3, F32) * 0.375, wide.T[:, :3].to(BF16).float()
        expected = base.double() + 2.0 * s.double() @ w.double().T
        exact = expected.float().double() == expected
        assert exact.double().mean() > 0.9
        ops.lora_expand_(base, s, w, None, None, 0.0, 2.0)
        _same_bits(name, base[exact], expected[exact].float().to(dtype))
    elif name == "lora_weight_grad":
        actual = ops.lora_weight_grad(_one_hot(9, 24, F32).T, wide, None, 0.0, 2.0, dtype)
        _same_bits(name, actual, (2 * wide[(torch.arange(9) * 5 + 1) % 24]).to(dtype))
    else:
        dy = wide.to(dtype)
        ds, db = ops.lora_dy_grads(dy, _one_hot(9, 24, F32).T.to(dtype), _one_hot(9, 40, F32).T, 1.5, dtype)
        _same_bits(name, ds, (1.5 * dy.float()[:, (torch.arange(9) * 5 + 1) % 40]).to(dtype))
        _same_bits(name, db, (1.5 * dy.float()[(torch.arange(9) * 5 + 1) % 24].T).to(dtype))
