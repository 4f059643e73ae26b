"""The layer that most methods are: LoRA whose factors are computed from what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn.lora import moved_like
from ..nn.nf4 import NF4Linear, check_base, is_bitsandbytes_4bit


class Factors(NamedTuple):
    """y = x Wᵀ + b + scaling dropout(x) Aᵀ Bᵀ: a ``[R, K]``, b ``[N, R]``, any tensors, and the weight where it is not the base's."""

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    weight: Tensor | None = None


class FactoredLinear(nn.Module):
    """A linear layer with an adapter whose A and B are functions of the trained parameters. A method overrides :meth:`factors`.

    The frozen layer is ``base_layer``, an nn.Linear that shares the given one's storage or an NF4Linear; everything else in the module
    is the adapter's: its parameters, and as buffers what is fixed when it is made. What is trained is float32 beside a 16-bit or
    4-bit weight, else of the weight's dtype (:attr:`adapter_dtype`).

    Where A is frozen, let B be what is computed: a layer keeps x for the backward pass only where A needs a gradient.

    Args:
        linear: an nn.Linear, a bitsandbytes Linear4bit or an NF4Linear; not changed, but its parameters are frozen.
        dropout: probability that an element of x is dropped before A, in training.

    Raises:
        TypeError: another kind of layer.
    """

    base_layer: Any

    def __init__(self, linear: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear) or not (
            isinstance(linear, NF4Linear) or is_bitsandbytes_4bit(linear) or linear.weight.is_floating_point()
        ):
            raise TypeError(f"linear: expected an nn.Linear, a Linear4bit or an NF4Linear, got {type(linear).__name__}")
        check_base(linear)
        four_bit = is_bitsandbytes_4bit(linear) and not isinstance(linear, NF4Linear)
        self.base_layer = NF4Linear.from_linear(linear) if four_bit else linear
        self.in_features, self.out_features, self.dropout = linear.in_features, linear.out_features, dropout
        for parameter in self.base_layer.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(False)
        self._unmerged: Any = None

    def factors(self) -> Factors:
        """A, B, scaling and, where the method changes it, the weight."""
        raise NotImplementedError

    @property
    def four_bit(self) -> bool:
        return isinstance(self.base_layer, NF4Linear)

    @property
    def weight(self) -> Tensor:
        """The base layer's, packed if it is in 4 bits."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def adapter_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base_layer.weight.dtype
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def dense_weight(self) -> Tensor:
        """W ``[N, K]`` in the adapter's dtype, without a graph; of a 4-bit layer what its bits decode to."""
        base = self.base_layer
        dense = F.nf4_dequantize(base.nf4) if self.four_bit else base.weight.detach()
        return dense.to(self.adapter_dtype)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Zeros of the adapter's dtype beside the weight."""
        return nn.Parameter(torch.zeros(shape, dtype=self.adapter_dtype, device=self.weight.device))

    def replace_weight(self, weight: Tensor) -> None:
        """Give the layer a base weight of its own ``[N, K]``, of the old one's dtype or again in 4 bits; the given module's stays."""
        base = self.base_layer
        if self.four_bit:
            self.base_layer = NF4Linear(_requantised(base.nf4, weight), base.bias, base.compute_dtype)
        else:
            new = nn.Linear(self.in_features, self.out_features, base.bias is not None, device="meta")
            new.weight = nn.Parameter(weight.detach().to(base.weight.dtype).contiguous(), requires_grad=False)
            new.register_parameter("bias", base.bias)
            self.base_layer = new

    def forward(self, input: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged:
            return base(input)
        found = self.factors()
        weight = found.weight if found.weight is not None else base.nf4 if self.four_bit else base.weight
        return F.lora_linear(
            input,
            weight,
            found.a,
            found.b,
            scaling=found.scaling,
            bias=base.bias,
            dropout_p=self.dropout,
            training=self.training,
            compute_dtype=base.compute_dtype if self.four_bit else None,
        )

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter."""
        return self._unmerged is not None

    def merged_weight(self) -> Tensor:
        """W + scaling B A ``[N, K]`` in the adapter's dtype."""
        found = self.factors()
        weight = self.dense_weight() if found.weight is None else found.weight.to(self.adapter_dtype)
        return torch.addmm(weight, found.b.to(weight.dtype), found.a.to(weight.dtype), alpha=found.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the weight. The old weight is kept until :meth:`unmerge`. Does nothing when merged already."""
        if self.merged:
            return
        weight, base = self.merged_weight(), self.base_layer
        if self.four_bit:
            self._unmerged = base.nf4
            base._hold(_requantised(base.nf4, weight))
        else:
            # A parameter of its own: another module may hold the old one, as an embedding does that the head is tied to.
            self.__dict__["_unmerged"] = base.weight  # no parameter of this module
            base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out again: the weight is torch.equal to what it was. Does nothing when not merged."""
        if self._unmerged is None:
            return
        if self.four_bit:
            self.base_layer._hold(self._unmerged.to(self.weight.device))
        else:
            self.base_layer.weight = moved_like(self._unmerged, self.weight)
        self.__dict__["_unmerged"] = None

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What files hold of this layer: everything in it that is not the base's. Name -> tensor."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base_layer.")}

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of :meth:`adapter_tensors`, and then :meth:`after_load`.

        Raises:
            ValueError: other names or shapes; nothing is changed then.
        """
        own = self.adapter_tensors()
        if set(own) != set(tensors):
            raise ValueError(f"expected the tensors {sorted(own)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name}: expected the shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.after_load()

    def after_load(self) -> None:
        """Renew what is computed from the adapter's tensors once, such as a base weight without the initial adapter."""

    def extra_repr(self) -> str:
        own = {name: tuple(p.shape) for name, p in self.named_parameters() if not name.startswith("base_layer.")}
        return ", ".join(f"{name}={list(shape)}" for name, shape in own.items())


def _requantised(old: F.NF4Weight, weight: Tensor) -> F.NF4Weight:
    quantised = F.nf4_quantize(weight, block_size=old.block_size, double_quant=old.nested, quant_type=old.quant_type)
    return dataclasses.replace(quantised, dtype=old.dtype)
