"""What the device knows, read by the host when it has come and not before."""

from __future__ import annotations

import torch
from torch import Tensor


class Unread:
    """Scalars of a step on their way to the host."""

    def __init__(self, step: int, seeds: list[int], lrs: list[float], scalars: Tensor) -> None:
        self.step, self.seeds, self.lrs = step, seeds, lrs
        self._event = None
        self._host = scalars
        if scalars.is_cuda:
            self._host = torch.empty(scalars.shape, dtype=scalars.dtype, device="cpu", pin_memory=True)
            self._host.copy_(scalars, non_blocking=True)
            self._event = torch.cuda.Event()
            # Of the scalars' device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(scalars.device))

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
