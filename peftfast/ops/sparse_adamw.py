"""Operators of AdamW on the values of sparse deltas, for all layers at once, with states in float32 or in 8 bits. Shapes and meaning
stand in ``peftfast.reference.sparse_delta``. A layer whose delta lies in no weight has empty weight, indices and base."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import sparse_delta as configs
from ..kernels import device_tables  # type: ignore[attr-defined]
from ..reference import sparse_delta as definition
from . import native
from .backends import cpu_available, device_of, kernels, on_device, takes_cpu, takes_triton, triton_available
from .dispatch import Implementation, Operator, Verdict, reference, require
from .sparse_delta import check_indices, check_vector, check_weight

AGE_DTYPES = (torch.int16, torch.int32)
Tensors = Sequence[Tensor]
# The lists come first, in this order, then hyper, corrections, seed and ids; states in 8 bits have theirs between.
LISTS = ("values", "grads", "exp_avg", "exp_avg_sq", "age", "weights", "indices", "bases")


def _check_layers(lists: Sequence[Tensors], state: torch.dtype, hyper: Tensor, ids: Sequence[int]) -> None:
    values = lists[0]
    for name, given in (*zip(LISTS[1:], lists[1:], strict=True), ("ids", ids)):
        require(
            len(given) == len(values),
            lambda name=name, given=given: f"{name}: expected {len(values)} as of values, got {len(given)}",  # type: ignore[misc]
        )
    for value, grads, first, second, age, weight, indices, base, tensor_id in zip(*lists, ids, strict=True):
        size = value.numel()
        check_vector("values", value, torch.float32, size, hyper)
        check_vector("grads", grads, torch.float32, size, value)
        check_vector("exp_avg", first, state, size, value)
        check_vector("exp_avg_sq", second, state, size, value)
        require(age.dtype in AGE_DTYPES, lambda age=age: f"age: expected int16 or int32, got {age.dtype}")  # type: ignore[misc]
        check_vector("age", age, age.dtype, size, value)
        require(0 <= tensor_id < 1 << 32, lambda t=tensor_id: f"ids: expected 32-bit words, got {t}")  # type: ignore[misc]
        check_indices(indices, value)
        if weight.numel():
            check_weight(weight)
            check_vector("indices", indices, indices.dtype, size, weight)
            check_vector("bases", base, weight.dtype, size, weight)


def _check_numbers(hyper: Tensor, corrections: Tensor, seed: Tensor | None) -> None:
    check_vector("hyper", hyper, torch.float32, 7, hyper)
    require(
        corrections.dtype == torch.float32
        and corrections.dim() == 2
        and corrections.shape[0] == 2
        and corrections.shape[1] > 0
        and corrections.is_contiguous()
        and corrections.device == hyper.device,
        lambda: (
            f"corrections: expected contiguous float32 [2, ages], got {corrections.dtype} {tuple(corrections.shape)}"
        ),
    )
    if seed is not None:
        require(
            seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == hyper.device,
            lambda: f"seed: expected one int64 element on {hyper.device}, got {seed.dtype} {tuple(seed.shape)}",
        )


def _check_adamw(*arguments: Any) -> None:
    *lists, hyper, corrections, seed, ids = arguments
    _check_numbers(hyper, corrections, seed)
    _check_layers(lists, torch.float32, hyper, ids)


def _check_adamw8(*arguments: Any) -> None:
    *lists, first_max, second_max, codes, hyper, corrections, seed, ids = arguments
    _check_numbers(hyper, corrections, seed)
    _check_layers(lists, torch.uint8, hyper, ids)
    require(
        codes.dtype == torch.float32
        and tuple(codes.shape) == (2, 256)
        and codes.is_contiguous()
        and codes.device == hyper.device,
        lambda: f"codes: expected contiguous float32 [2, 256], got {codes.dtype} {tuple(codes.shape)}",
    )
    for name, maxima in (("exp_avg_max", first_max), ("exp_avg_sq_max", second_max)):
        require(
            len(maxima) == len(lists[0]),
            lambda name=name, maxima=maxima: f"{name}: expected {len(lists[0])} as of values, got {len(maxima)}",  # type: ignore[misc]
        )
        for value, largest in zip(lists[0], maxima, strict=True):
            check_vector(name, largest, torch.float32, -(-value.numel() // definition.STATE_BLOCK), value)


def _cpu_step(lists: Sequence[Tensors], maxima: Sequence[Tensors], codes: Tensor | None, tail: Sequence[Any]) -> None:
    hyper, corrections, seed, ids = tail
    step = torch.ops.peftfast_cpu.sparse_adamw.default
    for k, (value, grads, first, second, age, *target) in enumerate(zip(*lists, strict=True)):
        written = target if target[0].numel() else (None, None, None)
        largest = (maxima[0][k], maxima[1][k]) if maxima else (None, None)
        step(value, grads, first, second, *largest, codes, age, *written, hyper, corrections, seed, ids[k])


def _cpu_adamw(*arguments: Any) -> None:
    _cpu_step(arguments[:8], (), None, arguments[8:])


def _cpu_adamw8(*arguments: Any) -> None:
    _cpu_step(arguments[:8], arguments[8:10], arguments[10], arguments[11:])


_TABLES = device_tables.DeviceTables(16)


def _table(rows: list[tuple[int, ...]], block: int, device: torch.device) -> tuple[Tensor, ...]:
    """A row of addresses and sizes for each layer, and the layer and the first element of each program, on the device. Kept while the
    addresses stay: the caching allocator mostly gives a step's gradients the places of the step before."""

    def host() -> tuple[Tensor, ...]:
        layer = [k for k, row in enumerate(rows) for _ in range(0, row[8], block)]
        first = [start for row in rows for start in range(0, row[8], block)]
        return (
            torch.tensor(rows, dtype=torch.int64, device="cpu"),
            torch.tensor(layer, dtype=torch.int32, device="cpu"),
            torch.tensor(first, dtype=torch.int64, device="cpu"),
        )

    return _TABLES.get((device, block, tuple(rows)), device, host)


def _groups(lists: Sequence[Tensors]) -> dict[tuple[Any, ...], list[int]]:
    """Layers that one launch can serve: weight, index and age of the same dtypes."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, (value, _, _, _, age, weight, indices, _) in enumerate(zip(*lists, strict=True)):
        if value.numel():
            dtype = weight.dtype if weight.numel() else None
            groups.setdefault((dtype, indices.dtype, age.dtype), []).append(k)
    return groups


def _row(lists: Sequence[Tensors], maxima: Sequence[Tensors], k: int, tensor_id: int) -> tuple[int, ...]:
    """values, grads, exp_avg, exp_avg_sq, age, weight, indices, base; how many active and how many weights; the id; the maxima."""
    largest = (maxima[0][k].data_ptr(), maxima[1][k].data_ptr()) if maxima else (0, 0)
    return (*(given[k].data_ptr() for given in lists), lists[0][k].numel(), lists[5][k].numel(), tensor_id, *largest)


def _triton_step(
    lists: Sequence[Tensors], maxima: Sequence[Tensors], codes: Tensor | None, tail: Sequence[Any]
) -> None:
    hyper, corrections, seed, ids = tail
    config = configs.adamw(device_of(hyper))
    with on_device(hyper):
        for (dtype, index_dtype, age_dtype), members in _groups(lists).items():
            rows = [_row(lists, maxima, k, ids[k]) for k in members]
            table = _table(rows, config.block, hyper.device)
            kernels("sparse_adamw").sparse_adamw_(
                *table, codes, hyper, corrections, seed, dtype, index_dtype, age_dtype, config
            )


def _triton_adamw(*arguments: Any) -> None:
    _triton_step(arguments[:8], (), None, arguments[8:])


def _triton_adamw8(*arguments: Any) -> None:
    _triton_step(arguments[:8], arguments[8:10], arguments[10], arguments[11:])


_CUDA_BLOCK = 1024  # active weights of one thread block, csrc/cuda/sparse_adamw.h


def _cuda_step(lists: Sequence[Tensors], maxima: Sequence[Tensors], codes: Tensor | None, tail: Sequence[Any]) -> None:
    hyper, corrections, seed, ids = tail
    with on_device(hyper):
        for (dtype, index_dtype, age_dtype), members in _groups(lists).items():
            rows = [_row(lists, maxima, k, ids[k]) for k in members]
            table = _table(rows, _CUDA_BLOCK, hyper.device)
            # The dtypes travel as empty tensors: the table holds bare addresses.
            likes = (
                torch.empty(0, dtype=like, device=hyper.device)
                for like in (dtype or torch.float32, index_dtype, age_dtype)
            )
            torch.ops.peftfast_cuda.sparse_adamw.default(*table, codes, hyper, corrections, seed, *likes)


def _cuda_adamw(*arguments: Any) -> None:
    _cuda_step(arguments[:8], (), None, arguments[8:])


def _cuda_adamw8(*arguments: Any) -> None:
    _cuda_step(arguments[:8], arguments[8:10], arguments[10], arguments[11:])


def _write_definition(lists: Sequence[Tensors], k: int, seed: Tensor | None, tensor_id: int) -> None:
    value, weight, indices, base = (lists[column][k] for column in (0, 5, 6, 7))
    if weight.numel():
        weight.copy_(definition.sparse_adamw_write(value, base, indices, weight, seed, tensor_id))


def _reference_adamw(*arguments: Any) -> None:
    *lists, hyper, corrections, seed, ids = arguments
    for k, (value, grads, first, second, age, *_) in enumerate(zip(*lists, strict=True)):
        new = definition.sparse_adamw(value, grads, first, second, age, hyper, corrections)
        for state, result in zip((value, first, second, age), new, strict=True):
            state.copy_(result)
        _write_definition(lists, k, seed, ids[k])


def _reference_adamw8(*arguments: Any) -> None:
    *lists, first_max, second_max, _, hyper, corrections, seed, ids = arguments
    for k, (value, grads, first, second, age, *_) in enumerate(zip(*lists, strict=True)):
        states = (value, first, second, first_max[k], second_max[k], age)
        new = definition.sparse_adamw8(value, grads, *states[1:], hyper, corrections)
        for state, result in zip(states, new, strict=True):
            state.copy_(result)
        _write_definition(lists, k, seed, ids[k])


def _cpu_accepts(values: Tensors, *arguments: Any) -> Verdict:
    return takes_cpu(*values, *arguments[4])


def _triton_accepts(values: Tensors, *arguments: Any) -> Verdict:
    ok, reason = takes_triton(*values, *arguments[4])
    if ok and any(t.data_ptr() % 16 for t in (*values, *(t for given in arguments[:4] for t in given)) if t.numel()):
        return False, "a tensor does not start at a multiple of 16 bytes"
    return ok, reason


def _cuda_accepts(values: Tensors, *arguments: Any) -> Verdict:
    if values and not values[0].is_cuda:
        return False, f"the CUDA library serves CUDA tensors, these are on {values[0].device.type}"
    return _triton_accepts(values, *arguments)


_SCHEMA = (
    "(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] age, "
    "Tensor(e!)[] weights, Tensor[] indices, Tensor[] bases, {}Tensor hyper, Tensor corrections, Tensor? seed, "
    "int[] ids) -> ()"
)

sparse_adamw_ = Operator(
    "sparse_adamw_",
    _SCHEMA.format(""),
    check=_check_adamw,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_adamw),
        Implementation("triton", triton_available, _triton_accepts, _triton_adamw),
        Implementation("cuda", native.cuda_available, _cuda_accepts, _cuda_adamw),
        reference(_reference_adamw),
    ),
)

sparse_adamw8_ = Operator(
    "sparse_adamw8_",
    _SCHEMA.format("Tensor(f!)[] exp_avg_max, Tensor(g!)[] exp_avg_sq_max, Tensor codes, "),
    check=_check_adamw8,
    fake=lambda *_: None,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_adamw8),
        Implementation("triton", triton_available, _triton_accepts, _triton_adamw8),
        Implementation("cuda", native.cuda_available, _cuda_accepts, _cuda_adamw8),
        reference(_reference_adamw8),
    ),
)
