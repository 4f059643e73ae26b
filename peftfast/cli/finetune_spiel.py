"""``finetune --method spiel``: a sparse delta on linear layers, whose support moves while it is trained, written as PEFT's SHiRA."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, workers
from .errors import UserError
from .finetune_base import Method, Target, option

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

STATE = "spiel.pt"


class SpIELMethod(Method):
    """``SparseDeltaLinear`` in place of the linear layers, SparseAdamW, and SpIEL-AG's drops and growths after its steps. Of an N x K
    layer r (N + K) weights are trained, as in SHiRA: the number of LoRA's at rank r."""

    help = "sparse deltas on a support that moves"
    options = {"reselection_steps": 20, "selection_accumulation_steps": 5, "initial_reselection_rate": 0.2}
    refused = {
        **dict.fromkeys(("optim", "optim_args"), "it has an optimiser of its own"),
        "fp16": "the gradients that a support is chosen by would carry the loss scale; --bf16 needs none",
    }

    def __init__(self) -> None:
        self.spiel: Any = None
        self._optimizer: Any = None
        self._target: Target | None = None
        self._whole: list[str] = []
        self._resume_from: Path | None = None

    @classmethod
    def add_options(cls, parse: argparse.ArgumentParser) -> None:
        group = parse.add_argument_group("spiel")
        own = cls.options
        option(
            group,
            "reselection_steps",
            type=arguments.integer(2),
            help=f"from one move to the next (default: {own['reselection_steps']})",
        )
        option(
            group,
            "selection_accumulation_steps",
            type=arguments.integer(1),
            help=f"steps over which candidates' gradients are summed (default: {own['selection_accumulation_steps']})",
        )
        option(
            group,
            "initial_reselection_rate",
            type=arguments.number(0, 1, above_lowest=True),
            help=f"part of the weights that moves, falling to 0 at the end (default: {own['initial_reselection_rate']})",
        )

    def check(self, options: argparse.Namespace, extra: Any) -> None:
        super().check(options, extra)
        if options.selection_accumulation_steps >= options.reselection_steps:
            raise UserError(
                f"--selection_accumulation_steps: expected fewer than --reselection_steps, {options.reselection_steps}, "
                f"got {options.selection_accumulation_steps}"
            )

    def adapt(self, model: Any, target: Target) -> Any:
        import torch

        from ..nn import SparseDeltaLinear

        self._target = target
        rank = target.options.r
        self._whole = [*target.whole, *_heads(model)] if target.classify else list(target.whole)
        linear = _targets(model, target.modules, self._whole)
        for name, layer in linear.items():
            count, size = rank * (layer.in_features + layer.out_features), layer.in_features * layer.out_features
            if count > size:
                raise ValueError(f"{name}: r = {rank} asks for {count} of its {size} weights; expected a smaller --r")
        model.requires_grad_(False)
        generator = torch.Generator(device=next(model.parameters()).device).manual_seed(target.options.seed)
        for name, layer in linear.items():
            count, size = rank * (layer.in_features + layer.out_features), layer.in_features * layer.out_features
            sparse = SparseDeltaLinear.from_linear(layer, density=count / size, generator=generator)
            model.set_submodule(name, sparse)
        for name in self._whole:
            _train_whole(model.get_submodule(name))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{len(linear)} sparse layers, {trained:,} weights trained")
        return model

    def begin(self, scratch: Path, resume_from: Path | None) -> None:
        self._resume_from = resume_from

    def trainer(self, **settings: Any) -> "Trainer":
        model, args = settings["model"], settings["args"]
        # Supports move alike on all workers; DDP would send them at each forward.
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False
        # transformers asks a 4-bit model for adapters that it knows, and it knows PEFT's alone.
        attached = getattr(model, "_hf_peft_config_loaded", False)
        model._hf_peft_config_loaded = True
        try:
            return _trainer_class()(self, **settings)
        finally:
            model._hf_peft_config_loaded = attached

    def make_optimizer(self, model: Any, args: Any) -> Any:
        from ..optim import SparseAdamW

        self._optimizer = SparseAdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        return self._optimizer

    def make_schedule(self, model: Any, total_steps: int) -> None:
        from ..methods import SpIEL

        assert self._target is not None
        options = self._target.options
        self.spiel = SpIEL(
            model,
            self._optimizer,
            total_steps=total_steps,
            reselection_steps=options.reselection_steps,
            accumulation_steps=options.selection_accumulation_steps,
            initial_rate=options.initial_reselection_rate,
            process_group=workers.count() > 1,
        )

    def callbacks(self) -> "list[TrainerCallback]":
        import torch
        from transformers import TrainerCallback

        method = self

        class MoveSupports(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if method._resume_from is not None:
                    # Of several workers on a CPU it is "cpu:0", which torch.load does not know.
                    device = "cpu" if args.device.type == "cpu" else args.device
                    kept = torch.load(method._resume_from / STATE, map_location=device, weights_only=True)
                    method.spiel.load_state_dict(kept)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                method.spiel.step()

        return [MoveSupports()]

    def trained(self, model: Any) -> dict[str, Any]:
        supports = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".delta_indices")}
        return super().trained(model) | supports

    def save(self, model: Any, folder: Path) -> None:
        from ..methods import save_shira

        assert self._target is not None
        save_shira(
            model,
            folder,
            base_model=str(self._target.options.model),
            task_type=self._target.task_type,
            modules_to_save=self._whole,
        )

    def load(self, model: Any, folder: Path) -> None:
        from ..methods import load_shira

        load_shira(model, folder)

    def save_state(self, folder: Path) -> None:
        import torch

        torch.save(self.spiel.state_dict(), folder / STATE)


def _heads(model: Any) -> list[str]:
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SEQ_CLS_HEAD_NAMES]


def _targets(model: Any, wanted: str | list[str], whole: list[str]) -> dict[str, Any]:
    """The linear layers that are meant, by name; all-linear: all but the output layer and what is trained whole."""
    from torch import nn

    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name == one or name.startswith(f"{one}.") for one in whole)
        and (module is not output or not isinstance(wanted, str))
    }
    if isinstance(wanted, str):
        return linear
    return {name: m for name, m in linear.items() if any(name == one or name.endswith(f".{one}") for one in wanted)}


def _train_whole(module: Any) -> None:
    """In float32, as SparseAdamW takes parameters; what comes in is brought to it, since a 16-bit base gives 16 bits."""
    import torch

    if any(p.dtype != torch.float32 for p in module.parameters()):
        module.to(torch.float32)
        module.register_forward_pre_hook(_widened)
    module.requires_grad_(True)


def _widened(module: Any, args: Any) -> Any:
    import torch

    return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def _trainer_class() -> Any:
    from transformers import Trainer

    class SpIELTrainer(Trainer):
        """SparseAdamW as the optimiser; a checkpoint's adapter is a SHiRA directory and not a whole model."""

        def __init__(self, method: SpIELMethod, **settings: Any) -> None:
            super().__init__(**settings)
            self._method = method

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = self._method.make_optimizer(self.model if model is None else model, self.args)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            made = super().create_scheduler(num_training_steps, optimizer)
            if self._method.spiel is None:
                self._method.make_schedule(self.model, num_training_steps)
            return made

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            self._method.save(self.model, Path(str(output_dir or self.args.output_dir)))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            self._method.load(self.model if model is None else model, Path(resume_from_checkpoint))

    return SpIELTrainer
