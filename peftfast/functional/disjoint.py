"""Whether tensors that one pass writes lie apart in memory: told from addresses, sizes and strides, without a look at the values."""

from collections.abc import Sequence

from torch import Tensor

# Of a search among strides that do not nest, which nobody has met: what takes longer counts as shared.
MOST_TRIALS = 20_000

_Step = tuple[int, int, int]  # a stride, and the least and the largest number of times that it is taken


def check_disjoint(name: str, tensors: Sequence[Tensor]) -> None:
    """Views that lie between one another's elements (``w[:, :4]`` and ``w[:, 4:]``) pass.

    Raises:
        ValueError: a tensor that holds a place twice, as an expanded one does, or a place of one before it. Not for meta tensors.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous() and _repeats(tensor):
            raise ValueError(
                f"{name}[{index}]: expected each element in a place of its own, got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}"
            )
        begin, end = _span(tensor)
        if end > begin:
            spans.append((begin, end, index))
    spans.sort()
    reach, near = 0, spans[:0]
    for span in spans:
        if span[0] >= reach:
            near = [span]
            reach = span[1]
            continue
        near = [one for one in near if one[1] > span[0]]
        for _, _, other in near:
            if _share(tensors[other], tensors[span[2]]):
                first, second = sorted((other, span[2]))
                raise ValueError(f"{name}[{second}]: the same memory was given before, in {name}[{first}]")
        near.append(span)
        reach = max(reach, span[1])


def check_sources(name: str, sources: Sequence[Tensor], written: str, tensors: Sequence[Tensor]) -> None:
    """Of what is read while tensors are written, each is the tensor at its place itself, or lies apart from all of them.

    Raises:
        ValueError: a source that shares memory with a tensor otherwise. Not for meta tensors.
    """
    spans = [(*_span(tensor), False, index) for index, tensor in enumerate(tensors)]
    for index, (source, tensor) in enumerate(zip(sources, tensors, strict=True)):
        if source.data_ptr() != tensor.data_ptr() or source.stride() != tensor.stride():
            spans.append((*_span(source), True, index))
    near = spans[:0]
    for span in sorted(spans):
        begin, end, is_source, index = span
        if end == begin:
            continue
        near = [one for one in near if one[1] > begin]
        for _, _, other_is_source, other in near:
            reader, place = (index, other) if is_source else (other, index)
            if is_source is not other_is_source and _share(sources[reader], tensors[place]):
                raise ValueError(
                    f"{name}[{reader}]: expected {written}[{reader}] itself or memory that is not written, got memory of "
                    f"{written}[{place}]"
                )
        near.append(span)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie; the same twice where it has none."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize


def _repeats(tensor: Tensor) -> bool:
    """Whether two indices name one place: whether some steps, not all of them zero, lead back to where they began."""
    taken = [(stride, size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    steps = [(stride, -most, most) for stride, most in sorted(taken, reverse=True)]
    if any(stride == 0 for stride, _, _ in steps):
        return True
    # Of the steps that are not zero the widest goes forward: the other sign is the same pair of indices.
    return any(_reaches(0, 0, [(stride, 1, most), *steps[k + 1 :]]) for k, (stride, _, most) in enumerate(steps))


def _share(one: Tensor, other: Tensor) -> bool:
    ranges: dict[int, list[int]] = {}
    for tensor, sign in ((one, 1), (other, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and stride > 0:  # a source may be expanded
                own = ranges.setdefault(stride * tensor.itemsize, [0, 0])
                own[sign > 0] += sign * (size - 1)
    steps = [(stride, least, most) for stride, (least, most) in sorted(ranges.items(), reverse=True)]
    apart = other.data_ptr() - one.data_ptr()
    return _reaches(apart - one.itemsize + 1, apart + other.itemsize - 1, steps)


def _reaches(low: int, high: int, steps: Sequence[_Step]) -> bool:
    """Whether a sum of the steps, each as often as it may be taken, lies in [low, high]. Where strides nest, a step has one or two
    numbers of times that the narrower ones can make up for."""
    rest = [(0, 0)]  # what the steps behind each can add
    for stride, least, most in reversed(steps):
        rest.append((rest[-1][0] + stride * least, rest[-1][1] + stride * most))
    trials = 0

    def search(low: int, high: int, at: int) -> bool:
        nonlocal trials
        trials += 1
        if at == len(steps) or trials > MOST_TRIALS:
            return low <= 0 <= high or trials > MOST_TRIALS
        stride, least, most = steps[at]
        below, above = rest[len(steps) - at - 1]
        first = max(least, -((above - low) // stride))
        last = min(most, (high - below) // stride)
        return any(search(low - count * stride, high - count * stride, at + 1) for count in range(first, last + 1))

    return search(low, high, 0)
