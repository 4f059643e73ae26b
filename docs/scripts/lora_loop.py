"""LoRA by PEFT in a training loop of your own."""

import small_model
import torch
from peft import LoraConfig, get_peft_model

import peftfast

model = get_peft_model(
    small_model.load(), LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
)
print(peftfast.patch(model))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.tensor([row["input_ids"] for row in small_model.rows()])
for step, batch in enumerate(ids.split(8)):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

model.save_pretrained("lora-adapter")  # PEFT's files, which stock PEFT loads
