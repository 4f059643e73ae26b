"""Each launcher called as the operators call it, on meta tensors, for the compile gate."""

import torch

from peftfast.configs import lora as lora_configs
from peftfast.configs import nf4 as nf4_configs
from peftfast.configs import philox as philox_configs
from peftfast.configs.device import Device
from peftfast.kernels import lora, nf4, philox
from peftfast.kernels import nf4_linear as nf4_linear_kernels
from peftfast.kernels import nf4_quantize as nf4_quantize_kernels

DEVICES = {
    80: Device("", (8, 0), 108),
    89: Device("", (8, 9), 128),
    90: Device("", (9, 0), 132),
    100: Device("", (10, 0), 148),
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


def nf4_linear(M: int, x: str, compute: str, out: str, nested: bool, arch: int, N: int = 4096, K: int = 4096) -> None:
    config = nf4_configs.nf4_linear(M, compute, DEVICES[arch])
    weight, nesting = _nf4(N, K, 64, nested)
    bias = _empty(N, dtype=compute)
    rows, y = _empty(M, K, dtype=x), _empty(M, N, dtype=out)
    nf4_linear_kernels.nf4_linear(rows, *weight, 64, (N, K), *nesting, bias, getattr(torch, compute), y, config)


def dropout_mask(arch: int, rows: int = 4096, columns: int = 4096) -> None:
    philox.dropout_mask(_empty(1, dtype=torch.int64), rows, columns, 0.1, philox_configs.dropout_mask(DEVICES[arch]))


def philox_words(arch: int, count: int = 4096) -> None:
    philox.philox_words(_empty(1, dtype=torch.int64), 0, count, 0, 0, philox_configs.philox_words(DEVICES[arch]))
