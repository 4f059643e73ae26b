"""A LoRA layer by everyone who has one, on a dense or a 4-bit base. The families lora and nf4 share these providers.

Inputs: ``x`` [M, K], ``dy`` [M, N], ``lora_a`` [R, K], ``lora_b`` [N, R], and ``weight``: [N, K], or an NF4Weight of that shape.
Adapters are float32 beside a 16-bit base, as PEFT keeps them, with values that the 16-bit dtype holds exactly: who casts them down
computes the same function.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftfast import functional as F
from peftfast.configs import lora_product as product
from peftfast.configs import nf4_product
from peftfast.reference import lora as definition

from .registry import FROZEN, Case, Cost, Inputs, Provider, Results, Work, peftfast_providers

SCALING = 2.0  # lora_alpha = 2 r, PEFT users' most common choice
LORA_OPERATORS = ("lora_shrink", "lora_expand_", "lora_weight_grad", "lora_dy_grads")
NESTED_BLOCK = 64 * 256


def adapter_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.itemsize == 2 else case.torch_dtype


def normal(case: Case, generator: torch.Generator, *size: int, std: float = 1.0) -> Tensor:
    return (torch.randn(*size, generator=generator, device=case.device) * std).to(case.torch_dtype)


def make_inputs(case: Case, generator: torch.Generator, nf4: bool) -> Inputs:
    weight = normal(case, generator, case.n, case.k, std=case.k**-0.5)
    return {
        "x": normal(case, generator, case.m, case.k),
        "dy": normal(case, generator, case.m, case.n),
        "lora_a": normal(case, generator, case.rank, case.k, std=case.k**-0.5).to(adapter_dtype(case)),
        # x Wᵀ and SCALING x Aᵀ Bᵀ both have deviation 1.
        "lora_b": normal(case, generator, case.n, case.rank, std=case.rank**-0.5 / SCALING).to(adapter_dtype(case)),
        "weight": F.nf4_quantize(weight) if nf4 else weight,
        "seed": None,
    }


def dense(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    weight = inputs["weight"]
    return F.nf4_dequantize(weight, dtype) if isinstance(weight, F.NF4Weight) else weight.to(dtype)


def formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    """y and its gradients by autograd through the definition, every product in ``dtype``. A 4-bit weight is decoded to the case's dtype
    first: that rounding belongs to the operator, not to its error."""
    weight = dense(inputs, case.torch_dtype).to(dtype)
    x = inputs["x"].to(dtype).requires_grad_()
    if computes == FROZEN:
        y, leaves = nn.functional.linear(x, weight), {"dx": x}
    else:
        lora_a, lora_b = (inputs[name].to(dtype).requires_grad_() for name in ("lora_a", "lora_b"))
        leaves = {"dx": x, "da": lora_a, "db": lora_b}
        y = definition.lora_linear(
            x, weight, lora_a, lora_b, scaling=SCALING, dropout_p=case.dropout, seed=inputs["seed"]
        )
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def nf4_bytes(n: int, k: int) -> int:
    """A 4-bit weight with double quantisation: two elements a byte, a byte for 64, four bytes for 64 * 256, both tables, the offset."""
    return -(-n * k // 2) + -(-n * k // 64) + 4 * -(-n * k // NESTED_BLOCK) + 4 * (16 + 256 + 1)


def cost(case: Case, computes: str, nf4: bool) -> Cost:
    """Bytes: x, W, A, B read and y, S written; backward: dy, x, S, W, A, B read and dx, dA, dB written. Operations: 2 M N K each way
    for the base, 2 M R (N + K) and 4 M R (N + K) for the adapter. Without the adapter x and S do not come back in the backward."""
    m, n, k, r, e = case.m, case.n, case.k, case.rank, case.itemsize
    weight = nf4_bytes(n, k) if nf4 else n * k * e
    base = m * k * e + weight + m * n * e  # the same each way: x in, y out; dy in, dx out
    if computes == FROZEN:
        forward, backward = Cost(base, 2 * m * n * k), Cost(base, 2 * m * n * k)
    else:
        adapters = r * (n + k) * adapter_dtype(case).itemsize
        forward = Cost(base + adapters + m * r * e, 2 * m * n * k + 2 * m * r * (n + k))
        backward = Cost(base + m * k * e + m * r * e + 2 * adapters, 2 * m * n * k + 4 * m * r * (n + k))
    full = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"fwd": forward, "bwd": backward, "full": full}[case.mode]


def _layer(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    x, lora_a, lora_b = (inputs[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b"))
    weight = inputs["weight"]
    frozen = (weight.packed, weight.absmax, weight.code) if isinstance(weight, F.NF4Weight) else (weight,)
    if isinstance(weight, F.NF4Weight):
        nested = (weight.nested_absmax, weight.nested_code, weight.nested_offset)
        frozen += tuple(tensor for tensor in nested if tensor is not None)
    return Work(
        lambda: {"y": call(x, lora_a, lora_b)},
        {"dx": x, "da": lora_a, "db": lora_b},
        inputs["dy"],
        (lora_a, lora_b, *frozen),
    )


def _peftfast(case: Case, inputs: Inputs) -> Work:
    def call(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return F.lora_linear(
            x, inputs["weight"], lora_a, lora_b, scaling=SCALING, dropout_p=case.dropout, seed=inputs["seed"]
        )

    return _layer(inputs, call)


def _reference(case: Case, inputs: Inputs) -> Work:
    """The definition under autograd, in the case's dtype."""
    seed = inputs["seed"]
    if seed is None and case.dropout:
        seed = torch.ones(1, dtype=torch.int64, device=case.device)

    def call(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        weight = dense(inputs, x.dtype)
        return definition.lora_linear(x, weight, lora_a, lora_b, scaling=SCALING, dropout_p=case.dropout, seed=seed)

    return _layer(inputs, call)


def compose(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, p: float) -> Tensor:
    """LoRA as one writes it by hand, adapters cast to x's dtype. A 4-bit weight comes in decoded, by peftfast's own decoder."""
    dropped = nn.functional.dropout(x, p) if p else x
    y = nn.functional.linear(x, weight)
    return y + SCALING * nn.functional.linear(nn.functional.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


_compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}


def _torch(case: Case, inputs: Inputs) -> Work:
    return _layer(inputs, lambda x, a, b: compose(x, dense(inputs, x.dtype), a, b, case.dropout))


def _torch_compile(case: Case, inputs: Inputs) -> Work:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # the backward is timed again and again on one graph
    key = (case.op, case.m, case.n, case.k, case.rank, case.dtype, case.dropout, case.device)
    if key not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        _compiled[key] = torch.compile(compose, dynamic=False)
    run = _compiled[key]
    # Decoding 4 bits stays outside: its definition is not what a user of torch.compile would compile.
    return _layer(inputs, lambda x, a, b: run(x, dense(inputs, x.dtype), a, b, case.dropout))


def _frozen(case: Case, inputs: Inputs) -> Work:
    x, weight = inputs["x"].detach().requires_grad_(), dense(inputs, case.torch_dtype)
    return Work(lambda: {"y": nn.functional.linear(x, weight)}, {"dx": x}, inputs["dy"], (weight,))


def linear4bit(case: Case, inputs: Inputs) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(case.k, case.n, bias=False, compute_dtype=case.torch_dtype, quant_type="nf4", device="meta")
    layer.weight = inputs["weight"].to_bitsandbytes()
    layer.quant_state = layer.weight.quant_state
    layer.support_avx512bf16_for_cpu = False  # else an evaluation would repack the weight, lossily
    return layer


def _bitsandbytes(case: Case, inputs: Inputs) -> Work:
    layer, x = linear4bit(case, inputs), inputs["x"].detach().requires_grad_()
    state = layer.weight.quant_state
    owned = (layer.weight.data, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    return Work(lambda: {"y": layer(x)}, {"dx": x}, inputs["dy"], owned)


def bitsandbytes_refuses(case: Case) -> str:
    if case.device == "cpu" and case.k % 64 and case.k % 16 == 0:
        return "bitsandbytes 0.50's CPU decoder returns garbage where K % 64 != 0 and K % 16 == 0"
    return ""


def _peft(case: Case, inputs: Inputs, autocast_adapter_dtype: bool) -> Work:
    from peft import LoraConfig, get_peft_model

    nf4 = isinstance(inputs["weight"], F.NF4Weight)
    if nf4:
        base = linear4bit(case, inputs)
    else:
        base = nn.Linear(case.k, case.n, bias=False, device="meta")
        base.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    model: Any = nn.ModuleDict({"linear": base})
    model.is_loaded_in_4bit = nf4
    config = LoraConfig(
        r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout, target_modules=["linear"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = adapted.base_model.model["linear"].train()
    if "lora" not in type(layer).__module__:
        raise RuntimeError(f"PEFT left the layer as {type(layer).__name__}")
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = torch.float32 if autocast_adapter_dtype else case.torch_dtype
    with torch.no_grad():
        # PEFT makes a 4-bit base's adapters float32 or in the base's dtype according to version: the arm's name decides.
        lora_a.data, lora_b.data = inputs["lora_a"].to(expected), inputs["lora_b"].to(expected)
    x = inputs["x"].detach().requires_grad_()
    owned = (lora_a, lora_b, base.weight.data)
    if nf4:
        state = base.weight.quant_state
        owned += (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    return Work(lambda: {"y": layer(x)}, {"dx": x, "da": lora_a, "db": lora_b}, inputs["dy"], owned)


def _peft_default(case: Case, inputs: Inputs) -> Work:
    return _peft(case, inputs, True)


def _peft_16bit(case: Case, inputs: Inputs) -> Work:
    return _peft(case, inputs, False)


def _peft_16bit_refuses(case: Case) -> str:
    return "" if case.itemsize == 2 else "the same as peft where the base is float32"


def _unsloth(case: Case, inputs: Inputs) -> Work:
    from unsloth.kernels.fast_lora import LoRA_W

    weight = inputs["weight"]
    packed: Any = weight.to_bitsandbytes() if isinstance(weight, F.NF4Weight) else weight
    state = getattr(packed, "quant_state", None)

    def call(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return LoRA_W.apply(x[None], packed, state, lora_a, lora_b, SCALING)[0]

    return _layer(inputs, call)


def _unsloth_refuses(case: Case) -> str:
    if case.device == "cpu":
        return "serves CUDA tensors"
    return "has no fused form with dropout" if case.dropout else ""


def _lorafusion(case: Case, inputs: Inputs) -> Work:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def call(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        return fused_linear_lora(x[None], inputs["weight"], a, b, SCALING, dropout_p=case.dropout)[0]

    return _layer(inputs, call)


def _lorafusion_refuses(case: Case) -> str:
    return "serves CUDA tensors" if case.device == "cpu" else ""


def _product_refuses(case: Case) -> str:
    if case.device == "cpu":
        return "interpreted: no speed to measure"
    return "" if case.dtype in product.DTYPES else "multiplies on tensor cores in bfloat16 and float16"


def _ways(variable: str, routes: tuple[str, ...]) -> Iterator[Provider]:
    """The layer on a 4-bit base by another way than the weight decoded whole, whether or not a table says so."""
    for route in routes:
        yield Provider(f"peftfast:{route}", _peftfast, ("triton",), _product_refuses, environment=((variable, route),))


def providers(nf4: bool) -> tuple[Provider, ...]:
    stock = ("peft", "bitsandbytes") if nf4 else ("peft",)
    refuses = bitsandbytes_refuses if nf4 else (lambda _: "")
    own = dict(own_mask=True)
    found = (
        *peftfast_providers(_peftfast, LORA_OPERATORS),
        # The layer with both products by kernels/lora_product.py, whether or not a table says so.
        Provider(
            "peftfast:product", _peftfast, ("triton",), _product_refuses, environment=((product.VARIABLE, "always"),)
        ),
        *(_ways(nf4_product.VARIABLE, ("fused", "overlapped")) if nf4 else ()),
        Provider("reference", _reference),
        Provider("torch", _torch, **own),
        Provider("torch.compile", _torch_compile, slow_start=True, **own),
        Provider("peft", _peft_default, stock, refuses, **own),
        Provider("peft:16bit", _peft_16bit, stock, lambda case: _peft_16bit_refuses(case) or refuses(case), **own),
        Provider("unsloth", _unsloth, ("unsloth",), _unsloth_refuses, **own),
        Provider("frozen", _frozen, computes=FROZEN),
    )
    if not nf4:
        found += (Provider("lorafusion", _lorafusion, ("lorafusion",), _lorafusion_refuses, **own),)
    if nf4:
        frozen4 = Provider("bitsandbytes", _bitsandbytes, ("bitsandbytes",), bitsandbytes_refuses, computes=FROZEN)
        found += (frozen4,)
    return found


def dropout_seed(case: Case) -> Tensor | None:
    return torch.full((1,), 1234, dtype=torch.int64, device=case.device) if case.dropout else None
