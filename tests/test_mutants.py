"""Every planted fault is noticed by the checks that the real tests run; the same planting without a fault is not."""

from types import SimpleNamespace

import pytest

from peftfast.functional import lora as layer
from peftfast.ops import lora as ops
from peftfast.ops import nf4 as nf4_ops
from tests.support import layer_checks, lora_checks, mutants, nf4_checks
from tests.support.lora_checks import BF16, F16
from tests.test_functional_lora import FUSED, check_counts, kind, saved_by

OPERATORS = [ops.lora_shrink, ops.lora_expand, ops.lora_expand_, ops.lora_weight_grad, ops.lora_dy_grads]


def check_operator(name: str) -> None:
    for case in lora_checks.TELLING:
        lora_checks.CHECKS[name](case)


def check_dequantize() -> None:
    for case in nf4_checks.TELLING:
        nf4_checks.check_dequantize(case)


def check_layers() -> None:
    for case in layer_checks.TELLING:
        layer_checks.check_layer(case)


def through(run, *given):  # type: ignore[no-untyped-def]
    return run(*given)


@pytest.mark.parametrize("mutant", mutants.LORA, ids=str)
def test_operator(mutant: mutants.Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.plant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_operator(mutant.operator.name)


@pytest.mark.parametrize("mutant", mutants.ROUNDING, ids=str)
def test_rounding(mutant: mutants.Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.plant(monkeypatch, mutant)
    for dtype in (BF16, F16):
        with pytest.raises(AssertionError, match="not rounded to nearest even"):
            lora_checks.check_rounding(mutant.operator.name, dtype)


@pytest.mark.parametrize("mutant", mutants.NF4, ids=str)
def test_dequantize(mutant: mutants.Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.plant(monkeypatch, mutant)
    with pytest.raises(AssertionError, match="differ from the formula's"):
        check_dequantize()


@pytest.mark.parametrize("mutant", mutants.LAYER, ids=str)
def test_layer(mutant: mutants.LayerMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.plant_in_layer(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_layers()


@pytest.mark.parametrize("operator", [*OPERATORS, nf4_ops.nf4_dequantize_out], ids=lambda operator: operator.name)
def test_planting_itself_breaks_nothing(operator, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    mutants.plant(monkeypatch, mutants.Mutant("none", operator, through))
    if operator in OPERATORS:
        check_operator(operator.name)
    else:
        check_dequantize()


def test_planting_in_the_layer_itself_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {operator.name: through for operator in OPERATORS} | {"linear": through}
    mutants.plant_in_layer(monkeypatch, mutants.LayerMutant("none", names, edit=lambda ctx, grads: grads))
    check_layers()


@pytest.mark.parametrize("index", FUSED)
def test_torch_calls_in_a_wrapper_are_noticed(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are right, the counts are not."""
    monkeypatch.setattr(layer, "by_library", SimpleNamespace(apply=mutants.composed_apply))
    layer_checks.check_layer(kind(index))
    with pytest.raises(AssertionError):
        check_counts(index)


def test_a_kept_dense_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "by_library", SimpleNamespace(apply=mutants.composed_apply))
    case = kind(0)
    _, saved = saved_by(case)
    assert any(t.is_floating_point() and t.numel() == case.N * 67 for t in saved)
