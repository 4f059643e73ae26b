"""kernels/nf4.py against the definition, bit for bit: interpreted without a GPU, compiled with one."""

import pytest
import torch
from torch import Tensor

from peftfast.configs import nf4 as configs
from peftfast.configs.device import Device
from peftfast.kernels import nf4, nf4_linear
from peftfast.reference import nf4 as definition

from .support.interpreter import DEVICE, require_runnable_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = configs.Nf4Config(tile_bytes=128)  # several programs, and several blocks in each


@pytest.fixture(autouse=True)
def runnable() -> None:
    require_runnable_kernels()


def _quantized(
    shape: tuple[int, ...], block_size: int, nested: bool, quant_type: str = "nf4"
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    generator = torch.Generator().manual_seed(len(shape) + block_size)
    weight = torch.randn(shape, generator=generator).to(DEVICE)
    code = definition.code_table(quant_type, DEVICE)
    packed, absmax = definition.nf4_quantize(weight, block_size, code)
    if not nested:
        return packed, absmax, code, (None, None, None)
    absmax, nested_absmax, offset = definition.nest_absmax(absmax)
    return packed, absmax, code, (nested_absmax, definition.nested_code_table(DEVICE), offset)


def _check(
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
    nested: bool,
    config: configs.Nf4Config,
    quant_type: str = "nf4",
) -> None:
    packed, absmax, code, nesting = _quantized(shape, block_size, nested, quant_type)
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    assert nf4.nf4_dequantize(packed, absmax, code, block_size, out.numel(), out, 0, *nesting, config) is out
    assert torch.equal(out, definition.nf4_dequantize(packed, absmax, code, block_size, shape, dtype, *nesting))


# One element, fewer than a block, odd counts whose last byte holds one element, blocks that straddle rows, whole
# blocks, 3-D.
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 65), (33, 64), (130, 96), (5, 3, 43), (127,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_bits(shape: tuple[int, ...], dtype: torch.dtype, nested: bool) -> None:
    _check(shape, 64, dtype, nested, SMALL)


@pytest.mark.parametrize("block_size", [size for size in configs.BLOCK_SIZES if size != 64])
def test_every_block_size(block_size: int) -> None:
    case = configs.Case("bfloat16", block_size, True)
    _check((67, 131), block_size, torch.bfloat16, True, configs.nf4_dequantize(case, Device()))


def test_more_than_one_block_of_nested_maxima() -> None:
    """Blocks of 256 maxima: 300 of them need two nested maxima."""
    _check((300, 64), 64, torch.bfloat16, True, configs.Nf4Config())


@pytest.mark.parametrize("quant_type", definition.QUANT_TYPES)
def test_both_codes(quant_type: str) -> None:
    _check((33, 65), 64, torch.float16, True, SMALL, quant_type)


def test_no_elements() -> None:
    packed, absmax, code, nesting = _quantized((2, 64), 64, False)
    out = torch.empty((0, 64), device=DEVICE)
    assert nf4.nf4_dequantize(packed[:0], absmax[:0], code, 64, 0, out, 0, *nesting, SMALL) is out


def test_product_and_sum_of_the_nested_scale_are_rounded_apart() -> None:
    """A fused multiply-add differs for this scale. On a GPU the test shows that the compiler fused nothing; the
    interpreter never does."""
    maximum = torch.tensor([1.1], device=DEVICE)
    offset = torch.tensor([0.037], device=DEVICE)
    nested_code = definition.nested_code_table(DEVICE)
    exact = nested_code.double() * maximum.double() + offset.double()
    index = torch.nonzero(exact.float() != nested_code * maximum + offset).flatten()
    assert index.numel() > 10  # entries for which the two roundings differ from one
    absmax = index.to(torch.uint8)
    packed = torch.full(
        (absmax.numel() * 32, 1), 0xFF, dtype=torch.uint8, device=DEVICE
    )  # code 15 is 1.0: out is the scale
    out = torch.empty(absmax.numel() * 64, device=DEVICE)
    code = definition.code_table("nf4", DEVICE)
    nf4.nf4_dequantize(packed, absmax, code, 64, out.numel(), out, 0, maximum, nested_code, offset, SMALL)
    assert torch.equal(out[::64], nested_code[index] * maximum + offset)


def test_a_wrong_nibble_order_or_scale_is_seen() -> None:
    packed, absmax, code, nesting = _quantized((33, 64), 64, True)
    right = definition.nf4_dequantize(packed, absmax, code, 64, (33, 64), torch.bfloat16, *nesting)
    swapped = (packed >> 4) | (packed << 4)
    for faulty in (
        (swapped, absmax, code, *nesting),
        (packed, absmax.roll(1), code, *nesting),
        (packed, absmax, code.flip(0), *nesting),
    ):
        out = torch.empty((33, 64), dtype=torch.bfloat16, device=DEVICE)
        nf4.nf4_dequantize(faulty[0], faulty[1], faulty[2], 64, out.numel(), out, 0, *faulty[3:], SMALL)
        assert not torch.equal(out, right)


# Rows 2 .. 9 of 12: whole blocks to a row, blocks that straddle rows, an odd width, rows in one block.
@pytest.mark.parametrize(("width", "block_size"), [(128, 64), (96, 64), (33, 32), (32, 4096)])
@pytest.mark.parametrize("spare", [0, 16, 5], ids=["consecutive", "apart", "askew"])
def test_rows(width: int, block_size: int, spare: int) -> None:
    packed, absmax, code, nesting = _quantized((12, width), block_size, True)
    buffer = torch.full((7, width + spare), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out = buffer[:, :width]
    nf4.nf4_dequantize(packed, absmax, code, block_size, 12 * width, out, 2, *nesting, SMALL)
    whole = definition.nf4_dequantize(packed, absmax, code, block_size, (12, width), torch.bfloat16, *nesting)
    assert torch.equal(out, whole[2:9])
    assert (buffer[:, width:] == 7.0).all()


@pytest.mark.parametrize("spare", [0, 16], ids=["consecutive", "apart"])
def test_rows_past_two_to_the_31_elements(spare: int) -> None:
    """The last rows of a weight of more elements than 32 bits count; what lies before them is memory that nothing touches."""
    rows, width = 2**25 + 40, 64
    packed = torch.zeros((rows * width // 2, 1), dtype=torch.uint8, device=DEVICE)
    absmax = torch.zeros(rows * width // 64, device=DEVICE)
    held = packed[-8 * 32 :]
    held.copy_((torch.arange(8 * 32, device=DEVICE) * 7)[:, None])
    absmax[-8:] = torch.arange(1, 9, device=DEVICE) / 8
    code = definition.code_table("nf4", DEVICE)
    out = torch.full((8, width + spare), 7.0, device=DEVICE)
    nf4.nf4_dequantize(packed, absmax, code, 64, rows * width, out[:, :width], rows - 8, None, None, None, SMALL)
    right = definition.nf4_dequantize(held, absmax[-8:], code, 64, (8, width), torch.float32, None, None, None)
    assert torch.equal(out[:, :width], right)
    assert (out[:, width:] == 7.0).all()


@pytest.mark.parametrize("shape", [(7, 64), (5, 65), (1, 4)])
@pytest.mark.parametrize("by", [1, 2, 4])
def test_bytes_that_no_word_can_be_loaded_from(shape: tuple[int, int], by: int) -> None:
    """Packed bytes at an address that 4 does not divide (and at one that it does, but not 16)."""
    packed, absmax, code, nesting = _quantized(shape, 32, True)
    askew = torch.empty(packed.numel() + by, dtype=torch.uint8, device=DEVICE)[by:].view(-1, 1).copy_(packed)
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    nf4.nf4_dequantize(askew, absmax, code, 32, out.numel(), out, 0, *nesting, SMALL)
    assert torch.equal(out, definition.nf4_dequantize(packed, absmax, code, 32, shape, out.dtype, *nesting))


@pytest.mark.parametrize("block_size", [32, 64])
def test_a_tile_has_one_maximum_of_the_second_level(block_size: int) -> None:
    """The largest tile has all the blocks that share one; rows from the middle of a tile on begin at its multiple."""
    packed, absmax, code, nesting = _quantized((700, 32), block_size, True)
    out = torch.full((290, 32), float("nan"), device=DEVICE)
    config = configs.Nf4Config(tile_bytes=4096)
    nf4.nf4_dequantize(packed, absmax, code, block_size, 700 * 32, out, 250, *nesting, config)
    whole = definition.nf4_dequantize(packed, absmax, code, block_size, (700, 32), torch.float32, *nesting)
    assert torch.equal(out, whole[250:540])
    with pytest.raises(ValueError, match="tile_bytes: expected at most 4096"):
        configs.Nf4Config(tile_bytes=8192)


def test_wide_rows_count_their_place_in_64_bits() -> None:
    """The variant for rows of 2^31 elements and more, on short ones."""
    packed, absmax, code, nesting = _quantized((12, 96), 32, False)
    whole = definition.nf4_dequantize(packed, absmax, code, 32, (12, 96), torch.float32, *nesting)
    for kind in (nf4.WHOLE_BLOCKS, nf4.ANY_ROWS):
        out = torch.full((7, 101), 7.0, device=DEVICE)
        begin, end = 2 * 96, 9 * 96
        given = (packed, absmax, code, out, None, None, None, begin // 128, begin, end, packed.numel(), 96, 101)
        rest = {"HALF": 16, "BLOCKS": 4, "ALIGNED": True, "ROWS": kind, "SLAB": True, "WIDE": True, "PICKS": 32}
        grid = (-(-end // 128) - begin // 128,)
        nf4._nf4_dequantize_kernel[grid](*given, None, None, None, 0, **rest, enable_fp_fusion=False)
        assert torch.equal(out[:, :96], whole[2:9])
        assert (out[:, 96:] == 7.0).all()


@pytest.mark.parametrize(("width", "wide"), [(2**31 - 4096, False), (2**31 - 4094, True), (2**31, True)])
def test_which_rows_are_wide(width: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place within a tile is counted from the beginning of the row in which the tile begins, perhaps at its end."""
    launches: list[dict[str, object]] = []
    monkeypatch.setattr(nf4, "launch", lambda *_, **constants: launches.append(constants))
    packed, absmax, code = (torch.empty(1, device="meta") for _ in range(3))
    out = torch.empty((2, width + 1), dtype=torch.bfloat16, device="meta")[:, :width]
    nf4.nf4_dequantize(packed, absmax, code, 64, 2 * width, out, 0, None, None, None, configs.Nf4Config())
    assert [one["WIDE"] for one in launches] == [wide]


def test_a_few_rows_by_words_and_by_bytes() -> None:
    """The same bits from packed bytes that no word can be loaded from: the tile is the same."""
    packed, absmax, code, nesting = _quantized((37, 96), 32, True)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for by in (0, 1):
        askew = torch.empty(packed.numel() + by, dtype=torch.uint8, device=DEVICE)[by:].view(-1, 1).copy_(packed)
        y = torch.full((3, 37), float("nan"), device=DEVICE)
        given = (x, askew, absmax, code, 32, (37, 96), *nesting, None, torch.bfloat16, y)
        results.append(nf4_linear.nf4_linear(*given, configs.LinearConfig(16, 32)))
    assert torch.equal(*results)
    weight = definition.nf4_dequantize(packed, absmax, code, 32, (37, 96), torch.bfloat16, *nesting)
    exact = x.bfloat16().double() @ weight.double().T
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [2, 5, 9])
def test_a_few_rows_in_parts(splits: int) -> None:
    """Sums that several programs share, and the bias once; the last part is the shorter one."""
    packed, absmax, code, nesting = _quantized((37, 224), 32, True)
    generator = torch.Generator().manual_seed(2)
    x, bias = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 224), (37,)))
    results = []
    for config in (configs.LinearConfig(16, 32), configs.LinearConfig(16, 32, splits=splits)):
        y = torch.full((3, 37), float("nan"), device=DEVICE)
        given = (x, packed, absmax, code, 32, (37, 224), *nesting, bias, torch.bfloat16, y)
        results.append(nf4_linear.nf4_linear(*given, config))
    weight = definition.nf4_dequantize(packed, absmax, code, 32, (37, 224), torch.bfloat16, *nesting)
    exact = x.bfloat16().double() @ weight.double().T + bias.double()
    for result in results:
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
