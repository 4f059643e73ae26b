"""peftfast.optim.MeZO: the estimate, the update, and that nothing but the update is ever written."""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.optim import MeZO, trainable_scales
from peftfast.optim.mezo import SEED_STEP
from tests.support.counting import Calls
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.zo_checks import bits


class Net(nn.Module):
    """Every way to hold a parameter: embedding, linear, normalisation, a bare parameter, a weight read where it does not live."""

    def __init__(self, dropout: float = 0.0, tied: bool = False, gain: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(64, 32, bias=False)
        self.gain = nn.Parameter(torch.ones(32)) if gain else 1.0
        self.head = nn.Linear(32, 5)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.first(self.embedding(tokens)).relu())
        x = self.second(self.dropout(x)) * self.gain
        if self.tied:
            x = x + 0.01 * nn.functional.linear(x @ self.embedding.weight.T, self.embedding.weight.T)
        return self.head(x).mean(1)


TOKENS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
LABELS = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def net(dtype: torch.dtype = F32, **options: Any) -> Net:
    return Net(**options).to(dtype).to(DEVICE)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(model(TOKENS).float(), LABELS)


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(bits(p.detach()), bits(old)) for p, old in zip(model.parameters(), before, strict=True))


def z_of(model: nn.Module, seed: int, distribution: str = "gaussian") -> list[Tensor]:
    return [
        F.perturbation(p.shape, seed, tensor_id=i, device=DEVICE, distribution=distribution)
        for i, p in enumerate(model.parameters())
    ]


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


@pytest.mark.slow
def test_ten_thousand_steps_without_learning_rate() -> None:
    """A layer that is moved in flight and a tensor that is copied."""
    model = nn.Linear(6, 5).to(BF16).to(DEVICE)
    model.loose = nn.Parameter(torch.randn(7, device=DEVICE).to(BF16))
    x, before = torch.randn(2, 6, device=DEVICE).to(BF16), state(model)
    optimizer = MeZO(model, lr=0.0, eps=1e-2, distribution="rademacher")
    for _ in range(10_000):
        optimizer.step(lambda: model(x).float().mean() + model.loose.float().sum())
    assert same(model, before) and optimizer.steps == 10_000 and optimizer.copied == ["loose"]


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


def reference_step(
    parameters: list[Tensor], loss: Callable[[list[Tensor]], Tensor], z: list[Tensor], lr: float, eps: float, wd: float
) -> float:
    """MeZO's algorithm 1 in plain torch, with the same z."""
    plus = loss([p + eps * d for p, d in zip(parameters, z, strict=True)])
    minus = loss([p - eps * d for p, d in zip(parameters, z, strict=True)])
    g = ((plus - minus) / (2 * eps)).item()
    for p, d in zip(parameters, z, strict=True):
        p.mul_(1 - lr * wd).sub_(lr * g * d)
    return g


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


def test_every_option_of_the_update_by_hand() -> None:
    """Momentum, decay, directions and clipping over three steps, in float64 by the formula."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 7, device=DEVICE))
    target = torch.linspace(1, 2, 7, device=DEVICE)

    def loss(theta: Tensor) -> Tensor:
        return ((theta - target.to(theta.dtype)) ** 2).sum()

    options = {"lr": 0.01, "eps": 0.01, "weight_decay": 0.5, "momentum": 0.5, "momentum_window": 2, "directions": 2}
    optimizer = MeZO([parameter], seed=11, clip=3.0, **options)  # type: ignore[arg-type]
    theta = parameter.detach().double().clone()
    history: list[list[tuple[float, Tensor]]] = []
    for step in range(3):
        found = []
        for i in range(2):
            z = F.perturbation((7,), (11 + (2 * step + i) * SEED_STEP) % 2**64, device=DEVICE).double()
            g = ((loss(theta + 0.01 * z) - loss(theta - 0.01 * z)) / 0.02).item()
            found.append((max(-3.0, min(3.0, g)), z))
        history.insert(0, found)
        update = sum(0.5**age * g * z / 2 for age, pairs in enumerate(history[:2]) for g, z in pairs)
        theta = theta * (1 - 0.01 * 0.5) - 0.01 * update
        optimizer.step(lambda: loss(parameter))
    torch.testing.assert_close(parameter.detach().double(), theta, rtol=0, atol=2e-5)


def test_micro_batches_are_averaged() -> None:
    parts = [(TOKENS[:4], LABELS[:4]), (TOKENS[4:], LABELS[4:])]
    whole, cut = net(), net()

    def part(tokens: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(cut(tokens), labels)

    first, second = MeZO(whole, lr=1e-2, seed=1), MeZO(cut, lr=1e-2, seed=1)
    for _ in range(3):
        a = first.step(closure_of(whole))
        b = second.step([part(*pair) for pair in parts])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_filter_leaves_ids_and_other_weights_alone() -> None:
    model, all_of_it = net(), net()
    before = state(model)
    optimizer = MeZO(model, lr=1e-2, seed=1, filter=lambda name, _: name.startswith("head"))
    optimizer.step(closure_of(model))
    changed = [name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)]
    assert changed == ["head.weight", "head.bias"]
    number = [name for name, _ in model.named_parameters()].index("head.weight")
    moved = model.head.weight.detach() - before[number]
    z = F.perturbation(moved.shape, 1, tensor_id=number, device=DEVICE)
    correlation = torch.corrcoef(torch.stack((moved.flatten(), z.flatten())))[0, 1].abs()
    assert correlation > 0.999
    del all_of_it


def test_frozen_parameters_of_a_module_stay() -> None:
    model = net()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.detach().clone()
    optimizer = MeZO(model, lr=1e-2)
    optimizer.step(closure_of(model))
    assert torch.equal(model.embedding.weight, before)


def test_groups_have_their_own_rates() -> None:
    model = net()
    before = state(model)
    groups = [
        {"params": [("first", model.first.weight)], "lr": 1e-2},
        {"params": [model.second.weight], "lr": 0.0, "weight_decay": 0.0},
    ]
    optimizer = MeZO(groups, seed=2)
    optimizer.step(closure_of(model))
    names = [name for name, _ in model.named_parameters()]
    assert not torch.equal(model.first.weight, before[names.index("first.weight")])
    assert torch.equal(model.second.weight, before[names.index("second.weight")])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step(closure_of(model))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5e-2


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sparse_mezo_moves_small_weights_alone(dtype: torch.dtype) -> None:
    model = net(dtype)
    before, weight = state(model), model.first.weight.detach().clone()
    threshold = weight.abs().float().flatten().kthvalue(math.ceil(0.25 * weight.numel())).values
    optimizer = MeZO(model, lr=1.0, eps=1e-2, density=0.25, seed=6, distribution="rademacher")
    seen = []
    model.first.register_forward_hook(lambda module, _, __: seen.append(module._parameters["weight"].detach().clone()))
    optimizer.step(closure_of(model))
    small = weight.abs().float() <= threshold
    for moved in seen[1:]:
        assert torch.equal(moved[~small], weight[~small]) and (moved[small] != weight[small]).double().mean() > 0.99
    assert torch.equal(model.first.weight.detach()[~small], weight[~small])
    names = [name for name, _ in model.named_parameters()]
    assert not torch.equal(model.norm.weight, before[names.index("norm.weight")])  # one dimension: no threshold


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


@pytest.mark.parametrize(("mode", "at"), [("exact", 0), ("exact", 1), ("exact", 2), ("inplace", 0), ("inplace", 1)])
def test_an_exception_in_the_closure_restores_the_weights(mode: str, at: int) -> None:
    model = net(tied=True)
    before, count = state(model), [0]
    optimizer = MeZO(model, lr=1.0, eps=1e-2, mode=mode, seed=3)

    def closure() -> Tensor:
        count[0] += 1
        if count[0] > at:
            raise RuntimeError("out of data")
        return closure_of(model)()

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    if mode == "exact":
        assert same(model, before)
    else:
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_step_out_and_is_raised_at_the_next(mode: str, bad: float) -> None:
    model = net()
    optimizer = MeZO(model, lr=1e-2, mode=mode, momentum=0.5, momentum_window=2, weight_decay=0.1)
    optimizer.step(closure_of(model))
    before = state(model)
    optimizer.step(lambda: closure_of(model)() * bad)
    if mode == "exact":
        assert same(model, before)
    else:
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="closure: the loss was not finite in step 1"):
        optimizer.step(closure_of(model))
    optimizer.step(closure_of(model))
    optimizer.step(lambda: closure_of(model)() * bad)
    with pytest.raises(ValueError, match="not finite in step 3"):
        optimizer.check()
    optimizer.check()


BAD_CLOSURES: dict[str, tuple[type, str, Any]] = {
    "none": (TypeError, "closure: expected a function", None),
    "empty": (TypeError, "closure: expected a function", []),
    "vector": (ValueError, "closure: expected a loss of one element, got shape", lambda: torch.ones(2, device=DEVICE)),
    "nothing": (TypeError, "closure: expected a loss", lambda: None),
    "device": (ValueError, "closure: expected a loss on", lambda: torch.ones(1, device="meta")),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_bad_closures(name: str, mode: str) -> None:
    kind, message, closure = BAD_CLOSURES[name]
    model = net()
    before = state(model)
    with pytest.raises(kind, match=message):
        MeZO(model, lr=1.0, mode=mode).step(closure)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0 if mode == "exact" else 1e-6)


W = nn.Parameter(torch.ones(3))
BAD_ARGUMENTS: dict[str, tuple[type, str, Callable[[], Any]]] = {
    "eps zero": (ValueError, "eps: expected a number above 0", lambda: MeZO([W], eps=0.0)),
    "eps tiny": (ValueError, "eps: expected a number above 0", lambda: MeZO([W], eps=1e-60)),
    "eps nan": (ValueError, "eps: expected", lambda: MeZO([W], eps=math.nan)),
    "lr": (ValueError, "lr: expected", lambda: MeZO([W], lr=-1.0)),
    "seed": (ValueError, "seed: expected 64 bits", lambda: MeZO([W], seed=2**64)),
    "mode": (ValueError, "mode: expected one of exact, inplace", lambda: MeZO([W], mode="fast")),
    "distribution": (ValueError, "distribution: expected", lambda: MeZO([W], distribution="cauchy")),
    "directions": (ValueError, "directions: expected", lambda: MeZO([W], directions=0)),
    "momentum": (ValueError, "momentum: expected", lambda: MeZO([W], momentum=1.0)),
    "window": (ValueError, "momentum_window: expected", lambda: MeZO([W], momentum=0.5, momentum_window=0)),
    "clip": (ValueError, "clip: expected", lambda: MeZO([W], clip=0.0)),
    "density": (ValueError, "density: expected", lambda: MeZO([W], density=1.5)),
    "sparse inplace": (ValueError, "density: Sparse MeZO needs", lambda: MeZO([W], density=0.5, mode="inplace")),
    "rank": (ValueError, "rank: expected an int", lambda: MeZO([W], rank=0)),
    "rank inplace": (ValueError, "rank: expected mode", lambda: MeZO([W], rank=1, mode="inplace")),
    "rank and density": (ValueError, "rank: expected mode", lambda: MeZO([W], rank=1, density=0.5)),
    "nothing": (ValueError, "params: expected at least one", lambda: MeZO([])),
    "frozen": (ValueError, "params: expected at least one", lambda: MeZO(nn.Linear(2, 2).requires_grad_(False))),
    "a tensor": (TypeError, "params: expected a module", lambda: MeZO(W)),
    "integers": (TypeError, "expected a floating", lambda: MeZO([torch.ones(2, dtype=torch.int64)])),
    "devices": (ValueError, "params: expected all on one device", lambda: MeZO([W, torch.ones(2, device="meta")])),
    "meta": (ValueError, "params: expected tensors with data", lambda: MeZO([torch.ones(2, device="meta")])),
    "process group": (ValueError, "process_group: torch.distributed", lambda: MeZO([W], process_group=True)),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    kind, message, call = BAD_ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        call()


def paired_closure(model: nn.Module) -> Callable[[], Tensor]:
    tokens = TOKENS.repeat(2, 1)

    def closure() -> Tensor:
        outputs = model(tokens).float().chunk(2)
        return torch.stack([nn.functional.cross_entropy(out, LABELS) for out in outputs])

    return closure


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_paired_gives_the_losses_of_two_forwards(dtype: torch.dtype) -> None:
    one, two = net(dtype, gain=False), net(dtype, gain=False)
    single, paired = MeZO(one, lr=1e-2, eps=1e-2, seed=8), MeZO(two, lr=1e-2, eps=1e-2, seed=8)
    for _ in range(2):
        first = single.step(closure_of(one))
        second = paired.step(paired_closure(two), paired=True)
        torch.testing.assert_close(first, second, rtol=1e-5 if dtype == F32 else 2e-2, atol=1e-5)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 if dtype == F32 else 3e-2)
    assert paired.paired_fallbacks == ["embedding", "norm"], "linear layers are served, the others named"


def test_paired_calls_the_fused_layer() -> None:
    model = net(gain=False)
    optimizer = MeZO(model, lr=0.0, seed=8)
    optimizer.step(paired_closure(model), paired=True)
    with Calls() as calls:
        optimizer.step(paired_closure(model), paired=True)
    assert calls.compute["zo_linear"] == 3


def test_what_paired_refuses() -> None:
    for model, message in (
        (net(dropout=0.5, gain=False), "draws random numbers"),
        (net(tied=True, gain=False), "embedding.weight"),
        (net(), "gain"),
    ):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            MeZO(model, lr=1.0).step(paired_closure(model), paired=True)
        assert same(model, before)
    model = net(gain=False)
    with pytest.raises(ValueError, match="paired: expected mode='exact'"):
        MeZO(model, mode="inplace").step(paired_closure(model), paired=True)
    with pytest.raises(ValueError, match="two losses"):
        MeZO(model).step(closure_of(model), paired=True)
    with pytest.raises(ValueError, match="doubled batch"):
        MeZO(model).step(lambda: torch.stack([model(TOKENS[:1]).mean()] * 2), paired=True)


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
    assert not {"normal_", "randn", "clone", "copy_"} & set(calls.compute), calls.compute
    assert "_local_scalar_dense" not in calls.compute or calls.compute["_local_scalar_dense"] <= 64
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


def low_rank_z(p: Tensor, seed: int, tensor_id: int, rank: int) -> Tensor:
    """By the definition in the docstring; dense where a side is not larger than the rank."""
    if p.dim() != 2 or min(p.shape) <= rank:
        return F.perturbation(p.shape, seed, tensor_id=tensor_id, device=DEVICE).double()
    rows, columns = p.shape
    both = F.perturbation(((rows + columns) * rank,), seed, tensor_id=tensor_id, device=DEVICE).double()
    return both[: rows * rank].reshape(rows, rank) @ both[rows * rank :].reshape(columns, rank).T / rank**0.5


@pytest.mark.parametrize(("tied", "paired"), [(False, False), (True, False), (False, True)])
def test_low_rank_directions(tied: bool, paired: bool) -> None:
    """Against the formula in float64: layers by factors, a table, a copied matrix, vectors, a head smaller than the rank."""
    model = net(tied=tied, gain=not paired)
    before = state(model)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=5, rank=8, directions=2, weight_decay=0.1)
    mine = [p.detach().clone().double() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    wide = copy.deepcopy(model).double()

    def loss(values: list[Tensor]) -> Tensor:
        outputs = torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (TOKENS,))
        return nn.functional.cross_entropy(outputs, LABELS)

    for step in range(2):
        updates = [torch.zeros_like(p) for p in mine]
        for i in range(2):
            seed = (5 + (2 * step + i) * SEED_STEP) % 2**64
            z = [low_rank_z(p, seed, k, 8) for k, p in enumerate(mine)]
            plus, minus = (loss([p + s * 1e-2 * d for p, d in zip(mine, z, strict=True)]) for s in (1, -1))
            for update, d in zip(updates, z, strict=True):
                update += (plus - minus) / 2e-2 * d / 2
        for p, update in zip(mine, updates, strict=True):
            p.mul_(1 - 1e-3).sub_(1e-2 * update)
        optimizer.step(paired_closure(model) if paired else closure_of(model), paired=paired)
    for p, right, old in zip(model.parameters(), mine, before, strict=True):
        torch.testing.assert_close(p.detach().double(), right, rtol=1e-5, atol=1e-5)
        assert not torch.equal(p.detach(), old)


def test_low_rank_writes_no_moved_weight() -> None:
    model = nn.Linear(64, 48, device=DEVICE)
    x = torch.randn(8, 64, device=DEVICE)
    optimizer = MeZO(model, lr=0.0, rank=4, weight_decay=0.0)
    before = state(model)
    optimizer.step(lambda: model(x).mean())
    with Calls() as calls:
        optimizer.step(lambda: model(x).mean())
    assert calls.compute["lora_shrink"] == 2 and calls.compute["lora_expand_"] == 3  # the third is the update
    assert same(model, before)


def test_state_dict_continues_a_run() -> None:
    one, two = net(), net()
    options = {"lr": 1e-2, "momentum": 0.5, "momentum_window": 3, "density": 0.5}
    whole = MeZO(one, seed=8, **options)  # type: ignore[arg-type]
    for _ in range(4):
        whole.step(closure_of(one))
    begun = MeZO(two, seed=8, **options)  # type: ignore[arg-type]
    for _ in range(2):
        begun.step(closure_of(two))
    saved = copy.deepcopy(begun.state_dict())
    resumed = MeZO(two, seed=99, **options)  # type: ignore[arg-type]
    resumed.load_state_dict(saved)
    for _ in range(2):
        resumed.step(closure_of(two))
    assert same(one, state(two)) and resumed.steps == 4
    with pytest.raises(ValueError, match="state_dict: expected that of a MeZO"):
        MeZO(two, seed=9).load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict: expected"):
        MeZO(two, seed=9).load_state_dict(torch.optim.SGD(two.parameters(), lr=1.0).state_dict())


def test_seeds_come_from_torch_s_generator() -> None:
    torch.manual_seed(5)
    first = MeZO([W])._seed
    torch.manual_seed(5)
    assert MeZO([W])._seed == first != MeZO([W])._seed


def test_adapters_of_a_patched_peft_model() -> None:
    """LoRA parameters on a 4-bit base: what is trained moves, what is frozen does not, and peftfast's own layers are no obstacle."""
    from peftfast.nn import LoRALinear, NF4Linear

    torch.manual_seed(0)
    base = NF4Linear.from_linear(nn.Linear(64, 32))
    layer = LoRALinear.from_linear(base, r=4, init_lora_weights=False).to(DEVICE)
    x, target = torch.randn(16, 64, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    packed = layer.weight.detach().clone()

    def closure() -> Tensor:
        return (layer(x) - target).square().mean()

    optimizer = MeZO(layer, lr=2e-3, eps=1e-3, seed=1)
    before = closure().item()
    for _ in range(200):
        optimizer.step(closure)
    assert closure().item() < 0.9 * before
    assert torch.equal(layer.weight, packed) and optimizer.copied == []


def test_block_scales_of_a_4_bit_weight() -> None:
    from peftfast.nn import NF4Linear

    torch.manual_seed(0)
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64)), nn.ReLU(), NF4Linear.from_linear(nn.Linear(64, 8)))
    model = model.to(DEVICE)
    x, target = torch.randn(32, 64, device=DEVICE), torch.randn(32, 8, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
    scales = trainable_scales(model)
    assert [name for name, _ in scales] == ["0.absmax", "2.absmax"]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert trainable_scales(model)[0][1] is scales[0][1]
    optimizer = MeZO(scales, lr=1e-3, eps=1e-3, seed=1)

    def closure() -> Tensor:
        return (model(x) - target).square().mean()

    with torch.no_grad():
        before = closure().item()
        for _ in range(300):
            optimizer.step(closure)
        assert closure().item() < 0.97 * before
    assert optimizer.copied == []
    with pytest.raises(ValueError, match="module: expected at least one NF4Linear"):
        trainable_scales(nn.Linear(2, 2))
