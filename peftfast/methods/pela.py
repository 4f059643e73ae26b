"""PELA: each weight as two thin ones, trained to give the whole model's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapting import AdapterHandle, Runtime, Targets, Unsuitable
from .factored import FactoredLinear
from .registry import Paper, register
from .sidenet import block_names
from .spectral import truncated_svd


@dataclass(frozen=True)
class Options:
    """compress_ratio: how many times fewer numbers the two factors have than the weight. distillation: factor of the features'
    distance
    in the loss. perturbation: of how far the largest change of a weight's entry is from perturbation_size."""

    compress_ratio: float = 2.0
    distillation: float = 1.0
    perturbation: float = 1.0
    perturbation_size: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("compress_ratio", "distillation", "perturbation", "perturbation_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if self.compress_ratio <= 0:
            raise ValueError(f"compress_ratio: expected a number above 0, got {self.compress_ratio!r}")


class PELALinear(FactoredLinear):
    """y = (x Rᵀ) Lᵀ + b, L ``[N, r]`` and R ``[r, K]`` the halves of W's truncated SVD at first, r = N K / (compress_ratio (N + K)).

    W stays in ``base_layer``: with ``original`` the layer computes what it did.
    """

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(linear)
        n, k = self.out_features, self.in_features
        rank = int(n * k // (options.compress_ratio * (n + k)))
        if rank < 1:
            raise Unsuitable(f"its {n} x {k} weight leaves no rank at compress_ratio {options.compress_ratio}")
        rank = min(rank, n, k)
        u, s, v = truncated_svd(self.dense_weight(), rank)
        self.left, self.right = nn.Parameter(u * s.sqrt()), nn.Parameter(s.sqrt()[:, None] * v)
        self.original = False

    def forward(self, input: Tensor) -> Tensor:
        if self.merged or self.original:
            out: Tensor = self.base_layer(input)
            return out
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(functional.linear(input, self.right.to(input.dtype)), self.left.to(input.dtype), bias)

    def merged_weight(self) -> Tensor:
        return self.left @ self.right

    def change(self) -> Tensor:
        """The largest magnitude of L R - W."""
        return (self.left @ self.right - self.dense_weight()).abs().max()


class PELARuntime(Runtime):
    """Distils: ``loss`` sends the last training batch through the whole model too, without a graph, and compares the blocks'
    outputs."""

    def __init__(self, model: nn.Module, layers: list[PELALinear], options: Options) -> None:
        self.model, self.layers, self.options = model, layers, options
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.features: list[Tensor] = []
        self.teaching = False

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one training step has a graph, and is not copied.
        return {**self.__dict__, "given": None, "features": [], "teaching": False}

    def attach(self, handle: AdapterHandle) -> None:
        """Hooks on the model, for its arguments, and on what gives the features: its blocks, or the layers where it has none."""
        if self.layers and self.options.distillation:
            blocks = [self.model.get_submodule(name) for name in block_names(self.model)]
            self._hooks = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
            self._hooks += [module.register_forward_hook(self._keep) for module in blocks or self.layers]

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.teaching:
            return
        self.features = []
        self.given = (arguments, named) if model.training and torch.is_grad_enabled() else None

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self.given is not None:
            self.features.append(output[0] if isinstance(output, tuple) else output)

    def _taught(self) -> list[Tensor]:
        """The whole model's features of the last batch, in evaluation mode."""
        assert self.given is not None
        flags = [(module, module.training) for module in self.model.modules()]
        own, self.features, self.teaching = self.features, [], True
        try:
            self.model.eval()
            for layer in self.layers:
                layer.original = True
            with torch.no_grad():
                self.model(*self.given[0], **self.given[1])
            return self.features
        finally:
            for layer in self.layers:
                layer.original = False
            for module, training in flags:
                module.training = training
            self.features, self.teaching = own, False

    def loss(self) -> Tensor | None:
        parts: list[Tensor] = []
        options = self.options
        if options.distillation and self.given is not None and self.features:
            pairs = zip(self.features, self._taught(), strict=True)
            gaps = [functional.mse_loss(own, whole) for own, whole in pairs]
            parts.append(options.distillation * torch.stack(gaps).mean())
        if options.perturbation:
            changes = torch.stack([layer.change() for layer in self.layers])
            parts.append(options.perturbation * (changes - options.perturbation_size).square().mean())
        self.given, self.features = None, []
        return torch.stack(parts).sum() if parts else None


@register(
    "pela",
    paper=Paper(
        "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
        "Guo, Wang, Kankanhalli",
        2023,
        "2310.10700",
    ),
    formula="y = x (L R)^T + b, L R the truncated SVD of W; loss + alpha mean_i |f_i - f_i of the whole model|^2 + beta mean (max "
    "|L R - W| "
    "- eps)^2",
    options=Options,
    reduces_to="two thin products; a forward of the frozen model (nf4 where it is in 4 bits) for what is distilled",
    kind="layer",
    fused="the whole model's forward on a 4-bit base; the thin products are torch's, since no weight stands beside them",
    choices="The weight stays frozen in the layer, for the whole model's forward in each step; a model without it is half as large "
    "and needs distillation=0 and perturbation=0. Features are the outputs of the model's blocks, or of the layers where it has "
    "none. "
    "The authors' codes weigh the features with 1 (images) and 0.1 (images and text) and the changes with 0 and 1; here both with 1. "
    "They train biases and norms as well, which stay frozen here. Distillation goes with the task's own loss, in one stage.",
    exact=False,
    learning_rate=5e-5,
)
def build(targets: Targets, options: Options) -> PELARuntime:
    layers: list[PELALinear] = []

    def make(name: str, linear: nn.Linear) -> PELALinear:
        layers.append(PELALinear(linear, options))
        return layers[-1]

    targets.replace(make)
    return PELARuntime(targets.model, layers, options)
