"""The one way in which the kernels of this folder are launched, so that whoever records a call sees its launches."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_local = threading.local()


def freed(tensor) -> bool:
    """Whether its memory was given back under elements that remain (``untyped_storage().resize_(0)``), as FSDP and offloading do."""
    return not tensor.untyped_storage().nbytes() and tensor.numel() > 0


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)``: the ordinary arguments in the kernel's order, then by name its constexprs and the
    compiler's options. A recording holds no call with a tensor whose memory was freed; a call that is not recorded asks here.

    Products and sums are contracted unless the launch says otherwise: left out, Triton 3.9 warns, and 3.10 is to decide differently."""
    constants.setdefault("enable_fp_fusion", True)
    for place, one in enumerate(args):
        if isinstance(one, torch.Tensor) and freed(one):
            raise RuntimeError(
                f"argument {place} of a kernel: expected {one.nbytes} bytes of memory, got a storage that was freed"
            )
    recorder = getattr(_local, "recorder", None)
    if recorder is None:
        kernel[grid](*args, **constants)
        return
    with aside():  # the interpreter copies tensors
        compiled = kernel[grid](*args, **constants)
    recorder.launched(kernel, compiled, grid, args, constants)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What the block does is no part of the call, whoever records it: it would be done once however often the call is repeated."""
    recorder = getattr(_local, "recorder", None)
    with contextlib.nullcontext() if recorder is None else recorder.aside():
        yield


def constant(tensor, *addressed) -> None:
    """Tell who records that ``tensor`` is the same for every call of these plain values and of these addresses: those of the tensors
    ``addressed``."""
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.constant(tensor, addressed)


def unrepeatable(reason: str) -> None:
    """Tell who records that this call is more than launches and operators on one stream, and must not be done again from a record."""
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.refuse(reason)


def recording() -> bool:
    """Whether this thread's launches are being recorded."""
    return getattr(_local, "recorder", None) is not None


@contextlib.contextmanager
def recorded_by(recorder) -> Iterator[None]:
    """Launches of this thread are told to ``recorder``."""
    _local.recorder = recorder
    try:
        yield
    finally:
        _local.recorder = None
