"""Operators on 4-bit weights: quantise, and dequantise into a new or a given tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..configs import nf4 as configs
from ..reference import nf4 as definition
from .backends import (
    cpu_available,
    device_of,
    dtype_name,
    kernels,
    on_device,
    takes_cpu,
    takes_triton,
    triton_available,
)
from .dispatch import Implementation, Operator, Verdict, reference, require

_WEIGHT = (
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
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    require(
        out.is_floating_point() and tuple(out.shape) == tuple(shape) and out.is_contiguous(),
        lambda: f"out: expected contiguous floating {tuple(shape)}, got {out.dtype} {tuple(out.shape)}",
    )
    require(out.device == packed.device, lambda: f"out: expected on {packed.device}, got {out.device}")


def _cpu_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
) -> None:
    torch.ops.peftfast_cpu.nf4_dequantize.default(
        packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset, out
    )


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
) -> None:
    case = configs.Case(dtype_name(out.dtype), block_size, nested_absmax is not None)
    config = configs.nf4_dequantize(case, device_of(out))
    with on_device(packed):
        kernels("nf4").nf4_dequantize(
            packed, absmax, code, block_size, out, nested_absmax, nested_code, nested_offset, config
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
) -> None:
    out.copy_(
        definition.nf4_dequantize(
            packed, absmax, code, block_size, tuple(shape), out.dtype, nested_absmax, nested_code, nested_offset
        )
    )


def _cpu_accepts(packed: Tensor, *arguments: object) -> Verdict:
    out = arguments[-1]
    return takes_cpu(packed, out if isinstance(out, Tensor) else None)


def _triton_accepts(packed: Tensor, *arguments: object) -> Verdict:
    out = arguments[-1]
    return takes_triton(packed, out if isinstance(out, Tensor) else None)


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


nf4_dequantize_out = Operator(
    "nf4_dequantize_out",
    f"({_WEIGHT}, Tensor(a!) out) -> ()",
    check=_check_out,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_out),
        Implementation("triton", triton_available, _triton_accepts, _triton_out),
        reference(_reference_out),
    ),
)

# The one row that has only its definition so far: quantising happens once a model, dequantising at every use.
nf4_quantize = Operator(
    "nf4_quantize",
    "(Tensor weight, int block_size, Tensor code) -> (Tensor, Tensor)",
    check=_check_quantize,
    fake=_fake_quantize,
    implementations=(reference(definition.nf4_quantize),),
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
