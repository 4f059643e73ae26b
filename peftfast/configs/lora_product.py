"""Where kernels/lora_product.py takes the place of the library's product, and its launch configurations.

The route: a layer's product stays with the library (cuBLAS) but where the GPU's table, ``<slug>.json`` beside this file, has the case
under ``lora_product``. ``python -m benchmarks.product`` measures shapes and writes the entries of those at which the kernel, adapter
included, reaches KEPT_FROM of the speed of the bare library product, and is faster than the library's product and a pass. No table is
here yet: no GPU has timed the kernel, so that nothing takes it unless it is asked for by :data:`VARIABLE`.

What it has to reach, at an H200's rates as others give them (790 TFLOP/s for bfloat16 products, 4.3 TB/s copied; not measured here),
M = 8192, R = 16: the product alone takes 2 M N K / 790 T; the pass that adds the adapter reads and writes 4 M N bytes.

    N x K          product   pass    break-even   the adapter's K step
    4096 x 4096     348 us   31 us   91.8 %       0.4 % of the operations
    8192 x 8192    1392 us   62 us   95.7 %       0.2 %
    14336 x 4096   1218 us  109 us   91.8 %       0.4 %

Below the break-even share the library and a pass are faster. At 98 % of the library a layer's forward or dX costs 1.02 times the
frozen one instead of 1.09 (4096 x 4096) or 1.045 (8192 x 8192). The mask of dX takes one Philox call for eight elements, about 100
instructions: 4.2 million calls at M = 8192 and N = 4096, 14 us of all multiprocessors' issue slots, 4 % of the product, unless two
programs share a multiprocessor and one draws its mask while the other multiplies: hence both kinds of tile among the candidates.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .device import Device, bucket, measured, require_at_least, require_powers_of_two
from .variable import Choice

VARIABLE = "PEFTFAST_LORA_PRODUCT"
CHOICES = ("measured", "always", "never")
KEPT_FROM = 0.98
DTYPES = ("bfloat16", "float16")
RANK_BUCKETS = (16, 32, 64, 128, 256, 512)
ROW_BUCKETS = (2048, 4096, 8192, 16384)
FEWEST_ROWS = 1536  # nearer to 2048 than to 1024, of which no entry tells


@dataclass(frozen=True)
class ProductConfig:
    """One launch.

    Attributes:
        block_m, block_n, block_k: the tile and its step. block_r: ranks of a step of the adapter's part.
        group_m: tiles down before the next column. programs: how many at once on the whole GPU; in a table, on one multiprocessor.
        tma: through descriptors. parts: into how many the tile is cut to be written.
        share: in a table, of the library's speed, as it was measured.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    block_r: int = 16
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    programs: int = 1
    tma: bool = True
    parts: int = 1
    share: float = 0.0

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_n", "block_k", "block_r", "num_warps", "parts")
        require_at_least(self, block_m=32, block_n=16, block_k=16, block_r=16, num_stages=1, group_m=1, programs=1)
        if self.parts > 2:
            raise ValueError(f"parts: expected 1 or 2, got {self.parts}")


@dataclass(frozen=True)
class Case:
    """What an entry of a table is for.

    Attributes:
        by_rows: w lies as ``[N, K]``, as the forward has W; else as ``[K, N]``, as dX has it.
        dropout: the adapter's part is masked. rows, rank: of ROW_BUCKETS and RANK_BUCKETS.
    """

    dtype: str
    N: int
    K: int
    rows: int
    rank: int
    by_rows: bool
    dropout: bool

    @property
    def key(self) -> str:
        order, option = "rows" if self.by_rows else "columns", "dropout" if self.dropout else "plain"
        return f"{self.dtype} {order} n{self.N} k{self.K} m{self.rows} r{self.rank} {option}"


def case(M: int, N: int, K: int, R: int, dtype: str, by_rows: bool, dropout: bool) -> Case:
    rows = min(ROW_BUCKETS, key=lambda size: abs(M - size))
    return Case(dtype, N, K, rows, bucket(R, RANK_BUCKETS), by_rows, dropout)


# "measured": the table decides; "always": wherever the kernel can; "never".
choice = Choice(VARIABLE, CHOICES)


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer
def kept(M: int, N: int, K: int, R: int, dtype: str, by_rows: bool, dropout: bool, device: Device) -> bool:
    """Whether the table of the device says that the kernel is the faster way."""
    if M < FEWEST_ROWS or R > RANK_BUCKETS[-1] or dtype not in DTYPES:
        return False
    key = case(M, N, K, R, dtype, by_rows, dropout).key
    return measured(device, "lora_product", key, ProductConfig) is not None


def lora_product(
    M: int, N: int, K: int, R: int, dtype: str, out: str, by_rows: bool, dropout: bool, tma: bool, device: Device
) -> ProductConfig:
    """The launch of a call: the table's if it has the case, else the first candidate."""
    config = None
    if tma:
        config = measured(device, "lora_product", case(M, N, K, R, dtype, by_rows, dropout).key, ProductConfig)
    config = config or candidates(R, out, tma, device)[0]
    return on(config, device)


def on(config: ProductConfig, device: Device) -> ProductConfig:
    """The launch that fills the device with ``config.programs`` on each of its multiprocessors."""
    return replace(config, programs=config.programs * device.multiprocessors)


def uses_copy_engine(device: Device) -> bool:
    """sm_120 has one and goes without: triton 3.6 spills 8 bytes there with any tile."""
    return device.roomy


def candidates(R: int, out: str, tma: bool, device: Device) -> list[ProductConfig]:
    """What is worth timing on a device, the likeliest first; ``programs`` on one multiprocessor.

    Chosen by what the compiler shows on sm_80, sm_89, sm_90 and sm_100 with triton 3.6 and 3.7.1 (2026-11-21): no spills, shared memory
    within the limit for as many programs as stand there, on sm_90 one wgmma in flight. No GPU has timed them.
    """
    block_r = min(bucket(R, RANK_BUCKETS), 32)
    if not tma:
        # By pointers: addresses and masks take registers, and before sm_90 an accumulator of 256 columns has none left.
        return [ProductConfig(128, 128, 32, block_r, 8, 3, tma=False)]
    if device.shared_memory < 220 * 1024:
        return [ProductConfig(128, 128, 64, block_r, 8, 2, parts=2)]
    if device.capability >= (
        10,
        0,
    ):  # where sums lie in a memory of their own, and what joins them takes registers on its way
        block_r = 16
        beside = ProductConfig(128, 128, 64, block_r, 8, 2 if out == "float32" else 3, programs=2, parts=2)
    else:
        beside = ProductConfig(128, 128, 64, block_r, 4, 2 if out == "float32" else 3, programs=2, parts=2)
    found = [ProductConfig(128, 256, 64, block_r, 8, 3, parts=2), beside]
    if out != "float32":  # whose tile to be written takes the fourth stage's shared memory
        found.append(ProductConfig(128, 256, 64, block_r, 8, 4, parts=2))
    if device.capability < (10, 0):  # spills beyond
        found.append(ProductConfig(256, 128, 64, block_r, 8, 3, parts=2))
    return found


def launch_matrix(device: Device) -> Iterator[tuple[int, str, bool, bool, bool, int, ProductConfig]]:
    """Rank, dtype of the result, by_rows, dropout, tma, number among the candidates, and that candidate."""
    forms = (False, True) if uses_copy_engine(device) else (False,)
    for rank in (16, 64):
        for out in ("bfloat16", "float32"):
            for by_rows, dropout in ((True, False), (False, False), (False, True)):
                for tma in forms:
                    for number, config in enumerate(candidates(rank, out, tma, device)):
                        yield rank, out, by_rows, dropout, tma, number, config
