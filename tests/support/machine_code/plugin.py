"""For pytest: the tests' Triton kernels, and those of csrc/cuda that the emulator would run, are compiled and run as machine code.
MACHINE_CODE_ORDER, as "late,ahead" in numbers, is one order for all launches; left out, they take all in turn."""

import os
from collections.abc import Iterator

import pytest

from .launch import ORDERS, Order, executed


@pytest.fixture(autouse=True, scope="session")
def machine_code() -> Iterator[None]:
    given = os.environ.get("MACHINE_CODE_ORDER")
    orders = (Order(*map(int, given.split(","))),) if given else ORDERS
    with executed(*orders):
        yield


def pytest_configure(config: pytest.Config) -> None:
    from peftfast.ops import backends, replay
    from tests.support import interpreter
    from tests.support.cuda_emulator import build as emulator

    from . import binaries

    emulator.build = binaries.build  # before a test's module takes it
    # A CPU's tensors are the kernels' here too, and no launch can be replayed: what asks is told that the interpreter runs.
    backends._interpreted = replay._interpreted = lambda: True
    interpreter.require_runnable_kernels = lambda: None
