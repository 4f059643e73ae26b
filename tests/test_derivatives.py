"""What the kernels cannot differentiate is refused, and in a patched model left to the stock forward: nothing is lost in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import peftfast
import peftfast.functional as F
from tests.support.gated_blocks import adapted, inputs
from tests.test_patch import relative

K, N, R = 64, 32, 4


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(5, K),
        "w": torch.randn(N, K),
        "a": torch.randn(R, K, requires_grad=True),
        "b": torch.randn(N, R, requires_grad=True),
        "values": torch.randn(64, requires_grad=True),
    }


def _sparse(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.sparse_delta_linear(x, t["w"], F.SparsePattern(torch.arange(0, 640, 10), (N, K)), t["values"])


LAYERS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "lora": lambda t, x: F.lora_linear(x, t["w"], t["a"], t["b"]),
    "lora on 4 bits": lambda t, x: F.lora_linear(x, F.nf4_quantize(t["w"]), t["a"], t["b"]),
    "dora": lambda t, x: F.lora_linear(x, t["w"], t["a"], t["b"], magnitude=torch.ones(N)),
    "a group": lambda t, x: F.lora_linears(x, [F.Projection(t["w"], t["a"], t["b"])] * 2)[1],
    "gated": lambda t, x: F.lora_gated_linear(x, x + 1, t["w"], t["a"], t["b"]),
    "sparse": _sparse,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_derivative_is_refused_where_its_graph_is_asked_for(name: str) -> None:
    """The loss is linear in the layer's result, and dx's dependence on the factors was lost where dy has no graph: torch's own
    decorator asks dy alone."""
    t = _tensors()
    x = t["x"].clone().requires_grad_()
    loss = LAYERS[name](t, torch.tanh(x)).sum()
    with pytest.raises(RuntimeError, match="create_graph.*once_differentiable"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(lambda x: LAYERS[name](t, x).square().sum(), t["x"])
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.any()


def test_a_4_bit_layer_without_adapter_has_second_derivatives() -> None:
    t = _tensors()
    nf4 = F.nf4_quantize(t["w"])
    dense = F.nf4_dequantize(nf4)
    found = []
    for layer in (lambda x: F.nf4_linear(x, nf4), lambda x: x @ dense.T):
        x = t["x"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(torch.tanh(x)).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append(x.grad)
    assert relative(found[0], found[1]) < 1e-5


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, "4 bits"])
def test_forward_mode_is_refused(name: str, grad_mode: bool) -> None:
    """Without grad mode too, in which torch propagates tangents all the same."""
    t = _tensors()
    layer = LAYERS.get(name, lambda t, x: F.nf4_linear(x, F.nf4_quantize(t["w"])))
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        plain = layer(t, t["x"])
        assert plain.shape == (5, N)  # what has no tangent is served
        with pytest.raises(NotImplementedError, match="forward mode|forward-mode"):
            layer(t, forward_ad.make_dual(t["x"], torch.ones_like(t["x"])))
    if name in ("4 bits", "lora on 4 bits"):
        with (
            torch.set_grad_enabled(grad_mode),
            pytest.raises((NotImplementedError, RuntimeError), match="forward|functorch"),
        ):
            torch.func.jvp(lambda x: layer(t, x), (t["x"],), (torch.ones_like(t["x"]),))


def _by_func(model: Any, x: Tensor) -> Tensor:
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda own: torch.func.functional_call(model, own, (x,)).square().mean())(own)
    return torch.cat([one.flatten() for one in grads.values()])


def _per_sample(model: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda x: model(x[None]).square().mean()))(x)  # type: ignore[no-any-return]


def _tangent(model: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent  # type: ignore[return-value]


def _traced(model: Any, x: Tensor) -> Tensor:
    y = torch.jit.trace(model, x[:, :3])(x)
    return y.detach()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [_by_func, _per_sample, _tangent, _traced], ids=lambda way: way.__name__.strip("_"))
def test_a_patched_model_under_transforms_is_stock(way: Callable[[Any, Tensor], Tensor]) -> None:
    """Of a dense base: bitsandbytes 0.50.2 writes a transform's tensor into its bias there."""
    model, x = adapted(), inputs().detach()
    expected = way(model, x)
    peftfast.patch(model)
    model(x)  # verdicts are known
    found = way(model, x)
    assert found is not None and relative(found, expected) < 1e-5


def test_a_patched_shira_layer_under_transforms_is_stock() -> None:
    import peft
    from torch import nn

    torch.manual_seed(0)
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.ShiraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, K)
    expected = _per_sample(model, x)
    peftfast.patch(model)
    assert relative(_per_sample(model, x), expected) < 1e-5
