"""peftfast.optim.MeZO: the estimate, the update, and that nothing but the update is ever written."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.optim import MeZO
from peftfast.optim.mezo import SEED_STEP
from tests.support.counting import Calls
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.mezo_checks import (
    LABELS,
    TOKENS,
    closure_of,
    net,
    reference_step,
    same,
    state,
    z_of,
)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_step_without_learning_rate_changes_no_bit(dtype: torch.dtype, tied: bool, bare: bool) -> None:
    model = net(dtype, dropout=0.3, tied=tied)
    model.embedding.weight.data[0] = -0.0
    before, closure = state(model), closure_of(model)
    parameters = list(model.parameters()) if bare else model
    optimizer = MeZO(parameters, lr=0.0, eps=1e-3, directions=2, momentum=0.5, momentum_window=2, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(closure)
    assert same(model, before)
    assert len(optimizer.copied) == (1 if tied else 0)
    assert type(model.first) is nn.Linear and not any("_peftfast" in name for m in model.modules() for name in vars(m))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_thousands_of_steps_without_learning_rate(full: bool) -> None:
    """A layer that is moved in flight and a tensor that is copied. Ten thousand steps with --full: each draws other signs for the same
    few elements, and what is not put back is off after the first."""
    steps = 10_000 if full else 1_000
    model = nn.Linear(6, 5).to(BF16).to(DEVICE)
    model.loose = nn.Parameter(torch.randn(7, device=DEVICE).to(BF16))
    x, before = torch.randn(2, 6, device=DEVICE).to(BF16), state(model)
    optimizer = MeZO(model, lr=0.0, eps=1e-2, distribution="rademacher")
    for _ in range(steps):
        optimizer.step(lambda: model(x).float().mean() + model.loose.float().sum())
    assert same(model, before) and optimizer.steps == steps and optimizer.copied == ["loose"]


def test_inplace_drifts_as_its_docstring_says() -> None:
    """+eps -2 eps +eps in bfloat16 at eps = 1e-3 and weights of 0.02: about 46 % of the weights change in a step."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False).to(BF16).to(DEVICE)
    layer.weight.data = (torch.randn(512, 512) * 0.02).to(BF16).to(DEVICE)
    x, before = torch.randn(2, 512, device=DEVICE).to(BF16), layer.weight.detach().clone()
    MeZO(layer, lr=0.0, eps=1e-3, mode="inplace", stochastic_rounding=False).step(lambda: layer(x).float().mean())
    changed = (layer.weight != before).double().mean().item()
    assert 0.35 < changed < 0.55
    MeZO(layer, lr=0.0, eps=1e-3).step(lambda: layer(x).float().mean())


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_trajectory_is_the_reference_formula_s(mode: str, distribution: str) -> None:
    model = net()
    optimizer = MeZO(model, lr=1e-3, eps=1e-2, mode=mode, distribution=distribution, seed=5, weight_decay=0.1)
    mine = [p.detach().clone().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    wide = copy.deepcopy(model).double()

    def loss(values: list[Tensor]) -> Tensor:
        outputs = torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (TOKENS,))
        return nn.functional.cross_entropy(outputs, LABELS)

    closure = closure_of(model)
    for step in range(20):
        z = [d.double() for d in z_of(model, (5 + step * SEED_STEP) % 2**64, distribution)]
        reference_step(mine, loss, z, 1e-3, 1e-2, 0.1)
        optimizer.step(closure)
    for p, right in zip(model.parameters(), mine, strict=True):
        torch.testing.assert_close(p.detach().double(), right, rtol=1e-6, atol=1e-6)


def quadratic(dtype: torch.dtype = F32) -> tuple[nn.Linear, Tensor, Callable[[], Tensor]]:
    layer = nn.Linear(4, 3, bias=False).to(DEVICE)
    optimum = torch.linspace(-1, 1, 12, device=DEVICE).reshape(3, 4)
    with torch.no_grad():
        layer.weight.zero_()
    layer = layer.to(dtype)
    identity = torch.eye(4, device=DEVICE).to(dtype)
    return layer, optimum, lambda: (layer(identity).T.float() - optimum).square().sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "inplace"},
        {"distribution": "rademacher"},
        {"two_sided": False},
        {"two_sided": False, "mode": "inplace"},
        {"directions": 3},
        {"directions": 3, "mode": "inplace"},
        {"momentum": 0.5, "lr": 1e-2},
        {"momentum": 0.5, "lr": 1e-2, "mode": "inplace"},
        {"clip": 1.0},
        {"paired": True},
    ],
    ids=str,
)
def test_a_quadratic_is_descended(options: dict[str, Any]) -> None:
    """The sign, and the size: after 600 steps the known optimum, whatever the option."""
    options = dict(options)
    paired = options.pop("paired", False)
    layer, optimum, closure = quadratic()
    if paired:
        identity = torch.eye(4, device=DEVICE).repeat(2, 1)

        def closure() -> Tensor:  # type: ignore[misc]
            plus, minus = layer(identity).chunk(2)
            return torch.stack([(y.T - optimum).square().sum() for y in (plus, minus)])

    optimizer = MeZO(layer, **{"lr": 2e-2, "eps": 1e-3, "seed": 3, **options})
    for _ in range(600):
        optimizer.step(closure, paired=paired)
    assert (layer.weight.detach() - optimum).abs().max() < (0.15 if options.get("two_sided") is False else 2e-2)


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("directions", [1, 3])
def test_one_side_gives_the_slope_of_two(mode: str, directions: int) -> None:
    """Of a linear loss, whose slope is the same on either side."""
    moved = []
    for two_sided in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 12, device=DEVICE))
        MeZO([weight], lr=0.1, eps=0.25, mode=mode, directions=directions, two_sided=two_sided, seed=3).step(
            lambda weight=weight: (weight * torch.arange(12.0, device=DEVICE)).sum()  # type: ignore[misc]
        )
        moved.append(weight.detach() - torch.linspace(-1, 1, 12, device=DEVICE))
    assert moved[0].abs().max() > 0.1
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)


def test_16_bits_descend_by_stochastic_rounding() -> None:
    """Updates far below half a unit: to nearest they are lost."""
    reached = {}
    for rounding in (True, False):
        layer, optimum, closure = quadratic(BF16)
        with torch.no_grad():
            layer.weight.copy_((optimum + 0.5).to(BF16))
        optimizer = MeZO(layer, lr=2e-5, eps=1e-2, seed=3, stochastic_rounding=rounding)
        before = closure().item()
        for _ in range(3000):
            optimizer.step(closure)
        reached[rounding] = closure().item() / before
    assert reached[True] < 0.97 < reached[False] + 0.02


def test_both_sides_see_the_same_dropout() -> None:
    model = net(dropout=0.5)
    seen: list[Tensor] = []
    model.dropout.register_forward_hook(lambda _, __, out: seen.append(out == 0))
    torch.manual_seed(4)
    optimizer = MeZO(model, lr=1e-4, directions=2, seed=1)
    optimizer.step(closure_of(model))
    assert len(seen) == 5 and all(torch.equal(seen[0], mask) for mask in seen)
    state_after = torch.get_rng_state()
    torch.manual_seed(4)
    closure_of(model)()
    assert torch.equal(torch.get_rng_state(), state_after), "a step draws as much as one call of the closure"
    again: list[Tensor] = []
    x = torch.ones(1000, device=DEVICE)
    parameter = nn.Parameter(torch.zeros(1, device=DEVICE))

    def closure() -> Tensor:
        again.append(nn.functional.dropout(x, 0.5))
        return parameter.sum()

    second = MeZO([parameter], lr=1e-3)
    second.step(closure)
    second.step(closure)
    assert torch.equal(again[0], again[1]) and torch.equal(again[1], again[2]) and torch.equal(again[3], again[4])
    assert not torch.equal(again[2], again[3])


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize(
    "options", [{}, {"two_sided": False}, {"directions": 2}, {"two_sided": False, "directions": 2}], ids=str
)
def test_a_step_draws_as_much_as_one_call(mode: str, options: dict[str, Any]) -> None:
    """Random numbers go on from step to step: the first step's mask is not the second's, whatever is evaluated in between."""
    model = net(dropout=0.5)
    optimizer = MeZO(model, lr=1e-4, seed=1, mode=mode, **options)
    torch.manual_seed(4)
    for _ in range(2):
        optimizer.step(closure_of(model))
    after = torch.get_rng_state()
    torch.manual_seed(4)
    for _ in range(2):
        closure_of(model)()
    assert torch.equal(torch.get_rng_state(), after)


def test_a_search_for_weights_read_elsewhere_draws_nothing() -> None:
    """Where other layers are called than before, the closure is watched again, and sees the random numbers of the step."""
    model, other = net(dropout=0.5), nn.Linear(5, 5).to(DEVICE)
    closures = [lambda: nn.functional.cross_entropy(other(model(TOKENS)), LABELS), closure_of(model)]
    optimizer = MeZO(nn.ModuleList([model, other]), lr=1e-4, seed=1)
    torch.manual_seed(4)
    for closure in closures:
        optimizer.step(closure)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    for closure in closures:
        closure()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model() -> None:
    plain, inner = net(gain=False), net(gain=False)
    compiled = torch.compile(inner, backend="aot_eager")
    optimizers = [MeZO(model, lr=1e-2, eps=1e-2, seed=3) for model in (plain, inner)]
    for _ in range(2):
        optimizers[0].step(closure_of(plain))
        optimizers[1].step(closure_of(compiled))
    assert optimizers[1].copied == []
    for p, q in zip(plain.parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_an_autocast_around_the_step_remembers_no_weight() -> None:
    """Its cache holds 16-bit copies of parameters, which would stay where the copied ones were before."""
    x = torch.randn(4, 8, device=DEVICE)
    results = []
    for outside in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 64, device=DEVICE).reshape(8, 8))
        optimizer = MeZO([weight], lr=1e-2, eps=0.1, seed=1)

        def loss(weight: Tensor = weight) -> Tensor:
            return (x @ weight).float().square().mean()

        def autocast_loss(loss: Callable[[], Tensor] = loss) -> Tensor:
            with torch.autocast(DEVICE.type, dtype=BF16):
                return loss()

        for _ in range(3):
            if outside:
                with torch.autocast(DEVICE.type, dtype=BF16), torch.enable_grad():
                    loss()  # fills the cache
                    optimizer.step(loss)
            else:
                optimizer.step(autocast_loss)
        results.append(weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], torch.linspace(-1, 1, 64, device=DEVICE).reshape(8, 8))


def test_perturbed_weights_are_rounded_once() -> None:
    layer = nn.Linear(16, 16, bias=False).to(BF16).to(DEVICE)
    seen = []
    layer.register_forward_pre_hook(lambda module, _: None)
    x = torch.eye(16, device=DEVICE).to(BF16)

    def closure() -> Tensor:
        y = layer(x)
        seen.append(y.T.clone())
        return y.float().sum()

    before = layer.weight.detach().clone()
    MeZO(layer, lr=0.0, eps=1e-2, seed=9).step(closure)
    z = F.perturbation((16, 16), 9, device=DEVICE)
    eps = torch.tensor(1e-2, device=DEVICE)
    assert torch.equal(seen[1], (before.float() + eps * z).bfloat16())
    assert torch.equal(seen[2], (before.float() - eps * z).bfloat16())


def test_what_is_called_is_found_again_when_it_changes() -> None:
    """In eval, torch's encoder layer reads its linear layers' weights past their forwards."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(DEVICE)
    layer.train()
    x = torch.randn(2, 5, 16, device=DEVICE)
    optimizer = MeZO(layer, lr=0.0, eps=1e-2, seed=4)
    seen = []

    def closure() -> Tensor:
        loss = layer(x).square().mean()
        seen.append(loss.item())
        return loss

    optimizer.step(closure)
    assert "self_attn.out_proj.weight" in optimizer.copied and "linear1.weight" not in optimizer.copied
    training = seen[1:3]
    layer.eval()
    before = state(layer)
    seen.clear()
    optimizer._steps = 0  # the same direction again
    optimizer.step(closure)
    assert same(layer, before)
    assert "linear1.weight" in optimizer.copied
    torch.testing.assert_close(torch.tensor(seen[-2:]), torch.tensor(training), rtol=1e-5, atol=1e-6)


def test_layers_that_are_not_always_called() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(DEVICE)
    x, turn = torch.randn(3, 4, device=DEVICE), [0]
    optimizer = MeZO(model, lr=1e-2, eps=1e-2)

    def closure() -> Tensor:
        return model[turn[0]](x).square().mean()

    for step in range(6):
        turn[0] = step % 2
        before = state(model)
        optimizer.step(closure)
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_bare_tensors_without_a_module_are_copied() -> None:
    theta = torch.zeros(5, device=DEVICE)
    optimizer = MeZO([theta], lr=0.05, eps=1e-3, seed=1)
    for _ in range(300):
        optimizer.step(lambda: (theta - 1).square().sum())
    assert (theta - 1).abs().max() < 0.05 and optimizer.copied == ["0"]


def test_hooks_and_overridden_forwards_still_work() -> None:
    model = net()
    model.first.forward = model.first.forward  # on the object: a swapped class would not be asked
    calls = []
    model.second.register_forward_hook(lambda *_: calls.append(1))
    optimizer = MeZO(model, lr=0.0)
    before = state(model)
    optimizer.step(closure_of(model))
    assert len(calls) == 3 and {"first.weight", "first.bias"} <= set(optimizer.copied)
    assert same(model, before)


def test_a_step_launches_little_and_computes_no_normal_of_torch() -> None:
    model = net()
    optimizer = MeZO(model, lr=1e-3, seed=8)
    closure = closure_of(model)
    optimizer.step(closure)
    with Calls() as plain:
        closure()
    with Calls() as calls:
        optimizer.step(closure)
    modules = sum(1 for m in model.modules() if m._parameters and not isinstance(m, nn.Dropout))
    assert calls.compute["perturb_"] == 2 * modules + 1
    assert not {"normal_", "randn", "clone"} & set(calls.compute), calls.compute
    # On a GPU the scalars of the step travel to pinned memory, and nothing else is copied.
    assert calls.compute["copy_"] <= (DEVICE.type != "cpu"), calls.compute
    assert plain.compute["addmm"] * 2 == calls.compute["addmm"]


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    model = net(BF16)
    optimizer = MeZO(model, lr=1e-3, seed=8, weight_decay=0.1, momentum=0.5, momentum_window=2, clip=1.0)
    closure = closure_of(model)
    optimizer.step(closure)
    optimizer.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.check()


def test_extra_memory_is_a_layer_s() -> None:
    """Scratch lives as long as its layer's forward: never more than the largest two at once."""
    alive: list[weakref.ref[Tensor]] = []
    most = [0]

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.weight, nn.Parameter):
                alive.append(weakref.ref(self.weight))
                most[0] = max(most[0], sum(one() is not None for one in alive))
            return super().forward(x)

    model = nn.Sequential(*(Watched(64, 64, bias=False) for _ in range(10))).to(DEVICE)
    optimizer = MeZO(model, lr=0.0)
    optimizer.step(lambda: model(torch.ones(1, 64, device=DEVICE)).mean())
    assert len(alive) == 20 and most[0] <= 2
