"""What one call makes on a GPU and later calls find: from when on other streams may read it, and how long its memory is theirs."""

import torch

from .launch import aside

_read_by_graphs: set["Made"] = set()


class Made:
    """Tensors that the current stream of their device has just been told to make.

    A call that finds them on another stream comes to :meth:`meet`: that stream waits, once and on the device, until they are there, and
    the allocator is told who reads them. A stream that is being captured may wait for nothing outside of its graph: who captures has
    waited for the device, as ``torch.cuda.graph`` does; the graph knows no more than addresses, so that what it reads is kept for good.
    ``streams``: those that need not wait.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = [one for one in tensors if one.is_cuda]
        self.streams: set[int] = set()
        self._event = None
        if self._tensors:
            with torch.cuda.device(self._tensors[0].device):
                if not torch.cuda.is_current_stream_capturing():
                    stream = torch.cuda.current_stream()
                    self._event = stream.record_event()
                    self.streams.add(stream.cuda_stream)

    def meet(self) -> None:
        """Before the current stream of their device reads them."""
        if self._event is None:
            return
        raw = torch._C._cuda_getCurrentRawStream(self._tensors[0].get_device())
        if raw in self.streams and not torch.cuda.is_current_stream_capturing():
            return
        with torch.cuda.device(self._tensors[0].device):
            stream, capturing = torch.cuda.current_stream(), torch.cuda.is_current_stream_capturing()
        if capturing:
            _read_by_graphs.add(self)
            return
        stream.wait_event(self._event)
        with aside():
            for one in self._tensors:
                one.record_stream(stream)
        self.streams.add(stream.cuda_stream)

    def __reduce__(self) -> tuple[type["Made"], tuple[()]]:
        return Made, ()  # a copy is another's, made by the stream that copies
