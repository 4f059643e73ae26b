"""LST, UniPT and SHERL beside a frozen model, each put together by hand from its published formula; generation with a cache."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.methods import lst
from peftfast.methods.sidenet import narrow_config
from peftfast.nn import NF4Linear
from tests.support.method_checks import Mlp, stir, trained
from tests.support.small_models import base, text_batches


class Watched:
    """The outputs of every frozen block, and what the first and the last get, of one forward pass."""

    def __init__(self, handle: Any) -> None:
        self.blocks: list[Any] = list(handle.layers.values())
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.last: list[Tensor] = []
        for block in self.blocks:
            block.base_layer.register_forward_pre_hook(lambda m, a: self.inputs.append(a[0]))
            block.base_layer.register_forward_hook(lambda m, a, o: self.outputs.append(_first(o)))
        self.blocks[-1].register_forward_hook(lambda m, a, o: self.last.append(_first(o)))


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def padded(kind: str) -> dict[str, Tensor]:
    """A batch whose first text is shorter by three tokens."""
    batch = text_batches(kind, 1, rows=3, length=12)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    return {**batch, "attention_mask": mask}


def check_training_and_files(handle: Any, kind: str, folder: Path, data: list[dict[str, Tensor]]) -> None:
    """No graph in the frozen model's parameters, a loss that falls, and files, copies and merging."""
    model = handle.model
    optimiser = handle.optimizer(lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(**data[0]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    peftfast.save_adapter(model, folder)
    loaded = peftfast.load_adapter(base(kind), folder).eval()
    model.eval()
    torch.testing.assert_close(loaded(**data[1]).logits, model(**data[1]).logits, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**data[1]).logits, model(**data[1]).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be merged"):
        handle.merge()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_lst(kind: str, tmp_path: Path) -> None:
    model, data = base(kind), text_batches(kind, 2)
    handle = peftfast.adapt(model, "lst", reduction=2, dropped=() if kind == "llama" else (1,))
    seen = Watched(handle)
    blocks = seen.blocks
    width, small = 64, 32
    sides = sum(p.numel() for block in blocks if block.side is not None for p in block.side.parameters())
    steps = sum(block.side is not None for block in blocks)
    assert handle.trainable == sides + steps * (width * small + 1) + 2 * width * small
    with torch.no_grad():
        for block in blocks:
            if block.side is not None:
                block.gate.fill_(0.07)
    states: list[Tensor] = []
    given: list[Tensor] = []
    for block in blocks:
        if block.side is not None:
            block.side.register_forward_pre_hook(lambda m, a: given.append(a[0]))
            block.side.register_forward_hook(lambda m, a, o: states.append(_first(o)))
    model(**data[0]).loss.backward()
    gate = 1 / (1 + math.exp(-0.07 / 0.1))
    before = seen.inputs[0] @ blocks[0].first_down.weight.T
    for i in range(steps):
        expected = gate * before + (1 - gate) * seen.outputs[i] @ blocks[i].down.weight.T
        torch.testing.assert_close(given[i], expected)
        before = states[i]
    torch.testing.assert_close(seen.last[0], before @ blocks[-1].widen.weight.T)
    assert not any(out.requires_grad for out in seen.outputs)
    assert all(p.grad is not None for p in trained(handle).values())
    check_training_and_files(handle, kind, tmp_path, data)
    for bad in ({"reduction": 7}, {"dropped": (5,)}, {"temperature": 0.0}, {"init": "fisher"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            peftfast.adapt(base(kind), "lst", **{"reduction": 2, **bad})
    with pytest.raises(ValueError, match="transformer"):
        peftfast.adapt(Mlp(), "lst")


@pytest.mark.parametrize("method", ["lst", "qst"])
@pytest.mark.parametrize("name", ["T5", "Bloom"])
def test_a_number_for_each_head_is_refused(method: str, name: str) -> None:
    """A side block has fewer heads than the model's position bias or slopes are of."""
    import transformers

    options = {
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }[name]
    kind = transformers.T5ForConditionalGeneration if name == "T5" else transformers.BloomForCausalLM
    model = kind(getattr(transformers, f"{name}Config")(vocab_size=64, **options))
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=f"^model: {name}Block is given (position_bias|alibi), of each of the model's heads"
    ):
        peftfast.adapt(model, method, reduction=4)
    assert dict(model.named_modules()) == before and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_lst_begins_at_the_models_own_weights(kind: str) -> None:
    """What a side block keeps are the rows and columns of the largest sums of magnitudes, the same channels everywhere."""
    model = base(kind)
    blocks = model.model.layers if kind == "llama" else model.bert.encoder.layer
    up, down = ("mlp.up_proj", "mlp.down_proj") if kind == "llama" else ("intermediate.dense", "output.dense")
    query = "self_attn.q_proj" if kind == "llama" else "attention.self.query"
    total = torch.zeros(64, dtype=torch.float64)
    for block in blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                writes = name in (down, "self_attn.o_proj", "attention.output.dense")
                total += linear.weight.detach().double().abs().sum(1 if writes else 0)
    stream = total.argsort(descending=True)[:32].sort().values
    block = blocks[1]
    inner = block.get_submodule(up).weight.detach().double().abs().sum(1)
    if kind == "llama":
        inner += block.mlp.gate_proj.weight.detach().double().abs().sum(1)
    inner += block.get_submodule(down).weight.detach().double().abs().sum(0)
    inner = inner.argsort(descending=True)[:128].sort().values
    wide = block.get_submodule(query).weight.detach().clone()
    whole = block.get_submodule(up).weight.detach()[inner][:, stream]
    back = block.get_submodule(down).weight.detach()[stream][:, inner]
    handle = peftfast.adapt(model, "lst", reduction=2)
    side = list(handle.layers.values())[1].side
    torch.testing.assert_close(side.get_submodule(up).weight, whole)
    torch.testing.assert_close(side.get_submodule(down).weight, back)
    rows = side.get_submodule(query).weight.detach()
    heads = wide.reshape(4, 16, 64)[:, :, stream]
    found = [int(((head - rows[:16]).abs().amax((1, 2)) == 0).nonzero()) for head in (heads,)]
    assert found and any(torch.equal(head, rows[16:]) for head in heads)
    other = list(peftfast.adapt(base(kind), "lst", reduction=2, init="random").layers.values())[1].side
    assert not torch.equal(other.get_submodule(up).weight, whole)


def test_lst_keeps_whole_groups_of_heads() -> None:
    """Beside grouped queries, the query heads that stay belong to the key heads that stay."""
    config = base("llama").config  # 4 heads in 2 groups
    small = narrow_config(config, 2)
    blocks = list(base("llama").model.layers)
    found = lst.Pruning(blocks, config, small).kept[0]
    heads, groups = found["heads"].reshape(-1, 16)[:, 0] // 16, found["groups"].reshape(-1, 16)[:, 0] // 16
    assert groups.numel() == small.num_key_value_heads and heads.numel() == small.num_attention_heads
    assert set((heads // 2).tolist()) == set(groups.tolist())


def unipt(block: Any, features: list[Tensor], mask: Tensor) -> Tensor:
    """Token by token and layer by layer, as published."""
    net = block.parallel
    z = [net.down[i](feature) for i, feature in enumerate(features)]
    out = []
    for row in range(features[0].shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[row, t]]

        def mean(x: Tensor, valid: list[int] = valid) -> Tensor:
            return torch.stack([x[t] for t in valid]).mean(0)

        merged, scores = [], []
        anchor = z[-1][row]
        for one in z[:-1]:
            weights = torch.relu(anchor @ one[row].T) * mask[row]
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6) + torch.eye(len(anchor))
            merged.append(weights @ one[row])
            scores.append(net.gate(mean(anchor) * mean(one[row]))[0])
        shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        mixed = sum(share * one for share, one in zip(shares, merged, strict=True))
        out.append(features[-1][row] + net.up(torch.relu(anchor + net.project(mixed))))
    return torch.stack(out)


def test_unipt(tmp_path: Path) -> None:
    model, data, batch = base("bert").eval(), text_batches("bert", 2), padded("bert")
    plain = model(**batch).logits
    handle = peftfast.adapt(model, "unipt", reduction=4)
    torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-5)
    assert handle.trainable == 3 * (64 * 16 + 3 * 16) + (16 * 16 + 3 * 16) + 16 + (16 * 64 + 64)
    stir(handle)
    seen = Watched(handle)
    found = model(**batch)
    features = [seen.inputs[0], *seen.outputs]
    expected = unipt(seen.blocks[-1], features, batch["attention_mask"])
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(seen.last[0][kept], expected[kept])
    assert not torch.equal(seen.last[0], seen.outputs[-1])
    grads = torch.autograd.grad(found.loss, list(trained(handle).values()))
    assert all(bool(grad.any()) for grad in grads)
    longer = {name: torch.cat([value, torch.zeros_like(value[:, :2])], 1) for name, value in batch.items()}
    torch.testing.assert_close(model(**longer).logits[:, :12][kept], found.logits[kept], rtol=1e-4, atol=1e-4)
    check_training_and_files(handle, "bert", tmp_path, data)
    with pytest.raises(ValueError, match="a model that generates"):
        peftfast.adapt(base("llama"), "unipt")


def sherl(block: Any, features: list[Tensor]) -> Tensor:
    net = block.guidance
    z = [down(feature) for down, feature in zip(net.down, features, strict=True)]
    shares = []
    for i in range(len(z) - 1):
        close = sum(torch.relu(torch.cosine_similarity(z[i], z[j], dim=-1, eps=1e-12)) for j in range(len(z) - 1))
        shares.append(torch.relu(net.attend(z[i] * z[-1]))[..., 0] / close)
    total = sum(shares).clamp(min=1e-6)
    guided = z[-1] + sum((share / total)[..., None] * one for share, one in zip(shares, z[:-1], strict=True))
    return net.norm(net.back(torch.relu(guided))) + (2 * torch.sigmoid(2 * net.gate / 0.1) - 1) * features[-1]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_sherl(kind: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else BertForMaskedLM(BertConfig(**sizes))
    batch = text_batches(kind, 1)[0]
    handle = peftfast.adapt(model.eval(), "sherl", reduction=4)
    assert handle.trainable == 4 * (64 * 16 + 3 * 16) + 17 + (16 * 64 + 64) + 2 * 64 + 1
    stir(handle)
    seen = Watched(handle)
    found = model(**batch)
    expected = sherl(seen.blocks[-1], [seen.inputs[0], *seen.outputs[:-1]])
    torch.testing.assert_close(seen.inputs[-1], expected)
    torch.testing.assert_close(seen.last[0], seen.outputs[-1])
    assert not any(out.requires_grad for out in seen.outputs[:-1]) and seen.outputs[-1].requires_grad
    grads = torch.autograd.grad(found.loss, list(trained(handle).values()))
    assert all(bool(grad.any()) for grad in grads)
    small = peftfast.adapt(base(kind), "sherl", reduction=4, dropout=0.0)
    check_training_and_files(small, kind, tmp_path, text_batches(kind, 2))
    with pytest.raises(ValueError, match="dropout"):
        peftfast.adapt(base(kind), "sherl", dropout=1.0)


def gpt2() -> Any:
    """A model whose blocks get their cache by position, and whose projections are no linear layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["qst", "lst", "sherl"])
def test_generation_with_a_cache(name: str, kind: str) -> None:
    """What a model with a side network generates is the same with and without its cache, beams included."""
    model = gpt2().eval() if kind == "gpt2" else base("llama").eval()
    handle = peftfast.adapt(model, name, reduction=2, target_modules=".*")
    with torch.no_grad():
        for parameter in handle.adapter_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "qst":
            list(handle.layers.values())[-1].mix.fill_(0.2)
    prompt = text_batches("llama", 1, rows=2, length=7)[0]["input_ids"]
    for settings in ({}, {"num_beams": 3}):
        given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
        with_cache = model.generate(prompt, use_cache=True, **given)
        assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **given)), settings
    if name != "sherl" and kind == "llama":
        with pytest.raises(ValueError, match="past_key_values: a side network needs a DynamicCache"):
            model.generate(prompt, cache_implementation="static", max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("name", ["lst", "sherl"])
def test_beside_a_four_bit_model(name: str) -> None:
    model, data = base("llama"), text_batches("llama", 1)[0]
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, NF4Linear.from_linear(module))
    handle = peftfast.adapt(model, name, reduction=2)
    model(**data).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in handle.adapter_parameters())
