"""F.perturb_, F.perturbation and F.zo_linear: what they promise in their own words."""

import contextlib
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.functional import disjoint
from peftfast.functional.disjoint import check_disjoint
from peftfast.functional.dora import forget_norms
from peftfast.optim import low_rank
from tests.support.counting import Calls
from tests.support.lora_checks import BF16, DEVICE, F16, F32


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def test_perturb_adds_scale_times_perturbation() -> None:
    for distribution in ("gaussian", "rademacher"):
        tensors = weights((33, 7), (5,))
        before = [tensor.clone() for tensor in tensors]
        F.perturb_(tensors, 2**64 - 3, 0.5, distribution=distribution)
        for i, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
            z = F.perturbation(old.shape, 2**64 - 3, tensor_id=i, device=DEVICE, distribution=distribution)
            assert torch.equal(tensor, old + 0.5 * z)


def test_seeds_of_the_same_64_bits_are_the_same() -> None:
    signed = F.perturbation((9,), -3, device=DEVICE)
    assert torch.equal(signed, F.perturbation((9,), 2**64 - 3, device=DEVICE))
    assert torch.equal(signed, F.perturbation((9,), torch.tensor([-3], device=DEVICE)))


def test_shards_are_parts_of_the_whole() -> None:
    (whole,) = weights((12, 10))
    shards = [whole[:5].clone(), whole[5:].clone()]
    F.perturb_(whole, 4, 0.1, tensor_ids=[7])
    F.perturb_(shards, 4, 0.1, tensor_ids=[7, 7], offsets=[0, 50])
    assert torch.equal(torch.cat(shards), whole)
    z = F.perturbation((7, 10), 4, tensor_id=7, offset=50, device=DEVICE)
    assert torch.equal(z, F.perturbation((12, 10), 4, tensor_id=7, device=DEVICE)[5:])


def test_fused_forms_are_one_read_and_one_rounding() -> None:
    """Restore and update is one term; restore, update and the next perturbation are two."""
    (old,) = weights((1000,), dtype=BF16)
    at_minus = old.clone()
    F.perturb_(at_minus, 1, -1e-2)
    fused = at_minus.clone()
    F.perturb_(fused, [1, 2], [1e-2 - 3e-4, 1e-2])
    z1, z2 = (F.perturbation((1000,), seed, device=DEVICE) for seed in (1, 2))
    scales = torch.tensor([1e-2 - 3e-4, 1e-2], device=DEVICE)
    assert torch.equal(fused, (at_minus.float() + scales[0] * z1 + scales[1] * z2).bfloat16())


def test_one_operator_for_each_dtype() -> None:
    tensors = [*weights((4, 4), (7,)), *weights((9,), (3, 3), dtype=BF16), *weights((2,), dtype=F16)]
    seed, scale = torch.tensor([5], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    with Calls() as calls:
        F.perturb_(tensors, seed, scale)
    assert calls.compute == {"perturb_": 3}


def test_mixed_dtypes_keep_their_ids_and_thresholds() -> None:
    tensors = [weights((50,))[0], weights((50,), dtype=BF16)[0], weights((50,))[0]]
    thresholds = torch.tensor([10.0, 10.0, 0.0], device=DEVICE)
    before = [tensor.clone() for tensor in tensors]
    F.perturb_(tensors, 1, 1.0, tensor_ids=[4, 5, 6], thresholds=thresholds)
    for i, tensor_id in enumerate((4, 5)):
        z = F.perturbation((50,), 1, tensor_id=tensor_id, device=DEVICE)
        assert torch.equal(tensors[i], (before[i].float() + z).to(tensors[i].dtype))
    assert torch.equal(tensors[2], before[2])


def test_strided_tensors_move_by_their_logical_position() -> None:
    (plain,) = weights((6, 8))
    strided = plain.T.contiguous().T
    assert not strided.is_contiguous()
    F.perturb_([plain], 3, 0.5)
    F.perturb_([strided], 3, 0.5)
    assert torch.equal(plain, strided)
    every_second = torch.zeros(4, 16, device=DEVICE)
    F.perturb_(every_second[:, ::2], 3, 1.0)
    assert torch.equal(every_second[:, ::2], F.perturbation((4, 8), 3, device=DEVICE))
    assert not every_second[:, 1::2].any()


def test_sources_are_read_and_not_written() -> None:
    source, target = weights((5, 5), (5, 5))
    before = source.clone()
    F.perturb_([target], 3, 0.5, sources=[source])
    assert torch.equal(source, before)
    assert torch.equal(target, before + 0.5 * F.perturbation((5, 5), 3, device=DEVICE))


def test_sources_that_lie_apart_or_in_place() -> None:
    whole = torch.arange(12.0, device=DEVICE)
    before = whole.clone()
    targets, sources = [whole[:4], whole[8:10], whole[10:].expand(1, 2)], [whole[:4], whole[6:8], whole[7].expand(1, 2)]
    F.perturb_(targets, 3, 0.0, sources=sources)
    before[8:10], before[10:] = before[6:8], before[7]
    assert torch.equal(whole, before)


def test_parameters_and_leaves_can_be_moved() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, device=DEVICE))
    F.perturb_([parameter], 1, 1.0)
    assert torch.equal(parameter.detach(), F.perturbation((4,), 1, device=DEVICE)) and parameter.requires_grad


def test_a_tensor_that_is_moved_says_so() -> None:
    """By its version: to a graph that has saved it, and to DoRA, which keeps the norms of a weight's rows while it does not change."""
    (weight, wide), x, a = weights((48, 48), (6, 4)), *weights((3, 48)), *weights((2, 48))
    b, magnitude = torch.ones(48, 2, device=DEVICE), torch.ones(48, device=DEVICE)

    def layer() -> torch.Tensor:
        return F.lora_linear(x, weight, a, b, magnitude=magnitude)

    layer()
    parameter = torch.nn.Parameter(wide.T)
    moved: list[Callable[[], None]] = [
        lambda: F.perturb_([weight, parameter], 3, 2.0),
        lambda: low_rank.move_(weight, torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE), 0, 2, False),
        lambda: low_rank.update_(weight, torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE), 0, 2, False),
    ]
    for move in moved:
        factor = torch.ones_like(weight, requires_grad=True)
        y = (factor * weight).sum()
        move()
        now = layer()
        forget_norms(weight)
        assert torch.equal(now, layer())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    assert parameter._version > 0


def test_positions_beyond_32_bits() -> None:
    """Where an int32 would wrap, the words are others; the meta device shows that shapes of such sizes pass."""
    far = F.perturbation((8,), 1, offset=2**33, device=DEVICE)
    assert not torch.equal(far, F.perturbation((8,), 1, device=DEVICE))
    assert F.perturbation((2**17, 2**17), 1, device="meta").shape == (2**17, 2**17)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_zo_linear(dtype: torch.dtype) -> None:
    x_plus, x_minus, weight, bias = weights((2, 3, 16), (2, 3, 16), (10, 16), (10,), dtype=dtype)
    plus, minus = F.zo_linear(x_plus, x_minus, weight, 5, 0.1, bias=bias, tensor_id=3)
    z = F.perturbation((10, 16), 5, tensor_id=3, device=DEVICE)
    step = torch.tensor(0.1, device=DEVICE) * z
    for x, got, moved in ((x_plus, plus, weight + step), (x_minus, minus, weight - step)):
        right = torch.nn.functional.linear(x, moved.to(dtype), bias)
        torch.testing.assert_close(got, right)
        assert got.shape == (2, 3, 10)


def test_zo_linear_on_strides() -> None:
    """Whatever the order in memory, z goes by the logical position."""
    x_plus, x_minus, weight, bias = weights((3, 16), (3, 16), (10, 16), (10,))
    right = F.zo_linear(x_plus, x_minus, weight, 5, 0.1, bias=bias)
    given = [t.T.contiguous().T for t in (x_plus, x_minus, weight)]
    assert not any(t.is_contiguous() for t in given)
    got = F.zo_linear(*given, 5, 0.1, bias=bias.repeat(2, 1).T[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("rows", [3, 200])
def test_zo_linear_on_a_4_bit_weight(rows: int) -> None:
    """That of the decoded weight, moved: the budget is tested with the operators."""
    x_plus, x_minus, weight = weights((rows, 64), (rows, 64), (10, 64))
    nf4 = F.nf4_quantize(weight)
    got = F.zo_linear(x_plus, x_minus, nf4, 5, 0.1, distribution="rademacher")
    right = F.zo_linear(x_plus, x_minus, F.nf4_dequantize(nf4), 5, 0.1, distribution="rademacher")
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_zo_linear_on_a_4_bit_weight_is_one_operator() -> None:
    x_plus, x_minus, weight = weights((3, 64), (3, 64), (10, 64))
    nf4 = F.nf4_quantize(weight)
    seed, eps = torch.tensor([5], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    with Calls() as calls:
        F.zo_linear(x_plus, x_minus, nf4, seed, eps)
    assert calls.compute == {"zo_nf4_linear": 1}


def test_zo_linear_draws_z_once_for_both_signs() -> None:
    x_plus, x_minus, weight = weights((3, 64), (3, 64), (10, 64))
    seed, eps = torch.tensor([5], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    with Calls() as calls:
        F.zo_linear(x_plus, x_minus, weight, seed, eps)
    assert calls.compute == {"zo_linear": 1}


ONE, OTHER = torch.ones(3), torch.ones(3)
BAD = {
    "distribution": (ValueError, "distribution: expected", lambda: F.perturb_([ONE], 1, 1.0, distribution="cauchy")),
    "seed": (ValueError, "seed: expected 64 bits", lambda: F.perturb_([ONE], 2**64, 1.0)),
    "seed low": (ValueError, "seed: expected 64 bits", lambda: F.perturb_([ONE], -(2**63) - 1, 1.0)),
    "seed float": (TypeError, "seed: expected an int", lambda: F.perturb_([ONE], 1.5, 1.0)),  # type: ignore[arg-type]
    "seed dtype": (TypeError, "seed: expected int64", lambda: F.perturb_([ONE], ONE, 1.0)),
    "scale": (ValueError, "scale: expected 2", lambda: F.perturb_([ONE], [1, 2], 1.0)),
    "scale nan": (ValueError, "scale: expected a finite", lambda: F.perturb_([ONE], 1, float("nan"))),
    "scale dtype": (TypeError, "scale: expected float32", lambda: F.perturb_([ONE], 1, ONE[:1].double())),
    "integers": (TypeError, r"tensors\[1\]: expected a floating", lambda: F.perturb_([ONE, ONE.int()], 1, 1.0)),
    "no tensor": (TypeError, r"tensors\[0\]: expected a tensor", lambda: F.perturb_([3], 1, 1.0)),  # type: ignore[list-item]
    "twice": (ValueError, r"tensors\[1\]: the same memory", lambda: F.perturb_([ONE, ONE], 1, 1.0)),
    "none": (TypeError, "tensors: expected a tensor or a sequence", lambda: F.perturb_(None, 1, 1.0)),  # type: ignore[arg-type]
    "sparse": (TypeError, r"tensors\[1\]: expected a dense", lambda: F.perturb_([ONE, ONE.to_sparse()], 1, 1.0)),
    "expanded": (ValueError, r"tensors\[1\]: expected each", lambda: F.perturb_([ONE, OTHER.expand(2, 3)], 1, 1.0)),
    "windows": (ValueError, r"tensors\[0\]: expected each", lambda: F.perturb_([ONE.unfold(0, 2, 1)], 1, 1.0)),
    "partly": (
        ValueError,
        r"tensors\[2\]: the same .* tensors\[1\]",
        lambda: F.perturb_([OTHER, ONE[:2], ONE[1:]], 1, 1.0),
    ),
    "one id": (TypeError, "tensor_ids: expected a sequence", lambda: F.perturb_([ONE], 1, 1.0, tensor_ids=1)),  # type: ignore[arg-type]
    "one offset": (TypeError, "offsets: expected a sequence", lambda: F.perturb_([ONE], 1, 1.0, offsets=1)),  # type: ignore[arg-type]
    "one source": (TypeError, "sources: expected a sequence", lambda: F.perturb_([ONE], 1, 1.0, sources=ONE)),  # type: ignore[arg-type]
    "devices": (ValueError, r"tensors\[1\]: expected on", lambda: F.perturb_([ONE, ONE.to("meta")], 1, 1.0)),
    "ids": (ValueError, "tensor_ids: expected 1, one for each", lambda: F.perturb_([ONE], 1, 1.0, tensor_ids=[1, 2])),
    "id": (ValueError, "tensor_ids: expected ints", lambda: F.perturb_([ONE], 1, 1.0, tensor_ids=[2**32])),
    "half an id": (ValueError, "tensor_ids: expected ints", lambda: F.perturb_([ONE], 1, 1.0, tensor_ids=[0.5])),  # type: ignore[list-item]
    "half an offset": (ValueError, "offsets: expected ints", lambda: F.perturb_([ONE], 1, 1.0, offsets=[0.5])),  # type: ignore[list-item]
    "offset": (ValueError, "offsets: expected ints", lambda: F.perturb_([ONE], 1, 1.0, offsets=[-1])),
    "decay": (ValueError, "decay: expected one", lambda: F.perturb_([ONE], 1, 1.0, decay=ONE)),
    "thresholds": (ValueError, "thresholds: expected 1", lambda: F.perturb_([ONE], 1, 1.0, thresholds=ONE)),
    "sources": (ValueError, "sources: expected the shapes", lambda: F.perturb_([ONE], 1, 1.0, sources=[ONE[:2]])),
    "sources swapped": (
        ValueError,
        r"sources\[[01]\]: expected .* itself or .* got memory of tensors\[[01]\]",
        lambda: F.perturb_([ONE, OTHER], 1, 1.0, sources=[OTHER, ONE]),
    ),
    "source shifted": (
        ValueError,
        r"sources\[0\]: .* memory of tensors\[0\]",
        lambda: F.perturb_([ONE[1:]], 1, 1.0, sources=[ONE[:2]]),
    ),
    "source expanded": (
        ValueError,
        r"sources\[1\]: .* memory of tensors\[1\]",
        lambda: F.perturb_([OTHER, ONE], 1, 1.0, sources=[OTHER, ONE[1].expand(3)]),
    ),
    "dtype": (TypeError, "dtype: expected a floating", lambda: F.perturbation((3,), 1, dtype=torch.int32)),
    "shape": (ValueError, "shape: expected sizes", lambda: F.perturbation((-3,), 1)),
    "seeds": (ValueError, "seed: expected one, got 2", lambda: F.perturbation((3,), [1, 2])),  # type: ignore[arg-type]
    "linear x": (TypeError, "x_minus: expected a floating", lambda: F.zo_linear(ONE, ONE.int(), ONE, 1, 0.1)),
    "linear shapes": (ValueError, "x_minus: expected", lambda: F.zo_linear(ONE, ONE[:2], ONE, 1, 0.1)),
    "linear weight": (TypeError, "weight: expected a tensor", lambda: F.zo_linear(ONE, ONE, 3, 1, 0.1)),  # type: ignore[arg-type]
    "linear K": (ValueError, "x_plus: expected", lambda: F.zo_linear(ONE, ONE, torch.ones(2, 4), 1, 0.1)),
    "linear list": (
        TypeError,
        "bias: expected a tensor, got list",
        lambda: F.zo_linear(ONE, ONE, torch.ones(2, 3), 1, 0.1, bias=[0]),
    ),  # type: ignore[arg-type]
    "linear bool": (
        TypeError,
        "bias: expected a tensor",
        lambda: F.zo_linear(ONE, ONE, torch.ones(2, 3), 1, 0.1, bias=True),
    ),  # type: ignore[arg-type]
    "linear bias": (ValueError, "bias: expected", lambda: F.zo_linear(ONE, ONE, torch.ones(2, 3), 1, 0.1, bias=ONE)),
}


def test_views_between_one_anothers_elements() -> None:
    whole = torch.zeros(6, 8, device=DEVICE)
    parts = [whole[:, :3], whole[:, 3:4], whole[1::2, 4:], whole[::2, 4::2], whole[::2, 5::2].T, whole[:0]]
    F.perturb_(parts, 3, 1.0)
    for index, part in enumerate(parts):
        assert torch.equal(part, F.perturbation(part.shape, 3, tensor_id=index, device=DEVICE))


def test_what_shares_memory() -> None:
    """Against the places themselves, for views of any strides."""
    draw = random.Random(5)
    whole = torch.zeros(200)

    def view() -> Tensor:
        of, dims = draw.choice((whole, whole.view(BF16))), draw.randint(0, 3)
        sizes, strides = ([draw.randint(low, high) for _ in range(dims)] for low, high in ((1, 5), (0, 12)))
        return of.as_strided(sizes, strides, draw.randint(0, 40))

    def places(tensor: Tensor) -> list[int]:
        at = torch.arange(2 * len(whole)).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
        return [place for one in (at * tensor.itemsize).tolist() for place in range(one, one + tensor.itemsize)]

    for _ in range(500):
        pair = [view(), view()]
        held = [place for one in pair for place in places(one)]
        shared = len(set(held)) < len(held)
        with pytest.raises(ValueError, match="^tensors") if shared else contextlib.nullcontext():
            check_disjoint("tensors", pair)


def test_a_search_among_strides_ends() -> None:
    """Of strides so alike that each number of times is possible for each: what takes long counts as shared, though no sum is odd."""
    steps = [(2 * (1000 - k), 0, 15) for k in range(6)]
    assert disjoint._reaches(45_001, 45_001, steps)
    assert not disjoint._reaches(15_001, 15_001, steps[:2])


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    kind, message, call = BAD[name]
    with pytest.raises(kind, match=message):
        call()
    assert torch.equal(ONE, torch.ones(3)) and torch.equal(OTHER, torch.ones(3))
