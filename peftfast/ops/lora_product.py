"""A layer's base product with its adapter inside, and whether a call takes that way.

forward    Y = lora_product(x, W, bias, S, B, lora_bias, no mask, scaling)
backward   dX = lora_product(dY, Wᵀ, none, dS, Aᵀ, none, the mask of x, 1)

Shapes and meaning stand in ``peftfast.reference.lora``; ``peftfast.configs.lora_product`` says where the kernel takes the place of the
library's product and a pass over its result (``lora_expand``): nowhere, until a GPU's table says so.
"""

import torch
from torch import Tensor

from ..configs import lora_product as configs
from ..reference import lora as definition
from .backends import device_of, dtype_name, kernels, multiplies_on_triton, on_device, triton_available
from .dispatch import Implementation, Operator, Verdict, reference, requested_backend, require
from .lora import _check_dropout, _check_dtype, _check_matrix

TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)


def _check_same_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    require(tensor.dtype == x.dtype, lambda: f"{name}: expected {x.dtype} as x is, got {tensor.dtype}")


def check_vector(name: str, vector: Tensor | None, size: int, x: Tensor) -> None:
    """A bias ``[size]`` on x's device, or None."""
    if vector is None:
        return
    require(
        vector.is_floating_point() and vector.dim() == 1 and vector.shape[0] == size,
        lambda: f"{name}: expected floating [{size}], got {vector.dtype} {tuple(vector.shape)}",
    )
    require(vector.device == x.device, lambda: f"{name}: expected on {x.device}, got on {vector.device}")


def _check(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    _check_matrix("x", x, None, None, x)
    _check_matrix("w", w, None, x.shape[1], x)
    _check_matrix("s", s, x.shape[0], None, x)
    _check_matrix("b", b, w.shape[0], s.shape[1], x)
    _check_same_dtype("w", w, x)
    _check_same_dtype("s", s, x)
    check_vector("bias", bias, w.shape[0], x)
    check_vector("lora_bias", lora_bias, w.shape[0], x)
    _check_dropout(seed, p, x)
    _check_dtype(dtype)


def copied_by_descriptors(x: Tensor, w: Tensor, out: torch.dtype) -> Verdict:
    """Whether the copy engine takes the operands (CUDA driver API, cuTensorMapEncodeTiled): rows without gaps between elements, 16
    bytes or a multiple apart, from an address of that alignment. w may lie by rows or by columns."""
    by_rows = w.stride(1) == 1
    for name, tensor in (("x", x), ("w" if by_rows else "w by columns", w if by_rows else w.T)):
        if 0 in tensor.shape:
            return False, f"{name} is empty"
        if tensor.stride(1) != 1:
            return False, f"{name}: the copy engine reads neighbours in memory, elements are {tensor.stride(1)} apart"
        if tensor.stride(0) * tensor.itemsize % 16 or tensor.stride(0) < tensor.shape[1]:
            return False, f"{name}: rows are {tensor.stride(0) * tensor.itemsize} bytes apart, no multiple of 16"
        if tensor.data_ptr() % 16:
            return False, f"{name}: begins at an address that 16 does not divide"
        if max(tensor.shape) >= 2**31:
            return False, f"{name}: the copy engine counts rows and columns in 31 bits"
    if w.shape[0] * out.itemsize % 16:
        return False, f"the result's rows of {w.shape[0] * out.itemsize} bytes are no multiple of 16"
    return True, ""


def _config(x: Tensor, w: Tensor, R: int, masked: bool, dtype: torch.dtype) -> configs.ProductConfig:
    device = device_of(x)
    tma = configs.uses_copy_engine(device) and copied_by_descriptors(x, w, dtype)[0]
    sizes = (x.shape[0], w.shape[0], x.shape[1], R)
    return configs.lora_product(*sizes, dtype_name(x.dtype), dtype_name(dtype), w.stride(1) == 1, masked, tma, device)


def _triton(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    config = _config(x, w, b.shape[1], seed is not None and p > 0.0, dtype)
    biases = [None if one is None else one.contiguous() for one in (bias, lora_bias)]
    with on_device(x):
        return kernels("lora_product").lora_product(x, w, biases[0], s, b, biases[1], seed, p, scaling, dtype, config)


def _triton_accepts(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Verdict:
    ok, reason = multiplies_on_triton(x, w, bias, s, b, lora_bias)
    if ok and x.dtype not in TENSOR_CORE_DTYPES:
        ok, reason = False, f"the product multiplies on tensor cores in bfloat16 and float16, got {x.dtype}"
    if ok and dtype not in (torch.float32, *TENSOR_CORE_DTYPES):
        ok, reason = False, f"the fused kernels give float32, bfloat16 and float16, asked for {dtype}"
    return ok, reason


def _reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    return definition.lora_product(x, w, bias, s, b, lora_bias, seed, p, scaling, dtype).contiguous()


lora_product = Operator(
    "lora_product",
    "(Tensor x, Tensor w, Tensor? bias, Tensor s, Tensor b, Tensor? lora_bias, Tensor? seed, float p, float scaling, "
    "ScalarType dtype) -> Tensor",
    check=_check,
    fake=lambda x, w, bias, s, b, lora_bias, seed, p, scaling, dtype: x.new_empty(
        (x.shape[0], w.shape[0]), dtype=dtype
    ),
    implementations=(Implementation("triton", triton_available, _triton_accepts, _triton), reference(_reference)),
)


def chosen(x: Tensor, shape: tuple[int, int], by_rows: bool, R: int, masked: bool, dtype: torch.dtype) -> Verdict:
    """Whether a layer's product of x ``[M, K]`` in ``dtype``, with a weight of ``shape`` ``(N, K)`` that lies by rows or by columns,
    takes :data:`lora_product`, or why it stays with the library.

    Not under torch.compile, where the table cannot be asked for sizes that may be symbols.
    """
    if torch.compiler.is_compiling():
        return False, "under torch.compile the library's product stays"
    asked = configs.choice()
    if asked == "never":
        return False, f"{configs.VARIABLE}=never"
    if not x.is_cuda and asked != "always":
        return False, f"no GPU's table is for a tensor on {x.device.type}"
    if dtype not in TENSOR_CORE_DTYPES:
        return False, f"the product multiplies on tensor cores in bfloat16 and float16, not in {dtype}"
    if requested_backend() not in (None, "triton") or not triton_available()[0] or not multiplies_on_triton(x)[0]:
        return False, "Triton does not serve this call"
    if not x.shape[0] or not R:
        return False, "nothing to add"
    if asked == "always":
        return True, ""
    if configs.kept(x.shape[0], *shape, R, dtype_name(dtype), by_rows, masked, device_of(x)):
        return True, ""
    return (
        False,
        "the GPU's table has no entry for this shape: the library's product and a pass were not measured slower",
    )
