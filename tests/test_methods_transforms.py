"""SSF, HUT, Hydra, Compacter, Monarch and FLoRA against their formulas in plain torch."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftfast
from tests.support.method_checks import (
    Mlp,
    adapted,
    batches,
    check_four_bit,
    check_layer_method,
    check_merging,
    check_steps,
    plain_model,
    stir,
)
from tests.support.shared_checks import check_shared

UP, DOWN = 64 + 48, 40 + 64  # N + K of the two layers


def test_ssf(tmp_path: Path) -> None:
    def forward(layer: nn.Module, x: Tensor, p: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:
        return (functional.linear(x, layer.weight, layer.bias)) * p["scale"] + p["shift"]

    handle = check_shared("ssf", forward, count=2 * (64 + 40), exact=False, tmp_path=tmp_path)
    check_merging(handle)
    exact = adapted("ssf", init_std=0.0)
    torch.testing.assert_close(exact.model(**batches(1)[0]).logits, Mlp()(**batches(1)[0]).logits, rtol=0, atol=0)
    check_shared("ssf", forward, four_bit=True, count=2 * (64 + 40), exact=False, tmp_path=tmp_path / "nf4")


def test_hut(tmp_path: Path) -> None:
    def weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base * (1 + p["hut_A"] @ p["hut_B"])

    check_layer_method("hut", weight, count=3 * (UP + DOWN), r=3, tmp_path=tmp_path)
    check_four_bit("hut", tmp_path / "nf4", weight, r=3)


def test_hydra(tmp_path: Path) -> None:
    def forward(layer: nn.Module, x: Tensor, p: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:
        h = functional.linear(x, layer.weight, layer.bias)
        branches = x @ p["parallel_A"].T @ p["parallel_B"].T + h @ p["sequential_A"].T @ p["sequential_B"].T
        return h + 6.0 / 3 * branches

    count = 3 * (UP + DOWN) + 3 * 2 * (64 + 40)
    given = {"r": 3, "lora_alpha": 6.0, "count": count}
    check_merging(check_shared("hydra", forward, tmp_path=tmp_path, **given))
    check_shared("hydra", forward, four_bit=True, tmp_path=tmp_path / "nf4", **given)


def test_hydra_keeps_no_output() -> None:
    """What the sequential branch reads is not kept: nothing of rows x N is saved for backward."""
    layer = peftfast.adapt(Mlp(torch.float32), "hydra", r=2, target_modules=["up"]).layers["up"]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(1000, 48)).sum()
    assert torch.Size((1000, 64)) not in kept and torch.Size((1000, 48)) in kept


def test_compacter(tmp_path: Path) -> None:
    def forward(layer: nn.Module, x: Tensor, p: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:
        rule = shared["compacter.rule"]
        down = sum(torch.kron(rule[i], torch.outer(p["down_s"][i], p["down_t"][i])) for i in range(4))
        up = sum(torch.kron(rule[i], torch.outer(p["up_s"][i], p["up_t"][i])) for i in range(4))
        h = functional.linear(x, layer.weight, layer.bias)
        return h + functional.gelu(h @ down.T + p["down_bias"]) @ up.T + p["up_bias"]

    count = 4**3 + 3 * (8 + 64) + 3 * (8 + 40)  # the rule; two sums of N + r and the biases in each layer
    handle = check_shared("compacter", forward, count=count, r=8, tmp_path=tmp_path)
    with pytest.raises(RuntimeError, match="compacter cannot be merged"):
        handle.merge()
    check_shared("compacter", forward, four_bit=True, count=count, r=8, tmp_path=tmp_path / "nf4")
    model = Mlp()
    model.up = nn.Linear(48, 63, dtype=torch.float64)
    model.down = nn.Linear(63, 40, dtype=torch.float64)
    odd = peftfast.adapt(model, "compacter", target_modules=["up", "down"], r=8)
    assert list(odd.layers) == ["down"] and "no multiple of n = 4" in odd.skipped["up"]


def test_monarch(tmp_path: Path) -> None:
    def weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        """The butterfly product as published, on the identity."""
        n, r = p["monarch_R"].shape[:2]
        x = torch.eye(base.shape[1], dtype=base.dtype)
        first = torch.einsum("bkp,kqp->bkq", x.reshape(len(x), n, -1), p["monarch_R"])
        first = first.reshape(len(x), r, n).transpose(1, 2)  # (r l) -> l r
        second = torch.einsum("blr,lsr->bls", first, p["monarch_L"])
        return base + second.transpose(1, 2).reshape(len(x), -1).T  # l s -> (s l)

    given = {"n_blocks": 4, "r": 3}
    handle = check_layer_method("monarch", weight, count=3 * (UP + DOWN), tmp_path=tmp_path, **given)
    delta = handle.layers["up"].merged_weight() - handle.layers["up"].dense_weight()
    assert int(torch.linalg.matrix_rank(delta.detach())) == 12
    check_four_bit("monarch", tmp_path / "nf4", weight, **given)


def test_flora_on_linear_layers(tmp_path: Path) -> None:
    def weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base + 0.5 * torch.einsum("ab,oa,bi->oi", p["core"], p["side_out"], p["side_in"])

    check_layer_method("flora", weight, count=2 * 9 + 3 * (UP + DOWN), r=3, scale=0.5, tmp_path=tmp_path)
    check_four_bit("flora", tmp_path / "nf4", weight, r=3, scale=0.5)


class Convolutions(Mlp):
    """Two convolutions under the names of the small model's layers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        torch.manual_seed(5)
        self.up = nn.Conv2d(3, 6, (3, 3), padding=1, stride=2, dtype=dtype)
        self.down = nn.Conv2d(6, 5, (2, 1), dilation=2, bias=False, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None):  # type: ignore[no-untyped-def]
        image = torch.tanh(self.down(torch.tanh(self.up(x.reshape(-1, 3, 4, 4).repeat(1, 1, 2, 2)))))
        logits = self.head(image.flatten(1).repeat(1, 2)[:, :40])
        return type("Output", (), {"loss": functional.cross_entropy(logits, labels), "logits": logits})()


class PlainConv(nn.Module):
    def __init__(self, conv: nn.Conv2d, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.names, self.values = list(values), nn.ParameterList([v.detach().clone() for v in values.values()])

    def forward(self, x: Tensor) -> Tensor:
        p = dict(zip(self.names, self.values, strict=True))
        delta = torch.einsum(
            "abhw,oa,ib,yh,xw->oiyx", p["core"], p["side_out"], p["side_in"], p["side_height"], p["side_width"]
        )
        conv = self.conv
        return functional.conv2d(x, conv.weight + delta, conv.bias, conv.stride, conv.padding, conv.dilation)


def test_flora_on_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(2)
    handle = peftfast.adapt(Convolutions(), "flora", target_modules=["up", "down"], r=2)
    sides = 2 * (6 + 3) + 2 * (3 + 3) + 2 * (5 + 6) + (2 * 2 + 1 * 1)
    assert handle.trainable == sides + 2 * 2 * 2 * 2 + 2 * 2 * 2 * 1
    batch = batches(1)[0]
    torch.testing.assert_close(handle.model(**batch).logits, Convolutions()(**batch).logits, rtol=0, atol=0)
    stir(handle, 0.3)
    plain = Convolutions().requires_grad_(False)
    for name, layer in handle.layers.items():
        values = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        setattr(plain, name, PlainConv(getattr(plain, name), values))
    check_steps(handle, plain, None, 1e-9)
    check_merging(handle)
    peftfast.save_adapter(handle.model, tmp_path)
    loaded = peftfast.load_adapter(Convolutions(), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, handle.model(**batch).logits, rtol=1e-9, atol=1e-9)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4))
    assert "groups" in peftfast.adapt(grouped, "flora", target_modules=["0", "1"]).skipped["0"]


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("ssf", {"init_std": -1.0}, "init_std: expected a deviation"),
        ("hut", {"r": 0}, "r: expected an int"),
        ("hydra", {"lora_alpha": 0.0}, "lora_alpha: expected a number above 0"),
        ("compacter", {"r": 6}, "r: expected a multiple of n = 4, got 6"),
        ("monarch", {"n_blocks": 0}, "n_blocks: expected an int"),
        ("monarch", {"n_blocks": 7}, "no multiples of n_blocks = 7"),
        ("flora", {"r_kernel": 0}, "r_kernel: expected an int"),
    ],
)
def test_bad_options(name: str, given: dict, match: str) -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        peftfast.adapt(model, name, target_modules=["up", "down"], **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plain_model is not None and type(model.up) is nn.Linear
