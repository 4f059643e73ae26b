"""A product of a few rows with a 4-bit weight on every backend, the routes of many rows, and what the switches keep."""

import contextlib
import dataclasses
import random
from typing import Any

import pytest
import torch
from peftfast.kernels.numerics import INTERPRETED
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import peftfast.functional as F
from peftfast.configs import nf4 as configs
from peftfast.ops import lora as lora_ops
from peftfast.ops import nf4 as nf4_ops
from peftfast.ops import nf4_linear as ops
from peftfast.reference import nf4 as definition
from tests.support.budget import assert_within_budget
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64
from tests.support.mutants import Mutant, plant

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


@dataclasses.dataclass(frozen=True)
class Case:
    M: int = 5
    N: int = 37
    K: int = 192
    R: int = 6
    x: torch.dtype = F32
    adapter: torch.dtype = F32
    compute: torch.dtype = BF16
    out: torch.dtype = F32
    block_size: int = 64
    nested: bool = True
    bias: bool = True
    lora_bias: bool = True
    strided: bool = False
    adapted: bool | None = None  # without ranks not, if it is not said: an adapter of none adds its bias
    data: int = 0


def arguments_of(case: Case) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7000 + case.data)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    rows = torch.rand(case.N, 1, generator=generator).to(DEVICE) * 2 + 0.1
    weight = F.nf4_quantize(
        normal(case.N, case.K) * rows / max(case.K, 1) ** 0.5, block_size=case.block_size, double_quant=case.nested
    )
    x = normal(case.M, case.K).to(case.x)
    lora_a, lora_b = normal(case.R, case.K) / max(case.K, 1) ** 0.5, normal(case.N, case.R) / max(case.R, 1) ** 0.5
    adapter = [lora_a.to(case.adapter), lora_b.to(case.adapter)]
    if case.strided:
        x = normal(case.K, case.M).to(case.x).T
        adapter = [adapter[0].T.contiguous().T, adapter[1].T.contiguous().T]
    bias = normal(case.N) if case.bias else None
    adapted = case.R > 0 if case.adapted is None else case.adapted
    lora_bias = normal(case.N).to(case.adapter) if case.lora_bias and adapted else None
    given = adapter if adapted else [None, None]
    return (x, *weight.storage(), bias, *given, lora_bias, 0.75, case.compute, case.out)


def expected_of(arguments: tuple[Any, ...], exact: bool) -> tuple[Tensor, Tensor]:
    """By torch's operators in the compute dtype, or in float64 with the weight a float32 product unrounded."""
    x, packed, absmax, code, block_size, shape, *nested, bias, lora_a, lora_b, lora_bias, scaling, compute, out = (
        arguments
    )
    dtype = F32 if exact else compute
    dense = definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), dtype, *nested)
    if exact:
        x, dense, bias, lora_a, lora_b, lora_bias = (
            None if t is None else t.double() for t in (x, dense, bias, lora_a, lora_b, lora_bias)
        )
    y, s = definition.nf4_linear(x if exact else x.to(compute), dense, bias, lora_a, lora_b, lora_bias, scaling)
    y = y if exact else y.to(out)
    return y, x.new_empty((x.shape[0], 0)) if s is None else s


def check_linear(case: Case, backend: str | None = None) -> None:
    """The largest error of a handful of values is luck: small results are looked at together with those of other data, interpreted
    (a data set takes seconds) with as many as make them no handful, and with the rest where those were without luck."""
    fewest = case.M * min(case.N, case.R or case.N)
    sets = 16 if fewest < 64 else 1
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"y": [], "s": []}

    def compare(count: int) -> None:
        for data in range(case.data + len(pooled["y"]), case.data + count):
            arguments = arguments_of(dataclasses.replace(case, data=data))
            with pytest.MonkeyPatch.context() as asked:
                if backend is not None:
                    asked.setenv("PEFTFAST_BACKEND", backend)
                results = ops.nf4_linear(*arguments)
            assert [t.dtype for t in results] == [case.out, case.compute]
            composed, exact = expected_of(arguments, False), expected_of(arguments, True)
            for name, *values in zip(pooled, results, composed, exact, strict=True):
                pooled[name].append(tuple(values))  # type: ignore[arg-type]
        for name, rows in pooled.items():
            assert_within_budget(f"{name} of {case}", *(torch.cat(column) for column in zip(*rows, strict=True)))

    if backend == "triton" and sets > 1 and INTERPRETED:
        with contextlib.suppress(AssertionError):
            return compare(min(sets, -(-64 // max(fewest, 1))))
    compare(sets)


TELLING = (
    Case(),
    Case(M=1, K=160, R=3, compute=F32, x=F16, data=1),
    Case(M=9, N=19, K=66, R=17, compute=F16, x=F16, out=F16, adapter=F16, nested=False, data=2),
    Case(M=17, N=70, K=256, x=BF16, out=BF16, strided=True, data=3),
)


def random_cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    dtypes = (F32, BF16, F16)
    return [
        Case(
            M=draw.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31)),
            N=draw.choice((1, 2, 3, 5, 31, 32, 33, 64, 67, 100)),
            K=draw.choice((1, 2, 33, 63, 64, 65, 96, 128, 160, 256, 384, 1000)),
            R=draw.choice((0, 1, 4, 7, 16, 33)),
            x=draw.choice(dtypes),
            adapter=draw.choice(dtypes),
            compute=draw.choice(dtypes),
            out=draw.choice(dtypes),
            block_size=draw.choice((32, 64, 64, 128, 256, 4096)),
            nested=draw.random() < 0.6,
            bias=draw.random() < 0.5,
            lora_bias=draw.random() < 0.5,
            strided=draw.random() < 0.2,
            data=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("first", range(0, 240, 60))
def test_linear(first: int) -> None:
    for case in random_cases(240, seed=1)[first : first + 60]:
        check_linear(case)


@pytest.mark.parametrize("compute", [F32, BF16, F16])
@pytest.mark.parametrize("backend", [None, on_triton])
def test_an_adapter_without_ranks_still_adds_its_bias(backend: str | None, compute: torch.dtype) -> None:
    for K in (192, 66):
        check_linear(Case(K=K, R=0, compute=compute, adapted=True), backend)


@pytest.mark.parametrize("compute", [F32, BF16, F16])
@pytest.mark.parametrize(("k", "block_size"), [(192, 64), (256, 64), (320, 128), (128, 256), (64, 32)])
def test_rows_of_the_identity_give_the_weight(compute: torch.dtype, k: int, block_size: int) -> None:
    """Bit for bit what the dequantiser gives, for every number of rows that a CPU kernel takes at once: rounded to bfloat16 where
    such numbers are multiplied, in float32 where the kernels multiply that."""
    if DEVICE.type != "cpu":
        pytest.skip("the kernels of a CPU")
    dot = compute == BF16 and k % 64 == 0 == block_size % 64 and torch.ops.peftfast_cpu.nf4_linear_has_dot()
    generator = torch.Generator().manual_seed(k)
    for nested in (False, True):
        nf4 = F.nf4_quantize(
            torch.randn(35, k, generator=generator).to(DEVICE), block_size=block_size, double_quant=nested
        )
        dense, eye = F.nf4_dequantize(nf4, BF16 if dot else F32).float(), torch.eye(k, device=DEVICE).to(compute)
        first = 0
        for rows in (*range(1, 18), 33):
            x = eye.roll(-first, 0)[:rows]
            y, _ = ops.nf4_linear(x, *nf4.storage(), None, None, None, None, 1.0, compute, F32)
            assert torch.equal(y, dense.T.roll(-first, 0)[:rows])
            first = (first + rows) % k


@pytest.mark.slow
@pytest.mark.interpreter
def test_linear_triton() -> None:
    for case in (
        *TELLING,
        Case(M=3, N=70, K=256, x=F32, block_size=32, data=4),
        Case(M=20, K=128, compute=F16, block_size=256),
    ):
        check_linear(case, "triton")
    served = random_cases(400, seed=2)
    served = [
        case for case in served if ops.triton_serves(case.K, case.block_size, case.compute)[0] and case.M * case.N > 64
    ]
    assert len(served) > 10
    for case in served[:8]:
        check_linear(case, "triton")


@pytest.mark.parametrize("case", TELLING, ids=str)
def test_opcheck(case: Case) -> None:
    opcheck(ops.nf4_linear.overload, arguments_of(case))


def test_a_long_row_keeps_within_the_budget() -> None:
    """Sums of one sign over many columns, where one float32 total would lose bits; of several data sets at once, since the largest of
    six errors is luck."""
    for compute in (F32, BF16):
        case = Case(M=2, N=3, K=40960, R=2, compute=compute, bias=False, lora_bias=False)
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"y": [], "s": []}
        for data in range(8):
            x, *rest = arguments_of(dataclasses.replace(case, data=data))
            arguments = (x.abs(), *rest)
            composed, exact = expected_of(arguments, False), expected_of(arguments, True)
            for name, *values in zip(found, ops.nf4_linear(*arguments), composed, exact, strict=True):
                found[name].append(tuple(values))  # type: ignore[arg-type]
        for name, rows in found.items():
            assert_within_budget(name, *(torch.cat(column) for column in zip(*rows, strict=True)))


def test_few_rows_do_not_depend_on_threads() -> None:
    if DEVICE.type != "cpu":
        pytest.skip("asks the CPU kernels")
    arguments = arguments_of(Case(M=3, N=517, K=512, R=16))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.nf4_linear(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def bad_calls() -> dict[str, tuple[str, dict[int, Any]]]:
    return {
        "x shape": ("x: expected floating", {0: torch.zeros(5, 191, device=DEVICE)}),
        "x dtype": ("x: expected floating", {0: torch.zeros(5, 192, device=DEVICE, dtype=torch.int32)}),
        "shape": ("expected", {5: (37 * 192,)}),
        "bias": ("bias: expected floating", {9: torch.zeros(36, device=DEVICE)}),
        "lora_a": ("lora_a: expected floating", {10: torch.zeros(6, 191, device=DEVICE)}),
        "lora_b": ("lora_b: expected floating", {11: torch.zeros(37, 5, device=DEVICE)}),
        "one factor": ("expected both or none", {11: None}),
        "lora_bias": ("lora_bias: expected floating", {12: torch.zeros(3, device=DEVICE)}),
        "lora_bias alone": ("lora_bias: expected an adapter", {10: None, 11: None}),
        "device": ("expected all tensors on", {9: torch.zeros(37, device="meta")}),
        "compute": ("compute: expected a floating dtype", {14: torch.int8}),
        "dtype": ("dtype: expected a floating dtype", {15: torch.int8}),
        "packed": ("packed: expected", {1: torch.zeros(5, 1, dtype=torch.uint8, device=DEVICE)}),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_contract(name: str) -> None:
    message, changes = bad_calls()[name]
    arguments = list(arguments_of(Case()))
    for position, value in changes.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.nf4_linear(*arguments)


@pytest.mark.parametrize(("rows", "taken"), [(2**30, True), (2**30 + 1, False)])
def test_the_cuda_kernel_counts_a_weight_in_32_bits(rows: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_cuda", lambda *tensors: (True, ""))
    x, packed = torch.zeros(1, 128, device="meta"), torch.empty(0, dtype=torch.uint8)
    ok, reason = ops._cuda_accepts(x, packed, x, x, 64, (rows, 128), *[None] * 7, 1.0, BF16, BF16)
    assert ok == taken and ("2^37 elements" in reason) == (not taken)


@pytest.mark.parametrize("which", ["x", "packed", "lora_a", "absmax"])
def test_the_cuda_kernel_reads_16_bytes_at_a_time(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x, packed and lora_a; the others may begin anywhere."""
    monkeypatch.setattr(ops, "takes_cuda", lambda *tensors: (True, ""))
    tensors = {
        name: torch.zeros(256, dtype=BF16)[name == which :][:128] for name in ("x", "packed", "absmax", "lora_a")
    }
    x, packed, absmax, lora_a = tensors.values()
    rest = (packed, absmax, packed, 64, (2, 128), *[None] * 4, lora_a, None, None, 1.0, BF16, BF16)
    ok, reason = ops._cuda_accepts(x[None], *rest)
    assert ok == (which == "absmax") and ("16 bytes" in reason) == (not ok)


def _argument(position: int, change: Any) -> Any:
    def fault(run: Any, *given: Any) -> Any:
        changed = list(given)
        if changed[position] is not None:
            changed[position] = change(changed[position])
        return run(*changed)

    return fault


MUTANTS = [
    Mutant(name, ops.nf4_linear, fault)
    for name, fault in {
        "row shifted": _argument(0, lambda x: x.roll(1, 0) if x.shape[0] > 1 else x * 1.1),
        "last column forgotten": _argument(0, lambda x: torch.cat((x[:, :-1], x[:, -1:] * 0), 1)),
        "columns swapped in pairs": _argument(0, lambda x: x.reshape(x.shape[0], -1, 2).flip(-1).reshape(x.shape)),
        "byte shifted": _argument(1, lambda packed: packed.roll(1, 0)),
        "block shifted": _argument(2, lambda absmax: absmax.roll(1)),
        "nested offset missing": _argument(8, lambda offset: offset * 0),
        "bias forgotten": _argument(9, lambda bias: None),
        "a shifted": _argument(10, lambda a: a.roll(1, 0)),
        "last rank forgotten": _argument(11, lambda b: torch.cat((b[:, :-1], b[:, -1:] * 0), 1)),
        "lora_bias forgotten": _argument(12, lambda bias: None),
        "lora_bias unscaled": _argument(12, lambda bias: bias / 0.75),
        "scaling missing": _argument(13, lambda scaling: 1.0),
        "scaling twice": _argument(13, lambda scaling: scaling * scaling),
        "s scaled": lambda run, *given: (lambda y, s: (y, s * given[13]))(*run(*given)),
        "last row of the weight forgotten": lambda run, *given: (
            lambda y, s: (torch.cat((y[:, :-1], y[:, -1:] * 0), 1), s)
        )(*run(*given)),
    }.items()
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError, match="over the budget"):
        for case in TELLING:
            check_linear(case)


def layer_tensors(rows: int, x_dtype: torch.dtype = F32) -> tuple[Tensor, F.NF4Weight, list[Tensor]]:
    x, *storage, bias, lora_a, lora_b, lora_bias, _, _, _ = arguments_of(Case(M=rows, x=x_dtype))
    packed, absmax, code, block_size, shape, *nested = storage
    weight = F.NF4Weight(packed, absmax, code, block_size, shape, F32, "nf4", *nested)
    return x.requires_grad_(), weight, [t.requires_grad_() for t in (lora_a, lora_b, bias, lora_bias)]


def layer(x: Tensor, weight: F.NF4Weight, leaves: list[Tensor], **options: Any) -> Tensor:
    lora_a, lora_b, bias, lora_bias = leaves
    return F.lora_linear(x, weight, lora_a, lora_b, scaling=0.75, bias=bias, lora_bias=lora_bias, **options)


def check_layer(rows: int, x_dtype: torch.dtype, autocast: bool, **options: Any) -> None:
    """y and all gradients against float64, and what composed torch gives."""
    x, weight, leaves = layer_tensors(rows, x_dtype)
    with torch.autocast(DEVICE.type, BF16, enabled=autocast):
        y = layer(x, weight, leaves, **options)
    compute = BF16 if autocast else options.get("compute_dtype") or x_dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(y.dtype)
    actual = (y.detach(), *torch.autograd.grad(y, (x, *leaves), dy))
    results = []
    for dtype in (compute, F64):
        dense = F.nf4_dequantize(weight, F32 if dtype == F64 else dtype).to(dtype)
        copies = [t.detach().to(F64 if dtype == F64 else t.dtype).requires_grad_() for t in (x, *leaves)]
        a, b, bias, lora_bias = (t.to(dtype) for t in copies[1:])
        z, _ = definition.nf4_linear(copies[0].to(dtype), dense, bias, a, b, lora_bias, 0.75)
        z = z if dtype == F64 else z.to(y.dtype)
        results.append((z.detach(), *torch.autograd.grad(z, copies, dy.to(z.dtype))))
    names = ("y", "x", "lora_a", "lora_b", "bias", "lora_bias")
    for name, one, composed, exact in zip(names, actual, *results, strict=True):
        assert_within_budget(f"{name}, {rows} rows", one, composed, exact)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": BF16}])
def test_a_layer_of_few_rows_and_its_gradients(rows: int, options: dict[str, Any]) -> None:
    check_layer(rows, F32, False, **options)


@pytest.mark.parametrize("route", ["expand", "accumulate", "concatenate"])
@pytest.mark.parametrize(("x_dtype", "autocast"), [(F32, True), (BF16, False), (BF16, True)])
def test_routes_of_many_rows(route: str, x_dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.ADAPTER_ROUTES, DEVICE.type, route)
    check_layer(70, x_dtype, autocast)


def test_routes_make_the_calls_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass over y beside the products, but for the default."""
    x, weight, leaves = layer_tensors(70)
    seen = {}
    for route in ("expand", "accumulate", "concatenate"):
        monkeypatch.setitem(configs.ADAPTER_ROUTES, DEVICE.type, route)
        with torch.autocast(DEVICE.type, BF16), torch.no_grad(), Calls() as calls:
            layer(x, weight, leaves)
        seen[route] = {
            name: count for name, count in calls.compute.items() if "mm" in name or "lora_" in name or "nf4" in name
        }
    assert seen["expand"] == {"nf4_dequantize_out": 1, "addmm": 1, "lora_shrink": 1, "lora_expand_": 1}
    assert seen["accumulate"] == {"nf4_dequantize_out": 1, "addmm": 1, "addmm_": 1, "lora_shrink": 1}
    assert seen["concatenate"] == {"nf4_dequantize_out": 1, "addmm": 1, "lora_shrink": 1}


@pytest.mark.parametrize("route", ["expand", "accumulate"])
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_routes_of_dx(route: str, x_dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget; without a pass over dX where nothing is dropped and dX has the product's dtype, and only there."""
    monkeypatch.setitem(configs.GRADIENT_ROUTES, DEVICE.type, route)
    if p == 0.0:
        check_layer(70, x_dtype, x_dtype == F32)
    x, weight, leaves = layer_tensors(70, x_dtype)
    y = layer(x, weight, leaves, compute_dtype=BF16, dropout_p=p, seed=3)
    with Calls() as calls:
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    passes = calls.compute.get("lora_expand_", 0) + calls.compute.get("lora_expand", 0)
    assert dx.dtype == x_dtype and passes == (0 if route == "accumulate" and x_dtype == BF16 and p == 0.0 else 1)
    with monkeypatch.context() as patch:
        patch.setitem(configs.GRADIENT_ROUTES, DEVICE.type, "expand")
        again = torch.autograd.grad(
            layer(x, weight, leaves, compute_dtype=BF16, dropout_p=p, seed=3), x, torch.ones_like(y)
        )
    torch.testing.assert_close(dx, again[0], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("autocast", [False, True])
def test_slabs(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a weight in place of the whole: the budget holds, the last is shorter, and no buffer is larger than a slab."""
    check_layer(70, F32, autocast)
    case = Case(M=70, N=150, K=192)
    x, *storage, bias, lora_a, lora_b, lora_bias, _, _, _ = arguments_of(case)
    packed, absmax, code, block_size, shape, *nested = storage
    weight = F.NF4Weight(packed, absmax, code, block_size, shape, F32, "nf4", *nested)
    seen = {}
    for limit in (0, 64 * 192 * 4):
        monkeypatch.setitem(configs.SLAB_BYTES, DEVICE.type, limit)
        with torch.autocast(DEVICE.type, BF16, enabled=autocast), torch.no_grad(), Calls() as calls:
            y = F.nf4_linear(x, weight, bias)
            z = layer(x, weight, [lora_a, lora_b, bias, lora_bias])
            w = F.nf4_linear(x, weight)
        slabs = 1 if limit == 0 else 3 if not autocast else 2
        assert calls.compute["nf4_dequantize_out"] == 3 * slabs
        seen[limit] = y, z, w
    for one, other in zip(*seen.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert configs.slab_rows(DEVICE.type, 150, 192, 4) == 64 and configs.slab_rows(DEVICE.type, 64, 192, 4) == 64
    assert configs.slab_rows("other", 150, 192, 4) == 150


def test_few_rows_are_one_operator() -> None:
    x, weight, leaves = layer_tensors(3)
    on_gpu = DEVICE.type == "cuda"  # which multiplies on tensor cores, of 16 bits
    with torch.no_grad(), torch.autocast(DEVICE.type, BF16, enabled=on_gpu), Calls() as calls:
        layer(x, weight, leaves)
        F.nf4_linear(x, weight, leaves[2])
    assert calls.compute["nf4_linear"] == 2 and set(calls.compute) <= {"nf4_linear", *(["_to_copy"] if on_gpu else [])}


def test_where_few_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    most = ops.most_rows(DEVICE.type, 192, 64, BF16)
    dot = DEVICE.type == "cpu" and torch.ops.peftfast_cpu.nf4_linear_has_dot()
    assert most == configs.FEW_ROWS["cpu dot" if dot else "cpu"] or DEVICE.type == "cuda"
    if DEVICE.type == "cpu":
        for k, block_size, compute in ((192, 64, F32), (192, 64, F16), (200, 64, BF16), (192, 32, BF16)):
            assert ops.most_rows("cpu", k, block_size, compute) == configs.FEW_ROWS["cpu"]
    assert ops.most_rows(DEVICE.type, 192, 64, F64) == 0
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    assert ops.most_rows(DEVICE.type, 192, 64, BF16) == 0
    assert ops.triton_serves(96, 64, BF16)[1] and ops.triton_serves(96, 32, F32)[1]
    assert ops.triton_serves(96, 32, BF16) == (True, "")
    assert ops.cuda_serves(65, 256, 64, BF16)[1] and ops.cuda_serves(1, 200, 64, BF16)[1]
    assert ops.cuda_serves(1, 256, 64, F32)[1] and ops.cuda_serves(64, 256, 64, F16) == (True, "")


@pytest.mark.parametrize("rows", [3, 70])
def test_compiles_whole(rows: int) -> None:
    x, weight, leaves = layer_tensors(rows)
    compiled = torch.compile(
        lambda x: layer(x, weight, leaves) + F.nf4_linear(x, weight), backend="aot_eager", fullgraph=True
    )
    expected = layer(x, weight, leaves) + F.nf4_linear(x, weight)
    torch.testing.assert_close(compiled(x), expected)
    dy = torch.ones_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (compiled(x), expected)))


@pytest.mark.parametrize("adapter", [False, True])
def test_shared_dequantization(adapter: bool) -> None:
    """Gradients are what they were; under checkpointing the backward dequantises once instead of twice; the dense weight is what is
    kept, no more."""
    x, weight, leaves = layer_tensors(70)

    def call(x: Tensor) -> Tensor:
        return layer(x, weight, leaves) if adapter else F.nf4_linear(x, weight, leaves[2])

    plain = torch.autograd.grad(call(x).square().sum(), x)[0]
    dense = weight.shape.numel() * 4
    counts, kept = {}, {}
    for shared in (False, True):
        with F.shared_dequantization() if shared else torch.enable_grad():
            with saved_tensors() as saved:
                call(x)
            kept[shared] = sum(storages(saved).values())
            y = checkpoint(call, x, use_reentrant=False)
            with Calls() as calls:
                (grad,) = torch.autograd.grad(y.square().sum(), x)
        counts[shared] = calls.compute["nf4_dequantize_out"]
        assert torch.equal(grad, plain)
    assert counts == {False: 2, True: 1}
    assert kept[True] - kept[False] == dense
    with torch.no_grad(), F.shared_dequantization(), saved_tensors() as saved:
        call(x)
    assert not saved


def test_merged_dequantization() -> None:
    x, weight, leaves = layer_tensors(70)
    lora_a, lora_b, bias, lora_bias = leaves
    merged = (F.nf4_dequantize(weight).double() + 0.75 * lora_b.double() @ lora_a.double()).detach()
    exact = (x.double() @ merged.T + bias.double() + 0.75 * lora_bias.double()).detach()
    with torch.no_grad(), F.merged_dequantization(), Calls() as calls:
        y = layer(x, weight, leaves, compute_dtype=BF16)
    assert {"lora_shrink", "lora_expand", "lora_expand_"}.isdisjoint(calls.compute)
    composed = torch.nn.functional.linear(x.bfloat16(), merged.bfloat16(), (bias + 0.75 * lora_bias).bfloat16()).float()
    assert_within_budget("merged", y, composed.detach(), exact)
    with F.merged_dequantization():  # a gradient is recorded, or something is dropped: the ordinary way
        assert layer(x, weight, leaves).requires_grad
        with torch.no_grad(), Calls() as calls:
            layer(x, weight, leaves, dropout_p=0.5)
    assert calls.compute["lora_shrink"] == 1
    with torch.no_grad(), Calls() as calls:
        layer(x, weight, leaves)
    assert calls.compute["lora_shrink"] == 1


def test_operators_are_there() -> None:
    assert {row.backend for row in ops.nf4_linear.implementations} == {"cuda", "cpu", "triton", "reference"}
    for operator in (nf4_ops.nf4_dequantize_out, nf4_ops.nf4_quantize, nf4_ops.nf4_nest):
        assert [row.backend for row in operator.implementations] == ["cuda", "cpu", "triton", "reference"]
    assert all(row.backend != "cuda" for row in lora_ops.lora_shrink.implementations)
