"""What methods share whose support is trained in part: values that an optimiser's momentum must not move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sparse import SparseRuntime


class FreezingRuntime(SparseRuntime):
    """Puts the values of a layer that are marked frozen back after every step.

    Attributes:
        frozen: name of layer -> bool ``[S]``, in the order of its values. kept: what these values are.
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.frozen: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def freeze(self, name: str, mask: Tensor) -> None:
        """Mark values of a layer; they keep what they are now."""
        self.frozen[name] = mask
        self.kept[name] = self.layers[name].delta_values.detach()[mask].clone()

    @torch.no_grad()
    def restore(self) -> None:
        for name, mask in self.frozen.items():
            self.layers[name].delta_values[mask] = self.kept[name]

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": dict(self.frozen), "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in state["frozen"]:
            device = self.layers[name].delta_values.device
            self.frozen[name], self.kept[name] = state["frozen"][name].to(device), state["kept"][name].to(device)
