"""``finetune --method NAME`` for every name that ``python -m peftfast methods`` lists and the command has no class of its own for."""

from __future__ import annotations

import argparse
import ast
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import UserError
from .finetune_base import Method, Target

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

STATE = "method.pt"
DATA_BATCHES = 32  # what an initialisation that reads data goes over
ADAM = {"adam_beta1": 1.0, "adam_beta2": 1.0, "adam_epsilon": math.inf}  # TrainingArguments -> what they are below
SHARED_NAMES = ("r", "lora_alpha", "lora_dropout", "use_rslora")  # options of the command that a method may have too


class Named(Method):
    """A method of :func:`peftfast.adapt` inside transformers' Trainer: its penalty is added to the loss, its step follows the
    optimiser's, and a checkpoint keeps all its tensors beside what it counts."""

    name: ClassVar[str] = ""
    options = {"r": None, "lora_alpha": None, "lora_dropout": None, "use_rslora": None}
    refused = dict.fromkeys(("optim", "optim_args"), "the method says what its optimiser is")

    def __init__(self) -> None:
        self.handle: Any = None
        self._target: Target | None = None
        self._counted: dict[str, Any] | None = None
        self._adam: dict[str, float] = {}  # those of ADAM that were given

    def _given(self, options: argparse.Namespace) -> dict[str, Any]:
        from ..methods.registry import get

        given = {name: getattr(options, name) for name in SHARED_NAMES if getattr(options, name) is not None}
        for text in options.method_option or []:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--method-option: expected NAME=VALUE, got {text!r}")
            given[name.strip().replace("-", "_")] = _value(value.strip())
        known = get(self.name).defaults()
        for name in given:
            if name not in known:
                where = f"--{name}" if name in SHARED_NAMES else "--method-option"
                raise UserError(f"{where}: {self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
        return given

    def check(self, options: argparse.Namespace, extra: Mapping[str, Any]) -> None:
        super().check(options, extra)
        self._adam = {name: extra[name] for name in ADAM if name in extra}
        for name, value in self._adam.items():
            if not 0.0 <= value < ADAM[name]:
                below = f" and below {ADAM[name]:g}" if ADAM[name] < math.inf else ""
                raise UserError(f"--{name}: expected a number of at least 0{below}, got {value!r}")
        # How many steps the records make is known when they are read: until then no number of an option is too many.
        self._checked(self._given(options), options.max_steps or sys.maxsize)

    def _checked(self, given: dict[str, Any], total_steps: int) -> dict[str, Any]:
        """``given``, with the run's steps where the method asks for them and they are not given."""
        from ..methods.registry import get, read_options

        method = get(self.name)
        if "total_steps" in method.defaults():
            given = {"total_steps": total_steps, **given}
        try:
            read_options(method, given)
        except (TypeError, ValueError) as error:
            raise UserError(f"--method-option: {error}") from None
        return given

    def make_optimizer(self, args: Any) -> Any:
        """The method's optimiser. Its betas and its epsilon are its own where none were given."""
        made = self.handle.optimizer(args.learning_rate, weight_decay=args.weight_decay)
        for group in made.param_groups if self._adam else ():
            if not {"betas", "eps"} <= group.keys():
                name = next(iter(self._adam))
                raise UserError(f"--{name}: not with --method {self.name}: {type(made).__name__} has none")
            beta1, beta2 = group["betas"]
            group["betas"] = (self._adam.get("adam_beta1", beta1), self._adam.get("adam_beta2", beta2))
            group["eps"] = self._adam.get("adam_epsilon", group["eps"])
        return made

    def adapt(self, model: Any, target: Target) -> Any:
        from ..methods.adapting import adapt
        from ..methods.registry import get

        self._target = target
        method, given = get(self.name), self._checked(self._given(target.options), target.total_steps)
        self.handle = adapt(
            model,
            self.name,
            target_modules=target.modules,
            exclude_modules=target.whole or None,
            modules_to_save=[*target.whole, *_heads(model)] if target.classify else target.whole,
            task_type=target.task_type,
            batches=target.batches(DATA_BATCHES) if method.reads_data and target.batches is not None else None,
            **given,
        )
        print(self.handle)
        return model

    def trainer(self, **settings: Any) -> Trainer:
        model = settings["model"]
        # transformers asks a 4-bit model for adapters that it knows, and it knows PEFT's alone.
        attached = getattr(model, "_hf_peft_config_loaded", False)
        model._hf_peft_config_loaded = True
        try:
            return _trainer_class()(self, **settings)
        finally:
            model._hf_peft_config_loaded = attached

    def callbacks(self) -> list[TrainerCallback]:
        from transformers import TrainerCallback

        method = self

        class Steps(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                # When the optimiser is there: a method may take its states along.
                if method._counted is not None:
                    method.handle.load_state_dict(method._counted)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                optimizer = given.get("optimizer")
                method.handle.step(getattr(optimizer, "optimizer", optimizer))

        return [Steps()]

    def trained(self, model: Any) -> dict[str, Any]:
        from ..methods.saved import own_contents

        return super().trained(model) | own_contents(self.handle)[1]

    def save(self, model: Any, folder: Path) -> None:
        from ..integrations.adapter_files import save_adapter

        assert self._target is not None
        save_adapter(model, folder, base_model_name_or_path=str(self._target.options.model))

    def write_checkpoint(self, folder: Path) -> None:
        """All tensors of the adapter, and what the method counts."""
        import torch

        from ..methods.saved import own_contents

        tensors = {name: tensor.detach().cpu() for name, tensor in own_contents(self.handle)[1].items()}
        whole = {name: self.handle.model.get_submodule(name).state_dict() for name in self.handle.modules_to_save}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"tensors": tensors, "whole": whole, "handle": self.handle.state_dict()}, folder / STATE)

    def read_checkpoint(self, folder: Path) -> None:
        """What :meth:`write_checkpoint` wrote."""
        import torch

        from ..methods.saved import fill_own

        kept = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        fill_own(self.handle, kept["tensors"])
        for name, state in kept["whole"].items():
            self.handle.model.get_submodule(name).load_state_dict(state)
        self._counted = kept["handle"]

    def save_state(self, folder: Path) -> None:
        self.write_checkpoint(folder)


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def named(name: str) -> type[Named]:
    """The class for a method's name.

    Raises:
        UserError: no method of that name is put on a model.
    """
    from ..methods.registry import get

    try:
        method = get(name)
    except ValueError as error:
        raise UserError(f"--method: {str(error).removeprefix('method: ')}") from None
    if method.build is None:
        raise UserError(f"--method: {name} is not put on a model (see `python -m peftfast methods {name}`)")
    rate = {"learning_rate": method.learning_rate}
    return type(f"Named_{name}", (Named,), {"name": name, "options": {**Named.options, **rate}})


def _heads(model: Any) -> list[str]:
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SEQ_CLS_HEAD_NAMES]


def _trainer_class() -> Any:
    from transformers import Trainer

    class NamedTrainer(Trainer):
        """The method's optimiser, penalty and checkpoints."""

        def __init__(self, method: Named, **settings: Any) -> None:
            super().__init__(**settings)
            self._method = method

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = self._method.make_optimizer(self.args)
            return self.optimizer

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            try:
                penalty = self._method.handle.loss() if model.training else 0.0
            except (ValueError, RuntimeError) as error:  # what does not go with how the model is run, as checkpointing
                if isinstance(error, RuntimeError) and not str(error).startswith("handle.loss"):
                    raise
                raise UserError(f"--method {self._method.name}: {error}") from None
            if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
                penalty = penalty / self.args.gradient_accumulation_steps  # the loss is a part of the step's then
            if return_outputs:
                return found[0] + penalty, found[1]
            return found + penalty

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            self._method.write_checkpoint(Path(str(output_dir or self.args.output_dir)))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            self._method.read_checkpoint(Path(resume_from_checkpoint))

    return NamedTrainer
