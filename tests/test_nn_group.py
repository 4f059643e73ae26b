"""Several adapted layers of one input as one module."""

import copy

import pytest
import torch
from torch import nn

from peftfast.nn import LoRALinear, LoRALinears, NF4Linear


def group(kind: str = "dense", p: float = 0.0) -> LoRALinears:
    torch.manual_seed(0)
    bases: list[nn.Module] = [nn.Linear(96, n, bias=n != 32) for n in (64, 32, 33)]
    if kind == "nf4":
        bases = [NF4Linear.from_linear(base) for base in bases]
    layers = LoRALinears(
        LoRALinear.from_linear(base, r=r, lora_dropout=p, use_dora=kind == "dora", lora_bias=kind == "dense")
        for base, r in zip(bases, (4, 8, 3), strict=True)
    )
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layers


@pytest.mark.parametrize("kind", ["dense", "nf4", "dora"])
def test_it_is_its_layers(kind: str) -> None:
    layers = group(kind)
    twin = copy.deepcopy(layers)
    x = torch.randn(5, 7, 96, requires_grad=True)
    together, alone = layers(x), tuple(layer(x) for layer in twin)
    grads = []
    for ys in (together, alone):
        x.grad = None
        sum(y.square().sum() for y in ys).backward()
        grads.append(x.grad)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    for (name, one), (_, other) in zip(layers.named_parameters(), twin.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_keys_and_copies() -> None:
    layers = group()
    assert set(layers.state_dict()) == {f"{i}.{key}" for i in range(3) for key in layers[i].state_dict()}
    x = torch.randn(4, 96)
    assert all(torch.equal(one, other) for one, other in zip(layers(x), copy.deepcopy(layers)(x), strict=True))


def test_hooks_of_a_layer_are_called() -> None:
    layers, x, seen = group(), torch.randn(4, 96, requires_grad=True), []
    handles = [
        layers[0].register_forward_hook(lambda layer, given, y: y * 0),
        layers[1].register_forward_pre_hook(lambda layer, given: seen.append("before")),
        layers[2].register_full_backward_hook(lambda layer, dx, dy: seen.append("backward")),
    ]
    ys = layers(x)
    sum(y.square().sum() for y in ys).backward()
    assert ys[0].abs().max() == 0 and seen == ["before", "backward"]
    for handle in handles:
        handle.remove()
    assert layers(x)[0].abs().max() > 0


def test_merged_and_differing_layers_run_alone() -> None:
    layers, x = group(), torch.randn(4, 96)
    before = layers(x)
    layers[0].bias.data += 0.0
    layers[0].merge()
    for one, other in zip(layers(x), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    layers[0].unmerge()
    layers[1].eval()
    assert all(torch.equal(one, other) for one, other in zip(layers(x), (layer(x) for layer in layers), strict=True))


def test_dropout_in_training_only() -> None:
    layers, x = group(p=0.5), torch.randn(4, 96)
    torch.manual_seed(1)
    first, second = layers(x), layers(x)
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    layers.eval()
    assert all(torch.equal(one, other) for one, other in zip(layers(x), layers(x), strict=True))


def test_bad_layers() -> None:
    with pytest.raises(TypeError, match="layers: expected LoRALinear layers"):
        LoRALinears([nn.Linear(3, 4)])
    with pytest.raises(TypeError, match="layers: expected LoRALinear layers"):
        LoRALinears([])
    with pytest.raises(ValueError, match="the same in_features"):
        LoRALinears([LoRALinear(3, 4), LoRALinear(5, 4)])
