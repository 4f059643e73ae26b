"""One small awkward call of every operator, what the definition gives for it, and how far an implementation may be from that.

``doctor`` imports this once torch is known to work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import Implementation
from ..reference import gated_activation, lora, nf4, philox, sparse_delta, zeroth_order

# Awkward on purpose: no side is a multiple of 8 or of a block, and 131 * 127 elements in blocks of 64 are an odd count in
# 260 blocks, the last one short, so that double quantisation has a second group of maxima.
M, N, K, R = 5, 43, 67, 3
NF4_SHAPE = (131, 127)
NF4_BLOCK_SIZE = 64
DROPOUT_P = 0.3
SCALING = 0.5


@dataclass(frozen=True)
class Case:
    """A call of an operator: its arguments on the CPU, what the definition gives, and the budget.

    ``expected``, ``dtypes`` and ``allowed`` have one entry for each result; allowed 0 means equal, bit for bit. An operator that
    writes has its result in argument number ``written``, a tensor or a list of them.
    """

    name: str
    arguments: tuple[Any, ...]
    expected: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...]
    allowed: tuple[float, ...]
    written: int | None = None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Fresh arguments on the device: an operator that writes must not write into the case."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    return tuple(map(move, arguments))


def _exact(name: str, arguments: tuple[Any, ...], expected: Any, written: int | None = None) -> Case:
    results = _as_tuple(expected)
    return Case(name, arguments, results, tuple(r.dtype for r in results), (0.0,) * len(results), written)


def _philox_cases() -> dict[str, list[Case]]:
    seed = torch.tensor([-(2**61) + 12345], dtype=torch.int64)
    words = (seed, 2**32 - 3, 9, 5, philox.STREAM_DROPOUT)  # counters that carry into the high word
    return {
        "dropout_mask": [_exact("mask", (seed, M, K, DROPOUT_P), philox.dropout_mask(seed, M, K, DROPOUT_P))],
        "philox_words": [_exact("words", words, philox.philox_words(*words))],
    }


def _zeroth_order_cases(random: torch.Generator) -> dict[str, list[Case]]:
    seeds, coefficients = torch.tensor([2**61 - 7, -5]), torch.tensor([1e-3, -2e-4])
    decay, thresholds, rounding_seed = torch.tensor([0.99]), torch.tensor([0.03, 0.01]), torch.tensor([77])
    ids, offsets = [3, 2**32 - 1], [0, 2**33 + 5]  # a shard that begins inside a counter
    cases: dict[str, list[Case]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = [(torch.randn(shape, generator=random) * 0.02).to(dtype) for shape in ((N, K), (R, 7))]
        for rademacher in (False, True):
            name = f"{'rademacher' if rademacher else 'gaussian'}, {_short(dtype)}"
            terms = (seeds, coefficients, decay, thresholds, rounding_seed)
            expected = tuple(
                zeroth_order.perturbed(
                    weight, seeds, coefficients, decay, thresholds[i], rounding_seed, ids[i], offsets[i], rademacher
                )
                for i, weight in enumerate(weights)
            )
            arguments: tuple[Any, ...] = (list(weights), [], *terms, ids, offsets, rademacher)
            cases.setdefault("perturb_", []).append(_exact(name, arguments, expected, written=0))
            place = (seeds[:1], (R, K), ids[1], offsets[1], rademacher, dtype)
            cases.setdefault("perturbation", []).append(_exact(name, place, zeroth_order.perturbation(*place)))
            pair = (weights[0], seeds[:1], coefficients[:1], thresholds[:1], ids[0], 0, rademacher)
            both = tuple(
                zeroth_order.perturbed(weights[0], seeds[:1], eps, None, thresholds[0], None, ids[0], 0, rademacher)
                for eps in (coefficients[:1], -coefficients[:1])
            )
            cases.setdefault("perturbed_pair", []).append(_exact(name, pair, both))
    return cases


def _nf4_cases(random: torch.Generator) -> dict[str, list[Case]]:
    cpu = torch.device("cpu")
    code = nf4.code_table("nf4", cpu)
    quantise = (torch.randn(NF4_SHAPE, generator=random), NF4_BLOCK_SIZE, code)
    packed, absmax = nf4.nf4_quantize(*quantise)
    nested_absmax_codes, nested_absmax, offset = nf4.nest_absmax(absmax)
    levels: tuple[tuple[str, Tensor, tuple[Tensor | None, ...]], ...] = (
        ("one level", absmax, (None, None, None)),
        ("double", nested_absmax_codes, (nested_absmax, nf4.nested_code_table(cpu), offset)),
    )
    cases = []
    for level, maxima, nested in levels:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            storage = (packed, maxima, code, NF4_BLOCK_SIZE, NF4_SHAPE)
            arguments = (*storage, *nested, torch.full(NF4_SHAPE, math.nan, dtype=dtype))
            expected = nf4.nf4_dequantize(*storage, dtype, *nested)
            cases.append(_exact(f"{level}, {_short(dtype)}", arguments, expected, written=len(arguments) - 1))
    slab = (packed, absmax, code, NF4_BLOCK_SIZE, NF4_SHAPE, None, None, None)
    rows = nf4.nf4_dequantize(*slab[:5], torch.bfloat16)[7:29]
    wider = torch.full((22, NF4_SHAPE[1] + 9), math.nan, dtype=torch.bfloat16)[:, : NF4_SHAPE[1]]
    cases.append(_exact("rows apart", (*slab, wider, 7), rows, written=8))
    centred, table = absmax - absmax.mean(), nf4.nested_code_table(cpu)
    nests = [
        _exact(name, (centred, table, snapped), nf4.quantize_nested(centred, table, snapped))
        for name, snapped in (("as on a GPU", False), ("as on a CPU", True))
    ]
    return {
        "nf4_quantize": [_exact("float32", quantise, (packed, absmax))],
        "nf4_nest": nests,
        "nf4_dequantize_out": cases,
    }


def _few_rows(*given: Any) -> tuple[Tensor, Tensor]:
    """The definition of nf4_linear; the weight in float64 is the float32 product unrounded."""
    x, packed, absmax, code, block_size, shape, *nested, bias, lora_a, lora_b, lora_bias, scaling, compute, dtype = (
        given
    )
    if compute == torch.float64:
        absmax = absmax if nested[0] is None else nf4.unnest_absmax(absmax, *(t.float() for t in nested))
        dense = nf4.nf4_dequantize(packed, absmax.float(), code.float(), block_size, shape, torch.float32)
    else:
        dense = nf4.nf4_dequantize(packed, absmax, code, block_size, shape, compute, *nested)
    y, s = nf4.nf4_linear(x.to(compute), dense.to(compute), bias, lora_a, lora_b, lora_bias, scaling)
    return y.to(dtype), x.new_empty((x.shape[0], 0), dtype=compute) if s is None else s


def _few_rows_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    k = 256  # which the GPU's kernel takes; the awkward widths are in the suite

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    packed, absmax = nf4.nf4_quantize(normal(N, k) / k**0.5, NF4_BLOCK_SIZE, nf4.code_table("nf4", torch.device("cpu")))
    index, nested_absmax, offset = nf4.nest_absmax(absmax)
    storage = (packed, index, nf4.code_table("nf4", torch.device("cpu")), NF4_BLOCK_SIZE, (N, k))
    nested = (nested_absmax, nf4.nested_code_table(torch.device("cpu")), offset)
    adapter = (normal(N), normal(R, k) / k**0.5, normal(N, R) / R**0.5, normal(N), SCALING)
    arguments = (normal(M, k), *storage, *nested, *adapter)
    cases = [
        _budgeted(name, _few_rows, (*arguments, compute, dtype), device)
        for name, compute, dtype in (
            ("qlora", torch.bfloat16, torch.float32),
            ("float16", torch.float16, torch.float16),
        )
    ]
    return {"nf4_linear": cases}


def _many_rows_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    """Blocks that straddle rows; a step's last columns missing; both directions, the second under a mask."""
    rows, n, k = 19, N, 3 * NF4_BLOCK_SIZE // 2
    cpu, seed = torch.device("cpu"), torch.tensor([987654321], dtype=torch.int64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    packed, absmax = nf4.nf4_quantize(normal(n, k) / k**0.5, NF4_BLOCK_SIZE, nf4.code_table("nf4", cpu))
    index, nested_absmax, offset = nf4.nest_absmax(absmax)
    weight = (
        packed,
        index,
        nf4.code_table("nf4", cpu),
        NF4_BLOCK_SIZE,
        (n, k),
        nested_absmax,
        nf4.nested_code_table(cpu),
        offset,
    )
    cases = []
    for name, transposed, compute in (("forward", False, torch.bfloat16), ("dx", True, torch.float16)):
        columns, depth = (k, n) if transposed else (n, k)
        adapter = (normal(columns), normal(rows, R).to(compute), normal(columns, R), normal(columns))
        mask = (seed, DROPOUT_P) if transposed else (None, 0.0)
        arguments = (normal(rows, depth).to(compute), *weight, transposed, *adapter, *mask, SCALING, torch.float32)
        cases.append(_budgeted(f"{name}, {_short(compute)}", _many_rows, arguments, device))
    dense = nf4.nf4_dequantize(*weight[:5], torch.bfloat16, *weight[5:])
    apart = torch.full((n, 31), math.nan, dtype=torch.bfloat16)[:, :26]
    alone = _exact("columns apart", (*weight, apart, 38), dense[:, 38:64], written=8)
    return {"nf4_product": cases, "nf4_dequantize_columns_out": [alone]}


def _many_rows(*given: Any) -> Tensor:
    """The definition of nf4_product; in float64 with the weight of the 16-bit dtype, whose rounding is the operator's."""
    x, packed, absmax, code, block_size, shape, *nested, transposed, bias, s, b, lora_bias, seed, p, scaling, dtype = (
        given
    )
    if x.dtype != torch.float64:
        return nf4.nf4_product(*given)
    absmax = nf4.unnest_absmax(absmax, *(t.float() for t in nested))
    compute = torch.float16 if transposed else torch.bfloat16  # as the cases above have it
    dense = nf4.nf4_dequantize(packed, absmax, code.float(), block_size, shape, compute).double()
    return lora.lora_product(x, dense.T if transposed else dense, bias, s, b, lora_bias, seed, p, scaling, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(one) for one in value]
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) else value


def _budgeted(
    name: str, definition: Callable[..., Any], arguments: tuple[Any, ...], device: str, written: int | None = None
) -> Case:
    """The numerics contract: twice (the error of the same formula composed of torch ops in that dtype on that device + one
    rounding of the largest value), against float64."""
    asked = arguments if written is None else (*arguments, arguments[written].dtype)
    composed = [r.cpu() for r in _as_tuple(definition(*_moved(asked, device)))]
    exact = _as_tuple(definition(*map(_widened, asked)))
    allowed = tuple(
        2 * (float((c.double() - e).abs().max()) + torch.finfo(c.dtype).eps / 2 * float(e.abs().max()))
        for c, e in zip(composed, exact, strict=True)
    )
    return Case(name, arguments, exact, tuple(c.dtype for c in composed), allowed, written)


def _lora_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    seed = torch.tensor([987654321], dtype=torch.int64)
    cases: dict[str, list[Case]] = {}
    # The second is QLoRA after prepare_model_for_kbit_training: float32 x and adapters, products in bfloat16.
    for outer, compute in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        name = _short(compute) if outer == compute else f"{_short(outer)} in {_short(compute)}"
        x, a, b, bias = normal(outer, M, K), normal(outer, R, K), normal(outer, N, R), normal(outer, N)
        s, ds, dy, base = (normal(compute, M, columns) for columns in (R, R, N, N))
        expand = (base, s, b, bias, seed, DROPOUT_P, SCALING)
        rows: tuple[tuple[str, Callable[..., Any], tuple[Any, ...], int | None], ...] = (
            ("lora_shrink", lora.lora_shrink, (x, a, seed, DROPOUT_P, SCALING, compute), None),
            ("lora_expand", lora.lora_expand, (*expand, outer), None),
            ("lora_expand_", lora.lora_expand, expand, 0),
            ("lora_weight_grad", lora.lora_weight_grad, (ds, x, seed, DROPOUT_P, SCALING, outer), None),
            ("lora_dy_grads", lora.lora_dy_grads, (dy, s, b, SCALING, outer), None),
        )
        for operator, definition, arguments, written in rows:
            case = _budgeted(name, definition, arguments, device, written)
            cases.setdefault(operator, []).append(case)
        # By pointers and, at widths of whole 16 bytes, by the copy engine.
        for at, n, k in (("", N, K), (", aligned", N + 5, K + 5)):
            product = (normal(compute, M, k), normal(compute, k, n).T, normal(outer, n), s, normal(outer, n, R))
            arguments = (*product, normal(outer, n), seed, DROPOUT_P, SCALING, outer)
            cases.setdefault("lora_product", []).append(_budgeted(f"{name}{at}", lora.lora_product, arguments, device))
    return cases


def _again(dh: Tensor, gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    return gated_activation.gated_activation(gate, up, activation)


def _gated_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {}
    for activation, dtype in zip(gated_activation.ACTIVATIONS, (torch.float32, torch.bfloat16) * 2, strict=True):
        dh, gate, up = ((torch.randn(M, N, generator=random) * 2).to(dtype) for _ in range(3))
        name = f"{activation}, {_short(dtype)}"
        rows: tuple[tuple[str, Callable[..., Any], tuple[Any, ...], int | None], ...] = (
            ("gated_activation", gated_activation.gated_activation, (gate, up, activation), None),
            ("gated_activation_backward", gated_activation.gated_activation_backward, (dh, gate, up, activation), None),
            ("gated_activation_recompute_", _again, (dh, gate, up, activation), 0),
        )
        for operator, definition, arguments, written in rows:
            case = _budgeted(name, definition, arguments, device, written)
            cases.setdefault(operator, []).append(case)
    return cases


def _sparse_delta_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    indices = torch.arange(1, N * K, 29, dtype=torch.int32)
    count = indices.numel()
    side = 16
    tile = indices // K // side * -(-K // side) + indices % K // side
    tiles, sizes = tile.unique(return_counts=True)
    starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).int()
    order = tile.sort(stable=True).indices.int()
    values = torch.randn(count, generator=random)
    code = nf4.code_table("nf4", torch.device("cpu"))
    cases: dict[str, list[Case]] = {}

    def add(operator: str, case: Case) -> None:
        cases.setdefault(operator, []).append(case)

    def tiled(dy: Tensor, x: Tensor, at: Tensor, *rest: Any) -> Tensor:
        return sparse_delta.sparse_delta_dvalues(dy, x, at, rest[-1])

    def apart(*given: Any) -> Tensor:
        return sparse_delta.sparse_delta_product(*given[:4])

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = _short(dtype)
        # Rows of three slabs of the CPU kernels.
        dy, x = (torch.randn(600, columns, generator=random).to(dtype) for columns in (N, K))
        weight, base = torch.randn(N, K, generator=random).to(dtype), torch.randn(count, generator=random).to(dtype)
        gradient = (dy, x, indices, torch.float32)
        by_tiles = (dy, x, indices, order, tiles.int(), starts, side, side, torch.float32)
        add("sparse_delta_dvalues", _budgeted(name, sparse_delta.sparse_delta_dvalues, gradient, device))
        add("sparse_delta_dvalues_tiled", _budgeted(name, tiled, by_tiles, device))
        blocks = torch.tensor([[0, 16, 0, 32], [16, 0, 16, 32]])
        squares = (*(torch.randn(600, 32, generator=random).to(dtype) for _ in "yx"), blocks, 16, 512, torch.float32)
        add("sparse_delta_blocks", _budgeted(name, sparse_delta.sparse_delta_blocks, squares, device))
        patched = sparse_delta.sparse_delta_patch(weight, indices, values)
        add("sparse_delta_patch", _exact(name, (weight, indices, values), patched))
        add("sparse_delta_patch_", _exact(name, (weight, indices, values), patched, written=0))
        few = (torch.randn(5, N, generator=random), x[:5].contiguous(), indices, values)
        add("sparse_delta_product_", _budgeted(name, apart, few, device, 0))
        few_indices, few_values = (
            indices[indices < N * K // 2].contiguous(),
            values[: int((indices < N * K // 2).sum())],
        )
        packed, absmax = nf4.nf4_quantize(weight.float(), NF4_BLOCK_SIZE, code)
        run = 4 * NF4_BLOCK_SIZE
        begins = torch.arange(0, N * K + run, run).clamp(max=N * K)
        run_starts = torch.searchsorted(few_indices, begins.int(), out_int32=True)
        stored = (packed, absmax, code, NF4_BLOCK_SIZE, (N, K))
        decoded = sparse_delta.sparse_delta_patch(nf4.nf4_dequantize(*stored, dtype), few_indices, few_values)
        delta = (few_indices, few_values.contiguous(), run_starts, run, dtype)
        add("sparse_delta_dequantize", _exact(name, (*stored, None, None, None, *delta), decoded))
        written = sparse_delta.sparse_delta_write(weight, indices, base, values)
        add("sparse_delta_write_", _exact(name, (weight, indices, base, values), written, written=0))
        add("sparse_adamw_", _adamw_case(name, random, indices, weight, base))
        add("sparse_adamw8_", _adamw8_case(name, random, indices, weight, base))
    return cases


def _adamw_case(name: str, random: torch.Generator, indices: Tensor, weight: Tensor, base: Tensor) -> Case:
    """One layer, rounded stochastically where it is in bfloat16; the written weight is what is compared."""
    count = indices.numel()
    value, grad, first = (torch.randn(count, generator=random) for _ in range(3))
    second, age = torch.rand(count, generator=random), torch.arange(count, dtype=torch.int16)
    hyper, corrections = (
        sparse_delta.adam_hyper(1e-2, 0.9, 0.99, 1e-8, 0.1),
        sparse_delta.adam_corrections(0.9, 0.99, 40),
    )
    seed = torch.tensor([123456789])
    new = sparse_delta.sparse_adamw(value, grad, first, second, age, hyper, corrections)[0]
    expected = sparse_delta.sparse_adamw_write(new, base, indices, weight, seed, 3)
    lists = ([value], [grad], [first], [second], [age], [weight], [indices], [base])
    return _exact(name, (*lists, hyper, corrections, seed, [3]), expected, written=5)


def _adamw8_case(name: str, random: torch.Generator, indices: Tensor, weight: Tensor, base: Tensor) -> Case:
    """The same with states in 8 bits, of whole blocks and of a part of one; exp_avg's bytes are what is compared."""
    count = indices.numel()
    codes = sparse_delta.state_codes()
    value, grad, first = (torch.randn(count, generator=random) for _ in range(3))
    (first, first_max), (second, second_max) = (
        sparse_delta.compress_states(state, code) for state, code in zip((first, grad.abs()), codes, strict=True)
    )
    age = torch.arange(count, dtype=torch.int16)
    hyper = sparse_delta.adam_hyper(1e-2, 0.9, 0.99, 1e-8, 0.1)
    corrections = sparse_delta.adam_corrections(0.9, 0.99, 40)
    expected = sparse_delta.sparse_adamw8(value, grad, first, second, first_max, second_max, age, hyper, corrections)[1]
    lists = ([value], [grad], [first], [second], [age], [weight], [indices], [base], [first_max], [second_max])
    return _exact(name, (*lists, codes, hyper, corrections, None, [3]), expected, written=2)


def _zo_linear_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    """K that the fused kernels take. Against float64 the weights are those that the dtype holds: their rounding belongs to the
    operator."""
    move: tuple[Any, ...] = (torch.tensor([2**61 - 7]), torch.tensor([0.02]), None, 3, False)
    k, sides = 128, (move[1], -move[1])
    code = nf4.code_table("nf4", torch.device("cpu"))
    packed, absmax = nf4.nf4_quantize(torch.randn(N, k, generator=random) * 0.1, NF4_BLOCK_SIZE, code)
    storage = (packed, absmax, code, NF4_BLOCK_SIZE, (N, k), None, None, None)
    cases: dict[str, list[Case]] = {}

    def add(operator: str, name: str, run: Callable[..., Any], given: tuple[Any, ...], moved: list[Tensor]) -> None:
        dtype, bias = given[0].dtype, given[-1 - len(move)] if operator == "zo_linear" else given[-2 - len(move)]
        composed = [r.cpu() for r in run(*_moved(given, device))]
        exact = tuple(
            torch.nn.functional.linear(x.double(), w.double(), bias.double())
            for x, w in zip(given[:2], moved, strict=True)
        )
        allowed = tuple(
            2 * (float((c.double() - e).abs().max()) + torch.finfo(dtype).eps / 2 * float(e.abs().max()))
            for c, e in zip(composed, exact, strict=True)
        )
        cases.setdefault(operator, []).append(Case(name, given, exact, (dtype, dtype), allowed))

    def along(weight: Tensor) -> list[Tensor]:
        return [zeroth_order.perturbed(weight, move[0], eps, None, None, None, 3, 0, False) for eps in sides]

    def decoded(maxima: Tensor, dtype: torch.dtype) -> Tensor:
        return nf4.nf4_dequantize(packed, maxima, code, NF4_BLOCK_SIZE, (N, k), dtype)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x_plus, x_minus, bias = (torch.randn(*shape, generator=random).to(dtype) for shape in ((M, k), (M, k), (N,)))
        weight = (torch.randn(N, k, generator=random) * 0.1).to(dtype)
        given = (x_plus, x_minus, weight, bias, bias, *move)
        add("zo_linear", _short(dtype), zeroth_order.zo_linear, given, along(weight))
        for of_scales, name in ((False, "the weight"), (True, "its scales")):
            moved = [decoded(one, dtype) for one in along(absmax)] if of_scales else along(decoded(absmax, dtype))
            given = (x_plus, x_minus, *storage, bias, bias, *move, of_scales)
            add("zo_nf4_linear", f"{_short(dtype)}, {name}", zeroth_order.zo_nf4_linear, given, moved)
    return cases


def _terms_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    """Three adapters, of which the rows of x name two and, with -1 and 3, none."""

    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    ranks, seeds = [R, 8, 1], torch.tensor([987654321, 5, -7], dtype=torch.int64)
    cases: dict[str, list[Case]] = {}
    for compute in (torch.float32, torch.bfloat16):
        for rows in (None, torch.tensor([2, -1, 0, 3, 0], dtype=torch.int32)):
            name = f"{_short(compute)}, {'summed' if rows is None else 'by rows'}"
            terms = (rows, seeds, [DROPOUT_P, 0.0, 0.5], [SCALING, 1.0, 2.0])
            x, s, dy, base = (normal(compute, M, columns) for columns in (K, sum(ranks), N, N))
            a, b = [normal(torch.float32, r, K) for r in ranks], [normal(torch.float32, N, r) for r in ranks]
            biases = [normal(torch.float32, N) for _ in ranks]
            expand = (base, s, b, biases, *terms)
            calls: tuple[tuple[str, Callable[..., Any], tuple[Any, ...], int | None], ...] = (
                ("lora_terms_shrink", lora.lora_terms_shrink, (x, a, *terms, compute), None),
                ("lora_terms_expand", lora.lora_terms_expand, (*expand, torch.float32), None),
                ("lora_terms_expand_", lora.lora_terms_expand, expand, 0),
                ("lora_terms_weight_grad", lora.lora_terms_weight_grad, (s, x, ranks, *terms, torch.float32), None),
                ("lora_terms_dy_grads", lora.lora_terms_dy_grads, (dy, s, b, rows, terms[3], torch.float32), None),
            )
            for operator, definition, arguments, written in calls:
                case = _budgeted(name, definition, arguments, device, written)
                cases.setdefault(operator, []).append(case)
    return cases


def _dora_cases(random: torch.Generator, device: str) -> dict[str, list[Case]]:
    seed = torch.tensor([987654321], dtype=torch.int64)
    cases: dict[str, list[Case]] = {}
    for compute in (torch.float32, torch.bfloat16):
        base, plain, dy, z = (torch.randn((M, N), generator=random).to(compute) for _ in range(4))
        s, b = torch.randn((M, R), generator=random).to(compute), torch.randn((N, R), generator=random)
        gain, bias = torch.rand(N, generator=random) + 0.5, torch.randn(N, generator=random)
        calls: tuple[tuple[str, Callable[..., Any], tuple[Any, ...]], ...] = (
            ("lora_dora_expand", lora.lora_dora_expand, (base, None, s, b, bias, gain, bias, SCALING, compute)),
            ("lora_dora_expand", lora.lora_dora_expand, (base, plain, s, b, None, gain, None, SCALING, compute)),
            ("lora_gain_grads", lora.lora_gain_grads, (dy, z, gain)),
            ("lora_dropout_add", lora.lora_dropout_add, (base, dy, seed, DROPOUT_P, compute)),
            ("lora_dropout_add", lora.lora_dropout_add, (None, dy, seed, DROPOUT_P, torch.float32)),
        )
        for operator, definition, arguments in calls:
            cases.setdefault(operator, []).append(_budgeted(_short(compute), definition, arguments, device))
    return cases


def cases(device: str) -> dict[str, list[Case]]:
    """The calls of every operator, by its name, with the budgets of this device."""
    random = torch.Generator().manual_seed(0)
    return {
        **_philox_cases(),
        **_nf4_cases(random),
        **_few_rows_cases(random, device),
        **_many_rows_cases(random, device),
        **_lora_cases(random, device),
        **_terms_cases(random, device),
        **_dora_cases(random, device),
        **_gated_cases(random, device),
        **_sparse_delta_cases(random, device),
        **_zeroth_order_cases(random),
        **_zo_linear_cases(random, device),
    }


def arguments_on(case: Case, device: str) -> tuple[Any, ...]:
    """A fresh copy of the case's arguments on the device."""
    return _moved(case.arguments, device)


def _largest_error(result: Any, expected: Tensor, dtype: torch.dtype) -> float:
    """Infinite for another shape or dtype than the definition's, and where exactly one of the two is not finite."""
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != dtype:
        return math.inf
    wide, expected_wide = result.detach().cpu().double(), expected.double()
    if torch.equal(wide, expected_wide):
        return 0.0
    return float(torch.nan_to_num((wide - expected_wide).abs(), nan=math.inf, posinf=math.inf).max())


def run_case(implementation: Implementation, case: Case, device: str) -> tuple[float, float, bool]:
    """Run one implementation, past the dispatcher, and compare: the largest error and what is allowed, of the result that is
    nearest to its budget, and whether all results are within theirs. Raises what the implementation raises."""
    arguments = arguments_on(case, device)
    returned = implementation.run(*arguments)
    written = returned if case.written is None else arguments[case.written]
    results = tuple(written) if isinstance(written, list) else _as_tuple(written)
    errors = [_largest_error(*row) for row in zip(results, case.expected, case.dtypes, strict=True)]
    rows = list(zip(errors, case.allowed, strict=True))
    error, allowed = max(rows, key=lambda row: row[0] / row[1] if row[1] else row[0])
    return error, allowed, all(e <= a for e, a in rows)
