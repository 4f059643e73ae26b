"""FLoRA: a Tucker core between factors of every side of the weight, of linear layers and of convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..nn.lora import moved_like
from .adapting import Targets, Unsuitable
from .factored import FactoredLinear, Factors
from .registry import Paper, above_zero, at_least_one, register


@dataclass(frozen=True)
class Options:
    """r: rank of the channels' sides. r_kernel: of a kernel's two sides, at most their size. scale: of the term."""

    r: int = 8
    r_kernel: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        at_least_one("r", self.r)
        at_least_one("r_kernel", self.r_kernel)
        above_zero("scale", self.scale)


class FLoRALinear(FactoredLinear):
    """W' = W + s A G B, A ``[N, r]``, core G ``[r, r]``, B ``[r, K]``."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        self.scale = options.scale
        self.core = self.new_parameter(options.r, options.r)
        self.side_out = self.new_parameter(self.out_features, options.r)
        self.side_in = self.new_parameter(options.r, self.in_features)
        for side in (self.side_out, self.side_in):
            nn.init.kaiming_uniform_(side, a=math.sqrt(5))

    def factors(self) -> Factors:
        return Factors(self.core @ self.side_in, self.side_out, self.scale)


class FLoRAConv2d(nn.Module):
    """conv(x, W + s G ×₁ A ×₂ B ×₃ C ×₄ D): A ``[out, r]``, B ``[in, r]``, C ``[kh, r_h]``, D ``[kw, r_w]``, G ``[r, r, r_h, r_w]``.

    The term runs as a point-wise convolution to r channels, one with the kernel G ×₃ C ×₄ D on them, and a point-wise one back: no
    gradient of the whole kernel is formed.
    """

    base_layer: nn.Conv2d

    def __init__(self, conv: nn.Conv2d, options: Options) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise Unsuitable("a convolution with groups or with a padding that is not zeros")
        self.base_layer, self.scale = conv, options.scale
        for parameter in conv.parameters():
            parameter.requires_grad_(False)
        height, width = conv.kernel_size
        high, wide = min(options.r_kernel, height), min(options.r_kernel, width)
        self.core = self._new(options.r, options.r, high, wide)
        self.side_out, self.side_in = self._new(conv.out_channels, options.r), self._new(conv.in_channels, options.r)
        self.side_height, self.side_width = self._new(height, high), self._new(width, wide)
        for side in (self.side_out, self.side_in, self.side_height, self.side_width):
            nn.init.kaiming_uniform_(side, a=math.sqrt(5))
        self._unmerged: Any = None

    def _new(self, *shape: int) -> nn.Parameter:
        weight = self.base_layer.weight
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def _kernel(self) -> Tensor:
        """G ×₃ C ×₄ D ``[r, r, kh, kw]``."""
        return torch.einsum("abhw,yh,xw->abyx", self.core, self.side_height, self.side_width)

    def forward(self, input: Tensor) -> Tensor:
        conv = self.base_layer
        y = conv(input)
        if self.merged:
            return y
        inner = functional.conv2d(input, self.side_in.T[:, :, None, None].to(y.dtype))
        inner = functional.conv2d(inner, self._kernel().to(y.dtype), None, conv.stride, conv.padding, conv.dilation)
        return y + self.scale * functional.conv2d(inner, self.side_out[:, :, None, None].to(y.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the term into the kernel; :meth:`unmerge` gives the very kernel back."""
        if not self.merged:
            delta = torch.einsum("abyx,oa,ib->oiyx", self._kernel(), self.side_out, self.side_in)
            old = self.__dict__["_unmerged"] = self.base_layer.weight
            merged = (old.to(delta.dtype) + self.scale * delta).to(old.dtype)
            self.base_layer.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it out again."""
        if self.merged:
            self.base_layer.weight = moved_like(self._unmerged, self.weight)
            self.__dict__["_unmerged"] = None


@register(
    "flora",
    paper=Paper("FLoRA: Low-Rank Core Space for N-dimension", "Si et al.", 2024, "2405.14739"),
    formula="W' = W + s G x1 A x2 B (linear), with x3 C x4 D for a kernel's height and width; the core G = 0",
    options=Options,
    reduces_to="lora with A' = G B on linear layers; three thin convolutions of torch on nn.Conv2d",
    kind="layer",
    fused="a linear layer, forward and backward (nf4 + lora on a 4-bit base); convolutions are torch's",
    choices="The core begins at 0 and the sides Kaiming-uniform, so that step 0 is the base. The paper tunes s for each task; 1 here. "
    "The kernel's ranks are at most its size.",
    modules=(nn.Linear, nn.Conv2d),
    demo={"r": 16},
    learning_rate=3e-3,
)
def build(targets: Targets, options: Options) -> None:
    def make(name: str, module: Any) -> nn.Module:
        return FLoRAConv2d(module, options) if isinstance(module, nn.Conv2d) else FLoRALinear(module, options)

    targets.replace(make)
