"""Which parameters can be moved in flight is found out, not assumed: the closure runs once, unperturbed, under a watch that sees every
operator and which module's forward it runs in. A parameter that is read only inside the forward of a module that holds it can be moved
there; one that is read elsewhere (a tied head called by F.linear, attention that takes its projection's weight) is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that look at a tensor without reading its values.
_ASIDE = {"detach", "alias", "sym_size", "sym_stride", "sym_numel", "is_same_size", "size", "stride"}

WATCHES_ONLY = (
    "_peftfast_watches_only"  # on a hook of all modules that changes nothing: layers run under it as they do without
)


@dataclass(frozen=True)
class Held:
    """A parameter in the hands of a module: under which name, and which of the optimiser's parameters it is."""

    name: str
    index: int


@dataclass
class Layout:
    """How each of the optimiser's parameters is perturbed."""

    modules: dict[nn.Module, list[Held]]
    copied: list[int]
    random: bool  # the closure draws random numbers
    read_outside: set[int]  # parameters that were seen read where no holder's forward ran
    known_calls: set[frozenset[int]] = field(default_factory=set)


class _Watch(TorchDispatchMode):
    def __init__(self, storages: dict[int, int], stack: list[nn.Module]) -> None:
        super().__init__()
        self.storages, self.stack = storages, stack
        self.inside: dict[int, set[nn.Module]] = {}
        self.outside: set[int] = set()
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        if func.overloadpacket.__name__ not in _ASIDE:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.device.type != "meta":
                    index = self.storages.get(_address(value))
                    if index is not None:
                        self._read(index)
        return func(*args, **kwargs)

    def _read(self, index: int) -> None:
        module = self.stack[-1] if self.stack else None
        if module is not None and any(
            p is not None and self.storages.get(_address(p)) == index for p in module._parameters.values()
        ):
            self.inside.setdefault(index, set()).add(module)
        else:
            self.outside.add(index)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without storage is none of ours
        return 0


def discover(run: Callable[[], Any], parameters: Sequence[Tensor]) -> Layout:
    """Run the closure once under the watch. Parameters that it does not read are copied: nobody has shown who holds them."""
    storages: dict[int, int] = {}
    shared: set[int] = set()
    for index, parameter in enumerate(parameters):
        address = _address(parameter)
        if address and address in storages:
            shared.update((index, storages[address]))
        storages[address] = index
    storages.pop(0, None)
    stack: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        while stack and stack.pop() is not module:
            pass

    for hook in (enter, leave):
        setattr(hook, WATCHES_ONLY, True)
    before, after = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    watch = _Watch(storages, stack)
    try:
        with watch:
            run()
    finally:
        before.remove()
        after.remove()
    modules: dict[nn.Module, list[Held]] = {}
    copied = []
    for index, parameter in enumerate(parameters):
        owners = watch.inside.get(index, set())
        held = [(owner, name) for owner in owners for name, p in owner._parameters.items() if p is parameter]
        serves = (
            owners
            and index not in watch.outside
            and index not in shared
            and parameter.is_contiguous()
            and len({owner for owner, _ in held}) == len(owners)
            and all(_swappable(owner) for owner in owners)
        )
        if serves:
            for owner, name in held:
                modules.setdefault(owner, []).append(Held(name, index))
        else:
            copied.append(index)
    # Every module here was called: that is the first set of calls that is known to be served.
    return Layout(modules, copied, watch.random, watch.outside, {frozenset(id(module) for module in modules)})


def _swappable(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not isinstance(module, torch.jit.ScriptModule)
