"""A frozen weight and a sparse delta on it: the passes of the layer, the optimiser's step, and the choice of a support.

Dimensions: M rows of x, K input features, N output features, S active weights. ``indices`` are flat row-major positions in the
weight ``[N, K]``, ascending and distinct. Sums are formed in float32, or in float64 where the tensors are.
"""

import torch
from torch import Tensor
from torch.nn import functional

from . import philox

STREAM_ROUNDING = 2  # 16-bit draws, 8 to a counter


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sparse_delta_dvalues(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of dyᵀ x at ``indices``, Δ's gradient, ``[S]`` of ``dtype``; dy ``[M, N]`` and x ``[M, K]`` of one dtype."""
    wide = wide_dtype(dy.dtype)
    return (dy.to(wide).T @ x.to(wide)).reshape(-1)[indices.long()].to(dtype)


def sparse_delta_blocks(
    dy: Tensor, x: Tensor, blocks: Tensor, block_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    """The same for square blocks of the weight, ``[count]``. ``blocks``: int64 ``[T, 4]``, of each its first row (of dyᵀ) and its first
    column, multiples of 16, the place of its first entry in the result, and how far apart its rows lie there. Entries of
    no block are 0."""
    wide = wide_dtype(dy.dtype)
    out = torch.zeros(count, dtype=dtype, device=dy.device)
    for row, column, start, stride in blocks.tolist():
        entries = dy[:, row : row + block_size].to(wide).T @ x[:, column : column + block_size].to(wide)
        out.as_strided((block_size, block_size), (stride, 1), start).copy_(entries)
    return out


def sparse_delta_patch(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """weight with ``values`` added at ``indices``: the sums in float32, each rounded once to weight's dtype."""
    flat, at = weight.reshape(-1).clone(), indices.long()
    wide = wide_dtype(weight.dtype)
    flat[at] = (flat[at].to(wide) + values.to(wide)).to(weight.dtype)
    return flat.reshape(weight.shape)


def sparse_delta_product(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """y + x Δᵀ, summed in the dtype of ``values`` ``[S]``, that of sums of x, and rounded once to y's; y ``[M, N]`` of that dtype or of
    x's, x ``[M, K]``."""
    n, k = y.shape[1], x.shape[1]
    delta = torch.zeros(n * k, dtype=values.dtype, device=y.device).index_put((indices.long(),), values)
    return (y.to(values.dtype) + x.to(values.dtype) @ delta.reshape(n, k).T).to(y.dtype)


def sparse_delta_write(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> Tensor:
    """weight with round(base + values) put at ``indices``, or base itself without values; base ``[S]`` of weight's dtype."""
    flat, wide = weight.reshape(-1).clone(), wide_dtype(weight.dtype)
    flat[indices.long()] = base if values is None else (base.to(wide) + values.to(wide)).to(weight.dtype)
    return flat.reshape(weight.shape)


def sparse_delta_linear(
    x: Tensor, weight: Tensor, indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x (W + Δ)ᵀ + b, differentiable by autograd in x, values, bias and weight; x ``[..., K]``."""
    delta = torch.zeros(weight.numel(), dtype=values.dtype, device=values.device).index_put((indices.long(),), values)
    return functional.linear(x, weight + delta.to(weight.dtype).reshape(weight.shape), bias)


def adam_corrections(beta1: float, beta2: float, ages: int) -> Tensor:
    """float32 ``[2, ages]``: 1 / (1 - beta1^age) and 1 / sqrt(1 - beta2^age), computed in float64 on the CPU and rounded once, so that
    every implementation multiplies by the same bits. Age 0, which no step has, stands as 1."""
    age = torch.arange(ages, dtype=torch.float64, device="cpu")
    first = 1.0 / (1.0 - torch.tensor(beta1, dtype=torch.float64, device="cpu") ** age)
    second = 1.0 / (1.0 - torch.tensor(beta2, dtype=torch.float64, device="cpu") ** age).sqrt()
    table = torch.stack((first, second))
    table[:, :1] = 1.0
    return table.float()


def stochastic_bf16(value: Tensor, indices: Tensor, seed: Tensor, tensor_id: int) -> Tensor:
    """float32 rounded to bfloat16, up with the probability of the part cut off: the draw of weight element e is draw e % 8 of counter
    e // 8, stream 2. Infinities and NaN are rounded as ever."""
    at = indices.long()
    words = philox._words_at(seed, at // 8, tensor_id, STREAM_ROUNDING)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1, 8)
    draw = draws.gather(1, (at % 8)[:, None])[:, 0].to(torch.int64)
    bits = value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    cut = ((bits + draw) >> 16) << 16
    cut = torch.where(cut >= 1 << 31, cut - (1 << 32), cut)
    rounded = cut.to(torch.int32).view(torch.float32).to(torch.bfloat16)
    return torch.where(value.isfinite(), rounded, value.to(torch.bfloat16))


def sparse_adamw(
    values: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    hyper: Tensor,
    corrections: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One AdamW step (arXiv 1711.05101) with an age for every weight, as SpIEL's (arXiv 2401.16405); returns values, exp_avg,
    exp_avg_sq and age.

    Every product, sum, quotient and root is rounded once, in the order written: no fused multiply-add. ``hyper``: float32 ``[7]``, as
    :func:`adam_hyper` gives it. ``corrections``: :func:`adam_corrections`; an age beyond the table takes its last entry.
    """
    lr, beta1, rest1, beta2, rest2, eps, keep = hyper
    new_age = (age.to(torch.int64) + 1).clamp(max=torch.iinfo(age.dtype).max)
    at = new_age.clamp(min=0, max=corrections.shape[1] - 1)
    first = exp_avg * beta1 + grads * rest1
    second = exp_avg_sq * beta2 + (grads * rest2) * grads
    # The correctly rounded root, by way of float64: torch's own float32 root on a CPU is an ulp off for one value in five.
    root = second.double().sqrt().to(second.dtype)
    step = (lr * corrections[0][at]) * first / (root * corrections[1][at] + eps)
    return values * keep - step, first, second, new_age.to(age.dtype)


def adam_hyper(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Tensor:
    """float32 ``[7]``: lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, each rounded once from float64."""
    return torch.tensor(
        (lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay), dtype=torch.float64, device="cpu"
    ).float()


def sparse_adamw_write(
    values: Tensor, base: Tensor, indices: Tensor, weight: Tensor, seed: Tensor | None, tensor_id: int
) -> Tensor:
    """weight with round(base + values) at ``indices``; with a seed a bfloat16 weight is rounded stochastically."""
    if seed is None or weight.dtype != torch.bfloat16:
        return sparse_delta_write(weight, indices, base, values)
    flat = weight.reshape(-1).clone()
    flat[indices.long()] = stochastic_bf16(base.float() + values, indices, seed, tensor_id)
    return flat.reshape(weight.shape)


STATE_BLOCK = 256  # states in 8 bits that share a maximum


def state_codes() -> Tensor:
    """float32 ``[2, 256]``: what a byte of exp_avg and of exp_avg_sq stands for, as a part of its block's maximum, ascending.

    exp_avg: 0 and both signs of the powers of 2^(1/6) from 2^-21 to 1, at most 6 % from any part between, where one of the 256 is
    spare. exp_avg_sq: 0 and the powers of 2^(1/8) from 2^-31.75 to 1, at most 4.4 %. Logarithmic, and peftfast's own; states in
    blocks of 8 bits are the idea of Dettmers et al., arXiv 2110.02861.
    """
    signed = torch.exp2(-torch.arange(126, -1, -1, dtype=torch.float64, device="cpu") / 6)
    positive = torch.exp2(-torch.arange(254, -1, -1, dtype=torch.float64, device="cpu") / 8)
    zero, one = signed.new_zeros(1), signed.new_ones(1)
    return torch.stack((torch.cat((-signed.flip(0), zero, signed, one)), torch.cat((zero, positive)))).float()


def compress_states(states: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``[S]`` as uint8 ``[S]`` and the blocks' maxima, float32 ``[ceil(S / 256)]``: each state becomes the nearest part of its
    block's largest magnitude, of two equally near the lower byte; in a block with a NaN or an infinity, bytes that decode to NaN or 0.
    ``code``: a row of :func:`state_codes`."""
    count = states.numel()
    blocks = functional.pad(states, (0, -count % STATE_BLOCK)).reshape(-1, STATE_BLOCK)
    largest = blocks.abs().amax(1)
    parts = blocks / torch.where(largest == 0, 1.0, largest)[:, None]
    middles = (code[1:] + code[:-1]) / 2
    return torch.bucketize(parts, middles).to(torch.uint8).reshape(-1)[:count].clone(), largest


def expand_states(compressed: Tensor, largest: Tensor, code: Tensor) -> Tensor:
    """float32 ``[S]``."""
    return code[compressed.long()] * largest.repeat_interleave(STATE_BLOCK)[: compressed.numel()]


def sparse_adamw8(
    values: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_max: Tensor,
    exp_avg_sq_max: Tensor,
    age: Tensor,
    hyper: Tensor,
    corrections: Tensor,
) -> tuple[Tensor, ...]:
    """:func:`sparse_adamw` on states in 8 bits, which are expanded, stepped and compressed again; returns values, exp_avg, exp_avg_sq,
    exp_avg_max, exp_avg_sq_max and age."""
    codes = state_codes().to(values.device)
    states = expand_states(exp_avg, exp_avg_max, codes[0]), expand_states(exp_avg_sq, exp_avg_sq_max, codes[1])
    new, first, second, new_age = sparse_adamw(values, grads, *states, age, hyper, corrections)
    (first, first_max), (second, second_max) = compress_states(first, codes[0]), compress_states(second, codes[1])
    return new, first, second, first_max, second_max, new_age


def top_positions(scores: Tensor, count: int, excluded: Tensor | None = None) -> Tensor:
    """The positions of the ``count`` largest of ``scores``, ascending, none of ``excluded`` among them; of equal scores the lowest
    positions. NaN is below everything."""
    flat = scores.reshape(-1).clone().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    allowed = torch.ones_like(flat, dtype=torch.bool)
    if excluded is not None:
        allowed[excluded.long()] = False
    positions = allowed.nonzero()[:, 0]
    order = torch.sort(flat[positions], descending=True, stable=True).indices
    return positions[order[:count]].sort().values


def sm3_step(
    values: Tensor, grads: Tensor, rows: Tensor, columns: Tensor, indices: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One SM3 step on the support (arXiv 1901.11150); returns values, rows ``[N]`` and columns ``[K]``. A maximum has no order, so the
    accumulators are the same whatever the order of the support."""
    at = indices.long()
    row, column = at // columns.numel(), at % columns.numel()
    bound = torch.minimum(rows[row], columns[column]) + grads * grads
    new_values = values - lr * grads / (bound + eps).sqrt()
    return (
        new_values,
        rows.scatter_reduce(0, row, bound, "amax", include_self=True),
        columns.scatter_reduce(0, column, bound, "amax", include_self=True),
    )
