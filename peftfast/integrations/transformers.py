"""transformers' Trainer, and every trainer derived from it (TRL's): patching where the trainer itself builds the PEFT model.

Importing this imports transformers.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from . import patch, peft_group_state, report
from .patch_report import PatchReport

__all__ = ["PatchCallback"]

logger = logging.getLogger("peftfast")


class PatchCallback(TrainerCallback, ExportableState):
    """``Trainer(..., callbacks=[PatchCallback()])``: :func:`peftfast.patch` on the trainer's model.

    Patches in ``on_init_end``, when TRL's trainers have wrapped the model by their ``peft_config`` and neither accelerate nor FSDP
    has wrapped it yet, and again in ``on_train_begin`` if ``model_init`` has made another model by then.
    ``peftfast.patch(trainer.model)`` after the trainer is made does the same for one model.

    A checkpoint's ``trainer_state.json`` keeps which layers run together, which the first forwards show: without it the first step of a
    resumed run would run them alone, and on a GPU draw other dropout masks from there on than a run that was never stopped.

    Args:
        strict: raise instead of leaving a layer stock, as in :func:`peftfast.patch`.

    Attributes:
        report: what :func:`peftfast.patch` returned last; None before.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.report: PatchReport | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # a reference of this kind cannot be pickled

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: the arguments, and what is known of the model's groups of layers."""
        model = None if self._model is None else self._model()
        groups = {} if model is None else peft_group_state.state_of(model)
        return {"args": {"strict": self.strict}, "attributes": {"groups": groups}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        # With model_init the trainer holds a model at this point too; only a trainer without any gives None.
        if model is not None:
            self._patch(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is None:
            return
        if any(row.fused and not row.patched for row in report(model).layers):
            self._patch(model)
        self._model = weakref.ref(model)
        saved = state.stateful_callbacks.get(type(self).__name__, [])
        for one in saved if isinstance(saved, list) else [saved]:
            peft_group_state.restore(model, one.get("attributes", {}).get("groups", {}))

    def _patch(self, model: nn.Module) -> None:
        self.report = patch(model, strict=self.strict)
        self._model = weakref.ref(model)
        for line in str(self.report).splitlines()[:1]:
            logger.info(line)
