"""A model of your own, adapted without PEFT, saved in PEFT's files and loaded again."""

import torch
from torch import nn

import peftfast
from peftfast.nn import LoRALinear


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


model = build()
for name in ("0", "2"):
    setattr(model, name, LoRALinear.from_linear(model.get_submodule(name), r=8, lora_alpha=16))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(32, 64)
for _ in range(5):
    loss = (model(x) - x.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

peftfast.save_adapter(model, "own-adapter")
again = peftfast.load_adapter(build(), "own-adapter")
assert torch.equal(again(x), model(x))
