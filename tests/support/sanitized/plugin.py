"""For pytest: what is sanitized takes the place of what is not, and a test during which the sanitizers report fails."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(os.environ["PEFTFAST_SANITIZED"])


def pytest_configure(config: pytest.Config) -> None:
    from peftfast.ops import native
    from tests.support import accesses

    library = accesses.compiled(Path(__file__).with_name("poisoned.cpp"))
    accesses.refuse(accesses.function(library, "first_poisoned", *accesses.ARRAYS), "every allocation")
    native._FOLDER = FOLDER / "libraries"


def _reported() -> str:
    path = FOLDER / f"address.{os.getpid()}"
    return path.read_text(errors="replace") if path.is_file() else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = len(_reported())
    result = yield
    found = _reported()[before:]
    # Of undefined behaviour the report goes to stderr, whatever its options say; pytest -s would leave it there.
    out, err = item.config.pluginmanager.getplugin("capturemanager").read_global_capture()
    item.add_report_section("call", "stdout", out)
    item.add_report_section("call", "stderr", err)
    if "runtime error: " in err:
        found += err
    if found:
        pytest.fail(found[:6000], pytrace=False)
    return result
