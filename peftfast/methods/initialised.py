"""LoRA layers that begin at factors of their own: the base weight without them, or a 4-bit weight beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn import LoRALinear, LoRANF4Linear, NF4Linear
from ..nn.nf4 import unpack_state
from .adapting import Unsuitable, is_four_bit
from .lora import LoRAOptions


class ResidualLoRALinear(LoRALinear):
    """A LoRALinear on W - scaling B0 A0, beginning at A0 and B0, which it keeps as ``initial_A`` and ``initial_B``: its files are then
    an adapter of W itself, of rank 2r. The given layer's weight stays as it was."""

    initial_A: Tensor
    initial_B: Tensor

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Start at ``a`` ``[r, K]`` and ``b`` ``[N, r]``."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.register_buffer("initial_A", self.lora_A.detach().clone())
        self.register_buffer("initial_B", self.lora_B.detach().clone())
        self._take_out()

    @torch.no_grad()
    def _take_out(self) -> None:
        dense = self._dense_weight().to(self.lora_A.dtype)
        residual = torch.addmm(dense, self.initial_B, self.initial_A, alpha=-self.scaling)
        self.weight = nn.Parameter(residual.to(self.weight.dtype), requires_grad=False)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of all but the weight and the bias."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in ("weight", "bias")}

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of :meth:`adapter_tensors`, on a layer made from W."""
        own = self.adapter_tensors()
        if set(own) != set(tensors) or any(own[name].shape != tensors[name].shape for name in own):
            raise ValueError(f"expected {_shapes(own)}, got {_shapes(tensors)}")
        back = torch.addmm(self.weight.to(self.lora_A.dtype), self.initial_B, self.initial_A, alpha=self.scaling)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.weight = nn.Parameter(back.to(self.weight.dtype), requires_grad=False)
        self._take_out()


class QuantisedLoRALinear(LoRANF4Linear):
    """A LoRANF4Linear whose 4-bit weight is the method's own: its files hold that weight too."""

    own_files = True

    def adapter_tensors(self) -> dict[str, Tensor]:
        """A, B and the 4-bit weight with its statistics."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != "bias"}

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of :meth:`adapter_tensors`, which may be of other block sizes than the layer's."""
        state = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
        factors = {name: t for name, t in tensors.items() if name in ("lora_A", "lora_B")}
        expected = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if "weight" not in tensors or _shapes(factors) != _shapes(expected):
            raise ValueError(f"expected a 4-bit weight and {_shapes(expected)}, got {_shapes(tensors)}")
        nf4 = unpack_state(tensors["weight"], state)
        if tuple(nf4.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"expected a 4-bit weight of {(self.out_features, self.in_features)}, got {tuple(nf4.shape)}"
            )
        self._hold(nf4.to(self.weight.device))
        for name, tensor in factors.items():
            expected[name].copy_(tensor)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}


def given(options: Any) -> dict[str, Any]:
    """LoRALinear's own options out of a method's."""
    known = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in known}


def scaling_of(options: Any) -> float:
    """lora_alpha / r, or over its root with use_rslora."""
    root = options.r**0.5 if getattr(options, "use_rslora", False) else options.r
    return float(options.lora_alpha / root)


def check_rank(linear: nn.Linear, rank: int) -> None:
    """Raises Unsuitable where the layer has no such rank."""
    if rank > min(linear.in_features, linear.out_features):
        raise Unsuitable(f"rank {rank} is more than its smaller side {min(linear.in_features, linear.out_features)}")


def dense_weight(linear: Any) -> Tensor:
    """The weight ``[N, K]`` of a dense or 4-bit layer: float64 stays, everything else comes as float32."""
    dense = F.nf4_dequantize(NF4Linear.from_linear(linear).nf4) if is_four_bit(linear) else linear.weight.detach()
    return dense if dense.dtype == torch.float64 else dense.float()


def residual_lora(linear: Any, options: LoRAOptions, a: Tensor, b: Tensor) -> LoRALinear:
    """LoRA on W - scaling b a, beginning at a and b. A 4-bit layer's residual is quantised again, with the settings it had."""
    if not is_four_bit(linear):
        layer: Any = ResidualLoRALinear.from_linear(linear, **given(options))
        layer.begin(a, b)
        return layer
    old = NF4Linear.from_linear(linear)
    residual = dense_weight(old) - scaling_of(options) * (b @ a).float()
    return quantised_lora(linear, residual, options, a, b, old.block_size, old.nf4.nested, old.quant_type, old)


def placeholder(linear: Any, options: LoRAOptions) -> LoRALinear:
    """A layer whose tensors come from files: of a method that would read data to make them."""
    if is_four_bit(linear):
        layer: Any = LoRALinear.from_linear(linear, **given(options))
        layer.__class__ = QuantisedLoRALinear
        return layer
    layer = ResidualLoRALinear.from_linear(linear, **given(options))
    layer.begin(torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B))
    return layer


@torch.no_grad()
def quantised_lora(
    linear: Any,
    weight: Tensor,
    options: Any,
    a: Tensor,
    b: Tensor,
    block_size: int,
    double_quant: bool,
    quant_type: str = "nf4",
    like: NF4Linear | None = None,
    own: bool = True,
) -> LoRALinear:
    """LoRA, beginning at a and b, on ``weight`` in 4 bits. ``own``: whether files are to hold that weight, since it is not simply the
    base's own in 4 bits."""
    nf4 = F.nf4_quantize(weight.float(), block_size=block_size, double_quant=double_quant, quant_type=quant_type)
    dtype = like.weight_dtype if like is not None else linear.weight.dtype
    base = NF4Linear(dataclasses.replace(nf4, dtype=dtype), linear.bias, None if like is None else like.compute_dtype)
    layer = LoRALinear.from_linear(base, **given(options))
    if own:
        layer.__class__ = QuantisedLoRALinear  # LoRANF4Linear with files of its own
    else:  # its files are PEFT's and say of which 4 bits the adapter makes up for what they lost
        layer.__dict__["started_from"] = {
            "quant_type": quant_type,
            "block_size": block_size,
            "double_quant": double_quant,
        }
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    return layer
