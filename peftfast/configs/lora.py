"""Launch configurations of kernels/lora.py.

What is compiled depends on a :class:`Case` alone, which has few values, so that a training run compiles each of its
kernels once; into how many parts a sum is cut follows from the sizes and is an ordinary argument of the kernel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .device import Device, blocks, bucket, measured, parts, require_at_least, require_powers_of_two

OPS = ("lora_shrink", "lora_expand", "lora_weight_grad", "lora_dy_grads")
RANK_BUCKETS = (16, 32, 64, 128)
ROW_BUCKETS = (16, 64)  # 64 rows are what one Hopper tensor core instruction takes; 16 are a decoding step's
# (wide, narrow, compute): QLoRA after prepare_model_for_kbit_training first, then PEFT's default of float32 adapters
# on a 16-bit base.
DTYPES = (
    ("float32", "float32", "bfloat16"),
    ("bfloat16", "float32", "bfloat16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "float32", "float32"),
    ("float32", "float32", "float16"),
    ("float16", "float32", "float16"),
    ("float16", "float16", "float16"),
    ("bfloat16", "float32", "float32"),  # DoRA's norms
)
# dy_grads reads dy once up to this rank. Its partial sums of ds weigh 4 R / block_c bytes for every byte pair of dy, written and read
# again. By the model of _shrink, 8192 x 4096, in times that dy takes of the memory: of rank 32 1.8 at once and 2.2 in two readings, of
# rank 64 2.9 and 2.5, since but one program of 128 KiB is there at once.
LARGEST_ONE_PASS_RANK = 32

# From this rank and this many rows on a pass over bfloat16 is a product of torch's library, where the CPU multiplies bfloat16.
# Kernel against library, 512 rows of 2048 x 2048, ms of one thread of an AMD EPYC of the Zen 5 generation (2026-11-21):
# x A^T at rank 16, 32, 64, 128, 256 0.30/0.23, 0.52/0.19, 1.23/0.42, 2.30/0.77, 4.93/1.34; y += s S B^T 0.44/0.18, 0.58/0.25,
# 1.02/0.46, 1.68/0.84, 3.12/1.48; dS and dB 0.57/0.36, 1.06/0.44, 2.17/0.86, 4.23/1.51, 8.68/2.76; dA 0.22/0.16, 0.46/0.25,
# 0.86/0.40, 1.71/0.86, 3.25/1.54, where the kernel multiplied float32. Since it multiplies bfloat16 in pairs the whole layer,
# forward and backward, takes at rank 16, 32, 64, 128, 256 21.7/22.1, 22.8/22.4, 24.0/23.5, 27.0/25.3, 33.9/29.2 ms, and under dropout
# 22.5/23.3, 23.3/24.3, 24.4/25.0, 27.5/26.6, 33.8/30.4.
LIBRARY_RANKS = 32
LIBRARY_ROWS = 64
# Under dropout it is a product of a masked copy, made by slabs: x^ A^T at rank 32, 64, 128, 256 0.91/0.49, 1.53/0.64, 2.98/0.98,
# 5.54/1.69; dX += mask(dS A) 0.63/0.55, 1.07/0.68, 1.74/1.11, 3.11/1.64; dA 0.70/0.66, 1.23/1.06, 2.14/1.30, 3.84/1.93 (same
# machine). 64 rows at a time take a fifth more than 256, 256 columns half more than 1024, all rows or columns no less. Of three
# adapters at once, each with a mask of its own, the passes of rank 32 take as long either way, those of rank 64 5.7/3.1, 4.5/3.7
# and 4.4/4.2.
SLAB_ROWS = 256
SLAB_COLUMNS = 1024
LIBRARY_MASKED_TERM_RANKS = 64


@dataclass(frozen=True)
class LoraConfig:
    """One launch.

    Attributes:
        block_m: rows of a tile. block_c: its columns of the wide matrix (K of x, N of base and dy). block_r: ranks
            held at once.
        splits: parts into which the long sum is cut: K of shrink, M of the gradients; unused by expand.
    """

    block_m: int
    block_c: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_c", "block_r", "num_warps")
        require_at_least(self, block_m=16, block_c=16, block_r=16, num_stages=1, splits=1)


@dataclass(frozen=True)
class DyGradsConfig:
    """Either one launch that reads dy once, or two."""

    one_pass: LoraConfig | None
    ds_pass: LoraConfig | None = None
    db_pass: LoraConfig | None = None


@dataclass(frozen=True)
class Case:
    """What a configuration and a compiled variant depend on.

    Attributes:
        wide: dtype of x, base or dy. narrow: dtype of w (A or B). compute: dtype of the products.
        rank, rows: of RANK_BUCKETS and ROW_BUCKETS.
        ragged: 8 does not divide the rank, or 16 not the width of the wide matrix: elements are addressed one by one, in more
            registers.
    """

    op: str
    wide: str
    narrow: str
    compute: str
    rank: int
    rows: int
    dropout: bool
    ragged: bool = False

    @property
    def plain(self) -> bool:
        """Products of float32 outside of tensor cores. The S pass and dA's form those of two bytes with others, or of bfloat16 with
        float32, on tensor cores all the same (kernels/numerics.py)."""
        mixed = self.wide == self.narrow != "float32" or (self.wide, self.narrow) == ("bfloat16", "float32")
        return self.compute == "float32" and not (mixed and self.op in ("lora_shrink", "lora_weight_grad"))

    @property
    def key(self) -> str:
        """The case's name in a device's table."""
        options = ("dropout" if self.dropout else "plain") + (" ragged" if self.ragged else "")
        return f"{self.wide} {self.narrow} {self.compute} r{self.rank} m{self.rows} {options}"


def case(op: str, M: int, width: int, R: int, wide: str, narrow: str, compute: str, dropout: bool) -> Case:
    """The case of a call; ``width`` is K of x or N of base and dy."""
    ragged = bool(width % 16 or R % 8)
    return Case(op, wide, narrow, compute, bucket(R, RANK_BUCKETS), bucket(M, ROW_BUCKETS), dropout, ragged)


def tile(case: Case, device: Device) -> LoraConfig:
    """The blocks of one launch: the device's table if it has the case, else the heuristic."""
    return measured(device, case.op, case.key, LoraConfig) or _HEURISTICS[case.op](case, device)


def lora_shrink(M: int, K: int, R: int, x: str, w: str, compute: str, dropout: bool, device: Device) -> LoraConfig:
    config = tile(case("lora_shrink", M, K, R, x, w, compute, dropout), device)
    programs = blocks(M, config.block_m) * blocks(R, config.block_r)
    return replace(config, splits=parts(programs, blocks(K, config.block_c), device))


def lora_expand(M: int, N: int, R: int, base: str, w: str, compute: str, dropout: bool, device: Device) -> LoraConfig:
    return tile(case("lora_expand", M, N, R, base, w, compute, dropout), device)


def lora_weight_grad(M: int, K: int, R: int, x: str, compute: str, dropout: bool, device: Device) -> LoraConfig:
    config = tile(case("lora_weight_grad", M, K, R, x, compute, compute, dropout), device)
    programs = blocks(K, config.block_c) * blocks(R, config.block_r)
    return replace(config, splits=parts(programs, blocks(M, config.block_m), device))


def lora_dy_grads(M: int, N: int, R: int, dy: str, b: str, device: Device) -> DyGradsConfig:
    if R > LARGEST_ONE_PASS_RANK:
        return DyGradsConfig(
            None, lora_shrink(M, N, R, dy, b, dy, False, device), lora_weight_grad(M, N, R, dy, dy, False, device)
        )
    config = tile(case("lora_dy_grads", M, N, R, dy, b, dy, False), device)
    programs = blocks(N, config.block_c) * blocks(R, config.block_r)
    return DyGradsConfig(replace(config, splits=parts(programs, blocks(M, config.block_m), device)))


def launch_matrix(device: Device) -> Iterator[tuple[Case, LoraConfig]]:
    """Every case that the functions above can ask for, with its configuration."""
    for op in OPS:
        for wide, narrow, compute in DTYPES:
            if op == "lora_dy_grads" and wide != compute:
                continue
            for rank in RANK_BUCKETS:
                if op == "lora_dy_grads" and rank > LARGEST_ONE_PASS_RANK:
                    continue
                for rows in ROW_BUCKETS:
                    for dropout in (False,) if op == "lora_dy_grads" else (False, True):
                        for ragged in (False, True):
                            one = Case(op, wide, narrow, compute, rank, rows, dropout, ragged)
                            yield one, tile(one, device)


# Chosen by what the compiler shows on sm_80, sm_89, sm_90 and sm_100 with triton 3.7.1 (2026-11-20): no spills, at
# most 190 registers, 16-byte loads. ptxas spills 8 bytes to stay at 64, 96 or 128 registers a thread, so that
# neighbours of these blocks often fail. No GPU has timed them yet.
def _shrink(case: Case, device: Device) -> LoraConfig:
    if case.plain:
        return LoraConfig(16, 32, min(case.rank, 64), num_stages=2)
    if case.ragged:
        return LoraConfig(case.rows, 32, 16, num_warps=8 if case.rows == 64 and not device.crowded else 4, num_stages=1)
    if case.rows == 16:  # x is small here: reading it once for every 64 ranks costs less than registers for 128
        return LoraConfig(16, 64, min(case.rank, 64))
    if case.compute == "float32":
        # Three products of each tile of w, whose parts are cut anew in every program: the taller the tile, the fewer. By the model
        # below, of 64 x 32, 64 x 64 and 128 x 64 (eight warps): rank 16 0.87, 0.87, 0.78, 32 0.64, 0.77, 0.68, 64 0.43, 0.31, 0.45.
        # In float32 outside of tensor cores it was 0.10 of rank 16 and 0.07 of 64.
        if case.rank <= 32 and device.crowded:
            return LoraConfig(64, 32, 16) if case.rank == 16 else LoraConfig(64, 64, 32, num_warps=8)
        if case.rank <= 32:
            return LoraConfig(64, 64, case.rank)
        return LoraConfig(128, 64, 64, num_warps=8) if device.roomy else LoraConfig(64, 32, 64)
    if device.roomy:
        # Many programs of few registers at once. The part of the memory's speed that a model of a multiprocessor reaches with the
        # machine code for sm_90 (tests/support/throughput.py, dropout, float32 w, 8192 x 4096, 512 programs of four warps, triton
        # 3.7.1, 2026-11-22), of tiles of 64 x 32, 64 x 64 and 128 x 64 (x 32 of float32): bfloat16 x of rank 16 0.89, 0.90, 0.66
        # (0.82 of eight warps), 32 0.85, 0.72, 0.59, 64 0.62, 0.52, 0.53; float32 x of rank 16 0.93, 0.67, 0.81, 32 0.92, 0.82, 0.80,
        # 64 0.86, 0.70, 0.65, 128 0.53, 0.37 and spilled.
        wider = case.wide != "float32" and (case.rank == 16 or case.rank == 128 and not case.dropout)
        return LoraConfig(64, 64 if wider else 32, case.rank)
    if case.rank == 128:
        return LoraConfig(64, 32, 128, num_warps=4 if case.narrow != "float32" else 8)
    if case.rank == 64:
        # 64 columns of float32 x take 65 KiB a program: sm_86, sm_89 and sm_120 would hold one at a time.
        return LoraConfig(64, 32 if device.small else 64, 64, num_warps=8)
    return LoraConfig(64, 64, case.rank)


def _expand(case: Case, device: Device) -> LoraConfig:
    if case.plain:
        return LoraConfig(16, 64, 16, num_stages=2)
    if case.ragged:
        return LoraConfig(case.rows, 64, 16, num_warps=8 if case.rows == 64 else 4, num_stages=1)
    if case.rows == 16 or device.small:
        # Eight warps: the tile of float32 sums, the base and the mask words take 180 registers a thread of four. The wide tiles below
        # spill on sm_89.
        return LoraConfig(case.rows, 128, min(case.rank, 32), num_warps=8 if case.rows == 64 else 4, num_stages=2)
    # 128 bytes of a row, so that four programs or more are there at once: while one waits for its base, another multiplies. By the
    # model of _shrink, beside tiles of 64 x 128 and eight warps: bfloat16 of rank 16 0.88 and 0.69 under dropout, 0.97 and 0.95
    # without, 64 0.70 and 0.54, 0.92 and 0.77; float32 of rank 16 and 64 0.98 and 0.83, 0.95 and 0.51 under dropout.
    if case.wide == "float32":
        return LoraConfig(64, 32, min(case.rank, 32), num_stages=1)
    ranks = {16: 16, 32: 16, 64: 64, 128: 64} if case.dropout else {16: 16, 32: 32, 64: 32, 128: 64}
    return LoraConfig(64, 64, ranks[case.rank], num_stages=1)


def _weight_grad(case: Case, device: Device) -> LoraConfig:
    if case.plain:
        return LoraConfig(16, 32, min(case.rank, 64), num_stages=2)
    if case.ragged:
        rows, warps = (32, 8) if case.rows == 64 else (16, 4)
        return LoraConfig(rows, 64, min(case.rank, 32), num_warps=warps, num_stages=2)
    if case.compute == "float32":
        # Three products of each tile of ds. By the model of _shrink, of 64 x 64 and of 32 x 128 (eight warps), and under dropout: rank
        # 16 0.91 and 0.70, 64 0.37, 0.30 and 0.51, 0.40; outside of tensor cores it was 0.29 and 0.18 without.
        if case.rows == 16 or case.rank <= 32:
            # Of rank 32 sm_80 and sm_89 spill with 64 rows.
            tall = device.roomy or (case.rank == 16 and not device.crowded)
            stages = 2 if device.crowded and case.rows == 16 else 3
            return LoraConfig(case.rows if tall else min(case.rows, 32), 64, min(case.rank, 64), num_stages=stages)
        return LoraConfig(32, 128, 64, num_warps=8)
    if case.rows == 64 and device.roomy:
        # By the model of _shrink, of 32 and of 64 rows, under dropout: bfloat16 of rank 16 0.82 and 0.87, 32 0.75 and 0.83, 64 0.70 and
        # 0.72, 128 0.41 and 0.46 (in 194 registers); float32 0.93 and 0.91, 0.92 and 0.76, 0.88 and 0.78, 0.62 (in 199) and 0.59.
        # Without dropout they differ by 0.01 at most but for bfloat16 of rank 128, 0.68 and 0.63. Tiles of 32 columns gain 0.04 at most
        # and lose up to 0.2.
        if case.rank == 128 and device.capability >= (10, 0):  # where triton 3.6 spills with 32 rows
            return LoraConfig(64, 128, 128, num_warps=8)
        short = not case.dropout or case.rank < 128 if case.wide == "float32" else case.rank == 128
        return LoraConfig(32 if short else 64, 64, case.rank)
    low = case.rank == 64 and device.small  # three programs in the shared memory of one
    warps = 8 if case.rows == 64 and case.rank >= 64 else 4
    return LoraConfig(min(case.rows, 32) if low else case.rows, 64, case.rank, num_warps=warps)


def _dy_grads(case: Case, device: Device) -> LoraConfig:
    if case.plain:
        return LoraConfig(16, 64, min(case.rank, 32), num_stages=2)
    if case.rows == 16:
        return LoraConfig(16, 64, case.rank, num_stages=2)
    if case.ragged:
        return LoraConfig(64, 64, min(case.rank, 32), num_warps=8, num_stages=2)
    # The wider the strip, the fewer partial sums of ds.
    stages = 1 if device.crowded else 2  # with two triton 3.6 spills 8 bytes of rank 32 to stay at 128 registers
    return LoraConfig(64, 128 if device.small else 256, case.rank, num_warps=8, num_stages=stages)


_HEURISTICS = dict(zip(OPS, (_shrink, _expand, _weight_grad, _dy_grads), strict=True))


def group_pays(device_type: str, rows: int, dropout: bool, ranks: Sequence[int]) -> bool:
    """Whether layers that get the same x run faster together than one after the other.

    On a GPU x is read from memory once instead of three times, forward and backward, and a third of the calls is made; not measured.
    On a CPU x lies in a cache, and what is saved is Python alone. Three layers of 512 x 512, r = 16, bfloat16, forward and backward,
    together over alone: 0.96 with 512 rows and nothing dropped; 0.98 to 1.04 with 32 to 256 rows; 1.07 with 64 x 64 and 16 rows, 1.11
    with 16 x 16 and 2 rows (Zen 5, AVX-512, one thread, 2026-11-21). With r = 64, which torch's library multiplies, 0.92 and 0.99 with
    128 and 512 rows, under dropout 0.88 and 0.94, with 64 rows 0.94 to 1.17. Of ranks on both sides of LIBRARY_RANKS the high ones
    have the library alone, and together not.
    """
    if device_type != "cpu":
        return True
    least, most = min(ranks), max(ranks)
    if least >= LIBRARY_MASKED_TERM_RANKS:
        return rows >= 128
    return rows >= 512 and not dropout and (most < LIBRARY_RANKS or least >= LIBRARY_RANKS)
