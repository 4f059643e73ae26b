"""A linear layer with a low-rank and a sparse delta at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.precision import compute_dtype_of
from .lora import _check_options
from .nf4 import is_bitsandbytes_4bit
from .sparse_delta import SparseDeltaLinear


class RoSALinear(SparseDeltaLinear):
    """y = x (W + Δ)ᵀ + b + scaling (x Aᵀ) Bᵀ with a sparse Δ (RoSA, arXiv 2401.04679). Made by :meth:`from_linear`.

    Trained are ``delta_values``, as in :class:`SparseDeltaLinear`, and ``lora_A`` ``[r, K]`` and ``lora_B`` ``[N, r]``, in the dtype of
    the values. The low-rank term is two of torch's own products, the second added into y. :meth:`merge` and :meth:`unmerge` are those
    of the sparse delta; a merged layer computes the low-rank term beside it.
    """

    r: int
    lora_alpha: float
    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Linear, *, r: int = 8, lora_alpha: float = 8, **options: Any
    ) -> RoSALinear:
        """As :meth:`SparseDeltaLinear.from_linear`, on a dense weight, with a low-rank term of rank r and scaling lora_alpha / r.

        Raises:
            TypeError: a 4-bit layer. ValueError: an option out of range.
        """
        _check_options(r, lora_alpha)
        if not isinstance(linear, nn.Linear) or is_bitsandbytes_4bit(linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear: expected an nn.Linear with a floating weight, got {type(linear).__name__}")
        layer = super().from_linear(linear, **options)
        if not isinstance(layer, RoSALinear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.delta_values.dtype}
        layer.r, layer.lora_alpha, layer.scaling = r, lora_alpha, lora_alpha / r
        layer.lora_A = nn.Parameter(torch.empty(r, layer.in_features, **factory))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, **factory))
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if not self._enabled:
            return y
        dtype = compute_dtype_of(input)
        rows = input.reshape(-1, self.in_features).to(dtype)
        s = rows @ self.lora_A.to(dtype).T
        flat = torch.addmm(y.reshape(-1, self.out_features), s, self.lora_B.to(dtype).T, alpha=self.scaling)
        return flat.reshape(y.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"
