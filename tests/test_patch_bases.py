"""Bases that patch does not serve: the layer runs PEFT's forward, with its bits, and the report says why. Of GPTQ, AWQ and HQQ
no package is needed: PEFT's own layer class stands on a stand-in for the base, which is all that the guard looks at."""

import copy
import importlib
import logging
import sys
import types
from collections.abc import Iterator

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.integrations import patch_report
from tests.test_patch import Block, K, N, X, adapted, expect_stock, layer_of, relative, stir


def test_guard_8_bit() -> None:
    block = Block()
    block.up = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    block.is_loaded_in_8bit = True
    model = peft.get_peft_model(block.to("cpu"), peft.LoraConfig(target_modules=["up", "down"]))
    report = peftfast.patch(model)
    assert report.stock == {"base_model.model.up": "no fused form of PEFT's lora.Linear8bitLt"}
    assert list(report.fused) == ["base_model.model.down"]


class Packed(nn.Module):
    """What a quantisation library puts in a linear layer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", torch.arange(K * N, dtype=torch.int32).remainder(7).reshape(N, K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 7 - 0.5)


@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear])
def test_guard_packed_bases(kind: type, caplog) -> None:
    model = adapted()
    config = model.peft_config["default"]
    model.base_model.model.up = kind(Packed(), "default", config=config, r=4, lora_alpha=8)
    stir(model)
    expected = layer_of(model)(X)
    reason = f"no fused form of PEFT's lora.{kind.__name__}"
    patch_report.logged.clear()
    with caplog.at_level(logging.WARNING, "peftfast"):
        report = peftfast.patch(model)
        peftfast.patch(model)
    assert [r.message for r in caplog.records] == [f"an adapter layer runs stock: {reason}"]
    assert report.stock == {"base_model.model.up": reason}
    assert list(report.fused) == ["base_model.model.down"]
    assert type(layer_of(model)) is kind and torch.equal(layer_of(model)(X), expected)


class HQQLinear(Packed):
    """Under the name, and with the attribute, by which PEFT tells HQQ's layer from others."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = self.qweight


@pytest.fixture
def hqq_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """PEFT's module of HQQ layers, which defines its class only where hqq is, read again beside a stand-in for hqq. PEFT's dispatch
    looks its names up in that module, so that get_peft_model takes the class too."""
    from peft.tuners.lora import hqq

    if hasattr(hqq, "HqqLoraLinear"):
        pytest.skip("hqq is installed, and PEFT has its class of it")
    with monkeypatch.context() as patches:
        for name in ("hqq", "hqq.core", "hqq.core.quantize"):
            patches.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["hqq.core.quantize"].HQQLinear = HQQLinear
        patches.setattr("peft.import_utils.is_hqq_available", lambda: True)
        yield importlib.reload(hqq)
    del hqq.HqqLoraLinear, hqq.HQQLinear
    importlib.reload(hqq)


def test_guard_hqq_bases(hqq_installed: types.ModuleType, caplog) -> None:
    block = Block()
    block.up = HQQLinear()
    model = stir(peft.get_peft_model(block, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])))
    layer = layer_of(model)
    assert type(layer) is hqq_installed.HqqLoraLinear
    expected = layer(X)
    assert not torch.equal(expected, layer.base_layer(X))
    reason = "no fused form of PEFT's lora.HqqLoraLinear"
    patch_report.logged.clear()
    with caplog.at_level(logging.WARNING, "peftfast"):
        report = peftfast.patch(model)
    assert [r.message for r in caplog.records] == [f"an adapter layer runs stock: {reason}"]
    assert report.stock == {"base_model.model.up": reason} and list(report.fused) == ["base_model.model.down"]
    assert type(layer) is hqq_installed.HqqLoraLinear and torch.equal(layer(X), expected)


def test_guard_an_unknown_linear(caplog) -> None:
    """PEFT takes any subclass of nn.Linear for one: its forward may be another."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    block = Block()
    block.up = Doubled(K, N)
    model = stir(peft.get_peft_model(block, peft.LoraConfig(target_modules=["up"])))
    expect_stock(model, "Doubled", caplog, X)


def test_a_base_without_a_weight(caplog) -> None:
    """A subclass of nn.Linear that keeps its weight in another form, and None in its place."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(K, N)
            self.register_buffer("qweight", self.weight.detach().half())
            self.weight = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.qweight.to(x.dtype), self.bias)

    block = Block()
    block.up = Packed()
    model = stir(peft.get_peft_model(block, peft.LoraConfig(target_modules=["up", "down"])))
    expect_stock(model, "Packed", caplog, X)
    peftfast.patch(model)
    model.add_adapter("other", peft.LoraConfig(target_modules=["up"]))
    model.set_adapter("other")
    assert torch.equal(layer_of(model)(X), block.up.base_layer(X))


class Scaled(torch.Tensor):
    """As torchao's weights: a tensor whose storage is not what F.linear multiplies by."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].as_subclass(torch.Tensor) * 3, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Own(torch.Tensor):
    """One that is as a plain tensor wherever torch multiplies by it."""


def test_guard_weights_of_a_tensor_subclass(caplog) -> None:
    model = stir(adapted())
    base = layer_of(model).base_layer
    expected = 3 * base.weight.detach().clone()
    base._parameters["weight"] = base.weight.detach().as_subclass(Scaled)
    assert type(base.weight) is not nn.Parameter
    torch.testing.assert_close(base(X), nn.functional.linear(X, expected, base.bias))
    expect_stock(model, "Scaled, not a plain tensor", caplog, X)


def test_guard_weights_of_a_tensor_subclass_under_shira() -> None:
    model = peft.get_peft_model(Block(), peft.ShiraConfig(r=2, target_modules=["up", "down"]))
    base = model.base_model.model.up.base_layer
    base._parameters["weight"] = base.weight.detach().as_subclass(Scaled)
    report = peftfast.patch(model)
    assert "Scaled, not a plain tensor" in report.stock["base_model.model.up"] and len(report.fused) == 1


PARTS = {
    "the base bias": lambda layer: (layer.base_layer, "bias"),
    "lora_A": lambda layer: (layer.lora_A["default"], "weight"),
    "lora_B": lambda layer: (layer.lora_B["default"], "weight"),
    "lora_B's bias": lambda layer: (layer.lora_B["default"], "bias"),
    "the magnitude vector": lambda layer: (layer.lora_magnitude_vector["default"], "weight"),
}


@pytest.mark.parametrize("part", PARTS)
def test_guard_parts_of_a_tensor_subclass(part: str, caplog) -> None:
    """The kernels would read the storage of an adapter's tensors as they read the weight's."""
    options = {"use_dora": part == "the magnitude vector", "lora_bias": part == "lora_B's bias"}
    model = stir(adapted(**options))
    holder, name = PARTS[part](layer_of(model))
    holder._parameters[name] = getattr(holder, name).detach().as_subclass(Own)
    expect_stock(model, f"{part} is a tests.Own, not a plain tensor", caplog, X)


@pytest.mark.parametrize("part", ["the base weight", "lora_A", "lora_B"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_guard_sparse_weights(part: str, caplog) -> None:
    """A pruned weight that is kept sparse has no storage, of which a verdict would keep the address."""
    model = stir(adapted())
    layer = layer_of(model)
    holder = layer.base_layer if part == "the base weight" else PARTS[part](layer)[0]
    holder.weight = nn.Parameter(holder.weight.detach().to_sparse_csr(), requires_grad=False)
    expect_stock(model, f"{part} is torch.sparse_csr", caplog, X)


@pytest.mark.parametrize("shape", [(), (1,), (1, N)])
@pytest.mark.parametrize("part", ["the base bias", "lora_B's bias", "the magnitude vector"])
def test_guard_vectors_that_are_broadcast(part: str, shape: tuple[int, ...], caplog) -> None:
    """torch adds a bias of one element to every column; the kernels read an element for each."""
    options = {"use_dora": part == "the magnitude vector", "lora_bias": part == "lora_B's bias"}
    model = stir(adapted(**options))
    holder, name = PARTS[part](layer_of(model))
    setattr(holder, name, nn.Parameter(torch.full(shape, 0.5)))
    expect_stock(model, f"{part} is of shape {shape}, not ({N},)", caplog, X)


def test_guard_experts_by_target_parameters() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.randn(3, N, K))
            self.experts.forward = lambda x: torch.einsum("bk,enk->bn", x, self.experts.weight)
            self.up = nn.Linear(K, N)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) + self.experts(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["up"], target_parameters=["experts.weight"], r=4)
    model = peft.get_peft_model(Experts(), config)
    assert any(isinstance(module, peft_layer.ParamWrapper) for module in model.modules())
    report = peftfast.patch(model)
    assert report.reasons == {"no fused form of PEFT's lora.ParamWrapper": 1} and len(report.fused) == 1


@pytest.mark.parametrize("tied_adapters", [False, True])
def test_a_tied_head_is_fused_and_its_embedding_is_not(tied_adapters: bool) -> None:
    """The head reads the table that the embedding holds; with ``ensure_weight_tying`` they share their adapters too."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    targets = peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=tied_adapters)

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = peft.get_peft_model(LlamaForCausalLM(config), copy.deepcopy(targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        return model

    stock, patched = build(), build()
    report = peftfast.patch(patched)
    assert list(report.fused) == ["base_model.model.lm_head"]
    assert report.reasons == {"no fused form of PEFT's lora.Embedding": 1}
    tokens = torch.randint(0, 64, (2, 9))
    results = []
    for model in (stock, patched):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert results[0].keys() == results[1].keys() and len(results[0]) >= (3 if tied_adapters else 5)
    for name, value in results[0].items():
        assert relative(results[1][name], value) < 1e-5, name
