"""The nf4 family: decoding alone, and the whole layer on a 4-bit base."""

import torch

from peftfast import functional as F
from peftfast.reference import nf4 as definition

from . import layers
from .registry import Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register

register(
    Op(
        "qlora_linear",
        "y = x W̃ᵀ + s dropout(x) Aᵀ Bᵀ on a 4-bit W, forward and backward",
        inputs=lambda case, generator: layers.make_inputs(case, generator, nf4=True),
        formula=layers.formula,
        cost=lambda case, computes: layers.cost(case, computes, nf4=True),
        providers=layers.providers(nf4=True),
        baseline="torch",
        modes=("fwd", "bwd", "full"),
    )
)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    weight = F.nf4_quantize(layers.normal(case, generator, case.n, case.k))
    return {"weight": weight, "out": torch.empty(case.n, case.k, dtype=case.torch_dtype, device=case.device)}


def _formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    """Code value times block maximum, in ``dtype`` but for the nested maxima, whose float32 roundings are part of the format."""
    weight = inputs["weight"]
    absmax = definition.unnest_absmax(weight.absmax, weight.nested_absmax, weight.nested_code, weight.nested_offset)
    nibbles = torch.stack((weight.packed.reshape(-1) >> 4, weight.packed.reshape(-1) & 15), dim=-1).reshape(-1)
    count = case.n * case.k
    scale = absmax.to(dtype).repeat_interleave(weight.block_size)[:count]
    return {"weight": (weight.code.to(dtype)[nibbles[:count].long()] * scale).reshape(case.n, case.k)}


def _peftfast(case: Case, inputs: Inputs) -> Work:
    return Work(lambda: {"weight": F.nf4_dequantize(inputs["weight"], out=inputs["out"])})


def _reference(case: Case, inputs: Inputs) -> Work:
    packed, absmax, code, block_size, shape, *nested = inputs["weight"].storage()

    def call() -> Results:
        dense = definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), case.torch_dtype, *nested)
        return {"weight": dense}

    return Work(call)


def _bitsandbytes(case: Case, inputs: Inputs) -> Work:
    import bitsandbytes

    weight = inputs["weight"].to_bitsandbytes()
    data, state = weight.data, weight.quant_state
    state.dtype = case.torch_dtype
    out = inputs["out"] if case.device != "cpu" else None  # bitsandbytes 0.50 has no out= for CPU tensors

    def call() -> Results:
        return {"weight": bitsandbytes.functional.dequantize_4bit(data, state, out=out)}

    return Work(call)


register(
    Op(
        "nf4_dequantize",
        "the dense weight from 4 bits, double quantisation undone",
        inputs=_inputs,
        formula=_formula,
        cost=lambda case, _: Cost(layers.nf4_bytes(case.n, case.k) + case.n * case.k * case.itemsize, 0),
        providers=(
            *peftfast_providers(_peftfast, ("nf4_dequantize_out",)),
            Provider("reference", _reference),
            Provider("bitsandbytes", _bitsandbytes, ("bitsandbytes",), layers.bitsandbytes_refuses),
        ),
        baseline="peftfast",
        ranked=False,
        dropped=False,
        tokens=False,
    )
)
