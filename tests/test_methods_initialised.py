"""Initialisations by name, each against the paper's formula in plain torch, against PEFT's own where PEFT has it, and its files."""

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfast
import peftfast.functional as F
from peftfast.methods.eva import ranks_by_variance
from peftfast.nn import NF4Linear
from tests.support.method_checks import (
    Mlp,
    adapted,
    batches,
    check_files,
    check_layer_method,
    stir,
)

TARGETS = ["up", "down"]
COUNT = 4 * (112 + 104)  # rank 4
X = batches(1)[0]


def residual(begin):
    """W' = W - B0 A0 + s B A with the product of ``begin(W)``, at rank 4 and s = 2."""

    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base - begin(base) + 2.0 * p["lora_B"] @ p["lora_A"]

    return weight


def principal(matrix: Tensor, rank: int = 4) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


def stock(config: peft.LoraConfig, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's model with that initialisation, its adapter moved and saved."""
    torch.manual_seed(5)
    model = peft.get_peft_model(Mlp(dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def read_by_peft(handle: Any, folder: Path, tolerance: float = 1e-8) -> None:
    """Stock PEFT computes from the files what the adapted model computes."""
    peftfast.save_adapter(handle.model, folder)
    dtype = handle.model.head.weight.dtype
    loaded = peft.PeftModel.from_pretrained(Mlp(dtype), folder, autocast_adapter_dtype=False).eval()
    batch = batches(1, dtype)[0]
    torch.testing.assert_close(loaded(**batch).logits, handle.model(**batch).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_principal_part(name: str, tmp_path: Path) -> None:
    def by_qr(base: Tensor) -> Tensor:
        q, r = torch.linalg.qr(base)
        return 2.0 * q[:, :4] @ r[:4]

    weight = residual(principal if name == "pissa" else by_qr)
    handle = check_layer_method(name, weight, count=COUNT, r=4, lora_alpha=8.0, tmp_path=tmp_path / "own")
    read_by_peft(handle, tmp_path / "again")
    before = Mlp().up.weight
    torch.testing.assert_close(
        handle.model.up.weight, before - (principal(before) if name == "pissa" else by_qr(before)), rtol=0, atol=1e-10
    )
    # PEFT's files of the same initialisation are read, the residual formed anew; and PEFT begins where we do.
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=name)
    theirs = stock(config, tmp_path / "stock")
    mine = peftfast.load_adapter(Mlp(torch.float32), tmp_path / "stock")
    batch = batches(1, torch.float32)[0]
    torch.testing.assert_close(mine(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    begun = peft.get_peft_model(Mlp(torch.float32), config).base_model.model.up
    fresh = adapted(name, dtype=torch.float32, r=4, lora_alpha=8.0).layers["up"]
    torch.testing.assert_close(fresh.lora_A.abs(), begun.lora_A.default.weight.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.lora_B.abs(), begun.lora_B.default.weight.abs(), rtol=1e-4, atol=1e-5)


def test_pissa_options(tmp_path: Path) -> None:
    quick = adapted("pissa", r=4, lora_alpha=8.0, niter=16)
    exact = adapted("pissa", r=4, lora_alpha=8.0)
    left = [float(torch.linalg.matrix_norm(one.model.up.weight, 2)) for one in (quick, exact)]
    assert left[1] <= left[0] < 1.05 * left[1] < float(torch.linalg.matrix_norm(Mlp().up.weight, 2))
    torch.testing.assert_close(quick.model(**X).logits, Mlp()(**X).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="pissa adapts none of the layers: rank 128 is more than its smaller side"):
        adapted("pissa")
    # QPiSSA: what is left is in 4 bits again, and the files hold it.
    handle = adapted("pissa", dtype=torch.float32, four_bit=True, r=4, lora_alpha=8.0)
    dense = F.nf4_dequantize(NF4Linear.from_linear(Mlp(torch.float32).up).nf4)
    layer = handle.layers["up"]
    product = 2.0 * (layer.lora_B @ layer.lora_A).detach()
    torch.testing.assert_close(product, principal(dense), rtol=0, atol=1e-5)
    assert torch.equal(F.nf4_dequantize(layer.nf4), F.nf4_dequantize(F.nf4_quantize(dense - product)))
    stir(handle)
    check_files(handle, tmp_path, four_bit=True, tolerance=1e-5)


def test_eva(tmp_path: Path) -> None:
    """Of one batch PEFT's incremental PCA is the PCA: the same ranks, directions and scalings; B = 0."""
    data = batches(1, torch.float32)[0]
    data["x"][:, :2] *= 6  # two directions that explain most of what comes into the first layer
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )  # fmt: skip
    theirs = peft.get_peft_model(Mlp(torch.float32), config)
    peft.initialize_lora_eva_weights(
        theirs, [data], prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, inputs, name: x[0] if isinstance(x, tuple) else x, show_progress_bar=False,
    )  # fmt: skip
    mine = peftfast.adapt(Mlp(torch.float32), "eva", target_modules=TARGETS, batches=[data], r=4, lora_alpha=8.0)
    for name in TARGETS:
        layer, stock_layer = mine.layers[name], theirs.base_model.model.get_submodule(name)
        a = stock_layer.lora_A.default.weight
        assert layer.r == a.shape[0] and layer.scaling == stock_layer.scaling["default"] == 2.0
        torch.testing.assert_close(layer.lora_A.abs(), a.abs(), rtol=1e-3, atol=1e-4)
        assert not layer.lora_B.any()
    assert sum(layer.r for layer in mine.layers.values()) == 8 and mine.layers["up"].r != 4
    x = data["x"].double()
    spectrum = torch.linalg.svdvals(x - x.mean(0)).square()
    hidden = torch.tanh(Mlp().up(x))
    other = torch.linalg.svdvals(hidden - hidden.mean(0)).square()
    parts = torch.cat([(spectrum / spectrum.sum())[:8], (other / other.sum())[:8]])
    assert mine.layers["up"].r == int((parts.argsort(descending=True)[:8] < 8).sum())
    stir(mine)
    read_by_peft(mine, tmp_path, 1e-5)
    handle = check_layer_method(
        "eva", lambda layer, base, p: base + 2.0 * p["lora_B"] @ p["lora_A"],
        count=sum(r * side for r, side in zip([4, 4], [112, 104], strict=True)),
        data=2, r=4, lora_alpha=8.0, rho=1.0, tmp_path=tmp_path / "even",
    )  # fmt: skip
    assert all(layer.r == 4 for layer in handle.layers.values())
    free = adapted("eva", data=1, r=4, lora_alpha=8.0, adjust_scaling_factors=False, whiten=True)
    assert free.layers["up"].scaling == 8.0 / free.layers["up"].r
    assert (free.layers["up"].lora_A.norm(dim=1) < 1).all()


def test_eva_ranks_and_masks() -> None:
    parts = {"a": torch.tensor([0.6, 0.3]), "b": torch.tensor([0.6, 0.1]), "c": torch.tensor([0.01, 0.001])}
    assert ranks_by_variance(parts, 3) == {"a": 2, "b": 1, "c": 0}
    from peftfast.methods.passes import chosen_rows

    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert chosen_rows(x, {"attention_mask": mask}).tolist() == [[0, 1], [2, 3], [6, 7]]
    labels = torch.tensor([[-100, 4, 5], [-100, 1, 1]])
    assert chosen_rows(x, {"attention_mask": mask, "labels": labels}, label_mask=-100).tolist() == [[2, 3]]
    assert len(chosen_rows(x, {"labels": torch.tensor([0, 1])}, label_mask=-100)) == 6


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("attr")  # which PEFT's CorDA imports without asking for it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    data = batches(3, torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    model = Mlp(torch.float32)
    preprocess_corda(model, config, run_model=lambda: [model(**one) for one in data])
    theirs = peft.get_peft_model(model, config)
    given = {"target_modules": TARGETS, "r": 4, "lora_alpha": 8.0, "corda_method": mode}
    mine = peftfast.adapt(Mlp(torch.float32), "corda", batches=data, **given)
    for name in TARGETS:
        layer, stock_layer = mine.layers[name], theirs.base_model.model.get_submodule(name)
        product = stock_layer.lora_B.default.weight @ stock_layer.lora_A.default.weight
        scale = float(product.abs().max())
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, rtol=0, atol=2e-3 * scale)
        torch.testing.assert_close(layer.weight, stock_layer.base_layer.weight, rtol=0, atol=4e-3 * scale)

    def begin(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        x = torch.cat([b["x"] if base.shape[1] == 48 else torch.tanh(Mlp().up(b["x"])) for b in batches(3)])
        c = sum((part / part.max().abs()).T @ (part / part.max().abs()) for part in x.detach().split(12)) / 3
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        u, s, v = torch.linalg.svd(base @ c, full_matrices=False)
        part = slice(4) if mode == "ipm" else slice(-4, None)
        return base - (u[:, part] * s[part]) @ v[part] @ torch.linalg.inv(c) + 2.0 * p["lora_B"] @ p["lora_A"]

    handle = check_layer_method(
        "corda", begin, count=COUNT, data=3, r=4, lora_alpha=8.0, corda_method=mode, tmp_path=tmp_path, tolerance=1e-8
    )
    read_by_peft(handle, tmp_path / "again")


def test_corda_covariance_of_sequences() -> None:
    """Each sequence of a batch is one of PEFT's samples."""
    from peftfast.methods.adapting import Targets
    from peftfast.methods.corda import covariances, damped_inverse
    from peftfast.methods.registry import get

    x = torch.randn(3, 5, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    found = covariances(Targets(model, get("corda"), ["0"], [{"input": x}], False))["0"]
    expected = sum((one / one.max().abs()).T @ (one / one.max().abs()) for one in x) / 3
    torch.testing.assert_close(found, expected)
    poor = torch.outer(x[0, 0], x[0, 0]) * 1e6
    damped, inverse = damped_inverse(poor)
    assert torch.dist(damped @ inverse, torch.eye(4)) < 0.05


def gradient_of(name: str, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The mean gradient of a weight over the batches, by autograd on the weight itself."""
    model = Mlp(dtype)
    for batch in batches(count, dtype):
        (model(**batch).loss / count).backward()
    return model.get_submodule(name).weight.grad


def test_lora_ga(tmp_path: Path) -> None:
    def begin(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(gradient_of("up" if base.shape == (64, 48) else "down", 3))
        signs = torch.sign((u[:, 4:8] * layer.initial_B).sum(0))[:, None] * torch.sign((v[:4] * layer.initial_A).sum(1))
        c = base.shape[0] ** 0.5 / 16
        # The sign of each pair of singular vectors is free, of A's and B's each on its own.
        start = c * u[:, 4:8] @ torch.diag(signs.diagonal()) @ v[:4]
        return base - 8.0 * start + 8.0 * p["lora_B"] @ p["lora_A"]

    handle = check_layer_method("lora-ga", begin, count=COUNT, data=3, r=4, lora_alpha=16.0, tmp_path=tmp_path)
    read_by_peft(handle, tmp_path / "again")
    layer = adapted("lora-ga", data=3, r=4).layers["down"]
    unit = layer.lora_A @ layer.lora_A.T
    torch.testing.assert_close(unit, torch.eye(4, dtype=unit.dtype) * 40**0.5 / 16, rtol=1e-9, atol=1e-9)


def test_lora_ga_says_how_far_from_a_4_bit_base_it_begins() -> None:
    with pytest.warns(UserWarning, match="does not begin at the base's output") as caught:
        handle = adapted("lora-ga", dtype=torch.float32, four_bit=True, data=3, r=4, lora_alpha=16.0)
    base, far = Mlp(torch.float32), []
    for name, layer in handle.layers.items():
        weight = F.nf4_dequantize(NF4Linear.from_linear(base.get_submodule(name)).nf4)
        begun = F.nf4_dequantize(layer.nf4) + layer.scaling * layer.lora_B @ layer.lora_A
        far.append(float((begun - weight).norm() / weight.norm()))
    assert max(far) > 0.01 and f"by {100 * max(far):.1f} % of the weight" in str(caught[0].message)


@pytest.mark.parametrize(
    ("direction", "scale"),
    [
        *itertools.product(["ArB2r", "A2rBr", "ArBr"], ["stable"]),
        *(("ArB2r", s) for s in ("weight_svd", "gd_scale", "unit")),
    ],
)
def test_lora_ga_is_pefts(direction: str, scale: str) -> None:
    preprocess_loraga = pytest.importorskip(
        "peft.tuners.lora.loraga", reason="PEFT has LoRA-GA from 0.19 on"
    ).preprocess_loraga
    from peft.tuners.lora import LoraGAConfig

    data = batches(3, torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
    )
    model = Mlp(torch.float32)
    preprocess_loraga(model, config, lambda: [model(**one).loss.backward() for one in data])
    theirs = peft.get_peft_model(model, config)
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8.0, "use_rslora": False, "singular_values": True}
    mine = peftfast.adapt(
        Mlp(torch.float32), "lora-ga", target_modules=TARGETS, batches=data, direction=direction, scale=scale, **given
    )
    for name in TARGETS:
        layer, stock_layer = mine.layers[name], theirs.base_model.model.get_submodule(name)
        for own, other in ((layer.lora_A, stock_layer.lora_A), (layer.lora_B, stock_layer.lora_B)):
            there = other.default.weight
            # weight_svd: PEFT's largest singular value is that of a randomised SVD of rank r.
            part = 0.1 if scale == "weight_svd" else 5e-3
            torch.testing.assert_close(own.abs(), there.abs(), rtol=0, atol=part * float(there.abs().max()))


@pytest.mark.parametrize("name", ["eva", "corda", "lora-ga", "eora", "lq-lora", "lora-sb"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_data_that_say_nothing(name: str, value: float) -> None:
    """Inputs of zeros or of no number: an end and a reason or a whole adapter, and no endless loop."""
    dtype = torch.float32
    batch = {"x": torch.full((12, 48), value, dtype=dtype), "labels": torch.zeros(12, dtype=torch.int64)}
    model = Mlp(dtype)
    try:
        handle = peftfast.adapt(model, name, target_modules=TARGETS, batches=[batch], r=4)
    except (ValueError, RuntimeError):  # RuntimeError: torch's own, of an SVD of no numbers
        assert type(model.up) is nn.Linear and not hasattr(model, "peftfast_handle")
        return
    assert all(bool(p.isfinite().all()) for p in handle.adapter_parameters())
    if value == 0.0:
        assert bool(handle.model(**batches(1, dtype)[0]).logits.isfinite().all())


def test_data_is_asked_for() -> None:
    for name in ("eva", "corda", "lora-ga", "eora", "lq-lora", "lora-sb"):
        with pytest.raises(ValueError, match=f"batches: {name} reads data"):
            adapted(name)
        with pytest.raises(ValueError, match="batches: expected at least one batch"):
            peftfast.adapt(Mlp(), name, target_modules=TARGETS, batches=[], r=4)
        with pytest.raises(TypeError, match="batches: expected dictionaries"):
            peftfast.adapt(Mlp(), name, target_modules=TARGETS, batches=[3], r=4)
    unlabelled = [{"x": batches(1)[0]["x"]}]
    model = Mlp()
    with pytest.raises(ValueError, match="batches: expected labels"):
        peftfast.adapt(model, "lora-ga", target_modules=TARGETS, batches=unlabelled, r=4)
    assert not model.up._forward_hooks and model.training and all(p.requires_grad for p in model.parameters())
