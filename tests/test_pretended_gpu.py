"""The lines that run only with a GPU, run without one: the GPU's own tests and the paths of the benchmarks that a CPU never takes."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peftfast.kernels.device_tables import DeviceTables

import peftfast
import peftfast.functional as F
from benchmarks import activity, dram, end_to_end, limits, memory, record, registry, run, timing
from benchmarks.host import PretendedDriver
from benchmarks.registry import Case, Work
from peftfast import ops
from peftfast.configs import nf4_product
from peftfast.configs.device import Device
from peftfast.functional import dora, lora_multi, nf4_routes
from peftfast.integrations import peft_call
from peftfast.nn import SparseDeltaLinear
from peftfast.ops import backends, replay
from peftfast.optim import SparseAdamW
from peftfast.optim.readback import Unread
from tests import test_gpu, test_gpu_sparse_delta
from tests.support import pretended_gpu
from tests.support.budget import assert_within_budget

pytestmark = pytest.mark.interpreter
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pretended GPU, with limits that the interpreter's CPU measures in no time."""
    for sizes, value in ((limits._COPY_BYTES, 2**12), (limits._MATRIX_SIZE, 16), (limits._REPEATS, 1)):
        monkeypatch.setitem(sizes, "cuda", value)
    monkeypatch.setitem(limits._CALIBRATION_SIZE, "cuda", 16)
    for name, value in (("MOST_COPIES", 2), ("FEWEST_ROUNDS", 1), ("MOST_ROUNDS", 2)):
        monkeypatch.setattr(timing, name, value)
    timing.cache_bytes.cache_clear()
    with pretended_gpu.installed():
        yield
    timing.cache_bytes.cache_clear()


def test_what_the_pretence_finds(gpu: None) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.is_cuda and there.device == torch.device("cuda", 0) and not (there + 1).is_cpu
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="cuda"):
        there.numpy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for waits in (lambda: there.sum().item(), lambda: here.to("cuda"), lambda: torch.tensor([1], device="cuda")):
            with pytest.raises(RuntimeError, match="synchronizing"):
                waits()
        assert (there * 2).device.type == "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    (leaf * there).sum().backward()
    assert leaf.grad is not None and leaf.grad.is_cuda


@pytest.mark.parametrize("nf4", [False, True])
def test_the_tests_of_matrix_units(gpu: None, nf4: bool) -> None:
    test_gpu.test_matrix_units_keep_the_budget((37, 33, 69, 7), nf4, 0.1)


def test_the_tests_of_streams_and_bits(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = test_gpu.layer_inputs
    monkeypatch.setattr(test_gpu, "layer_inputs", lambda *sizes: whole(*(min(size, 24) for size in sizes)))
    monkeypatch.setattr(test_gpu, "range", lambda count: [0], raising=False)
    test_gpu.test_two_streams_do_not_meet()
    test_gpu.test_run_to_run_bits()


def test_the_tests_of_a_4_bit_products_ways(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that has captured nothing leaves the zeros of before its replay, which the test must find."""
    whole = test_gpu.layer_inputs
    monkeypatch.setattr(test_gpu, "layer_inputs", lambda *sizes: whole(*(min(size, 32) for size in sizes)))
    monkeypatch.setattr(test_gpu, "range", lambda count: [0], raising=False)
    monkeypatch.setattr(nf4_routes, "PART_MULTIPLE", 16)
    test_gpu.test_every_way_of_a_4_bit_product_keeps_the_budget((33, 32, 64, 3), "overlapped", monkeypatch)
    with pytest.raises(AssertionError, match="same"):
        test_gpu.test_every_way_of_a_4_bit_product_in_a_graph_and_on_two_streams("overlapped", monkeypatch)


def test_norms_of_a_captured_graph_are_not_kept(gpu: None) -> None:
    """They are there once it is replayed; who asks before would read memory that nothing has written."""
    weight = torch.randn(8, 2 * dora.SHORT_ROW, device="cuda")
    a, b, magnitude = torch.randn(2, weight.shape[1]).cuda(), torch.randn(8, 2).cuda(), torch.ones(8).cuda()

    def gain() -> torch.Tensor:
        return dora.row_gain(weight, a, b, 1.0, magnitude, torch.float32)

    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        gain()
    assert not hasattr(weight, dora._KEPT)
    gain()
    kept = getattr(weight, dora._KEPT)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        gain()
    assert getattr(weight, dora._KEPT) is kept


@pytest.mark.parametrize("tensor", [False, True])
def test_the_test_that_a_training_step_never_waits(gpu: None, tensor: bool) -> None:
    test_gpu_sparse_delta.test_a_training_step_never_waits_for_the_device(tensor)


def test_it_would_notice_a_step_that_waits(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = test_gpu_sparse_delta.SparseAdamW.step

    def waits(self: Any) -> Any:
        self.param_groups[0]["params"][0].sum().item()
        return step(self)

    monkeypatch.setattr(test_gpu_sparse_delta.SparseAdamW, "step", waits)
    with pytest.raises(RuntimeError, match="synchronizing"):
        test_gpu_sparse_delta.test_a_training_step_never_waits_for_the_device(False)


def test_tables_that_kernels_read(gpu: None) -> None:
    """Made once without a wait, forgotten when others came, but not where a graph reads them; a graph that asks for new ones is told
    what to do."""
    device, tables = torch.device("cuda", 0), DeviceTables(2)
    made: list[object] = []

    def get(key: object) -> tuple[torch.Tensor, ...]:
        def make() -> tuple[torch.Tensor, ...]:
            made.append(key)
            return (torch.tensor([len(made)]), torch.zeros(0, 3))

        return tables.get(key, device, make)

    torch.cuda.set_sync_debug_mode("error")
    try:
        first = get("first")
        get("second")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(table.device == device for table in first) and first[0].tolist() == [1] and first[1].shape == (0, 3)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert get("first") is first
        with pytest.raises(RuntimeError, match=r"being captured.*zero_grad\(set_to_none=False\)"):
            get("third")
    for key in ("third", "fourth", "fifth"):
        get(key)
    assert get("first") is first and made == ["first", "second", "third", "fourth", "fifth"]
    get("second")
    assert made[-1] == "second"


class _Streams:
    """Streams whose work stays behind: who waits for whose events, and which tensors the allocator is told of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        log = self.log

        class Stream(torch.cuda.Stream):  # type: ignore[misc]
            def record_event(self, event: Any = None) -> Any:
                log.append(("made", self))
                return self

            def wait_event(self, event: Any) -> None:
                log.append((self, "waits for", event))

        patch.setattr(pretended_gpu.Pretended, "record_stream", lambda one, stream: log.append((stream, "reads", one)))
        self.main, self.side, self.third = Stream(), Stream(), Stream()


def test_tables_are_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied by the stream that asked first. Another is told to wait for that, once, and the allocator that it reads them; one
    that is captured may wait for nothing outside of its graph."""
    device, tables, streams = torch.device("cuda", 0), DeviceTables(2), _Streams(monkeypatch)

    def get() -> tuple[torch.Tensor, ...]:
        return tables.get("key", device, lambda: (torch.tensor([1]), torch.tensor([2, 3])))

    with torch.cuda.stream(streams.main):
        found = get()
        assert get() is found and streams.log == [("made", streams.main)]
    with torch.cuda.stream(streams.third), torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert get() is found
    assert len(streams.log) == 1
    for stream in (streams.side, streams.third):
        del streams.log[:]
        with torch.cuda.stream(stream):
            assert get() is get() is found
        assert streams.log[0] == (stream, "waits for", streams.main)
        assert [one[:2] for one in streams.log[1:]] == [(stream, "reads")] * 2
        assert all(one[2] is table for one, table in zip(streams.log[1:], found, strict=True))


def test_what_a_recording_holds_is_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed call asks for no table: it has those of the call that was recorded."""
    from triton.runtime import driver

    class Driver(PretendedDriver):
        def get_current_stream(self, _: int) -> int:
            return torch.cuda.current_stream().cuda_stream

    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    streams, table = _Streams(monkeypatch), torch.ones(3, device="cuda")
    with torch.cuda.stream(streams.main):
        held, nothing = replay.Device([table]), replay.Device([torch.ones(3)])
        assert streams.log == [("made", streams.main)] and held.stream() == streams.main.cuda_stream
    with torch.cuda.stream(streams.side):
        for _ in range(2):
            assert held.stream() == nothing.stream() == streams.side.cuda_stream
    assert streams.log[1] == (streams.side, "waits for", streams.main)
    assert streams.log[2][:2] == (streams.side, "reads") and streams.log[2][2] is table and len(streams.log) == 3
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=streams.main):
        assert held.stream() == streams.main.cuda_stream
    alive = weakref.ref(table)
    del held, table, streams.log[:]
    assert alive() is not None  # a graph reads it, whatever becomes of the recording


def test_rows_that_are_kept_are_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for as long as a graph reads them, however many batches come after."""
    streams, device = _Streams(monkeypatch), torch.device("cuda", 0)

    def rows(number: int) -> torch.Tensor:
        return peft_call._row_ids(("a", "b", "a"), ("a", "b"), number, device)

    peft_call._kept_row_ids.cache_clear()
    with torch.cuda.stream(streams.main):
        ids = rows(1)
        assert rows(1) is ids and ids.tolist() == [0, 1, 0] and streams.log == [("made", streams.main)]
    with torch.cuda.stream(streams.side):
        assert rows(1) is ids
    assert [one[:2] for one in streams.log[1:]] == [(streams.side, "waits for"), (streams.side, "reads")]
    with torch.cuda.stream(streams.main), torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert rows(1) is ids
    alive = weakref.ref(ids)
    del ids, streams.log[:]
    with torch.cuda.stream(streams.main):
        others = [weakref.ref(rows(number)) for number in range(2, 300)]
    del streams.log[:]
    assert others[0]() is None and alive() is not None


def test_norms_that_are_kept_are_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for as long as a graph reads them, which knows of no weight that changed since."""
    streams, weight = _Streams(monkeypatch), torch.randn(8, 2 * dora.SHORT_ROW, device="cuda")
    a, b, magnitude = torch.randn(2, weight.shape[1]).cuda(), torch.randn(8, 2).cuda(), torch.ones(8).cuda()

    def gain() -> torch.Tensor:
        return dora.row_gain(weight, a, b, 1.0, magnitude, torch.float32)

    with torch.cuda.stream(streams.main):
        gain()
    norms = getattr(weight, dora._KEPT).norms
    assert streams.log == [("made", streams.main)]
    with torch.cuda.stream(streams.side):
        gain()
    assert streams.log[1] == (streams.side, "waits for", streams.main)
    assert streams.log[2][:2] == (streams.side, "reads") and streams.log[2][2] is norms
    with torch.cuda.stream(streams.main), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gain()
    assert len(streams.log) == 3
    alive = weakref.ref(norms)
    del norms, streams.log[:]
    weight.mul_(2.0)
    with torch.cuda.stream(streams.main):
        gain()
    assert alive() is not None and getattr(weight, dora._KEPT).norms is not alive()


def test_what_is_kept_of_a_support_is_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, indices = _Streams(monkeypatch), torch.arange(0, 64 * 64, 3)
    pattern = F.SparsePattern(indices.cuda(), torch.Size((64, 64)))
    blocks = F.SparsePattern.from_blocks([1, 2, 7], 16, (64, 64)).to("cuda")
    for kept, count in (
        (lambda: pattern.runs(128), 1),
        (lambda: pattern.tiles(16, 16), 3),
        (lambda: blocks.blocks(False), 2),
    ):
        with torch.cuda.stream(streams.main):
            first = kept()
        for stream in (streams.main, streams.side, streams.side):
            with torch.cuda.stream(stream):
                again = kept()
            for one, other in zip(first, again, strict=True) if isinstance(first, tuple) else ((first, again),):
                assert one is other
        assert [one[:2] for one in streams.log[1:]] == [(streams.side, "waits for"), *[(streams.side, "reads")] * count]
        del streams.log[:]
    copied = pickle.loads(pickle.dumps(F.SparsePattern(indices, torch.Size((64, 64)))))
    assert torch.equal(copied.runs(128), copy.deepcopy(copied).runs(128))


def test_runs_of_a_captured_graph_are_not_kept(gpu: None) -> None:
    """They are there once it is replayed; who asks before would read memory that nothing has written."""
    pattern = F.SparsePattern(torch.arange(0, 64 * 64, 3).cuda(), torch.Size((64, 64)))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert pattern.runs(128) is not pattern.runs(128)
    kept = pattern.runs(128)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert pattern.runs(128) is kept


def test_the_rate_of_a_captured_step_is_not_kept(gpu: None) -> None:
    """What a graph writes of it is there once that is replayed: an eager step of the same rate may come before."""
    values = torch.nn.Parameter(torch.zeros(5).cuda())
    optimizer = SparseAdamW([values], lr=1e-3)
    group = optimizer.param_groups[0]
    first = optimizer._hyper_for(group, values.device)
    group["lr"] = 2e-3
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = optimizer._hyper_for(group, values.device)
    later = optimizer._hyper_for(group, values.device)
    assert later is not captured and optimizer._hyper_for(group, values.device) is later
    group["lr"] = 1e-3
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert optimizer._hyper_for(group, values.device) is first


def test_the_draws_of_a_replayed_step_are_counted(gpu: None) -> None:
    """The host has seen one step, that which was captured, and the device each replay: files and copies go on from there."""
    values = torch.nn.Parameter(torch.zeros(5).cuda())
    optimizer = SparseAdamW([values], stochastic_rounding=True, seed=5)
    drawn = optimizer._seed_on(values.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer._count(1)
    drawn.fill_(5 + 3)  # after three replays
    assert optimizer.state_dict()["rounding_seed"] == 8
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.state_dict()["rounding_seed"] == 8
    other._count(1)
    assert optimizer.state_dict()["rounding_seed"] == 8


def test_rates_that_are_kept_are_there_on_every_stream(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for as long as a graph reads them, however far a schedule goes on beside it."""
    streams, values = _Streams(monkeypatch), torch.nn.Parameter(torch.zeros(5).cuda())
    optimizer = SparseAdamW([values])
    group = optimizer.param_groups[0]

    def numbers(lr: float) -> torch.Tensor:
        group["lr"] = lr
        return optimizer._hyper_for(group, values.device)

    with torch.cuda.stream(streams.main):
        first = numbers(1.0)
    del streams.log[:]
    with torch.cuda.stream(streams.side):
        assert numbers(1.0) is numbers(1.0) is first
    assert [one[:2] for one in streams.log] == [(streams.side, "waits for"), (streams.side, "reads")]
    with torch.cuda.stream(streams.main), torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert numbers(1.0) is first
    alive = weakref.ref(first)
    del first, streams.log[:]
    with torch.cuda.stream(streams.main):
        others = [weakref.ref(numbers(1.0 / rate)) for rate in range(2, 100)]
    del streams.log[:]
    assert others[0]() is None and alive() is not None


@pytest.mark.parametrize("graph", [True, False])
def test_results_of_a_timed_turn_lie_beside_each_other(gpu: None, graph: bool) -> None:
    """A result that is given back leaves its memory to the next call, which would write to lines that are in L2 already."""
    results: list[Any] = []
    alive: list[int] = []

    def step() -> torch.Tensor:
        alive.append(sum(one() is not None for one in results))
        result = torch.ones(5, device="cuda")
        if not graph:
            result.sum().item()  # which cannot be captured
        results.append(weakref.ref(result))
        return result

    with timing.side_stream("cuda"):
        if graph:
            assert timing._captured([step] * 3)[0] is not None
        else:
            clock = timing._cuda_clock(timing.Runner([step] * 3), timing.Settings(1, 0.01))
            assert not clock.graph
            clock.read()
    assert alive[-3:] == [0, 1, 2]


def test_scalars_are_read_when_their_own_device_has_them(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event without a stream belongs to the current device, which may be another than the parameters'."""
    asked: list[object] = []
    streams = {0: torch.cuda.Stream(), 1: torch.cuda.Stream()}

    class Event(torch.cuda.Event):  # type: ignore[misc]
        def record(self, stream: object = None) -> None:
            asked.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[torch.device(device or 1).index or 0])
    unread = Unread(1, [2], [0.1], torch.tensor([0.5, 0.25], device="cuda"))
    assert asked == [streams[0]] and unread.values() == [0.5, 0.25]


def test_ids_of_rows_on_the_gpu_are_not_waited_for(gpu: None) -> None:
    x, rows = torch.ones(2, 3, device="cuda"), torch.tensor([0, -1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert lora_multi._row_ids(rows, x, 1).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_support_goes_where_the_weight_is(gpu: None) -> None:
    linear, indices = torch.nn.Linear(16, 8).to("cuda"), torch.tensor([1, 20, 100])
    for support in (indices, peftfast.SparsePattern(indices, (8, 16))):
        layer = SparseDeltaLinear.from_linear(linear, indices=support)
        assert layer.delta_indices.is_cuda and layer.delta_values.is_cuda
        assert layer(torch.ones(2, 16).to("cuda")).is_cuda


def test_ids_of_rows_in_pinned_memory(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken before the call returns, since their owner may write the next batch's at once; pageable ones torch has staged."""
    x, rows = torch.ones(2, 3, device="cuda"), torch.tensor([0, -1], dtype=torch.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert lora_multi._row_ids(rows, x, 1).is_cuda
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            lora_multi._row_ids(rows, x, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SIZES = ("--device", "cuda", "--shapes", "32", "--tokens", "8", "--rank", "4", "--quick", "--seconds", "0.001")


@pytest.mark.slow
def test_a_run(gpu: None, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    words = (
        "--op",
        "lora_linear",
        "nf4_dequantize",
        "--mode",
        "fwd",
        "bwd",
        "--provider",
        "peftfast",
        "--out",
        str(out),
    )
    assert run.main([*SIZES, *words]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["gpu"]["name"] == "NVIDIA H200" and not report["stopped"]
    assert {(row["op"], row["mode"]) for row in report["rows"]} == {
        ("lora_linear", "fwd"),
        ("lora_linear", "bwd"),
        ("nf4_dequantize", "fwd"),
    }
    for row in report["rows"]:
        assert row["graph"], (row["provider"], row["note"])
        assert row["copies"] == 2 and row["p50"] > 0
    # What record files of it has the GPU's name.
    readme = tmp_path / "README.md"
    readme.write_text(f"{record.BEGIN}\n{record.END}\n")
    assert record.main([str(out), "--results", str(tmp_path / "results"), "--readme", str(readme)]) == 0
    assert (tmp_path / "results" / "nvidia-h200" / "nf4_dequantize.json").is_file()
    assert "Nothing has been measured on a GPU" not in (tmp_path / "results" / "README.md").read_text()


def test_the_process_that_ncu_watches(gpu: None, tmp_path: Path) -> None:
    case = {
        "op": "nf4_dequantize",
        "shape": "64",
        "m": 0,
        "n": 64,
        "k": 64,
        "rank": 0,
        "dtype": "bfloat16",
        "dropout": 0.0,
    }
    wanted = tmp_path / "wanted.json"
    rest = {"device": "cuda", "mode": "fwd", "density": 0.0, "adapters": 0, "provider": "peftfast"}
    wanted.write_text(json.dumps([case | rest]))
    assert {*case, *rest} - {"provider"} == {field for field in Case.__dataclass_fields__}
    assert dram.main([str(wanted)]) == 0


def test_a_training_step_of_a_model(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps themselves on the CPU: transformers asks the driver. What is around them knows the device's name."""
    monkeypatch.setattr(
        activity, "measure", lambda step, device: activity.Activity(1, 0.1) if step() is not None else None
    )
    out = tmp_path / "step.json"
    with monkeypatch.context() as inner:
        inner.setattr(end_to_end.llama, "batches", lambda *a: iter([{"input_ids": torch.ones(1, 4)}] * 8))
        trainee = end_to_end.Trainee(torch.nn.Linear(2, 2, device="cuda"), lambda batch: torch.ones((), device="cuda"))
        arm = end_to_end.Arm("peftfast", "lora", lambda problem: trainee, role=end_to_end.BASELINE)
        inner.setattr(end_to_end, "ARMS", (arm,))
        assert end_to_end.main(["--device", "cuda", "--quick", "--method", "lora", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["arm"] for row in report["arms"]] == ["peftfast", "peftfast again"]
    assert report["machine"]["gpu"] and report["arms"][0]["launches"] == 1


def _timed(step: Any) -> timing.Timing:
    settings = timing.Settings(1, 1e-3, 1e-4)
    with timing.side_stream("cuda"):
        return timing.measure({"one": timing.Runner([step])}, "cuda", settings)["one"]


def test_a_step_that_waits_is_timed_without_a_graph(gpu: None) -> None:
    x = torch.ones(3, device="cuda")
    assert _timed(lambda: x * 2).graph
    found = _timed(lambda: x.sum().item())
    assert not found.graph and "synchronizing" in found.note and found.p50 > 0
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_refused_capture_leaves_the_process_whole(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends neither the allocator's part of a capture nor the generator's where the driver's part failed."""
    done: list[Any] = []
    generator = torch.cuda.default_generators[0]
    monkeypatch.setattr(generator, "clone_state", lambda: "as it was")
    monkeypatch.setattr(generator, "graphsafe_set_state", lambda state: done.append(state))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: done.append(pool))

    @contextlib.contextmanager
    def refused(graph: Any, **_: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    x = torch.ones(3, device="cuda")
    found = _timed(lambda: x * 2)
    assert not found.graph and "previous error" in found.note
    assert done == [(0, torch.cuda.graph_pool_handle()), "as it was"]
    # By these names torch has them, wherever it has CUDA.
    assert hasattr(torch.Generator, "clone_state") and hasattr(torch.Generator, "graphsafe_set_state")
    assert torch.version.cuda is None or hasattr(torch._C, "_cuda_endAllocateToPool")


def test_memory_of_a_step(gpu: None) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    work = Work(lambda: {"y": x * 2}, {"dx": x}, torch.ones(3, device="cuda"))
    found = memory.measure({"one": (work, contextlib.nullcontext)}, "full", "cuda")
    assert found["one"]["peak_bytes"] == 0 and found["one"]["saved_bytes"] is not None


@pytest.mark.parametrize("name", ["nf4_product", "nf4_product_dx"])
def test_the_ways_of_a_4_bit_product(name: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that the benchmark times, within its error budget, and the one that a layer takes."""
    # Small tiles: the interpreter runs each program.
    small = nf4_product.ProductConfig("fused", 1, 32, 32, 32, num_stages=2)
    monkeypatch.setattr(nf4_product, "candidates", lambda *_: [small])
    monkeypatch.setattr(nf4_routes, "PART_MULTIPLE", 16)
    op = registry.load()[name]
    case = Case(name, "", 17, 32, 32, 4, "bfloat16", 0.1 if op.dropped else 0.0, "cuda", "fwd")
    inputs = op.inputs(case, torch.Generator("cuda").manual_seed(0))
    exact, composed = (op.formula(case, inputs, registry.WHOLE, dtype) for dtype in (torch.float64, torch.bfloat16))
    ways = [one for one in op.providers if one.ours and not one.refuses(case)]
    assert {one.name for one in ways} >= {
        *("peftfast", "peftfast:dequantize", "peftfast:slabs 2", "peftfast:overlapped 2", "peftfast:fused 1")
    }
    for one in ways:
        for result, found in one.build(case, inputs).forward().items():
            values = (value.inner for value in (found, composed[result], exact[result]))
            assert_within_budget(one.name, *values)
    for route in ("fused", "overlapped"):
        monkeypatch.setenv(nf4_product.VARIABLE, route)
        (found,) = ways[0].build(case, inputs).forward().values()
        (expected,) = composed.values()
        torch.testing.assert_close(found.inner, expected.inner, rtol=2e-2, atol=5e-2)


@pytest.fixture
def turing(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU whose tensor cores Triton does not use."""
    monkeypatch.setattr(backends, "cuda_device", lambda index: Device("NVIDIA Tesla T4", (7, 5), 2))
    backends.gpu_multiplies.cache_clear()
    yield
    backends.gpu_multiplies.cache_clear()


WITHOUT = "triton: cuda:0 is an sm_75, Triton multiplies on tensor cores from sm_80 on"


def test_a_gpu_without_tensor_cores_leaves_lora_layers_stock(turing: None) -> None:
    import peft

    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).to("cuda")
    x = torch.randn(3, 16).to("cuda")
    stock = model(x)
    report = peftfast.patch(model)
    assert len(report.stock) == 1 and not report.fused and WITHOUT in str(report)
    assert torch.equal(model(x).cpu(), stock.cpu())


def test_a_gpu_without_tensor_cores_runs_what_multiplies_nothing(turing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MeZO moves scratch weights and multiplies by the library; a sparse gradient gathers columns at any density; a few rows of a 4-bit
    weight are multiplied with the dequantised one."""
    asked: list[str] = []
    for module in (ops.lora, ops.nf4, ops.nf4_linear, ops.sparse_delta, ops.zeroth_order, ops.zeroth_order_linear):
        monkeypatch.setattr(module, "kernels", lambda name: asked.append(name) or backends.kernels(name))
    dense, x = torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    packed, wide = F.nf4_quantize(dense), dense.float()
    pattern = peftfast.SparsePattern(torch.arange(0, 512, 2), (8, 64))

    def calls(on: str) -> list[torch.Tensor]:
        here, rows, four = dense.to(on), x.to(on), packed.to(on)
        sides = [F.zo_linear(rows, rows, w, 5, 0.5)[0] for w in (here, four)]
        values = torch.ones(256, device=on, requires_grad=True)
        F.sparse_delta_linear(rows.float(), wide.to(on), pattern.to(on), values).sum().backward()
        moved = [wide.clone().to(on)]
        F.perturb_(moved, 5, 0.5)
        return [*sides, F.nf4_linear(rows, four), values.grad, *moved]

    expected = calls("cpu")
    asked.clear()
    for got, want in zip(calls("cuda"), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-2, atol=2e-2)
    assert {"zeroth_order", "nf4", "sparse_delta"} <= set(asked), asked
    assert not {"zeroth_order_linear", "nf4_linear", "lora"} & set(asked), asked
    one = torch.empty(1, 1, device="cuda")
    blocks = (one, one, torch.zeros(1, 4, dtype=torch.int64).to("cuda"), 16, 1, torch.float32)
    assert ops.sparse_delta.sparse_delta_blocks.select(*blocks).backend == "reference"
    assert ops.sparse_delta.sparse_delta_dvalues.select(one, one, torch.zeros(1), torch.float32).backend == "triton"
    assert backends.gpu_multiplies() == backends.gpu_multiplies(0) == (False, WITHOUT.removeprefix("triton: "))


def test_other_libraries_keep_their_cpu_kernels() -> None:
    """bitsandbytes chooses once a process; FP4's second zero has another sign without its CPU kernels."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    program = """
from tests.support import pretended_gpu
with pretended_gpu.installed():
    from bitsandbytes import cextension
print(cextension.BNB_BACKEND)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "CPU\n", done.stderr
