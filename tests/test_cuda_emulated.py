"""csrc/cuda run on the CPU, thread by thread, against the definitions: what compiling alone cannot show where there is no GPU."""

import ctypes
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.configs import nf4 as configs
from peftfast.configs.device import Device
from peftfast.reference import nf4 as definition
from tests.support.budget import assert_within_budget
from tests.support.cuda_emulator.build import build, fails_apart, translated
from tests.test_nf4_linear import Case, arguments_of, expected_of
from tests.test_nf4_quantize import awkward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)  # numbered as csrc/narrow.h numbers them
CPU = torch.device("cpu")
GUARD = 64

pytestmark = pytest.mark.interpreter  # where there is a GPU the kernels themselves are tested


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def library(folder: Path) -> ctypes.CDLL:
    return build("nf4", folder)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def number(dtype: torch.dtype) -> int:
    return DTYPES.index(dtype)


def call(function: Any, *arguments: Any) -> None:
    converted = [
        pointer(one) if one is None or isinstance(one, Tensor)
        else ctypes.c_float(one) if isinstance(one, float)
        else ctypes.c_int32(number(one)) if isinstance(one, torch.dtype)
        else ctypes.c_int32(one) if isinstance(one, bool)
        else ctypes.c_int64(one)
        for one in arguments
    ]  # fmt: skip
    assert function(*converted) is None


class Guarded:
    """A tensor of ``shape`` with elements on both sides that must stay what they are; NaN, or 0xA5, inside until it is written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel()
        self.whole = torch.full((count + 2 * GUARD,), 0xA5 if dtype == torch.uint8 else float("nan")).to(dtype)
        self.whole[:GUARD] = self.whole[GUARD + count :] = 7
        self.tensor = self.whole[GUARD : GUARD + count].view(shape)

    def check(self) -> Tensor:
        assert (self.whole[:GUARD] == 7).all() and (self.whole[GUARD + self.tensor.numel() :] == 7).all()
        return self.tensor


def stored(
    shape: tuple[int, ...], block_size: int, nested: bool, data: int = 0, quant_type: str = "nf4"
) -> tuple[Any, ...]:
    """packed, absmax, code and the three nested tensors."""
    code = definition.code_table(quant_type, CPU)
    packed, absmax = definition.nf4_quantize(awkward(shape, F32, data).cpu(), block_size, code)
    if not nested:
        return packed, absmax, code, None, None, None
    index, nested_absmax, offset = definition.nest_absmax(absmax)
    return packed, index, code, nested_absmax, definition.nested_code_table(CPU), offset


def dequantize(
    library: ctypes.CDLL,
    weight: tuple[Any, ...],
    block_size: int,
    shape: tuple[int, int],
    rows: slice,
    spare: int,
    dtype: torch.dtype,
) -> Tensor:
    n, k = shape
    first, last, _ = rows.indices(n)
    buffer = Guarded((last - first, k + spare), dtype)
    slab = (first * k, last * k, k, k + spare)
    if first == 0 and last == n and spare == 0:
        slab = (0, n * k, n * k, n * k)
    call(library.nf4_dequantize, *weight, block_size, n * k, *slab, buffer.tensor, dtype)
    out = buffer.check()
    assert out[:, k:].isnan().all()
    return out[:, :k]


def check_dequantize(library: ctypes.CDLL, **fixed: Any) -> None:
    draw = random.Random(0)
    for data in range(150):
        shape = draw.choice([(33, 64), (70, 96), (5, 33), (17, 256), (3, 1000), (131, 72), (9, 1024), (61, 21)])
        block_size, dtype, nested = draw.choice((8, 32, 64, 128, 4096)), draw.choice(DTYPES), draw.random() < 0.6
        weight = stored(shape, block_size, nested, data, draw.choice(definition.QUANT_TYPES))
        rows = draw.choice([slice(None), slice(1, None), slice(2, 3)])
        out = dequantize(library, weight, block_size, shape, rows, draw.choice((0, 8, 5)), dtype)
        packed, absmax, code, *nesting = weight
        expected = definition.nf4_dequantize(packed, absmax, code, block_size, shape, dtype, *nesting)[rows]
        wrong = (out != expected).sum().item()
        assert wrong == 0, f"{shape} {block_size} {dtype} {rows}: {wrong} values differ"


def check_quantize(library: ctypes.CDLL) -> None:
    draw = random.Random(1)
    for data in range(150):
        shape, block_size = (
            draw.choice([(33, 64), (7, 9), (130, 96), (1, 1), (5, 1000)]),
            draw.choice(definition.BLOCK_SIZES),
        )
        dtype, code = draw.choice(DTYPES), definition.code_table(draw.choice(definition.QUANT_TYPES), CPU)
        weight = awkward(shape, dtype, data).cpu()
        if data % 4 == 0:  # an address that 16 does not divide
            weight = torch.cat((weight.new_zeros(1), weight.reshape(-1)))[1:].view(shape)
        bounds, order = definition.code_bounds(code)
        packed, absmax = (
            Guarded(((weight.numel() + 1) // 2, 1), torch.uint8),
            Guarded((-(-weight.numel() // block_size),), F32),
        )
        call(
            library.nf4_quantize,
            weight,
            dtype,
            weight.numel(),
            block_size,
            bounds,
            order.to(torch.uint8),
            packed.tensor,
            absmax.tensor,
        )
        expected = definition.nf4_quantize(weight, block_size, code)
        wrong = sum((one.check() != other).sum().item() for one, other in zip((packed, absmax), expected, strict=True))
        assert wrong == 0, f"{shape} {block_size} {dtype}: {wrong} values differ"


def check_nest(library: ctypes.CDLL) -> None:
    code = definition.nested_code_table(CPU)
    bounds = (code[1:] + code[:-1]) / 2
    for count in (1, 7, 255, 256, 257, 3000):
        for snapped in (False, True):
            values = torch.randn(count, generator=torch.Generator().manual_seed(count))
            values = values - values.mean()
            index, absmax = Guarded((count,), torch.uint8), Guarded((-(-count // 256),), F32)
            call(library.nf4_nest, values, count, bounds, snapped, index.tensor, absmax.tensor)
            expected = definition.quantize_nested(values, code, snapped)
            wrong = sum(
                (one.check() != other).sum().item() for one, other in zip((index, absmax), expected, strict=True)
            )
            assert wrong == 0, f"{count} {snapped}: {wrong} values differ"


# Rows on both sides of each number of tiles, weight rows past a tile's end, A in one tile and in more; warps: one for all, several
# to a tile, tiles of several, shares that differ, more than there are units, in one block and in two.
LINEAR = [
    (Case(M=1, N=16, K=128, R=3, x=BF16), 1),
    (Case(M=8, N=70, K=256, R=16, x=F32, adapter=BF16, data=1), 9),
    (Case(M=9, N=5, K=384, R=70, x=F16, compute=F16, adapter=F16, out=F16, nested=False, data=2), 17),
    (Case(M=17, N=65, K=128, R=0, x=BF16, out=BF16, bias=False, data=3), 3),
    (Case(M=33, N=64, K=640, R=8, x=F32, block_size=4096, lora_bias=False, data=4), 20),
    (Case(M=64, N=130, K=256, R=5, x=BF16, out=BF16, block_size=32, data=5), 4),
    (Case(M=9, N=70, K=256, R=0, x=BF16, adapted=True, data=6), 32),
    (Case(M=3, N=20, K=256, R=40, x=BF16, data=7), 7),
    (Case(M=40, N=40, K=640, R=20, x=BF16, data=8), 7),  # a tile's two groups of rows have not as many parts
]


def check_linear(library: ctypes.CDLL) -> None:
    for case, warps in LINEAR:
        arguments = arguments_of(case)
        x, packed, absmax, code, block_size, _, *nested, bias, lora_a, lora_b, lora_bias, scaling, compute, out = (
            arguments
        )
        partial = Guarded((scratch(library, case.M, case.N, case.K, case.R, warps),), F32)
        s, y = Guarded((case.M, case.R), compute), Guarded((case.M, case.N), out)
        adapter = [(t, F32 if t is None else t.dtype) for t in (bias, lora_a, lora_b, lora_bias)]
        call(
            library.nf4_linear,
            *(packed, absmax, code, *nested, block_size),
            *(case.M, case.N, case.K, case.R, x, x.dtype),
            *(one for pair in adapter for one in pair),
            *(scaling, compute, warps, partial.tensor, s.tensor, y.tensor, out),
        )
        partial.check()
        rows = zip(
            ("y", "s"), (y.check(), s.check()), expected_of(arguments, False), expected_of(arguments, True), strict=True
        )
        for name, actual, composed, exact in rows:
            assert_within_budget(f"{name} of {case}", actual, composed, exact)


def scratch(library: ctypes.CDLL, *sizes: int) -> int:
    """The sums' parts of M, N, K, R and so many warps."""
    library.nf4_linear_scratch.restype = ctypes.c_int64
    return library.nf4_linear_scratch(*map(ctypes.c_int64, sizes))  # type: ignore[no-any-return]


def test_both_sides_know_a_product_s_scratch(library: ctypes.CDLL) -> None:
    draw = random.Random(2)
    for _ in range(300):
        M, N, K = draw.choice((0, 1, 16, 17, 64)), draw.choice((0, 1, 70, 4096, 14336)), 128 * draw.randint(0, 40)
        R, device = draw.choice((0, 3, 16, 70)), Device("", (9, 0), draw.choice((1, 20, 132)))
        warps, size = configs.nf4_linear_shares(M, N, K, R, device)
        assert size == scratch(library, M, N, K, R, warps), (M, N, K, R, device)


@pytest.mark.parametrize(("N", "K"), [(0, 256), (5, 0), (0, 0)])
def test_an_adapter_s_product_is_there_without_a_weight(N: int, K: int, library: ctypes.CDLL) -> None:
    """Of a weight without rows S is all that there is, and without columns it is nothing, and y the biases."""
    M, R, warps = 9, 20, 7
    generator = torch.Generator().manual_seed(N + K)
    x, lora_a, lora_b, bias, lora_bias = (
        torch.randn(shape, generator=generator) for shape in ((M, K), (R, K), (N, R), (N,), (N,))
    )
    weight = torch.empty(0, dtype=torch.uint8), torch.empty(0), definition.code_table("nf4", CPU), None, None, None
    partial = Guarded((scratch(library, M, N, K, R, warps),), F32)
    s, y = Guarded((M, R), BF16), Guarded((M, N), F32)
    adapter = [one for t in (bias, lora_a, lora_b, lora_bias) for one in (t, F32)]
    sizes = (M, N, K, R)
    call(
        library.nf4_linear,
        *weight,
        64,
        *sizes,
        x,
        F32,
        *adapter,
        0.5,
        BF16,
        warps,
        partial.tensor,
        s.tensor,
        y.tensor,
        F32,
    )
    partial.check()
    exact = x.double() @ lora_a.double().T
    assert_within_budget("s", s.check(), x.bfloat16() @ lora_a.bfloat16().T, exact)
    assert torch.equal(y.check(), (bias + 0.5 * lora_bias).expand(M, N))


CHECKS = {"dequantize": check_dequantize, "quantize": check_quantize, "nest": check_nest, "linear": check_linear}


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name: str, library: ctypes.CDLL) -> None:
    CHECKS[name](library)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("dequantize", ("row * slab.stride + static_cast", "row * slab.width + static_cast")),
        ("dequantize", ("target += rows.wrap", "target -= rows.wrap")),
        ("dequantize", ("rows.units * (slab.stride - slab.width);", "rows.units * slab.stride;")),
        (
            "dequantize",
            ("(start + lane * kElements + j * kStep) >> block_shift", "(lane * kElements + j * kStep) >> block_shift"),
        ),
        ("dequantize", ("lane < last ? lane : last", "0")),
        ("quantize", ("word |= index << (8 * (j / 2) + (j % 2 == 0 ? 4 : 0))", "word |= index << (4 * j)")),
        ("quantize", ("limits[rank + step - 1] >= value", "limits[rank + step - 1] > value")),
        ("nest", ("distance = 16; distance > 0", "distance = 16; distance > 1")),
        (
            "linear",
            (
                "{upper[0], lower[0], upper[1], lower[1]}",
                "{upper[0], upper[1], lower[0], lower[1]}",
            ),
        ),
        ("linear", ("rows.at[i] += kUnitChunks", "rows.at[i] += i == 1 ? 0 : kUnitChunks")),
        ("linear", ("(shares, walk.number + 1)", "(shares, walk.number)")),
        ("linear", ("walk.left > here ? 0 : 1", "1")),
        ("linear", ("++walk.number, walk.step = 0;", "++walk.number;")),
        ("linear", ("(number & (shares.groups - 1))", "(0)")),
        ("linear", ("kWide ? number >> (shares.groups - 1) : number", "number")),
        ("linear", ("group + (2 * r + i / 2) * 8", "group + i / 2 * 8")),
        ("linear", ("upper)[4] = pairs[2 * r]", "upper)[4] = pairs[0]")),
        ("linear", ("m / kLinearGroupRows", "m / (2 * kLinearGroupRows)")),
        ("linear", ("first + kBytes > 256 && byte >= 256", "false")),
        ("linear", ("warp < shares.more ? warp : shares.more", "0")),
        ("linear", ("shares.more + (unit - longer) / shares.each", "unit / shares.each")),
        ("linear", ("shares.adapter_units + walk.number * shares.steps", "walk.number * shares.steps")),
        ("linear", ("0x5504 | i << 4", "0x5504")),
        ("linear", ("* sizeof(float2);\n    const int64_t x_bytes", "* sizeof(float);\n    const int64_t x_bytes")),
        ("linear", ("threadIdx.x / 8 % 16);", "threadIdx.x / 16 % 16);")),
        ("linear", ("* a_bytes;\n        float sums", "* a_bytes + a_bytes;\n        float sums")),
        ("linear", ("part < count; part += kPartLanes", "part + 1 < count; part += kPartLanes")),
        ("linear", ("part < count; ++part", "part + 1 < count; ++part")),
        ("linear", (" || p.lora_bias != nullptr", "")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_planted_fault_is_found(
    name: str, edit: tuple[str, str], library: ctypes.CDLL, folder: Path, tmp_path: Path
) -> None:
    faulty = build("nf4", tmp_path, edit, base=folder)
    assert fails_apart(lambda: CHECKS[name](faulty), AssertionError)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("dequantize", ("target += rows.wrap", "target += rows.wrap + 0")),
        ("linear", ("part < count; ++part", "part < count + 0; ++part")),
    ],
    ids=["dequantize", "linear"],
)
def test_an_edit_that_changes_nothing_is_no_fault(
    name: str, edit: tuple[str, str], library: ctypes.CDLL, folder: Path, tmp_path: Path
) -> None:
    """Unoptimised code and the other process alone are not what the planted faults are found by."""
    same = build("nf4", tmp_path, edit, base=folder)
    assert not fails_apart(lambda: CHECKS[name](same), AssertionError)


def test_translation() -> None:
    source = "kernel<T, true>\n    <<<grid, 128, 0, stream>>>(a, b + (c), d);"
    assert translated(source) == "emulated::launch(grid, 128, 0, stream, [&] { kernel<T, true>(a, b + (c), d); });"
    with pytest.raises(ValueError, match="no source has"):
        build("nf4", Path("/nonexistent"), ("no such text", ""))


def test_what_a_faulty_kernel_does_stays_apart() -> None:
    def wrong() -> None:
        raise ValueError

    assert fails_apart(wrong, ValueError) and fails_apart(os.abort) and not fails_apart(lambda: None)
    with pytest.raises(RuntimeError, match="another error"):
        fails_apart(wrong, AssertionError)
