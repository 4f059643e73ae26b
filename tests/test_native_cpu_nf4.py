"""The C++ kernels of the nf4 family against the definition, on each instruction set in turn."""

from collections.abc import Callable

import pytest
import torch

from peftfast.reference import nf4 as reference_nf4
from tests.test_native_cpu import BF16, F16, F32, assert_within_budget, double, isa, ops, poisoned, randn

__all__ = ["isa"]  # a fixture


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("rows", "spare"), [((0, 40), 3), ((5, 17), 0), ((3, 4), 8), ((0, 1), 0), ((39, 40), 5)])
@pytest.mark.parametrize("width", [64, 33, 96, 130])
def test_nf4_dequantize_rows(isa: str, dtype: torch.dtype, rows: tuple[int, int], spare: int, width: int) -> None:
    """Rows that begin and end inside blocks and bytes, in a buffer whose rows lie apart; what lies between them stays."""
    code = reference_nf4.code_table("nf4", torch.device("cpu"))
    packed, absmax = reference_nf4.nf4_quantize(randn(40, width), 64, code)
    whole = reference_nf4.nf4_dequantize(packed, absmax, code, 64, (40, width), dtype)
    buffer = torch.full((rows[1] - rows[0] + 2, width + spare), 7.0, dtype=dtype)
    out = buffer[1:-1, :width]
    ops.nf4_dequantize(packed, absmax, code, 64, None, None, None, 40 * width, rows[0], out)
    assert torch.equal(out, whole[rows[0] : rows[1]])
    assert (buffer[1:-1, width:] == 7.0).all() and (buffer[0] == 7.0).all() and (buffer[-1] == 7.0).all()


@pytest.mark.parametrize("quant_type", reference_nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (1, 1), (5, 96), (130, 127)])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_nf4_quantize(isa: str, quant_type: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int) -> None:
    code = reference_nf4.code_table(quant_type, torch.device("cpu"))
    bounds, order = reference_nf4.code_bounds(code)
    weight = (randn(*shape) * torch.logspace(-9, 4, shape[0])[:, None]).to(dtype)
    weight.view(-1)[::7] = 0
    weight.view(-1)[1::11] = bounds[torch.arange(weight.view(-1)[1::11].numel()) % 15].to(dtype)
    blocks = -(-weight.numel() // block_size)
    packed, absmax = torch.full(((weight.numel() + 1) // 2, 1), 0xA5, dtype=torch.uint8), poisoned(blocks)
    ops.nf4_quantize(weight, block_size, bounds, order.to(torch.uint8), packed, absmax)
    expected = reference_nf4.nf4_quantize(weight, block_size, code)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("compute", [F32, BF16, F16])
@pytest.mark.parametrize("M", [1, 2, 4, 7, 8, 17])
@pytest.mark.parametrize(
    ("N", "K", "block_size"), [(33, 128, 64), (70, 96, 64), (3, 320, 128), (5, 33, 32), (4, 64, 4096)]
)
def test_nf4_linear(isa: str, compute: torch.dtype, M: int, N: int, K: int, block_size: int) -> None:
    code, table = (
        reference_nf4.code_table("nf4", torch.device("cpu")),
        reference_nf4.nested_code_table(torch.device("cpu")),
    )
    packed, absmax = reference_nf4.nf4_quantize(randn(N, K) / K**0.5, block_size, code)
    index, nested_absmax, offset = reference_nf4.nest_absmax(absmax)
    x, lora_a, lora_b, bias, lora_bias = (
        randn(M, K),
        randn(5, K) / K**0.5,
        randn(N, 5),
        randn(1, N)[0],
        randn(N, 1)[:, 0],
    )
    y, s = poisoned(M, N), poisoned(M, 5, dtype=compute)
    weight = (packed, index, code, block_size, nested_absmax, table, offset)
    ops.nf4_linear(x, *weight, bias, lora_a, lora_b, lora_bias, 1.5, s, y)
    dense = reference_nf4.nf4_dequantize(packed, index, code, block_size, (N, K), F32, nested_absmax, table, offset)
    adapter = (bias, lora_a, lora_b, lora_bias)
    composed = reference_nf4.nf4_linear(x.to(compute), dense.to(compute), *adapter, 1.5)
    exact = reference_nf4.nf4_linear(x.double(), dense.double(), *double(*adapter), 1.5)
    assert_within_budget(y, composed[0].float(), exact[0])
    assert_within_budget(s, composed[1], exact[1])


def bad_nf4_calls() -> list[tuple[str, Callable[[], None]]]:
    weight, bounds, order = randn(4, 32), torch.arange(15.0), torch.arange(16, dtype=torch.uint8)
    packed, absmax, wide = torch.zeros(64, 1, dtype=torch.uint8), torch.ones(2), torch.arange(255.0)
    index, one, y, s = torch.zeros(128, dtype=torch.uint8), torch.ones(1), poisoned(2, 4), poisoned(2, 3)
    values, x, a, b = torch.ones(128), randn(2, 32), randn(3, 32), randn(4, 3)
    code, none = torch.zeros(16), (None, None, None)
    stored = (packed, absmax, code, 64, *none)
    return [
        ("block_size: expected a multiple of 32", lambda: ops.nf4_quantize(weight, 48, bounds, order, packed, absmax)),
        ("weight: expected a contiguous", lambda: ops.nf4_quantize(weight.T, 64, bounds, order, packed, absmax)),
        ("weight: expected dtype", lambda: ops.nf4_quantize(weight.double(), 64, bounds, order, packed, absmax)),
        ("bounds: expected 15", lambda: ops.nf4_quantize(weight, 64, bounds[1:], order, packed, absmax)),
        ("order: expected 16", lambda: ops.nf4_quantize(weight, 64, bounds, order[1:], packed, absmax)),
        ("packed: expected 64", lambda: ops.nf4_quantize(weight, 64, bounds, order, packed[1:], absmax)),
        ("absmax: expected 2", lambda: ops.nf4_quantize(weight, 64, bounds, order, packed, absmax[1:])),
        ("bounds: expected 255", lambda: ops.nf4_nest(values, bounds, False, index, one)),
        ("index: expected 128", lambda: ops.nf4_nest(values, wide, False, index[1:], one)),
        ("absmax: expected 1", lambda: ops.nf4_nest(values, wide, False, index, absmax)),
        ("values: expected dtype", lambda: ops.nf4_nest(values.double(), wide, False, index, one)),
        ("packed: expected 48", lambda: ops.nf4_linear(x[:, 8:], *stored, None, a, b, None, 1.0, s, y)),
        ("lora_a: expected shape", lambda: ops.nf4_linear(x, *stored, None, a[:, 1:], b, None, 1.0, s, y)),
        ("lora_b: expected shape", lambda: ops.nf4_linear(x, *stored, None, a, b.T, None, 1.0, s, y)),
        ("expected both or none", lambda: ops.nf4_linear(x, *stored, None, a, None, None, 1.0, s, y)),
        ("lora_bias: expected an adapter", lambda: ops.nf4_linear(x, *stored, None, None, None, values[:4], 1.0, s, y)),
        ("bias: expected shape", lambda: ops.nf4_linear(x, *stored, values, a, b, None, 1.0, s, y)),
        ("s: expected shape", lambda: ops.nf4_linear(x, *stored, None, a, b, None, 1.0, s[:1], y)),
        ("y: expected shape", lambda: ops.nf4_linear(x, *stored, None, a, b, None, 1.0, s, poisoned(3, 4))),
        ("y: expected a contiguous", lambda: ops.nf4_linear(x, *stored, None, a, b, None, 1.0, s, poisoned(4, 2).T)),
    ]


@pytest.mark.parametrize(("message", "call"), bad_nf4_calls())
def test_bad_nf4_arguments_raise(message: str, call: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
