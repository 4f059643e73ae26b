"""Operators on 4-bit weights: quantise them, and dequantise all of them or some rows into a new or a given tensor."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import nf4 as configs
from ..reference import nf4 as definition
from .backends import (
    cpu_available,
    cuda_available,
    device_of,
    dtype_name,
    kernels,
    on_device,
    takes_cpu,
    takes_cuda,
    takes_triton,
    triton_available,
)
from .dispatch import Implementation, Operator, Verdict, reference, require

WEIGHT_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor code, int block_size, SymInt[] shape, "
    "Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset"
)


def check_weight(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
) -> None:
    """The storage contract of a 4-bit weight. No index a kernel computes leaves tensors that pass this."""
    count = math.prod(shape)
    blocks = -(-count // block_size) if block_size > 0 else 0
    require(
        block_size in definition.BLOCK_SIZES,
        lambda: f"block_size: expected one of {definition.BLOCK_SIZES}, got {block_size}",
    )
    require(
        packed.dtype == torch.uint8 and packed.numel() == (count + 1) // 2 and packed.is_contiguous(),
        lambda: (
            f"packed: expected {(count + 1) // 2} contiguous uint8 for a weight of shape {tuple(shape)}, "
            f"got {packed.numel()} {packed.dtype}"
        ),
    )
    require(
        code.dtype == torch.float32 and code.numel() == 16 and code.is_contiguous(),
        lambda: f"code: expected 16 float32, got {code.numel()} {code.dtype}",
    )
    nested = nested_absmax is not None
    require(
        (nested_code is not None) == nested and (nested_offset is not None) == nested,
        lambda: "nested_absmax, nested_code, nested_offset: expected all three or none",
    )
    expected_dtype = torch.uint8 if nested else torch.float32
    require(
        absmax.dtype == expected_dtype and absmax.numel() == blocks and absmax.is_contiguous(),
        lambda: f"absmax: expected {blocks} contiguous {expected_dtype}, got {absmax.numel()} {absmax.dtype}",
    )
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        groups = -(-blocks // definition.NESTED_BLOCK_SIZE)
        for name, tensor, size in (
            ("nested_absmax", nested_absmax, groups),
            ("nested_code", nested_code, 256),
            ("nested_offset", nested_offset, 1),
        ):
            require(
                tensor.dtype == torch.float32 and tensor.numel() == size and tensor.is_contiguous(),
                lambda name=name, tensor=tensor, size=size: (  # type: ignore[misc]
                    f"{name}: expected {size} contiguous float32, got {tensor.numel()} {tensor.dtype}"
                ),
            )
    for other in (absmax, code, nested_absmax, nested_code, nested_offset):
        require(
            other is None or other.device == packed.device,
            lambda: f"a 4-bit weight's tensors: expected all on {packed.device}",
        )


def _check_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    first_row: int = 0,
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    check_rows(out, shape, first_row)
    require(out.device == packed.device, lambda: f"out: expected on {packed.device}, got {out.device}")


def check_rows(out: Tensor, shape: Sequence[int], first_row: int) -> None:
    """``out`` holds a weight of ``shape``, contiguous; or rows ``first_row`` .. of a matrix, its own rows consecutive elements that
    may lie apart."""
    require(out.is_floating_point(), lambda: f"out: expected contiguous floating {tuple(shape)}, got {out.dtype}")
    if out.is_contiguous() and tuple(out.shape) == tuple(shape) and first_row == 0:
        return
    require(
        len(shape) == 2 and out.dim() == 2 and out.shape[1] == shape[1] and out.shape[0] <= shape[0],
        lambda: f"out: expected contiguous floating {tuple(shape)}, or rows of it, got {out.dtype} {tuple(out.shape)}",
    )
    require(
        (out.stride(1) == 1 or out.shape[1] < 2) and (out.stride(0) >= out.shape[1] or out.shape[0] < 2),
        lambda: f"out: expected contiguous floating rows, which do not overlap, got strides {out.stride()}",
    )
    require(
        0 <= first_row <= shape[0] - out.shape[0],
        lambda: (
            f"first_row: expected 0 to {shape[0] - out.shape[0]} for {out.shape[0]} of {shape[0]} rows, got {first_row}"
        ),
    )


def _compiled_out(library: str):  # type: ignore[no-untyped-def]
    def run(
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        block_size: int,
        shape: Sequence[int],
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        nested_offset: Tensor | None,
        out: Tensor,
        first_row: int = 0,
    ) -> None:
        getattr(torch.ops, library).nf4_dequantize.default(
            packed,
            absmax,
            code,
            block_size,
            nested_absmax,
            nested_code,
            nested_offset,
            math.prod(shape),
            first_row,
            out,
        )

    return run


def _triton_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    first_row: int = 0,
) -> None:
    case = configs.Case(dtype_name(out.dtype), block_size, nested_absmax is not None)
    config = configs.nf4_dequantize(case, device_of(out))
    with on_device(packed):
        kernels("nf4").nf4_dequantize(
            packed,
            absmax,
            code,
            block_size,
            math.prod(shape),
            out,
            first_row,
            nested_absmax,
            nested_code,
            nested_offset,
            config,
        )


def _reference_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    first_row: int = 0,
) -> None:
    dense = definition.nf4_dequantize(
        packed, absmax, code, block_size, tuple(shape), out.dtype, nested_absmax, nested_code, nested_offset
    )
    out.copy_(dense if dense.shape == out.shape else dense[first_row : first_row + out.shape[0]])


_OUT = 8  # where ``out`` stands among the arguments


def _cpu_accepts(packed: Tensor, *arguments: Any) -> Verdict:
    return takes_cpu(packed, arguments[_OUT - 1])


def _cuda_accepts(packed: Tensor, *arguments: Any) -> Verdict:
    return takes_cuda(packed, arguments[_OUT - 1])


def _triton_accepts(packed: Tensor, *arguments: Any) -> Verdict:
    return takes_triton(packed, arguments[_OUT - 1])


def _check_quantize(weight: Tensor, block_size: int, code: Tensor) -> None:
    require(
        weight.is_floating_point() and weight.numel() > 0,
        lambda: f"weight: expected a floating tensor with elements, got {weight.dtype} {tuple(weight.shape)}",
    )
    require(
        block_size in definition.BLOCK_SIZES,
        lambda: f"block_size: expected one of {definition.BLOCK_SIZES}, got {block_size}",
    )
    require(
        code.dtype == torch.float32 and code.numel() == 16 and code.device == weight.device,
        lambda: f"code: expected 16 float32 on {weight.device}, got {code.numel()} {code.dtype} on {code.device}",
    )


def _fake_quantize(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    packed = weight.new_empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((-(-weight.numel() // block_size),), dtype=torch.float32)


def _empty_quantized(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed = torch.empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
    return packed, torch.empty((-(-weight.numel() // block_size),), dtype=torch.float32, device=weight.device)


def _compiled_quantize(library: str):  # type: ignore[no-untyped-def]
    def run(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
        bounds, order = definition.code_bounds(code)
        packed, absmax = _empty_quantized(weight, block_size)
        getattr(torch.ops, library).nf4_quantize.default(
            weight.contiguous(), block_size, bounds, order.to(torch.uint8), packed, absmax
        )
        return packed, absmax

    return run


def _triton_quantize(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    bounds, order = definition.code_bounds(code)
    packed, absmax = _empty_quantized(weight, block_size)
    config = configs.nf4_quantize(configs.QuantizeCase(dtype_name(weight.dtype), block_size), device_of(weight))
    with on_device(weight):
        kernels("nf4_quantize").nf4_quantize(
            weight.contiguous(), block_size, bounds, order.to(torch.uint8), packed, absmax, config
        )
    return packed, absmax


def _check_nest(values: Tensor, code: Tensor, snapped: bool) -> None:
    require(
        values.dtype == torch.float32 and values.dim() == 1 and values.shape[0] > 0,
        lambda: f"values: expected a float32 vector with elements, got {values.dtype} {tuple(values.shape)}",
    )
    require(
        code.dtype == torch.float32 and code.numel() == 256 and code.device == values.device,
        lambda: f"code: expected 256 float32 on {values.device}, got {code.numel()} {code.dtype} on {code.device}",
    )


def _fake_nest(values: Tensor, code: Tensor, snapped: bool) -> tuple[Tensor, Tensor]:
    groups = -(-values.numel() // definition.NESTED_BLOCK_SIZE)
    return values.new_empty(values.shape, dtype=torch.uint8), values.new_empty((groups,))


def _empty_nested(values: Tensor) -> tuple[Tensor, Tensor]:
    groups = -(-values.numel() // definition.NESTED_BLOCK_SIZE)
    index = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    return index, torch.empty((groups,), dtype=torch.float32, device=values.device)


def _compiled_nest(library: str):  # type: ignore[no-untyped-def]
    def run(values: Tensor, code: Tensor, snapped: bool) -> tuple[Tensor, Tensor]:
        index, absmax = _empty_nested(values)
        bounds = (code[:-1] + code[1:]) / 2
        getattr(torch.ops, library).nf4_nest.default(values.contiguous(), bounds, snapped, index, absmax)
        return index, absmax

    return run


def _triton_nest(values: Tensor, code: Tensor, snapped: bool) -> tuple[Tensor, Tensor]:
    index, absmax = _empty_nested(values)
    bounds = (code[:-1] + code[1:]) / 2
    with on_device(values):
        kernels("nf4_quantize").nf4_nest(
            values.contiguous(), bounds, snapped, index, absmax, configs.nf4_nest(device_of(values))
        )
    return index, absmax


def _cpu_takes_values(values: Tensor, *_: Any) -> Verdict:
    return takes_cpu(values)


def _cuda_takes_values(values: Tensor, *_: Any) -> Verdict:
    return takes_cuda(values)


def _triton_takes_values(values: Tensor, *_: Any) -> Verdict:
    return takes_triton(values)


nf4_dequantize_out = Operator(
    "nf4_dequantize_out",
    f"({WEIGHT_SCHEMA}, Tensor(a!) out, int first_row=0) -> ()",
    check=_check_out,
    fake=lambda *_: None,
    implementations=(
        # On a GPU the compiled dequantiser goes first: its 16-byte loads and stores are consecutive within a warp. Not measured.
        Implementation("cuda", cuda_available, _cuda_accepts, _compiled_out("peftfast_cuda")),
        Implementation("cpu", cpu_available, _cpu_accepts, _compiled_out("peftfast_cpu")),
        Implementation("triton", triton_available, _triton_accepts, _triton_out),
        reference(_reference_out),
    ),
)

nf4_quantize = Operator(
    "nf4_quantize",
    "(Tensor weight, int block_size, Tensor code) -> (Tensor, Tensor)",
    check=_check_quantize,
    fake=_fake_quantize,
    implementations=(
        Implementation("cuda", cuda_available, _cuda_takes_values, _compiled_quantize("peftfast_cuda")),
        Implementation("cpu", cpu_available, _cpu_takes_values, _compiled_quantize("peftfast_cpu")),
        Implementation("triton", triton_available, _triton_takes_values, _triton_quantize),
        reference(definition.nf4_quantize),
    ),
)

nf4_nest = Operator(
    "nf4_nest",
    "(Tensor values, Tensor code, bool snapped) -> (Tensor, Tensor)",
    check=_check_nest,
    fake=_fake_nest,
    implementations=(
        Implementation("cuda", cuda_available, _cuda_takes_values, _compiled_nest("peftfast_cuda")),
        Implementation("cpu", cpu_available, _cpu_takes_values, _compiled_nest("peftfast_cpu")),
        Implementation("triton", triton_available, _triton_takes_values, _triton_nest),
        reference(definition.quantize_nested),
    ),
)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
) -> Tensor:
    """A new tensor of ``shape`` and ``dtype`` filled by :data:`nf4_dequantize_out`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    nf4_dequantize_out(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset, out)
    return out
