"""torch's default dtype and default device are the caller's: what peftfast makes for itself does not follow them."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftfast
import peftfast.functional as F
from peftfast.integrations import peft_gated_mlp
from peftfast.nn import LoRALinear, SparseDeltaLinear
from peftfast.optim import MeZO, SparseAdamW
from peftfast.reference import nf4
from tests.support import small_models

CPU = {"device": "cpu", "dtype": torch.float32}


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32, **CPU)


def _x() -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1), **CPU)


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*shape, generator=generator, **CPU).requires_grad_() for shape in ((4, 64), (32, 4)))  # type: ignore[return-value]


def _mezo(whole: bool) -> torch.Tensor:
    linear, x = _linear(), _x()
    optimizer = MeZO(
        linear if whole else linear.parameters(), lr=1e-2, eps=1e-3, seed=3, momentum=0.5, weight_decay=0.1
    )
    for _ in range(3):
        optimizer.step(lambda: linear(x).square().mean())
    return linear.weight.detach()


def _mixed() -> torch.Tensor:
    a, b = _factors()
    y = F.multi_lora_linear(_x(), _linear().weight, [F.Adapter(a, b, dropout_p=0.2, seed=4)], rows=[0, -1, 0, 0, -1, 0])
    y.square().sum().backward()
    assert a.grad is not None
    return a.grad


def _lora(weight: Any) -> torch.Tensor:
    a, b = _factors()
    F.lora_linear(_x(), weight, a, b, dropout_p=0.2, seed=4).square().sum().backward()
    assert a.grad is not None
    return a.grad


def _gated() -> torch.Tensor:
    a, b = _factors()
    F.lora_gated_linear(_x(), _x(), _linear().weight, a, b, dropout_p=0.2, seed=4).square().sum().backward()
    assert b.grad is not None
    return b.grad


def _adamw(bits: int) -> torch.Tensor:
    layer = SparseDeltaLinear.from_linear(_linear(), density=0.05, resident=True)
    optimizer = SparseAdamW([layer.delta_values], lr=1e-2, state_bits=bits)
    for _ in range(2):
        optimizer.zero_grad()
        layer(_x()).square().mean().backward()
        optimizer.step()
    return layer.weight.detach()


def _columns() -> torch.Tensor:
    pattern = F.SparsePattern.from_columns([1, 5], shape=(32, 64))
    return F.sparse_delta_linear(_x(), _linear().weight, pattern, torch.ones(pattern.count, **CPU))


CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "lora": lambda: _lora(_linear().weight),
    "lora on 4 bits": lambda: _lora(F.nf4_quantize(_linear().weight)),
    "lora on fp4": lambda: _lora(F.nf4_quantize(_linear().weight, quant_type="fp4")),
    "lora on int4": lambda: _lora(F.nf4_quantize(_linear().weight, quant_type="int4")),
    "a module": lambda: LoRALinear.from_linear(_linear(), r=4)(_x()).detach(),
    "mixed adapters": _mixed,
    "gated": _gated,
    "columns": _columns,
    "perturbation": lambda: F.perturbation((5,), 3, dtype=torch.float32, device="cpu"),
    "perturb_": lambda: F.perturb_([_linear().weight.data], 3, 1e-3) or torch.zeros(1, **CPU),
    "mezo": lambda: _mezo(False),
    "mezo in flight": lambda: _mezo(True),
    "sparse adamw": lambda: _adamw(32),
    "sparse adamw in 8 bits": lambda: _adamw(8),
}


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    def take() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield take
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_another_default_changes_nothing(name: str, default: Callable[[], None]) -> None:
    expected = CALLS[name]()
    default()
    for table in (nf4.code_table, nf4.nested_code_table):  # what was made before the default changed
        table.cache_clear()
    found = CALLS[name]()
    assert found.dtype == expected.dtype and found.device == expected.device and torch.equal(found, expected)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "shira"])
def test_patched_layers_run_on_the_same_kernels(method: str, default: Callable[[], None]) -> None:
    if method == "shira":
        options = peft.ShiraConfig(r=4, target_modules=["q_proj", "gate_proj"])
        model: nn.Module = peft.get_peft_model(small_models.base("llama"), options)
    else:
        model = small_models.adapted("llama", method, torch.float32)
    expected = peftfast.patch(model)
    assert expected.fused and not expected.stock
    peft_gated_mlp._backend_of.cache_clear()
    default()
    assert peftfast.report(model) == expected
