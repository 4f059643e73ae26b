"""Choosing a support: at random, by the size of weights or of scores, and from dW = dyᵀ x without ever holding dW.

Whatever is chosen from N K scores is streamed by slabs of rows, so that temporaries stay of the order of what is chosen plus one slab.
The chosen set is that of :func:`peftfast.reference.sparse_delta.top_positions`: the largest, of equal scores the lowest positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.sparse_delta import wide_dtype
from .sparse_pattern import SparsePattern, check_shape, smallest_index_dtype

SUPPORTS = ("random", "smallest", "largest")
_SLAB = 1 << 18  # scores at a time where few are chosen


def active_count(density: float, shape: tuple[int, ...]) -> int:
    """How many weights a density stands for, at least one.

    Raises:
        TypeError: no number. ValueError: not in (0, 1].
    """
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density: expected a number, got {type(density).__name__}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: expected a part in (0, 1], got {density}")
    return max(1, round(density * shape[0] * shape[1]))


class TopPositions:
    """The largest scores of a stream, with their positions. Scores come in ascending order of position; equal ones keep the first."""

    def __init__(self, count: int, device: torch.device, excluded: Tensor | None = None) -> None:
        self.count = count
        self.scores = torch.empty(0, device=device)
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self._excluded = excluded  # ascending
        self._floor: Tensor | None = None

    def add(self, scores: Tensor, first: int) -> None:
        """A run of scores at positions first, first + 1, ..."""
        scores = scores.reshape(-1)
        if scores.numel() == 0 or self.count == 0:
            return
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self._excluded is not None and self._excluded.numel():
            low, high = torch.searchsorted(
                self._excluded, torch.tensor([first, first + scores.numel()], device=scores.device).to(self._excluded)
            ).tolist()
            if high > low:
                allowed = torch.ones_like(scores, dtype=torch.bool)
                allowed[self._excluded[low:high].long() - first] = False
                at = allowed.nonzero()[:, 0]
                scores, positions = scores[at], at + first
            else:
                positions = torch.arange(first, first + scores.numel(), device=scores.device)
        else:
            positions = torch.arange(first, first + scores.numel(), device=scores.device)
        if self._floor is not None:
            # Later positions lose ties, so a score must beat the worst that is held.
            better = (scores > self._floor).nonzero()[:, 0]
            scores, positions = scores[better], positions[better]
        self.scores = torch.cat((self.scores.to(scores.dtype), scores))
        self.positions = torch.cat((self.positions, positions))
        if self.positions.numel() > self.count:
            self._cut()

    def _cut(self) -> None:
        floor = torch.topk(self.scores, self.count, sorted=False).values.min()
        above = (self.scores > floor).nonzero()[:, 0]
        level = (self.scores == floor).nonzero()[: self.count - above.numel(), 0]
        kept = torch.cat((above, level)).sort().values
        self.scores, self.positions, self._floor = self.scores[kept], self.positions[kept], floor


def slabs(shape: tuple[int, ...], count: int) -> Iterator[tuple[int, int]]:
    """Runs of rows whose scores together are about as many as are chosen, or 2^18."""
    rows = max(1, max(count, _SLAB) // shape[1])
    for first in range(0, shape[0], rows):
        yield first, min(shape[0], first + rows)


def top_of_matrix(scores: Tensor, count: int, *, largest: bool = True, magnitude: bool = True) -> Tensor:
    """The positions of the ``count`` largest (or smallest) of a matrix's entries (or their magnitudes), ascending, int64."""
    top = TopPositions(count, scores.device)
    for first, last in slabs(tuple(scores.shape), count):
        part = scores[first:last].to(wide_dtype(scores.dtype))
        part = part.abs() if magnitude else part
        top.add(part if largest else -part, first * scores.shape[1])
    return top.positions


def top_of_product(dy: Tensor, x: Tensor, count: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The positions of the ``count`` largest magnitudes of dyᵀ x, ascending, and those entries in float32; dyᵀ x is formed slab by
    slab. ``excluded``: ascending positions that may not be chosen."""
    shape = (dy.shape[1], x.shape[1])
    wide = wide_dtype(dy.dtype)
    # On a GPU 16-bit operands are multiplied as they are, with float32 sums that come out as such.
    direct = dy.is_cuda and dy.dtype in (torch.bfloat16, torch.float16)
    columns = x if direct else x.to(wide)
    top = TopPositions(count, dy.device, excluded)
    signs = _Signed(top)
    for first, last in slabs(shape, count):
        part = dy[:, first:last].T
        scores = torch.mm(part, columns, out_dtype=torch.float32) if direct else part.to(wide) @ columns
        signs.add(scores, first * shape[1])
    return top.positions, signs.values()


class _Signed:
    """Keeps the signs beside the magnitudes of a :class:`TopPositions`."""

    def __init__(self, top: TopPositions) -> None:
        self.top = top
        self.negative = torch.empty(0, dtype=torch.bool, device=top.positions.device)

    def add(self, entries: Tensor, first: int) -> None:
        before = self.top.positions
        self.top.add(entries.abs(), first)
        after = self.top.positions
        new = after >= first
        kept = torch.searchsorted(before, after[~new])
        self.negative = torch.cat((self.negative[kept], entries.reshape(-1)[after[new] - first] < 0))

    def values(self) -> Tensor:
        return torch.where(self.negative, -self.top.scores, self.top.scores)


def random_positions(
    count: int, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """``count`` distinct positions, every set of them as likely as any other, ascending, int64; O(count) memory up to half density.
    Drawn where the generator is: torch takes none of another device."""
    total = shape[0] * shape[1]
    drawn = device if generator is None else generator.device
    if 2 * count > total:
        return torch.randperm(total, generator=generator, device=drawn)[:count].sort().values.to(device)
    found = torch.empty(0, dtype=torch.int64, device=drawn)
    while found.numel() < count:
        more = torch.randint(0, total, (count + count // 8 + 16 - found.numel(),), generator=generator, device=drawn)
        found = torch.cat((found, more)).unique()
    kept = torch.randperm(found.numel(), generator=generator, device=drawn)[:count]
    return found[kept].sort().values.to(device)


def choose_support(
    weight: Tensor,
    density: float,
    support: str = "random",
    *,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SparsePattern:
    """A fixed support on a weight ``[N, K]``.

    Args:
        density: part of the weights, in (0, 1].
        support: "random"; "smallest", the weights of least magnitude (SaRA, arXiv 2409.06633); "largest", those of greatest.
        scores: ``[N, K]``: the largest of these instead, such as magnitudes of gradients or a Fisher score (squared gradients).
        generator: of the random choice, on any device: one on the CPU gives the same support wherever the weight is. torch's own if not
            given.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating tensor, got {getattr(weight, 'dtype', type(weight).__name__)}")
    shape = check_shape(weight.shape)
    for name, tensor in (("weight", weight), ("scores", scores)):
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(f"{name}: expected a tensor that holds its values, got one on meta")
        if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")
    count = active_count(density, tuple(shape))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if support not in SUPPORTS:
        raise ValueError(f"support: expected one of {SUPPORTS}, got {support!r}")
    with torch.no_grad():
        if scores is not None:
            if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != weight.shape:
                raise ValueError(f"scores: expected floating {tuple(shape)}, got {getattr(scores, 'shape', scores)}")
            found = top_of_matrix(scores, count, magnitude=False)
        elif support == "random":
            found = random_positions(count, tuple(shape), weight.device, generator)
        else:
            found = top_of_matrix(weight.detach(), count, largest=support == "largest")
    return SparsePattern(smallest_index_dtype(found, shape), shape)


def top_of_outer(rows: Tensor, columns: Tensor, count: int, excluded: Tensor) -> Tensor:
    """The positions of the ``count`` largest float32 products rows[i] * columns[j], ascending, int64, none of ``excluded`` (ascending)
    among them. Neither negative nor NaN is expected in ``rows`` and ``columns``.

    The products are monotone in each factor, so that the number above a bar is counted row by row by bisection in the sorted columns;
    the bar is found by bisection over the bits of a float32. O((N + K) log) time and O(N + K + chosen + excluded) memory.
    """
    n, k = rows.numel(), columns.numel()
    rows, columns = rows.float(), columns.float()
    ascending, order = torch.sort(columns, stable=True)
    taken = excluded.long()
    held = rows[taken // k] * columns[taken % k]

    def above(bar: Tensor) -> Tensor:
        """For each row, where in ``ascending`` the products that reach the bar begin."""
        low = torch.zeros(n, dtype=torch.int64, device=rows.device)
        high = torch.full_like(low, k)
        for _ in range(k.bit_length()):
            middle = (low + high) // 2
            reaches = rows * ascending[middle.clamp(max=k - 1)] >= bar
            open_ = low < high
            high = torch.where(open_ & reaches, middle, high)
            low = torch.where(open_ & ~reaches, middle + 1, low)
        return low

    def free(bar: Tensor) -> int:
        return int((k - above(bar)).sum() - (held >= bar).sum())

    count = min(count, n * k - taken.numel())
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    low_bits, high_bits = 0, 0x7F800001  # the largest bar that `count` products reach lies in [low, high)
    while high_bits - low_bits > 1:
        middle_bits = (low_bits + high_bits) // 2
        bar = torch.tensor(middle_bits, dtype=torch.int32, device="cpu").view(torch.float32).to(rows.device)
        if free(bar) >= count:
            low_bits = middle_bits
        else:
            high_bits = middle_bits
    bar = torch.tensor(low_bits, dtype=torch.int32, device="cpu").view(torch.float32).to(rows.device)
    over = torch.tensor(low_bits + 1, dtype=torch.int32, device="cpu").view(torch.float32).to(rows.device)
    chosen = _without(_expand(above(over), torch.full((n,), k, device=rows.device), order, k), taken)
    level = _level(rows, columns, bar, above(bar), above(over), order, taken, count - chosen.numel())
    return torch.cat((chosen, level)).sort().values


def _expand(begin: Tensor, end: Tensor, order: Tensor, k: int) -> Tensor:
    """Positions of the entries [begin, end) of each row in the sorted columns, ascending."""
    counts = end - begin
    row = torch.repeat_interleave(torch.arange(begin.numel(), device=begin.device), counts)
    within = torch.arange(row.numel(), device=begin.device) - (counts.cumsum(0) - counts)[row]
    return (row * k + order[begin[row] + within]).sort().values


def _without(positions: Tensor, taken: Tensor) -> Tensor:
    if taken.numel() == 0 or positions.numel() == 0:
        return positions
    at = torch.searchsorted(taken, positions).clamp(max=taken.numel() - 1)
    return positions[taken[at] != positions]


def _level(
    rows: Tensor, columns: Tensor, bar: Tensor, begin: Tensor, end: Tensor, order: Tensor, taken: Tensor, wanted: int
) -> Tensor:
    """The lowest ``wanted`` free positions whose product equals the bar. Rows are taken from the top until there are enough, so that a
    great many equal products (all zero, before any gradient) are never held."""
    k = columns.numel()
    found: list[Tensor] = []
    counts = end - begin
    running = counts.cumsum(0)
    first, missing = 0, wanted
    while missing > 0 and first < rows.numel():
        before = int(running[first - 1]) if first else 0
        last = int(torch.searchsorted(running, torch.tensor(before + missing, device=rows.device))) + 1
        last = min(max(last, first + 1), rows.numel())
        part = _expand(begin[first:last], end[first:last], order, k) + first * k
        part = _without(part, taken)[:missing]
        found.append(part)
        missing -= part.numel()
        first = last
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=rows.device)
