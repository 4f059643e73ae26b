"""What may change at a patched layer between two calls without a word to it: results stay those of stock PEFT."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules import module as hooks

import peftfast
from peftfast.configs import gated_activation as gated_configs
from peftfast.configs import lora as lora_configs
from peftfast.integrations.peft_call import VERDICT

K = 72  # DoRA keeps the norms of rows longer than 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(x) + self.q(x)


def adapter(seed: int = 0, **options: Any) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(**{"r": 4, "target_modules": ["q", "v"], "init_lora_weights": False, **options})


def make(patched: bool, **options: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(Net(), adapter(**options))
    if patched:
        peftfast.patch(model)
        model(some_x())  # remembered from here on
        model(some_x())
    return model


def some_x() -> Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(2))


def layer(model: Any) -> Any:
    return model.base_model.model.q


@pytest.fixture(autouse=True, params=[False, True], ids=["alone", "grouped"])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph behind x, as a model's layers have it, so that siblings may run together."""
    monkeypatch.setattr(lora_configs, "group_pays", lambda *_: request.param)
    monkeypatch.setattr(gated_configs, "gated_pays", lambda *_: request.param)


def check(run: Callable[[Any], Any], **options: Any) -> None:
    """The same values and gradients from a patched model and from a stock one, once for x alone and once for one with a graph."""
    expected, actual = (run(make(patched, **options)) for patched in (False, True))
    for one, other in zip(expected, actual, strict=True):
        assert one is None and other is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5), (one, other)


def results(model: Any, x: Tensor | None = None) -> list[Tensor | None]:
    x = (some_x() if x is None else x).requires_grad_()
    model.zero_grad()
    y = model(x * 1.0)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("way", ["loaded again", "named first"])
def test_an_adapter_that_comes_after_its_name(way: str) -> None:
    """PEFT goes on without an adapter that a layer does not have, until it has it."""

    def run(model: Any) -> list[Tensor | None]:
        if way == "loaded again":
            model.add_adapter("b", adapter(3, target_modules=["v"]))
            model.base_model.set_adapter(["default", "b"])
            results(model)
            model.delete_adapter("b")
        else:
            model.base_model.set_adapter(["default", "b"])
            results(model)
        model.add_adapter("b", adapter(4))
        model.base_model.set_adapter(["default", "b"])
        return results(model)

    check(run)


@pytest.mark.parametrize("part", ["base", "lora_A"])
def test_a_weight_that_is_no_parameter(part: str) -> None:
    """FSDP1's views and what a hypernetwork makes are another tensor at each call."""

    def run(model: Any) -> list[Tensor | None]:
        module = layer(model).base_layer if part == "base" else layer(model).lora_A["default"]
        maker = nn.Parameter(module.weight.detach().clone())
        del module._parameters["weight"]
        found: list[Tensor | None] = []
        for factor in (1.0, 2.0, 3.0):
            with torch.set_grad_enabled(factor > 1.0):  # the first call may have been an evaluation
                module.weight = maker * factor
                y = model(some_x())
            if factor > 1.0:
                y.sum().backward()
            found += [y.detach(), None if maker.grad is None else maker.grad.clone()]
        return found

    check(run)


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_on_all_modules() -> None:
    def twice(module: nn.Module, _: Any, y: Tensor) -> Tensor | None:
        return y * 2 if type(module) is nn.Linear else None

    def scaled(module: nn.Module, dx: tuple, _: Any) -> tuple | None:
        return tuple(None if d is None else d * 2 for d in dx) if type(module) is nn.Linear else None

    def run(model: Any) -> list[Tensor | None]:
        found = []
        for register, hook in (
            (hooks.register_module_forward_hook, twice),
            (hooks.register_module_full_backward_hook, scaled),
        ):
            with hooked(register, hook):
                found += results(model)
        return found + results(model)

    check(run)
    model = make(True)
    with hooked(hooks.register_module_forward_hook, twice):
        assert {one.reason for one in peftfast.report(model).layers} == {"a hook on all modules"}


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("part", ["base", "lora_A"])
def test_a_class_that_is_exchanged(part: str) -> None:
    def run(model: Any) -> list[Tensor | None]:
        (layer(model).base_layer if part == "base" else layer(model).lora_A["default"]).__class__ = Twice
        return results(model)

    check(run)


class Scaled(Tensor):
    """Computes what it likes in F.linear."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 3 if func is functional.linear else made


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, K), torch.ones(5, K)], layout=layout)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "a subclass": lambda: some_x().as_subclass(Scaled),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "sparse": lambda: torch.eye(K).to_sparse(),
    "compressed": lambda: torch.eye(K).to_sparse_csr(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_is_no_plain_tensor(name: str) -> None:
    def run(model: Any) -> list[Tensor]:
        y = layer(model)(INPUTS[name]())
        return list(y.unbind()) if y.is_nested else [y]

    check(run)


@pytest.mark.parametrize("shape", [(3, K + 1), ()], ids=str)
def test_an_input_of_another_width_fails_as_in_peft(shape: tuple[int, ...]) -> None:
    kinds = []
    for patched in (False, True):
        with pytest.raises(Exception) as error:  # noqa: PT011
            layer(make(patched))(torch.ones(shape))
        kinds.append((error.type, str(error.value)))
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("way", ["olora", "merged", "merged and patched again"])
def test_norms_of_a_weight_that_peft_writes(way: str) -> None:
    """Behind its version counter: when it merges, and when it takes an adapter's start out of the weight."""

    def run(model: Any) -> list[Tensor | None]:
        results(model)
        if way == "olora":
            model.add_adapter("new", adapter(3, init_lora_weights="olora"))
            model.set_adapter("default")
            return results(model)
        patched = VERDICT in layer(model).__dict__
        model.add_adapter("plain", adapter(3, lora_alpha=8))
        if way != "merged":
            peftfast.unpatch(model)
        base = model.merge_and_unload(adapter_names=["plain"])
        again: Any = get_peft_model(base, adapter(4, use_dora=True))
        if patched:
            peftfast.patch(again)
        return results(again)

    check(run, use_dora=True)


@pytest.mark.parametrize("use_dora", [False, True])
def test_parameters_that_are_swapped(use_dora: bool) -> None:
    """torch swaps a parameter's tensor only where nothing refers to it weakly; patch keeps norms of DoRA's weight."""

    def run(model: Any) -> list[Tensor | None]:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            found = results(model)
            model.double()
            model.float()
            found += results(model)
            state = {name: value * 1.5 for name, value in model.state_dict().items()}
            for assign in (False, True):
                model.load_state_dict(state, assign=assign)
                found += results(model)
            return found
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    check(run, use_dora=use_dora)
