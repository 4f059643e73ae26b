"""Tables of addresses and sizes that kernels read on the device."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from .launch import aside
from .streams import Made

Tables = tuple[torch.Tensor, ...]


class DeviceTables:
    """What was made on the host for a call's plain values and addresses, on the device, where the next call with the same finds it. Of
    those that nothing asked for ``most`` are kept, and for good what a captured graph reads: it knows no more than their addresses."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, tuple[Tables, Made]] = OrderedDict()
        self._captured: dict[Hashable, tuple[Tables, Made]] = {}
        self._lock = threading.Lock()  # backwards run in autograd's threads

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tables]) -> Tables:
        """The tables of ``key``, which ``make`` gives on the host.

        Raises:
            RuntimeError: they are missing while a graph is captured, when nothing can be copied from the host.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            found = self._kept.get(key) or self._captured.get(key)
            if found is None:
                if capturing:
                    raise RuntimeError(
                        "a CUDA graph is being captured, and these tensors lie at addresses that no call before had: make the call "
                        "once before the capture, with parameters of one dtype and gradients that keep their place "
                        "(zero_grad(set_to_none=False))"
                    )
                # Whoever records the call holds the tables as they are, not how they came.
                with aside():
                    tables = tuple(_copied(table, device) for table in make())
                found = tables, Made(*tables)
            if capturing:
                self._captured[key] = found
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            found[1].meet()
        return found[0]


def _copied(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; from pinned memory, for which nobody waits."""
    if device.type != "cuda":
        return table.to(device)
    pinned = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(table).to(device, non_blocking=True)
