"""Modules: what they replace they resemble."""

import copy
import math
import pickle

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrizations, prune

import peftfast
import peftfast.functional as F
from peftfast.nn import LoRALinear, LoRANF4Linear, NF4Linear, RoSALinear, SparseDeltaLinear
from peftfast.optim import SparseAdamW


def linear4bit(n: int, k: int, bias: bool = True, **options) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(k, n, bias=bias, quant_type="nf4", compute_dtype=torch.bfloat16, **options)
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_is_equal_before_training(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(96, 33, bias=bias, dtype=dtype)
    layer = LoRALinear.from_linear(linear, r=5, lora_dropout=0.25)
    x = torch.randn(2, 7, 96, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert layer.lora_A.dtype == torch.float32
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_from_linear4bit_shares_and_equals(x_dtype: torch.dtype) -> None:
    base = linear4bit(48, 128)
    layer = LoRALinear.from_linear(base, r=3)
    x = torch.randn(80, 128, dtype=x_dtype)  # the same library call; a few rows take another way
    assert isinstance(layer, LoRALinear) and isinstance(layer, NF4Linear)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.absmax.data_ptr() == base.weight.quant_state.absmax.data_ptr()
    assert torch.equal(layer(x), base(x)) and layer(x).dtype == x_dtype


def test_nf4linear_resembles_linear4bit() -> None:
    base = linear4bit(48, 128)
    ours = NF4Linear.from_linear(base)
    x = torch.randn(80, 128)
    assert torch.equal(ours(x), base(x))
    theirs, mine = base.state_dict(), ours.state_dict()
    assert set(theirs) == set(mine)
    for key, value in theirs.items():
        if "bitsandbytes__" in key:
            unpack = bnb.utils.unpack_tensor_to_dict
            assert unpack(value) == {k: tuple(v) if k == "shape" else v for k, v in unpack(mine[key]).items()} or (
                unpack(value) == unpack(mine[key])
            )
        else:
            assert torch.equal(value, mine[key]), key


def test_nf4linear_quantises_as_bitsandbytes() -> None:
    linear = nn.Linear(96, 33, dtype=torch.bfloat16)
    ours = NF4Linear.from_linear(linear, double_quant=False)
    packed, state = bnb.functional.quantize_4bit(linear.weight.data, quant_type="nf4")
    assert torch.equal(ours.weight.data, packed) and torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip_through_safetensors(double_quant: bool) -> None:
    ours = NF4Linear.from_linear(nn.Linear(96, 33), double_quant=double_quant)
    other = NF4Linear.from_linear(nn.Linear(96, 33), double_quant=not double_quant)
    other.load_state_dict(load(save(ours.state_dict())))
    x = torch.randn(4, 96)
    assert torch.equal(other(x), ours(x))
    assert other.nf4.nested == double_quant


def test_state_dict_errors() -> None:
    ours = NF4Linear.from_linear(nn.Linear(96, 33))
    smaller = NF4Linear.from_linear(nn.Linear(64, 33)).state_dict()
    with pytest.raises(RuntimeError, match=r"expected a weight of shape \(33, 96\), got \(33, 64\)"):
        ours.load_state_dict(smaller)
    state = ours.state_dict()
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match="weight"):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight\.absmax"):
        ours.load_state_dict({"weight": ours.weight, "bias": ours.bias})


def test_a_state_assigned_on_the_meta_device() -> None:
    ours = NF4Linear.from_linear(nn.Linear(96, 33))
    other = copy.deepcopy(ours).to("meta")
    other.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), ours(x))


def test_a_weight_that_is_no_parameter() -> None:
    """It would be in no state_dict and in no move of a layer that shares it."""
    for make in (parametrizations.weight_norm, lambda one: prune.l1_unstructured(one, "weight", 0.5)):
        linear = make(nn.Linear(64, 32).requires_grad_(False))
        for kind in (LoRALinear, SparseDeltaLinear, RoSALinear):
            with pytest.raises(TypeError, match="^linear: .* has no parameter weight"):
                kind.from_linear(linear)
        model = nn.Sequential(linear, nn.Linear(32, 8))
        handle = peftfast.adapt(model, "lora")
        assert list(handle.layers) == ["1"] and "has no parameter weight" in handle.skipped["0"]
        weight = NF4Linear.from_linear(linear).nf4
        assert torch.equal(weight.packed, F.nf4_quantize(linear.weight).packed)


def test_dtype_moves_leave_the_quantisation_alone() -> None:
    ours = NF4Linear.from_linear(nn.Linear(64, 16))
    before = ours.nf4
    ours.to(torch.bfloat16).half().double()
    assert torch.equal(F.nf4_dequantize(ours.nf4), F.nf4_dequantize(before))
    assert ours.nested_absmax.dtype == torch.float32 and ours.bias.dtype == torch.float64


@pytest.mark.parametrize("kind", ["dense", "nf4", "dora"])
def test_copies_behave(kind: str) -> None:
    base: nn.Module = nn.Linear(32, 16)
    if kind == "nf4":
        base = NF4Linear.from_linear(base)
    layer = LoRALinear.from_linear(base, r=4, use_dora=kind == "dora", lora_bias=True)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.lora_A.data_ptr() != layer.lora_A.data_ptr()
    fresh = LoRALinear.from_linear(copy.deepcopy(base), r=4, use_dora=kind == "dora", lora_bias=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("dora", [False, True])
def test_merge_and_unmerge_dense(dora: bool) -> None:
    layer = LoRALinear(48, 32, r=4, lora_alpha=16, lora_bias=True, use_dora=dora)
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(layer.lora_bias)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(6, 48)
    before = layer(x)
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias) and not layer.merged


def test_merging_writes_into_nothing_that_is_shared() -> None:
    linear = nn.Linear(48, 32)
    layer = LoRALinear.from_linear(linear, r=4, lora_bias=True)
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(layer.lora_bias)
    x = torch.randn(6, 48)
    before = linear(x)
    layer.merge()
    assert torch.equal(linear(x), before)
    layer.unmerge()
    assert layer.weight is linear.weight and layer.bias is linear.bias


@pytest.mark.parametrize("four_bit", [False, True])
def test_what_is_cast_while_merged_is_cast_after(four_bit: bool) -> None:
    base: nn.Module = nn.Linear(64, 32)
    if four_bit:
        base = NF4Linear.from_linear(base)
    layer = LoRALinear.from_linear(base, r=4, lora_bias=True)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(6, 64).bfloat16()
    expected = copy.deepcopy(layer).bfloat16()(x)
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer(x), expected)


def test_merge_4bit_restores_its_bytes() -> None:
    layer = LoRALinear.from_linear(NF4Linear.from_linear(nn.Linear(64, 32)), r=4)
    nn.init.normal_(layer.lora_B, std=0.5)
    before = layer.nf4
    packed, absmax = before.packed.clone(), before.absmax.clone()
    wanted = F.nf4_dequantize(before) + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
    layer.merge()
    requantised = F.nf4_dequantize(F.nf4_quantize(wanted))
    assert torch.equal(F.nf4_dequantize(layer.nf4), requantised)
    layer.unmerge()
    assert torch.equal(layer.nf4.packed, packed) and torch.equal(layer.nf4.absmax, absmax)


def test_rslora_scaling_and_inits() -> None:
    assert LoRALinear(8, 8, r=16, lora_alpha=-8).scaling == -0.5 and LoRALinear(8, 8, r=16, lora_alpha=0).scaling == 0.0
    assert LoRALinear(8, 8, r=16, lora_alpha=8).scaling == 0.5
    assert LoRALinear(8, 8, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0
    assert LoRALinear(8, 8, init_lora_weights=False).lora_B.abs().sum() > 0
    torch.manual_seed(0)
    gaussian = LoRALinear(4096, 8, r=4, init_lora_weights="gaussian")
    assert abs(gaussian.lora_A.std().item() - 0.25) < 0.01 and not gaussian.lora_B.any()


def test_training_moves_only_the_adapter() -> None:
    layer = LoRALinear.from_linear(NF4Linear.from_linear(nn.Linear(64, 32)), r=4, lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    packed = layer.weight.clone()
    x, target = torch.randn(40, 64), torch.randn(40, 32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.weight, packed)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


BAD_OPTIONS = {
    "lora_dropout": ("0.1", None, 1.0, math.nan, torch.tensor(0.1)),
    "lora_alpha": ("16", None, math.nan, math.inf, True, torch.tensor(16.0)),
    "r": (8.0, True, None),
    "init_lora_weights": (None, 1, torch.tensor(True)),
}


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(TypeError, match="linear: expected an nn.Linear, .* got Conv2d"):
        LoRALinear.from_linear(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="linear: expected a layer without an adapter"):
        LoRALinear.from_linear(LoRALinear(4, 4))
    linear = nn.Linear(64, 32)
    adapted = LoRALinear.from_linear(linear)
    quantised = LoRALinear.from_linear(NF4Linear.from_linear(linear))
    sparse = SparseDeltaLinear.from_linear(linear)
    for kind in (LoRALinear, SparseDeltaLinear, NF4Linear, RoSALinear):
        for taken in (
            adapted,
            quantised,
            sparse,
            SparseDeltaLinear.from_linear(NF4Linear.from_linear(linear)),
            Doubled(64, 32),
        ):
            flags = [parameter.requires_grad for parameter in taken.parameters()]
            with pytest.raises(TypeError, match="^linear: expected"):
                kind.from_linear(taken)
            assert [parameter.requires_grad for parameter in taken.parameters()] == flags
    with pytest.raises(TypeError, match="without an adapter, .*; Doubled has a forward of its own"):
        LoRALinear.from_linear(Doubled(4, 4))
    for name, values in BAD_OPTIONS.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                LoRALinear(4, 4, **{name: value})
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                LoRALinear.from_linear(nn.Linear(4, 4), **{name: value})
    with pytest.raises(ValueError, match="^lora_alpha: expected a finite number, got '16'"):
        RoSALinear.from_linear(nn.Linear(4, 4), lora_alpha="16")
    with pytest.raises(TypeError, match="NF4Linear is made by from_linear, .*; got int"):
        NF4Linear(64, 32)
    with pytest.raises(ValueError, match=r"nf4: expected a weight of shape \(N, K\), got \(64,\)"):
        NF4Linear(F.nf4_quantize(torch.randn(64)))
    with pytest.raises(ValueError, match="r: expected an int of at least 1, got 0"):
        LoRALinear(4, 4, r=0)
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRALinear(4, 4, lora_dropout=1.5)
    with pytest.raises(ValueError, match="init_lora_weights"):
        LoRALinear(4, 4, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="not quantised yet"):
        LoRALinear.from_linear(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(TypeError, match="from_linear"):
        LoRANF4Linear(4, 4)
    repacked = linear4bit(64, 64)
    repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked it for inference"):
        NF4Linear.from_linear(repacked)
    with pytest.raises(RuntimeError, match="merge: lora_bias needs a base bias"):
        LoRALinear(4, 4, bias=False, lora_bias=True).merge()


def test_public_surface() -> None:
    assert {"patch", "unpatch", "report", "nn", "functional"} <= set(peftfast.__all__)
    assert peftfast.nn.LoRALinear is LoRALinear


KINDS = {
    "lora": lambda linear: LoRALinear.from_linear(linear, r=4),
    "dora": lambda linear: LoRALinear.from_linear(linear, r=4, use_dora=True),
    "nf4 dora": lambda linear: LoRALinear.from_linear(NF4Linear.from_linear(linear), r=4, use_dora=True),
    "sparse": lambda linear: SparseDeltaLinear.from_linear(linear, density=0.1),
    "resident": lambda linear: SparseDeltaLinear.from_linear(linear, density=0.1, resident=True),
    "rosa": lambda linear: RoSALinear.from_linear(linear, r=4, density=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_swapped(kind: str) -> None:
    """torch swaps a parameter's tensor only where nothing refers to it weakly."""

    def run(swap: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer, x, found = KINDS[kind](nn.Linear(96, 128)), torch.randn(3, 96), []
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            for assign in (False, True):
                layer(x).square().sum().backward()
                found += [p.grad for p in layer.parameters() if p.grad is not None]
                layer.zero_grad()
                layer.to(torch.bfloat16)
                found.append(layer(x.bfloat16()).detach())
                layer.to(torch.float32)
                state = {
                    name: value * 2 if value.is_floating_point() else value
                    for name, value in layer.state_dict().items()
                }
                layer.load_state_dict(state, assign=assign)
                optimizer = SparseAdamW(
                    [p for name, p in layer.named_parameters() if name == "delta_values"] or [nn.Parameter(x)]
                )
                layer(x).square().sum().backward()
                optimizer.step()
                layer.zero_grad()
                found.append(layer(x).detach())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        return found

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)
