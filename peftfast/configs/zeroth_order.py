"""Launch configurations of kernels/zeroth_order.py."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .device import Device, blocks, bucket, measured, parts, require_at_least, require_powers_of_two

DTYPES = ("float32", "bfloat16", "float16")
# A direction costs a GPU about as many instructions as a row of both products takes cycles for one weight: past some 200 rows a sign,
# drawing z again for each tile of rows costs more than writing both weights to scratch once (arithmetic, not measured on a GPU).
LARGEST_FUSED_ROWS = 128


# Rows a sign up to which the CPU kernel, which writes no moved weight, is quicker than moving slabs of rows and multiplying each by
# torch. 2048 x 2048 and 1024 x 4096, Gaussian, one thread of an AMD EPYC of the Zen 5 generation (2026-11-21), fused against slabs, ms:
# bfloat16 4.0 and 4.1 at 8 rows, 5.0 and 4.5 at 16, where torch multiplies on other instructions; float16 6.4 and 21.7 at 32; float32
# 18.7 and 25.5 at 128.
CPU_FUSED_ROWS = {"float32": 128, "bfloat16": 8, "float16": 128}
# Of each moved weight: two slabs of bfloat16 are 1 MB, a second-level cache.
CPU_SLAB_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class PerturbConfig:
    """Elements of one program, a multiple of 1024, and its warps."""

    block: int = 2048
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block", "num_warps")
        if self.block < 1024:
            raise ValueError(f"block: expected at least 1024, got {self.block}")


@dataclass(frozen=True)
class ZoLinearConfig:
    """A tile of both products: block_m rows of each sign, block_n columns of y, block_k of W at a time; ``splits``: parts into which
    K is cut."""

    block_m: int
    block_n: int = 32
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_n", "block_k", "num_warps")
        require_at_least(self, block_m=16, block_n=16, block_k=16, num_stages=1, splits=1)


def perturb(dtype: str, rademacher: bool, device: Device) -> PerturbConfig:
    """Sixteen elements a thread, which share what a program finds out first; with 32 ptxas spills four words of the normals' kernel on
    sm_100. Signs take 32: a thread draws one counter, of 128 signs, however many elements it has."""
    key = f"{dtype} {'rademacher' if rademacher else 'gaussian'}"
    default = PerturbConfig(4096) if rademacher else PerturbConfig()
    return measured(device, "perturb_", key, PerturbConfig) or default


def zo_linear(M: int, N: int, K: int, dtype: str, rademacher: bool, device: Device) -> ZoLinearConfig | None:
    """The tile for M rows a sign; None where scratch weights and the library's product serve better: many rows, rows of W that begin
    inside a counter, and float32, whose exact products spill registers at any tile (3 KB a thread at 32 x 32 x 64), as all do without
    tensor cores."""
    if M > LARGEST_FUSED_ROWS or K % 4 or dtype == "float32" or not device.tensor_cores:
        return None
    rows = bucket(M, (16, 32, 64, 128))
    key = f"{dtype} {'rademacher' if rademacher else 'gaussian'} M{rows}"
    default = ZoLinearConfig(rows, num_warps=8 if rows >= 32 else 4)
    return _cut(measured(device, "zo_linear", key, ZoLinearConfig) or default, M, N, K, device)


def zo_nf4_linear(
    M: int, N: int, K: int, block_size: int, dtype: str, distribution: str, device: Device
) -> ZoLinearConfig | None:
    """The tile for M rows a sign of a 4-bit weight; ``distribution`` is gaussian, rademacher, or scales where z moves those. None:
    more rows, which spill registers where a thread loads 16 bytes (280 bytes a thread at 128 rows). A step has one maximum a row, so
    it is at most a block."""
    if M > 64 or not device.tensor_cores:
        return None
    rows = bucket(M, (16, 32, 64))
    # A tile has 16 packed bytes for each thread, which loads them at once and draws z of their 32 elements by 8 counters.
    warps, columns = (4 if rows >= 64 else 2), min(64, block_size)
    # With little shared memory the compiler holds what it reads ahead in registers, and spills 8 to 32 bytes of 64 rows.
    stages = 1 if rows == 64 and device.small else 2
    default = ZoLinearConfig(
        rows, block_n=warps * 32 * 32 // columns, block_k=columns, num_warps=warps, num_stages=stages
    )
    config = measured(device, "zo_nf4_linear", f"{dtype} {distribution} M{rows}", ZoLinearConfig) or default
    return _cut(config, M, N, K, device)


def _cut(config: ZoLinearConfig, M: int, N: int, K: int, device: Device) -> ZoLinearConfig:
    programs = blocks(N, config.block_n) * blocks(M, config.block_m)
    return replace(config, splits=parts(programs, blocks(K, config.block_k), device, max(1, 16 // config.num_warps)))


def launch_matrix(device: Device) -> Iterator[tuple[str, str, bool, int, PerturbConfig | ZoLinearConfig]]:
    """Every (op, dtype, rademacher, rows, configuration) that can be launched on a device; rows is 0 for perturb_."""
    for dtype in DTYPES:
        for rademacher in (False, True):
            yield "perturb_", dtype, rademacher, 0, perturb(dtype, rademacher, device)
            for rows in (16, 32, 64, 128):
                config = zo_linear(rows, 4096, 4096, dtype, rademacher, device)
                if config is not None:
                    yield "zo_linear", dtype, rademacher, rows, config
