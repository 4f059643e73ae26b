"""ID3: weights are unmasked step by step, by a score of gradient against magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..nn import SparseDeltaLinear
from .adapting import AdapterHandle, Targets, is_four_bit
from .frozen import FreezingRuntime
from .registry import Paper, above_zero, at_least_one, register


@dataclass(frozen=True)
class Options:
    """density: part of each weight that is trained in the end. total_steps: by which all of it is. every: steps between unmaskings.
    epsilon, exponent: of the score |g| / (|w| + epsilon)^exponent."""

    density: float = 0.01
    total_steps: int = 1000
    every: int = 10
    epsilon: float = 1e-3
    exponent: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.density, float) or not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a part in (0, 1], got {self.density!r}")
        at_least_one("total_steps", self.total_steps)
        at_least_one("every", self.every)
        above_zero("epsilon", self.epsilon)
        if not 0.0 <= self.exponent < float("inf"):
            raise ValueError(f"exponent: expected a number of at least 0, got {self.exponent!r}")


class _Watch:
    """A forward hook that adds up dyᵀ x of a layer."""

    def __init__(self, runtime: ID3Runtime, name: str) -> None:
        self.runtime, self.name = runtime, name

    def __call__(self, module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self.runtime.watching and output.requires_grad:
            x = arguments[0].detach()
            output.register_hook(lambda dy: self.runtime.add(self.name, dy.detach(), x))


class ID3Runtime(FreezingRuntime):
    """Every layer has all its slots from the first step on. A slot that no weight has yet is frozen at 0; unmasking moves it to the
    weight, so that neither the parameter nor the optimiser is ever a new one."""

    def __init__(self, layers: dict[str, Any], options: Options) -> None:
        super().__init__(layers)
        self.options = options
        self.gradients: dict[str, Tensor] = {}
        self.watching = True
        for name, layer in layers.items():
            self.freeze(name, torch.ones_like(layer.delta_values, dtype=torch.bool))

    def attach(self, handle: AdapterHandle) -> None:
        self._hooks = [layer.register_forward_hook(_Watch(self, name)) for name, layer in self.layers.items()]

    @torch.no_grad()
    def add(self, name: str, dy: Tensor, x: Tensor) -> None:
        """A backward's gradient of the whole weight ``[N, K]``, in float32 at least."""
        dtype = torch.promote_types(dy.dtype, torch.float32)
        found = dy.reshape(-1, dy.shape[-1]).to(dtype).T @ x.reshape(-1, x.shape[-1]).to(dtype)
        self.gradients[name] = self.gradients[name] + found if name in self.gradients else found

    @property
    def _times(self) -> int:
        """How many unmaskings there are: at the steps 1, 1 + every, ... up to total_steps."""
        return -(-self.options.total_steps // self.options.every)

    @torch.no_grad()
    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.restore()
        number, rest = divmod(step - 1, self.options.every)
        if rest == 0 and number < self._times:
            for name, layer in self.layers.items():
                if name in self.gradients:
                    wanted = round(layer.delta_values.numel() * (number + 1) / self._times)
                    self._unmask(name, layer, self.gradients.pop(name), wanted, optimizer)
        number, rest = divmod(step, self.options.every)
        self.watching = rest == 0 and number < self._times
        self.gradients.clear()

    def _unmask(
        self, name: str, layer: Any, gradient: Tensor, wanted: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        closed = self.frozen[name]
        count = wanted - int((~closed).sum())
        if count <= 0:
            return
        weight = F.nf4_dequantize(layer.nf4) if is_four_bit(layer) else layer.weight.detach()
        scores = (gradient.abs() / (weight.to(gradient).abs() + self.options.epsilon) ** self.options.exponent).reshape(
            -1
        )
        scores[layer.delta_indices[~closed].long()] = -1.0  # those that are trained already
        chosen = torch.sort(scores, descending=True, stable=True).indices[:count].sort().values
        there = torch.isin(layer.delta_indices, chosen.to(layer.delta_indices))  # closed slots that lie right already
        missing = chosen[~torch.isin(chosen, layer.delta_indices[there].long())]
        changed = (closed & ~there).nonzero()[: missing.numel(), 0]
        opened = there & closed
        opened[changed] = True
        order = layer.move_support(changed, missing) if changed.numel() else torch.arange(closed.numel())
        order = order.to(closed.device)
        _reset(optimizer, layer.delta_values, opened, order)
        self.freeze(name, (closed & ~opened)[order])
        layer.delta_values.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "watching": self.watching}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.watching = state["watching"]


def _reset(optimizer: torch.optim.Optimizer | None, values: Tensor, opened: Tensor, order: Tensor) -> None:
    """States of the weights that are new begin at 0, and all follow their weights."""
    state = optimizer.state.get(values, {}) if optimizer is not None else {}
    for tensor in state.values():
        if isinstance(tensor, Tensor) and tensor.shape == values.shape:
            tensor[opened] = 0
            tensor.copy_(tensor[order])


@register(
    "id3",
    paper=Paper(
        "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models",
        "Agarwal et al.",
        2024,
        "2408.14470",
    ),
    formula="y = x (W + S)^T; the support grows to its budget by the largest |dL/dW| / (|W| + epsilon)^exponent of what is masked",
    options=Options,
    reduces_to="sparse_delta with moving slots",
    kind="moving",
    fused="the layer's gradient of its values, AdamW over them with an age for each; the score takes torch's dense dy^T x of a layer",
    choices="The budget is each layer's own density of it, in equal shares over total_steps; the score is read every `every` "
    "steps, since it "
    "takes a dense gradient. What the gradient of a step unmasks is trained from the next step on. epsilon and exponent are those of "
    "the usage that the authors' toolkit shows, where the score is the gradient alone; the paper varies both. That toolkit ranks the "
    "weights of all layers together.",
    demo={"density": 0.05, "every": 5, "epsilon": 1.0, "exponent": 0.5},
    learning_rate=5e-4,
)
def build(targets: Targets, options: Options) -> ID3Runtime:
    generator = torch.Generator().manual_seed(0)  # of where slots lie that no weight has yet
    targets.replace(
        lambda name, linear: SparseDeltaLinear.from_linear(linear, density=options.density, generator=generator)
    )
    return ID3Runtime(dict(targets.replacements), options)
