"""act(gate) * up and its backward, in Triton (definitions: peftfast.reference.gated_activation)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import narrow, widen

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_SILU, _GELU, _GELU_TANH, _RELU = (tl.constexpr(i) for i in range(4))
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)
_CUBIC_SLOPE = tl.constexpr(3 * 1.5957691216057308 * 0.044715)


@triton.jit
def _curve(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g), in float32."""
    if ACTIVATION == _RELU:
        # What is no number stays none, as torch has it.
        value = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    elif ACTIVATION == _GELU:
        area = 0.5 * (1.0 + tl.erf(g * _ROOT_HALF))
        value = g * area
        slope = area + g * tl.exp(-0.5 * g * g) * _DENSITY
    else:
        z = g
        if ACTIVATION == _GELU_TANH:
            square = tl.where(g * g > 1e6, 1e6, g * g)  # beyond, the sigmoid is 0 or 1 already
            z = g * (_LINEAR + _CUBIC * square)
        # The sigmoid and what it lacks of 1, each without cancellation or overflow.
        power = tl.exp(-tl.abs(z))
        large = 1.0 / (1.0 + power)
        small = power * large
        half = tl.where(z < 0.0, small, large)
        bend = tl.where(z < 0.0, large, small)
        if ACTIVATION == _GELU_TANH:
            bend = bend * (_LINEAR + _CUBIC_SLOPE * square)
        value = g * half
        slope = half + value * bend
    return value, slope


@triton.jit
def _between(value, dtype: tl.constexpr):
    """What stands between two operators of the stock expression: rounded to its dtype, so that a model that is trained by one agrees
    with a model that is trained by the other."""
    return widen(narrow(value, dtype))


@triton.jit
def _place(pid, N, BLOCK: tl.constexpr):
    """Row, columns and mask of a program: N is one row's length, of which a program takes BLOCK."""
    # tl.cdiv adds before it divides, and wraps around just below 2**31: a row may be all elements.
    blocks = (N - 1) // BLOCK + 1
    row = (pid // blocks).to(tl.int64)
    offs_n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, offs_n, offs_n < N


@triton.jit
def _gated_activation_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    N,
    stride_gatem,
    stride_upm,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = act(gate) * up, contiguous."""
    row, offs_n, mask = _place(tl.program_id(0), N, BLOCK)
    g = widen(tl.load(gate_ptr + row * stride_gatem + offs_n, mask=mask, other=0.0))
    u = widen(tl.load(up_ptr + row * stride_upm + offs_n, mask=mask, other=0.0))
    value = _between(_curve(g, ACTIVATION)[0], gate_ptr.dtype.element_ty)
    tl.store(h_ptr + row * N + offs_n, narrow(value * u, h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_activation_backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    N,
    stride_dhm,
    stride_gatem,
    stride_upm,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dh * up * act'(gate), dup = dh * act(gate), and where h has a place h = act(gate) * up, which may be dh's: a program
    reads what it overwrites before it writes. All that is written is contiguous."""
    row, offs_n, mask = _place(tl.program_id(0), N, BLOCK)
    d = widen(tl.load(dh_ptr + row * stride_dhm + offs_n, mask=mask, other=0.0))
    g = widen(tl.load(gate_ptr + row * stride_gatem + offs_n, mask=mask, other=0.0))
    u = widen(tl.load(up_ptr + row * stride_upm + offs_n, mask=mask, other=0.0))
    value, slope = _curve(g, ACTIVATION)
    value = _between(value, gate_ptr.dtype.element_ty)
    out = row * N + offs_n
    tl.store(
        dgate_ptr + out,
        narrow(_between(d * u, gate_ptr.dtype.element_ty) * slope, dgate_ptr.dtype.element_ty),
        mask=mask,
    )
    tl.store(dup_ptr + out, narrow(d * value, dup_ptr.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + out, narrow(value * u, h_ptr.dtype.element_ty), mask=mask)


def _sizes(*tensors: torch.Tensor) -> tuple[int, int]:
    """Rows and columns as the launch sees them: one long row where every tensor is contiguous."""
    M, N = tensors[0].shape
    return (1, M * N) if all(tensor.is_contiguous() for tensor in tensors) else (M, N)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str, config) -> torch.Tensor:
    """h ``[M, N]``, contiguous, of gate and up ``[M, N]`` whose columns lie side by side."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not h.numel():
        return h
    M, N = _sizes(gate, up)
    launch(
        _gated_activation_kernel,
        (M * triton.cdiv(N, config.block),),
        gate,
        up,
        h,
        N,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=ACTIVATIONS.index(activation),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return h


def gated_activation_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, h: torch.Tensor | None, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup ``[M, N]``, contiguous, of dh, gate and up ``[M, N]`` whose columns lie side by side; h is written where it is
    given, and may be dh, contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if not dgate.numel():
        return dgate, dup
    M, N = _sizes(dh, gate, up)
    launch(
        _gated_activation_backward_kernel,
        (M * triton.cdiv(N, config.block),),
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        N,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=ACTIVATIONS.index(activation),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return dgate, dup
