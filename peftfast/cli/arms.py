"""The arms of the demo: a model, its optimiser and its own random numbers, trained step by step beside the others.

How the times are made comparable. All arms take step k on the same batch before any takes step k + 1, and the order in which they
come rotates, so that whatever else the machine does falls on all alike; the median leaves out single interruptions. Tokenising and
padding are done before the clock starts. Each arm keeps its own random state, so its dropout does not depend on its neighbours.

How memory is measured. Arms that live side by side share one process, so memory is probed for each arm before the training, right
after its model is loaded: a few steps on the largest batch of the run, against a mark taken with the model loaded and nothing
else. A rehearsal with a throw-away copy comes first and takes what the libraries allocate once per process. What an arm allocates
at its first step and keeps (gradients, optimiser states, a copy of a weight if it made one) lies above the mark and counts.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import classifier, measure
from .docstrings import Example

Batch = dict[str, Tensor]

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
LORA_DROPOUT = 0.05
# Found by 100-step runs at batch 32, held-out accuracy: adapters 5e-4 59 %, 1e-3 60 %, 2e-3 63 %.
ADAPTER_LEARNING_RATE = 2e-3
HEAD_LEARNING_RATE = 1e-2
WARMUP_PART = 0.1


@dataclass(frozen=True)
class Recipe:
    """What an arm is: ``adapters`` says LoRA on an NF4 base, ``patched`` the same after ``peftfast.patch``."""

    name: str
    adapters: bool
    patched: bool = False
    dropout: bool = True


FROZEN = Recipe("frozen encoder, trained head", adapters=False)
STOCK = Recipe("QLoRA, stock PEFT", adapters=True)
PATCHED = Recipe("QLoRA, peftfast", adapters=True, patched=True)
ARMS = (FROZEN, STOCK, PATCHED)


@dataclass
class Arm:
    """A recipe made flesh, and what its steps have shown so far. Memory is in bytes; None where the system does not tell."""

    recipe: Recipe
    model: Any
    device: str
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    random_state: list[Tensor]
    report: Any = None
    peak: int | None = None
    saved: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    handle: Any = None  # of peftfast.adapt, whose penalty and steps belong to the training

    @property
    def milliseconds(self) -> float:
        """The median step."""
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        return 500.0 * (ordered[middle] + ordered[~middle])

    @property
    def final_loss(self) -> float:
        """The mean of the last 20 steps."""
        last = self.losses[-20:]
        return sum(last) / len(last)

    def step(self, batch: Batch) -> None:
        """One timed step of training: forward, backward, update. The clock stops when the device is done."""
        self.model.train()
        with self._own_random_numbers():
            self._synchronise()
            start = time.perf_counter()
            loss = self.model(**batch).loss
            whole = loss if self.handle is None else loss + self.handle.loss()
            whole.backward()
            self.optimiser.step()
            if self.handle is not None:
                self.handle.step(self.optimiser)
            self.optimiser.zero_grad(set_to_none=True)
            self.schedule.step()
            self.losses.append(loss.item())
            self._synchronise()
            self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch]) -> Tensor:
        """Evaluation logits of all rows of ``batches``, in order, on the CPU."""
        self.model.eval()
        return torch.cat([self.model(**{k: v for k, v in b.items() if k != "labels"}).logits.cpu() for b in batches])

    def _synchronise(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        _set_random_state(self.random_state, self.device)
        try:
            yield
        finally:
            self.random_state = _random_state(self.device)


def _random_state(device: str) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if device.startswith("cuda"):
        state.append(torch.cuda.get_rng_state(device))
    return state


def _set_random_state(state: list[Tensor], device: str) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def build_model(recipe: Recipe, directory: str, labels: int, device: str, seed: int) -> tuple[nn.Module, Any]:
    """(model, report of peftfast.patch or None). The same seed gives the same head and the same adapters in every arm."""
    torch.manual_seed(seed)
    model: nn.Module = classifier.load(
        directory, num_labels=labels, quantised=recipe.adapters, device=device, dropout=recipe.dropout
    )
    if not recipe.adapters:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
        return model, None

    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    # No gradient checkpointing: the model is small, and it would hide what is saved for backward.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=LORA_DROPOUT if recipe.dropout else 0.0))
    if not recipe.patched:
        return model, None

    import peftfast

    return model, peftfast.patch(model)


def build(
    recipe: Recipe,
    directory: str,
    labels: int,
    device: str,
    seed: int,
    steps: int,
    probe: tuple[Batch, int] | None = None,
) -> Arm:
    """An arm ready for its first step; with ``probe`` (a batch, steps), the memory of a step on that batch has been measured."""
    model, report = build_model(recipe, directory, labels, device, seed)
    peak, saved = (None, 0) if probe is None else _probe(model, device, seed, *probe)
    optimiser, schedule = _optimiser(model, steps)
    torch.manual_seed(seed)
    return Arm(recipe, model, device, optimiser, schedule, _random_state(device), report, peak, saved)


def rehearse(recipe: Recipe, directory: str, labels: int, device: str, seed: int, batch: Batch) -> None:
    """A step of a copy that is thrown away: one-time allocations and first-call costs of the libraries happen here."""
    build(recipe, directory, labels, device, seed, steps=1).step(batch)


def _optimiser(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "classifier" not in name], "lr": ADAPTER_LEARNING_RATE},
        {"params": [p for name, p in trained if "classifier" in name], "lr": HEAD_LEARNING_RATE},
    ]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warmup = max(1, round(WARMUP_PART * steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def _probe(model: nn.Module, device: str, seed: int, batch: Batch, steps: int) -> tuple[int | None, int]:
    """(peak of a step above the loaded model, bytes saved for backward); the model's trained weights are as before."""
    mark = measure.memory_in_use(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    copies = sum(p.numel() * p.element_size() for p in before)
    optimiser, schedule = _optimiser(model, steps)
    torch.manual_seed(seed)
    arm = Arm(Recipe("probe", adapters=False), model, device, optimiser, schedule, _random_state(device))

    def run() -> None:
        for _ in range(steps):
            arm.step(batch)

    peak = measure.peak_above(mark, device, run)
    saved = measure.saved_for_backward(model, lambda: model(**batch).loss)
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    return (None if peak is None else max(0, peak - copies)), saved


def batches(
    examples: Sequence[Example], tokenizer: Any, size: int, steps: int, max_length: int, seed: int, device: str
) -> list[Batch]:
    """``steps`` padded batches in an order that the seed alone decides; every epoch is shuffled anew."""
    shuffle = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * size:
        epoch = list(range(len(examples)))
        shuffle.shuffle(epoch)
        order += epoch
    return [
        encode([examples[i] for i in order[k * size : (k + 1) * size]], tokenizer, max_length, device)
        for k in range(steps)
    ]


def evaluation_batches(
    examples: Sequence[Example], tokenizer: Any, max_length: int, device: str, size: int = 64
) -> list[Batch]:
    """Every example once, texts of like length together: half the padding, half the time."""
    ordered = sorted(examples, key=lambda e: (len(e.text), e.name))
    return [encode(ordered[k : k + size], tokenizer, max_length, device) for k in range(0, len(ordered), size)]


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, device: str) -> Batch:
    """input_ids and attention_mask ``[B, T]``, labels ``[B]``, int64 on ``device``; T is the longest text's, at most max_length."""
    texts = [example.text for example in examples]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    labels = torch.tensor([example.label for example in examples], device=device)
    return {
        "input_ids": encoded["input_ids"].to(device),
        "attention_mask": encoded["attention_mask"].to(device),
        "labels": labels,
    }


def accuracy(logits: Tensor, evaluation: Sequence[Batch]) -> float:
    labels = torch.cat([batch["labels"].cpu() for batch in evaluation])
    return (logits.argmax(-1) == labels).double().mean().item()


def train(
    arms: Sequence[Arm], order: Sequence[Batch], after_step: Callable[[int, Arm], None] = lambda step, arm: None
) -> None:
    """Every arm takes every step; which of them comes first rotates."""
    for step, batch in enumerate(order):
        first = step % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            arm.step(batch)
            after_step(step, arm)
