"""BA-LoRA, LAE and I-LoRA: penalties on outputs, and averaged adapters."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.methods import ba_lora, i_lora
from tests.support.method_checks import (
    Mlp,
    PlainLinear,
    adapted,
    batches,
    check_files,
    check_four_bit,
    check_layer_method,
    check_merging,
    check_steps,
    plain_model,
    stir,
    trained,
)

UP, DOWN = 64 + 48, 40 + 64


def lora_weight(scaling: float) -> Any:
    def weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
        return base + scaling * p["lora_B"] @ p["lora_A"]

    return weight


def remembered(plain: Mlp) -> list[Any]:
    """[batch, output] of the plain model's last pass."""
    last: list[Any] = [None, None]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        last[:] = [kwargs, output]

    plain.register_forward_hook(hook, with_kwargs=True)
    return last


def pissa_weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
    u, s, v = torch.linalg.svd(base, full_matrices=False)
    return base - u[:, :4] * s[:4] @ v[:4] + 0.5 * p["lora_B"] @ p["lora_A"]


def ratio(z: Tensor, count: int, norm: str) -> Tensor:
    s = torch.linalg.svdvals(z)
    return -s[:count].sum() / (s.sum() if norm == "nuclear" else s.square().sum().sqrt())


@pytest.mark.parametrize("done", [0, 22, 60])
@pytest.mark.parametrize(("form", "norm"), [("nlu", "frobenius"), ("nlu", "nuclear"), ("nlg", "frobenius")])
def test_ba_lora(form: str, norm: str, done: int) -> None:
    given = {"r": 4, "lora_alpha": 2.0, "lambda1": 0.3, "lambda2": 0.2, "lambda3": 0.1, "svd_k": 2, "svd_norm": norm}
    handle = adapted("ba-lora", form=form, top_k_entropy=2, total_steps=100, **given)
    assert handle.trainable == 4 * (UP + DOWN)
    first = batches(1)[0]
    torch.testing.assert_close(handle.model(**first).logits, Mlp()(**first).logits, rtol=0, atol=1e-10)
    stir(handle)
    handle.runtime.done = done
    weight1 = 0.3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / 100)))
    focus = {0: 0.0, 22: 0.4, 60: 1.0}[done]
    plain = plain_model(handle, pissa_weight)
    last = remembered(plain)

    def penalty(_: Any) -> Tensor:
        z, z0 = last[1].logits, Mlp()(**last[0]).logits.detach()
        if form == "nlu":
            rows = zip(z, z0, strict=True)
            apart = torch.stack([a / a.norm() - b / b.norm() for a, b in rows]).square().mean()
            covariance = torch.cov(z.T)
            diverse = sum(covariance[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 3
        else:
            p, p0 = (z / 2).softmax(-1), (z0 / 2).softmax(-1)
            apart = 4 * (p0 * (p0.log() - p.log())).sum(-1).mean()
            two = z.sort(-1, descending=True).values[:, :2].softmax(-1)
            diverse = (two * two.log()).sum(-1).mean()
        return weight1 * apart + focus * (0.2 * diverse + 0.1 * ratio(z, 2, norm))

    check_steps(handle, plain, penalty, 1e-8)


def test_ba_lora_counts_labelled_tokens_and_keeps_its_start(tmp_path: Path) -> None:
    handle = adapted("ba-lora", r=4, schedule=False, lambda1=1.0, lambda2=1.0, lambda3=0.0, temperature=1.0)
    generator = torch.Generator().manual_seed(5)
    z, z0 = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    keep = labels != -100
    p, p0 = z[keep].softmax(-1), z0[keep].softmax(-1)
    expected = (p0 * (p0 / p).log()).sum(-1).mean() + (p * p.log()).sum(-1).mean()
    torch.testing.assert_close(handle.runtime.penalty(z, z0, labels), expected)
    assert handle.runtime.penalty(z, z0, torch.full_like(labels, -100)) == 0
    assert handle.loss() == 0.0, "no pass, no penalty"
    handle.model.eval()(**batches(1)[0])
    assert handle.loss() == 0.0, "evaluation is not trained on"
    # The state to go on from holds what the model was, and a copy of the model penalises by its own layers.
    handle.model.train()
    stir(handle)
    twin = adapted("ba-lora", r=4, schedule=False, lambda1=1.0, lambda2=1.0, lambda3=0.0, temperature=1.0)
    stir(twin)
    twin.runtime.pretrained = {}
    twin.load_state_dict(pickle.loads(pickle.dumps(handle.state_dict())))
    copied = copy.deepcopy(handle.model)
    found = []
    for model in (handle.model, twin.model, copied, pickle.loads(pickle.dumps(handle.model))):
        model(**batches(1)[0])
        found.append(model.peftfast_handle.loss())
    assert float(found[0].detach()) > 0.01 or float(found[0].detach()) < -0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    check_files(handle, tmp_path)
    check_merging(handle)
    unloaded = handle.merge_and_unload()
    assert not unloaded._forward_hooks and not unloaded._forward_pre_hooks
    handle = adapted("ba-lora", dtype=torch.float32, four_bit=True, r=4)
    (handle.model(**batches(1, torch.float32)[0]).loss + handle.loss()).backward()
    assert all(p.grad is not None for p in trained(handle).values())


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_a_second_pass_of_an_encoder_decoder(name: str) -> None:
    """Its decoder reads the shifted labels: without them T5 raises, and BART's reads the encoder's tokens."""
    import transformers

    given: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 48, "d_kv": 8}
    if name == "Bart":
        sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
        given = {"vocab_size": 64, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **sides}
    config = getattr(transformers, f"{name}Config")(decoder_start_token_id=0, dropout_rate=0.0, dropout=0.0, **given)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    tokens = torch.randint(3, 64, (2, 3, 7))
    plain = {"schedule": False, "lambda1": 1.0, "lambda2": 0.0, "lambda3": 0.0}
    handle = peftfast.adapt(model, "ba-lora", r=4, target_modules=["fc1", "wi"], **plain)
    model(input_ids=tokens[0], labels=tokens[1])
    assert abs(float(handle.loss())) < 1e-6  # nothing is trained yet
    with torch.no_grad():
        for parameter in handle.adapter_parameters():
            parameter.add_(torch.randn_like(parameter))
    model(input_ids=tokens[0], labels=tokens[1])
    assert float(handle.loss()) > 1e-4
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    handle = peftfast.adapt(model, "mosa", r=4, parts=1, reg_weight=1.0, target_modules=["fc1", "wi"])
    with torch.no_grad():
        for parameter in handle.adapter_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model(input_ids=tokens[0], labels=tokens[1])
    assert abs(float(handle.loss())) < 1e-6  # of one part two draws are the same


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_singular_values_have_svds_gradient(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    own = ba_lora.singular_values(matrix, 3)
    s = torch.linalg.svdvals(matrix)[:3].flip(0)
    torch.testing.assert_close(own, s)
    found, expected = (torch.autograd.grad((weights * one).sum(), matrix)[0] for one in (own, s))
    torch.testing.assert_close(found, expected)


def scaled_weight(layer: nn.Module, base: Tensor, p: dict[str, Tensor]) -> Tensor:
    return base + 0.5 * p["lora_scale"] * p["lora_B"] @ p["lora_A"]


def predictions(layers: dict[str, dict[str, Tensor]], head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model = Mlp()
    model.head.load_state_dict(head.state_dict())
    with torch.no_grad():
        for name, p in layers.items():
            model.get_submodule(name).weight.copy_(scaled_weight(None, model.get_submodule(name).weight, p))
    return model(**batch).logits.softmax(-1)


def test_lae(tmp_path: Path) -> None:
    given = {"r": 4, "lora_alpha": 2.0}
    check_layer_method("lae", scaled_weight, count=4 * (UP + DOWN) + 2, tmp_path=tmp_path, **given)
    check_four_bit("lae", tmp_path / "nf4", scaled_weight, **given)
    alone = adapted("lae", task_steps=2, freeze_steps=1, **given)
    with pytest.raises(ValueError, match="freeze_steps: expected 0 where nothing but the adapters is trained"):
        alone.model(**batches(1)[0])

    def with_head() -> Any:
        torch.manual_seed(2)
        targets: dict[str, Any] = {"target_modules": ["up", "down"], "modules_to_save": ["head"]}
        more = {"ema_decay": 0.75, "task_steps": 2, "freeze_steps": 1}
        return peftfast.adapt(Mlp(), "lae", **targets, **more, **given)

    handle = with_head()
    stir(handle)
    probe = batches(1)[0]
    optimiser = handle.optimizer(lr=0.02)
    names = ("lora_A", "lora_B", "lora_scale")

    def now() -> dict[str, dict[str, Tensor]]:
        layers = handle.layers.items()
        return {path: {name: getattr(layer, name).detach().clone() for name in names} for path, layer in layers}

    offline: dict[str, dict[str, Tensor]] = {}
    for step, batch in enumerate(batches(6), 1):
        before = now()
        handle.model.train()(**batch).loss.backward()
        optimiser.step()
        handle.step(optimiser)
        optimiser.zero_grad()
        online = now()
        for path, p in offline.items():
            for name in names:
                p[name] = 0.75 * p[name] + 0.25 * online[path][name]
        if step == 2:
            offline = copy.deepcopy(online)
        resting = step in (2, 4, 6)
        assert all(layer.lora_A.requires_grad is not resting for layer in handle.layers.values())
        assert torch.equal(before["up"]["lora_B"], online["up"]["lora_B"]) is (step in (3, 5))
        expected = predictions(online, handle.model.head, probe)
        if offline:
            expected = torch.maximum(expected, predictions(offline, handle.model.head, probe))
        found = handle.model.eval()(**probe).logits
        torch.testing.assert_close(found.exp() if offline else found.softmax(-1), expected, rtol=1e-9, atol=1e-12)
    assert (
        predictions(online, handle.model.head, probe) - predictions(offline, handle.model.head, probe)
    ).abs().max() > 1e-3
    check_files(handle, tmp_path / "two")
    with pytest.raises(ValueError, match="past_key_values: expected None"):
        handle.runtime.evaluated((), {"past_key_values": object()}, found)
    weight = handle.model.up.weight.clone()
    with pytest.raises(RuntimeError, match="predicts by two adapters"):
        handle.merge()
    assert torch.equal(handle.model.up.weight, weight)
    twin = with_head()
    twin.load_state_dict(handle.state_dict())
    assert twin.runtime.task == 3 and not twin.layers["up"].lora_A.requires_grad


def test_i_lora(tmp_path: Path) -> None:
    """The first task is LoRA's; then the rows of the batches before are replayed, and the slow adapter follows the fast one."""
    given = {"r": 4, "lora_alpha": 2.0}
    check_layer_method("i-lora", lora_weight(0.5), count=4 * (UP + DOWN), tmp_path=tmp_path, **given)
    check_four_bit("i-lora", tmp_path / "nf4", lora_weight(0.5), **given)
    handle = adapted("i-lora", decay=0.6, reg_weight=0.7, buffer=12, task_steps=1, **given)
    stir(handle)
    for layer in handle.layers.values():
        layer.accumulate(0.0)
    plain = plain_model(handle, lora_weight(0.5))
    slow = copy.deepcopy(plain)
    own, values = [list(model.parameters()) for model in (handle.model, plain)]
    own, values = ([p for p in one if p.requires_grad] for one in (own, values))
    optimisers = torch.optim.AdamW(own, lr=0.02), torch.optim.AdamW(values, lr=0.02)
    first, *rest = batches(3)
    rest[1]["labels"] = rest[1]["labels"].clone()
    for step, batch in enumerate((first, *rest), 1):
        loss, formula = handle.model(**batch).loss, plain(**batch).loss
        penalty = handle.loss()
        if step == 1:
            assert penalty == 0.0
        elif step == 2:  # the buffer holds the first batch and nothing else
            apart = (plain(**first).logits - slow(**first).logits.detach()).square().mean()
            expected = plain(**first).loss + 2 * 0.7 * apart
            assert apart > 1e-6
            torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-12)
            formula = formula + expected
        if step < 3:
            (loss + penalty).backward()
            formula.backward()
            for one, other in zip(own, values, strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        handle.step(optimisers[0])
        decay = min(1 - 1 / (step + 1), 0.6)
        with torch.no_grad():
            for old, new in zip(slow.parameters(), plain.parameters(), strict=True):
                old.mul_(decay).add_((1 - decay) * new)
        for name in ("up", "down"):
            layer, other = handle.layers[name], getattr(slow, name)
            torch.testing.assert_close(layer.slow_A, other.values[0].detach(), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(layer.slow_B, other.values[1].detach(), rtol=1e-8, atol=1e-10)
    assert handle.runtime.memory.count == 36 and len(handle.runtime.memory.rows) == 12
    state = pickle.loads(pickle.dumps(handle.state_dict()))
    twin = adapted("i-lora", decay=0.6, reg_weight=0.7, buffer=12, infer="slow", **given)
    twin.model.load_state_dict(handle.model.state_dict())
    twin.load_state_dict(state)
    for one in (handle, twin):
        one.model(**first)
    torch.testing.assert_close(twin.loss(), handle.loss())
    # Evaluation and merging by the slow adapter, training by the fast one.
    expected = slow(**first).logits
    torch.testing.assert_close(twin.model.eval()(**first).logits, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(twin.model.train()(**first).logits, handle.model(**first).logits)
    check_merging(twin)
    twin.merge()
    torch.testing.assert_close(twin.model(**first).logits, expected, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="hidden_states"):
        handle = adapted("i-lora", on="hidden", task_steps=1, **given)
        handle.model.forward = lambda x, labels=None, output_hidden_states=False: Mlp.forward(handle.model, x, labels)
        for _ in range(2):
            handle.model(**first)
            handle.loss()
            handle.step()


def test_reservoir_keeps_an_even_sample() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        memory = i_lora.Reservoir(8, torch.Generator().manual_seed(seed))
        for start in range(0, 40, 5):
            memory.add({"x": torch.arange(start, start + 5)})
        found = memory.draw(40, torch.device("cpu"))["x"]
        assert len(found) == len(set(found.tolist())) == 8
        counts[found] += 1
    assert (counts / 300 - 0.2).abs().max() < 5 * (0.2 * 0.8 / 300) ** 0.5
    memory = i_lora.Reservoir(4, torch.Generator().manual_seed(0))
    memory.add({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3, dtype=torch.long)})
    memory.add({"input_ids": torch.ones(1, 5, dtype=torch.long), "labels": torch.ones(1, 5, dtype=torch.long)})
    drawn = memory.draw(2, torch.device("cpu"))
    assert sorted(drawn["input_ids"].sum(1).tolist()) == [3, 5] and (drawn["labels"] == -100).sum() == 2


def test_a_failed_load_leaves_no_hooks(tmp_path: Path) -> None:
    handle = adapted("lae", r=4)
    peftfast.save_adapter(handle.model, tmp_path)
    wrong = Mlp()
    wrong.up = nn.Linear(48, 63, dtype=torch.float64)
    with pytest.raises(ValueError, match="directory"):
        peftfast.load_adapter(wrong, tmp_path)
    assert not wrong._forward_hooks and not wrong._forward_pre_hooks and not isinstance(wrong.up, PlainLinear)


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("ba-lora", {"r": 4, "lambda2": -1.0}, "lambda2: expected at least 0"),
        ("ba-lora", {"r": 4, "form": "mt"}, "form: expected one of"),
        ("ba-lora", {"r": 4, "temperature": 0.0}, "temperature: expected a number above 0"),
        ("lae", {"ema_decay": 1.0}, "ema_decay: expected a probability"),
        ("lae", {"freeze_steps": -1}, "freeze_steps: expected a number of steps"),
        ("i-lora", {"infer": "both"}, "infer: expected one of"),
        ("i-lora", {"task_steps": 0.5}, "task_steps: expected a number of steps"),
        ("mosa", {"share": "both"}, "share: expected one of"),
        ("mosa", {"parts": 0}, "parts: expected an int of at least 1"),
        ("orthogonal-adaptation", {"concept": -1}, "concept: expected an int of at least 0"),
        ("orthogonal-adaptation", {"basis": "any"}, "basis: expected one of"),
    ],
)
def test_bad_options(name: str, given: dict, match: str) -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        peftfast.adapt(model, name, target_modules=["up", "down"], **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model._forward_hooks
