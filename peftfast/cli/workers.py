"""Several workers of one command, as torchrun and ``accelerate launch`` start them: a process for each GPU, which trains on its part of
every batch. The first writes and is heard."""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

# What a launcher tells each process; without all of them it is on its own, whatever its surroundings have left in one.
TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def _launched() -> bool:
    return all(os.environ.get(one, "").isdigit() for one in TOLD)


def _told(name: str) -> int:
    return int(os.environ[name]) if _launched() else int(name == "WORLD_SIZE")


def count() -> int:
    """How many there are."""
    return _told("WORLD_SIZE")


def number() -> int:
    """Which this one is, from 0."""
    return _told("RANK")


def first() -> bool:
    return number() == 0


def device(kind: str) -> str:
    """This worker's device: "cpu", or of the machine's GPUs the one with its number there.

    Raises:
        UserError: there are more workers than GPUs.
    """
    if kind == "cpu" or not _launched():
        return kind
    import torch

    local, there = _told("LOCAL_RANK"), torch.cuda.device_count()
    if local >= there:
        raise UserError(
            f"--device: worker {local + 1} of this machine has no GPU, torch finds {there}; expected as many workers as GPUs"
        )
    return f"cuda:{local}"


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """What the first prints is printed once; the others' standard output goes nowhere."""
    with contextlib.ExitStack() as stack:
        if not first():
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            )
        yield


@contextlib.contextmanager
def together(device: str, extra: Mapping[str, Any]) -> Iterator[None]:
    """Begins when all workers are there; ``extra``: TrainingArguments that were given. The process group is the Trainer's too."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState
    from torch import distributed

    begun = not distributed.is_initialized()
    if begun:
        timeout = datetime.timedelta(seconds=extra.get("ddp_timeout", 1800))
        PartialState(cpu=device == "cpu", backend=extra.get("ddp_backend"), timeout=timeout)
    distributed.barrier()
    yield
    if begun:  # not after an error, where others may wait for an answer in it
        distributed.destroy_process_group()


def to_the_first(folder: Path, pattern: str) -> dict[str, bytes]:
    """The files of all workers' folders whose names match: to the first their contents by name, to the others nothing."""
    own = {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))} if folder.is_dir() else {}
    if count() == 1:
        return own
    from torch import distributed

    every: list[Any] | None = [None] * count() if first() else None
    distributed.gather_object(own, every)
    return {name: contents for one in every or () for name, contents in one.items()}


def check_same(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError where the workers' tensors are not of the same names, shapes and bits."""
    if count() > 1:
        from ..optim.exchange import Exchange

        exchange = Exchange(True)
        exchange.agree_on(0, list(tensors), [tensor.shape for tensor in tensors.values()])
        exchange.check_same(list(tensors), list(tensors.values()))
