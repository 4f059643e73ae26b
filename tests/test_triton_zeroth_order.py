"""kernels/zeroth_order.py by itself: blockings, tables, alignment; interpreted without a GPU, compiled with one."""

import pytest
import torch

from peftfast.configs.zeroth_order import PerturbConfig, ZoLinearConfig
from peftfast.kernels import zeroth_order, zeroth_order_linear
from peftfast.reference import zeroth_order as definition

from .support.budget import assert_within_budget
from .support.interpreter import DEVICE, require_runnable_kernels, seed_of
from .support.zo_checks import NF4LinearCase, bits, nf4_arguments, nf4_moved


@pytest.fixture(autouse=True)
def runnable() -> None:
    require_runnable_kernels()


def moved(weights, ids, offsets, rademacher, config):  # type: ignore[no-untyped-def]
    outs = [torch.full_like(weight, float("nan")) for weight in weights]
    minus = [torch.full_like(weight, float("nan")) for weight in weights]
    one = torch.tensor([0.5], device=DEVICE)
    arguments = (seed_of(3), one, None, None, None, ids, offsets, rademacher, config)
    zeroth_order.perturb(weights, outs, minus, *arguments)
    return outs, minus


@pytest.mark.parametrize("rademacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_the_blocking(rademacher: bool, dtype: torch.dtype) -> None:
    """Nine tensors of one launch (the search of the table goes four deep), empty ones and unaligned ones among them."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 0, 2048, 5, 4097, 1024, 0, 3, 2500)
    weights = [torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in sizes]
    weights[4] = weights[4][1:]  # two or four bytes off 16
    offsets = [0, 5, 0, 2047, 0, 2**33 + 3, 0, 1, 64]
    ids = [7 * i for i in range(9)]
    for config in (PerturbConfig(), PerturbConfig(1024, 4), PerturbConfig(4096, 8)):
        outs, minus = moved(weights, ids, offsets, rademacher, config)
        for i, weight in enumerate(weights):
            for sign, got in ((0.5, outs[i]), (-0.5, minus[i])):
                scale = torch.tensor([sign], device=DEVICE)
                right = definition.perturbed(
                    weight, seed_of(3), scale, None, None, None, ids[i], offsets[i], rademacher
                )
                assert torch.equal(bits(got), bits(right)), (config, i, sign)


def test_thresholds_of_empty_tensors_are_passed_over() -> None:
    weights = [torch.empty(0, device=DEVICE), torch.ones(8, device=DEVICE)]
    thresholds = torch.tensor([9.0, 0.5], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    arguments = (None, seed_of(3), one, None, thresholds, None, [0, 1], [0, 0], False, PerturbConfig())
    zeroth_order.perturb(weights, weights, *arguments)
    assert torch.equal(weights[1], torch.ones(8, device=DEVICE))


# Rows that begin inside a counter of 128 signs, and rows that begin with one, in steps of less, of one and of two counters.
@pytest.mark.parametrize(
    ("config", "K"),
    [
        (ZoLinearConfig(16, 16, 16), 76),
        (ZoLinearConfig(32, 64, 32), 76),
        (ZoLinearConfig(16, 32, 64), 256),
        (ZoLinearConfig(16, 32, 128), 384),
        (ZoLinearConfig(16, 16, 256), 384),
        (ZoLinearConfig(16, 64, 16, splits=2), 76),
        (ZoLinearConfig(32, 32, 64, splits=3), 256),
    ],
)
@pytest.mark.parametrize("rademacher", [False, True])
def test_linear_does_not_depend_on_the_tile(config: ZoLinearConfig, K: int, rademacher: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((19, K), (19, K), (35, K), (35,), (35,))
    tensors = [torch.randn(*shape, generator=generator).half().to(DEVICE) for shape in shapes]
    terms = (seed_of(8), torch.tensor([0.25], device=DEVICE), None, 2, rademacher)
    got = zeroth_order_linear.zo_linear(*tensors, *terms, config)
    right = definition.zo_linear(*(one.double() for one in tensors), *terms)
    composed = definition.zo_linear(*tensors, *terms)
    for name, *results in zip(("plus", "minus"), got, composed, right, strict=True):
        assert_within_budget(name, *results)


@pytest.mark.parametrize("of_scales", [False, True])
@pytest.mark.parametrize(
    "config", [ZoLinearConfig(16, 16, 32), ZoLinearConfig(32, 64, 64), ZoLinearConfig(16, 32, 32, splits=3)]
)
def test_nf4_linear_does_not_depend_on_the_tile(config: ZoLinearConfig, of_scales: bool) -> None:
    case = NF4LinearCase(19, 35, 128, torch.float16, nested=not of_scales, of_scales=of_scales)
    arguments = nf4_arguments(case)
    got = zeroth_order_linear.zo_nf4_linear(*arguments, config)
    composed = definition.zo_nf4_linear(*arguments)
    for side, moved in enumerate(nf4_moved(arguments)):
        exact = torch.nn.functional.linear(arguments[side].double(), moved.double(), arguments[10 + side].double())
        assert_within_budget(("plus", "minus")[side], got[side], composed[side], exact)


@pytest.mark.parametrize("rademacher", [False, True])
def test_packed_bytes_that_no_word_can_be_loaded_from(rademacher: bool) -> None:
    arguments = list(nf4_arguments(NF4LinearCase(5, 35, 128, torch.float16, rademacher=rademacher)))
    aligned = zeroth_order_linear.zo_nf4_linear(*arguments, ZoLinearConfig(16, 16, 32))
    packed = arguments[2]
    arguments[2] = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(-1, 1).copy_(packed)
    askew = zeroth_order_linear.zo_nf4_linear(*arguments, ZoLinearConfig(16, 16, 32))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(aligned, askew, strict=True))


def test_a_coefficient_keeps_its_sign_under_signs() -> None:
    """Of every kind: what is put into the sign bit is what the product with a sign is, also of zero's neighbours and infinity."""
    for value in (0.5, -0.5, 2.0**-149, -(2.0**-149), float("inf"), float("-inf"), 0.0, -0.0):
        out = torch.full((5000,), float("nan"), device=DEVICE)
        one = torch.tensor([value], device=DEVICE)
        arguments = (seed_of(3), one, None, None, None, [4], [0], True, PerturbConfig(1024, 4))
        zeroth_order.perturb(None, [out], None, *arguments)
        right = definition.perturbed(torch.zeros(5000, device=DEVICE), seed_of(3), one, None, None, None, 4, 0, True)
        assert torch.equal(out, right), value
