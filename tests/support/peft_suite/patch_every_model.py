"""A pytest plugin for PEFT's own tests: every model that PEFT adapts is patched as soon as its adapters are in.

Loaded by ``-p patch_every_model`` with this folder on the path, since PEFT's tests are a package named ``tests`` too. ``--stock`` runs
the same selection unpatched, ``--shard 1/3`` a third of the tests, ``--outcomes FILE`` writes what failed and how often
peftfast's operators were called.
"""

import functools
import json
import zlib
from pathlib import Path

import peft.tuners.tuners_utils
import pytest

from peftfast.functional.lora import LoRALinearFunction
from peftfast.integrations import peft as integration
from peftfast.ops.dispatch import Operator

fused_calls = 0
outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftfast")
    group.addoption("--stock", action="store_true", help="do not patch")
    group.addoption("--shard", default="1/1", help="K/N: the tests whose names fall into part K of N")
    group.addoption("--leave-out", type=Path, help="file with the names of tests that are not run, one a line")
    group.addoption("--outcomes", type=Path, help="JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--stock"):
        return
    # Every way to an adapter ends here: get_peft_model, from_pretrained, add_adapter, load_adapter, inject_adapter_in_model.
    inject = peft.tuners.tuners_utils.BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_and_patch(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        integration.patch(model)
        return result

    peft.tuners.tuners_utils.BaseTuner.inject_adapter = inject_and_patch
    call = Operator.__call__

    def counted(operator: Operator, *args):
        global fused_calls
        fused_calls += 1
        return call(operator, *args)

    Operator.__call__ = counted
    # On a CPU a dense layer is one call of the library, past the operators.
    forward = LoRALinearFunction.forward

    def counted_forward(*args):
        global fused_calls
        fused_calls += 1
        return forward(*args)

    LoRALinearFunction.forward = staticmethod(counted_forward)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--shard").split("/"))
    path = config.getoption("--leave-out")
    left_out = set(path.read_text().splitlines()) if path is not None else set()
    chosen = [
        item for item in items if item.nodeid not in left_out and zlib.crc32(item.nodeid.encode()) % parts == part - 1
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        outcomes["failed"].append(report.nodeid)
    elif report.when == "call" or report.skipped:
        outcomes[report.outcome].append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    if path is not None:
        counts = {"passed": len(outcomes["passed"]), "skipped": len(outcomes["skipped"])}
        failed = sorted(set(outcomes["failed"]))
        path.write_text(json.dumps({"failed": failed, "fused_calls": fused_calls, **counts}, indent=1))
