"""SparseDeltaLinear, its resident delta, and SparseAdamW."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.nn import NF4Linear, RoSALinear, SparseDeltaLinear
from peftfast.nn.sparse_delta import SparseDeltaNF4Linear, layer_of
from peftfast.optim import SparseAdamW
from peftfast.optim.sparse_adamw import age_dtype, ages_of
from peftfast.reference import sparse_delta as definition
from tests.support.lora_checks import BF16, F16, F32

ROWS = 40  # more than take the delta apart: a patched layer is then torch.equal to a resident one


def linear(dtype: torch.dtype = F32, bias: bool = True, data: int = 0) -> nn.Linear:
    torch.manual_seed(data)
    return nn.Linear(64, 48, bias=bias).to(dtype)


def pair(dtype: torch.dtype = F32) -> tuple[SparseDeltaLinear, SparseDeltaLinear, Tensor]:
    """A patched and a resident layer of the same support, and their base."""
    torch.manual_seed(1)
    plain = SparseDeltaLinear.from_linear(linear(dtype), density=0.05)
    resident = SparseDeltaLinear.from_linear(linear(dtype), indices=plain.delta_indices.clone(), resident=True)
    return plain, resident, linear(dtype).weight.detach()


def train(layer: SparseDeltaLinear, optimiser: torch.optim.Optimizer, steps: int, data: int = 5) -> None:
    generator = torch.Generator().manual_seed(data)
    for _ in range(steps):
        x = torch.randn(ROWS, 64, generator=generator).to(layer.weight.dtype)
        optimiser.zero_grad()
        layer(x).float().square().mean().backward()
        optimiser.step()


def some_x(dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_from_linear_changes_nothing_and_shares(dtype: torch.dtype) -> None:
    base = linear(dtype)
    layer = SparseDeltaLinear.from_linear(base, density=0.05)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert torch.equal(layer(some_x(dtype)), base(some_x(dtype)))
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["delta_values"] and layer.delta_values.dtype == F32
    assert layer.delta_values.numel() == round(0.05 * 64 * 48) and layer_of(layer.delta_values) is layer
    assert "active=154 (5.01 %)" in repr(layer)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_resident_trains_as_patched_and_unmerges_exactly(dtype: torch.dtype) -> None:
    plain, resident, base = pair(dtype)
    assert not plain.merged and resident.merged
    for layer in (plain, resident):
        train(layer, SparseAdamW([layer.delta_values], lr=1e-2, weight_decay=0.1), 12)
    assert torch.equal(plain.delta_values, resident.delta_values) and plain.delta_values.abs().min() > 0
    assert torch.equal(plain(some_x(dtype)), resident(some_x(dtype)))
    assert torch.equal(plain.weight, base) and not torch.equal(resident.weight, base)
    expected = definition.sparse_delta_patch(base, resident.delta_indices, resident.delta_values.detach())
    assert torch.equal(resident.weight, expected)
    resident.unmerge()
    assert torch.equal(resident.weight, base)
    resident.merge()
    assert torch.equal(resident.weight, expected)


def test_resident_costs_no_patch() -> None:
    from tests.support.counting import Calls

    _, resident, _ = pair()
    with Calls() as calls:
        resident(some_x().requires_grad_()).sum().backward()
    assert calls.compute["sparse_delta_patch"] == calls.compute["sparse_delta_write_"] == 0
    assert calls.compute["sparse_delta_dvalues"] == 1


def test_bytes_of_state_beside_a_16_bit_weight() -> None:
    """At most 20 for an active weight: index 4, base 2, delta 4, two states of 4, age 2."""
    _, resident, _ = pair(BF16)
    optimiser = SparseAdamW([resident.delta_values])
    train(resident, optimiser, 1)
    kept = [
        resident.delta_values,
        resident.delta_indices,
        resident.base_values,
        *optimiser.state[resident.delta_values].values(),
    ]
    assert sum(t.element_size() for t in kept if t is not None) == 20
    assert all(t.numel() == 154 for t in kept if t is not None)


@pytest.mark.parametrize("which", ["patched", "resident"])
def test_disabled_between_forward_and_backward(which: str) -> None:
    """As DPO runs its reference: no weight is written meanwhile, and the gradients are those without it."""
    layers = [pair()[which == "resident"] for _ in range(2)]
    base = linear()
    grads = []
    for k, layer in enumerate(layers):
        train(layer, SparseAdamW([layer.delta_values], lr=1e-2), 3)
        layer.zero_grad()
        x = some_x().requires_grad_()
        y = layer(x)
        if k:
            version = layer.weight._version
            with layer.disabled():
                assert torch.equal(layer(some_x()), base(some_x()))
            assert layer.weight._version == version
            assert not torch.equal(layer(some_x()), base(some_x()))
        y.square().sum().backward()
        grads.append((x.grad, layer.delta_values.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_writing_between_forward_and_backward_is_an_error() -> None:
    _, resident, _ = pair()
    y = resident(some_x().requires_grad_())
    resident.unmerge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_values_written_by_others_are_noticed() -> None:
    plain, resident, _ = pair()
    for layer in (plain, resident):
        train(layer, torch.optim.SGD([layer.delta_values], lr=0.5), 3)
    assert torch.equal(plain(some_x()), resident(some_x()))
    resident.delta_values.data.mul_(2)
    plain.delta_values.data.mul_(2)
    assert not torch.equal(plain(some_x()), resident(some_x()))  # .data bumps no counter
    resident.resync()
    assert torch.equal(plain(some_x()), resident(some_x()))


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_base_changed_behind_our_back_is_an_error(how: str) -> None:
    _, resident, _ = pair()
    optimiser = SparseAdamW([resident.delta_values], lr=1e-2)
    train(resident, optimiser, 2)
    kept = resident.delta_values.detach().clone()
    resident(some_x()).sum().backward()
    if how == "written":
        with torch.no_grad():
            resident.weight.add_(1.0)
    else:
        resident.weight.data = resident.weight.detach() + 1.0
    now = resident.weight.detach().clone()
    for call in (lambda: resident(some_x()), optimiser.step, resident.unmerge, resident.resync):
        with pytest.raises(RuntimeError, match=f"weight: {how} by others"):
            call()
    with resident.disabled(), pytest.raises(RuntimeError, match="by others"):
        resident(some_x())
    assert torch.equal(resident.weight, now) and torch.equal(resident.delta_values, kept)
    resident.rebase()
    resident(some_x())
    resident.unmerge()
    assert torch.equal(resident.weight, now)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_state_dict_holds_the_base_and_loads(dtype: torch.dtype) -> None:
    plain, resident, base = pair(dtype)
    train(resident, SparseAdamW([resident.delta_values], lr=1e-2), 3)
    state = resident.state_dict()
    assert set(state) == {"weight", "bias", "delta_values", "delta_indices"}
    assert torch.equal(state["weight"], base)
    plain.load_state_dict(state)
    assert torch.equal(plain(some_x(dtype)), resident(some_x(dtype)))
    other = SparseDeltaLinear.from_linear(linear(dtype, data=3), density=0.01, resident=True)
    parameter = other.delta_values
    other.load_state_dict(state)
    assert other.delta_values is parameter and other.merged
    assert torch.equal(other(some_x(dtype)), resident(some_x(dtype)))
    other.unmerge()
    assert torch.equal(other.weight, base)


def test_bad_indices_in_a_state_dict_change_nothing() -> None:
    plain, _, _ = pair()
    state = copy.deepcopy(plain.state_dict())
    before = plain.delta_indices.clone()
    for change in (lambda i: i.flip(0), lambda i: i + 64 * 48, lambda i: i.float()):
        bad = {**state, "delta_indices": change(state["delta_indices"]), "delta_values": state["delta_values"] + 1}
        with pytest.raises(RuntimeError, match="delta_indices: indices: expected"):
            plain.load_state_dict(bad)
        assert torch.equal(plain.delta_indices, before) and plain.delta_values.abs().max() == 0


def test_copies_and_pickles() -> None:
    _, resident, base = pair()
    train(resident, SparseAdamW([resident.delta_values], lr=1e-2), 3)
    stream = io.BytesIO()
    torch.save(resident, stream)
    stream.seek(0)
    for other in (copy.deepcopy(resident), torch.load(stream, weights_only=False)):
        assert layer_of(other.delta_values) is other
        assert torch.equal(other(some_x()), resident(some_x()))
        train(other, SparseAdamW([other.delta_values], lr=1e-2), 2)
        other.unmerge()
        assert torch.equal(other.weight, base)
    assert layer_of(resident.delta_values) is resident and resident.merged


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_takes_what_the_weight_does_not_hold_yet(way: Callable[[Any], Any]) -> None:
    """A step of another optimiser is put into the weight at the next forward, the copy's too; a weight that others wrote is an error in
    the copy as well."""
    _, resident, _ = pair()
    train(resident, torch.optim.SGD([resident.delta_values], lr=1.0), 1)
    other = way(resident)
    assert torch.equal(other(some_x()), resident(some_x()))
    with torch.no_grad():
        resident.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written by others"):
        way(resident)(some_x())


@pytest.mark.parametrize("trained", [False, True])
def test_a_weight_to_which_what_it_held_was_written(trained: bool) -> None:
    """As DDP does where it makes all workers' tensors the first one's; elsewhere than on the support it may have been another W."""
    _, resident, _ = pair()
    if trained:
        train(resident, SparseAdamW([resident.delta_values], lr=1e-2), 2)
    expected = resident(some_x())
    with torch.no_grad():
        for tensor in (*resident.parameters(), *resident.buffers()):
            tensor.copy_(tensor.clone())
    assert torch.equal(resident(some_x()), expected)
    train(resident, SparseAdamW([resident.delta_values], lr=1e-2), 2)
    with torch.no_grad():
        resident.weight.reshape(-1)[resident.delta_indices[0]] += 1
    with pytest.raises(RuntimeError, match="written by others"):
        resident(some_x())


def test_values_written_by_others_are_noticed_when_compiled() -> None:
    _, resident, _ = pair()
    compiled = torch.compile(resident, backend="aot_eager")
    for _ in range(3):
        with torch.no_grad():
            resident.delta_values.add_(1.0)
        y = compiled(some_x())
        assert torch.equal(y, resident(some_x()))


def test_values_of_one_call() -> None:
    """torch.func.functional_call lends a layer other values: they count, get their gradient, and are in no later call."""
    plain, resident, _ = pair()
    before = resident(some_x())
    for _ in range(2):  # the second are where the first were
        values = {"delta_values": torch.randn(resident.delta_values.shape, requires_grad=True)}
        y, expected = (torch.func.functional_call(layer, values, (some_x(),)) for layer in (resident, plain))
        (dy,) = torch.autograd.grad(y.square().sum(), list(values.values()))
        assert torch.equal(y, expected)
        assert torch.equal(dy, torch.autograd.grad(expected.square().sum(), list(values.values()))[0])
        del values, y, expected
    assert torch.equal(resident(some_x()), before)


def test_other_values_for_good() -> None:
    """A parameter that is put in the place of delta_values, as by load_state_dict(assign=True), is the layer's."""
    plain, resident, base = pair()
    resident(some_x())
    resident.delta_values = nn.Parameter(torch.randn_like(resident.delta_values))
    plain.load_state_dict(resident.state_dict(), assign=True)
    for layer in (plain, resident):
        assert layer_of(layer.delta_values) is layer
    assert torch.equal(resident(some_x()), plain(some_x()))
    plain.merge()
    assert torch.equal(resident.weight, plain.weight)
    resident.unmerge()
    assert torch.equal(resident.weight, base)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_from_the_meta_device(resident: bool, assign: bool) -> None:
    layer = pair()[resident]
    train(layer, SparseAdamW([layer.delta_values], lr=1e-2), 2)
    other = pair()[resident].to("meta")
    if not assign:
        torch.use_deterministic_algorithms(True)  # fresh memory comes filled with NaN and the largest integers
        try:
            other.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert other.merged == resident and torch.equal(other(some_x()), layer(some_x()))


def test_conversion_keeps_values_in_float32() -> None:
    _, resident, base = pair()
    train(resident, SparseAdamW([resident.delta_values], lr=1e-2), 3)
    values = resident.delta_values.detach().clone()
    resident.to(BF16)
    assert resident.delta_values.dtype == F32 and torch.equal(resident.delta_values, values)
    assert resident.weight.dtype == BF16 and resident.merged
    assert torch.equal(resident.weight, definition.sparse_delta_patch(base.to(BF16), resident.delta_indices, values))
    resident.unmerge()
    assert torch.equal(resident.weight, base.to(BF16))


@pytest.mark.parametrize("structure", ["rows", "columns", "blocks"])
def test_structured_layers_train(structure: str) -> None:
    shape = (48, 64)
    pattern = {
        "rows": lambda: F.SparsePattern.from_rows([0, 7], shape),
        "columns": lambda: F.SparsePattern.from_columns([5, 6, 7], shape),
        "blocks": lambda: F.SparsePattern.from_blocks([2, 3, 9], 16, shape),
    }[structure]()
    slab = SparseDeltaLinear.from_linear(linear(), indices=pattern, resident=True)
    scattered = SparseDeltaLinear.from_linear(linear(), indices=pattern.indices.clone())
    assert slab.pattern.structure == structure and scattered.pattern.structure is None
    for layer in (slab, scattered):
        train(layer, SparseAdamW([layer.delta_values], lr=1e-3), 5)
    assert torch.allclose(slab(some_x()), scattered(some_x()), atol=1e-4)
    slab.unmerge()
    assert torch.equal(slab.weight, linear().weight)


def test_gradients_accumulate() -> None:
    plain, _, _ = pair()
    x = torch.randn(8, 64)
    plain(x).square().sum().backward()
    whole = plain.delta_values.grad.clone()
    plain.zero_grad()
    for part in x.split(3):
        plain(part).square().sum().backward()
    assert torch.allclose(plain.delta_values.grad, whole, rtol=1e-4, atol=1e-5)


def test_four_bit_base_stays_packed() -> None:
    base = NF4Linear.from_linear(linear())
    packed = base.weight.detach().clone()
    layer = SparseDeltaLinear.from_linear(base, density=0.02, support="largest")
    assert isinstance(layer, SparseDeltaNF4Linear) and layer.weight.dtype == torch.uint8
    # Few rows go through the base in a product that decodes on its way, whose sums are in another order.
    many = some_x().repeat(20, 1)
    assert torch.equal(layer(many), base(many))
    train_layer = SparseAdamW([layer.delta_values], lr=1e-2)
    for _ in range(3):
        train_layer.zero_grad()
        layer(some_x()).square().mean().backward()
        train_layer.step()
    assert torch.equal(layer.weight, packed) and layer.delta_values.abs().min() > 0
    dense = F.nf4_dequantize(layer.nf4)
    dense = definition.sparse_delta_patch(dense, layer.delta_indices, layer.delta_values.detach())
    assert torch.equal(layer(many), nn.functional.linear(many, dense, layer.bias))
    assert torch.allclose(layer(some_x()), nn.functional.linear(some_x(), dense, layer.bias), rtol=1e-5, atol=1e-5)
    with layer.disabled():
        assert torch.equal(layer(some_x()), base(some_x()))
    other = SparseDeltaLinear.from_linear(NF4Linear.from_linear(linear(data=2)), density=0.01)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(some_x()), layer(some_x()))
    with pytest.raises(RuntimeError, match="merge: a 4-bit weight"):
        layer.merge()
    with pytest.raises(ValueError, match="resident: a 4-bit weight"):
        SparseDeltaLinear.from_linear(base, resident=True)


def bad_layers() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    def made(**options: Any) -> Callable[[], Any]:
        return lambda: SparseDeltaLinear.from_linear(linear(), **options)

    return {
        "no linear": (TypeError, "linear: expected an nn.Linear", lambda: SparseDeltaLinear.from_linear(nn.ReLU())),  # type: ignore[arg-type]
        "constructed": (TypeError, "made by from_linear", lambda: SparseDeltaLinear(3, 4)),
        "twice": (
            TypeError,
            "expected a layer without an adapter",
            lambda: SparseDeltaLinear.from_linear(SparseDeltaLinear.from_linear(linear())),
        ),
        "density": (ValueError, "density: expected", made(density=0)),
        "support": (ValueError, "support: expected", made(support="any")),
        "indices": (ValueError, "indices: expected ascending", made(indices=torch.tensor([3, 1]))),
        "beyond": (ValueError, "indices: expected all below 3072", made(indices=torch.tensor([3072]))),
        "pattern": (
            ValueError,
            "expected a pattern of shape",
            made(indices=F.SparsePattern(torch.tensor([1]), (64, 48))),
        ),
    }


@pytest.mark.parametrize("name", bad_layers())
def test_bad_layer(name: str) -> None:
    kind, message, call = bad_layers()[name]
    with pytest.raises(kind, match=message):
        call()


def test_move_support_keeps_what_stays() -> None:
    for merged in (False, True):
        _, layer, base = pair()
        if not merged:
            layer.unmerge()
        with torch.no_grad():
            layer.delta_values.copy_(torch.arange(1.0, 155.0))
        kept = dict(zip(layer.delta_indices.tolist(), layer.delta_values.tolist(), strict=True))
        free = sorted(set(range(48 * 64)) - set(kept))[:5]
        changed = torch.tensor([0, 3, 50, 100, 153])
        gone = layer.delta_indices[changed].tolist()
        order = layer.move_support(changed, torch.tensor(free))
        expected = {**{k: v for k, v in kept.items() if k not in gone}, **dict.fromkeys(free, 0.0)}
        assert dict(zip(layer.delta_indices.tolist(), layer.delta_values.tolist(), strict=True)) == expected
        assert layer.delta_indices.tolist() == sorted(expected) and layer.merged == merged
        assert order.sort().values.tolist() == list(range(154))
        with pytest.raises(ValueError, match="repeated"):
            layer.move_support(torch.tensor([0]), layer.delta_indices[1:2])
        layer.unmerge()
        assert torch.equal(layer.weight, base)


# The optimiser.


def test_steps_are_the_definitions_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.randn(61, generator=generator))
    optimiser = SparseAdamW([parameter], lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    value, states = parameter.detach().clone(), [torch.zeros(61), torch.zeros(61), torch.zeros(61, dtype=torch.int16)]
    hyper = definition.adam_hyper(3e-3, 0.8, 0.95, 1e-6, 0.2)
    corrections = definition.adam_corrections(0.8, 0.95, ages_of((0.8, 0.95)))
    for _ in range(6):
        parameter.grad = torch.randn(61, generator=generator)
        optimiser.step()
        value, *states = definition.sparse_adamw(value, parameter.grad, *states, hyper, corrections)
    assert torch.equal(parameter, value)
    for name, state in zip(("exp_avg", "exp_avg_sq", "age"), states, strict=True):
        assert torch.equal(optimiser.state[parameter][name], state)


def test_a_step_bumps_the_version_of_what_it_writes() -> None:
    """Else a backward through a parameter that a step changed meanwhile would go on silently."""
    plain, _, _ = pair()
    other = nn.Parameter(torch.ones(3))
    optimiser = SparseAdamW([plain.delta_values, other])
    y = (other * other).sum() + plain(some_x()).sum()
    plain.delta_values.grad, other.grad = torch.ones(154), torch.ones(3)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("bits", [32, 8])
def test_one_call_steps_all_layers(bits: int) -> None:
    """And nothing else of the size of the states is computed beside it."""
    from tests.support.counting import Calls

    layers = [pair()[1] for _ in range(4)]
    optimiser = SparseAdamW([layer.delta_values for layer in layers], state_bits=bits)
    for layer in layers:
        layer(some_x()).sum().backward()
    optimiser.step()
    with Calls() as calls:
        optimiser.step()
    name = "sparse_adamw_" if bits == 32 else "sparse_adamw8_"
    assert calls.compute[name] == 1
    assert not [other for other in calls.compute if other != name and not other.startswith("_record_function")]


def test_optimiser_state_resumes() -> None:
    _, first, _ = pair()
    optimiser = SparseAdamW([first.delta_values], lr=1e-2)
    train(first, optimiser, 4)
    stream = io.BytesIO()
    torch.save([first.state_dict(), optimiser.state_dict()], stream)
    stream.seek(0)
    layer_state, optimiser_state = torch.load(stream)
    _, second, _ = pair()
    resumed = SparseAdamW([second.delta_values], lr=1e-2)
    second.load_state_dict(layer_state)
    resumed.load_state_dict(optimiser_state)
    assert resumed.state[second.delta_values]["age"].dtype == torch.int16
    for layer, one in ((first, optimiser), (second, resumed)):
        train(layer, one, 3, data=8)
    assert torch.equal(first.delta_values, second.delta_values) and torch.equal(first.weight, second.weight)


def test_stochastic_rounding_of_the_weight() -> None:
    _, resident, base = pair(BF16)
    optimiser = SparseAdamW([resident.delta_values], lr=1e-2, stochastic_rounding=True, seed=4)
    train(resident, optimiser, 1)
    exact = base.flatten()[resident.delta_indices].float() + resident.delta_values.detach()
    expected = definition.stochastic_bf16(exact, resident.delta_indices, torch.tensor([5]), 0)
    assert torch.equal(resident.weight.flatten()[resident.delta_indices], expected)
    assert not torch.equal(expected, exact.to(BF16))
    first = resident.weight.detach().clone()
    resident.delta_values.grad = torch.zeros_like(resident.delta_values)
    for state in ("exp_avg", "exp_avg_sq"):
        optimiser.state[resident.delta_values][state].zero_()
    optimiser.step()  # the values stay, the draws are new
    assert not torch.equal(resident.weight, first)
    resident.unmerge()
    assert torch.equal(resident.weight, base)
    assert optimiser.state_dict()["rounding_seed"] == 6


def test_learning_rate_as_a_tensor_and_a_closure() -> None:
    values = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        plain, _, _ = pair()
        optimiser = SparseAdamW([plain.delta_values], lr=lr, weight_decay=0.1)

        def closure(layer: SparseDeltaLinear = plain) -> Tensor:
            layer.zero_grad()
            loss = layer(some_x()).square().mean()
            loss.backward()
            return loss

        assert optimiser.step(closure).item() > 0
        values.append(plain.delta_values.detach())
    assert torch.equal(*values)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copy_of_an_optimiser_goes_on_as_the_first(way: Callable[[Any], Any], bits: int) -> None:
    """With its states, its rates and the draws of its rounding."""
    layer = SparseDeltaLinear.from_linear(nn.Linear(64, 32).to(BF16), density=0.1, resident=True)
    optimiser = SparseAdamW([layer.delta_values], lr=1e-2, stochastic_rounding=True, seed=3, state_bits=bits)
    train(layer, optimiser, 2)
    other, its_optimiser = way((layer, optimiser))
    for one, steps in ((layer, optimiser), (other, its_optimiser)):
        train(one, steps, 3)
    assert torch.equal(layer.delta_values, other.delta_values) and torch.equal(layer.weight, other.weight)
    assert its_optimiser.state_dict()["rounding_seed"] == optimiser.state_dict()["rounding_seed"] == 8


def test_ages() -> None:
    assert age_dtype((0.9, 0.999)) == torch.int16 and age_dtype((0.9, 0.9999)) == torch.int32
    for betas in ((0.9, 0.999), (0.9, 0.9999), (0.0, 0.0), (0.5, 0.99)):
        table = definition.adam_corrections(*betas, ages_of(betas))
        assert table[:, -1].tolist() == [1.0, 1.0] and (table[:, 0] == 1).all()


@pytest.mark.parametrize("signed", [False, True])
def test_eight_bit_code(signed: bool) -> None:
    table = definition.state_codes()[0 if signed else 1]
    assert table.numel() == 256 and torch.equal(table, table.sort().values) and (table == 0).sum() == 1
    generator = torch.Generator().manual_seed(0)
    values = torch.exp2(torch.rand(1000, generator=generator) * -20) * (
        1 if not signed else torch.randn(1000, generator=generator).sign()
    )
    values[512:768] = 0.0
    bytes_, largest = definition.compress_states(values, table)
    assert bytes_.dtype == torch.uint8 and bytes_.shape == values.shape and largest.numel() == 4
    found = definition.expand_states(bytes_, largest, table)
    large = values.abs() > 2.0**-19
    assert ((found - values).abs()[large] <= 0.062 * values.abs()[large]).all()
    assert (found[512:768] == 0).all() and (found.sign() * values.sign() >= 0).all()
    blocks = torch.nn.functional.pad(values, (0, 24)).reshape(4, 256)
    assert torch.equal(largest, blocks.abs().amax(1))


def test_states_in_eight_bits() -> None:
    """They take 2 bytes and a 64th for an active weight, train as well, and resume where they were."""
    layers = [pair()[1] for _ in range(3)]
    optimisers = [
        SparseAdamW([layer.delta_values], lr=1e-2, state_bits=bits)
        for layer, bits in zip(layers, (32, 8, 8), strict=True)
    ]
    for layer, optimiser in list(zip(layers, optimisers, strict=True))[:2]:
        train(layer, optimiser, 12)
    state = optimisers[1].state[layers[1].delta_values]
    assert {name: t.dtype for name, t in state.items()} == {
        "exp_avg": torch.uint8,
        "exp_avg_max": F32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_max": F32,
        "age": torch.int16,
    }
    exact, close = (layer.delta_values.detach() for layer in layers[:2])
    assert not torch.equal(exact, close) and (exact - close).abs().mean() < 0.1 * exact.abs().mean()
    layers[2].load_state_dict(layers[1].state_dict())
    optimisers[2].load_state_dict(copy.deepcopy(optimisers[1].state_dict()))
    for k in (1, 2):
        train(layers[k], optimisers[k], 3, data=8)
    assert torch.equal(layers[1].delta_values, layers[2].delta_values)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("resident", [False, True])
def test_rosa(dtype: torch.dtype, resident: bool) -> None:
    torch.manual_seed(3)
    base = linear(dtype)
    layer = RoSALinear.from_linear(base, r=4, lora_alpha=8, density=0.05, resident=resident)
    weight = linear(dtype).weight.detach()
    assert torch.equal(layer(some_x(dtype)), nn.functional.linear(some_x(dtype), weight, base.bias))
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert trained.keys() == {"delta_values", "lora_A", "lora_B"} and "r=4, scaling=2" in repr(layer)
    optimiser = SparseAdamW(trained.values(), lr=1e-2)
    train(layer, optimiser, 4)
    layer.zero_grad()
    x, y = some_x(dtype), None
    y = layer(x)
    y.float().square().sum().backward()
    patched = definition.sparse_delta_patch(weight, layer.delta_indices, layer.delta_values.detach()).double()
    wide = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    bias = layer.bias.detach().double()
    zero = wide["delta_values"] - wide["delta_values"].detach()
    exact = definition.sparse_delta_linear(x.double(), patched, layer.delta_indices, zero, bias)
    exact = exact + 2.0 * (x.double() @ wide["lora_A"].T) @ wide["lora_B"].T
    exact.square().sum().backward()
    tolerance = 1e-4 if dtype == F32 else 3e-2
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()
    for name, parameter in trained.items():
        assert (parameter.grad.double() - wide[name].grad).abs().max() <= tolerance * wide[name].grad.abs().max(), name
    with layer.disabled():
        assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    with pytest.raises(TypeError, match="expected an nn.Linear with a floating weight"):
        RoSALinear.from_linear(NF4Linear.from_linear(linear()))
    with pytest.raises(ValueError, match="r: expected"):
        RoSALinear.from_linear(linear(), r=0)


def bad_optimisers() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    p = nn.Parameter(torch.ones(3))
    half = SparseDeltaLinear.from_linear(linear(F16))
    return {
        "dtype": (TypeError, "params: expected float32", lambda: SparseAdamW([nn.Parameter(torch.ones(3).half())])),
        "lr": (ValueError, "lr: expected", lambda: SparseAdamW([p], lr=-1.0)),
        "lr's type": (TypeError, "lr: expected", lambda: SparseAdamW([p], lr="1")),  # type: ignore[arg-type]
        "lr's size": (ValueError, "lr: expected one", lambda: SparseAdamW([p], lr=torch.ones(2))),
        "eps": (ValueError, "eps: expected", lambda: SparseAdamW([p], eps=float("nan"))),
        "betas": (ValueError, "betas: expected", lambda: SparseAdamW([p], betas=(0.9, 1.0))),
        "bits": (ValueError, "state_bits: expected 8 or 32", lambda: SparseAdamW([p], state_bits=16)),
        "decay": (ValueError, "weight_decay: expected", lambda: SparseAdamW([p], weight_decay=-0.1)),
        "float16": (
            ValueError,
            "stochastic_rounding: expected bfloat16",
            lambda: SparseAdamW([half.delta_values], stochastic_rounding=True),
        ),
    }


@pytest.mark.parametrize("name", bad_optimisers())
def test_bad_optimiser(name: str) -> None:
    kind, message, call = bad_optimisers()[name]
    with pytest.raises(kind, match=message):
        call()
