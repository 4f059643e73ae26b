"""The public LoRA layer: values, gradients, what it saves, what it calls, and the company it keeps in torch."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftfast.functional as F
from peftfast.reference import lora as definition
from peftfast.reference import philox
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.layer_checks import (
    KINDS,
    LEAVES,
    QLORA,
    LayerCase,
    check_layer,
    compare_with_definition,
    define,
    dense_weight,
    gradients,
    run,
    tensors_of,
)
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


def kind(index: int, **options: Any) -> LayerCase:
    x, adapter, compute, weight = KINDS[index]
    return LayerCase(x=x, adapter=adapter, compute=compute, weight=weight, data=index, **options)


@pytest.mark.parametrize("index", range(len(KINDS)))
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("biases", [(False, False), (True, True), (False, True)])
def test_values_and_gradients(index: int, p: float, biases: tuple[bool, bool]) -> None:
    check_layer(kind(index, p=p, bias=biases[0], lora_bias=biases[1]))


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("shape", [(67,), (1, 67), (0, 67), (2, 0, 67), (31, 67), (2, 3, 67), (2, 3, 5, 67), (1, 1)])
def test_shapes_of_x(index: int, shape: tuple[int, ...]) -> None:
    check_layer(kind(index, shape=shape))


@pytest.mark.parametrize("index", [0, 2, 5])
@pytest.mark.parametrize(("N", "R"), [(1, 1), (2, 3), (127, 8), (96, 64), (31, 129)])
def test_shapes_of_the_layer(index: int, N: int, R: int) -> None:
    check_layer(kind(index, N=N, R=R, shape=(41, 96)))


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("layout", ["transposed", "wide", "spaced"])
@pytest.mark.parametrize("shape", [(23, 67), (1, 23, 67)])
def test_strides(index: int, layout: str, shape: tuple[int, ...]) -> None:
    check_layer(kind(index, shape=shape, layout=layout))


@pytest.mark.parametrize("asked", [on_triton, "reference"])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_other_backends(asked: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    check_layer(kind(index, shape=(2, 7, 67)))


SUBSETS = [
    ("x",),
    ("lora_a",),
    ("lora_b",),
    ("lora_a", "lora_b"),
    ("x", "lora_b"),
    ("x", "lora_a"),
    ("bias",),
    ("lora_bias",),
    ("weight",),
    (),
]


@pytest.mark.parametrize("needs", SUBSETS)
@pytest.mark.parametrize("index", [0, 2])
def test_gradients_of_a_subset(needs: tuple[str, ...], index: int) -> None:
    check_layer(kind(index, needs=needs))


def test_magnitude_is_the_definition() -> None:
    """DoRA runs composed: within the budget of itself, values and gradients, and the log says so."""
    case = LayerCase(bias=True, lora_bias=False)
    tensors = tensors_of(case) | {"magnitude": torch.rand(case.N, device=DEVICE).add_(0.5).requires_grad_()}
    compare_with_definition(case, tensors, run(case, tensors))


def saved_by(case: LayerCase) -> tuple[dict[str, Any], list[Tensor]]:
    tensors = tensors_of(case)
    with saved_tensors() as saved:
        run(case, tensors)
    return tensors, saved


@pytest.mark.parametrize("index", [0, 2, 4])
def test_saved_tensors(index: int) -> None:
    """x itself, S, and the parameters' own storages: no mask, no cast copy, no dense copy of a 4-bit weight."""
    case = kind(index, p=0.5)
    tensors, saved = saved_by(case)
    weight = tensors["weight"]
    given = [t for name, t in tensors.items() if isinstance(t, Tensor) and name != "weight"]
    given += [t for t in weight.storage() if isinstance(t, Tensor)] if isinstance(weight, F.NF4Weight) else [weight]
    kept = storages(saved)
    beyond = {address: size for address, size in kept.items() if address not in storages(given)}
    s_bytes = 33 * case.R * case.compute_dtype.itemsize
    assert sorted(beyond.values()) == [8, s_bytes]  # the seed and S
    assert tensors["x"].untyped_storage().data_ptr() in kept


def test_frozen_factors_save_less() -> None:
    for needs, x_saved, s_saved in (
        (("x", "lora_b"), False, True),
        (("x",), False, False),
        (("lora_b",), False, True),
        (("lora_a",), True, False),
        (("lora_a", "lora_b"), True, True),
    ):
        case = kind(0, needs=needs)
        tensors, saved = saved_by(case)
        kept = storages(saved)
        assert (tensors["x"].untyped_storage().data_ptr() in kept) == x_saved, needs
        assert any(t.shape == (33, case.R) and t.dtype == BF16 for t in saved) == s_saved, needs
        weight = tensors["weight"]
        assert (weight.packed.untyped_storage().data_ptr() in kept) == ("x" in needs), needs


FUSED = {
    # dense, one dtype
    2: (
        {"addmm": 1, "lora_shrink": 1, "lora_expand_": 1},
        {"lora_dy_grads": 1, "lora_weight_grad": 1, "mm": 1, "lora_expand_": 1},
    ),
    # QLoRA: x and dy are cast to bfloat16 for the base product, the passes cast in flight
    0: (
        {"_to_copy": 1, "nf4_dequantize_out": 1, "addmm": 1, "lora_shrink": 1, "lora_expand": 1},
        {
            "_to_copy": 1,
            "lora_dy_grads": 1,
            "lora_weight_grad": 1,
            "nf4_dequantize_out": 1,
            "mm": 1,
            "lora_expand": 1,
        },
    ),
    # bfloat16 x and base, float32 adapters: no cast at all
    5: (
        {"addmm": 1, "lora_shrink": 1, "lora_expand_": 1},
        {"lora_dy_grads": 1, "lora_weight_grad": 1, "mm": 1, "lora_expand_": 1},
    ),
}


def check_counts(index: int) -> None:
    """The layer is the operators it says it is, and no torch calls beside them: "fused" is not a wrapper's word."""
    case = kind(index, needs=("x", "lora_a", "lora_b"), lora_bias=False)
    tensors = tensors_of(case)
    dy = torch.ones(*case.shape[:-1], case.N, dtype=case.x, device=DEVICE)
    seed = case.seed
    with Calls() as forward:
        y = run(case, tensors, seed=seed)
    with Calls() as backward:
        gradients(y, tensors, dy)
    assert (forward.compute, backward.compute) == FUSED[index]


@pytest.mark.parametrize("index", FUSED)
def test_counts(index: int) -> None:
    check_counts(index)


def test_counts_with_everything_frozen_but_b() -> None:
    case = kind(2, needs=("lora_b",))
    tensors = tensors_of(case)
    y = run(case, tensors)
    dy = torch.ones_like(y)
    with Calls() as backward:
        gradients(y, tensors, dy)
    assert backward.compute == {"lora_dy_grads": 1}


def test_drawing_a_seed_is_one_call() -> None:
    case = kind(2, lora_bias=False)
    tensors = tensors_of(case)
    with Calls() as calls:
        run(case, tensors, seed=None)
    assert calls.compute == {"randint": 1, **FUSED[2][0]}


def test_no_dense_copy_survives_the_forward() -> None:
    """Neither saved nor alive: every tensor of the weight's size that the forward makes is gone when it returns."""
    case = LayerCase(weight="nested", compute=BF16, shape=(4, 640), N=512, needs=LEAVES)
    tensors = tensors_of(case)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if type(t) is Tensor}
    with saved_tensors() as saved:
        y = run(case, tensors)
    largest = max(storages(saved).values())
    assert largest <= tensors["weight"].packed.nbytes
    made = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before]
    assert y.requires_grad and all(t.numel() < 512 * 640 for t in made if t.is_floating_point())


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_zero_b_is_the_base_layer(index: int) -> None:
    case = kind(index, lora_bias=False)
    tensors = tensors_of(case)
    tensors["lora_b"] = torch.zeros_like(tensors["lora_b"])
    compute = case.compute_dtype
    expected = torch.nn.functional.linear(
        tensors["x"].reshape(-1, 67).to(compute), dense_weight(tensors["weight"], compute), tensors["bias"]
    )
    assert torch.equal(run(case, tensors), expected.to(case.x).reshape(3, 11, -1))


@pytest.mark.parametrize("index", [0, 2])
def test_same_bits_every_run(index: int) -> None:
    case = kind(index, shape=(500, 384), N=320, R=16)
    tensors = tensors_of(case)
    dy = torch.randn(500, 320, device=DEVICE)

    def once() -> list[Tensor]:
        y = run(case, tensors)
        return [y, *gradients(y, tensors, dy).values()]

    first = once()
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))


def test_computed_factors_and_slices() -> None:
    """A and B that are results, rows and columns of larger tensors, not contiguous; gradients reach what they came from."""
    generator = torch.Generator().manual_seed(0)
    case = LayerCase(lora_bias=False, needs=("x",))
    tensors = tensors_of(case)
    both = torch.randn(4 * case.R, 2 * 67, generator=generator).to(DEVICE).requires_grad_()
    core = torch.randn(case.R, case.N, generator=generator).to(DEVICE).requires_grad_()

    def factors(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (both, core)]
        return leaves, (leaves[0][::4, 67:] * 0.1).tanh(), leaves[1].T * 0.3

    def one(dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
        leaves, a, b = factors(dtype)
        given = {n: t if t is None else t.detach().to(dtype) for n, t in tensors.items()} | {"lora_a": a, "lora_b": b}
        y = run(case, given) if fused else define(case, given, dtype, dtype)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    for actual, expected in zip(one(F32, True), one(F64, False), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    leaves, a, b = factors(F32)
    assert not a.is_leaf and not b.is_contiguous()
    sliced = leaves[0][::4, 67:]
    y = run(case, tensors | {"lora_a": sliced, "lora_b": b})
    y.sum().backward()
    assert (leaves[0].grad[::4, 67:] != 0).all() and (leaves[0].grad[:, :67] == 0).all()


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_checkpointing_sees_the_same_mask(index: int, reentrant: bool, given: bool) -> None:
    case = kind(index, p=0.5)
    tensors = tensors_of(case)
    seed = case.seed if given else None

    def layer(x: Tensor) -> Tensor:
        return run(case, tensors | {"x": x}, seed=seed)

    torch.manual_seed(3)
    plain = layer(tensors["x"])
    torch.manual_seed(3)
    recomputed = checkpoint(layer, tensors["x"], use_reentrant=reentrant)
    assert torch.equal(plain, recomputed)
    names = [name for name in case.needs if isinstance(tensors[name], Tensor)]
    grads = []
    for y in (plain, recomputed):
        y.square().sum().backward()
        grads.append([tensors[name].grad for name in names])
        for name in names:
            tensors[name].grad = None
    for name, one, other in zip(names, *grads, strict=True):
        assert torch.equal(one, other), name


def test_manual_seed_rules_the_mask() -> None:
    case = kind(2, p=0.5)
    tensors = tensors_of(case)

    def draw(**options: Any) -> Tensor:
        return run(case, tensors, **({"seed": None} | options))

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    again = draw()
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(first, draw())
    state = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()
    for options in ({"seed": 5}, {"seed": case.seed}, {"dropout_p": 0.0}, {"training": False}):
        draw(**options)
        now = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()
        assert torch.equal(state, now), options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first, draw())


def test_seed_as_a_number_and_as_a_tensor() -> None:
    case = kind(2, p=0.5)
    tensors = tensors_of(case)
    for number in (0, 5, 2**63 - 1, -1, -(2**63), 2**64 - 1):
        wrapped = (number + 2**63) % 2**64 - 2**63
        expected = run(case, tensors, seed=torch.tensor([wrapped], device=DEVICE))
        assert torch.equal(run(case, tensors, seed=number), expected)
        assert torch.equal(run(case, tensors, seed=torch.tensor(wrapped)), expected)
    assert not torch.equal(run(case, tensors, seed=1), run(case, tensors, seed=2))


def test_the_mask_is_the_definitions_of_x_flattened() -> None:
    x = torch.ones(2, 3, 24, device=DEVICE)
    eye = torch.eye(24, device=DEVICE)
    y = F.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=0.25, seed=9)
    mask = philox.dropout_mask(torch.tensor([9], device=DEVICE), 6, 24, 0.25)
    expected = mask.reshape(2, 3, 24) * torch.tensor(philox.keep_scale(0.25))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    off = F.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=0.25, seed=9, training=False)
    assert torch.equal(off, x)


@pytest.mark.parametrize("x", [F32, BF16, F16])
def test_autocast_on_a_dense_base(x: torch.dtype) -> None:
    """Autocast's dtype computes and comes out; gradients have their tensors' own; the cast weight is not kept."""
    case = LayerCase(x=x)
    tensors = tensors_of(case) | {"weight": tensors_of(LayerCase())["weight"]}
    with torch.autocast(DEVICE.type, BF16), saved_tensors() as saved:
        y = run(case, tensors)
    assert y.dtype == BF16
    compare_with_definition(case, tensors, y)
    kept = storages(saved)
    assert tensors["weight"].untyped_storage().data_ptr() in kept
    assert case.N * 67 * 2 not in kept.values() and 33 * 67 * 2 not in set(kept.values()) - {tensors["x"].nbytes}


def test_autocast_leaves_float64_alone() -> None:
    """As torch's own, which does not cast it."""
    case = LayerCase(x=F64, adapter=F64)
    tensors = tensors_of(case)
    with torch.autocast(DEVICE.type, BF16):
        y = run(case, tensors)
        assert y.dtype == torch.nn.functional.linear(tensors["x"], tensors["weight"]).dtype == F64
    assert torch.equal(y, run(case, tensors))


def test_autocast_on_a_4_bit_base() -> None:
    """A quantised layer's own compute dtype beats autocast's, and x's dtype comes out."""
    for case in (QLORA, kind(9)):
        tensors = tensors_of(case)
        with torch.autocast(DEVICE.type, BF16):
            y = run(case, tensors)
        compare_with_definition(case, tensors, y)
    case = kind(3)
    tensors = tensors_of(case)
    with torch.autocast(DEVICE.type, BF16):
        y = run(case, tensors)
    assert y.dtype == BF16
    compare_with_definition(case, tensors, y)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("given", [True, False])
def test_compiles_whole(index: int, given: bool) -> None:
    case = kind(index, p=0.5)
    tensors = tensors_of(case)
    seed = case.seed if given else None
    results = []
    for layer in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        y = layer(case, tensors, seed=seed)
        results.append([y.detach(), *gradients(y, tensors, torch.ones_like(y)).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_compiles_for_changing_rows() -> None:
    case = kind(2)
    tensors = tensors_of(case)
    layer = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9, 2):
        tensors["x"] = torch.randn(rows, 67, device=DEVICE, requires_grad=True)
        y = layer(case, tensors)
        assert torch.equal(y, run(case, tensors))
        gradients(y, tensors, torch.ones_like(y))


@pytest.mark.parametrize("index", [0, 2])
def test_without_gradients(index: int) -> None:
    case = kind(index)
    tensors = tensors_of(case)
    expected = run(case, tensors)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, saved_tensors() as saved:
            y = run(case, tensors)
        assert not y.requires_grad and not saved and torch.equal(y, expected)


def test_inputs_are_left_alone() -> None:
    case = kind(0, p=0.5)
    tensors = tensors_of(case)
    before = {name: t.detach().clone() for name, t in tensors.items() if isinstance(t, Tensor)}
    y = run(case, tensors)
    gradients(y, tensors, torch.ones_like(y))
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def test_an_unused_output_has_zero_gradients() -> None:
    case = kind(2)
    tensors = tensors_of(case)
    y = run(case, tensors)
    y.backward(torch.zeros_like(y))
    assert all((tensors[name].grad == 0).all() for name in case.needs)


def test_an_expanded_gradient() -> None:
    """What sum() sends back has strides of zero."""
    case = kind(2)
    tensors = tensors_of(case)
    y = run(case, tensors)
    actual = gradients(y.sum(), tensors, torch.ones((), device=DEVICE))
    expected = gradients(run(case, tensors), tensors, torch.ones_like(y))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


def test_double_backward_is_refused() -> None:
    case = kind(2)
    tensors = tensors_of(case)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(run(case, tensors).square().sum(), tensors["lora_a"], create_graph=True)


def test_float64_runs_on_the_definition() -> None:
    case = LayerCase(
        x=F64, adapter=F64, needs=("x", "lora_a", "lora_b", "bias", "lora_bias", "weight"), shape=(3, 7), N=4, R=2
    )
    tensors = tensors_of(case)
    names = list(case.needs)

    def layer(*values: Tensor) -> Tensor:
        return run(case, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(layer, [tensors[name] for name in names])
    expected = definition.lora_linear(**tensors, scaling=case.scaling, dropout_p=case.p, seed=case.seed)
    torch.testing.assert_close(run(case, tensors), expected)


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_float64_adapter(index: int, rows: int) -> None:
    """No kernel reads it: the definition serves it, in a whole layer and in a few rows of a 4-bit weight as in single passes. All that
    an adapter's gradients are made of is ten values of dS where the rows are two, so that many data sets are looked at together: among
    five, the largest error is by chance over twice that of as good a sum in one draw of thirty; among 64, in one of ten thousand."""
    x, _, compute, weight = KINDS[index]
    for p, needs in (
        (0.1, LEAVES),
        (0.0, ("x", "lora_a", "lora_b")),
        (0.0, ("lora_a",)),
        (0.0, ("lora_b",)),
        (0.0, ()),
    ):
        case = LayerCase(
            x=x, adapter=F64, compute=compute, weight=weight, p=p, needs=needs, shape=(rows, 67), data=index
        )
        check_layer(case, values=9000 if rows == 2 else 0)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("name", ["lora_a", "lora_b", "lora_bias"])
def test_a_float8_factor_is_its_values(name: str, weight: str) -> None:
    case = LayerCase(weight=weight, p=0.0, needs=("x",), shape=(3, 67))
    tensors = tensors_of(case)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    wide = tensors | {name: tensors[name].to(F32)}
    y, expected = run(case, tensors), run(case, wide)
    torch.testing.assert_close(y, expected)
    dy = torch.ones_like(y)
    torch.testing.assert_close(gradients(y, tensors, dy), gradients(expected, wide, dy))


def test_an_adapter_of_rank_zero_is_the_base() -> None:
    x, w = torch.randn(3, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    y = F.lora_linear(x, w, w[:0], torch.empty(5, 0, device=DEVICE))
    assert torch.equal(y, torch.nn.functional.linear(x, w))


X, W, A, B = torch.randn(3, 16), torch.randn(12, 16), torch.randn(4, 16), torch.randn(12, 4)
V = torch.randn(12)
BAD = {
    "x missing": (TypeError, "x: expected a floating tensor, got NoneType", {"x": None}),
    "x dtype": (TypeError, "x: expected a floating tensor, got torch.int32", {"x": X.int()}),
    "x features": (ValueError, r"x: expected \[..., 16\]", {"x": X[:, :15]}),
    "x scalar": (ValueError, r"x: expected \[..., 16\]", {"x": X[0, 0]}),
    "weight missing": (TypeError, "weight: expected a tensor or an NF4Weight", {"weight": None}),
    "weight packed": (TypeError, "weight: expected a floating tensor, got torch.uint8", {"weight": W.byte()}),
    "weight vector": (ValueError, r"weight: expected shape \(N, K\)", {"weight": W[0]}),
    "weight dtype": (TypeError, "weight: expected torch.float32 beside x", {"weight": W.bfloat16()}),
    "weight device": (ValueError, "weight: expected on", {"weight": W.to("meta")}),
    "lora_a missing": (TypeError, "lora_a: expected a floating tensor", {"lora_a": None}),
    "lora_a dtype": (TypeError, "lora_a: expected a floating tensor", {"lora_a": A.int()}),
    "lora_a shape": (ValueError, r"lora_a: expected shape \(R, 16\)", {"lora_a": A[:, :15]}),
    "lora_a vector": (ValueError, "lora_a: expected shape", {"lora_a": A[0]}),
    "lora_a device": (ValueError, "lora_a: expected on", {"lora_a": A.to("meta")}),
    "lora_b missing": (TypeError, "lora_b: expected a floating tensor", {"lora_b": None}),
    "lora_b rows": (ValueError, r"lora_b: expected shape \(12, 4\)", {"lora_b": B[:11]}),
    "lora_b rank": (ValueError, r"lora_b: expected shape \(12, 4\)", {"lora_b": B[:, :3]}),
    "lora_b beside no rank": (ValueError, r"lora_b: expected shape \(12, 0\)", {"lora_a": A[:0]}),
    "lora_b device": (ValueError, "lora_b: expected on", {"lora_b": B.to("meta")}),
    "scaling": (TypeError, "scaling: expected a Python number", {"scaling": "1"}),
    "scaling tensor": (TypeError, "scaling: expected a Python number", {"scaling": torch.ones(1)}),
    "bias type": (TypeError, "bias: expected a floating tensor", {"bias": 1.0}),
    "bias dtype": (TypeError, "bias: expected a floating tensor", {"bias": V.int()}),
    "bias shape": (ValueError, r"bias: expected shape \(12,\)", {"bias": V[:11]}),
    "bias device": (ValueError, "bias: expected on", {"bias": V.to("meta")}),
    "lora_bias": (ValueError, r"lora_bias: expected shape \(12,\)", {"lora_bias": V[None]}),
    "magnitude": (ValueError, r"magnitude: expected shape \(12,\)", {"magnitude": V[:1]}),
    "dropout_p range": (ValueError, "dropout_p: expected a probability", {"dropout_p": 1.5}),
    "dropout_p nan": (ValueError, "dropout_p: expected a probability", {"dropout_p": float("nan")}),
    "dropout_p type": (TypeError, "dropout_p: expected a Python number", {"dropout_p": None}),
    "seed float": (TypeError, "seed: expected an int", {"seed": 1.5, "dropout_p": 0.1}),
    "seed dtype": (ValueError, "seed: expected one int64", {"seed": V[:1], "dropout_p": 0.1}),
    "seed unused": (TypeError, "seed: expected an int", {"seed": 1.5}),
    "x sparse": (TypeError, "x: expected a dense tensor, got torch.sparse_coo", {"x": X.to_sparse()}),
    "x float8": (
        TypeError,
        "x: expected at least 16 bits",
        {"x": X.to(torch.float8_e4m3fn), "weight": W.to(torch.float8_e4m3fn)},
    ),
    "weight sparse": (TypeError, "weight: expected a dense tensor", {"weight": W.to_sparse()}),
    "lora_a sparse": (TypeError, "lora_a: expected a dense tensor", {"lora_a": A.to_sparse()}),
    "bias sparse": (TypeError, "bias: expected a dense tensor", {"bias": V.to_sparse()}),
    "compute_dtype float8": (
        TypeError,
        "compute_dtype: expected a floating dtype of",
        {"compute_dtype": torch.float8_e5m2},
    ),
    "seed size": (ValueError, "seed: expected one int64", {"seed": V.long(), "dropout_p": 0.1}),
    "compute_dtype": (TypeError, "compute_dtype: expected a floating dtype", {"compute_dtype": torch.int32}),
    "compute_dtype name": (TypeError, "compute_dtype: expected a floating dtype", {"compute_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, message, changes = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        F.lora_linear(**({"x": X, "weight": W, "lora_a": A, "lora_b": B} | changes))
