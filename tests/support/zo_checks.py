"""Each zeroth-order operator against its definition, as functions of a case: what the tests run and what the mutants must fail."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.reference import nf4 as nf4_definition
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


@dataclass(frozen=True)
class NF4LinearCase:
    M: int = 5
    N: int = 37
    K: int = 192
    dtype: torch.dtype = BF16
    block_size: int = 64
    nested: bool = True
    of_scales: bool = False
    rademacher: bool = False
    bias: bool = True
    threshold: bool = True
    data: int = 0


NF4_LINEAR_TELLING = (
    NF4LinearCase(),
    NF4LinearCase(17, 33, 128, F16, nested=False, of_scales=True, data=1),
    NF4LinearCase(4, 40, 256, BF16, 32, nested=False, rademacher=True, of_scales=True, threshold=False, data=2),
    NF4LinearCase(4, 19, 67, F32, rademacher=True, bias=False, data=3),
)


def nf4_arguments(case: NF4LinearCase) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(8500 + case.data)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = torch.rand(case.N, 1, generator=generator) * 2 + 0.1
    weight = F.nf4_quantize(
        (normal(case.N, case.K) * 0.1 * rows).to(DEVICE), block_size=case.block_size, double_quant=case.nested
    )
    x_plus, x_minus = (normal(case.M, case.K).to(case.dtype).to(DEVICE) for _ in range(2))
    biases = [normal(case.N).to(case.dtype).to(DEVICE) if case.bias else None for _ in range(2)]
    seed, eps = torch.tensor([-5], device=DEVICE), torch.tensor([0.05], device=DEVICE)
    # About half of the elements, or of the block maxima, lie below it.
    threshold = torch.tensor([0.25 if case.of_scales else 0.08], device=DEVICE) if case.threshold else None
    return (x_plus, x_minus, *weight.storage(), *biases, seed, eps, threshold, 9, case.rademacher, case.of_scales)


def nf4_moved(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Both moved weights, in x's dtype, by the definition."""
    x, _, packed, absmax, code, block_size, shape, *nested, _, _, seed, eps, threshold, id_, rademacher, scales = (
        arguments
    )
    sides = []
    for scale in (eps, -eps):
        along = (seed, scale, None, threshold, None, id_, 0, rademacher)
        maxima = definition.perturbed(absmax, *along) if scales else absmax
        dense = nf4_definition.nf4_dequantize(packed, maxima, code, block_size, tuple(shape), x.dtype, *nested)
        sides.append(dense if scales else definition.perturbed(dense, *along))
    return sides[0], sides[1]


def check_nf4_linear(case: NF4LinearCase) -> None:
    """Small results are looked at together with those of other data: the largest error of a handful is luck."""
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"plus": [], "minus": []}
    for data in range(case.data, case.data + (8 if case.M * case.N < 64 else 1)):
        arguments = nf4_arguments(replace(case, data=data))
        actual, composed = linear_ops.zo_nf4_linear(*arguments), definition.zo_nf4_linear(*arguments)
        for side, (name, moved) in enumerate(zip(rows, nf4_moved(arguments), strict=True)):
            bias = arguments[10 + side]
            exact = torch.nn.functional.linear(
                arguments[side].double(), moved.double(), None if bias is None else bias.double()
            )
            assert actual[side].dtype == case.dtype
            rows[name].append((actual[side], composed[side], exact))
    for name, found in rows.items():
        assert_within_budget(f"{case}: {name}", *(torch.cat(column) for column in zip(*found, strict=True)))
