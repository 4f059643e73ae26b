"""Quantising: every backend bit for bit the definition, and on a CPU byte for byte bitsandbytes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfast.functional as F
from peftfast.ops import nf4 as ops
from peftfast.reference import nf4 as definition
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.mutants import Mutant, plant

CPU = torch.device("cpu")
on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, data: int) -> Tensor:
    """Rows of very different size, a block of zeros, and elements halfway between two codes."""
    generator = torch.Generator().manual_seed(data)
    weight = torch.randn(shape, generator=generator)
    flat = weight.view(-1)
    flat *= torch.exp2(torch.randint(-12, 6, (flat.numel(),), generator=generator).float() // 4 * 4)
    bounds, _ = definition.code_bounds(definition.code_table("nf4", CPU))
    flat[1::7] = bounds[torch.randint(0, 15, flat[1::7].shape, generator=generator)]
    if data % 3 == 0:
        flat[: 64 * (data % 5)] = 0
    if data % 4 == 0:
        flat[::9] = 1.0
    return weight.to(dtype).to(DEVICE)


def check_quantize(shape: tuple[int, ...], block_size: int, dtype: torch.dtype, quant_type: str, data: int) -> None:
    weight = awkward(shape, dtype, data)
    weight = weight.T if weight.dim() == 2 and data % 2 else weight
    code = definition.code_table(quant_type, DEVICE)
    packed, absmax = ops.nf4_quantize(weight, block_size, code)
    expected_packed, expected_absmax = definition.nf4_quantize(weight, block_size, code)
    wrong = (packed != expected_packed).sum().item() + (absmax != expected_absmax).sum().item()
    assert packed.shape == expected_packed.shape and wrong == 0, f"{shape} {block_size} {dtype}: {wrong} bytes differ"


def check_nest(count: int, snapped: bool, data: int) -> None:
    generator = torch.Generator().manual_seed(data)
    values = torch.randn(count, generator=generator).abs().to(DEVICE)
    values = values - values.mean() if data % 4 else values * 0
    code = definition.nested_code_table(DEVICE)
    index, absmax = ops.nf4_nest(values, code, snapped)
    expected_index, expected_absmax = definition.quantize_nested(values, code, snapped)
    wrong = (index != expected_index).sum().item() + (absmax != expected_absmax).sum().item()
    assert wrong == 0, f"{count} {snapped}: {wrong} bytes differ"


@pytest.mark.parametrize("quant_type", definition.QUANT_TYPES)
@pytest.mark.parametrize("first", ["inference", "fake", "meta"])
def test_the_code_tables_are_everyones(quant_type: str, first: str) -> None:
    """Whoever quantises first in a process: in inference mode, while a mode makes fakes, where tensors lie on another device by
    default."""
    definition.code_table.cache_clear()
    definition.nested_code_table.cache_clear()
    expected = [definition.code_table(quant_type, CPU).clone(), definition.nested_code_table(CPU).clone()]
    definition.code_table.cache_clear()
    definition.nested_code_table.cache_clear()
    weight = torch.randn(64, 64)
    if first == "inference":
        with torch.inference_mode():
            F.nf4_quantize(weight, quant_type=quant_type, double_quant=True)
    elif first == "meta":
        with torch.device("meta"):
            F.nf4_quantize(weight, quant_type=quant_type, double_quant=True)
    else:
        with FakeTensorMode():
            definition.code_table(quant_type, CPU)
    quantised = F.nf4_quantize(weight, quant_type=quant_type, double_quant=True)
    for found, table in zip((quantised.code, quantised.nested_code), expected, strict=True):
        assert type(found) is Tensor and found.device == CPU and torch.equal(found, table)
    x, a, b = (torch.randn(size, requires_grad=True) for size in ((80, 64), (2, 64), (64, 2)))
    F.lora_linear(x, quantised, a, b).sum().backward()


SIZES = (1, 2, 3, 7, 13, 31, 32, 33, 64, 65, 96, 127, 160, 256, 311)


@pytest.mark.parametrize("part", range(4))
def test_quantize(part: int) -> None:
    draw = random.Random(part)
    for index in range(60):
        shape = draw.choice(
            [(draw.choice(SIZES), draw.choice(SIZES)), (draw.choice(SIZES),), (2, 3, draw.choice(SIZES))]
        )
        kind = draw.choice((F32, BF16, F16))
        check_quantize(shape, draw.choice(definition.BLOCK_SIZES), kind, draw.choice(definition.QUANT_TYPES), index)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_quantize_triton(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    cases = (((33, 65), 64, "nf4"), ((5, 7), 32, "fp4"), ((64, 96), 4096, "nf4"), ((130, 64), 128, "fp4"))
    for data, (shape, block_size, quant_type) in enumerate(cases):
        check_quantize(shape, block_size, dtype, quant_type, data)


@pytest.mark.parametrize("asked", ["", on_triton])
@pytest.mark.parametrize("snapped", [False, True])
def test_nest(asked: str, snapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    for data, count in enumerate((1, 2, 255, 256, 257, 700)):
        check_nest(count, snapped, data)


@pytest.mark.parametrize("asked", ["", on_triton])
def test_what_is_not_finite(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN makes its block's maximum NaN and takes the last code, as in the definition; neighbours are untouched."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight[1, 3] = float("nan")
    weight[3, 5] = float("inf")
    code = definition.code_table("nf4", DEVICE)
    packed, absmax = ops.nf4_quantize(weight, 64, code)
    expected_packed, expected_absmax = definition.nf4_quantize(weight, 64, code)
    assert torch.equal(packed, expected_packed)
    assert absmax[1].isnan() and expected_absmax[1].isnan() and torch.equal(absmax[2:], expected_absmax[2:])


def quantize_as_bitsandbytes(weight: Tensor, block_size: int, quant_type: str, nested: bool) -> F.NF4Weight:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed, state = bitsandbytes.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    fields = {}
    if nested:
        offset = state.offset.reshape(1)
        fields = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "nested_offset": offset}
    return F.NF4Weight(packed, state.absmax, state.code, block_size, weight.shape, weight.dtype, quant_type, **fields)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Of zeros the signs too."""
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def assert_same_bytes(ours: F.NF4Weight, theirs: F.NF4Weight) -> None:
    for name, value in vars(theirs).items():
        if isinstance(value, Tensor):
            assert same_bits(getattr(ours, name), value), name
        else:
            assert getattr(ours, name) == value, name


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    block_size=st.sampled_from(definition.BLOCK_SIZES),
    dtype=st.sampled_from([F32, BF16, F16]),
    quant_type=st.sampled_from(definition.BITSANDBYTES_TYPES),
    nested=st.booleans(),
    transposed=st.booleans(),
    data=st.integers(0, 2**31),
)
def test_bytes_are_bitsandbytes(
    shape: list[int], block_size: int, dtype: torch.dtype, quant_type: str, nested: bool, transposed: bool, data: int
) -> None:
    """Its CPU backend, nested bytes included: any shape, dtype, block size and strides."""
    weight = awkward(tuple(shape), dtype, data).cpu()
    weight = weight.transpose(0, -1) if transposed else weight
    ours = F.nf4_quantize(weight, block_size=block_size, double_quant=nested, quant_type=quant_type)
    assert_same_bytes(ours, quantize_as_bitsandbytes(weight, block_size, quant_type, nested))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    block_size=st.sampled_from([32, 64, 128, 256, 1024]),
    dtype=st.sampled_from([F32, BF16, F16]),
    quant_type=st.sampled_from(definition.BITSANDBYTES_TYPES),
    nested=st.booleans(),
    storage=st.sampled_from([torch.uint8, BF16, F32]),
    spare=st.integers(0, 40),
    data=st.integers(0, 2**31),
)
def test_values_are_bitsandbytes(
    rows: int,
    blocks: int,
    block_size: int,
    dtype: torch.dtype,
    quant_type: str,
    nested: bool,
    storage: torch.dtype,
    spare: int,
    data: int,
) -> None:
    """Dequantised by its CPU kernel where that is right (the width a multiple of the block), from bytes of any storage; ours whole, and
    as rows of a wider buffer."""
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = awkward((rows, blocks * block_size), dtype, data).cpu()
    nf4 = F.nf4_quantize(weight, block_size=block_size, double_quant=nested, quant_type=quant_type)
    given_weight = nf4.to_bitsandbytes(storage)
    expected = bitsandbytes.dequantize_4bit(given_weight, given_weight.quant_state)
    # FP4's second zero is +0.0 by its CPU library, which it does not load beside a GPU, and -0.0 elsewhere.
    same = torch.equal if quant_type == "fp4" and torch.cuda.is_available() else same_bits
    assert same(F.nf4_dequantize(F.NF4Weight.from_bitsandbytes(given_weight)), expected)
    first = data % rows
    out = torch.empty(rows - first, weight.shape[1] + spare, dtype=dtype)[:, spare:]
    ours = F.nf4_dequantize(nf4, out=out, first_row=first)
    assert same(ours.contiguous(), expected[first:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.integers(0, 2**31), count=st.integers(2, 600))
def test_nested_bytes_are_bitsandbytes_beside_its_grid(data: int, count: int) -> None:
    """Values a few last bits away from where its CPU kernel goes from one of its 65,536 values to the next, at which the code changes:
    multiplied by the reciprocal of the maximum and never divided by it, in a short last block too."""
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    generator = torch.Generator().manual_seed(data)
    code = definition.nested_code_table(CPU)
    middle = ((code[1:].double() + code[:-1].double()) / 2)[torch.randint(0, 255, (count,), generator=generator)]
    edge = (((middle + 1) / 2 * 65535).floor() + 0.5) / 65535 * 2 - 1
    maximum = torch.rand(1, generator=generator).double() * 10.0 ** (data % 7 - 3) + 1e-6
    values = (edge * maximum).float()
    bits = values.view(torch.int32) + torch.randint(-2, 3, (count,), generator=generator, dtype=torch.int32)
    values = torch.where(values == 0, values, bits.view(F32)).clamp(-maximum.float(), maximum.float())
    values[::256] = maximum.float()
    index, absmax = ops.nf4_nest(values, code, True)
    expected, state = bitsandbytes.quantize_blockwise(values, blocksize=256)
    assert torch.equal(index, expected) and torch.equal(absmax, state.absmax)
    assert torch.equal(definition.quantize_nested(values, code, True)[0], expected)


def test_every_value_of_the_grid_takes_bitsandbytes_code() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    grid = (torch.arange(65536).double() / 65535 * 2 - 1).float()
    values = torch.cat([torch.cat([torch.ones(1), part]) for part in grid.split(255)])
    index, _ = ops.nf4_nest(values, definition.nested_code_table(CPU), True)
    assert torch.equal(index, bitsandbytes.quantize_blockwise(values, blocksize=256)[0])


@pytest.mark.parametrize(
    "values", [[0.0] * 3, [0.0] * 300, [1e-39, 2e-39, 0.0], [1e-45, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]]
)
def test_nested_extremes_are_bitsandbytes(values: list[float]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    given_values = torch.tensor(values)
    expected, state = bitsandbytes.quantize_blockwise(given_values, blocksize=256)
    index, absmax = ops.nf4_nest(given_values, definition.nested_code_table(CPU), True)
    assert torch.equal(index, expected) and torch.equal(absmax, state.absmax)


def _last_forgotten(run, *given):  # type: ignore[no-untyped-def]
    index, absmax = run(*given)
    index[-1] = 1
    return index, absmax


def _truncated_nest(run, values, code, snapped):  # type: ignore[no-untyped-def]
    return run(values, code, not snapped)


def _divided(run, weight, block_size, code):  # type: ignore[no-untyped-def]
    """Every block divided by its maximum."""
    blocks = torch.nn.functional.pad(weight.float().reshape(-1), (0, -weight.numel() % block_size)).reshape(
        -1, block_size
    )
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).reshape(-1)[: weight.numel() + weight.numel() % 2]
    index = definition.nearest_code(scaled, code).to(torch.uint8)
    return ((index[::2] << 4) | index[1::2])[:, None], absmax


MUTANTS = [
    Mutant("nibbles swapped", ops.nf4_quantize, lambda run, *g: (lambda p, a: (p << 4 | p >> 4, a))(*run(*g))),
    Mutant("maxima shifted", ops.nf4_quantize, lambda run, *g: (lambda p, a: (p, a.roll(1)))(*run(*g))),
    Mutant("code reversed", ops.nf4_quantize, lambda run, w, b, c: run(w, b, c.flip(0))),
    Mutant("rounded to bfloat16 first", ops.nf4_quantize, lambda run, w, b, c: run(w.bfloat16(), b, c)),
    Mutant(
        "strides ignored", ops.nf4_quantize, lambda run, w, b, c: run(w.T.reshape(w.shape) if w.dim() == 2 else w, b, c)
    ),
    Mutant("every block divided", ops.nf4_quantize, _divided),
    Mutant("the other nesting", ops.nf4_nest, _truncated_nest),
    Mutant("nested maxima shifted", ops.nf4_nest, lambda run, *g: (lambda i, a: (i, a * 1.5))(*run(*g))),
    Mutant("last byte forgotten", ops.nf4_nest, _last_forgotten),
]


def check_all() -> None:
    for data in range(30):
        check_quantize((31 + data, 67), 64, (F32, BF16, F16)[data % 3], definition.QUANT_TYPES[data % 2], data)
    for data in range(1, 9):
        for snapped in (False, True):
            check_nest(100 * data, snapped, data)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError, match="bytes differ"):
        check_all()


def test_planting_itself_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in (ops.nf4_quantize, ops.nf4_nest):
        plant(monkeypatch, Mutant("none", operator, lambda run, *given: run(*given)))
    check_all()
