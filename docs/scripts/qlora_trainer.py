"""QLoRA in transformers' Trainer: bitsandbytes quantises, PEFT adapts, the callback patches."""

import tempfile

import small_model
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from peftfast.integrations.transformers import PatchCallback

with tempfile.TemporaryDirectory() as directory:  # stands for a model on your disk
    small_model.load().save_pretrained(directory)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # The default is float32, which runs everything in it.
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantised, device_map={"": "cpu"})

base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
callback = PatchCallback()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "qlora-out", max_steps=4, bf16=True, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    ),
    train_dataset=small_model.rows(),
    callbacks=[callback],
)
trainer.train()
print(callback.report)
