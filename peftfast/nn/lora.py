"""Linear layers with a LoRA adapter, for models adapted without PEFT."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..reference.lora import weight_norm
from .nf4 import NF4Linear, check_base, is_bitsandbytes_4bit
from .options import at_least_one, finite, one_of, probability


class LoRALinear(nn.Linear):
    """An nn.Linear with a LoRA adapter (arXiv 2106.09685): y = x Wᵀ + b + scaling dropout(x) Aᵀ Bᵀ.

    ``weight`` and ``bias`` are frozen; ``lora_A`` ``[r, K]``, ``lora_B`` ``[N, r]`` and, if asked for, ``lora_bias`` and
    ``lora_magnitude_vector`` ``[N]`` are trained. They are float32 beside a 16-bit or 4-bit weight, as PEFT keeps them, else of
    the weight's dtype.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        r: rank, at least 1.
        lora_alpha: finite; scaling is lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora`` (arXiv 2312.03732).
        lora_dropout: probability in [0, 1).
        lora_bias: a trained bias on B's side, scaled like B.
        use_dora: DoRA (arXiv 2402.09353).
        init_lora_weights: True: A Kaiming-uniform, B zero; "gaussian": A normal with deviation 1 / r, B zero; False: both
            Kaiming-uniform.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        lora_bias: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_options(r, lora_alpha, lora_dropout, init_lora_weights)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._adapt(r, lora_alpha, lora_dropout, lora_bias, use_rslora, use_dora, init_lora_weights)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        lora_bias: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> LoRALinear:
        """An adapted layer on the storage of ``linear``: an nn.Linear, a bitsandbytes Linear4bit or an :class:`NF4Linear` (the last
        two give a :class:`LoRANF4Linear`). The shared weight and bias are frozen; hooks stay with ``linear``. Until it is trained, the
        layer's output is torch.equal to that of an nn.Linear.

        Raises:
            TypeError: ``linear`` is none of these, or computes more than they do, as where its ``forward`` is overridden.
            ValueError: an option out of range, or a 4-bit weight not quantised yet.
        """
        _check_options(r, lora_alpha, lora_dropout, init_lora_weights)
        layer: LoRALinear
        check_base(linear)
        if isinstance(linear, NF4Linear) or (isinstance(linear, nn.Linear) and is_bitsandbytes_4bit(linear)):
            base = NF4Linear.from_linear(linear)
            layer = LoRANF4Linear.__new__(LoRANF4Linear)
            NF4Linear.__init__(layer, base.nf4, base.bias, base.compute_dtype)
        elif isinstance(linear, nn.Linear) and linear.weight.is_floating_point():
            layer = cls.__new__(cls)
            nn.Module.__init__(layer)
            layer.in_features, layer.out_features = linear.in_features, linear.out_features
            layer.weight = linear.weight
            layer.register_parameter("bias", linear.bias)
        else:
            raise TypeError(
                f"linear: expected an nn.Linear, a Linear4bit or an NF4Linear, got {type(linear).__name__}"
                + (f" with a weight of {linear.weight.dtype}" if isinstance(linear, nn.Linear) else "")
            )
        layer.train(linear.training)
        layer._adapt(r, lora_alpha, lora_dropout, lora_bias, use_rslora, use_dora, init_lora_weights)
        return layer

    def _adapt(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        lora_bias: bool,
        use_rslora: bool,
        use_dora: bool,
        init_lora_weights: bool | str,
    ) -> None:
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        wide = self.weight.dtype in (torch.float32, torch.float64)
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype if wide else torch.float32}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **factory))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **factory))
        self.lora_bias = nn.Parameter(torch.zeros(self.out_features, **factory)) if lora_bias else None
        self.reset_adapter(init_lora_weights)
        self.lora_magnitude_vector = None
        if use_dora:
            with torch.no_grad():
                dense = self._dense_weight().to(factory["dtype"])
                self.lora_magnitude_vector = nn.Parameter(weight_norm(dense, self.lora_A, self.lora_B, self.scaling))
        self._unmerged: Any = None

    def reset_adapter(self, init_lora_weights: bool | str = True) -> None:
        """Draw A and B anew, see the class."""
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def _base(self) -> Tensor | F.NF4Weight:
        return self.weight

    def _dense_weight(self) -> Tensor:
        return self.weight.detach()

    def _compute_dtype(self) -> torch.dtype | None:
        return None

    def _base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return self._base_forward(input)
        return F.lora_linear(
            input,
            self._base(),
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            bias=self.bias,
            lora_bias=self.lora_bias,
            magnitude=self.lora_magnitude_vector,
            dropout_p=self.lora_dropout,
            training=self.training,
            compute_dtype=self._compute_dtype(),
        )

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter."""
        return self._unmerged is not None

    def _check_mergeable(self) -> None:
        if self.lora_bias is not None and self.bias is None:
            raise RuntimeError("merge: lora_bias needs a base bias to be merged into, and this layer has none")

    def _merged_weight(self) -> Tensor:
        """W + scaling B A, with DoRA's row gains, in the adapter's dtype."""
        dense = self._dense_weight().to(self.lora_A.dtype)
        merged = dense + self.scaling * (self.lora_B @ self.lora_A)
        if self.lora_magnitude_vector is not None:
            norm = weight_norm(dense, self.lora_A, self.lora_B, self.scaling)
            merged = merged * (self.lora_magnitude_vector / norm)[:, None]
        return merged

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the weight. A copy of the weight is kept, so that :meth:`unmerge` restores its bits: N K elements
        until then. Does nothing when merged already."""
        if self.merged:
            return
        self._check_mergeable()
        weight, bias = self._merged_weight(), self._merged_bias()
        self._unmerged = (self._exchange(weight), self.bias)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def _merged_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return None
        added = self.lora_bias * self.scaling
        if self.lora_magnitude_vector is not None:
            dense = self._dense_weight().to(self.lora_A.dtype)
            added = added * self.lora_magnitude_vector / weight_norm(dense, self.lora_A, self.lora_B, self.scaling)
        return added if self.bias is None else (self.bias + added).to(self.bias.dtype)

    def _exchange(self, weight: Tensor) -> Any:
        """Store a new weight; what :meth:`_restore` needs of the old one is returned."""
        # A parameter of its own: another module may hold the old one, as an embedding does that the head is tied to.
        before = self.weight
        self.weight = nn.Parameter(weight.to(before.dtype), requires_grad=False)
        return before

    def _restore(self, before: Any) -> None:
        self.weight = moved_like(before, self.weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out again: weight and bias are torch.equal to what they were, where the layer has been moved or cast
        meanwhile to what that would have made of them. Does nothing when not merged."""
        if self._unmerged is None:
            return
        before, bias = self._unmerged
        self._restore(before)
        if bias is not None:
            self.bias = moved_like(bias, self.bias)
        self._unmerged = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


class LoRANF4Linear(LoRALinear, NF4Linear):  # type: ignore[misc]  # from_linear is LoRALinear's
    """A :class:`LoRALinear` on a 4-bit weight (QLoRA, arXiv 2305.14314), made by :meth:`LoRALinear.from_linear`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("LoRANF4Linear is made by LoRALinear.from_linear, from a Linear4bit or an NF4Linear")

    def _base(self) -> F.NF4Weight:
        return self.nf4

    def _dense_weight(self) -> Tensor:
        return F.nf4_dequantize(self.nf4)

    def _compute_dtype(self) -> torch.dtype | None:
        return self.compute_dtype

    def _base_forward(self, x: Tensor) -> Tensor:
        return NF4Linear.forward(self, x)

    def _merged_weight(self) -> Any:
        """The merged weight in 4 bits, with the bytes that PEFT's own merge gives; DoRA's, dense, is quantised by :meth:`_exchange`."""
        if self.lora_magnitude_vector is not None:
            return super()._merged_weight()
        return F.nf4_merge(self.nf4, self.lora_A, self.lora_B, self.scaling)

    def _exchange(self, weight: Tensor | F.NF4Weight) -> F.NF4Weight:
        before = self.nf4
        if isinstance(weight, Tensor):
            quantised = F.nf4_quantize(
                weight,
                block_size=before.block_size,
                double_quant=before.nested,
                quant_type=before.quant_type,
            )
            weight = dataclasses.replace(quantised, dtype=before.dtype)
        self._hold(weight)
        return before

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense nn.Linear of the merged layer, W̃ + scaling B A rounded once to ``dtype`` (the weight's before quantisation if not
        given); this layer stays as it is.

        Raises:
            RuntimeError: the layer is merged into its 4 bits already: unmerge first, or the roundings of 4 bits stay in.
        """
        if self.merged:
            raise RuntimeError("merged_linear: the adapter is merged into the 4-bit weight: unmerge first")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
        dtype = dtype or self.weight_dtype
        if self.lora_magnitude_vector is None:
            weight = F.nf4_merge_dense(self.nf4, self.lora_A, self.lora_B, self.scaling, dtype=dtype)
        else:
            weight = LoRALinear._merged_weight(self).to(dtype)
        bias = self._merged_bias()
        bias = self.bias if bias is None else bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def _restore(self, before: F.NF4Weight) -> None:
        self._hold(before.to(self.weight.device))


def moved_like(parameter: nn.Parameter, other: Tensor) -> nn.Parameter:
    """The parameter, with the other's device and dtype."""
    if parameter.device != other.device or parameter.dtype != other.dtype:
        parameter.data = parameter.data.to(other.device, other.dtype)
    return parameter


def _check_options(r: Any, lora_alpha: Any, lora_dropout: Any = 0.0, init_lora_weights: Any = True) -> None:
    at_least_one("r", r)
    finite("lora_alpha", lora_alpha)
    probability("lora_dropout", lora_dropout)
    one_of("init_lora_weights", init_lora_weights, (True, False, "gaussian"))
