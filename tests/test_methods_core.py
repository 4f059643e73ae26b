"""Core and diagonal forms by name, each against the paper's formula in plain torch; VeRA against PEFT's own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftfast
from tests.support.method_checks import Mlp, adapted, batches, check_four_bit, check_layer_method, stir

TARGETS = ["up", "down"]
R = {"r": 4, "lora_alpha": 8.0}


def nystrom(base: Tensor, inverse: bool) -> Tensor:
    block = base[:4, :4]
    return base[:, :4] @ (torch.linalg.pinv(block) if inverse else block) @ base[:4]


def test_slora(tmp_path: Path) -> None:
    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base + 2.0 * p["lora_B"] @ p["lora_N"] @ p["lora_A"]

    check_layer_method("slora", weight, count=4 * 216 + 2 * 16, tmp_path=tmp_path, **R)
    check_four_bit("slora", tmp_path / "nf4", weight, **R)


@pytest.mark.parametrize("inverse", [True, False])
def test_nlora_and_inttune(inverse: bool, tmp_path: Path) -> None:
    def nlora(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base - nystrom(base, inverse) + 2.0 * p["lora_B"] @ p["lora_N"] @ p["lora_A"]

    size = 0.01 if inverse else 0.05  # the inverse of a random block is large
    given = {"inverse": inverse, **R}
    handle = check_layer_method(
        "nlora", nlora, count=4 * 216 + 2 * 16, tmp_path=tmp_path, stirred=size, tolerance=1e-8, **given
    )
    assert handle.model.up.lora_A.shape == (4, 48)
    begun = adapted("nlora", **given)
    approximated = Mlp().up.weight - begun.layers["up"].weight
    torch.testing.assert_close(approximated, nystrom(Mlp().up.weight, inverse), rtol=0, atol=1e-9)
    if inverse:  # Nyström's is exact on the rows and columns that it is made of
        torch.testing.assert_close(approximated[:4], Mlp().up.weight[:4], rtol=0, atol=1e-8)

    def inttune(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        a, b = base[:4], base[:, :4]
        return base - nystrom(base, inverse) + 2.0 * b @ p["lora_N"] @ a

    check_layer_method(
        "inttune", inttune, count=2 * 16, tmp_path=tmp_path / "int", stirred=size, tolerance=1e-8, **given
    )
    if not inverse:
        check_four_bit("inttune", tmp_path / "nf4", inttune, **given)
        with pytest.raises(ValueError, match="in 4 bits would be quantised again"):
            adapted("nlora", dtype=torch.float32, four_bit=True, **given)


def full_step(base: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    model = Mlp()
    for batch in batches(3):
        model(**batch).loss.backward()
    step = -eta * torch.sign(model.get_submodule("up" if base.shape == (64, 48) else "down").weight.grad)
    u, s, v = torch.linalg.svd(step)
    return u[:, :4], s[:4], v[:4]


@pytest.mark.parametrize("keep", [False, True])
def test_lora_sb(keep: bool, tmp_path: Path) -> None:
    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        u, s, v = full_step(base, 0.01)
        signs = torch.sign((u * layer.frozen_B).sum(0))
        core = 2.0 * p["latent"] - (torch.diag(s) if keep else 0.0)
        return base + (u * signs) @ core @ (signs[:, None] * v)

    handle = check_layer_method(
        "lora-sb",
        weight,
        count=2 * 16,
        exact=keep,
        data=3,
        eta=0.01,
        keep_output=keep,
        tmp_path=tmp_path,
        tolerance=1e-8,
        **R,
    )
    assert handle.method.reads_data
    if not keep:  # it begins at the best rank-4 part of the step
        begun = adapted("lora-sb", data=3, eta=0.01, **R).layers["up"]
        u, s, v = full_step(Mlp().up.weight, 0.01)
        torch.testing.assert_close(begun.merged_weight() - Mlp().up.weight, (u * s) @ v, rtol=0, atol=1e-10)


def test_svfit(tmp_path: Path) -> None:
    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(base, full_matrices=False)
        values = torch.cat([p["values"], s[len(p["values"]) :]])
        return u @ torch.diag(values) @ v

    check_layer_method("svfit", weight, count=2 * 6, r=6, tmp_path=tmp_path)
    assert adapted("svfit").trainable == 48 + 40
    check_four_bit("svfit", tmp_path / "nf4", weight, r=6)


def test_loldu(tmp_path: Path) -> None:
    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        permutation, lower, upper = torch.linalg.lu(base)
        d = upper.diagonal()
        unit = upper / d[:, None]
        first = permutation @ lower[:, :6]
        rest = base - 0.5 * first @ torch.diag(d[:6]) @ unit[:6]
        return rest + p["sigma"] * first @ torch.diag(p["diagonal"]) @ unit[:6]

    check_layer_method("loldu", weight, count=2 * 7, r=6, lora_alpha=3.0, tmp_path=tmp_path)
    check_four_bit("loldu", tmp_path / "nf4", weight, r=6, lora_alpha=3.0)
    model = Mlp()
    torch.nn.init.zeros_(model.up.weight)
    handle = peftfast.adapt(model, "loldu", target_modules=TARGETS, r=4)
    assert "the weight is of low rank" in handle.skipped["up"] and list(handle.layers) == ["down"]


def test_vera(tmp_path: Path) -> None:
    def weight(layer: Any, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        a = torch.empty(8, 64).uniform_(-((6 / 64) ** 0.5), (6 / 64) ** 0.5, generator=generator).to(base)
        b = torch.empty(64, 8).uniform_(-((6 / 8) ** 0.5), (6 / 8) ** 0.5, generator=generator).to(base)
        n, k = base.shape
        return base + torch.diag(p["vera_lambda_b"]) @ b[:n] @ torch.diag(p["vera_lambda_d"]) @ a[:, :k]

    options = {"r": 8, "projection_prng_key": 3}
    check_layer_method("vera", weight, count=2 * 8 + 64 + 40, tmp_path=tmp_path / "own", **options)
    check_four_bit("vera", tmp_path / "nf4", weight, **options)
    handle = adapted("vera", dtype=torch.float32, **options)
    assert (handle.layers["up"].vera_lambda_d == 0.1).all() and not handle.layers["up"].vera_lambda_b.any()
    stir(handle)
    batch = batches(1, torch.float32)[0]
    peftfast.save_adapter(handle.model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Mlp(torch.float32), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**batch).logits, handle.model(**batch).logits, rtol=1e-5, atol=1e-5)
    config = peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=3, d_initial=0.2)
    for keep in (True, False):
        config.save_projection = keep
        stock = peft.get_peft_model(Mlp(torch.float32), config)
        torch.nn.init.normal_(stock.base_model.model.up.vera_lambda_b["default"])
        stock.save_pretrained(tmp_path / f"b{keep}")
        loaded = peftfast.load_adapter(Mlp(torch.float32), tmp_path / f"b{keep}")
        torch.testing.assert_close(loaded(**batch).logits, stock.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
        assert loaded.peftfast_handle.options.d_initial == 0.2


@pytest.mark.parametrize("name", ["lora-xs", "inttune", "svfit", "loldu", "vera"])
def test_frozen_factors_keep_no_x(name: str) -> None:
    """Only what is r wide is kept of the rows, and nothing is trained but what the paper trains."""
    handle = adapted(name, dtype=torch.float32, r=4)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        handle.layers["up"](torch.randn(1000, 48)).sum()
    assert torch.Size((1000, 4)) in kept and torch.Size((1000, 48)) not in kept
    assert not handle.model.up.base_layer.weight.requires_grad
