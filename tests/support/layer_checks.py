"""The LoRA layer, forward and every gradient, against float64 autograd of its definition."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.reference import lora as definition
from peftfast.reference import nf4 as nf4_definition
from tests.support.budget import assert_within_budget
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64, Results, check_results, matrix

LEAVES = ("x", "lora_a", "lora_b", "bias", "lora_bias")


@dataclass(frozen=True)
class LayerCase:
    """``weight`` is "dense", "nf4" or "nested"; ``needs`` the tensors that want a gradient; ``data`` seeds values and mask."""

    shape: tuple[int, ...] = (3, 11, 67)
    N: int = 45
    R: int = 5
    x: torch.dtype = F32
    adapter: torch.dtype = F32
    compute: torch.dtype | None = None
    weight: str = "dense"
    p: float = 0.1
    scaling: float = 1.5
    bias: bool = True
    lora_bias: bool = True
    layout: str = "plain"
    needs: tuple[str, ...] = (*LEAVES, "weight")
    data: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute or self.x

    @property
    def seed(self) -> Tensor:
        return torch.tensor([0x5EED << 40 | self.data], device=DEVICE)


# The first is QLoRA's: 4-bit double-quantised base, float32 x and adapters, bfloat16 products.
QLORA = LayerCase(weight="nested", compute=BF16, needs=LEAVES)
TELLING = (QLORA, LayerCase(p=0.5, data=1), LayerCase(p=0.0, x=BF16, data=2))


def tensors_of(case: LayerCase) -> dict[str, Any]:
    """x, weight, lora_a, lora_b, bias, lora_bias: leaves, of a size at which the adapter's term is as large as the base's."""
    generator = torch.Generator().manual_seed(2000 + case.data)
    K, N, R = case.shape[-1], case.N, case.R
    rows = torch.Size(case.shape[:-1]).numel()
    narrow, compute = case.adapter, case.compute_dtype
    x = matrix(rows, K, case.x, case.layout, generator)
    x = x.view(case.shape) if case.layout in ("plain", "wide", "spaced") else x.reshape(case.shape)
    dense = matrix(N, K, F32, "plain", generator) / K**0.5
    weight: Any = dense.to(compute)
    if case.weight != "dense":
        weight = F.nf4_quantize(dense.to(compute), double_quant=case.weight == "nested")
    tensors = {
        "x": x,
        "weight": weight,
        "lora_a": matrix(R, K, narrow, case.layout, generator) / K**0.5,
        "lora_b": matrix(N, R, narrow, case.layout, generator) / (R**0.5 * case.scaling),
        "bias": matrix(1, N, compute, "plain", generator)[0] if case.bias else None,
        "lora_bias": matrix(1, N, narrow, "plain", generator)[0] if case.lora_bias else None,
    }
    for name in case.needs:
        if isinstance(tensors[name], Tensor):
            tensors[name].requires_grad_()
    return tensors


def dense_weight(weight: Tensor | F.NF4Weight, dtype: torch.dtype) -> Tensor:
    """The definition's weight in ``dtype``; that of a 4-bit weight in float64 is the float32 product unrounded."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    *first, nested_absmax, nested_code, nested_offset = weight.storage()
    return nf4_definition.nf4_dequantize(*first, dtype, nested_absmax, nested_code, nested_offset)


def run(case: LayerCase, tensors: dict[str, Any], **options: Any) -> Tensor:
    """The layer under test."""
    options.setdefault("dropout_p", case.p)
    seed = options.pop("seed") if "seed" in options else case.seed
    return F.lora_linear(**tensors, scaling=case.scaling, seed=seed, compute_dtype=case.compute, **options)


def define(case: LayerCase, tensors: dict[str, Any], dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """The definition, every tensor cast to ``dtype``."""
    cast = {
        name: dense_weight(t, dtype) if name == "weight" else t if t is None else t.to(dtype)
        for name, t in tensors.items()
    }
    return definition.lora_linear(**cast, scaling=case.scaling, dropout_p=case.p, seed=case.seed).to(out_dtype)


def gradients(y: Tensor, tensors: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad}
    if not leaves:
        return {}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def _results(case: LayerCase) -> Results:
    tensors = tensors_of(case)
    return results_of(case, tensors, run(case, tensors))


def check_layer(case: LayerCase, values: int = 0) -> None:
    """y and each gradient within the budget, in the right dtype and shape."""
    check_results(case, _results, values)


def compare_with_definition(case: LayerCase, tensors: dict[str, Any], y: Tensor) -> None:
    """As :func:`check_layer`, for a y that was made of ``tensors`` in another way."""
    for name, values in results_of(case, tensors, y).items():
        assert_within_budget(name, *values)


def results_of(case: LayerCase, tensors: dict[str, Any], y: Tensor) -> Results:
    """For y and each gradient: the layer's, the definition's in the compute dtype, the definition's in float64."""
    assert y.shape == (*case.shape[:-1], case.N), f"{case}: {tuple(y.shape)}"
    assert case.compute is None or y.dtype == case.x, f"{case}: {y.dtype}"
    generator = torch.Generator().manual_seed(3000 + case.data)
    dy = torch.randn(y.shape, generator=generator).to(DEVICE, y.dtype)
    actual = {"y": y.detach(), **gradients(y, tensors, dy)}
    for name, value in actual.items():
        expected = y.dtype if name == "y" else tensors[name].dtype
        assert value.dtype == expected, f"gradient of {name}: {value.dtype}, expected {expected}; {case}"
    composed_y = define(case, tensors, case.compute or y.dtype, y.dtype)
    composed = {"y": composed_y.detach(), **gradients(composed_y, tensors, dy)}
    wide = {
        name: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    exact_y = define(case, wide, F64, F64)
    exact = {"y": exact_y.detach(), **gradients(exact_y, wide, dy.double())}
    return {name: (value, composed[name], exact[name]) for name, value in actual.items()}


# dtype of x, adapters, compute_dtype; weight.
KINDS = (
    (F32, F32, BF16, "nested"),
    (F32, F32, BF16, "nf4"),
    (F32, F32, None, "dense"),
    (F32, F32, None, "nested"),
    (BF16, BF16, None, "dense"),
    (BF16, F32, None, "dense"),
    (BF16, F32, BF16, "nested"),
    (F16, F16, None, "dense"),
    (F16, F32, None, "nf4"),
    (F32, F16, F16, "nested"),
)
