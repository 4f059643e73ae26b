"""Products of many rows with a 4-bit weight that write no dense one, or decode it beside the product: the kernel (interpreted without a
GPU), the operators, the ways a layer takes, and planted faults in each."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import peftfast.functional as F
from peftfast.configs import device as devices
from peftfast.configs import nf4_product as configs
from peftfast.configs.device import Device
from peftfast.functional import nf4_routes as routes
from peftfast.kernels import nf4_product as kernel
from peftfast.ops import nf4_product as ops
from peftfast.reference import lora as lora_definition
from peftfast.reference import nf4 as definition

from .support import pretended_gpu
from .support.budget import assert_within_budget
from .support.counting import Calls
from .support.interpreter import DEVICE, require_runnable_kernels, seed_of
from .support.mutants import Mutant, plant

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
H200 = Device("NVIDIA H200", (9, 0), 132)
SEED = 2**40 + 12345
# Several tiles, steps, groups and partial sums even at the sizes below, and programs with more than one tile.
SMALL = configs.ProductConfig("fused", 1, 32, 32, 32, 16, 4, 2, group_m=2, programs=2, splits=2)


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    transposed: bool = False
    R: int = 5  # 0: no adapter
    block_size: int = 64
    nested: bool = True
    dtype: torch.dtype = BFLOAT16
    narrow: torch.dtype = FLOAT32
    out: torch.dtype = BFLOAT16
    p: float = 0.0
    biases: bool = False
    splits: int = 2


# Blocks of a whole row, of half a row, that straddle rows by 32 columns and by 2; rows, columns and steps with tails; one sum, several,
# more than steps; no adapter, ranks of several steps, nothing kept; both 16-bit types and wide results.
CASES = (
    Case(70, 40, 64, biases=True),
    Case(33, 64, 128, transposed=True, p=0.3, R=3),
    Case(37, 43, 50, block_size=32, nested=False, biases=True),
    Case(37, 43, 50, transposed=True, block_size=32, p=0.1, biases=True, splits=1),
    Case(17, 70, 160, R=17, out=FLOAT32, splits=8),
    Case(40, 96, 96, transposed=True, R=0, biases=True, dtype=FLOAT16, out=FLOAT16),
    Case(1, 33, 512, block_size=4096, R=0, out=FLOAT32, splits=3),
    Case(35, 41, 32, transposed=True, R=40, p=1.0, dtype=FLOAT16, narrow=FLOAT16, out=FLOAT16, nested=False),
)


@pytest.fixture(autouse=True)
def runnable() -> None:
    require_runnable_kernels()


def _weight(case: Case, generator: torch.Generator) -> F.NF4Weight:
    rows = torch.rand(case.N, 1, generator=generator) * 2 + 0.1
    values = torch.randn(case.N, case.K, generator=generator) * rows / case.K**0.5
    return F.nf4_quantize(values.to(DEVICE), block_size=case.block_size, double_quant=case.nested)


def _arguments(case: Case) -> tuple[Any, ...]:
    """The operator's; the adapter's part as large as the base's."""
    generator = torch.Generator().manual_seed(case.M + 31 * case.K)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    weight = _weight(case, generator)
    columns, depth = (case.K, case.N) if case.transposed else (case.N, case.K)
    x = normal(case.M, depth, dtype=case.dtype)
    adapter: list[Any] = [None, None]
    if case.R:
        adapter = [normal(case.M, case.R, dtype=case.dtype), normal(columns, case.R, dtype=FLOAT32) / case.R**0.5]
        adapter[1] = adapter[1].to(case.narrow)
    biases = [normal(columns, dtype=FLOAT32) if case.biases else None for _ in range(2)]
    seed = seed_of(SEED) if case.p else None
    rest = (*adapter, biases[1] if case.R else None, seed, case.p, 1.5, case.out)
    return (x, *weight.storage(), case.transposed, biases[0], *rest)


def _exact(arguments: tuple[Any, ...]) -> Tensor:
    """In float64, of the weight as the dequantiser gives it: its rounding is the operator's."""
    x, packed, absmax, code, block_size, shape, *nested, transposed, bias, s, b, lora_bias, seed, p, scaling, _ = (
        arguments
    )
    dense = definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), x.dtype, *nested).double()
    dense = dense.T if transposed else dense
    s, b = (x.new_zeros(x.shape[0], 0), x.new_zeros(dense.shape[0], 0)) if s is None else (s, b)
    bias, s, b, lora_bias = (None if one is None else one.double() for one in (bias, s, b, lora_bias))
    return lora_definition.lora_product(x.double(), dense, bias, s, b, lora_bias, seed, p, scaling, FLOAT64)


def _check(run: Callable[..., Tensor], case: Case) -> Tensor:
    arguments = _arguments(case)
    actual = run(*arguments)
    assert actual.dtype == case.out
    assert_within_budget(str(case), actual, ops._reference(*arguments), _exact(arguments))
    return actual


def _kernel(config: configs.ProductConfig) -> Callable[..., Tensor]:
    return lambda *given: kernel.nf4_product(*given[:5], tuple(given[5]), *given[6:], config)


def test_the_definition() -> None:
    """gradcheck, in float64 and of both directions."""
    for case in (Case(5, 6, 8, R=2, p=0.3, biases=True), Case(4, 6, 8, transposed=True, R=0, block_size=32)):
        x, *stored = _arguments(case)
        wide = [one.double() if isinstance(one, Tensor) and one.is_floating_point() and i > 8 else one
                for i, one in enumerate(stored)]  # fmt: skip
        leaves = [one.double().requires_grad_() for one in (x, *(t for t in stored[9:13] if t is not None))]

        def product(x: Tensor, *rest: Tensor, wide: list[Any] = wide) -> Tensor:
            given = iter(rest)
            adapter = [None if one is None else next(given) for one in wide[9:13]]
            return definition.nf4_product(x, *wide[:9], *adapter, *wide[13:-1], FLOAT64)

        assert torch.autograd.gradcheck(product, leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case: Case) -> None:
    _check(_kernel(replace(SMALL, splits=case.splits)), case)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], Case(16, 34, 96, dtype=FLOAT16)], ids=str)
def test_what_it_multiplies_by_is_the_dequantised_weight(case: Case) -> None:
    """Bit for bit: rows of the identity give the weight's columns, or its rows; and so do columns decoded alone."""
    weight = _weight(case, torch.Generator().manual_seed(3))
    dense = F.nf4_dequantize(weight, case.dtype)
    for transposed in (False, True):
        eye = torch.eye(case.N if transposed else case.K, dtype=case.dtype, device=DEVICE)
        nothing = (None, None, None, None, None, 0.0, 1.0, case.dtype)
        y = _kernel(replace(SMALL, splits=1))(eye, *weight.storage(), transposed, *nothing)
        assert torch.equal(y if transposed else y.T, dense)
    first, width = 6, case.K - 10
    wide = torch.full((case.N, width + 3), float("nan"), dtype=case.dtype, device=DEVICE)
    out = wide[:, :width]
    stored = weight.storage()
    kernel.nf4_dequantize_columns(*stored[:4], tuple(stored[4]), *stored[5:], out, first, configs.ColumnsConfig(16, 32))
    assert torch.equal(out, dense[:, first : first + width]) and wide[:, width:].isnan().all()


def test_the_order_of_tiles_does_not_show() -> None:
    """The same bits from other numbers of programs and other groups; the partial sums are added in one order."""
    case = Case(40, 40, 72, transposed=True, p=0.3)
    whole = _check(_kernel(SMALL), case)
    for config in (replace(SMALL, programs=5, group_m=3), replace(SMALL, programs=100)):
        assert torch.equal(whole, _kernel(config)(*_arguments(case)))


def test_nothing_to_multiply() -> None:
    given = _arguments(Case(17, 16, 32, biases=True))
    assert _kernel(SMALL)(given[0][:0], *given[1:11], given[11][:0], *given[12:]).shape == (0, 16)
    without_rank = (*given[:11], given[11][:, :0], given[12][:, :0], *given[13:])
    alone, expected = _kernel(SMALL)(*without_rank), _exact(without_rank)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-2, atol=1e-2)


decode_tile = kernel.decode_tile


@triton.jit
def _probe_kernel(
    packed_ptr, absmax_ptr, code_ptr, out_ptr, row, rows, columns, row_bytes, WORDS: tl.constexpr, STORED: tl.constexpr
):
    code = tl.load(code_ptr + tl.arange(0, 16))
    rest = (packed_ptr, absmax_ptr, code, None, None, 0.0, row, 0, rows, columns, row_bytes)
    tile = decode_tile(*rest, 12, 64, tl.float32, True, WORDS, STORED, 1, 64)
    tl.store(out_ptr + tl.arange(0, 64)[None, :], tile)


@pytest.mark.parametrize(("words", "stored"), [(False, True), (True, False), (True, True)])
def test_beyond_two_to_the_31_elements(words: bool, stored: bool) -> None:
    """A tile whose elements are counted past 2^31: rows of 2^17 columns, whose bytes lie closer together here."""
    row, columns = 2**14 + 5, 2**17
    packed, absmax = torch.zeros(4 * row + 64, dtype=torch.uint8, device=DEVICE), torch.zeros(2**20, device=DEVICE)
    packed[4 * row : 4 * row + 32] = (torch.arange(32, device=DEVICE) * 7).to(torch.uint8)
    absmax[row * columns // 4096] = 1.25
    code, out = definition.code_table("nf4", DEVICE), torch.zeros(1, 64, device=DEVICE)
    _probe_kernel[(1,)](packed, absmax, code, out, row, row + 1, columns, 4, words, stored)
    held = packed[4 * row : 4 * row + 32]
    assert torch.equal(out[0], code[torch.stack((held >> 4, held & 15), 1).reshape(-1).long()] * 1.25)


@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_that_no_word_can_be_loaded_from(transposed: bool) -> None:
    given = list(_arguments(Case(17, 40, 96, transposed=transposed)))
    aligned = _kernel(SMALL)(*given)
    given[1] = torch.empty(given[1].numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(-1, 1).copy_(given[1])
    assert torch.equal(_kernel(SMALL)(*given), aligned)
    out = torch.empty(40, 32, device=DEVICE)
    kernel.nf4_dequantize_columns(*given[1:5], (40, 96), *given[6:9], out, 32, configs.ColumnsConfig(16, 32))
    whole = definition.nf4_dequantize(*given[1:5], (40, 96), FLOAT32, *given[6:9])
    assert torch.equal(out, whole[:, 32:64])


FAULTS: dict[str, Callable[..., Tensor]] = {
    "no adapter step": lambda *g: _kernel(SMALL)(*g[:11], g[11] * 0, *g[12:]),
    "the last rank forgotten": lambda *g: _kernel(SMALL)(*g[:11], g[11][:, :-1], g[12][:, :-1], *g[13:]),
    "mask of another seed": lambda *g: _kernel(SMALL)(*g[:14], g[14] + 1, *g[15:]),
    "no mask": lambda *g: _kernel(SMALL)(*g[:14], None, *g[15:]),
    "unscaled": lambda *g: _kernel(SMALL)(*g[:16], 1.0, g[17]),
    "no bias": lambda *g: _kernel(SMALL)(*g[:10], None, *g[11:]),
    "no lora_bias": lambda *g: _kernel(SMALL)(*g[:13], None, *g[14:]),
    "the nested offset forgotten": lambda *g: _kernel(SMALL)(*g[:8], g[8] * 0, *g[9:]),
    "a block's maximum of its neighbour": lambda *g: _kernel(SMALL)(*g[:2], g[2].roll(1), *g[3:]),
    "nibbles of a byte exchanged": lambda *g: _kernel(SMALL)(g[0], (g[1] >> 4) | (g[1] << 4), *g[2:]),
    "the last step forgotten": lambda *g: _kernel(SMALL)(_without_the_last(g[0]), *g[1:]),
    "the adapter in every partial sum": lambda *g: 2 * _kernel(SMALL)(*g) - _kernel(SMALL)(*g[:10], None, None, None, None, *g[14:]),
}  # fmt: skip


def _without_the_last(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] = 0
    return x


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    case = Case(17, 64, 32, transposed=True, R=3, p=0.3, biases=True, out=FLOAT32)
    given = _arguments(case)
    # argument positions: x, eight of the weight, transposed, bias, s, b, lora_bias, seed, p, scaling, dtype
    assert given[9] is True and given[14] is not None
    with pytest.raises(AssertionError, match="over the budget"):
        _check(FAULTS[fault], case)


def test_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("triton", "reference"):
        monkeypatch.setenv("PEFTFAST_BACKEND", backend)
        for case in (CASES[1], CASES[5]):
            _check(ops.nf4_product, case)
    torch.library.opcheck(ops.nf4_product.overload, _arguments(CASES[1]))
    weight = _weight(CASES[0], torch.Generator().manual_seed(3))
    given = (*weight.storage(), torch.zeros(40, 20, device=DEVICE), 6)
    for backend in ("reference", "triton"):
        monkeypatch.setenv("PEFTFAST_BACKEND", backend)
        given[-2].zero_()
        ops.nf4_dequantize_columns_out(*given)
        assert torch.equal(given[-2], F.nf4_dequantize(weight, FLOAT32)[:, 6:26])
    torch.library.opcheck(ops.nf4_dequantize_columns_out.overload, given)


def test_who_serves_whom_and_why_not() -> None:
    odd = _arguments(Case(17, 16, 33))
    assert ops._triton_accepts(*odd) == (False, "a row of K = 33 columns, an odd number, begins within a byte")
    assert ops.nf4_product.select(*odd).backend == "reference"
    _check(ops.nf4_product, Case(17, 16, 33, transposed=True))
    wide = _arguments(Case(17, 16, 32, dtype=FLOAT32, out=FLOAT32))
    assert "tensor cores" in ops._triton_accepts(*wide)[1]
    assert "asked for torch.float64" in ops._triton_accepts(*_arguments(Case(17, 16, 32, out=FLOAT64)))[1]
    weight = _weight(Case(17, 16, 32), torch.Generator().manual_seed(3)).storage()
    assert "begins within a byte" in ops._columns_accepts(*weight, torch.zeros(16, 4, device=DEVICE), 3)[1]
    out = torch.zeros(16, 4, device=DEVICE)
    ops.nf4_dequantize_columns_out(*weight, out, 3)
    assert out.any()


def test_operators_refuse() -> None:
    given = list(_arguments(Case(17, 16, 32, biases=True)))
    for match, at, wrong in (
        ("x: expected shape", 0, given[0][:, :-1]),
        ("s, b: expected both or none", 11, None),
        ("s: expected shape", 11, given[11][:-1]),
        ("s: expected torch.bfloat16 as x is", 11, given[11].half()),
        ("b: expected shape", 12, given[12][:-1]),
        (r"bias: expected floating \[16\]", 10, given[10][:-1]),
        (r"lora_bias: expected floating \[16\]", 13, given[13][:-1]),
        ("packed: expected", 1, given[1][:-1]),
        (r"shape: expected \(N, K\)", 5, (512,)),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.nf4_product(*given[:at], wrong, *given[at + 1 :])
    alone = (*given[:11], None, None, *given[13:])
    with pytest.raises(RuntimeError, match="lora_bias: expected an adapter"):
        ops.nf4_product(*alone)
    stored, out = given[1:9], torch.zeros(16, 8, device=DEVICE)
    for match, rest in (
        ("out: expected floating", (out[:-1], 0)),
        ("out: expected floating", (out.int(), 0)),
        ("out: expected rows of neighbours", (out.T.contiguous().T, 0)),
        ("first: expected 0 to 24 for 8 of 32 columns, got 25", (out, 25)),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.nf4_dequantize_columns_out(*stored, *rest)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, dict]], None]]:
    """Gives an H200 a table."""
    monkeypatch.setattr(configs, "measured", lambda *given: devices.measured(*given, folder=tmp_path))
    monkeypatch.delenv(configs.VARIABLE, raising=False)

    def forget() -> None:
        devices._table.cache_clear()
        configs.kept.cache_clear()

    def write(entries: dict[str, dict]) -> None:
        (tmp_path / "nvidia-h200.json").write_text(json.dumps({"nf4_product": entries}))
        forget()

    forget()
    yield write
    forget()


@pytest.mark.interpreter
def test_the_table_alone_decides(table: Callable[[dict[str, dict]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    key = configs.case(200, 4096, 14336, 13, "bfloat16", 64, True, False, False).key
    assert key == "bfloat16 forward n4096 k14336 b64 nested m256 r16 plain"
    call = (200, 4096, 14336, 13, "bfloat16", 64, True, False, False, H200)
    assert configs.kept(*call) is None
    table({key: {"route": "fused", "block_m": 128, "programs": 2, "gain": 1.3}})
    found = configs.kept(*call)
    assert found is not None and found.block_m == 128 and found.gain == 1.3
    for other in (
        (90, *call[1:]), (16, *call[1:]), (200, 4098, *call[2:]), (*call[:3], 17, *call[4:]), (*call[:3], 0, *call[4:]),
        (*call[:5], 32, *call[6:]), (*call[:6], False, *call[7:]), (*call[:7], True, *call[8:]),
        (*call[:9], Device("NVIDIA H100", (9, 0), 132)), (*call[:3], 200, *call[4:]),
    ):  # fmt: skip
        assert configs.kept(*other) is None, other
    dx = configs.case(1500, 64, 96, 16, "float16", 64, False, True, True).key
    assert dx == "float16 dx n64 k96 b64 flat m1536 r16 dropout"
    with pretended_gpu.installed():
        monkeypatch.setattr(ops, "device_of", lambda _: H200)
        x = torch.zeros(1, dtype=BFLOAT16, device="cuda")
        config, reason = ops.chosen(x, 200, (4096, 14336), 64, True, 13, False, False, BFLOAT16)
        assert config is found and not reason
        config, reason = ops.chosen(x, 400, (4096, 14336), 64, True, 13, False, False, BFLOAT16)
        assert config.route == "dequantize" and "no entry" in reason


def test_no_table_is_here_yet() -> None:
    """No GPU has timed these: nothing may be taken by itself. The first measured table takes this test away."""
    folder = Path(configs.__file__).parent
    assert not [path.name for path in folder.glob("*.json") if "nf4_product" in json.loads(path.read_text())]


def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(20, 16, dtype=BFLOAT16, device=DEVICE)
    asked = (x, 20, (16, 16), 64, True, 2, False, False, BFLOAT16)
    monkeypatch.delenv(configs.VARIABLE, raising=False)
    if DEVICE.type == "cpu":
        assert ops.chosen(*asked) == (ops.USUAL, "no GPU's table is for a tensor on cpu")
    for route in ("slabs", "fused"):
        monkeypatch.setenv(configs.VARIABLE, route)
        assert ops.chosen(*asked)[0].route == route
    assert ops.chosen(*asked[:2], (16, 15), *asked[3:])[1].endswith("begins within a byte")
    assert "tensor cores" in ops.chosen(*asked[:-1], FLOAT32)[1]
    assert ops.chosen(x, 16, *asked[2:]) == (ops.USUAL, "16 rows, fewer than 17")
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    assert ops.chosen(*asked) == (ops.USUAL, "Triton does not serve this call")
    monkeypatch.delenv("PEFTFAST_BACKEND")
    if DEVICE.type == "cpu":
        monkeypatch.setenv(configs.VARIABLE, "overlapped")
        assert "streams of a GPU" in ops.chosen(*asked)[1]
    monkeypatch.setenv(configs.VARIABLE, "dequantize")
    assert ops.chosen(*asked) == (ops.USUAL, "PEFTFAST_NF4_PRODUCT=dequantize")
    monkeypatch.setenv(configs.VARIABLE, "fused")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "under torch.compile" in ops.chosen(*asked)[1]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setenv(configs.VARIABLE, "sometimes")
    with pytest.raises(
        ValueError, match="PEFTFAST_NF4_PRODUCT: expected one of measured, dequantize, slabs, overlapped"
    ):
        ops.chosen(*asked)


@pytest.mark.interpreter
def test_a_report_names_the_way(table: Callable[[dict[str, dict]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    given = (weight, (4096, 4096), 64, True, 16, True, BFLOAT16)
    assert ops.ways(*given) == ""
    monkeypatch.setenv(configs.VARIABLE, "slabs")
    assert ops.ways(*given) == "forward slabs, dX slabs"
    monkeypatch.delenv(configs.VARIABLE)
    sizes = (4096, 4096, 16, "bfloat16", 64, True)
    keys = [configs.case(rows, *sizes, False, False).key for rows in (32, 64)]
    keys.append(configs.case(2048, *sizes, True, True).key)
    table({key: {"route": route} for key, route in zip(keys, ("fused", "fused", "overlapped"), strict=True)})
    monkeypatch.setattr(ops, "device_of", lambda _: H200)
    with pretended_gpu.installed():
        on_gpu = torch.zeros(1, dtype=torch.uint8, device="cuda")
        found = ops.ways(on_gpu, *given[1:])
    assert found == "forward fused at 32, 64 rows, dX overlapped at 2048 rows"


def test_configurations() -> None:
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        device = Device("", capability, 100)
        for M in (17, 64, 65, 128, 1536, 5000):
            for transposed in (False, True):
                assert configs.candidates(M, 16, transposed, device)
                config = configs.fused(M, 4096, 4096, 16, transposed, 4096, device)
                tiles = -(-M // config.block_m) * -(-4096 // config.block_n)
                assert config.programs % 100 == 0 and 1 <= config.splits <= 8
                assert config.splits == 1 or tiles * config.splits <= config.programs
    assert (
        configs.splits_of(64, 4096, 4096, 64, 64, 64, 396) == 4
    )  # 64 tiles; more would move more than the weight does
    assert (
        configs.splits_of(17, 1024, 4096, 64, 64, 64, 396) == 8
        and configs.splits_of(256, 4096, 4096, 128, 64, 64, 264) == 1
    )
    assert configs.parted(150, 2, 64) == [(0, 128), (128, 150)] and configs.parted(64, 8, 64) == [(0, 64)]
    assert configs.parted(4096, 4, 64) == [(i * 1024, (i + 1) * 1024) for i in range(4)] and not configs.parted(
        0, 2, 64
    )
    wrong = (
        ({"block_m": 48}, "power of two"),
        ({"route": "cut"}, "route"),
        ({"programs": 0}, "programs"),
        ({"parts": 0}, "parts"),
    )
    for given, match in wrong:
        with pytest.raises(ValueError, match=match):
            configs.ProductConfig(**given)


def _layer(
    choice: str, device: torch.device, x_dtype: torch.dtype = FLOAT32, adapter: bool = True, p: float = 0.25
) -> dict[str, Tensor]:
    os.environ[configs.VARIABLE] = choice
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, divisor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) / divisor).to(device)

    x = random(2, 17, 64).to(x_dtype).requires_grad_()
    weight = F.nf4_quantize(random(48, 64, divisor=8.0))
    lora_a, lora_b = random(5, 64, divisor=8.0).requires_grad_(), random(48, 5, divisor=3.0).requires_grad_()
    bias, lora_bias, dy = random(48), random(48), random(2, 17, 48)
    if not adapter:
        y = F.nf4_linear(x, weight, bias, compute_dtype=BFLOAT16)
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
        with torch.no_grad():
            again = F.nf4_linear(x, weight, bias, compute_dtype=BFLOAT16)
        return {"y": y.detach(), "dx": dx, "again": again}
    options = dict(scaling=1.5, bias=bias, lora_bias=lora_bias, dropout_p=p, seed=77 if p else None)
    y = F.lora_linear(x, weight, lora_a, lora_b, **options, compute_dtype=BFLOAT16)
    dx, da, db = torch.autograd.grad(y, (x, lora_a, lora_b), dy.to(y.dtype))
    with torch.no_grad():
        again = F.lora_linear(x, weight, lora_a, lora_b, **options, compute_dtype=BFLOAT16)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db, "again": again}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 48 x 64 in three or four parts; what the environment asks for is restored after the test."""
    monkeypatch.setattr(routes, "PART_MULTIPLE", 16)
    monkeypatch.setenv(configs.VARIABLE, "measured")


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        torch.testing.assert_close(value.cpu(), theirs[name].cpu(), rtol=2e-2, atol=2e-2)
    assert torch.equal(ours["y"].cpu(), ours["again"].cpu())
    assert all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ("da", "db") if name in ours)


@pytest.mark.parametrize(
    ("adapter", "x_dtype", "p"), [(True, FLOAT32, 0.25), (True, BFLOAT16, 0.0), (False, FLOAT32, 0.0)]
)
def test_a_layer_takes_the_fused_way(
    adapter: bool, x_dtype: torch.dtype, p: float, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results within a rounding; no weight is decoded, no library product, no pass over y or dX."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    with Calls() as calls:
        ours = _layer("fused", DEVICE, x_dtype, adapter, p)
    assert calls.compute["nf4_product"] == 3
    taken = {"nf4_dequantize_out", "nf4_linear", "lora_expand", "lora_expand_", "mm", "addmm"}
    assert not taken & set(calls.compute), calls.compute
    _same(ours, _layer("dequantize", DEVICE, x_dtype, adapter, p))


@pytest.mark.parametrize("route", ["slabs", *(["overlapped"] if DEVICE.type == "cuda" else [])])
@pytest.mark.parametrize(
    ("adapter", "x_dtype", "p"), [(True, FLOAT32, 0.25), (True, BFLOAT16, 0.0), (False, FLOAT32, 0.0)]
)
def test_a_layer_takes_the_weight_in_parts(
    adapter: bool, x_dtype: torch.dtype, p: float, route: str, small_parts: None
) -> None:
    with Calls() as calls:
        ours = _layer(route, DEVICE, x_dtype, adapter, p)
    # Twice the three parts of the forward, and the four of dX.
    assert (calls.compute["nf4_dequantize_out"], calls.compute["nf4_dequantize_columns_out"]) == (6, 4), calls.compute
    assert calls.compute["mm"] + calls.compute["addmm"] == 10 and "nf4_product" not in calls.compute
    _same(ours, _layer("dequantize", DEVICE, x_dtype, adapter, p))


@pytest.mark.interpreter
@pytest.mark.parametrize("adapter", [True, False])
def test_a_layer_decodes_beside_its_product(adapter: bool, small_parts: None) -> None:
    theirs = _layer("dequantize", torch.device("cpu"), FLOAT32, adapter)
    with pretended_gpu.installed():
        ours = _layer("overlapped", pretended_gpu.CUDA, FLOAT32, adapter)
        slabs = _layer("slabs", pretended_gpu.CUDA, FLOAT32, adapter)
        ours, slabs = ({name: one.inner for name, one in found.items()} for found in (ours, slabs))
    assert all(torch.equal(ours[name], slabs[name]) for name in ours)
    for name in ("y", "dx"):
        torch.testing.assert_close(ours[name], theirs[name].to(ours[name].dtype), rtol=2e-2, atol=2e-2)


def test_no_buffer_is_larger_than_a_part(small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two of them only where two are at work."""
    asked: list[int] = []
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = real(*size, **options)
        asked.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    weight = F.nf4_quantize(torch.randn(80, 64, device=DEVICE))
    packed, *rest = weight.storage()
    x = torch.randn(20, 64, dtype=BFLOAT16, device=DEVICE)
    asked.clear()
    routes.by_parts(x, packed, tuple(rest), None, False, configs.ProductConfig("slabs", 4))
    assert sorted(asked) == sorted([20 * 80, 32 * 64])
    asked.clear()
    dx = routes.by_parts(x @ x.new_ones(64, 80), packed, tuple(rest), None, True, configs.ProductConfig("slabs", 4))
    assert sorted(asked)[-2:] == [16 * 80, 20 * 64] and dx.shape == (20, 64)


def test_shared_and_merged_keep_their_ways(small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense weight that is kept for dX, or takes the adapter in, is still what those switches ask for."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    with F.shared_dequantization(), Calls() as calls:
        _layer("fused", DEVICE)
    assert calls.compute["nf4_dequantize_out"] == 2 and "nf4_product" not in calls.compute  # a forward each, dX none
    with F.merged_dequantization(), Calls() as calls:
        _layer("fused", DEVICE, p=0.0)
    assert calls.compute["nf4_dequantize_out"] == 1 and calls.compute["nf4_product"] == 2


def test_a_compiled_layer_keeps_its_graph_and_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment asks for; and the operator itself is one node."""
    monkeypatch.setenv(configs.VARIABLE, "slabs")
    weight, x = F.nf4_quantize(torch.randn(48, 64, device=DEVICE)), torch.randn(20, 64, device=DEVICE)
    layer = torch.compile(lambda x: F.nf4_linear(x, weight), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ F.nf4_dequantize(weight, FLOAT32).T)
    given = _arguments(Case(17, 16, 33, out=FLOAT32))
    operator = torch.compile(lambda x: ops.nf4_product(x, *given[1:]), backend="aot_eager", fullgraph=True)
    assert torch.equal(operator(given[0]), ops.nf4_product(*given))


MUTANTS = (
    Mutant("mask of another seed", ops.nf4_product, lambda run, *g: run(*g[:14], g[14] if g[14] is None else g[14] + 1, *g[15:])),
    Mutant("no adapter", ops.nf4_product, lambda run, *g: run(*g[:11], g[11] * 0, *g[12:])),
    Mutant("unscaled", ops.nf4_product, lambda run, *g: run(*g[:16], 1.0, g[17])),
    Mutant("no bias", ops.nf4_product, lambda run, *g: run(*g[:10], None, *g[11:])),
    Mutant("no lora_bias", ops.nf4_product, lambda run, *g: run(*g[:13], None, *g[14:])),
    Mutant("columns of the part before", ops.nf4_dequantize_columns_out, lambda run, *g: run(*g[:9], max(g[9] - 16, 0))),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_in_a_layer_is_found(mutant: Mutant, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _layer("dequantize", DEVICE)
    # The definition in the kernel's place: the fault is the same, and nothing is interpreted.
    for operator, run in ((ops.nf4_product, ops._reference), (ops.nf4_dequantize_columns_out, ops._columns_reference)):
        rows = [replace(row, run=run) for row in operator.implementations]
        monkeypatch.setattr(operator, "implementations", tuple(rows))
    plant(monkeypatch, dataclasses.replace(mutant))
    wrong = _layer("fused" if mutant.operator is ops.nf4_product else "slabs", DEVICE)
    off = {name: (wrong[name].float() - right[name].float()).abs().max().item() for name in ("y", "dx")}
    assert max(off.values()) > 0.1, off
