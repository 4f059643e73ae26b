"""Several workers of one command, as torchrun and ``accelerate launch`` start them: a process for each GPU, which trains on its part of
every batch. The first writes and is heard."""

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .arguments import first_line
from .errors import UserError

# What a launcher tells each process; without all of them it is on its own, whatever its surroundings have left in one.
TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
# What accelerate reads beside them, and each of them alone.
READ_BY_ACCELERATE = (*TOLD, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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
    """Begins when all workers are there; ``extra``: TrainingArguments that were given. The process group is the Trainer's too.

    Raises:
        UserError: they cannot meet.
    """
    if not _launched():
        left = {name: os.environ.pop(name) for name in READ_BY_ACCELERATE if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(left)
        return
    if count() == 1:
        yield
        return
    from accelerate.state import AcceleratorState, PartialState
    from torch import distributed

    begun = not distributed.is_initialized()
    timeout = datetime.timedelta(seconds=extra.get("ddp_timeout", 1800))
    # It makes this worker's device the current one, and the group where there is none; done before, it would do neither.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        PartialState(cpu=device == "cpu", backend=extra.get("ddp_backend"), timeout=timeout)
        distributed.barrier()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the workers cannot begin together: {first_line(error)}") from None
    if begun:  # kept for another run in this process: where the workers met once, they find what they left there
        atexit.register(distributed.destroy_process_group)
    try:
        yield
    except BaseException:  # others may wait for an answer in it
        atexit.unregister(distributed.destroy_process_group)
        raise


def to_the_first(folder: Path, pattern: str) -> dict[str, bytes]:
    """The files of all workers' folders whose names match: to the first their contents by name, to the others nothing."""
    own = {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))} if folder.is_dir() else {}
    if count() == 1:
        return own
    from torch import distributed

    every: list[Any] | None = [None] * count() if first() else None
    distributed.gather_object(own, every)
    return {name: contents for one in every or () for name, contents in one.items()}


def mean(value: float) -> float:
    """Of the workers' values, which all give theirs."""
    if count() == 1:
        return value
    from torch import distributed

    every = [value] * count()
    distributed.all_gather_object(every, value)
    return sum(every) / len(every)


def check_same(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError where the workers' tensors are not of the same names, shapes and bits."""
    if count() > 1:
        from ..optim.exchange import Exchange

        exchange = Exchange(True)
        exchange.agree_on(0, list(tensors), [tensor.shape for tensor in tensors.values()])
        exchange.check_same(list(tensors), list(tensors.values()))
