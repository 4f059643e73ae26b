"""Each operator of several adapters and of DoRA against its definition, as functions of a case."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfast.ops import lora_dora, lora_terms
from peftfast.reference import lora as definition
from tests.support.lora_checks import DEVICE, DTYPES, F32, F64, Results, check_results, matrix


@dataclass(frozen=True)
class TermsCase:
    """``rows``: whether the rows of x name their adapters; ``ps`` one a term; ``dtypes`` of x, of the adapters, of the products."""

    M: int = 33
    K: int = 67
    N: int = 45
    ranks: tuple[int, ...] = (5, 8, 3)
    ps: tuple[float, ...] = (0.1, 0.0, 0.5)
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)
    rows: bool = False
    seeded: bool = True
    bias: bool = True
    layout: str = "plain"
    data: int = 0

    @property
    def seeds(self) -> Tensor | None:
        if not self.seeded:
            return None
        return torch.tensor([(0x5EED << 40) + 100 * self.data + t for t in range(len(self.ranks))], device=DEVICE)

    @property
    def names(self) -> Tensor | None:
        """-1 and one past the end are no adapter's."""
        if not self.rows:
            return None
        generator = torch.Generator().manual_seed(self.data)
        names = torch.randint(-1, len(self.ranks) + 1, (self.M,), generator=generator, dtype=torch.int32)
        return names.to(DEVICE)

    @property
    def scalings(self) -> list[float]:
        return [1.5, 0.5, 2.0, 1.0, 0.25][: len(self.ranks)]


TELLING = (
    TermsCase(),
    TermsCase(rows=True, data=1),
    TermsCase(dtypes=DTYPES[0], rows=True, ps=(0.5, 0.1, 0.0), data=2),
    TermsCase(dtypes=DTYPES[3], seeded=False, data=3),
    TermsCase(ranks=(16, 1), ps=(0.9, 0.3), layout="transposed", data=4),
    TermsCase(ranks=(8, 24, 16), data=5),  # eights: other accesses to factors and S
)


def random_cases(count: int, seed: int, largest: int) -> list[TermsCase]:
    draw = random.Random(seed)
    sizes = [size for size in (1, 3, 5, 8, 16, 31, 64, 67, 127, 257) if size <= largest]
    cases = []
    for index in range(count):
        terms = draw.randint(1, 5)
        cases.append(
            TermsCase(
                M=draw.choice([0, *sizes]),
                K=draw.choice(sizes),
                N=draw.choice(sizes),
                ranks=tuple(draw.choice((1, 2, 4, 7, 8, 16, 17, 33)) for _ in range(terms)),
                ps=tuple(draw.choice((0.0, 0.0, 0.1, 0.5, 1.0)) for _ in range(terms)),
                dtypes=draw.choice(DTYPES),
                rows=draw.random() < 0.5,
                seeded=draw.random() < 0.8,
                bias=draw.random() < 0.5,
                layout=draw.choice(("plain", "plain", "transposed", "wide", "spaced")),
                data=index,
            )
        )
    return cases


def _matrices(case: TermsCase) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6000 + case.data)
    wide, narrow, compute = case.dtypes
    make = functools.partial(matrix, layout=case.layout, generator=generator)
    return {
        "x": make(case.M, case.K, wide),
        "a": [make(rank, case.K, narrow) for rank in case.ranks],
        "b": [make(case.N, rank, narrow) for rank in case.ranks],
        "biases": [matrix(1, case.N, narrow, "plain", generator)[0] for _ in case.ranks] if case.bias else [],
        "s": make(case.M, sum(case.ranks), compute),
        "dy": make(case.M, case.N, compute),
        "z": make(case.M, case.N, compute),
        "gain": torch.rand(case.N, generator=generator).to(DEVICE) + 0.5,
        "base": make(case.M, case.N, wide),
    }


def arguments(name: str, case: TermsCase) -> tuple[Any, ...]:
    given = _matrices(case)
    wide, narrow, compute = case.dtypes
    terms = (case.names, case.seeds, list(case.ps), case.scalings)
    rank = case.ranks[0]
    bias = given["biases"][0] if case.bias else None
    seed = torch.tensor([case.data + 5], device=DEVICE)
    dora = (given["s"][:, :rank], given["b"][0], bias, given["gain"], bias, 1.5, wide)
    return {
        "lora_terms_shrink": (given["x"], given["a"], *terms, compute),
        "lora_terms_expand": (given["base"], given["s"], given["b"], given["biases"], *terms, compute),
        "lora_terms_expand_": (given["base"], given["s"], given["b"], given["biases"], *terms),
        "lora_terms_weight_grad": (given["s"], given["x"], list(case.ranks), *terms, narrow),
        "lora_terms_dy_grads": (given["dy"], given["s"], given["b"], case.names, case.scalings, narrow),
        "lora_dora_expand": (given["dy"], given["z"] if case.rows else None, *dora),
        "lora_gain_grads": (given["dy"], given["z"], given["gain"]),
        "lora_dropout_add": (given["base"] if case.bias else None, given["x"], seed, case.ps[0], compute)
        if case.N == case.K or not case.bias
        else (None, given["x"], seed, case.ps[0], compute),
    }[name]


OPERATORS = {
    operator.name: operator
    for operator in (
        lora_terms.lora_terms_shrink,
        lora_terms.lora_terms_expand,
        lora_terms.lora_terms_expand_,
        lora_terms.lora_terms_weight_grad,
        lora_terms.lora_terms_dy_grads,
        lora_dora.lora_dora_expand,
        lora_dora.lora_gain_grads,
        lora_dora.lora_dropout_add,
    )
}


def _defined(name: str, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if name == "lora_terms_expand_":
        return (definition.lora_terms_expand(*given, given[0].dtype),)
    found = getattr(definition, name)(*given)
    return found if isinstance(found, tuple) else (found,)


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(one) for one in value]
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return F64 if isinstance(value, torch.dtype) else value


def _results(name: str, case: TermsCase) -> Results:
    given = arguments(name, case)
    composed = _defined(name, given)
    exact = _defined(name, tuple(_wide(value) for value in given))
    found = OPERATORS[name](*given)
    actual = (given[0],) if found is None else found if isinstance(found, tuple) else (found,)
    for one, other in zip(actual, composed, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, (name, case)
        assert name == "lora_terms_expand_" or one.is_contiguous(), (name, case)
    return {f"{name} {i}": values for i, values in enumerate(zip(actual, composed, exact, strict=True))}


CHECKS: dict[str, Callable[[TermsCase], None]] = {
    name: functools.partial(check_results, results_of=functools.partial(_results, name)) for name in OPERATORS
}
