"""Launch configurations of kernels/sparse_delta.py, and the density at which tiles of dW take over from gathered columns."""

from collections.abc import Iterator
from dataclasses import dataclass

from .device import Device, bucket, measured, require_at_least, require_powers_of_two

DTYPES = ("float32", "bfloat16", "float16")
ROW_BUCKETS = (64, 512, 8192)
PRODUCT_BUCKETS = (16, 64)
# Up to so many rows and this density the delta of a weight that is not written is a product of its own; beyond, it is patched into
# a copy, or into what a 4-bit weight is decoded to. CPU: one thread of a Zen 5 on a shared machine, processor time, both ways in turn
# (2026-11-21). Beside a dense weight the product's time is 0.46 to 0.79 of the copy's at 1 row, 0.65 to 0.90 at 16, 0.77 to 1.02 at 32
# and 0.84 to 1.22 at 64, over 0.1 to 10 % of 2048 x 2048, 4096 x 1024 and 512 x 512 in bfloat16 and float32: at 2048 x 2048, 1 %,
# bfloat16 0.41 against 0.66 ms at 1 row, 1.16 against 1.27 at 32, 1.91 against 2.21 at 64. Beside a packed weight of that shape
# 0.78 against 1.17 ms at 16 rows, and 1.26 against 1.87 at 32.
APART_ROWS = 32
APART_DENSITY = 0.1
# On a GPU a product of its own reads a sector of 32 bytes of x for each row and active weight, against two or three passes over the
# weight: 168,000 active of 4096 x 4096 in bfloat16, 16 rows, 86 MB of L2 against 67 MB of memory for the copy and 33 read again. An
# estimate by bytes, not measured on any GPU.
APART_WORK = 0.16  # rows times density
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Rows of a transposed operand are padded to this: whole 16-byte reads, and no mask along the sum.
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class GatherConfig:
    """Active weights of one program and rows summed at a time, a divisor of ROW_MULTIPLE."""

    block_s: int = 32
    block_m: int = 64
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_s", "block_m", "num_warps")
        if self.block_m > ROW_MULTIPLE:
            raise ValueError(f"block_m: expected at most {ROW_MULTIPLE}, got {self.block_m}")


@dataclass(frozen=True)
class TileConfig:
    """A tile of dW, rows summed at a time, and active weights picked from the finished tile at a time."""

    block_n: int = 128
    block_k: int = 128
    block_m: int = 64
    picks: int = 256
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_n", "block_k", "block_m", "picks", "num_warps")
        require_at_least(self, num_stages=1)


@dataclass(frozen=True)
class ProductConfig:
    """Rows of x and active weights of one step of the product of a few rows. Not measured."""

    block_m: int = 16
    block_s: int = 32
    num_warps: int = 1

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_s", "num_warps")


@dataclass(frozen=True)
class BlockConfig:
    """Elements of one program."""

    block: int = 1024
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block", "num_warps")


@dataclass(frozen=True)
class Crossover:
    """The density from which dvalues come from tiles of dW.

    Of a 4096 x 11008 weight at 2048 rows of bfloat16, gathering costs an estimated 0.46 ms at 1 % (L2 reads) and the dense product
    0.26 ms; in float32, without tensor cores, 0.9 and 3 ms. Estimates from bandwidths and rates, not measured on any GPU yet.

    A CPU gathers at every density. Of a 2048 x 2048 weight at 512 rows, one thread of a Zen 5 gathers 0.1, 0.5, 1, 2, 5 and 10 % in
    1.2, 1.4, 1.8, 2.3, 4.6 and 8.1 ms in bfloat16, and in 2.0, 2.4, 3.0, 3.8, 7.2 and 13.1 ms in float32; the dense product and the
    pick from it take 10.8 and 43.5 ms (2026-11-21).
    """

    density: float


def apart_rows(device_type: str, density: float) -> int:
    """Up to how many rows of x take a delta of this density as a product of its own."""
    if device_type == "cpu":
        return APART_ROWS if density <= APART_DENSITY else 0
    return min(PRODUCT_BUCKETS[0], int(APART_WORK / density))


def gather(dtype: str, rows: int, device: Device) -> GatherConfig:
    key = f"{dtype} M{bucket(rows, ROW_BUCKETS)}"
    found = measured(device, "sparse_delta_gather", key, GatherConfig)
    # As many bytes of each dtype: 64 rows of float32 take 80 to 95 registers, and on sm_90 spill 8 bytes with triton 3.8.
    return found or GatherConfig(block_m=32 if dtype == "float32" else 64)


def tile(dtype: str, block_n: int, block_k: int, device: Device) -> TileConfig:
    """The tile's sides are the pattern's: its entries are sorted by them."""
    found = measured(device, "sparse_delta_tile", f"{dtype} {block_n}x{block_k}", TileConfig)
    if found is not None:
        return found
    # float32 sums are formed by plain multiply-adds: half the tile, or registers spill.
    if dtype == "float32":
        return TileConfig(block_n, block_k, 32, picks=128, num_warps=8, num_stages=2)
    return TileConfig(block_n, block_k, num_stages=3 if device.shared_memory > 128 * 1024 else 2)


def block(dtype: str, block_size: int, device: Device) -> TileConfig:
    """Of a support of square blocks: a program forms one, or a tile of a larger one."""
    side = min(block_size, 64 if dtype == "float32" else 128)
    found = measured(device, "sparse_delta_block", f"{dtype} {block_size}", TileConfig)
    if found is not None:
        return found
    whole = tile(dtype, side, side, device)
    return TileConfig(
        side, side, whole.block_m, num_warps={16: 1, 32: 2, 64: 4}.get(side, 8), num_stages=whole.num_stages
    )


def tile_sides(dtype: str, device: Device) -> tuple[int, int]:
    """The sides of the tiles by which a pattern is sorted."""
    return (64, 64) if dtype == "float32" else (128, 128)


def crossover(dtype: str, device: Device) -> float:
    found = measured(device, "sparse_delta_crossover", dtype, Crossover)
    return (found or Crossover(0.03 if dtype == "float32" else 0.005)).density


def product(dtype: str, rows: int, device: Device) -> ProductConfig:
    found = measured(device, "sparse_delta_product", f"{dtype} M{bucket(rows, PRODUCT_BUCKETS)}", ProductConfig)
    return found or (ProductConfig() if rows <= PRODUCT_BUCKETS[0] else ProductConfig(64, num_warps=4))


def scatter(device: Device) -> BlockConfig:
    return measured(device, "sparse_delta_scatter", "any", BlockConfig) or BlockConfig(512)


def adamw(device: Device) -> BlockConfig:
    """Four elements a thread, 16 bytes of a float32 array; with four warps instead, ptxas spills two words of the stochastic form."""
    return measured(device, "sparse_adamw", "any", BlockConfig) or BlockConfig(1024, 8)


def launch_matrix(device: Device) -> Iterator[tuple[str, str, GatherConfig | TileConfig | ProductConfig | BlockConfig]]:
    """(operator, key, configuration) of every launch."""
    for dtype in DTYPES:
        for rows in ROW_BUCKETS:
            yield "sparse_delta_gather", f"{dtype} M{rows}", gather(dtype, rows, device)
        yield "sparse_delta_tile", dtype, tile(dtype, *tile_sides(dtype, device), device)
        for side in BLOCK_SIZES:
            yield "sparse_delta_block", f"{dtype} {side}", block(dtype, side, device)
        for rows in PRODUCT_BUCKETS:
            yield "sparse_delta_product", f"{dtype} M{rows}", product(dtype, rows, device)
    yield "sparse_delta_scatter", "any", scatter(device)
    yield "sparse_adamw", "any", adamw(device)
