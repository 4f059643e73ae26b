"""Optimisers: torch.optim.Optimizer subclasses."""

from .mezo import MeZO
from .quantised import trainable_scales
from .seed_log import replay

__all__ = ["MeZO", "replay", "trainable_scales"]
