"""kernels/philox.py and kernels/numerics.py against the definitions, bit for bit: interpreted without a GPU, compiled
with one."""

import pytest
import torch
import triton
import triton.language as tl

from peftfast.configs.device import Device
from peftfast.configs.philox import MaskConfig, WordsConfig
from peftfast.configs.philox import dropout_mask as mask_config
from peftfast.kernels import numerics, philox
from peftfast.reference import philox as definition

from .support.interpreter import DEVICE, require_runnable_kernels, seed_of

SEEDS = (0, 1, -1, -0x123456789ABCDEF1, 2**63 - 1)


@pytest.fixture(autouse=True)
def runnable() -> None:
    require_runnable_kernels()


def test_known_answers() -> None:
    words = philox.philox_words(seed_of(0), 0, 1, 0, 0, WordsConfig())
    assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    words = philox.philox_words(
        seed_of(-1), -1, 1, ones, ones, WordsConfig()
    )  # q = -1 is all ones in both of its words
    assert words[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("start", "count", "tensor_id", "stream"),
    [(0, 1, 0, 0), (1, 1, 1, 1), (0, 300, 0, 1), (2**32 - 3, 7, 7, 2), (2**40 + 1, 65, 2**32 - 1, 3)],
)
def test_words(seed: int, start: int, count: int, tensor_id: int, stream: int) -> None:
    words = philox.philox_words(seed_of(seed), start, count, tensor_id, stream, WordsConfig(block=64))
    assert torch.equal(words, definition.philox_words(seed_of(seed), start, count, tensor_id, stream))


def test_no_words() -> None:
    assert philox.philox_words(seed_of(0), 0, 0, 0, 0, WordsConfig()).shape == (0, 4)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 8), (3, 7), (5, 13), (4, 16), (7, 33), (2, 257), (17, 64), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1e-5, 1.0])
def test_mask(rows: int, columns: int, p: float) -> None:
    mask = philox.dropout_mask(seed_of(-77), rows, columns, p, MaskConfig(block_m=4, block_c=16))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, definition.dropout_mask(seed_of(-77), rows, columns, p))


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_of_every_seed_and_blocking(seed: int) -> None:
    expected = definition.dropout_mask(seed_of(seed), 19, 75, 0.3)
    for config in (mask_config(Device()), MaskConfig(1, 8), MaskConfig(32, 64)):
        assert torch.equal(philox.dropout_mask(seed_of(seed), 19, 75, 0.3, config), expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 2**26), (2**26, 1)])
def test_a_long_mask_is_a_grid_that_a_gpu_takes(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA programming guide, technical specifications: 2**31 - 1 blocks along x, 65,535 along y."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(philox, "launch", lambda _, grid, *arguments, **constants: grids.append(grid))
    philox.dropout_mask(torch.empty(1, dtype=torch.int64, device="meta"), rows, columns, 0.5, mask_config(Device()))
    assert len(grids) == 1 and grids[0][0] < 2**31 and max((1, *grids[0][1:])) < 2**16


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.1, 1 / 3, 0.5, 0.99999, 1.0])
def test_threshold_and_scale(p: float) -> None:
    assert philox.keep_threshold(p) == definition.keep_threshold(p)
    assert philox.keep_scale(p) == definition.keep_scale(p)


def test_another_mask_differs() -> None:
    """What the equalities above would miss if the definition ignored its arguments."""
    mask = definition.dropout_mask(seed_of(5), 16, 64, 0.5)
    for other in (
        philox.dropout_mask(seed_of(6), 16, 64, 0.5, MaskConfig()),
        philox.dropout_mask(seed_of(5 + 2**32), 16, 64, 0.5, MaskConfig()),
        philox.dropout_mask(seed_of(5), 17, 64, 0.5, MaskConfig())[1:],
        philox.dropout_mask(seed_of(5), 16, 72, 0.5, MaskConfig())[:, :64],
    ):
        assert 0.3 < (mask == other).float().mean() < 0.7


@triton.jit
def _convert_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(target_ptr + offs, numerics.convert(tl.load(source_ptr + offs), target_ptr.dtype.element_ty))


def _every_kind_of_float32() -> torch.Tensor:
    """Random bit patterns, among them NaN, infinities and denormals, and halfway cases of both 16-bit types."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = [
        0,
        -(2**31),
        1,
        0x8000,
        0x18000,
        0x007FFFFF,
        0x7F7FFFFF,
        0x7F7F8000,
        0x7F7F7FFF,
        0x7F800000,
        0x7F800001,
        0x7FFFFFFF,
    ]
    bits[: len(special)] = torch.tensor(special)
    halfway = torch.arange(
        0x3F800000, 0x3F800000 + 512 * 0x1000, 0x1000
    )  # halves of a bfloat16 and of a float16 unit above 1
    bits[64 : 64 + 512] = halfway.to(torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_conversion_rounds_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    values = _every_kind_of_float32().to(source).to(DEVICE)
    converted = torch.empty(values.shape, dtype=target, device=DEVICE)
    _convert_kernel[(1,)](values, converted, BLOCK=values.numel())
    expected = values.to(target)
    number = ~values.isnan()
    integer = torch.int32 if target == torch.float32 else torch.int16
    assert torch.equal(converted.view(integer)[number], expected.view(integer)[number])
    assert converted[~number].isnan().all()
