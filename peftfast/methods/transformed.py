"""Layers that change the weight or the features by more than an added low-rank product, and those that no weight can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..nn.lora import moved_like
from .factored import FactoredLinear


class TransformedLinear(FactoredLinear):
    """y = x W'ᵀ + b' with W' and b' computed from the base's and the trained parameters. A method overrides :meth:`transformed`."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        self._plain_bias: Any = None

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        """W' ``[N, K]`` and b' ``[N]`` in the adapter's dtype, with a graph."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """b in the adapter's dtype, without a graph."""
        return None if self.bias is None else self.bias.detach().to(self.adapter_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(input)
        weight, bias = self.transformed()
        return functional.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    def merged_weight(self) -> Tensor:
        return self.transformed()[0]

    @torch.no_grad()
    def merge(self) -> None:
        if self.merged:
            return
        base, bias = self.base_layer, self.transformed()[1]
        super().merge()
        self.__dict__["_plain_bias"] = base.bias  # no parameter of this module
        if bias is not None:
            plain = base.weight_dtype if self.four_bit else base.weight.dtype
            dtype = plain if base.bias is None else base.bias.dtype
            base.bias = nn.Parameter(bias.to(dtype), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            super().unmerge()
            base, plain = self.base_layer, self._plain_bias
            base.bias = plain if plain is None or base.bias is None else moved_like(plain, base.bias)
            self.__dict__["_plain_bias"] = None


class Unmergeable:
    """Mixed in before a layer that comes down to no weight: ``handle.merge()`` says so."""

    @property
    def merge(self) -> Any:
        raise AttributeError("merge")

    @property
    def unmerge(self) -> Any:
        raise AttributeError("unmerge")
