"""The handle of an adapted model: its report, and what a training loop calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import NF4Linear, RoSALinear, SparseDeltaLinear
from ..nn.hooks import replace
from ..optim.arguments import check_number
from .registry import Method, get

HANDLE = "peftfast_handle"  # the attribute of an adapted model
SHARED = "peftfast_shared"  # the module of an adapted model that holds what layers share


class Runtime:
    """What a method does while its layers are trained. The base class does nothing."""

    _hooks: Sequence[Any] = ()  # handles of those that attach has set

    def attach(self, handle: AdapterHandle) -> None:
        """Once, when the layers stand in the model: for a method that hooks into the model's own forward pass."""

    def detach(self) -> None:
        """Take away from the model what :meth:`attach` hung into it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """After optimiser step number ``step`` (the first is 1), its gradients still in place."""

    def loss(self) -> Tensor | None:
        """A penalty to add to the training loss, a scalar with a graph; None: no penalty."""
        return None

    def resting(self) -> list[nn.Parameter]:
        """Parameters that the method trains and that have ``requires_grad`` False for now; an optimiser must know them too."""
        return []

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """The method's own optimiser over parameter groups as torch's optimisers take them; None: AdamW serves."""
        return None

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors that files are to hold otherwise than the layers do, by their names in the model."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's and the optimiser's states."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of :meth:`state_dict`."""


class AdapterHandle:
    """An adapted model's report, and what a training loop calls.

    ::

        handle = peftfast.adapt(model, "lora-xs", r=16)
        optimizer = handle.optimizer(lr=1e-3)
        for batch in data:
            loss = model(**batch).loss + handle.loss()
            loss.backward()
            optimizer.step()
            handle.step(optimizer)      # before the gradients are cleared
            optimizer.zero_grad()

    Attributes:
        model, method, options: what was adapted, by what, and how.
        layers: path -> adapter layer. skipped: path -> why a layer that was asked for stays as it was.
        modules_to_save: names of modules trained and saved whole. task_type: PEFT's, for the files.
        runtime: the method's own object.
        completed_steps: calls of :meth:`step`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        options: Any,
        layers: dict[str, nn.Module],
        skipped: dict[str, str],
        modules_to_save: Sequence[str],
        runtime: Runtime,
    ) -> None:
        self.model, self.method, self.options = model, method, options
        self.layers, self.skipped, self.runtime = layers, skipped, runtime
        self.modules_to_save = list(modules_to_save)
        self.task_type: str | None = None
        self.completed_steps = 0

    def __getstate__(self) -> dict[str, Any]:
        # The method holds functions: by its name, models with a handle can be copied and pickled.
        return {**self.__dict__, "method": self.method.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, method=get(state["method"]))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the method, each once, those of ``modules_to_save`` not among them."""
        saved = {id(p) for name in self.modules_to_save for p in self.model.get_submodule(name).parameters()}
        resting = {id(p) for p in self.runtime.resting()}
        return [p for p in self.model.parameters() if (p.requires_grad or id(p) in resting) and id(p) not in saved]

    @property
    def trainable(self) -> int:
        """How many numbers the method trains, ``modules_to_save`` not counted."""
        return sum(parameter.numel() for parameter in self.adapter_parameters())

    def optimizer(self, lr: float, *, head_lr: float | None = None, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The optimiser that the method was published with where that is one of its own, else AdamW; ``head_lr`` is for
        ``modules_to_save`` (lr if not given).

        Raises:
            ValueError: lr, head_lr or weight_decay is no finite number from 0.
        """
        for name, number in (("lr", lr), ("weight_decay", weight_decay), ("head_lr", head_lr)):
            if number is not None or name != "head_lr":
                check_number(name, number, low=0.0)
        own = self.adapter_parameters()
        known = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": own, "lr": lr, "weight_decay": weight_decay}]
        if rest:
            groups.append({"params": rest, "lr": lr if head_lr is None else head_lr, "weight_decay": weight_decay})
        made = self.runtime.optimizer(groups)
        return torch.optim.AdamW(groups) if made is None else made

    def loss(self) -> Tensor | float:
        """The method's penalty, to be added to the loss; 0.0 where it has none."""
        found = self.runtime.loss()
        return 0.0 if found is None else found

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After each optimiser step, before the gradients are cleared. ``optimizer`` lets a method whose parameters move take its
        states along."""
        self.completed_steps += 1
        self.runtime.step(self.completed_steps, optimizer)

    def _merging(self, call: str) -> None:
        without = [name for name, layer in self.layers.items() if not hasattr(layer, call)]
        if without:
            raise RuntimeError(f"{call}: {self.method.name} cannot be merged into a weight ({without[0]})")
        if call == "merge":
            self._check_untied()
        for layer in self.layers.values():
            getattr(layer, call)()

    def _check_untied(self) -> None:
        """Sparse layers write into the weight's own storage, which must then be theirs alone."""
        written = {
            id(m.weight): path for path, m in self.layers.items() if isinstance(m, SparseDeltaLinear | RoSALinear)
        }
        for path, module in self.model.named_modules() if written else ():
            for parameter in module._parameters.values():
                first = written.get(id(parameter))
                if first is not None and first != path:
                    raise RuntimeError(
                        f"merge: the weight of {first} is tied to that of {path}, which would change with it"
                    )

    def merge(self) -> None:
        """Put every adapter into its weight.

        Raises:
            RuntimeError: the method does not come down to a weight, or it writes into one that is another module's too; nothing is
                changed then.
        """
        self._merging("merge")

    def unmerge(self) -> None:
        """Take the adapters out again."""
        self._merging("unmerge")

    def merge_and_unload(self) -> nn.Module:
        """Merge, and put a plain linear layer in the place of every adapter layer: an nn.Linear, or an
        :class:`~peftfast.nn.NF4Linear` where the base is in 4 bits. The handle is of no more use then. Returns the model.

        Raises:
            RuntimeError: as :meth:`merge`.
        """
        self.merge()
        self.runtime.detach()
        for path, layer in self.layers.items():
            replace(self.model, path, _plain(layer))
        self.model._modules.pop(SHARED, None)
        self.model.__dict__.pop(HANDLE, None)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """To go on from, beside the model's and the optimiser's own."""
        return {"completed_steps": self.completed_steps, "runtime": self.runtime.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of :meth:`state_dict`."""
        self.completed_steps = state["completed_steps"]
        self.runtime.load_state_dict(state["runtime"])

    def __repr__(self) -> str:
        given = ", ".join(f"{f.name}={getattr(self.options, f.name)!r}" for f in dataclasses.fields(self.options))
        total = sum(parameter.numel() for parameter in self.model.parameters())
        lines = [
            f"{self.method.name}({given}): {len(self.layers)} layers, {self.trainable:,} trained of {total:,} parameters"
        ]
        reasons: dict[str, int] = {}
        for reason in self.skipped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"  {count} layers stay as they were: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def _plain(layer: Any) -> nn.Module:
    """The linear layer that a merged adapter layer has become."""
    if isinstance(getattr(layer, "base_layer", None), nn.Module):
        base: nn.Module = layer.base_layer
        return base
    if isinstance(layer, RoSALinear):  # whose low-rank term is computed beside its merged weight
        with torch.no_grad():
            low_rank = layer.scaling * (layer.lora_B @ layer.lora_A)
            weight = layer.weight.detach().to(low_rank.dtype) + low_rank
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        return plain.train(layer.training)
    if isinstance(layer, NF4Linear):
        return NF4Linear(layer.nf4, layer.bias, layer.compute_dtype).train(layer.training)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)
