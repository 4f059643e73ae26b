"""Groups of patched layers: found by what they receive, equal to the layers alone, and never kept a moment too long."""

import copy
import gc
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.configs import lora as configs
from peftfast.functional import lora
from peftfast.integrations import peft_call, peft_group_call, peft_groups
from tests.support.counting import Calls
from tests.support.patched_blocks import (
    Attention,
    Counts,
    adapted,
    attention,
    check_same,
    groups_in,
    inputs,
    patched_pair,
    stack_of,
    step,
    waiting,
)
from tests.support.small_models import adapted as small_model
from tests.support.small_models import text_batches
from tests.test_patch import K, relative, stir


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Groups run here whether they pay or not, and leave nothing behind."""
    monkeypatch.setattr(configs, "group_pays", lambda *_: True)
    yield
    assert peft_groups.holds_results() == 0


OPTIONS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"k": 7, "v": 1}, "alpha_pattern": {"v": 3}},
}


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_layers_alone(options: str, four_bit: bool, counts: Counts) -> None:
    grouped, alone = patched_pair(four_bit, **OPTIONS[options])
    expected = step(alone)
    assert counts.during(lambda: check_same(step(grouped), expected, 0.02 if four_bit else 1e-5))[1] == 2
    if not four_bit:
        check_same(step(grouped, seed=8), step(alone, seed=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_forward_is_that_of_the_layers_alone_bit_for_bit(dtype: torch.dtype) -> None:
    """The first forward runs alone and the second together: with one seed they must not differ."""
    model = adapted(lora_dropout=0.2).to(dtype)
    peftfast.patch(model)
    x = inputs().detach().to(dtype).requires_grad_()
    first, second = step(model, x), step(model, x)
    assert len(peftfast.report(model).groups) == 2
    assert torch.equal(first["y"], second["y"])
    check_same(second, first, 1e-5 if dtype == torch.float32 else 0.02)
    third = step(model, x)
    assert all(torch.equal(second[name], third[name]) for name in second)


def test_masks_are_each_projection_s_own() -> None:
    model = adapted(blocks=1, lora_dropout=0.5)
    block = attention(model)
    with torch.no_grad():
        for part in ("lora_A", "lora_B"):
            getattr(block.v, part)["default"].weight.copy_(getattr(block.k, part)["default"].weight)
    block.v.base_layer.load_state_dict(block.k.base_layer.state_dict())
    peftfast.patch(model)
    step(model)
    taken: list[Any] = []
    block.between = lambda x, q: taken.append([y.detach() for y, *_ in waiting()])
    step(model)
    k, v = taken[0]
    assert not torch.equal(k, v)
    model.eval()
    step(model)
    assert torch.equal(*taken[1])


@pytest.mark.parametrize("shape", ["llama", "qwen", "bert"])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_models_of_transformers(shape: str, method: str, counts: Counts) -> None:
    model = small_model(shape, method, torch.float32)
    stir(model)
    twin = copy.deepcopy(model)
    (batch,) = text_batches(shape, 1)

    def run(one: nn.Module) -> dict[str, Tensor]:
        one.zero_grad()
        loss = one(**batch).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}

    peftfast.patch(model)
    run(model)
    expected = run(twin)
    alone, together = counts.during(lambda: check_same(run(model), expected, 2e-4))
    groups = peftfast.report(model).groups
    last = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    if shape == "bert":
        assert last == [("query", "key", "value")] * 2
        # The first block's x needs no gradient.
        assert together == 1
    else:
        assert last == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2
        assert together >= 3
    assert [type(m) for m in twin.modules()] == [
        type(m).__mro__[2] if peft_groups._is_patched(m) or hasattr(type(m), "_peftfast_stock") else type(m)
        for m in model.modules()
    ]
    assert list(model.state_dict()) == list(twin.state_dict())


def _vision(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "vit":
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, hidden_dropout_prob=0.0)
        names = ["query", "key", "value", "q_proj", "k_proj", "v_proj", "dense"]
        return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}, names
    kind = {"mistral": "Mistral", "gemma": "Gemma", "gemma2": "Gemma2"}[name]
    config = getattr(transformers, f"{kind}Config")(
        **sizes, vocab_size=64, num_key_value_heads=2, head_dim=16, pad_token_id=0
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model, {"input_ids": torch.randint(0, 64, (2, 9))}, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("name", ["mistral", "gemma", "gemma2", "vit"])
def test_blocks_of_other_shapes(name: str, counts: Counts) -> None:
    base, batch, names = _vision(name)
    present = [one for one in names if any(n.endswith(one) for n, _ in base.named_modules())]
    model = stir(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=present)))
    expected = model(**batch)[0]
    peftfast.patch(model)
    model(**batch)
    found = []
    assert counts.during(lambda: found.append(model(**batch)[0]))[1] >= 1
    assert relative(found[0], expected) < 1e-5
    assert len(peftfast.report(model).groups) == (2 if name == "vit" else 4)


def test_generate_with_a_cache_gives_stock_s_tokens(counts: Counts) -> None:
    model = stir(small_model("llama", "lora", torch.float32)).eval()
    prompt = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options)
    peftfast.patch(model)
    together = counts.during(lambda: model.generate(input_ids=prompt, **options))[1]
    assert together >= 4 * 6
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("noisy", [False, True])
def test_checkpointing(reentrant: bool, noisy: bool, counts: Counts) -> None:
    """Masks and results of the recomputed forward are those of the first, in the very first step, and when two forwards come before
    their backward passes: also where something else draws random numbers between two siblings."""
    grouped, alone = adapted(lora_dropout=0.4), adapted(lora_dropout=0.4)
    peftfast.patch(grouped)
    peftfast.patch(alone, groups=False)
    stack_of(grouped).reentrant = reentrant

    def noise(x: Tensor, q: Tensor) -> None:
        torch.rand(3)

    for model in (grouped, alone):
        for block in stack_of(model).blocks:
            block.between = noise if noisy else block.between

    def two(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        xs = [inputs(seed=seed) for seed in (1, 2)]
        losses = []
        for i, x in enumerate(xs):
            torch.manual_seed(20 + i)
            losses.append(model(x).square().mean())
        (losses[0] + 2 * losses[1]).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"x0": xs[0].grad, "x1": xs[1].grad, "loss": losses[0].detach()} | grads

    if not noisy:
        check_same(two(grouped), two(alone))
        check_same(two(grouped), two(alone))
    for _ in range(3):
        found = two(grouped)
    assert counts.during(lambda: two(grouped))[1] == 2 * 2 * 2
    # What the forward drew, the recomputation draws: the gradients are those without checkpointing.
    stack_of(grouped).reentrant = None
    check_same(found, two(grouped))


def test_a_recomputation_of_a_forward_before_the_groups_were_known() -> None:
    """Re-entrant, with dropout, and something that draws between two siblings: the first forward ran alone, the second together, and
    both are computed anew in one backward pass. Each must find its own masks."""
    model = adapted(blocks=1, lora_dropout=0.5)
    peftfast.patch(model)
    stack_of(model).reentrant = True
    attention(model).between = lambda x, q: torch.rand(5)
    drawn: list[Tensor] = []
    plain = lora.draw_seed

    def recorded(x: Tensor, count: int = 1) -> Tensor:
        seeds = plain(x, count)
        drawn.extend(seeds)
        return seeds

    with pytest.MonkeyPatch.context() as patch:
        for module in (lora, peft_call, peft_group_call):
            patch.setattr(module, "draw_seed", recorded)
        xs = [inputs(seed=1), inputs(seed=2)]
        losses = [model(x).sum() for x in xs]
        first, second = drawn[:4], drawn[4:8]
        drawn.clear()
        (losses[0] + losses[1]).backward()
    again = [int(seed) for seed in drawn]
    assert len(groups_in(model)) == 1 and groups_in(model)[0].together
    assert again == [int(seed) for seed in (*second, *first)]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_loss_that_is_kept_through_the_next_forward(reentrant: bool | None, counts: Counts) -> None:
    """As in most training loops: the variable holds the last step's loss, and with it a graph that is spent, while the next is made."""
    grouped, alone = adapted(), adapted()
    peftfast.patch(grouped)
    peftfast.patch(alone, groups=False)
    stack_of(grouped).reentrant = stack_of(alone).reentrant = reentrant
    kept = {}

    def train(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        kept[model] = model(inputs()).square().mean()
        kept[model].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for expected_together in (0, 2, 2):
        found: list[dict[str, Tensor]] = []
        together = counts.during(lambda found=found: found.append(train(grouped)))[1]
        assert together == expected_together * (1 if reentrant is None else 2)
        check_same(found[0], train(alone))


def test_a_retained_graph_is_computed_anew_as_it_was_made(counts: Counts) -> None:
    """A checkpointed forward from before the groups were known, computed anew twice, the second time after another forward."""
    model, alone = adapted(), adapted()
    peftfast.patch(model)
    peftfast.patch(alone, groups=False)
    found = []
    for one in (model, alone):
        stack_of(one).reentrant = False
        loss = one(inputs()).square().mean()
        loss.backward(retain_graph=True)
        between = counts.during(lambda one=one: one(inputs(seed=6)).square().mean().backward())
        assert between[1] == 0
        loss.backward()
        found.append({n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None})
        again = counts.during(lambda one=one: one(inputs()).sum().backward())
        assert again[1] == (4 if one is model else 0)
    check_same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_model(reentrant: bool) -> None:
    model, twin = (small_model("llama", "lora", torch.float32) for _ in range(2))
    for one in (model, twin):
        stir(one)
        one.enable_input_require_grads()
    peftfast.patch(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    for batch in text_batches("llama", 3):
        losses = []
        for one in (model, twin):
            one.zero_grad()
            loss = one(**batch).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                assert relative(p.grad, q.grad) < 1e-4, name


def test_x_changed_in_place_between_siblings(counts: Counts) -> None:
    grouped, alone = patched_pair(blocks=1)

    def change(x: Tensor, q: Tensor) -> None:
        with torch.no_grad():
            x.add_(1.0)

    for model in (grouped, alone):
        attention(model).between = change
    with torch.no_grad():
        expected = alone(inputs())
        found = []
        ran = counts.during(lambda: found.append(grouped(inputs())))
        assert torch.equal(found[0], expected)
    assert ran[1] == 1 and ran[0] >= 3


def test_x_changed_behind_another_view() -> None:
    grouped, alone = patched_pair(blocks=1)
    for model in (grouped, alone):
        attention(model).between = lambda x, q: x.view(-1)[:5].zero_()
    with torch.no_grad():
        assert torch.equal(grouped(inputs()), alone(inputs()))


@pytest.mark.parametrize("order", ["kvq", "vqk", "qk", "kq", "qkvv", "qq", "qqkv", "q"])
def test_other_orders_and_counts(order: str) -> None:
    grouped, alone = patched_pair(blocks=1)
    for model in (grouped, alone):
        attention(model).order = order
    for _ in range(5):  # a result that nobody takes, again and again: the group gives up, and stays right
        check_same(step(grouped), step(alone))


def test_a_result_that_nobody_takes_has_no_gradient_and_ends_the_group(counts: Counts) -> None:
    grouped, _ = patched_pair(blocks=1)
    attention(grouped).order = "qk"
    found = step(grouped)
    assert not any(".v." in name for name in found)
    for _ in range(3):
        step(grouped)
    assert counts.during(lambda: step(grouped)) == (3, 0)
    assert not peftfast.report(grouped).groups


def test_cross_attention_runs_alone(counts: Counts) -> None:
    grouped, alone = patched_pair(blocks=1)
    other = inputs(seed=9).detach()
    for model in (grouped, alone):
        attention(model).other = other
    check_same(step(grouped), step(alone))
    for model in (grouped, alone):
        attention(model).other = None
    check_same(step(grouped), step(alone))
    fresh = adapted(blocks=1)
    attention(fresh).other = inputs(seed=9)
    peftfast.patch(fresh)
    step(fresh)
    assert peftfast.report(fresh).groups == [("base_model.model.blocks.0.k", "base_model.model.blocks.0.v")]


def changes() -> dict[str, Callable[[Attention], Any]]:
    def scaling(block: Attention) -> None:
        block.k.scaling["default"] *= 2

    def weight(block: Attention) -> None:
        with torch.no_grad():
            block.k.lora_B["default"].weight.mul_(2)

    def replaced(block: Attention) -> None:
        old = block.k.lora_A["default"].weight
        block.k.lora_A["default"].weight = nn.Parameter(old.detach() * 3)

    def moved(block: Attention) -> None:
        block.k.lora_A["default"].weight.data = block.k.lora_A["default"].weight.data.clone() * 3

    return {
        "scaling": scaling,
        "a weight in place": weight,
        "a parameter replaced": replaced,
        "a parameter's storage": moved,
        "dropout": lambda block: setattr(block.k.lora_dropout["default"], "p", 1.0),
        "disabled": lambda block: block.k.enable_adapters(False),
        "merged": lambda block: block.k.merge(),
        "frozen": lambda block: block.k.lora_A["default"].weight.requires_grad_(False),
        "hooked inside": lambda block: block.k.lora_A["default"].register_forward_hook(lambda m, a, y: y * 2),
        "another adapter": lambda block: block.k.set_adapter(["second"]),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("when", ["between siblings", "between calls"])
def test_state_that_changes(change: str, when: str) -> None:
    dropout = {"lora_dropout": 1e-9} if change == "dropout" else {}  # PEFT has an Identity for none
    found = []
    for groups in (True, False):
        model = adapted(blocks=1, **dropout)
        model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k", "v", "o"]))
        stir(model)
        peftfast.patch(model, groups=groups)
        step(model)
        block = attention(model)
        done: list[int] = []

        def act(x: Tensor, q: Tensor, block: Attention = block, done: list[int] = done) -> None:
            if not done:
                done.append(1)
                changes()[change](block)

        if when == "between siblings" and change != "a weight in place":
            block.between = act
        else:
            act(inputs(), inputs())
        found.append(step(model))
        found.append(step(model))
    check_same(found[0], found[2])
    check_same(found[1], found[3])


def test_a_sibling_on_another_stream_runs_alone(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has been told to make its result by the stream of the first, for which nobody has told the other to wait."""
    grouped, alone = patched_pair(blocks=1)
    stream = [0]
    monkeypatch.setattr(peft_groups, "_stream_of", lambda x: stream[0])
    expected = step(alone)
    assert counts.during(lambda: check_same(step(grouped), expected)) == (1, 1)
    attention(grouped).between = lambda x, q: stream.__setitem__(0, 7)
    assert counts.during(lambda: check_same(step(grouped), expected)) == (3, 1)  # k, v and o
    stream[0] = 0
    attention(grouped).between = lambda x, q: None
    assert counts.during(lambda: check_same(step(grouped), expected)) == (1, 1)


def test_a_weight_that_changes_between_siblings_is_refused_by_autograd() -> None:
    """Without gradients it is seen and k runs alone; with them the node of all three holds the old weight, and autograd says so."""
    results = []
    for groups in (True, False):
        model = adapted(blocks=1)
        peftfast.patch(model, groups=groups)
        step(model)
        block = attention(model)
        block.between = _doubled(block)
        with torch.no_grad():
            results.append(model(inputs()))
        if groups:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                step(model)
    assert torch.equal(*results)


def _doubled(block: Attention) -> Callable[[Tensor, Tensor], Any]:
    def act(x: Tensor, q: Tensor) -> None:
        with torch.no_grad():
            block.k.lora_B["default"].weight.mul_(2)

    return act


def test_grad_mode_and_autocast_that_differ_between_siblings() -> None:
    for manager in (torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        results = []
        for groups in (True, False):
            model = adapted(blocks=1)
            peftfast.patch(model, groups=groups)
            step(model)
            block = attention(model)
            stock = type(block).forward

            def forward(self: Attention, x: Tensor, manager: Any = manager) -> Tensor:
                x = torch.tanh(x)
                q = self.q(x)
                with manager():
                    k = self.k(x)
                return self.o(torch.tanh(k).float() * torch.sigmoid(self.v(x))) + q

            try:
                type(block).forward = forward
                results.append(step(model))
            finally:
                type(block).forward = stock
        check_same(*results)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}])
def test_autocast(options: dict, counts: Counts) -> None:
    grouped, alone = patched_pair(blocks=1, **options)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(alone)
        found: list[dict[str, Tensor]] = []
        assert counts.during(lambda: found.append(step(grouped)))[1] == 1
    check_same(found[0], expected, 0.02)
    assert found[0]["y"].dtype == expected["y"].dtype


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_input_that_no_layer_takes_is_not_given_to_the_group(four_bit: bool, counts: Counts) -> None:
    """Of another dtype than dense weights: stock's own error. To a 4-bit layer it is as good as any."""
    model = adapted(four_bit, blocks=1)
    peftfast.patch(model)
    step(model)
    assert counts.during(lambda: step(model))[1] == 1
    x = inputs().bfloat16()
    if four_bit:
        assert counts.during(lambda: model(x))[1] == 1
        return
    with pytest.raises(RuntimeError) as ours:
        model(x)
    peftfast.unpatch(model)
    with pytest.raises(RuntimeError) as stock:
        model(x)
    assert str(ours.value) == str(stock.value)
    peftfast.patch(model)
    step(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert counts.during(lambda: model(x))[1] == 1


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_hooked_sibling_runs_alone_and_its_hook_is_called(kind: str, counts: Counts) -> None:
    grouped, _ = patched_pair(blocks=1)
    called: list[int] = []
    layer = attention(grouped).k
    register = {
        "forward": lambda: layer.register_forward_hook(lambda *a: called.append(1)),
        "pre": lambda: layer.register_forward_pre_hook(lambda *a: called.append(1)),
        "backward": lambda: layer.register_full_backward_hook(lambda *a: called.append(1)),
    }
    handle = register[kind]()
    assert counts.during(lambda: step(grouped))[1] == 0 and called
    handle.remove()
    assert counts.during(lambda: step(grouped))[1] == 1


def test_frozen_sibling() -> None:
    results = []
    for groups in (True, False):
        model = adapted(blocks=1)
        for part in (attention(model).k.lora_A, attention(model).k.lora_B, attention(model).v.lora_A):
            part["default"].weight.requires_grad_(False)
        peftfast.patch(model, groups=groups)
        step(model)
        results.append(step(model))
    check_same(*results)


def test_an_exception_leaves_nothing() -> None:
    grouped, alone = patched_pair(blocks=1)
    alive: list[Any] = []

    def fail(x: Tensor, q: Tensor) -> None:
        alive.append(weakref.ref(x))
        alive.extend(weakref.ref(y) for y, *_ in waiting())
        raise KeyError("on the way")

    attention(grouped).between = fail
    with pytest.raises(KeyError):
        grouped(inputs())
    gc.collect()
    assert len(alive) == 3 and all(ref() is None for ref in alive)
    assert peft_groups.holds_results() == 0
    attention(grouped).between = lambda x, q: None
    check_same(step(grouped), step(alone))
    assert peftfast.report(grouped).groups


def test_an_interrupt_leaves_nothing_after_the_next_forward() -> None:
    """torch calls no hook for what is not an Exception."""
    grouped, alone = patched_pair(blocks=1)

    def interrupt(x: Tensor, q: Tensor) -> None:
        raise KeyboardInterrupt

    attention(grouped).between = interrupt
    with pytest.raises(KeyboardInterrupt):
        grouped(inputs())
    attention(grouped).between = lambda x, q: None
    check_same(step(grouped), step(alone))
    assert not peft_groups._local.scopes


@pytest.mark.parametrize("order", ["qkv", "qk"])
def test_nothing_outlives_the_block(order: str) -> None:
    grouped, _ = patched_pair(blocks=1)
    attention(grouped).order = order
    seen: list[Any] = []

    def remember(x: Tensor, q: Tensor) -> None:
        seen.append(weakref.ref(x))
        seen.extend(weakref.ref(y) for y, *_ in waiting())
        assert len(waiting()) == 2

    attention(grouped).between = remember
    with torch.no_grad():
        grouped(inputs())
    assert len(seen) == 3 and all(ref() is None for ref in seen)
    assert peft_groups.holds_results() == 0


def test_saved_bytes_are_no_more_than_alone() -> None:
    from tests.support.counting import saved_tensors, storages

    grouped, alone = patched_pair(blocks=1, lora_dropout=0.1)
    held = []
    for model in (grouped, alone):
        with saved_tensors() as saved:
            model(inputs())
        held.append(sum(storages(saved).values()))
    assert held[0] <= held[1]


def test_a_block_that_calls_itself() -> None:
    results = []
    for groups in (True, False):
        model = adapted(blocks=1)
        peftfast.patch(model, groups=groups)
        step(model)
        block = attention(model)
        inner: list[Tensor] = []

        def again(x: Tensor, q: Tensor, block: Attention = block, inner: list[Tensor] = inner) -> None:
            if not inner:
                inner.append(x)
                inner[0] = block(x)

        block.between = again
        results.append(step(model) | {"inner": inner[0].detach()})
    check_same(*results)


def test_threads() -> None:
    grouped, alone = patched_pair()
    expected = {seed: alone(inputs(seed=seed)).detach() for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            if not torch.equal(grouped(inputs(seed=seed)), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_heads_on_features_that_need_no_gradient_keep_a_graph_each() -> None:
    """One node for both could be run backward once."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, 3), nn.Linear(K, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = stir(peft.get_peft_model(Heads(), peft.LoraConfig(r=2, target_modules=["a", "b"])))
    peftfast.patch(model)
    for _ in range(3):
        one, two = model(torch.randn(5, K))
        one.sum().backward()
        two.sum().backward()
    with torch.no_grad():
        model(torch.randn(5, K))
    assert peftfast.report(model).groups


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stand_for_themselves(how: str, counts: Counts) -> None:
    grouped, alone = patched_pair()
    twin = copy.deepcopy(grouped) if how == "deepcopy" else None
    if twin is None:
        attention(grouped).between = attention(grouped, 1).between = None
        for block in stack_of(grouped).blocks:
            block.__dict__.pop("between")
        twin = pickle.loads(pickle.dumps(grouped))
        for block in (*stack_of(grouped).blocks, *stack_of(twin).blocks):
            block.between = lambda x, q: None
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        for parameter in alone.parameters():
            parameter.mul_(0.5)
    for _ in range(2):
        check_same(step(twin), step(alone))
    assert counts.during(lambda: step(twin))[1] == 2
    assert counts.during(lambda: step(grouped))[1] == 2


def test_unpatch_and_groups_off_take_everything_back() -> None:
    model = adapted()
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    peftfast.patch(model)
    step(model)
    assert any((len(m._forward_hooks), len(m._forward_pre_hooks)) != (0, 0) for m in model.modules())
    peftfast.patch(model)
    assert max(len(m._forward_hooks) for m in model.modules()) == 1
    assert peftfast.report(model).groups
    peftfast.patch(model, groups=False)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not peftfast.report(model).groups
    peftfast.patch(model)
    peftfast.unpatch(model)
    assert [set(one) for one in before] == [set(module.__dict__) for module in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not any(module._forward_hooks_always_called for module in model.modules())


@pytest.mark.parametrize("first", ["disabled", "merged", "inference"])
def test_forwards_that_show_no_groups_are_not_counted(first: str) -> None:
    """As of a reference or an evaluation before the training."""
    model = small_model("llama", "lora", torch.float32)
    (batch,) = text_batches("llama", 1)
    peftfast.patch(model)
    if first == "merged":
        model.merge_adapter()
    with (
        model.disable_adapter() if first == "disabled" else torch.inference_mode(first == "inference"),
        torch.no_grad(),
    ):
        for _ in range(6):
            model(**batch)
    if first == "merged":
        model.unmerge_adapter()
    assert not peftfast.report(model).groups
    model(**batch)
    last = [tuple(name.rpartition(".")[2] for name in group) for group in peftfast.report(model).groups]
    assert last == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2


def test_the_report_names_thegroups_in() -> None:
    model = adapted()
    report = peftfast.patch(model)
    assert not report.groups
    step(model)
    report = peftfast.report(model)
    prefix = "base_model.model.blocks"
    assert report.groups == [tuple(f"{prefix}.{i}.{name}" for name in "qkv") for i in range(2)]
    assert "in a group with k and v" in str(report)
    assert report.to_dict()["groups"] == [list(group) for group in report.groups]


def test_fullgraph_compile_traces_the_layers_alone(counts: Counts) -> None:
    grouped, alone = patched_pair(blocks=1)
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    x = inputs()
    y = compiled(x)
    assert relative(y, alone(x)) < 1e-5
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(alone(x).square().sum(), x)
    assert relative(found, expected) < 1e-5


def test_inference_mode_runs_alone(counts: Counts) -> None:
    grouped, alone = patched_pair(blocks=1)
    with torch.inference_mode():
        x = inputs().detach()
        assert counts.during(lambda: grouped(x))[1] == 0
        assert torch.equal(grouped(x), alone(x))


def test_a_switch_while_another_thread_s_group_is_about_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a group is of one state of its adapters at a time, and a call runs on the state that it asked for."""
    grouped, _ = patched_pair(blocks=1, lora_alpha=2)
    grouped.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q", "k", "v"]))
    stir(grouped)
    own = attention(grouped)
    layers, x = (own.q, own.k, own.v), inputs()

    def run() -> Tensor:
        with torch.no_grad():
            return grouped(x)

    def switch(name: str) -> None:
        for layer in layers:
            layer.set_adapter(name)

    with torch.no_grad():
        source = torch.tanh(x)
        expected = own.q(source)
    found: list[Tensor] = []
    own.between = lambda x, q: found.append(q)

    def switched(*_: Any) -> bool:
        monkeypatch.setattr(configs, "group_pays", lambda *_: True)
        switch("second")
        other = threading.Thread(target=run)
        other.start()
        other.join()
        return True

    run()
    monkeypatch.setattr(configs, "group_pays", switched)
    found.clear()
    run()
    assert len(found) == 2
    assert relative(found[1], expected) < 1e-5 and relative(found[0], expected) > 0.1


def test_groups_that_another_thread_finds_meanwhile() -> None:
    block = peft_groups.Block(attention(adapted()))
    failed: list[BaseException] = []
    until, switch = time.monotonic() + 0.3, sys.getswitchinterval()

    def work() -> None:
        try:
            while time.monotonic() < until:
                block.distinct()
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            for key in range(30):
                block.groups[key] = object()  # type: ignore[assignment]
            block.groups.clear()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failed


def test_few_rows_on_4_bits_run_alone(counts: Counts) -> None:
    """They decode the packed bytes on the way, which a group does not."""
    grouped, _ = patched_pair(True, blocks=1)
    with torch.no_grad():
        assert counts.during(lambda: grouped(torch.randn(2, 3, K)))[1] == 0
        assert counts.during(lambda: grouped(torch.randn(2, 30, K)))[1] == 1


def test_where_it_does_not_pay_the_layers_run_alone(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(configs, "group_pays", lambda *given: asked.append(given) or False)
    grouped, alone = patched_pair(blocks=1, lora_dropout=0.2)
    expected = step(alone)
    assert counts.during(lambda: check_same(step(grouped), expected))[1] == 0
    assert set(asked) == {("cpu", 66, True, (4, 4, 4))}


@pytest.mark.parametrize("ps", [(0.1, 0.1, 0.1), (0.1, 0.0, 0.3), (0.0, 0.0, 0.2)])
def test_a_groups_seeds_are_one_launch_on_a_gpu(ps: tuple[float, ...]) -> None:
    """Whatever device is not a CPU: the masks of a group come from one draw, and nothing is filled or copied for them."""
    with Calls() as calls:
        seeds = peft_group_call._seeds(torch.empty(2, 3, device="meta"), ps)
    assert seeds is not None and seeds.shape == (3,) and calls.compute == {"randint": 1}


@pytest.mark.parametrize("ps", [(0.1, 0.1, 0.1), (0.1, 0.0, 0.3), (0.0, 0.0, 0.0)])
def test_a_groups_seeds_are_its_layers_on_a_cpu(ps: tuple[float, ...]) -> None:
    x = torch.empty(2, 3)
    torch.manual_seed(3)
    with torch.device("meta"):
        seeds = peft_group_call._seeds(x, ps)
    after = torch.rand(1)
    torch.manual_seed(3)
    own = [lora.draw_seed(x) if p else torch.zeros(1, dtype=torch.int64) for p in ps]
    assert torch.equal(torch.rand(1), after)
    assert seeds is None if not any(ps) else torch.equal(seeds, torch.cat(own))
