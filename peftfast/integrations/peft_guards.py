"""Why a PEFT layer runs PEFT's own forward, or an empty string: the guards of the patch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..nn.hooks import hooked
from ..nn.nf4 import is_bitsandbytes_4bit
from ..ops import lora as lora_ops
from ..ops import lora_dora as dora_ops
from ..ops import lora_terms as terms_ops
from ..ops import native
from ..ops import nf4 as nf4_ops
from ..ops import nf4_product as nf4_product_ops
from ..ops.backends import FLOAT_DTYPES, constant_when_compiled
from ..optim.discovery import WATCHES_ONLY
from . import bitsandbytes as bnb

TRANSFORMED = "a transform of torch.func, forward-mode differentiation or torch.jit's tracer"

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    FSDP: tuple[type, ...] = (FSDPModule,)
    DTENSOR: tuple[type, ...] = (DTensor,)
else:
    FSDP = DTENSOR = ()


# As nn.Module.__call__ asks them.
GLOBAL_HOOKS = tuple(
    getattr(torch.nn.modules.module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)


def hooked_globally() -> bool:
    """Whether a hook on all modules waits for the calls of a layer's own, which its fused forward does not make."""
    return any(GLOBAL_HOOKS) and any(
        not hasattr(hook, WATCHES_ONLY) for hooks in GLOBAL_HOOKS for hook in list(hooks.values())
    )


def plain_layout(x: Tensor) -> bool:
    """Whether a tensor's elements lie at strides; not sparse, not nested."""
    return x.layout is torch.strided and not x.is_nested


def _parameter_reason(name: str, parameter: Tensor | None) -> str:
    if parameter is None:
        return ""
    if hasattr(parameter, "ds_id"):
        return f"{name} is partitioned by DeepSpeed ZeRO-3"
    if parameter.is_meta:
        return f"{name} is on the meta device: offloaded, or not loaded yet"
    if isinstance(parameter, DTENSOR):
        return f"{name} is a DTensor; one that FSDP2 gathers for a forward is fused then"
    return ""


def dense_reason(name: str, parameter: Tensor | None) -> str:
    """A subclass of Tensor, as torchao's, computes what it likes in F.linear, and a sparse one has no storage; a kernel reads it."""
    if parameter is None:
        return ""
    kind = type(parameter)
    if kind not in (Tensor, nn.Parameter):
        return f"{name} is a {kind.__module__.partition('.')[0]}.{kind.__name__}, not a plain tensor"
    return "" if plain_layout(parameter) else f"{name} is {'nested' if parameter.is_nested else parameter.layout}"


def _vector_reason(name: str, vector: Tensor | None, width: int) -> str:
    """torch adds one of a single element, or of more dimensions, to every column; a kernel reads an element for each. Other shapes are
    no vector of the layer's, or a part of one that FSDP1 will gather."""
    if vector is None or vector.dim() == 1 and vector.shape[0] != 1 or tuple(vector.shape) == (width,):
        return ""
    return f"{name} is of shape {tuple(vector.shape)}, not ({width},)"


def has_dora(layer: Any, name: str) -> bool:
    """Whether an adapter of a layer is DoRA as PEFT has it; another variant is refused by :func:`why_stock`."""
    variant = layer.lora_variant.get(name)
    return variant is DoraLinearVariant or type(variant) is DoraLinearVariant


def _variant_reason(layer: Any, name: str, alone: bool) -> str:
    if not has_dora(layer, name):
        variant = layer.lora_variant[name]
        kind = variant if isinstance(variant, type) else type(variant)
        return f"the PEFT variant {kind.__name__.removesuffix('Variant')} has no fused form"
    if not alone:
        return "DoRA beside other active adapters: PEFT's result depends on their order"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer or hooked(magnitude):
        return "the magnitude vector is not PEFT's own module, or has a hook"
    if magnitude.weight.device != layer.base_layer.weight.device:
        return f"the magnitude vector is on {magnitude.weight.device}"
    if magnitude.weight.dtype not in FLOAT_DTYPES:
        return f"the magnitude vector is {magnitude.weight.dtype}"
    called = "the magnitude vector", magnitude.weight
    return _parameter_reason(*called) or dense_reason(*called) or _vector_reason(*called, layer.base_layer.out_features)


_TENSORS = frozenset((Tensor, nn.Parameter))


def scaled_by_tensors(layer: Any) -> bool:
    scalings = tuple(layer.scaling.values())  # another thread may add an adapter meanwhile
    return not _TENSORS.isdisjoint(map(type, scalings))


def why_stock(layer: Any, names: list[str]) -> str:
    """Why this layer runs PEFT's forward for these adapters, whatever its input is. Ordered from the layer inwards."""
    base = layer.base_layer
    four_bit = is_bitsandbytes_4bit(base)
    if not four_bit and type(base) is not nn.Linear:
        return f"the base layer is {type(base).__module__.partition('.')[0]}'s {type(base).__name__}"
    if not torch.compiler.is_compiling() and hooked_globally():
        return "a hook on all modules"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the weight is stored transposed"
    # Before the hooks: DeepSpeed and accelerate set some of their own where the weight is not there.
    reason = _parameter_reason("the base weight", base.weight) or _parameter_reason("the base bias", base.bias)
    if reason:
        return reason
    if hooked(base):
        return "a hook on the base layer"
    reason = bnb.why_not_served(base) if four_bit else dense_reason("the base weight", base.weight)
    bias = "the base bias", base.bias
    reason = reason or dense_reason(*bias) or _vector_reason(*bias, base.out_features)
    if reason:
        return reason
    dora = False
    if scaled_by_tensors(layer):
        return "a scaling that is a tensor, as prepare_model_for_compiled_hotswap makes it, or a parameter"
    for name in names:
        if name in layer.lora_variant:
            reason = _variant_reason(layer, name, len(names) == 1)
            if reason:
                return reason
            dora = True
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
            return "lora_A, lora_B or lora_dropout is not PEFT's own module"
        if hooked(a) or hooked(b) or hooked(dropout):
            return "a hook on lora_A, lora_B or lora_dropout"
        for part, module in (("lora_A", a), ("lora_B", b)):
            for own, parameter in ((part, module.weight), (f"{part}'s bias", module.bias)):
                reason = _parameter_reason(own, parameter) or dense_reason(own, parameter)
                if reason:
                    return reason
            if module.weight.device != base.weight.device:
                return f"{part} is on {module.weight.device}, the base weight on {base.weight.device}"
            if module.weight.dtype not in FLOAT_DTYPES:
                return f"{part} is {module.weight.dtype}"
        if a.bias is not None:
            return "lora_A has a bias"
        reason = _vector_reason("lora_B's bias", b.bias, base.out_features)
        if reason:
            return reason
    if not four_bit and base.weight.dtype not in FLOAT_DTYPES:
        return f"the base weight is {base.weight.dtype}"
    return _cached_backend_reason(base.weight.device, four_bit, dora, len(names) > 1)


_INPUTS = (Tensor, nn.Parameter, FakeTensor)


def input_reason(base: Any, x: Any) -> str:
    """Why this input is not served on this base layer, whatever the adapter is, or an empty string."""
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        return f"an input of {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
    if not torch.compiler.is_compiling() and type(x) not in _INPUTS:
        return f"an input that is a {type(x).__module__.partition('.')[0]}.{type(x).__name__}, not a plain tensor"
    if not plain_layout(x):
        return f"an input that is {'nested' if x.is_nested else x.layout}"
    if not x.dim() or x.shape[-1] != base.in_features:
        return f"an input of shape {tuple(x.shape)}, the layer's width is {base.in_features}"
    if x.device != base.weight.device:
        return f"an input on {x.device}, the base weight on {base.weight.device}"
    return ""


def why_stock_for(layer: Any, x: Any) -> str:
    """Why this input is not served, or an empty string."""
    reason = input_reason(layer.base_layer, x)
    if reason:
        return reason
    weight = layer.base_layer.weight
    if not is_bitsandbytes_4bit(layer.base_layer):
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
            return f"an input of {x.dtype} on a weight of {weight.dtype}"
    if isinstance(x, DTENSOR):
        return "an input that is a DTensor"
    if x.dim() < 2 and layer.lora_variant:
        return "an input of one dimension to DoRA, to which PEFT adds another"
    return ""


def _probe_arguments(device: torch.device, four_bit: bool, dora: bool, several: bool) -> dict[Any, tuple[Any, ...]]:
    """The smallest call of each operator on a path, to ask its table with. In float32, whatever torch's default is."""
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    a = empty((1, 8))
    s = empty((1, 1))
    uint8 = empty((32, 1), dtype=torch.uint8)
    one = empty(1)
    table = empty(16)
    probes: dict[Any, tuple[Any, ...]] = {
        lora_ops.lora_shrink: (a, a, None, 0.0, 1.0, torch.bfloat16),
        lora_ops.lora_expand_: (a, s, a.T, None, None, 0.0, 1.0),
        lora_ops.lora_weight_grad: (s, a, None, 0.0, 1.0, torch.float32),
        lora_ops.lora_dy_grads: (a, s, a.T, 1.0, torch.float32),
    }
    if four_bit:
        dense = empty(64)
        probes[nf4_ops.nf4_dequantize_out] = (uint8, one, table, 64, (64,), None, None, None, dense)
    if dora:
        probes[dora_ops.lora_dora_expand] = (a, None, s, a.T, None, a[0], None, 1.0, torch.bfloat16)
        probes[dora_ops.lora_gain_grads] = (a, a, a[0])
    if several:
        probes[terms_ops.lora_terms_shrink] = (a, [a], None, None, [0.0], [1.0], torch.bfloat16)
        probes[terms_ops.lora_terms_expand_] = (a, s, [a.T], [], None, None, [0.0], [1.0])
        probes[terms_ops.lora_terms_weight_grad] = (s, a, [1], None, None, [0.0], [1.0], torch.float32)
        probes[terms_ops.lora_terms_dy_grads] = (a, s, [a.T], None, [1.0], torch.float32)
    return probes


def _backends(device: torch.device, *path: bool) -> tuple[dict[str, None], str]:
    """The backends that a layer's operators run on (in order, without repeats), and why one of them has no fused form here."""
    used: dict[str, None] = {}
    for operator, arguments in _probe_arguments(device, *path).items():
        chosen = operator.select(*arguments).backend
        if chosen == "reference":
            reasons = [f"{row.backend}: {reason}" for row, ok, reason in operator.verdicts(*arguments) if not ok]
            return (
                used,
                f"no fused implementation of {operator.name} ({'; '.join(reasons) or 'reference was asked for'})",
            )
        used[chosen] = None
    return used, ""


@constant_when_compiled
@functools.cache
def _cached_backend_reason(device: torch.device, *path: bool) -> str:
    # What is installed does not change during a process; the environment's choice may, between tests, and report asks anew.
    return _backends(device, *path)[1]


def forget_backends() -> None:
    _cached_backend_reason.cache_clear()


def kernel_name(layer: Any, names: list[str]) -> str:
    """What a fused layer runs on, for the report."""
    device, four_bit = layer.base_layer.weight.device, is_bitsandbytes_4bit(layer.base_layer)
    dora, several = any(has_dora(layer, name) for name in names), len(names) > 1
    used = [
        f"cpu {native.cpu_isa()}" if name == "cpu" else name for name in _backends(device, four_bit, dora, several)[0]
    ]
    family = "lora" + (" (dora)" if dora else f" ({len(names)} adapters)" if several else "")
    way = "" if not four_bit or dora or several else _way_of_many_rows(layer, names[0])
    return f"{'nf4 + ' if four_bit else ''}{family} [{', '.join(used)}{f'; {way}' if way else ''}]"


def _way_of_many_rows(layer: Any, name: str) -> str:
    """How a 4-bit layer multiplies many rows, where it is not by the weight decoded whole."""
    base, weight = layer.base_layer, layer.base_layer.weight
    state = getattr(base, "quant_state", None) or getattr(weight, "quant_state", None)
    if state is None:
        return ""
    dropped = getattr(layer.lora_dropout[name], "p", 0.0) > 0.0
    dtype = getattr(base, "compute_dtype", None) or torch.bfloat16
    sizes = (tuple(state.shape), state.blocksize, state.nested, layer.r[name])
    return nf4_product_ops.ways(weight, *sizes, dropped, dtype)
