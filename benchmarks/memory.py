"""What a call takes in memory: the peak above the baseline, the bytes saved for backward, and scratch."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .registry import Work

Steps = dict[str, tuple[Callable[[], Any], Callable[[], AbstractContextManager[None]]]]
_MARK = "benchmarks.memory:"


def saved_for_backward(work: Work) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters not counted."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in work.owned}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A sparse tensor, such as stock SHiRA makes, has no storage but those of its parts.
        parts = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in owned:
                sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph hangs on the results and keeps every saved tensor alive, so that no address serves twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = work.forward()
    del results
    return sum(sizes.values())


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler of a CPU build of torch writes a line to file descriptor 2 at each start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peaks_cuda(steps: Steps, device: str) -> dict[str, tuple[int, int]]:
    found = {}
    for name, (step, active) in steps.items():
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with active():
            kept = step()
        torch.cuda.synchronize(device)
        found[name] = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
        del kept
    return found


def _peaks_cpu(steps: Steps) -> dict[str, tuple[int, int]]:
    """By the profiler's record of allocations, one session for all steps: starting it takes half a second. Empty where it has none."""
    kept = []
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        for name, (step, active) in steps.items():
            with active(), torch.profiler.record_function(_MARK + name):
                kept.append(step())
    kineto = getattr(getattr(profile, "profiler", None), "kineto_results", None)
    if kineto is None:
        return {}
    spans, allocations = {}, []
    for event in kineto.events():
        if event.name() == "[memory]":
            allocations.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(_MARK):
            spans[event.name().removeprefix(_MARK)] = event.start_ns(), event.start_ns() + event.duration_ns()
    found = {}
    for name, (begin, end) in spans.items():
        held = peak = 0
        for _, count in sorted(item for item in allocations if begin <= item[0] <= end):
            held += count
            peak = max(peak, held)
        found[name] = peak, held
    return found


def peaks(steps: Steps, device: str) -> dict[str, tuple[int, int]]:
    """For each step, run once: the peak of torch's allocator above what it held before, and what the step's result still holds. A
    library's own malloc is not seen."""
    for step, active in steps.values():
        with active():
            step()
    gc.collect()
    return _peaks_cuda(steps, device) if device.startswith("cuda") else _peaks_cpu(steps)


def measure(works: dict[str, tuple[Work, Any]], mode: str, device: str) -> dict[str, dict[str, int | None]]:
    """``peak_bytes``, ``saved_bytes`` and ``scratch_bytes`` (the peak less what the call leaves behind) of one call of each; a work
    comes with its provider's ``active``."""
    steps: Steps = {}
    saved: dict[str, int] = {}
    for name, (work, active) in works.items():
        with active():
            saved[name] = saved_for_backward(work) if work.leaves else 0
            steps[name] = work.step(mode), active
    found = peaks(steps, device)
    rows: dict[str, dict[str, int | None]] = {}
    for name in works:
        peak, held = found.get(name, (None, 0))
        scratch = None if peak is None else max(0, peak - held)
        rows[name] = {"peak_bytes": peak, "saved_bytes": saved[name], "scratch_bytes": scratch}
    return rows
