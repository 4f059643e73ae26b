"""What DoRA (arXiv 2402.09353) needs beside the passes of LoRA: row gains, their gradients, and the mask alone, for its second product.
Shapes and meaning stand in ``peftfast.reference.lora``.

forward    Y, Z = dora_expand(base product, S, B, gain)
backward   G dY, dgain = gain_grads(dY, Z, gain)
"""

from typing import Any

import torch
from torch import Tensor

from ..configs import lora_terms as configs
from ..reference import lora as definition
from .backends import cpu_available, device_of, dtype_name, kernels, on_device, triton_available
from .dispatch import Implementation, Operator, reference, require
from .lora import _check_dropout, _check_dtype, _check_matrix, _cpu_accepts, _triton_accepts


def _check_vector(name: str, vector: Tensor | None, size: int, like: Tensor) -> None:
    if vector is None:
        return
    require(
        vector.is_floating_point() and vector.dim() == 1 and vector.shape[0] == size,
        lambda: f"{name}: expected floating [{size}], got {vector.dtype} {tuple(vector.shape)}",
    )
    require(vector.device == like.device, lambda: f"{name}: expected on {like.device}, got on {vector.device}")


def _check_expand(
    base: Tensor,
    plain: Tensor | None,
    s: Tensor,
    w: Tensor,
    lora_bias: Tensor | None,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    _check_matrix("base", base, None, None, base)
    rows, columns = base.shape
    if plain is not None:
        _check_matrix("plain", plain, rows, columns, base)
    _check_matrix("s", s, rows, None, base)
    _check_matrix("w", w, columns, s.shape[1], base)
    for name, vector in (("lora_bias", lora_bias), ("gain", gain), ("bias", bias)):
        _check_vector(name, vector, columns, base)
    _check_dtype(dtype)


def _cpu_expand(base: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, z = torch.empty(base.shape, dtype=rest[-1]), torch.empty(base.shape, dtype=base.dtype)
    torch.ops.peftfast_cpu.lora_dora_expand.default(base, *rest[:-1], y, z)
    return y, z


def _triton_expand(
    base: Tensor,
    plain: Tensor | None,
    s: Tensor,
    w: Tensor,
    lora_bias: Tensor | None,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    config = configs.lora_dora_expand(
        base.shape[0], base.shape[1], s.shape[1], dtype_name(base.dtype), dtype_name(s.dtype), device_of(base)
    )
    vectors = [None if one is None else one.contiguous() for one in (lora_bias, gain, bias)]
    with on_device(base):
        return kernels("lora_dora").lora_dora_expand(base, plain, s, w, *vectors, scaling, dtype, config)


def _contiguous_pair(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, z = definition.lora_dora_expand(*arguments)
    return y.contiguous(), z.contiguous()


def _check_gain_grads(dy: Tensor, z: Tensor, factor: Tensor) -> None:
    _check_matrix("dy", dy, None, None, dy)
    _check_matrix("z", z, dy.shape[0], dy.shape[1], dy)
    _check_vector("factor", factor, dy.shape[1], dy)


def _cpu_gain_grads(dy: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = torch.empty(dy.shape, dtype=dy.dtype), torch.empty(factor.shape, dtype=factor.dtype)
    torch.ops.peftfast_cpu.lora_gain_grads.default(dy, z, factor, out, sums)
    return out, sums


def _triton_gain_grads(dy: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    config = configs.lora_gain_grads(dy.shape[0], dy.shape[1], device_of(dy))
    with on_device(dy):
        return kernels("lora_dora").lora_gain_grads(dy, z, factor.contiguous(), config)


def _reference_gain_grads(dy: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = definition.lora_gain_grads(dy, z, factor)
    return out.contiguous(), sums


def _check_dropout_add(base: Tensor | None, x: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> None:
    _check_matrix("x", x, None, None, x)
    if base is not None:
        _check_matrix("base", base, x.shape[0], x.shape[1], x)
    _check_dropout(seed, p, x)
    _check_dtype(dtype)


def _cpu_dropout_add(base: Tensor | None, x: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    torch.ops.peftfast_cpu.lora_dropout_add.default(base, x, seed, p, out)
    return out


def _triton_dropout_add(base: Tensor | None, x: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    with on_device(x):
        return kernels("lora_dora").lora_dropout_add(base, x, seed, p, dtype, configs.lora_dropout_add(device_of(x)))


lora_dora_expand = Operator(
    "lora_dora_expand",
    "(Tensor base, Tensor? plain, Tensor s, Tensor w, Tensor? lora_bias, Tensor gain, Tensor? bias, float scaling, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    check=_check_expand,
    fake=lambda base, *rest: (base.new_empty(base.shape, dtype=rest[-1]), base.new_empty(base.shape)),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_expand),
        Implementation("triton", triton_available, _triton_accepts, _triton_expand),
        reference(_contiguous_pair),
    ),
)

lora_gain_grads = Operator(
    "lora_gain_grads",
    "(Tensor dy, Tensor z, Tensor factor) -> (Tensor, Tensor)",
    check=_check_gain_grads,
    fake=lambda dy, z, factor: (dy.new_empty(dy.shape), factor.new_empty(factor.shape)),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_gain_grads),
        Implementation("triton", triton_available, _triton_accepts, _triton_gain_grads),
        reference(_reference_gain_grads),
    ),
)

lora_dropout_add = Operator(
    "lora_dropout_add",
    "(Tensor? base, Tensor x, Tensor seed, float p, ScalarType dtype) -> Tensor",
    check=_check_dropout_add,
    fake=lambda base, x, seed, p, dtype: x.new_empty(x.shape, dtype=dtype),
    implementations=(
        Implementation("cpu", cpu_available, _cpu_accepts, _cpu_dropout_add),
        Implementation("triton", triton_available, _triton_accepts, _triton_dropout_add),
        reference(lambda *arguments: definition.lora_dropout_add(*arguments).contiguous()),
    ),
)
