"""What a method of ``finetune`` is: its options, how it adapts a model, what trains it, and what is written."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

# Options that every method has, and whose default is the method's.
COMMON: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "r": 16,
}


def option(group: argparse._ArgumentGroup, name: str, *others: str, **settings: Any) -> None:
    """An option that may be written --with_underscores, as transformers does, or --with-hyphens, and by other names. Its help ends with
    the default, unless it says that itself."""
    default, said = settings.get("default"), settings.get("help", "")
    if not (default is None or isinstance(default, bool) or "default" in said):
        shown = "default: %(default)g" if isinstance(default, float) else "default: %(default)s"
        settings["help"] = f"{said} ({shown})" if said else shown
    spellings = dict.fromkeys(f"--{spelt}" for one in (name, *others) for spelt in (one.replace("_", "-"), one))
    group.add_argument(*spellings, dest=name, **settings)


@dataclass
class Target:
    """What is to be adapted.

    Attributes:
        options: of the command, the method's defaults filled in.
        classify: a sequence classifier, else a causal language model.
        modules: as PEFT's target_modules takes them: "all-linear", or names.
        whole: paths of new modules besides the head, which are trained and saved whole.
        four_bit: the base's linear layers are in 4 bits.
        batches: (how many) -> the first batches of the training data, for a method that reads data before it trains.
        total_steps: optimiser steps of the run.
        tokenizer: the model's.
    """

    options: argparse.Namespace
    classify: bool
    modules: str | list[str]
    whole: list[str] = field(default_factory=list)
    four_bit: bool = False
    batches: Callable[[int], list[dict[str, Any]]] | None = None
    total_steps: int = 1
    tokenizer: Any = None

    @property
    def task_type(self) -> str:
        return "SEQ_CLS" if self.classify else "CAUSAL_LM"


class Method:
    """One run's method. Everything has a default but :meth:`adapt`.

    Class attributes:
        help: a few words for --help.
        title: what errors call it, where that is not its name.
        packages: importable name -> what to ask pip for.
        four_bit: trains on a 4-bit base, whether --load_in_4bit is given or not.
        options: its own options and their defaults. The parser's are None; given with a method that has none of that name they are
            refused. Those of :data:`COMMON` may be among them, with other defaults.
        refused: TrainingArguments that it does not take -> why.
        result: what ``--out`` gets, in a word.
    """

    help: ClassVar[str] = ""
    title: ClassVar[str] = ""
    packages: ClassVar[Mapping[str, str]] = {}
    four_bit: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {}
    refused: ClassVar[Mapping[str, str]] = {}
    result: ClassVar[str] = "adapter"

    @classmethod
    def chosen(cls, options: argparse.Namespace) -> "type[Method]":
        """The class itself, or one beside it that an option asks for."""
        return cls

    @classmethod
    def add_options(cls, parse: argparse.ArgumentParser) -> None:
        """Add the options that no other method has, each with the default None."""

    def check(self, options: argparse.Namespace, extra: Mapping[str, Any]) -> None:
        """Raise UserError for values that do not go together. ``extra``: the further TrainingArguments that were given."""
        for name, why in self.refused.items():
            if extra.get(name) or getattr(options, name, None):
                raise UserError(f"--{name}: not with --method {options.method}: {why}")

    def adapt(self, model: Any, target: Target) -> Any:
        """The model to train: ``model`` with all of it frozen but what the method trains. Raises ValueError for modules that are not
        served."""
        raise NotImplementedError

    def trainer(self, **settings: Any) -> "Trainer":
        """transformers' Trainer, or one of its subclasses, from its own arguments (``model``, ``args`` and so on)."""
        from transformers import Trainer

        return Trainer(**settings)

    def callbacks(self) -> "list[TrainerCallback]":
        """Further callbacks of the Trainer."""
        return []

    def begin(self, scratch: Path, resume_from: Path | None) -> None:
        """Called before the Trainer is made. ``scratch``: a folder for the time of the run. ``resume_from``: a whole checkpoint, with
        what :meth:`save_state` wrote into it."""

    def trained(self, model: Any) -> dict[str, Any]:
        """The tensors that training changes, by name: those of all workers are to be the same."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as a PEFT directory."""
        model.save_pretrained(str(folder))

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint what the Trainer does not: it keeps the adapter, the optimiser's ``state_dict``, the schedule, and
        the state of the random numbers and of the data."""

    def finish(self, folder: Path) -> None:
        """Write beside the finished adapter what else the method gives."""
