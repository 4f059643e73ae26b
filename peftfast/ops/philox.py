"""Operators of the random-number definition: the words themselves and the keep mask of dropout, for tests and the curious.

The kernels that use a mask regenerate it in place and never call these.
"""

import torch
from torch import Tensor

from ..configs import philox as configs
from ..reference import philox as definition
from .backends import cpu_available, device_of, kernels, on_device, takes_cpu, takes_triton, triton_available
from .dispatch import Implementation, Operator, Verdict, reference, require


def check_seed(seed: Tensor) -> None:
    require(
        seed.dtype == torch.int64 and seed.numel() == 1,
        lambda: f"seed: expected one int64 element, got {seed.dtype} of shape {tuple(seed.shape)}",
    )


def check_probability(p: float) -> None:
    require(0.0 <= p <= 1.0, lambda: f"p: expected a probability in [0, 1], got {p}")


def _check_mask(seed: Tensor, rows: int, columns: int, p: float) -> None:
    check_seed(seed)
    check_probability(p)
    require(rows >= 0 and columns >= 0, lambda: f"rows, columns: expected sizes, got {rows}, {columns}")


def _fake_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    return seed.new_empty((rows, columns), dtype=torch.bool)


def _cpu_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    out = torch.empty((rows, columns), dtype=torch.bool)
    torch.ops.peftfast_cpu.dropout_mask.default(seed, p, out)
    return out


def _triton_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    with on_device(seed):
        return kernels("philox").dropout_mask(seed, rows, columns, p, configs.dropout_mask(device_of(seed)))


def _check_words(seed: Tensor, start: int, count: int, tensor_id: int, stream: int) -> None:
    check_seed(seed)
    require(start >= 0 and count >= 0, lambda: f"start, count: expected a range, got {start}, {count}")
    require(
        0 <= tensor_id < 1 << 32 and 0 <= stream < 1 << 32,
        lambda: f"tensor_id, stream: expected 32-bit words, got {tensor_id}, {stream}",
    )


def _fake_words(seed: Tensor, start: int, count: int, tensor_id: int, stream: int) -> Tensor:
    return seed.new_empty((count, 4), dtype=torch.int64)


def _cpu_words(seed: Tensor, start: int, count: int, tensor_id: int, stream: int) -> Tensor:
    out = torch.empty((count, 4), dtype=torch.int64)
    torch.ops.peftfast_cpu.philox_words.default(seed, start, tensor_id, stream, out)
    return out


def _triton_words(seed: Tensor, start: int, count: int, tensor_id: int, stream: int) -> Tensor:
    with on_device(seed):
        return kernels("philox").philox_words(
            seed, start, count, tensor_id, stream, configs.philox_words(device_of(seed))
        )


def _cpu_accepts(seed: Tensor, *_: object) -> Verdict:
    return takes_cpu(seed)


def _triton_accepts(seed: Tensor, *_: object) -> Verdict:
    return takes_triton(seed)


dropout_mask = Operator(
    "dropout_mask",
    "(Tensor seed, SymInt rows, SymInt columns, float p) -> Tensor",
    check=_check_mask,
    fake=_fake_mask,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_mask),
        Implementation("triton", triton_available, _triton_accepts, _triton_mask),
        reference(definition.dropout_mask),
    ),
)

philox_words = Operator(
    "philox_words",
    "(Tensor seed, int start, SymInt count, int tensor_id, int stream) -> Tensor",
    check=_check_words,
    fake=_fake_words,
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_words),
        Implementation("triton", triton_available, _triton_accepts, _triton_words),
        reference(definition.philox_words),
    ),
)
