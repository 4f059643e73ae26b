"""Decoding the next part of a weight on a side stream while the current stream multiplies by this one.

    side    decode 0 | decode 1 | (after product 0) decode 2 | (after product 1) decode 3
    main               (after decode 0) product 0 | (after decode 1) product 1 | ...

Two buffers, of which the side stream writes one while the other is read. Every wait is for an event: nothing waits on the host, and the
same calls can be captured in a CUDA graph, which the side stream joins by its first wait and leaves by the main stream's last. Buffers
come from the caller, allocated on the main stream before the fork, and may be freed after :func:`overlapped` has returned: the main
stream has by then been told to wait for everything that the side stream was given, so that what the allocator hands out next on it
comes later. No cross-stream bookkeeping of the allocator (record_stream), which would hold the memory back.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import launch as launches  # type: ignore[attr-defined]

_lock = threading.Lock()
_streams: dict[tuple[int, int], Any] = {}


def side_stream(device: torch.device, main: Any) -> Any:
    """The device's side stream, of high priority: its programs are short and few beside a product's, which must not make them wait.

    One a device, whoever asks; and one for each stream that is being captured, since a stream that has joined a capture takes no other
    work until the capture ends.
    """
    with torch.cuda.stream(main):  # on its own device, which need not be the current one
        capturing = torch.cuda.is_current_stream_capturing()
    key = (device.index or 0, main.cuda_stream if capturing else -1)
    with _lock:
        if key not in _streams:
            _streams[key] = torch.cuda.Stream(device, priority=-1)
        return _streams[key]


def overlapped(
    parts: int, decode: Callable[[int, int], None], multiply: Callable[[int, int], None], device: torch.device
) -> None:
    """``decode(part, buffer)`` on the side stream and ``multiply(part, buffer)`` on the current one, for all parts in order; buffer is
    0 or 1. Neither allocates what the other reads."""
    launches.unrepeatable("two streams")
    main = torch.cuda.current_stream(device)
    side = side_stream(device, main)
    read: list[Any] = [None, None]  # by the product that read each buffer last

    def decoded(part: int) -> Any:
        if read[part % 2] is not None:
            side.wait_event(read[part % 2])
        with torch.cuda.stream(side):
            decode(part, part % 2)
        return side.record_event()

    # The weight may just have been written, and the buffers' memory just been read, on the main stream.
    side.wait_event(main.record_event())
    try:
        ready = decoded(0)
        for part in range(parts):
            following = decoded(part + 1) if part + 1 < parts else None
            main.wait_event(ready)
            multiply(part, part % 2)
            read[part % 2] = main.record_event()
            ready = following
    except BaseException:
        main.wait_stream(side)  # whoever frees the buffers now does it on the main stream
        raise
