"""AdamW on the values of sparse deltas in Triton, one launch for all layers of a kind (the definitions are
peftfast.reference.sparse_delta). Indices outside the weight write nothing."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import convert, narrow, widen
from .philox import words_at

_STREAM_ROUNDING = tl.constexpr(2)
_TABLE_COLUMNS = tl.constexpr(13)  # a layer's row: eight addresses, active weights, weights, tensor id, two addresses
_STATE_BLOCK = tl.constexpr(256)  # states in bytes that share a maximum
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTEGERS = {torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit
def _address(table_ptr, column: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype), bitcast=True)
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _rounded(total, element, seed_ptr, tensor_id):
    """float32 total in bfloat16, up with the probability of what is cut off; element is the position in the weight."""
    word0, word1, word2, word3 = words_at(
        tl.load(seed_ptr), element // 8, tensor_id, tl.full((), _STREAM_ROUNDING, tl.int32)
    )
    draw = element % 8
    word = tl.where(draw < 4, tl.where(draw < 2, word0, word1), tl.where(draw < 6, word2, word3))
    draw_bits = tl.where(draw % 2 == 0, word & 0xFFFF, word >> 16)
    bits = total.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    up = ((bits + draw_bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, up, narrow(total, tl.bfloat16))


@triton.jit
def _over(fraction, middle: tl.constexpr):
    return (fraction > middle).to(tl.int32)


@triton.jit
def _state_byte(part, SIGNED: tl.constexpr):
    """The byte of a state that is ``part`` of its block's maximum, by counting the middles below it: csrc/sparse_delta.h says why the
    fractions are the same in every octave."""
    bits = part.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    negative = bits < 0
    if SIGNED:
        key = size + negative.to(tl.int32)
        fraction = key & 0x7FFFFF
        steps = (key >> 23) * 6 - 635
        steps += _over(fraction, 0x07D66B) + _over(fraction, 0x1878F7) + _over(fraction, 0x2B2506)
        steps += _over(fraction, 0x401A74) + _over(fraction, 0x57A0F2) + _over(fraction, 0x7208F8)
        steps = tl.where(key <= (105 << 23), 0, tl.maximum(steps, 1))
        byte = tl.where(negative, 127 - steps, 127 + steps)
    else:
        fraction = size & 0x7FFFFF
        steps = (size >> 23) * 8 - 761
        steps += _over(fraction, 0x05CAE1) + _over(fraction, 0x11E6D9) + _over(fraction, 0x1F1B64)
        steps += _over(fraction, 0x2D81E5) + _over(fraction, 0x3D360E) + _over(fraction, 0x4E5614)
        steps += _over(fraction, 0x6102E2) + _over(fraction, 0x756064)
        steps = tl.where(size <= (94 << 23) + 0x1837F0, 0, tl.maximum(steps, 1))
        byte = tl.where(negative, 0, steps)
    return tl.where(size > 0x7F800000, 255, byte)


@triton.jit
def _read_states(row_ptr, codes_ptr, column: tl.constexpr, offs, mask):
    """Bytes decoded; their maxima lie in the column that is 9 further on."""
    byte = tl.load(_address(row_ptr, column, tl.uint8, True) + offs, mask=mask, other=0)
    largest = tl.load(_address(row_ptr, column + 9, tl.float32, True) + offs // _STATE_BLOCK, mask=mask, other=0.0)
    return tl.load(codes_ptr + (column - 2) * 256 + byte.to(tl.int32)) * largest


@triton.jit
def _write_states(row_ptr, column: tl.constexpr, states, offs, first, count, mask, BLOCK: tl.constexpr):
    parts: tl.constexpr = BLOCK // _STATE_BLOCK
    states = tl.where(mask, states, 0.0)
    size = states.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN is above infinity
    most = tl.max(size.reshape(parts, _STATE_BLOCK), 1)
    spread = tl.broadcast_to(most[:, None], (parts, _STATE_BLOCK)).reshape(BLOCK)
    unit = tl.where(spread == 0, 1.0, spread.to(tl.float32, bitcast=True))
    byte = _state_byte(tl.div_rn(states, unit), column == 2)
    tl.store(_address(row_ptr, column, tl.uint8, True) + offs, byte.to(tl.uint8), mask=mask)
    offs_blocks = first // _STATE_BLOCK + tl.arange(0, parts)
    blocks = (count + _STATE_BLOCK - 1) // _STATE_BLOCK
    largest_ptrs = _address(row_ptr, column + 9, tl.float32, True) + offs_blocks
    tl.store(largest_ptrs, narrow(most.to(tl.float32, bitcast=True), tl.float32), mask=offs_blocks < blocks)


@triton.jit
def _adamw_block(
    row_ptr,
    first,
    count,
    codes_ptr,
    hyper_ptr,
    corrections_ptr,
    seed_ptr,
    ages,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    AGE: tl.constexpr,
    OLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    offs = first + tl.arange(0, BLOCK)
    if FULL:
        mask = tl.full((BLOCK,), True, tl.int1)
    else:
        mask = offs < count
    value_ptrs = _address(row_ptr, 0, tl.float32, True) + offs
    age_ptrs = _address(row_ptr, 4, AGE, True) + offs
    if codes_ptr is not None:
        average = _read_states(row_ptr, codes_ptr, 2, offs, mask)
        second = _read_states(row_ptr, codes_ptr, 3, offs, mask)
    else:
        average = tl.load(_address(row_ptr, 2, tl.float32, True) + offs, mask=mask, other=0.0)
        second = tl.load(_address(row_ptr, 3, tl.float32, True) + offs, mask=mask, other=0.0)
    lr = tl.load(hyper_ptr)
    grad = tl.load(_address(row_ptr, 1, tl.float32, True) + offs, mask=mask, other=0.0)
    age = tl.load(age_ptrs, mask=mask, other=0).to(tl.int32)
    age = tl.where(age == OLDEST, age, age + 1)
    at = tl.minimum(tl.maximum(age, 0), ages - 1)
    correction1 = tl.load(corrections_ptr + at, mask=mask, other=1.0)
    correction2 = tl.load(corrections_ptr + ages + at, mask=mask, other=1.0)
    average = average * tl.load(hyper_ptr + 1) + grad * tl.load(hyper_ptr + 2)
    second = second * tl.load(hyper_ptr + 3) + (grad * tl.load(hyper_ptr + 4)) * grad
    step = tl.div_rn((lr * correction1) * average, tl.sqrt_rn(second) * correction2 + tl.load(hyper_ptr + 5))
    value = tl.load(value_ptrs, mask=mask, other=0.0) * tl.load(hyper_ptr + 6) - step
    if codes_ptr is not None:
        _write_states(row_ptr, 2, average, offs, first, count, mask, BLOCK)
        _write_states(row_ptr, 3, second, offs, first, count, mask, BLOCK)
    else:
        tl.store(_address(row_ptr, 2, tl.float32, True) + offs, narrow(average, tl.float32), mask=mask)
        tl.store(_address(row_ptr, 3, tl.float32, True) + offs, narrow(second, tl.float32), mask=mask)
    tl.store(age_ptrs, narrow(age, AGE), mask=mask)
    tl.store(value_ptrs, narrow(value, tl.float32), mask=mask)
    if WEIGHT is not None:
        index = tl.load(_address(row_ptr, 6, INDEX, False) + offs, mask=mask, other=0)
        inside = mask & (index >= 0) & (index < tl.load(row_ptr + 9))
        base = tl.load(_address(row_ptr, 7, WEIGHT, False) + offs, mask=mask, other=0.0)
        total = widen(base) + value
        weight_ptrs = _address(row_ptr, 5, WEIGHT, False) + index
        if seed_ptr is not None and WEIGHT == tl.bfloat16:
            rounded = _rounded(total, index.to(tl.int64), seed_ptr, tl.load(row_ptr + 10))
            tl.store(weight_ptrs, convert(rounded, WEIGHT), mask=inside)
        else:
            tl.store(weight_ptrs, narrow(total, WEIGHT), mask=inside)


@triton.jit(do_not_specialize=["ages"])
def _sparse_adamw_kernel(
    table_ptr,
    layer_ptr,
    first_ptr,
    codes_ptr,
    hyper_ptr,
    corrections_ptr,
    seed_ptr,
    ages,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    AGE: tl.constexpr,
    OLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one layer. Every operation is rounded alone: the kernel must be compiled with enable_fp_fusion=False."""
    row_ptr = table_ptr + tl.load(layer_ptr + tl.program_id(0)).to(tl.int64) * _TABLE_COLUMNS
    first = tl.multiple_of(tl.load(first_ptr + tl.program_id(0)), 16)
    count = tl.load(row_ptr + 8)
    # A full block needs no mask, and without one every access to a float32 array is of 16 bytes.
    if first + BLOCK <= count:
        _adamw_block(
            row_ptr, first, count, codes_ptr, hyper_ptr, corrections_ptr, seed_ptr, ages,
            WEIGHT, INDEX, AGE, OLDEST, BLOCK, True,
        )  # fmt: skip
    else:
        _adamw_block(
            row_ptr, first, count, codes_ptr, hyper_ptr, corrections_ptr, seed_ptr, ages,
            WEIGHT, INDEX, AGE, OLDEST, BLOCK, False,
        )  # fmt: skip


def sparse_adamw_(
    table: torch.Tensor,
    layer: torch.Tensor,
    first: torch.Tensor,
    codes: torch.Tensor | None,
    hyper: torch.Tensor,
    corrections: torch.Tensor,
    seed: torch.Tensor | None,
    dtype: torch.dtype | None,
    index_dtype: torch.dtype,
    age_dtype: torch.dtype,
    config,
) -> None:
    """One step for all layers of ``table``, int64 ``[layers, 13]``: the addresses of values, grads, exp_avg, exp_avg_sq, age, weight,
    indices and base, the first five multiples of 16; active weights; weights; tensor id; the addresses of exp_avg's and exp_avg_sq's
    maxima, multiples of 16. ``layer`` and ``first``: of each program. With ``codes``, float32 ``[2, 256]``, both states are bytes."""
    if layer.numel():
        launch(
            _sparse_adamw_kernel,
            (layer.numel(),),
            table,
            layer,
            first,
            codes,
            hyper,
            corrections,
            seed,
            corrections.shape[1],
            WEIGHT=None if dtype is None else _DTYPES[dtype],
            INDEX=_INTEGERS[index_dtype],
            AGE=_INTEGERS[age_dtype],
            OLDEST=torch.iinfo(age_dtype).max,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
