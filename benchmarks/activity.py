"""What a step makes the GPU do: launches, and the time in which at least one kernel or copy runs. By torch's profiler."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Activity:
    """``busy_s``: the union of all intervals in which the GPU ran something."""

    launches: int
    busy_s: float


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what the intervals (begin, end) cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def measure(step: Callable[[], Any], device: str) -> Activity | None:
    """One call of ``step`` under the profiler; None on a CPU, which launches nothing."""
    if not device.startswith("cuda"):
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize(device)
    intervals = [
        (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return Activity(len(intervals), union(intervals))
