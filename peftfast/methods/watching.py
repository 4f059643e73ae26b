"""What methods share whose penalty or choice needs the model's own outputs: the last training pass, and further passes
beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapting import AdapterHandle, Runtime

NO_INPUT = ("labels", "num_items_in_batch")  # arguments of a loss, which a pass for logits alone leaves out


@dataclass
class Seen:
    """A training pass of the model: its arguments, and its output with the graph, None where the method does not ask
    for it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Watching(Runtime):
    """Keeps the last training pass of the model (in training mode, with gradients) until :meth:`take`.

    A method may override :meth:`starting`, called before each pass of the model that is not its own, and
    :meth:`evaluated`, which may replace the output of one in evaluation mode.
    """

    wants_output = True

    def __init__(self) -> None:
        self.model: Any = None
        self.seen: Seen | None = None
        self._own = False

    def attach(self, handle: AdapterHandle) -> None:
        self.model = handle.model
        self._hooks = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}  # a graph can be neither copied nor written

    def starting(self, model: nn.Module) -> None:
        """Before a pass of the model."""

    def evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Another output in the place of an evaluation's; None: as it is."""

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._own:
            self.starting(model)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._own:
            return None
        if not model.training:
            return self.evaluated(args, kwargs, output)
        if torch.is_grad_enabled():
            self.seen = Seen(args, kwargs, output if self.wants_output else None)
        return None

    def take(self) -> Seen | None:
        """The last training pass, once; None where there was none since."""
        seen, self.seen = self.seen, None
        return seen

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The model's output in a pass that :class:`Watching` does not see: with gradients where ``training``, else in evaluation
        mode without; ``parameters``: by name, in the place of the model's.

        Raises:
            ValueError: the arguments hold a cache of keys and values, which the pass before has written.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("past_key_values: expected None: two passes cannot write one cache; give use_cache=False")
        self._own = True
        try:
            if training:
                return self.model(*args, **kwargs)
            with torch.no_grad(), evaluating(self.model):
                if parameters is None:
                    return self.model(*args, **kwargs)
                return torch.func.functional_call(self.model, dict(parameters), args, dict(kwargs))
        finally:
            self._own = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then each module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def inputs_of(kwargs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The arguments without those of the loss. An encoder-decoder keeps its labels, from which it forms what its decoder reads."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name not in NO_INPUT}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, which may be a tensor itself.

    Raises:
        ValueError: it has none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"model: expected an output that is a tensor or has logits, got {type(output).__name__}")
    return found


def loss_of(output: Any, method: str) -> Tensor:
    """The loss of a model's output.

    Raises:
        ValueError: it has none.
    """
    found = getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"model: {method} asks for the model's own loss: expected an output with one (labels among the arguments), "
            f"got {type(output).__name__}"
        )
    return found
