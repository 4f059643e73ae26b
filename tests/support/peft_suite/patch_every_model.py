"""A pytest plugin for PEFT's own tests: every model that PEFT adapts is patched as soon as its adapters are in.

Loaded by ``-p patch_every_model`` with this folder on the path, since PEFT's tests are a package named ``tests`` too. ``--stock`` runs
the same selection unpatched, ``--planted TEST`` one test of it once more with a fault in the fused layers, ``--outcomes FILE`` writes
what failed, how often peftfast's operators were called and what the test with the fault came to.
"""

import functools
import json
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import jinja2
import peft.tuners.tuners_utils
import pytest
import torch

from peftfast.functional.lora import LoRALinearFunction
from peftfast.functional.node import known
from peftfast.integrations import peft as integration
from peftfast.ops.dispatch import Operator

fused_calls = 0
outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "planted": []}
PLANTED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftfast")
    group.addoption("--stock", action="store_true", help="do not patch")
    group.addoption("--leave-out", type=Path, help="file with the names of tests that are not run, one a line")
    group.addoption("--planted", help="name of a test that is run once more, under a planted fault")
    group.addoption("--outcomes", type=Path, help="JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    # A thousand adapters are saved, each with a model card of the same template: compiled once. And torch.manual_seed, called six
    # thousand times, keeps its caller's stack as text for each kind of device that may yet come.
    jinja2.Template.__new__ = functools.cache(jinja2.Template.__new__)
    for late in (torch.cuda, torch.xpu, torch.mtia):
        late.traceback = SimpleNamespace(format_stack=list)
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
    path = config.getoption("--leave-out")
    left_out = set(path.read_text().splitlines()) if path is not None else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def with_a_fault(item: pytest.Function) -> pytest.Function:
    """The same test, during which a fused layer computes something else."""
    again = pytest.Function.from_parent(item.parent, name=f"{item.name} planted", callobj=item.obj)
    again.stash[PLANTED] = True
    return again


@pytest.hookimpl(trylast=True)  # after -k, which would leave it out or in by its name
def pytest_collection_finish(session: pytest.Session) -> None:
    name = session.config.getoption("--planted")
    if name is not None:
        (item,) = (item for item in session.items if item.name == name)
        session.items.append(with_a_fault(item))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if PLANTED in item.stash:
            forward = integration.FusedLinear.forward
            monkeypatch.setattr(
                integration.FusedLinear, "forward", lambda *args, **named: 1.01 * forward(*args, **named)
            )
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, None, None]:
    outcome = yield
    if PLANTED in item.stash:
        outcome.get_result().planted = True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "planted"):
        if report.when == "call":
            outcomes["planted"].append(report.outcome)
    elif report.failed:
        outcomes["failed"].append(report.nodeid)
    elif report.when == "call" or report.skipped:
        outcomes[report.outcome].append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    if path is not None:
        by_library = sum(one.native.counts()["forwards"] for one in known() if one.native is not None)
        counts = {"passed": len(outcomes["passed"]), "skipped": len(outcomes["skipped"])}
        failed = sorted(set(outcomes["failed"]))
        told = {"failed": failed, "fused_calls": fused_calls + by_library, "planted": outcomes["planted"], **counts}
        path.write_text(json.dumps(told, indent=1))
