"""Planted faults in groups of patched layers: each is noticed by the tests of the groups; and what a group must not forget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfast
from peftfast.configs import lora as configs
from peftfast.functional.lora_projections import LoRAProjectionsFunction
from peftfast.integrations import peft_groups
from peftfast.ops import native
from tests import test_patch_groups as real
from tests.support.patched_blocks import Counts, adapted, attention, check_same, inputs, patched_pair, stack_of, step


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Groups run here whether they pay or not, and leave nothing behind."""
    monkeypatch.setattr(configs, "group_pays", lambda *_: True)
    yield
    assert peft_groups.holds_results() == 0


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "seeds of each other": lambda m: _edited(m, 1, lambda seeds: seeds.roll(1)),
    "no mask": lambda m: _edited(m, 1, lambda seeds: None),
    "another rate": lambda m: _edited(m, 2, lambda ps: tuple(p / 2 for p in ps)),
    "scalings of each other": lambda m: _edited(m, 3, lambda s: (*s[1:], s[0])),
    "no bias": lambda m: _edited(m, 4, lambda plain: plain._replace(biases=())),
    "weights of each other": lambda m: _edited(m, 4, lambda plain: plain._replace(weights=_swapped(plain.weights))),
    "a factor of another": lambda m: _edited(m, 6, torch.zeros_like),
    "results of each other": lambda m: _swap_results(m),
}


def _swapped(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors[0], tensors[2], tensors[1]


def _edited(monkeypatch: pytest.MonkeyPatch, at: int, edit: Callable[[Any], Any]) -> None:
    plain = LoRAProjectionsFunction.forward

    def faulty(ctx: Any, *args: Any) -> Any:
        return plain(ctx, *(edit(one) if i == at else one for i, one in enumerate(args)))

    monkeypatch.setattr(LoRAProjectionsFunction, "forward", staticmethod(faulty))


def _swap_results(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LoRAProjectionsFunction.forward
    monkeypatch.setattr(LoRAProjectionsFunction, "forward", staticmethod(lambda *args: _swapped(plain(*args))))


def _pair_differs() -> bool:
    options = {"lora_dropout": 0.4, "alpha_pattern": {"v": 3}}
    grouped, alone = patched_pair(blocks=1, **options)
    try:
        check_same(step(grouped), step(alone))
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_in_the_forward_are_noticed(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault is not None:
        FAULTS[fault](monkeypatch)
    assert _pair_differs() is (fault is not None)


@pytest.mark.parametrize("at", range(8))
def test_planted_faults_in_the_backward_are_noticed(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx, every dA and every dB, wrong in turn, and the rows of dx shifted."""
    plain = LoRAProjectionsFunction.backward
    position = (0, 5, 6, 7, 8, 9, 10, 0)[at]

    def faulty(ctx: Any, *dys: Any) -> Any:
        grads = list(plain(ctx, *dys))
        grads[position] = grads[position].roll(1, 0) if at == 7 else grads[position] * 1.01
        return tuple(grads)

    monkeypatch.setattr(LoRAProjectionsFunction, "backward", staticmethod(faulty))
    assert _pair_differs()


def _always_equal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(peft_groups, name, lambda *_: None)


GUARDS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "state": (
        lambda m: m.setattr(peft_groups, "numbers_of", lambda layer, verdict: ((1.0,), (0.0,))),
        lambda: real.test_state_that_changes("scaling", "between siblings"),
    ),
    "modes": (lambda m: _always_equal(m, "_key_of"), real.test_grad_mode_and_autocast_that_differ_between_siblings),
    "end of the block": (
        lambda m: m.setattr(peft_groups, "_close", lambda scopes, first, failed: None),
        lambda: real.test_nothing_outlives_the_block("qk"),
    ),
    "older than the change": (
        lambda m: m.setattr(peft_groups.Block, "together", lambda self, group, delicate: group.together),
        real.test_a_recomputation_of_a_forward_before_the_groups_were_known,
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_planted_faults_in_the_guards_are_noticed(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = GUARDS[guard]
    plant(monkeypatch)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            check()
    finally:
        peft_groups._local.__dict__.pop("scopes", None)


def test_the_token_of_a_living_graph_holds_a_change_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a checkpoint that is not re-entrant would count other tensors in its recomputation."""
    monkeypatch.setattr(peft_groups._Scope, "mark", lambda self, y: None)
    monkeypatch.setattr(peft_groups.Block, "together", lambda self, group, delicate: group.together)
    model = adapted(blocks=1)
    peftfast.patch(model)
    stack_of(model).reentrant = False
    losses = [model(inputs(seed=seed)).sum() for seed in (1, 2)]
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        (losses[0] + losses[1]).backward()


def test_a_layer_s_result_may_be_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("", "reference"):
        monkeypatch.setenv("PEFTFAST_BACKEND", backend)
        grouped, alone = patched_pair(blocks=1)
        for model in (grouped, alone):
            attention(model).between = lambda x, q: torch.relu_(q)
        check_same(step(grouped), step(alone))


Y = torch.zeros(6, 6)


@pytest.mark.parametrize(
    "call",
    [
        lambda op: op.lora_group_forward(Y, [Y, Y], [], [Y[:2]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [Y[0], Y[0]], [Y[:2]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y[:, :4]], [], [Y[:2]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [], [Y[:2, :4]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [], [Y[:2]], [Y[:5, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [], [Y[:2]], [Y[:, :2]], [Y[0, :5]], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y.half()], [], [Y[:2]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y.T[:5].T, [Y], [], [Y[:2]], [Y[:, :2]], [], None, [0.0], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [], [Y[:2]], [Y[:, :2]], [], torch.zeros(2).long(), [0.5], [1.0]),
        lambda op: op.lora_group_forward(Y, [Y], [], [Y[:2]], [Y[:, :2]], [], None, [1.5], [1.0]),
        lambda op: op.lora_group_forward(Y, [], [], [], [], [], None, [], []),
        lambda op: _backward(op, dys=[Y, Y]),
        lambda op: _backward(op, dys=[Y[:, :5].contiguous()]),
        lambda op: _backward(op, dx=Y[:5]),
        lambda op: _backward(op, x=Y[:5]),
        lambda op: _backward(op, x=None),
        lambda op: _backward(op, s=None),
        lambda op: _backward(op, s=Y[:, :3]),
        lambda op: _backward(op, a=[]),
        lambda op: _backward(op, scalings=[]),
    ],
)
def test_the_joined_operators_refuse_what_does_not_fit(call: Callable[[Any], Any]) -> None:
    available, reason = native.cpu_available()
    if not available:
        pytest.skip(reason)
    assert len(_backward(torch.ops.peftfast_cpu)) == 2
    with pytest.raises(RuntimeError):
        call(torch.ops.peftfast_cpu)


def _backward(op: Any, **changed: Any) -> list[Tensor]:
    given = {"dys": [Y], "dx": Y.clone(), "x": Y, "a": [Y[:2]], "b": [Y[:, :2]], "s": Y[:, :2], "seeds": None}
    given |= {"ps": [0.0], "scalings": [1.0], "needs_a": True, "needs_b": True, "a_dtype": torch.float32} | changed
    return op.lora_group_backward(*given.values())
