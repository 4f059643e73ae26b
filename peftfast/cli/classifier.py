"""The demo's model: a BERT encoder, the mean of its last layer over the words, one linear layer.

all-MiniLM-L6-v2 was trained with mean pooling and never with BERT's pooler: with that in between, 100 steps of the head alone
reach 36 % held-out accuracy in place of 55 %. The file imports torch and transformers only, since stock PEFT reads an adapter back
with it in a process that must not know peftfast.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel


class MeanPooledClassifier(BertPreTrainedModel):
    """``num_labels`` of the config classes; the head is called ``classifier``, which PEFT trains and saves for SEQ_CLS by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask ``[B, T]``, labels ``[B]`` -> logits ``[B, num_labels]`` and, with labels, their mean loss."""
        return self.judged(self.pooled(input_ids, attention_mask), labels)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, hidden]``: what the head sees of a text, the mean over its words."""
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def judged(self, pooled: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load(
    directory: str, *, num_labels: int, quantised: bool, device: str, dropout: bool = True
) -> MeanPooledClassifier:
    """The classifier with the encoder's weights from ``directory``, its head new (``torch.manual_seed`` rules it), on ``device``.

    quantised: every linear layer of the encoder as bitsandbytes NF4 with double quantisation and bf16 products; the head stays in
    fp32. Otherwise everything is fp32. dropout: False sets the encoder's own dropout to zero.
    """
    arguments: dict[str, Any] = {"num_labels": num_labels, "dtype": torch.float32, "local_files_only": True}
    if not dropout:
        arguments.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if not quantised:
        model = MeanPooledClassifier.from_pretrained(directory, **arguments)
        nn.Module.to(model, device)
        return model

    import bitsandbytes
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["classifier"],
    )
    model = MeanPooledClassifier.from_pretrained(
        directory, quantization_config=quantisation, device_map={"": device}, **arguments
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with AVX512-BF16, bitsandbytes 0.50 rewrites the packed weight at the first evaluation; the gradient of x
            # is lost in all training after it.
            module.support_avx512bf16_for_cpu = False
    return model
