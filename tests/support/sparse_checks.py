"""Each sparse-delta operator against its definition, as functions of a case: what the tests run and what the mutants must fail."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfast.functional import SparsePattern, nf4_quantize
from peftfast.ops import sparse_adamw as adamw_ops
from peftfast.ops import sparse_delta as ops
from peftfast.ops import sparse_dequantize as dequantize_ops
from peftfast.reference import nf4 as nf4_definition
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


def check_blocks(case: Case, side: int = 16) -> None:
    """Some blocks of a weight of whole ones, their entries laid out as a pattern has them, behind a gap."""
    generator = generator_of(case)
    n, k = -(-case.N // side) * side, -(-case.K // side) * side
    dy, x = _matrix(case, case.M, n, generator), _matrix(case, case.M, k, generator)
    every = n // side * (k // side)
    parts = torch.randperm(every, generator=generator)[: max(1, every // 2)].sort().values
    pattern = SparsePattern.from_blocks(parts, side, (n, k)).to(DEVICE)
    table, count = pattern.blocks(False).clone(), pattern.count + 5
    table[:, 2] += 5
    exact, composed = (
        torch.cat((torch.zeros(5, device=DEVICE), dense.reshape(-1)[pattern.indices.long()].to(dense.dtype)))
        for dense in (dy.double().T @ x.double(), (dy.float().T @ x.float()).to(case.out))
    )
    actual = ops.sparse_delta_blocks(dy, x, table, side, count, case.out)
    assert actual.dtype == case.out and (actual[:5] == 0).all()
    assert_within_budget(f"blocks of {side} {case}", actual, composed.to(case.out), exact)


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


def dequantize_inputs(case: Case, nested: bool, run: int = 128) -> tuple[Any, ...]:
    generator = generator_of(case)
    pattern = SparsePattern(support_of(case, generator), torch.Size((case.N, case.K)))
    weight = nf4_quantize(torch.randn(case.N, case.K, generator=generator), double_quant=nested).to(DEVICE)
    values = torch.randn(case.S, generator=generator).to(DEVICE)
    return (*weight.storage(), pattern.indices, values, pattern.runs(run), run, case.dtype)


def check_dequantize(case: Case) -> None:
    for nested in (False, True):
        given = dequantize_inputs(case, nested)
        packed, absmax, code, block_size, shape, *nesting, indices, values, _, _, dtype = given
        dense = nf4_definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), dtype, *nesting)
        expected = definition.sparse_delta_patch(dense, indices, values)
        assert_equal(f"dequantize {case}", dequantize_ops.sparse_delta_dequantize(*given), expected)


def product_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, indices and values."""
    generator = generator_of(case)
    indices = support_of(case, generator)
    x = _matrix(case, case.M, case.K, generator)
    values = torch.randn(case.S, generator=generator).to(DEVICE)
    return torch.randn(case.M, case.N, generator=generator).to(DEVICE), x, indices, values


def check_product(case: Case) -> None:
    """Each entry within the a-priori bound of a float32 sum of its terms: an entry has few of them, so that the error of torch's
    own is what luck made it."""
    _check_product(case, *product_inputs(case))


def check_narrow_product(case: Case) -> None:
    """The same with y in x's dtype: rounded once more."""
    y, *rest = product_inputs(case)
    _check_product(case, y.to(case.dtype), *rest)


def _check_product(case: Case, y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> None:
    exact = definition.sparse_delta_product(y.double(), x.double(), indices, values.double())
    terms = definition.sparse_delta_product(y.double().abs(), x.double().abs(), indices, values.double().abs())
    composed = definition.sparse_delta_product(y, x, indices, values)
    assert composed.dtype == y.dtype
    ops.sparse_delta_product_(y, x, indices, values)
    longest = (indices.long() // case.K).bincount().max().item() if case.S else 0
    rounding = 0.0 if y.dtype == F32 else torch.finfo(y.dtype).eps / 2 * 1.001
    over = ((y.double() - exact).abs() > terms * (longest + 2) * 2.0**-24 + exact.abs() * rounding).sum().item()
    assert over == 0, f"product {case}: {over} of {y.numel()} sums are over the bound of a float32 sum"
    if y.numel() >= FEWEST_FOR_BUDGET:
        assert_within_budget(f"product {case}", y, composed, exact)


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
WRITTEN8 = {**WRITTEN, 8: "exp_avg_max", 9: "exp_avg_sq_max"}


def _assert_written(name: str, actual: list[Any], expected: list[Any], columns: dict[int, str]) -> None:
    for column, what in columns.items():
        for layer, (one, other) in enumerate(zip(actual[column], expected[column], strict=True)):
            assert_equal(f"{name} {what} of layer {layer}", one, other)


def check_adamw(data: int, seeded: bool) -> None:
    actual, expected = adamw_inputs(data, seeded), adamw_inputs(data, seeded)
    adamw_ops.sparse_adamw_(*actual)
    adamw_ops._reference_adamw(*expected)
    _assert_written("adamw", actual, expected, WRITTEN)


def check_adamw_outside(small: bool) -> None:
    """Indices in front of the weight, behind it and far from it, as they may come to stand in a tensor that was checked: nothing is
    written there, and all else is what it was to be."""
    inputs, step = (adamw8_inputs, adamw_ops.sparse_adamw8_) if small else (adamw_inputs, adamw_ops.sparse_adamw_)
    actual, expected = inputs(3, True), inputs(3, True)
    (adamw_ops._reference_adamw8 if small else adamw_ops._reference_adamw)(*expected)
    wholes = []
    for layer, (weight, indices) in enumerate(zip(actual[5], actual[6], strict=True)):
        if not weight.numel():
            continue
        far = torch.iinfo(indices.dtype)
        places = indices[[0, 1, 2, -1]].long()
        expected[5][layer].view(-1)[places] = weight.view(-1)[places]
        indices[[0, 1, 2, -1]] = torch.tensor(
            [-1, far.min, far.max, weight.numel()], device=DEVICE, dtype=indices.dtype
        )
        whole = torch.full((weight.numel() + 128,), 3.0, device=DEVICE).to(weight.dtype)
        whole[64:-64] = weight.view(-1)
        actual[5][layer] = whole[64:-64].view(weight.shape)
        wholes.append(whole)
    step(*actual)
    _assert_written("adamw outside", actual, expected, WRITTEN8 if small else WRITTEN)
    assert len(wholes) == 4 and all((whole[:64] == 3).all() and (whole[-64:] == 3).all() for whole in wholes)


def adamw8_inputs(data: int, seeded: bool) -> list[Any]:
    """The same layers, their states in 8 bits; a block of zeros among them, gradients over many octaves, and of some none at all."""
    *lists, hyper, corrections, seed, ids = adamw_inputs(data, seeded)
    generator = torch.Generator().manual_seed(900 + data)
    for grad in lists[1]:
        octaves = torch.randint(-26, 1, (grad.numel(),), generator=generator).float()
        grad.mul_(torch.exp2(octaves).to(DEVICE))
        grad[torch.rand(grad.numel(), generator=generator).to(DEVICE) < 0.1] = 0.0
    codes, maxima = definition.state_codes().to(DEVICE), []
    for column, code in zip((2, 3), codes, strict=True):
        states = [state.clone() for state in lists[column]]
        states[-1][256:512] = 0.0
        lists[1][-1][256:300] = 0.0
        compressed = [definition.compress_states(state, code) for state in states]
        lists[column] = [one for one, _ in compressed]
        maxima.append([largest for _, largest in compressed])
    return [*lists, *maxima, codes, hyper, corrections, seed, ids]


def check_adamw8(data: int, seeded: bool) -> None:
    actual, expected = adamw8_inputs(data, seeded), adamw8_inputs(data, seeded)
    for _ in range(2):
        adamw_ops.sparse_adamw8_(*actual)
        adamw_ops._reference_adamw8(*expected)
    _assert_written("adamw8", actual, expected, WRITTEN8)


def check_state_bytes() -> None:
    """Every byte, every middle between two and its neighbours, both signs: a step keeps of a gradient what the definition keeps.
    With both betas 0 the states are g and g², in blocks that each hold their maximum, 1."""
    codes = definition.state_codes()
    middles = ((codes[:, 1:] + codes[:, :-1]) / 2).abs().reshape(-1)
    telling = torch.cat((codes.abs().reshape(-1), middles))
    telling = telling[telling <= 1]
    steps = torch.arange(-2, 3)[:, None]
    near = (telling.view(torch.int32)[None] + steps).clamp(min=0).view(torch.float32).reshape(-1)
    near = torch.cat((near, near.sqrt(), torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-22, 2.0**-126])))
    near = torch.cat((near, -near)).clamp(-1, 1)
    near = torch.nn.functional.pad(near, (0, -near.numel() % 255)).reshape(-1, 255)
    grads = torch.nn.functional.pad(near, (1, 0), value=1.0).reshape(-1)
    count, blocks = grads.numel(), grads.numel() // 256

    def inputs() -> list[Any]:
        small = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        lists = [torch.zeros(count, device=DEVICE), grads.to(DEVICE), *small]
        lists += [torch.zeros(count, dtype=torch.int16, device=DEVICE), torch.empty(0, device=DEVICE)]
        lists += [torch.empty(0, dtype=torch.int32, device=DEVICE), torch.empty(0, device=DEVICE)]
        lists += [torch.zeros(blocks, device=DEVICE) for _ in range(2)]
        hyper = definition.adam_hyper(1.0, 0.0, 0.0, 1e-8, 0.0).to(DEVICE)
        return [*([one] for one in lists), codes.to(DEVICE), hyper, torch.ones(2, 4, device=DEVICE), None, [0]]

    actual, expected = inputs(), inputs()
    adamw_ops.sparse_adamw8_(*actual)
    adamw_ops._reference_adamw8(*expected)
    _assert_written("state bytes", actual, expected, WRITTEN8)
    assert len(actual[2][0].unique()) == 255 and len(actual[3][0].unique()) >= 250


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
    "sparse_delta_blocks": check_blocks,
    "sparse_delta_dequantize": check_dequantize,
    "sparse_delta_patch": check_patch,
    "sparse_delta_patch_": check_patch_,
    "sparse_delta_product_": check_product,
    "sparse_delta_product_ narrow": check_narrow_product,
    "sparse_delta_write_": check_write,
}


def without_rows(case: Case) -> Case:
    return dataclasses.replace(case, M=0)
