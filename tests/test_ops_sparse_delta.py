"""Operators of the sparse delta: against the definition on every backend and instruction set, and their contracts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from peftfast.ops import native
from peftfast.ops import sparse_adamw as adamw_ops
from peftfast.ops import sparse_delta as ops
from peftfast.ops import sparse_dequantize as dequantize_ops
from peftfast.reference import philox
from peftfast.reference import sparse_delta as definition
from tests.support import sparse_checks as checks
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.sparse_checks import TELLING, Case, random_cases
from tests.test_native_cpu import ISAS

cpu = torch.ops.peftfast_cpu
on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    chosen = native.cpu_isa()
    monkeypatch.setenv("PEFTFAST_BACKEND", "cpu")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(chosen)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_on_each_instruction_set(name: str, isa: str) -> None:
    for case in (*TELLING, *random_cases(60, seed=len(name))):
        checks.CHECKS[name](case)


@pytest.mark.parametrize("side", [32, 64, 128, 256])
def test_larger_blocks_on_each_instruction_set(side: int, isa: str) -> None:
    for dtype, out in ((F32, F32), (BF16, F32), (F16, F16)):
        checks.check_blocks(Case(M=300, N=2 * side, K=3 * side, dtype=dtype, out=out, data=side), side)


@pytest.mark.interpreter
@pytest.mark.parametrize(("side", "dtype"), [(32, F32), (128, F32), (256, BF16)])
def test_triton_larger_blocks(side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one block where it is larger than a program's."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    checks.check_blocks(Case(M=70, N=side, K=2 * side, dtype=dtype), side)


@pytest.mark.parametrize("asked", ["cpu", on_triton])
def test_blocks_outside_touch_nothing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    dy, x = torch.ones(4, 32, device=DEVICE), torch.ones(4, 32, device=DEVICE)
    most = 2**62
    bad = [
        [-16, 0, 0, 16],
        [32, 0, 0, 16],
        [8, 0, 0, 16],
        [0, 1, 0, 16],
        [0, 32, 0, 16],
        [0, most, 0, 16],
        [0, 0, -1, 16],
        [0, 0, 1, 16],
    ]
    bad += [[0, 0, 0, 15], [0, 0, 0, 17], [0, 0, 0, most // 4], [0, 0, 0, -16], [0, 0, most, 16]]
    found = ops.sparse_delta_blocks(dy, x, torch.tensor(bad, device=DEVICE), 16, 256, F32)
    assert (found == 0).all()
    good = torch.tensor([*bad, [16, 16, 0, 16]], device=DEVICE)
    assert (ops.sparse_delta_blocks(dy, x, good, 16, 256, F32) == 4).all()


@pytest.mark.parametrize("seeded", [False, True])
def test_adamw_on_each_instruction_set(seeded: bool, isa: str) -> None:
    for data in range(4):
        checks.check_adamw(data, seeded)
        checks.check_adamw8(data, seeded)
    checks.check_adamw_outside(seeded)


def test_state_bytes_on_each_instruction_set(isa: str) -> None:
    checks.check_state_bytes()


@pytest.mark.interpreter
def test_state_bytes_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    checks.check_state_bytes()


@pytest.mark.parametrize("asked", ["cpu", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_states_in_bytes_of_a_block_that_is_not_finite(
    value: float, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN or an infinity in a gradient shows in its own block, as the definition has it, and in no other."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    given, expected = checks.adamw8_inputs(0, False), checks.adamw8_inputs(0, False)
    for lists in (given, expected):
        lists[1][4][300] = value
    adamw_ops.sparse_adamw8_(*given)
    adamw_ops._reference_adamw8(*expected)
    for column in checks.WRITTEN8:
        for one, other in zip(given[column], expected[column], strict=True):
            assert torch.equal(one.nan_to_num(nan=123.0), other.nan_to_num(nan=123.0))
    assert not given[8][4][1].isfinite() and given[8][4][[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("name", checks.CHECKS)
def test_on_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last fallback, called as an operator."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    for case in TELLING:
        checks.CHECKS[name](case)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", checks.CHECKS)
def test_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in (*TELLING, *random_cases(4, seed=3)):
        checks.CHECKS[name](case)


@pytest.mark.interpreter
def test_triton_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in (Case(N=45, K=40, S=600), Case(M=70, N=20, K=33, S=300, dtype=BF16), checks.without_rows(Case(S=9))):
        checks.check_tiled(case)


@pytest.mark.interpreter
def test_tables_of_tiles_that_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are not there, places outside of the support and runs that do not end in it: the entries that are named right come
    right, and the rest of the buffers that the operands lie in is neither read nor written."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    n, k, side = 20, 33, 16
    dy, x = (torch.full((40, width), float("nan"), device=DEVICE)[8:16] for width in (n, k))
    dy.copy_(torch.arange(8 * n).reshape(8, n)), x.copy_(torch.arange(8 * k).reshape(8, k))
    indices = torch.tensor([0, 5, 2 * k, 19 * k + 32], dtype=torch.int32, device=DEVICE)
    expected = definition.sparse_delta_dvalues(dy, x, indices, F32)
    order, tiles, starts = checks.tiles_of(indices, k, side, side)
    assert tiles.tolist() == [0, 5] and starts.tolist() == [0, 3, 4]

    def given(name: str, values: list[int]) -> list[float]:
        table = {"order": order, "tiles": tiles, "starts": starts}
        table[name] = torch.tensor(values, dtype=torch.int32, device=DEVICE)
        return ops.sparse_delta_dvalues_tiled(dy, x, indices, *table.values(), side, side, F32).tolist()

    first, second, third, last = expected.tolist()
    assert given("tiles", [0, 5]) == [first, second, third, last]
    for wrong in (-1, -(2**31), 2**31 - 1, 10**6):
        assert given("tiles", [0, wrong]) in ([first, second, third, 0.0], [first, second, third, last])
        assert given("order", [0, wrong, 2, 3]) == [first, 0.0, third, last]
    assert given("starts", [-5, 3, 9]) == [first, second, third, last]


@pytest.mark.interpreter
@pytest.mark.parametrize("seeded", [False, True])
def test_triton_adamw(seeded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    checks.check_adamw(11, seeded)
    checks.check_adamw8(11, seeded)
    checks.check_adamw_outside(seeded)


@pytest.mark.parametrize("asked", ["cpu", on_triton])
def test_indices_outside_touch_nothing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hands an operator wrong indices past all checks gets zeros, and no access outside the tensors."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    bad = torch.tensor([-1, -(2**31), 12, 2**31 - 1, 5], dtype=torch.int32, device=DEVICE)
    dy, x = torch.ones(4, 3, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    assert ops.sparse_delta_dvalues(dy, x, bad, F32).tolist() == [0, 0, 0, 0, 4]
    weight, values = torch.zeros(3, 4, device=DEVICE), torch.ones(5, device=DEVICE)
    ops.sparse_delta_patch_(weight, bad[4:].contiguous(), values[4:].contiguous())
    ops.sparse_delta_write_(weight, bad, values, values)
    y = torch.zeros(4, 3, device=DEVICE)
    ops.sparse_delta_product_(y, x, bad[4:].contiguous(), values[4:].contiguous())
    assert y.tolist() == [[0, 1, 0]] * 4
    for count in range(1, 5):
        ops.sparse_delta_product_(y, x, bad[:count].contiguous(), values[:count].contiguous())
    assert y.tolist() == [[0, 1, 0]] * 4
    expected = torch.zeros(12, device=DEVICE)
    expected[5] = 2.0
    assert torch.equal(weight.view(-1), expected)


@pytest.mark.parametrize("asked", ["cpu", on_triton])
def test_starts_that_are_wrong_touch_nothing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run adds no entry of another, and reads none that is not there."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    *stored, indices, values, starts, run, dtype = checks.dequantize_inputs(Case(N=8, K=32, S=40), False)
    plain = dequantize_ops.sparse_delta_dequantize(*stored, indices, torch.zeros_like(values), starts, run, dtype)
    for wrong in (starts + 1000, starts - 1000, starts * 0 + 2**31 - 1, starts.flip(0), starts):
        at = indices if wrong is not starts else (indices.long() + (1 << 33)) * (1 - 2 * (indices.long() % 2))
        found = dequantize_ops.sparse_delta_dequantize(*stored, at, values, wrong, run, dtype)
        changed = (found != plain).flatten().nonzero()[:, 0]
        assert torch.isin(changed, indices).all() and (wrong is not starts or changed.numel() == 0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    case = Case(M=600, N=64, K=64, S=4000, dtype=BF16)
    expected = [t.clone() for t in _everything(case)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(_everything(case), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def _everything(case: Case) -> list[torch.Tensor]:
    dy, x, indices = checks.dvalues_inputs(case)
    weight, indices, values, base = checks.weight_inputs(case)
    lists = checks.adamw_inputs(1, True)
    small = checks.adamw8_inputs(1, True)
    adamw_ops.sparse_adamw_(*lists)
    adamw_ops.sparse_adamw8_(*small)
    ops.sparse_delta_write_(weight, indices, base, values)
    products = []
    for rows in (600, 20, 1):
        products.append(torch.zeros(rows, case.N, dtype=case.dtype if rows == 20 else F32, device=DEVICE))
        ops.sparse_delta_product_(products[-1], x[:rows].contiguous(), indices, values)
    return [
        *products,
        ops.sparse_delta_dvalues(dy, x, indices, F32),
        ops.sparse_delta_patch(weight, indices, values),
        weight,
        *(t for column in checks.WRITTEN for t in lists[column]),
        *(t for column in checks.WRITTEN8 for t in small[column]),
    ]


def test_stochastic_rounding_is_unbiased_and_neighbouring() -> None:
    value = torch.full((20000,), 1.0 + 2.0**-8 * 0.25, dtype=F32)
    rounded = definition.stochastic_bf16(value, torch.arange(20000), torch.tensor([5]), 3)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs((rounded.float() > 1).double().mean().item() - 0.125) < 0.01
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0])
    result = definition.stochastic_bf16(special, torch.arange(6), torch.tensor([5]), 0)
    assert torch.equal(result.isnan(), special.isnan()) and torch.equal(
        result[[0, 1, 3, 5]].float(), special[[0, 1, 3, 5]]
    )


def test_stochastic_draws_are_stream_two() -> None:
    """Eight elements to a counter, the low half of a word before its high half."""
    words = philox.philox_words(torch.tensor([9]), 2, 1, 7, definition.STREAM_ROUNDING)[0]
    draws = [part for word in words.tolist() for part in (word & 0xFFFF, word >> 16)]
    for element, draw in zip(range(16, 24), draws, strict=True):
        for cut in (draw - 1, draw, 65536 - draw, 65535 - draw):
            if not 0 <= cut < 65536:
                continue
            value = torch.tensor([0x3F800000 + cut], dtype=torch.int32).view(F32)
            up = definition.stochastic_bf16(value, torch.tensor([element]), torch.tensor([9]), 7)
            assert (up.item() > 1.0) == (cut + draw >= 65536)


def test_adamw_is_torchs_within_rounding() -> None:
    """Uniform ages: the values of torch.optim.AdamW after some steps, in float64's company."""
    parameter = torch.nn.Parameter(torch.randn(50))
    other = parameter.detach().clone()
    stock = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    states = [torch.zeros(50), torch.zeros(50), torch.zeros(50, dtype=torch.int16)]
    hyper, corrections = definition.adam_hyper(1e-2, 0.9, 0.99, 1e-8, 0.1), definition.adam_corrections(0.9, 0.99, 100)
    for _ in range(10):
        grad = torch.randn(50)
        parameter.grad = grad.clone()
        stock.step()
        other, *states = definition.sparse_adamw(other, grad, *states, hyper, corrections)
    assert (other - parameter).abs().max() < 1e-6


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 5), (6, 5), (6,)))
    indices = torch.tensor([0, 3, 7, 8, 22, 29])
    values = torch.randn(6, generator=generator, dtype=torch.float64)
    for tensor in (x, values, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, v, b: definition.sparse_delta_linear(a, weight, indices, v, b), (x, values, bias)
    )
    y = definition.sparse_delta_linear(x, weight, indices, values, bias)
    grad = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    by_autograd = torch.autograd.grad(y, values, grad)[0]
    assert torch.allclose(definition.sparse_delta_dvalues(grad, x.detach(), indices, torch.float64), by_autograd)


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    dy, x = torch.ones(4, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    at, weight = torch.tensor([1, 7], device=DEVICE), torch.ones(3, 5, device=DEVICE)
    values = torch.ones(2, device=DEVICE)
    lists = checks.adamw_inputs(0, False)

    def adamw(position: int, change: Callable[[Any], Any]) -> Callable[[], Any]:
        given = [list(item) if isinstance(item, list) else item for item in lists]
        given[position] = change(given[position])
        return lambda: adamw_ops.sparse_adamw_(*given)

    def adamw8(position: int, change: Callable[[Any], Any]) -> Callable[[], Any]:
        given = checks.adamw8_inputs(0, True)
        given[position] = change(given[position])
        return lambda: adamw_ops.sparse_adamw8_(*given)

    def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
        return lambda column: [change(column[0]), *column[1:]]

    def decoded(position: int, change: Callable[[Any], Any]) -> Callable[[], Any]:
        given = list(checks.dequantize_inputs(Case(), False))
        given[position] = change(given[position])
        return lambda: dequantize_ops.sparse_delta_dequantize(*given)

    tiled = (*checks.tiles_of(at, 5, 16, 16), 16, 16)
    return {
        "rows": ("x: expected 4 rows", lambda: ops.sparse_delta_dvalues(dy, x[:3], at, F32)),
        "dtypes": ("x: expected 4 rows of", lambda: ops.sparse_delta_dvalues(dy, x.half(), at, F32)),
        "vector": ("dy: expected a floating matrix", lambda: ops.sparse_delta_dvalues(dy[0], x, at, F32)),
        "index dtype": (
            "indices: expected a contiguous int32",
            lambda: ops.sparse_delta_dvalues(dy, x, at.short(), F32),
        ),
        "index shape": ("indices: expected a contiguous", lambda: ops.sparse_delta_dvalues(dy, x, at[None], F32)),
        "index device": ("indices: expected on", lambda: ops.sparse_delta_dvalues(dy, x, at.to("meta"), F32)),
        "result": ("dtype: expected a floating", lambda: ops.sparse_delta_dvalues(dy, x, at, torch.int32)),
        "order": (
            "order: expected",
            lambda: ops.sparse_delta_dvalues_tiled(dy, x, at, tiled[0][:1].contiguous(), *tiled[1:], F32),
        ),
        "starts": (
            "starts: expected",
            lambda: ops.sparse_delta_dvalues_tiled(dy, x, at, *tiled[:2], tiled[1], 16, 16, F32),
        ),
        "block": (
            "block_n: expected a power",
            lambda: ops.sparse_delta_dvalues_tiled(dy, x, at, *tiled[:3], 12, 16, F32),
        ),
        "blocks": (
            "blocks: expected contiguous int64",
            lambda: ops.sparse_delta_blocks(dy, x, at[None].long(), 16, 256, F32),
        ),
        "block size": (
            "block_size: expected one of",
            lambda: ops.sparse_delta_blocks(dy, x, torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), 24, 576, F32),
        ),
        "weight": ("weight: expected a contiguous", lambda: ops.sparse_delta_patch_(weight.T, at, values)),
        "values length": ("values: expected", lambda: ops.sparse_delta_patch(weight, at, values[:1])),
        "values dtype": ("values: expected", lambda: ops.sparse_delta_patch(weight, at, values.double())),
        "product y": ("y: expected 4 contiguous rows", lambda: ops.sparse_delta_product_(dy[:3], x, at, values)),
        "product values": ("values: expected", lambda: ops.sparse_delta_product_(dy, x, at, values[:1])),
        "product x": ("x: expected a floating matrix", lambda: ops.sparse_delta_product_(dy, x[0], at, values)),
        "decoded packed": ("packed: expected", decoded(0, lambda t: t[:-1])),
        "decoded values": ("values: expected", decoded(9, lambda t: t[:-1])),
        "decoded starts": ("starts: expected", decoded(10, lambda t: t[:-1])),
        "decoded run": ("run: expected a power", decoded(11, lambda _: 96)),
        "decoded dtype": ("dtype: expected", decoded(12, lambda _: torch.int32)),
        "base dtype": ("base: expected", lambda: ops.sparse_delta_write_(weight, at, values.half(), None)),
        "adamw count": ("grads: expected 5", adamw(1, lambda column: column[:4])),
        "adamw grads": ("grads: expected a contiguous", adamw(1, first(lambda t: t[:-1]))),
        "adamw values": ("values: expected", adamw(0, first(lambda t: t.double()))),
        "adamw age": ("age: expected int16", adamw(4, first(lambda t: t.float()))),
        "adamw indices": ("indices: expected", adamw(6, first(lambda t: t[:-1]))),
        "adamw bases": ("bases: expected", adamw(7, first(lambda t: t.float()))),
        "adamw hyper": ("hyper: expected", adamw(8, lambda t: t[:6])),
        "adamw corrections": ("corrections: expected", adamw(9, lambda t: t[:1])),
        "adamw seed": ("seed: expected one int64", adamw(10, lambda _: torch.zeros(1, device=DEVICE))),
        "adamw8 states": ("exp_avg: expected a contiguous torch.uint8", adamw8(2, first(lambda t: t.float()))),
        "adamw8 maxima": ("exp_avg_max: expected a contiguous", adamw8(8, first(lambda t: t[:-1]))),
        "adamw8 counts": ("exp_avg_sq_max: expected 5", adamw8(9, lambda column: column[:4])),
        "adamw8 codes": ("codes: expected", adamw8(10, lambda t: t[:1])),
        "adamw ids": ("ids: expected 32-bit", adamw(11, lambda ids: [-1, *ids[1:]])),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_contract(name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def bad_native_calls() -> list[tuple[str, Callable[[], Any]]]:
    x, out = torch.ones(4, 5), torch.ones(2)
    at, weight = torch.tensor([1, 7]), torch.ones(3, 5)
    adam = [t[0].cpu() for t in checks.adamw_inputs(0, False)[:8]]
    adam[4:4] = [None, None, None]
    tail = (*(t.cpu() for t in checks.adamw_inputs(0, False)[8:10]), None, 0)
    small = [t[0].cpu() for t in checks.adamw8_inputs(0, False)[:10]]
    codes = definition.state_codes()
    return [
        ("x: expected 4 rows", lambda: cpu.sparse_delta_dvalues(x, x[:3], at, out)),
        ("x: expected dtype", lambda: cpu.sparse_delta_dvalues(x, x.half(), at, out)),
        ("dy: expected contiguous rows", lambda: cpu.sparse_delta_dvalues(x.T, x.T, at, out)),
        ("out: expected 2 elements", lambda: cpu.sparse_delta_dvalues(x, x, at, out[:1])),
        ("indices: expected dtype", lambda: cpu.sparse_delta_dvalues(x, x, at.float(), out)),
        ("blocks: expected dtype", lambda: cpu.sparse_delta_blocks(x, x, weight.float(), 16, out)),
        ("block_size: expected a multiple", lambda: cpu.sparse_delta_blocks(x, x, at.new_zeros(1, 4), 8, out)),
        ("values: expected 2 elements", lambda: cpu.sparse_delta_patch(weight, at, out[:1], weight.clone())),
        ("out: expected 15", lambda: cpu.sparse_delta_patch(weight, at, out, weight[:2])),
        ("y: expected 4 rows", lambda: cpu.sparse_delta_product(torch.ones(3, 3), x, at, out)),
        ("values: expected 2", lambda: cpu.sparse_delta_product(x.clone(), x, at, out[:1])),
        ("base: expected dtype", lambda: cpu.sparse_delta_write(weight, at, out.half(), None)),
        ("age: expected dtype", lambda: cpu.sparse_adamw(*adam[:7], adam[7].long(), *adam[8:], *tail)),
        ("expected all or none", lambda: cpu.sparse_adamw(*adam[:9], None, None, *tail)),
        ("hyper: expected 7", lambda: cpu.sparse_adamw(*adam, tail[0][:6], *tail[1:])),
        ("exp_avg: expected dtype", lambda: cpu.sparse_adamw(*adam[:4], *small[8:], codes, *adam[7:], *tail)),
        ("expected all or none", lambda: cpu.sparse_adamw(*small[:4], *small[8:], None, *adam[7:], *tail)),
        (
            "exp_avg_sq_max: expected",
            lambda: cpu.sparse_adamw(*small[:4], small[8], small[9][:0], codes, *adam[7:], *tail),
        ),
        ("tensor_id", lambda: cpu.sparse_adamw(*adam, *tail[:3], 2**32)),
    ]


@pytest.mark.parametrize(("message", "call"), bad_native_calls())
def test_bad_arguments_of_the_library_raise(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_opcheck(dtype: torch.dtype) -> None:
    dy, x, indices = checks.dvalues_inputs(Case(dtype=dtype))
    weight, indices, values, base = checks.weight_inputs(Case(dtype=dtype))
    torch.library.opcheck(ops.sparse_delta_dvalues.overload, (dy, x, indices, F32))
    torch.library.opcheck(ops.sparse_delta_patch.overload, (weight, indices, values))
    torch.library.opcheck(ops.sparse_delta_patch_.overload, (weight, indices, values))
    torch.library.opcheck(ops.sparse_delta_product_.overload, checks.product_inputs(Case(dtype=dtype)))
    torch.library.opcheck(ops.sparse_delta_write_.overload, (weight, indices, base, values))
    decoded = checks.dequantize_inputs(Case(dtype=dtype), True)
    torch.library.opcheck(dequantize_ops.sparse_delta_dequantize.overload, decoded)


def test_no_dense_gradient_is_formed() -> None:
    """2048 x 2048 in float32 is 16 MiB; the transposed slab of 256 rows and the results are 4.3."""
    dy, x = torch.randn(512, 2048), torch.randn(512, 2048)
    indices = torch.arange(0, 2048 * 2048, 211, dtype=torch.int32)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.sparse_delta_dvalues(dy, x, indices, F32)
    largest = max((event.cpu_memory_usage for event in profile.key_averages()), default=0)
    assert largest <= 4 * indices.numel() + 4096
