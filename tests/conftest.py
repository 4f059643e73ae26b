"""Where no GPU is there, Triton kernels run interpreted; that is decided before triton is imported, so first of all here."""

import contextlib
import gc
import os
import random
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # torch.manual_seed keeps its caller's stack as text for each kind of device that may yet come, which takes half a millisecond.
    for late in (torch.cuda, torch.xpu, torch.mtia):
        late.traceback = SimpleNamespace(format_stack=list)  # type: ignore[attr-defined]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

from peftfast.ops import replay  # noqa: E402
from tests.support import bounds, known_masks, races  # noqa: E402
from tests.support.interpreter import quicken  # noqa: E402
from tests.support.poison import poisoned_empty  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
    # Without a C++ compiler tests/test_watched_launches.py is skipped, and says so.
    with contextlib.suppress(FileNotFoundError):
        races.watch_launches()
        bounds.watch_launches()

known_masks.keep()

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a worker: two workers with two threads each cost more in contention than they gain. The same for what they start.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long form of tests that have one: minutes more")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the interpreter's tests would repeat what runs compiled; without one the GPU's tests cannot run. The slow ones come
    first: one that began last would be waited for by all workers."""
    left_out = ["interpreter" if torch.cuda.is_available() else "gpu", *([] if config.getoption("full") else ["full"])]
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if not config.getoption("full"):
        planted: dict[str, list[pytest.Item]] = {}
        for item in items:
            if item.get_closest_marker("planted"):
                planted.setdefault(item.nodeid.partition("[")[0], []).append(item)
        deselected += [item for group in planted.values() for item in group[1::2] if item not in deselected]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        gone = set(map(id, deselected))
        items[:] = [item for item in items if id(item) not in gone]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours stay on one worker, so that fixtures of a module are built once; who is done takes half of what another has left."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each failure as it happens, in the file that TEST_FAILURES_FILE names: a run that is cut off never comes to its summary."""
    path = os.environ.get("TEST_FAILURES_FILE")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"--- {report.nodeid} ({report.when})\n{report.longreprtext}\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that names no seed sees the same numbers whatever ran before it and in whichever worker; TEST_SEED draws others."""
    seed = zlib.crc32(f"{item.nodeid} {os.environ.get('TEST_SEED', '')}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every torch.empty that peftfast asks for comes filled with NaN: an element that a kernel forgets to write fails its test."""
    if request.node.get_closest_marker("compiled") is None:
        poisoned_empty(monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def libraries_are_no_garbage() -> None:
    """What lives when a file begins, a million objects of the libraries, is not searched again by each collection: 0.3 s otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """A test may have changed what recordings of calls depend on, such as a table of configurations."""
    replay.forget()


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn, asked for by name."""
    monkeypatch.setenv("PEFTFAST_BACKEND", request.param)
    return request.param
