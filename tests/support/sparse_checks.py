"""Each sparse-delta operator against its definition, as functions of a case: what the tests run and what the mutants must fail."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfast.ops import sparse_delta as ops
from peftfast.reference import sparse_delta as definition
from tests.support.budget import assert_within_budget
from tests.support.lora_checks import BF16, DEVICE, F16, F32

FEWEST_FOR_BUDGET = 64


@dataclass(frozen=True)
class Case:
    """``data`` seeds values and support; ``layout`` is the strides of dy and x."""

    M: int = 33
    N: int = 45
    K: int = 67
    S: int = 150
    dtype: torch.dtype = F32
    out: torch.dtype = F32
    index: torch.dtype = torch.int32
    layout: str = "plain"
    data: int = 0


TELLING = (
    Case(),
    Case(M=300, N=19, K=40, S=100, dtype=BF16, data=1),
    Case(M=64, N=33, K=70, S=300, dtype=F16, index=torch.int64, data=2),
    Case(M=7, N=5, K=3, S=15, dtype=BF16, out=BF16, layout="transposed", data=3),
)


def generator_of(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(7000 + case.data)


def support_of(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randperm(case.N * case.K, generator=generator)[: case.S].sort().values.to(case.index).to(DEVICE)


def _matrix(case: Case, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows of different size and a mean, so that a forgotten or shifted row stands out."""
    gain = 1 + torch.arange(rows)[:, None] % 5
    plain = ((torch.randn(rows, columns, generator=generator) + 0.25) * gain).to(case.dtype).to(DEVICE)
    if case.layout == "transposed":
        return plain.T.contiguous().T
    if case.layout == "wide":
        return torch.cat((plain, plain), 1)[:, :columns]
    if case.layout == "spaced":
        return plain.repeat_interleave(2, 1)[:, ::2]
    return plain


def dvalues_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = generator_of(case)
    indices = support_of(case, generator)
    return _matrix(case, case.M, case.N, generator), _matrix(case, case.M, case.K, generator), indices


def check_dvalues(case: Case) -> None:
    dy, x, indices = dvalues_inputs(case)
    exact = definition.sparse_delta_dvalues(dy.double(), x.double(), indices, torch.float64)
    composed = definition.sparse_delta_dvalues(dy, x, indices, case.out)
    actual = ops.sparse_delta_dvalues(dy, x, indices, case.out)
    assert actual.dtype == case.out
    if case.S >= FEWEST_FOR_BUDGET:
        assert_within_budget(f"dvalues {case}", actual, composed, exact)
        return
    # Of few sums the torch-composed error is what luck made it: each against the a-priori bound of a float32 sum instead.
    terms = definition.sparse_delta_dvalues(dy.double().abs(), x.double().abs(), indices, torch.float64)
    bound = terms * (case.M + 2) * 2.0**-24 + exact.abs() * torch.finfo(case.out).eps / 2 * 1.001 + 2.0**-25
    over = ((actual.double() - exact).abs() > bound).sum().item()
    assert over == 0, f"dvalues {case}: {over} of {case.S} sums are over the bound of a float32 sum"


def tiles_of(indices: Tensor, k: int, block_n: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    tile = indices.long() // k // block_n * -(-k // block_k) + indices.long() % k // block_k
    found, counts = tile.unique(return_counts=True)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    return tile.sort(stable=True).indices.to(torch.int32), found.to(torch.int32), starts


def check_tiled(case: Case, block: int = 16) -> None:
    dy, x, indices = dvalues_inputs(case)
    exact = definition.sparse_delta_dvalues(dy.double(), x.double(), indices, torch.float64)
    composed = definition.sparse_delta_dvalues(dy, x, indices, case.out)
    tiles = tiles_of(indices, case.K, block, block)
    actual = ops.sparse_delta_dvalues_tiled(dy, x, indices, *tiles, block, block, case.out)
    assert_within_budget(f"tiled {case}", actual, composed, exact)


def weight_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, indices, values and base; sums that lie on, below and above the middle of neighbouring 16-bit numbers among them."""
    generator = generator_of(case)
    indices = support_of(case, generator)
    weight = torch.randn(case.N, case.K, generator=generator).to(case.dtype).to(DEVICE)
    values = (torch.randn(case.S, generator=generator) * 0.1).to(DEVICE)
    base = weight.reshape(-1)[indices.long()].clone()
    halves = torch.tensor([2.0**-9, 3 * 2.0**-9, 2.0**-12, 3 * 2.0**-12, 0.0, 2.0**-30], device=DEVICE)
    count = min(case.S, halves.numel())
    values[:count] = halves[:count]
    weight.view(-1)[indices[:count].long()] = 1.0
    base[:count] = 1.0
    return weight, indices, values, base


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: {actual.dtype} {actual.shape}"
    wrong = (actual != expected).sum().item()
    assert wrong == 0, f"{name}: {wrong} of {expected.numel()} differ from the definition's"


def check_patch(case: Case) -> None:
    weight, indices, values, _ = weight_inputs(case)
    kept = weight.clone()
    expected = definition.sparse_delta_patch(weight, indices, values)
    assert_equal(f"patch {case}", ops.sparse_delta_patch(weight, indices, values), expected)
    assert_equal(f"patch leaves its weight {case}", weight, kept)


def check_patch_(case: Case) -> None:
    weight, indices, values, _ = weight_inputs(case)
    expected = definition.sparse_delta_patch(weight, indices, values)
    ops.sparse_delta_patch_(weight, indices, values)
    assert_equal(f"patch_ {case}", weight, expected)


def check_write(case: Case) -> None:
    weight, indices, values, base = weight_inputs(case)
    for given in (values, None):
        target = weight.clone().fill_(3.0)
        expected = definition.sparse_delta_write(target, indices, base, given)
        ops.sparse_delta_write_(target, indices, base, given)
        assert_equal(f"write {case}", target, expected)


def adamw_inputs(data: int, seeded: bool, weights: bool = True) -> list[Any]:
    """Layers of each dtype, of sizes on both sides of a vector, one without a weight; ages alike and different, one at its end."""
    generator = torch.Generator().manual_seed(data)
    rows = []
    for number, (count, dtype, index, age_dtype) in enumerate(
        (
            (200, BF16, torch.int32, torch.int16),
            (37, F32, torch.int64, torch.int32),
            (5, None, torch.int32, torch.int16),
            (64, F16, torch.int32, torch.int16),
            (1037, BF16, torch.int32, torch.int16),
        )
    ):
        age = torch.randint(0, 60, (count,), generator=generator)
        if number % 2:
            age.fill_(7)
        age[0] = torch.iinfo(age_dtype).max
        row = [torch.randn(count, generator=generator) * 0.01, *(torch.randn(count, generator=generator) for _ in "gm")]
        row += [torch.rand(count, generator=generator), age.to(age_dtype)]
        if dtype is None or not weights:
            row += [torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0)]
        else:
            weight = torch.randn(45, 67, generator=generator).to(dtype)
            indices = torch.randperm(45 * 67, generator=generator)[:count].sort().values
            row += [weight, indices.to(index), weight.view(-1)[indices].clone()]
        rows.append([tensor.to(DEVICE) for tensor in row])
    hyper = definition.adam_hyper(1e-2, 0.9, 0.99, 1e-8, 0.1).to(DEVICE)
    corrections = definition.adam_corrections(0.9, 0.99, 50).to(DEVICE)
    seed = torch.tensor([0x5EED << 33 | data], device=DEVICE) if seeded else None
    lists = [list(column) for column in zip(*rows, strict=True)]
    return [*lists, hyper, corrections, seed, [3, 1, 4, 1, 2**32 - 1]]


WRITTEN = {0: "values", 2: "exp_avg", 3: "exp_avg_sq", 4: "age", 5: "weights"}


def check_adamw(data: int, seeded: bool) -> None:
    actual, expected = adamw_inputs(data, seeded), adamw_inputs(data, seeded)
    ops.sparse_adamw_(*actual)
    ops._reference_adamw(*expected)
    for column, name in WRITTEN.items():
        for layer, (one, other) in enumerate(zip(actual[column], expected[column], strict=True)):
            assert_equal(f"adamw {name} of layer {layer}", one, other)


def random_cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    sizes = (1, 2, 3, 7, 8, 16, 31, 33, 64, 67, 97)
    cases = []
    for index in range(count):
        n, k = draw.choice(sizes), draw.choice(sizes)
        cases.append(
            Case(
                M=draw.choice((0, 1, 2, 31, 32, 33, 64, 65, 257, 600)),
                N=n,
                K=k,
                S=draw.randint(1, min(n * k, 400)),
                dtype=draw.choice((F32, BF16, F16)),
                out=draw.choice((F32, F32, BF16, F16)),
                index=draw.choice((torch.int32, torch.int64)),
                layout=draw.choice(("plain", "plain", "transposed", "wide", "spaced")),
                data=index,
            )
        )
    return cases


CHECKS = {
    "sparse_delta_dvalues": check_dvalues,
    "sparse_delta_patch": check_patch,
    "sparse_delta_patch_": check_patch_,
    "sparse_delta_write_": check_write,
}


def without_rows(case: Case) -> Case:
    return dataclasses.replace(case, M=0)
