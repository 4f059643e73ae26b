"""The C++ library against the definitions, on each instruction set in turn, at small awkward shapes."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peftfast.ops import native
from peftfast.reference import lora as reference_lora
from peftfast.reference import nf4 as reference_nf4
from peftfast.reference import philox as reference_philox

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([-0x123456789ABCDEF])
KNOWN_WORDS = {  # by what fills seed and counter: zeros or ones
    0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    -1: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
}


def supported_isas() -> list[str]:
    if not native.cpu_available()[0]:
        return []
    chosen = native.cpu_isa()
    names = []
    for name in ("avx512_bf16", "avx512", "avx2", "scalar"):
        try:
            torch.ops.peftfast_cpu.set_isa(name)
        except RuntimeError:
            continue
        names.append(name)
    torch.ops.peftfast_cpu.set_isa(chosen)
    return names


ISAS = supported_isas()
if not ISAS:  # an error, not a skip: a suite that passes without the library has shown nothing
    raise RuntimeError(f"the CPU library is not here: {native.cpu_available()[1]}")
ops = torch.ops.peftfast_cpu


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = native.cpu_isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(chosen)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = F32, strides: str = "plain") -> Tensor:
    """A matrix whose strides are those of a plain tensor, of a transposed one, of a slice of a wider one, or of every
    second column of one."""
    generator = torch.Generator().manual_seed(sum(shape) * 31 + len(strides))
    rows, columns = shape
    if strides == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).T
    if strides == "wide":
        return torch.randn(rows, columns + 5, generator=generator).to(dtype)[:, 3 : 3 + columns]
    if strides == "spaced":
        return torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, ::2]
    return torch.randn(rows, columns, generator=generator).to(dtype)


def assert_within_budget(actual: Tensor, composed: Tensor, exact: Tensor) -> None:
    """Error against float64 <= 2 * (that of the definition in the same dtype + one rounding of the largest value)."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
    budget = 2 * ((composed.double() - exact).abs().max().item() + rounding)
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"error {error:.3e} over the budget {budget:.3e}"


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


# M, K, N, R: each of 0 and 1, primes, ranks on both sides of every register block, more than one tile each way.
SHAPES = [
    (0, 8, 8, 2),
    (1, 1, 1, 1),
    (1, 64, 48, 16),
    (7, 33, 129, 3),
    (25, 193, 197, 8),
    (53, 200, 71, 17),
    (5, 96, 96, 64),
    (3, 17, 13, 129),
    (61, 1601, 2111, 5),
    (530, 31, 29, 12),
]
# x, adapters, compute dtype. The first is QLoRA's after prepare_model_for_kbit_training.
DTYPES = [(F32, F32, BF16), (F32, F32, F32), (BF16, F32, BF16), (BF16, BF16, BF16), (F16, F32, F16), (F32, F16, BF16)]
PROBABILITIES = [0.0, 0.05, 0.5, 1.0]
SETTINGS = [
    *((shape, DTYPES[0], p, "plain") for shape in SHAPES for p in (0.0, 0.05)),
    *(((25, 193, 197, 17), dtypes, 0.05, "plain") for dtypes in DTYPES[1:]),
    *(((26, 205, 203, 9), DTYPES[0], p, "plain") for p in PROBABILITIES),
    *(
        ((26, 205, 203, 9), dtypes, 0.5, strides)
        for dtypes in (DTYPES[0], DTYPES[3])
        for strides in ("transposed", "wide", "spaced")
    ),
]


@pytest.mark.parametrize(("shape", "dtypes", "p", "strides"), SETTINGS)
def test_shrink(isa: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], p: float, strides: str) -> None:
    rows, width, _, rank = shape
    x, w = randn(rows, width, dtype=dtypes[0], strides=strides), randn(rank, width, dtype=dtypes[1], strides=strides)
    out = poisoned(rows, rank, dtype=dtypes[2])
    ops.lora_shrink(x, w, SEED, p, 1.5, out)
    composed = reference_lora.lora_shrink(x, w, SEED, p, 1.5, dtypes[2])
    exact = reference_lora.lora_shrink(*double(x, w), SEED, p, 1.5, torch.float64)
    assert_within_budget(out, composed, exact)


@pytest.mark.parametrize(("shape", "dtypes", "p", "strides"), SETTINGS)
@pytest.mark.parametrize("in_place", [False, True])
def test_expand(
    isa: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], p: float, strides: str, in_place: bool
) -> None:
    rows, _, width, rank = shape
    base = randn(rows, width, dtype=dtypes[2] if in_place else dtypes[0], strides=strides)
    s, w = randn(rows, rank, dtype=dtypes[2], strides=strides), randn(width, rank, dtype=dtypes[1], strides=strides)
    bias = None if p == 0.5 else randn(1, width, dtype=dtypes[1], strides=strides)[0]
    composed = reference_lora.lora_expand(base, s, w, bias, SEED, p, 0.75, dtypes[2])
    exact = reference_lora.lora_expand(*double(base, s, w, bias), SEED, p, 0.75, torch.float64)
    out = base if in_place else poisoned(rows, width, dtype=dtypes[2])
    ops.lora_expand(base, s, w, bias, SEED, p, 0.75, out)
    assert_within_budget(out, composed, exact)


@pytest.mark.parametrize(("shape", "dtypes", "p", "strides"), SETTINGS)
def test_weight_grad(isa: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], p: float, strides: str) -> None:
    rows, width, _, rank = shape
    ds, x = randn(rows, rank, dtype=dtypes[2], strides=strides), randn(rows, width, dtype=dtypes[0], strides=strides)
    out = poisoned(rank, width, dtype=dtypes[1])
    ops.lora_weight_grad(ds, x, SEED, p, 1.5, out)
    composed = reference_lora.lora_weight_grad(ds, x, SEED, p, 1.5, dtypes[1])
    exact = reference_lora.lora_weight_grad(*double(ds, x), SEED, p, 1.5, torch.float64)
    assert_within_budget(out, composed, exact)


@pytest.mark.parametrize(("shape", "dtypes", "p", "strides"), [setting for setting in SETTINGS if setting[2] != 0.0])
def test_dy_grads(isa: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], p: float, strides: str) -> None:
    rows, _, width, rank = shape
    dy, s = randn(rows, width, dtype=dtypes[2], strides=strides), randn(rows, rank, dtype=dtypes[2], strides=strides)
    b = randn(width, rank, dtype=dtypes[1], strides=strides)
    ds, db = poisoned(rows, rank, dtype=dtypes[2]), poisoned(width, rank, dtype=dtypes[1])
    ops.lora_dy_grads(dy, s, b, 1.5, ds, db)
    composed = reference_lora.lora_dy_grads(dy, s, b, 1.5, dtypes[1])
    exact = reference_lora.lora_dy_grads(*double(dy, s, b), 1.5, torch.float64)
    for actual, reference, value in zip((ds, db), composed, exact, strict=True):
        assert_within_budget(actual, reference, value)


@pytest.mark.parametrize(
    ("shape", "strides"), [((53, 200, 71, 17), "plain"), ((25, 193, 197, 8), "spaced"), ((1, 1, 1, 1), "plain")]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_are_added_in_float32(
    shape: tuple[int, ...], strides: str, p: float, dtype: torch.dtype, isa: str
) -> None:
    """Results in float32 have float32's precision, of bfloat16 operands and of float32 ones, which nothing rounds, beside them."""
    rows, width, columns, rank = shape
    x, dy = randn(rows, width, dtype=dtype, strides=strides), randn(rows, columns, dtype=BF16, strides=strides)
    ds, s = randn(rows, rank, dtype=BF16), randn(rows, rank, dtype=BF16, strides=strides)
    b, base = randn(columns, rank, dtype=dtype, strides=strides), randn(rows, columns)
    dx, ds_out, db, y = (
        poisoned(rank, width),
        poisoned(rows, rank, dtype=BF16),
        poisoned(columns, rank),
        poisoned(rows, columns),
    )
    ops.lora_weight_grad(ds, x, SEED, p, 1.5, dx)
    ops.lora_dy_grads(dy, s, b, 1.5, ds_out, db)
    ops.lora_expand(base, s, b, None, SEED, p, 1.5, y)
    exact = [
        reference_lora.lora_weight_grad(*double(ds, x), SEED, p, 1.5, torch.float64),
        reference_lora.lora_dy_grads(*double(dy, s, b), 1.5, torch.float64)[1],
        reference_lora.lora_expand(*double(base, s, b), None, SEED, p, 1.5, torch.float64),
    ]
    for actual, expected in zip((dx, db, y), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_results_do_not_depend_on_threads(isa: str, threads: Callable[[int], None]) -> None:
    rows, width, rank = 900, 1700, 16
    x, s, b = randn(rows, width), randn(rows, rank, dtype=BF16), randn(width, rank)

    def run() -> list[Tensor]:
        outs = [poisoned(rows, rank), poisoned(rank, width), poisoned(rows, rank), poisoned(width, rank)]
        ops.lora_shrink(x, b.T, SEED, 0.1, 1.5, outs[0])
        ops.lora_weight_grad(s, x, SEED, 0.1, 1.5, outs[1])
        ops.lora_dy_grads(x, s, b, 1.5, outs[2], outs[3])
        base = x.clone()
        ops.lora_expand(base, s, b, None, SEED, 0.1, 1.5, base)
        return [*outs, base]

    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


ROWS_OF_TERMS = {
    "together": [-1] * 5 + [0] * 70 + [1] + [3] * 300 + [-1] * 2 + [2] * 16,  # every adapter's rows follow one another
    "scattered": [(7 * i) % 6 - 1 for i in range(130)],  # of which 4 is no adapter
    "none of one": [0, 0, 0, 2, 2, 3],
}


@pytest.mark.parametrize("named", ROWS_OF_TERMS)
@pytest.mark.parametrize(("dtype", "adapter"), [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_rows_of_terms(named: str, dtype: torch.dtype, adapter: torch.dtype, isa: str) -> None:
    """Each adapter's part of a pass over many has the bits of a pass of its own; the other rows are 0, or as they were."""
    rows, width, columns, ranks = torch.tensor(ROWS_OF_TERMS[named], dtype=torch.int32), 417, 211, (16, 7, 33, 1)
    count, offsets, m = len(ranks), [0, 16, 23, 56], len(rows)
    x, dy, base = (
        randn(m, width, dtype=dtype),
        randn(m, columns, dtype=dtype),
        randn(m, columns + 1, dtype=dtype)[:, 1:],
    )
    s = randn(m, sum(ranks), dtype=dtype)
    a = [randn(rank, width, dtype=adapter) for rank in ranks]
    b = [randn(columns, rank, dtype=adapter, strides="wide" if rank == 33 else "plain") for rank in ranks]
    scalings = [0.5 + t for t in range(count)]
    shrunk, ds = poisoned(m, sum(ranks), dtype=dtype), poisoned(m, sum(ranks), dtype=dtype)
    da, db, y = poisoned(sum(ranks), width, dtype=adapter), poisoned(columns * sum(ranks), dtype=adapter), base.clone()
    ops.lora_terms_shrink(x, a, rows, None, [0.0] * count, scalings, shrunk)
    ops.lora_terms_dy_grads(dy, s, b, rows, scalings, ds, db)
    ops.lora_terms_weight_grad(s, x, list(ranks), rows, None, [0.0] * count, scalings, da)
    ops.lora_terms_expand(y, s, b, [], rows, None, [0.0] * count, scalings, y)
    expected = [torch.zeros_like(shrunk), torch.zeros_like(ds), torch.zeros_like(da), base.clone()]
    for t, (rank, offset, scaling) in enumerate(zip(ranks, offsets, scalings, strict=True)):
        own, at = (rows == t).nonzero()[:, 0], slice(offset, offset + rank)
        alone = [poisoned(len(own), rank, dtype=dtype), poisoned(len(own), rank, dtype=dtype)]
        grads = [poisoned(rank, width, dtype=adapter), poisoned(columns, rank, dtype=adapter)]
        ops.lora_shrink(x[own], a[t], None, 0.0, scaling, alone[0])
        ops.lora_dy_grads(dy[own], s[own, at], b[t], scaling, alone[1], grads[1])
        ops.lora_weight_grad(s[own, at], x[own], None, 0.0, scaling, grads[0])
        whole = base[own]
        ops.lora_expand(whole, s[own, at], b[t], None, None, 0.0, scaling, whole)
        expected[0][own, at], expected[1][own, at], expected[2][at], expected[3][own] = *alone, grads[0], whole
        assert torch.equal(db[columns * offset : columns * (offset + rank)].view(columns, rank), grads[1]), t
    for name, actual, one in zip(("s", "ds", "da", "y"), (shrunk, ds, da, y), expected, strict=True):
        assert torch.equal(actual, one), name


def test_rows_of_terms_do_not_depend_on_threads(isa: str, threads: Callable[[int], None]) -> None:
    rows = torch.tensor(ROWS_OF_TERMS["together"] * 2, dtype=torch.int32)
    width, rank, count = 1300, 16, 4
    x, s = randn(len(rows), width, dtype=BF16), randn(len(rows), rank * count, dtype=BF16)
    a, b = [randn(rank, width)] * count, [randn(width, rank)] * count
    seeds, ps, scalings = torch.arange(count), [0.1, 0.0, 0.2, 0.3], [1.5] * count

    def run() -> list[Tensor]:
        outs = [poisoned(*s.shape), poisoned(*s.shape), poisoned(width * rank * count), poisoned(rank * count, width)]
        ops.lora_terms_shrink(x, a, rows, seeds, ps, scalings, outs[0])
        ops.lora_terms_dy_grads(x, s, b, rows, scalings, outs[1], outs[2])
        ops.lora_terms_weight_grad(s, x, [rank] * count, rows, seeds, ps, scalings, outs[3])
        y = x.clone()
        ops.lora_terms_expand(y, s, b, [], rows, seeds, ps, scalings, y)
        return [*outs, y]

    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_denormals_stay(dtype: torch.dtype, isa: str) -> None:
    """An instruction that rounds to bfloat16 takes denormals for zeros; a pass that adds nothing leaves base as it was."""
    integers = torch.int32 if dtype == F32 else torch.int16
    base = torch.arange(1, 1 + 3 * 80, dtype=integers).reshape(3, 80).view(dtype)
    y = poisoned(3, 80, dtype=dtype)
    ops.lora_expand(base, torch.zeros(3, 4, dtype=dtype), torch.ones(80, 4, dtype=dtype), None, None, 0.0, 1.0, y)
    assert torch.equal(y.view(integers), base.view(integers))
    h = poisoned(3, 80, dtype=dtype)
    ops.gated_activation(torch.ones_like(base), base, 3, h)  # relu(1) = 1
    assert torch.equal(h.view(integers), base.view(integers))


def test_dropped_values_may_be_infinite(isa: str) -> None:
    x = randn(9, 40)
    x[~reference_philox.dropout_mask(SEED, 9, 40, 0.5)] = float("inf")
    w, out = randn(3, 40), poisoned(9, 3)
    ops.lora_shrink(x, w, SEED, 0.5, 1.0, out)
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (5, 700), (4, 64), (2, 4097)])
@pytest.mark.parametrize("p", [*PROBABILITIES, 1e-6, 1 - 1e-6])
def test_dropout_mask(isa: str, shape: tuple[int, int], p: float) -> None:
    out = torch.empty(shape, dtype=torch.bool)
    ops.dropout_mask(SEED, p, out)
    assert torch.equal(out, reference_philox.dropout_mask(SEED, *shape, p))


@pytest.mark.parametrize("start", [0, 3, 2**32 - 5, 2**62 + 1, -7])
def test_philox_words(isa: str, start: int) -> None:
    out = torch.empty(37, 4, dtype=torch.int64)
    ops.philox_words(SEED, start, 7, 3, out)
    assert torch.equal(out, reference_philox.philox_words(SEED, start, 37, 7, 3))


def test_philox_known_answers(isa: str) -> None:
    out = torch.empty(1, 4, dtype=torch.int64)
    for bits, words in KNOWN_WORDS.items():
        ops.philox_words(torch.tensor([bits]), bits, bits & 0xFFFFFFFF, bits & 0xFFFFFFFF, out)
        assert tuple(out[0].tolist()) == words


@pytest.mark.parametrize("quant_type", reference_nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (1, 1), (5, 96), (130, 128), (0, 4)])
@pytest.mark.parametrize("block_size", [32, 64, 4096, 48, 33])
def test_nf4_dequantize(isa: str, quant_type: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int) -> None:
    code = reference_nf4.code_table(quant_type, torch.device("cpu"))
    weight = randn(*shape) * torch.logspace(-6, 5, shape[0])[:, None]  # float16 overflows and denormals among them
    if weight.numel():
        packed, absmax = reference_nf4.nf4_quantize(weight, block_size, code)
        nested, nested_absmax, offset = reference_nf4.nest_absmax(absmax)
    else:
        packed, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
        nested, nested_absmax, offset = torch.empty(0, dtype=torch.uint8), torch.empty(0), torch.zeros(1)
    table = reference_nf4.nested_code_table(torch.device("cpu"))
    for maxima, nesting in ((absmax, (None, None, None)), (nested, (nested_absmax, table, offset))):
        out = poisoned(*shape, dtype=dtype)
        ops.nf4_dequantize(packed, maxima, code, block_size, *nesting, out.numel(), 0, out)
        expected = reference_nf4.nf4_dequantize(packed, maxima, code, block_size, shape, dtype, *nesting)
        assert torch.equal(out, expected)


BITS_16 = torch.arange(65536, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_widening_and_narrowing_are_torchs(isa: str, dtype: torch.dtype) -> None:
    """Every 16-bit pattern to float32, and float32 patterns around every rounding boundary back, by expanding rank 0."""
    every = BITS_16.to(torch.int16).view(dtype)[None]
    s, w = torch.empty(1, 0), torch.empty(65536, 0)
    out = poisoned(1, 65536)
    ops.lora_expand(every, s, w, None, None, 0.0, 1.0, out)
    assert torch.equal(out.nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))
    assert torch.equal(out.isnan(), every.isnan())
    middle = every.float().view(torch.int32)
    for step in (1 << 12, (1 << 12) - 1, (1 << 12) + 1, 1 << 15, (1 << 15) - 1, (1 << 15) + 1, 0x7FFF0000):
        values = (middle + step).view(F32)
        values = values[:, : 65536 - 3]  # a tail that no vector covers
        narrowed = poisoned(1, 65533, dtype=dtype)
        ops.lora_expand(values, s, w[:65533], None, None, 0.0, 1.0, narrowed)
        expected = values.to(dtype)
        assert torch.equal(narrowed.isnan(), expected.isnan())
        assert torch.equal(narrowed.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def bad_calls() -> list[tuple[str, Callable[[], None]]]:
    x, w, out, bias = randn(4, 8), randn(2, 8), poisoned(4, 2), torch.zeros(7)
    s, b, base = randn(4, 2), randn(8, 2), randn(4, 8)
    packed, absmax, code = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1), torch.zeros(16)
    weight = poisoned(8, 8)
    bytes_, table = torch.zeros(1, dtype=torch.uint8), torch.zeros(256)
    none = (None, None, None)
    mask = torch.empty(2, 2, dtype=torch.bool)
    return [
        ("w: expected shape", lambda: ops.lora_shrink(x, randn(2, 7), None, 0.0, 1.0, out)),
        ("out: expected shape", lambda: ops.lora_shrink(x, w, None, 0.0, 1.0, poisoned(4, 3))),
        ("x: expected dtype", lambda: ops.lora_shrink(x.double(), w, None, 0.0, 1.0, out)),
        ("x: expected two dimensions", lambda: ops.lora_shrink(x[0], w, None, 0.0, 1.0, out)),
        ("seed: expected dtype", lambda: ops.lora_shrink(x, w, torch.zeros(1), 0.5, 1.0, out)),
        ("seed: expected 1 elements", lambda: ops.lora_shrink(x, w, torch.zeros(2, dtype=torch.int64), 0.5, 1.0, out)),
        ("p: expected", lambda: ops.lora_shrink(x, w, SEED, 1.5, 1.0, out)),
        ("p: expected", lambda: ops.lora_shrink(x, w, SEED, float("nan"), 1.0, out)),
        ("s: expected shape", lambda: ops.lora_expand(base, randn(3, 2), b, None, None, 0.0, 1.0, base)),
        ("w: expected shape", lambda: ops.lora_expand(base, s, randn(8, 3), None, None, 0.0, 1.0, base)),
        ("bias: expected 8 elements", lambda: ops.lora_expand(base, s, b, bias, None, 0.0, 1.0, base)),
        ("out: expected shape", lambda: ops.lora_expand(base, s, b, None, None, 0.0, 1.0, randn(4, 9))),
        ("ds: expected shape", lambda: ops.lora_weight_grad(randn(5, 2), x, None, 0.0, 1.0, poisoned(2, 8))),
        ("out: expected shape", lambda: ops.lora_weight_grad(s, x, None, 0.0, 1.0, poisoned(8, 2))),
        ("b: expected shape", lambda: ops.lora_dy_grads(base, s, randn(7, 2), 1.0, poisoned(4, 2), poisoned(8, 2))),
        ("db: expected shape", lambda: ops.lora_dy_grads(base, s, b, 1.0, poisoned(4, 2), poisoned(2, 8))),
        ("packed: expected 32", lambda: ops.nf4_dequantize(packed[:31], absmax, code, 64, *none, 64, 0, weight)),
        ("packed: expected dtype", lambda: ops.nf4_dequantize(packed.float(), absmax, code, 64, *none, 64, 0, weight)),
        ("absmax: expected 2", lambda: ops.nf4_dequantize(packed, absmax, code, 32, *none, 64, 0, weight)),
        ("absmax: expected dtype", lambda: ops.nf4_dequantize(packed, bytes_, code, 64, *none, 64, 0, weight)),
        ("code: expected 16", lambda: ops.nf4_dequantize(packed, absmax, code[:15], 64, *none, 64, 0, weight)),
        ("block_size", lambda: ops.nf4_dequantize(packed, absmax, code, 0, *none, 64, 0, weight)),
        ("all or none", lambda: ops.nf4_dequantize(packed, bytes_, code, 64, absmax, None, None, 64, 0, weight)),
        (
            "nested_absmax: expected 1",
            lambda: ops.nf4_dequantize(packed, bytes_, code, 64, absmax[:0], table, absmax, 64, 0, weight),
        ),
        (
            "nested_code: expected 256",
            lambda: ops.nf4_dequantize(packed, bytes_, code, 64, absmax, table[:255], absmax, 64, 0, weight),
        ),
        (
            "out: expected a contiguous",
            lambda: ops.nf4_dequantize(packed, absmax, code, 64, *none, 64, 0, weight.T[:, :]),
        ),
        ("out: expected rows within", lambda: ops.nf4_dequantize(packed, absmax, code, 64, *none, 64, 1, weight)),
        ("out: expected rows within", lambda: ops.nf4_dequantize(packed, absmax, code, 64, *none, 64, -1, weight[:4])),
        (
            "out: expected rows within",
            lambda: ops.nf4_dequantize(packed, absmax, code, 64, *none, 64, 0, weight[:, :5]),
        ),
        ("count: expected", lambda: ops.nf4_dequantize(packed, absmax, code, 64, *none, -1, 0, weight)),
        ("out: expected a contiguous", lambda: ops.dropout_mask(SEED, 0.5, torch.empty(3, 2, dtype=torch.bool).T)),
        ("out: expected dtype", lambda: ops.dropout_mask(SEED, 0.5, poisoned(2, 2))),
        ("seed: expected 1", lambda: ops.dropout_mask(torch.zeros(0, dtype=torch.int64), 0.5, mask)),
        ("tensor_id", lambda: ops.philox_words(SEED, 0, 2**32, 0, torch.empty(1, 4, dtype=torch.int64))),
        ("out: expected shape", lambda: ops.philox_words(SEED, 0, 0, 0, torch.empty(1, 3, dtype=torch.int64))),
        ("'sse9'", lambda: ops.set_isa("sse9")),
    ]


@pytest.mark.parametrize(("message", "call"), bad_calls())
def test_bad_arguments_raise(message: str, call: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_choice_of_instruction_set_is_reported(isa: str) -> None:
    assert native.cpu_isa() == isa
    with pytest.raises(RuntimeError):
        ops.set_isa("unknown")
    assert native.cpu_isa() == isa
    ops.set_isa("auto")
    assert native.cpu_isa() == ISAS[0]


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        ("80;90a;100", ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)), ((7, 5), (9, 1))),
        ("90a", ((9, 0),), ((8, 9), (10, 0), (12, 0))),
        ("90", ((9, 0), (10, 0), (12, 1)), ((8, 9),)),
        ("86;75", ((7, 5), (8, 0), (8, 6), (9, 0)), ((7, 0),)),
        ("80;100f", ((8, 9), (10, 0), (10, 3)), ((9, 0), (12, 0))),
    ],
)
def test_for_which_gpus_a_library_has_code(architectures: str, runs: tuple, fails: tuple) -> None:
    names = architectures.split(";")
    assert all(native.has_code(names, capability) for capability in runs)
    assert not any(native.has_code(names, capability) for capability in fails)


def test_a_cuda_library_for_another_gpu_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two GPUs is enough: the other backends serve both."""
    namespace = SimpleNamespace(architectures=lambda: "80;90a")
    monkeypatch.setattr(torch.ops, "peftfast_cuda", namespace, raising=False)
    capabilities = [(9, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a stranger")
    assert native._serves_every_gpu("_cuda.so") == (True, "")
    capabilities[1] = (10, 0)
    ok, reason = native._serves_every_gpu("_cuda.so")
    assert not ok and "built for sm_80, sm_90a, and cuda:1 is an sm_100, a stranger" in reason
    del namespace.architectures
    assert "of another version" in native._serves_every_gpu("_cuda.so")[1]


def test_verdicts_are_remembered() -> None:
    assert native.cpu_available() is native.cpu_available()
    ok, reason = native.cuda_available()
    assert ok or reason


def test_a_library_that_many_threads_ask_for_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.ops.load_library sets flags of the process and puts back those that it found: two at once may leave them set."""
    loaded: list[str] = []

    def load(backend: str) -> tuple[bool, str]:
        loaded.append(backend)
        time.sleep(0.05)
        return True, ""

    monkeypatch.setattr(native, "_load", load)
    monkeypatch.setattr(native, "_verdicts", {})
    threads = [threading.Thread(target=native.cpu_available) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["cpu"]
