"""Gated MLPs under patch: equal to stock, keeping gate and up alone, reversible, and said in the report."""

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

import peftfast
from peftfast.configs import gated_activation as configs
from peftfast.integrations import peft_gated_mlp
from tests.support.counting import saved_tensors, storages
from tests.support.gated_blocks import (
    MLP,
    ROWS,
    ByFunction,
    ByProduct,
    Counts,
    N,
    UpFirst,
    adapted,
    block_of,
    check_same,
    inputs,
    pair,
    step,
)
from tests.support.small_models import adapted as small_model
from tests.support.small_models import text_batches
from tests.test_patch import relative, stir


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(autouse=True)
def every_product_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "gated_pays", lambda *_: True)


ACTS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": ACT2FN["gelu_pytorch_tanh"], "relu": nn.ReLU()}
OPTIONS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "ranks": {"rank_pattern": {"down": 7}, "alpha_pattern": {"down": 3}},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_layers_one_after_the_other(options: str, four_bit: bool, counts: Counts) -> None:
    ours, theirs = pair(four_bit=four_bit, **OPTIONS[options])
    expected = step(theirs)
    assert counts.during(lambda: check_same(step(ours), expected, 0.01 if four_bit else 1e-5)) == (2, 0)
    check_same(step(ours, seed=8), step(theirs, seed=8), 0.01 if four_bit else 1e-5)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", [MLP, UpFirst])
def test_equals_stock(kind: type, act: str, counts: Counts) -> None:
    """PEFT's own forward and gradients, in float32 to 1e-5."""
    model = adapted(kind, ACTS[act])
    expected = step(model)
    peftfast.patch(model)
    assert counts.during(lambda: check_same(step(model), expected)) == (2, 0)


@pytest.mark.parametrize("kind", [ByFunction, ByProduct])
def test_an_activation_that_is_called_as_a_function(
    kind: type, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(kind)
    expected = step(model)
    peftfast.patch(model)
    assert counts.during(lambda: check_same(step(model), expected)) == (2, 0)
    for name in ("silu", "gelu"):
        monkeypatch.setattr(functional, name, lambda x, **_: torch.tanh(x))
    found: list[Any] = []
    assert counts.during(lambda: found.append(step(model))) == (0, 0)
    peftfast.unpatch(model)
    check_same(found[0], step(model))


TARGETS = {
    "down": (2, 0),
    "gate": (0, 2),
    "gate up": (0, 2),
    "up down": (2, 0),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_on_some_layers(targets: str, counts: Counts) -> None:
    model = adapted(targets=targets)
    expected = step(model)
    peftfast.patch(model)
    assert counts.during(lambda: check_same(step(model), expected)) == TARGETS[targets]


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma", "Gemma2", "Mistral"])
@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj", "down_proj", "q_proj"], ["down_proj"], ["gate_proj", "up_proj"]], ids=str
)
def test_models_equal_stock(name: str, targets: list[str], counts: Counts) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        pad_token_id=0,
    )
    base = getattr(transformers, f"{name}ForCausalLM")(config)
    model = stir(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))).train()
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(1))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, keys, text = run(), list(model.state_dict()), repr(model)
    report = peftfast.patch(model)
    whole = "down_proj" in targets
    assert [row.activation for row in report.mlps] == ["gelu_tanh" if "Gemma" in name else "silu"] * 2
    assert all(row.fused and bool(row.kept) is not whole for row in report.mlps)
    assert counts.during(lambda: check_same(run(), expected)) == ((2, 0) if whole else (0, 2))
    assert list(model.state_dict()) == keys and repr(model) == text


def test_bfloat16_is_no_further_from_float32_than_stock() -> None:
    wide = adapted(act=nn.GELU())
    exact = step(wide)
    found = {}
    for name in ("stock", "patched"):
        model = adapted(act=nn.GELU()).to(torch.bfloat16)
        if name == "patched":
            peftfast.patch(model)
        found[name] = step(model, inputs().to(torch.bfloat16))
    for key in exact:
        errors = [relative(found[name][key].float(), exact[key]) for name in ("stock", "patched")]
        assert errors[1] <= 1.1 * errors[0] + 1e-3, key


@pytest.mark.parametrize("four_bit", [False, True])
def test_two_matrices_less_are_kept(four_bit: bool) -> None:
    def kept(model: Any) -> int:
        with saved_tensors() as saved:
            y = model(inputs())
        size = sum(storages(saved).values())
        del y
        return size

    size = 2 * ROWS * N * 4
    for targets, less in (("gate up down", 2), ("gate up", 1), ("down", 2)):
        ours, theirs = pair(targets=targets, four_bit=four_bit)
        assert kept(theirs) - kept(ours) == 2 * less * size, targets


def test_why_the_product_is_kept(counts: Counts) -> None:
    """DoRA and several adapters have a way of their own, behind a product that is fused."""
    model = adapted(use_dora=True)
    expected = step(model)
    report = peftfast.patch(model)
    assert [row.kept for row in report.mlps] == ["DoRA"] * 2 and "the product is kept: DoRA" in str(report)
    assert counts.during(lambda: check_same(step(model), expected, 2e-5)) == (0, 2)
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["gate", "up", "down"]))
    stir(model)
    peftfast.patch(model)
    assert counts.during(lambda: step(model)) == (2, 0)
    model.base_model.set_adapter(["default", "other"])
    assert [row.kept for row in peftfast.report(model).mlps] == ["several adapters"] * 2
    assert counts.during(lambda: step(model)) == (0, 2)
    model.base_model.set_adapter("other")
    assert counts.during(lambda: step(model)) == (2, 0)


def test_what_does_not_pay_runs_stock(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = adapted(targets="gate up")
    peftfast.patch(model)
    again = Counts(monkeypatch)
    assert again.during(lambda: step(model)) == (0, 0)
    assert configs.gated_pays("cpu", 10, True) and not configs.gated_pays("cpu", 10, False)
    assert configs.gated_pays("cuda", 10, True) and configs.gated_pays("cuda", 1 << 20, False)


def test_stock_models_are_stock_again(counts: Counts) -> None:
    model = adapted()
    text, keys, kinds = repr(model), list(model.state_dict()), [type(m) for m in model.modules()]
    expected = step(model)
    peftfast.patch(model)
    assert repr(model) == text and list(model.state_dict()) == keys and type(block_of(model)) is not MLP
    assert isinstance(block_of(model), MLP) and type(block_of(model)).__name__ == "MLP"
    first = type(block_of(model))
    peftfast.patch(model)
    assert type(block_of(model)) is first and type(block_of(model, 1)) is first
    peftfast.patch(model, gated=False)
    assert type(block_of(model)) is MLP
    peftfast.patch(model)
    peftfast.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert counts.during(lambda: check_same(step(model), expected, 0.0 + 1e-12)) == (0, 0)
    assert set(block_of(model).__dict__) == set(MLP().__dict__)


def test_copies_and_pickles_are_patched_models(counts: Counts) -> None:
    model = adapted()
    peftfast.patch(model)
    expected = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model, 0))):
        assert type(block_of(other)) is type(block_of(model))
        assert counts.during(lambda other=other: check_same(step(other), expected)) == (2, 0)
        peftfast.unpatch(other)
        assert type(block_of(other)) is MLP
    one = copy.copy(block_of(model))
    assert type(one) is type(block_of(model)) and one.gate is block_of(model).gate


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("targets", ["gate up down", "gate up"])
def test_checkpointing(reentrant: bool, targets: str) -> None:
    ours, theirs = pair(lora_dropout=0.4, targets=targets)
    plain = step(ours)
    ours.base_model.model.reentrant = theirs.base_model.model.reentrant = reentrant
    for seed in (7, 8, 9):
        check_same(step(ours, seed=seed), step(theirs, seed=seed))
    check_same(step(ours), plain, 1e-6)


def test_generate_gives_stock_s_tokens(counts: Counts) -> None:
    model = stir(small_model("llama", "lora", torch.float32)).eval()
    prompt = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options)
    peftfast.patch(model)
    found: list[Tensor] = []
    assert counts.during(lambda: found.append(model.generate(input_ids=prompt, **options)))[1] >= 16
    assert torch.equal(found[0], expected)


def test_without_gradients_and_in_inference_mode(counts: Counts) -> None:
    ours, theirs = pair()
    x = inputs().detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found: list[Tensor] = []
            assert counts.during(lambda found=found: found.append(ours(x))) == (0, 2)
            assert relative(found[0], theirs(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, counts: Counts) -> None:
    ours, theirs = pair(act=nn.GELU())

    def run(model: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype):
            y = model(inputs())
        model.zero_grad()
        y.float().square().mean().backward()
        return {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = run(theirs)
    found: list[dict[str, Tensor]] = []
    assert counts.during(lambda: found.append(run(ours))) == (2, 0)
    assert {n: t.dtype for n, t in found[0].items()} == {n: t.dtype for n, t in expected.items()}
    check_same(found[0], expected, 0.03)


def test_threads_share_a_model() -> None:
    ours, theirs = pair()
    xs = [inputs(seed) for seed in range(6)]
    expected = [theirs(x) for x in xs]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(xs))}

    def run(i: int) -> None:
        for _ in range(5):
            found[i].append(ours(xs[i]))

    workers = [threading.Thread(target=run, args=(i,)) for i in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(len(ys) == 5 and relative(y, expected[i]) < 1e-6 for i, ys in found.items() for y in ys)


def test_a_compiler_sees_the_stock_expression(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_compile_block compiles patched blocks."""
    model = adapted(targets="gate")
    peftfast.patch(model)
    block, x = block_of(model), inputs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert counts.during(lambda: peft_gated_mlp._forward(block, (x,), {})) == (0, 0)


def test_the_report_names_them() -> None:
    model = adapted()
    assert not peftfast.report(model).mlps[0].patched and "not patched" in str(peftfast.report(model))
    report = peftfast.patch(model)
    row = report.mlps[0]
    assert (row.name, row.module, row.form) == ("base_model.model.blocks.0", "MLP", "down(act(gate) * up)")
    assert row.fused and not row.kept and report.to_dict()["mlps"][0]["activation"] == "silu"
    assert "2 x MLP, down(act(gate) * up): silu, neither activation nor product is kept" in str(report)
    block_of(model).act = nn.Tanh()
    assert "Tanh is none of the activations" in peftfast.report(model).mlps[0].reason


def test_the_report_says_why_no_patch_serves_one() -> None:
    """A tuner whose layers are none of LoRA's: that the module is not patched is no matter of patching."""
    model = peft.get_peft_model(adapted().unload(), peft.ShiraConfig(r=2, target_modules=["gate", "up", "down"]))
    for report in (peftfast.report(model), peftfast.patch(model)):
        assert {(row.patched, row.reason) for row in report.mlps} == {
            (False, "it holds no LoRA layer that has a fused form")
        }
        assert "not patched" not in str(report).partition("MLP")[2]


def test_the_reference_backend_is_no_fused_product(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    peftfast.patch(model)
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")
    assert "no fused product" in peftfast.report(model).mlps[0].reason
    assert counts.during(lambda: step(model)) == (0, 0)


def test_training_runs_as_stock() -> None:
    """Twenty steps of a small model: the losses of the two are one another's to float32's accuracy."""
    losses = []
    for gated in (True, False):
        model = small_model("llama", "lora", torch.float32)
        peftfast.patch(model, gated=gated)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for batch in text_batches("llama", 8):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert max(abs(one - two) for one, two in zip(*losses, strict=True)) < 1e-4
    assert losses[0][-1] < losses[0][0]
