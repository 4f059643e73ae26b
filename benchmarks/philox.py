"""The philox family: the keep mask of dropout by itself. The fused passes draw it in place and never write it."""

import torch
from torch.nn import functional

from peftfast.ops import philox
from peftfast.reference import philox as definition

from .registry import Case, Cost, Inputs, Op, Provider, Results, Work, peftfast_providers, register


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    seed = torch.full((1,), 1234, dtype=torch.int64, device=case.device)
    # Ones: at rate 0 torch's dropout of them is its mask.
    return {"x": torch.ones(case.m, case.k, dtype=case.torch_dtype, device=case.device), "seed": seed}


def _formula(case: Case, inputs: Inputs, computes: str, dtype: torch.dtype) -> Results:
    return {"mask": definition.dropout_mask(inputs["seed"], case.m, case.k, case.dropout).to(dtype)}


def _peftfast(case: Case, inputs: Inputs) -> Work:
    return Work(lambda: {"mask": philox.dropout_mask(inputs["seed"], case.m, case.k, case.dropout)})


def _reference(case: Case, inputs: Inputs) -> Work:
    return Work(lambda: {"mask": definition.dropout_mask(inputs["seed"], case.m, case.k, case.dropout)})


def _bernoulli(case: Case, inputs: Inputs) -> Work:
    mask = torch.empty(case.m, case.k, dtype=torch.bool, device=case.device)
    return Work(lambda: {"mask": mask.bernoulli_(1 - case.dropout)})


def _dropout(case: Case, inputs: Inputs) -> Work:
    """Draws a mask and multiplies x by it: more than the mask alone, and what stock LoRA calls."""
    return Work(lambda: {"mask": functional.dropout(inputs["x"], case.dropout)})


register(
    Op(
        "dropout_mask",
        "the keep mask of an M x K matrix",
        inputs=_inputs,
        formula=_formula,
        cost=lambda case, _: Cost(case.m * case.k, 0),
        providers=(
            *peftfast_providers(_peftfast, ("dropout_mask",)),
            Provider("reference", _reference),
            Provider("torch bernoulli", _bernoulli, own_mask=True),
            Provider("torch dropout", _dropout, own_mask=True),
        ),
        baseline="torch bernoulli",
        ranked=False,
    )
)
