"""Groups of projections, several adapters in one batch, and DoRA: values, gradients, what they save and what they call."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftfast.functional as F
from peftfast.configs.device import Device
from peftfast.functional import dora, lora_group
from peftfast.ops import backends
from peftfast.reference import lora as definition
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.group_checks import (
    BATCH,
    DORA,
    QKV,
    TELLING,
    GroupCase,
    Part,
    check_group,
    define,
    gradients,
    results,
    run,
    tensors_of,
    upstream,
)
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64, Results, check_results

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)
KINDS = {
    "float32": {},
    "bfloat16": {"x": BF16, "adapter": BF16},
    "peft": {"x": BF16},
    "qlora": {"compute": BF16},
    "float16": {"x": F16},
}
GROUPS = {
    "qkv": GroupCase(QKV),
    "dora": GroupCase(DORA),
    "several active": GroupCase(BATCH, batch=True),
    "mixed rows": GroupCase(BATCH, batch=True, named="rows"),
    "mixed batch": GroupCase(BATCH, batch=True, named="leading"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weight", ["dense", "nested"])
def test_values_and_gradients(group: str, kind: str, weight: str) -> None:
    case = GROUPS[group]
    parts = tuple(dataclasses.replace(part, weight=weight) for part in case.parts)
    check_group(dataclasses.replace(case, parts=parts, **KINDS[kind]))


@pytest.mark.parametrize("shape", [(67,), (1, 67), (0, 67), (31, 67), (2, 3, 5, 67), (4, 1)])
@pytest.mark.parametrize("group", GROUPS)
def test_shapes_of_x(group: str, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and GROUPS[group].named != "all":
        pytest.skip("rows name indices of a leading dimension, which a vector has not")
    check_group(dataclasses.replace(GROUPS[group], shape=shape))


@pytest.mark.parametrize("layout", ["transposed", "wide", "spaced"])
@pytest.mark.parametrize("group", GROUPS)
def test_strides(group: str, layout: str) -> None:
    check_group(dataclasses.replace(GROUPS[group], shape=(23, 67), layout=layout))


@pytest.mark.parametrize("asked", [on_triton, "reference"])
@pytest.mark.parametrize("case", TELLING, ids=lambda case: f"data{case.data}")
def test_the_other_backends(asked: str, case: GroupCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    check_group(dataclasses.replace(case, shape=(2, 7, 67)))


FROZEN = [
    ("lora_a",),
    ("lora_b",),
    ("lora_a", "lora_b"),
    ("bias", "lora_bias"),
    ("magnitude",),
    ("lora_a", "lora_b", "bias", "lora_bias", "magnitude"),
]


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
@pytest.mark.parametrize("group", GROUPS)
def test_frozen_tensors(group: str, frozen: tuple[str, ...], needs_x: bool) -> None:
    """Frozen in every part, and in the first alone, which leaves a subset of terms."""
    for parts in (
        tuple(dataclasses.replace(part, frozen=frozen) for part in GROUPS[group].parts),
        (dataclasses.replace(GROUPS[group].parts[0], frozen=frozen), *GROUPS[group].parts[1:]),
    ):
        check_group(dataclasses.replace(GROUPS[group], parts=parts, needs_x=needs_x, shape=(9, 67)))


def test_a_trained_weight_beside_dora() -> None:
    case = GroupCase((Part(N=20, R=4, p=0.3, magnitude=True), Part(N=20, R=4, p=0.0, magnitude=True)), shape=(40, 33))
    tensors = tensors_of(case)
    for i in range(2):
        tensors[f"weight{i}"].requires_grad_()
    dys = upstream(case, run(case, tensors))
    actual = gradients(run(case, tensors), tensors, dys)
    expected = gradients(define(case, tensors, F32, F32), tensors, dys)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_an_output_that_nobody_uses() -> None:
    case = GroupCase(QKV)
    for used in ((1,), (0, 2)):
        tensors = tensors_of(case)
        ys = run(case, tensors)
        dys = upstream(case, ys)
        chosen = ([ys[i] for i in used], tensors, [dys[i] for i in used])
        found, expected = gradients(*chosen), None
        exact = define(case, tensors, F32, F32)
        expected = gradients([exact[i] for i in used], tensors, [dys[i] for i in used])
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def calls_of(case: GroupCase) -> tuple[dict[str, int], dict[str, int]]:
    tensors = tensors_of(case)
    with Calls() as forward:
        ys = run(case, tensors, seeded=False)
    dys = upstream(case, ys)
    with Calls() as backward:
        gradients(ys, tensors, dys)
    return forward.compute, backward.compute


PLAIN = tuple(Part(N=n, R=4, p=0.1, weight="dense") for n in (48, 16, 16))


def test_counts_of_a_group() -> None:
    """One S pass, one dA pass, one pass over dX beside the products, which add to it as they are formed."""
    forward, backward = calls_of(GroupCase(PLAIN))
    assert forward == {"randint": 1, "lora_terms_shrink": 1, "mm": 3, "lora_expand_": 3}
    assert backward == {
        "lora_dy_grads": 3,
        "mm": 1,
        "addmm_": 2,
        "cat": 1,
        "lora_terms_expand_": 1,
        "lora_terms_weight_grad": 1,
    }


@pytest.mark.interpreter
@pytest.mark.parametrize("lora_bias", [False, True])
def test_launches_of_a_group(lora_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine launches forward and at most fourteen backward for three projections, all that torch launches among them, with the
    configurations of a large GPU, where every sum is cut and its parts are added. The kernels are counted, not run."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    monkeypatch.setattr(backends, "_INTERPRETED_DEVICE", Device("", (9, 0), 132))
    launches: list[str] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: launches.append(self.fn.__name__))
    parts = tuple(Part(N=n, R=16, p=0.1, lora_bias=lora_bias) for n in (1024, 512, 512))
    case = GroupCase(parts, shape=(2048, 1024), x=BF16)
    tensors = tensors_of(case)

    def torchs(calls: Calls) -> int:
        return sum(count for name, count in calls.compute.items() if not name.startswith("lora_"))

    with Calls() as forward:
        ys = run(case, tensors, seeded=False)
    first = len(launches)
    dys = upstream(case, ys)
    with Calls() as backward:
        gradients(ys, tensors, dys)
    assert "_reduce_partials_kernel" in launches[:first] and "_reduce_two_kernel" in launches[first:]
    assert first + torchs(forward) <= 9, (launches, forward.compute)
    # The gradients of three biases of adapters are sums of their own, and three scalings and casts.
    assert len(launches) - first + torchs(backward) <= 14 + 9 * lora_bias, (launches, backward.compute)


@pytest.mark.parametrize("named", ["all", "rows"])
def test_counts_of_a_batch(named: str) -> None:
    forward, backward = calls_of(GroupCase(PLAIN, batch=True, named=named, shape=(33, 67)))
    forward.pop("randint")
    forward = {name: n for name, n in forward.items() if name not in ("_to_copy", "min", "max", "_local_scalar_dense")}
    assert forward == {"mm": 1, "lora_terms_shrink": 1, "lora_terms_expand_": 1}
    assert backward == {"lora_terms_dy_grads": 1, "mm": 1, "lora_terms_expand_": 1, "lora_terms_weight_grad": 1}


def test_saved_tensors() -> None:
    """x once, S once, the seeds, and the parameters' own storages."""
    case = GroupCase(QKV)
    tensors = tensors_of(case)
    with saved_tensors() as saved:
        run(case, tensors, seeded=False)
    given = storages([t for t in tensors.values() if isinstance(t, Tensor)])
    beyond = {address: size for address, size in storages(saved).items() if address not in given}
    assert sorted(beyond.values()) == [3 * 8, 33 * 16 * 4]
    assert tensors["x"].untyped_storage().data_ptr() in storages(saved)


def test_dora_saves_its_product_only_for_the_magnitude() -> None:
    def beyond(frozen: tuple[str, ...]) -> list[int]:
        case = GroupCase((Part(N=40, R=4, p=0.3, magnitude=True, frozen=frozen),), shape=(50, 67))
        tensors = tensors_of(case)
        with saved_tensors() as saved:
            run(case, tensors)
        given = storages([t for t in tensors.values() if isinstance(t, Tensor)])
        return [size for address, size in storages(saved).items() if address not in given]

    assert 50 * 40 * 4 in beyond(())
    assert 50 * 40 * 4 not in beyond(("magnitude",)) and 50 * 67 * 4 not in beyond(())


@pytest.mark.parametrize("group", GROUPS)
def test_same_bits_every_run(group: str) -> None:
    case = dataclasses.replace(GROUPS[group], shape=(300, 384))
    tensors = tensors_of(case)
    dys = upstream(case, run(case, tensors))

    def once() -> list[Tensor]:
        ys = run(case, tensors)
        return [*ys, *gradients(ys, tensors, dys).values()]

    first = once()
    assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))


def test_a_group_is_its_layers() -> None:
    """With the masks of its members' seeds a group gives what lora_linear gives one by one, bit for bit where the operators are the
    same."""
    case = GroupCase(QKV)
    tensors = tensors_of(case)
    for i, (part, y) in enumerate(zip(case.parts, run(case, tensors), strict=True)):
        alone = F.lora_linear(
            tensors["x"],
            *(tensors[f"{name}{i}"] for name in ("weight", "lora_a", "lora_b")),
            scaling=part.scaling,
            bias=tensors[f"bias{i}"],
            lora_bias=tensors[f"lora_bias{i}"],
            dropout_p=part.p,
            seed=case.seed(i),
        )
        assert torch.equal(alone, y)


def test_rows_that_name_no_adapter_are_the_base() -> None:
    case = GroupCase(BATCH, batch=True, named="rows", shape=(40, 67))
    tensors = tensors_of(case)
    (y,) = run(case, tensors)
    base = torch.nn.functional.linear(tensors["x"], tensors["weight0"], tensors["bias0"])
    free = case.rows == -1
    assert free.any() and torch.equal(y[free], base[free])
    for t in range(len(case.parts)):
        assert not torch.equal(y[case.rows == t], base[case.rows == t])


def test_hundreds_of_adapters() -> None:
    count, ranks = 300, (1, 4, 8, 16)
    parts = tuple(Part(N=24, R=ranks[i % 4], p=0.0, scaling=0.5 + i % 3) for i in range(count))
    case = GroupCase(parts, shape=(64, 33), batch=True, named="rows")

    def pooled(case: GroupCase) -> Results:
        """All dA as one result and all dB as another: an adapter's alone have few values."""
        found = results(case)
        kinds = {name: [one for one in found if one.startswith(name)] for name in ("y", "x", "lora_a", "lora_b")}
        return {
            kind: tuple(torch.cat([found[name][i].flatten() for name in names]) for i in range(3))
            for kind, names in kinds.items()
        }

    check_results(case, pooled)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_checkpointing_sees_the_same_masks(group: str, reentrant: bool) -> None:
    case = GROUPS[group]
    tensors = tensors_of(case)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(case, tensors | {"x": x}, seeded=False))

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        ys = checkpoint(call, tensors["x"], use_reentrant=reentrant) if checkpointed else call(tensors["x"])
        leaves = [t for t in tensors.values() if isinstance(t, Tensor) and t.requires_grad]
        sum(y.square().sum() for y in ys).backward()
        results.append([*(y.detach() for y in ys), *(t.grad for t in leaves)])
        for t in leaves:
            t.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize("group", GROUPS)
def test_compiles_whole(group: str) -> None:
    case = GROUPS[group]
    tensors = tensors_of(case)
    rows = case.rows
    results = []

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(case, tensors | {"x": x}, seeded=False))

    if rows is not None:  # drawn outside of the graph
        adapters = [
            F.Adapter(tensors[f"lora_a{i}"], tensors[f"lora_b{i}"], part.scaling, dropout_p=part.p)
            for i, part in enumerate(case.parts)
        ]

        def call(x: Tensor) -> tuple[Tensor, ...]:  # noqa: F811
            return (F.multi_lora_linear(x, tensors["weight0"], adapters, rows, bias=tensors["bias0"]),)

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        ys = function(tensors["x"])
        leaves = [tensors["x"], *(tensors[f"lora_a{i}"] for i in range(len(case.parts)))]
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scaling", [0.0, 2.0])
def test_row_gain_is_the_norm(dtype: torch.dtype, scaling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator).to(DEVICE, dtype) for s in ((40, 67), (5, 67), (40, 5)))
    magnitude = torch.rand(40, generator=generator).to(DEVICE)
    exact = magnitude.double() / definition.weight_norm(weight.double(), a.double(), b.double(), scaling)
    for _ in range(2):  # the second time from the kept norms
        gain = dora.row_gain(weight, a, b, scaling, magnitude, dtype)
        torch.testing.assert_close(gain.double(), exact, rtol=2e-6, atol=0)


def test_norms_of_a_trained_weight_are_not_kept() -> None:
    """FSDP2 gathers a weight that was stepped into memory of the same address, and preserves its version counter."""
    weight = torch.randn(24, 100, requires_grad=True)
    a, b, magnitude = torch.randn(4, 100), torch.randn(24, 4), torch.rand(24) + 0.5
    x = torch.randn(5, 100)
    F.lora_linear(x, weight, a, b, magnitude=magnitude)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(2.0)
    fresh = weight.detach().clone()
    expected = F.lora_linear(x, fresh, a, b, magnitude=magnitude)
    assert torch.equal(F.lora_linear(x, weight, a, b, magnitude=magnitude), expected)


def test_kept_norms_follow_the_weight() -> None:
    columns = 2 * dora.SHORT_ROW  # of shorter rows nothing is kept
    weight, a, b = torch.randn(columns, columns), torch.randn(2, columns), torch.randn(columns, 2)
    magnitude = torch.ones(columns)

    def check() -> None:
        exact = 1 / definition.weight_norm(weight, a, b, 1.0)
        torch.testing.assert_close(dora.row_gain(weight, a, b, 1.0, magnitude, F32), exact)

    check()
    weight.mul_(3.0)  # another version
    check()
    weight.data = torch.randn(columns, columns)  # another address
    check()
    weight.data = weight.data.T  # in another order
    check()
    weight.data = weight.data.view(torch.int32).add(1 << 23).view(F32)
    check()
    memory = bytearray(4 * columns * columns)
    for _ in range(2):  # other memory of the same address, as an allocator gives what has been freed
        weight.data = torch.frombuffer(memory, dtype=F32).view(columns, columns)
        weight.data.copy_(torch.randn(columns, columns))
        check()
    weight.data.mul_(2.0)  # neither
    with pytest.raises(AssertionError):
        check()
    weight = torch.nn.Parameter(weight.data, requires_grad=False)  # which counts its versions anew
    check()
    weight.data.mul_(2.0)
    dora.forget_norms(weight)
    check()


def test_kept_norms_follow_a_4bit_weight() -> None:
    columns = 2 * dora.SHORT_ROW
    a, b, magnitude = torch.randn(2, columns), torch.randn(8, 2), torch.ones(8)
    quantised = F.nf4_quantize(torch.randn(8, columns), double_quant=False)

    def check(quantised: F.NF4Weight) -> None:
        exact = 1 / definition.weight_norm(F.nf4_dequantize(quantised), a, b, 1.0)
        torch.testing.assert_close(dora.row_gain(quantised, a, b, 1.0, magnitude, F32), exact)

    check(quantised)
    quantised.absmax.mul_(2.0)
    check(quantised)
    check(dataclasses.replace(quantised, absmax=quantised.absmax * 3.0))
    check(dataclasses.replace(quantised, code=quantised.code.flip(0) * 5.0))
    check(dataclasses.replace(quantised, dtype=BF16))
    check(quantised)


def test_kept_norms_stay_with_the_tensor() -> None:
    """Copies and files do not hold them, and what is written names nothing of ours."""
    columns = 2 * dora.SHORT_ROW
    weight = torch.nn.Parameter(torch.randn(8, columns), requires_grad=False)
    a, b, magnitude = torch.randn(2, columns), torch.randn(8, 2), torch.ones(8)
    first = dora.row_gain(weight, a, b, 1.0, magnitude, F32)
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    assert b"peftfast" not in file.getvalue() and len(file.getvalue()) < weight.nbytes + 2048
    file.seek(0)
    for other in (torch.load(file, weights_only=True)["weight"], copy.deepcopy(weight), copy.deepcopy(weight.detach())):
        with torch.no_grad():
            other.data.mul_(2.0)
        exact = 1 / definition.weight_norm(other, a, b, 1.0)
        torch.testing.assert_close(dora.row_gain(other, a, b, 1.0, magnitude, F32), exact)
    assert torch.equal(dora.row_gain(weight, a, b, 1.0, magnitude, F32), first)


@pytest.mark.parametrize("group", ["qkv", "several active"])
def test_float64_is_the_definition(group: str) -> None:
    case = dataclasses.replace(GROUPS[group], x=F64, adapter=F64, shape=(5, 7))
    tensors = tensors_of(case)
    for one, other in zip(run(case, tensors), define(case, tensors, F64, F64), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("x", [F32, BF16])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_float64_adapters(x: torch.dtype, lora_bias: bool) -> None:
    """No kernel reads them: the definition serves them, in the plain case as in the general one."""
    check_group(GroupCase(QKV, x=x, adapter=F64))
    plain = [dataclasses.replace(one, weight="dense", bias=False, lora_bias=lora_bias, p=0.0) for one in QKV]
    check_group(GroupCase(tuple(dataclasses.replace(one, frozen=("lora_bias",)) for one in plain), x=x, adapter=F64))


def test_gradcheck_of_dora_in_float64() -> None:
    x, w, a, b = (torch.randn(*s, dtype=F64) for s in ((4, 5), (3, 5), (2, 5), (3, 2)))
    magnitude = torch.rand(3, dtype=F64) + 0.5
    for t in (x, magnitude):
        t.requires_grad_()
    # Not to A and B: the norm carries no gradient, which differences would see.
    call = lambda x, m: F.lora_linear(x, w, a, b, scaling=1.5, magnitude=m, dropout_p=0.3, seed=5)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, magnitude))


X, W, A, B = torch.randn(3, 16), torch.randn(12, 16), torch.randn(4, 16), torch.randn(12, 4)
BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "no projections": (ValueError, "projections: expected at least one", lambda: F.lora_linears(X, [])),
    "projections": (TypeError, "projections: expected a sequence", lambda: F.lora_linears(X, [W])),
    "one of them": (
        ValueError,
        r"projections\[1\].lora_a: expected shape",
        lambda: F.lora_linears(X, [F.Projection(W, A, B), F.Projection(W, A[:, :3], B)]),
    ),
    "seed of one": (
        TypeError,
        r"projections\[1\].seed: expected an int or an int64 tensor, got float",
        lambda: F.lora_linears(
            X, [F.Projection(W, A, B, dropout_p=0.1), F.Projection(W, A, B, dropout_p=0.1, seed=1.5)]
        ),
    ),
    "seed of an adapter": (
        ValueError,
        r"adapters\[0\].seed: expected one int64",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B, seed=torch.zeros(2))]),
    ),
    "x": (TypeError, "x: expected a floating", lambda: F.lora_linears(None, [F.Projection(W, A, B)])),
    "no adapters": (ValueError, "adapters: expected at least one", lambda: F.multi_lora_linear(X, W, [])),
    "adapters": (TypeError, "adapters: expected a sequence", lambda: F.multi_lora_linear(X, W, A)),
    "an adapter": (
        ValueError,
        r"adapters\[0\].lora_b: expected shape",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B[:3])]),
    ),
    "weight": (TypeError, "weight: expected a tensor", lambda: F.multi_lora_linear(X, None, [F.Adapter(A, B)])),
    "rows dtype": (
        TypeError,
        "rows: expected int32 or int64",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B)], torch.zeros(3)),
    ),
    "rows type": (TypeError, "rows: expected a tensor", lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B)], "abc")),
    "rows shape": (
        ValueError,
        r"rows: expected shape \(3,\)",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B)], [0, 0]),
    ),
    "rows of a vector": (ValueError, "rows: expected", lambda: F.multi_lora_linear(X[0], W, [F.Adapter(A, B)], [0])),
    "rows range": (
        ValueError,
        r"rows: expected ids in \[-1, 1\), got 0 to 1",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B)], [0, 1, 0]),
    ),
    "rows below": (
        ValueError,
        r"rows: expected ids in \[-1, 1\), got -2",
        lambda: F.multi_lora_linear(X, W, [F.Adapter(A, B)], torch.tensor([-2, 0, 0])),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, message, call = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_rows_of_the_terms_that_are_left() -> None:
    """Numbered anew by the list of terms; what is no term stays with none."""
    rows = torch.tensor([-1, 3, 0, 1, 2, 7, 3], dtype=torch.int32, device=DEVICE)
    assert lora_group._renumbered(rows, [1, 3]).tolist() == [-1, 1, -1, 0, -1, -1, 1]
    assert lora_group._renumbered(rows, []).tolist() == [-1] * 7
