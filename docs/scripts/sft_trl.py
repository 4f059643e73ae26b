"""TRL's SFTTrainer, which builds the PEFT model itself; DPOTrainer and the others take the callback in the same way."""

import datasets
import small_model
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peftfast.integrations.transformers import PatchCallback

# Yours: rows of {"text"}, {"messages"} or {"prompt", "completion"}, and no skip_prepare_dataset.
rows = datasets.Dataset.from_list(small_model.rows())
trainer = SFTTrainer(
    small_model.load(),
    SFTConfig(
        "sft-out",
        max_steps=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=rows,
    processing_class=small_model.tokenizer(),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[PatchCallback()],
)
trainer.train()
