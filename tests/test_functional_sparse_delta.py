"""F.sparse_delta_linear, SparsePattern and the choice of a support."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfast
import peftfast.functional as F
from peftfast.configs import sparse_delta as configs
from peftfast.functional import sparse_delta as layer
from peftfast.functional import sparse_support as support
from peftfast.reference import sparse_delta as definition
from tests.support.budget import assert_within_budget
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64

SHAPE = (48, 32)
KINDS = ("equal", "random", "zero", "wide")
_MADE: dict[str, Callable[[], F.SparsePattern]] = {
    "scattered": lambda: F.choose_support(torch.zeros(SHAPE), 0.2, generator=torch.Generator().manual_seed(1)),
    "rows": lambda: F.SparsePattern.from_rows([1, 5, 47], SHAPE),
    "rows side by side": lambda: F.SparsePattern.from_rows([4, 5, 6], SHAPE),
    "columns": lambda: F.SparsePattern.from_columns([0, 9, 31], SHAPE),
    "columns side by side": lambda: F.SparsePattern.from_columns(torch.tensor([3, 4, 5]), SHAPE),
    "blocks": lambda: F.SparsePattern.from_blocks([0, 1, 5], 16, SHAPE),
    "blocks of a column": lambda: F.SparsePattern.from_blocks([1, 5], 16, SHAPE),
    "everything": lambda: F.choose_support(torch.zeros(SHAPE), 1.0),
}
PATTERNS: dict[str, Callable[[], F.SparsePattern]] = {
    name: lambda make=make: make().to(DEVICE)  # type: ignore[misc]
    for name, make in _MADE.items()
}


def inputs(pattern: F.SparsePattern, dtype: torch.dtype, data: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(data)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    n, k = pattern.shape
    return {
        "x": normal(5, 7, k).to(dtype),  # more rows than take the delta apart
        "weight": (normal(n, k) * k**-0.5).to(dtype),
        "values": normal(pattern.count) * (pattern.density * k) ** -0.5,
        "bias": normal(n).to(dtype),
        "dy": normal(5, 7, n).to(dtype),
    }


def run(function: Callable[..., Tensor], given: dict[str, Tensor], support_: Any) -> list[Tensor]:
    leaves = [given[name].detach().requires_grad_() for name in ("x", "values", "bias", "weight")]
    y = function(leaves[0], leaves[3], support_, leaves[1], leaves[2])
    return [y.detach(), *torch.autograd.grad(y, leaves, given["dy"].to(y.dtype))]


def check_layer(pattern: F.SparsePattern, dtype: torch.dtype, data: int = 0) -> None:
    """Forward and each gradient within the budget of the same formula composed of torch's operators, the patched weight rounded."""
    pattern, given = pattern.to(DEVICE), inputs(pattern, dtype, data)
    patched = definition.sparse_delta_patch(
        given["weight"], pattern.indices, given["values"].to(definition.wide_dtype(dtype))
    )
    exact_given = {name: t.double() for name, t in given.items()}
    # The rounding of W + Δ belongs to the operator: the exact layer has that weight, and a delta beside it of nothing.
    exact_given["weight"] = patched.double()
    exact_given["values"] = torch.zeros_like(exact_given["values"])
    composed_given = {**given, "weight": patched, "values": torch.zeros_like(given["values"])}
    exact = run(definition.sparse_delta_linear, exact_given, pattern.indices)
    composed = run(definition.sparse_delta_linear, composed_given, pattern.indices)
    actual = run(F.sparse_delta_linear, given, pattern)
    for name, *row in zip(("y", "dx", "dvalues", "dbias", "dweight"), actual, composed, exact, strict=True):
        assert_within_budget(f"{name} {pattern} {dtype}", *row)


@pytest.mark.parametrize("name", PATTERNS)
def test_layer(name: str) -> None:
    for dtype in (F32, BF16, F16):
        check_layer(PATTERNS[name](), dtype)


@pytest.mark.parametrize("name", PATTERNS)
def test_layer_in_float64_is_the_definition(name: str) -> None:
    pattern = PATTERNS[name]().to(DEVICE)
    given = {key: t.double() for key, t in inputs(pattern, F64).items()}
    expected = run(definition.sparse_delta_linear, given, pattern.indices)
    for actual, other in zip(run(F.sparse_delta_linear, given, pattern), expected, strict=True):
        assert torch.allclose(actual, other, rtol=1e-12, atol=1e-12)


def test_indices_in_the_place_of_a_pattern() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    one = run(F.sparse_delta_linear, given, pattern)
    other = run(F.sparse_delta_linear, given, pattern.indices)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_four_bit_weight(dtype: torch.dtype) -> None:
    pattern = PATTERNS["scattered"]().to(DEVICE)
    given = inputs(pattern, dtype)
    packed = F.nf4_quantize(given["weight"])
    dense = {**given, "weight": F.nf4_dequantize(packed)}
    leaves = [[d[name].detach().requires_grad_() for name in ("x", "values")] for d in (given, dense)]
    ys = [
        F.sparse_delta_linear(leaves[0][0], packed, pattern, leaves[0][1], given["bias"]),
        F.sparse_delta_linear(leaves[1][0], dense["weight"], pattern, leaves[1][1], given["bias"]),
    ]
    assert torch.equal(*ys)
    grads = [torch.autograd.grad(y, leaf, given["dy"]) for y, leaf in zip(ys, leaves, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def check_few_rows(rows: int, dtype: torch.dtype, packed: bool) -> dict[str, int]:
    """y and every gradient of a layer that takes its delta as a product of its own, within the budget; the forward's calls."""
    draw = torch.Generator().manual_seed(rows)
    weight = (torch.randn(96, 128, generator=draw) / 11).to(DEVICE, dtype)
    nf4 = F.nf4_quantize(weight) if packed else None
    pattern = F.choose_support(torch.zeros(96, 128), 0.01, generator=draw)
    most = layer.apart_rows(DEVICE.type, pattern, nf4.block_size if nf4 else None, dtype)
    if DEVICE.type == "cuda" and rows > most:
        pytest.skip(f"a GPU takes {most} rows apart")
    values, bias = torch.randn(pattern.count, generator=draw), torch.randn(96, generator=draw).to(dtype)
    x, dy = (torch.randn(rows, size, generator=draw).to(dtype).to(DEVICE) for size in (128, 96))
    weight = F.nf4_dequantize(nf4) if nf4 else weight
    pattern, values, bias = pattern.to(DEVICE), values.to(DEVICE), bias.to(DEVICE)
    delta = torch.zeros(96 * 128, device=DEVICE).index_put((pattern.indices.long(),), values).reshape(96, 128)

    def formula(x: Tensor, dy: Tensor, delta: Tensor) -> list[Tensor]:
        base = weight.to(x.dtype)
        y = torch.nn.functional.linear(x, base, bias.to(x.dtype)) + torch.nn.functional.linear(x, delta.to(x.dtype))
        dx = dy @ (base.to(delta.dtype) + delta).to(x.dtype)
        dense = dy.to(delta.dtype).T @ x.to(delta.dtype)
        return [y, dx, dense.flatten()[pattern.indices.long()], dy.sum(0, dtype=delta.dtype).to(dy.dtype)]

    leaves = [tensor.detach().requires_grad_() for tensor in (x, values, bias)]
    with Calls() as calls:
        y = F.sparse_delta_linear(leaves[0], nf4 if nf4 else weight, pattern, leaves[1], leaves[2])
    counted = dict(calls.compute)
    actual = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    composed, exact = formula(x, dy, delta), formula(x.double(), dy.double(), delta.double())
    # The weight of dX is rounded to the dtype, which is the operator's; y's is not.
    exact[1] = dy.double() @ (weight.float() + delta).to(dtype).double()
    for name, *row in zip(("y", "dx", "dvalues", "dbias"), actual, composed, exact, strict=True):
        assert_within_budget(f"{name} of {rows} rows {dtype} packed {packed}", *row)
    return counted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_of_a_base_that_is_not_written(rows: int, dtype: torch.dtype, packed: bool) -> None:
    """The base is copied or decoded for dX alone."""
    calls = check_few_rows(rows, dtype, packed)
    assert calls["sparse_delta_product_"] == 1
    assert not {"sparse_delta_patch_", "sparse_delta_patch", "clone", "nf4_dequantize_out"} & calls.keys()


def test_positions_past_32_bits_are_int64() -> None:
    shape, far = (2**17, 2**17), torch.tensor([0, 2**33])
    assert F.SparsePattern(far, shape).indices.tolist() == far.tolist()
    with pytest.raises(TypeError, match="indices: expected int64 for a weight of 17179869184 elements"):
        F.SparsePattern(far[:1].int(), shape)


def test_few_rows_end_where_a_copy_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = PATTERNS["scattered"]().to(DEVICE)  # 20 %
    given = inputs(pattern, F32)
    thin = F.SparsePattern(pattern.indices[::8].contiguous(), SHAPE)
    for support_, values, rows, apart in (
        (pattern, given["values"], 1, False),
        (thin, given["values"][::8], 1, True),
        (thin, given["values"][::8], 0, False),
        (thin, given["values"][::8], 33, False),
    ):
        x = torch.randn(rows, 32, device=DEVICE)
        with Calls() as calls:
            F.sparse_delta_linear(x, given["weight"], support_, values)
        assert calls.compute["sparse_delta_product_"] == apart and calls.compute["sparse_delta_patch"] == (not apart)
    # The definition forms Δ whole: where it is asked for, the weight is patched.
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    with Calls() as calls:
        F.sparse_delta_linear(given["x"][0, :1], given["weight"], thin, given["values"][::8])
    assert calls.compute["sparse_delta_product_"] == 0
    for device_type in ("cpu", "cuda"):
        assert configs.apart_rows(device_type, 0.005) >= 16 >= configs.apart_rows("cuda", 0.02) >= 1
    assert configs.apart_rows("cpu", 0.2) == configs.apart_rows("cuda", 0.2) == 0


def test_nothing_is_recorded_where_nothing_is_trained() -> None:
    """The same bits past autograd as through it."""
    pattern = PATTERNS["columns"]()
    given = inputs(pattern, BF16)
    through = F.sparse_delta_linear(given["x"], given["weight"], pattern, given["values"].requires_grad_())
    with torch.no_grad():
        past = F.sparse_delta_linear(given["x"], given["weight"], pattern, given["values"])
    assert through.requires_grad and not past.requires_grad and torch.equal(through, past)


def test_compute_dtype_and_autocast() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    plain = F.sparse_delta_linear(given["x"], given["weight"], pattern, given["values"], compute_dtype=BF16)
    assert plain.dtype == F32
    with torch.autocast(DEVICE.type, dtype=BF16):
        under = F.sparse_delta_linear(given["x"], given["weight"], pattern, given["values"])
    assert under.dtype == BF16 and torch.equal(under.float(), plain)
    rounded = definition.sparse_delta_patch(given["weight"].to(BF16), pattern.indices, given["values"])
    assert torch.equal(under, torch.nn.functional.linear(given["x"].to(BF16), rounded))


def test_the_base_is_not_written_and_no_dense_copy_is_saved() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    kept = given["weight"].clone()
    x, values = given["x"].requires_grad_(), given["values"].requires_grad_()
    with saved_tensors() as saved:
        y = F.sparse_delta_linear(x, given["weight"], pattern, values, given["bias"])
    known = {t.untyped_storage().data_ptr() for t in (x, given["weight"], values, pattern.indices)}
    assert set(storages(saved)) == known
    y.sum().backward()
    assert torch.equal(given["weight"], kept)


@pytest.mark.parametrize(
    ("name", "columns"), [("columns", 3), ("columns side by side", 3), ("blocks of a column", 16), ("blocks", 32)]
)
def test_columns_save_their_part_of_x(name: str, columns: int) -> None:
    pattern = PATTERNS[name]()
    given = inputs(pattern, F32)
    values = given["values"].requires_grad_()
    with saved_tensors() as saved:
        F.sparse_delta_linear(given["x"], given["weight"], pattern, values)
    found = sum(
        size for at, size in storages(saved).items() if at not in (pattern.indices.data_ptr(), values.data_ptr())
    )
    assert found == 35 * columns * 4


def test_many_blocks_are_one_call() -> None:
    pattern = F.SparsePattern.from_blocks(list(range(0, 24, 2)), 16, (96, 64))
    dy, x = torch.randn(5, 96, device=DEVICE), torch.randn(5, 64, device=DEVICE)
    pattern = pattern.to(DEVICE)
    layer.dvalues(dy, x, pattern, F32)
    with Calls() as calls:
        layer.dvalues(dy, x, pattern, F32)
    assert dict(calls.compute) == {"sparse_delta_blocks": 1}


def test_needs_input_grad_is_honoured() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    with saved_tensors() as saved:
        F.sparse_delta_linear(given["x"].requires_grad_(), given["weight"], pattern, given["values"])
    assert given["x"].untyped_storage().data_ptr() not in storages(saved)


def test_the_backward_forms_no_dense_gradient() -> None:
    """Two products forward and back; the gradient of the values is one operator."""
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    x, values = given["x"].requires_grad_(), given["values"].requires_grad_()
    # On a GPU the first sorts the support by tiles.
    torch.autograd.grad(F.sparse_delta_linear(x, given["weight"], pattern, values), (x, values), given["dy"])
    with Calls() as calls:
        F.sparse_delta_linear(x, given["weight"], pattern, values).backward(given["dy"])
    gradient = "sparse_delta_dvalues_tiled" if DEVICE.type == "cuda" else "sparse_delta_dvalues"
    counted = {name: calls.compute[name] for name in ("mm", "addmm", "sparse_delta_patch", gradient)}
    assert counted == {"mm": 2, "addmm": 0, "sparse_delta_patch": 2, gradient: 1}
    others = set(calls.compute) - set(counted) - {"linear", "_to_copy", "clone", "copy_", "_local_scalar_dense"}
    assert not others, others


@pytest.mark.compiled
def test_compiles_without_a_break() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)

    def call(x: Tensor, weight: Tensor, values: Tensor) -> Tensor:
        return F.sparse_delta_linear(x, weight, pattern, values)

    x, values = given["x"].requires_grad_(), given["values"].requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if DEVICE.type == "cuda":  # which sorts the support by tiles in an eager call alone, and gathers until then
        compiled(x, given["weight"], values).backward(given["dy"])
    expected = call(x, given["weight"], values)
    grads = torch.autograd.grad(expected, (x, values), given["dy"])
    torch._dynamo.reset()
    y = compiled(x, given["weight"], values)
    assert torch.equal(y, expected)
    for one, other in zip(torch.autograd.grad(y, (x, values), given["dy"]), grads, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_changes_nothing() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)

    def call(x: Tensor, values: Tensor) -> Tensor:
        return F.sparse_delta_linear(x, given["weight"], pattern, values)

    leaves = given["x"].requires_grad_(), given["values"].requires_grad_()
    plain = torch.autograd.grad(call(*leaves), leaves, given["dy"])
    y = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, leaves, given["dy"]), plain, strict=True))


def test_empty_x() -> None:
    pattern = PATTERNS["scattered"]()
    given = inputs(pattern, F32)
    values = given["values"].requires_grad_()
    y = F.sparse_delta_linear(given["x"][:0], given["weight"], pattern, values)
    y.sum().backward()
    assert y.shape == (0, 7, 48) and torch.equal(values.grad, torch.zeros_like(values))


def bad_patterns() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    def made(*indices: int, dtype: torch.dtype = torch.int64, shape: Any = (3, 4)) -> Callable[[], Any]:
        return lambda: F.SparsePattern(torch.tensor(indices, dtype=dtype), shape)

    return {
        "unsorted": (ValueError, "indices: expected ascending.*unsorted 5, 2 at 1 and 2", made(1, 5, 2)),
        "repeated": (ValueError, "indices: expected ascending.*repeated 5, 5 at 1", made(1, 5, 5)),
        "negative": (ValueError, "indices: expected none below 0, got -1", made(-1, 5)),
        "beyond": (ValueError, "indices: expected all below 12", made(1, 12)),
        "none": (ValueError, "at least one", made()),
        "dtype": (TypeError, "int32 or int64 tensor, got torch.float32", made(1, dtype=F32)),
        "short": (TypeError, "int32 or int64", made(1, dtype=torch.int16)),
        "no tensor": (TypeError, "got list", lambda: F.SparsePattern([1, 2], (3, 4))),  # type: ignore[arg-type]
        "matrix": (ValueError, "expected a vector", lambda: F.SparsePattern(torch.tensor([[1]]), (3, 4))),
        "strides": (ValueError, "contiguous", lambda: F.SparsePattern(torch.arange(6)[::2], (3, 4))),
        "int32 too narrow": (TypeError, "expected int64", made(1, dtype=torch.int32, shape=(2**16, 2**16))),
        "shape": (ValueError, "shape: expected", made(1, shape=(3,))),
        "shape of words": (TypeError, "shape: expected", made(1, shape="ab")),
        "rows beyond": (ValueError, "rows: expected", lambda: F.SparsePattern.from_rows([3], (3, 4))),
        "columns unsorted": (ValueError, "columns: expected", lambda: F.SparsePattern.from_columns([2, 1], (3, 4))),
        "columns none": (ValueError, "columns: expected", lambda: F.SparsePattern.from_columns([], (3, 4))),
        "block size": (ValueError, "block_size: expected 16", lambda: F.SparsePattern.from_blocks([0], 8, (32, 32))),
        "block divides": (ValueError, "divisor", lambda: F.SparsePattern.from_blocks([0], 32, (48, 32))),
        "block beyond": (ValueError, "blocks: expected", lambda: F.SparsePattern.from_blocks([4], 16, (32, 32))),
        "structure": (ValueError, "structure", lambda: F.SparsePattern(torch.tensor([1]), (3, 4), "rows")),
        "structure's indices": (
            ValueError,
            "indices: expected those of the rows",
            lambda: F.SparsePattern(torch.tensor([1, 2, 3, 4]), (3, 4), "rows", torch.tensor([0])),
        ),
        "meta": (
            ValueError,
            "weight: expected .* got one on meta",
            lambda: F.choose_support(torch.ones(3, 4, device="meta"), 0.5),
        ),
        "scores on meta": (
            ValueError,
            "scores: expected .* got one on meta",
            lambda: F.choose_support(torch.ones(3, 4), 0.5, scores=torch.ones(3, 4, device="meta")),
        ),
        "sparse": (
            TypeError,
            "weight: expected a dense tensor",
            lambda: F.choose_support(torch.ones(3, 4).to_sparse(), 0.5),
        ),
        "density 0": (ValueError, "density: expected a part", lambda: F.choose_support(torch.ones(3, 4), 0.0)),
        "density above 1": (ValueError, "density: expected", lambda: F.choose_support(torch.ones(3, 4), 1.01)),
        "density NaN": (ValueError, "density: expected", lambda: F.choose_support(torch.ones(3, 4), float("nan"))),
        "density's type": (TypeError, "density: expected", lambda: F.choose_support(torch.ones(3, 4), "1")),  # type: ignore[arg-type]
        "support": (ValueError, "support: expected", lambda: F.choose_support(torch.ones(3, 4), 0.5, "best")),
        "scores": (
            ValueError,
            "scores: expected",
            lambda: F.choose_support(torch.ones(3, 4), 0.5, scores=torch.ones(4, 3)),
        ),
    }


@pytest.mark.parametrize("name", bad_patterns())
def test_bad_pattern(name: str) -> None:
    kind, message, call = bad_patterns()[name]
    with pytest.raises(kind, match=message):
        call()


def bad_calls() -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    pattern = PATTERNS["scattered"]()
    return {
        "values length": (ValueError, "values: expected shape", {"values": torch.ones(3)}),
        "values dtype": (TypeError, "values: expected a floating", {"values": torch.ones(pattern.count).int()}),
        "pattern's shape": (
            ValueError,
            "pattern: expected one of shape",
            {"pattern": F.SparsePattern(pattern.indices, (32, 48))},
        ),
        "pattern's type": (TypeError, "pattern: expected a SparsePattern", {"pattern": [1, 2]}),
        "indices": (ValueError, "indices: expected ascending", {"pattern": pattern.indices.flip(0)}),
        "features": (ValueError, "x: expected", {"x": torch.ones(2, 31)}),
        "x's dtype": (TypeError, "x: expected a floating", {"x": torch.ones(2, 32).int()}),
        "weight's dtype": (TypeError, "weight: expected torch.float32 beside x", {"weight": torch.ones(SHAPE).half()}),
        "weight's bytes": (TypeError, "4-bit weight is passed as", {"weight": torch.ones(SHAPE).byte()}),
        "bias": (ValueError, "bias: expected shape", {"bias": torch.ones(47)}),
        "device": (ValueError, "values: expected on", {"values": torch.ones(pattern.count, device="meta")}),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_call(name: str) -> None:
    kind, message, change = bad_calls()[name]
    pattern = PATTERNS["scattered"]()
    given: dict[str, Any] = {**inputs(pattern, F32), "pattern": pattern, **change}
    kept = given["weight"].clone()
    with pytest.raises(kind, match=message):
        F.sparse_delta_linear(*(given[name] for name in ("x", "weight", "pattern", "values", "bias")))
    assert torch.equal(given["weight"], kept)


def test_pattern_from_unsorted_and_its_kin() -> None:
    pattern, order = F.SparsePattern.from_unsorted(torch.tensor([7, 1, 4]), (3, 4))
    assert pattern.indices.tolist() == [1, 4, 7] and order.tolist() == [1, 2, 0]
    assert peftfast.SparsePattern is F.SparsePattern
    assert pattern.count == 3 and pattern.density == 0.25 and "3 of (3, 4), 25 %" in repr(pattern)
    assert pattern.to("cpu") is pattern


def test_tiles_hold_each_position_once() -> None:
    pattern = PATTERNS["scattered"]()
    order, tiles, starts = pattern.tiles(16, 8)
    assert order.sort().values.tolist() == list(range(pattern.count))
    assert pattern.tiles(16, 8)[0] is order
    for tile, first, last in zip(tiles.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        at = pattern.indices[order[first:last].long()]
        assert last > first
        assert set((at // 32 // 16 * 4 + at % 32 // 8).tolist()) == {tile}


def test_blocks_are_where_they_are_said_to_be() -> None:
    mask = torch.zeros(SHAPE)
    for block in (0, 1, 5):
        mask[block // 2 * 16 :, block % 2 * 16 :][:16, :16] = 1
    assert torch.equal(mask.flatten().nonzero()[:, 0].int(), PATTERNS["blocks"]().indices)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_SLAB", 64)


@pytest.mark.parametrize("data", range(12))
def test_streamed_choices_are_the_definitions(data: int, small_slabs: None) -> None:
    """Small integers: ties everywhere, and sums without rounding."""
    generator = torch.Generator().manual_seed(data)
    n, k = (int(torch.randint(1, 40, (1,), generator=generator)) for _ in "nk")
    count = int(torch.randint(1, n * k + 1, (1,), generator=generator))
    weight = torch.randint(-5, 6, (n, k), generator=generator).float()
    if data % 3 == 0:
        weight[0, 0] = float("nan")
    assert torch.equal(support.top_of_matrix(weight, count), definition.top_positions(weight.abs(), count))
    small = support.top_of_matrix(weight, count, largest=False)
    assert torch.equal(small, definition.top_positions(-weight.abs(), count))
    dy, x = (torch.randint(-2, 3, (9, size), generator=generator).float() for size in (n, k))
    taken = torch.randperm(n * k, generator=generator)[: n * k // 5].sort().values
    count = min(count, n * k - taken.numel())
    positions, entries = support.top_of_product(dy, x, count, taken)
    product = dy.T @ x
    assert torch.equal(positions, definition.top_positions(product.abs(), count, taken))
    assert torch.equal(entries, product.flatten()[positions])


@pytest.mark.parametrize(("data", "kind"), list(itertools.product(range(6), KINDS)))
def test_top_of_an_outer_product(data: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(data)
    n, k = (int(torch.randint(1, 40, (1,), generator=generator)) for _ in "nk")
    rows, columns = (torch.rand(size, generator=generator) for size in (n, k))
    if kind == "equal":
        rows, columns = (rows * 4).floor() * 0.3, (columns * 4).floor() * 0.7
    if kind == "zero":
        rows, columns = rows * 0, columns * 0
    if kind == "wide":
        rows, columns = torch.exp2(rows * 250 - 125), torch.exp2(columns * 250 - 125)
    taken = torch.randperm(n * k, generator=generator)[: n * k // 4].sort().values
    count = int(torch.randint(0, n * k - taken.numel() + 1, (1,), generator=generator))
    chosen = support.top_of_outer(rows, columns, count, taken)
    assert torch.equal(chosen, definition.top_positions(torch.outer(rows, columns), count, taken))


def test_distinct_scores_give_torch_topk() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randperm(900, generator=generator).float().reshape(30, 30)
    expected = torch.topk(scores.flatten(), 77).indices.sort().values
    assert torch.equal(support.top_of_matrix(scores, 77, magnitude=False), expected)
    assert torch.equal(F.choose_support(scores, 77 / 900, scores=scores).indices.long(), expected)
    assert torch.equal(F.choose_support(scores, 77 / 900, "largest").indices.long(), expected)
    lowest = torch.topk(scores.flatten(), 77, largest=False).indices.sort().values
    assert torch.equal(F.choose_support(scores, 77 / 900, "smallest").indices.long(), lowest)


@pytest.mark.parametrize("data", range(4))
def test_level_scores_give_torch_topks_scores(data: int, small_slabs: None) -> None:
    """Of equal scores torch.topk promises no place: what it takes of each score is the same, and ours are the first of them."""
    scores = torch.randint(0, 7, (29, 31), generator=torch.Generator().manual_seed(data)).float()
    count = 250 + 100 * data
    found = F.choose_support(scores, count / scores.numel(), scores=scores).indices.long()
    expected = torch.topk(scores.flatten(), count)
    assert torch.equal(scores.flatten()[found].sort().values, expected.values.sort().values)
    bar = expected.values.min()
    above = (scores.flatten() > bar).nonzero()[:, 0]
    level = (scores.flatten() == bar).nonzero()[: count - above.numel(), 0]
    assert torch.equal(found, torch.cat((above, level)).sort().values) and level.numel() > 1


def test_random_support_is_distinct_and_even() -> None:
    counts = torch.zeros(12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        found = support.random_positions(4, (3, 4), torch.device("cpu"), generator)
        assert found.unique().numel() == 4 and torch.equal(found, found.sort().values)
        counts[found] += 1
    assert (counts / 600 - 4 / 12).abs().max() < 0.07
    assert support.random_positions(12, (3, 4), torch.device("cpu"), generator).tolist() == list(range(12))


def test_choosing_holds_no_matrix_of_scores() -> None:
    """The largest allocation while 1 % of a 2000 x 1000 product is chosen stays far under its 8 MB."""
    dy, x = torch.randn(8, 2000), torch.randn(8, 1000)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        support.top_of_product(dy, x, 20000)
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert 0 < largest <= 8 * support._SLAB + 8 * 1000, largest


def test_dvalues_function_agrees_with_the_operator() -> None:
    pattern = PATTERNS["blocks"]()
    dy, x = torch.randn(9, 48, device=DEVICE), torch.randn(9, 32, device=DEVICE)
    expected = definition.sparse_delta_dvalues(dy, x, pattern.indices, F32)
    assert torch.allclose(layer.dvalues(dy, x, pattern, F32), expected, atol=1e-5)
