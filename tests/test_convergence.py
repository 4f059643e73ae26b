"""Real optimiser steps on real text, stock and patched: the losses are as near to each other as those of two stock runs that differ
only in the order of their sums.

The other stock run takes the rows of each batch in reverse and has the intermediate features of each MLP permuted: the same function and
the same batches, other orders of summation forward and backward. ``--full`` takes 60 steps instead of 10, and all combinations.
"""

import pytest
import torch

import peftfast
from tests.support import small_models

STEPS, FULL_STEPS = 10, 60
F32, BF16 = torch.float32, torch.bfloat16
# (shape, method, dtype) of the short form.
SHORT = {
    ("llama", "lora", F32),
    ("llama", "lora", BF16),
    ("llama", "qlora", F32),
    ("llama", "qlora", BF16),
    ("llama", "dora", BF16),
    ("llama", "shira", F32),
    ("qwen", "lora", BF16),
    ("qwen", "qlora", F32),
    ("bert", "lora", F32),
    ("bert", "qlora", BF16),
}
CASES = [
    (shape, method, dtype)
    for shape in ("llama", "qwen", "bert")
    for method in ("lora", "qlora", "dora", "shira")
    for dtype in (F32, BF16)
]
# Two stock runs are one sample of their distance, which in 10 steps of AdamW is within a factor of three of the next sample's.
SAMPLE = 3.0


def losses(case: tuple, steps: int, *, patched: bool = False, reordered: bool = False) -> tuple[torch.Tensor, int]:
    """(the loss of each step, how many layers run fused)."""
    shape, method, dtype = case
    model = small_models.adapted(shape, method, dtype, reordered=reordered)
    fused = len(peftfast.patch(model).fused) if patched else 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for batch in small_models.text_batches(shape, steps):
        if reordered:
            batch = {name: value.flip(0) for name, value in batch.items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64), fused


def name_of(case: tuple) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_agree_within_the_noise_of_stock(case: tuple, full: bool) -> None:
    if not full and case not in SHORT:
        pytest.skip("only with --full")
    steps = FULL_STEPS if full else STEPS
    stock, _ = losses(case, steps)
    other, _ = losses(case, steps, reordered=True)
    patched, fused = losses(case, steps, patched=True)
    assert stock[-1] < stock[0] - 0.3, stock
    if case[1] in ("lora", "qlora"):
        assert fused == (12 if case[0] == "bert" else 14)
    noise, apart = (stock - other).abs(), (stock - patched).abs()
    assert noise.max() > 0
    assert apart.max() <= SAMPLE * noise.max(), f"apart {apart.max():.2e}, noise {noise.max():.2e}"


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaling that is off by a hundredth moves the losses out of the noise."""
    case = ("llama", "lora", BF16)
    from peftfast.integrations import peft as integration

    fused = integration.F.lora_linear
    stock, _ = losses(case, STEPS)
    other, _ = losses(case, STEPS, reordered=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            integration.F,
            "lora_linear",
            lambda *args, scaling=1.0, **options: fused(*args, scaling=0.9 * scaling, **options),
        )
        faulty, _ = losses(case, STEPS, patched=True)
    assert (stock - faulty).abs().max() > SAMPLE * (stock - other).abs().max()
