"""The 4-bit operators: registration, contracts, and each backend bit for bit the formula."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from peftfast import functional as F
from peftfast.ops import nf4 as ops
from peftfast.reference import nf4 as definition
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.nf4_checks import TELLING, NF4Case, check_dequantize, weight_of

on_triton = pytest.param("triton", marks=pytest.mark.interpreter)


@pytest.mark.parametrize("case", [*TELLING, NF4Case((16, 128), 64, F32)])
def test_opcheck_dequantize(case: NF4Case) -> None:
    out = torch.zeros(case.shape, dtype=case.dtype, device=DEVICE)
    opcheck(ops.nf4_dequantize_out.overload, (*weight_of(case).storage(), out))


@pytest.mark.parametrize("asked", [on_triton, "reference"])
def test_opcheck_of_the_other_backends(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    out = torch.zeros(TELLING[0].shape, dtype=BF16, device=DEVICE)
    utilities = ("test_schema", "test_faketensor")
    opcheck(ops.nf4_dequantize_out.overload, (*weight_of(TELLING[0]).storage(), out), test_utils=utilities)


@pytest.mark.parametrize("shape", [(7, 33), (64, 64), (5,)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_quantize(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    weight = weight.T if transposed and weight.dim() == 2 else weight
    opcheck(ops.nf4_quantize.overload, (weight, 64, definition.code_table("nf4", DEVICE)))


def random_cases(count: int, seed: int) -> list[NF4Case]:
    draw = random.Random(seed)
    sizes = (1, 2, 3, 7, 13, 32, 33, 64, 65, 96, 127, 160, 256, 311)
    return [
        NF4Case(
            shape=draw.choice(
                [(draw.choice(sizes), draw.choice(sizes)), (draw.choice(sizes),), (2, 5, draw.choice(sizes))]
            ),
            block_size=draw.choice(definition.BLOCK_SIZES),
            dtype=draw.choice((F32, BF16, F16)),
            nested=draw.random() < 0.6,
            quant_type=draw.choice(definition.QUANT_TYPES),
            data=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_dequantize(first: int) -> None:
    for case in random_cases(200, seed=1)[first : first + 50]:
        check_dequantize(case)


@pytest.mark.interpreter
def test_dequantize_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in (*TELLING, *random_cases(8, seed=2)):
        check_dequantize(case)


@pytest.mark.parametrize("asked", ["", on_triton, "reference"])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_an_empty_weight(asked: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    absmax = torch.empty(0, dtype=torch.uint8 if nested else F32, device=DEVICE)
    code = definition.code_table("nf4", DEVICE)
    nesting = (None, None, None)
    if nested:
        table = definition.nested_code_table(DEVICE)
        nesting = (torch.empty(0, device=DEVICE), table, torch.zeros(1, device=DEVICE))
    packed = torch.empty(0, 1, dtype=torch.uint8, device=DEVICE)
    assert ops.nf4_dequantize(packed, absmax, code, 64, (0, 64), BF16, *nesting).shape == (0, 64)


@pytest.mark.parametrize("asked", ["", on_triton])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dequantize_rounds_to_nearest_even(asked: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code values and maxima whose products lie on, below and above the middle of neighbours, denormals and overflow among them."""
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    generator = torch.Generator().manual_seed(0)
    code = (torch.rand(16, generator=generator) * 2 - 1).to(DEVICE)
    code[:3] = torch.tensor([1.0, -1.0, 1.0 + 2**-8])
    absmax = torch.exp2(torch.linspace(-30, 20, 64)).to(DEVICE)
    absmax[::3] = 1 + torch.arange(22, device=DEVICE) * 2.0**-8  # halves of bfloat16's last bit
    packed = torch.randint(0, 256, (1024, 1), generator=generator, dtype=torch.uint8).to(DEVICE)
    arguments = (packed, absmax, code, 32, (64, 32), dtype, None, None, None)
    assert torch.equal(ops.nf4_dequantize(*arguments), definition.nf4_dequantize(*arguments))


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    nf4 = weight_of(NF4Case((8, 64), 64, F32))
    plain = weight_of(NF4Case((8, 64), 64, F32, nested=False))
    names = ("packed", "absmax", "code", "block_size", "shape", "nested_absmax", "nested_code", "nested_offset")
    out = torch.empty(8, 64, device=DEVICE)

    def call(
        weight: F.NF4Weight = nf4, out: torch.Tensor = out, first_row: int = 0, **changes: Any
    ) -> Callable[[], Any]:
        given = dict(zip(names, weight.storage(), strict=True)) | changes
        return lambda: ops.nf4_dequantize_out(*given.values(), out, first_row)

    table = definition.nested_code_table(DEVICE)
    weight, code = torch.randn(8, 64, device=DEVICE), definition.code_table("nf4", DEVICE)
    return {
        "packed size": ("packed: expected 256", call(packed=nf4.packed[:-1])),
        "packed dtype": ("packed: expected", call(packed=nf4.packed.char())),
        "packed strides": ("packed: expected", call(packed=nf4.packed.repeat(1, 2)[:, 0])),
        "absmax dtype": ("absmax: expected 8 contiguous torch.uint8", call(absmax=nf4.absmax.float())),
        "absmax dtype, not nested": ("absmax: expected 8 contiguous torch.float32", call(plain, absmax=nf4.absmax)),
        "absmax size": ("absmax: expected 8", call(absmax=nf4.absmax[:-1])),
        "absmax device": ("expected all on", call(absmax=nf4.absmax.to("meta"))),
        "code size": ("code: expected 16", call(code=nf4.code[:15])),
        "code dtype": ("code: expected 16 float32", call(code=nf4.code.double())),
        "block_size": ("block_size: expected one of", call(block_size=48)),
        "block_size zero": ("block_size: expected one of", call(block_size=0)),
        "shape": ("packed: expected", call(shape=(8, 65))),
        "nested, one missing": ("expected all three or none", call(nested_code=None)),
        "nested, one too many": ("expected all three or none", call(plain, nested_offset=nf4.nested_offset)),
        "nested_absmax size": ("nested_absmax: expected 1", call(nested_absmax=torch.ones(2, device=DEVICE))),
        "nested_code size": ("nested_code: expected 256", call(nested_code=nf4.nested_code[:255])),
        "nested_offset dtype": ("nested_offset: expected 1", call(nested_offset=nf4.nested_offset.double())),
        "out shape": ("out: expected contiguous floating", call(out=out[:, :63])),
        "out shape, too many rows": ("out: expected contiguous floating", call(out=torch.empty(9, 64, device=DEVICE))),
        "out of three dimensions": ("out: expected contiguous floating", call(out=out[None])),
        "out rows overlap": (
            "which do not overlap",
            call(out=torch.empty(520, device=DEVICE).as_strided((8, 64), (63, 1))),
        ),
        "first_row": ("first_row: expected 0 to 1", call(out=out[:7], first_row=2)),
        "first_row below": ("first_row: expected 0 to 1", call(out=out[:7], first_row=-1)),
        "nest dtype": ("values: expected a float32", lambda: ops.nf4_nest(out.double()[0], table, False)),
        "nest shape": ("values: expected a float32", lambda: ops.nf4_nest(out, table, False)),
        "nest nothing": ("values: expected a float32", lambda: ops.nf4_nest(out[0, :0], table, False)),
        "nest code": ("code: expected 256", lambda: ops.nf4_nest(out[0], table[:16], False)),
        "out dtype": ("out: expected contiguous floating", call(out=out.int())),
        "out strides": ("out: expected contiguous floating", call(out=torch.empty(64, 8, device=DEVICE).T)),
        "out device": ("out: expected on", call(out=out.to("meta"))),
        "quantize weight dtype": ("weight: expected a floating", lambda: ops.nf4_quantize(weight.int(), 64, code)),
        "quantize nothing": ("weight: expected", lambda: ops.nf4_quantize(weight[:0], 64, code)),
        "quantize block_size": ("block_size: expected", lambda: ops.nf4_quantize(weight, 65, code)),
        "quantize code": ("code: expected 16", lambda: ops.nf4_quantize(weight, 64, code[:3])),
        "quantize code device": ("code: expected 16", lambda: ops.nf4_quantize(weight, 64, code.to("meta"))),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_contract(name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()
