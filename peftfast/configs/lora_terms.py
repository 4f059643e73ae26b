"""Launch configurations of kernels/lora_terms.py and kernels/lora_dora.py.

As in configs/lora.py a compiled variant depends on few values; here the blocks of ranks of all adapters lie on one grid axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .device import Device, blocks, bucket, measured, parts, require_at_least, require_powers_of_two
from .lora import ROW_BUCKETS, LoraConfig

OPS = ("lora_terms_shrink", "lora_terms_expand", "lora_terms_weight_grad", "lora_dora_expand")
RANK_BUCKETS = (16, 32, 64)
DTYPES = (
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float32", "float16"),
    ("float16", "float16"),
)


@dataclass(frozen=True)
class Case:
    """What a configuration depends on. wide: dtype of x or base. compute: of the products. rank: the largest, of RANK_BUCKETS."""

    op: str
    wide: str
    compute: str
    rank: int
    rows: int
    dropout: bool

    @property
    def key(self) -> str:
        """The case's name in a device's table."""
        return f"{self.wide} {self.compute} r{self.rank} m{self.rows} {'dropout' if self.dropout else 'plain'}"


@dataclass(frozen=True)
class TileConfig:
    """A launch over tiles of one matrix; ``splits``: parts into which a sum over its rows is cut."""

    block_m: int
    block_c: int
    num_warps: int = 4
    splits: int = 1

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_c", "num_warps")
        require_at_least(self, splits=1)


def tile(case: Case, device: Device) -> LoraConfig:
    """The blocks of one launch: the device's table if it has the case, else the heuristic."""
    return measured(device, case.op, case.key, LoraConfig) or _heuristic(case, device)


def _case(op: str, M: int, ranks: list[int], wide: str, compute: str, dropout: bool) -> Case:
    rank = bucket(max(ranks, default=1), RANK_BUCKETS)
    return Case(op, wide, compute, rank, bucket(M, ROW_BUCKETS), dropout)


def lora_terms_shrink(
    M: int, K: int, ranks: list[int], x: str, compute: str, dropout: bool, device: Device
) -> LoraConfig:
    config = tile(_case("lora_terms_shrink", M, ranks, x, compute, dropout), device)
    programs = blocks(M, config.block_m) * sum(blocks(rank, config.block_r) for rank in ranks)
    return replace(config, splits=parts(programs, blocks(K, config.block_c), device))


def lora_terms_expand(
    M: int, N: int, ranks: list[int], base: str, compute: str, dropout: bool, device: Device
) -> LoraConfig:
    return tile(_case("lora_terms_expand", M, ranks, base, compute, dropout), device)


def lora_terms_weight_grad(
    M: int, K: int, ranks: list[int], x: str, compute: str, dropout: bool, device: Device
) -> LoraConfig:
    config = tile(_case("lora_terms_weight_grad", M, ranks, x, compute, dropout), device)
    programs = blocks(K, config.block_c) * sum(blocks(rank, config.block_r) for rank in ranks)
    return replace(config, splits=parts(programs, blocks(M, config.block_m), device))


def lora_terms_dy_grads(
    M: int, N: int, ranks: list[int], dy: str, compute: str, device: Device
) -> tuple[LoraConfig, LoraConfig]:
    """Of the readings of dy for ds and for db."""
    ds = lora_terms_shrink(
        M, N, [min(rank, 32) for rank in ranks], dy, dy, False, device
    )  # B lies by columns: 64 ranks spill
    return ds, lora_terms_weight_grad(M, N, ranks, dy, compute, False, device)


def lora_dora_expand(M: int, N: int, R: int, base: str, compute: str, device: Device) -> LoraConfig:
    return tile(_case("lora_dora_expand", M, [R], base, compute, False), device)


def lora_gain_grads(M: int, N: int, device: Device) -> TileConfig:
    config = TileConfig(32, 128)
    return replace(config, splits=parts(blocks(N, config.block_c), blocks(M, config.block_m), device))


def lora_dropout_add(device: Device) -> TileConfig:
    return TileConfig(16, 128)


def launch_matrix(device: Device) -> Iterator[tuple[Case, LoraConfig]]:
    """Every case that the functions above can ask for, with its configuration."""
    for op in OPS:
        for wide, compute in DTYPES:
            for rank in RANK_BUCKETS:
                for rows in ROW_BUCKETS:
                    for dropout in (False,) if op == "lora_dora_expand" else (False, True):
                        one = Case(op, wide, compute, rank, rows, dropout)
                        yield one, tile(one, device)


# Chosen by what the compiler shows (no spills); no GPU has timed them. Strides and addresses come from memory here, so that
# these kernels take more registers than their siblings of configs/lora.py.
def _heuristic(case: Case, device: Device) -> LoraConfig:
    if case.compute == "float32":
        return LoraConfig(16, 32, 16, num_stages=2)
    if case.op in ("lora_terms_expand", "lora_dora_expand"):
        # Four warps, for four programs at once. By the model of configs/lora.py's _shrink three terms reach, with eight warps and with
        # four, of the memory's speed: rank 16 0.49 and 0.58, under dropout 0.21 and 0.32, 64 0.23 and 0.26, 0.11 and 0.15.
        if case.rows == 16:
            return LoraConfig(16, 64, 16, num_stages=2 if device.crowded else 1)
        warps = 4 if device.roomy or device.crowded else 8
        # Of float32 sm_100 spills 8 bytes of ranks from 32 on with one stage.
        stages = 2 if case.wide == "float32" and case.rank > 16 and device.capability[0] == 10 else 1
        return LoraConfig(64, 64, min(case.rank, 32), num_warps=warps, num_stages=stages)
    if case.rows == 64 and device.roomy:
        # Every term reads x anew, from the second cache: what binds is the processor's part. The busiest unit works, counted on sm_90
        # (tests/support/throughput.py, triton 3.7.1, 2026-11-22), of the time in which the memory would bring bfloat16 x once: S of
        # rank 16 0.82 with tiles of 32 rows and 0.35 with 64, under dropout 1.08 and 0.79. By the model, with 32 columns and with 64,
        # S of rank 16 under dropout 0.93 and 0.99, 64 0.70 and 0.46.
        return LoraConfig(64, 32 if case.op == "lora_terms_shrink" and case.rank > 16 else 64, case.rank)
    shrink = case.op == "lora_terms_shrink"
    rank = min(case.rank, 32) if shrink and case.rows == 16 else case.rank
    # With two stages 8 bytes of S of rank 64 under dropout are spilled on sm_80, to stay at 128 registers (triton 3.8 and 3.9).
    deep = shrink and case.dropout and rank == 64 and not device.small
    shallow = case.rows == 16 and not shrink and device.crowded
    return LoraConfig(min(case.rows, 32), 64, rank, num_stages=3 if deep else 1 if shallow else 2)
