"""The C++ layers at both sides of a move on each instruction set: bits of the moved weights, products, memory, bad arguments."""

import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.configs import zeroth_order as configs
from peftfast.ops import native
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.reference import zeroth_order as definition
from tests.support.lora_checks import BF16, F16, F32
from tests.support.zo_checks import (
    LINEAR_TELLING,
    NF4_LINEAR_TELLING,
    LinearCase,
    NF4LinearCase,
    bits,
    check_linear,
    check_nf4_linear,
    nf4_arguments,
    nf4_moved,
)

from .test_native_cpu import ISAS, ops

SEED, EPS = torch.tensor([77]), torch.tensor([0.05])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = native.cpu_isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(chosen)


# Rows inside a block of 4-bit storage and of z, odd widths that begin inside a byte, more than 256 blocks, several tiles of rows.
NF4_CASES = (
    *NF4_LINEAR_TELLING,
    NF4LinearCase(1, 70, 1000, BF16, data=4),
    NF4LinearCase(9, 67, 33, F16, 32, rademacher=True, data=5),
    NF4LinearCase(2, 9, 2100, F32, 64, nested=False, of_scales=True, data=6),
    NF4LinearCase(8, 130, 7, BF16, 32, threshold=False, data=7),
)


def pair(arguments: tuple[Any, ...], begin: int, count: int) -> tuple[Tensor, Tensor]:
    x, _, packed, absmax, code, block_size, shape, *nested, _, _, seed, eps, threshold, id_, rademacher, scales = (
        arguments
    )
    plus, minus = (torch.full((count,), math.nan, dtype=x.dtype) for _ in range(2))
    place = (math.prod(shape), begin, seed, eps, threshold, id_, rademacher, scales)
    ops.zo_nf4_pair(packed, absmax, code, block_size, *nested, *place, plus, minus)
    return plus, minus


def test_moved_weights_have_the_bits_of_the_definition(isa: str) -> None:
    for case in NF4_CASES:
        arguments = tuple(one.cpu() if isinstance(one, Tensor) else one for one in nf4_arguments(case))
        expected = [side.flatten() for side in nf4_moved(arguments)]
        size = expected[0].numel()
        for begin, count in ((0, size), (case.K, size - case.K), (size - 1, 1), (1, 600), (0, 0)):
            count = min(count, size - begin)
            for got, right in zip(pair(arguments, begin, count), expected, strict=True):
                assert torch.equal(bits(got), bits(right[begin : begin + count])), (case, begin, count)


def test_an_eps_of_zero_keeps_every_bit(isa: str) -> None:
    arguments = list(nf4_arguments(NF4LinearCase(threshold=False)))
    arguments[13] = torch.zeros(1)
    plus, minus = pair(tuple(arguments), 0, 37 * 192)
    dense = F.nf4_dequantize(F.NF4Weight(*arguments[2:6], torch.Size((37, 192)), BF16, "nf4", *arguments[7:10]), BF16)
    assert torch.equal(bits(plus), bits(dense.flatten())) and torch.equal(bits(minus), bits(dense.flatten()))


@pytest.mark.parametrize("rows", [10**9, -1], ids=["fused", "slabs"])
def test_products(isa: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "CPU_FUSED_ROWS", dict.fromkeys(configs.CPU_FUSED_ROWS, rows))
    monkeypatch.setattr(configs, "CPU_SLAB_ELEMENTS", 1)  # 64 rows a slab
    more = (LinearCase(4, 6, 2100, BF16), LinearCase(13, 70, 20, F32, rademacher=True), LinearCase(1, 131, 9, F16))
    for case in (*LINEAR_TELLING, *more):
        check_linear(case)
    for nf4_case in NF4_CASES:
        check_nf4_linear(nf4_case)


def test_both_ways_move_the_same_weight(isa: str) -> None:
    """A product with the identity is the weight, whichever side of the choice it falls on."""
    for case in (NF4LinearCase(N=11, bias=False), NF4LinearCase(N=11, nested=False, of_scales=True, bias=False)):
        arguments = nf4_arguments(replace(case, M=case.K))
        eye = torch.eye(case.K, dtype=case.dtype)
        fused = [torch.empty((case.K, 11), dtype=case.dtype) for _ in range(2)]
        _, _, *weight, _, _, seed, eps, threshold, id_, rademacher, scales = arguments
        del weight[4]  # its shape
        ops.zo_nf4_linear(eye, eye, *weight, None, None, seed, eps, threshold, id_, rademacher, scales, *fused)
        for got, right in zip(fused, nf4_moved(arguments), strict=True):
            assert torch.equal(got.T, right)


def test_results_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    arguments = nf4_arguments(NF4LinearCase(3, 301, 320))
    weight = torch.randn(301, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dense = linear_ops.zo_linear(*arguments[:2], weight, *arguments[10:17])
            results.append(torch.cat([*dense, *linear_ops.zo_nf4_linear(*arguments)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(results[0]), bits(other)) for other in results[1:])


def test_no_dense_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 16 M elements, 32 MB in bfloat16: few rows and, by slabs, many stay far below one copy of it."""
    n, k = 4096, 4096
    packed, absmax = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8), torch.rand(n * k // 64)
    code = F.nf4_quantize(torch.ones(1, 64)).code
    x = torch.randn(16, k).bfloat16()
    storage = (packed, absmax, code, 64, (n, k), None, None, None)

    def call(rows: int) -> None:
        linear_ops.zo_nf4_linear(x[:rows], x[:rows], *storage, None, None, SEED, EPS, None, 0, True, False)

    call(2)
    call(16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in (2, 16):
        call(rows)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024, "KiB"


def bad_calls() -> list[tuple[str, Callable[[], None]]]:
    def dense(message: str, **changes: object) -> tuple[str, Callable[[], None]]:
        given: dict[str, object] = {
            "x_plus": torch.zeros(2, 8),
            "x_minus": torch.zeros(2, 8),
            "weight": torch.zeros(3, 8),
            "bias_plus": None,
            "bias_minus": None,
            "seed": SEED,
            "eps": EPS,
            "threshold": None,
            "tensor_id": 0,
            "rademacher": False,
            "y_plus": torch.zeros(2, 3),
            "y_minus": torch.zeros(2, 3),
        }
        return message, lambda: ops.zo_linear(*(given | changes).values())

    def packed(message: str, **changes: object) -> tuple[str, Callable[[], None]]:
        given: dict[str, object] = {
            "packed": torch.zeros(64, dtype=torch.uint8),
            "absmax": torch.zeros(2),
            "code": torch.zeros(16),
            "block_size": 64,
            "nested_absmax": None,
            "nested_code": None,
            "nested_offset": None,
            "count": 128,
            "begin": 0,
            "seed": SEED,
            "eps": EPS,
            "threshold": None,
            "tensor_id": 0,
            "rademacher": False,
            "of_scales": False,
            "plus": torch.zeros(128),
            "minus": torch.zeros(128),
        }
        return message, lambda: ops.zo_nf4_pair(*(given | changes).values())

    nested = {
        "absmax": torch.zeros(2, dtype=torch.uint8),
        "nested_absmax": torch.zeros(1),
        "nested_code": torch.zeros(256),
        "nested_offset": torch.zeros(1),
    }
    return [
        dense("x_plus, y_plus: expected two dimensions", x_plus=torch.zeros(8)),
        dense("x_minus: expected 16", x_minus=torch.zeros(1, 8)),
        dense("x_minus: expected the weight's dtype", x_minus=torch.zeros(2, 8).half()),
        dense("x_plus: expected dtype float32, bfloat16 or float16", x_plus=torch.zeros(2, 8).double()),
        dense("x_plus: expected a contiguous", x_plus=torch.zeros(8, 2).T),
        dense("weight: expected 24", weight=torch.zeros(3, 7)),
        dense("y_minus: expected 6", y_minus=torch.zeros(2, 2)),
        dense("expected both or none", bias_plus=torch.zeros(3)),
        dense("bias_minus: expected 3", bias_plus=torch.zeros(3), bias_minus=torch.zeros(2)),
        dense("seed: expected dtype", seed=EPS),
        dense("eps: expected 1", eps=torch.zeros(2)),
        dense("threshold: expected 1", threshold=torch.zeros(2)),
        dense("tensor_id: expected", tensor_id=2**32),
        packed("packed: expected 64", packed=torch.zeros(63, dtype=torch.uint8)),
        packed("absmax: expected 2", absmax=torch.zeros(3)),
        packed("expected float32 block maxima", of_scales=True, **nested),
        packed("begin: expected 128 elements", begin=1),
        packed("begin: expected 128 elements", begin=-1),
        packed("minus: expected 128", minus=torch.zeros(127)),
        packed("minus: expected the weight's dtype", minus=torch.zeros(128).half()),
    ]


@pytest.mark.parametrize(("message", "call"), bad_calls())
def test_bad_arguments_raise(message: str, call: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_sizes() -> None:
    for m, n, k in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        x, weight, bias = torch.ones(m, k), torch.ones(n, k), torch.full((n,), 2.0)
        plus, minus = linear_ops.zo_linear(x, x, weight, bias, bias, SEED, EPS, None, 0, False)
        right = definition.zo_linear(x, x, weight, bias, bias, SEED, EPS, None, 0, False)[0]
        assert plus.shape == minus.shape == (m, n) and (k or torch.equal(plus, right))
