"""For pytest: what is sanitized takes the place of what is not, and a test during which the sanitizers report fails."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ["PEFTFAST_SANITIZED"])


def pytest_configure(config: pytest.Config) -> None:
    from peftfast.ops import native
    from tests.support import accesses

    library = accesses.compiled(Path(__file__).with_name("poisoned.cpp"))
    first_poisoned = accesses.function(library, "first_poisoned", *accesses.ARRAYS)

    def look(kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        found = first_poisoned(addresses.ctypes.data, mask.ctypes.data, addresses.size, size)
        if found:
            raise IndexError(f"{kind} of {size} bytes at {found:#x}, outside of every allocation")

    accesses.watch(look)
    native._FOLDER = FOLDER / "libraries"


def _reported() -> int:
    return sum(path.stat().st_size for path in FOLDER.glob(f"report.{os.getpid()}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _reported()
    result = yield
    if _reported() > before:
        text = (FOLDER / f"report.{os.getpid()}").read_bytes()[before:].decode(errors="replace")
        pytest.fail(text[:6000], pytrace=False)
    return result
