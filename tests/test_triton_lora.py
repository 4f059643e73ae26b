"""kernels/lora.py against the definition in float64, within the error budget: interpreted without a GPU, compiled with
one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from peftfast.configs import lora as configs
from peftfast.configs import lora_terms as terms_configs
from peftfast.configs.device import Device
from peftfast.kernels import lora, lora_dora
from peftfast.reference import lora as definition
from peftfast.reference import philox as philox_definition

from .support.budget import assert_within_budget
from .support.interpreter import DEVICE, require_runnable_kernels, seed_of

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
QLORA = (FLOAT32, FLOAT32, BFLOAT16)  # dtypes of x, of the adapters, of the products
PEFT = (BFLOAT16, FLOAT32, BFLOAT16)
HALF = (BFLOAT16, BFLOAT16, BFLOAT16)
SINGLE = (FLOAT32, FLOAT32, FLOAT32)
FP16 = (FLOAT16, FLOAT32, FLOAT16)
CONFIG = configs.LoraConfig(16, 32, 16, splits=3)  # several steps and splits even at the sizes below
SCALING = 1.5
SEED = 2**40 + 12345


@pytest.fixture(autouse=True)
def runnable() -> None:
    require_runnable_kernels()


@dataclass(frozen=True)
class Sizes:
    M: int
    K: int
    N: int
    R: int


# Prime everything; rank 1, 3, 17 and above one block; one row; sizes that fill their blocks exactly.
CASES = [
    (Sizes(37, 67, 53, 3), QLORA, 0.1),
    (Sizes(37, 131, 71, 17), QLORA, 0.0),
    (Sizes(1, 67, 53, 1), PEFT, 0.1),
    (Sizes(32, 64, 64, 16), HALF, 0.1),
    (Sizes(19, 71, 37, 40), PEFT, 0.0),
    (Sizes(33, 41, 43, 17), SINGLE, 0.1),
    (Sizes(13, 64, 32, 8), FP16, 0.3),
    (Sizes(17, 23, 29, 3), QLORA, 1.0),
    (Sizes(18, 64, 32, 24), PEFT, 1e-6),
    (Sizes(7, 35, 41, 8), HALF, 1.0),
]
IDS = [
    f"M{sizes.M}-K{sizes.K}-N{sizes.N}-R{sizes.R}-{str(dtypes[0])[6:]}-{str(dtypes[2])[6:]}-p{p}"
    for sizes, dtypes, p in CASES
]
cases = pytest.mark.parametrize(("sizes", "dtypes", "p"), CASES, ids=IDS)


@dataclass
class Data:
    """The tensors of a layer's two passes; the adapter's term is as large as the base's."""

    x: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor
    base: Tensor
    s: Tensor
    dy: Tensor
    compute: torch.dtype
    narrow: torch.dtype


def _data(sizes: Sizes, dtypes: tuple[torch.dtype, ...], strided: bool = False) -> Data:
    generator = torch.Generator().manual_seed(1)
    wide, narrow, compute = dtypes

    def random(rows: int, columns: int, dtype: torch.dtype, divisor: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator).to(DEVICE) / divisor
        if strided:  # rows farther apart than they are long
            buffer = torch.full((rows, columns + 5), float("nan"), dtype=dtype, device=DEVICE)
            buffer[:, 2 : columns + 2] = values
            return buffer[:, 2 : columns + 2]
        return values.to(dtype)

    M, K, N, R = sizes.M, sizes.K, sizes.N, sizes.R
    return Data(
        x=random(M, K, wide),
        a=random(R, K, narrow, K**0.5),
        b=random(N, R, narrow, R**0.5),
        bias=torch.randn(N, generator=generator).to(DEVICE, narrow),
        base=random(M, N, wide),
        s=random(M, R, compute),
        dy=random(M, N, compute),
        compute=compute,
        narrow=narrow,
    )


def _shrink(run: Callable, data: Data, p: float) -> None:
    seed = seed_of(SEED)
    actual = run(data.x, data.a, seed, p, SCALING, data.compute, CONFIG)
    composed = definition.lora_shrink(data.x, data.a, seed, p, SCALING, data.compute)
    exact = definition.lora_shrink(data.x.double(), data.a.double(), seed, p, SCALING, FLOAT64)
    assert actual.dtype == composed.dtype
    assert_within_budget("lora_shrink", actual, composed, exact)


def _expand(
    run: Callable, data: Data, p: float, *, bias: bool = True, in_place: bool = False, transposed: bool = False
) -> None:
    seed, dtype = seed_of(SEED), data.base.dtype
    offset = data.bias if bias else None
    w = data.b.T.contiguous().T if transposed else data.b
    exact_offset = offset.double() if offset is not None else None
    exact = definition.lora_expand(
        data.base.double(), data.s.double(), w.double(), exact_offset, seed, p, SCALING, FLOAT64
    )
    composed = definition.lora_expand(data.base, data.s, w, offset, seed, p, SCALING, dtype)
    out = data.base if in_place else torch.full_like(data.base, float("nan"))
    assert run(data.base, data.s, w, offset, seed, p, SCALING, out, CONFIG) is out
    assert_within_budget("lora_expand", out, composed, exact)


def _weight_grad(run: Callable, data: Data, p: float) -> None:
    seed = seed_of(SEED)
    actual = run(data.s, data.x, seed, p, SCALING, data.narrow, CONFIG)
    composed = definition.lora_weight_grad(data.s, data.x, seed, p, SCALING, data.narrow)
    exact = definition.lora_weight_grad(data.s.double(), data.x.double(), seed, p, SCALING, FLOAT64)
    assert actual.dtype == composed.dtype and actual.is_contiguous()
    assert_within_budget("lora_weight_grad", actual, composed, exact)


ONE_PASS = configs.DyGradsConfig(CONFIG)
TWO_PASSES = configs.DyGradsConfig(None, CONFIG, CONFIG)


def _dy_grads(run: Callable, data: Data, config: configs.DyGradsConfig = ONE_PASS) -> None:
    actual = run(data.dy, data.s, data.b, SCALING, data.narrow, config)
    composed = definition.lora_dy_grads(data.dy, data.s, data.b, SCALING, data.narrow)
    exact = definition.lora_dy_grads(data.dy.double(), data.s.double(), data.b.double(), SCALING, FLOAT64)
    for name, *three in zip(("ds", "db"), actual, composed, exact, strict=True):
        assert three[0].dtype == three[1].dtype and three[0].is_contiguous()
        assert_within_budget(name, *three)


@cases
def test_shrink(sizes: Sizes, dtypes: tuple[torch.dtype, ...], p: float) -> None:
    _shrink(lora.lora_shrink, _data(sizes, dtypes), p)


@cases
def test_expand(sizes: Sizes, dtypes: tuple[torch.dtype, ...], p: float) -> None:
    _expand(lora.lora_expand, _data(sizes, dtypes), p)


@cases
def test_weight_grad(sizes: Sizes, dtypes: tuple[torch.dtype, ...], p: float) -> None:
    _weight_grad(lora.lora_weight_grad, _data(sizes, dtypes), p)


@pytest.mark.parametrize(("sizes", "dtypes"), [case[:2] for case in CASES], ids=IDS)
@pytest.mark.parametrize("config", [ONE_PASS, TWO_PASSES], ids=["one pass", "two passes"])
def test_dy_grads(sizes: Sizes, dtypes: tuple[torch.dtype, ...], config: configs.DyGradsConfig) -> None:
    _dy_grads(lora.lora_dy_grads, _data(sizes, dtypes), config)


@pytest.mark.parametrize("dtypes", [QLORA, HALF], ids=["qlora", "half"])
def test_rows_apart(dtypes: tuple[torch.dtype, ...]) -> None:
    """Rows with a stride of their own, base in place among them: what lies between the rows stays."""
    data = _data(Sizes(18, 40, 33, 5), dtypes, strided=True)
    _shrink(lora.lora_shrink, data, 0.1)
    _weight_grad(lora.lora_weight_grad, data, 0.1)
    _dy_grads(lora.lora_dy_grads, data)
    _expand(lora.lora_expand, data, 0.1, in_place=True)
    whole = data.base._base
    assert whole is not None and whole.isnan().sum() == 5 * 18


def test_columns_apart() -> None:
    """Every matrix stored column by column."""
    data = _data(Sizes(18, 40, 33, 5), PEFT)
    for name in ("x", "a", "b", "base", "s", "dy"):
        setattr(data, name, getattr(data, name).T.contiguous().T)
    _shrink(lora.lora_shrink, data, 0.1)
    _weight_grad(lora.lora_weight_grad, data, 0.1)
    _dy_grads(lora.lora_dy_grads, data)
    _expand(lora.lora_expand, data, 0.1)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_expand_in_place(transposed: bool, bias: bool) -> None:
    """As the backward calls it: dX += mask(dS A), A handed over as a transposed view."""
    _expand(lora.lora_expand, _data(Sizes(21, 8, 45, 6), PEFT), 0.1, bias=bias, in_place=True, transposed=transposed)


@pytest.mark.parametrize("dtypes", [QLORA, SINGLE], ids=["qlora", "single"])
def test_the_heuristics_own_configurations(dtypes: tuple[torch.dtype, ...]) -> None:
    sizes, device = Sizes(70, 300, 280, 20), Device("", (9, 0), 2)
    data = _data(sizes, dtypes)
    wide, narrow, compute = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    M, K, N, R = sizes.M, sizes.K, sizes.N, sizes.R

    def with_config(launcher: Callable, config: object) -> Callable:
        return lambda *arguments: launcher(*arguments[:-1], config)

    _shrink(with_config(lora.lora_shrink, configs.lora_shrink(M, K, R, wide, narrow, compute, True, device)), data, 0.1)
    _expand(with_config(lora.lora_expand, configs.lora_expand(M, N, R, wide, narrow, compute, True, device)), data, 0.1)
    grad = configs.lora_weight_grad(M, K, R, wide, compute, True, device)
    _weight_grad(with_config(lora.lora_weight_grad, grad), data, 0.1)
    _dy_grads(lora.lora_dy_grads, data, configs.lora_dy_grads(M, N, R, compute, narrow, device))


@pytest.mark.parametrize("sizes", [Sizes(0, 8, 9, 3), Sizes(4, 0, 9, 3), Sizes(4, 8, 0, 3), Sizes(4, 8, 9, 0)], ids=str)
def test_nothing_to_add(sizes: Sizes) -> None:
    """An empty sum is zero, an empty result is empty, and expand without a rank adds its bias alone."""
    data = _data(sizes, QLORA)
    M, K, N, R = sizes.M, sizes.K, sizes.N, sizes.R
    shrunk = lora.lora_shrink(data.x, data.a, None, 0.0, 1.0, data.compute, CONFIG)
    assert shrunk.shape == (M, R) and (K or not shrunk.count_nonzero())
    grad = lora.lora_weight_grad(data.s, data.x, None, 0.0, 1.0, FLOAT32, CONFIG)
    assert grad.shape == (R, K) and (M or not grad.count_nonzero())
    for config in (ONE_PASS, TWO_PASSES):
        ds, db = lora.lora_dy_grads(data.dy, data.s, data.b, 1.0, FLOAT32, config)
        assert ds.shape == (M, R) and (N or not ds.count_nonzero())
        assert db.shape == (N, R) and (M or not db.count_nonzero())
    out = torch.full_like(data.base, float("nan"))
    lora.lora_expand(data.base, data.s, data.b, data.bias, None, 0.0, 2.0, out, CONFIG)
    if not R:
        torch.testing.assert_close(out, data.base + 2.0 * data.bias)


def test_dropped_values_do_not_spread() -> None:
    """Infinities at dropped places of x leave no NaN: a dropped element is selected away, not multiplied by zero."""
    data = _data(Sizes(16, 64, 32, 4), QLORA)
    from peftfast.reference.philox import dropout_mask

    data.x[~dropout_mask(seed_of(SEED), 16, 64, 0.5)] = float("inf")
    for result in (
        lora.lora_shrink(data.x, data.a, seed_of(SEED), 0.5, 1.0, BFLOAT16, CONFIG),
        lora.lora_weight_grad(data.s, data.x, seed_of(SEED), 0.5, 1.0, FLOAT32, CONFIG),
    ):
        assert result.isfinite().all()


def test_the_order_of_the_sum_is_fixed() -> None:
    """The same bits again, and other bits only from another number of splits."""
    data = _data(Sizes(96, 256, 96, 4), QLORA)

    def results() -> tuple[Tensor, ...]:
        return (
            lora.lora_shrink(data.x, data.a, None, 0.0, 1.0, BFLOAT16, CONFIG),
            lora.lora_weight_grad(data.s, data.x, None, 0.0, 1.0, FLOAT32, CONFIG),
            *lora.lora_dy_grads(data.dy, data.s, data.b, 1.0, FLOAT32, ONE_PASS),
        )

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)
    whole = replace(CONFIG, splits=1)
    grad = lora.lora_weight_grad(data.s, data.x, None, 0.0, 1.0, FLOAT32, whole)
    torch.testing.assert_close(grad, results()[1], rtol=1e-5, atol=1e-5)


def _altered(launcher: Callable, **changes: Callable) -> Callable:
    """The launcher with some of its arguments, by position as "a0", "a1", ..., changed on the way in."""

    def run(*arguments: object) -> object:
        changed = [changes[f"a{i}"](one) if f"a{i}" in changes else one for i, one in enumerate(arguments)]
        return launcher(*changed)

    return run


@pytest.mark.parametrize(
    ("check", "launcher", "changes"),
    [
        (_shrink, "lora_shrink", {"a2": lambda seed: seed + 1}),
        (_shrink, "lora_shrink", {"a3": lambda p: 0.0}),
        (_shrink, "lora_shrink", {"a4": lambda scaling: 1.0}),
        (_shrink, "lora_shrink", {"a0": lambda x: x.roll(1, 0)}),
        (_expand, "lora_expand", {"a3": lambda bias: None}),
        (_expand, "lora_expand", {"a4": lambda seed: seed + 2**32}),
        (_expand, "lora_expand", {"a6": lambda scaling: 1.0}),
        (_expand, "lora_expand", {"a1": torch.zeros_like}),
        (_weight_grad, "lora_weight_grad", {"a2": lambda seed: seed + 1}),
        (_weight_grad, "lora_weight_grad", {"a4": lambda scaling: 1.0}),
        (_weight_grad, "lora_weight_grad", {"a1": lambda x: x.roll(1, 0)}),
        (lambda run, data, p: _dy_grads(run, data), "lora_dy_grads", {"a3": lambda scaling: 1.0}),
        (lambda run, data, p: _dy_grads(run, data), "lora_dy_grads", {"a1": lambda s: s.roll(1, 0)}),
    ],
)
def test_a_planted_fault_is_found(check: Callable, launcher: str, changes: dict[str, Callable]) -> None:
    data = _data(Sizes(32, 40, 48, 4), QLORA)
    with pytest.raises(AssertionError, match="over the budget"):
        check(_altered(getattr(lora, launcher), **changes), data, 0.3)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_every_draw_falls_on_its_side_of_the_threshold(dtype: torch.dtype) -> None:
    """Two 16-bit elements are masked at once: thresholds at, just above and just below draws that occur, in both halves of a word."""
    rows, columns = 24, 136
    seed = seed_of(SEED)
    words = philox_definition.philox_words(seed, 0, rows * columns // 8, 0, 1).cpu()
    draws = torch.stack([words & 0xFFFF, words >> 16], -1).reshape(rows, columns)
    x = torch.ones(rows, columns, dtype=dtype, device=DEVICE)
    for draw in (0, int(draws[3, 40]), int(draws[23, 135]), int(draws.min()), int(draws.max()), 0x7FFF, 0x8000, 0xFFFF):
        for threshold in {max(0, draw - 1), draw, draw + 1}:
            p = 1 - threshold / 65536
            assert philox_definition.keep_threshold(p) == threshold
            got = lora_dora.lora_dropout_add(None, x, seed, p, FLOAT32, terms_configs.TileConfig(8, 64))
            assert torch.equal((got != 0).cpu(), draws < threshold), threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_factor_keeps_every_bit_beside_16_bits(dtype: torch.dtype) -> None:
    """In a product of float32: tensor cores multiply a bfloat16 x, by the three parts of w. What is not finite stays as it is."""
    bits = [
        0x3F7FFFFF,
        0x3F800001,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x7F800000,
        0xFF800000,
        0xC0490FDB,
        0x0A3FFFFF,
        0x00012345,
        0x807FFFFF,
    ]
    words = torch.tensor([one - (one >> 31 << 32) for one in bits], dtype=torch.int32, device=DEVICE)
    w = torch.cat((words.view(torch.float32), torch.tensor([float("nan")], device=DEVICE)))[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    config = configs.lora_shrink(1, 1, len(w), str(dtype).removeprefix("torch."), "float32", "float32", False, Device())
    out = lora.lora_shrink(one, w, None, 0.0, 1.0, torch.float32, config)[0]
    expected = w[:, 0].tolist()
    assert out[:-3].tolist() == expected[:-3] and out[-1].isnan()
    assert (out[-3:-1] - w[-3:-1, 0]).abs().max() <= 2.0**-133  # denormal parts of denormals
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, 70, generator=generator).to(DEVICE) for rows in (33, 5))
    out = lora.lora_shrink(x.to(dtype), w, None, 0.0, 1.0, torch.float32, config)
    exact = x.to(dtype).double() @ w.double().T
    assert (out - exact).abs().max() < 1e-6 * exact.abs().max()
    whole = lora.lora_shrink(x.to(dtype), w.to(dtype), None, 0.0, 1.0, torch.float32, config)
    exact = x.to(dtype).double() @ w.to(dtype).double().T
    assert (whole - exact).abs().max() < 1e-6 * exact.abs().max()
