"""The lora family's whole products: a layer's forward and its dX with the adapter, S and dS given.

``frozen`` is the bare library product, what the frozen layer costs. ``peftfast:library`` adds the adapter by a pass over the result,
``peftfast:product 1`` to ``4`` are the kernel's candidates of ``peftfast.configs.lora_product``; ``peftfast`` is the one of them that a
layer takes on this device by itself. ``benchmarks.product`` makes a table of what these rows show.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftfast.configs import lora_product as configs
from peftfast.ops import lora as passes
from peftfast.ops import lora_product as product
from peftfast.ops.backends import device_of, dtype_name, kernels, on_device
from peftfast.reference import lora as definition

from . import layers
from .registry import FROZEN, Case, Cost, Inputs, Op, Provider, Results, Work, register

CANDIDATES = 4  # of the longest list
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float]


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    inputs = layers.make_inputs(case, generator, nf4=False)
    inputs["s"] = layers.normal(case, generator, case.m, case.rank)
    # dY W has deviation sqrt(n / k), dS A sqrt(rank / k) for dS of deviation 1.
    inputs["ds"] = layers.normal(case, generator, case.m, case.rank, std=(case.n / case.rank) ** 0.5)
    inputs["seed"] = torch.full((1,), 1234, dtype=torch.int64, device=case.device)
    return inputs


def _forward(case: Case, inputs: Inputs) -> Operands:
    """x, w, s, b, seed, p, scaling of the operator's call."""
    return inputs["x"], inputs["weight"], inputs["s"], inputs["lora_b"], None, 0.0, layers.SCALING


def _gradient(case: Case, inputs: Inputs) -> Operands:
    seed = inputs["seed"] if case.dropout else None
    return inputs["dy"], inputs["weight"].T, inputs["ds"], inputs["lora_a"].T, seed, case.dropout, 1.0


def _library(given: Operands) -> Tensor:
    x, w, s, b, seed, p, scaling = given
    y = functional.linear(x, w)
    passes.lora_expand_(y, s, b, None, seed, p, scaling)
    return y


def _fused(given: Operands) -> Tensor:
    x, w, s, b, seed, p, scaling = given
    return product.lora_product(x, w, None, s, b, None, seed, p, scaling, x.dtype)


def _chosen(given: Operands) -> Tensor:
    x, w, _, b, seed, _, _ = given
    sizes = (w.shape[0], w.shape[1]), w.stride(1) == 1, b.shape[1]
    fused = product.chosen(x, *sizes, seed is not None, x.dtype)[0]
    return _fused(given) if fused else _library(given)


def _by_torch(given: Operands) -> Tensor:
    """As one writes it: the small product added to the large one; with dropout after a pass of torch's own."""
    x, w, s, b, seed, p, scaling = given
    y = functional.linear(x, w)
    if seed is None:
        return y.addmm_(s, b.T.to(s.dtype), alpha=scaling)
    return y.add_(functional.dropout(s @ b.T.to(s.dtype), p), alpha=scaling)


def launches(case: Case, columns: int, depth: int) -> list[configs.ProductConfig]:
    """The candidates for a product ``[M, depth] [depth, columns]`` on the case's device, which its ``programs`` fill."""
    probe = torch.empty(0, device=case.device)
    device = device_of(probe)
    aligned = columns * case.itemsize % 16 == 0 and depth * case.itemsize % 16 == 0
    tma = aligned and configs.uses_copy_engine(device)
    return configs.candidates(case.rank, dtype_name(case.torch_dtype), tma, device)


def _candidate(number: int, given: Operands, config: configs.ProductConfig) -> Callable[[], Tensor]:
    x, w, s, b, seed, p, scaling = given
    config = configs.on(config, device_of(x))

    def call() -> Tensor:
        with on_device(x):
            return kernels("lora_product").lora_product(x, w, None, s, b, None, seed, p, scaling, x.dtype, config)

    return call


def _register(name: str, summary: str, operands: Callable[[Case, Inputs], Operands], dropped: bool, dx: bool) -> None:
    result = "dx" if dx else "y"

    def sizes(case: Case) -> tuple[int, int]:
        return (case.k, case.n) if dx else (case.n, case.k)

    def builder(call: Callable[[Operands], Tensor]) -> Callable[[Case, Inputs], Work]:
        return lambda case, inputs: Work(lambda: {result: call(operands(case, inputs))})

    def candidate(number: int) -> Callable[[Case, Inputs], Work]:
        def build(case: Case, inputs: Inputs) -> Work:
            call = _candidate(number, operands(case, inputs), launches(case, *sizes(case))[number])
            return Work(lambda: {result: call()})

        return build

    def refuses(number: int) -> Callable[[Case], str]:
        def refusal(case: Case) -> str:
            if case.device == "cpu":
                return "interpreted: no speed to measure"
            if case.torch_dtype not in product.TENSOR_CORE_DTYPES:
                return "multiplies on tensor cores in bfloat16 and float16"
            return "" if number < len(launches(case, *sizes(case))) else "no such candidate for this shape"

        return refusal

    def frozen(case: Case, inputs: Inputs) -> Work:
        x, w = operands(case, inputs)[:2]
        return Work(lambda: {result: functional.linear(x, w)})

    def formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
        x, w, s, b, seed, p, scaling = operands(case, inputs)
        x, w, s, b = (one.to(dtype) for one in (x, w, s, b))
        if computes == FROZEN:
            return {result: functional.linear(x, w)}
        return {result: definition.lora_product(x, w, None, s, b, None, seed, p, scaling, dtype)}

    def cost(case: Case, computes: str) -> Cost:
        n, k = sizes(case)
        moved = (case.m * k + n * k + case.m * n) * case.itemsize
        if computes == FROZEN:
            return Cost(moved, 2 * case.m * n * k)
        adapter = case.rank * (case.m * case.itemsize + n * layers.adapter_dtype(case).itemsize)
        return Cost(moved + adapter, 2 * case.m * n * (k + case.rank))

    def library_refuses(case: Case) -> str:
        return "what peftfast runs here anyway (library)" if case.device == "cpu" else ""

    ours: tuple[Any, ...] = tuple(
        Provider(f"peftfast:product {i + 1}", candidate(i), ("triton",), refuses(i)) for i in range(CANDIDATES)
    )
    register(
        Op(
            name,
            summary,
            inputs=_inputs,
            formula=formula,
            cost=cost,
            providers=(
                Provider("peftfast", builder(_chosen)),
                Provider("peftfast:library", builder(_library), refuses=library_refuses),
                *ours,
                Provider("torch", builder(_by_torch), own_mask=dropped),
                Provider("frozen", frozen, computes=FROZEN),
            ),
            baseline="frozen",
            dropped=dropped,
        )
    )


_register("lora_product", "y = x Wᵀ + s S Bᵀ, the layer's forward but for S", _forward, False, False)
_register("lora_product_dx", "dX = dY W + dropout(dS A), the gradient of x but for dS", _gradient, True, True)
