"""Several LoRA projections of one x, and several adapters on one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import lora_group, lora_projections
from . import plain as plain_layers
from .derivatives import by_definition
from .dora import row_gain
from .lora import _check_arguments, _seed_tensor, draw_seed
from .lora_group import Plan
from .lora_projections import Projections, projections_of
from .nf4 import NF4Weight
from .precision import autocast_off, autocast_on, compute_dtype_of


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of :func:`lora_linears`: :func:`lora_linear`'s arguments."""

    weight: Tensor | NF4Weight
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | int | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of :func:`multi_lora_linear`: what of :func:`lora_linear`'s arguments is the adapter's own."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    lora_bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | int | None = None


def _draw_seeds(x: Tensor, ps: Sequence[float], given: Sequence[Tensor | int | None]) -> Tensor | None:
    """One int64 a term, by one draw for all that are not given; None without dropout."""
    if not any(ps):
        return None
    if all(seed is None for seed in given):
        return draw_seed(x, len(ps))
    own = [draw_seed(x) if seed is None else _seed_tensor(seed, x).reshape(1) for seed in given]
    return torch.cat(own)


def _plain(
    x: Tensor, projections: Any, terms: Any, rows: Any, dtype: torch.dtype, out_dtype: torch.dtype
) -> Projections | None:
    """The tensors of a call that is the plain case; None for another. The compiler traces the general Function alone."""
    if rows is not None or x.dtype is not dtype or out_dtype is not dtype or torch.compiler.is_compiling():
        return None
    if any(len(own) != 1 for own in terms) or any(magnitude is not None for _, _, magnitude in projections):
        return None
    own = [term for (term,) in terms]
    weights, biases, _ = zip(*projections, strict=True)
    factors = ([term.lora_a for term in own], [term.lora_b for term in own])
    found = projections_of(dtype, weights, *factors, biases, [term.lora_bias for term in own])
    return found if found is not None and found.uniform() else None


def apply_group(
    x: Tensor,
    projections: Sequence[tuple[Tensor | NF4Weight, Tensor | None, Tensor | None]],
    terms: Sequence[Sequence[Any]],
    rows: Tensor | None,
    training: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Projections (weight, bias, magnitude) of x, each with its terms: objects with the fields of :class:`Adapter`. Nothing is
    checked."""
    with autocast_off(x.device.type):
        flat = [term for own in terms for term in own]
        ps = tuple(float(term.dropout_p) if training else 0.0 for term in flat)
        seeds = _draw_seeds(x, ps, [term.seed for term in flat])
        if by_definition():
            return plain_layers.group(x, projections, terms, rows, seeds, ps, dtype, out_dtype)
        plain = _plain(x, projections, terms, rows, dtype, out_dtype)
        if plain is not None:
            scalings = tuple(float(term.scaling) for term in flat)
            return lora_projections.by_library.apply(x, seeds, ps, scalings, plain, *plain.a, *plain.b)
        tensors: list[Any] = []
        quantised: list[Any] = []
        for (weight, bias, magnitude), own in zip(projections, terms, strict=True):
            gain = None
            if magnitude is not None:
                (term,) = own
                gain = row_gain(weight, term.lora_a, term.lora_b, float(term.scaling), magnitude, dtype)
            if isinstance(weight, NF4Weight):
                packed, absmax, code, block_size, shape, *nested = weight.storage()
                quantised.append((block_size, tuple(shape)))
                tensors += [packed, absmax, code, *nested, bias, gain]
            else:
                quantised.append(None)
                tensors += [weight, None, None, None, None, None, bias, gain]
        for term in flat:
            tensors += [term.lora_a, term.lora_b, term.lora_bias]
        plan = Plan(
            dtype,
            out_dtype,
            tuple(len(own) for own in terms),
            tuple(magnitude is not None for _, _, magnitude in projections),
            tuple(quantised),
            ps,
            tuple(float(term.scaling) for term in flat),
        )
        results = lora_group.by_library.apply(x.reshape(-1, x.shape[-1]), rows, seeds, tuple(plan), *tensors)
        return tuple(
            y.reshape(*x.shape[:-1], weight.shape[0]) for y, (weight, _, _) in zip(results, projections, strict=True)
        )


def _dtypes(x: Any, compute_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype, bool]:
    """Of the products, of the result, and whether a dense weight may have another dtype."""
    if not isinstance(x, Tensor):
        return torch.float32, torch.float32, False
    dtype = compute_dtype_of(x, compute_dtype)
    return dtype, dtype if compute_dtype is None else x.dtype, compute_dtype is not None or autocast_on(x.device.type)


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Several LoRA projections of one x, as q, k, v or gate, up: what :func:`lora_linear` gives for each, with one pass over x for all
    S, one for all dA, and one dX that the products add to as they are formed.

    Each projection has its own weight (dense or 4-bit), rank, scaling, mask, bias and magnitude.

    Args:
        x: ``[..., K]``, as :func:`lora_linear` takes it.
        projections: at least one :class:`Projection` of K input features.
        training, compute_dtype: as in :func:`lora_linear`, for all.

    Returns:
        One ``[..., N]`` for each projection, in order.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ``projections[i].`` before a projection's own.
    """
    projections = tuple(projections) if isinstance(projections, Sequence) else projections
    if not isinstance(projections, tuple) or not all(isinstance(one, Projection) for one in projections):
        raise TypeError(f"projections: expected a sequence of Projection, got {projections!r:.80}")
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    dtype, out_dtype, cast_weight = _dtypes(x, compute_dtype)
    for i, one in enumerate(projections):
        factors = (one.lora_a, one.lora_b, one.bias, one.lora_bias, one.magnitude)
        options = (one.dropout_p, one.scaling, one.seed, dtype, cast_weight)
        _check_own(f"projections[{i}].", ("x:",), x, one.weight, *factors, *options)
    return apply_group(
        x,
        [(one.weight, one.bias, one.magnitude) for one in projections],
        [(one,) for one in projections],
        None,
        training,
        dtype,
        out_dtype,
    )


def _check_own(prefix: str, shared: tuple[str, ...], x: Any, *arguments: Any) -> None:
    """lora_linear's checks, with ``prefix`` before what they complain of unless that is ``shared``."""
    try:
        _check_arguments(x, *arguments)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise type(error)(text if text.startswith(shared) else prefix + text) from None


def _row_ids(rows: Any, x: Tensor, count: int) -> Tensor:
    """int32 [M] of what the caller gave: one id for each index of x's leading dimension, or for each row."""
    if isinstance(rows, Tensor):
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows: expected int32 or int64, got {rows.dtype}")
    elif isinstance(rows, Sequence) and all(isinstance(one, int) for one in rows):
        rows = torch.tensor(rows, dtype=torch.int32, device="cpu")
    else:
        raise TypeError(f"rows: expected a tensor or a sequence of ints, got {type(rows).__name__}")
    shapes = (tuple(x.shape[:1]), tuple(x.shape[:-1]))
    if x.dim() < 2 or tuple(rows.shape) not in shapes:
        raise ValueError(
            f"rows: expected shape {shapes[0]} or {shapes[-1]} for x of {tuple(x.shape)}, got {tuple(rows.shape)}"
        )
    if rows.device.type == "cpu" and rows.numel() and not torch.compiler.is_compiling():
        least, largest = int(rows.min()), int(rows.max())
        if least < -1 or largest >= count:
            raise ValueError(f"rows: expected ids in [-1, {count}), got {least} to {largest}")
    total = x.shape[:-1].numel()
    # A pinned tensor would be read after this call has returned, when its owner may have written the next batch's ids into it. What is
    # compiled cannot ask whether it is one.
    leaves = rows.device.type == "cpu" and x.device.type != "cpu"
    waits = leaves and (torch.compiler.is_compiling() or rows.is_pinned())
    ids = rows.reshape(-1).to(x.device, torch.int32, non_blocking=not waits)
    return ids if ids.numel() == total else ids.repeat_interleave(total // max(ids.numel(), 1))


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    adapters: Sequence[Adapter],
    rows: Tensor | Sequence[int] | None = None,
    *,
    bias: Tensor | None = None,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + b + adapters, where each row of x names its own: a batch that mixes adapters, forward and backward, in one pass for all of
    them, whatever their number, ranks and scalings (as Punica's and S-LoRA's kernels serve, arXiv 2310.18547, 2311.03285). Without
    ``rows`` every adapter acts on every row and their terms are summed, as PEFT's several active adapters.

    Args:
        x: ``[..., K]``, at least 2-D where ``rows`` is given.
        weight: ``[N, K]`` in the compute dtype, or an :class:`NF4Weight`.
        adapters: at least one :class:`Adapter`.
        rows: int32 or int64, one adapter's index for each index of x's leading dimension or for each row, -1 for the base alone.
            Rows of one adapter that lie together are served fastest. On a GPU the values are not checked, which would wait for the
            device; what is no index is the base.
        bias: ``[N]``.
        training, compute_dtype: as in :func:`lora_linear`.

    Returns:
        ``[..., N]``, as :func:`lora_linear` gives it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ``adapters[i].`` before an adapter's own.
    """
    adapters = tuple(adapters) if isinstance(adapters, Sequence) else adapters
    if not isinstance(adapters, tuple) or not all(isinstance(one, Adapter) for one in adapters):
        raise TypeError(f"adapters: expected a sequence of Adapter, got {adapters!r:.80}")
    if not adapters:
        raise ValueError("adapters: expected at least one, got none")
    dtype, out_dtype, cast_weight = _dtypes(x, compute_dtype)
    for i, one in enumerate(adapters):
        factors = (one.lora_a, one.lora_b, bias, one.lora_bias, None)
        options = (one.dropout_p, one.scaling, one.seed, dtype, cast_weight)
        _check_own(f"adapters[{i}].", ("x:", "weight:", "bias:"), x, weight, *factors, *options)
    ids = None if rows is None else _row_ids(rows, x, len(adapters))
    return apply_group(x, [(weight, bias, None)], [adapters], ids, training, dtype, out_dtype)[0]
