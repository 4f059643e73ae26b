"""transformers' Trainer, and every trainer derived from it (TRL's): patching where the trainer itself builds the PEFT model.

Importing this imports transformers.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from . import patch, report
from .patch_report import PatchReport

__all__ = ["PatchCallback"]

logger = logging.getLogger("peftfast")


class PatchCallback(TrainerCallback):
    """``Trainer(..., callbacks=[PatchCallback()])``: :func:`peftfast.patch` on the trainer's model.

    Patches in ``on_init_end``, when TRL's trainers have wrapped the model by their ``peft_config`` and neither accelerate nor FSDP
    has wrapped it yet, and again in ``on_train_begin`` if ``model_init`` has made another model by then.
    ``peftfast.patch(trainer.model)`` after the trainer is made does the same for one model.

    Args:
        strict: raise instead of leaving a layer stock, as in :func:`peftfast.patch`.

    Attributes:
        report: what :func:`peftfast.patch` returned last; None before.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.report: PatchReport | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        # With model_init the trainer holds a model at this point too; only a trainer without any gives None.
        if model is not None:
            self._patch(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None and any(row.fused and not row.patched for row in report(model).layers):
            self._patch(model)

    def _patch(self, model: nn.Module) -> None:
        self.report = patch(model, strict=self.strict)
        for line in str(self.report).splitlines()[:1]:
            logger.info(line)
