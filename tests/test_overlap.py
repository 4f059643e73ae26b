"""The order in which parts of a weight are decoded beside the product: streams and events that are recorded and then run in every order
that their waits allow. A wait that is missing shows in one of them."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftfast.functional import overlap
from peftfast.kernels import launch as launches

DEVICE = torch.device("cuda", 0)


class Event:
    passed = False


class Stream:
    """What it is given, in order: calls, events to record, events to wait for."""

    def __init__(self, machine: "Machine") -> None:
        self.machine, self.given, self.cuda_stream = machine, [], id(self)
        machine.streams.append(self)

    def record_event(self, event: Any = None) -> Event:
        event = event or Event()
        self.given.append(("record", event))
        return event

    def wait_event(self, event: Event) -> None:
        self.machine.waits += 1
        if self.machine.waits != self.machine.dropped:
            self.given.append(("wait", event))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Machine:
    """Streams of one device. ``dropped``: the wait, counted from 1, that is forgotten."""

    def __init__(self, dropped: int = 0) -> None:
        self.streams: list[Stream] = []
        self.waits, self.dropped, self.capturing = 0, dropped, False
        self.main = Stream(self)
        self.current = [self.main]

    def launch(self, call: Callable[[], None]) -> None:
        self.current[-1].given.append(("call", call))

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def run(self, choose: Callable[[list[Stream]], Stream]) -> None:
        """Everything that was given, the next stream of those that need not wait by ``choose``."""
        while any(stream.given for stream in self.streams):
            ready = [s for s in self.streams if s.given and (s.given[0][0] != "wait" or s.given[0][1].passed)]
            assert ready, "every stream waits"
            kind, what = choose(ready).given.pop(0)
            if kind == "record":
                what.passed = True
            elif kind == "call":
                what()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(dropped: int = 0) -> Machine:
        made = Machine(dropped)
        monkeypatch.setattr(overlap, "_streams", {})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current[-1])
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: Stream(made))
        monkeypatch.setattr(torch.cuda, "stream", made.on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
        return made

    return make


ORDERS: dict[str, Callable[[list[Stream]], Stream]] = {
    "the main stream as far as it can": lambda ready: ready[0],
    "the side stream as far as it can": lambda ready: ready[-1],
    **{f"random {seed}": (lambda draw: lambda ready: draw.choice(ready))(random.Random(seed)) for seed in range(6)},
}


def _product(machine: Machine, parts: int, order: str) -> list[Any]:
    """What each product read. The weight is written, and the buffers' memory read by others, just before on the main stream; the memory
    is written by others just after, as when the allocator hands it out again."""
    weight, buffers, found = ["old"], ["others'", "others'"], []
    others_read: list[str] = []
    machine.launch(lambda: weight.__setitem__(0, "new"))
    machine.launch(lambda: others_read.extend(buffers))

    def decode(part: int, buffer: int) -> None:
        machine.launch(lambda: buffers.__setitem__(buffer, f"{weight[0]} {part}"))

    def multiply(part: int, buffer: int) -> None:
        machine.launch(lambda: found.append(buffers[buffer]))

    overlap.overlapped(parts, decode, multiply, DEVICE)
    machine.launch(lambda: buffers.__setitem__(slice(None), ["given out again"] * 2))
    machine.run(ORDERS[order])
    return [*found, *others_read, *buffers]


def _expected(parts: int) -> list[str]:
    return [*(f"new {part}" for part in range(parts)), "others'", "others'", "given out again", "given out again"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_product(order: str, machine: Callable[..., Machine]) -> None:
    for parts in (1, 2, 3, 4, 7):
        assert _product(machine(), parts, order) == _expected(parts)


@pytest.mark.parametrize("parts", [2, 4])
def test_no_wait_can_be_left_out(parts: int, machine: Callable[..., Machine]) -> None:
    """The fork, one for each part that is multiplied, one for each buffer that is written again."""
    whole = machine()
    _product(whole, parts, "random 0")
    assert whole.waits == 1 + parts + (parts - 2)
    for dropped in range(1, whole.waits + 1):
        wrong = [order for order in ORDERS if _product(machine(dropped), parts, order) != _expected(parts)]
        assert wrong, f"without wait {dropped} of {whole.waits} every order gives the product"


def test_decoding_runs_ahead(machine: Callable[..., Machine]) -> None:
    """Part i + 1 is decoded with the product of part i still to come: otherwise nothing would overlap."""
    made, seen = machine(), []
    decode = lambda part, buffer: made.launch(lambda: seen.append(("decode", part)))  # noqa: E731
    multiply = lambda part, buffer: made.launch(lambda: seen.append(("multiply", part)))  # noqa: E731
    overlap.overlapped(4, decode, multiply, DEVICE)
    made.run(ORDERS["the side stream as far as it can"])
    assert [f"{kind[0]}{part}" for kind, part in seen] == ["d0", "d1", "m0", "d2", "m1", "d3", "m2", "m3"]


@pytest.mark.parametrize("order", ORDERS)
def test_an_error_leaves_nothing_at_work(order: str, machine: Callable[..., Machine]) -> None:
    made, buffers = machine(), ["", ""]

    def multiply(part: int, buffer: int) -> None:
        if part == 1:
            raise RuntimeError("out of memory")

    def decode(part: int, buffer: int) -> None:
        made.launch(lambda: buffers.__setitem__(buffer, f"{part}"))

    with pytest.raises(RuntimeError, match="out of memory"):
        overlap.overlapped(4, decode, multiply, DEVICE)
    made.launch(lambda: buffers.__setitem__(slice(None), ["given out again"] * 2))
    made.run(ORDERS[order])
    assert buffers == ["given out again"] * 2 and made.current == [made.main]


def test_one_side_stream_a_device_and_one_for_a_capture(machine: Callable[..., Machine]) -> None:
    made = machine()
    asked: list[Any] = []
    threads = [threading.Thread(target=lambda: asked.append(overlap.side_stream(DEVICE, made.main))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in asked}) == 1 and asked[0] is overlap.side_stream(DEVICE, Stream(made))
    assert overlap.side_stream(torch.device("cuda", 1), made.main) is not asked[0]
    made.capturing = True
    captured = overlap.side_stream(DEVICE, made.main)
    assert captured is not asked[0] and captured is overlap.side_stream(DEVICE, made.main)
    assert captured is not overlap.side_stream(DEVICE, Stream(made))


def test_a_call_on_two_streams_is_not_replayed(machine: Callable[..., Machine]) -> None:
    """What is recorded is done again on one stream."""
    machine()
    refusals: list[str] = []
    with launches.recorded_by(SimpleNamespace(refuse=refusals.append)):
        overlap.overlapped(1, lambda *_: None, lambda *_: None, DEVICE)
    assert refusals == ["two streams"]
