"""peftfast.optim.MeZO's options one by one against their formulas."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.optim import MeZO, trainable_scales
from peftfast.optim.mezo import SEED_STEP
from tests.support.counting import Calls
from tests.support.lora_checks import BF16, DEVICE, F32
from tests.support.mezo_checks import (
    LABELS,
    TOKENS,
    closure_of,
    low_rank_z,
    net,
    paired_closure,
    same,
    state,
)


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


@pytest.mark.parametrize("compute", [None, BF16])
def test_paired_serves_4_bit_layers(compute: torch.dtype | None) -> None:
    """Scales and biases moved at one reading of the packed bytes, as two forwards move them; of one layer the bias alone is trained."""
    from peftfast.nn import NF4Linear

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))
    x, labels = torch.randn(8, 64).to(DEVICE), torch.randint(0, 5, (8,)).to(DEVICE)
    models = []
    for _ in range(2):
        model = copy.deepcopy(dense).to(DEVICE)
        for k in (0, 2):
            layer = NF4Linear.from_linear(model[k], block_size=32)
            layer.compute_dtype = compute
            model[k] = layer
        trainable_scales(model[0])
        models.append(model)
    one, two = models

    def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]

    def single() -> Tensor:
        return nn.functional.cross_entropy(one(x).float(), labels)

    def paired() -> Tensor:
        return torch.stack([nn.functional.cross_entropy(y.float(), labels) for y in two(x.repeat(2, 1)).chunk(2)])

    assert [name for name, _ in trained(one)] == ["0.bias", "0.absmax", "2.bias"]
    first, second = (MeZO(trained(model), lr=1e-2, eps=1e-2, seed=8) for model in models)
    for _ in range(3):
        torch.testing.assert_close(
            first.step(single), second.step(paired, paired=True), rtol=1e-5 if compute is None else 2e-2, atol=1e-5
        )
    for (_, p), (name, q) in zip(trained(one), trained(two), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4 if compute is None else 3e-2, msg=name)
    assert second.paired_fallbacks == [] and second.copied == []
    with Calls() as calls:
        second.step(paired, paired=True)
    assert calls.compute["zo_nf4_linear"] == 2 and "nf4_linear" not in calls.compute


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
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got NoneType"):
        trainable_scales(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="module: expected at least one NF4Linear"):
        trainable_scales(nn.Linear(2, 2))


def test_trained_block_scales_are_saved_moved_and_merged() -> None:
    """Scales that are parameters keep a layer's keys, its dtypes, and what a merge must give back."""
    from safetensors.torch import load, save

    from peftfast.nn import LoRALinear, NF4Linear

    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(3, 64)
    plain, scaled, other = (nn.Sequential(NF4Linear.from_linear(linear)) for _ in range(3))
    ((_, absmax),) = trainable_scales(scaled)
    with torch.no_grad():
        absmax *= 1.5
    saved = load(save(scaled.state_dict()))
    plain.load_state_dict(saved)
    ((_, kept),) = trainable_scales(other)
    other.load_state_dict(saved)
    assert torch.equal(plain(x), scaled(x)) and torch.equal(other(x), scaled(x))
    assert other[0].absmax is kept and kept.data_ptr() != saved["0.weight.absmax"].data_ptr()
    other.load_state_dict(nn.Sequential(NF4Linear.from_linear(linear)).state_dict())
    assert torch.equal(other(x), NF4Linear.from_linear(linear)(x))

    expected = F.nf4_dequantize(scaled[0].nf4)
    assert torch.equal(F.nf4_dequantize(scaled.half()[0].nf4), expected) and scaled[0].absmax is absmax
    adapted = LoRALinear.from_linear(NF4Linear.from_linear(linear), init_lora_weights=False)
    trainable_scales(adapted)
    before = adapted(x)
    adapted.merge()
    assert not torch.equal(adapted(x), before)
    adapted.unmerge()
    assert torch.equal(adapted(x), before)


def test_copied_parameters_that_are_cast_between_steps() -> None:
    layer = nn.Linear(8, 4).to(DEVICE)
    optimizer = MeZO(layer, lr=0.0, seed=1)
    x = torch.randn(3, 8, device=DEVICE)
    for dtype in (F32, BF16):
        before = layer.to(dtype).weight.clone()
        optimizer.step(lambda dtype=dtype: (x.to(dtype) @ layer.weight.T).float().square().mean())
        assert optimizer.copied and torch.equal(layer.weight, before)


def test_it_is_neither_copied_nor_pickled() -> None:
    optimiser = MeZO(nn.Linear(3, 2), lr=1e-3)
    for way in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="MeZO: expected no copy and no pickle"):
            way(optimiser)
