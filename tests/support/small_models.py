"""Small models of the shapes that people train, made from configurations, and real text to train them on."""

import copy
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, HIDDEN, INTERMEDIATE = 256, 64, 256
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2}
MASK = 1  # a byte that no text has
# The MLP's layers that write the intermediate features.
WRITERS = ("gate_proj", "up_proj", "intermediate.dense")


def base(shape: str) -> nn.Module:
    """ "llama", "qwen" (biases on q, k and v) or "bert" (an encoder that fills in masked words), with the same weights each time."""
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if shape == "bert":
        return BertForMaskedLM(
            BertConfig(**SIZES, num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen": (Qwen2Config, Qwen2ForCausalLM)}[shape]
    made = model(config(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made


def quantise(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Every linear layer of the blocks as a Linear4bit."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and "layer" in name:
            layer = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=compute_dtype,
                quant_type="nf4",
                compress_statistics=False,
            )
            layer.load_state_dict(child.state_dict())
            layer.support_avx512bf16_for_cpu = False
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer.to("cpu"))
    module.is_loaded_in_4bit = True


def is_reader(name: str) -> bool:
    return name.endswith("down_proj") or (name.endswith("output.dense") and "attention" not in name)


def permutation(number: int) -> torch.Tensor:
    """Of the intermediate features, in blocks of 64, so that the blocks of a 4-bit weight stay what they are."""
    blocks = torch.arange(INTERMEDIATE).view(-1, 64)
    return (
        blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(4 + number)).tolist()]
        .flip(0)
        .flatten()
    )


def reorder(model: nn.Module, number: int, *, adapters: bool) -> None:
    """Permute an MLP's intermediate features: the same function, but for the order in which the next layer sums them."""
    order = permutation(number)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not adapters and type(module) is nn.Linear:
                if name.endswith(WRITERS):
                    module.weight.copy_(module.weight[order])
                    if module.bias is not None:
                        module.bias.copy_(module.bias[order])
                elif is_reader(name):
                    module.weight.copy_(module.weight[:, order])
            if adapters and is_reader(name) and hasattr(module, "lora_A"):
                weight = module.lora_A["default"].weight
                weight.copy_(weight[:, order])
            if adapters and hasattr(module, "shira_indices"):
                _reorder_support(module, order, is_reader(name), name.endswith(WRITERS))


def _reorder_support(layer: nn.Module, order: torch.Tensor, reads: bool, writes: bool) -> None:
    """Move SHiRA's positions with the features that they belong to, and keep them in row-major order. The values are zero still."""
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order))
    rows, columns = layer.shira_indices["default"].long()
    rows, columns = (moved[rows] if writes else rows), (moved[columns] if reads else columns)
    flat = torch.sort(rows * layer.in_features + columns).values
    kept = layer.shira_indices["default"]
    kept.copy_(torch.stack([flat // layer.in_features, flat % layer.in_features]).to(kept.dtype))


def adapted(shape: str, method: str, dtype: torch.dtype, *, reordered: int = 0) -> nn.Module:
    """A PEFT model. ``method``: lora, qlora, dora or shira; ``dtype`` of the dense weights, or of the products of a 4-bit base."""
    model = copy.deepcopy(base(shape))
    if reordered:
        reorder(model, reordered, adapters=False)
    if method == "qlora":
        quantise(model, dtype)
    else:
        model.to(dtype)
    targets = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|query|key|value|dense)"
    if shape == "bert":
        targets = r"bert\.encoder.*\.(query|key|value|dense)"
    torch.manual_seed(1)
    config: peft.PeftConfig = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=method == "dora")
    if method == "shira":
        config = peft.ShiraConfig(r=8, target_modules=targets, random_seed=0)
    model = peft.get_peft_model(model, config)
    if reordered:
        reorder(model, reordered, adapters=True)
    return model


def text_batches(shape: str, steps: int, *, rows: int = 8, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Bytes of the licence, a text that does not change; for "bert" every seventh is masked and has to be found."""
    data = torch.tensor(list((ROOT / "LICENSE").read_bytes()))
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(steps):
        starts = torch.randint(0, len(data) - length, (rows,), generator=generator)
        ids = torch.stack([data[start : start + length] for start in starts])
        if shape != "bert":
            batches.append({"input_ids": ids, "labels": ids})
            continue
        hidden = torch.arange(length) % 7 == 3
        labels = torch.where(hidden, ids, torch.full_like(ids, -100))
        batches.append({"input_ids": torch.where(hidden, torch.full_like(ids, MASK), ids), "labels": labels})
    return batches
