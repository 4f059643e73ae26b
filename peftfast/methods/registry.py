"""The methods by name. A method is one file in this folder, found by being there; no other file knows of it.

How a method file is written (``lora_xs.py`` is a short whole one, ``lora.py`` the plainest)::

    @dataclass(frozen=True)
    class Options:                      # the paper's defaults; names as in PEFT where PEFT has the option
        r: int = 8
        lora_alpha: float = 16.0

        def __post_init__(self) -> None:
            at_least_one("r", self.r)   # ValueError that names the option

    @register(
        "my-method",
        paper=Paper("Title", "First Author, Second Author", 2024, "2401.00001"),
        formula="y = x (W + (alpha / r) B A)^T",
        options=Options,
        reduces_to="lora",              # the families that do the work
        kind="layer",                   # one of KINDS
        fused="what runs in peftfast's kernels, and what in torch's own products",
    )
    def build(targets: Targets, options: Options) -> Runtime | None:
        targets.replace(lambda name, linear: MyLinear(linear, options))

``build`` gets the matched layers as :class:`~peftfast.methods.adapting.Targets` and says what stands in the place of each:
``targets.replace(make)`` asks ``make(name, module)`` for a layer; one that raises :class:`~peftfast.methods.adapting.Unsuitable` stays
as it is, with the reason in the report. Nothing of the model is exchanged before ``build`` has returned. A layer is usually a
:class:`~peftfast.methods.factored.FactoredLinear`, of which a method overrides ``factors()``: A, B, the scaling and, where it changes,
the weight, each a tensor with whatever graph behind it. Everything that is no trained parameter of a new layer is frozen.

Methods that read data go through ``targets.data("my-method")``, which yields dictionaries of the model's arguments with a progress bar
and raises where the caller gave none. When an adapter is read from files, ``targets.restoring`` is
True: ``build`` then makes layers of the right shapes without data, and their tensors are copied in afterwards.

What goes on during a training is a :class:`~peftfast.methods.handle.Runtime` that ``build`` returns: ``step`` after each optimiser
step, ``loss`` for a penalty, ``optimizer`` for a method with one of its own, ``state_dict``. One that needs the model's own
outputs, or further passes of it, is a :class:`~peftfast.methods.watching.Watching`, which hooks into the model when the layers
stand. What several layers use is hung into the model by ``targets.share(name, module)``. Operations on saved deltas
(``kind="deltas"``) and optimisers have no ``build``: the decorated function is the operation itself; an optimiser that ``adapt``
can prepare a model for decorates its ``build`` and names the class by ``operation=``.

Files need nothing where a layer is a FactoredLinear: all its tensors that are not ``base_layer``'s are written, and copied back into
the layer that ``build`` makes; ``after_load`` is called then. Other modules may have ``adapter_tensors`` and
``load_adapter_tensors``.

The test of a method is ``tests/support/method_checks.py``'s :func:`check_layer_method` with an independent formula in plain torch, in a
file ``tests/test_methods_*.py``. ``docs/methods.md`` takes its row from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..nn.options import above_zero as above_zero
from ..nn.options import at_least_one as at_least_one
from ..nn.options import one_of as one_of
from ..nn.options import probability as probability
from .unserved import UNSERVED

KINDS = {
    "layer": "an adapter layer",
    "initialisation": "a LoRA layer with an initialisation of its own",
    "moving": "an adapter layer whose rank or support moves while it is trained",
    "deltas": "an operation on saved deltas",
    "optimiser": "an optimiser or a context manager",
}


@dataclass(frozen=True)
class Paper:
    """Where a method was published; ``arxiv`` is its number there, None where there is none."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        where = f", arXiv {self.arxiv}" if self.arxiv else ""
        return f"{self.title} ({self.authors}, {self.year}{where})"


@dataclass(frozen=True)
class PeftFiles:
    """How a method's layers stand in PEFT's files.

    Attributes:
        peft_type: of adapter_config.json.
        write: (handle) -> (entries of the config, tensors by their names in the file). It raises ValueError for what PEFT's class
            cannot express.
        read: (config) -> (options, names of the layers or target_modules) for ``adapt``; the tensors are then given to ``fill``.
        fill: (handle, tensors by name in the file): copies them into the layers.
    """

    peft_type: str
    write: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]
    read: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], Any]]
    fill: Callable[[Any, dict[str, Any]], None]


@dataclass(frozen=True)
class Method:
    """A method as it is registered; see the module."""

    name: str
    paper: Paper
    formula: str
    options: type
    reduces_to: str
    kind: str
    fused: str
    build: Callable[..., Any] | None = None
    operation: Callable[..., Any] | None = None
    peft: str | None = None
    files: PeftFiles | None = None
    choices: str = ""
    exact: bool = True
    reads_data: bool = False
    modules: tuple[type, ...] = (nn.Linear,)
    demo: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3

    def defaults(self) -> dict[str, Any]:
        """Option name -> default, ``required`` where there is none."""
        return {one.name: _default(one) for one in dataclasses.fields(self.options)}


_METHODS: dict[str, Method] = {}
_found = False


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default is not dataclasses.MISSING:
        return option.default
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return "required"


def register(
    name: str,
    *,
    paper: Paper,
    formula: str,
    options: type,
    reduces_to: str,
    kind: str,
    fused: str,
    operation: Callable[..., Any] | None = None,
    peft: str | None = None,
    files: PeftFiles | None = None,
    choices: str = "",
    exact: bool = True,
    reads_data: bool = False,
    modules: tuple[type, ...] = (nn.Linear,),
    demo: Mapping[str, Any] | None = None,
    learning_rate: float = 2e-3,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a method's ``build``; for a kind without one ("deltas", "optimiser") of the operation itself.

    Args:
        name: lower case with hyphens, as the paper writes it otherwise.
        formula: one line of plain text. options: a dataclass of the options, frozen, with the paper's defaults.
        peft: the name of PEFT's config class for it, if PEFT has the method.
        files: PEFT's own files for it; None: plain LoRA files if all its layers are LoRALinear, else the project's own peft_type.
        choices: what the publication leaves open and what was chosen.
        exact: whether the adapted model computes what the base computes until it is trained.
        reads_data: whether ``adapt`` needs ``batches``.
        modules: classes of the modules that it adapts.
        demo: options of the demo's run, where the defaults are meant for larger models. learning_rate: of that run.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {sorted(KINDS)}, got {kind!r}")
    if name in _METHODS:
        raise ValueError(f"name: {name!r} is registered already")

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        without = kind in ("deltas", "optimiser") and operation is None
        _METHODS[name] = Method(
            name, paper, formula, options, reduces_to, kind, fused,
            build=None if without else function,
            operation=function if without else operation,
            peft=peft, files=files, choices=choices, exact=exact, reads_data=reads_data,
            modules=modules, demo=dict(demo or {}), learning_rate=learning_rate,
        )  # fmt: skip
        return function

    return keep


def _find_all() -> None:
    global _found
    if not _found:
        package = __package__ or "peftfast.methods"
        for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
            importlib.import_module(f".{module.name}", package)
        _found = True


def methods() -> dict[str, Method]:
    """Name -> method, of all method files, sorted by name."""
    _find_all()
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        TypeError: not a string. ValueError: no such method; the message says why, or gives those of like names.
    """
    if not isinstance(name, str):
        raise TypeError(f"method: expected a name, got {type(name).__name__}")
    if name not in _METHODS:
        _find_all()
    if name in UNSERVED and name not in _METHODS:
        raise ValueError(f"method: {name!r} is not served: {UNSERVED[name]}")
    if name not in _METHODS:
        like = difflib.get_close_matches(name, _METHODS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(like)}?" if like else ""
        raise ValueError(f"method: no method {name!r}{hint} (`python -m peftfast methods` lists them)")
    return _METHODS[name]


def read_options(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's options dataclass with ``given``.

    Raises:
        TypeError: an unknown option, with the names of the valid ones, or one that has no default is missing. ValueError: a value out
            of range.
    """
    known = method.defaults()
    for name in given:
        if name not in known:
            raise TypeError(f"{method.name}: no option {name!r}; it has {', '.join(known) or 'none'}")
    missing = [
        name for name, value in known.items() if isinstance(value, str) and value == "required" and name not in given
    ]
    if missing:
        raise TypeError(f"{method.name}: option {missing[0]} has no default and must be given")
    try:
        options = method.options(**given)
    except ValueError:
        raise
    except Exception:  # of a comparison or a conversion that such a value does not have
        _check_kinds(method, given)
        raise
    _check_kinds(method, given)
    return options


def _check_kinds(method: Method, given: Mapping[str, Any]) -> None:
    """TypeError or ValueError unless every value is of its default's kind, and finite where that is a number."""
    for name, default in method.defaults().items():
        value = given.get(name, default)
        if default is None or value is default or (isinstance(default, str) and default == "required"):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(default, bool):
            fits, kind = isinstance(value, bool), "True or False"
        elif isinstance(default, int):
            fits, kind = whole, "an int"
        elif isinstance(default, float):
            fits, kind = whole or isinstance(value, float), "a number"
        elif isinstance(default, tuple):
            element = typing.get_args(typing.get_type_hints(method.options)[name])[0]
            fits = isinstance(value, tuple | list) and all(
                isinstance(one, element) and not (element is int and isinstance(one, bool)) for one in value
            )
            kind = f"a tuple of {element.__name__}"
        else:
            fits, kind = isinstance(value, type(default)), type(default).__name__
        if not fits:
            raise TypeError(f"{name}: expected {kind}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
