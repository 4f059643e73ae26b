"""Patched layers of one block that get the same tensor (q, k, v; gate, up), served together: the first of them that is called computes
all, and the others take their result.

Nothing is known of the model. A block is a module that holds two patched layers or more; hooks on it tell when its forward begins and
ends. What its first forwards show, layers that got the identical tensor, is a group from then on. A result waits on the stack of the
thread that computed it, for a call with that very tensor in that very state, and is gone when it is taken, when anything differs, and
when the block's forward ends or raises.

A checkpointed forward and its recomputation must take the same way: autograd counts the tensors that they save, and both draw seeds. So
whether a block's groups run together changes only where its forward begins, outside of any backward pass, and when no graph of the
block's earlier calls may still be run backward: each is gone, or a backward pass that does not retain it has been through. A training
loop that keeps its last loss in a variable never lets go of the graph before its next forward.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import lora as configs
from ..functional.derivatives import transformed
from .patch_report import log_once
from .peft_call import VERDICT, fused_or_stock
from .peft_group_call import Shared, numbers_of
from .peft_guards import TRANSFORMED

_BLOCK = "_peftfast_block"  # in a block's __dict__: what is known of its groups
_ROUNDS = 4  # forwards of a block that are watched: the first may be of another kind, such as a cross-attention
_MOST = 4  # layers in a group: of more, too many results would wait at once
_MISSES = 3  # forwards in which a result was computed for nothing, after which a group runs alone for good

_local = threading.local()


class _Token:
    """Of one forward of a block: alive as long as a graph is that its calls recorded. ``open``: how many of its nodes no backward pass
    has been through that let go of what it read."""

    __slots__ = ("__weakref__", "open")

    def __init__(self) -> None:
        self.open = 0

    def ran(self, *_: Any) -> None:
        """A hook of such a node."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.open -= 1


def _nothing() -> None:
    return None


class Group:
    """Layers of a block that get the same tensor, in the order of their first calls."""

    def __init__(self, members: tuple[Any, ...]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self.index = {id(member): i for i, member in enumerate(members)}
        self.together = self.before = False
        self.wanted = True
        self.misses = 0
        self.shared = Shared(members)

    @property
    def members(self) -> tuple[Any, ...]:
        """Those that are still alive; where one is not, the block is about to forget the group."""
        return tuple([member for one in self._members if (member := one()) is not None])


class Block:
    """What is known of a block: its patched layers, and those of them that form groups. A copy or a pickle does not hold it.

    It keeps no layer alive: one that is replaced, as ``merge_and_unload`` does, is gone at once with all that it holds, and what is
    known here goes with it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        own = weakref.ref(self)

        def lost(key: int) -> Callable[[Any], None]:
            def forget(_: Any) -> None:
                block = own()
                if block is not None:
                    block.forget(key)

            return forget

        # An id may be used again, but not before the layer that had it is forgotten.
        self.children = {id(layer): weakref.ref(layer, lost(id(layer))) for layer in _own_layers(module)}
        self.groups: dict[int, Group] = {}
        self.rounds = 0
        self.pending = False
        self.switched_at = 0
        self.tokens: set[Any] = set()  # weak references

    def __reduce__(self) -> Any:
        return _nothing, ()

    def forget(self, key: int) -> None:
        """A layer is no more: nor are the groups, which hold its tensors, and with the last layer the hooks."""
        self.children.pop(key, None)
        self.groups.clear()
        module = self._module()
        if not self.children and module is not None and module.__dict__.get(_BLOCK) is self:
            _release(module)

    def learns(self, layer: Any) -> bool:
        return self.rounds < _ROUNDS and id(layer) in self.children and id(layer) not in self.groups

    def recorded(self) -> bool:
        """Whether what an earlier forward recorded may be computed anew."""
        for reference in list(self.tokens):  # another thread may add its own meanwhile
            token = reference()
            if token is None or not token.open:
                self.tokens.discard(reference)
        return bool(self.tokens)

    def begin(self) -> None:
        """A forward of the block begins: where a change is due and nothing recorded may be computed anew, it is made."""
        recorded = self.recorded()
        if self.pending and torch._C._current_graph_task_id() == -1 and not recorded:
            for group in self.distinct():
                group.before, group.together = group.together, group.wanted
            self.pending = False
            # Without gradients this may be the forward of a re-entrant checkpoint, whose node is the last that was made.
            self.switched_at = torch._C._autograd._get_sequence_nr() - (not torch.is_grad_enabled())

    def distinct(self) -> list[Group]:
        groups = list(self.groups.values())  # another thread may find one meanwhile
        return list({id(group): group for group in groups}.values())

    def together(self, group: Group, delicate: bool) -> bool:
        """Whether a group runs together in this call. ``delicate``: a call that records a graph or draws seeds; others are free."""
        if not delicate:
            return group.wanted
        if group.before is not group.together and torch._C._current_graph_task_id() != -1:
            # In a backward pass: a recomputation. A re-entrant one left no graph; its node is older than the change, or is not.
            node: Any = torch._C._current_autograd_node()
            if node is not None and node._sequence_nr() < self.switched_at:
                return group.before
        return group.together

    def found(self, members: list[Any]) -> None:
        group = Group(tuple(members))
        for member in members:
            self.groups[id(member)] = group
        self.pending = True

    def missed(self, group: Group) -> None:
        group.misses += 1
        if group.misses >= _MISSES and group.wanted:
            group.wanted = False
            self.pending = True


class _Entry:
    """The results that wait for the siblings of one call."""

    __slots__ = ("key", "missed", "results", "version", "x")

    def __init__(self, x: Tensor, results: dict[int, Any]) -> None:
        self.x, self.version, self.key = weakref.ref(x), x._version, _key_of(x)
        self.results = results
        self.missed = False

    def take(self, index: int, layer: Any, x: Tensor) -> Tensor | None:
        """The result that waits for a layer; None where there is none (it has been taken, or nothing was computed) or where anything
        is not as it was."""
        waiting = self.results.pop(index, None)
        if waiting is None:
            return None
        y, verdict, numbers = waiting
        if (
            x._version == self.version
            and layer.__dict__.get(VERDICT) is verdict
            and _key_of(x) == self.key
            and verdict.holds(layer)
            and numbers_of(layer, verdict) == numbers
        ):
            return y
        self.missed = True
        return None


def _key_of(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast, torch.is_inference_mode_enabled(), x.requires_grad, _stream_of(x)


def _stream_of(x: Tensor) -> int:
    """The stream that a call with x is for. A result that another computed may not be there yet, and nobody waits for it, who asked for
    none there."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def _way() -> tuple[Any, ...]:
    """What a checkpoint changes around what it runs: the grad mode, or the hooks of saved tensors."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Scope:
    """One forward of a block, on one thread."""

    __slots__ = ("block", "entries", "seen", "token", "way")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.token: _Token | None = None
        self.way = _way()
        self.entries: dict[Group, _Entry] = {}
        self.seen: list[tuple[Any, int, list[Any]]] = []  # x, its version, the layers that got it

    def serve(self, group: Group, layer: Any, x: Tensor) -> Tensor | None:
        """A grouped layer's result, or None where it is to run alone."""
        if x.is_inference():
            return None  # it has no version by which a change would show
        if _way() != self.way:
            return (
                None  # in a checkpoint of a part of the block, whose recomputation is outside of a forward of the block
            )
        index = group.index[id(layer)]
        entry = self.entries.get(group)
        if entry is not None and entry.x() is x:
            return entry.take(index, layer, x)
        if entry is not None and entry.results:
            entry.results.clear()
            self.block.missed(group)
        if not (group.together or group.wanted or group.before):
            return None
        found = group.shared.verdicts(x)
        ours: dict[int, Any] = {}
        y = None
        if found is not None:
            members = group.members
            if len(members) != len(found):
                return None
            numbers = [numbers_of(member, verdict) for member, verdict in zip(members, found, strict=True)]
            dropout = any([any(own[1]) for own in numbers])
            ranks = tuple([a.shape[0] for verdict in found for _, a, *_ in verdict.adapters])
            pays = configs.group_pays(x.device.type, x.shape[:-1].numel(), dropout, ranks)
            if pays and self.block.together(group, torch.is_grad_enabled() or dropout):
                ys = group.shared.run(x, found, numbers)
                y = ys[index]
                ours = {i: (ys[i], found[i], numbers[i]) for i in range(len(ys)) if i != index}
                self.mark(y)
        self.entries[group] = _Entry(x, ours)
        return y

    def mark(self, y: Tensor) -> None:
        """Let y's graph keep the token of this forward, and say when a backward pass has been through."""
        if y.requires_grad and y.grad_fn is not None:
            if self.token is None:
                self.token = _Token()
            self.token.open += 1
            self.block.tokens.add(weakref.ref(self.token))
            metadata: Any = y.grad_fn.metadata  # a property, which torch's stub calls a method
            metadata["peftfast"] = self.token
            if self.block.rounds < _ROUNDS or self.block.pending:  # a change is near
                y.grad_fn.register_hook(self.token.ran)

    def note(self, layer: Any, x: Tensor, y: Tensor) -> None:
        """A layer ran alone."""
        verdict = layer.__dict__.get(VERDICT)
        if verdict is None or x.is_inference():
            return
        self.mark(y)
        if not self.block.learns(layer) or not verdict.holds(layer):
            return
        for known, version, layers in self.seen:
            if known() is x and version == x._version:
                layers.append(layer)
                return
        self.seen.append((weakref.ref(x), x._version, [layer]))

    def close(self, failed: bool) -> None:
        """The forward has ended."""
        block = self.block
        for group, entry in self.entries.items():
            if (entry.results or entry.missed) and not failed:
                block.missed(group)
        self.entries.clear()
        if failed:
            return
        if self.seen:
            calls = [id(layer) for _, _, layers in self.seen for layer in layers]
            for _, _, layers in self.seen:
                # A layer that was called more than once is left alone.
                if 2 <= len(layers) <= _MOST and all(calls.count(id(layer)) == 1 for layer in layers):
                    block.found(layers)
            # One with the adapters disabled or merged, or in inference mode, has shown nothing, and is not counted.
            block.rounds = min(block.rounds + 1, _ROUNDS)


def forward(layer: Any, stock: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A patched layer's forward; ``stock`` is PEFT's."""
    if torch.compiler.is_compiling():
        return fused_or_stock(layer, stock, x, args, kwargs)
    if transformed():
        log_once(TRANSFORMED)
        return stock(x, *args, **kwargs)  # type: ignore[no-any-return]
    if args or kwargs:
        return fused_or_stock(layer, stock, x, args, kwargs)
    scopes = getattr(_local, "scopes", None)
    if not scopes or type(x) is not Tensor:
        return fused_or_stock(layer, stock, x, args, kwargs)
    scope = scopes[-1]
    group = scope.block.groups.get(id(layer))
    if group is None:
        y = fused_or_stock(layer, stock, x, args, kwargs)
        if scope.block.learns(layer):
            scope.note(layer, x, y)
        return y
    served = scope.serve(group, layer, x)
    if served is not None:
        return served
    y = fused_or_stock(layer, stock, x, args, kwargs)
    scope.note(layer, x, y)
    return y


def _watch(module: Any) -> Block:
    block = module.__dict__[_BLOCK] = Block(module)
    return block


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    block = module.__dict__.get(_BLOCK)
    if block is None:  # a copy
        block = _watch(module)
    scopes = _local.__dict__.setdefault("scopes", [])
    for i, scope in enumerate(scopes):
        if scope.block is block:
            # One that an interrupt left behind, or a block that calls itself: its results are given up.
            _close(scopes, i, True)
            break
    block.begin()
    scopes.append(_Scope(block))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    scopes: list[_Scope] = getattr(_local, "scopes", [])
    block = module.__dict__.get(_BLOCK)
    for i in range(len(scopes) - 1, -1, -1):
        if scopes[i].block is block:
            # torch calls a hook of this kind with None where the forward raised.
            _close(scopes, i, output is None and sys.exc_info()[0] is not None)
            return


def _close(scopes: list[_Scope], first: int, failed: bool) -> None:
    while len(scopes) > first:
        scopes.pop().close(failed or len(scopes) > first)


def _is_patched(module: nn.Module) -> bool:
    return any(kind.__dict__.get("_peftfast_grouped", False) for kind in type(module).__mro__)


def _own_layers(module: nn.Module) -> list[Any]:
    """The patched layers that a module holds itself, or in containers that have no forward."""
    layers: list[Any] = []
    for child in module.children():
        if _is_patched(child):
            layers.append(child)
        elif type(child) in (nn.ModuleList, nn.ModuleDict):
            layers += _own_layers(child)
    return layers


def install(model: nn.Module) -> None:
    """Watch every block of a patched model. A block that is watched already keeps what is known of it while its layers are the same."""
    for module in model.modules():
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            continue
        layers = _own_layers(module)
        block = module.__dict__.get(_BLOCK)
        if block is not None and set(block.children) == {id(layer) for layer in layers}:
            continue
        _release(module)
        if len(layers) >= 2:
            _watch(module)
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


def remove(model: nn.Module) -> None:
    for module in model.modules():
        _release(module)


def _release(module: nn.Module) -> None:
    module.__dict__.pop(_BLOCK, None)
    for hooks, own in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def groups_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """The layers of every group that runs together, as far as forwards have shown them."""
    blocks = [module.__dict__.get(_BLOCK) for module in model.modules()]
    found = itertools.chain.from_iterable(block.distinct() for block in blocks if block is not None)
    return [group.members for group in found if group.wanted]


def holds_results() -> int:
    """How many results wait on this thread: none outside of a forward."""
    return sum(len(entry.results) for scope in getattr(_local, "scopes", ()) for entry in scope.entries.values())


__all__ = ["Block", "Group", "forward", "groups_of", "holds_results", "install", "remove"]
