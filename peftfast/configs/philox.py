"""Launch configurations of kernels/philox.py."""

from collections.abc import Iterator
from dataclasses import dataclass

from .device import Device, measured, require_powers_of_two


@dataclass(frozen=True)
class MaskConfig:
    """A tile of the keep mask; block_c is a multiple of 8, the columns that share a counter."""

    block_m: int = 8
    block_c: int = 512
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block_m", "block_c", "num_warps")
        if self.block_c < 8:
            raise ValueError(f"block_c: expected at least 8, got {self.block_c}")


@dataclass(frozen=True)
class WordsConfig:
    """Counters of one program."""

    block: int = 256
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(self, "block", "num_warps")


def dropout_mask(device: Device) -> MaskConfig:
    return measured(device, "dropout_mask", "any", MaskConfig) or MaskConfig()


def philox_words(device: Device) -> WordsConfig:
    return measured(device, "philox_words", "any", WordsConfig) or WordsConfig()


def launch_matrix(device: Device) -> Iterator[tuple[str, MaskConfig | WordsConfig]]:
    """Every (op, configuration) that can be launched on a device."""
    yield "dropout_mask", dropout_mask(device)
    yield "philox_words", philox_words(device)
