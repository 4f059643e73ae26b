"""An adapter merged into 4 bits and into dense weights, against the definition and PEFT's own merge."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.functional import nf4_merging as merging
from peftfast.nn import LoRALinear, LoRANF4Linear, NF4Linear
from tests.support.lora_checks import BF16, DEVICE, F16, F32

SCALING = 0.75


def adapter(n: int, k: int, r: int = 4, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    a, b = (torch.randn(shape, generator=generator) for shape in ((r, k), (n, r)))
    return (a / k**0.5).to(dtype).to(DEVICE), (b / r**0.5).to(dtype).to(DEVICE)


def weight_of(n: int, k: int, dtype: torch.dtype = BF16, **options: Any) -> F.NF4Weight:
    return F.nf4_quantize(
        (torch.randn(n, k, generator=torch.Generator().manual_seed(k)) / k**0.5).to(dtype).to(DEVICE), **options
    )


@pytest.mark.parametrize("shape", [(33, 64), (37, 96), (5, 33), (70, 130), (1, 1), (129, 20)])
@pytest.mark.parametrize("slab", [1, 700, 2**24])
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 128, "double_quant": False}, {"block_size": 4096, "quant_type": "fp4"}]
)
def test_merge_is_requantising(
    shape: tuple[int, int], slab: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any number of slabs: the bytes of the whole dense weight, added to and quantised."""
    monkeypatch.setattr(merging, "_SLAB", slab)
    nf4 = weight_of(*shape, **options)
    a, b = adapter(*shape)
    # Of integers and halves: the product has the same bits however the library cuts it.
    a, b = a.mul(4).round() / 4, b.mul(4).round() / 4
    before = [t.clone() for t in nf4.storage() if isinstance(t, Tensor)]
    merged = F.nf4_merge(nf4, a, b, SCALING)
    dense = F.nf4_dequantize(nf4) + (b @ a) * SCALING
    expected = F.nf4_quantize(dense, block_size=nf4.block_size, double_quant=nf4.nested, quant_type=nf4.quant_type)
    assert dense.dtype == F32 and merged.dtype == nf4.dtype
    for one, other in zip(merged.storage(), expected.storage(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert all(
        torch.equal(*pair) for pair in zip(before, (t for t in nf4.storage() if isinstance(t, Tensor)), strict=True)
    )
    full = F.nf4_merge_dense(nf4, a, b, SCALING)
    assert full.dtype == BF16 and torch.equal(full, dense.to(BF16))
    assert torch.equal(F.nf4_merge_dense(nf4, a, b, SCALING, dtype=F32), dense)


def test_merge_refuses() -> None:
    nf4 = weight_of(8, 64)
    a, b = adapter(8, 64)
    for merge in (F.nf4_merge, F.nf4_merge_dense):
        for message, error, arguments in (
            ("nf4: expected an NF4Weight", TypeError, (a, a, b)),
            ("nf4: expected a weight of shape", ValueError, (F.nf4_quantize(torch.randn(64, device=DEVICE)), a, b)),
            ("lora_a: expected a floating", TypeError, (nf4, a.int(), b)),
            ("lora_a: expected shape", ValueError, (nf4, a[:, 1:], b)),
            ("lora_b: expected shape", ValueError, (nf4, a, b[1:])),
            ("lora_b: expected on", ValueError, (nf4, a, b.to("meta"))),
            ("lora_b: expected torch.float32 as lora_a is", TypeError, (nf4, a, b.half())),
            ("scaling: expected a Python number", TypeError, (nf4, a, b, "2")),
        ):
            with pytest.raises(error, match=message):
                merge(*arguments)
    for dtype in (torch.int8, "float32"):
        with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
            F.nf4_merge_dense(nf4, a, b, dtype=dtype)  # type: ignore[arg-type]


def peft_layer(dtype: torch.dtype, bias: bool, lora_bias: bool, alpha: float, **options: Any) -> Any:
    """PEFT's 4-bit layer on a CPU with trained-looking adapters."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import LoraConfig, get_peft_model

    base = bnb.nn.Linear4bit(128, 48, bias=bias, compute_dtype=dtype, **options)
    base.weight.data = (torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) / 10).to(dtype)
    base.support_avx512bf16_for_cpu = False
    base = base.to("cpu")
    model: Any = nn.ModuleDict({"linear": base})
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["linear"], lora_bias=lora_bias)
    layer = get_peft_model(model, config).base_model.model["linear"]
    generator = torch.Generator().manual_seed(1)
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_B["default"].bias):
        if parameter is not None:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return layer


def ours_on(layer: Any) -> LoRANF4Linear:
    """Our layer on a copy of the same base and adapter."""
    import copy

    ours = LoRALinear.from_linear(
        copy.deepcopy(layer.base_layer),
        r=4,
        lora_alpha=layer.lora_alpha["default"],
        lora_bias=layer.lora_bias["default"],
    )
    assert isinstance(ours, LoRANF4Linear)
    ours.lora_A.data = layer.lora_A["default"].weight.data.to(ours.lora_A.dtype)
    ours.lora_B.data = layer.lora_B["default"].weight.data.to(ours.lora_B.dtype)
    if ours.lora_bias is not None:
        ours.lora_bias.data = layer.lora_B["default"].bias.data.to(ours.lora_bias.dtype)
    return ours


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("options", [{"quant_type": "nf4"}, {"quant_type": "fp4", "compress_statistics": False}])
@pytest.mark.parametrize("alpha", [4, 10])
def test_merge_is_pefts(dtype: torch.dtype, options: dict[str, Any], alpha: float) -> None:
    """The same bytes, maxima and nested statistics. PEFT's layer forgets the dtype the weight had, for its own sum's; ours keeps it."""
    layer = peft_layer(dtype, True, False, alpha, **options)
    ours = ours_on(layer)
    x = torch.randn(3, 128)
    before = ours(x)
    kept = [t.clone() for t in ours.nf4.storage() if isinstance(t, Tensor)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
    ours.merge()
    theirs = F.NF4Weight.from_bitsandbytes(layer.base_layer.weight)
    for one, other in zip(ours.nf4.storage(), theirs.storage(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert ours.nf4.dtype == dtype and torch.equal(ours.bias, layer.base_layer.bias)
    ours.unmerge()
    assert all(
        torch.equal(*pair) for pair in zip(kept, (t for t in ours.nf4.storage() if isinstance(t, Tensor)), strict=True)
    )
    assert torch.equal(ours(x), before)


@pytest.mark.parametrize("alpha", [4, 8])
def test_lora_bias_is_merged_as_it_is_computed(alpha: float) -> None:
    """PEFT 0.21 computes with scaling * lora_B.bias and merges lora_B.bias unscaled into a 4-bit layer: its merged layer is off by
    (scaling - 1) * lora_B.bias. Ours merges what is computed, which with scaling 1 is PEFT's too."""
    layer = peft_layer(F32, True, True, alpha)
    ours = ours_on(layer)
    scaling, lora_bias = alpha / 4, layer.lora_B["default"].bias.data.clone()
    base_bias = layer.base_layer.bias.data.clone()
    with torch.no_grad():
        x = torch.randn(40, 128)
        assert torch.allclose(layer(x), ours(x), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
    ours.merge()
    torch.testing.assert_close(ours.bias, base_bias + scaling * lora_bias)
    torch.testing.assert_close(layer.base_layer.bias.data - ours.bias, (1 - scaling) * lora_bias, atol=1e-6, rtol=0)
    ours.unmerge()
    assert torch.equal(ours.bias, base_bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [None, F32, BF16])
def test_merged_linear(bias: bool, dora: bool, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(
        NF4Linear.from_linear(nn.Linear(96, 48, bias=bias)), r=4, lora_bias=True, use_dora=dora
    )
    nn.init.normal_(layer.lora_B, std=0.3)
    nn.init.normal_(layer.lora_bias)
    packed = layer.weight.clone()
    linear = layer.merged_linear(dtype)
    assert type(linear) is nn.Linear and linear.weight.dtype == (dtype or F32) and not linear.weight.requires_grad
    x = torch.randn(30, 96)
    tolerance = 1e-5 if dtype != BF16 else 0.05
    torch.testing.assert_close(
        linear(x.to(linear.weight.dtype)).float(), layer(x).detach(), atol=tolerance, rtol=tolerance
    )
    assert torch.equal(layer.weight, packed) and not layer.merged
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        layer.merged_linear(torch.int8)
    if bias:
        layer.merge()
        with pytest.raises(RuntimeError, match="merged_linear: .* unmerge first"):
            layer.merged_linear()
    else:
        with pytest.raises(RuntimeError, match="merge: lora_bias needs a base bias"):
            layer.merge()


def test_dora_merges_into_4_bits() -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(NF4Linear.from_linear(nn.Linear(96, 48, dtype=BF16)), r=4, use_dora=True)
    nn.init.normal_(layer.lora_B, std=0.3)
    expected = F.nf4_quantize(LoRALinear._merged_weight(layer).detach())
    before = layer.nf4
    layer.merge()
    assert torch.equal(layer.nf4.packed, expected.packed) and layer.nf4.dtype == BF16
    layer.unmerge()
    assert torch.equal(layer.nf4.packed, before.packed)
