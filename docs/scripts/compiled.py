"""torch.compile over a patched model: one graph, any sequence length."""

import small_model
import torch
from peft import LoraConfig, get_peft_model

import peftfast

model = get_peft_model(small_model.load(), LoraConfig(r=8, target_modules="all-linear"))
peftfast.patch(model)  # before compiling
# Yours: no backend argument, which means inductor.
compiled = torch.compile(model, dynamic=True, backend="aot_eager")
for length in (16, 24):
    ids = torch.randint(0, small_model.VOCABULARY, (2, length))
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    print(f"length {length}: loss {loss.item():.3f}")
