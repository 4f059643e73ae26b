"""A layer whose whole weight is computed from what is trained."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .factored import FactoredLinear


class ComposedLinear(FactoredLinear):
    """y = x W'ᵀ + b. A method overrides :meth:`composed`; the product is torch's own, in x's dtype or autocast's."""

    def composed(self) -> Tensor:
        """W' ``[N, K]`` in the adapter's dtype, with its graph."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            out: Tensor = self.base_layer(input)
            return out
        bias = self.bias
        return functional.linear(input, self.composed().to(input.dtype), None if bias is None else bias.to(input.dtype))

    def merged_weight(self) -> Tensor:
        return self.composed()
