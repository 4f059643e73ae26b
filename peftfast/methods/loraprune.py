"""LoRAPrune: heads and channels are masked while LoRA trains, by an importance that comes from LoRA's gradients
alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.lora import moved_like
from .adapting import Runtime, Targets
from .lora import LoRAOptions
from .low_rank import LowRankLinear
from .registry import Paper, at_least_one, one_of, probability, register


@dataclass(frozen=True)
class Options(LoRAOptions):
    """r, lora_alpha, lora_dropout: as of lora. ratio: part of each layer's heads and channels that is masked at the
    end. warmup, cooldown: parts of the training before the ratio rises and after it has. interval: steps between
    prunings. decay: of the importance. keep_ends: whether the first tenth of the blocks and the last one are left
    alone. total_steps: of the training."""

    lora_dropout: float = 0.05
    ratio: float = 0.5
    warmup: float = 0.1
    cooldown: float = 0.1
    interval: int = 10
    decay: float = 0.9
    keep_ends: bool = True
    total_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ratio", "warmup", "cooldown", "decay"):
            probability(name, getattr(self, name))
        at_least_one("interval", self.interval)
        at_least_one("total_steps", self.total_steps)
        one_of("keep_ends", self.keep_ends, (True, False))
        if self.warmup + self.cooldown >= 1.0:
            raise ValueError(f"warmup: expected less than 1 - cooldown = {1 - self.cooldown}, got {self.warmup}")


class MaskedLoRALinear(LowRankLinear):
    """y = m ∘ (x (W + s B A)ᵀ + b), m ``[N]`` of zeros and ones."""

    row_mask: Tensor

    def __init__(self, linear: nn.Module, options: Options) -> None:
        super().__init__(linear, options.r, options.lora_alpha, options.lora_dropout)
        ones = torch.ones(self.out_features, dtype=self.adapter_dtype, device=self.weight.device)
        self.register_buffer("row_mask", ones)
        self._unmasked_bias: nn.Parameter | None = None

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out if self.merged else out * self.row_mask.to(out.dtype)

    def merged_weight(self) -> Tensor:
        return super().merged_weight() * self.row_mask[:, None]

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged and self.bias is not None:
            bias = self.__dict__["_unmasked_bias"] = self.base_layer.bias
            masked = bias * self.row_mask.to(bias.dtype)
            self.base_layer.bias = nn.Parameter(masked, requires_grad=bias.requires_grad)
        super().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged and self.bias is not None and self._unmasked_bias is not None:
            self.base_layer.bias = moved_like(self._unmasked_bias, self.bias)
            self.__dict__["_unmasked_bias"] = None
        super().unmerge()


@dataclass
class Group:
    """Units (groups of heads that share a key and value head, or channels) that are masked together.

    Attributes:
        rows: paths of the layers whose rows they are, and are masked; columns: of those that only read them.
        count: how many units. importance ``[count]``.
    """

    rows: list[str]
    columns: list[str]
    count: int
    importance: Tensor = field(default_factory=lambda: torch.zeros(0))


def groups_of(targets: Targets) -> list[tuple[str, Group]]:
    """(path of the block, group), of blocks of Llama's or BERT's shape, where the layers to be masked are among the
    chosen."""
    found: list[tuple[str, Group]] = []

    def add(block: str, rows: list[str], reader: str, needed: list[str], heads: Any) -> None:
        chosen = [f"{block}.{name}" for name in rows if f"{block}.{name}" in targets.modules]
        if not any(f"{block}.{name}" in chosen for name in needed):
            return
        layer: Any = targets.model.get_submodule(f"{block}.{needed[0]}")
        count = layer.out_features // heads if heads else layer.out_features
        columns = [f"{block}.{reader}"] if f"{block}.{reader}" in targets.modules else []
        found.append((block, Group(chosen, columns, count)))

    for path, block in targets.model.named_modules():
        inner: Any = getattr(getattr(block, "attention", None), "self", None)
        if hasattr(getattr(block, "self_attn", None), "q_proj") and hasattr(getattr(block, "mlp", None), "down_proj"):
            attention: Any = block.self_attn
            rows = [f"self_attn.{name}_proj" for name in "qkv"]
            add(path, rows, "self_attn.o_proj", rows[2:], attention.head_dim)
            wide = ["mlp.gate_proj", "mlp.up_proj"]
            add(path, wide, "mlp.down_proj", wide, None)
        elif hasattr(inner, "query"):
            rows = [f"attention.self.{name}" for name in ("query", "key", "value")]
            add(path, rows, "attention.output.dense", rows[2:], inner.attention_head_size)
            add(path, ["intermediate.dense"], "output.dense", ["intermediate.dense"], None)
    return found


def kept_ends(groups: list[tuple[str, Group]]) -> list[tuple[str, Group]]:
    """Without the first tenth of the blocks and the last."""
    blocks = list(dict.fromkeys(block for block, _ in groups))
    inside = set(blocks[int(0.1 * len(blocks)) : -1])
    return [one for one in groups if one[0] in inside]


class LoRAPruneRuntime(Runtime):
    """Importance and masks. ``groups``: path of a block -> :class:`Group`, in order."""

    def __init__(self, layers: dict[str, nn.Module], groups: list[Group], options: Options) -> None:
        self.layers: dict[str, Any] = layers
        self.groups, self.options = groups, options
        for group in groups:
            first: Any = layers[group.rows[0]]
            group.importance = torch.zeros(group.count, device=first.lora_A.device)

    def ratio(self, step: int) -> float:
        """The part that is masked after ``step``: 0, then rising with the cube, then constant."""
        given = self.options
        part = (step / given.total_steps - given.warmup) / (1 - given.warmup - given.cooldown)
        return given.ratio * (1 - (1 - min(1.0, max(0.0, part))) ** 3)

    @property
    def masked(self) -> float:
        """The part of all units that is masked now."""
        masks = [self.layers[group.rows[0]].row_mask.reshape(group.count, -1)[:, 0] for group in self.groups]
        return 1 - float(torch.cat(masks).mean())

    @torch.no_grad()
    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        ratio = self.ratio(step)
        for group in self.groups:
            self._observe(group)
            if step % self.options.interval == 0 and ratio > 0:
                self._mask(group, int(group.count * ratio))

    def _observe(self, group: Group) -> None:
        total = torch.zeros_like(group.importance)
        for path in (*group.rows, *group.columns):
            layer = self.layers[path]
            if layer.lora_A.grad is None or layer.lora_B.grad is None:
                return
            scores = sensitivity(layer)
            scores = (scores.sum(0) if path in group.columns else scores.sum(1)).reshape(group.count, -1).sum(1)
            total += (scores / (torch.linalg.vector_norm(scores) + 1e-8)).to(total.dtype)
        if bool(total.isfinite().all()):
            group.importance = self.options.decay * group.importance + (1 - self.options.decay) * total

    def _mask(self, group: Group, count: int) -> None:
        """The ``count`` units of least importance, those that are masked already first."""
        now = self.layers[group.rows[0]].row_mask.reshape(group.count, -1)[:, 0]
        order = torch.sort(torch.where(now > 0, group.importance, -1.0), stable=True).indices
        mask = torch.ones_like(now)
        mask[order[: max(count, int((now == 0).sum()))]] = 0.0
        for path in group.rows:
            row_mask = self.layers[path].row_mask
            row_mask.copy_(mask.to(row_mask)[:, None].expand(-1, len(row_mask) // group.count).reshape(-1))

    def state_dict(self) -> dict[str, Any]:
        return {"importance": [group.importance for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group, importance in zip(self.groups, state["importance"], strict=True):
            group.importance = importance.to(group.importance.device)


def sensitivity(layer: Any) -> Tensor:
    """|(dB A + B dA - dB dA) ∘ (W + s B A)| ``[N, K]`` of a LoRA layer with gradients: the gradient of the weight from
    LoRA's own."""
    a, b = layer.lora_A, layer.lora_B
    gradient = b.grad @ (a - a.grad) + b @ a.grad
    return (gradient * torch.addmm(layer.dense_weight(), b, a, alpha=layer.scaling)).abs()


@register(
    "loraprune",
    paper=Paper(
        "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
        "Zhang et al.",
        2023,
        "2305.18403",
    ),
    formula="y = m * (x (W + (alpha / r) B A)^T + b), m of whole heads and channels, 0 where the mean of sum |(dB A + "
    "B dA - dB dA) * (W + s B A)| is smallest",
    options=Options,
    reduces_to="lora, its output masked; nf4 + lora on a 4-bit base",
    kind="moving",
    fused="the layer, forward and backward; the mask and the importance, a dense matrix a layer and step, are torch's",
    choices="Masks in the place of smaller layers, as the paper has it while it trains: heads by the rows of q, k and "
    "v, channels by those of the FFN's first layers, biases too, so that what follows sees zeros. Layers keep their "
    "shapes, in memory and files too: nothing becomes smaller or faster by it. Blocks of Llama's and BERT's shape; "
    "heads that share a key and value head go together. Numbers as in the authors' code, whose prunings end just "
    "before the last ratio is reached; here it is reached. A and B are as after the step, their gradients as before "
    "it.",
    demo={"r": 16, "lora_alpha": 16.0, "lora_dropout": 0.0, "interval": 2, "ratio": 0.2},
)
def build(targets: Targets, options: Options) -> LoRAPruneRuntime:
    groups = groups_of(targets)
    if options.keep_ends:
        groups = kept_ends(groups)
    if not groups:
        raise ValueError(
            "target_modules: loraprune finds nothing to mask: expected the v or FFN layers of blocks of Llama's or "
            "BERT's shape" + (", more than two of them unless keep_ends=False" if options.keep_ends else "")
        )
    masked = {path for _, group in groups for path in group.rows}

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if name in masked:
            return MaskedLoRALinear(linear, options)
        return LowRankLinear(linear, options.r, options.lora_alpha, options.lora_dropout)

    targets.replace(make)
    return LoRAPruneRuntime(targets.replacements, [group for _, group in groups], options)
