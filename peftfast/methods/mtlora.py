"""MTLoRA: a low-rank term that all tasks share, and one for each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as F
from .adapting import Runtime, Targets
from .factored import FactoredLinear
from .registry import Paper, above_zero, at_least_one, register
from .routing import TaskRuntime, Tasks
from .transformed import Unmergeable


@dataclass(frozen=True)
class Options:
    """n_tasks: tasks. r, r_task: ranks of the shared term and of a task's. lora_alpha: both are scaled by lora_alpha / their rank."""

    n_tasks: int = 1
    r: int = 8
    r_task: int = 4
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        for name in ("n_tasks", "r", "r_task"):
            at_least_one(name, getattr(self, name))
        above_zero("lora_alpha", self.lora_alpha)


class MTLoRALinear(Unmergeable, FactoredLinear):  # type: ignore[misc]
    """y = x (W + s B A + s' B_t A_t)ᵀ for a row of task t: one adapter [A; A_t], [B, (s' / s) B_t] a task, rows naming theirs."""

    def __init__(self, linear: nn.Linear, options: Options, current: Tasks) -> None:
        super().__init__(linear)
        n, k = self.out_features, self.in_features
        self.scaling, self.ratio = options.lora_alpha / options.r, options.r / options.r_task
        self.__dict__["current"] = current
        self.lora_A, self.lora_B = self.new_parameter(options.r, k), self.new_parameter(n, options.r)
        self.task_A = self.new_parameter(options.n_tasks, options.r_task, k)
        self.task_B = self.new_parameter(options.n_tasks, n, options.r_task)
        for one in (self.lora_A, *self.task_A):
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        base = self.base_layer
        ids = self.__dict__["current"].of(input, len(self.task_A))
        if ids is None and len(self.task_A) > 1:
            raise ValueError("task_ids: several tasks: call the model in `with handle.runtime.tasks(task_ids):`")
        adapters = [
            F.Adapter(torch.cat([self.lora_A, a]), torch.cat([self.lora_B, self.ratio * b], dim=1), self.scaling)
            for a, b in zip(self.task_A, self.task_B, strict=True)
        ]
        return F.multi_lora_linear(
            input,
            base.nf4 if self.four_bit else base.weight,
            adapters,
            ids,
            bias=base.bias,
            training=self.training,
            compute_dtype=base.compute_dtype if self.four_bit else None,
        )


@register(
    "mtlora",
    paper=Paper(
        "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning",
        "Agiza, Neseem, Reda",
        2024,
        "2403.20320",
    ),
    formula="y = x (W + (alpha / r) B A + (alpha / r_task) B_t A_t)^T for a row of task t",
    options=Options,
    reduces_to="lora with rows naming adapters; nf4 + lora on a 4-bit base",
    kind="layer",
    fused="the layer with the shared term and each row's task's, forward and backward, as one adapter a task",
    choices="A row is of one task, named by handle.runtime.tasks(task_ids), and gets the shared and its task's term "
    "in every layer that is "
    "chosen. The paper gives task terms to the last layer of each stage of a vision model alone and computes that layer once for each "
    "task: choose those layers by target_modules, and give a batch with a row for each task.",
)
def build(targets: Targets, options: Options) -> Runtime:
    current = Tasks()
    targets.replace(lambda name, linear: MTLoRALinear(linear, options, current))
    return TaskRuntime(current)
