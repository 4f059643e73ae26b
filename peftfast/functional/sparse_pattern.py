"""Which weights of a matrix a sparse delta changes: validated once, sorted, and for structured supports kept as slabs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import streams  # type: ignore[attr-defined]

STRUCTURES = ("rows", "columns", "blocks")
_LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """The support of a sparse delta on a weight ``[N, K]``.

    Attributes:
        indices: int32 or int64 ``[S]``, flat row-major positions, ascending and distinct, at least one.
        shape: (N, K).
        structure: None, or "rows", "columns" or "blocks" where the support is whole rows, columns or square blocks, as the class
            methods make it: the gradient is then formed by dense products of slabs.
        parts: int64, ascending: which rows, columns or blocks (block = block row * (K / block_size) + block column).
        block_size: side of a block, 16 to 256.

    The values of a delta lie in the order of ``indices``, whatever the structure.

    Raises:
        TypeError: indices are no tensor of int32 or int64. ValueError: unsorted, repeated, negative or beyond the weight, each named
            with its first place.
    """

    indices: Tensor
    shape: torch.Size
    structure: str | None = None
    parts: Tensor | None = None
    block_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(self.shape))
        object.__setattr__(self, "_tiles", {})
        check_indices(self.indices, self.shape)
        if (self.structure is None) != (self.parts is None) or self.structure not in (None, *STRUCTURES):
            raise ValueError(f"structure: expected None or one of {STRUCTURES} with parts, got {self.structure!r}")
        if self.structure is not None:
            expected = _structured(self.structure, self.parts, self.shape, self.block_size)
            if not torch.equal(expected.to(self.indices), self.indices):
                raise ValueError(f"indices: expected those of the {self.structure} named by parts")

    @property
    def count(self) -> int:
        """How many weights are active."""
        return self.indices.numel()

    @property
    def density(self) -> float:
        return self.count / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @classmethod
    def from_unsorted(cls, indices: Tensor, shape: Sequence[int]) -> tuple[SparsePattern, Tensor]:
        """A pattern of indices in any order, and the order that sorts them: values given beside them become ``values[order]``."""
        if not isinstance(indices, Tensor) or indices.dim() != 1:
            raise TypeError(f"indices: expected a vector, got {_described(indices)}")
        ordered, order = torch.sort(indices)
        return cls(ordered, torch.Size(shape)), order

    @classmethod
    def from_rows(cls, rows: Tensor | Sequence[int], shape: Sequence[int]) -> SparsePattern:
        """Whole rows of the weight: output features."""
        return cls._of("rows", rows, shape)

    @classmethod
    def from_columns(cls, columns: Tensor | Sequence[int], shape: Sequence[int]) -> SparsePattern:
        """Whole columns of the weight: input features. Only these columns of x are kept for the backward."""
        return cls._of("columns", columns, shape)

    @classmethod
    def from_blocks(cls, blocks: Tensor | Sequence[int], block_size: int, shape: Sequence[int]) -> SparsePattern:
        """Square blocks (SMT, arXiv 2405.15525); block_size 16, 32, 64, 128 or 256 divides both sides of the weight."""
        return cls._of("blocks", blocks, shape, block_size)

    @classmethod
    def _of(
        cls, structure: str, parts: Tensor | Sequence[int], shape: Sequence[int], block_size: int = 0
    ) -> SparsePattern:
        size = check_shape(shape)
        chosen = parts if isinstance(parts, Tensor) else _numbers(structure, parts)
        indices = _structured(structure, chosen, size, block_size)
        return cls(smallest_index_dtype(indices, size), size, structure, chosen.to(torch.int64), block_size)

    def to(self, device: torch.device | str) -> SparsePattern:
        """The same pattern on another device; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        return self._replaced(self.indices.to(device), None if self.parts is None else self.parts.to(device))

    def _replaced(self, indices: Tensor, parts: Tensor | None) -> SparsePattern:
        return trusted(indices, self.shape, self.structure, parts, self.block_size)

    def taken(self) -> slice | Tensor:
        """The rows that a support of rows takes, or the columns that one of columns or blocks takes: a slice where they lie side by
        side. Settled once: it asks the device, which a backward must not."""
        if "_taken" not in self.__dict__:
            parts = self.parts
            if parts is None:
                raise ValueError("structure: expected a structured pattern")
            if self.structure == "blocks":
                across = self.shape[1] // self.block_size
                side = torch.arange(self.block_size, device=parts.device)
                parts = ((parts % across).unique()[:, None] * self.block_size + side).reshape(-1)
            object.__setattr__(self, "_taken", _side_by_side(parts))
        return self.__dict__["_taken"]

    def blocks(self, sliced: bool) -> Tensor:
        """int64 ``[blocks, 4]``: the first row and first column of each block, where its first entry lies among the values, and how far
        apart its rows lie there. ``sliced``: columns are numbered among :meth:`taken`. Kept: 32 bytes a block."""
        if "_blocks" not in self.__dict__:
            if self.structure != "blocks" or self.parts is None:
                raise ValueError("structure: expected a pattern of blocks")
            side, across = self.block_size, self.shape[1] // self.block_size
            row, column = self.parts // across, self.parts % across
            _, group, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
            first = counts.cumsum(0) - counts  # blocks before each row of blocks, whose entries lie row by row
            within = torch.arange(row.numel(), device=row.device) - first[group]
            start = first[group] * side * side + within * side
            stride = counts[group] * side
            packed = torch.unique(column, return_inverse=True)[1]
            tables = tuple(torch.stack((row * side, of * side, start, stride), 1) for of in (column, packed))
            object.__setattr__(self, "_blocks", _Kept(*tables))
        return self.__dict__["_blocks"].tensors()[sliced]

    def tiles(self, block_n: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The support by tiles of the weight, int32: the positions of ``indices`` sorted by tile ``[S]``, the tiles that hold any, and
        where each begins (one more, the end). Kept: 4 bytes per active weight."""
        known: dict[tuple[int, int], _Kept] = self.__dict__["_tiles"]
        if (block_n, block_k) not in known:
            width = self.shape[1]
            tile = self.indices // width // block_n * -(-width // block_k) + self.indices % width // block_k
            order = torch.sort(tile, stable=True).indices.to(torch.int32)
            found, counts = torch.unique(tile, return_counts=True)
            starts = torch.zeros(found.numel() + 1, dtype=torch.int32, device=self.device)
            starts[1:] = counts.cumsum(0)
            known[block_n, block_k] = _Kept(order, found.to(torch.int32), starts)
        return known[block_n, block_k].tensors()  # type: ignore[return-value]

    def has_tiles(self, block_n: int, block_k: int) -> bool:
        """Whether :meth:`tiles` are kept: to sort them asks the device how many there are, which a compiler does not follow."""
        return (block_n, block_k) in self.__dict__["_tiles"]

    def runs(self, length: int) -> Tensor:
        """int32: the first entry of each ``length`` elements of the weight, and one more, the end. Kept: 4 bytes a run."""
        known: dict[int, _Kept] = self.__dict__.setdefault("_runs", {})
        if length not in known:
            total = self.shape[0] * self.shape[1]
            begins = torch.arange(0, total, length, device=self.device).to(self.indices.dtype)
            starts = torch.full((begins.numel() + 1,), self.count, dtype=torch.int32, device=self.device)
            starts[:-1] = torch.searchsorted(self.indices, begins, out_int32=True)
            if not torch.compiler.is_compiling() and starts.is_cuda and torch.cuda.is_current_stream_capturing():
                return starts  # which are there when the graph is replayed, and not before
            known[length] = _Kept(starts)
        return known[length].tensors()[0]

    def __repr__(self) -> str:
        kind = f", {self.structure}" if self.structure else ""
        return f"SparsePattern({self.count} of {tuple(self.shape)}, {100 * self.density:.3g} %{kind})"


class _Kept:
    """What is kept of a pattern, for calls on any stream."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._made = None if torch.compiler.is_compiling() else streams.Made(*tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        if self._made is not None and not torch.compiler.is_compiling():
            self._made.meet()
        return self._tensors


def _numbers(structure: str, parts: Sequence[int]) -> Tensor:
    try:
        return torch.tensor([operator.index(part) for part in parts], dtype=torch.int64, device="cpu")
    except TypeError:
        raise TypeError(f"{structure}: expected integers, got {parts!r}") from None


def _side_by_side(numbers: Tensor) -> slice | Tensor:
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == numbers.numel() else numbers


def trusted(
    indices: Tensor,
    shape: torch.Size,
    structure: str | None = None,
    parts: Tensor | None = None,
    block_size: int = 0,
) -> SparsePattern:
    """A pattern of indices that are known to be right."""
    pattern = object.__new__(SparsePattern)
    fields = {"indices": indices, "shape": shape, "structure": structure, "parts": parts, "block_size": block_size}
    pattern.__dict__.update(fields, _tiles={})
    return pattern


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_shape(shape: Sequence[int]) -> torch.Size:
    try:
        size = torch.Size([operator.index(side) for side in shape])
    except TypeError:
        raise TypeError(f"shape: expected (N, K), got {shape!r}") from None
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"shape: expected (N, K) of at least 1 each, got {tuple(size)}")
    if size[0] * size[1] > 2**63 - 1:
        raise ValueError(f"shape: expected at most 2**63 - 1 elements, got {tuple(size)}")
    return size


def check_indices(indices: Tensor, shape: Sequence[int]) -> None:
    """Flat positions in a weight of ``shape``. A pass over them, and a host synchronisation on a GPU."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: expected an int32 or int64 tensor, got {_described(indices)}")
    if indices.dim() != 1 or indices.numel() == 0:
        raise ValueError(f"indices: expected a vector of at least one, got shape {tuple(indices.shape)}")
    if not indices.is_contiguous():
        raise ValueError(f"indices: expected a contiguous vector, got strides {indices.stride()}")
    count = shape[0] * shape[1]
    if indices.dtype == torch.int32 and count > _LARGEST_INT32:
        raise TypeError(f"indices: expected int64 for a weight of {count} elements, got int32")
    if indices.is_meta:
        return
    wrong = torch.stack(((indices[1:] <= indices[:-1]).any(), indices[0] < 0, indices[-1] >= count)).tolist()
    if wrong[0]:
        at = int((indices[1:] <= indices[:-1]).nonzero()[0, 0])
        first, second = indices[at].item(), indices[at + 1].item()
        what = "repeated" if first == second else "unsorted"
        raise ValueError(f"indices: expected ascending and distinct, got {what} {first}, {second} at {at} and {at + 1}")
    if wrong[1]:
        raise ValueError(f"indices: expected none below 0, got {indices[0].item()}")
    if wrong[2]:
        raise ValueError(
            f"indices: expected all below {count} for a weight of {tuple(shape)}, got {indices[-1].item()}"
        )


def smallest_index_dtype(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """indices as int32 where the weight is small enough for it."""
    return indices.to(torch.int32 if shape[0] * shape[1] <= _LARGEST_INT32 else torch.int64)


def _structured(structure: str, parts: Tensor | None, shape: torch.Size, block_size: int) -> Tensor:
    """int64 positions, ascending, of whole rows, columns or blocks."""
    n, k = shape
    if not isinstance(parts, Tensor) or parts.dtype not in (torch.int32, torch.int64) or parts.dim() != 1:
        raise TypeError(f"{structure}: expected a vector of int32 or int64, got {_described(parts)}")
    limit = {"rows": n, "columns": k}.get(structure, 0)
    if structure == "blocks":
        if type(block_size) is not int or block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size: expected 16, 32, 64, 128 or 256, got {block_size}")
        if n % block_size or k % block_size:
            raise ValueError(f"block_size: expected a divisor of both sides of {(n, k)}, got {block_size}")
        limit = n // block_size * (k // block_size)
    parts = parts.to(torch.int64)
    if parts.numel() == 0 or bool((parts[1:] <= parts[:-1]).any()) or int(parts[0]) < 0 or int(parts[-1]) >= limit:
        raise ValueError(
            f"{structure}: expected at least one, ascending, distinct and in [0, {limit}), got {parts.tolist()[:8]}"
        )
    if structure == "rows":
        return (parts[:, None] * k + torch.arange(k, device=parts.device)).reshape(-1)
    if structure == "columns":
        return (torch.arange(n, device=parts.device)[:, None] * k + parts).reshape(-1)
    side = torch.arange(block_size, device=parts.device)
    across = k // block_size
    corner = parts // across * block_size * k + parts % across * block_size
    return (corner[:, None, None] + side[:, None] * k + side).reshape(-1).sort().values
