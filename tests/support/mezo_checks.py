"""A model that holds parameters in every way, MeZO's algorithm in plain torch, and what the tests of MeZO compare."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftfast.functional as F
from tests.support.lora_checks import DEVICE, F32
from tests.support.zo_checks import bits


class Net(nn.Module):
    """Every way to hold a parameter: embedding, linear, normalisation, a bare parameter, a weight read where it does not live."""

    def __init__(self, dropout: float = 0.0, tied: bool = False, gain: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(64, 32, bias=False)
        self.gain = nn.Parameter(torch.ones(32)) if gain else 1.0
        self.head = nn.Linear(32, 5)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.first(self.embedding(tokens)).relu())
        x = self.second(self.dropout(x)) * self.gain
        if self.tied:
            x = x + 0.01 * nn.functional.linear(x @ self.embedding.weight.T, self.embedding.weight.T)
        return self.head(x).mean(1)


TOKENS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)

LABELS = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def net(dtype: torch.dtype = F32, **options: Any) -> Net:
    return Net(**options).to(dtype).to(DEVICE)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(model(TOKENS).float(), LABELS)


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(bits(p.detach()), bits(old)) for p, old in zip(model.parameters(), before, strict=True))


def z_of(model: nn.Module, seed: int, distribution: str = "gaussian") -> list[Tensor]:
    return [
        F.perturbation(p.shape, seed, tensor_id=i, device=DEVICE, distribution=distribution)
        for i, p in enumerate(model.parameters())
    ]


def reference_step(
    parameters: list[Tensor], loss: Callable[[list[Tensor]], Tensor], z: list[Tensor], lr: float, eps: float, wd: float
) -> float:
    """MeZO's algorithm 1 in plain torch, with the same z."""
    plus = loss([p + eps * d for p, d in zip(parameters, z, strict=True)])
    minus = loss([p - eps * d for p, d in zip(parameters, z, strict=True)])
    g = ((plus - minus) / (2 * eps)).item()
    for p, d in zip(parameters, z, strict=True):
        p.mul_(1 - lr * wd).sub_(lr * g * d)
    return g


def paired_closure(model: nn.Module) -> Callable[[], Tensor]:
    tokens = TOKENS.repeat(2, 1)

    def closure() -> Tensor:
        outputs = model(tokens).float().chunk(2)
        return torch.stack([nn.functional.cross_entropy(out, LABELS) for out in outputs])

    return closure


def low_rank_z(p: Tensor, seed: int, tensor_id: int, rank: int) -> Tensor:
    """By the definition in the docstring; dense where a side is not larger than the rank."""
    if p.dim() != 2 or min(p.shape) <= rank:
        return F.perturbation(p.shape, seed, tensor_id=tensor_id, device=DEVICE).double()
    rows, columns = p.shape
    both = F.perturbation(((rows + columns) * rank,), seed, tensor_id=tensor_id, device=DEVICE).double()
    return both[: rows * rank].reshape(rows, rank) @ both[rows * rank :].reshape(columns, rank).T / rank**0.5
