"""Operators of a sparse delta on a frozen weight: its gradient and its addition to a weight; ``sparse_adamw`` has the optimiser's step.
Shapes and meaning stand in ``peftfast.reference.sparse_delta``.

What depends on the values of ``indices`` (order, range) is checked by whoever makes them, once, since it costs a pass and, on a GPU, a
synchronisation. Handed wrong indices all the same, an operator reads and writes nothing outside its tensors.
"""

from typing import Any

import torch
from torch import Tensor

from ..configs import sparse_delta as configs
from ..reference import sparse_delta as definition
from . import native
from .backends import (
    FLOAT_DTYPES,
    constant_when_compiled,
    cpu_available,
    device_of,
    dtype_name,
    kernels,
    multiplies_on_triton,
    on_device,
    takes_cpu,
    takes_triton,
    triton_available,
)
from .dispatch import Implementation, Operator, Verdict, reference, requested_backend, require

INDEX_DTYPES = (torch.int32, torch.int64)


def check_indices(indices: Tensor, like: Tensor) -> None:
    require(
        indices.dtype in INDEX_DTYPES and indices.dim() == 1 and indices.is_contiguous(),
        lambda: (
            f"indices: expected a contiguous int32 or int64 vector, got {indices.dtype} of shape {tuple(indices.shape)}"
        ),
    )
    require(indices.device == like.device, lambda: f"indices: expected on {like.device}, got on {indices.device}")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int, like: Tensor) -> None:
    require(
        tensor.dtype == dtype and tuple(tensor.shape) == (size,) and tensor.is_contiguous(),
        lambda: (
            f"{name}: expected a contiguous {dtype} of shape ({size},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
        ),
    )
    require(tensor.device == like.device, lambda: f"{name}: expected on {like.device}, got on {tensor.device}")


def check_weight(weight: Tensor) -> None:
    require(
        weight.is_floating_point() and weight.is_contiguous(),
        lambda: f"weight: expected a contiguous floating tensor, got {weight.dtype} with strides {weight.stride()}",
    )


def _values_dtype(weight: Tensor) -> torch.dtype:
    return definition.wide_dtype(weight.dtype)


# Gradient of the values.


def _check_operands(dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    for name, tensor in (("dy", dy), ("x", x)):
        require(
            tensor.dim() == 2 and tensor.is_floating_point(),
            lambda name=name, tensor=tensor: (  # type: ignore[misc]
                f"{name}: expected a floating matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            ),
        )
    require(
        x.shape[0] == dy.shape[0] and x.dtype == dy.dtype and x.device == dy.device,
        lambda: (
            f"x: expected {dy.shape[0]} rows of {dy.dtype} on {dy.device}, got {x.shape[0]} of {x.dtype} on {x.device}"
        ),
    )
    require(dtype.is_floating_point, lambda: f"dtype: expected a floating dtype, got {dtype}")


def _check_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    _check_operands(dy, x, dtype)
    check_indices(indices, dy)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _cpu_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(indices.shape, dtype=dtype)
    torch.ops.peftfast_cpu.sparse_delta_dvalues.default(_rows_contiguous(dy), _rows_contiguous(x), indices, out)
    return out


def _transposed(matrix: Tensor) -> Tensor:
    """``[columns, padded]`` with zeros behind the rows: the scratch of the gathered gradient, which reads columns."""
    rows, columns = matrix.shape
    padded = -(-max(1, rows) // configs.ROW_MULTIPLE) * configs.ROW_MULTIPLE
    out = torch.empty((columns, padded), dtype=matrix.dtype, device=matrix.device)
    out[:, :rows].copy_(matrix.T)
    out[:, rows:].zero_()
    return out


def _triton_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    config = configs.gather(dtype_name(dy.dtype), dy.shape[0], device_of(dy))
    with on_device(dy):
        return kernels("sparse_delta").sparse_delta_gather(_transposed(dy), _transposed(x), indices, dtype, config)


def _cuda_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(indices.shape, dtype=dtype, device=dy.device)
    with on_device(dy):
        torch.ops.peftfast_cuda.sparse_delta_dvalues.default(_transposed(dy), _transposed(x), indices, out)
    return out


def _cpu_accepts_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Verdict:
    return _with_dtype(takes_cpu(dy, x), dtype)


def _triton_accepts_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Verdict:
    return _with_dtype(takes_triton(dy, x), dtype)


def _with_dtype(verdict: Verdict, dtype: torch.dtype) -> Verdict:
    if verdict[0] and dtype not in FLOAT_DTYPES:
        return False, f"results of {dtype}"
    return verdict


def _cuda_accepts_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Verdict:
    if not dy.is_cuda:
        return False, f"the CUDA library serves CUDA tensors, these are on {dy.device.type}"
    return _triton_accepts_dvalues(dy, x, indices, dtype)


sparse_delta_dvalues = Operator(
    "sparse_delta_dvalues",
    "(Tensor dy, Tensor x, Tensor indices, ScalarType dtype) -> Tensor",
    check=_check_dvalues,
    fake=lambda dy, x, indices, dtype: dy.new_empty(indices.shape, dtype=dtype),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts_dvalues, _cpu_dvalues),
        Implementation("triton", triton_available, _triton_accepts_dvalues, _triton_dvalues),
        Implementation("cuda", native.cuda_available, _cuda_accepts_dvalues, _cuda_dvalues),
        reference(definition.sparse_delta_dvalues),
    ),
)


# The same by tiles of dyᵀ x, from whose sums the support is picked: above the crossover density on a GPU.


def _check_tiled(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    order: Tensor,
    tiles: Tensor,
    starts: Tensor,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> None:
    _check_dvalues(dy, x, indices, dtype)
    check_vector("order", order, torch.int32, indices.numel(), dy)
    check_vector("tiles", tiles, torch.int32, tiles.numel(), dy)
    check_vector("starts", starts, torch.int32, tiles.numel() + 1, dy)
    for name, block in (("block_n", block_n), ("block_k", block_k)):
        require(
            block >= 16 and block & (block - 1) == 0,
            lambda name=name, block=block: f"{name}: expected a power of two of at least 16, got {block}",  # type: ignore[misc]
        )


def _triton_tiled(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    order: Tensor,
    tiles: Tensor,
    starts: Tensor,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> Tensor:
    config = configs.tile(dtype_name(dy.dtype), block_n, block_k, device_of(dy))
    with on_device(dy):
        return kernels("sparse_delta").sparse_delta_tiled(
            _rows_contiguous(dy), _rows_contiguous(x), indices, order, tiles, starts, dtype, config
        )


def _triton_accepts_tiled(dy: Tensor, x: Tensor, indices: Tensor, *arguments: Any) -> Verdict:
    return _with_dtype(multiplies_on_triton(dy, x), arguments[-1])


sparse_delta_dvalues_tiled = Operator(
    "sparse_delta_dvalues_tiled",
    "(Tensor dy, Tensor x, Tensor indices, Tensor order, Tensor tiles, Tensor starts, int block_n, int block_k, "
    "ScalarType dtype) -> Tensor",
    check=_check_tiled,
    fake=lambda dy, x, indices, *rest: dy.new_empty(indices.shape, dtype=rest[-1]),
    implementations=(
        Implementation("triton", triton_available, _triton_accepts_tiled, _triton_tiled),
        reference(lambda dy, x, indices, *rest: definition.sparse_delta_dvalues(dy, x, indices, rest[-1])),
    ),
)


# The same of square blocks of the weight, all in one launch.


def _check_blocks(dy: Tensor, x: Tensor, blocks: Tensor, block_size: int, count: int, dtype: torch.dtype) -> None:
    _check_operands(dy, x, dtype)
    require(
        blocks.dtype == torch.int64
        and blocks.dim() == 2
        and blocks.shape[1] == 4
        and blocks.is_contiguous()
        and blocks.device == dy.device,
        lambda: (
            f"blocks: expected contiguous int64 [blocks, 4] on {dy.device}, got {blocks.dtype} {tuple(blocks.shape)}"
        ),
    )
    require(
        block_size in configs.BLOCK_SIZES,
        lambda: f"block_size: expected one of {configs.BLOCK_SIZES}, got {block_size}",
    )
    require(count >= 0, lambda: f"count: expected at least 0, got {count}")


def _cpu_blocks(dy: Tensor, x: Tensor, blocks: Tensor, block_size: int, count: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(count, dtype=dtype)
    rows = _rows_contiguous(dy), _rows_contiguous(x)
    torch.ops.peftfast_cpu.sparse_delta_blocks.default(*rows, blocks, block_size, out)
    return out


def _triton_blocks(dy: Tensor, x: Tensor, blocks: Tensor, block_size: int, count: int, dtype: torch.dtype) -> Tensor:
    config = configs.block(dtype_name(dy.dtype), block_size, device_of(dy))
    with on_device(dy):
        rows = _rows_contiguous(dy), _rows_contiguous(x)
        return kernels("sparse_delta").sparse_delta_blocks(*rows, blocks, block_size, count, dtype, config)


def _cpu_accepts_blocks(dy: Tensor, x: Tensor, *arguments: Any) -> Verdict:
    return _with_dtype(takes_cpu(dy, x), arguments[-1])


def _triton_accepts_blocks(dy: Tensor, x: Tensor, *arguments: Any) -> Verdict:
    return _with_dtype(multiplies_on_triton(dy, x), arguments[-1])


sparse_delta_blocks = Operator(
    "sparse_delta_blocks",
    "(Tensor dy, Tensor x, Tensor blocks, int block_size, int count, ScalarType dtype) -> Tensor",
    check=_check_blocks,
    fake=lambda dy, x, blocks, block_size, count, dtype: dy.new_empty(count, dtype=dtype),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts_blocks, _cpu_blocks),
        Implementation("triton", triton_available, _triton_accepts_blocks, _triton_blocks),
        reference(definition.sparse_delta_blocks),
    ),
)


# The delta in a weight: added, or written.


def _check_patch(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    check_weight(weight)
    check_indices(indices, weight)
    check_vector("values", values, _values_dtype(weight), indices.numel(), weight)


def _cpu_patch(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    torch.ops.peftfast_cpu.sparse_delta_patch.default(weight, indices, values, out)
    return out


def _cpu_patch_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    torch.ops.peftfast_cpu.sparse_delta_patch.default(weight, indices, values, weight)


def _triton_patch(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    out = weight.clone()
    _triton_patch_(out, indices, values)
    return out


def _triton_patch_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    with on_device(weight):
        kernels("sparse_delta").sparse_delta_patch_(weight, indices, values, configs.scatter(device_of(weight)))


def _reference_patch_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    weight.copy_(definition.sparse_delta_patch(weight, indices, values))


def _cpu_accepts_weight(weight: Tensor, *_: Any) -> Verdict:
    return takes_cpu(weight)


def _triton_accepts_weight(weight: Tensor, *_: Any) -> Verdict:
    return takes_triton(weight)


sparse_delta_patch = Operator(
    "sparse_delta_patch",
    "(Tensor weight, Tensor indices, Tensor values) -> Tensor",
    check=_check_patch,
    fake=lambda weight, indices, values: torch.empty_like(weight),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts_weight, _cpu_patch),
        Implementation("triton", triton_available, _triton_accepts_weight, _triton_patch),
        reference(definition.sparse_delta_patch),
    ),
)

sparse_delta_patch_ = Operator(
    "sparse_delta_patch_",
    "(Tensor(a!) weight, Tensor indices, Tensor values) -> ()",
    check=_check_patch,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts_weight, _cpu_patch_),
        Implementation("triton", triton_available, _triton_accepts_weight, _triton_patch_),
        reference(_reference_patch_),
    ),
)


# The delta beside a weight that is neither decoded nor copied: a few rows of x times the support.


def _check_product(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> None:
    require(
        x.dim() == 2 and x.is_floating_point(),
        lambda: f"x: expected a floating matrix, got {x.dtype} of shape {tuple(x.shape)}",
    )
    wide = definition.wide_dtype(x.dtype)
    require(
        y.dim() == 2
        and y.shape[0] == x.shape[0]
        and y.dtype in (wide, x.dtype)
        and y.is_contiguous()
        and y.device == x.device,
        lambda: (
            f"y: expected {x.shape[0]} contiguous rows of {wide} or {x.dtype} on {x.device}, "
            f"got {y.dtype} {tuple(y.shape)} on {y.device}"
        ),
    )
    check_indices(indices, x)
    check_vector("values", values, wide, indices.numel(), x)


def _cpu_product(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> None:
    torch.ops.peftfast_cpu.sparse_delta_product.default(y, _rows_contiguous(x), indices, values)


def _triton_product(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> None:
    config = configs.product(dtype_name(x.dtype), x.shape[0], device_of(x))
    with on_device(x):
        kernels("sparse_delta").sparse_delta_product_(y, _rows_contiguous(x), indices, values, config)


def _reference_product(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> None:
    y.copy_(definition.sparse_delta_product(y, x, indices, values))


sparse_delta_product_ = Operator(
    "sparse_delta_product_",
    "(Tensor(a!) y, Tensor x, Tensor indices, Tensor values) -> ()",
    check=_check_product,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, lambda y, x, *_: takes_cpu(y, x), _cpu_product),
        Implementation("triton", triton_available, lambda y, x, *_: takes_triton(y, x), _triton_product),
        reference(_reference_product),
    ),
)


@constant_when_compiled
def product_is_fused(device_type: str) -> bool:
    """Whether something better than the definition, which forms Δ whole, multiplies a few rows there."""
    requested = requested_backend()
    for row in sparse_delta_product_.implementations:
        if row.backend == "reference" or requested not in (None, row.backend) or not row.available()[0]:
            continue
        if device_type == ("cpu" if row.backend == "cpu" else "cuda") or requested == "triton":
            return True
    return False


def _check_write(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    check_weight(weight)
    check_indices(indices, weight)
    check_vector("base", base, weight.dtype, indices.numel(), weight)
    if values is not None:
        check_vector("values", values, _values_dtype(weight), indices.numel(), weight)


def _cpu_write(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    torch.ops.peftfast_cpu.sparse_delta_write.default(weight, indices, base, values)


def _triton_write(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    with on_device(weight):
        config = configs.scatter(device_of(weight))
        kernels("sparse_delta").sparse_delta_write_(weight, indices, base, values, config)


def _reference_write(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    wide = definition.wide_dtype(weight.dtype)
    new = base if values is None else (base.to(wide) + values).to(weight.dtype)
    weight.view(-1)[indices.long()] = new


sparse_delta_write_ = Operator(
    "sparse_delta_write_",
    "(Tensor(a!) weight, Tensor indices, Tensor base, Tensor? values) -> ()",
    check=_check_write,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts_weight, _cpu_write),
        Implementation("triton", triton_available, _triton_accepts_weight, _triton_write),
        reference(_reference_write),
    ),
)
