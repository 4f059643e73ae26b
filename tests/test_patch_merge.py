"""PEFT's merge and unmerge on patched 4-bit layers: PEFT's bytes, on the layer's device, and back to the bit."""

import copy
import gc
import logging
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
import peftfast.functional as F
from peftfast.functional import nf4_merging

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, N = 128, 48


@pytest.fixture(autouse=True)
def _no_rounding_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(
    dtype: torch.dtype = BF16,
    adapters: tuple[str, ...] = ("default",),
    adapter_dtype: torch.dtype = F32,
    bias: bool = True,
    storage: torch.dtype = torch.uint8,
    nested: bool = True,
    quant_type: str = "nf4",
    **options: Any,
) -> Any:
    """A PEFT model of one 4-bit layer with adapters that look trained; the same at every call."""
    base = bnb.nn.Linear4bit(
        K, N, bias=bias, compute_dtype=dtype, quant_storage=storage, compress_statistics=nested, quant_type=quant_type
    )
    generator = torch.Generator().manual_seed(0)
    base.weight.data = (torch.randn(N, K, generator=generator) / 10).to(dtype)
    if bias:
        base.bias.data = torch.randn(N, generator=generator).to(dtype)
    base.support_avx512bf16_for_cpu = False
    model: Any = nn.ModuleDict({"linear": base.to("cpu")})
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["linear"], **options)
    model = peft.get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    layer = layer_of(model)
    for name in adapters:
        for part in (layer.lora_A[name], layer.lora_B[name]):
            for parameter in part.parameters():
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(adapter_dtype)
    return model.eval()


def layer_of(model: Any) -> Any:
    return model.base_model.model["linear"]


def pair(**options: Any) -> tuple[Any, Any]:
    """Stock and patched."""
    stock, patched = model_of(**options), model_of(**options)
    peftfast.patch(patched)
    return stock, patched


def stored(base: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # As bytes: packed ones seen as floating numbers hold NaN.
        pair = [t[name].contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        assert one[name].dtype == other[name].dtype and torch.equal(*pair), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": F16, "adapters": ("first", "second"), "storage": F32},
        {"dtype": F32, "nested": False, "quant_type": "fp4", "bias": False},
        {"adapters": ("first", "second", "third"), "adapter_dtype": BF16, "storage": BF16},
    ],
    ids=str,
)
def test_merge_is_pefts_and_unmerge_exact(options: dict[str, Any]) -> None:
    """The saved weight byte for byte, its stated dtype and shape included, with several adapters too."""
    stock, patched = pair(**options)
    x = torch.randn(3, K).to(options.get("dtype", BF16))
    ours, theirs = layer_of(patched), layer_of(stock)
    before, y = stored(ours.base_layer), patched.base_model.model["linear"](x)
    original = ours.base_layer.weight
    for model in (stock, patched):
        model.merge_adapter(safe_merge=True)
    assert ours.merged and ours.merged_adapters == theirs.merged_adapters == list(options.get("adapters", ["default"]))
    assert_same(stored(ours.base_layer), stored(theirs.base_layer))
    one, other = ours.base_layer.weight, theirs.base_layer.weight
    assert type(one) is type(other) and one.shape == other.shape and not one.requires_grad
    assert one.quant_state.dtype == other.quant_state.dtype and one.bnb_quantized
    assert [one.module is ours.base_layer, one.quant_state is ours.base_layer.quant_state] == [
        other.module is theirs.base_layer,
        other.quant_state is theirs.base_layer.quant_state,
    ]
    assert torch.equal(ours(x), theirs(x)) and not torch.equal(ours(x), y)
    patched.unmerge_adapter()
    assert not ours.merged and ours.base_layer.weight is original
    assert_same(stored(ours.base_layer), before)
    assert torch.equal(ours(x), y)
    stock.unmerge_adapter()
    with pytest.raises(AssertionError):
        assert_same(stored(theirs.base_layer), before)  # what PEFT's own gives back


def test_merges_without_bitsandbytes_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("went through bitsandbytes")

    _, patched = pair()
    monkeypatch.setattr(bnb.functional, "quantize_4bit", refuse)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", refuse)
    patched.merge_adapter()
    patched.unmerge_adapter()


def test_planted_faults_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair(adapters=("first", "second"))
    stock.merge_adapter()
    right = nf4_merging._merged_rows
    for fault in (
        lambda nf4, a, b, scaling, *rest: right(nf4, a, b, 1.0, *rest),
        lambda nf4, a, b, scaling, *rest: right(nf4, a.roll(1, 0), b, scaling, *rest),
        lambda nf4, a, b, scaling, *rest: right(nf4, a, b, scaling, *rest).to(nf4.dtype),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(nf4_merging, "_merged_rows", fault)
            patched.merge_adapter()
        same = torch.equal(layer_of(patched).base_layer.weight, layer_of(stock).base_layer.weight)
        patched.unmerge_adapter()
        assert not same


def test_one_adapter_after_the_other() -> None:
    """A second merge keeps what was before the first, and a merge of what is merged does nothing."""
    stock, patched = pair(adapters=("first", "second"))
    before = stored(layer_of(patched).base_layer)
    for model in (stock, patched):
        for names in (["second"], ["first"], ["first", "second"]):
            model.merge_adapter(adapter_names=names)
    assert layer_of(patched).merged_adapters == ["second", "first"]
    assert_same(stored(layer_of(patched).base_layer), stored(layer_of(stock).base_layer))
    patched.unmerge_adapter()
    assert_same(stored(layer_of(patched).base_layer), before)
    with pytest.raises((TypeError, ValueError), match="adapter_names should be a list") as theirs:  # by PEFT's version
        layer_of(stock).merge(adapter_names="first")
    with pytest.raises(theirs.type, match="adapter_names should be a list"):
        layer_of(patched).merge(adapter_names="first")


def test_disabling_unmerges() -> None:
    stock, patched = pair()
    x = torch.randn(2, K).to(BF16)
    with stock.disable_adapter():
        expected = layer_of(stock)(x)
    patched.merge_adapter()
    with patched.disable_adapter():
        assert torch.equal(layer_of(patched)(x), expected)
    assert not layer_of(patched).merged


def test_a_broken_adapter_writes_nothing() -> None:
    _, patched = pair(lora_bias=True)
    layer = layer_of(patched)
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].bias):
        value, weight, before = parameter.data[..., -1].clone(), layer.base_layer.weight, stored(layer.base_layer)
        parameter.data[..., -1] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
            patched.merge_adapter(safe_merge=True)
        parameter.data[..., -1] = value
        assert layer.base_layer.weight is weight and not layer.merged
        assert_same(stored(layer.base_layer), before)


def test_lora_bias_is_merged_as_it_is_computed() -> None:
    """PEFT computes with scaling times lora_B.bias and merges it unscaled; and its safe merge of one fails."""
    stock, patched = pair(lora_bias=True, dtype=F32)
    layer, x = layer_of(patched), torch.randn(40, K)
    bias, added = layer.base_layer.bias.data.clone(), layer.lora_B["default"].bias.data
    patched.merge_adapter(safe_merge=True)
    stock.merge_adapter()
    assert torch.equal(layer.base_layer.weight, layer_of(stock).base_layer.weight)
    torch.testing.assert_close(layer.base_layer.bias.data, bias + 2.5 * added)
    torch.testing.assert_close(layer.base_layer.bias - layer_of(stock).base_layer.bias, 1.5 * added)
    patched.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)
    assert layer(x).isfinite().all()


def test_what_is_left_to_peft(caplog: pytest.LogCaptureFixture) -> None:
    """A DoRA adapter, and an unmerge after an adapter that was merged is gone: PEFT's own, and said."""
    from peftfast.integrations import patch_report

    patch_report.logged.clear()
    stock, patched = pair(use_dora=True)
    with caplog.at_level(logging.WARNING, logger="peftfast"):
        for model in (stock, patched):
            model.merge_adapter()
        assert_same(stored(layer_of(patched).base_layer), stored(layer_of(stock).base_layer))
        assert "DoraLinear, so PEFT's own 4-bit merge runs" in caplog.text
        stock, patched = pair(adapters=("first", "second"))
        for model in (stock, patched):
            model.merge_adapter()
            layer_of(model).delete_adapter("second")
            model.unmerge_adapter()
        assert_same(stored(layer_of(patched).base_layer), stored(layer_of(stock).base_layer))
        assert "PEFT's own 4-bit unmerge runs" in caplog.text


class _Other(nn.Linear):
    pass


SPOILED = {
    "the base weight is partitioned by DeepSpeed": lambda layer: setattr(layer.base_layer.weight, "ds_id", 0),
    "lora_A is partitioned by DeepSpeed": lambda layer: setattr(layer.lora_A["default"].weight, "ds_id", 0),
    "lora_B's bias is partitioned by DeepSpeed": lambda layer: setattr(layer.lora_B["default"].bias, "ds_id", 0),
    "lora_A is not PEFT's own module": lambda layer: setattr(layer.lora_A["default"], "__class__", _Other),
}


@pytest.mark.parametrize("reason", SPOILED)
def test_what_is_not_served_is_merged_by_peft(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """And said once, with the reason; the layer keeps nothing of before the merge then."""
    from peftfast.integrations import patch_report

    patch_report.logged.clear()
    stock, patched = pair(lora_bias=True)
    for model in (stock, patched):
        SPOILED[reason](layer_of(model))
    with caplog.at_level(logging.WARNING, logger="peftfast"):
        patched.merge_adapter()
    stock.merge_adapter()
    said = [record.message for record in caplog.records if "PEFT's own 4-bit merge runs" in record.message]
    assert len(said) == 1 and reason in said[0]
    assert_same(stored(layer_of(patched).base_layer), stored(layer_of(stock).base_layer))
    assert not [name for name in vars(layer_of(patched)) if "unmerged" in name]


def test_merge_and_unload_keeps_nothing() -> None:
    stock, patched = pair(adapters=("first", "second"))
    original = weakref.ref(layer_of(patched).base_layer.weight)
    merged, expected = patched.merge_and_unload(), stock.merge_and_unload()
    assert type(merged["linear"]) is bnb.nn.Linear4bit
    assert_same(stored(merged), stored(expected))
    del patched
    gc.collect()
    assert original() is None


def test_copies_and_unpatching() -> None:
    """A copy of a merged model unmerges by itself; unpatching forgets, and PEFT's own unmerge follows."""
    stock, patched = pair()
    before = stored(layer_of(patched).base_layer)
    kept = F.NF4Weight.from_bitsandbytes(layer_of(patched).base_layer.weight).nbytes
    assert kept < 0.6 * N * K + 1100  # the price of unmerging exactly: half a byte an element, and the tables
    patched.merge_adapter()
    twin = copy.deepcopy(patched)
    twin.unmerge_adapter()
    assert_same(stored(layer_of(twin).base_layer), before)
    assert layer_of(patched).merged
    peftfast.unpatch(patched)
    assert not [name for name in vars(layer_of(patched)) if name.startswith("_peftfast")]
    stock.merge_adapter()
    for model in (stock, patched):
        model.unmerge_adapter()
    assert_same(stored(layer_of(patched).base_layer), stored(layer_of(stock).base_layer))


def test_a_bias_that_no_merge_wrote_stays_as_it_is() -> None:
    _, patched = pair()
    base = layer_of(patched).base_layer
    base.bias = nn.Parameter(torch.zeros(N), requires_grad=False)
    patched.merge_adapter()
    base.bias.data.add_(1.0)
    patched.unmerge_adapter()
    assert torch.equal(base.bias, torch.ones(N))


def test_dora_merged_between_forward_and_backward() -> None:
    """PEFT gives the parameter the merged weight behind autograd's back: the gradient is that of the weight of the forward."""
    grads = []
    for patched in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(96, 64)), config)
        with torch.no_grad():
            model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
        if patched:
            peftfast.patch(model)
        x = torch.randn(7, 96, requires_grad=True)
        loss = model(x).square().sum()
        model.merge_adapter()
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)
