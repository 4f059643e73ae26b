"""Kernels with one fault each, which the compile gate must report. Launchers take the architecture and nothing else."""

import torch
import triton
import triton.language as tl

from peftfast.configs.lora import LoraConfig
from peftfast.configs.lora_product import ProductConfig
from peftfast.kernels import lora, lora_product


@triton.jit
def _copy_kernel(source_ptr, target_ptr, count, stride, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offs, tl.load(source_ptr + offs.to(PLACES) * stride, mask=offs < count), mask=offs < count)


def _copy(stride: int, count: int, places: tl.dtype = tl.int64) -> None:
    source, target = (torch.empty(4096, dtype=torch.float32, device="meta") for _ in range(2))
    _copy_kernel[(1,)](source, target, count, stride, BLOCK=1024, PLACES=places)


def wide_copy(arch: int) -> None:
    """Nothing is wrong with this one."""
    _copy(1, 4096)


def strided_copy(arch: int) -> None:
    """Its loads are scalar, its stores are not: one narrow stream beside a wide one must not pass."""
    _copy(3, 4096)


def narrow_places(arch: int) -> None:
    """The same with places counted in 32 bits."""
    _copy(3, 4096, tl.int32)


def ragged_copy(arch: int) -> None:
    """A mask that ends anywhere makes every access scalar."""
    _copy(1, 4095)


def _shrink(config: LoraConfig) -> None:
    x = torch.empty((8192, 4096), dtype=torch.bfloat16, device="meta")
    w = torch.empty((256, 4096), dtype=torch.bfloat16, device="meta")
    lora.lora_shrink(x, w, None, 0.0, 1.0, torch.bfloat16, config)


def spilled(arch: int) -> None:
    """256 x 256 float32 sums in four warps are 512 registers a thread."""
    _shrink(LoraConfig(256, 64, 256, num_warps=4))


def too_much_shared_memory(arch: int) -> None:
    """Eight stages of two 128 x 128 tiles of two bytes are 512 KiB."""
    _shrink(LoraConfig(128, 128, 128, num_warps=8, num_stages=9))


def without_tensor_cores(arch: int) -> None:
    """float32 products are plain multiply-adds."""
    x, w = (torch.empty((64, 4096), dtype=torch.float32, device="meta") for _ in range(2))
    lora.lora_shrink(x, w, None, 0.0, 1.0, torch.float32, LoraConfig(16, 32, 16))


@triton.jit
def _constant_kernel(target_ptr, tensor_id):
    tl.store(target_ptr, tensor_id.to(tl.int64))


def planted_constant(arch: int, tensor_id: int) -> None:
    """An argument that is 1 is a constant to the compiler, and has no type to convert from."""
    _constant_kernel[(1,)](torch.empty(1, dtype=torch.int64, device="meta"), tensor_id)


def crowded_product(arch: int) -> None:
    """Five stages of 48 KiB, and the tile to be written."""
    x, s = (torch.empty((8192, columns), dtype=torch.bfloat16, device="meta") for columns in (4096, 16))
    w, b = (torch.empty((4096, columns), dtype=torch.bfloat16, device="meta") for columns in (4096, 16))
    config = ProductConfig(128, 256, 64, 16, num_warps=8, num_stages=5)
    lora_product.lora_product(x, w, None, s, b, None, None, 0.0, 1.0, torch.bfloat16, config)


@triton.jit
def _philox_in_halves_kernel(seed_ptr, words_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = offs.to(tl.uint32), (offs >> 32).to(tl.uint32)
    words = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
    for i in tl.static_range(4):
        tl.store(words_ptr + 4 * offs + i, words[i].to(tl.int64))


def philox_in_halves(arch: int) -> None:
    """The language's own generator, whose products take two instructions."""
    seed, words = (torch.empty(size, dtype=torch.int64, device="meta") for size in (1, 4096))
    _philox_in_halves_kernel[(4,)](seed, words, BLOCK=256)


@triton.jit
def _rounded_product_kernel(x_ptr, y_ptr, out_ptr, M, K: tl.constexpr, R: tl.constexpr):
    columns, rows, ranks = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, R)
    total = tl.zeros((64, R), tl.float32)
    for first in range(0, M, 64):
        x = tl.load(x_ptr + columns[:, None] + (first + rows)[None, :] * K)
        y = tl.load(y_ptr + (first + rows)[:, None] * R + ranks[None, :])
        total = tl.dot(x.to(tl.bfloat16), y, total)
    tl.store(out_ptr + columns[:, None] * R + ranks[None, :], total)


def product_in_flight(arch: int) -> None:
    """The first factor is rounded in registers, and nothing within the loop asks for the sum."""
    x, out = torch.empty((8192, 4096), device="meta"), torch.empty((4096, 16), device="meta")
    y = torch.empty((8192, 16), dtype=torch.bfloat16, device="meta")
    _rounded_product_kernel[(64,)](x, y, out, 8192, K=4096, R=16, num_stages=3)
