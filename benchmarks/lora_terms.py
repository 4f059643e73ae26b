"""Several adapters in one batch: rows that name their adapter, by peftfast in one pass, by a loop over adapters, and by PEFT."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftfast import functional as F

from . import layers
from .registry import FROZEN, Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register

OPERATORS = (
    "lora_terms_shrink",
    "lora_terms_expand_",
    "lora_terms_weight_grad",
    "lora_terms_dy_grads",
)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    """``a0``, ``b0``, ... of the adapters; ``rows``: as many successive rows each, the last ones the rest."""
    found = layers.make_inputs(case, generator, nf4=False)
    found.pop("lora_a"), found.pop("lora_b")
    for i in range(case.adapters):
        one = layers.make_inputs(case, generator, nf4=False)
        found[f"a{i}"], found[f"b{i}"] = one["lora_a"], one["lora_b"]
    share = -(-case.m // case.adapters)
    found["rows"] = (torch.arange(case.m, device=case.device) // share).to(torch.int32)
    return found


def _pieces(case: Case) -> list[tuple[int, slice]]:
    """(adapter, its rows)."""
    share = -(-case.m // case.adapters)
    return [(i, slice(i * share, min(case.m, (i + 1) * share))) for i in range(case.adapters) if i * share < case.m]


def _compose(case: Case, x: Tensor, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A loop over adapters, as one writes it by hand."""
    y = functional.linear(x, weight)
    parts = []
    for i, rows in _pieces(case):
        a, b = (factor.to(x.dtype) for factor in factors[i])
        parts.append(layers.SCALING * functional.linear(functional.linear(x[rows], a), b))
    return y + torch.cat(parts)


def _leaves(case: Case, inputs: Inputs) -> tuple[Tensor, list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    x = inputs["x"].detach().requires_grad_()
    factors = [
        (inputs[f"a{i}"].detach().requires_grad_(), inputs[f"b{i}"].detach().requires_grad_())
        for i in range(case.adapters)
    ]
    named = {"dx": x}
    for i, _ in _pieces(case):
        named[f"da{i}"], named[f"db{i}"] = factors[i]
    return x, factors, named


def _formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in _tensors(inputs).items()}
    x, factors, named = _leaves(case, wide)
    if computes == FROZEN:
        named = {"dx": x}
        y = functional.linear(x, wide["weight"])
    else:
        y = _compose(case, x, wide["weight"], factors)
    gradients = torch.autograd.grad(y, list(named.values()), wide["dy"])
    return {"y": y.detach(), **dict(zip(named, gradients, strict=True))}


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def cost(case: Case, computes: str) -> Cost:
    """As of one adapter on all rows, but for the factors of the others, which are read (and their gradients written) too."""
    one = layers.cost(case, computes, nf4=False)
    if computes == FROZEN:
        return one
    factors = (len(_pieces(case)) - 1) * case.rank * (case.n + case.k) * layers.adapter_dtype(case).itemsize
    return Cost(one.bytes + factors * {"fwd": 1, "bwd": 2, "full": 3}[case.mode], one.flops)


def _work(case: Case, inputs: Inputs, call: Any) -> Work:
    x, factors, named = _leaves(case, inputs)
    owned = (inputs["weight"], *(factor for pair in factors for factor in pair))
    return Work(lambda: {"y": call(x, factors)}, named, inputs["dy"], owned)


def _peftfast(case: Case, inputs: Inputs) -> Work:
    def call(x: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        adapters = [F.Adapter(*pair, scaling=layers.SCALING) for pair in factors]
        return F.multi_lora_linear(x, inputs["weight"], adapters, inputs["rows"])

    return _work(case, inputs, call)


def _torch(case: Case, inputs: Inputs) -> Work:
    return _work(case, inputs, lambda x, factors: _compose(case, x, inputs["weight"], factors))


def _peft(case: Case, inputs: Inputs) -> Work:
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(case.k, case.n, bias=False, device="meta")
    base.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    config = LoraConfig(r=case.rank, lora_alpha=layers.SCALING * case.rank, target_modules=["linear"])
    model: Any = nn.ModuleDict({"linear": base})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
        for i in range(1, case.adapters):
            adapted.add_adapter(str(i), config)
    layer = adapted.base_model.model["linear"]
    x, factors, named = _leaves(case, inputs)
    for i, (a, b) in enumerate(factors):
        layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = a.data, b.data
    for name in [name for name in named if name != "dx"]:
        half, i = name[:2], name[2:]
        named[name] = (layer.lora_A if half == "da" else layer.lora_B)[i].weight.requires_grad_()
    share = case.m // case.adapters
    names = [str(i) for i, _ in _pieces(case)]

    def call() -> Results:
        return {"y": layer(x.view(case.adapters, share, case.k), adapter_names=names).view(case.m, case.n)}

    return Work(call, named, inputs["dy"], (inputs["weight"], *(p for p in layer.parameters())))


def _peft_refuses(case: Case) -> str:
    return "" if case.m % case.adapters == 0 else "takes sequences of one length"


def _frozen(case: Case, inputs: Inputs) -> Work:
    x = inputs["x"].detach().requires_grad_()
    return Work(lambda: {"y": functional.linear(x, inputs["weight"])}, {"dx": x}, inputs["dy"], (inputs["weight"],))


register(
    Op(
        "multi_lora_linear",
        "a batch whose rows name their adapter, forward and backward",
        inputs=_inputs,
        formula=_formula,
        cost=cost,
        providers=(
            *peftfast_providers(_peftfast, OPERATORS),
            Provider("torch", _torch),
            Provider("peft", _peft, ("peft",), _peft_refuses),
            Provider("frozen", _frozen, computes=FROZEN),
        ),
        baseline="torch",
        modes=("fwd", "bwd", "full"),
        dropped=False,
        routed=True,
    )
)
