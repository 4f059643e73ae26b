"""The perturbation, the gathered gradient and AdamW of csrc/cuda run on the CPU, thread by thread, through the operators' own code: the
library's operators are defined by the schemas of csrc/bind, and call the emulated launch functions."""

import contextlib
import ctypes
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.ops import sparse_adamw as adamw_ops
from peftfast.ops import sparse_delta as delta_ops
from peftfast.ops import zeroth_order as zo_ops
from tests.support import sparse_checks, zo_checks
from tests.support.cuda_emulator.build import CSRC, build, fails_apart
from tests.support.zo_checks import ZoCase
from tests.test_cuda_emulated import call

pytestmark = pytest.mark.interpreter  # where there is a GPU the kernels themselves are tested

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SOURCES = {"zo_apply": "zeroth_order", "sparse_delta_dvalues": "sparse", "sparse_adamw": "sparse"}


def schema(name: str) -> str:
    for path in (CSRC / "bind").glob("*_cuda.cpp"):
        for text in re.findall(r"m\.def\((.*?)\);", path.read_text(), re.DOTALL):
            found = "".join(re.findall(r'"([^"]*)"', text))
            if found.startswith(f"{name}("):
                return found
    raise ValueError(name)


class ZoTensor(ctypes.Structure):
    """csrc/cuda/zeroth_order.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "out", "minus")),
        *((name, ctypes.c_int64) for name in ("count", "offset")),
        ("tensor_id", ctypes.c_uint32),
    ]


def _zo_apply(library: ctypes.CDLL, sources: Any, outs: Any, minus: Any, seeds: Tensor, *rest: Any) -> None:
    coefficients, decay, thresholds, rounding, ids, offsets, rademacher = rest
    rows = (ZoTensor * len(outs))()
    for i, out in enumerate(outs):
        given = [group[i].data_ptr() if group else None for group in (sources, outs, minus)]
        rows[i] = ZoTensor(*given, out.numel(), offsets[i], ids[i])
    terms = (seeds, coefficients, seeds.numel(), decay, thresholds, rounding, rademacher)
    function = library.zo_apply
    call(lambda *rest: function(rows, ctypes.c_int64(len(outs)), *rest), *terms, outs[0].dtype)


def _dvalues(library: ctypes.CDLL, dyt: Tensor, xt: Tensor, indices: Tensor, out: Tensor) -> None:
    sizes = (dyt.dtype, dyt.shape[0], xt.shape[0], dyt.shape[1])
    wide = indices.dtype == torch.int64
    call(library.sparse_delta_dvalues, dyt, xt, *sizes, indices, wide, indices.numel(), out, out.dtype)


def _adamw(library: ctypes.CDLL, table: Tensor, layer: Tensor, first: Tensor, codes: Any, *rest: Any) -> None:
    hyper, corrections, seed, weight_like, index_like, age_like = rest
    numbers = (hyper, corrections, corrections.shape[1], seed)
    wide = (index_like.dtype == torch.int64, age_like.dtype == torch.int32)
    call(library.sparse_adamw, table, layer, first, layer.numel(), codes, *numbers, weight_like.dtype, *wide)


CALLS = {"zo_apply": _zo_apply, "sparse_delta_dvalues": _dvalues, "sparse_adamw": _adamw}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tmp_path_factory.mktemp(family) for family in sorted(set(SOURCES.values()))}


@pytest.fixture(scope="module")
def libraries(folders: dict[str, Path]) -> dict[str, ctypes.CDLL]:
    return {family: build(family, folder) for family, folder in folders.items()}


@contextlib.contextmanager
def operators_of(libraries: dict[str, ctypes.CDLL]) -> Iterator[dict[str, ctypes.CDLL]]:
    """``torch.ops.peftfast_cuda`` for CPU tensors. What is yielded decides which library of a family they call."""
    used = dict(libraries)
    namespace = torch.library.Library("peftfast_cuda", "DEF")

    def implementation(name: str) -> Any:
        return lambda *arguments: CALLS[name](used[SOURCES[name]], *arguments)

    for name in CALLS:
        namespace.define(schema(name))
        namespace.impl(name, implementation(name), "CompositeExplicitAutograd")
    try:
        yield used
    finally:
        namespace._destroy()


@pytest.fixture(scope="module")
def operators(libraries: dict[str, ctypes.CDLL]) -> Iterator[dict[str, ctypes.CDLL]]:
    with operators_of(libraries) as used:
        yield used


PLAIN = ZoCase(terms=1, decay=False, threshold=False, rounding=False)
ZO = (
    ZoCase(sizes=(2100, 0, 77), dtype=BF16, offsets=(0, 3, 8)),
    ZoCase(sizes=(300, 40), dtype=F32, offsets=(5, 128), terms=2, decay=True, threshold=True, data=1),
    ZoCase(sizes=(501,), dtype=F16, offsets=(2047,), rademacher=True, rounding=True, out_of_place=True, data=2),
    ZoCase(sizes=(130, 512), dtype=BF16, offsets=(0, 64), rademacher=True, rounding=True, data=3),
    # Whole tiles, and nothing but the terms.
    replace(PLAIN, sizes=(2500, 1100), offsets=(0, 2**33 + 128), rademacher=True, data=4),
    replace(PLAIN, sizes=(1200,), dtype=F32, offsets=(1024,), rademacher=True, out_of_place=True, data=5),
    replace(PLAIN, sizes=(1700, 9), dtype=F16, offsets=(2**40 + 16, 2**32 - 3), terms=2, data=6),
)


def check_zo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zo_checks, "ops", SimpleNamespace(perturb_=zo_ops._compiled_perturb("peftfast_cuda")))
    for case in ZO:
        zo_checks.check_perturb(case)


def check_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seed, eps = torch.randn(70, 33).to(BF16), torch.tensor([9]), torch.tensor([1e-2])
    for threshold, rademacher in itertools.product((None, torch.tensor([0.5])), (False, True)):
        arguments = (weight, seed, eps, threshold, 5, 16, rademacher)
        actual = zo_ops._compiled_pair("peftfast_cuda")(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, zo_ops._reference_pair(*arguments), strict=True))


def check_dvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_checks.ops, "sparse_delta_dvalues", delta_ops._cuda_dvalues)
    for case in (*sparse_checks.TELLING, *sparse_checks.random_cases(4, seed=4)):
        sparse_checks.check_dvalues(case)


def check_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sparse_adamw_", "sparse_adamw8_"):
        run = {"sparse_adamw_": adamw_ops._cuda_adamw, "sparse_adamw8_": adamw_ops._cuda_adamw8}[name]
        monkeypatch.setattr(sparse_checks.adamw_ops, name, run)
    for seeded in (False, True):
        sparse_checks.check_adamw(1, seeded)
        sparse_checks.check_adamw8(1, seeded)
        sparse_checks.check_adamw_outside(seeded)


CHECKS = {"zo": check_zo, "pair": check_pair, "dvalues": check_dvalues, "adamw": check_adamw}


@pytest.mark.parametrize("name", CHECKS)
def test_operators(name: str, operators: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[name](monkeypatch)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("name", "family", "edit"),
    [
        ("zo", "zeroth_order", ("at = element - entry.offset", "at = element")),
        ("zo", "zeroth_order", ("before - blocks", "before")),
        ("zo", "zeroth_order", ("lane / kCounters % 4", "lane % 4")),
        ("zo", "zeroth_order", ("from + u * kStep", "from")),
        ("zo", "zeroth_order", ("bits << (31 - i)", "bits << (30 - i)")),
        ("zo", "zeroth_order", ("(32 * u + lane) * (kElements / 4)", "lane * (kElements / 4)")),
        ("zo", "zeroth_order", ("| (32 * u + lane);", "| lane;")),
        ("zo", "zeroth_order", ("plus[u][i] : stays[i]", "plus[u][i] : plus[u][i] * 0.5f")),
        ("zo", "zeroth_order", ("if (at + i >= 0 && at + i < count) out", "if (at + i > 0 && at + i < count) out")),
        (
            "pair",
            "zeroth_order",
            ("minus[u][i + j] = minus[u][i + j] - term", "minus[u][i + j] = minus[u][i + j] + term"),
        ),
        ("pair", "zeroth_order", ("minus[u][i] = minus[u][i] - term", "minus[u][i] = minus[u][i] + term")),
        ("dvalues", "sparse", ("distance = kLanes / 2; distance > 0", "distance = kLanes / 2; distance > 1")),
        ("adamw", "sparse", ("if (s + i < count) put", "put")),
        ("adamw", "sparse", ("index < 0 || index >= step.row[9]", "index >= step.row[9]")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_planted_fault_is_found(
    name: str,
    family: str,
    edit: tuple[str, str],
    operators: dict[str, ctypes.CDLL],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(operators, family, build(family, tmp_path, edit, base=folders[family]))
    assert fails_apart(lambda: CHECKS[name](monkeypatch), AssertionError, IndexError)
