"""Which implementation serves a call: asked for, passed over, missing, and what is said about it."""

import dataclasses
import logging

import pytest
import torch

from peftfast.ops import backends, dispatch
from peftfast.ops import lora as ops
from peftfast.ops import nf4 as nf4_ops
from peftfast.reference import lora as definition
from peftfast.reference import nf4 as nf4_definition

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tables are asked about CPU tensors")

X, W = torch.randn(3, 8), torch.randn(2, 8)
ARGUMENTS = (X, W, None, 0.0, 1.0, torch.float32)
WIDE = (X.double(), W.double(), None, 0.0, 1.0, torch.float64)


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_reported", set())
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)


def without(monkeypatch: pytest.MonkeyPatch, operator: dispatch.Operator, *missing: str) -> None:
    """The operator's table where the backends named are not available."""
    rows = tuple(
        dataclasses.replace(row, available=lambda: (False, "taken away")) if row.backend in missing else row
        for row in operator.implementations
    )
    monkeypatch.setattr(operator, "implementations", rows)


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="PEFTFAST_BACKEND: expected one of cuda, triton, cpu, reference, got 'tpu'"):
        ops.lora_shrink(*ARGUMENTS)


def test_nothing_asked_takes_the_first_that_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.requested_backend() is None
    assert ops.lora_shrink.select(*ARGUMENTS).backend == "cpu"
    without(monkeypatch, ops.lora_shrink, "cpu")
    assert ops.lora_shrink.select(*ARGUMENTS).backend == "triton"
    without(monkeypatch, ops.lora_shrink, "cpu", "triton")
    assert ops.lora_shrink.select(*ARGUMENTS).backend == "reference"
    assert torch.equal(ops.lora_shrink(*ARGUMENTS), definition.lora_shrink(*ARGUMENTS))
    assert ops.lora_shrink.select(*WIDE).backend == "reference"


@pytest.mark.parametrize("asked", ["cpu", "triton", "reference"])
def test_asked_for(asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    for operator in (ops.lora_shrink, ops.lora_weight_grad):
        arguments = ARGUMENTS if operator is ops.lora_shrink else (X[:, :2], X, *ARGUMENTS[2:])
        assert operator.select(*arguments).backend == asked
    assert not caplog.records


@pytest.mark.parametrize("asked", ["cpu", "triton"])
def test_asked_for_but_missing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, ops.lora_shrink, asked)
    monkeypatch.setenv("PEFTFAST_BACKEND", asked)
    with pytest.raises(RuntimeError, match=f"PEFTFAST_BACKEND={asked} was asked for but is missing: taken away"):
        ops.lora_shrink(*ARGUMENTS)


def test_cuda_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "cuda")
    for operator, arguments in (
        (ops.lora_shrink, ARGUMENTS),
        (nf4_ops.nf4_quantize, (W, 64, nf4_definition.code_table("nf4", torch.device("cpu")))),
    ):
        with pytest.raises(RuntimeError, match="PEFTFAST_BACKEND=cuda was asked for but is missing"):
            operator(*arguments)


def test_passed_over_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "cpu")
    with caplog.at_level(logging.WARNING, logger="peftfast"):
        for _ in range(3):
            ops.lora_shrink(*WIDE)
        assert len(caplog.records) == 1
        message = caplog.records[0].getMessage()
        assert "peftfast::lora_shrink runs on reference, not on cpu" in message and "torch.float64" in message
        ops.lora_shrink(X, W, None, 0.0, 1.0, torch.float64)  # another reason
        assert len(caplog.records) == 2 and "asked for torch.float64" in caplog.records[1].getMessage()
        ops.lora_weight_grad(WIDE[0][:, :2], *WIDE[:1], *WIDE[2:])  # another operator
        assert len(caplog.records) == 3


def test_an_operator_without_that_backend_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "cpu")
    others = tuple(row for row in nf4_ops.nf4_quantize.implementations if row.backend not in ("cpu", "triton"))
    monkeypatch.setattr(nf4_ops.nf4_quantize, "implementations", others)
    with caplog.at_level(logging.WARNING, logger="peftfast"):
        nf4_ops.nf4_quantize(W, 64, nf4_definition.code_table("nf4", torch.device("cpu")))
    assert [record.getMessage() for record in caplog.records] == [
        "peftfast::nf4_quantize runs on reference, not on cpu: cpu does not implement this operator"
    ]


def test_nothing_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, ops.lora_shrink, "cpu", "triton", "reference")
    with pytest.raises(RuntimeError, match="peftfast::lora_shrink: no implementation accepts"):
        ops.lora_shrink(*ARGUMENTS)


def test_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ops.lora_shrink.verdicts(*WIDE)
    assert [(row.backend, ok) for row, ok, _ in rows] == [("cpu", False), ("triton", False), ("reference", True)]
    assert "got torch.float64" in rows[0][2] and "got torch.float64" in rows[1][2]
    assert [ok for _, ok, _ in ops.lora_shrink.verdicts(*ARGUMENTS)] == [True, True, True]
    without(monkeypatch, ops.lora_shrink, "triton")
    assert ops.lora_shrink.verdicts(*ARGUMENTS)[1][1:] == (False, "taken away")
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")  # what is asked for does not change what could serve
    assert ops.lora_shrink.verdicts(*ARGUMENTS)[0][1]


def test_every_table_ends_with_the_definition() -> None:
    for operator in (*vars(ops).values(), *vars(nf4_ops).values()):
        if isinstance(operator, dispatch.Operator):
            assert operator.implementations[-1].backend == "reference"
            assert operator.implementations[-1].available() == (True, "")
            assert {row.backend for row in operator.implementations} <= set(dispatch.BACKENDS)


def test_what_the_backends_take() -> None:
    meta = X.to("meta")
    for takes in (backends.takes_cpu, backends.takes_triton):
        assert takes(X, None, W) == (True, "")
        ok, reason = takes(X, meta)
        assert not ok and "on meta" in reason
        ok, reason = takes(X.double())
        assert not ok and "torch.float64" in reason
