"""The passes of a LoRA layer beside its base product. Shapes and meaning stand in ``peftfast.reference.lora``.

forward    S = shrink(x, A);  Y = base product;  expand_(Y, S, B)
backward   dS, dB = dy_grads(dY, S, B);  dA = weight_grad(dS, x);  dX = base product;  expand_(dX, dS, Aᵀ)
"""

import torch
from torch import Tensor

from ..configs import lora as configs
from ..reference import lora as definition
from . import lora_library
from .backends import (
    cpu_available,
    device_of,
    dtype_name,
    kernels,
    multiplies_on_triton,
    on_device,
    takes_cpu,
    triton_available,
)
from .dispatch import Implementation, Operator, Verdict, reference, require
from .philox import check_probability, check_seed


def _check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None, like: Tensor) -> None:
    require(
        tensor.dim() == 2 and tensor.is_floating_point(),
        lambda: f"{name}: expected a floating matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}",
    )
    require(
        (rows is None or tensor.shape[0] == rows) and (columns is None or tensor.shape[1] == columns),
        lambda: f"{name}: expected shape {(rows, columns)}, got {tuple(tensor.shape)}",
    )
    require(tensor.device == like.device, lambda: f"{name}: expected on {like.device}, got on {tensor.device}")


def _check_dropout(seed: Tensor | None, p: float, like: Tensor) -> None:
    check_probability(p)
    if seed is not None:
        check_seed(seed)
        require(seed.device == like.device, lambda: f"seed: expected on {like.device}, got on {seed.device}")


def _check_dtype(dtype: torch.dtype) -> None:
    require(dtype.is_floating_point, lambda: f"dtype: expected a floating dtype, got {dtype}")


def _check_shrink(x: Tensor, w: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype) -> None:
    _check_matrix("x", x, None, None, x)
    _check_matrix("w", w, None, x.shape[1], x)
    _check_dropout(seed, p, x)
    _check_dtype(dtype)


def _cpu_shrink(x: Tensor, w: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype) -> Tensor:
    if lora_library.takes(x.shape[0], w.shape[0], x.dtype, dtype):
        return lora_library.shrink(x, w, seed, p, scaling)
    out = torch.empty((x.shape[0], w.shape[0]), dtype=dtype)
    torch.ops.peftfast_cpu.lora_shrink.default(x, w, seed, p, scaling, out)
    return out


def _triton_shrink(x: Tensor, w: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype) -> Tensor:
    config = configs.lora_shrink(
        x.shape[0],
        x.shape[1],
        w.shape[0],
        dtype_name(x.dtype),
        dtype_name(w.dtype),
        dtype_name(dtype),
        seed is not None and p > 0,
        device_of(x),
    )
    with on_device(x):
        return kernels("lora").lora_shrink(x, w, seed, p, scaling, dtype, config)


def _check_expand_(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
) -> None:
    _check_matrix("base", base, None, None, base)
    _check_matrix("s", s, base.shape[0], None, base)
    _check_matrix("w", w, base.shape[1], s.shape[1], base)
    if bias is not None:
        require(
            bias.is_floating_point() and bias.dim() == 1 and bias.shape[0] == base.shape[1],
            lambda: f"bias: expected floating [{base.shape[1]}], got {bias.dtype} {tuple(bias.shape)}",
        )
        require(bias.device == base.device, lambda: f"bias: expected on {base.device}, got on {bias.device}")
    _check_dropout(seed, p, base)


def _check_expand(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    _check_expand_(base, s, w, bias, seed, p, scaling)
    _check_dtype(dtype)


def _cpu_expand_into(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    out: Tensor,
) -> None:
    if out is base and bias is None and base.is_contiguous():
        if lora_library.takes(base.shape[0], s.shape[1], base.dtype, s.dtype):
            lora_library.expand_(base, s, w, seed, p, scaling)
            return
    torch.ops.peftfast_cpu.lora_expand.default(base, s, w, bias, seed, p, scaling, out)


def _triton_expand_into(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    out: Tensor,
) -> None:
    config = configs.lora_expand(
        base.shape[0],
        base.shape[1],
        s.shape[1],
        dtype_name(base.dtype),
        dtype_name(w.dtype),
        dtype_name(s.dtype),
        seed is not None and p > 0,
        device_of(base),
    )
    bias = None if bias is None else bias.contiguous()
    with on_device(base):
        kernels("lora").lora_expand(base, s, w, bias, seed, p, scaling, out, config)


def _expand_new(into):  # type: ignore[no-untyped-def]
    def run(
        base: Tensor,
        s: Tensor,
        w: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        p: float,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(base.shape, dtype=dtype, device=base.device)
        into(base, s, w, bias, seed, p, scaling, out)
        return out

    return run


def _expand_in_place(into):  # type: ignore[no-untyped-def]
    def run(
        base: Tensor, s: Tensor, w: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, scaling: float
    ) -> None:
        into(base, s, w, bias, seed, p, scaling, base)

    return run


def _reference_expand(
    base: Tensor,
    s: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    # A sum of torch's has the strides of its arguments; the operator promises a contiguous result, as its fake says.
    return definition.lora_expand(base, s, w, bias, seed, p, scaling, dtype).contiguous()


def _reference_expand_(
    base: Tensor, s: Tensor, w: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, scaling: float
) -> None:
    base.copy_(definition.lora_expand(base, s, w, bias, seed, p, scaling, base.dtype))


def _check_weight_grad(
    ds: Tensor, x: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype
) -> None:
    _check_matrix("x", x, None, None, x)
    _check_matrix("ds", ds, x.shape[0], None, x)
    _check_dropout(seed, p, x)
    _check_dtype(dtype)


def _cpu_weight_grad(
    ds: Tensor, x: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    if lora_library.takes(x.shape[0], ds.shape[1], ds.dtype, x.dtype, dtype):
        return lora_library.weight_grad(ds, x, seed, p, scaling)
    out = torch.empty((ds.shape[1], x.shape[1]), dtype=dtype)
    torch.ops.peftfast_cpu.lora_weight_grad.default(ds, x, seed, p, scaling, out)
    return out


def _triton_weight_grad(
    ds: Tensor, x: Tensor, seed: Tensor | None, p: float, scaling: float, dtype: torch.dtype
) -> Tensor:
    config = configs.lora_weight_grad(
        x.shape[0],
        x.shape[1],
        ds.shape[1],
        dtype_name(x.dtype),
        dtype_name(ds.dtype),
        seed is not None and p > 0,
        device_of(x),
    )
    with on_device(x):
        return kernels("lora").lora_weight_grad(ds, x, seed, p, scaling, dtype, config)


def _check_dy_grads(dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> None:
    _check_matrix("dy", dy, None, None, dy)
    _check_matrix("s", s, dy.shape[0], None, dy)
    _check_matrix("b", b, dy.shape[1], s.shape[1], dy)
    _check_dtype(dtype)


def _cpu_dy_grads(dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if lora_library.takes(dy.shape[0], s.shape[1], dy.dtype, s.dtype):
        return lora_library.dy_grads(dy, s, b, scaling, dtype)
    ds = torch.empty(s.shape, dtype=dy.dtype)
    db = torch.empty(b.shape, dtype=dtype)
    torch.ops.peftfast_cpu.lora_dy_grads.default(dy, s, b, scaling, ds, db)
    return ds, db


def _triton_dy_grads(dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    config = configs.lora_dy_grads(
        dy.shape[0], dy.shape[1], s.shape[1], dtype_name(dy.dtype), dtype_name(b.dtype), device_of(dy)
    )
    with on_device(dy):
        return kernels("lora").lora_dy_grads(dy, s, b, scaling, dtype, config)


def _tensors(arguments: tuple[object, ...]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def _accepts_dtype(arguments: tuple[object, ...]) -> Verdict:
    dtype = arguments[-1]
    if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the fused kernels give float32, bfloat16 and float16, asked for {dtype}"
    return True, ""


def _cpu_accepts(*arguments: object) -> Verdict:
    ok, reason = takes_cpu(*_tensors(arguments))
    return _accepts_dtype(arguments) if ok else (ok, reason)


def _triton_accepts(*arguments: object) -> Verdict:
    ok, reason = multiplies_on_triton(*_tensors(arguments))
    return _accepts_dtype(arguments) if ok else (ok, reason)


def _table(cpu, triton, definition_of):  # type: ignore[no-untyped-def]
    return (
        Implementation("cpu", cpu_available, _cpu_accepts, cpu),
        Implementation("triton", triton_available, _triton_accepts, triton),
        reference(definition_of),
    )


lora_shrink = Operator(
    "lora_shrink",
    "(Tensor x, Tensor w, Tensor? seed, float p, float scaling, ScalarType dtype) -> Tensor",
    check=_check_shrink,
    fake=lambda x, w, seed, p, scaling, dtype: x.new_empty((x.shape[0], w.shape[0]), dtype=dtype),
    implementations=_table(_cpu_shrink, _triton_shrink, definition.lora_shrink),
)

lora_expand = Operator(
    "lora_expand",
    "(Tensor base, Tensor s, Tensor w, Tensor? bias, Tensor? seed, float p, float scaling, ScalarType dtype) -> Tensor",
    check=_check_expand,
    fake=lambda base, s, w, bias, seed, p, scaling, dtype: base.new_empty(base.shape, dtype=dtype),
    implementations=_table(_expand_new(_cpu_expand_into), _expand_new(_triton_expand_into), _reference_expand),
)

lora_expand_ = Operator(
    "lora_expand_",
    "(Tensor(a!) base, Tensor s, Tensor w, Tensor? bias, Tensor? seed, float p, float scaling) -> ()",
    check=_check_expand_,
    fake=lambda *_: None,
    implementations=_table(
        _expand_in_place(_cpu_expand_into), _expand_in_place(_triton_expand_into), _reference_expand_
    ),
)

lora_weight_grad = Operator(
    "lora_weight_grad",
    "(Tensor ds, Tensor x, Tensor? seed, float p, float scaling, ScalarType dtype) -> Tensor",
    check=_check_weight_grad,
    fake=lambda ds, x, seed, p, scaling, dtype: ds.new_empty((ds.shape[1], x.shape[1]), dtype=dtype),
    implementations=_table(_cpu_weight_grad, _triton_weight_grad, definition.lora_weight_grad),
)

lora_dy_grads = Operator(
    "lora_dy_grads",
    "(Tensor dy, Tensor s, Tensor b, float scaling, ScalarType dtype) -> (Tensor, Tensor)",
    check=_check_dy_grads,
    fake=lambda dy, s, b, scaling, dtype: (dy.new_empty(s.shape), b.new_empty(b.shape, dtype=dtype)),
    implementations=_table(_cpu_dy_grads, _triton_dy_grads, definition.lora_dy_grads),
)
