"""Whether calling a module is more than its class's forward."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether the module has a hook, or a ``forward`` of its own, that a fused call which passes it over would not run."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
