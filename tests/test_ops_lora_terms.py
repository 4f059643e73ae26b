"""The operators of several adapters and of DoRA: registration, contracts, and each backend within the error budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from peftfast.ops import lora_dora as dora
from peftfast.ops import lora_terms as terms
from peftfast.ops import native
from tests.support.lora_checks import BF16, DEVICE, DTYPES, F32, LARGE_RANKS
from tests.support.terms_checks import CHECKS, OPERATORS, TELLING, TermsCase, arguments, random_cases

OPCHECKS = [
    TermsCase(M=9, K=19, N=13),
    TermsCase(M=9, K=19, N=13, rows=True, dtypes=DTYPES[0], layout="transposed", seeded=False),
    TermsCase(M=0, K=19, N=13, dtypes=DTYPES[3], bias=False),
]


@pytest.mark.compiled
@pytest.mark.parametrize("case", OPCHECKS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, case: TermsCase) -> None:
    opcheck(OPERATORS[name].overload, arguments(name, case))


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "scalar"])
@pytest.mark.parametrize("name", CHECKS)
def test_within_budget(name: str, isa: str) -> None:
    if not native.cpu_available()[0]:
        pytest.fail("the CPU library is not here")
    chosen = native.cpu_isa()
    try:
        torch.ops.peftfast_cpu.set_isa(isa)
    except RuntimeError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for case in (*TELLING, *random_cases(25, seed=len(name), largest=300)):
            CHECKS[name](case)
    finally:
        torch.ops.peftfast_cpu.set_isa(chosen)


@pytest.mark.parametrize("name", CHECKS)
def test_large_ranks(name: str) -> None:
    for case in LARGE_RANKS:
        CHECKS[name](TermsCase(M=case.M, K=case.K, N=case.N, ranks=(case.R, 3), ps=(0.0, 0.0), seeded=False))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CHECKS)
def test_within_budget_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in (*TELLING, *random_cases(5, seed=len(name), largest=70)):
        CHECKS[name](case)


@pytest.mark.parametrize("name", CHECKS)
def test_within_budget_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    for case in (*TELLING, *random_cases(5, seed=len(name), largest=70)):
        CHECKS[name](case)


@pytest.mark.parametrize("name", CHECKS)
def test_same_bits_whatever_the_threads(name: str) -> None:
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            given = arguments(name, TermsCase(M=700, K=515, N=389, ranks=(16, 5), ps=(0.1, 0.5), rows="terms" in name))
            result = OPERATORS[name](*given)
            result = given[0] if result is None else result
            found.append(list(result) if isinstance(result, tuple) else [result])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_rows_of_others_are_zero_and_not_read() -> None:
    """What stands in x's rows of no adapter, or of another, reaches nothing."""
    x, a = torch.randn(8, 16), [torch.randn(2, 16), torch.randn(3, 16)]
    rows = torch.tensor([0, 1, -1, 5, 1, 0, -1, 1], dtype=torch.int32)
    x[rows == -1] = float("nan")
    s = terms.lora_terms_shrink(x, a, rows, None, [0.0, 0.0], [1.0, 1.0], F32)
    assert (s[rows != 0][:, :2] == 0).all() and (s[rows != 1][:, 2:] == 0).all()
    da = terms.lora_terms_weight_grad(torch.ones(8, 5), x, [2, 3], rows, None, [0.0, 0.0], [1.0, 1.0], F32)
    torch.testing.assert_close(da[0], x[rows == 0].sum(0))
    torch.testing.assert_close(da[2], x[rows == 1].sum(0))


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    x, a, b = torch.randn(4, 8), torch.randn(2, 8), torch.randn(6, 2)
    s, dy, seeds = torch.randn(4, 2), torch.randn(4, 6), torch.tensor([1])
    rows = torch.zeros(4, dtype=torch.int32)

    def shrink(x=x, a=(a,), rows=rows, seeds=seeds, ps=(0.1,), scalings=(1.0,), dtype=F32):  # type: ignore[no-untyped-def]
        return lambda: terms.lora_terms_shrink(x, list(a), rows, seeds, list(ps), list(scalings), dtype)

    def expand(base=dy, s=s, w=(b,), biases=(), dtype=F32):  # type: ignore[no-untyped-def]
        return lambda: terms.lora_terms_expand(base, s, list(w), list(biases), rows, None, [0.0], [1.0], dtype)

    def grad(ds=s, x=x, ranks=(2,)):  # type: ignore[no-untyped-def]
        return lambda: terms.lora_terms_weight_grad(ds, x, list(ranks), rows, None, [0.0], [1.0], F32)

    def gained(base=dy, plain=None, gain=dy[0], bias=None):  # type: ignore[no-untyped-def]
        return lambda: dora.lora_dora_expand(base, plain, s, b, None, gain, bias, 1.0, F32)

    return {
        "no terms": ("terms: expected at least one", shrink(a=(), ps=(), scalings=())),
        "a shape": ("a: expected shape", shrink(a=(a[:, :7],))),
        "a device": ("a: expected on", shrink(a=(a.to("meta"),))),
        "scalings": ("scalings: expected 1, got 2", shrink(scalings=(1.0, 1.0))),
        "ps": ("ps: expected 1, got 0", shrink(ps=())),
        "p": ("p: expected a probability", shrink(ps=(1.5,))),
        "rows dtype": ("rows: expected int32", shrink(rows=rows.long())),
        "rows size": ("rows: expected int32", shrink(rows=rows[:3])),
        "seeds dtype": ("seeds: expected int64", shrink(seeds=torch.ones(1))),
        "seeds size": ("seeds: expected int64", shrink(seeds=torch.tensor([1, 2]))),
        "dtype": ("dtype: expected a floating", shrink(dtype=torch.int32)),
        "s shape": ("s: expected shape", expand(s=s[:, :1])),
        "w shape": ("w: expected shape", expand(w=(b[:5],))),
        "biases": ("biases: expected none or 1", expand(biases=(dy[0], dy[0]))),
        "bias size": ("biases: expected floating", expand(biases=(dy[0, :3],))),
        "ranks": ("ds: expected shape", grad(ranks=(3,))),
        "negative rank": ("ranks: expected sizes", grad(ranks=(-2,))),
        "dora plain": ("plain: expected shape", gained(plain=dy[:3])),
        "dora gain": ("gain: expected floating", gained(gain=dy[0, :3])),
        "dora bias": ("bias: expected floating", gained(bias=torch.ones(6, dtype=torch.int32))),
        "gain grads z": ("z: expected shape", lambda: dora.lora_gain_grads(dy, dy[:3], dy[0])),
        "gain grads factor": ("factor: expected floating", lambda: dora.lora_gain_grads(dy, dy, dy[0, :3])),
        "dropout base": ("base: expected shape", lambda: dora.lora_dropout_add(dy, x, seeds, 0.1, F32)),
        "dropout seed": ("seed: expected one int64", lambda: dora.lora_dropout_add(None, x, rows, 0.1, F32)),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_contract(name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


LIBRARY = torch.ops.peftfast_cpu
Y = torch.randn(4, 8)
NATIVE: dict[str, tuple[str, Callable[[], Any]]] = {
    "rows dtype": (
        "rows: expected dtype",
        lambda: LIBRARY.lora_terms_shrink(Y, [Y], torch.zeros(4).long(), None, [0.0], [1.0], Y[:, :4]),
    ),
    "rows count": (
        "rows: expected 4 elements",
        lambda: LIBRARY.lora_terms_shrink(Y, [Y], torch.zeros(3).int(), None, [0.0], [1.0], Y[:, :4]),
    ),
    "out": ("out: expected shape", lambda: LIBRARY.lora_terms_shrink(Y, [Y], None, None, [0.0], [1.0], Y)),
    "scalings": ("ps, scalings", lambda: LIBRARY.lora_terms_shrink(Y, [Y], None, None, [0.0], [], Y[:, :4])),
    "seeds": (
        "seeds: expected 1",
        lambda: LIBRARY.lora_terms_shrink(Y, [Y], None, torch.zeros(2).long(), [0.5], [1.0], Y[:, :4].clone()),
    ),
    "db": (
        "db: expected 32",
        lambda: LIBRARY.lora_terms_dy_grads(Y, Y[:, :4], [Y.T[:, :4]], None, [1.0], Y[:, :4].clone(), Y[0]),
    ),
    "ranks": (
        "ranks: expected sizes",
        lambda: LIBRARY.lora_terms_weight_grad(Y, Y, [-1], None, None, [0.0], [1.0], Y.clone()),
    ),
    "biases": (
        "biases: expected none or 1",
        lambda: LIBRARY.lora_terms_expand(Y, Y, [Y.T @ Y], [Y[0]] * 2, None, None, [0.0], [1.0], Y.clone()),
    ),
    "gain": (
        "gain: expected 8",
        lambda: LIBRARY.lora_dora_expand(Y, None, Y, Y.T @ Y, None, Y[0, :3], None, 1.0, Y.clone(), Y.clone()),
    ),
    "layer weight": (
        "weight: expected dtype",
        lambda: LIBRARY.lora_layer_forward(Y, Y.bfloat16(), None, Y, Y.T[:4], None, None, 0.0, 1.0),
    ),
    "layer x": (
        r"x: expected a contiguous",
        lambda: LIBRARY.lora_layer_forward(Y.T, Y[:, :4], None, Y[:2, :4], Y[:, :2], None, None, 0.0, 1.0),
    ),
    "layer b": (
        "lora_b: expected shape",
        lambda: LIBRARY.lora_layer_forward(Y, Y, None, Y[:2], Y[:3, :2], None, None, 0.0, 1.0),
    ),
    "layer nothing": (
        "expected a gradient",
        lambda: LIBRARY.lora_layer_backward(Y, None, None, None, Y.T, None, None, 0.0, 1.0, False, False, False, F32),
    ),
    "layer s": (
        "s: expected beside",
        lambda: LIBRARY.lora_layer_backward(Y, None, None, None, Y.T, None, None, 0.0, 1.0, False, False, True, BF16),
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_contract(name: str) -> None:
    message, call = NATIVE[name]
    native.cpu_available()  # loads the library
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dropped", [False, True])
def test_dora_of_nothing_is_the_base_to_the_bit(backend: str, dtype: torch.dtype, dropped: bool) -> None:
    """A gain of 1 and a delta of 0: the bias, which is taken out of base for the gain, leaves no rounding behind."""
    generator = torch.Generator().manual_seed(4)
    base, plain = (torch.randn(5, 37, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    s, w = torch.randn(5, 4, generator=generator).to(dtype).to(DEVICE), torch.zeros(37, 4, device=DEVICE)
    bias = torch.randn(37, generator=generator).to(DEVICE)
    given = (base, plain if dropped else None, s, w, None, torch.ones(37, device=DEVICE), bias, 2.0, dtype)
    y, z = dora.lora_dora_expand(*given)
    assert torch.equal(y, plain if dropped else base)
    torch.testing.assert_close(z.float(), base.float() - bias, rtol=0.0, atol=0.05 if dtype == BF16 else 1e-6)
