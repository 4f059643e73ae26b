"""The sparse_delta family: the whole layer on a dense and on a 4-bit base, the gradient of its values alone, and the optimiser's step.

Inputs: ``x`` [M, K], ``dy`` [M, N], ``weight`` [N, K] or an NF4Weight of that shape, ``values`` [S] float32 and ``pattern``, where S is
density * N * K. The delta's term of y is as large as the base's.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast import functional as F
from peftfast.nn import SparseDeltaLinear
from peftfast.ops import sparse_adamw as ops
from peftfast.reference import sparse_delta as definition

from . import layers
from .registry import FROZEN, Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register

OPERATORS = ("sparse_delta_patch", "sparse_delta_dvalues")


def active(case: Case) -> int:
    return max(1, round(case.density * case.n * case.k))


def _pattern(case: Case, generator: torch.Generator) -> F.SparsePattern:
    return F.choose_support(
        torch.empty((), device=case.device).expand(case.n, case.k), case.density, generator=generator
    )


def _inputs(case: Case, generator: torch.Generator, nf4: bool) -> Inputs:
    weight = layers.normal(case, generator, case.n, case.k, std=case.k**-0.5)
    values = torch.randn(active(case), generator=generator, device=case.device) * (case.density * case.k) ** -0.5
    return {
        "x": layers.normal(case, generator, case.m, case.k),
        "dy": layers.normal(case, generator, case.m, case.n),
        "weight": F.nf4_quantize(weight) if nf4 else weight,
        # What a 16-bit dtype holds exactly: who casts the values down computes the same function.
        "values": values.to(case.torch_dtype).float(),
        "pattern": _pattern(case, generator),
    }


def _formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    """y and its gradients by autograd, every product in ``dtype``, through the weight W + Δ as it is rounded to the case's dtype."""
    x = inputs["x"].to(dtype).requires_grad_()
    weight, pattern = layers.dense(inputs, case.torch_dtype), inputs["pattern"]
    if computes == FROZEN:
        y, leaves = nn.functional.linear(x, weight.to(dtype)), {"dx": x}
    else:
        weight = definition.sparse_delta_patch(weight, pattern.indices, inputs["values"]).to(dtype)
        values = torch.zeros_like(inputs["values"], dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves = {"dx": x, "dvalues": values}
        y = definition.sparse_delta_linear(x, weight, pattern.indices, values)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def cost(case: Case, computes: str, nf4: bool) -> Cost:
    """Bytes: x, W, values and indices read and y written; backward: dy, x, W, values and indices read, dx and dvalues written.
    Operations: 2 M N K each way, and 2 M S for dvalues."""
    m, n, k, e, s = case.m, case.n, case.k, case.itemsize, active(case)
    weight = layers.nf4_bytes(n, k) if nf4 else n * k * e
    base = m * k * e + weight + m * n * e
    if computes == FROZEN:
        forward = backward = Cost(base, 2 * m * n * k)
    else:
        forward = Cost(base + 8 * s, 2 * m * n * k)
        backward = Cost(base + m * k * e + 12 * s, 2 * m * n * k + 2 * m * s)
    full = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"fwd": forward, "bwd": backward, "full": full}[case.mode]


def _frozen_tensors(weight: Any) -> tuple[Tensor, ...]:
    if not isinstance(weight, F.NF4Weight):
        return (weight,)
    return tuple(value for value in vars(weight).values() if isinstance(value, Tensor))


def _layer(inputs: Inputs, call: Callable[[Tensor, Tensor], Tensor]) -> Work:
    x, values = (inputs[name].detach().requires_grad_() for name in ("x", "values"))
    owned = (values, inputs["pattern"].indices, *_frozen_tensors(inputs["weight"]))
    return Work(lambda: {"y": call(x, values)}, {"dx": x, "dvalues": values}, inputs["dy"], owned)


def _peftfast(case: Case, inputs: Inputs) -> Work:
    return _layer(inputs, lambda x, values: F.sparse_delta_linear(x, inputs["weight"], inputs["pattern"], values))


def _resident(case: Case, inputs: Inputs) -> Work:
    """The delta held by the weight: a copy of it, since other providers read the base."""
    base = nn.Linear(case.k, case.n, bias=False, device="meta")
    base.weight = nn.Parameter(inputs["weight"].clone(), requires_grad=False)
    layer = SparseDeltaLinear.from_linear(base, indices=inputs["pattern"])
    with torch.no_grad():
        layer.delta_values.copy_(inputs["values"])
    layer.merge()
    x = inputs["x"].detach().requires_grad_()
    owned = (layer.delta_values, layer.weight, layer.delta_indices)
    return Work(lambda: {"y": layer(x)}, {"dx": x, "dvalues": layer.delta_values}, inputs["dy"], owned)


def compose(x: Tensor, weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """As one writes it by hand: the weight is copied, the delta added, and autograd forms a dense gradient."""
    patched = weight.flatten().index_add(0, indices, values.to(weight.dtype))
    return nn.functional.linear(x, patched.view_as(weight))


def _torch(case: Case, inputs: Inputs) -> Work:
    indices = inputs["pattern"].indices
    return _layer(inputs, lambda x, values: compose(x, layers.dense(inputs, x.dtype), indices, values))


def _frozen(case: Case, inputs: Inputs) -> Work:
    x, weight = inputs["x"].detach().requires_grad_(), layers.dense(inputs, case.torch_dtype)
    return Work(lambda: {"y": nn.functional.linear(x, weight)}, {"dx": x}, inputs["dy"], (weight,))


def _shira_rank(case: Case) -> int:
    return max(1, round(active(case) / (case.n + case.k)))


def _peft(case: Case, inputs: Inputs, patched: bool) -> Work:
    """PEFT's SHiRA, its mask replaced by the pattern: its own has r (N + K) values."""
    from peft import ShiraConfig, get_peft_model

    import peftfast

    nf4 = isinstance(inputs["weight"], F.NF4Weight)
    if nf4:
        base = layers.linear4bit(case, inputs)
        base.weight.quant_state.dtype = case.torch_dtype
    else:
        base = nn.Linear(case.k, case.n, bias=False, device="meta")
        base.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    model: Any = nn.ModuleDict({"linear": base})
    config = ShiraConfig(r=_shira_rank(case), target_modules=["linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    layer = model.base_model.model["linear"].train()
    indices = inputs["pattern"].indices.long()
    layer.shira_weight["default"] = nn.Parameter(inputs["values"].clone())
    layer.shira_indices["default"] = torch.stack((indices // case.k, indices % case.k)).int()
    if patched:
        report = peftfast.patch(model)
        if report.stock:
            raise RuntimeError(f"the layer stays stock: {next(iter(report.reasons))}")
    x, values = inputs["x"].detach().requires_grad_(), layer.shira_weight["default"]
    owned = (values, layer.shira_indices["default"], *_frozen_tensors(inputs["weight"]))
    return Work(lambda: {"y": layer(x)}, {"dx": x, "dvalues": values}, inputs["dy"], owned)


def _providers(nf4: bool) -> tuple[Provider, ...]:
    stock = ("peft", "bitsandbytes") if nf4 else ("peft",)
    refuses = layers.bitsandbytes_refuses if nf4 else (lambda _: "")
    operators = ("sparse_delta_dequantize", "sparse_delta_dvalues") if nf4 else OPERATORS
    found = (
        *peftfast_providers(_peftfast, operators),
        Provider("torch", _torch),
        Provider("peft", lambda case, inputs: _peft(case, inputs, False), stock, refuses),
        Provider("peftfast:patch", lambda case, inputs: _peft(case, inputs, True), stock, refuses),
        Provider("frozen", _frozen, computes=FROZEN),
    )
    return found if nf4 else (*found, Provider("peftfast:resident", _resident))


for _name, _nf4, _where in (("sparse_delta_linear", False, "a dense"), ("qsparse_delta_linear", True, "a 4-bit")):
    register(
        Op(
            _name,
            f"y = x (W + Δ)ᵀ with a sparse Δ on {_where} W, forward and backward",
            inputs=lambda case, generator, nf4=_nf4: _inputs(case, generator, nf4),  # type: ignore[misc]
            formula=_formula,
            cost=lambda case, computes, nf4=_nf4: cost(case, computes, nf4),  # type: ignore[misc]
            providers=_providers(_nf4),
            baseline="torch",
            modes=("fwd", "bwd", "full"),
            ranked=False,
            dropped=False,
            sparse=True,
        )
    )


def _dvalues_formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    dense = inputs["dy"].to(dtype).T @ inputs["x"].to(dtype)
    return {"dvalues": dense.flatten()[inputs["pattern"].indices.long()]}


def _fused_dvalues(case: Case, inputs: Inputs) -> Work:
    from peftfast.functional.sparse_delta import dvalues

    return Work(lambda: {"dvalues": dvalues(inputs["dy"], inputs["x"], inputs["pattern"], torch.float32)})


def _dense_dvalues(case: Case, inputs: Inputs) -> Work:
    indices = inputs["pattern"].indices
    return Work(lambda: {"dvalues": (inputs["dy"].T @ inputs["x"]).view(-1)[indices]})


register(
    Op(
        "sparse_delta_dvalues",
        "the entries of dyᵀ x on the support",
        inputs=lambda case, generator: _inputs(case, generator, False),
        formula=_dvalues_formula,
        cost=lambda case, _: Cost(
            case.m * (case.n + case.k) * case.itemsize + 8 * active(case), 2 * case.m * active(case)
        ),
        providers=(
            *peftfast_providers(_fused_dvalues, ("sparse_delta_dvalues",)),
            Provider("torch", _dense_dvalues),
        ),
        baseline="torch",
        ranked=False,
        dropped=False,
        sparse=True,
    )
)

BETAS = (0.9, 0.999)
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.0}


def _adamw_inputs(case: Case, generator: torch.Generator) -> Inputs:
    count = active(case)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, device=case.device)

    weight = layers.normal(case, generator, case.n, case.k)
    pattern = _pattern(case, generator)
    return {"values": normal() * 0.01, "grad": normal(), "weight": weight, "pattern": pattern}


def _adamw_formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    """The first step from states of zero: lr g / (|g| + eps)."""
    values, grad = (inputs[name].to(dtype) for name in ("values", "grad"))
    return {"values": values - HYPER["lr"] * grad / (grad.abs() + HYPER["eps"])}


def _fused_adamw(case: Case, inputs: Inputs) -> Work:
    """The values' step, and the weight written from base + Δ."""
    values, weight, at = inputs["values"].clone(), inputs["weight"].clone(), inputs["pattern"].indices
    base = weight.view(-1)[at.long()].clone()
    first, second, age = torch.zeros_like(values), torch.zeros_like(values), torch.zeros_like(values, dtype=torch.int16)
    hyper = definition.adam_hyper(HYPER["lr"], *BETAS, HYPER["eps"], HYPER["weight_decay"]).to(case.device)
    corrections = definition.adam_corrections(*BETAS, 2**15 + 1).to(case.device)
    lists = ([values], [inputs["grad"]], [first], [second], [age], [weight], [at], [base])

    def call() -> Results:
        ops.sparse_adamw_(*lists, hyper, corrections, None, [0])
        return {"values": values}

    return Work(call)


def _fused_adamw8(case: Case, inputs: Inputs) -> Work:
    """The same with states in 8 bits."""
    values, weight, at = inputs["values"].clone(), inputs["weight"].clone(), inputs["pattern"].indices
    base = weight.view(-1)[at.long()].clone()
    codes = definition.state_codes().to(case.device)
    (first, first_max), (second, second_max) = (
        definition.compress_states(torch.zeros_like(values), code) for code in codes
    )
    age = torch.zeros_like(values, dtype=torch.int16)
    hyper = definition.adam_hyper(HYPER["lr"], *BETAS, HYPER["eps"], HYPER["weight_decay"]).to(case.device)
    corrections = definition.adam_corrections(*BETAS, 2**15 + 1).to(case.device)
    lists = ([values], [inputs["grad"]], [first], [second], [age], [weight], [at], [base], [first_max], [second_max])

    def call() -> Results:
        ops.sparse_adamw8_(*lists, codes, hyper, corrections, None, [0])
        return {"values": values}

    return Work(call)


def _torch_adamw(case: Case, inputs: Inputs, dense: bool) -> Work:
    """torch's fused AdamW: on the whole weight, zero but for the support, or on the values alone, where no weight is written."""
    at = inputs["pattern"].indices.long()
    if dense:
        parameter, grad = (torch.zeros(case.n * case.k, device=case.device) for _ in "pg")
        parameter[at], grad[at] = inputs["values"], inputs["grad"]
    else:
        parameter, grad = inputs["values"].clone(), inputs["grad"]
    parameter = nn.Parameter(parameter)
    parameter.grad = grad
    optimiser = torch.optim.AdamW([parameter], fused=True, **HYPER)

    def call() -> Results:
        optimiser.step()
        return {"values": parameter.detach()[at] if dense else parameter.detach()}

    return Work(call)


register(
    Op(
        "sparse_adamw",
        "AdamW on the values of a sparse delta, the weight written in the same pass",
        inputs=_adamw_inputs,
        formula=_adamw_formula,
        # grad, index, base; values and two states read and written; age; the weight.
        cost=lambda case, _: Cost(active(case) * (4 + 4 + 24 + 4 + 2 * case.itemsize), 0),
        providers=(
            *peftfast_providers(_fused_adamw, ("sparse_adamw_",)),
            Provider("peftfast:8bit", _fused_adamw8),
            Provider("torch", lambda case, inputs: _torch_adamw(case, inputs, True)),
            Provider("torch:values", lambda case, inputs: _torch_adamw(case, inputs, False)),
        ),
        baseline="torch",
        ranked=False,
        dropped=False,
        tokens=False,
        sparse=True,
    )
)
