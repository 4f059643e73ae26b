"""The nf4 family's products of many rows: a layer's forward with its adapter, and its dX, dS given, by every way that there is.

``frozen`` is the library's product with a dense weight that was there before: what the frozen 16-bit layer costs.
``peftfast:dequantize`` decodes the weight whole, multiplies by the library and adds the adapter by a pass; ``peftfast:few rows`` is
the operator of a few rows, where it serves; with them nothing is taken but where a table says so. ``peftfast:slabs 2`` to ``8``
decode and multiply in so many parts, ``peftfast:overlapped 2`` to ``8`` decode the next beside the product of one, ``peftfast:fused
1`` to ``3`` are the candidates of ``peftfast.configs.nf4_product``, which also says what to expect of each. ``peftfast`` is what a
layer takes on this device by itself. ``benchmarks.product`` makes a table of what these rows show.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftfast import ops
from peftfast.configs import nf4_product as configs
from peftfast.functional import nf4_routes as routes
from peftfast.functional.nf4_product import takes_few_rows
from peftfast.ops.backends import device_of, kernels, on_device
from peftfast.ops.lora_product import TENSOR_CORE_DTYPES
from peftfast.reference import lora as definition

from . import layers
from .registry import FROZEN, Case, Cost, Inputs, Op, Provider, Results, Work, register

CANDIDATES = 3  # of the longest list


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    inputs = layers.make_inputs(case, generator, nf4=True)
    # dY W̃ has deviation sqrt(n / k), dS A sqrt(rank / k) for dS of deviation 1.
    inputs["ds"] = layers.normal(case, generator, case.m, case.rank, std=(case.n / case.rank) ** 0.5)
    inputs["seed"] = torch.full((1,), 1234, dtype=torch.int64, device=case.device)
    return inputs


class _Call:
    """One direction of a layer on a case's inputs."""

    def __init__(self, case: Case, inputs: Inputs, dx: bool) -> None:
        self.dx, self.case, self.inputs = dx, case, inputs
        self.x = inputs["dy"] if dx else inputs["x"]
        self.packed, *rest = inputs["weight"].storage()
        self.quantisation = tuple(rest)
        self.seed, self.p = (inputs["seed"], case.dropout) if dx and case.dropout else (None, 0.0)

    def adapter(self) -> tuple[Tensor, Tensor, None, Tensor | None, float, float, torch.dtype]:
        """s, b, lora_bias, seed, p, scaling and dtype of the operators' calls; S of the forward by its own pass."""
        inputs, dtype = self.inputs, self.x.dtype
        if self.dx:
            return inputs["ds"], inputs["lora_a"].T, None, self.seed, self.p, 1.0, dtype
        s = ops.lora.lora_shrink(self.x, inputs["lora_a"], None, 0.0, 1.0, dtype)
        return s, inputs["lora_b"], None, None, 0.0, layers.SCALING, dtype

    def dequantize(self) -> Tensor:
        dense = layers.dense(self.inputs, self.x.dtype)
        return routes.add_product(self.x @ (dense if self.dx else dense.T), *self.adapter())

    def few(self) -> Tensor:
        adapter = (None, self.inputs["lora_a"], self.inputs["lora_b"], None, layers.SCALING)
        dtypes = (self.x.dtype, self.x.dtype)
        return ops.nf4_linear.nf4_linear_now(self.x, self.packed, *self.quantisation, *adapter, *dtypes)[0]

    def by_parts(self, config: configs.ProductConfig) -> Tensor:
        base = routes.by_parts(self.x, self.packed, self.quantisation, None, self.dx, config)
        return routes.add_product(base, *self.adapter())

    def fused(self, config: configs.ProductConfig) -> Tensor:
        absmax, code, block_size, shape, *nested = self.quantisation
        stored = (self.packed, absmax, code, block_size, tuple(shape), *nested)
        adapter = self.adapter()
        with on_device(self.x):
            return kernels("nf4_product").nf4_product(self.x, *stored, self.dx, None, *adapter, config)

    def chosen(self) -> Tensor:
        masked, rank = self.seed is not None, self.case.rank
        config = routes.chosen(self.x, self.x.shape[0], self.quantisation, rank, self.dx, masked, self.x.dtype)
        if config.route == "fused":
            return ops.nf4_product.nf4_product(self.x, self.packed, *self.quantisation, self.dx, None, *self.adapter())
        if config.route != "dequantize":
            return self.by_parts(config)
        if not self.dx and takes_few_rows(self.x, self.quantisation[3], self.quantisation[2], self.x.dtype):
            return self.few()
        return self.dequantize()

    def launch(self, number: int) -> configs.ProductConfig:
        device = device_of(self.x)
        config = configs.candidates(self.case.m, self.case.rank, self.dx, device)[number]
        return configs.on(config, self.case.m, *_sizes(self.case, self.dx), device)

    def torch(self) -> Tensor:
        """As one writes it: the small product added to the large one; with dropout after a pass of torch's own."""
        dense, dtype = layers.dense(self.inputs, self.x.dtype), self.x.dtype
        if not self.dx:
            return layers.compose(self.x, dense, self.inputs["lora_a"], self.inputs["lora_b"], 0.0)
        added = self.inputs["ds"] @ self.inputs["lora_a"].to(dtype)
        return (self.x @ dense).add_(functional.dropout(added, self.p) if self.p else added)


def _sizes(case: Case, dx: bool) -> tuple[int, int]:
    """Columns and depth of the product."""
    return (case.k, case.n) if dx else (case.n, case.k)


def candidates(case: Case, device: Any, dx: bool) -> dict[str, configs.ProductConfig]:
    """Provider -> what it is in a table: all that could take the usual way's place."""
    found = {
        f"peftfast:fused {i}": config for i, config in enumerate(configs.candidates(case.m, case.rank, dx, device), 1)
    }
    for route in ("slabs", "overlapped"):
        found |= {f"peftfast:{route} {parts}": configs.ProductConfig(route, parts) for parts in configs.PARTS}
    return found


def _register(name: str, summary: str, dx: bool) -> None:
    result = "dx" if dx else "y"

    def builder(run: Callable[[_Call], Tensor]) -> Callable[[Case, Inputs], Work]:
        def build(case: Case, inputs: Inputs) -> Work:
            call = _Call(case, inputs, dx)

            def step() -> Results:
                with torch.no_grad():
                    return {result: run(call)}

            return Work(step)

        return build

    def fused(number: int) -> Callable[[Case, Inputs], Work]:
        def build(case: Case, inputs: Inputs) -> Work:
            call = _Call(case, inputs, dx)
            config = call.launch(number)
            return builder(lambda _: call.fused(config))(case, inputs)

        return build

    def parts(route: str, count: int) -> Provider:
        config = configs.ProductConfig(route, count)
        return Provider(f"peftfast:{route} {count}", builder(lambda call: call.by_parts(config)), refuses=on_gpu(count))

    def on_gpu(count: int) -> Callable[[Case], str]:
        def refusal(case: Case) -> str:
            if case.device == "cpu":
                return "for the caches and streams of a GPU"
            columns = _sizes(case, dx)[0]
            return (
                ""
                if len(configs.parted(columns, count, routes.PART_MULTIPLE)) == count
                else "too few columns for so many parts"
            )

        return refusal

    def refuses(number: int) -> Callable[[Case], str]:
        def refusal(case: Case) -> str:
            if case.device == "cpu":
                return "interpreted: no speed to measure"
            if case.torch_dtype not in TENSOR_CORE_DTYPES:
                return "multiplies on tensor cores in bfloat16 and float16"
            if case.k % configs.WHOLE_BYTES:
                return "tiles for columns that 32 divides"
            found = configs.candidates(case.m, case.rank, dx, device_of(torch.empty(0, device=case.device)))
            return "" if number < len(found) else "no such candidate for so many rows"

        return refusal

    def few_refuses(case: Case) -> str:
        most = ops.nf4_linear.most_rows(case.device, case.k, 64, case.torch_dtype)
        return "" if 0 < case.m <= most else f"takes up to {most} rows here"

    def usual_refuses(case: Case) -> str:
        return "what peftfast runs here anyway" if case.device == "cpu" else ""

    def frozen(case: Case, inputs: Inputs) -> Work:
        call, weight = _Call(case, inputs, dx), layers.dense(inputs, case.torch_dtype)
        return Work(lambda: {result: call.x @ (weight if dx else weight.T)})

    def bitsandbytes(case: Case, inputs: Inputs) -> Work:
        if not dx:
            layer = layers.linear4bit(case, inputs)
            return builder(lambda call: layer(call.x))(case, inputs)
        from bitsandbytes.functional import dequantize_4bit

        weight = inputs["weight"].to_bitsandbytes()
        data, state = weight.data, weight.quant_state
        state.dtype = case.torch_dtype
        return builder(lambda call: call.x @ dequantize_4bit(data, state))(case, inputs)

    def formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
        """Of the weight decoded to the case's dtype: that rounding belongs to the operator, not to its error."""
        call, weight = _Call(case, inputs, dx), layers.dense(inputs, case.torch_dtype).to(dtype)
        x, weight = call.x.to(dtype), weight.T if dx else weight
        if computes == FROZEN:
            return {result: functional.linear(x, weight)}
        a, b = inputs["lora_a"].to(dtype), inputs["lora_b"].to(dtype)
        s, right, scaling = (inputs["ds"].to(dtype), a.T, 1.0) if dx else (x @ a.T, b, layers.SCALING)
        return {result: definition.lora_product(x, weight, None, s, right, None, call.seed, call.p, scaling, dtype)}

    def cost(case: Case, computes: str) -> Cost:
        columns, depth = _sizes(case, dx)
        moved = case.m * (depth + columns) * case.itemsize + layers.nf4_bytes(case.n, case.k)
        flops = 2 * case.m * columns * depth
        if computes == FROZEN:
            return Cost(moved, flops)
        factors = case.rank * layers.adapter_dtype(case).itemsize * (case.k if dx else case.n + case.k)
        ds = case.m * case.rank * case.itemsize if dx else 0
        return Cost(moved + factors + ds, flops + 2 * case.m * case.rank * (columns if dx else columns + depth))

    ours: tuple[Any, ...] = tuple(
        Provider(f"peftfast:fused {i + 1}", fused(i), ("triton",), refuses(i)) for i in range(CANDIDATES)
    )
    few = Provider("peftfast:few rows", builder(_Call.few), refuses=few_refuses)
    register(
        Op(
            name,
            summary,
            inputs=_inputs,
            formula=formula,
            cost=cost,
            providers=(
                Provider("peftfast", builder(_Call.chosen)),
                Provider("peftfast:dequantize", builder(_Call.dequantize), refuses=usual_refuses),
                *(() if dx else (few,)),
                *(parts(route, count) for route in ("slabs", "overlapped") for count in configs.PARTS),
                *ours,
                Provider("torch", builder(_Call.torch), own_mask=dx),
                Provider("frozen", frozen, computes=FROZEN),
                Provider("bitsandbytes", bitsandbytes, ("bitsandbytes",), layers.bitsandbytes_refuses, FROZEN),
            ),
            baseline="frozen",
            dropped=dx,
        )
    )


_register("nf4_product", "y = x W̃ᵀ + s (x Aᵀ) Bᵀ on a 4-bit W, many rows", False)
_register("nf4_product_dx", "dX = dY W̃ + dropout(dS A) on a 4-bit W, but for dS", True)
