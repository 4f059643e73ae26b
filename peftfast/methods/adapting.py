"""``peftfast.adapt``: puts a method on a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..extras import missing
from ..nn.hooks import replace
from ..nn.nf4 import is_bitsandbytes_4bit, why_no_base
from .handle import HANDLE, SHARED, AdapterHandle, Runtime
from .registry import Method, get, read_options

__all__ = ["HANDLE", "SHARED", "AdapterHandle", "Runtime", "Targets", "Unsuitable", "adapt", "is_four_bit", "matched"]


class Unsuitable(Exception):
    """A layer that a method leaves as it is; the text is the reason that the report gives."""


class Targets:
    """The layers that ``target_modules`` chose, for a method's ``build``.

    Attributes:
        model: as it was given, unchanged.
        modules: path -> module, in the model's order.
        restoring: whether files will give the tensors: no data then.
        replacements: path -> new layer, exchanged when ``build`` has returned.
        skipped: path -> reason.
        shared: modules that several layers use, see :meth:`share`.
    """

    def __init__(
        self, model: nn.Module, method: Method, names: Iterable[str], batches: Iterable[Any] | None, restoring: bool
    ) -> None:
        self.model, self.method, self.restoring = model, method, restoring
        self.modules: dict[str, Any] = {}
        self.replacements: dict[str, nn.Module] = {}
        self.skipped: dict[str, str] = {}
        self.shared = nn.ModuleDict()
        self._batches = batches
        for name in names:
            module = model.get_submodule(name)
            reason = _unsuitable(module, method)
            if reason is None:
                self.modules[name] = module
            else:
                self.skipped[name] = reason

    def skip(self, name: str, reason: str) -> None:
        """Leave a layer as it is."""
        self.modules.pop(name, None)
        self.skipped[name] = reason

    def share(self, name: str, module: nn.Module) -> None:
        """Hang something that several layers use into the model, as ``model.peftfast_shared[name]``: it moves, trains and is saved with
        it. A layer refers to it by ``self.__dict__[...]``, so that it is not the layer's own as well."""
        self.shared[name] = module

    def replace(self, make: Callable[[str, Any], nn.Module]) -> None:
        """A new layer for each module; where ``make`` raises :class:`Unsuitable` the module stays, with the reason."""
        for name, module in self.progress(list(self.modules.items()), f"{self.method.name}: layers"):
            try:
                self.replacements[name] = make(name, module)
            except Unsuitable as reason:
                self.skip(name, str(reason))

    def progress(self, items: Sequence[Any], title: str) -> Iterator[Any]:
        """``items`` with a progress bar on a terminal, without one elsewhere or where tqdm is not installed."""
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            yield from items
            return
        yield from tqdm(items, desc=title, disable=not sys.stderr.isatty(), leave=False)

    def data(self, title: str) -> Iterator[dict[str, Any]]:
        """The batches, with a progress bar; each a dictionary of the model's arguments, labels included, on the model's device.

        Raises:
            ValueError: ``adapt`` was given none. TypeError: a batch is not a dictionary.
        """
        if self._batches is None:
            raise ValueError(f"batches: {self.method.name} reads data: give adapt an iterable of the model's arguments")
        if not isinstance(self._batches, Sequence):
            self._batches = list(self._batches)  # a method may go over them twice
        if not self._batches:
            raise ValueError("batches: expected at least one batch, got none")
        device = next(self.model.parameters()).device
        for batch in self.progress(self._batches, title):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches: expected dictionaries of the model's arguments, got {type(batch).__name__}")
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _unsuitable(module: nn.Module, method: Method) -> str | None:
    """Why no method can work on a module, None where one can."""
    if not isinstance(module, method.modules):
        kinds = " or ".join(kind.__name__ for kind in method.modules)
        return f"{type(module).__name__} is not {kinds}"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        if weight.is_meta:
            return "its weight is on the meta device"
        if hasattr(weight, "ds_id"):
            return "its weight is sharded by ZeRO-3"
        if isinstance(module, nn.Linear) and not weight.is_floating_point() and not is_four_bit(module):
            return f"its weight is {weight.dtype}"
    return why_no_base(module) or None


def matched(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    modules_to_save: Sequence[str],
    task_type: str | None,
) -> list[str]:
    """Paths of the modules that PEFT would adapt, by PEFT's own functions.

    Raises:
        ModuleNotFoundError: PEFT is not installed. TypeError, ValueError: neither names nor a regular expression.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    except ModuleNotFoundError as error:
        raise missing("adapt", error.name or "peft") from None

    chosen = _names("target_modules", target_modules)
    if not chosen:
        raise ValueError(f"target_modules: expected names of layers or a pattern, got {target_modules!r}")
    config: Any = LoraConfig(
        target_modules=chosen,
        exclude_modules=None if exclude_modules is None else _names("exclude_modules", exclude_modules),
        modules_to_save=list(modules_to_save) or None,
        task_type=task_type,
    )
    config = _maybe_include_all_linear_layers(config, model)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def _names(argument: str, given: Any) -> str | list[str]:
    """A pattern or a list of names, as PEFT takes them."""
    if isinstance(given, str):
        try:
            re.compile(given)
        except re.error as error:
            raise ValueError(f"{argument}: {given!r} is no regular expression: {error}") from None
        return given
    names = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected names of layers or a pattern, got {given!r}")
    return names


def _check_free(model: nn.Module) -> None:
    """ValueError where the model has adapters already: a second method would freeze them and leave them out of its files."""
    if hasattr(model, "peft_config"):
        raise ValueError("model: a PEFT model has adapters already; expected the model that PEFT was given")
    from ..nn import LoRALinear, RoSALinear, SparseDeltaLinear
    from .factored import FactoredLinear

    for name, module in model.named_modules():
        if HANDLE in module.__dict__:
            where = f" ({name})" if name else ""
            raise ValueError(f"model: adapted already, by {module.__dict__[HANDLE].method.name}{where}")
        if isinstance(module, LoRALinear | SparseDeltaLinear | RoSALinear | FactoredLinear):
            raise ValueError(f"model: {name} is an adapter layer already, a {type(module).__name__}")


def adapt(
    model: nn.Module,
    method: str,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str | None = None,
    batches: Iterable[dict[str, Any]] | None = None,
    **options: Any,
) -> AdapterHandle:
    """Put a method from the literature on a model: its layers are exchanged in place, and everything but the adapters is frozen. Hooks
    on a layer, torch's and accelerate's, go on to the one in its place.

    Args:
        model: any module with linear layers; bitsandbytes' Linear4bit and :class:`peftfast.nn.NF4Linear` are taken over in 4 bits
            where the method allows it.
        method: a name that ``python -m peftfast methods`` lists.
        target_modules, exclude_modules, task_type: as in PEFT, and matched by PEFT's own functions: "all-linear" (with
            task_type="SEQ_CLS" without the head), ends of paths, or a regular expression of a whole path.
        modules_to_save: paths of modules that are trained and saved whole, such as a new head.
        batches: what a method that reads data goes over: a finite iterable of dictionaries of the model's arguments, such as a
            DataLoader. Where several processes adapt a model, all are to be given the same.
        options: the method's own; the defaults are the paper's.

    Returns:
        The handle; the model keeps it as ``model.peftfast_handle``.

    Raises:
        TypeError: an unknown option, with the names of the valid ones. ValueError: an unknown method, an option out of range, no layer
            that fits, or no data for a method that reads it. Nothing of the model is changed then.
    """
    return _adapt(model, method, target_modules, exclude_modules, modules_to_save, task_type, batches, options, False)


def _adapt(
    model: nn.Module,
    name: str,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    modules_to_save: Sequence[str],
    task_type: str | None,
    batches: Iterable[dict[str, Any]] | None,
    given: dict[str, Any],
    restoring: bool,
) -> AdapterHandle:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    method = get(name)
    if method.build is None:
        operation = f"{method.operation.__module__}.{method.operation.__name__}" if method.operation else "a function"
        raise ValueError(f"method: {name} is {KIND_WORDS[method.kind]}, not put on a model by adapt: see {operation}")
    _check_free(model)
    options = read_options(method, given)
    if isinstance(modules_to_save, str) or not isinstance(modules_to_save, Iterable):
        raise TypeError(f"modules_to_save: expected a sequence of paths, got {modules_to_save!r}")
    kept, known = list(modules_to_save), dict(model.named_modules())
    for module in kept:
        if module not in known:
            raise ValueError(f"modules_to_save: the model has no module {module!r}")
    names = matched(model, target_modules, exclude_modules, kept, task_type)
    targets = Targets(model, method, names, batches, restoring)
    if not targets.modules:
        reasons = "; ".join(sorted(set(targets.skipped.values())))
        raise ValueError(
            f"target_modules: {target_modules!r} matches no layer that {name} adapts"
            + (f": {reasons}" if reasons else "")
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(False)
        runtime = method.build(targets, options)
        if not targets.replacements and not targets.modules:
            raise ValueError(
                f"target_modules: {name} adapts none of the layers: {'; '.join(sorted(set(targets.skipped.values())))}"
            )
    except BaseException:
        for parameter, flag in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(flag)
        raise
    finally:
        for submodule, training in was_training:
            submodule.training = training
    for path, layer in targets.replacements.items():
        layer.train(model.get_submodule(path).training)
        replace(model, path, layer)
    if len(targets.shared):
        model.add_module(SHARED, targets.shared)
    for module in kept:
        model.get_submodule(module).requires_grad_(True)
    handle = AdapterHandle(
        model, method, options, dict(targets.replacements), targets.skipped, kept, runtime or Runtime()
    )
    handle.task_type = task_type
    model.__dict__[HANDLE] = handle
    handle.runtime.attach(handle)
    return handle


KIND_WORDS = {"deltas": "an operation on saved deltas", "optimiser": "an optimiser or a context manager"}


def is_four_bit(module: nn.Module) -> bool:
    """Whether a linear layer's weight is in 4 bits, bitsandbytes' or peftfast's."""
    from ..nn import NF4Linear

    return isinstance(module, NF4Linear) or is_bitsandbytes_4bit(module)
