"""The lora family: the whole layer on a dense base, and each of its side passes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftfast.ops import lora as passes
from peftfast.reference import lora as definition

from . import layers
from .registry import Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register

register(
    Op(
        "lora_linear",
        "y = x Wᵀ + s dropout(x) Aᵀ Bᵀ on a dense W, forward and backward",
        inputs=lambda case, generator: layers.make_inputs(case, generator, nf4=False),
        formula=layers.formula,
        cost=lambda case, computes: layers.cost(case, computes, nf4=False),
        providers=layers.providers(nf4=False),
        baseline="torch",
        modes=("fwd", "bwd", "full"),
    )
)


def _pass_inputs(case: Case, generator: torch.Generator) -> Inputs:
    inputs = layers.make_inputs(case, generator, nf4=False)
    del inputs["weight"]
    inputs["s"] = layers.normal(case, generator, case.m, case.rank)
    return inputs


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _register_pass(
    name: str,
    summary: str,
    results: tuple[str, ...],
    fused: Callable[[Case, Inputs], Any],
    defined: Callable[[Case, Inputs], Any],
    by_torch: Callable[[Case, Inputs], Any],
    cost: Callable[[Case], Cost],
    dropped: bool,
) -> None:
    """One operator of ``peftfast.ops.lora``: as it is, by its definition, and as torch's own calls with torch's dropout."""

    def named(value: Any) -> Results:
        return dict(zip(results, value if isinstance(value, tuple) else (value,), strict=True))

    def builder(call: Callable[[Case, Inputs], Any]) -> Callable[[Case, Inputs], Work]:
        def build(case: Case, inputs: Inputs) -> Work:
            if case.dropout and dropped and inputs["seed"] is None:
                inputs = {**inputs, "seed": torch.ones(1, dtype=torch.int64, device=case.device)}
            return Work(lambda: named(call(case, inputs)))

        return build

    def formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
        return named(defined(case, {key: _cast(value, dtype) for key, value in inputs.items()}))

    register(
        Op(
            name,
            summary,
            inputs=_pass_inputs,
            formula=formula,
            cost=lambda case, _: cost(case),
            providers=(
                *peftfast_providers(builder(fused), (name,)),
                Provider("reference", builder(defined)),
                Provider("torch", builder(by_torch), own_mask=dropped),
            ),
            baseline="torch",
            dropped=dropped,
        )
    )


def _torch_dropout(case: Case, x: Tensor) -> Tensor:
    return functional.dropout(x, case.dropout) if case.dropout else x


def _adapter_bytes(case: Case, size: int) -> int:
    return case.rank * size * layers.adapter_dtype(case).itemsize


_register_pass(
    "lora_shrink",
    "S = dropout(x) Aᵀ",
    ("s",),
    lambda c, i: passes.lora_shrink(i["x"], i["lora_a"], i["seed"], c.dropout, 1.0, i["x"].dtype),
    lambda c, i: definition.lora_shrink(i["x"], i["lora_a"], i["seed"], c.dropout, 1.0, i["x"].dtype),
    lambda c, i: functional.linear(_torch_dropout(c, i["x"]), i["lora_a"].to(i["x"].dtype)),
    lambda c: Cost(
        (c.m * c.k + c.m * c.rank) * c.itemsize + _adapter_bytes(c, c.k),
        2 * c.m * c.k * c.rank,
    ),
    dropped=True,
)
_register_pass(
    "lora_expand",
    "y = base + s S Bᵀ",
    ("y",),
    lambda c, i: passes.lora_expand(i["dy"], i["s"], i["lora_b"], None, None, 0.0, layers.SCALING, i["dy"].dtype),
    lambda c, i: definition.lora_expand(i["dy"], i["s"], i["lora_b"], None, None, 0.0, layers.SCALING, i["dy"].dtype),
    lambda c, i: i["dy"] + layers.SCALING * functional.linear(i["s"], i["lora_b"].to(i["s"].dtype)),
    lambda c: Cost(
        (2 * c.m * c.n + c.m * c.rank) * c.itemsize + _adapter_bytes(c, c.n),
        2 * c.m * c.n * c.rank,
    ),
    dropped=False,
)
_register_pass(
    "lora_weight_grad",
    "dA = dSᵀ dropout(x)",
    ("da",),
    lambda c, i: passes.lora_weight_grad(i["s"], i["x"], i["seed"], c.dropout, 1.0, i["lora_a"].dtype),
    lambda c, i: definition.lora_weight_grad(i["s"], i["x"], i["seed"], c.dropout, 1.0, i["lora_a"].dtype),
    lambda c, i: (i["s"].T @ _torch_dropout(c, i["x"])).to(i["lora_a"].dtype),
    lambda c: Cost(
        (c.m * c.k + c.m * c.rank) * c.itemsize + _adapter_bytes(c, c.k),
        2 * c.m * c.k * c.rank,
    ),
    dropped=True,
)
_register_pass(
    "lora_dy_grads",
    "dS = s dy B and dB = s dyᵀ S in one pass over dy",
    ("ds", "db"),
    lambda c, i: passes.lora_dy_grads(i["dy"], i["s"], i["lora_b"], layers.SCALING, i["lora_b"].dtype),
    lambda c, i: definition.lora_dy_grads(i["dy"], i["s"], i["lora_b"], layers.SCALING, i["lora_b"].dtype),
    lambda c, i: (
        (i["dy"] @ i["lora_b"].to(i["dy"].dtype)) * layers.SCALING,
        ((i["dy"].T @ i["s"]) * layers.SCALING).to(i["lora_b"].dtype),
    ),
    lambda c: Cost(
        (c.m * c.n + 2 * c.m * c.rank) * c.itemsize + 2 * _adapter_bytes(c, c.n),
        4 * c.m * c.n * c.rank,
    ),
    dropped=False,
)
