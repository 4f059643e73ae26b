"""Operators that move weights along seeded directions. What they compute stands in ``peftfast.reference.zeroth_order``; the layers that
move their weight in flight are in :mod:`.zeroth_order_linear`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..configs import zeroth_order as configs
from ..reference import zeroth_order as definition
from . import native
from .backends import (
    FLOAT_DTYPES,
    cpu_available,
    device_of,
    dtype_name,
    kernels,
    on_device,
    takes_cpu,
    takes_triton,
    triton_available,
)
from .dispatch import Implementation, Operator, Verdict, reference, require
from .philox import check_seed

WORDS = 1 << 32
LARGEST_OFFSET = 1 << 62

_TERMS = "Tensor seeds, Tensor coefficients, Tensor? decay, Tensor? thresholds, Tensor? rounding_seed"


def check_place(tensor_id: int, offset: int) -> None:
    require(0 <= tensor_id < WORDS, lambda: f"tensor_id: expected a value in [0, 2**32), got {tensor_id}")
    require(0 <= offset <= LARGEST_OFFSET, lambda: f"offset: expected a value in [0, 2**62], got {offset}")


def check_one_float(name: str, value: Tensor, like: Tensor, count: int = 1) -> None:
    require(
        value.dtype == torch.float32 and value.numel() == count and value.is_contiguous(),
        lambda: f"{name}: expected {count} contiguous float32, got {value.dtype} of shape {tuple(value.shape)}",
    )
    require(value.device == like.device, lambda: f"{name}: expected on {like.device}, got on {value.device}")


def _check_terms(
    like: Tensor, count: int, seeds: Tensor, coefficients: Tensor, decay: Tensor | None, thresholds: Tensor | None
) -> None:
    require(
        seeds.dtype == torch.int64 and seeds.dim() == 1 and seeds.is_contiguous(),
        lambda: f"seeds: expected contiguous int64 [K], got {seeds.dtype} of shape {tuple(seeds.shape)}",
    )
    require(seeds.device == like.device, lambda: f"seeds: expected on {like.device}, got on {seeds.device}")
    check_one_float("coefficients", coefficients, like, seeds.numel())
    if decay is not None:
        check_one_float("decay", decay, like)
    if thresholds is not None:
        check_one_float("thresholds", thresholds, like, count)


def _check_perturb(
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor | None,
    thresholds: Tensor | None,
    rounding_seed: Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    rademacher: bool,
) -> None:
    count = len(tensors)
    require(
        len(sources) in (0, count) and len(tensor_ids) == count and len(offsets) == count,
        lambda: (
            f"sources, tensor_ids, offsets: expected {count} each for {count} tensors (sources may be none), got "
            f"{len(sources)}, {len(tensor_ids)}, {len(offsets)}"
        ),
    )
    for tensor_id, offset in zip(tensor_ids, offsets, strict=True):
        check_place(tensor_id, offset)
    if not count:
        return
    first = tensors[0]
    for tensor in (*tensors, *sources):
        require(
            tensor.is_floating_point() and tensor.dtype == first.dtype and tensor.is_contiguous(),
            lambda tensor=tensor: (  # type: ignore[misc]
                f"tensors, sources: expected contiguous {first.dtype}, floating, got {tensor.dtype} with strides {tensor.stride()}"
            ),
        )
        require(
            tensor.device == first.device,
            lambda tensor=tensor: f"tensors, sources: expected all on {first.device}, got one on {tensor.device}",  # type: ignore[misc]
        )
    for tensor, source in zip(tensors, sources, strict=bool(sources)):
        require(
            tensor.numel() == source.numel(),
            lambda tensor=tensor, source=source: (  # type: ignore[misc]
                f"sources: expected {tensor.numel()} elements, got {source.numel()}"
            ),
        )
    _check_terms(first, count, seeds, coefficients, decay, thresholds)
    if rounding_seed is not None:
        check_seed(rounding_seed)
        require(
            rounding_seed.device == first.device,
            lambda: f"rounding_seed: expected on {first.device}, got on {rounding_seed.device}",
        )


def _compiled_perturb(namespace: str):  # type: ignore[no-untyped-def]
    def run(tensors: Sequence[Tensor], sources: Sequence[Tensor], *rest: object) -> None:
        if tensors:
            *terms, tensor_ids, offsets, rademacher = rest
            given = sources if sources else tensors
            apply = getattr(torch.ops, namespace).zo_apply.default
            apply(given, tensors, [], *terms, tensor_ids, offsets, rademacher)

    return run


def _triton_perturb(
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor | None,
    thresholds: Tensor | None,
    rounding_seed: Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    rademacher: bool,
) -> None:
    if not tensors:
        return
    first = tensors[0]
    config = configs.perturb(dtype_name(first.dtype), rademacher, device_of(first))
    given = sources if sources else tensors
    with on_device(first):
        kernels("zeroth_order").perturb(
            given, tensors, None, seeds, coefficients, decay, thresholds, rounding_seed, tensor_ids, offsets, rademacher, config
        )  # fmt: skip


def _reference_perturb(
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor | None,
    thresholds: Tensor | None,
    rounding_seed: Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    rademacher: bool,
) -> None:
    for i, (tensor, source) in enumerate(zip(tensors, sources or tensors, strict=True)):
        threshold = None if thresholds is None else thresholds[i]
        moved = definition.perturbed(
            source, seeds, coefficients, decay, threshold, rounding_seed, tensor_ids[i], offsets[i], rademacher
        )
        tensor.copy_(moved.reshape(tensor.shape))


def _check_perturbation(
    seed: Tensor, shape: Sequence[int], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
) -> None:
    check_seed(seed)
    check_place(tensor_id, offset)
    require(dtype.is_floating_point, lambda: f"dtype: expected a floating dtype, got {dtype}")


def _fake_perturbation(
    seed: Tensor, shape: Sequence[int], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
) -> Tensor:
    return seed.new_empty(tuple(shape), dtype=dtype)


def _compiled_perturbation(namespace: str):  # type: ignore[no-untyped-def]
    def run(
        seed: Tensor, shape: Sequence[int], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=seed.device)
        one = torch.ones(1, dtype=torch.float32, device=seed.device)
        apply = getattr(torch.ops, namespace).zo_apply.default
        apply([], [out], [], seed.reshape(1), one, None, None, None, [tensor_id], [offset], rademacher)
        return out

    return run


def _triton_perturbation(
    seed: Tensor, shape: Sequence[int], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=seed.device)
    config = configs.perturb(dtype_name(dtype), rademacher, device_of(seed))
    one = torch.ones(1, dtype=torch.float32, device=seed.device)
    with on_device(seed):
        kernels("zeroth_order").perturb(
            None, [out], None, seed.reshape(1), one, None, None, None, [tensor_id], [offset], rademacher, config
        )
    return out


def _reference_perturbation(
    seed: Tensor, shape: Sequence[int], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
) -> Tensor:
    return definition.perturbation(seed, tuple(shape), tensor_id, offset, rademacher, dtype)


def check_pair(
    weight: Tensor,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    offset: int,
    rademacher: bool,
) -> None:
    require(
        weight.is_floating_point() and weight.is_contiguous(),
        lambda: f"weight: expected floating and contiguous, got {weight.dtype} with strides {weight.stride()}",
    )
    check_seed(seed)
    require(seed.device == weight.device, lambda: f"seed: expected on {weight.device}, got on {seed.device}")
    check_place(tensor_id, offset)
    check_one_float("eps", eps, weight)
    if threshold is not None:
        check_one_float("threshold", threshold, weight)


def _fake_pair(weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight)


def compiled_pair_into(namespace: str):  # type: ignore[no-untyped-def]
    def run(
        weight: Tensor,
        plus: Tensor,
        minus: Tensor,
        seed: Tensor,
        eps: Tensor,
        threshold: Tensor | None,
        tensor_id: int,
        offset: int,
        rademacher: bool,
    ) -> None:
        """Both moves of ``weight``, contiguous as they are; ``plus`` may be its memory."""
        threshold = None if threshold is None else threshold.reshape(1)
        terms = (seed.reshape(1), eps.reshape(1), None, threshold, None)
        apply = getattr(torch.ops, namespace).zo_apply.default
        apply([weight], [plus], [minus], *terms, [tensor_id], [offset], rademacher)

    return run


def triton_pair_into(
    weight: Tensor,
    plus: Tensor,
    minus: Tensor,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    offset: int,
    rademacher: bool,
) -> None:
    config = configs.perturb(dtype_name(weight.dtype), rademacher, device_of(weight))
    with on_device(weight):
        kernels("zeroth_order").perturb(
            [weight], [plus], [minus], seed.reshape(1), eps.reshape(1), None, threshold, None, [tensor_id], [offset],
            rademacher, config
        )  # fmt: skip


def _new_pair(into):  # type: ignore[no-untyped-def]
    def run(
        weight: Tensor,
        seed: Tensor,
        eps: Tensor,
        threshold: Tensor | None,
        tensor_id: int,
        offset: int,
        rademacher: bool,
    ) -> tuple[Tensor, Tensor]:
        plus, minus = torch.empty_like(weight), torch.empty_like(weight)
        into(weight, plus, minus, seed, eps, threshold, tensor_id, offset, rademacher)
        return plus, minus

    return run


def _compiled_pair(namespace: str):  # type: ignore[no-untyped-def]
    return _new_pair(compiled_pair_into(namespace))


def _reference_pair(
    weight: Tensor, seed: Tensor, eps: Tensor, threshold: Tensor | None, tensor_id: int, offset: int, rademacher: bool
) -> tuple[Tensor, Tensor]:
    seeds, eps = seed.reshape(1), eps.reshape(1)
    plus, minus = (
        definition.perturbed(weight, seeds, each, None, threshold, None, tensor_id, offset, rademacher)
        for each in (eps, -eps)
    )
    return plus, minus


def _tensors(arguments: Sequence[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found.extend(item for item in argument if isinstance(item, Tensor))
    return found


def _takes_dtype(arguments: Sequence[object]) -> Verdict:
    for argument in arguments:
        if isinstance(argument, torch.dtype) and argument not in FLOAT_DTYPES:
            return False, f"the fused kernels give float32, bfloat16 and float16, asked for {argument}"
    return True, ""


def cpu_accepts(*arguments: object) -> Verdict:
    ok, reason = takes_cpu(*_tensors(arguments))
    return _takes_dtype(arguments) if ok else (ok, reason)


def triton_accepts(*arguments: object) -> Verdict:
    ok, reason = takes_triton(*_tensors(arguments))
    return _takes_dtype(arguments) if ok else (ok, reason)


def _cuda_accepts(*arguments: object) -> Verdict:
    for tensor in _tensors(arguments):
        if not tensor.is_cuda:
            return False, f"the CUDA library serves CUDA tensors, these are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return False, f"the CUDA library takes float32, bfloat16 and float16, got {tensor.dtype}"
    return _takes_dtype(arguments)


def _table(compiled, triton, definition_of):  # type: ignore[no-untyped-def]
    return (
        Implementation("cuda", native.cuda_available, _cuda_accepts, compiled("peftfast_cuda")),
        Implementation("cpu", cpu_available, cpu_accepts, compiled("peftfast_cpu")),
        Implementation("triton", triton_available, triton_accepts, triton),
        reference(definition_of),
    )


perturb_ = Operator(
    "perturb_",
    f"(Tensor(a!)[] tensors, Tensor[] sources, {_TERMS}, int[] tensor_ids, int[] offsets, bool rademacher) -> ()",
    check=_check_perturb,
    fake=lambda *_: None,
    implementations=_table(_compiled_perturb, _triton_perturb, _reference_perturb),
)

perturbation = Operator(
    "perturbation",
    "(Tensor seed, SymInt[] shape, int tensor_id, int offset, bool rademacher, ScalarType dtype) -> Tensor",
    check=_check_perturbation,
    fake=_fake_perturbation,
    implementations=_table(_compiled_perturbation, _triton_perturbation, _reference_perturbation),
)

perturbed_pair = Operator(
    "perturbed_pair",
    "(Tensor weight, Tensor seed, Tensor eps, Tensor? threshold, int tensor_id, int offset, bool rademacher) -> (Tensor, Tensor)",
    check=check_pair,
    fake=_fake_pair,
    implementations=_table(_compiled_pair, _new_pair(triton_pair_into), _reference_pair),
)
