"""PST, transformed LoRA, PELA, FineQuant, SketchTune's calibrated codes and WTA-CRS's gradient norms against their formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftfast
from peftfast import functional as F
from peftfast.methods.finequant import granularity
from peftfast.methods.pst import Options as PSTOptions
from peftfast.methods.pst import _Keep
from peftfast.methods.sketchtune import assign, cluster, inverse_root
from peftfast.methods.transformed_lora import divided
from peftfast.methods.wta_crs import GradientNorms, choose_rows, sampled_linear, wta_crs
from tests.support.method_checks import (
    Mlp,
    adapted,
    batches,
    check_files,
    check_four_bit,
    check_layer_method,
    check_merging,
    plain_model,
    stir,
    trained,
)
from tests.support.small_models import base, text_batches


class StraightMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        order = sorted(range(scores.numel()), key=lambda i: scores.flatten()[i].item())
        mask = torch.ones(scores.numel(), dtype=scores.dtype)
        mask[order[:count]] = 0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def pst(layer: Any, weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    changed = weight + 0.5 * p["weight_U"] @ p["weight_V"]
    scores = changed.abs() + 2.0 * p["mask_A"] @ p["mask_B"] + 3.0 * (p["mask_R"][:, None] + p["mask_C"][None])
    return changed * StraightMask.apply(scores, int(weight.numel() * 0.3))


def test_pst(tmp_path: Path) -> None:
    given = {"weight_rank": 2, "mask_rank": 3, "weight_beta": 0.5, "mask_alpha1": 2.0, "mask_alpha2": 3.0}
    still = {**given, "initial_sparsity": 0.3, "sparsity": 0.3}
    handle = check_layer_method("pst", pst, count=(2 + 3 + 1) * 216, exact=False, tmp_path=tmp_path, **still)
    check_four_bit("pst", tmp_path / "nf4", pst, **still)
    assert int((handle.layers["up"].merged_weight() == 0).sum()) == int(64 * 48 * 0.3)
    handle = adapted("pst", total_steps=10, sparsity=0.9, **given)
    torch.testing.assert_close(handle.model(**batches(1)[0]).logits, Mlp()(**batches(1)[0]).logits)  # nothing is 0 yet
    zeros = []
    for _ in range(10):
        handle.step()
        zeros.append(float((handle.layers["up"].composed() == 0).double().mean()))
    expected = [0.0] + [0.9 - 0.9 * (1 - (step - 1) / 6) ** 3 for step in range(2, 8)] + [0.9] * 3
    torch.testing.assert_close(torch.tensor(zeros), torch.tensor(expected), rtol=0, atol=1e-3)
    check_files(handle, tmp_path / "sparse")
    other = adapted("pst", total_steps=10, sparsity=0.9, **given)
    other.load_state_dict(handle.state_dict())
    assert other.layers["down"].count == handle.layers["down"].count == int(64 * 40 * 0.9)
    equal = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert _Keep.apply(equal, 3).tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]  # of equal ones the first
    for bad in ({"sparsity": 1.0}, {"weight_rank": 0}, {"final_warmup": 0.95}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PSTOptions(**bad)


def ring(cores: list[Tensor], at: list[tuple[int, ...]]) -> Tensor:
    """The trace of a product of slices."""
    product = cores[0][at[0]]
    for core, where in zip(cores[1:], at[1:], strict=True):
        product = product @ core[where]
    return product.trace()


def digits(number: int, sides: list[int]) -> list[int]:
    """The first side's digit the highest."""
    found = []
    for side in reversed(sides):
        found.append(number % side)
        number //= side
    return found[::-1]


def test_rings_entry_by_entry() -> None:
    """T and D of a layer are the traces that the paper defines."""
    handle = adapted("transformed-lora", r=3, residual_r=2)
    layer = handle.layers["down"]
    torch.testing.assert_close(layer.merged_weight(), layer.dense_weight())  # T = 1 and D = 0
    stir(handle, 0.3)
    transform, outs, ins = list(layer.transform), list(layer.out_core), list(layer.in_core)
    first, second = layer.halves()
    whole = torch.einsum("ijab,klba->ikjl", first, second).reshape(64, 64)
    a, b = layer.thin()
    assert [core.shape[0] for core in transform] == [4, 4, 4] and [core.shape[0] for core in outs] == [5, 4, 2]
    for i, j in ((0, 0), (5, 5), (63, 1), (17, 42), (33, 34)):
        pairs = list(zip(digits(i, [4] * 3), digits(j, [4] * 3), strict=True))
        torch.testing.assert_close(whole[i, j], ring(transform, pairs))
        n = i % 40
        where = [(d,) for d in (*digits(n, [5, 4, 2]), *digits(j, [4] * 3))]
        torch.testing.assert_close((b @ a)[n, j], ring(outs + ins, where))
    assert a.shape == (4, 64) and b.shape == (40, 4)
    for size, parts, expected in ((48, 3, [4, 4, 3]), (4096, 3, [16, 16, 16]), (384, 2, [24, 16]), (7, 2, [7, 1])):
        assert divided(size, parts) == expected


def names_of(p: dict[str, Tensor], stem: str) -> list[Tensor]:
    return [p[name] for name in sorted(p) if name.startswith(stem)]


def tlora(layer: Any, weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The rings contracted by one einsum each, of three cores a side."""
    t = torch.einsum("aixy,bjyz,cmzx->abcijm", *names_of(p, "transform"))
    sides = [c.shape[0] for c in names_of(p, "transform")]
    size = sides[0] * sides[1] * sides[2]
    whole = t.reshape(size, size)
    outs, ins = names_of(p, "out_core"), names_of(p, "in_core")
    delta = torch.einsum("auv,bvw,cwx,dxy,eyz,fzu->abcdef", *outs, *ins)
    return weight @ whole + delta.reshape(weight.shape)


def penalty(model: Mlp) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for layer in (model.up, model.down):
        p = dict(zip(layer.names, layer.values, strict=True))
        for core in names_of(p, "transform"):
            r = core.shape[2]
            for x in range(r):
                for y in range(r):
                    total = total + (core[:, :, x, y] - torch.eye(core.shape[0], dtype=torch.float64) / r).norm()
    return 0.05 * total


def test_transformed_lora(tmp_path: Path) -> None:
    given = {"r": 3, "residual_r": 2, "identity_weight": 0.05}
    count = 9 * (16 + 16 + 9 + 3 * 16) + 4 * (12 + 11 + 11 + 12)
    handle = check_layer_method("transformed-lora", tlora, count=count, penalty=penalty, tmp_path=tmp_path, **given)
    assert handle.loss().requires_grad and adapted("transformed-lora", identity_weight=0.0).loss() == 0.0
    check_four_bit("transformed-lora", tmp_path / "nf4", tlora, tolerance=1e-4, **{**given, "identity_weight": 0.0})
    model = Mlp()
    model.up, model.down = nn.Linear(48, 62, dtype=torch.float64), nn.Linear(62, 40, dtype=torch.float64)
    odd = peftfast.adapt(model, "transformed-lora", target_modules=["up", "down"])
    assert list(odd.layers) == ["up"] and "do not divide into 3 factors" in odd.skipped["down"]
    for bad in ({"cores": 1}, {"r": 0}, {"identity_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("transformed-lora", **bad)


def pela(layer: Any, weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    return p["left"] @ p["right"]


def test_pela(tmp_path: Path) -> None:
    ranks = {"up": 64 * 48 // (2 * 112), "down": 40 * 64 // (2 * 104)}
    count = ranks["up"] * 112 + ranks["down"] * 104
    alone = {"distillation": 0.0, "perturbation": 0.0}
    handle = check_layer_method("pela", pela, count=count, exact=False, tmp_path=tmp_path, **alone)
    assert handle.loss() == 0.0
    fresh = adapted("pela").layers["up"]
    u, s, v = torch.linalg.svd(Mlp().up.weight.detach())
    nearest = (u[:, : ranks["up"]] * s[: ranks["up"]]) @ v[: ranks["up"]]
    torch.testing.assert_close(fresh.merged_weight(), nearest)
    torch.testing.assert_close(fresh.left.norm(dim=0), fresh.right.norm(dim=1))
    thin = peftfast.adapt(Mlp(), "pela", target_modules=["up", "head"], compress_ratio=3.0)
    assert list(thin.layers) == ["up"] and "leaves no rank" in thin.skipped["head"]
    check_four_bit("pela", tmp_path / "nf4", pela, **alone)
    for bad in ({"compress_ratio": 0.0}, {"distillation": -1.0}, {"perturbation": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("pela", **bad)


def test_pela_learns_the_whole_models_features() -> None:
    """The penalty is the mean squared gap of both layers' outputs to those of the base on the same batch, and the weights' change."""
    handle = adapted("pela", distillation=0.7, perturbation=0.4, perturbation_size=0.2)
    stir(handle)
    plain, whole = plain_model(handle, pela), Mlp()
    batch = batches(1)[0]
    out = handle.model(**batch)
    found = handle.loss()
    assert handle.model.training and not any(layer.original for layer in handle.layers.values())

    def features(model: Any) -> list[Tensor]:
        up = model.up(batch["x"])
        return [up, model.down(torch.tanh(up))]

    gaps = [((own - one.detach()) ** 2).mean() for own, one in zip(features(plain), features(whole), strict=True)]
    changes = [
        (((model.values[0] @ model.values[1]) - base_).abs().max() - 0.2) ** 2
        for model, base_ in ((plain.up, whole.up.weight), (plain.down, whole.down.weight))
    ]
    expected = 0.7 * sum(gaps) / 2 + 0.4 * sum(changes) / 2
    torch.testing.assert_close(found, expected)
    (out.loss + found).backward()
    (plain(**batch).loss + expected).backward()
    values = [p for p in plain.parameters() if p.requires_grad]
    for one, other in zip(trained(handle).values(), values, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    handle.model(**batch)
    twin = copy.deepcopy(handle.model)
    twin(**batch)
    torch.testing.assert_close(twin.peftfast_handle.loss(), found.detach(), check_dtype=False)
    handle.model.eval()
    handle.model(**batch)
    assert handle.runtime.features == []


def test_pela_on_a_transformer() -> None:
    """The features are the blocks': of the model with dropout, the whole one's without."""
    model = base("bert")
    whole = copy.deepcopy(model).eval()
    torch.manual_seed(0)
    handle = peftfast.adapt(model, "pela", target_modules=r"bert\.encoder.*\.(query|key|value|dense)", perturbation=0.0)
    batch = text_batches("bert", 1)[0]
    own = model(**batch, output_hidden_states=True).hidden_states[1:]
    with torch.no_grad():
        other = whole(**batch, output_hidden_states=True).hidden_states[1:]
    expected = sum(functional.mse_loss(a, b) for a, b in zip(own, other, strict=True)) / 2
    torch.testing.assert_close(handle.loss(), expected)
    handle.loss()
    optimiser = handle.optimizer(lr=2e-3)
    losses = []
    for _ in range(4):
        model(**batch)
        loss = handle.loss()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_int4_is_rounding_to_sevenths() -> None:
    weight = torch.randn(33, 128, generator=torch.Generator().manual_seed(0))
    nf4 = F.nf4_quantize(weight, block_size=64, double_quant=False, quant_type="int4")
    scale = weight.reshape(-1, 64).abs().amax(1, keepdim=True) / 7
    expected = ((weight.reshape(-1, 64) / scale).round() * scale).reshape(33, 128)
    torch.testing.assert_close(F.nf4_dequantize(nf4), expected, rtol=1e-6, atol=1e-6)
    assert nf4.quant_type == "int4" and int((nf4.packed >> 4).min()) >= 1
    with pytest.raises(ValueError, match="quant_type: bitsandbytes has"):
        nf4.to_bitsandbytes()
    x = torch.randn(5, 128)
    torch.testing.assert_close(
        F.lora_linear(x, nf4, torch.zeros(2, 128), torch.zeros(33, 2)), x @ expected.T, rtol=1e-4, atol=1e-4
    )


def test_finequant(tmp_path: Path) -> None:
    handle = adapted("finequant", dtype=torch.float32, r=2, smallest=32)
    assert list(handle.layers) == ["down"] and "do not divide into groups of 32" in handle.skipped["up"]
    assert handle.trainable == 2 * 104
    layer = handle.layers["down"]
    weight = Mlp(torch.float32).down.weight.detach()
    assert layer.nf4.quant_type == "int4" and layer.nf4.block_size in (32, 64) and not layer.nf4.nested
    scale = weight.reshape(-1, layer.nf4.block_size).abs().amax(1, keepdim=True) / 7
    expected = ((weight.reshape(scale.shape[0], -1) / scale).round() * scale).reshape(40, 64)
    torch.testing.assert_close(F.nf4_dequantize(layer.nf4), expected, rtol=1e-5, atol=1e-6)
    stir(handle)
    x = torch.randn(6, 64)
    delta = 8.0 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ (expected + delta).T, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    plain_a = layer.lora_A.detach().clone().requires_grad_()
    (x @ (expected + 8.0 * layer.lora_B.detach() @ plain_a).T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, plain_a.grad, rtol=1e-3, atol=1e-3)
    check_files(handle, tmp_path, tolerance=1e-5)
    for bad in ({"alpha": 1.0}, {"smallest": 48}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("finequant", **bad)


def test_granularity() -> None:
    """Whole rows where they are even, halves while the mean range falls by more than alpha."""
    even = torch.ones(4, 512)
    assert granularity(even, 0.1, 64) == 512
    spiked = torch.ones(4, 512)
    spiked[:, 0] = 9.0
    # Mean ranges from 512 down: 9, 5, 3, 2.
    assert granularity(spiked, 0.1, 64) == 64
    assert granularity(spiked, 0.35, 64) == 128
    assert granularity(spiked, 0.42, 64) == 256
    assert granularity(spiked, 0.1, 256) == 256


def test_sketchtune_weighs_errors() -> None:
    """The table against a weighted k-means row by row; the codes against the update that a solver finds, input by input."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3, 60, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, 60, generator=generator, dtype=torch.float64)
    table, codes = cluster(rows, 4, 200, weights)
    for row, weight, values, which in zip(rows, weights, table, codes.long(), strict=True):
        for value in which.unique():
            at = which == value
            torch.testing.assert_close(values[value], (row[at] * weight[at]).sum() / weight[at].sum())
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    x[:, 3] = 0
    moment = x.T @ x / 200
    order, root = inverse_root(moment, 0.01)
    assert (moment.diagonal()[order[:4]].diff() <= 0).all()
    hessian = moment.clone()
    hessian[3, 3] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(root.T @ root, hessian[order][:, order].inverse())
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    table = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64).sort(-1).values
    codes = assign(weight, table, order, root, block=5)
    for n in range(5):
        left = weight[n].clone()
        for i, k in enumerate(order.tolist()):
            values = table[n, k // 6]
            code = int((left[k] - values).abs().argmin())
            assert int(codes[n, k]) == code
            error = left[k] - values[code]
            rest = order[i + 1 :]
            # The change of what is left that makes (w' - w) H (w' - w)ᵀ least, with input k at its value.
            if len(rest):
                left[rest] += torch.linalg.solve(hessian[rest][:, rest], hessian[rest, k]) * error
    assert (codes != cluster(weight.reshape(10, 6), 4, 1)[1].reshape(5, 12)).any()


def test_sketchtune_with_data(tmp_path: Path) -> None:
    def sketch(layer: Any, weight: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, k = weight.shape
        return p["table"].gather(2, layer.codes.reshape(n, 2, -1).long()).reshape(n, k)

    given = {"bits": 2, "groups": 2, "data": 4}
    handle = check_layer_method("sketchtune", sketch, count=104 * 2 * 4, exact=False, tmp_path=tmp_path, **given)
    assert handle.layers["up"].codes.dtype == torch.uint8
    # On inputs of few directions the calibrated codes leave far less of an error in the outputs than the nearest ones.
    mixed = [
        {**batch, "x": batch["x"][:, :6] @ torch.randn(6, 48, dtype=torch.float64)} for batch in batches(4)[:1] * 4
    ]
    x, weight = torch.cat([batch["x"] for batch in mixed]), Mlp().up.weight.detach()

    def error(**options: Any) -> float:
        layer = peftfast.adapt(Mlp(), "sketchtune", target_modules=["up"], bits=2, batches=mixed, **options).layers[
            "up"
        ]
        return float((x @ (layer.composed().detach() - weight).T).square().mean())

    assert error() < 0.6 * error(exponent=0.0)
    with pytest.raises(ValueError, match="batches: sketchtune reads data"):
        adapted("sketchtune")
    for bad in ({"exponent": -1.0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted("sketchtune", **bad)


def test_wta_crs_remembers_gradient_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chosen by the norms of x times those of dy that the same examples had before, unseen ones by the mean of the seen."""
    from peftfast.methods import wta_crs as module

    asked: list[Tensor] = []
    monkeypatch.setattr(module, "choose_rows", lambda norms, count: (asked.append(norms), choose_rows(norms, count))[1])
    norms, weight = GradientNorms(), torch.randn(6, 5, requires_grad=True)

    def step(examples: list[int] | None, rows: int = 3) -> tuple[Tensor, Tensor]:
        x = torch.randn(2, rows, 5)
        dy = torch.randn(2, rows, 6)
        norms.batch(examples)
        sampled_linear(x, weight, None, 0.5, norms, "layer").backward(dy)
        return x.norm(dim=-1), dy.norm(dim=-1)

    x, first = step([7, 2])
    torch.testing.assert_close(asked[-1], x.flatten())
    x, second = step([2, 4])
    known = torch.cat([first[1], first[1].mean().expand(3)])
    torch.testing.assert_close(asked[-1], x.flatten() * known, rtol=1e-2, atol=1e-2)  # kept in bfloat16
    x, third = step([4, 7], rows=4)
    known = torch.stack([second[1], first[0]])
    filled = torch.cat([known, known.mean().expand(2, 1)], 1)
    torch.testing.assert_close(asked[-1], (x * filled).flatten(), rtol=1e-2, atol=1e-2)
    x, _ = step(None)
    torch.testing.assert_close(asked[-1], x.flatten())
    torch.testing.assert_close(norms.tables["layer"][4].float(), third[0], rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="examples: expected 2 numbers"):
        step([1, 2, 3])
    for bad in ([0.5], [-1], [[1]]):
        with pytest.raises(ValueError, match="examples"):
            norms.batch(bad)


def test_wta_crs_with_gradient_norms_has_the_exact_mean() -> None:
    """Whatever the remembered norms are, the mean over draws is the exact gradient, by adapt and over any model."""
    handle = adapted("wta-crs", dtype=torch.float32, r=2, budget=0.4)
    stir(handle)
    runtime: Any = handle.runtime
    batch = batches(1, torch.float32)[0]
    for _ in range(2):  # the second time with norms
        runtime.norms.batch(range(12))
        handle.model(**batch).loss.backward()
        handle.model.zero_grad()
    assert set(runtime.norms.tables) == {"up", "down"} and bool((runtime.norms.tables["up"] >= 0).any())
    torch.manual_seed(0)
    total = torch.zeros_like(handle.layers["up"].lora_A)
    for _ in range(150):
        runtime.norms.batch(range(12))
        handle.model(**batch).loss.backward()
        total += handle.layers["up"].lora_A.grad / 150
        handle.model.zero_grad()
    runtime.norms.batch(None)
    handle.layers["up"].budget = handle.layers["down"].budget = 1.0
    handle.model(**batch).loss.backward()
    exact = handle.layers["up"].lora_A.grad

    assert (total - exact).norm() < 0.15 * exact.norm()
    other = adapted("wta-crs", dtype=torch.float32, r=2)
    other.load_state_dict(handle.state_dict())
    assert torch.equal(other.runtime.norms.tables["up"], runtime.norms.tables["up"])
    model, norms = Mlp(torch.float32), GradientNorms()
    with wta_crs(model, budget=0.5, norms=norms) as names:
        for _ in range(2):
            norms.batch(torch.arange(12))
            model(**batch).loss.backward()
    assert set(norms.tables) == set(names) == {"up", "down", "head"} and norms.tables["up"].shape == (12, 1)
    check_merging(adapted("wta-crs", r=2))
