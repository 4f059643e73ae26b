"""What forwards have shown of a model's groups, as a checkpoint keeps it.

A process that goes on from a checkpoint would watch its first forwards anew and run their layers alone. That changes bits: a group adds
its gradients of x in another order, and on a GPU it draws the seeds of all its dropout masks at once, after which the generator stands
elsewhere. With what was known at the checkpoint the next step is the one of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .peft_groups import _BLOCK, Block

State = dict[str, dict[str, Any]]


def state_of(model: nn.Module) -> State:
    """Of each block that has been called, by its name: how many forwards were watched, whether a change is due, and its groups. As JSON
    can hold it; layers are named from their block on."""
    state: State = {}
    for name, module in model.named_modules():
        block: Block | None = module.__dict__.get(_BLOCK)
        if block is None or not (block.rounds or block.groups):
            continue
        names = {id(layer): own for own, layer in module.named_modules()}
        state[name] = {
            "rounds": block.rounds,
            "pending": block.pending,
            "groups": [
                {
                    "layers": [names[id(member)] for member in group.members],
                    "together": group.together,
                    "before": group.before,
                    "wanted": group.wanted,
                    "misses": group.misses,
                }
                for group in block.distinct()
                if all(id(member) in names for member in group.members)  # one may be in another place by now
            ],
        }
    return state


def restore(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let a patched model's blocks know what :func:`state_of` saved. A block whose layers are others by now, or that has recorded a
    graph, keeps what it knows itself; so does one that the state does not name."""
    for name, module in model.named_modules():
        block: Block | None = module.__dict__.get(_BLOCK)
        known = state.get(name)
        if block is None or known is None or block.recorded():
            continue
        layers = {own: layer for own, layer in module.named_modules() if id(layer) in block.children}
        if all(own in layers for group in known["groups"] for own in group["layers"]):
            _restore_block(block, layers, known)


def _restore_block(block: Block, layers: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    block.groups.clear()
    for saved in known["groups"]:
        members = [layers[own] for own in saved["layers"]]
        block.found(members)
        group = block.groups[id(members[0])]
        group.together, group.before = saved["together"], saved["before"]
        group.wanted, group.misses = saved["wanted"], saved["misses"]
    block.rounds, block.pending = known["rounds"], known["pending"]


__all__ = ["State", "restore", "state_of"]
