"""What a training step takes: the peak of memory above a mark, and the bytes that autograd saves for backward."""

import ctypes
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

_RESET_PEAK = "/proc/self/clear_refs"
_STATUS = "/proc/self/status"


def _status_bytes(field: str) -> int | None:
    try:
        with open(_STATUS) as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_peak() -> bool:
    try:
        with open(_RESET_PEAK, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Have the C library return what is free: blocks inside its heap stay resident when freed, and would count as in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def memory_in_use(device: str) -> int | None:
    """Bytes in use: torch's on CUDA; on the CPU the process's resident pages, after the C library has given back what is free.

    None where the system does not say.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    _give_back()
    return _status_bytes("VmRSS")


def peak_above(mark: int | None, device: str, run: Callable[[], None]) -> int | None:
    """The peak of memory while ``run`` runs, in bytes above ``mark`` (from :func:`memory_in_use`); None where it cannot be known.

    On the CPU it is VmHWM of the process, reset by writing 5 to /proc/self/clear_refs (proc(5)): Linux only.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak: int | None = torch.cuda.max_memory_allocated(device)
    else:
        _give_back()
        known = _reset_peak()
        run()
        peak = _status_bytes("VmHWM") if known else None
    return None if peak is None or mark is None else max(0, peak - mark)


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps between ``forward`` and its backward, the model's own tensors not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A sparse tensor, such as stock SHiRA makes, has no storage but those of its parts.
        parts = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph hangs on the result and keeps every saved tensor alive, so that no address serves twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())
