"""csrc/cuda's S pass and dropout mask, which serve nothing before a GPU has timed them, run on the CPU thread by thread."""

import ctypes
import random
from pathlib import Path

import pytest
import torch

from peftfast.reference import lora as definition
from peftfast.reference import philox
from tests.support.budget import assert_within_budget
from tests.support.cuda_emulator.build import build, fails_apart
from tests.test_cuda_emulated import DTYPES, F32, Guarded, call

pytestmark = pytest.mark.interpreter  # where there is a GPU the kernels themselves are tested

SEED = torch.tensor([0x5EED << 33 | 5])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tmp_path_factory.mktemp(family) for family in ("lora", "philox")}


@pytest.fixture(scope="module")
def shrink(folders: dict[str, Path]) -> ctypes.CDLL:
    return build("lora", folders["lora"])


def check_shrink(library: ctypes.CDLL, count: int) -> None:
    draw = random.Random(1)
    for data in range(count):
        m, k, r = draw.choice((1, 31, 37)), draw.choice((8, 61, 256, 520)), draw.choice((1, 7, 17))
        x_dtype, w_dtype, p = draw.choice(DTYPES), draw.choice(DTYPES), draw.choice((0.0, 0.3, 1.0))
        dtype = x_dtype if draw.random() < 0.7 else draw.choice(DTYPES)
        splits, wide = draw.choice((1, 2, 5)), draw.choice((0, 3, 8))
        generator = torch.Generator().manual_seed(data)
        x, w = (
            torch.randn(rows, k + wide, generator=generator).to(kind) for rows, kind in ((m, x_dtype), (r, w_dtype))
        )
        x[:, k:] = w[:, k:] = float("nan")  # not to be read
        x, w = x[:, :k], w[:, :k]
        out, partials = Guarded((m, r), dtype), Guarded((splits, m, r), F32)
        threshold = philox.keep_threshold(p)
        scale = 1.5 * philox.keep_scale(p) if p else 1.5
        seed = SEED if p else None
        sizes = (x_dtype, w_dtype, dtype, m, k, r, x.stride(0), w.stride(0))
        call(library.lora_shrink, x, w, *sizes, seed, threshold, scale, splits, partials.tensor, out.tensor)
        exact = definition.lora_shrink(x.to(dtype).double(), w.to(dtype).double(), seed, p, 1.5, torch.float64)
        # The operands are rounded, their products and sums are float32.
        composed = definition.lora_shrink(x.to(dtype).float(), w.to(dtype).float(), seed, p, 1.5, F32).to(dtype)
        partials.check() if splits > 1 else None
        assert_within_budget(f"{m}x{k} r {r} p {p} {sizes[:3]} splits {splits}", out.check(), composed, exact)


def test_the_s_pass(shrink: ctypes.CDLL) -> None:
    check_shrink(shrink, 40)


@pytest.mark.parametrize(
    "edit",
    [
        ("total += s.partials[split * count + at];", "total = s.partials[split * count + at];"),
        ("if (kWhole || i >= left) continue;", "if (kWhole || i > left) continue;"),
        ("bits >> i & 1u ? x", "bits >> i & 2u ? x"),
        ("(steps + s.splits - 1) / s.splits", "steps / s.splits"),
    ],
    ids=["partials", "tail", "mask", "splits"],
)
def test_a_planted_fault_is_found(
    edit: tuple[str, str], folders: dict[str, Path], shrink: ctypes.CDLL, tmp_path: Path
) -> None:
    faulty = build("lora", tmp_path, edit, folders["lora"])
    assert fails_apart(lambda: check_shrink(faulty, 40), AssertionError)


def test_the_mask(folders: dict[str, Path]) -> None:
    library = build("philox", folders["philox"])
    for rows, columns in ((1, 1), (3, 16), (5, 33), (40, 1008), (7, 1003)):
        for p in (0.0, 0.25, 1.0):
            out = Guarded((rows, columns), torch.uint8)
            call(library.dropout_mask, SEED, rows, columns, philox.keep_threshold(p), out.tensor)
            assert torch.equal(out.check().bool(), philox.dropout_mask(SEED, rows, columns, p))
