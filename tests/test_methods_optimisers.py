"""GaLore, Natural GaLore, GradNormLoRP, LISA, OwLore and WTA-CRS against their papers' rules in plain torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.methods.galore import GaLore, NaturalGaLore
from peftfast.methods.layer_sampling import LayerSampler
from peftfast.methods.wta_crs import choose_rows, sampled_linear, wta_crs
from tests.support.method_checks import Mlp, adapted, batches, check_files, check_four_bit, check_merging, trained


class Rule:
    """Adam on a projected gradient by the papers' equations, in NumPy-like plain steps."""

    def __init__(
        self, rank: int, interval: int, scale: float, lr: float, history: int = 0, damping: float = 0.0
    ) -> None:
        self.rank, self.interval, self.scale, self.lr = rank, interval, scale, lr
        self.history, self.damping = history, damping
        self.t, self.m, self.v, self.past = 0, 0.0, 0.0, []

    def step(self, weight: Tensor, g: Tensor) -> Tensor:
        tall = weight.shape[0] > weight.shape[1]
        g = g.T if tall else g
        if not self.t and not g.abs().max() > 0:
            return weight
        if self.t % self.interval == 0:
            values, vectors = torch.linalg.eigh(g @ g.T)
            self.basis = vectors[:, -self.rank :].flip(1) * 1.0
            # The signs of singular vectors are free, and a projection that is renewed keeps its states: take the library's.
            u = torch.linalg.svd(g.T if tall else g, full_matrices=False)
            library = u[2][: self.rank].T if tall else u[0][:, : self.rank]
            self.basis = self.basis * torch.sign((self.basis * library).sum(0))
            self.past = []
        r = self.basis.T @ g
        if self.history:
            self.past = [*self.past, r.T.reshape(-1) if tall else r.reshape(-1)][-self.history :]
            stack = torch.stack(self.past, 1)
            fisher = self.damping * torch.eye(len(stack), dtype=r.dtype) + stack @ stack.T
            solved = torch.linalg.solve(fisher, stack[:, -1])
            r = solved.reshape(r.T.shape).T if tall else solved.reshape(r.shape)
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r**2
        n = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)) ** 0.5 + 1e-8)
        update = self.scale * self.basis @ n
        return weight - self.lr * (update.T if tall else update)


@pytest.mark.parametrize("name", ["galore", "natural-galore"])
def test_galore(name: str, tmp_path: Path) -> None:
    more = {"history": 3, "damping": 0.01} if name == "natural-galore" else {}
    handle = adapted(name, rank=3, update_interval=4, scale=0.5, **more)
    assert handle.trainable == 64 * 48 + 40 * 64 and list(handle.layers) == ["up", "down"]
    optimiser = handle.optimizer(lr=0.01)
    assert type(optimiser) is (NaturalGaLore if more else GaLore)
    rules = {layer: Rule(3, 4, 0.5, 0.01, **more) for layer in ("up", "down")}
    plain = Mlp()
    for batch in batches(6):
        handle.model(**batch).loss.backward()
        optimiser.step()
        handle.step(optimiser)
        optimiser.zero_grad()
        plain.zero_grad()
        plain(**batch).loss.backward()
        for layer, rule in rules.items():
            weight = plain.get_submodule(layer).weight
            weight.data = rule.step(weight.data, weight.grad)
    for layer in rules:
        torch.testing.assert_close(
            handle.model.get_submodule(layer).weight, plain.get_submodule(layer).weight, rtol=1e-6, atol=1e-7
        )
    up = optimiser.state[handle.model.up.weight]  # [64, 48]: the right side
    assert up["exp_avg"].shape == up["exp_avg_sq"].shape == (64, 3) and up["basis"].shape == (48, 3)
    assert optimiser.state[handle.model.down.weight]["exp_avg"].shape == (3, 64)
    loaded = check_files(handle, tmp_path)
    assert torch.equal(loaded.up.weight, handle.model.up.weight) and not torch.equal(loaded.up.weight, Mlp().up.weight)
    weight = handle.model.up.weight.detach().clone()
    unloaded = handle.merge_and_unload()
    assert type(unloaded.up) is nn.Linear and torch.equal(unloaded.up.weight, weight)


def test_galore_goes_on_from_a_checkpoint_and_steps_the_rest_as_adamw() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).to(torch.bfloat16)
    optimiser = NaturalGaLore(one.parameters(), lr=0.01, rank=5, update_interval=3, weight_decay=0.1)
    data = [torch.randn(9, 20, dtype=torch.bfloat16) for _ in range(6)]

    def go(model: nn.Module, by: torch.optim.Optimizer, given: list[Tensor]) -> None:
        for x in given:
            by.zero_grad()
            model(x).float().square().mean().backward()
            by.step()

    go(one, optimiser, data[:4])
    other = copy.deepcopy(one)
    second = NaturalGaLore(other.parameters(), lr=0.01, rank=5, update_interval=3, weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert second.state[other[0].weight]["exp_avg"].dtype == torch.float32
    for model, by in ((one, optimiser), (other, second)):
        go(model, by, data[4:])
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))

    torch.manual_seed(0)
    full = nn.Linear(20, 30, dtype=torch.float64)
    twin = copy.deepcopy(full)
    go64 = [torch.randn(9, 20, dtype=torch.float64) for _ in range(4)]
    for model, by in (
        (full, GaLore(full.parameters(), lr=0.01, rank=None, weight_decay=0.1)),
        (twin, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)),
    ):
        go(model, by, go64)
    torch.testing.assert_close(full.weight, twin.weight, rtol=1e-6, atol=1e-6)
    for bad in ({"rank": 0}, {"update_interval": 0}, {"scale": 0.0}, {"lr": -1.0}, {"betas": (1.0, 0.9)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GaLore(full.parameters(), **bad)
    for bad in ({"history": 0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NaturalGaLore(full.parameters(), **bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("natural-galore", **bad)
    with pytest.raises(ValueError, match="in 4 bits"):
        adapted("galore", dtype=torch.float32, four_bit=True)


def test_gradnormlorp(tmp_path: Path) -> None:
    handle = adapted("gradnormlorp", r=6, projection_rank=2, update_interval=3, scale=2.0)
    assert handle.trainable == 6 * (112 + 104) + 64 + 40
    torch.testing.assert_close(handle.model(**batches(1)[0]).logits, Mlp()(**batches(1)[0]).logits)
    optimiser = handle.optimizer(lr=0.01)
    values = {name: p.detach().clone() for name, p in trained(handle).items()}
    rules = {name: Rule(2, 3, 2.0, 0.01) for name in values if not name.endswith("vector")}
    plain_magnitudes = {name: nn.Parameter(v.clone()) for name, v in values.items() if name.endswith("vector")}
    adam = torch.optim.AdamW(plain_magnitudes.values(), lr=0.01, weight_decay=0.0)
    base = Mlp()
    for batch in batches(5):
        leaves = {
            n: (plain_magnitudes[n] if n in plain_magnitudes else v.requires_grad_(True)) for n, v in values.items()
        }
        weights = {}
        for layer in ("up", "down"):
            moved = (
                base.get_submodule(layer).weight.detach()
                + 16 / 6 * leaves[f"{layer}.lora_B"] @ leaves[f"{layer}.lora_A"]
            )
            weights[f"{layer}.weight"] = (
                leaves[f"{layer}.lora_magnitude_vector"][:, None] * moved / moved.detach().norm(dim=1, keepdim=True)
            )
        loss = torch.func.functional_call(base, weights, (), batch).loss
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        fused = handle.model(**batch).loss
        torch.testing.assert_close(fused, loss, rtol=1e-8, atol=1e-9)
        fused.backward()
        optimiser.step()
        optimiser.zero_grad()
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
            if name in rules:
                values[name] = rules[name].step(leaf.detach(), slope)
            else:
                leaf.grad = slope
        adam.step()
    for name, parameter in trained(handle).items():
        torch.testing.assert_close(parameter, plain_magnitudes.get(name, values[name]), rtol=1e-6, atol=1e-7)
    check_files(handle, tmp_path)
    with pytest.raises(ValueError, match="projection_rank"):
        adapted("gradnormlorp", projection_rank=0)


class Blocks(nn.Module):
    def __init__(self, count: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(count)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        from tests.support.method_checks import Output

        logits = self.head(x)
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def block_data(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(8, 16, generator=generator), "labels": torch.randint(0, 3, (8,), generator=generator)}
        for _ in range(count)
    ]


def test_lisa(tmp_path: Path) -> None:
    """What is drawn is stepped as AdamW begun at the draw steps it; everything else stays bit for bit."""
    model = Blocks()
    handle = peftfast.adapt(
        model, "lisa", target_modules=r"layers\.\d\.0", modules_to_save=["head"], active=2, interval=3, seed=5
    )
    optimiser = handle.optimizer(lr=0.01)
    sampler = handle.runtime.sampler
    plain, drawn = Blocks(), []
    adam: Any = None
    head = torch.optim.AdamW(plain.head.parameters(), lr=0.01, weight_decay=0.0)
    for step, batch in enumerate(block_data(7)):
        if step % 3 == 0:
            drawn.append(list(sampler.chosen))
            staying = set(drawn[-2]) & set(drawn[-1]) if step else set()
            if adam is not None:
                old = {name: adam.state[plain.get_submodule(name)[0].weight] for name in staying}
            adam = torch.optim.AdamW(
                [plain.get_submodule(n)[0].weight for n in sampler.chosen], lr=0.01, weight_decay=0.0
            )
            for name in staying:
                adam.state[plain.get_submodule(name)[0].weight] = old[name]
        assert len(sampler.chosen) == 2
        model(**batch).loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is not None and "layers" in n] == [
            f"{name}.0.weight" for name in sampler.chosen
        ]
        optimiser.step()
        assert len(optimiser.state) == 4  # two blocks and the head's weight and bias
        handle.step(optimiser)
        optimiser.zero_grad()
        plain.zero_grad()
        plain(**batch).loss.backward()
        adam.step()
        head.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len({tuple(names) for names in drawn}) > 1
    peftfast.save_adapter(model, tmp_path)
    bare = Blocks()
    weight = bare.layers[0][0].weight
    loaded = peftfast.load_adapter(bare, tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert torch.equal(weight, Blocks().layers[0][0].weight)  # the base's own is not written
    state = handle.state_dict()
    later = [sampler.draw() for _ in range(5)]
    handle.load_state_dict(state)
    assert later == [sampler.draw() for _ in range(5)]
    with pytest.raises(ValueError, match="active: expected at most"):
        peftfast.adapt(Blocks(), "lisa", target_modules=r"layers\.\d\.0", active=7)


def test_layer_sampler_is_a_context() -> None:
    model = Blocks()
    groups = {str(i): list(block.parameters()) for i, block in enumerate(model.layers)}
    groups["0"][0].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    counts = dict.fromkeys(groups, 0)
    with LayerSampler(groups, active=1, weights={**dict.fromkeys(groups, 0.0), "2": 3.0, "4": 1.0}) as sampler:
        for _ in range(400):
            (name,) = sampler.draw()
            counts[name] += 1
            assert all(p.requires_grad == (key == name) for key, given in groups.items() for p in given)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert counts["2"] + counts["4"] == 400 and abs(counts["2"] - 300) < 40
    for bad in ({"active": 0}, {"active": 9}, {"interval": 0}, {"weights": {"0": 1.0}}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LayerSampler(groups, **bad)


def test_owlore(tmp_path: Path) -> None:
    """The parts of outliers are the paper's, a block is drawn by them, and what is drawn is stepped by GaLore."""
    model = Blocks()
    with torch.no_grad():
        model.layers[3][0].weight[2, :4] = 40.0
        model.layers[1][0].weight[2, 0] = 60.0
    data = block_data(3)
    inputs: dict[int, list[Tensor]] = {i: [] for i in range(6)}
    hooks = [
        block[0].register_forward_hook(lambda m, a, o, i=i: inputs[i].append(a[0]))
        for i, block in enumerate(model.layers)
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    expected = {}
    for i, block in enumerate(model.layers):
        scores = block[0].weight.detach().abs() * torch.cat(inputs[i]).norm(dim=0)
        expected[f"layers.{i}"] = float((scores > 5.0 * scores.mean()).double().mean())
    assert expected["layers.3"] > expected["layers.1"] > 0
    handle = peftfast.adapt(
        model,
        "owlore",
        target_modules=r"layers\.\d\.0",
        batches=data,
        active=1,
        interval=2,
        outlier=5.0,
        rank=4,
        scale=1.0,
    )
    weights = handle.runtime.sampler.weights
    torch.testing.assert_close(weights, torch.tensor([max(v, 1e-6) for v in expected.values()], dtype=torch.float64))
    optimiser = handle.optimizer(lr=0.01)
    assert type(optimiser) is GaLore
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = set()
    for batch in block_data(4):
        chosen |= set(handle.runtime.sampler.chosen)
        model(**batch).loss.backward()
        optimiser.step()
        assert [s["exp_avg"].shape for s in optimiser.state.values()] == [(4, 16)]
        handle.step(optimiser)
        optimiser.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"{name}.0.weight" for name in chosen}
    peftfast.save_adapter(model, tmp_path)
    loaded = peftfast.load_adapter(Blocks(), tmp_path)
    torch.testing.assert_close(loaded(**data[0]).logits, model(**data[0]).logits)
    for bad in ({"outlier": 0.0}, {"rank": 0}, {"active": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            peftfast.adapt(Blocks(), "owlore", target_modules=r"layers\.\d\.0", batches=data, **bad)


def test_rows_are_chosen_as_published() -> None:
    norms = torch.tensor([5.0, 0.1, 3.0, 0.2, 0.3, 0.1, 0.2, 0.1], dtype=torch.float64)
    likely = norms / norms.sum()
    ordered = likely.sort(descending=True).values
    best = min(range(4), key=lambda c: float(1 - ordered[:c].sum()) / (4 - c))
    assert best == 2
    rows, factors = choose_rows(norms, 4)
    assert rows[:2].tolist() == [0, 2] and factors[:2].tolist() == [1.0, 1.0]
    left = 1 - float(ordered[:2].sum())
    torch.testing.assert_close(factors[2:], left / (2 * likely[rows[2:]]), rtol=1e-4, atol=1e-4)
    assert not set(rows[2:].tolist()) & {0, 2}
    assert choose_rows(norms, 8)[0].tolist() == list(range(8))
    for odd in (torch.zeros(8), torch.tensor([1.0, *[0.0] * 7])):
        rows, factors = choose_rows(odd, 3)
        assert rows.numel() == 3 and factors.isfinite().all()


def test_sampled_gradient_has_the_exact_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) * torch.rand(40, 1, dtype=torch.float64) ** 3
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(40, 5, dtype=torch.float64)
    found = []
    for _ in range(1500):
        given = x.clone().requires_grad_(True)
        y = sampled_linear(given.reshape(4, 10, 6), weight, bias, 0.3)
        dx, dw, db = torch.autograd.grad(y, (given, weight, bias), dy.reshape(4, 10, 5))
        found.append(dw)
    torch.testing.assert_close(y.reshape(40, 5), x @ weight.T + bias)
    torch.testing.assert_close(dx, dy @ weight)
    torch.testing.assert_close(db, dy.sum(0))
    stack = torch.stack(found)
    error = (stack.mean(0) - dy.T @ x).abs() / (stack.std(0) / math.sqrt(1500))
    assert error.max() < 4.5 and stack.std(0).max() > 0.01
    y = sampled_linear(x, weight, None, 1.0)
    torch.testing.assert_close(torch.autograd.grad(y, weight, dy)[0], dy.T @ x)


def test_wta_crs(tmp_path: Path) -> None:
    """At the whole budget LoRA itself; below it the same output, and only the chosen rows of x are kept."""

    def lora(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base + 4.0 * p["lora_B"] @ p["lora_A"]

    from tests.support.method_checks import check_layer_method

    check_layer_method("wta-crs", lora, count=4 * 216, r=4, budget=1.0, tmp_path=tmp_path)
    check_four_bit("wta-crs", tmp_path / "nf4", lora, r=4, budget=1.0)
    handle = adapted("wta-crs", dtype=torch.float32, r=4, budget=0.25)
    check_merging(adapted("wta-crs", r=4))
    layer = handle.layers["up"]
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(100, 48)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-4, atol=1e-4)
    assert torch.Size((25, 48)) in kept and torch.Size((100, 48)) not in kept
    for bad in ({"budget": 0.0}, {"budget": 1.5}, {"lora_dropout": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("wta-crs", **bad)


def test_wta_crs_over_any_model() -> None:
    model, data = Mlp(), batches(1)[0]
    model.down.weight.requires_grad_(False)
    exact = torch.autograd.grad(model(**data).loss, model.up.weight)[0]
    with wta_crs(model, budget=1.0) as names:
        assert names == ["up", "head"]
        torch.testing.assert_close(torch.autograd.grad(model(**data).loss, model.up.weight)[0], exact)
    with wta_crs(model, budget=0.5):
        loss = model(**data).loss
        sampled = torch.autograd.grad(loss, model.up.weight)[0]
        model.eval()
        torch.testing.assert_close(torch.autograd.grad(model(**data).loss, model.up.weight)[0], exact)
        model.train()
    torch.testing.assert_close(loss, Mlp()(**data).loss)
    assert not torch.allclose(sampled, exact) and "forward" not in model.up.__dict__
    torch.testing.assert_close(torch.autograd.grad(model(**data).loss, model.up.weight)[0], exact)
    with pytest.raises(ValueError, match="budget"), wta_crs(model, budget=0):
        pass
