"""Perturbing layers in flight: a module sees moved weights while its forward runs, and the weights themselves are never written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..functional.precision import compute_dtype_of
from ..nn.nf4 import NF4Linear
from . import low_rank
from .discovery import Held, Layout

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CURRENT = "_peftfast_in_flight"  # on a swapped module: what its forward asks


@dataclass
class Direction:
    """One direction as the layers need it: everything on the device.

    Attributes:
        seed: int64 ``[1]``. scale: float32 ``[1]``, with its sign. eps: the same without sign, for both at once.
        tensor_ids: of each of the optimiser's parameters. thresholds: float32 ``[parameters]`` or None.
    """

    seed: Tensor
    scale: Tensor
    eps: Tensor
    tensor_ids: Sequence[int]
    thresholds: Tensor | None
    rademacher: bool
    rank: int | None = None
    paired: bool = False
    called: set[int] = field(default_factory=set)
    fallbacks: list[nn.Module] = field(default_factory=list)

    def threshold(self, index: int) -> Tensor | None:
        return None if self.thresholds is None else self.thresholds[index : index + 1]

    def moved(self, parameters: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        """New tensors: the parameters moved by ``scale``."""
        outs: list[Tensor] = [torch.empty_like(p) for p in parameters]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for k, parameter in enumerate(parameters):
            if self.rank is not None and low_rank.serves(parameter, self.rank):
                outs[k].copy_(parameter.detach())
                low_rank.move_(outs[k], self.seed, self.scale, self.tensor_ids[indices[k]], self.rank, self.rademacher)
            else:
                by_dtype.setdefault(parameter.dtype, []).append(k)
        for members in by_dtype.values():
            limits = None
            if self.thresholds is not None:
                limits = torch.cat([self.thresholds[indices[k] : indices[k] + 1] for k in members])
            ops.zeroth_order.perturb_(
                [outs[k] for k in members],
                [parameters[k].detach() for k in members],
                self.seed,
                self.scale,
                None,
                limits,
                None,
                [self.tensor_ids[indices[k]] for k in members],
                [0] * len(members),
                self.rademacher,
            )
        return outs

    def both(self, parameter: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(W + eps z, W - eps z) in new memory."""
        if self.rank is not None and low_rank.serves(parameter, self.rank):
            sides = (parameter.detach().clone(), parameter.detach().clone())
            for side, scale in zip(sides, (self.eps, -self.eps), strict=True):
                low_rank.move_(side, self.seed, scale, self.tensor_ids[index], self.rank, self.rademacher)
            return sides
        plus, minus = ops.zeroth_order.perturbed_pair(
            parameter.detach(), self.seed, self.eps, self.threshold(index), self.tensor_ids[index], 0, self.rademacher
        )
        return plus, minus


@functools.cache
def _swapped_class(stock: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        held, direction = self.__dict__[_CURRENT]
        direction.called.add(id(self))
        run = functools.partial(stock.forward, self)
        serve = _paired_forward if direction.paired else _single_forward
        return serve(self, stock, run, held, direction, args, kwargs)

    names = {"forward": forward, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names)


@contextlib.contextmanager
def _holding(module: nn.Module, held: Sequence[Held], values: Sequence[Tensor | None]) -> Iterator[None]:
    """The module's parameters exchanged, in its own table alone: the Parameter objects are not touched."""
    table: dict[str, Any] = module._parameters
    before = [table[one.name] for one in held]
    try:
        for one, value in zip(held, values, strict=True):
            table[one.name] = value
        yield
    finally:
        for one, parameter in zip(held, before, strict=True):
            table[one.name] = parameter


def _single_forward(
    module: nn.Module, stock: Any, run: Any, held: list[Held], direction: Direction, args: Any, kwargs: Any
) -> Any:
    if _by_factors(module, stock, held, direction, args, kwargs):
        return _low_rank_forward(module, run, held, direction, args[0])
    if stock.forward is nn.Embedding.forward and direction.rank is None and _few_rows(module, args, kwargs):
        return _embedded(module, held[0], direction, args[0])
    parameters = [module._parameters[one.name] for one in held]
    moved = direction.moved(parameters, [one.index for one in held])  # type: ignore[arg-type]
    with _holding(module, held, moved):
        return run(*args, **kwargs)


def _by_factors(module: Any, stock: Any, held: list[Held], direction: Direction, args: Any, kwargs: Any) -> bool:
    return (
        direction.rank is not None
        and stock.forward is nn.Linear.forward
        and any(one.name == "weight" for one in held)
        and low_rank.serves(module.weight, direction.rank)
        and len(args) == 1
        and not kwargs
    )


def _low_rank_forward(module: Any, run: Any, held: list[Held], direction: Direction, x: Tensor) -> Tensor:
    """The layer as it is, and the move of its weight as an adapter's: one sign, or with a doubled batch both at one reading."""
    assert direction.rank is not None
    weight = next(one for one in held if one.name == "weight")
    bias = next((one for one in held if one.name == "bias"), None)
    half = len(x) // 2 if direction.paired else None
    scale = direction.eps if direction.paired else direction.scale
    if bias is None:
        y = run(x)
    elif half is None:
        with _holding(module, [bias], direction.moved([module.bias], [bias.index])):
            y = run(x)
    else:
        with _holding(module, [bias], [None]):
            y = run(x)
        for part, value in zip((y[:half], y[half:]), direction.both(module.bias, bias.index), strict=True):
            part.add_(value)
    u, v = low_rank.factors(
        module.weight, direction.seed, direction.tensor_ids[weight.index], direction.rank, direction.rademacher
    )
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    low_rank.add_to_(out, rows, u * scale, v, None if half is None else len(rows) // 2)
    return y


def _few_rows(module: Any, args: Any, kwargs: Any) -> bool:
    """Whether a look-up on the CPU touches so few rows that moving them alone is less work. Which rows those are is known on the device
    only, and asking would wait for it: on a GPU the table is moved as a whole."""
    x = args[0] if len(args) == 1 and not kwargs else None
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and module.max_norm is None
        and 2 * x.numel() < module.weight.shape[0]
    )


def _embedded(module: Any, held: Held, direction: Direction, x: Tensor) -> Tensor:
    """Rows of the moved table: z is a function of the position, so a row has the same in or out of its table."""
    rows, inverse = x.reshape(-1).unique(return_inverse=True)
    width = module.weight.shape[1]
    moved = module.weight.detach()[rows]
    limit = direction.threshold(held.index)
    ops.zeroth_order.perturb_(
        list(moved.unbind()),
        [],
        direction.seed,
        direction.scale,
        None,
        None if limit is None else limit.expand(len(rows)).contiguous(),
        None,
        [direction.tensor_ids[held.index]] * len(rows),
        [row * width for row in rows.tolist()],
        direction.rademacher,
    )
    return moved[inverse].reshape(*x.shape, width)


def _paired_forward(
    module: nn.Module, stock: Any, run: Any, held: list[Held], direction: Direction, args: Any, kwargs: Any
) -> Any:
    halves = _halves(module, args, kwargs)
    if _by_factors(module, stock, held, direction, args, kwargs):
        return _low_rank_forward(module, run, held, direction, args[0])
    weight = next((one for one in held if one.name == "weight"), None)
    if stock.forward is nn.Linear.forward and weight is not None and args[0].dtype == module.weight.dtype:
        rows = [half.reshape(-1, half.shape[-1]) for half in halves]
        plus, minus = ops.zeroth_order_linear.zo_linear(
            *rows,
            module.weight.detach(),  # type: ignore[operator, union-attr]
            *_biases(module, held, direction, module.weight.dtype),  # type: ignore[arg-type]
            direction.seed,
            direction.eps,
            direction.threshold(weight.index),
            direction.tensor_ids[weight.index],
            direction.rademacher,
        )
        return torch.cat((plus, minus)).reshape(*args[0].shape[:-1], plus.shape[-1])
    if stock.forward is NF4Linear.forward and args[0].dtype in FLOAT_DTYPES:
        return _paired_nf4(module, held, direction, args[0], halves)
    if module not in direction.fallbacks:
        direction.fallbacks.append(module)
    pairs = [direction.both(module._parameters[one.name], one.index) for one in held]  # type: ignore[arg-type]
    outs = []
    for half, values in zip(halves, zip(*pairs, strict=True), strict=True):
        with _holding(module, held, values):
            outs.append(run(half, *args[1:], **kwargs))
    if not all(isinstance(out, Tensor) and out.dim() and out.shape[0] == halves[0].shape[0] for out in outs):
        raise ValueError(
            f"paired: expected {type(module).__name__} to give a tensor with the batch first, as it takes one"
        )
    return torch.cat(outs)


def _biases(
    module: Any, held: Sequence[Held], direction: Direction, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if module.bias is None:
        return None, None
    bias = next((one for one in held if one.name == "bias"), None)
    whole = module.bias.detach()
    plus, minus = (whole, whole) if bias is None else direction.both(module.bias, bias.index)
    return plus.to(dtype), minus.to(dtype)


def _paired_nf4(module: Any, held: Sequence[Held], direction: Direction, x: Tensor, halves: Sequence[Tensor]) -> Tensor:
    """A 4-bit layer whose block scales are parameters, or its bias alone: the packed bytes are read once for both sides."""
    dtype = compute_dtype_of(x, module.compute_dtype)
    biases = _biases(module, held, direction, dtype)
    scales = next((one for one in held if one.name == "absmax"), None)
    rows = [half.reshape(-1, half.shape[-1]).to(dtype) for half in halves]
    # Where no scale moves, both sides meet the weight as it is: a move by nothing.
    plus, minus = ops.zeroth_order_linear.zo_nf4_linear(
        *rows,
        *module.nf4.storage(),
        *biases,
        direction.seed,
        direction.eps if scales is not None else torch.zeros_like(direction.eps),
        None if scales is None else direction.threshold(scales.index),
        0 if scales is None else direction.tensor_ids[scales.index],
        direction.rademacher,
        scales is not None,
    )
    y = torch.cat((plus, minus)).reshape(*x.shape[:-1], plus.shape[-1])
    return y if module.compute_dtype is None else y.to(x.dtype)


def _halves(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] % 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"paired: {type(module).__name__} expected a doubled batch in its first dimension, got {got}")
    half = x.shape[0] // 2
    return x[:half], x[half:]


@contextlib.contextmanager
def perturbing(layout: Layout, direction: Direction) -> Iterator[None]:
    """The layout's modules in their swapped classes, for the length of one evaluation."""
    swapped: list[tuple[nn.Module, type]] = []
    try:
        for module, held in layout.modules.items():
            stock = type(module)
            module.__dict__[_CURRENT] = (held, direction)
            swapped.append((module, stock))
            module.__class__ = _swapped_class(stock)  # type: ignore[arg-type]
        yield
    finally:
        for module, stock in swapped:
            module.__class__ = stock
            del module.__dict__[_CURRENT]
