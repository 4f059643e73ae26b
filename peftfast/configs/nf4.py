"""Launch configurations of kernels/nf4.py and kernels/nf4_quantize.py, and which way a product with a 4-bit weight takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .device import Device, blocks, bucket, measured, parts, require_at_least, require_powers_of_two

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Nf4Config:
    """Packed bytes of one program, rounded up to a whole block, and its warps. A program reads one maximum of the second level, which
    256 blocks share, of 16 bytes at least."""

    tile_bytes: int = 2048
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "tile_bytes", "num_warps")
        if self.tile_bytes > 4096:
            raise ValueError(f"tile_bytes: expected at most 4096, got {self.tile_bytes}")


@dataclass(frozen=True)
class Case:
    """What a configuration and a compiled variant depend on."""

    dtype: str
    block_size: int
    nested: bool

    @property
    def key(self) -> str:
        return f"{self.dtype} block{self.block_size} {'nested' if self.nested else 'plain'}"


def nf4_dequantize(case: Case, device: Device) -> Nf4Config:
    return measured(device, "nf4_dequantize", case.key, Nf4Config) or Nf4Config()


@dataclass(frozen=True)
class QuantizeConfig:
    """Elements of one program, rounded up to a whole block, and its warps: 8 elements a thread. With 16 the kernel spills two
    registers on sm_80 (triton 3.6, blocks of 64, 16-bit weights)."""

    tile: int = 2048
    num_warps: int = 8

    def __post_init__(self) -> None:
        require_powers_of_two(self, "tile", "num_warps")


@dataclass(frozen=True)
class QuantizeCase:
    """What a configuration of the quantiser and a compiled variant depend on."""

    dtype: str
    block_size: int

    @property
    def key(self) -> str:
        return f"{self.dtype} block{self.block_size}"


def nf4_quantize(case: QuantizeCase, device: Device) -> QuantizeConfig:
    return measured(device, "nf4_quantize", case.key, QuantizeConfig) or QuantizeConfig()


@dataclass(frozen=True)
class NestConfig:
    """Warps of the one program that takes 256 block maxima."""

    num_warps: int = 2

    def __post_init__(self) -> None:
        require_powers_of_two(self, "num_warps")


def nf4_nest(device: Device) -> NestConfig:
    return measured(device, "nf4_nest", "any", NestConfig) or NestConfig()


# Rows of x up to which the fused few-row product is quicker than dequantising and the library's product, by backend.
# cpu: where float32 is multiplied. With an adapter of rank 16 and the weight out of cache, 0.96 against 0.96 ms at 16 rows and
# 1.14 against 1.04 at 20 for 2048 x 2048, 0.88 against 1.02 and 1.06 against 1.18 for 1024 x 4096, one thread of an AMD EPYC of
# the Zen 5 generation (2026-11-21). cpu dot: where AVX-512 multiplies bfloat16. By the same measure 1.52 against 1.73 ms at 40
# rows and 1.81 against 1.76 at 48 for 2048 x 2048, 1.44 against 1.55 and 1.76 against 1.82 for 1024 x 4096.
# cuda and triton: not measured; 64 is what the kernel was made for, 16 one tile of tl.dot.
FEW_ROWS = {"cuda": 64, "cpu": 16, "cpu dot": 40, "triton": 16}


# How the adapter's product joins the base product of many rows, by device type. "expand": added by a pass over y.
# "accumulate": written first, and the base product adds itself to it (beta = 1). "concatenate": [x | S] [W | s B]^T in one
# product, which costs no pass where x is cast anyway. On the CPU of FEW_ROWS, 2048 x 2048 at 64 to 2048 rows, the three lie
# within 5 % of each other and none leads throughout; the first rounds least. cuda: not measured.
ADAPTER_ROUTES = {"cpu": "expand", "cuda": "expand"}


# How the adapter's part of dX joins the base product of a 4-bit weight. "expand": added by a pass over dX, which reads and writes
# it, masks, and gives dX the dtype of x on its way. "accumulate": dS A is written first and dY W adds itself to it, half of the
# bytes; no mask can come in between, and where dX is cast it would be cast by a pass of its own. [dY | dS] [W; A] in one
# product is no route: dY would have to be copied into the wider buffer, twice M N elements against the M K that it saves, unless
# it is cast anyway; and it is cast where x is, hence where dX needs the pass all the same. cpu: the library's addmm_ makes the
# two the same product in another order. cuda: not measured.
GRADIENT_ROUTES = {"cpu": "expand", "cuda": "expand"}


def gradient_route(device_type: str, masked: bool, casts: bool) -> str:
    """The route of dX for a layer that drops part of x or does not, and whose x has another dtype than its product or has not."""
    return "expand" if masked or casts else GRADIENT_ROUTES.get(device_type, "expand")


# Bytes of the buffer that a weight is dequantised into, by device type; 0: the whole weight. On the CPU of FEW_ROWS slabs of 2
# and 4 MB are within 1 % of the whole at 64 to 512 rows, smaller ones slower. A GPU could keep a slab in its L2 cache, where
# the product finds it: cuda is not measured, and off.
SLAB_BYTES = {"cpu": 0, "cuda": 0}


def slab_rows(device_type: str, N: int, K: int, itemsize: int) -> int:
    """Rows of the weight that are dequantised and multiplied at a time: N, or a multiple of 64 within SLAB_BYTES."""
    limit = SLAB_BYTES.get(device_type, 0)
    if limit == 0 or N * K * itemsize <= limit:
        return N
    return max(64, limit // (K * itemsize) // 64 * 64)


def adapter_route(device_type: str, casts: bool, keeps_dtype: bool) -> str:
    """The route of a layer that casts x to its compute dtype or does not, and whose result has that dtype or another."""
    route = ADAPTER_ROUTES.get(device_type, "expand")
    if not keeps_dtype or (route == "concatenate" and not casts):
        return "expand"
    return route


MOST_COLUMNS = 128  # of a step of the Triton kernel


@dataclass(frozen=True)
class LinearConfig:
    """Tile of the Triton product of a few rows: weight rows and columns, the pipeline, and the parts into which K is cut."""

    block_n: int = 32
    block_k: int = MOST_COLUMNS
    num_warps: int = 2
    num_stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_n", "block_k", "num_warps")
        require_at_least(self, block_n=16, block_k=16, num_stages=1, splits=1)
        if self.block_k > MOST_COLUMNS:
            raise ValueError(f"block_k: expected at most {MOST_COLUMNS}, got {self.block_k}")


def nf4_linear(M: int, N: int, K: int, dtype: str, device: Device) -> LinearConfig:
    """Two warps, whose threads read 16 bytes of a 64-element block's rows at once, on narrow tiles, and many such programs. Not
    measured."""
    rows = bucket(M, (16, 32, 64))
    config = measured(device, "nf4_linear", f"{dtype} rows{rows}", LinearConfig) or LinearConfig()
    programs = blocks(N, config.block_n) * blocks(M, rows)
    return replace(config, splits=parts(programs, blocks(K, config.block_k), device, 8))


# Of csrc/cuda/nf4_linear.cu: rows of a tile of A, and of the weight for as few rows of x; of the weight for more, which are
# multiplied so many at a time; columns of a unit; warps of a block for few rows and for more.
TILE_ROWS, WIDE_TILE_ROWS, GROUP_ROWS = 16, 32, 32
UNIT_COLUMNS, BLOCK_WARPS, WIDE_BLOCK_WARPS = 128, 16, 12


def nf4_linear_shares(M: int, N: int, K: int, R: int, device: Device) -> tuple[int, int]:
    """The warps that share a product of the CUDA kernel, and the float32 that their parts of the sums take, as csrc/cuda/nf4.h says it.

    A block of warps on each multiprocessor: all begin at once and have equally much to do, within a unit. Not measured; predicted for
    an H200, 8 rows, without the launch that adds the parts: 0.48 of the memory's speed at 4096 x 4096, 0.59 at 14336 x 4096. A grid of
    row tiles and parts of K came to 0.34 and 0.41, and the blocks of its adapter would have ended last. For 32 rows 0.27 and 0.38;
    where a warp used x for 16 rows of the weight, 0.23 and 0.26, bound by the L2 cache."""
    wide = M > TILE_ROWS
    steps, adapter_steps = K // UNIT_COLUMNS, K // (128 if wide else 64)
    tiles = -(-N // (WIDE_TILE_ROWS if wide else TILE_ROWS))
    units = -(-M // GROUP_ROWS) * (-(-R // TILE_ROWS) * adapter_steps + tiles * steps)
    warps = (WIDE_BLOCK_WARPS if wide else BLOCK_WARPS) * device.multiprocessors
    each = max(1, units // min(warps, units)) if units else 1
    parts, adapter_parts = (-(-(of_tile - 1) // each) + 1 if of_tile else 0 for of_tile in (steps, adapter_steps))
    return warps, M * (adapter_parts * R + parts * N)


def launch_matrix(device: Device) -> Iterator[tuple[Case, Nf4Config]]:
    """Every case with its configuration."""
    for dtype in DTYPES:
        for block_size in BLOCK_SIZES:
            for nested in (False, True):
                case = Case(dtype, block_size, nested)
                yield case, nf4_dequantize(case, device)
