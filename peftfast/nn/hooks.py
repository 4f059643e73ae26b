"""What calling a module does beside its class's forward: hooks, and a ``forward`` that was set on the object."""

from __future__ import annotations

import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# The dictionaries of a module's hooks, which the handles that registering them returned refer to.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooked(module: nn.Module) -> bool:
    """Whether the module has a hook, or a ``forward`` of its own, that a fused call which passes it over would not run.

    A hook of accelerate's that brings the module's arguments to the device of its weight and does no more, as a ``device_map`` of
    several devices sets on every layer, is none: the fused call takes arguments that lie there. Nor is the ``forward`` by which
    ms-swift does the same on every ``lora_A`` and ``lora_B``.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not _does_nothing(module))
    )


def overridden(module: nn.Module) -> bool:
    """Whether a ``forward`` that is set on the object does not end in the class's: neither that one, bound, as accelerate leaves it
    when its hooks are removed, nor accelerate's, which runs a hook around it."""
    return "forward" in module.__dict__ and not _is_bound(module, "forward") and _hook_around(module) is None


def swap_class(module: Any, kind: Any) -> None:
    """Give an object another class. What accelerate has bound of the old one's forward is bound of the new one's."""
    kept = [name for name in ("forward", "_old_forward") if _is_bound(module, name)]
    module.__class__ = kind
    for name in kept:
        module.__dict__[name] = types.MethodType(kind.forward, module)


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one at ``path``, whose hooks see the calls of the new one from then on: torch's, whose handles
    still remove them, and accelerate's."""
    before = model.get_submodule(path)
    # A layer that keeps the one before may call it, and a hook is to see a call once.
    kept_inside = any(module is before for module in layer.modules())
    fresh = not any(layer.__dict__[name] for name in _HOOKS)
    for name in _HOOKS:
        if fresh:
            layer.__dict__[name] = before.__dict__[name]
        else:  # whose own handles go on to remove its hooks, and those of the layer before no longer do
            layer.__dict__[name].update(before.__dict__[name])
        if kept_inside:
            before.__dict__[name] = OrderedDict()
    if layer._is_full_backward_hook is None:
        layer._is_full_backward_hook = before._is_full_backward_hook
    hook = _hook_around(before)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    model.set_submodule(path, layer)


def why_own_forward(module: nn.Module) -> str:
    """Why another layer on the module's weight would not compute what a call of the object does; an empty string where it would."""
    if overridden(module):
        return "forward is overridden on the layer itself"
    hook = _hook_around(module)
    return "" if hook is None or _moves_arguments(hook) else f"accelerate's {type(hook).__name__} is on it"


def _is_bound(module: nn.Module, name: str) -> bool:
    """Whether an attribute of the object is its class's forward, bound."""
    method = module.__dict__.get(name)
    return (
        isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is type(module).forward
    )


def _hook_around(module: nn.Module) -> Any:
    """accelerate's hook, where the object's forward runs it around the class's; else None."""
    forward, hook = module.__dict__.get("forward"), module.__dict__.get("_hf_hook")
    if hook is None or getattr(getattr(forward, "func", None), "__module__", "") != "accelerate.hooks":
        return None
    whose = forward.args  # type: ignore[union-attr]
    return hook if len(whose) == 1 and whose[0] is module and _is_bound(module, "_old_forward") else None


def _moves_arguments(hook: Any) -> bool:
    """Whether a hook of accelerate's does no more than bring a call's arguments to a device, and its result back."""
    kind = type(hook)
    known = kind.__name__ == "AlignDevicesHook" and kind.__module__ == "accelerate.hooks"
    return known and not hook.offload and not hook.no_grad


def _is_swifts(module: nn.Module) -> bool:
    """Whether the object's forward is ms-swift's, which brings x to the weight's device and calls the class's."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    kind: Any = forward.__func__
    known = kind.__name__ == "keep_device_forward" and kind.__module__.startswith("swift.")
    return known and _is_bound(module, "forward_origin")


def _does_nothing(module: nn.Module) -> bool:
    """Whether the object's forward is its class's for a call whose arguments lie beside its weight."""
    if _is_bound(module, "forward") or _is_swifts(module):
        return True
    hook, weight = _hook_around(module), getattr(module, "weight", None)  # of PEFT's layers the base's
    if not isinstance(weight, Tensor) or hook is None or not _moves_arguments(hook):
        return False
    where = hook.execution_device
    if isinstance(where, int):
        return weight.get_device() == where
    return where is None or torch.device(where) == weight.device
