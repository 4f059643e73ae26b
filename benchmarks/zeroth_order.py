"""The zeroth_order family: a weight moved along its direction, and a linear layer at both sides of a two-point estimate.

Whoever draws normals of torch's draws others than peftfast's: such a provider is checked at eps = 0, where none show.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from peftfast.ops import zeroth_order as ops
from peftfast.ops import zeroth_order_linear as linear_ops
from peftfast.reference import zeroth_order as definition

from .layers import normal
from .registry import Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register

EPS = 1e-3  # MeZO's


def _refuses_large(case: Case) -> str:
    """The definition takes some 40 passes of int64 over its words: a minute a row at a large layer's size."""
    return "" if case.n * case.k <= 2**20 else "takes a second a million elements"


def _ours(build: Callable[[Case, Inputs], Work], operator: str) -> tuple[Provider, ...]:
    """peftfast and its backends; the definition as one of them at small sizes only."""
    return tuple(
        dataclasses.replace(provider, refuses=_refuses_large) if provider.backend == "reference" else provider
        for provider in peftfast_providers(build, (operator,))
    )


def _still(inputs: Inputs) -> Inputs:
    return {**inputs, "eps": torch.zeros_like(inputs["eps"])}


def _direction(case: Case) -> Inputs:
    direction = torch.full((1,), 1234, dtype=torch.int64, device=case.device)
    return {"direction": direction, "eps": torch.full((1,), EPS, device=case.device)}


def _weight_inputs(case: Case, generator: torch.Generator) -> Inputs:
    return {"weight": normal(case, generator, case.n, case.k, std=0.02), **_direction(case)}


def _moved(inputs: Inputs, dtype: torch.dtype, rademacher: bool) -> Tensor:
    """In float64: the float32 z and eps as they are, product and sum exact."""
    weight = inputs["weight"]
    z = definition.perturbation(inputs["direction"], tuple(weight.shape), 0, 0, rademacher, torch.float32)
    return weight.to(dtype) + inputs["eps"].to(dtype) * z.to(dtype)


def _fused(rademacher: bool):  # type: ignore[no-untyped-def]
    def build(case: Case, inputs: Inputs) -> Work:
        weight = inputs["weight"].clone()  # moved on and on, in place: the inputs belong to everyone

        def call() -> Results:
            terms = (inputs["direction"], inputs["eps"], None, None, None)
            ops.perturb_([weight], [], *terms, [0], [0], rademacher)
            return {"weight": weight}

        return Work(call)

    return build


def _by_definition(rademacher: bool):  # type: ignore[no-untyped-def]
    def build(case: Case, inputs: Inputs) -> Work:
        def call() -> Results:
            terms = (inputs["direction"], inputs["eps"], None, None, None)
            return {"weight": definition.perturbed(inputs["weight"], *terms, 0, 0, rademacher)}

        return Work(call)

    return build


def _normal_and_add(case: Case, inputs: Inputs) -> Work:
    """The least that torch can do with a buffer for z: draw into it, add it."""
    weight, z, eps = inputs["weight"].clone(), torch.empty_like(inputs["weight"]), inputs["eps"].item()

    def call() -> Results:
        weight.add_(z.normal_(), alpha=eps)
        return {"weight": weight}

    return Work(call)


def _as_published(case: Case, inputs: Inputs) -> Work:
    """MeZO's own code: torch.normal, and the parameter's data replaced."""
    held = [inputs["weight"].clone()]
    eps = inputs["eps"].item()

    def call() -> Results:
        weight = held[0]
        z = torch.normal(mean=0.0, std=1.0, size=weight.shape, device=weight.device, dtype=weight.dtype)
        held[0] = weight + 1 * z * eps
        return {"weight": held[0]}

    return Work(call)


def _signs_and_add(case: Case, inputs: Inputs) -> Work:
    weight, z, eps = inputs["weight"].clone(), torch.empty_like(inputs["weight"]), inputs["eps"].item()

    def call() -> Results:
        z.bernoulli_(0.5).mul_(2).sub_(1)
        weight.add_(z, alpha=eps)
        return {"weight": weight}

    return Work(call)


for _name, _rademacher, _torch in (
    ("perturb_gaussian", False, (("torch normal_ and add_", _normal_and_add), ("MeZO's code", _as_published))),
    ("perturb_rademacher", True, (("torch bernoulli_ and add_", _signs_and_add),)),
):
    register(
        Op(
            _name,
            f"W += eps z in place, z {'signs' if _rademacher else 'normals'} of a seed",
            inputs=_weight_inputs,
            formula=lambda case, inputs, _, dtype, rademacher=_rademacher: {  # type: ignore[misc]
                "weight": _moved(inputs, dtype, rademacher)
            },
            cost=lambda case, _: Cost(2 * case.n * case.k * case.itemsize, 0),
            providers=(
                *_ours(_fused(_rademacher), "perturb_"),
                Provider("reference", _by_definition(_rademacher), refuses=_refuses_large),
                *(Provider(name, build, own_mask=True) for name, build in _torch),
            ),
            baseline=_torch[0][0],
            ranked=False,
            dropped=False,
            tokens=False,
            still=_still,
        )
    )


def _linear_inputs(case: Case, generator: torch.Generator) -> Inputs:
    return {
        "x_plus": normal(case, generator, case.m, case.k),
        "x_minus": normal(case, generator, case.m, case.k),
        "weight": normal(case, generator, case.n, case.k, std=case.k**-0.5),
        **_direction(case),
    }


def _linear_formula(case: Case, inputs: Inputs, _: str, dtype: torch.dtype) -> Results:
    """The moved weights are those that the case's dtype holds: that rounding belongs to the operator."""
    results = {}
    for name, sign in (("plus", 1.0), ("minus", -1.0)):
        terms = (inputs["direction"], sign * inputs["eps"], None, None, None)
        weight = definition.perturbed(inputs["weight"], *terms, 0, 0, False)
        results[name] = functional.linear(inputs[f"x_{name}"].to(dtype), weight.to(dtype))
    return results


def _linear_fused(case: Case, inputs: Inputs) -> Work:
    def call() -> Results:
        terms = (inputs["direction"], inputs["eps"], None, 0, False)
        plus, minus = linear_ops.zo_linear(inputs["x_plus"], inputs["x_minus"], inputs["weight"], None, None, *terms)
        return {"plus": plus, "minus": minus}

    return Work(call)


def _linear_by_definition(case: Case, inputs: Inputs) -> Work:
    return Work(lambda: _linear_formula(case, inputs, "", case.torch_dtype))


def _linear_in_place(case: Case, inputs: Inputs) -> Work:
    """What MeZO does to one layer: +eps, product, -2 eps, product, +eps, with z drawn again each time."""
    weight, z, eps = inputs["weight"].clone(), torch.empty_like(inputs["weight"]), inputs["eps"].item()

    def call() -> Results:
        weight.add_(z.normal_(), alpha=eps)
        plus = functional.linear(inputs["x_plus"], weight)
        weight.add_(z.normal_(), alpha=-2 * eps)
        minus = functional.linear(inputs["x_minus"], weight)
        weight.add_(z.normal_(), alpha=eps)
        return {"plus": plus, "minus": minus}

    return Work(call)


register(
    Op(
        "zo_linear",
        "both sides of a two-point estimate through one layer",
        inputs=_linear_inputs,
        formula=_linear_formula,
        # W read once: what a scratch of moved weights adds is not what the operator needs.
        cost=lambda case, _: Cost(
            (case.n * case.k + 2 * case.m * (case.n + case.k)) * case.itemsize, 4 * case.m * case.n * case.k
        ),
        providers=(
            *_ours(_linear_fused, "zo_linear"),
            Provider("reference", _linear_by_definition, refuses=_refuses_large),
            Provider("torch, in place", _linear_in_place, own_mask=True),
        ),
        baseline="torch, in place",
        ranked=False,
        dropped=False,
        still=_still,
    )
)
