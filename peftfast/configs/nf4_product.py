"""Which way a product of many rows with a 4-bit weight takes, and the launch configurations of kernels/nf4_product.py.

The ways, forward and for dX, by the names that :data:`VARIABLE` and a GPU's table take:

dequantize    the weight decoded whole, then the library's product: what is taken where no table says otherwise
slabs         decoded and multiplied in parts, one after the other, each small enough to be in the L2 cache when it is multiplied
overlapped    the same, but a side stream decodes the next part into a second buffer meanwhile (peftfast.functional.overlap)
fused         kernels/nf4_product.py: decoded on the way into the tensor cores, no dense weight

``python -m benchmarks.product --table nf4_product`` measures them all in one run, and each GPU's ``<slug>.json`` beside this file has
what was the fastest under ``nf4_product``. No table is here yet: no GPU has timed any of this, so that nothing leaves the first way
unless it is asked for.

What to expect by bytes and operations, at an H200's rates as others give them (4.3 TB/s, 790 TFLOP/s in bfloat16, 132 multiprocessors
at 1.7 GHz; not measured here), in us, forward, for 4096 x 4096 | 14336 x 4096:

    dequantize    0.516 N K bytes read and 2 N K written, 9.8 | 34.4, then the larger of 2 M N K operations and of the dense weight, x
                  and y, and 3 for launches
    fused         the largest of the packed bytes, 2.0 | 7.0; decoding, 3.2 | 11.4 for each row of tiles (64, 128 or 256 rows; 23
                  elements a cycle on a multiprocessor); and the operations at 65 % of the library's rate, since what a loop reaches
                  that decodes in step with them is not known; and 2 for a second launch
    overlapped    the first part's decoding and the whole product, and a launch and an event for each part, in as many parts as leave
                  each 132 tiles of 128 x 256, which is what fills the GPU

    M        dequantize     fused        overlapped
    17         21 |  65      5 |  13     -
    64         21 |  65      6 |  17     -
    128        21 |  66     10 |  31     -
    256        24 |  75     19 |  61     -
    512        35 | 113     35 | 119     -
    1024       56 | 190     69 | 236      -  | 174 (2 parts)
    2048      100 | 342    136 | 470      -  | 320 (4)
    4096      187 | 646    270 | 939     184 | 624 (2, 8)

So the fused kernel should win to M = 256, by two to four times below 128, and lose from 1024 on; 512 hangs on what its loop reaches.
Overlapping should win where a weight has several parts that fill the GPU, from M = 1024 on for a wide one and from 4096 for 4096 x
4096, by 3 to 9 %. Up to 64 rows the few-row kernel (csrc/cuda/nf4_linear) stands beside them: the fused kernel's bytes, in one launch.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from .device import Device, bucket, measured, require_at_least, require_powers_of_two
from .lora_product import RANK_BUCKETS
from .variable import Choice

VARIABLE = "PEFTFAST_NF4_PRODUCT"
ROUTES = ("dequantize", "slabs", "overlapped", "fused")
KEPT_FROM = 1.03  # times as fast as what is taken without a table: beyond what two measurements of one thing differ by
DTYPES = ("bfloat16", "float16")
ROW_BUCKETS = (17, 32, 64, 128, 256, 512, 1024, 1536, 2048, 4096)
FEWEST_ROWS = 17  # fewer are the few-row kernels'
PARTS = (2, 4, 8)
WHOLE_BYTES = 32  # columns of 16 bytes
MOST_RANK = 128  # of the adapter's part, which is measured at 16


@dataclass(frozen=True)
class ProductConfig:
    """A route, and what it needs.

    Attributes:
        route: of ROUTES. parts: into how many the weight is cut, of ``slabs`` and ``overlapped``.
        The rest is the fused kernel's. block_m, block_n, block_k: the tile and its step. block_r: ranks of a step of the adapter's
        part. group_m: tiles down before the next column. programs: how many at once on the whole GPU; in a table, on one
        multiprocessor. splits: into how many sums K is cut; 0 in a table and among candidates: as many as fill the GPU.
        gain: in a table, how many times as fast as without one, as it was measured.
    """

    route: str = "fused"
    parts: int = 1
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    block_r: int = 16
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    programs: int = 1
    splits: int = 0
    gain: float = 0.0

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {self.route!r}")
        require_powers_of_two(self, "block_m", "block_n", "block_k", "block_r", "num_warps")
        require_at_least(self, block_m=32, block_n=16, block_k=16, block_r=16, num_stages=1, group_m=1, programs=1)
        require_at_least(self, parts=1, splits=0)


@dataclass(frozen=True)
class Case:
    """What an entry of a table is for.

    Attributes:
        transposed: dX, whose weight is ``[N, K]`` as the layer has it and whose product has K columns; else the forward.
        rank: of RANK_BUCKETS, 0 without an adapter. dropout: dX takes the adapter's part under a mask. rows: of ROW_BUCKETS.
    """

    dtype: str
    N: int
    K: int
    block_size: int
    nested: bool
    rows: int
    rank: int
    transposed: bool
    dropout: bool

    @property
    def key(self) -> str:
        way, option = "dx" if self.transposed else "forward", "dropout" if self.dropout else "plain"
        level = "nested" if self.nested else "flat"
        return f"{self.dtype} {way} n{self.N} k{self.K} b{self.block_size} {level} m{self.rows} r{self.rank} {option}"


def case(
    M: int, N: int, K: int, R: int, dtype: str, block_size: int, nested: bool, transposed: bool, dropout: bool
) -> Case:
    """The case nearest to a call, rows by their ratio."""
    rows = min(ROW_BUCKETS, key=lambda size: max(M, size) / min(M, size))
    rank = bucket(R, RANK_BUCKETS) if R else 0
    return Case(dtype, N, K, block_size, nested, rows, rank, transposed, dropout)


choice = Choice(VARIABLE, ("measured", *ROUTES))


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer
def kept(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: str,
    block_size: int,
    nested: bool,
    transposed: bool,
    dropout: bool,
    device: Device,
) -> ProductConfig | None:
    """What the table of the device says is faster than decoding the weight whole, if anything."""
    if not FEWEST_ROWS <= M <= 2 * ROW_BUCKETS[-1] or R > MOST_RANK or dtype not in DTYPES:
        return None
    key = case(M, N, K, R, dtype, block_size, nested, transposed, dropout).key
    return measured(device, "nf4_product", key, ProductConfig)


def fused(M: int, N: int, K: int, R: int, transposed: bool, columns: int, device: Device) -> ProductConfig:
    """The launch of a call that no table speaks of: the first candidate. N and K are the product's, of ``[M, K] [K, N]``, ``columns``
    the weight's: where 32 does not divide them, bytes are read one by one and each has a maximum of its own, for which larger tiles
    have no registers."""
    if columns % WHOLE_BYTES:
        return on(ProductConfig("fused", 1, 64, 32, 32, 16, 4, 2, programs=2), M, N, K, device)
    return on(candidates(M, R, transposed, device)[0], M, N, K, device)


def on(config: ProductConfig, M: int, N: int, K: int, device: Device) -> ProductConfig:
    """The launch that fills the device with ``config.programs`` on each of its multiprocessors, K cut as far as that takes."""
    programs = config.programs * device.multiprocessors
    splits = config.splits or splits_of(M, N, K, config.block_m, config.block_n, config.block_k, programs)
    return dataclasses.replace(config, programs=programs, splits=splits)


def splits_of(M: int, N: int, K: int, block_m: int, block_n: int, block_k: int, programs: int) -> int:
    """So many that programs there are find a tile each, but no more than leave eight steps to each sum, and no more than move
    what the packed weight does: a partial sum is written and read in float32, 8 M N bytes against N K / 2."""
    tiles = -(-M // block_m) * -(-N // block_n)
    return max(1, min(programs // tiles, -(-K // block_k) // 8, K // (16 * M)))


def candidates(M: int, R: int, transposed: bool, device: Device) -> list[ProductConfig]:
    """Tiles of the fused kernel that are worth timing on a device, the likeliest first; ``programs`` on one multiprocessor.

    Chosen by what the compiler shows on sm_80, sm_89, sm_90 and sm_100 with triton 3.6 and 3.7.1 (2026-11-21): no spills, 16-byte loads
    of both operands, registers and shared memory for as many programs as stand there. No GPU has timed them.
    """
    block_r = min(bucket(R, RANK_BUCKETS), 32)
    hopper = device.roomy
    if M <= 64:
        found = [ProductConfig("fused", 1, 64, 64, 64, block_r, programs=3 if hopper else 2)]
        if hopper and not transposed:
            # Twice as many tiles. Transposed a row would give 16 bytes, half of what memory moves at once.
            found.append(ProductConfig("fused", 1, 64, 32, 128, block_r, programs=3))
        return found
    if not hopper:
        found = [ProductConfig("fused", 1, 128, 128, 64, block_r, 8, 2)]
        if not device.crowded:  # which spills with triton 3.6 and 3.8
            found.insert(0, ProductConfig("fused", 1, 128, 64, 64, block_r, programs=2))
        return found
    found = [ProductConfig("fused", 1, 128, 64, 64, block_r, 4, 4, programs=2)]
    if device.capability >= (
        10,
        0,
    ):  # where what joins the sums takes registers, and two programs of 128 x 128 have none left
        found.append(ProductConfig("fused", 1, 128, 128, 64, block_r, 8))
    else:
        found.append(ProductConfig("fused", 1, 128, 128, 32, block_r, 4, 4, programs=2))
    if M > 128:
        # Half the decoding, and nothing beside it on its multiprocessor to multiply meanwhile.
        found.append(ProductConfig("fused", 1, 256, 128, 64, block_r, 8))
    return found


def parted(rows: int, parts: int, multiple: int) -> list[tuple[int, int]]:
    """``rows`` in at most ``parts`` runs of one length, a multiple of ``multiple``, the last perhaps shorter: where each begins and
    ends."""
    length = -(-rows // parts)
    length = max(multiple, -(-length // multiple) * multiple)
    return [(first, min(first + length, rows)) for first in range(0, rows, length)]


@dataclass(frozen=True)
class ColumnsConfig:
    """Tile of the dequantiser of columns. 64 columns are 32 bytes of a row, what memory moves at once."""

    rows: int = 32
    columns: int = 128
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "rows", "columns", "num_warps")


def nf4_dequantize_columns(dtype: str, device: Device) -> ColumnsConfig:
    return measured(device, "nf4_dequantize_columns", dtype, ColumnsConfig) or ColumnsConfig()


def launch_matrix(device: Device) -> Iterator[tuple[int, int, bool, int, ProductConfig]]:
    """Rows, rank, transposed, number among the candidates, and that candidate."""
    for M in (64, 128, 1024):
        for rank in (16, 64):
            for transposed in (False, True):
                for number, config in enumerate(candidates(M, rank, transposed, device)):
                    yield M, rank, transposed, number, config
