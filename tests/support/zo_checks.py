"""Each zeroth-order operator against its definition, as functions of a case: what the tests run and what the mutants must fail."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.reference import zeroth_order as definition
from tests.support.budget import assert_within_budget
from tests.support.lora_checks import BF16, DEVICE, F16, F32


@dataclass(frozen=True)
class ZoCase:
    sizes: tuple[int, ...] = (515, 3, 1300)
    dtype: torch.dtype = BF16
    rademacher: bool = False
    terms: int = 2
    decay: bool = True
    threshold: bool = True
    rounding: bool = True
    offsets: tuple[int, ...] = (0, 7, 2**33 + 5)
    out_of_place: bool = False
    data: int = 0


# Every term matters in each: two seeds, a decay, a threshold that some elements are above, shards that begin inside a counter.
TELLING = (
    ZoCase(),
    ZoCase(dtype=F32, out_of_place=True),
    ZoCase(dtype=F16, rademacher=True),
    ZoCase((5, 2049), F32, rademacher=True, terms=1, rounding=False, offsets=(127, 1)),
    ZoCase((4096, 64), BF16, terms=1, decay=False, threshold=False, rounding=False, offsets=(0, 512)),
)


def random_cases(count: int, seed: int) -> list[ZoCase]:
    draw = random.Random(seed)
    sizes = (0, 1, 2, 3, 4, 7, 8, 31, 127, 128, 129, 511, 512, 513, 1024, 2047, 2048, 3001)
    starts = (0, 0, 1, 3, 8, 127, 500, 512, 2**31 - 3, 2**32 + 1, 2**40 + 12)
    cases = []
    for index in range(count):
        many = draw.randint(1, 4)
        cases.append(
            ZoCase(
                sizes=tuple(draw.choice(sizes) for _ in range(many)),
                dtype=draw.choice((F32, BF16, F16)),
                rademacher=draw.random() < 0.4,
                terms=draw.randint(1, 3),
                decay=draw.random() < 0.5,
                threshold=draw.random() < 0.5,
                rounding=draw.random() < 0.5,
                offsets=tuple(draw.choice(starts) for _ in range(many)),
                out_of_place=draw.random() < 0.5,
                data=index,
            )
        )
    return cases


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def weights_of(case: ZoCase) -> list[Tensor]:
    """Of the size of a model's weights, zeros of both signs, denormals and infinities among them."""
    generator = torch.Generator().manual_seed(6000 + case.data)
    weights = []
    for size in case.sizes:
        weight = torch.randn(size, generator=generator) * 0.02
        for place, value in enumerate((0.0, -0.0, 1e-40, -3e-6, float("inf"), 60000.0)):
            if size > 20 + place:
                weight[3 * place + 1] = value
        weights.append(weight.to(case.dtype).to(DEVICE))
    return weights


def terms_of(case: ZoCase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(7000 + case.data)
    seeds = torch.randint(-(2**63), 2**63 - 1, (case.terms,), generator=generator)
    coefficients = torch.randn(case.terms, generator=generator) * 3e-3
    decay = torch.tensor([0.97]) if case.decay else None
    thresholds = torch.rand(len(case.sizes), generator=generator) * 0.03 if case.threshold else None
    rounding = torch.tensor([123456789123]) if case.rounding else None
    given = (seeds, coefficients, decay, thresholds, rounding)
    return tuple(None if one is None else one.to(DEVICE) for one in given)  # type: ignore[return-value]


def check_perturb(case: ZoCase) -> None:
    weights, terms = weights_of(case), terms_of(case)
    seeds, coefficients, decay, thresholds, rounding = terms
    ids = [3 * i + 2**31 for i in range(len(weights))]
    expected = [
        definition.perturbed(
            weight,
            seeds,
            coefficients,
            decay,
            None if thresholds is None else thresholds[i],
            rounding,
            ids[i],
            case.offsets[i],
            case.rademacher,
        )
        for i, weight in enumerate(weights)
    ]
    before = [weight.clone() for weight in weights]
    outs = [torch.full_like(weight, float("nan")) for weight in weights] if case.out_of_place else weights
    sources = weights if case.out_of_place else []
    ops.perturb_(outs, sources, *terms, ids, list(case.offsets[: len(weights)]), case.rademacher)
    for i, (out, right) in enumerate(zip(outs, expected, strict=True)):
        wrong = (bits(out) != bits(right)).sum().item()
        assert wrong == 0, f"{case}: tensor {i}: {wrong} of {out.numel()} elements differ in their bits"
    if case.out_of_place:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, before, strict=True)), (
            f"{case}: a source moved"
        )


@dataclass(frozen=True)
class LinearCase:
    M: int = 5
    N: int = 37
    K: int = 68
    dtype: torch.dtype = F32
    rademacher: bool = False
    bias: bool = True
    threshold: bool = True
    data: int = 0


LINEAR_TELLING = (
    LinearCase(),
    LinearCase(17, 33, 132, BF16, threshold=False),
    LinearCase(3, 40, 64, F16, rademacher=True),
    LinearCase(2, 9, 31, BF16, bias=False),
)


def check_linear(case: LinearCase) -> None:
    generator = torch.Generator().manual_seed(8000 + case.data)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype).to(DEVICE)

    x_plus, x_minus, weight = normal(case.M, case.K), normal(case.M, case.K), normal(case.N, case.K, scale=0.1)
    biases = (normal(case.N), normal(case.N)) if case.bias else (None, None)
    seed, eps = torch.tensor([-5], device=DEVICE), torch.tensor([0.05], device=DEVICE)
    threshold = torch.tensor([0.1], device=DEVICE) if case.threshold else None
    arguments = (x_plus, x_minus, weight, *biases, seed, eps, threshold, 9, case.rademacher)
    actual = linear_ops.zo_linear(*arguments)
    composed = definition.zo_linear(*arguments)
    for name, x, bias, scale, got, stock in zip(
        ("plus", "minus"), (x_plus, x_minus), biases, (eps, -eps), actual, composed, strict=True
    ):
        moved = definition.perturbed(weight, seed, scale, None, threshold, None, 9, 0, case.rademacher)
        exact = torch.nn.functional.linear(x.double(), moved.double(), None if bias is None else bias.double())
        assert got.dtype == case.dtype
        assert_within_budget(f"{case}: {name}", got, stock, exact)
