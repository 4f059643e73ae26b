"""Gated MLPs are known by their code: which forwards are one, and which callables are a known activation."""

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from peftfast.integrations import mlp_form
from tests.support.gated_blocks import (
    MLP,
    Branch,
    ByFunction,
    ByProduct,
    Flag,
    Inherited,
    InPlace,
    NoGate,
    Residual,
    Same,
    Scaled,
    Stores,
    Tanh,
    Thrown,
    Twice,
    TwoInputs,
    UpFirst,
    Wrapped,
)


def test_forms_are_known_by_their_code() -> None:
    forms = {kind.__name__: str(mlp_form.form_of(kind)) for kind in (MLP, UpFirst, ByFunction, ByProduct, Inherited)}
    assert forms == {
        "MLP": "down(act(gate) * up)",
        "UpFirst": "down(up * act(gate))",
        "ByFunction": "down(gelu_tanh(gate) * up)",
        "ByProduct": "down(silu(gate) * up)",
        "Inherited": "down(act(gate) * up)",
    }
    assert mlp_form.form_of(UpFirst).up_called_first and not mlp_form.form_of(MLP).up_called_first


@pytest.mark.parametrize(
    "kind",
    [
        Branch,
        Flag,
        Stores,
        Scaled,
        Twice,
        Thrown,
        TwoInputs,
        Tanh,
        Same,
        NoGate,
        Wrapped,
        Residual,
        InPlace,
        nn.Module,
        nn.Linear,
    ],
)
def test_other_forwards_are_none(kind: type) -> None:
    assert mlp_form.form_of(kind) is None


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Glm4"])
def test_models_of_transformers_are_known_without_a_list(name: str) -> None:
    module = __import__(f"transformers.models.{name.lower()}.modeling_{name.lower()}", fromlist=["x"])
    form = mlp_form.form_of(getattr(module, f"{name}MLP")) if hasattr(module, f"{name}MLP") else None
    if name == "Glm4":  # one product for gate and up
        assert form is None
    else:
        assert str(form) == "down_proj(act_fn(gate_proj) * up_proj)"


class OwnAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


class Called(OwnAct):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Beta(nn.Module):
    """silu while beta is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), ""),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), ""),
        (functional.silu, "silu"),
        (torch.relu, "relu"),
        (functional.gelu, "gelu"),
        (functools.partial(functional.gelu, approximate="tanh"), "gelu_tanh"),
        (functools.partial(functional.silu, inplace=True), ""),
        (ACT2FN["silu"], "silu"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["gelu_python"], ""),
        (ACT2FN["quick_gelu"], ""),
        (OwnAct(), "silu"),
        (Called(), ""),
        (Beta(), ""),
        (nn.Tanh(), ""),
        (nn.Identity(), ""),
        (lambda x: functional.silu(x), ""),
        (None, ""),
    ],
    # No addresses: the workers of a parallel run must collect the same names.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_activations(act: Any, name: str) -> None:
    assert mlp_form.activation_of(act) == name
