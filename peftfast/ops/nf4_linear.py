"""A product of a few rows with a 4-bit weight, the adapter inside: the packed bytes are read once and no dense weight is written."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import nf4 as configs
from ..reference import nf4 as definition
from . import lora as lora_ops
from .backends import (
    FLOAT_DTYPES,
    constant_when_compiled,
    cpu_available,
    cuda_available,
    device_of,
    dtype_name,
    gpu_multiplies,
    kernels,
    multiplies_on_triton,
    on_device,
    takes_cpu,
    takes_cuda,
    triton_available,
    undisturbed,
)
from .dispatch import Implementation, Operator, Verdict, reference, requested_backend, require
from .nf4 import WEIGHT_SCHEMA, check_weight


def _check(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    require(len(shape) == 2, lambda: f"shape: expected (N, K), got {tuple(shape)}")
    n, k = shape
    require(
        x.dim() == 2 and x.is_floating_point() and x.shape[1] == k,
        lambda: f"x: expected floating [M, {k}], got {x.dtype} {tuple(x.shape)}",
    )
    require((lora_a is None) == (lora_b is None), lambda: "lora_a, lora_b: expected both or none")
    require(lora_a is not None or lora_bias is None, lambda: "lora_bias: expected an adapter with it")
    if lora_a is not None and lora_b is not None:
        require(
            lora_a.dim() == 2 and lora_a.is_floating_point() and lora_a.shape[1] == k,
            lambda: f"lora_a: expected floating [R, {k}], got {lora_a.dtype} {tuple(lora_a.shape)}",
        )
        require(
            lora_b.dim() == 2 and lora_b.is_floating_point() and tuple(lora_b.shape) == (n, lora_a.shape[0]),
            lambda: f"lora_b: expected floating {(n, lora_a.shape[0])}, got {lora_b.dtype} {tuple(lora_b.shape)}",
        )
    for name, vector in (("bias", bias), ("lora_bias", lora_bias)):
        require(
            vector is None or (vector.is_floating_point() and vector.dim() == 1 and vector.shape[0] == n),
            lambda name=name, vector=vector: (
                f"{name}: expected floating [{n}], got {vector.dtype} {tuple(vector.shape)}"
            ),  # type: ignore[misc]
        )
    for other in (x, bias, lora_a, lora_b, lora_bias):
        require(other is None or other.device == packed.device, lambda: f"expected all tensors on {packed.device}")
    for name, asked in (("compute", compute), ("dtype", dtype)):
        require(
            asked.is_floating_point,
            lambda name=name, asked=asked: f"{name}: expected a floating dtype, got {asked}",  # type: ignore[misc]
        )


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape, lora_a, compute, dtype = rest[4], rest[9], rest[-2], rest[-1]
    ranks = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty((x.shape[0], shape[0]), dtype=dtype), x.new_empty((x.shape[0], ranks), dtype=compute)


def _results(
    x: Tensor, n: int, lora_a: Tensor | None, compute: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    ranks = 0 if lora_a is None else lora_a.shape[0]
    y = torch.empty((x.shape[0], n), dtype=dtype, device=x.device)
    return y, torch.empty((x.shape[0], ranks), dtype=compute, device=x.device)


def _cpu(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, s = _results(x, shape[0], lora_a, compute, dtype)
    nested = (nested_absmax, nested_code, nested_offset)
    adapter = (bias, lora_a, lora_b, lora_bias, scaling)
    torch.ops.peftfast_cpu.nf4_linear.default(x, packed, absmax, code, block_size, *nested, *adapter, s, y)
    return y, s


def _cuda(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, s = _results(x, shape[0], lora_a, compute, dtype)
    ranks = s.shape[1]
    warps, scratch = configs.nf4_linear_shares(x.shape[0], shape[0], shape[1], ranks, device_of(x))
    partial = torch.empty(scratch, dtype=torch.float32, device=x.device)
    # The kernel rounds x and A from float32 to the compute dtype on the way; the other 16-bit dtype is cast before it.
    x = x if x.dtype in (compute, torch.float32) else x.to(compute)
    lora_a = lora_a if lora_a is None or lora_a.dtype in (compute, torch.float32) else lora_a.to(compute)
    contiguous = [None if t is None else t.contiguous() for t in (bias, lora_a, lora_b, lora_bias)]
    nested = (nested_absmax, nested_code, nested_offset)
    torch.ops.peftfast_cuda.nf4_linear.default(
        x.contiguous(), packed, absmax, code, block_size, *nested, *contiguous, scaling, warps, partial, s, y
    )
    return y, s


def _triton(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The base product in one launch; with an adapter the two passes of the lora family follow."""
    y, s = _results(x, shape[0], None, compute, dtype)
    config = configs.nf4_linear(x.shape[0], shape[0], shape[1], dtype_name(compute), device_of(x))
    with on_device(x):
        kernels("nf4_linear").nf4_linear(
            x,
            packed,
            absmax,
            code,
            block_size,
            tuple(shape),
            nested_absmax,
            nested_code,
            nested_offset,
            bias,
            compute,
            y,
            config,
        )
    if lora_a is not None and lora_b is not None:
        s = lora_ops.lora_shrink(x, lora_a, None, 0.0, 1.0, compute)
        lora_ops.lora_expand_(y, s, lora_b, lora_bias, None, 0.0, scaling)
    return y, s


def _reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    nested = (nested_absmax, nested_code, nested_offset)
    dense = definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), compute, *nested)
    y, s = definition.nf4_linear(x.to(compute), dense, bias, lora_a, lora_b, lora_bias, scaling)
    return y.to(dtype), x.new_empty((x.shape[0], 0), dtype=compute) if s is None else s


def _cpu_accepts(x: Tensor, *rest: Any) -> Verdict:
    ok, reason = takes_cpu(x, *(one for one in rest if isinstance(one, Tensor)))
    return _takes_dtypes(rest) if ok else (ok, reason)


def _takes_dtypes(rest: tuple[Any, ...]) -> Verdict:
    for dtype in rest[-2:]:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False, f"the fused kernels compute in and give float32, bfloat16 and float16, asked for {dtype}"
    return True, ""


def _cuda_accepts(x: Tensor, *rest: Any) -> Verdict:
    ok, reason = takes_cuda(x, *(one for one in rest if isinstance(one, Tensor)))
    if ok:
        ok, reason = _takes_dtypes(rest)
    if ok:
        ok, reason = cuda_serves(x.shape[0], rest[4][1], rest[3], rest[-2])
    if ok and math.prod(rest[4]) > 2**37:
        ok, reason = False, f"the CUDA kernel takes weights of up to 2^37 elements, got {tuple(rest[4])}"
    if ok and any(t is not None and t.data_ptr() % 16 for t in (x, rest[0], rest[9])):
        ok, reason = False, "the CUDA kernel reads 16 bytes at a time, and x, packed or lora_a begins between two such"
    return ok, reason


def cuda_serves(rows: int, k: int, block_size: int, compute: torch.dtype) -> Verdict:
    """What the CUDA kernel is made for; csrc/cuda/nf4_linear.h says why."""
    if compute not in (torch.bfloat16, torch.float16):
        return False, f"the CUDA kernel multiplies on tensor cores in bfloat16 and float16, asked for {compute}"
    if rows > configs.FEW_ROWS["cuda"]:
        return False, f"the CUDA kernel takes up to {configs.FEW_ROWS['cuda']} rows, got {rows}"
    if k % 128:
        return False, f"the CUDA kernel reads 128 columns at a time, which do not divide K = {k}"
    return True, ""


def _triton_accepts(x: Tensor, *rest: Any) -> Verdict:
    ok, reason = multiplies_on_triton(x, *(one for one in rest if isinstance(one, Tensor)))
    if ok:
        ok, reason = _takes_dtypes(rest)
    if ok:
        ok, reason = triton_serves(rest[4][1], rest[3], rest[-2])
    return ok, reason


def triton_serves(k: int, block_size: int, compute: torch.dtype) -> Verdict:
    """What the Triton kernel is made for: steps of whole blocks or within one, on tensor cores."""
    if compute not in (torch.bfloat16, torch.float16):
        return False, f"the Triton kernel multiplies on tensor cores in bfloat16 and float16, asked for {compute}"
    step = min(block_size, configs.MOST_COLUMNS)
    if k % step:
        return False, f"the Triton kernel reads {step} columns at a time, which do not divide K = {k}"
    return True, ""


nf4_linear = Operator(
    "nf4_linear",
    f"(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? lora_bias, float scaling, "
    "ScalarType compute, ScalarType dtype) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    implementations=(
        # Two launches for base and adapter, against one and two more for Triton. Neither has been measured.
        Implementation("cuda", cuda_available, _cuda_accepts, _cuda),
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu),
        Implementation("triton", triton_available, _triton_accepts, _triton),
        reference(_reference),
    ),
)


_PLAIN = (Tensor, torch.nn.Parameter)


def nf4_linear_now(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:data:`nf4_linear` for arguments that have been checked: of a plain CPU tensor, where nobody watches operators, straight from
    the C++ library, which checks its own. The way through the operator takes 18 us, a third of a 2048 x 2048 product of one row."""
    if x.is_cpu and type(x) in _PLAIN and not torch.compiler.is_compiling() and undisturbed():
        adapter = [one.dtype for one in rest[8:12] if one is not None]
        if all(dtype in FLOAT_DTYPES for dtype in (x.dtype, *adapter, *rest[-2:])):
            return _cpu(x, *rest)
    return nf4_linear(x, *rest)


def _most_rows(device_type: str, k: int, block_size: int, compute: torch.dtype) -> int:
    requested = requested_backend()
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    for row in nf4_linear.implementations:
        if row.backend == "reference" or (requested is not None and row.backend != requested):
            continue
        if not row.available()[0]:
            continue
        if row.backend == "cuda" and (device_type != "cuda" or not cuda_serves(1, k, block_size, compute)[0]):
            continue
        if row.backend == "cpu" and device_type != "cpu":
            continue
        if row.backend == "triton" and not triton_serves(k, block_size, compute)[0]:
            continue
        if row.backend == "triton" and device_type == "cuda" and not gpu_multiplies()[0]:
            continue
        if row.backend == "triton" and not (device_type == "cuda" or requested == "triton"):
            continue
        if row.backend == "cpu" and compute == torch.bfloat16 and k % 64 == 0 == block_size % 64 and _cpu_has_dot():
            return configs.FEW_ROWS["cpu dot"]
        return configs.FEW_ROWS[row.backend]
    return 0


@functools.cache
def _cpu_has_dot() -> bool:
    """By the instruction set that is chosen at the first question: only speed hangs on it."""
    return torch.ops.peftfast_cpu.nf4_linear_has_dot()


@constant_when_compiled
def most_rows(device_type: str, k: int, block_size: int, compute: torch.dtype) -> int:
    """Up to how many rows :data:`nf4_linear` is quicker than dequantising and a library product, on the backend that serves it; 0
    where only the definition does."""
    return _most_rows(device_type, k, block_size, compute)
