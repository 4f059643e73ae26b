"""Zeroth order: seeded directions, weights moved along them in place, and linear layers on weights that are never written."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .disjoint import check_disjoint, check_sources
from .nf4 import NF4Weight

DISTRIBUTIONS = ("gaussian", "rademacher")


def perturbation(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    tensor_id: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    distribution: str = "gaussian",
) -> Tensor:
    """The direction z that :func:`perturb_` moves a tensor along: the same bits on every device, in any blocking or sharding.

    Args:
        shape: of the result.
        seed: 64 bits, an int or one int64 element.
        tensor_id: which tensor of the model, in [0, 2**32).
        offset: position of the first element in the logical, unsharded tensor, row-major.
        dtype: z is float32 and rounded to this.
        device: of the result; a seed tensor's, else the CPU.
        distribution: "gaussian" (Philox4x32-10 and Box-Muller) or "rademacher" (1 and -1).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rademacher = is_rademacher(distribution)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
    sizes = tuple(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"shape: expected sizes, got {shape}")
    _check_places([tensor_id], [offset])
    where = device if device is not None else seed.device if isinstance(seed, Tensor) else "cpu"
    seeds = seeds_tensor("seed", seed, torch.device(where))
    if seeds.numel() != 1:
        raise ValueError(f"seed: expected one, got {seeds.numel()}")
    return ops.zeroth_order.perturbation(seeds, sizes, tensor_id, offset, rademacher, dtype)


def perturb_(
    tensors: Tensor | Sequence[Tensor],
    seed: int | Sequence[int] | Tensor,
    scale: float | Sequence[float] | Tensor,
    *,
    distribution: str = "gaussian",
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    decay: float | Tensor | None = None,
    thresholds: Tensor | None = None,
    rounding_seed: int | Tensor | None = None,
    sources: Sequence[Tensor] | None = None,
) -> None:
    """tensors += scale * z(seed), in place (MeZO, arXiv 2305.17333): one launch for all tensors of a dtype, z never stored.

    With several seeds and scales the terms are added in order in one pass, so that to restore, to update and to perturb for the next
    step is one read and one write: ``perturb_(ps, [old, new], [eps - lr * g, eps])`` after a pass at ``-eps``. Sums are float32
    (float64 for float64 tensors) and rounded to the tensor's dtype once; a term whose scale is 0 is left out.

    Args:
        tensors: floating, of any shapes, on one device, no two elements in one place. One that is not contiguous is moved by way of
            a contiguous copy.
        seed: 64 bits each: an int, a sequence of ints, or int64 ``[K]`` on the tensors' device.
        scale: as many: floats or float32 ``[K]`` on the tensors' device.
        distribution: "gaussian" or "rademacher".
        tensor_ids: in [0, 2**32), distinct tensors of a model distinctly; 0, 1, 2, ... if not given.
        offsets: position of each tensor's first element in its logical, unsharded tensor, row-major; 0 if not given.
        decay: the tensors are multiplied by it before the terms are added: a float or one float32.
        thresholds: float32 ``[len(tensors)]``: elements whose magnitude is above it stay as they are (Sparse MeZO, arXiv 2402.15751).
        rounding_seed: round bfloat16 and float16 stochastically, without bias, by draws of this seed; to nearest even if not given.
        sources: read these in place of ``tensors``, which are only written; of the same shapes and dtypes, and each its tensor itself
            or apart from all tensors in memory.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    given = [tensors] if isinstance(tensors, Tensor) else _listed("tensors", tensors, "a tensor or a sequence of them")
    rademacher = is_rademacher(distribution)
    _check_tensors("tensors", given)
    if given and given[0].device.type != "meta":
        check_disjoint("tensors", given)
    read = given if sources is None else _listed("sources", sources, "a sequence of tensors")
    if sources is not None:
        _check_tensors("sources", read)
        if [(t.shape, t.dtype, t.device) for t in read] != [(t.shape, t.dtype, t.device) for t in given]:
            raise ValueError("sources: expected the shapes, dtypes and device of tensors")
        if given and given[0].device.type != "meta":
            check_sources("sources", read, "tensors", given)
    ids = list(range(len(given))) if tensor_ids is None else _listed("tensor_ids", tensor_ids, "a sequence of ints")
    places = [0] * len(given) if offsets is None else _listed("offsets", offsets, "a sequence of ints")
    for name, values in (("tensor_ids", ids), ("offsets", places)):
        if len(values) != len(given):
            raise ValueError(f"{name}: expected {len(given)}, one for each tensor, got {len(values)}")
    _check_places(ids, places)
    device = given[0].device if given else torch.device("cpu")
    seeds = seeds_tensor("seed", seed, device)
    scales = floats_tensor("scale", scale, device)
    if seeds.numel() != scales.numel():
        raise ValueError(f"scale: expected {seeds.numel()}, one for each seed, got {scales.numel()}")
    factor = None if decay is None else floats_tensor("decay", decay, device)
    if factor is not None and factor.numel() != 1:
        raise ValueError(f"decay: expected one, got {factor.numel()}")
    draws = None if rounding_seed is None else seeds_tensor("rounding_seed", rounding_seed, device)
    if draws is not None and draws.numel() != 1:
        raise ValueError(f"rounding_seed: expected one, got {draws.numel()}")
    if thresholds is not None:
        thresholds = floats_tensor("thresholds", thresholds, device)
        if thresholds.numel() != len(given):
            raise ValueError(f"thresholds: expected {len(given)}, one for each tensor, got {thresholds.numel()}")
    groups: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(given):
        groups.setdefault(tensor.dtype, []).append(index)
    with torch.no_grad():
        for members in groups.values():
            outs = [given[i].detach() for i in members]
            written = [
                out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
                for out in outs
            ]
            taken = [read[i].detach().contiguous() for i in members]
            if all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(written, taken, strict=True)):
                taken = []
            own = thresholds
            if thresholds is not None and len(groups) > 1:
                own = torch.cat([thresholds[i : i + 1] for i in members])
            ops.zeroth_order.perturb_(
                written, taken, seeds, scales, factor, own, draws, [ids[i] for i in members], [places[i] for i in members], rademacher
            )  # fmt: skip
            for out, new in zip(outs, written, strict=True):
                if out is not new:
                    out.copy_(new)
            # Kernels write behind the counters that autograd and DoRA's norms look at.
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(outs)


def zo_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    weight: Tensor | NF4Weight,
    seed: int | Tensor,
    eps: float | Tensor,
    *,
    bias: Tensor | None = None,
    bias_minus: Tensor | None = None,
    tensor_id: int = 0,
    threshold: float | Tensor | None = None,
    distribution: str = "gaussian",
) -> tuple[Tensor, Tensor]:
    """Both sides of a two-point estimate in one layer: x_plus (W + eps z)ᵀ + b and x_minus (W - eps z)ᵀ + b.

    W is read once and z drawn once for both signs, and W itself is never written. With few rows the perturbed weights exist in
    registers, on a CPU in scratch of a few rows; with many, a slab of rows (a CPU) or the layer (a GPU) is written to scratch that
    lives as long as the call. A 4-bit weight is decoded in x's dtype on the way, then perturbed: no dense copy of it is made where the
    rows are few.

    Args:
        x_plus, x_minus: ``[..., K]`` of one shape and of weight's dtype. weight: ``[N, K]``, or an NF4Weight of that shape.
        seed, eps, tensor_id, distribution: as in :func:`perturb_`; z is the same.
        bias: ``[N]``, added as it is. bias_minus: another one for the minus side.
        threshold: elements of W whose magnitude is above it are not perturbed.

    Returns:
        Two ``[..., N]``. No gradients.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rademacher = is_rademacher(distribution)
    for name, x in (("x_plus", x_plus), ("x_minus", x_minus)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x_plus.shape != x_minus.shape or x_plus.dtype != x_minus.dtype or x_plus.device != x_minus.device:
        raise ValueError(
            f"x_minus: expected {x_plus.dtype} {tuple(x_plus.shape)} on {x_plus.device}, got {x_minus.dtype} "
            f"{tuple(x_minus.shape)} on {x_minus.device}"
        )
    _check_places([tensor_id], [0])
    if isinstance(weight, NF4Weight):
        if x_plus.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"x_plus: expected float32, bfloat16 or float16 beside a 4-bit weight, got {x_plus.dtype}")
        dtype = x_plus.dtype
    elif isinstance(weight, Tensor):
        dtype = weight.dtype
    else:
        raise TypeError(f"weight: expected a tensor or an NF4Weight, got {type(weight).__name__}")
    shape, device = tuple(weight.shape), weight.device
    if len(shape) != 2 or x_plus.dim() == 0 or x_plus.shape[-1] != shape[1]:
        raise ValueError(f"x_plus: expected [..., K] for a weight [N, K], got {tuple(x_plus.shape)} and {shape}")
    if dtype != x_plus.dtype or device != x_plus.device:
        raise ValueError(f"weight: expected {x_plus.dtype} on {x_plus.device}, got {dtype} on {device}")
    for name, one in (("bias", bias), ("bias_minus", bias_minus)):
        if one is not None and not isinstance(one, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(one).__name__}")
        if one is not None and (tuple(one.shape), one.dtype, one.device) != (shape[:1], dtype, device):
            raise ValueError(
                f"{name}: expected {dtype} ({shape[0]},) on {device}, got {one.dtype} {tuple(one.shape)} on {one.device}"
            )
    if bias_minus is not None and bias is None:
        raise ValueError("bias_minus: expected bias beside it")
    seeds, scale = seeds_tensor("seed", seed, device), floats_tensor("eps", eps, device)
    limit = None if threshold is None else floats_tensor("threshold", threshold, device)
    for name, value in (("seed", seeds), ("eps", scale), ("threshold", limit)):
        if value is not None and value.numel() != 1:
            raise ValueError(f"{name}: expected one, got {value.numel()}")
    with torch.no_grad():
        biases = [
            None if one is None else one.detach().contiguous()
            for one in (bias, bias_minus if bias_minus is not None else bias)
        ]
        rows = [x.detach().reshape(-1, x.shape[-1]) for x in (x_plus, x_minus)]
        terms = (*biases, seeds, scale, limit, tensor_id, rademacher)
        if isinstance(weight, NF4Weight):
            plus, minus = ops.zeroth_order_linear.zo_nf4_linear(*rows, *weight.storage(), *terms, False)
        else:
            plus, minus = ops.zeroth_order_linear.zo_linear(*rows, weight.detach().contiguous(), *terms)
        result = (*x_plus.shape[:-1], shape[0])
        return plus.reshape(result), minus.reshape(result)


def is_rademacher(distribution: str) -> bool:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    return distribution == "rademacher"


def signed_seed(name: str, value: object) -> int:
    """A 64-bit seed, signed or unsigned, as the int64 of the same bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(value).__name__}")
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name}: expected 64 bits, got {value}")
    return value - (1 << 64) if value >= 1 << 63 else value


def seeds_tensor(name: str, seed: object, device: torch.device) -> Tensor:
    """int64 ``[K]`` on ``device``; a tensor must be there already, since moving it would wait for the device."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {seed.dtype}")
        if seed.device != device:
            raise ValueError(f"{name}: expected on {device}, got on {seed.device}")
        return seed.reshape(-1).contiguous()
    values = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    return _filled([signed_seed(name, value) for value in values], torch.int64, device)


def floats_tensor(name: str, value: object, device: torch.device) -> Tensor:
    """float32 ``[K]`` on ``device``."""
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: expected on {device}, got on {value.device}")
        return value.detach().reshape(-1).contiguous()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for one in values:
        if not isinstance(one, (int, float)) or isinstance(one, bool):
            raise TypeError(f"{name}: expected a float or a float32 tensor, got {type(one).__name__}")
        if not math.isfinite(one):
            raise ValueError(f"{name}: expected a finite number, got {one}")
    return _filled(values, torch.float32, device)


def _filled(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:  # type: ignore[type-arg]
    """By fills, which need no copy from pageable memory: no host synchronisation."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device="cpu")
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])


def _listed(name: str, value: Any, expected: str) -> list[Any]:
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return list(value)


def _check_tensors(name: str, tensors: list[Tensor]) -> None:
    device = None
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{index}]: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}[{index}]: expected a floating dtype, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}[{index}]: expected a dense tensor, got {tensor.layout}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}[{index}]: expected on {device} as the first, got on {tensor.device}")


def _check_places(tensor_ids: Sequence[int], offsets: Sequence[int]) -> None:
    for tensor_id in tensor_ids:
        if not isinstance(tensor_id, int) or not 0 <= tensor_id < ops.zeroth_order.WORDS:
            raise ValueError(f"tensor_ids: expected ints in [0, 2**32), got {tensor_id!r}")
    for offset in offsets:
        if not isinstance(offset, int) or not 0 <= offset <= ops.zeroth_order.LARGEST_OFFSET:
            raise ValueError(f"offsets: expected ints in [0, 2**62], got {offset!r}")
