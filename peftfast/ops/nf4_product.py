"""A product of many rows with a 4-bit weight that writes no dense one, columns of a weight decoded alone, and which way a call takes.

forward    Y = nf4_product(x, W̃, not transposed, bias, S, B, lora_bias, no mask, scaling)
backward   dX = nf4_product(dY, W̃, transposed, none, dS, Aᵀ, none, the mask of x, 1)

Shapes and meaning stand in ``peftfast.reference.nf4``; ``peftfast.configs.nf4_product`` says which way is taken where.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import nf4_product as configs
from ..reference import nf4 as definition
from .backends import device_of, dtype_name, kernels, multiplies_on_triton, on_device, takes_triton, triton_available
from .dispatch import Implementation, Operator, Verdict, reference, requested_backend, require
from .lora import _check_dropout, _check_dtype, _check_matrix
from .lora_product import TENSOR_CORE_DTYPES, check_vector
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
    transposed: bool,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    require(len(shape) == 2, lambda: f"shape: expected (N, K), got {tuple(shape)}")
    n, k = (shape[1], shape[0]) if transposed else shape
    _check_matrix("x", x, None, k, x)
    require(x.device == packed.device, lambda: f"x: expected on {packed.device} beside the weight, got on {x.device}")
    require((s is None) == (b is None), lambda: "s, b: expected both or none")
    require(s is not None or lora_bias is None, lambda: "lora_bias: expected an adapter with it")
    if s is not None and b is not None:
        _check_matrix("s", s, x.shape[0], None, x)
        _check_matrix("b", b, n, s.shape[1], x)
        require(s.dtype == x.dtype, lambda: f"s: expected {x.dtype} as x is, got {s.dtype}")
    check_vector("bias", bias, n, x)
    check_vector("lora_bias", lora_bias, n, x)
    _check_dropout(seed, p, x)
    _check_dtype(dtype)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    shape, transposed, dtype = rest[4], rest[8], rest[-1]
    return x.new_empty((x.shape[0], shape[1] if transposed else shape[0]), dtype=dtype)


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
    transposed: bool,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    n, k = shape
    R, device, masked = 0 if b is None else b.shape[1], device_of(x), seed is not None and p > 0.0
    own = (R, dtype_name(x.dtype), block_size, nested_absmax is not None, transposed, masked, device)
    sizes = (x.shape[0], k, n) if transposed else (x.shape[0], n, k)
    config = configs.kept(x.shape[0], n, k, *own)
    if config is None or config.route != "fused":
        config = configs.fused(*sizes, R, transposed, k, device)
    else:
        config = configs.on(config, *sizes, device)
    nested = (nested_absmax, nested_code, nested_offset)
    biases = [None if one is None else one.contiguous() for one in (bias, lora_bias)]
    adapter = (biases[0], s, b, biases[1], seed, p, scaling, dtype)
    with on_device(x):
        return kernels("nf4_product").nf4_product(
            x, packed, absmax, code, block_size, (n, k), *nested, transposed, *adapter, config
        )


def triton_serves(k: int, compute: torch.dtype) -> Verdict:
    """What the Triton kernels are made for."""
    if compute not in TENSOR_CORE_DTYPES:
        return False, f"the product multiplies on tensor cores in bfloat16 and float16, not in {compute}"
    if k % 2:
        return False, f"a row of K = {k} columns, an odd number, begins within a byte"
    return True, ""


def _triton_accepts(x: Tensor, *rest: Any) -> Verdict:
    ok, reason = multiplies_on_triton(x, *(one for one in rest if isinstance(one, Tensor)))
    if ok:
        ok, reason = triton_serves(rest[4][1], x.dtype)
    if ok and rest[-1] not in (torch.float32, *TENSOR_CORE_DTYPES):
        ok, reason = False, f"the fused kernels give float32, bfloat16 and float16, asked for {rest[-1]}"
    return ok, reason


def _reference(x: Tensor, *rest: Any) -> Tensor:
    return definition.nf4_product(x, *rest).contiguous()


nf4_product = Operator(
    "nf4_product",
    f"(Tensor x, {WEIGHT_SCHEMA}, bool transposed, Tensor? bias, Tensor? s, Tensor? b, Tensor? lora_bias, Tensor? seed, float p, "
    "float scaling, ScalarType dtype) -> Tensor",
    check=_check,
    fake=_fake,
    implementations=(Implementation("triton", triton_available, _triton_accepts, _triton), reference(_reference)),
)


def _check_columns(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    first: int,
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    require(
        len(shape) == 2 and out.is_floating_point() and out.dim() == 2 and out.shape[0] == shape[0],
        lambda: f"out: expected floating [N, columns] of a weight {tuple(shape)}, got {out.dtype} {tuple(out.shape)}",
    )
    require(
        (out.stride(1) == 1 or out.shape[1] < 2) and (out.stride(0) >= out.shape[1] or out.shape[0] < 2),
        lambda: f"out: expected rows of neighbours, which do not overlap, got strides {out.stride()}",
    )
    require(
        0 <= first <= shape[1] - out.shape[1],
        lambda: f"first: expected 0 to {shape[1] - out.shape[1]} for {out.shape[1]} of {shape[1]} columns, got {first}",
    )
    require(out.device == packed.device, lambda: f"out: expected on {packed.device}, got {out.device}")


def _columns_triton(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    first: int,
) -> None:
    config = configs.nf4_dequantize_columns(dtype_name(out.dtype), device_of(out))
    nested = (nested_absmax, nested_code, nested_offset)
    with on_device(packed):
        kernels("nf4_product").nf4_dequantize_columns(
            packed, absmax, code, block_size, tuple(shape), *nested, out, first, config
        )


def _columns_accepts(packed: Tensor, *rest: Any) -> Verdict:
    ok, reason = takes_triton(packed, rest[7])
    if ok and (rest[3][1] % 2 or rest[8] % 2):
        ok, reason = False, f"columns from {rest[8]} on of {rest[3][1]}: a row of them begins within a byte"
    return ok, reason


def _columns_reference(packed: Tensor, *rest: Any) -> None:
    absmax, code, block_size, shape, *nested, out, first = rest
    dense = definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), out.dtype, *nested)
    out.copy_(dense[:, first : first + out.shape[1]])


nf4_dequantize_columns_out = Operator(
    "nf4_dequantize_columns_out",
    f"({WEIGHT_SCHEMA}, Tensor(a!) out, int first) -> ()",
    check=_check_columns,
    fake=lambda *_: None,
    implementations=(
        Implementation("triton", triton_available, _columns_accepts, _columns_triton),
        reference(_columns_reference),
    ),
)

USUAL = configs.ProductConfig("dequantize")


def chosen(
    x: Tensor,
    rows: int,
    shape: Sequence[int],
    block_size: int,
    nested: bool,
    R: int,
    transposed: bool,
    masked: bool,
    dtype: torch.dtype,
) -> tuple[configs.ProductConfig, str]:
    """The way of a layer's product of so many rows of x, ``[..., K]`` (transposed ``[..., N]``), in ``dtype`` with a 4-bit weight of
    ``shape`` ``(N, K)``, and why it is :data:`USUAL` where it is.

    Not under torch.compile, where the table cannot be asked for sizes that may be symbols.
    """
    if torch.compiler.is_compiling():
        return USUAL, "under torch.compile the weight is decoded whole"
    asked = configs.choice()
    if asked == "dequantize":
        return USUAL, f"{configs.VARIABLE}=dequantize"
    if asked == "measured" and not x.is_cuda:
        return USUAL, f"no GPU's table is for a tensor on {x.device.type}"
    if rows < configs.FEWEST_ROWS:
        return USUAL, f"{rows} rows, fewer than {configs.FEWEST_ROWS}"
    found = configs.ProductConfig(asked, configs.PARTS[1]) if asked != "measured" else None
    if found is None:
        sizes = (rows, shape[0], shape[1], R, dtype_name(dtype))
        found = configs.kept(*sizes, block_size, nested, transposed, masked, device_of(x))
    if found is None:
        return USUAL, "the GPU's table has no entry for this shape: no other way was measured faster"
    ok, reason = _takes(found.route, x, shape[1], dtype)
    return (found, "") if ok else (USUAL, reason)


def ways(
    like: Tensor, shape: Sequence[int], block_size: int, nested: bool, R: int, masked: bool, dtype: torch.dtype
) -> str:
    """For a report: the ways other than the usual one that a layer on ``like``'s device takes, and for how many rows; or nothing."""
    found: dict[str, list[int]] = {}
    for rows in configs.ROW_BUCKETS:
        for name, transposed in (("forward", False), ("dX", True)):
            given = (shape, block_size, nested, R, transposed, masked and transposed, dtype)
            route = chosen(like, rows, *given)[0].route
            if route != USUAL.route:
                found.setdefault(f"{name} {route}", []).append(rows)
    texts = (f"{name} at {', '.join(map(str, rows))} rows" for name, rows in found.items())
    everywhere = (name for name, rows in found.items() if len(rows) == len(configs.ROW_BUCKETS))
    return ", ".join(everywhere if all(len(rows) == len(configs.ROW_BUCKETS) for rows in found.values()) else texts)


def _takes(route: str, x: Tensor, k: int, dtype: torch.dtype) -> Verdict:
    if route == "overlapped" and not x.is_cuda:
        return False, f"overlapping is for the streams of a GPU, x is on {x.device.type}"
    if route == "fused":
        if requested_backend() not in (None, "triton") or not triton_available()[0] or not multiplies_on_triton(x)[0]:
            return False, "Triton does not serve this call"
        return triton_serves(k, dtype)
    return True, ""
