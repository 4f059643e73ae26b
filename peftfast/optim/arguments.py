"""What MeZO is given, examined: parameters, closures, losses, numbers; and what is worked out of them once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_WEIGHT = 0.05  # a momentum window ends where beta**age falls below this

Closure = Callable[[], Any]


def groups_of(
    params: Any, filter: Callable[[str, Tensor], bool] | None
) -> tuple[list[dict[str, Any]], list[str], list[int]]:
    """(groups as torch takes them, names, ids): ids count every parameter in order, whether it is trained or not."""
    if isinstance(params, Tensor) or not isinstance(params, nn.Module | Iterable):
        got = "a tensor" if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"params: expected a module or an iterable of tensors, got {got}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a function of a name and a parameter, got {type(filter).__name__}")
    if isinstance(params, nn.Module):
        named: list[Any] = [{"params": [pair for pair in params.named_parameters()]}]
        frozen_too = False
    else:
        given = list(params)
        named = given if given and all(isinstance(group, dict) for group in given) else [{"params": given}]
        frozen_too = True
    groups, names, ids, count = [], [], [], 0
    for group in named:
        members = group["params"]
        kept = []
        for item in [members] if isinstance(members, Tensor) else list(members):
            name, parameter = item if isinstance(item, tuple) else (str(count), item)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"params: expected tensors, got {type(parameter).__name__}")
            if (frozen_too or parameter.requires_grad) and (filter is None or filter(name, parameter)):
                kept.append(parameter)
                names.append(name)
                ids.append(count)
            count += 1
        if kept:
            groups.append({**group, "params": kept})
    if not groups:
        raise ValueError("params: expected at least one tensor to train, got none")
    return groups, names, ids


def check_parameters(names: Sequence[str], parameters: Sequence[Tensor]) -> torch.device:
    device = parameters[0].device
    for name, parameter in zip(names, parameters, strict=True):
        if not parameter.is_floating_point():
            raise TypeError(f"params: {name}: expected a floating dtype, got {parameter.dtype}")
        if parameter.device != device:
            raise ValueError(
                f"params: expected all on one device, got {names[0]} on {device} and {name} on {parameter.device}"
            )
        if type(parameter) not in (Tensor, nn.Parameter):
            raise TypeError(f"params: {name}: expected a plain tensor, got {type(parameter).__name__}")
    if device.type == "meta":
        raise ValueError("params: expected tensors with data, got meta tensors")
    return device


def closures_of(closure: Any) -> list[Closure]:
    closures = [closure] if callable(closure) else list(closure) if isinstance(closure, (list, tuple)) else []
    if not closures or not all(map(callable, closures)):
        raise TypeError(f"closure: expected a function that returns the loss, or a sequence of them, got {closure!r}")
    return closures


def loss_of(value: Any, device: torch.device, count: int) -> Tensor:
    """The loss as float64 ``[count]``; float64 so that the difference of two losses is exact."""
    what = "one element" if count == 1 else "two losses (plus, minus)"
    if count == 2 and isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"closure: expected {what}, got {len(value)}")
        return torch.cat([loss_of(one, device, 1) for one in value])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and count == 1:
        return torch.full((1,), float(value), dtype=torch.float64, device=device)
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"closure: expected a loss of {what}, got {type(value).__name__}")
    if value.numel() != count:
        raise ValueError(f"closure: expected a loss of {what}, got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"closure: expected a loss on {device} beside the parameters, got on {value.device}")
    return value.detach().reshape(count).to(torch.float64)


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[Callable[[], None]]:
    """The value sets torch's generators back to where they are now. Their states are the host's: nothing waits for the device."""
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    yield rewind


def magnitude_thresholds(parameters: Sequence[Tensor], density: float, device: torch.device) -> Tensor:
    limits = []
    for parameter in parameters:
        magnitudes = parameter.detach().abs().reshape(-1).float()
        if parameter.dim() < 2 or magnitudes.numel() == 0:
            limits.append(torch.full((1,), math.inf, dtype=torch.float32, device=device))
        else:
            limits.append(magnitudes.kthvalue(max(1, math.ceil(density * magnitudes.numel()))).values.reshape(1))
    return torch.cat(limits)


def window_of(momentum: float) -> int:
    return max(1, math.ceil(math.log(SMALLEST_WEIGHT) / math.log(momentum)))


def momentum_weights(momentum: float, window: int, directions: int) -> Tensor:
    """β^age of each term, the newest first: float32 ``[window * directions]``."""
    return torch.tensor(
        [momentum**age for age in range(window) for _ in range(directions)], dtype=torch.float32, device="cpu"
    )


def float32(value: float) -> float:
    return torch.tensor(float(value), dtype=torch.float32, device="cpu").item()


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, open_: bool = False, closed_top: bool = False
) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (value > low if open_ else value >= low) and (value <= high if closed_top else value < high)
    if not good:
        top = "" if high == math.inf else f" to {high}" if closed_top else f" and below {high}"
        raise ValueError(f"{name}: expected a number {'above' if open_ else 'from'} {low}{top}, got {value!r}")
