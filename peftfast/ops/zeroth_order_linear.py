"""Linear layers that see both signs of a move of their weight, which is never written: the weight is read and z drawn once for both.
What they compute stands in ``peftfast.reference.zeroth_order``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..configs import zeroth_order as configs
from ..reference import zeroth_order as definition
from . import native
from .backends import cpu_available, device_of, dtype_name, kernels, on_device, triton_available
from .dispatch import Implementation, Operator, reference, require
from .nf4 import WEIGHT_SCHEMA, check_weight, nf4_dequantize
from .nf4_linear import triton_serves
from .philox import check_seed
from .zeroth_order import (
    check_one_float,
    check_pair,
    check_place,
    compiled_pair_into,
    cpu_accepts,
    perturbed_pair,
    triton_accepts,
    triton_pair_into,
)


def _check_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    weight: Tensor,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
) -> None:
    require(weight.dim() == 2, lambda: f"weight: expected [N, K], got shape {tuple(weight.shape)}")
    check_pair(weight, seed, eps, threshold, tensor_id, 0, rademacher)
    _check_sides(x_plus, x_minus, weight, weight.shape, weight.dtype, bias_plus, bias_minus)


def _check_sides(
    x_plus: Tensor,
    x_minus: Tensor,
    beside: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
) -> None:
    """Inputs and biases of a weight of ``shape`` and ``dtype`` that lies ``beside`` them."""
    N, K = shape
    for name, x in (("x_plus", x_plus), ("x_minus", x_minus)):
        require(
            x.dim() == 2 and x.shape[1] == K and x.dtype == dtype,
            lambda name=name, x=x: (  # type: ignore[misc]
                f"{name}: expected {dtype} [M, {K}], got {x.dtype} {tuple(x.shape)}"
            ),
        )
        require(
            x.device == beside.device,
            lambda name=name, x=x: f"{name}: expected on {beside.device}, got on {x.device}",  # type: ignore[misc]
        )
    require(x_plus.shape[0] == x_minus.shape[0], lambda: "x_plus, x_minus: expected as many rows in both")
    require((bias_plus is None) == (bias_minus is None), lambda: "bias_plus, bias_minus: expected both or none")
    for name, bias in (("bias_plus", bias_plus), ("bias_minus", bias_minus)):
        if bias is not None:
            require(
                bias.dim() == 1 and bias.shape[0] == N and bias.dtype == dtype,
                lambda name=name, bias=bias: (  # type: ignore[misc]
                    f"{name}: expected {dtype} [{N}], got {bias.dtype} {tuple(bias.shape)}"
                ),
            )
            require(
                bias.device == beside.device,
                lambda name=name, bias=bias: f"{name}: expected on {beside.device}, got on {bias.device}",  # type: ignore[misc]
            )


def _fake_linear(x_plus: Tensor, x_minus: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (x_plus.shape[0], weight.shape[0])
    return x_plus.new_empty(shape), x_plus.new_empty(shape)


def _slabs(
    x_plus: Tensor,
    x_minus: Tensor,
    N: int,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    move: Callable[[int, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Some rows of both weights at a time, moved into the same scratch and multiplied by torch: where the rows of x are many."""
    K = x_plus.shape[1]
    rows = min(N, max(64, configs.CPU_SLAB_ELEMENTS // max(K, 1)))
    sides = []
    for x, bias in ((x_plus, bias_plus), (x_minus, bias_minus)):
        sides.append((x, bias, x.new_empty((rows, K)), x.new_empty((x.shape[0], N))))
    for first in range(0, N, rows):
        last = min(first + rows, N)
        move(first, *(scratch[: last - first] for _, _, scratch, _ in sides))
        for x, bias, scratch, y in sides:
            moved = scratch[: last - first].T
            if bias is None:
                torch.mm(x, moved, out=y[:, first:last])
            else:
                torch.addmm(bias[first:last], x, moved, out=y[:, first:last])
    return sides[0][3], sides[1][3]


def _cpu_fuses(x: Tensor) -> bool:
    return x.shape[0] <= configs.CPU_FUSED_ROWS[dtype_name(x.dtype)]


def _empty_results(x: Tensor, N: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], N)), x.new_empty((x.shape[0], N))


def _cpu_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    weight: Tensor,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    if _cpu_fuses(x_plus):
        results = _empty_results(x_plus, N)
        biases = _contiguous(bias_plus, bias_minus)
        torch.ops.peftfast_cpu.zo_linear.default(
            x_plus.contiguous(), x_minus.contiguous(), weight, *biases, seed, eps, threshold, tensor_id, rademacher, *results
        )  # fmt: skip
        return results
    pair_into = compiled_pair_into("peftfast_cpu")

    def move(first: int, plus: Tensor, minus: Tensor) -> None:
        rows = weight[first : first + len(plus)]
        pair_into(rows, plus, minus, seed, eps, threshold, tensor_id, first * K, rademacher)

    return _slabs(x_plus, x_minus, N, bias_plus, bias_minus, move)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _gpu_pair_into(*arguments):  # type: ignore[no-untyped-def]
    (compiled_pair_into("peftfast_cuda") if native.cuda_available()[0] else triton_pair_into)(*arguments)


def _triton_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    weight: Tensor,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    config = configs.zo_linear(x_plus.shape[0], N, K, dtype_name(weight.dtype), rademacher, device_of(weight))
    if config is None:
        plus, minus = torch.empty_like(weight), torch.empty_like(weight)
        _gpu_pair_into(weight, plus, minus, seed, eps, threshold, tensor_id, 0, rademacher)
        return functional.linear(x_plus, plus, bias_plus), functional.linear(x_minus, minus, bias_minus)
    with on_device(weight):
        return kernels("zeroth_order_linear").zo_linear(
            x_plus, x_minus, weight, bias_plus, bias_minus, seed, eps, threshold, tensor_id, rademacher, config
        )


# On a GPU the fused kernel reads W once for both signs and writes no weight; the CUDA library has no product of its own.
zo_linear = Operator(
    "zo_linear",
    "(Tensor x_plus, Tensor x_minus, Tensor weight, Tensor? bias_plus, Tensor? bias_minus, Tensor seed, Tensor eps, "
    "Tensor? threshold, int tensor_id, bool rademacher) -> (Tensor, Tensor)",
    check=_check_linear,
    fake=_fake_linear,
    implementations=(
        Implementation("cpu", cpu_available, cpu_accepts, _cpu_linear),
        Implementation("triton", triton_available, triton_accepts, _triton_linear),
        reference(definition.zo_linear),
    ),
)


def _check_nf4(
    x_plus: Tensor,
    x_minus: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
    of_scales: bool,
) -> None:
    check_weight(packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
    require(len(shape) == 2, lambda: f"shape: expected (N, K), got {tuple(shape)}")
    require(
        not (of_scales and nested_absmax is not None),
        lambda: "absmax: expected float32 block maxima where z moves them, got nested ones",
    )
    require(x_plus.is_floating_point(), lambda: f"x_plus: expected a floating dtype, got {x_plus.dtype}")
    check_seed(seed)
    require(seed.device == packed.device, lambda: f"seed: expected on {packed.device}, got on {seed.device}")
    check_place(tensor_id, 0)
    check_one_float("eps", eps, packed)
    if threshold is not None:
        check_one_float("threshold", threshold, packed)
    _check_sides(x_plus, x_minus, packed, shape, x_plus.dtype, bias_plus, bias_minus)


def _fake_nf4(x_plus: Tensor, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    shape = (x_plus.shape[0], rest[5][0])
    return x_plus.new_empty(shape), x_plus.new_empty(shape)


def _cpu_nf4(
    x_plus: Tensor,
    x_minus: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
    of_scales: bool,
) -> tuple[Tensor, Tensor]:
    N, K = shape
    weight = (packed, absmax, code, block_size, nested_absmax, nested_code, nested_offset)
    terms = (seed, eps, threshold, tensor_id, rademacher, of_scales)
    if _cpu_fuses(x_plus):
        results = _empty_results(x_plus, N)
        biases = _contiguous(bias_plus, bias_minus)
        torch.ops.peftfast_cpu.zo_nf4_linear.default(
            x_plus.contiguous(), x_minus.contiguous(), *weight, *biases, *terms, *results
        )
        return results

    def move(first: int, plus: Tensor, minus: Tensor) -> None:
        torch.ops.peftfast_cpu.zo_nf4_pair.default(*weight, N * K, first * K, *terms, plus, minus)

    return _slabs(x_plus, x_minus, N, bias_plus, bias_minus, move)


def _triton_nf4(
    x_plus: Tensor,
    x_minus: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
    of_scales: bool,
) -> tuple[Tensor, Tensor]:
    N, K = shape
    nested = (nested_absmax, nested_code, nested_offset)
    config = None
    if triton_serves(K, block_size, x_plus.dtype)[0]:
        distribution = "scales" if of_scales else "rademacher" if rademacher else "gaussian"
        config = configs.zo_nf4_linear(
            x_plus.shape[0], N, K, block_size, dtype_name(x_plus.dtype), distribution, device_of(packed)
        )
    if config is not None:
        with on_device(packed):
            return kernels("zeroth_order_linear").zo_nf4_linear(
                x_plus, x_minus, packed, absmax, code, block_size, (N, K), *nested, bias_plus, bias_minus, seed, eps,
                threshold, tensor_id, rademacher, of_scales, config
            )  # fmt: skip
    # Two dense weights during the layer: the plus side is moved where it was decoded.
    if of_scales:
        maxima = perturbed_pair(absmax, seed, eps, threshold, tensor_id, 0, rademacher)
        plus, minus = (nf4_dequantize(packed, one, code, block_size, shape, x_plus.dtype, *nested) for one in maxima)
    else:
        plus = nf4_dequantize(packed, absmax, code, block_size, shape, x_plus.dtype, *nested)
        minus = torch.empty_like(plus)
        _gpu_pair_into(plus, plus, minus, seed, eps, threshold, tensor_id, 0, rademacher)
    return functional.linear(x_plus, plus, bias_plus), functional.linear(x_minus, minus, bias_minus)


zo_nf4_linear = Operator(
    "zo_nf4_linear",
    f"(Tensor x_plus, Tensor x_minus, {WEIGHT_SCHEMA}, Tensor? bias_plus, Tensor? bias_minus, Tensor seed, Tensor eps, "
    "Tensor? threshold, int tensor_id, bool rademacher, bool of_scales) -> (Tensor, Tensor)",
    check=_check_nf4,
    fake=_fake_nf4,
    implementations=(
        Implementation("cpu", cpu_available, cpu_accepts, _cpu_nf4),
        Implementation("triton", triton_available, triton_accepts, _triton_nf4),
        reference(definition.zo_nf4_linear),
    ),
)
