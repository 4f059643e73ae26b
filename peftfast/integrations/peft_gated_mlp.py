"""Gated MLPs, down(act(gate(x)) * up(x)), whose product is formed in one pass and kept by nobody, by exchanging a module's class.

Which modules these are, their code says (:mod:`mlp_form`). The class made for one calls gate and up as modules, in the order of the
stock forward, and in the place of the rest one Function that keeps gate's and up's results alone; or, where down is no layer of which
that is known, the product alone and then down as a module. Every call asks whether that is what the stock forward would give.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import ops
from ..configs import gated_activation as configs
from ..functional import lora_gated
from ..functional.derivatives import transformed
from ..functional.gated_activation import by_library as gated_product
from ..functional.lora import draw_seed
from ..functional.lora_gated import apply_gated
from ..nn.hooks import hooked, overridden, swap_class
from ..ops.backends import FLOAT_DTYPES
from ..ops.dispatch import requested_backend
from ..reference.gated_activation import activate
from .mlp_form import Form, activation_of, form_of
from .patch_report import MLPReport
from .peft import _why_not_swapped
from .peft_call import Verdict
from .peft_group_call import _dtypes, _verdict_of
from .peft_groups import _is_patched
from .peft_guards import FSDP, GLOBAL_HOOKS, plain_layout, why_stock_for

logger = logging.getLogger("peftfast")

NO_ADAPTER = "it holds no adapter layer any more"


class _Gated:
    """Mixed in before the module's own class."""

    _peftfast_stock: Any
    _peftfast_form: Form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name in its module: a copy and a pickle name the stock one.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        made, arguments, *rest = reduced
        if made is copyreg.__newobj__ and arguments == (type(self),):  # type: ignore[attr-defined]
            members = _members(self, self._peftfast_form)
            if members is not None and any(isinstance(one, BaseTunerLayer) for one in members[:3]):
                return _made_anew, (self._peftfast_stock,), *rest
            # Of the standard library alone: a merged model's pickle is read where peftfast is not.
            return copyreg._reconstructor, (self._peftfast_stock, object, None), *rest  # type: ignore[attr-defined]
        return made, arguments, *rest


def _made_anew(stock: type) -> Any:
    kind: Any = gated_class(stock) or stock
    return kind.__new__(kind)


@functools.cache
def _class_of(stock: Any, form: Form) -> type:
    own = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_peftfast_stock": stock,
        "_peftfast_form": form,
    }
    kind: Any = type(stock)(stock.__name__, (_Gated, stock), own)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)

    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    kind.forward = forward
    return kind  # type: ignore[no-any-return]


def gated_class(stock: type) -> type | None:
    """The class for modules of ``stock``, or None where its forward is not a gated MLP's."""
    form = form_of(stock)
    if form is None:
        return None
    # A metaclass or a hook of subclasses would run; an attribute of the class, or a look-up of its own, would be found before a member.
    names = [name for name in (form.gate, form.up, form.down, form.act) if name]
    looked_up = stock.__getattr__ is nn.Module.__getattr__ and stock.__getattribute__ is object.__getattribute__  # type: ignore[attr-defined]
    plain = type(stock) is type and not any("__init_subclass__" in kind.__dict__ for kind in stock.__mro__[:-1])
    return _class_of(stock, form) if plain and looked_up and not any(hasattr(stock, name) for name in names) else None


def _own_kind(module: nn.Module) -> Any:
    """The class that patch gave a module; fully_shard may have derived another from it."""
    return next((kind for kind in type(module).__mro__ if "_peftfast_form" in kind.__dict__), None)


@functools.cache
def _backend_of(device: torch.device, requested: str | None) -> str:
    one = torch.empty((1, 8), dtype=torch.float32, device=device)
    return ops.gated_activation.gated_activation.select(one, one, "silu").backend


def _members(module: Any, form: Form) -> tuple[Any, Any, Any, Any] | None:
    """gate, up, down and act; None where one is not what a gated MLP has there."""
    modules = module._modules
    gate, up, down = modules.get(form.gate), modules.get(form.up), modules.get(form.down)
    if gate is None or up is None or down is None:
        return None
    act = None
    if form.act:
        act = module.__dict__.get(form.act)  # where Python looks first
        act = modules.get(form.act) if act is None else act
    return gate, up, down, act


def _found_elsewhere(module: Any, form: Form) -> bool:
    """Whether Python would find a member before torch does: on the object, or on the class, set after it was looked at."""
    kind, own = type(module), module.__dict__
    if form.gate in own or form.up in own or form.down in own:
        return True
    return (
        hasattr(kind, form.gate)
        or hasattr(kind, form.up)
        or hasattr(kind, form.down)
        or (form.act != "" and hasattr(kind, form.act))
    )


def _activation(form: Form, act: Any) -> str:
    return activation_of(act) if form.act else form.activation


def why_not(module: Any, stock: Any, form: Form) -> str:
    """Why the stock forward runs, whatever x is; an empty string if it need not."""
    if not form.holds(stock.forward):
        return "its class's forward has been replaced"
    members = _members(module, form)
    if members is None:
        return "one of its parts is not a module of its own"
    if _found_elsewhere(module, form):
        return "one of its parts is hidden by an attribute of the same name"
    gate, up, down, act = members
    if not _activation(form, act):
        kind = act if isinstance(act, type) else type(act)
        return f"{kind.__name__} is none of the activations that are known, or works in place"
    if isinstance(act, nn.Module) and hooked(act):
        return "a hook on the activation"
    if any(GLOBAL_HOOKS):
        return "a hook on all modules"
    adapted = False
    for one in (gate, up, down):
        own = one.__dict__  # where PEFT's layers have them
        if own.get("_disable_adapters") or own.get("merged_adapters"):
            return "an adapter is disabled or merged"
        adapted = adapted or "_disable_adapters" in own
    return "" if adapted else NO_ADAPTER


def _whole(down: Any) -> Verdict | None:
    """What is known of down where its call can be a part of the fused one, as far as its input does not matter; else None."""
    if not getattr(type(down), "_peftfast_grouped", False) or hooked(down):
        return None
    verdict = _verdict_of(down)
    return None if verdict is None or len(verdict.adapters) > 1 or verdict.adapters[0][5] is not None else verdict


def why_product_alone(down: Any) -> str:
    """Why down is called as a module, with the product made before it; an empty string if it need not."""
    if _whole(down) is not None:
        return ""
    if not _is_patched(down):
        return "it has no LoRA layer that is patched"
    if hooked(down):
        return "a hook on it"
    verdict = _verdict_of(down)
    if verdict is None:
        return "it runs stock"
    return "several adapters" if len(verdict.adapters) > 1 else "DoRA"


def _plain(verdict: Verdict, x: Any) -> bool:
    """Whether an input needs no further questions: of a dense weight's own dtype, where nothing casts."""
    known = verdict.short and x.dtype is verdict.dtype and x.device == verdict.device and x.shape[-1] == verdict.width
    return known and not torch.is_autocast_enabled(verdict.device_type)


def _takes(x: Any) -> bool:
    return type(x) is Tensor and plain_layout(x)


def _forward(module: Any, args: Any, kwargs: Any) -> Any:
    if not isinstance(module, _Gated):  # its forward was bound before unpatch and kept, as accelerate's hooks keep it
        return type(module).forward(module, *args, **kwargs)
    stock = module._peftfast_stock
    # A compiler sees the whole expression and fuses it itself; it also decides what of it is kept.
    if torch.compiler.is_compiling() or kwargs or len(args) != 1 or not _takes(args[0]):
        return stock.forward(module, *args, **kwargs)
    form = module._peftfast_form
    reason = "transformed" if transformed() else why_not(module, stock, form)
    if reason:
        if reason is NO_ADAPTER and type(module) is _own_kind(module):  # type: ignore[arg-type]
            # merge_and_unload or unload has made a plain model of it, which is to be one in its files too.
            swap_class(module, stock)
        return stock.forward(module, *args)
    members = _members(module, form)
    assert members is not None
    gate, up, down, act = members
    verdict = _whole(down) if torch.is_grad_enabled() else None
    (x,) = args
    if form.up_called_first:
        u = up(x)
        g = gate(x)
    else:
        g = gate(x)
        u = up(x)
    activation = _activation(form, act)
    whole = verdict is not None and (_plain(verdict, g) or not why_stock_for(down, g))
    if not _served(g, u, whole):
        acted = act(g) if form.act else activate(g, activation)
        return down(u * acted if form.up_is_left else acted * u)
    if whole:
        return _tail(down, verdict, g, u, activation)
    return down(gated_product.apply(g, u, activation))


def _served(g: Any, u: Any, whole: bool) -> bool:
    if type(g) is not Tensor or type(u) is not Tensor or g.dtype not in FLOAT_DTYPES or not g.dim():
        return False
    if u.dtype is not g.dtype or u.shape != g.shape or u.device != g.device:
        return False
    return (
        configs.gated_pays(g.device.type, g.numel(), whole)
        and _backend_of(g.device, requested_backend()) != "reference"
    )


def _tail(down: Any, verdict: Any, g: Tensor, u: Tensor, activation: str) -> Tensor:
    name, a, b, lora_bias, dropout, _ = verdict.adapters[0]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    weight: Any = verdict.weight if verdict.nf4 is None else verdict.nf4
    seed = draw_seed(g) if p else None  # as the layer would draw it
    layer = (a, b, verdict.bias, lora_bias, seed, p, float(down.scaling[name]))
    if _plain(verdict, g):
        return lora_gated.by_library.apply(g, u, activation, weight, *layer, g.dtype, g.dtype)  # type: ignore[no-any-return]
    return apply_gated(g, u, activation, weight, *layer, *_dtypes(down, verdict, g))


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any, Any, Form]]:
    """(name, module, its stock class, its form) of every gated MLP that holds an adapter layer."""
    for name, module in model.named_modules():
        own = _own_kind(module)
        stock: Any = own._peftfast_stock if own is not None else type(module)
        if not module._modules or isinstance(module, (BaseTunerLayer, torch.jit.ScriptModule)):
            continue
        form = form_of(stock) if own is None else own._peftfast_form
        if form is None:
            continue
        members = _members(module, form)
        if members is not None and any(isinstance(one, BaseTunerLayer) for one in members[:3]):
            yield name, module, stock, form


def patch(model: nn.Module) -> None:
    """Exchange the class of every gated MLP that holds a patched layer."""
    for _, module, stock, form in list(_candidates(model)):
        members = _members(module, form)
        if type(module) is not stock or isinstance(module, FSDP) or members is None:
            continue
        kind = gated_class(stock)
        if kind is not None and not overridden(module) and any(map(_is_patched, members[:3])):
            swap_class(module, kind)


def unpatch(model: nn.Module) -> None:
    for module in model.modules():
        own = _own_kind(module)
        if own is None:
            continue
        if own is not type(module):
            logger.warning("unpatch: a module that fully_shard has wrapped keeps its class")
            continue
        stock: Any = own.__dict__["_peftfast_stock"]
        swap_class(module, stock)


def report(model: nn.Module) -> tuple[MLPReport, ...]:
    rows = []
    for name, module, stock, form in _candidates(model):
        own = _own_kind(module)
        members = _members(module, form)
        assert members is not None
        reason = "forward is overridden on the module itself" if overridden(module) else ""
        if own is None and not reason:
            if isinstance(module, FSDP):
                reason = "wrapped by fully_shard before patching: patch first"
            elif gated_class(stock) is None:
                reason = "its class does what another class must not inherit"
            elif all(map(_why_not_swapped, members[:3])):
                reason = "it holds no LoRA layer that has a fused form"
        reason = reason or why_not(module, stock, form)
        alone = ""
        if not reason and own is not None:
            alone = why_product_alone(members[2])
            device = next((p.device for p in members[2].parameters()), torch.device("cpu"))
            if _backend_of(device, requested_backend()) == "reference":
                reason = f"no fused product on {device}"
        rows.append(
            MLPReport(
                name=name,
                module=stock.__name__,
                form=str(form),
                activation=_activation(form, members[3]),
                patched=own is not None,
                reason=reason,
                kept="" if reason or not alone else alone,
            )
        )
    return tuple(rows)
