"""The C++ kernels of the zeroth order on each instruction set: bits, every word, a thousand million draws."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peftfast.ops import native
from peftfast.reference import philox
from peftfast.reference import zeroth_order as definition
from tests.support.zo_checks import TELLING, ZoCase, bits, random_cases, terms_of, weights_of

from .test_native_cpu import ISAS, ops

SEED, ONE = torch.tensor([77]), torch.ones(1)
CPU = torch.device("cpu")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = native.cpu_isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(chosen)


def apply(case: ZoCase, weights: list[Tensor], outs: list[Tensor], minus: list[Tensor], ids: list[int]) -> None:
    terms = [None if term is None else term.cpu() for term in terms_of(case)]
    ops.zo_apply(weights, outs, minus, *terms, ids, list(case.offsets[: len(weights)]), case.rademacher)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_bits_of_the_definition(isa: str, first: int) -> None:
    for case in (*TELLING, *random_cases(120, seed=11)[first : first + 40]):
        weights = [weight.cpu() for weight in weights_of(case)]
        seeds, coefficients, decay, thresholds, rounding = (None if t is None else t.cpu() for t in terms_of(case))
        ids = [2**32 - 1 - i for i in range(len(weights))]
        outs = [torch.full_like(weight, math.nan) for weight in weights]
        minus = [torch.full_like(weight, math.nan) for weight in weights]
        apply(case, weights, outs, minus, ids)
        for i, weight in enumerate(weights):
            threshold = None if thresholds is None else thresholds[i]
            place = (ids[i], case.offsets[i], case.rademacher)
            for sign, got in ((1, outs[i]), (-1, minus[i])):
                right = definition.perturbed(weight, seeds, sign * coefficients, decay, threshold, rounding, *place)
                assert torch.equal(bits(got), bits(right)), f"{case}: tensor {i}, sign {sign}"


@pytest.mark.parametrize("rademacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_z_alone(isa: str, rademacher: bool, dtype: torch.dtype) -> None:
    for count, offset in ((0, 0), (1, 0), (5, 3), (700, 2**32 - 9), (513, 511)):
        out = torch.full((count,), math.nan, dtype=dtype)
        ops.zo_apply([], [out], [], SEED, ONE, None, None, None, [6], [offset], rademacher)
        right = definition.perturbation(SEED, (count,), 6, offset, rademacher, dtype)
        assert torch.equal(bits(out), bits(right))


def test_results_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    case = ZoCase((100_003, 5, 50_000), offsets=(3, 0, 1))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights = [weight.cpu() for weight in weights_of(case)]
            apply(case, weights, weights, [], [0, 1, 2])
            results.append(torch.cat(weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(results[0]), bits(other)) for other in results[1:])


def survey(begin: int, end: int) -> list[int]:
    out = torch.zeros(3, dtype=torch.int64)
    ops.normal_survey(begin, end, out)
    return out.tolist()


def test_survey_counts_what_is_there() -> None:
    words = torch.arange(2**32 - 1000, 2**32)
    first, second = philox.box_muller(words, words)
    both = torch.cat((first, second))
    unsigned = both.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    largest = both.abs().max().reshape(1).view(torch.int32).item()
    assert survey(2**32 - 1000, 2**32) == [0, largest, int(unsigned.sum())]


@pytest.mark.slow
def test_every_word_gives_finite_normals() -> None:
    """All 2**32 words as radius and as angle, on the widest instruction set; samples of them on all, with the same sum of bits."""
    ops.set_isa("auto")
    not_finite, largest, _ = survey(0, 2**32)
    assert not_finite == 0
    assert torch.tensor([largest], dtype=torch.int32).view(torch.float32).item() < 6.77
    for begin in (0, 2**31 - 2**19, 2**32 - 2**20, 3 * 2**29 - 7):
        seen = set()
        for isa in ISAS:
            ops.set_isa(isa)
            seen.add(tuple(survey(begin, min(begin + 2**20 + 3, 2**32))))
        assert len(seen) == 1
    ops.set_isa("auto")


@pytest.mark.slow
def test_a_thousand_million_draws() -> None:
    """Mean, variance, skewness, kurtosis, Kolmogorov-Smirnov over 4,000 bins, tails beyond 4, 5 and 5.5, and the correlation of
    neighbours 1, 2, 3, 4 and 128 apart; bounds of five deviations (KS: P = 1e-6)."""
    count, part = 10**9, 10**6  # parts that stay in the cache
    edges, reach = 4000, 6.0
    bins = torch.zeros(edges + 2, dtype=torch.int64)  # the first and the last for what lies outside
    sums = torch.zeros(4, dtype=torch.float64)
    lags = {lag: 0.0 for lag in (1, 2, 3, 4, 128)}
    tails = {4.0: 0, 5.0: 0, 5.5: 0}
    z, square, place = torch.empty(part), torch.empty(part), torch.empty(part, dtype=torch.int32)
    for start in range(0, count, part):
        ops.zo_apply([], [z], [], SEED, ONE, None, None, None, [0], [start], False)
        torch.mul(z, edges / (2 * reach), out=square)
        place.copy_(square.add_(edges / 2 + 1).clamp_(0, edges + 1))
        bins += torch.bincount(place, minlength=edges + 2)
        # Every tenth part for the sums of products: their bounds are wider by the root of ten.
        if start % (10 * part) == 0:
            torch.mul(z, z, out=square)
            sums += torch.stack([_sum(z), _sum(square), _sum(square * z), _sum(square * square)])
            for lag in lags:
                lags[lag] += float(torch.dot(z[:-lag], z[lag:]))
    histogram = bins[1:-1].double()
    used = count / 10
    for total, moment, variance in zip(sums.tolist(), (0.0, 1.0, 0.0, 3.0), (1.0, 2.0, 15.0, 96.0), strict=True):
        assert abs(total / used - moment) < 5 * (variance / used) ** 0.5
    for lag, total in lags.items():
        assert abs(total / used) < 5 / used**0.5, f"neighbours {lag} apart are correlated"
    inside = histogram.sum().item()
    cumulative = (bins[0] + histogram.cumsum(0)) / count
    at = torch.linspace(-reach, reach, edges + 1, dtype=torch.float64)[1:]
    exact = 0.5 * torch.erfc(-at / math.sqrt(2))
    assert (cumulative - exact).abs().max().item() < 2.69 / count**0.5
    mean = (histogram * (at - reach / edges)).sum().item() / count
    assert abs(mean) < 5 / count**0.5
    for limit in tails:
        beyond = (
            histogram[at <= -limit + 1e-9].sum().item() + histogram[at > limit + 1e-9].sum().item() + count - inside
        )
        expected = count * math.erfc(limit / math.sqrt(2))
        assert abs(beyond - expected) < 5 * expected**0.5 + 1, f"beyond {limit}: {beyond}, expected {expected}"


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def test_signs_in_numbers() -> None:
    out = torch.empty(2**26)
    ops.zo_apply([], [out], [], SEED, ONE, None, None, None, [0], [0], True)
    assert abs(_sum(out)) < 5 * 2**13
    for lag in (1, 2, 32, 128):
        assert abs(float(torch.dot(out[:-lag], out[lag:]))) < 5 * 2**13 + 1


def test_updates_below_half_a_unit_are_not_lost(isa: str) -> None:
    """lr g = 1e-6 on weights of 0.02: to nearest, bfloat16 takes 3 % of it; by chance all of it, to within 1 % of the step."""
    torch.manual_seed(0)
    count = 4_000_000
    weight = (torch.randn(count) * 0.02).bfloat16()
    z = torch.empty(count)
    ops.zo_apply([], [z], [], SEED, ONE, None, None, None, [0], [0], False)
    wanted = 1e-6 * z
    taken = {}
    for name, rounding in (("nearest", None), ("chance", torch.tensor([5]))):
        out = torch.empty_like(weight)
        ops.zo_apply([weight], [out], [], SEED, torch.tensor([1e-6]), None, None, rounding, [0], [0], False)
        moved = out.double() - weight.double()
        taken[name] = float((moved * wanted).sum() / (wanted.double() ** 2).sum())
    assert taken["nearest"] < 0.1
    # One pass over 4 M weights shows it to about 1.3 %: the noise of the roundings over the step. 40 seeds show it to 0.2 %.
    assert abs(taken["chance"] - 1) < 0.07


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased_to_one_percent() -> None:
    torch.manual_seed(0)
    count, rounds = 4_000_000, 60
    weight = (torch.randn(count) * 0.02).bfloat16()
    z, out, moved = torch.empty(count), torch.empty_like(weight), torch.zeros(count)
    ops.zo_apply([], [z], [], SEED, ONE, None, None, None, [0], [0], False)
    before = weight.float()
    for seed in range(rounds):
        ops.zo_apply([weight], [out], [], SEED, torch.tensor([1e-6]), None, None, torch.tensor([seed]), [0], [0], False)
        moved += out.float() - before
    taken = float((moved.double() * z).sum() / (rounds * 1e-6 * (z.double() ** 2).sum()))
    assert abs(taken - 1) < 0.01


def bad_calls() -> list[tuple[str, Callable[[], None]]]:
    w, v = torch.zeros(8), torch.zeros(9)

    def call(message: str, **changes: object) -> tuple[str, Callable[[], None]]:
        given: dict[str, object] = {
            "sources": [w],
            "outs": [w],
            "minus": [],
            "seeds": SEED,
            "coefficients": ONE,
            "decay": None,
            "thresholds": None,
            "rounding_seed": None,
            "tensor_ids": [0],
            "offsets": [0],
            "rademacher": False,
        }
        return message, lambda: ops.zo_apply(*(given | changes).values())

    return [
        call("expected equal lengths", sources=[w, v]),
        call("expected equal lengths", minus=[v, v]),
        call("sources, minus: expected 8 elements", sources=[v]),
        call("sources, minus: expected dtype", sources=[w.half()]),
        call("expected dtype float32, bfloat16 or float16", sources=[w.double()], outs=[w.double()]),
        call("contiguous", sources=[torch.zeros(4, 2).T], outs=[torch.zeros(4, 2).T]),
        call("the same memory or apart", sources=[v[:8]], outs=[v[1:]]),
        call("minus: expected memory apart", minus=[w]),
        call("tensor_ids, offsets: expected 1", tensor_ids=[]),
        call("tensor_ids: expected values", tensor_ids=[2**32]),
        call("offsets: expected values", offsets=[-1]),
        call("offsets: expected values", offsets=[2**62 + 1]),
        call("seeds: expected dtype", seeds=ONE),
        call("coefficients: expected dtype", coefficients=SEED),
        call("coefficients: expected 1", coefficients=torch.ones(2)),
        call("decay: expected 1", decay=torch.ones(2)),
        call("thresholds: expected 1", thresholds=torch.ones(2)),
        call("seed: expected 1", rounding_seed=torch.zeros(2, dtype=torch.int64)),
        ("begin, end", lambda: ops.normal_survey(5, 4, torch.zeros(3, dtype=torch.int64))),
        ("begin, end", lambda: ops.normal_survey(0, 2**32 + 1, torch.zeros(3, dtype=torch.int64))),
        ("out: expected 3", lambda: ops.normal_survey(0, 1, torch.zeros(2, dtype=torch.int64))),
    ]


@pytest.mark.parametrize(("message", "call"), bad_calls())
def test_bad_arguments_raise(message: str, call: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
