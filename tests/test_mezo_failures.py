"""peftfast.optim.MeZO where something is wrong: arguments, closures, losses; weights are as before."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast.optim import MeZO
from tests.support.lora_checks import DEVICE
from tests.support.mezo_checks import (
    TOKENS,
    closure_of,
    net,
    paired_closure,
    same,
    state,
)


@pytest.mark.parametrize(("mode", "at"), [("exact", 0), ("exact", 1), ("exact", 2), ("inplace", 0), ("inplace", 1)])
def test_an_exception_in_the_closure_restores_the_weights(mode: str, at: int) -> None:
    model = net(tied=True)
    before, count = state(model), [0]
    optimizer = MeZO(model, lr=1.0, eps=1e-2, mode=mode, seed=3)

    def closure() -> Tensor:
        count[0] += 1
        if count[0] > at:
            raise RuntimeError("out of data")
        return closure_of(model)()

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    if mode == "exact":
        assert same(model, before)
    else:
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_step_out_and_is_raised_at_the_next(mode: str, bad: float) -> None:
    model = net()
    optimizer = MeZO(model, lr=1e-2, mode=mode, momentum=0.5, momentum_window=2, weight_decay=0.1)
    optimizer.step(closure_of(model))
    before = state(model)
    optimizer.step(lambda: closure_of(model)() * bad)
    if mode == "exact":
        assert same(model, before)
    else:
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="closure: the loss was not finite in step 1"):
        optimizer.step(closure_of(model))
    optimizer.step(closure_of(model))
    optimizer.step(lambda: closure_of(model)() * bad)
    with pytest.raises(ValueError, match="not finite in step 3"):
        optimizer.check()
    optimizer.check()


BAD_CLOSURES: dict[str, tuple[type, str, Any]] = {
    "none": (TypeError, "closure: expected a function", None),
    "empty": (TypeError, "closure: expected a function", []),
    "vector": (ValueError, "closure: expected a loss of one element, got shape", lambda: torch.ones(2, device=DEVICE)),
    "nothing": (TypeError, "closure: expected a loss", lambda: None),
    "device": (ValueError, "closure: expected a loss on", lambda: torch.ones(1, device="meta")),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_bad_closures(name: str, mode: str) -> None:
    kind, message, closure = BAD_CLOSURES[name]
    model = net()
    before = state(model)
    with pytest.raises(kind, match=message):
        MeZO(model, lr=1.0, mode=mode).step(closure)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0 if mode == "exact" else 1e-6)


W = nn.Parameter(torch.ones(3))

BAD_ARGUMENTS: dict[str, tuple[type, str, Callable[[], Any]]] = {
    "eps zero": (ValueError, "eps: expected a number above 0", lambda: MeZO([W], eps=0.0)),
    "eps tiny": (ValueError, "eps: expected a number above 0", lambda: MeZO([W], eps=1e-60)),
    "eps nan": (ValueError, "eps: expected", lambda: MeZO([W], eps=math.nan)),
    "lr": (ValueError, "lr: expected", lambda: MeZO([W], lr=-1.0)),
    "seed": (ValueError, "seed: expected 64 bits", lambda: MeZO([W], seed=2**64)),
    "mode": (ValueError, "mode: expected one of exact, inplace", lambda: MeZO([W], mode="fast")),
    "distribution": (ValueError, "distribution: expected", lambda: MeZO([W], distribution="cauchy")),
    "directions": (ValueError, "directions: expected", lambda: MeZO([W], directions=0)),
    "momentum": (ValueError, "momentum: expected a number from 0.0 and below 1.0", lambda: MeZO([W], momentum=1.0)),
    "window": (ValueError, "momentum_window: expected", lambda: MeZO([W], momentum=0.5, momentum_window=0)),
    "clip": (ValueError, "clip: expected", lambda: MeZO([W], clip=0.0)),
    "density": (ValueError, "density: expected", lambda: MeZO([W], density=1.5)),
    "sparse inplace": (ValueError, "density: Sparse MeZO needs", lambda: MeZO([W], density=0.5, mode="inplace")),
    "rank": (ValueError, "rank: expected an int", lambda: MeZO([W], rank=0)),
    "rank inplace": (ValueError, "rank: expected mode", lambda: MeZO([W], rank=1, mode="inplace")),
    "rank and density": (ValueError, "rank: expected mode", lambda: MeZO([W], rank=1, density=0.5)),
    "no params": (TypeError, "params: expected a module or an iterable", lambda: MeZO(None)),  # type: ignore[arg-type]
    "filter": (TypeError, "filter: expected a function", lambda: MeZO([W], filter=3)),  # type: ignore[arg-type]
    "nothing": (ValueError, "params: expected at least one", lambda: MeZO([])),
    "frozen": (ValueError, "params: expected at least one", lambda: MeZO(nn.Linear(2, 2).requires_grad_(False))),
    "a tensor": (TypeError, "params: expected a module", lambda: MeZO(W)),
    "integers": (TypeError, "expected a floating", lambda: MeZO([torch.ones(2, dtype=torch.int64)])),
    "devices": (ValueError, "params: expected all on one device", lambda: MeZO([W, torch.ones(2, device="meta")])),
    "meta": (ValueError, "params: expected tensors with data", lambda: MeZO([torch.ones(2, device="meta")])),
    "process group": (ValueError, "process_group: torch.distributed", lambda: MeZO([W], process_group=True)),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    kind, message, call = BAD_ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        call()


def test_what_paired_refuses() -> None:
    for model, message in (
        (net(dropout=0.5, gain=False), "draws random numbers"),
        (net(tied=True, gain=False), "embedding.weight"),
        (net(), "gain"),
    ):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            MeZO(model, lr=1.0).step(paired_closure(model), paired=True)
        assert same(model, before)
    model = net(gain=False)
    with pytest.raises(ValueError, match="paired: expected mode='exact'"):
        MeZO(model, mode="inplace").step(paired_closure(model), paired=True)
    with pytest.raises(ValueError, match="two losses"):
        MeZO(model).step(closure_of(model), paired=True)
    with pytest.raises(ValueError, match="doubled batch"):
        MeZO(model).step(lambda: torch.stack([model(TOKENS[:1]).mean()] * 2), paired=True)


def test_seeds_come_from_torch_s_generator() -> None:
    torch.manual_seed(5)
    first = MeZO([W])._seed
    torch.manual_seed(5)
    assert MeZO([W])._seed == first != MeZO([W])._seed


def test_groups_are_fixed_when_the_optimiser_is_made() -> None:
    """A tensor added later would be moved by nobody."""
    optimizer = MeZO([W])
    with pytest.raises(ValueError, match="param_group: expected all groups"):
        optimizer.add_param_group({"params": [torch.zeros(2, device=DEVICE)]})
