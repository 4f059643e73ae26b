"""The nf4 family: decoding and encoding alone, a few rows, and the whole layer on a 4-bit base."""

import dataclasses
from collections.abc import Callable

import torch

from peftfast import functional as F
from peftfast.reference import nf4 as definition

from . import layers
from .registry import (
    FROZEN,
    WHOLE,
    Case,
    Cost,
    Inputs,
    Op,
    Provider,
    Results,
    Work,
    copy_inputs,
    peftfast_providers,
    register,
)

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


def _dense_inputs(case: Case, generator: torch.Generator) -> Inputs:
    return {"weight": layers.normal(case, generator, case.n, case.k)}


def _quantised(weight: F.NF4Weight) -> Results:
    """The gate sees a wrong block here; that every byte is right is what the tests show."""
    return {"packed": weight.packed, "absmax": weight.absmax}


def _quantise_formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    """In float32 whatever is asked: the roundings are part of the format."""
    device = inputs["weight"].device
    packed, absmax = definition.nf4_quantize(inputs["weight"], 64, definition.code_table("nf4", device))
    return {"packed": packed, "absmax": definition.nest_absmax(absmax, case.device == "cpu")[0]}


def _peftfast_quantise(case: Case, inputs: Inputs) -> Work:
    return Work(lambda: _quantised(F.nf4_quantize(inputs["weight"])))


def _bitsandbytes_quantise(case: Case, inputs: Inputs) -> Work:
    import bitsandbytes

    def call() -> Results:
        packed, state = bitsandbytes.functional.quantize_4bit(
            inputs["weight"], quant_type="nf4", compress_statistics=True
        )
        return {"packed": packed, "absmax": state.absmax}

    return Work(call)


register(
    Op(
        "nf4_quantize",
        "a dense weight to 4 bits, maxima quantised too",
        inputs=_dense_inputs,
        formula=_quantise_formula,
        cost=lambda case, _: Cost(layers.nf4_bytes(case.n, case.k) + case.n * case.k * case.itemsize, 0),
        providers=(
            *peftfast_providers(_peftfast_quantise, ("nf4_quantize", "nf4_nest")),
            Provider(
                "reference", lambda case, inputs: Work(lambda: _quantise_formula(case, inputs, "", torch.float32))
            ),
            Provider("bitsandbytes", _bitsandbytes_quantise, ("bitsandbytes",)),
        ),
        baseline="peftfast",
        ranked=False,
        dropped=False,
        tokens=False,
    )
)


def _few_inputs(rows: int) -> Callable[[Case, torch.Generator], Inputs]:
    return lambda case, generator: layers.make_inputs(dataclasses.replace(case, m=rows), generator, nf4=True)


def _few_formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    weight, x = layers.dense(inputs, case.torch_dtype).to(dtype), inputs["x"].to(dtype)
    if computes == FROZEN:
        return {"y": torch.nn.functional.linear(x, weight)}
    lora_a, lora_b = inputs["lora_a"].to(dtype), inputs["lora_b"].to(dtype)
    return {"y": definition.nf4_linear(x, weight, None, lora_a, lora_b, None, layers.SCALING)[0]}


def _without_gradient(call: Callable[[], torch.Tensor]) -> Work:
    def run() -> Results:
        with torch.no_grad():
            return {"y": call()}

    return Work(run)


def _few_peftfast(case: Case, inputs: Inputs) -> Work:
    x, weight, lora_a, lora_b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    return _without_gradient(lambda: F.lora_linear(x, weight, lora_a, lora_b, scaling=layers.SCALING))


def _few_peftfast_frozen(case: Case, inputs: Inputs) -> Work:
    return _without_gradient(lambda: F.nf4_linear(inputs["x"], inputs["weight"]))


def _few_torch(case: Case, inputs: Inputs) -> Work:
    x, lora_a, lora_b = inputs["x"], inputs["lora_a"], inputs["lora_b"]
    return _without_gradient(lambda: layers.compose(x, layers.dense(inputs, x.dtype), lora_a, lora_b, 0.0))


def _few_reference(case: Case, inputs: Inputs) -> Work:
    return _without_gradient(lambda: _few_formula(case, inputs, WHOLE, case.torch_dtype)["y"])


def _few_dense(case: Case, inputs: Inputs) -> Work:
    weight = layers.dense(inputs, case.torch_dtype)
    return _without_gradient(lambda: torch.nn.functional.linear(inputs["x"], weight))


def _few_bitsandbytes(case: Case, inputs: Inputs) -> Work:
    layer = layers.linear4bit(case, inputs)
    return _without_gradient(lambda: layer(inputs["x"]))


def _few_repacked(case: Case, inputs: Inputs) -> Work:
    """After bitsandbytes has permuted the bytes for this CPU: on a copy, since it does so in place."""
    layer = layers.linear4bit(case, copy_inputs({"weight": inputs["weight"]}))
    layer.support_avx512bf16_for_cpu = True
    layer.eval()
    return _without_gradient(lambda: layer(inputs["x"]))


def _repacked_refuses(case: Case) -> str:
    if case.device != "cpu" or case.dtype != "bfloat16" or case.n % 32:
        return "repacks for a CPU, bfloat16 and N % 32 == 0"
    from bitsandbytes.functional import has_avx512bf16

    return layers.bitsandbytes_refuses(case) if has_avx512bf16() else "this CPU has no AVX512-BF16"


def _few_cost(rows: int) -> Callable[[Case, str], Cost]:
    return lambda case, computes: layers.cost(dataclasses.replace(case, m=rows, mode="fwd"), computes, nf4=True)


for few in (1, 16):
    register(
        Op(
            f"nf4_linear_m{few}",
            f"{few} row{'s' if few > 1 else ''} through a 4-bit layer with its adapter, no gradient",
            inputs=_few_inputs(few),
            formula=_few_formula,
            cost=_few_cost(few),
            providers=(
                *peftfast_providers(_few_peftfast, ("nf4_linear",)),
                Provider("reference", _few_reference),
                Provider("torch", _few_torch),
                Provider("peftfast frozen", _few_peftfast_frozen, computes=FROZEN),
                Provider("frozen", _few_dense, computes=FROZEN),
                Provider("bitsandbytes", _few_bitsandbytes, ("bitsandbytes",), layers.bitsandbytes_refuses, FROZEN),
                Provider("bitsandbytes repacked", _few_repacked, ("bitsandbytes",), _repacked_refuses, FROZEN),
            ),
            baseline="torch",
            dropped=False,
            tokens=False,
        )
    )
