"""Calls of the autograd library (csrc/autograd), counted, and small layers for them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast import functional as F
from tests.support.functions_ran import calls_by_library as calls

BF16 = torch.bfloat16
N, K, R = 24, 32, 4


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTFAST_AUTOGRAD", "python")
        before = calls()
        yield
        assert calls() == before


@contextlib.contextmanager
def made(forwards: int, backwards: int) -> Iterator[None]:
    """Exactly so many calls within the block are the library's."""
    before = calls()
    yield
    after = calls()
    assert (after[0] - before[0], after[1] - before[1]) == (forwards, backwards)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(randn(R, K, seed=seed + 1, dtype=dtype)), nn.Parameter(randn(N, R, seed=seed + 2, dtype=dtype))


WEIGHT, (A, B) = randn(N, K), factors()


def layer(x: Tensor, **options: Any) -> Tensor:
    return F.lora_linear(x, WEIGHT, A, B, scaling=1.5, **options)


def settle(call: Callable[[], Any]) -> None:
    """Two times: seen, and recorded."""
    for _ in range(2):
        out = call()
        (out if isinstance(out, Tensor) else sum(one.sum() for one in out)).sum().backward()


def fresh(*shape: int, seed: int = 5) -> Tensor:
    return randn(*(shape or (5, K)), seed=seed).requires_grad_()


Options = tuple[Callable[..., Any], list[Tensor]]


def projections(general: bool = False) -> Options:
    own = [factors(seed=4 * i) for i in range(3)]
    ps = [
        F.Projection(randn(N, K, seed=i), a, b, 0.5 + i, dropout_p=0.3, seed=torch.tensor([i]))
        for i, (a, b) in enumerate(own)
    ]
    if general:
        own[0][0].requires_grad_(False)
    wanted = [one for pair in own for one in pair if one.requires_grad]
    return lambda x: F.lora_linears(x, ps), wanted
