"""LoRA layers, groups and batches of random shapes, dtypes, strides and options against float64 autograd of their definition: forward
and every gradient within the error budget. Five hundred sets on the CPU kernels, forty under the interpreter."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftfast.functional import lora as layer
from peftfast.ops import native
from tests.support.group_checks import GroupCase, Part, check_group, gradients, run, tensors_of, upstream
from tests.support.layer_checks import KINDS, LEAVES, LayerCase, check_layer
from tests.support.lora_checks import BF16, F16, F32

# Mostly sizes at which a result has as many values as a comparison of largest errors needs; the least ones are tested one by one
# elsewhere, on many data sets each.
OUTPUTS = (64, 65, 67, 96, 127, 128, 130, 257, 31)
INPUTS = (8, 31, 33, 64, 65, 67, 96, 127, 130, 200)
ROWS = (0, 1, 2, 5, 7, 16, 17, 31, 64, 65, 130)
RANKS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 64, 127, 300)
DROPOUTS = (0.0, 0.0, 0.05, 0.1, 0.5, 0.9)
SCALINGS = (1.0, 0.25, 2.0, 1.7, 0.5)
LAYOUTS = ("plain", "plain", "transposed", "wide", "spaced")
VALUES = 128  # of each result, at least
# Under the interpreter every result has that many from one data set, since a launch takes 20 to 400 ms.
FEW_OUTPUTS, FEW_INPUTS, FEW_ROWS, FEW_RANKS = (64, 67), (33, 65), (5, 17), (2, 5, 19)


def shapes(small: bool) -> st.SearchStrategy[tuple[int, ...]]:
    width, rows = st.sampled_from(FEW_INPUTS if small else INPUTS), st.sampled_from(FEW_ROWS if small else ROWS)
    leading = st.one_of(
        st.tuples(rows), st.tuples(st.sampled_from((1, 2, 3)), rows), st.tuples(st.just(2), st.just(1), rows)
    )
    return st.tuples(leading, width).map(lambda pair: (*pair[0], pair[1]))


@st.composite
def layers(draw: st.DrawFn, small: bool = False) -> LayerCase:
    x, adapter, compute, weight = draw(st.sampled_from(KINDS))
    leaves = LEAVES + (("weight",) if weight == "dense" else ())
    return LayerCase(
        shape=draw(shapes(small)),
        N=draw(st.sampled_from(FEW_OUTPUTS if small else OUTPUTS)),
        R=draw(st.sampled_from(FEW_RANKS if small else RANKS)),
        x=x,
        adapter=adapter,
        compute=compute,
        weight=weight,
        p=draw(st.sampled_from(DROPOUTS)),
        scaling=draw(st.sampled_from(SCALINGS)),
        bias=draw(st.booleans()),
        lora_bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        # Half of them what a training step asks for, which is what the joined operator serves.
        needs=draw(st.one_of(st.just(LEAVES[:3]), st.sets(st.sampled_from(leaves)).map(lambda s: tuple(sorted(s))))),
        data=draw(st.integers(0, 2**20)),
    )


@st.composite
def groups(draw: st.DrawFn, small: bool = False) -> GroupCase:
    batch = draw(st.booleans())
    x, adapter, compute = draw(
        st.sampled_from(((F32, F32, None), (F32, F32, BF16), (BF16, F32, None), (BF16, BF16, None), (F16, F32, None)))
    )
    parts = draw(
        st.lists(
            st.builds(
                Part,
                N=st.sampled_from(FEW_OUTPUTS if small else OUTPUTS),
                R=st.sampled_from(FEW_RANKS if small else RANKS[:13]),
                p=st.sampled_from(DROPOUTS),
                scaling=st.sampled_from(SCALINGS),
                weight=st.sampled_from(("dense", "dense", "nf4", "nested")),
                bias=st.booleans(),
                lora_bias=st.booleans(),
                magnitude=st.just(False) if batch else st.booleans(),
                frozen=st.sampled_from(((), (), ("lora_a",), ("lora_b",), ("lora_a", "lora_b"), ("magnitude",))),
            ),
            min_size=1,
            max_size=2 if small else 4,
        )
    )
    named = draw(st.sampled_from(("all", "rows", "leading"))) if batch else "all"
    options: dict[str, Any] = {"batch": batch, "named": named, "needs_x": draw(st.booleans())}
    layout, data = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**20))
    return GroupCase(tuple(parts), draw(shapes(small)), x, adapter, compute, **options, layout=layout, data=data)


def settled(count: int) -> settings:
    # The same examples at every run: a budget is a statement about random data, and a suite must not be.
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.skipif(not native.cpu_available()[0], reason="on the CPU kernels")
@settled(300)
@given(layers())
def test_layers(case: LayerCase) -> None:
    check_layer(case, VALUES)


@pytest.mark.skipif(not native.cpu_available()[0], reason="on the CPU kernels")
@settled(200)
@given(groups())
def test_groups(case: GroupCase) -> None:
    check_group(case, VALUES)


@pytest.mark.interpreter
@settled(20)
@given(layers(True))
def test_layers_interpreted(monkeypatch: pytest.MonkeyPatch, case: LayerCase) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    check_layer(case)


@pytest.mark.interpreter
@settled(20)
@given(groups(True))
def test_groups_interpreted(monkeypatch: pytest.MonkeyPatch, case: GroupCase) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    check_group(case)


@pytest.mark.skipif(not native.cpu_available()[0], reason="on the CPU kernels")
@settled(100)
@given(layers())
def test_one_operator_is_the_passes_one_by_one(case: LayerCase) -> None:
    """The joined operator and the operators it joins: the same bits, forward and backward."""
    from tests.support.layer_checks import gradients, run, tensors_of

    tensors = tensors_of(case)
    results = []
    for whole in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr(layer, "undisturbed", lambda: False)
            y = run(case, tensors)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.data)).to(y.dtype)
            results.append({"y": y.detach()} | gradients(y, tensors, dy))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), (name, case)


@pytest.mark.skipif(not native.cpu_available()[0], reason="on the CPU kernels")
@settled(30)
@given(groups())
def test_groups_give_the_same_bits_again(case: GroupCase) -> None:
    tensors = tensors_of(case)
    found = []
    for _ in range(2):
        ys = run(case, tensors)
        found.append([*ys, *gradients(ys, tensors, upstream(case, ys)).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
