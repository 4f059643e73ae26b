"""A model of a few layers with random weights, so that the scripts here run anywhere in seconds. Put your own in its place."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 256


def load() -> LlamaForCausalLM:
    # Yours: AutoModelForCausalLM.from_pretrained("...", dtype=torch.bfloat16)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def rows(count: int = 32, length: int = 32) -> list[dict[str, list[int]]]:
    """A data set: token ids, and the same as labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def tokenizer():
    """A byte-level tokenizer that needs no file. Yours: AutoTokenizer.from_pretrained("...")"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 2]
    vocabulary = {letter: k for k, letter in enumerate([*letters, "<pad>", "</s>"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
