"""The passes of several adapters at once: the projections of one x (q, k, v), the active adapters of one layer, or the adapters that
the rows of a batch name. Shapes and meaning stand in ``peftfast.reference.lora``.

S of all adapters lies side by side in one matrix, so that each pass is one operator, and reads x once, however many there are.
"""

from typing import Any

import torch
from torch import Tensor

from ..configs import lora_terms as configs
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
from .lora import _accepts_dtype, _check_dtype, _check_matrix
from .philox import check_probability


def _check_terms(
    count: int, rows: Tensor | None, seeds: Tensor | None, ps: list[float] | None, scalings: list[float], like: Tensor
) -> None:
    require(count > 0, lambda: "terms: expected at least one")
    require(len(scalings) == count, lambda: f"scalings: expected {count}, got {len(scalings)}")
    if ps is not None:
        require(len(ps) == count, lambda: f"ps: expected {count}, got {len(ps)}")
        for p in ps:
            check_probability(p)
    if rows is not None:
        require(
            rows.dtype == torch.int32 and rows.dim() == 1 and rows.shape[0] == like.shape[0],
            lambda: f"rows: expected int32 [{like.shape[0]}], got {rows.dtype} of shape {tuple(rows.shape)}",
        )
        require(rows.device == like.device, lambda: f"rows: expected on {like.device}, got on {rows.device}")
    if seeds is not None:
        require(
            seeds.dtype == torch.int64 and seeds.dim() == 1 and seeds.shape[0] == count,
            lambda: f"seeds: expected int64 [{count}], got {seeds.dtype} of shape {tuple(seeds.shape)}",
        )
        require(seeds.device == like.device, lambda: f"seeds: expected on {like.device}, got on {seeds.device}")


def _check_matrices(name: str, tensors: list[Tensor], rows: int | None, columns: int | None, like: Tensor) -> None:
    """_check_matrix of each, of which there may be hundreds at every call."""
    device = like.device
    for one in tensors:
        shape = one.shape
        if (
            len(shape) != 2
            or (rows is not None and shape[0] != rows)
            or (columns is not None and shape[1] != columns)
            or one.device != device
            or not one.is_floating_point()
        ):
            _check_matrix(name, one, rows, columns, like)


def _check_shrink(
    x: Tensor,
    a: list[Tensor],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> None:
    _check_matrix("x", x, None, None, x)
    _check_terms(len(a), rows, seeds, ps, scalings, x)
    _check_matrices("a", a, None, x.shape[1], x)
    _check_dtype(dtype)


def _check_expand_(
    base: Tensor,
    s: Tensor,
    w: list[Tensor],
    biases: list[Tensor],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
) -> None:
    _check_matrix("base", base, None, None, base)
    _check_terms(len(w), rows, seeds, ps, scalings, base)
    _check_matrices("w", w, base.shape[1], None, base)
    _check_matrix("s", s, base.shape[0], sum(one.shape[1] for one in w), base)
    require(len(biases) in (0, len(w)), lambda: f"biases: expected none or {len(w)}, got {len(biases)}")
    for bias in biases:
        require(
            bias.is_floating_point() and bias.dim() == 1 and bias.shape[0] == base.shape[1],
            lambda: f"biases: expected floating [{base.shape[1]}] each, got {[tuple(one.shape) for one in biases]}",
        )
        require(bias.device == base.device, lambda: f"biases: expected on {base.device}")


def _check_expand(*arguments: Any) -> None:
    _check_expand_(*arguments[:-1])
    _check_dtype(arguments[-1])


def _check_weight_grad(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> None:
    _check_matrix("x", x, None, None, x)
    _check_terms(len(ranks), rows, seeds, ps, scalings, x)
    for rank in ranks:
        require(rank >= 0, lambda: f"ranks: expected sizes, got {list(ranks)}")
    _check_matrix("ds", ds, x.shape[0], sum(ranks), x)
    _check_dtype(dtype)


def _check_dy_grads(
    dy: Tensor, s: Tensor, b: list[Tensor], rows: Tensor | None, scalings: list[float], dtype: torch.dtype
) -> None:
    _check_matrix("dy", dy, None, None, dy)
    _check_terms(len(b), rows, None, None, scalings, dy)
    _check_matrices("b", b, dy.shape[1], None, dy)
    _check_matrix("s", s, dy.shape[0], sum(one.shape[1] for one in b), dy)
    _check_dtype(dtype)


def _masked(seeds: Tensor | None, ps: list[float]) -> bool:
    return seeds is not None and any(ps)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _cpu_shrink(
    x: Tensor,
    a: list[Tensor],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> Tensor:
    ranks = [one.shape[0] for one in a]
    if rows is None and lora_library.takes_terms(x.shape[0], ranks, _masked(seeds, ps), x.dtype, dtype):
        return lora_library.terms_shrink(x, a, seeds, ps, scalings)
    out = torch.empty((x.shape[0], sum(ranks)), dtype=dtype)
    torch.ops.peftfast_cpu.lora_terms_shrink.default(
        x, a, _contiguous(rows), _contiguous(seeds), list(ps), list(scalings), out
    )
    return out


def _cpu_expand_into(
    out: Tensor, base: Tensor, s: Tensor, w: Any, biases: Any, rows: Any, seeds: Any, *rest: Any
) -> None:
    if rows is not None and out is not base:  # rows without an adapter are not written
        out.copy_(base)
    ps, scalings = rest
    if rows is None and out is base and not biases and base.is_contiguous():
        ranks = [one.shape[1] for one in w]
        if lora_library.takes_terms(base.shape[0], ranks, _masked(seeds, ps), base.dtype, s.dtype):
            lora_library.terms_expand_(base, s, w, seeds, ps, scalings)
            return
    torch.ops.peftfast_cpu.lora_terms_expand.default(
        base, s, w, biases, _contiguous(rows), _contiguous(seeds), list(ps), list(scalings), out
    )


def _triton_expand_into(
    out: Tensor, base: Tensor, s: Tensor, w: Any, biases: Any, rows: Any, seeds: Any, ps: Any, scalings: Any
) -> None:
    config = configs.lora_terms_expand(
        base.shape[0],
        base.shape[1],
        [one.shape[1] for one in w],
        dtype_name(base.dtype),
        dtype_name(s.dtype),
        seeds is not None and any(ps),
        device_of(base),
    )
    with on_device(base):
        kernels("lora_terms").lora_terms_expand(base, s, w, biases, rows, seeds, ps, scalings, out, config)


def _expand_new(into):  # type: ignore[no-untyped-def]
    def run(base: Tensor, *rest: Any) -> Tensor:
        out = torch.empty(base.shape, dtype=rest[-1], device=base.device)
        into(out, base, *rest[:-1])
        return out

    return run


def _expand_in_place(into):  # type: ignore[no-untyped-def]
    def run(base: Tensor, *rest: Any) -> None:
        into(base, base, *rest)

    return run


def _reference_expand(*arguments: Any) -> Tensor:
    return definition.lora_terms_expand(*arguments).contiguous()


def _reference_expand_(*arguments: Any) -> None:
    base = arguments[0]
    base.copy_(_reference_expand(*arguments, base.dtype))


def _triton_shrink(
    x: Tensor,
    a: list[Tensor],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> Tensor:
    config = configs.lora_terms_shrink(
        x.shape[0],
        x.shape[1],
        [one.shape[0] for one in a],
        dtype_name(x.dtype),
        dtype_name(dtype),
        seeds is not None and any(ps),
        device_of(x),
    )
    with on_device(x):
        return kernels("lora_terms").lora_terms_shrink(x, a, rows, seeds, ps, scalings, dtype, config)


def _cpu_weight_grad(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> Tensor:
    if rows is None and lora_library.takes_terms(x.shape[0], ranks, _masked(seeds, ps), ds.dtype, x.dtype, dtype):
        return lora_library.terms_weight_grad(ds, x, ranks, seeds, ps, scalings)
    out = torch.empty((sum(ranks), x.shape[1]), dtype=dtype)
    torch.ops.peftfast_cpu.lora_terms_weight_grad.default(
        ds, x, list(ranks), _contiguous(rows), _contiguous(seeds), list(ps), list(scalings), out
    )
    return out


def _triton_weight_grad(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    rows: Tensor | None,
    seeds: Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
) -> Tensor:
    config = configs.lora_terms_weight_grad(
        x.shape[0],
        x.shape[1],
        list(ranks),
        dtype_name(x.dtype),
        dtype_name(ds.dtype),
        seeds is not None and any(ps),
        device_of(x),
    )
    with on_device(x):
        return kernels("lora_terms").lora_terms_weight_grad(ds, x, ranks, rows, seeds, ps, scalings, dtype, config)


def _cpu_dy_grads(
    dy: Tensor, s: Tensor, b: list[Tensor], rows: Tensor | None, scalings: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    ranks = [one.shape[1] for one in b]
    if rows is None and lora_library.takes_terms(dy.shape[0], ranks, False, dy.dtype, s.dtype, dtype):
        return lora_library.terms_dy_grads(dy, s, b, scalings)
    ds = torch.empty(s.shape, dtype=dy.dtype)
    db = torch.empty(dy.shape[1] * s.shape[1], dtype=dtype)
    torch.ops.peftfast_cpu.lora_terms_dy_grads.default(dy, s, b, _contiguous(rows), list(scalings), ds, db)
    return ds, db


def _triton_dy_grads(
    dy: Tensor, s: Tensor, b: list[Tensor], rows: Tensor | None, scalings: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    config = configs.lora_terms_dy_grads(
        dy.shape[0],
        dy.shape[1],
        [one.shape[1] for one in b],
        dtype_name(dy.dtype),
        dtype_name(s.dtype),
        device_of(dy),
    )
    with on_device(dy):
        return kernels("lora_terms").lora_terms_dy_grads(dy, s, b, rows, scalings, dtype, config)


def _flat(arguments: tuple[object, ...]) -> list[Tensor]:
    tensors = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors += [one for one in argument if isinstance(one, Tensor)]
    return tensors


def _cpu_accepts(*arguments: object) -> Verdict:
    ok, reason = takes_cpu(*_flat(arguments))
    return _accepts_dtype(arguments) if ok else (ok, reason)


def _triton_accepts(*arguments: object) -> Verdict:
    ok, reason = multiplies_on_triton(*_flat(arguments))
    return _accepts_dtype(arguments) if ok else (ok, reason)


def _table(cpu, triton, definition_of):  # type: ignore[no-untyped-def]
    return (
        Implementation("cpu", cpu_available, _cpu_accepts, cpu),
        Implementation("triton", triton_available, _triton_accepts, triton),
        reference(definition_of),
    )


_TERMS = "Tensor? rows, Tensor? seeds, float[] ps, float[] scalings"

lora_terms_shrink = Operator(
    "lora_terms_shrink",
    f"(Tensor x, Tensor[] a, {_TERMS}, ScalarType dtype) -> Tensor",
    check=_check_shrink,
    fake=lambda x, a, rows, seeds, ps, scalings, dtype: x.new_empty(
        (x.shape[0], sum(one.shape[0] for one in a)), dtype=dtype
    ),
    implementations=_table(_cpu_shrink, _triton_shrink, definition.lora_terms_shrink),
)

lora_terms_expand = Operator(
    "lora_terms_expand",
    f"(Tensor base, Tensor s, Tensor[] w, Tensor[] biases, {_TERMS}, ScalarType dtype) -> Tensor",
    check=_check_expand,
    fake=lambda base, *rest: base.new_empty(base.shape, dtype=rest[-1]),
    implementations=_table(
        _expand_new(_cpu_expand_into),
        _expand_new(_triton_expand_into),
        _reference_expand,
    ),
)

lora_terms_expand_ = Operator(
    "lora_terms_expand_",
    f"(Tensor(a!) base, Tensor s, Tensor[] w, Tensor[] biases, {_TERMS}) -> ()",
    check=_check_expand_,
    fake=lambda *_: None,
    implementations=_table(
        _expand_in_place(_cpu_expand_into), _expand_in_place(_triton_expand_into), _reference_expand_
    ),
)

lora_terms_weight_grad = Operator(
    "lora_terms_weight_grad",
    f"(Tensor ds, Tensor x, SymInt[] ranks, {_TERMS}, ScalarType dtype) -> Tensor",
    check=_check_weight_grad,
    fake=lambda ds, x, ranks, rows, seeds, ps, scalings, dtype: ds.new_empty((sum(ranks), x.shape[1]), dtype=dtype),
    implementations=_table(_cpu_weight_grad, _triton_weight_grad, definition.lora_terms_weight_grad),
)

lora_terms_dy_grads = Operator(
    "lora_terms_dy_grads",
    "(Tensor dy, Tensor s, Tensor[] b, Tensor? rows, float[] scalings, ScalarType dtype) -> (Tensor, Tensor)",
    check=_check_dy_grads,
    fake=lambda dy, s, b, rows, scalings, dtype: (
        dy.new_empty(s.shape),
        dy.new_empty((dy.shape[1] * s.shape[1],), dtype=dtype),
    ),
    implementations=_table(_cpu_dy_grads, _triton_dy_grads, definition.lora_terms_dy_grads),
)
