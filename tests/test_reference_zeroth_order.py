"""The definitions of z, of stochastic rounding and of a perturbed weight, against formulas in float64 and against frozen answers."""

import math

import pytest
import torch

from peftfast.reference import philox
from peftfast.reference import zeroth_order as definition

SEED = torch.tensor([-0x123456789ABCDEF])


def floats(*texts: str) -> torch.Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=torch.float32)


def test_known_answers() -> None:
    """Frozen: a log of seeds written today must give the same weights on every later version and machine."""
    ones = 2**32 - 1
    assert torch.equal(
        philox.gaussian(torch.tensor([0]), 0, 4, 0),
        floats("0x1.fb7662p-1", "-0x1.d96d60p-1", "-0x1.3c3740p-1", "-0x1.eda366p-2"),
    )
    assert torch.equal(
        philox.gaussian(torch.tensor([-1]), 2**34 - 4, 4, ones),
        floats("-0x1.9c9972p-1", "-0x1.30e06ep+0", "0x1.55f0aep+0", "-0x1.c3edd2p-2"),
    )
    signs = [-1, 1, -1, -1, -1, -1, -1, -1, -1, 1, 1, -1, -1, -1, 1, 1]
    assert philox.rademacher(torch.tensor([5]), 120, 16, 3).tolist() == signs
    draws = [60458, 20419, 38519, 27092, 18358, 37199, 51185, 34280]
    assert philox.rounding_draws(torch.tensor([5]), 0, 8, 3).tolist() == draws


def test_known_answers_of_words() -> None:
    radius = torch.tensor([0, 1, 2**31, 2**32 - 1, 0x243F6A88])
    angle = torch.tensor([0, 2**29, 2**30 + 12345, 2**32 - 1, 0x85A308D3])
    first, second = philox.box_muller(radius, angle)
    assert torch.equal(first, floats("0x1.b0e08ep+2", "0x1.2aa63ap+2", "-0x1.64bee4p-16", "0x0p+0", "-0x1.f5584cp+0"))
    assert torch.equal(second, floats("0x0p+0", "0x1.2aa636p+2", "0x1.2d6abep+0", "0x0p+0", "-0x1.1739f8p-2"))


def test_box_muller_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor(
        [0, 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, *(k * 2**29 + d for k in range(8) for d in (-1, 0, 1))]
    )
    edges = edges.clamp(0, 2**32 - 1)
    radius = torch.cat((torch.randint(0, 2**32, (10**6,), generator=generator), edges))
    angle = torch.cat((torch.randint(0, 2**32, (10**6,), generator=generator), edges.flip(0)))
    first, second = philox.box_muller(radius, angle)
    # The radius word as float32 holds it: near u = 1 its rounding is what shows.
    u = ((radius.float() + 0.5).double() / 2**32).clamp(max=1.0)
    exact, turn = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * angle.double() / 2**32
    for got, right in ((first, exact * torch.cos(turn)), (second, exact * torch.sin(turn))):
        assert got.isfinite().all()
        assert ((got - right).abs() / exact.clamp(min=1e-3)).max() < 4e-7


def test_elements_of_a_shard_are_those_of_the_whole() -> None:
    for draw in (philox.gaussian, philox.rademacher, philox.rounding_draws):
        whole = draw(SEED, 0, 700, 9)
        for start, count in ((0, 1), (1, 6), (127, 2), (130, 300), (699, 1), (3, 0)):
            assert torch.equal(draw(SEED, start, count, 9), whole[start : start + count])
        far = 2**40 + 3
        assert torch.equal(draw(SEED, far, 9, 9)[4:], draw(SEED, far + 4, 5, 9))


def test_directions_differ_by_seed_tensor_and_stream() -> None:
    z = philox.gaussian(SEED, 0, 4096, 0)
    for other in (
        philox.gaussian(SEED + 1, 0, 4096, 0),
        philox.gaussian(SEED, 0, 4096, 1),
        philox.gaussian(SEED, 4096, 4096, 0),
    ):
        assert abs((z * other).mean()) < 5 / 64
    signs = philox.rademacher(SEED, 0, 4096, 0)
    assert abs((z.sign() * signs).mean()) < 5 / 64 and signs.abs().eq(1).all()


def test_reference_moments() -> None:
    z = philox.gaussian(SEED, 0, 10**6, 0).double()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((z**power).mean() - moment) < 5 * (variance / 10**6) ** 0.5
    assert abs(philox.rademacher(SEED, 0, 10**6, 0).mean()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_neighbours_and_no_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    values = torch.cat(
        (values[values.isfinite()], torch.randn(100_000, generator=generator) * 2.0**-16, torch.zeros(2))
    )
    draws = torch.randint(0, 65536, values.shape, generator=generator)
    rounded = definition.round_stochastically(values, draws, dtype)
    nearest = values.to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, math.inf))
    down = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    exact = nearest.float() == values
    assert torch.equal(rounded[exact], nearest[exact])
    between = nearest.isfinite() & ~exact
    low = torch.where(nearest.float() > values, down, nearest)
    high = torch.where(nearest.float() > values, nearest, up)
    assert ((rounded == low) | (rounded == high))[between].all()
    assert torch.equal(rounded.isfinite(), nearest.isfinite()), "chance made an infinity, or unmade one"
    assert definition.round_stochastically(torch.tensor([math.nan]), torch.tensor([5]), dtype).isnan().all()
    assert torch.signbit(definition.round_stochastically(torch.tensor([-0.0]), torch.tensor([65535]), dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0203, -1.0007, 3e-6, -7.3e-8, 5e-9])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    """Over all draws once: the mean is the value, to the resolution of a draw."""
    draws = torch.arange(65536)
    rounded = definition.round_stochastically(torch.full((65536,), value), draws, dtype).double()
    unit = (rounded.max() - rounded.min()).item()
    assert unit > 0 and abs(rounded.mean().item() - torch.tensor(value).double().item()) <= unit / 65536


def test_perturbed() -> None:
    weight = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seeds, coefficients = torch.tensor([3, 4]), torch.tensor([0.5, -0.25])
    z = [definition.perturbation(seeds[k : k + 1], (7, 11), 2, 5, False, torch.float64) for k in range(2)]
    moved = definition.perturbed(weight, seeds, coefficients, None, None, None, 2, 5, False)
    assert torch.equal(moved, weight + 0.5 * z[0] - 0.25 * z[1])
    decay = torch.tensor([0.5])
    moved = definition.perturbed(weight, seeds, coefficients, decay, None, None, 2, 5, False)
    assert torch.equal(moved, weight * 0.5 + 0.5 * z[0] - 0.25 * z[1])
    threshold = torch.tensor(0.3)
    moved = definition.perturbed(weight, seeds, coefficients, decay, threshold, None, 2, 5, False)
    small = weight.abs() <= threshold
    assert 0 < small.sum() < weight.numel()
    assert torch.equal(moved[~small], weight[~small])
    assert torch.equal(moved[small], (weight * 0.5 + 0.5 * z[0] - 0.25 * z[1])[small])


def test_nothing_moves_without_a_coefficient() -> None:
    weight = torch.tensor([0.0, -0.0, 1.5, 1e-40]).bfloat16()
    zero = torch.zeros(2)
    moved = definition.perturbed(weight, torch.tensor([3, 4]), zero, None, None, torch.tensor([8]), 0, 0, False)
    assert torch.equal(moved.view(torch.int16), weight.view(torch.int16))


def test_zo_linear_is_two_products() -> None:
    generator = torch.Generator().manual_seed(2)
    x_plus, x_minus, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 8), (3, 8), (5, 8), (5,))
    )
    seed, eps = torch.tensor([4]), torch.tensor([0.5])
    z = definition.perturbation(seed, (5, 8), 1, 0, False, torch.float64)
    plus, minus = definition.zo_linear(x_plus, x_minus, weight, bias, 2 * bias, seed, eps, None, 1, False)
    torch.testing.assert_close(plus, x_plus @ (weight + 0.5 * z).T + bias)
    torch.testing.assert_close(minus, x_minus @ (weight - 0.5 * z).T + 2 * bias)


def test_zo_nf4_linear_moves_the_weight_or_its_scales() -> None:
    """By hand, from a weight of two blocks whose maxima are 1 and 3."""
    code = torch.linspace(-1, 1, 16)
    packed = torch.arange(64, dtype=torch.uint8).reshape(-1, 1) * 3
    nibbles = torch.stack((packed[:, 0] >> 4, packed[:, 0] & 15), 1).flatten().long()
    absmax, eye = torch.tensor([1.0, 3.0]), torch.eye(64)
    seed, eps, limit = torch.tensor([4]), torch.tensor([0.5]), torch.tensor([2.0])
    weight = (packed, absmax, code, 64, (2, 64), None, None, None)
    dense = code[nibbles].reshape(2, 64) * absmax[:, None]
    z = definition.perturbation(seed, (2, 64), 1, 0, False, torch.float32)
    plus, minus = definition.zo_nf4_linear(eye, eye, *weight, None, None, seed, eps, None, 1, False, False)
    torch.testing.assert_close(plus.T, dense + 0.5 * z)
    torch.testing.assert_close(minus.T, dense - 0.5 * z)
    z = definition.perturbation(seed, (2,), 1, 0, False, torch.float32)
    moved = torch.tensor([1.0 - 0.5 * z[0], 3.0])  # the second maximum lies above the threshold
    _, minus = definition.zo_nf4_linear(eye, eye, *weight, None, None, seed, eps, limit, 1, False, True)
    torch.testing.assert_close(minus.T, code[nibbles].reshape(2, 64) * moved[:, None])
