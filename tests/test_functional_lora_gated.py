"""The product of a gated MLP and its end with a LoRA layer: values, gradients, what they keep, refuse, and how they run."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftfast.functional as F
from peftfast.functional.lora_gated import LoRAGatedFunction
from peftfast.reference import gated_activation as gated
from peftfast.reference.gated_activation import ACTIVATIONS
from tests.support.budget import assert_within_budget
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.gated_layers import (
    KINDS,
    LEAVES,
    PLAIN,
    TELLING,
    GatedLayerCase,
    check_layer,
    results_of,
    run,
    tensors_of,
)
from tests.support.layer_checks import gradients
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64, LAYOUTS


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer(kind: tuple[Any, ...], activation: str) -> None:
    x, adapter, compute, weight = kind
    every = (*LEAVES, "weight") if weight == "dense" else LEAVES
    common = {"x": x, "adapter": adapter, "compute": compute, "weight": weight, "activation": activation}
    check_layer(GatedLayerCase(**common, needs=every))
    check_layer(GatedLayerCase(**common, needs=PLAIN, p=0.0, lora_bias=False, data=1))


def test_random_layers() -> None:
    draw = random.Random(3)
    for index in range(30):
        x, adapter, compute, weight = draw.choice(KINDS)
        leaves = (*LEAVES, "weight") if weight == "dense" else LEAVES
        check_layer(
            GatedLayerCase(
                shape=draw.choice(((1, 33), (2, 7, 64), (65, 130), (4, 17, 97), (2, 2, 5, 31))),
                N=draw.choice((8, 33, 64, 130)),
                R=draw.choice((1, 4, 7, 16, 33, 64)),
                x=x,
                adapter=adapter,
                compute=compute,
                weight=weight,
                activation=draw.choice(ACTIVATIONS),
                p=draw.choice((0.0, 0.1, 0.5)),
                bias=draw.random() < 0.5,
                lora_bias=draw.random() < 0.3,
                layout=draw.choice(LAYOUTS),
                needs=draw.choice((leaves, PLAIN, PLAIN)),
                data=index,
            )
        )


@pytest.mark.parametrize(
    "case", [*TELLING[2:], GatedLayerCase(weight="nested", compute=BF16, needs=PLAIN, lora_bias=False)], ids=str
)
def test_layer_on_each_backend(case: GatedLayerCase, backend: str) -> None:
    check_layer(case)


def test_every_set_of_gradients() -> None:
    """Each is the same whichever others are asked for, on the single operator and by the passes: to the bit on a CPU."""
    for weight, names in (
        ("dense", PLAIN),
        ("dense", ("gate", "up", "lora_a", "lora_b", "weight", "bias")),
        ("nf4", PLAIN),
    ):
        full = {n: v for n, (v, *_) in results_of(GatedLayerCase(weight=weight, needs=names)).items()}
        for size in range(1, len(names)):
            for needs in itertools.combinations(names, size):
                found = results_of(GatedLayerCase(weight=weight, needs=needs))
                assert set(found) == {"y", *needs}
                for name, (value, *rest) in found.items():
                    if DEVICE.type == "cpu":
                        assert torch.equal(value, full[name]), (name, needs)
                    else:  # dS alone and dS beside dB are two kernels, whose sums have two orders
                        assert_within_budget(f"{name} of {needs}", value, *rest)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_it_gives_the_bits_of_the_two_calls(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a pass at a time, as where a backend is asked for."""
    case = GatedLayerCase(x=dtype, adapter=dtype, needs=PLAIN, p=0.2, activation="gelu")
    tensors = tensors_of(case)
    dy = torch.randn(3, 11, 45).to(DEVICE, dtype)

    def both() -> Tensor:
        own = dict(tensors)
        h = F.gated_activation(own.pop("gate"), own.pop("up"), "gelu")
        return F.lora_linear(h, **own, scaling=case.scaling, dropout_p=case.p, seed=case.seed)

    found = []
    for call, backend in ((both, ""), (lambda: run(case, tensors), ""), (lambda: run(case, tensors), "cpu")):
        monkeypatch.setenv("PEFTFAST_BACKEND", backend)
        y = call()
        found.append({"y": y.detach(), **gradients(y, tensors, dy)})
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


def saved_bytes(call: Callable[[], Tensor], owned: list[Tensor]) -> int:
    with saved_tensors() as saved:
        y = call()
    kept = storages(saved)
    del y
    return sum(size for address, size in kept.items() if address not in storages(owned))


@pytest.mark.parametrize("weight", ["dense", "nested"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_but_gate_up_and_s_is_kept(weight: str, p: float) -> None:
    case = GatedLayerCase(shape=(64, 96), R=4, weight=weight, needs=PLAIN, p=p, compute=BF16, x=BF16)
    tensors = tensors_of(case)
    owned = [t for t in tensors.values() if isinstance(t, Tensor)]
    if weight == "nested":
        owned += [t for t in tensors["weight"].storage() if isinstance(t, Tensor)]
    halves = [tensors["gate"], tensors["up"]]
    seed = 8 if p else 0
    own = saved_bytes(lambda: run(case, tensors), owned)
    assert own == 64 * 4 * 2 + seed  # gate and up are the caller's here
    rest = {name: value for name, value in tensors.items() if name not in ("gate", "up")}
    options = {"scaling": case.scaling, "dropout_p": p, "seed": case.seed, "compute_dtype": BF16}
    apart = saved_bytes(
        lambda: F.lora_linear(torch.nn.functional.silu(halves[0]) * halves[1], **rest, **options), owned
    )
    assert apart - own == 2 * 64 * 96 * 2
    assert saved_bytes(lambda: F.gated_activation(*halves), halves) == 0


@pytest.mark.parametrize("needs", [("lora_b",), PLAIN])
def test_a_checkpoint_may_unpack_what_is_saved_once(needs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", "python")
    case = GatedLayerCase(needs=needs, p=0.0, bias=False, lora_bias=False)
    own, again = tensors_of(case), tensors_of(case)
    run(case, own).sum().backward()
    checkpoint(run, case, again, use_reentrant=False).sum().backward()
    assert all(torch.equal(own[name].grad, again[name].grad) for name in needs)


def test_a_frozen_adapter_keeps_less() -> None:
    case = GatedLayerCase(needs=("lora_b",), p=0.0, bias=False, lora_bias=False)
    tensors = tensors_of(case)
    with saved_tensors() as saved:
        run(case, tensors)
    assert not {t.data_ptr() for t in saved} & {tensors["gate"].data_ptr(), tensors["up"].data_ptr()}


def test_a_call_is_one_operator_and_one_product() -> None:
    case = GatedLayerCase(needs=PLAIN, p=0.1)
    tensors = tensors_of(case)
    with Calls() as calls:
        y = run(case, tensors)
    del calls.compute["lift_fresh"]  # of the seed
    assert calls.compute == {"gated_activation": 1, "lora_shrink": 1, "lora_expand_": 1, "addmm": 1}
    dy = torch.ones_like(y)
    with Calls() as calls:
        y.backward(dy)
    assert calls.compute == {
        "lora_dy_grads": 1,
        "mm": 1,
        "lora_expand_": 1,
        "gated_activation_recompute_": 1,
        "lora_weight_grad": 1,
    }


def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    """The backward writes into nothing that was saved."""
    for case in TELLING:
        tensors = tensors_of(case)
        y = run(case, tensors)
        leaves = [t for t in tensors.values() if isinstance(t, Tensor) and t.requires_grad]
        before = [tensors["gate"].clone(), tensors["up"].clone()]
        first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
        second = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
        assert torch.equal(before[0], tensors["gate"]) and torch.equal(before[1], tensors["up"])


def test_a_gate_that_is_written_before_the_backward_is_noticed() -> None:
    case = GatedLayerCase(needs=("lora_a", "lora_b"))
    tensors = tensors_of(case)
    y = run(case, tensors)
    tensors["gate"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused() -> None:
    gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(F.gated_activation(gate, up).square().sum(), gate, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_runs_on_the_definition(activation: str) -> None:
    torch.manual_seed(1)
    gate, up = (torch.randn(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: F.gated_activation(g, u, activation), [gate, up])
    weight, a, b = (torch.randn(size, dtype=F64, requires_grad=True) for size in ((5, 4), (2, 4), (5, 2)))
    seed = torch.tensor([7])

    def layer(*leaves: Tensor) -> Tensor:
        return F.lora_gated_linear(*leaves, activation=activation, scaling=2.0, dropout_p=0.3, seed=seed)

    assert torch.autograd.gradcheck(layer, [gate, up, weight, a, b])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_float64_adapter(dtype: torch.dtype) -> None:
    """No kernel reads it: the definition serves it."""
    for needs in (PLAIN, ("gate", "up"), ("lora_a",), ("lora_b",)):
        check_layer(GatedLayerCase(x=dtype, adapter=F64, needs=needs, p=0.0))


def test_autocast_gives_stock_s_dtype() -> None:
    case = GatedLayerCase(needs=PLAIN, p=0.0, bias=False, lora_bias=False)
    tensors = tensors_of(case)
    with torch.autocast(DEVICE.type, BF16):
        y = F.lora_gated_linear(**tensors, scaling=case.scaling)
        narrow = {n: t.to(BF16) if n in ("gate", "up") else t for n, t in tensors.items()}
        same = F.lora_gated_linear(**narrow, scaling=case.scaling)
    assert y.dtype == same.dtype == BF16
    grads = gradients(y, tensors, torch.ones_like(y))
    assert all(grads[name].dtype == F32 for name in PLAIN)
    exact = gradients(run(case, tensors), tensors, torch.ones(y.shape, device=DEVICE))
    assert all((grads[n] - exact[n]).norm() / exact[n].norm() < 0.03 for n in PLAIN)


def test_without_a_gradient_nothing_is_kept() -> None:
    tensors = tensors_of(GatedLayerCase(needs=PLAIN, p=0.0))
    expected = run(GatedLayerCase(p=0.0), tensors)
    with torch.no_grad():
        y = run(GatedLayerCase(p=0.0), tensors)
        assert torch.equal(y, expected) and y.grad_fn is None
        four_bit = tensors_of(GatedLayerCase(weight="nf4", p=0.0))
        few = run(GatedLayerCase(weight="nf4", p=0.0), four_bit)
    torch.testing.assert_close(few, run(GatedLayerCase(weight="nf4", p=0.0), four_bit).detach(), rtol=1e-4, atol=1e-4)


def test_seeds_are_drawn_as_the_layer_draws_them() -> None:
    case = GatedLayerCase(needs=PLAIN, p=0.5)
    tensors = tensors_of(case)
    torch.manual_seed(11)
    own = run(case, tensors, seed=None)
    after = torch.rand(1)
    torch.manual_seed(11)
    rest = {n: t for n, t in tensors.items() if n not in ("gate", "up")}
    h = gated.gated_activation(tensors["gate"], tensors["up"], "silu")
    apart = F.lora_linear(h, **rest, scaling=case.scaling, dropout_p=0.5)
    assert torch.equal(after, torch.rand(1))
    torch.testing.assert_close(own, apart, rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph() -> None:
    case = GatedLayerCase(weight="nested", needs=PLAIN, p=0.1)
    tensors = tensors_of(case)
    dy = torch.randn(3, 11, 45).to(DEVICE)

    def call(**given: Any) -> Tensor:
        return run(case, given)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, found = call(**tensors), compiled(**tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one, two = gradients(expected, tensors, dy), gradients(found, tensors, dy)
    for name in PLAIN:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_no_rows() -> None:
    for shape in ((0, 16), (2, 0, 16)):
        case = GatedLayerCase(shape=shape, needs=PLAIN)
        tensors = tensors_of(case)
        y = run(case, tensors)
        grads = gradients(y, tensors, torch.ones_like(y))
        assert y.shape == (*shape[:-1], 45) and not grads["lora_a"].any() and grads["gate"].shape == shape


def bad_calls() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    gate, weight = torch.randn(3, 8), torch.randn(5, 8)
    a, b = torch.randn(2, 8), torch.randn(5, 2)

    def layer(**changed: Any) -> Callable[[], Any]:
        return lambda: F.lora_gated_linear(
            **({"gate": gate, "up": gate, "weight": weight, "lora_a": a, "lora_b": b} | changed)
        )

    return {
        "float8": (
            TypeError,
            "gate: expected a floating tensor of at least 16 bits",
            lambda: F.gated_activation(gate.to(torch.float8_e4m3fn), gate.to(torch.float8_e4m3fn)),
        ),
        "seed": (TypeError, "seed: expected an int", layer(seed=1.5)),
        "no tensor": (TypeError, "gate: expected a floating tensor, got list", lambda: F.gated_activation([1.0], gate)),
        "integers": (
            TypeError,
            "up: expected a floating tensor, got torch.int32",
            lambda: F.gated_activation(gate, gate.int()),
        ),
        "a scalar": (
            ValueError,
            "gate: expected at least one dimension",
            lambda: F.gated_activation(gate[0, 0], gate[0, 0]),
        ),
        "dtypes": (TypeError, "up: expected torch.float32 beside gate", lambda: F.gated_activation(gate, gate.half())),
        "shapes": (ValueError, r"up: expected shape \(3, 8\)", lambda: F.gated_activation(gate, gate[:2])),
        "devices": (ValueError, "up: expected on cpu", lambda: F.gated_activation(gate, gate.to("meta"))),
        "a name": (ValueError, "activation: expected one of silu", lambda: F.gated_activation(gate, gate, "swish")),
        "no name": (TypeError, "activation: expected a name", lambda: F.gated_activation(gate, gate, torch.relu)),
        "a width": (ValueError, r"gate: expected \[..., 7\]", layer(weight=weight[:, :7], lora_a=a[:, :7])),
        "a factor": (ValueError, "lora_a: expected shape", layer(lora_a=a[:, :7])),
        "a rate": (ValueError, "dropout_p: expected a probability", layer(dropout_p=1.5)),
        "a weight": (TypeError, "weight: expected a tensor", layer(weight=[1])),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls(name: str) -> None:
    kind, message, call = bad_calls()[name]
    with pytest.raises(kind, match=message):
        call()


def _scaled(position: int) -> Callable[[pytest.MonkeyPatch], None]:
    plain = LoRAGatedFunction.backward

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(ctx: Any, dy: Tensor) -> Any:
            grads = list(plain(ctx, dy))
            if grads[position] is not None:
                grads[position] = grads[position] * 1.01
            return tuple(grads)

        monkeypatch.setattr(LoRAGatedFunction, "backward", staticmethod(faulty))

    return plant


def _other_arguments(change: Callable[[list[Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    plain = LoRAGatedFunction.forward

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(ctx: Any, *given: Any) -> Any:
            own = list(given)
            change(own)
            return plain(ctx, *own)

        monkeypatch.setattr(LoRAGatedFunction, "forward", staticmethod(faulty))

    return plant


def _swap(own: list[Any]) -> None:
    own[0], own[1] = own[1], own[0]


def _set(at: int, change: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    def edit(own: list[Any]) -> None:
        own[at] = change(own[at])

    return edit


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{f"gradient {at}": _scaled(at) for at in (0, 1, 3, 4, 5, 6, 7)},
    "gate and up swapped": _other_arguments(_swap),
    "another activation": _other_arguments(_set(2, lambda name: "gelu" if name == "silu" else "silu")),
    "no lora_bias": _other_arguments(_set(7, lambda bias: None)),
    "another seed": _other_arguments(_set(8, lambda seed: None if seed is None else seed + 1)),
    "another rate": _other_arguments(_set(9, lambda p: p / 2)),
    "another scaling": _other_arguments(_set(10, lambda scaling: scaling * 1.01)),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_noticed(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault is not None:
        FAULTS[fault](monkeypatch)

    def check() -> None:
        for case in TELLING:
            check_layer(case)

    if fault is None:
        check()
        return
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        check()
