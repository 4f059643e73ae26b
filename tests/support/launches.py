"""Each launcher called as the operators call it, on meta tensors, for the compile gate."""

from dataclasses import replace

import torch

from peftfast.configs import gated_activation as gated_configs
from peftfast.configs import lora as lora_configs
from peftfast.configs import lora_product as product_configs
from peftfast.configs import lora_terms as terms_configs
from peftfast.configs import nf4 as nf4_configs
from peftfast.configs import nf4_product as nf4_product_configs
from peftfast.configs import philox as philox_configs
from peftfast.configs import sparse_delta as sparse_configs
from peftfast.configs import zeroth_order as zo_configs
from peftfast.configs.device import Device
from peftfast.kernels import (
    gated_activation as gated_kernels,
)
from peftfast.kernels import (
    lora,
    lora_dora,
    lora_product,
    lora_terms,
    nf4,
    philox,
    sparse_adamw,
    sparse_delta,
    zeroth_order,
    zeroth_order_linear,
)
from peftfast.kernels import nf4_linear as nf4_linear_kernels
from peftfast.kernels import nf4_product as nf4_product_kernels
from peftfast.kernels import nf4_quantize as nf4_quantize_kernels

DEVICES = {
    80: Device("", (8, 0), 108),
    89: Device("", (8, 9), 128),
    90: Device("", (9, 0), 132),
    100: Device("", (10, 0), 148),
    120: Device("", (12, 0), 170),
}


def _empty(*shape: int, dtype: str | torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, device="meta")


def _seed(dropout: bool) -> torch.Tensor | None:
    return _empty(1, dtype=torch.int64) if dropout else None


def lora_shrink(
    M: int,
    R: int,
    wide: str,
    narrow: str,
    compute: str,
    dropout: bool,
    arch: int,
    K: int = 4096,
    transposed: bool = False,
) -> None:
    x = _empty(M, K, dtype=wide)
    w = _empty(K, R, dtype=narrow).T if transposed else _empty(R, K, dtype=narrow)
    config = lora_configs.lora_shrink(M, K, R, wide, narrow, compute, dropout, DEVICES[arch])
    lora.lora_shrink(x, w, _seed(dropout), 0.1, 1.0, getattr(torch, compute), config)


def lora_expand(
    M: int,
    R: int,
    wide: str,
    narrow: str,
    compute: str,
    dropout: bool,
    arch: int,
    N: int = 4096,
    transposed: bool = False,
    bias: bool = False,
) -> None:
    base = _empty(M, N, dtype=wide)
    w = _empty(R, N, dtype=narrow).T if transposed else _empty(N, R, dtype=narrow)
    config = lora_configs.lora_expand(M, N, R, wide, narrow, compute, dropout, DEVICES[arch])
    offset = _empty(N, dtype=narrow) if bias else None
    lora.lora_expand(base, _empty(M, R, dtype=compute), w, offset, _seed(dropout), 0.1, 1.0, base, config)


def lora_weight_grad(
    M: int, R: int, wide: str, narrow: str, compute: str, dropout: bool, arch: int, K: int = 4096
) -> None:
    config = lora_configs.lora_weight_grad(M, K, R, wide, compute, dropout, DEVICES[arch])
    ds, x = _empty(M, R, dtype=compute), _empty(M, K, dtype=wide)
    lora.lora_weight_grad(ds, x, _seed(dropout), 0.1, 1.0, getattr(torch, narrow), config)


def lora_dy_grads(
    M: int, R: int, wide: str, narrow: str, compute: str, arch: int, dropout: bool = False, N: int = 4096
) -> None:
    config = lora_configs.lora_dy_grads(M, N, R, wide, narrow, DEVICES[arch])
    dy, s, b = _empty(M, N, dtype=wide), _empty(M, R, dtype=compute), _empty(N, R, dtype=narrow)
    lora.lora_dy_grads(dy, s, b, 1.0, getattr(torch, narrow), config)


def lora_product_tile(
    R: int,
    out: str,
    by_rows: bool,
    dropout: bool,
    tma: bool,
    candidate: int,
    arch: int,
    M: int = 8192,
    N: int = 4096,
    K: int = 4096,
    dtype: str = "bfloat16",
) -> None:
    x, s = _empty(M, K, dtype=dtype), _empty(M, R, dtype=dtype)
    w = _empty(N, K, dtype=dtype) if by_rows else _empty(K, N, dtype=dtype).T
    b = _empty(N, R, dtype="float32") if by_rows else _empty(R, N, dtype="float32").T
    biases = [_empty(N, dtype=dtype) if by_rows else None for _ in range(2)]
    config = product_configs.candidates(R, out, tma, DEVICES[arch])[candidate]
    adapter = (s, b, biases[1], _seed(dropout), 0.1, 1.5, getattr(torch, out), config)
    lora_product.lora_product(x, w, biases[0], *adapter)


def _nf4(N: int, K: int, block_size: int, nested: bool) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, ...]]:
    blocks = N * K // block_size
    nesting = (None, None, None)
    if nested:
        nesting = tuple(_empty(size, dtype=torch.float32) for size in (-(-blocks // 256), 256, 1))
    absmax = _empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    return [_empty(N * K // 2, 1, dtype=torch.uint8), absmax, _empty(16, dtype=torch.float32)], nesting


def nf4_dequantize(
    dtype: str, block_size: int, nested: bool, arch: int, N: int = 4096, K: int = 4096, spare: int = 0, first: int = 0
) -> None:
    config = nf4_configs.nf4_dequantize(nf4_configs.Case(dtype, block_size, nested), DEVICES[arch])
    weight, nesting = _nf4(N, K, block_size, nested)
    out = _empty(N - first, K + spare, dtype=dtype)[:, :K]
    nf4.nf4_dequantize(*weight, block_size, N * K, out, first, *nesting, config)


def nf4_quantize(dtype: str, block_size: int, arch: int, N: int = 4096, K: int = 4096) -> None:
    config = nf4_configs.nf4_quantize(nf4_configs.QuantizeCase(dtype, block_size), DEVICES[arch])
    blocks = N * K // block_size
    bounds, order = _empty(15, dtype=torch.float32), _empty(16, dtype=torch.uint8)
    packed, absmax = _empty(N * K // 2, 1, dtype=torch.uint8), _empty(blocks, dtype=torch.float32)
    nf4_quantize_kernels.nf4_quantize(_empty(N, K, dtype=dtype), block_size, bounds, order, packed, absmax, config)


def nf4_nest(snapped: bool, arch: int, count: int = 2**18) -> None:
    values, bounds = _empty(count, dtype=torch.float32), _empty(255, dtype=torch.float32)
    index, absmax = _empty(count, dtype=torch.uint8), _empty(count // 256, dtype=torch.float32)
    nf4_quantize_kernels.nf4_nest(values, bounds, snapped, index, absmax, nf4_configs.nf4_nest(DEVICES[arch]))


def nf4_linear(
    M: int, x: str, compute: str, out: str, nested: bool, arch: int, N: int = 4096, K: int = 4096, warps: int = 0
) -> None:
    """With ``warps`` in the place of the configuration's, on tiles that a group of warps can multiply."""
    config = nf4_configs.nf4_linear(M, N, K, compute, DEVICES[arch])
    if warps:
        config = replace(config, block_n=16 * warps, num_warps=warps)
    weight, nesting = _nf4(N, K, 64, nested)
    bias = _empty(N, dtype=compute)
    rows, y = _empty(M, K, dtype=x), _empty(M, N, dtype=out)
    nf4_linear_kernels.nf4_linear(rows, *weight, 64, (N, K), *nesting, bias, getattr(torch, compute), y, config)


def nf4_product(
    M: int,
    R: int,
    transposed: bool,
    dropout: bool,
    nested: bool,
    candidate: int,
    arch: int,
    dtype: str = "bfloat16",
    out: str = "bfloat16",
    N: int = 4096,
    K: int = 4096,
    block_size: int = 64,
) -> None:
    columns, depth = (K, N) if transposed else (N, K)
    device = DEVICES[arch]
    if candidate < 0:  # what rows take whose bytes are read one by one
        config = nf4_product_configs.fused(M, columns, depth, R, transposed, K, device)
    else:
        config = nf4_product_configs.candidates(M, R, transposed, device)[candidate]
        config = nf4_product_configs.on(config, M, columns, depth, device)
    weight, nesting = _nf4(N, K, block_size, nested)
    adapter: list[torch.Tensor | None] = [None, None]
    if R:
        b = _empty(R, columns, dtype="float32").T if transposed else _empty(columns, R, dtype="float32")
        adapter = [_empty(M, R, dtype=dtype), b]
    biases = [None if transposed else _empty(columns, dtype=dtype) for _ in range(2)]
    rest = (biases[0], *adapter, biases[1] if R else None, _seed(dropout), 0.1, 1.5, _dtype(out), config)
    x = _empty(M, depth, dtype=dtype)
    nf4_product_kernels.nf4_product(x, *weight, block_size, (N, K), *nesting, transposed, *rest)


def nf4_dequantize_columns(
    dtype: str, nested: bool, arch: int, N: int = 4096, K: int = 4096, first: int = 1024, width: int = 1024
) -> None:
    config = nf4_product_configs.nf4_dequantize_columns(dtype, DEVICES[arch])
    weight, nesting = _nf4(N, K, 64, nested)
    out = _empty(N, width, dtype=dtype)
    nf4_product_kernels.nf4_dequantize_columns(*weight, 64, (N, K), *nesting, out, first, config)


def dropout_mask(arch: int, rows: int = 4096, columns: int = 4096) -> None:
    philox.dropout_mask(_empty(1, dtype=torch.int64), rows, columns, 0.1, philox_configs.dropout_mask(DEVICES[arch]))


def philox_words(arch: int, count: int = 4096) -> None:
    philox.philox_words(_empty(1, dtype=torch.int64), 0, count, 0, 0, philox_configs.philox_words(DEVICES[arch]))


def sparse_delta_gather(
    dtype: str, arch: int, M: int = 2048, N: int = 4096, K: int = 11008, S: int = 45056, wide: bool = False
) -> None:
    config = sparse_configs.gather(dtype, M, DEVICES[arch])
    indices = _empty(S, dtype=torch.int64 if wide else torch.int32)
    padded = -(-M // sparse_configs.ROW_MULTIPLE) * sparse_configs.ROW_MULTIPLE
    slabs = _empty(N, padded, dtype=dtype), _empty(K, padded, dtype=dtype)
    sparse_delta.sparse_delta_gather(*slabs, indices, torch.float32, config)


def sparse_delta_tiled(dtype: str, arch: int, M: int = 2048, N: int = 4096, K: int = 11008, S: int = 450560) -> None:
    sides = sparse_configs.tile_sides(dtype, DEVICES[arch])
    config = sparse_configs.tile(dtype, *sides, DEVICES[arch])
    indices, order = _empty(S, dtype=torch.int32), _empty(S, dtype=torch.int32)
    tiles, starts = _empty(2752, dtype=torch.int32), _empty(2753, dtype=torch.int32)
    dy, x = _empty(M, N, dtype=dtype), _empty(M, K, dtype=dtype)
    sparse_delta.sparse_delta_tiled(dy, x, indices, order, tiles, starts, torch.float32, config)


def sparse_delta_blocks(dtype: str, arch: int, side: int, M: int = 2048, N: int = 4096, K: int = 11264) -> None:
    config = sparse_configs.block(dtype, side, DEVICES[arch])
    dy, x, blocks = _empty(M, N, dtype=dtype), _empty(M, K, dtype=dtype), _empty(64, 4, dtype=torch.int64)
    sparse_delta.sparse_delta_blocks(dy, x, blocks, side, 64 * side * side, torch.float32, config)


def sparse_delta_dequantize(dtype: str, arch: int, wide: bool = False, nested: bool = True) -> None:
    config = nf4_configs.nf4_dequantize(nf4_configs.Case(dtype, 64, nested), DEVICES[arch])
    weight, nesting = _nf4(4096, 11008, 64, nested)
    indices = _empty(450560, dtype=torch.int64 if wide else torch.int32)
    starts = _empty(4096 * 11008 // (2 * config.tile_bytes) + 1, dtype=torch.int32)
    delta = (indices, _empty(450560, dtype=torch.float32), starts)
    out = _empty(4096, 11008, dtype=dtype)
    nf4.nf4_dequantize(*weight, 64, 4096 * 11008, out, 0, *nesting, config, delta)


def sparse_delta_product(dtype: str, arch: int, M: int, wide: bool = False, narrow: bool = False) -> None:
    config = sparse_configs.product(dtype, M, DEVICES[arch])
    indices = _empty(450560, dtype=torch.int64 if wide else torch.int32)
    y, x = _empty(M, 4096, dtype=dtype if narrow else torch.float32), _empty(M, 11008, dtype=dtype)
    sparse_delta.sparse_delta_product_(y, x, indices, _empty(450560, dtype=torch.float32), config)


def sparse_delta_scatter(dtype: str, arch: int, write: bool, values: bool = True, wide: bool = False) -> None:
    config = sparse_configs.scatter(DEVICES[arch])
    weight = _empty(4096, 11008, dtype=dtype)
    indices = _empty(45056, dtype=torch.int64 if wide else torch.int32)
    given = _empty(45056, dtype=torch.float32) if values else None
    if write:
        sparse_delta.sparse_delta_write_(weight, indices, _empty(45056, dtype=dtype), given, config)
    else:
        sparse_delta.sparse_delta_patch_(weight, indices, given, config)


def sparse_adamw_step(
    dtype: str | None,
    arch: int,
    stochastic: bool = False,
    index: str = "int32",
    age: str = "int16",
    small: bool = False,
) -> None:
    sparse_adamw.sparse_adamw_(
        _empty(200, 13, dtype=torch.int64),
        _empty(65536, dtype=torch.int32),
        _empty(65536, dtype=torch.int64),
        _empty(2, 256, dtype=torch.float32) if small else None,
        _empty(7, dtype=torch.float32),
        _empty(2, 32769, dtype=torch.float32),
        _seed(stochastic),
        None if dtype is None else getattr(torch, dtype),
        getattr(torch, index),
        getattr(torch, age),
        sparse_configs.adamw(DEVICES[arch]),
    )


def perturb(
    dtype: str,
    rademacher: bool,
    arch: int,
    rounding: bool = False,
    pair: bool = False,
    terms: int = 1,
    options: bool = False,
    source: bool = True,
    tensors: int = 3,
) -> None:
    """Addresses of meta tensors are 0: aligned."""
    config = zo_configs.perturb(dtype, rademacher, DEVICES[arch])
    outs = [_empty(4096, 4096, dtype=dtype) for _ in range(tensors)]
    scalars = _empty(1, dtype=torch.float32), _empty(tensors, dtype=torch.float32)
    zeroth_order.perturb(
        outs if source else None,
        outs,
        outs if pair else None,
        _empty(terms, dtype=torch.int64),
        _empty(terms, dtype=torch.float32),
        *(scalars if options else (None, None)),
        _empty(1, dtype=torch.int64) if rounding else None,
        list(range(tensors)),
        [0] * tensors,
        rademacher,
        config,
    )


def zo_linear(
    M: int,
    dtype: str,
    rademacher: bool,
    arch: int,
    N: int = 4096,
    K: int = 4096,
    options: bool = False,
    tensor_id: int = 5,
) -> None:
    config = zo_configs.zo_linear(M, N, K, dtype, rademacher, DEVICES[arch])
    bias = _empty(N, dtype=dtype) if options else None
    x = _empty(M, K, dtype=dtype)
    one = _empty(1, dtype=torch.float32)
    seed, threshold = _empty(1, dtype=torch.int64), one if options else None
    zeroth_order_linear.zo_linear(
        x, x, _empty(N, K, dtype=dtype), bias, bias, seed, one, threshold, tensor_id, rademacher, config
    )


def zo_nf4_linear(
    M: int,
    dtype: str,
    distribution: str,
    arch: int,
    N: int = 4096,
    K: int = 4096,
    block_size: int = 64,
    nested: bool = False,
    tensor_id: int = 5,
) -> None:
    """With bias and threshold: what costs most registers."""
    config = zo_configs.zo_nf4_linear(M, N, K, block_size, dtype, distribution, DEVICES[arch])
    weight, nesting = _nf4(N, K, block_size, nested)
    x, bias, one = _empty(M, K, dtype=dtype), _empty(N, dtype=dtype), _empty(1, dtype=torch.float32)
    terms = (
        bias,
        bias,
        _empty(1, dtype=torch.int64),
        one,
        one,
        tensor_id,
        distribution == "rademacher",
        distribution == "scales",
    )
    zeroth_order_linear.zo_nf4_linear(x, x, *weight, block_size, (N, K), *nesting, *terms, config)


def lora_terms_shrink(
    M: int, ranks: list[int], wide: str, compute: str, dropout: bool, rows: bool, arch: int, K: int = 4096
) -> None:
    config = terms_configs.lora_terms_shrink(M, K, ranks, wide, compute, dropout, DEVICES[arch])
    a = [_empty(rank, K, dtype="float32") for rank in ranks]
    lora_terms.lora_terms_shrink(_empty(M, K, dtype=wide), a, *_terms(M, ranks, rows, dropout), _dtype(compute), config)


def lora_terms_expand(
    M: int,
    ranks: list[int],
    wide: str,
    compute: str,
    dropout: bool,
    rows: bool,
    arch: int,
    N: int = 4096,
    transposed: bool = False,
    bias: bool = False,
) -> None:
    config = terms_configs.lora_terms_expand(M, N, ranks, wide, compute, dropout, DEVICES[arch])
    w = [_empty(rank, N, dtype="float32").T if transposed else _empty(N, rank, dtype="float32") for rank in ranks]
    biases = [_empty(N, dtype="float32") for _ in ranks] if bias else []
    base, s = _empty(M, N, dtype=wide), _empty(M, sum(ranks), dtype=compute)
    lora_terms.lora_terms_expand(base, s, w, biases, *_terms(M, ranks, rows, dropout), base, config)


def lora_terms_weight_grad(
    M: int,
    ranks: list[int],
    wide: str,
    compute: str,
    dropout: bool,
    rows: bool,
    arch: int,
    K: int = 4096,
    by_columns: bool = False,
) -> None:
    config = terms_configs.lora_terms_weight_grad(M, K, ranks, wide, compute, dropout, DEVICES[arch])
    ds, x = _empty(M, sum(ranks), dtype=compute), _empty(M, K, dtype=wide)
    terms = _terms(M, ranks, rows, dropout)
    lora_terms.lora_terms_weight_grad(ds, x, ranks, *terms, torch.float32, config, by_columns)


def lora_terms_dy_grads(M: int, ranks: list[int], compute: str, rows: bool, arch: int, N: int = 4096) -> None:
    config = terms_configs.lora_terms_dy_grads(M, N, ranks, compute, compute, DEVICES[arch])
    dy, s = _empty(M, N, dtype=compute), _empty(M, sum(ranks), dtype=compute)
    b = [_empty(N, rank, dtype="float32") for rank in ranks]
    names, _, _, scalings = _terms(M, ranks, rows, False)
    lora_terms.lora_terms_dy_grads(dy, s, b, names, scalings, torch.float32, config)


def lora_dora_expand(M: int, rank: int, wide: str, compute: str, arch: int, N: int = 4096, plain: bool = False) -> None:
    config = terms_configs.lora_dora_expand(M, N, rank, wide, compute, DEVICES[arch])
    base, s, w = _empty(M, N, dtype=wide), _empty(M, rank, dtype=compute), _empty(N, rank, dtype="float32")
    gain = _empty(N, dtype="float32")
    lora_dora.lora_dora_expand(base, base if plain else None, s, w, None, gain, gain, 1.0, _dtype(wide), config)


def lora_gain_grads(M: int, wide: str, arch: int, N: int = 4096) -> None:
    dy = _empty(M, N, dtype=wide)
    config = terms_configs.lora_gain_grads(M, N, DEVICES[arch])
    lora_dora.lora_gain_grads(dy, _empty(M, N, dtype=wide), _empty(N, dtype="float32"), config)


def lora_dropout_add(M: int, wide: str, base: bool, arch: int, N: int = 4096) -> None:
    x = _empty(M, N, dtype=wide)
    config = terms_configs.lora_dropout_add(DEVICES[arch])
    lora_dora.lora_dropout_add(_empty(M, N, dtype=wide) if base else None, x, _seed(True), 0.1, x.dtype, config)


def _gated(rows: int, N: int, dtype: str, halves: bool) -> list[torch.Tensor]:
    """gate and up: whole, or the halves of one matrix."""
    if halves:
        return list(_empty(rows, 2 * N, dtype=dtype).chunk(2, -1))
    return [_empty(rows, N, dtype=dtype) for _ in range(2)]


def gated_activation(
    activation: str, dtype: str, arch: int, M: int = 4096, N: int = 14336, halves: bool = False
) -> None:
    config = gated_configs.gated("gated_activation", activation, dtype, DEVICES[arch])
    gated_kernels.gated_activation(*_gated(M, N, dtype, halves), activation, config)


def gated_activation_backward(
    activation: str,
    dtype: str,
    arch: int,
    M: int = 4096,
    N: int = 14336,
    halves: bool = False,
    recompute: bool = False,
) -> None:
    config = gated_configs.gated("gated_activation_backward", activation, dtype, DEVICES[arch])
    dh = _empty(M, N, dtype=dtype)
    h = dh if recompute else None
    gated_kernels.gated_activation_backward(dh, *_gated(M, N, dtype, halves), activation, h, config)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _terms(M: int, ranks: list[int], rows: bool, dropout: bool) -> tuple:
    """rows, seeds, ps, scalings of a launch of kernels/lora_terms.py."""
    names = _empty(M, dtype=torch.int32) if rows else None
    seeds = _empty(len(ranks), dtype=torch.int64) if dropout else None
    return names, seeds, [0.1 * dropout] * len(ranks), [1.0] * len(ranks)
