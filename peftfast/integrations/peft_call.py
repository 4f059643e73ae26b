"""The fused forward of a patched PEFT layer, and what it remembers of its guards from call to call."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.dora import forget_norms
from ..functional.lora import by_library, draw_seed
from ..functional.lora_multi import apply_group
from ..functional.precision import compute_dtype_of
from ..kernels import streams  # type: ignore[attr-defined]
from ..nn.nf4 import is_bitsandbytes_4bit
from . import bitsandbytes as bnb
from .patch_report import log_once
from .peft_guards import has_dora, hooked_globally, plain_layout, scaled_by_tensors, why_stock, why_stock_for

VERDICT = "_peftfast_verdict"  # in a patched layer's __dict__: the last verdict of its guards


_FORWARD = itertools.repeat("forward")


def _nothing() -> None:
    return None


_FIELDS = operator.attrgetter("absmax", "code", "offset", "state2")
_NESTED = operator.attrgetter("absmax", "code")


def _statistics(state: Any) -> tuple[Any, ...]:
    """The tensors that are read of a quantisation state."""
    fields = _FIELDS(state)
    return fields if fields[-1] is None else (*fields, *_NESTED(fields[-1]))


class Verdict:
    """That the guards let a layer with these adapters run fused, and all that they looked at, so that the next call can see by
    identities that nothing has changed: modules, parameters, their addresses (which a move, a cast or a partition changes), hooks.
    A copy or a pickle of the layer does not hold it."""

    def __init__(self, layer: Any, active: str | list[str], names: list[str]) -> None:
        base = layer.base_layer
        self.active, self.modules = active, layer._modules
        # Active by name and not there: PEFT goes on without them, until they are.
        self.absent = () if isinstance(active, str) else tuple(name for name in active if name not in layer.lora_A)
        self.four_bit = is_bitsandbytes_4bit(base)
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.adapters = []
        self.variants = dict(layer.lora_variant)
        modules: list[Any] = [base]
        children: list[tuple[Any, str]] = [(layer, "base_layer")]
        for name in names:
            a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            magnitude = layer.lora_magnitude_vector[name] if has_dora(layer, name) else None
            self.adapters.append((name, a.weight, b.weight, b.bias, dropout, magnitude))
            own = [("lora_A", a), ("lora_B", b), ("lora_dropout", dropout)]
            own += [("lora_magnitude_vector", magnitude)] if magnitude is not None else []
            children += [(layer._modules[folder], name) for folder, _ in own]
            children += [(layer, folder) for folder, _ in own]
            modules += [module for _, module in own]
        held = [(parent._modules, key, parent._modules[key]) for parent, key in children]
        for module in modules:
            held += [(module._parameters, key, value) for key, value in module._parameters.items()]
        self.containers, self.keys, self.values = zip(*held, strict=True)
        self.empty = [
            hooks
            for module in modules
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        self.own = [module.__dict__ for module in modules]
        self.forwards = [own.get("forward") for own in self.own]  # accelerate's, which the guards know
        self.whole, self.kinds = modules, [type(module) for module in modules]
        self.parameters = [value for value in self.values if isinstance(value, Tensor)]
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self.state = bnb.quant_state(base) if self.four_bit else None
        self.statistics = None if self.state is None else (_statistics(self.state), self.state.absmax.data_ptr())
        self.nf4 = bnb.weight_of(base) if self.four_bit else None
        self.dtype, self.device, self.width = base.weight.dtype, base.weight.device, base.in_features
        self.device_type = self.device.type
        # One LoRA adapter on a dense base: what the short way serves.
        self.short = not self.four_bit and len(names) == 1 and not self.variants
        self.inference = any(parameter.is_inference() for parameter in self.parameters)

    def __reduce__(self) -> Any:
        return _nothing, ()

    def holds(self, layer: Any) -> bool:
        if layer._active_adapter != self.active or layer._disable_adapters or layer.merged_adapters:
            return False
        if self.absent and any(name in layer.lora_A for name in self.absent):
            return False
        if layer._modules is not self.modules:  # a replica, which has this layer's attributes and other modules
            return False
        try:  # by iterators, at a fifth of a loop's cost
            if not all(map(operator.is_, map(operator.getitem, self.containers, self.keys), self.values)):
                return False
        except KeyError:
            return False
        if (
            any(self.empty)
            or not all(map(operator.is_, map(dict.get, self.own, _FORWARD), self.forwards))
            or hooked_globally()
        ):
            return False
        if not all(map(operator.is_, map(type, self.whole), self.kinds)):
            return False
        if not all(map(operator.eq, map(Tensor.data_ptr, self.parameters), self.addresses)):
            return False
        if layer.lora_variant != self.variants or layer.fan_in_fan_out or scaled_by_tensors(layer):
            return False
        if self.state is not None and self.statistics is not None:
            if bnb.quant_state(self.base) is not self.state or bnb.why_not_served(self.base):
                return False
            known, address = self.statistics
            return all(map(operator.is_, known, _statistics(self.state))) and self.state.absmax.data_ptr() == address
        return True


def _remembered(layer: Any) -> Verdict | None:
    verdict = layer.__dict__.get(VERDICT)
    return verdict if verdict is not None and verdict.holds(layer) else None


def remember(layer: Any, active: str | list[str], names: list[str]) -> None:
    plain = (Tensor, nn.Parameter)
    base = layer.base_layer
    known = type(base.weight) in plain or is_bitsandbytes_4bit(base)
    # What is no parameter, as FSDP1's views and what a hypernetwork makes, is another tensor at the next call.
    known = known and all(map(_holds_its_tensors, _modules_of(layer, names)))
    with torch.inference_mode(False):  # the views of a 4-bit weight may be saved for a later call's backward
        layer.__dict__[VERDICT] = Verdict(layer, active, names) if known else None


def _modules_of(layer: Any, names: list[str]) -> list[Any]:
    """Those whose tensors a call with these adapters reads."""
    factors = [folder[name] for name in names for folder in (layer.lora_A, layer.lora_B)]
    return [layer.base_layer, *factors, *(layer.lora_magnitude_vector[name] for name in names if has_dora(layer, name))]


def _holds_its_tensors(module: Any) -> bool:
    parameters = module._parameters
    return "weight" in parameters and ("bias" in parameters or getattr(module, "bias", None) is None)


def fused_or_stock(layer: Any, stock: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A patched layer's forward; ``stock`` is PEFT's."""
    if torch.compiler.is_compiling() or args or kwargs:
        return _by_the_guards(layer, stock, x, args, kwargs)
    verdict = _remembered(layer)
    if verdict is None:
        return _by_the_guards(layer, stock, x, args, kwargs)
    if verdict.short and _takes(verdict, x):
        if x.dim() and x.shape[-1] == verdict.width and not torch.is_autocast_enabled(verdict.device_type):
            name, a, b, lora_bias, dropout, _ = verdict.adapters[0]
            p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
            return by_library.call(  # type: ignore[no-any-return]
                x,
                verdict.weight,
                a,
                b,
                verdict.bias,
                lora_bias,
                draw_seed(x) if p else None,
                p,
                layer.scaling[name],
                x.dtype,
                x.dtype,
            )
    reason = why_stock_for(layer, x)
    if reason:
        log_once(reason)
        return stock(x)
    return _run(layer, x, [name for name, *_ in verdict.adapters], None, verdict)


def _takes(verdict: Verdict, x: Any) -> bool:
    return type(x) is Tensor and x.dtype is verdict.dtype and x.device == verdict.device and plain_layout(x)


def _by_the_guards(layer: Any, stock: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    # Not guards but PEFT's own states, in which its forward is the right one and nothing is lost.
    # Read once: another thread may switch adapters meanwhile, and names and verdict must be of one state.
    active = layer._active_adapter if isinstance(layer._active_adapter, str) else list(layer._active_adapter)
    names = _present(layer, active)
    mixed = not args and list(kwargs) == ["adapter_names"] and kwargs["adapter_names"] is not None
    if not mixed and (args or kwargs or not names) or layer.disable_adapters or layer.merged:
        if layer.merged:
            forget_norms(layer.base_layer.weight)  # PEFT writes merged weights behind their version counters
        return stock(x, *args, **kwargs)
    rows: tuple[str, ...] | None = None
    if mixed:
        asked = kwargs["adapter_names"]
        layer._check_forward_args(x, adapter_names=asked)
        wanted, present = set(asked), list(layer.lora_A.keys())  # to which another thread may add one meanwhile
        names = [name for name in present if name in wanted]
        if not names:
            return stock(x, **kwargs)
        rows = tuple(asked)
        if any(name in layer.lora_variant for name in names):
            log_once("a batch that mixes adapters, one of them a PEFT variant")
            return stock(x, **kwargs)
    reason = why_stock(layer, names) or why_stock_for(layer, x)
    if reason:
        log_once(reason)
        return stock(x, **kwargs)
    if not mixed and not torch.compiler.is_compiling():
        remember(layer, active, names)
    return _run(layer, x, names, rows, None)


def _present(layer: Any, active: str | list[str]) -> list[str]:
    return [name for name in ([active] if isinstance(active, str) else active) if name in layer.lora_A]


def active_names(layer: Any) -> list[str]:
    return _present(layer, layer.active_adapters)


def _row_ids(asked: tuple[str, ...], names: tuple[str, ...], rows_each: int, device: torch.device) -> Tensor:
    """int32: for each row of x the index of its adapter in ``names``, -1 for none. Kept, since all layers of a model ask for the same:
    one copy to the device a batch, and none in a captured graph, for which they are kept for good."""
    if torch.compiler.is_compiling():
        return _made_row_ids(asked, names, rows_each, device)
    ids, made = _kept_row_ids(asked, names, rows_each, device)
    made.meet()
    return ids


@functools.lru_cache(maxsize=256)
def _kept_row_ids(
    asked: tuple[str, ...], names: tuple[str, ...], rows_each: int, device: torch.device
) -> tuple[Tensor, streams.Made]:
    ids = _made_row_ids(asked, names, rows_each, device)
    return ids, streams.Made(ids)


def _made_row_ids(asked: tuple[str, ...], names: tuple[str, ...], rows_each: int, device: torch.device) -> Tensor:
    index = {name: i for i, name in enumerate(names)}
    with torch.inference_mode(False):  # a later call may save them for its backward
        ids = torch.tensor([index.get(name, -1) for name in asked], dtype=torch.int32, device="cpu")
        return ids.repeat_interleave(rows_each).to(device)


def _run(layer: Any, x: Tensor, names: Sequence[str], rows: tuple[str, ...] | None, verdict: Verdict | None) -> Tensor:
    base = layer.base_layer
    four_bit = is_bitsandbytes_4bit(base)
    compute_dtype = bnb.compute_dtype_for(base, x) if four_bit else None
    weight: Any = base.weight
    if four_bit:
        weight = bnb.weight_of(base) if verdict is None else verdict.nf4
    adapters, training = [], True
    for name in names:
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        adapters.append(F.Adapter(a.weight, b.weight, layer.scaling[name], b.bias, p))
    if len(adapters) > 1 or rows is not None:
        dtype = compute_dtype_of(x, compute_dtype)
        ids = None if rows is None else _row_ids(rows, tuple(names), x.shape[1:-1].numel(), x.device)
        out_dtype = x.dtype if four_bit else dtype
        return apply_group(x, [(weight, base.bias, None)], [adapters], ids, training, dtype, out_dtype)[0]
    (one,) = adapters
    # PEFT drops nothing of DoRA's input where the layer itself is not in training.
    dora = has_dora(layer, names[0])
    return F.lora_linear(
        x,
        weight,
        one.lora_a,
        one.lora_b,
        scaling=one.scaling,
        bias=base.bias,
        lora_bias=one.lora_bias,
        magnitude=layer.lora_magnitude_vector[names[0]].weight if dora else None,
        dropout_p=one.dropout_p,
        training=training and (not dora or layer.training),
        compute_dtype=compute_dtype,
    )
