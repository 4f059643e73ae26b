"""NF4Weight, its conversions, quantising, dequantising and the linear layer on it."""

import copy
import pickle
from typing import Any

import pytest
import torch

import peftfast.functional as F
from tests.support.budget import assert_within_budget
from tests.support.counting import Calls, saved_tensors, storages
from tests.support.layer_checks import dense_weight
from tests.support.lora_checks import BF16, DEVICE, F16, F32, F64
from tests.support.nf4_checks import NF4Case, weight_of

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


def params4bit(shape: tuple[int, int], quantise: bool = True, **options: Any) -> Any:
    nn = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    parameter = nn.Params4bit(weight, requires_grad=False, **options)
    return parameter.to("cpu") if quantise else parameter


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F16, F32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_from_and_to_bitsandbytes_share_storage(storage: torch.dtype, nested: bool, quant_type: str) -> None:
    given = params4bit((24, 128), compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    nf4 = F.NF4Weight.from_bitsandbytes(given)
    assert nf4.packed.dtype == torch.uint8 and nf4.shape == (24, 128) and nf4.dtype == BF16 and nf4.nested == nested
    assert type(nf4.packed) is torch.Tensor and nf4.quant_type == quant_type
    assert nf4.packed.data_ptr() == given.data_ptr()
    assert nf4.absmax.data_ptr() == given.quant_state.absmax.data_ptr()
    back = nf4.to_bitsandbytes()
    assert back.data_ptr() == given.data_ptr() and back.bnb_quantized and not back.requires_grad
    assert back.quant_state.absmax.data_ptr() == given.quant_state.absmax.data_ptr()
    if nested:
        assert back.quant_state.offset.data_ptr() == given.quant_state.offset.data_ptr()
        assert back.quant_state.state2.absmax.data_ptr() == given.quant_state.state2.absmax.data_ptr()
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = functional.dequantize_4bit(back, back.quant_state)
    assert torch.equal(dense, functional.dequantize_4bit(given, given.quant_state))
    assert torch.equal(dense, F.nf4_dequantize(nf4))
    # Once more round: the same weight.
    again = F.NF4Weight.from_bitsandbytes(back)
    assert torch.equal(F.nf4_dequantize(again), dense)


def test_from_bitsandbytes_with_a_state_of_its_own() -> None:
    given = params4bit((8, 64))
    bare = torch.nn.Parameter(given.data.as_subclass(torch.Tensor), requires_grad=False)
    nf4 = F.NF4Weight.from_bitsandbytes(bare, given.quant_state)
    assert torch.equal(F.nf4_dequantize(nf4), F.nf4_dequantize(F.NF4Weight.from_bitsandbytes(given)))


def test_from_bitsandbytes_refuses() -> None:
    with pytest.raises(ValueError, match="not quantised yet"):
        F.NF4Weight.from_bitsandbytes(params4bit((8, 64), quantise=False))
    with pytest.raises(TypeError, match="weight: expected a bitsandbytes Params4bit"):
        F.NF4Weight.from_bitsandbytes(torch.zeros(8, 64))
    with pytest.raises(TypeError, match="weight: expected a bitsandbytes Params4bit"):
        F.NF4Weight.from_bitsandbytes(None)
    repacked = params4bit((8, 64))
    repacked.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked it for inference"):
        F.NF4Weight.from_bitsandbytes(repacked)
    other = params4bit((8, 64), compress_statistics=True)
    other.quant_state.state2.blocksize = 128
    with pytest.raises(ValueError, match="nested blocks of 256"):
        F.NF4Weight.from_bitsandbytes(other)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dequantize_is_bitsandbytes(asked: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its CPU kernel where that is right: widths that are multiples of the block."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    weight = torch.randn(77, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            nf4 = F.nf4_quantize(weight, double_quant=nested, quant_type=quant_type)
            given = nf4.to_bitsandbytes()
            assert torch.equal(F.nf4_dequantize(nf4), functional.dequantize_4bit(given, given.quant_state))


def test_quantize_options() -> None:
    weight = torch.randn(9, 65, device=DEVICE).to(F16)
    nf4 = F.nf4_quantize(weight)
    assert (nf4.block_size, nf4.quant_type, nf4.nested, nf4.dtype) == (64, "nf4", True, F16)
    assert nf4.packed.shape == (293, 1) and nf4.absmax.shape == (10,) and nf4.absmax.dtype == torch.uint8
    assert nf4.nbytes == 293 + 10 + 64 + 4 + 1024 + 4
    assert nf4.to(DEVICE).packed.data_ptr() == nf4.packed.data_ptr()
    plain = F.nf4_quantize(weight, block_size=4096, double_quant=False, quant_type="fp4")
    assert (plain.block_size, plain.quant_type, plain.nested) == (4096, "fp4", False)
    error = (F.nf4_dequantize(nf4, F32) - weight.float()).abs().max()
    assert (
        error < 0.16 * weight.abs().max()
    )  # half the widest gap of the code, 0.304 / 2, and the maxima's own rounding
    parameter = torch.nn.Parameter(weight.float())
    assert not F.nf4_dequantize(F.nf4_quantize(parameter)).requires_grad


def test_quantize_refuses() -> None:
    weight = torch.randn(8, 64)
    for message, error, call in (
        ("weight: expected float32", TypeError, lambda: F.nf4_quantize(weight.long())),
        ("weight: expected float32", TypeError, lambda: F.nf4_quantize(weight.double())),
        ("weight: expected float32", TypeError, lambda: F.nf4_quantize([1.0])),
        ("weight: expected elements", ValueError, lambda: F.nf4_quantize(weight[:0])),
        ("block_size: expected one of", ValueError, lambda: F.nf4_quantize(weight, block_size=48)),
        ("block_size: expected one of", ValueError, lambda: F.nf4_quantize(weight, block_size=64.0)),
        ("quant_type: expected one of", ValueError, lambda: F.nf4_quantize(weight, quant_type="int8")),
        ("quant_type: expected one of", ValueError, lambda: F.nf4_quantize(weight, quant_type=["nf4"])),
        ("weight: expected a dense tensor", TypeError, lambda: F.nf4_quantize(weight.to_sparse())),
    ):
        with pytest.raises(error, match=message):
            call()


def test_weight_refuses_what_it_cannot_hold() -> None:
    nf4 = weight_of(NF4Case((8, 64), 64, F32))
    fields = vars(nf4)
    for message, error, change in (
        ("packed: expected a tensor", TypeError, {"packed": None}),
        ("absmax: expected a tensor", TypeError, {"absmax": 3}),
        ("code: expected a tensor", TypeError, {"code": [1.0]}),
        ("packed: expected 256", ValueError, {"packed": nf4.packed[1:]}),
        ("absmax: expected 8", ValueError, {"absmax": nf4.absmax[1:]}),
        ("code: expected 16", ValueError, {"code": nf4.code[1:]}),
        ("block_size: expected one of", ValueError, {"block_size": 63}),
        ("block_size: expected an int", TypeError, {"block_size": 64.0}),
        ("shape: expected a sequence of ints", TypeError, {"shape": 8}),
        ("shape: expected a sequence of ints", TypeError, {"shape": (8.0, 64)}),
        ("shape: expected no negative size", ValueError, {"shape": (-8, -64)}),
        ("shape: expected no negative size", ValueError, {"shape": torch.Size((-8, -64))}),
        ("dtype: expected a floating dtype", TypeError, {"dtype": torch.int8}),
        ("dtype: expected a floating dtype", TypeError, {"dtype": "float32"}),
        ("nested_offset: expected a tensor or None", TypeError, {"nested_offset": 3.0}),
        ("quant_type: expected one of", ValueError, {"quant_type": "nf5"}),
        ("packed: expected", ValueError, {"shape": (9, 64)}),
        ("all three or none", ValueError, {"nested_offset": None}),
        ("nested_absmax: expected 1", ValueError, {"nested_absmax": torch.ones(2, device=DEVICE)}),
        ("nested_code: expected 256", ValueError, {"nested_code": torch.ones(2, device=DEVICE)}),
    ):
        with pytest.raises(error, match=message):
            F.NF4Weight(**(fields | change))


def test_copies_and_pickles() -> None:
    nf4 = weight_of(NF4Case())
    dense = F.nf4_dequantize(nf4)
    for other in (copy.deepcopy(nf4), pickle.loads(pickle.dumps(nf4))):
        assert other.packed.data_ptr() != nf4.packed.data_ptr()
        assert (other.shape, other.dtype, other.block_size) == (nf4.shape, nf4.dtype, nf4.block_size)
        assert torch.equal(F.nf4_dequantize(other), dense)
    assert copy.copy(nf4).packed is nf4.packed
    with pytest.raises(AttributeError):
        nf4.block_size = 32  # type: ignore[misc]


def test_dequantize_into_out() -> None:
    nf4 = weight_of(NF4Case())
    dense = F.nf4_dequantize(nf4, F32)
    out = torch.full(nf4.shape, float("nan"), device=DEVICE)
    assert F.nf4_dequantize(nf4, out=out) is out and torch.equal(out, dense)
    assert F.nf4_dequantize(nf4, F32, out=out) is out
    assert F.nf4_dequantize(nf4).dtype == nf4.dtype
    factor = torch.ones(nf4.shape, device=DEVICE, requires_grad=True)
    y = (factor * out).sum()
    F.nf4_dequantize(nf4, out=out[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match="out: expected a tensor that needs no gradient"):
        F.nf4_dequantize(nf4, out=factor)
    with torch.no_grad():
        assert torch.equal(F.nf4_dequantize(nf4, out=factor), dense)


def test_dequantize_refuses() -> None:
    nf4 = weight_of(NF4Case((8, 64)))
    out = torch.empty(8, 64, device=DEVICE)
    for message, error, call in (
        ("nf4: expected an NF4Weight", TypeError, lambda: F.nf4_dequantize(out)),
        ("dtype: expected a floating", TypeError, lambda: F.nf4_dequantize(nf4, torch.int32)),
        ("dtype: expected a floating", TypeError, lambda: F.nf4_dequantize(nf4, "float32")),
        ("dtype: torch.bfloat16 was asked for", ValueError, lambda: F.nf4_dequantize(nf4, BF16, out=out)),
        ("out: expected a tensor", TypeError, lambda: F.nf4_dequantize(nf4, out=1)),
        ("out: expected contiguous floating", ValueError, lambda: F.nf4_dequantize(nf4, out=out[:, :7])),
        ("first_row: expected an int", TypeError, lambda: F.nf4_dequantize(nf4, out=out, first_row=1.0)),
        ("first_row: expected 0 without out", ValueError, lambda: F.nf4_dequantize(nf4, first_row=1)),
        ("first_row: expected 0 to 4", ValueError, lambda: F.nf4_dequantize(nf4, out=out[:4], first_row=5)),
        ("out: expected contiguous floating", ValueError, lambda: F.nf4_dequantize(nf4, out=out.int())),
        ("out: expected contiguous floating", ValueError, lambda: F.nf4_dequantize(nf4, out=out.view(64, 8).T)),
        ("out: expected on", ValueError, lambda: F.nf4_dequantize(nf4, out=out.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("compute", [None, BF16])
@pytest.mark.parametrize("shape", [(65,), (4, 65), (2, 3, 65), (0, 65)])
def test_linear(dtype: torch.dtype, compute: torch.dtype | None, shape: tuple[int, ...]) -> None:
    nf4 = weight_of(NF4Case((33, 65)))
    x, bias = (
        torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(),
        torch.randn(33, device=DEVICE).requires_grad_(),
    )
    y = F.nf4_linear(x, nf4, bias, compute_dtype=compute)
    dy = torch.randn(y.shape, device=DEVICE).to(y.dtype)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 33)
    results = {}
    for name, product in (("composed", compute or dtype), ("exact", F64)):
        leaves = [t.detach().to(F64 if name == "exact" else t.dtype).requires_grad_() for t in (x, bias)]
        z = torch.nn.functional.linear(leaves[0].to(product), dense_weight(nf4, product), leaves[1].to(product))
        z = z if name == "exact" else z.to(dtype)
        results[name] = (z.detach(), *torch.autograd.grad(z, leaves, dy.to(z.dtype)))
    actual = (y.detach(), *torch.autograd.grad(y, (x, bias), dy))
    assert [t.dtype for t in actual] == [dtype, dtype, F32]
    for name, *values in zip(("y", "x", "bias"), actual, results["composed"], results["exact"], strict=True):
        assert_within_budget(name, *values)


def test_linear_in_float64() -> None:
    nf4 = weight_of(NF4Case((5, 9)))
    x = torch.randn(4, 9, dtype=F64, device=DEVICE, requires_grad=True)
    bias = torch.randn(5, dtype=F64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: F.nf4_linear(x, nf4, bias), (x, bias))


def test_linear_under_autocast() -> None:
    nf4 = weight_of(NF4Case((33, 64)))
    x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, BF16):
        y = F.nf4_linear(x, nf4)
        assert y.dtype == BF16
        composed = torch.nn.functional.linear(x, F.nf4_dequantize(nf4, BF16))
        # A few rows meet the weight unrounded, but where the processor multiplies bfloat16.
        assert_within_budget("y", y, composed, x.to(BF16).double() @ dense_weight(nf4, F32).double().T)
        assert F.nf4_linear(x, nf4, compute_dtype=BF16).dtype == F32
    assert torch.autograd.grad(y.sum(), x)[0].dtype == F32


def test_linear_keeps_no_dense_weight() -> None:
    nf4 = weight_of(NF4Case((64, 128)))
    x = torch.randn(80, 128, device=DEVICE, requires_grad=True)  # too many for the operator of a few rows
    with saved_tensors() as saved, Calls() as forward:
        y = F.nf4_linear(x, nf4, compute_dtype=BF16)
    kept = storages(saved)
    own = storages([t for t in nf4.storage() if isinstance(t, torch.Tensor)])
    assert kept.items() <= own.items()
    assert forward.compute == {"_to_copy": 2, "nf4_dequantize_out": 1, "mm": 1}  # x to bfloat16, y to float32
    with Calls() as backward:
        y.sum().backward()
    assert backward.compute["nf4_dequantize_out"] == 1 and backward.compute["mm"] == 1


def test_linear_refuses() -> None:
    nf4 = weight_of(NF4Case((8, 64)))
    x = torch.randn(2, 64, device=DEVICE)
    for message, error, call in (
        ("nf4: expected an NF4Weight", TypeError, lambda: F.nf4_linear(x, x)),
        ("x: expected a floating tensor", TypeError, lambda: F.nf4_linear(None, nf4)),
        ("x: expected a floating tensor", TypeError, lambda: F.nf4_linear(x.int(), nf4)),
        ("x: expected", ValueError, lambda: F.nf4_linear(x[:, :63], nf4)),
        ("bias: expected shape", ValueError, lambda: F.nf4_linear(x, nf4, torch.ones(7, device=DEVICE))),
        ("bias: expected a floating tensor", TypeError, lambda: F.nf4_linear(x, nf4, 1.0)),
        ("bias: expected on", ValueError, lambda: F.nf4_linear(x, nf4, torch.ones(8, device="meta"))),
        ("nf4: expected on", ValueError, lambda: F.nf4_linear(x, nf4.to("meta"))),
        ("compute_dtype: expected a floating", TypeError, lambda: F.nf4_linear(x, nf4, compute_dtype=torch.int8)),
        ("weight: expected shape", ValueError, lambda: F.nf4_linear(x, weight_of(NF4Case((64,))))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_linear_is_differentiated_twice() -> None:
    nf4 = weight_of(NF4Case((8, 64)))
    x = torch.randn(2, 64, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(F.nf4_linear(x, nf4).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    dense = F.nf4_dequantize(nf4).to(x.dtype)
    torch.testing.assert_close(second, 2 * (torch.ones_like(x) @ dense.T) @ dense, rtol=1e-4, atol=1e-4)
