"""GaLore and its kin: optimisers whose states are those of gradients projected to a low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LoRALinear
from .adapting import Runtime, Targets
from .lora import LoRAOptions
from .registry import Paper, above_zero, at_least_one, register
from .whole import train_weights


class GaLore(torch.optim.Optimizer):
    """AdamW on gradients projected to rank r (arXiv 2403.03507): G ``[N, K]`` becomes R = Pᵀ G where N <= K, P the r first
    left singular
    vectors, or G Q, Q the right ones; the states are R's, and the weight takes scale · P (or · Qᵀ) times Adam's step of R.

    P is found anew from the gradient at every ``update_interval``-th step, the first included; the states go on as they are. A matrix
    is not stepped before it has had a gradient other than zero. Parameters
    that are no matrix, or no larger than the rank, and groups with ``rank=None`` are stepped as by AdamW.

    Args:
        params: parameters or groups of them; each group may have its own of the following.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        rank, update_interval, scale: as above.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        **more: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, {**defaults, "update_interval": update_interval, "scale": scale, **more})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        if group["rank"] is not None:
            at_least_one("rank", group["rank"])
        at_least_one("update_interval", group["update_interval"])
        above_zero("scale", group["scale"])
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= group[name] < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {group[name]!r}")
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {group['betas']!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, self.state[parameter])
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))  # type: ignore[union-attr]
        rank, count = group["rank"], state.get("step", 0)
        projected = rank is not None and gradient.dim() == 2 and rank < min(gradient.shape)
        left = gradient.dim() == 2 and gradient.shape[0] <= gradient.shape[1]
        small = gradient
        if projected:
            if not count and not gradient.any():
                return  # no direction to project on yet, as of a LoRA's A while B is zero
            if count % group["update_interval"] == 0:
                u, _, v = torch.linalg.svd(gradient, full_matrices=False)
                state["basis"] = (u[:, :rank] if left else v[:rank].T).contiguous()
                self._new_basis(state)
            small = state["basis"].T @ gradient if left else gradient @ state["basis"]
            small = self._conditioned(small, group, state)
        if not count:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(small), torch.zeros_like(small)
        state["step"] = count + 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(small, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(small, small, value=1 - beta2)
        spread = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = state["exp_avg"] / (1 - beta1 ** state["step"]) / spread
        if projected:
            update = group["scale"] * (state["basis"] @ update if left else update @ state["basis"].T)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_((group["lr"] * update).to(parameter.dtype))

    def _new_basis(self, state: dict[str, Any]) -> None:
        """The projection has changed."""

    def _conditioned(self, small: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """What of the projected gradient Adam is given."""
        return small

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts states to their parameter's dtype; these are float32 beside 16-bit weights.
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in state_dict["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    self.state[parameters[number]][name] = value.detach().clone().to(parameters[number].device)


class NaturalGaLore(GaLore):
    """GaLore whose projected gradient is multiplied by the inverse of an empirical Fisher matrix of its last ``history`` values (arXiv
    2410.16029): with these as the columns of G ``[r K, s]``, (damping I + G Gᵀ)⁻¹ g by Woodbury's identity, an s x s system.

    Args:
        history: s. damping: above 0. The rest: :class:`GaLore`'s. The history begins anew with each projection.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        history: int = 5,
        damping: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, history=history, damping=damping, **options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least_one("history", group["history"])
        above_zero("damping", group["damping"])

    def _new_basis(self, state: dict[str, Any]) -> None:
        state.pop("past", None)

    def _conditioned(self, small: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        row = small.reshape(1, -1)
        past = torch.cat((state["past"], row)) if "past" in state else row.clone()
        state["past"] = past = past[-group["history"] :]
        inner = past @ past.T
        inner.diagonal().add_(group["damping"])
        weights = torch.linalg.solve(inner, past @ row.T)
        return ((row - weights.T @ past) / group["damping"]).reshape(small.shape)


@dataclass(frozen=True)
class GaLoreOptions:
    """rank: of the projected gradient. update_interval: steps from one projection to the next. scale: of the step."""

    rank: int = 128
    update_interval: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        at_least_one("rank", self.rank)
        at_least_one("update_interval", self.update_interval)
        above_zero("scale", self.scale)


@dataclass(frozen=True)
class NaturalGaLoreOptions(GaLoreOptions):
    """rank, update_interval, scale: as in GaLore. history: gradients that the Fisher matrix is of. damping: added to it."""

    history: int = 5
    damping: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("history", self.history)
        above_zero("damping", self.damping)


class ProjectedRuntime(Runtime):
    """Makes a GaLore over the method's own parameters; other groups, such as a head's, are stepped in full."""

    def __init__(self, kind: type[GaLore], **options: Any) -> None:
        self.kind, self.options = kind, options

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        first, *rest = groups
        return self.kind([{**first, **self.options}, *({**group, "rank": None} for group in rest)])


@register(
    "galore",
    paper=Paper(
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "Zhao et al.", 2024, "2403.03507"
    ),
    formula="R = P^T G, P the r first singular vectors of G at every T-th step; W -= lr scale P Adam(R)",
    options=GaLoreOptions,
    reduces_to="torch's products and SVD",
    kind="optimiser",
    fused="nothing: projecting, Adam and projecting back are torch's",
    operation=GaLore,
    choices="The states stay as they are when the projection changes, as published. Decay is AdamW's, of the whole weight, "
    "and eps torch's 1e-8 on the corrected root; the authors' code has 1e-6 on the uncorrected one. A square matrix is projected "
    "from the left, as in the "
    "paper; that code does so from the right.",
    demo={"rank": 16, "scale": 1.0},
    learning_rate=1e-3,
)
def build(targets: Targets, options: GaLoreOptions) -> Runtime:
    train_weights(targets)
    return ProjectedRuntime(GaLore, rank=options.rank, update_interval=options.update_interval, scale=options.scale)


@register(
    "natural-galore",
    paper=Paper(
        "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning",
        "Das",
        2024,
        "2410.16029",
    ),
    formula="W -= lr scale P Adam((damping I + sum_s g_s g_s^T)^-1 g), g = vec(P^T G), the sum over the last s gradients",
    options=NaturalGaLoreOptions,
    reduces_to="torch's products, SVD and an s x s solution",
    kind="optimiser",
    fused="nothing: all is torch's; the inverse is by Woodbury's identity",
    operation=NaturalGaLore,
    choices="The Fisher matrix is a sum, not a mean, over the history with the present gradient in it; the history begins "
    "anew with each "
    "projection, in whose coordinates it is. The authors' code keeps it, has 20 gradients in it, and projects both sides of a matrix; "
    "history=5 was chosen here.",
    demo={"rank": 16, "scale": 1.0},
    learning_rate=1e-3,
)
def build_natural(targets: Targets, options: NaturalGaLoreOptions) -> Runtime:
    train_weights(targets)
    given = {name: getattr(options, name) for name in ("rank", "update_interval", "scale", "history", "damping")}
    return ProjectedRuntime(NaturalGaLore, **given)


@dataclass(frozen=True)
class GradNormLoRPOptions(LoRAOptions):
    """r, lora_alpha, lora_dropout: of the adapter. projection_rank, update_interval, scale: of its gradients' projection."""

    r: int = 8
    projection_rank: int = 4
    update_interval: int = 500
    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("projection_rank", self.projection_rank)
        at_least_one("update_interval", self.update_interval)
        above_zero("scale", self.scale)


@register(
    "gradnormlorp",
    paper=Paper(
        "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training",
        "Huang, Shen, Zhu, Rudinac, Kanoulas",
        2024,
        "2412.19616",
    ),
    formula="y = x (m V / ||V||)^T, V = W + (alpha / r) B A; A and B stepped by GaLore at the projection's rank, m by AdamW",
    options=GradNormLoRPOptions,
    reduces_to="lora (DoRA); nf4 + lora on a 4-bit base",
    kind="optimiser",
    operation=GaLore,
    fused="the layer, forward and backward, its row norms included; the optimiser is torch's",
    choices="The norm is by rows and takes part in the graph as a constant, as in PEFT's DoRA, which the paper's code trains.",
    demo={"r": 16, "lora_alpha": 16.0, "projection_rank": 8, "scale": 1.0},
)
def build_gradnormlorp(targets: Targets, options: GradNormLoRPOptions) -> Runtime:
    def make(name: str, linear: nn.Linear) -> LoRALinear:
        return LoRALinear.from_linear(
            linear, r=options.r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, use_dora=True
        )

    targets.replace(make)
    given = {"update_interval": options.update_interval, "scale": options.scale}
    return ProjectedRuntime(GaLore, rank=options.projection_rank, **given)
