"""``finetune --method mezo``: LoRA's parameters, or with ``--full_model`` all of them, trained by forward passes alone
(:class:`peftfast.optim.MeZO`) inside transformers' Trainer, whose data, schedule, logging and checkpoints stay what they are."""

import argparse
import functools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, workers
from .checkpoint import SEEDS
from .errors import UserError
from .finetune_base import Method, Target, option
from .finetune_lora import LORA_OPTIONS, LoRA

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

NO_BACKWARD = "it has no backward"
FULL_MODEL_RATE = 1e-6  # the paper's runs of a full model take 1e-7 to 1e-6


class MeZOMethod(LoRA):
    """PEFT's LoRA, patched, and MeZO in the place of backward and AdamW."""

    help = "lora trained by forward passes alone"
    # Rates of the paper's runs with LoRA are 1e-5 to 1e-4, at a constant rate and without dropout (arXiv 2305.17333, appendix).
    options = LORA_OPTIONS | {
        "lora_dropout": 0.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "full_model": False,
        "zo_eps": 1e-3,
        "zo_directions": 1,
        "zo_clip": None,
    }
    refused = {
        "gradient_checkpointing": NO_BACKWARD,
        "max_grad_norm": "it has no gradients; --zo_clip cuts the projected one",
        **dict.fromkeys(("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"), "it is the optimiser"),
        "fp16": "a loss scale would hide the difference of two losses; --bf16 needs none",
    }

    def __init__(self) -> None:
        self.optimizer: Any = None
        self._given: argparse.Namespace | None = None
        self._log = Path()
        self._resume_from: Path | None = None

    @classmethod
    def add_options(cls, parse: argparse.ArgumentParser) -> None:
        group = parse.add_argument_group("mezo")
        above_zero = arguments.number(0, above_lowest=True)
        option(
            group,
            "full_model",
            action="store_true",
            default=None,
            help="train every parameter, without adapter: --out is then a model's directory, until the end with the model twice "
            f"(default learning rate: {FULL_MODEL_RATE:g})",
        )
        option(group, "zo_eps", type=above_zero, help=f"size of the perturbation (default: {cls.options['zo_eps']:g})")
        option(
            group,
            "zo_directions",
            type=arguments.integer(1),
            help=f"directions a step (default: {cls.options['zo_directions']})",
        )
        option(group, "zo_clip", type=above_zero, help="largest projected gradient (default: none)")

    @classmethod
    def chosen(cls, options: argparse.Namespace) -> type[Method]:
        return FullModelMeZO if options.full_model else cls

    def adapt(self, model: Any, target: Any) -> Any:
        self._given = target.options
        return super().adapt(model, target)

    def begin(self, scratch: Path, resume_from: Path | None) -> None:
        self._log, self._resume_from = scratch / SEEDS, resume_from

    def trainer(self, **settings: Any) -> "Trainer":
        return _trainer_class()(self, **settings)

    def make_optimizer(self, model: Any, args: Any) -> Any:
        """MeZO over the adapter, with a log that a resumed run goes on with."""
        from ..optim import MeZO

        class SteppedByTheLossItself(MeZO):
            """The Trainer calls ``step()`` after its training step, which has taken the step already, with its closures."""

            def step(self, closure: Any = None, *, paired: bool = False) -> Any:  # type: ignore[override]
                return None if closure is None else super().step(closure, paired=paired)

        assert self._given is not None
        self.optimizer = SteppedByTheLossItself(
            model,
            lr=args.learning_rate,
            eps=self._given.zo_eps,
            directions=self._given.zo_directions,
            clip=self._given.zo_clip,
            weight_decay=args.weight_decay,
            seed=args.seed,
            log=None if self._resume_from is not None else self._log,
            process_group=workers.count() > 1,
        )
        return self.optimizer

    def callbacks(self) -> "list[TrainerCallback]":
        from transformers import TrainerCallback

        method = self

        class GoOnWithTheLog(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                # The optimiser's state is loaded by now, and says how far the log goes.
                if method._resume_from is not None:
                    shutil.copyfile(method._resume_from / SEEDS, method._log)
                    method.optimizer.resume_log(method._log)

        return [GoOnWithTheLog()]

    def save_state(self, folder: Path) -> None:
        self._settle()
        shutil.copyfile(self._log, folder / SEEDS)

    def finish(self, folder: Path) -> None:
        self._settle()
        shutil.copyfile(self._log, folder / SEEDS)

    def _settle(self) -> None:
        with named_losses():
            self.optimizer.check()


class FullModelMeZO(MeZOMethod):
    """MeZO over every parameter of the model."""

    title = "mezo with --full_model"
    result = "model"
    options = {
        **{name: value for name, value in MeZOMethod.options.items() if name not in LORA_OPTIONS},
        "r": None,
        "learning_rate": FULL_MODEL_RATE,
    }

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: Any = None

    def check(self, options: argparse.Namespace, extra: Any) -> None:
        super().check(options, extra)
        if options.load_in_4bit:
            raise UserError("--load_in_4bit: not with --full_model: weights in 4 bits cannot be moved")
        if options.r is not None or options.target_modules != ["all-linear"]:
            name = "r" if options.r is not None else "target_modules"
            raise UserError(f"--{name}: not with --full_model, which trains every parameter")

    def adapt(self, model: Any, target: Target) -> Any:
        self._given, self._tokenizer = target.options, target.tokenizer
        model.requires_grad_(True)
        print(f"full model, {sum(p.numel() for p in model.parameters()):,} weights trained")
        return model

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(str(folder))
        self._tokenizer.save_pretrained(str(folder))


class named_losses:
    """A loss that is not finite, which MeZO tells a step later, as a line for the user."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and "not finite" in str(error):
            raise UserError(f"{str(error).partition(';')[0]}: lower --learning_rate or --zo_eps") from None


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer

    class MeZOTrainer(Trainer):
        """A step is the closures of its micro-batches, handed to the optimiser at the last of them. No graph is recorded."""

        def __init__(self, method: MeZOMethod, **settings: Any) -> None:
            super().__init__(**settings)
            self._method = method
            self._waiting: list[Any] = []
            # Without DistributedDataParallel, which keeps room for every gradient: the workers exchange losses alone.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = self._method.make_optimizer(self.model if model is None else model, self.args)
            return self.optimizer

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
            """There is none to log."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            self._waiting.append(self._prepare_inputs(inputs))
            if not self.accelerator.sync_gradients:
                return torch.zeros((), device=self.args.device)
            batches, self._waiting = self._waiting, []
            # Such a loss is a part of the whole batch's; MeZO takes the mean of the closures.
            part = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or bool(self.compute_loss_func)

            def closure_of(batch: Any) -> Any:
                def closure() -> Any:
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
                    return loss * len(batches) if part else loss

                return closure

            with named_losses():
                return self._method.optimizer.step([closure_of(batch) for batch in batches])

    return MeZOTrainer
