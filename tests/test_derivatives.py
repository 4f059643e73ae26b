"""What the kernels cannot differentiate is refused, left to the definition, and in a patched model to the stock forward: nothing is
lost in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import peftfast
import peftfast.functional as F
import peftfast.nn
from peftfast.functional import derivatives
from peftfast.reference import lora as definition
from peftfast.reference import sparse_delta as definition_of_sparse
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


def _plain(name: str, t: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a layer is, by torch's operators alone."""
    if name == "4 bits":
        return x @ F.nf4_dequantize(F.nf4_quantize(t["w"])).T
    if name == "activation":
        return torch.nn.functional.silu(x) * (x + 1)
    if name == "sparse":
        return definition_of_sparse.sparse_delta_linear(x, t["w"], torch.arange(0, 640, 10), t["values"])
    w = F.nf4_dequantize(F.nf4_quantize(t["w"])) if name == "lora on 4 bits" else t["w"]
    x = torch.nn.functional.silu(x) * (x + 1) if name == "gated" else x
    magnitude = torch.ones(N) if name == "dora" else None
    return definition.lora_linear(x, w, t["a"], t["b"], magnitude=magnitude)


ALL_LAYERS = LAYERS | {
    "4 bits": lambda t, x: F.nf4_linear(x, F.nf4_quantize(t["w"])),
    "activation": lambda t, x: F.gated_activation(x, x + 1),
    "a batch that mixes": lambda t, x: F.multi_lora_linear(x[None], t["w"], [F.Adapter(t["a"], t["b"])], [0])[0],
}


def _in_func(layer: Callable[..., Tensor], t: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    own = {name: t[name].detach() for name in ("a", "b", "values", "w")}
    grads = torch.func.grad(lambda own, x: layer(t | own, x).square().sum(), argnums=(0, 1))(own, x)
    return [*grads[0].values(), grads[1]]


def _tangents(layer: Callable[..., Tensor], t: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level(), torch.no_grad():
        own: Any = forward_ad.unpack_dual(layer(t, forward_ad.make_dual(x, torch.ones_like(x))))
    with forward_ad.dual_level():
        recorded: Any = forward_ad.unpack_dual(layer(t, forward_ad.make_dual(x, torch.ones_like(x))))
    return [own.tangent, recorded.tangent, *torch.func.jvp(lambda x: layer(t, x), (x,), (torch.ones_like(x),))]


def _mapped(layer: Callable[..., Tensor], t: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    each = torch.func.grad(lambda x: layer(t, x[None]).square().sum())
    both = torch.stack([t["b"].detach(), 2 * t["b"].detach()])
    return [torch.vmap(each)(x), torch.vmap(lambda b: layer(t | {"b": b}, x))(both)]


def _second(layer: Callable[..., Tensor], t: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return [torch.func.hessian(lambda x: layer(t, x).square().sum())(x[:2])]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("way", [_in_func, _tangents, _mapped, _second], ids=lambda way: way.__name__.strip("_"))
@pytest.mark.parametrize("name", ALL_LAYERS)
def test_under_transforms_the_definition_runs(
    name: str, way: Callable[..., list[Tensor]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "_said", [])
    if name in ("4 bits", "lora on 4 bits") and way is _in_func:
        quantised = F.nf4_quantize(_tensors()["w"])
        monkeypatch.setattr(F, "nf4_quantize", lambda w: quantised)  # which is no part of what is differentiated
    t = _tensors()
    with caplog.at_level("WARNING", "peftfast"):
        found = way(ALL_LAYERS[name], t, t["x"])
    assert [record.message for record in caplog.records if "plain PyTorch runs, not the kernels" in record.message]
    expected = way(lambda t, x: _plain(name, t, x), t, t["x"])
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition_under_transforms_is_what_the_kernels_compute(dtype: torch.dtype, magnitude: bool) -> None:
    """Of factors in float32, as PEFT keeps them, and with the same elements dropped for the same seed; autocast decides there too."""
    t = _tensors()
    options: dict[str, Any] = {"scaling": 0.5, "dropout_p": 0.3, "seed": 7, "lora_bias": torch.randn(N)}
    if magnitude:
        options["magnitude"] = torch.rand(N) + 0.5

    def layer(x: Tensor) -> Tensor:
        return F.lora_linear(x, t["w"].to(dtype), t["a"], t["b"], **options)

    x = t["x"].to(dtype)
    found, _ = torch.func.jvp(layer, (x,), (x,))
    assert found.dtype == dtype
    assert relative(found.float(), layer(x).float()) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.func.jvp(layer, (t["x"],), (t["x"],))[0].dtype == layer(t["x"]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "sparse", "resident", "sparse on 4 bits", "rosa", "group"])
def test_modules_under_transforms(kind: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N)
    base = peftfast.nn.NF4Linear.from_linear(linear) if "4 bits" in kind or kind == "qlora" else linear
    if kind in ("lora", "dora", "qlora"):
        options: Any = {"r": R, "use_dora": kind == "dora", "init_lora_weights": False}
        layer: Any = peftfast.nn.LoRALinear.from_linear(base, **options)
    elif kind == "group":
        layer = peftfast.nn.LoRALinears([peftfast.nn.LoRALinear(K, N, r=R) for _ in range(2)])
    elif kind == "rosa":
        layer = peftfast.nn.RoSALinear.from_linear(base, density=0.1, r=R)
    else:
        layer = peftfast.nn.SparseDeltaLinear.from_linear(base, density=0.1, resident=kind == "resident")
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(3, K)
    model = (lambda x: layer(x)[1]) if kind == "group" else layer
    model(x).square().sum().backward()
    own = {name: one.detach() for name, one in layer.named_parameters() if one.requires_grad}

    def loss(own: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(layer, own, (x,))
        return (y[1] if kind == "group" else y).square().sum()  # type: ignore[no-any-return]

    for name, grad in torch.func.grad(loss)(own).items():
        expected = layer.get_parameter(name).grad
        assert expected is None or relative(grad, expected) < 1e-5, name
    assert relative(torch.vmap(lambda x: model(x[None])[0])(x), model(x)) < 1e-5
    if kind == "resident":
        before = layer.weight.detach().clone()
        with layer.disabled():
            assert relative(torch.func.jvp(layer, (x,), (x,))[0], layer(x)) < 1e-6
        assert torch.equal(layer.weight, before)  # a call under a transform writes nothing


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
