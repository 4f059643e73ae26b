"""Launch configurations of kernels/nf4.py."""

from collections.abc import Iterator
from dataclasses import dataclass

from .device import Device, measured, require_powers_of_two

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Nf4Config:
    """Packed bytes of one program, rounded up to a whole block, and its warps."""

    tile_bytes: int = 2048
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "tile_bytes", "num_warps")


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


def launch_matrix(device: Device) -> Iterator[tuple[Case, Nf4Config]]:
    """Every case with its configuration."""
    for dtype in DTYPES:
        for block_size in BLOCK_SIZES:
            for nested in (False, True):
                case = Case(dtype, block_size, nested)
                yield case, nf4_dequantize(case, device)
