"""How long a call takes: providers interleaved round by round, medians with the 20th and 80th percentile.

CUDA: events around replays of a graph that holds one call for each copy of the inputs, the copies and their results together beyond
three times L2.
CPU: torch.utils.benchmark with the number of threads stated, over the same copies against the last-level cache. One thread is
timed by the processor time it had, which other processes do not lengthen; several by the wall, and a reading during which the
system took a core away for another process (an involuntary context switch) is dropped where enough others are left, and counted.
"""

import contextlib
import ctypes
import functools
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

CACHE_FACTOR = 3  # inputs that rotate through three times the cache are not found there again
MOST_COPIES = 32
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40
TIMER_WARM_UP = 2  # calls that Timer.timeit makes before each reading
EXTRA_ROUNDS = 6  # times FEWEST_ROUNDS: what is tried for undisturbed readings
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True)
class Settings:
    """``row_s``: seconds given to one row. ``slice_s``: the shortest stretch between two readings of the clock."""

    threads: int
    row_s: float = 0.3
    slice_s: float = 0.005


@dataclass
class Runner:
    """One provider's calls, one for each copy of the inputs."""

    steps: Sequence[Callable[[], Any]]
    active: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Timing:
    """Seconds a call."""

    p20: float
    p50: float
    p80: float
    rounds: int
    calls: int
    graph: bool
    samples: list[float] = field(repr=False, default_factory=list)
    note: str = ""
    preempted: int = 0

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, over the median. Half of it would be less than two runs differ by."""
        return (self.p80 - self.p20) / self.p50


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile by linear interpolation."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], statistics.median(samples), tenths[7]


@functools.cache
def cache_bytes(device: str) -> int:
    """L2 on CUDA; on the CPU the last-level cache as Linux states it, else 32 MiB."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


def copies_for(case_bytes: int, device: str) -> int:
    """How many copies of the inputs rotate."""
    return max(1, min(MOST_COPIES, -(-CACHE_FACTOR * cache_bytes(device) // max(case_bytes, 1))))


@functools.cache
def keep_heap_warm() -> str:
    """Tell glibc to keep freed memory: a fresh mapping of a 32 MiB result costs more in page faults than many a kernel."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = all(libc.mallopt(what, value) for what, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)))
        done = done and bool(libc.mallopt(_M_TOP_PAD, 64 * 2**20))
    except (OSError, AttributeError):
        done = False
    return "glibc heap kept warm" if done else "allocator as it is"


def cpu_clock(threads: int) -> Callable[[], float]:
    """What times ``threads`` threads on a CPU."""
    return time.process_time if threads == 1 else time.perf_counter


def measure(runners: dict[str, Runner], device: str, settings: Settings) -> dict[str, Timing]:
    """Every runner's timing; round i runs each of them once before round i + 1 begins, the order turning by one each round."""
    clocks = {name: _clock(runner, device, settings) for name, runner in runners.items()}
    readings: dict[str, list[_Reading]] = {name: [] for name in runners}
    names = list(runners)

    def one_round(i: int, members: Sequence[str]) -> None:
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if name in members:
                with runners[name].active():
                    readings[name].append(clocks[name].read())

    most = max((clock.rounds for clock in clocks.values()), default=0)
    for i in range(most):
        # A slow one joins fewer rounds, spread evenly over all of them.
        one_round(i, [n for n, c in clocks.items() if (i * c.rounds) // most != ((i + 1) * c.rounds) // most])
    for i in range(EXTRA_ROUNDS * FEWEST_ROUNDS):
        if not (lacking := [name for name in names if len(_clean(readings[name])) < FEWEST_ROUNDS]):
            break
        one_round(i, lacking)
    return {name: _timing(readings[name], clock) for name, clock in clocks.items()}


@dataclass(frozen=True)
class _Reading:
    seconds: float
    clean: bool = True


def _clean(readings: Sequence[_Reading]) -> list[float]:
    return [reading.seconds for reading in readings if reading.clean]


def _timing(readings: Sequence[_Reading], clock: "_Clock") -> Timing:
    kept, note = _clean(readings), clock.note
    if len(kept) < FEWEST_ROUNDS:
        kept, note = [reading.seconds for reading in readings], "other processes took the cores during most readings"
    preempted = sum(not reading.clean for reading in readings)
    return Timing(*quantiles(kept), len(kept), clock.calls, clock.graph, kept, note, preempted)


@dataclass
class _Clock:
    read: Callable[[], _Reading]
    rounds: int
    calls: int
    graph: bool
    note: str = ""


def _rounds(seconds: float, settings: Settings) -> int:
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(settings.row_s / max(seconds, 1e-9))))


def _clock(runner: Runner, device: str, settings: Settings) -> _Clock:
    with runner.active():
        return (_cuda_clock if device.startswith("cuda") else _cpu_clock)(runner, settings)


def _cpu_clock(runner: Runner, settings: Settings) -> _Clock:
    """A reading goes on through the copies where the last one ended, so that a slow call is read alone."""
    turn = itertools.cycle(runner.steps)
    for step in runner.steps:
        step()
    clock = cpu_clock(settings.threads)
    switches: list[int] = []

    def watched_clock() -> float:
        switches.append(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
        return clock()

    timer = Timer("next(turn)()", globals={"turn": turn}, timer=watched_clock, num_threads=settings.threads)
    once = min(timer.timeit(1).mean for _ in range(3))
    number = max(1, round(settings.slice_s / max(once, 1e-7)))

    def read() -> _Reading:
        seconds = timer.timeit(number).mean
        # The last two: timeit reads the clock for its own warm-up too.
        return _Reading(seconds, settings.threads == 1 or switches[-1] == switches[-2])

    return _Clock(read, _rounds(once * (number + TIMER_WARM_UP), settings), number, False)


def side_stream(device: str) -> AbstractContextManager[Any]:
    """Where everything of a CUDA run happens: the default stream cannot be captured, and a backward runs on the stream of its forward,
    which for the backward alone lies before the capture."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.startswith("cuda") else nullcontext()


@contextlib.contextmanager
def capturing(graph: "torch.cuda.CUDAGraph", stream: "torch.cuda.Stream | None" = None) -> Iterator[None]:
    """torch.cuda.graph, of which a failure leaves the process as it was. What a driver refuses to capture otherwise leaves torch's
    allocator waiting for the end of the capture, so that the next empty_cache is an internal error, and its generator counting for the
    graph, so that the next random number is one (torch 2.6 to 2.13)."""
    device, current = torch.cuda.current_device(), torch.cuda.current_stream()
    pool, generator = torch.cuda.graph_pool_handle(), torch.cuda.default_generators[device]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except BaseException:
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):  # where the capture itself was ended, this was too
            torch._C._cuda_endAllocateToPool(device, pool)
        generator.graphsafe_set_state(before)
        with contextlib.suppress(RuntimeError):  # what was asked for while capturing may be reported once more here
            torch.cuda.synchronize()
        raise


def _one_line(error: BaseException) -> str:
    text = str(error)
    return text.splitlines()[0] if text else type(error).__name__


def waits(steps: Sequence[Callable[[], Any]]) -> str:
    """For what a step makes the host wait, or nothing: a step that waits cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step()
    except Exception as error:
        return _one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _turn(steps: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all steps, alive together: given back, the memory of one would be the next one's, whose writes would then meet
    their lines in L2 and not leave it."""
    return [step() for step in steps]


def _captured(steps: Sequence[Callable[[], Any]]) -> "tuple[torch.cuda.CUDAGraph | None, str]":
    """A graph of one call of each step, or None and why."""
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        return None, "no graph: on the default stream"
    if reason := waits(steps):
        return None, f"no graph: {reason}"
    graph = torch.cuda.CUDAGraph()
    try:
        with capturing(graph, stream):
            results = _turn(steps)
        del results
    except Exception as error:  # whatever else a graph cannot hold; it is timed without one, and says so
        return None, f"no graph: {_one_line(error)}"
    return graph, ""


def _cuda_clock(runner: Runner, settings: Settings) -> _Clock:
    for _ in range(3):  # compiles, fills the allocator, settles library heuristics
        for step in runner.steps:
            step()
    torch.cuda.synchronize()
    graph, note = _captured(runner.steps)

    def cycle() -> None:
        if graph is not None:
            graph.replay()
        else:
            _turn(runner.steps)

    def stretch(number: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(number):
            cycle()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    stretch(2)
    once = stretch(3) / 3
    number = max(1, round(settings.slice_s / once))
    calls = number * len(runner.steps)
    return _Clock(
        lambda: _Reading(stretch(number) / calls), _rounds(once * number, settings), calls, graph is not None, note
    )
