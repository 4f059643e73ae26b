"""A Llama-shaped model built from its configuration, with random weights, and real text to train it on."""

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shapes import MODELS, Model


@dataclass(frozen=True)
class Size:
    """A model of ``layers`` blocks. Byte-level text needs a vocabulary of at least 256."""

    block: Model
    layers: int
    vocabulary: int

    def linear_elements(self, layers: int | None = None) -> int:
        """Elements of all weights that tokens are multiplied by, the head's among them; ``layers``: of a model cut to so many."""
        block = sum(n * k for n, k in self.block.projections().values())
        return (layers or self.layers) * block + self.vocabulary * self.block.hidden


SIZES = {
    "tiny": Size(Model(hidden=128, intermediate=352, heads=4, kv_heads=2, head_dim=32), 2, 256),
    "small": Size(Model(hidden=512, intermediate=1408, heads=8, kv_heads=4, head_dim=64), 4, 256),
    # config.json of the models of these names.
    "llama3.2-1b": Size(Model(hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64), 16, 128256),
    "llama3-8b": Size(MODELS["llama3-8b"], 32, 128256),
}


def build(size: Size, dtype: torch.dtype, device: str, seed: int, layers: int | None = None) -> nn.Module:
    """A causal language model with random weights that the seed alone decides, made on ``device`` in ``dtype``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    block = size.block
    config = LlamaConfig(
        hidden_size=block.hidden,
        intermediate_size=block.intermediate,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads,
        head_dim=block.head_dim,
        num_hidden_layers=layers or size.layers,
        vocab_size=size.vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model


def quantise(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """Every linear layer but the head as bitsandbytes' Linear4bit, NF4 with double quantisation, as ``load_in_4bit`` makes it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear) or child_name == "lm_head":
                continue
            layer = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            device = child.weight.device
            packed = Params4bit(
                child.weight.detach().cpu() if device.type == "cuda" else child.weight.detach(),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                module=layer,
            )
            layer.weight = packed.to(device)
            if child.bias is not None:
                layer.bias = child.bias
            layer.support_avx512bf16_for_cpu = False  # else an evaluation would repack the weight, lossily
            setattr(module, child_name, layer)
            child.weight = None  # type: ignore[assignment]
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    return model


def text() -> bytes:
    """Some 100 kB of real text that every Python has: the source of a module of the standard library."""
    return inspect.getsource(argparse).encode()


def batches(count: int, rows: int, length: int, device: str) -> Iterator[dict[str, Tensor]]:
    """``count`` batches ``[rows, length]`` of successive bytes, the same in every run."""
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    for i in range(count):
        starts = [(i * rows + row) * length % (len(data) - length) for row in range(rows)]
        ids = torch.stack([data[start : start + length] for start in starts]).to(device)
        yield {"input_ids": ids, "labels": ids}


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each storage once, and of the scales of its 4-bit weights."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        for holder in (state, nested):
            tensors += [getattr(holder, name, None) for name in ("absmax", "code", "offset")]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())
