"""The product of a gated MLP: its definition, and its operators on each backend within the error budget."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch.library import opcheck

from peftfast.kernels import gated_activation as kernels
from peftfast.ops import gated_activation as ops
from peftfast.ops import native
from peftfast.reference import gated_activation as definition
from peftfast.reference.gated_activation import ACTIVATIONS
from tests.support.gated_checks import CHECKS, OPERATORS, TELLING, GatedCase, arguments, call, random_cases
from tests.support.interpreter import DEVICE, require_runnable_kernels
from tests.support.lora_checks import BF16, F16, F32, F64


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_s_backward_is_autograd_s(activation: str) -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(5, 7, dtype=F64) * 3 for _ in range(3))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    assert torch.autograd.gradcheck(lambda g, u: definition.gated_activation(g, u, activation), leaves)
    expected = torch.autograd.grad(definition.gated_activation(gate, up, activation), leaves, dh)
    found = definition.gated_activation_recompute(dh, gate.detach(), up.detach(), activation)
    for one, two in zip(found, (*expected, definition.gated_activation(gate, up, activation)), strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> Any:
    if not native.cpu_available()[0]:
        pytest.fail("the CPU library is not here")
    chosen = native.cpu_isa()
    try:
        torch.ops.peftfast_cpu.set_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.peftfast_cpu.set_isa(chosen)


@pytest.mark.parametrize("name", CHECKS)
def test_within_budget(name: str, isa: str) -> None:
    for case in (*TELLING, *random_cases(80, seed=len(name), largest=2049)):
        CHECKS[name](case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_on_a_fine_grid(activation: str, isa: str) -> None:
    """Errors of the polynomials: relative to act(g) where float64 itself is exact, absolute for the slope."""
    gate = torch.cat([torch.linspace(-90, 90, 200_003), torch.linspace(-8, 8, 200_003)])[None]
    one = torch.ones_like(gate)
    h = ops.gated_activation(gate, one, activation)
    slope, value = ops.gated_activation_backward(one, gate, one, activation)
    wide = gate.double()
    exact = definition.activate(wide, activation)
    if activation == "gelu":  # 1 + erf cancels below -5 in float64 too
        exact = wide * 0.5 * torch.special.erfc(-wide * math.sqrt(0.5))
    if activation == "gelu_tanh":
        exact = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    normal = exact.abs() > 1e-35
    bound = {"silu": 4e-7, "gelu": 6e-6, "gelu_tanh": 2e-5, "relu": 0.0}[activation]
    for found in (h, value):
        assert ((found - exact).abs() / exact.abs())[normal].max() <= bound
        assert (found - exact).abs()[~normal].max() <= 1e-35
    assert (slope - definition.slope(wide, activation)).abs().max() <= 3e-7
    near = (wide.abs() < 3) & normal
    assert ((h - exact).abs() / exact.abs())[near].max() <= 1e-6


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, -1e30])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_number_stays_none(activation: str, value: float, isa: str) -> None:
    """As torch has it; where its own derivative overflows at 1e30, the limit."""
    gate, one = torch.full((1, 21), value), torch.ones(1, 21)
    h = ops.gated_activation(gate, one, activation)
    expected = definition.gated_activation(gate, one, activation)
    if activation == "gelu" and value == math.inf:
        expected = gate  # torch 2.13's vectorised one gives nan, its scalar one inf
    assert torch.equal(h.nan_to_num(7.0), expected.nan_to_num(7.0))
    slope, _ = ops.gated_activation_backward(one, gate, one, activation)
    if abs(value) == 1e30:
        assert torch.equal(slope, (gate > 0).float())
    else:
        found = definition.slope(gate, activation)
        assert torch.equal(slope.isnan(), found.isnan())


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CHECKS)
def test_within_budget_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "triton")
    for case in (*TELLING, *random_cases(5, seed=len(name), largest=70)):
        CHECKS[name](case)


@triton.jit(do_not_specialize=["pid"])
def _place_kernel(out_ptr, pid, N, BLOCK: tl.constexpr):
    row, offs_n, mask = kernels._place(pid, N, BLOCK)
    tl.store(out_ptr, row)
    tl.store(out_ptr + 1, tl.min(offs_n, axis=0))
    tl.store(out_ptr + 2, tl.sum(mask.to(tl.int64), axis=0))


@pytest.mark.parametrize("N", [1, 1024, 1025, 2**31 - 1024, 2**31 - 512, 2**31 - 1, 2**31, 2**33 - 1])
def test_the_last_program_of_a_long_row(N: int) -> None:
    """Contiguous tensors are one row of all their elements: 4 GB and more of 16 bits, of which no test has three."""
    require_runnable_kernels()
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    last = triton.cdiv(N, 1024) - 1
    _place_kernel[(1,)](out, last, N, BLOCK=1024)
    assert out.tolist() == [0, last * 1024, N - last * 1024]


@pytest.mark.parametrize("name", CHECKS)
def test_within_budget_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    for case in (*TELLING, *random_cases(5, seed=len(name), largest=70)):
        CHECKS[name](case)


@pytest.mark.compiled
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "case", [GatedCase(), GatedCase(dtype=BF16, layout="wide", activation="relu"), GatedCase(M=0)], ids=str
)
def test_opcheck(name: str, case: GatedCase) -> None:
    dh, gate, up = arguments(case)
    given = (gate, up) if name == "gated_activation" else (dh.contiguous(), gate, up)
    opcheck(OPERATORS[name].overload, (*given, case.activation))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_layout_threads_and_place_change_no_bit(dtype: torch.dtype) -> None:
    """A tail's element is computed as one within a vector is, and h in dh's place as in its own."""
    before = torch.get_num_threads()
    case = GatedCase(M=37, N=1031, dtype=dtype, activation="gelu")
    dh, gate, up = arguments(case)
    first = call("gated_activation_recompute_", case, dh, gate, up)
    try:
        torch.set_num_threads(2)
        again = call("gated_activation_recompute_", case, dh, gate, up)
    finally:
        torch.set_num_threads(before)
    wide = torch.zeros(37, 2000, dtype=dtype, device=dh.device)
    wide[:, 5:1036] = gate
    strided = call("gated_activation_recompute_", case, dh, wide[:, 5:1036], up)
    apart = (*call("gated_activation_backward", case, dh, gate, up), *call("gated_activation", case, dh, gate, up))
    for other in (again, strided, apart):
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    one_column = call("gated_activation", case, dh[:, :1], gate[:, :1], up[:, :1])[0]
    assert torch.equal(one_column, first[2][:, :1])


def bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    gate, other = torch.randn(3, 5), torch.randn(3, 4)
    return {
        "a vector": ("gate: expected a floating matrix", lambda: ops.gated_activation(gate[0], gate[0], "silu")),
        "integers": ("gate: expected a floating matrix", lambda: ops.gated_activation(gate.int(), gate.int(), "silu")),
        "a shape": ("up: expected torch.float32", lambda: ops.gated_activation(gate, other, "silu")),
        "a dtype": ("up: expected torch.float32", lambda: ops.gated_activation(gate, gate.half(), "silu")),
        "a device": ("up: expected on cpu", lambda: ops.gated_activation(gate, gate.to("meta"), "silu")),
        "a name": ("activation: expected one of", lambda: ops.gated_activation(gate, gate, "swish")),
        "a gradient": ("dh: expected torch.float32", lambda: ops.gated_activation_backward(other, gate, gate, "silu")),
        "its strides": (
            "dh: expected a contiguous",
            lambda: ops.gated_activation_recompute_(torch.randn(5, 3).T, gate, gate, "silu"),
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls(name: str) -> None:
    message, run = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        run()


def test_the_library_refuses_what_the_operators_never_hand_it() -> None:
    library, gate = torch.ops.peftfast_cpu, torch.randn(4, 6)
    h = torch.empty(4, 6)
    for given, message in (
        ((gate, gate[:, :5], 0, h), "up: expected shape"),
        ((gate.T, gate.T, 0, torch.empty(6, 4)), "gate: expected columns side by side"),
        ((gate, gate, 4, h), "activation: expected 0 to 3"),
        ((gate, gate.half(), 0, h), "up: expected dtype"),
        ((gate, gate, 0, torch.empty(6, 4).T), "h: expected"),
        ((gate, gate, 0, torch.empty(4, 5)), "h: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.gated_activation(*given)
