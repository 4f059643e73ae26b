"""A backward pass that is mapped over gradients, of a recorded call or of a Function in Python: one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast import functional as F
from peftfast.ops import native

K, N, R = 32, 24, 4
MODES = [
    "python",
    pytest.param("auto", marks=pytest.mark.skipif(not native.autograd_available()[0], reason="no library")),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Given:
    """Tensors for a call, those that are trained as parameters."""

    def __init__(self) -> None:
        self.weight, self.other, self.down, self.bias = randn(N, K), randn(N, K, seed=1), randn(16, N, seed=2), randn(N)
        self.a, self.b = nn.Parameter(randn(R, K, seed=3)), nn.Parameter(randn(N, R, seed=4))
        self.a2, self.b2 = nn.Parameter(randn(7, K, seed=5)), nn.Parameter(randn(N, 7, seed=6))
        self.a3, self.b3 = nn.Parameter(randn(R, N, seed=7)), nn.Parameter(randn(16, R, seed=8))
        self.lora_bias, self.magnitude = nn.Parameter(randn(N, seed=9)), nn.Parameter(randn(N, seed=10).abs() + 1)

    def trained(self) -> list[nn.Parameter]:
        return [one for one in vars(self).values() if isinstance(one, nn.Parameter)]


CALLS: dict[str, Callable[[Given, Tensor], Tensor]] = {
    "layer": lambda g, x: F.lora_linear(x, g.weight, g.a, g.b, bias=g.bias, dropout_p=0.3, seed=5),
    "lora_bias": lambda g, x: F.lora_linear(x, g.weight, g.a, g.b, lora_bias=g.lora_bias),
    "DoRA": lambda g, x: F.lora_linear(x, g.weight, g.a, g.b, magnitude=g.magnitude, dropout_p=0.3, seed=5),
    "group": lambda g, x: torch.cat(
        F.lora_linears(x, [F.Projection(g.weight, g.a, g.b), F.Projection(g.other, g.a2, g.b2, dropout_p=0.2, seed=3)])
    ),
    "group of which one is unused": lambda g, x: F.lora_linears(
        x, [F.Projection(g.weight, g.a, g.b), F.Projection(g.other, g.a2, g.b2)]
    )[1],
    "mixed batch": lambda g, x: F.multi_lora_linear(
        x, g.weight, [F.Adapter(g.a, g.b), F.Adapter(g.a2, g.b2)], rows=[i % 3 - 1 for i in range(len(x))]
    ),
    "gated": lambda g, x: F.lora_gated_linear(x[..., :N] * 1, x[..., -N:] * 1, g.down, g.a3, g.b3),
    "product": lambda g, x: F.gated_activation(x[..., :N] * 1, x[..., -N:] * 1, "gelu"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_gradients_is_one_after_the_other(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``is_grads_batched``, by which vectorised Jacobians are made, and ``torch.vmap`` over a backward pass."""
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", mode)
    given, call, x = Given(), CALLS[name], randn(6, K, seed=11).requires_grad_()
    for _ in range(3):
        y = call(given, x)
        y.sum().backward()
    y = call(given, x)
    wanted: list[Tensor] = [*given.trained(), x]
    dys = randn(2, 3, *y.shape, seed=12)

    def backward(dy: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(y, wanted, dy, retain_graph=True, allow_unused=True, **options)

    expected = [[backward(dy) for dy in row] for row in dys]
    used = [i for i, one in enumerate(expected[0][0]) if one is not None]
    assert len(used) > 1 or name == "product"
    found = backward(dys[0], is_grads_batched=True)
    assert [i for i, one in enumerate(found) if one is not None] == used
    # Two maps inside one another, the outer one over a dimension in the middle.
    mapped = torch.vmap(torch.vmap(lambda dy: tuple(backward(dy)[i] for i in used)), in_dims=1)(dys.movedim(0, 1))
    for at, i in enumerate(used):
        assert torch.equal(found[i], torch.stack([row[i] for row in expected[0]]))  # type: ignore[arg-type]
        assert torch.equal(mapped[at], torch.stack([torch.stack([one[i] for one in row]) for row in expected]))  # type: ignore[arg-type]
    empty = torch.vmap(lambda dy: backward(dy)[-1])(dys[0, :0])
    assert empty is not None and empty.shape == (0, *x.shape)


@pytest.mark.parametrize("mode", MODES)
def test_a_vectorised_jacobian(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_AUTOGRAD", mode)
    given, x = Given(), randn(3, K, seed=13)

    def call(x: Tensor) -> Tensor:
        return CALLS["layer"](given, x)

    plain, vectorised = (torch.autograd.functional.jacobian(call, x, vectorize=one) for one in (False, True))
    assert torch.equal(plain, vectorised)
