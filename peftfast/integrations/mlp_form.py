"""Recognising a gated MLP by its code: whether a forward is down(act(gate(x)) * up(x)) and nothing else.

A forward whose instructions neither branch nor store nor name anything but torch is a fixed expression of its members. Called once with
stand-ins for ``self`` and x it gives that expression, whatever the members are called and in whichever model. What no finite number of
inputs could show, that there is no branch on data or on a flag, the instructions show.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# What may stand in such a forward, under the names of Python 3.11 to 3.14. An instruction that is not known makes it another one.
_PLAIN = frozenset(
    """RESUME CACHE NOP NOT_TAKEN EXTENDED_ARG PUSH_NULL PRECALL CALL CALL_KW KW_NAMES COPY SWAP POP_TOP BINARY_OP
    LOAD_FAST LOAD_FAST_BORROW LOAD_FAST_CHECK LOAD_FAST_LOAD_FAST LOAD_FAST_BORROW_LOAD_FAST_BORROW
    STORE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST
    LOAD_ATTR LOAD_METHOD LOAD_GLOBAL LOAD_CONST LOAD_SMALL_INT RETURN_VALUE RETURN_CONST""".split()
)
_MODULES = (torch, nn, functional)
_PRODUCTS = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply)


@dataclass(frozen=True)
class Function:
    """A function of torch that is an activation, and where it is looked up: replaced there, it is another."""

    function: Any
    home: Any
    name: str

    def holds(self) -> bool:
        return getattr(self.home, self.name, None) is self.function


_SILU = Function(functional.silu, functional, "silu")
_GELU = Function(functional.gelu, functional, "gelu")
_RELUS = (Function(functional.relu, functional, "relu"), Function(torch.relu, torch, "relu"))
_FUNCTIONS = {one.function: one for one in (_SILU, _GELU, *_RELUS)}


def _functions_hold() -> bool:
    return all([one.holds() for one in _FUNCTIONS.values()])


_STOCK = {kind: kind.forward for kind in (nn.SiLU, nn.GELU, nn.ReLU)}


def _name_of(function: Any, options: dict[str, Any]) -> str:
    """The activation that a function of torch is with these keyword arguments; "" if none that is known."""
    known = _FUNCTIONS.get(function)
    if known is None or not known.holds():
        return ""
    if known is _GELU:
        approximate = options.get("approximate", "none") if set(options) <= {"approximate"} else None
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")  # type: ignore[arg-type]
    return known.name if all(key == "inplace" and value is False for key, value in options.items()) else ""


class _NotPlain(Exception):
    """A stand-in was used as no gated MLP uses it."""


class _Value:
    """Stands for x and for all that is made of it. ``made`` is "x", a member's name, an activation's, or "*"; ``of`` its operands."""

    __slots__ = ("calls", "made", "of")

    def __init__(self, calls: list[str], made: str, *of: Any) -> None:
        self.calls, self.made, self.of = calls, made, of

    def __mul__(self, other: Any) -> _Value:
        if not isinstance(other, _Value):
            raise _NotPlain
        return _Value(self.calls, "*", self, other)

    def __imul__(self, other: Any) -> _Value:
        raise _NotPlain  # writes into what a layer gave, and keeps its shape and dtype

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), options: Any = None) -> _Value:
        options = options or {}
        if function in _PRODUCTS and len(args) == 2 and not options:
            return args[0] * args[1]  # type: ignore[no-any-return]
        name = _name_of(function, options)
        if not name or len(args) != 1 or not isinstance(args[0], _Value):
            raise _NotPlain
        return _Value(args[0].calls, f"act:{name}", args[0])


class _Member:
    """Stands for an attribute of ``self``."""

    __slots__ = ("calls", "name")

    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, *args: Any) -> _Value:
        if len(args) != 1 or not isinstance(args[0], _Value):
            raise _NotPlain
        self.calls.append(self.name)
        return _Value(self.calls, f"member:{self.name}", args[0])


class _Self:
    def __init__(self, calls: list[str]) -> None:
        self.__dict__["_calls"] = calls

    def __getattr__(self, name: str) -> _Member:
        return _Member(self.__dict__["_calls"], name)


Names = tuple[tuple[str, Any], ...]


def _expression(function: Any) -> tuple[_Value, Names] | None:
    """What a forward makes of x, and what of its module it named; None where it is no plain expression."""
    if type(function) is not types.FunctionType:
        return None
    code = function.__code__
    simple = _ordinary(code) and code.co_argcount == 2 and not code.co_kwonlyargcount and not code.co_freevars
    if not simple or code.co_exceptiontable:
        return None
    names = []
    for instruction in dis.get_instructions(code):
        if instruction.opname not in _PLAIN:
            return None
        if instruction.opname == "LOAD_GLOBAL":
            value = function.__globals__.get(instruction.argval)
            if not any(value is one for one in _MODULES) and not (callable(value) and _known(value)):
                return None
            names.append((instruction.argval, value))
    calls: list[str] = []
    try:
        value = function(_Self(calls), _Value(calls, "x"))
    except Exception:  # whatever it is, the forward is another one
        return None
    return (value, tuple(names)) if isinstance(value, _Value) else None


def _known(function: Any) -> bool:
    try:
        return function in _FUNCTIONS or function in _PRODUCTS
    except TypeError:
        return False


def _ordinary(code: types.CodeType) -> bool:
    """Whether it is an ordinary function of positional arguments: no generator, no coroutine, no ``*args``."""
    return not code.co_flags & 0x2AC  # VARARGS, VARKEYWORDS, GENERATOR, COROUTINE, ASYNC_GENERATOR


@dataclass(frozen=True)
class Form:
    """down(act(gate(x)) * up(x)), as a class's forward has it.

    Attributes:
        function: the forward. code: its code, which could be exchanged.
        gate, up, down: attributes. act: an attribute too, or "" where torch's own function ``activation`` is called.
        up_called_first: up(x) comes before gate(x). up_is_left: the product is up * act.
        names: of its module, as the forward found them.
    """

    function: Any
    code: Any
    gate: str
    up: str
    down: str
    act: str
    activation: str
    up_called_first: bool
    up_is_left: bool
    names: Names

    def holds(self, function: Any) -> bool:
        """Whether a class's forward is still the one that was looked at."""
        if function is not self.function or function.__code__ is not self.code:
            return False
        named = all([function.__globals__.get(name) is value for name, value in self.names])
        return named and (self.act != "" or _functions_hold())

    def __str__(self) -> str:
        act = f"{self.act or self.activation}({self.gate})"
        return f"{self.down}({self.up} * {act})" if self.up_is_left else f"{self.down}({act} * {self.up})"


_forms: weakref.WeakKeyDictionary[Any, Form | None] = weakref.WeakKeyDictionary()


def form_of(kind: type) -> Form | None:
    """The form of a module class's forward, if it is a gated MLP's."""
    function = kind.__dict__.get("forward") or getattr(kind, "forward", None)
    if type(function) is not types.FunctionType:
        return None
    known = _forms.get(function)
    if known is not None and known.holds(function):
        return known
    if function not in _forms or known is not None:
        _forms[function] = _form(function)
    return _forms[function]


def _form(function: Any) -> Form | None:
    found = _expression(function)
    if found is None:
        return None
    value, names = found
    kind, _, down = value.made.partition(":")
    if kind != "member" or value.of[0].made != "*":
        return None
    left, right = value.of[0].of
    for acted, plain in ((left, right), (right, left)):
        kind, _, up = plain.made.partition(":")
        if kind != "member" or plain.of[0].made != "x":
            continue
        kind, _, act = acted.made.partition(":")
        if kind not in ("member", "act"):
            continue
        inner_kind, _, gate = acted.of[0].made.partition(":")
        if inner_kind != "member" or acted.of[0].of[0].made != "x":
            continue
        members = [gate, up, down] + ([act] if kind == "member" else [])
        if sorted(value.calls) != sorted(members) or len(set(members)) != len(members):
            continue  # something more is called, or one of them twice
        own, by_torch = (act, "") if kind == "member" else ("", act)
        first = value.calls.index(up) < value.calls.index(gate)
        return Form(function, function.__code__, gate, up, down, own, by_torch, first, plain is left, names)
    return None


def activation_of(act: Any) -> str:
    """Which of the known activations a callable is: a function of torch, torch's module for it, or a module whose forward calls one of
    them and nothing else. "" for any other; one that works in place is another."""
    kind = type(act)
    stock = _STOCK.get(kind)
    if kind is nn.SiLU and kind.forward is stock:  # the common case, at a third of the time
        return "silu" if act.inplace is False and functional.silu is _SILU.function else ""
    if stock is not None:
        if kind.forward is not stock:
            return ""
        if kind is nn.GELU:
            return _name_of(functional.gelu, {"approximate": act.approximate})
        return _name_of(functional.silu if kind is nn.SiLU else functional.relu, {"inplace": act.inplace})
    if isinstance(act, nn.Module):
        if kind.__call__ is not nn.Module.__call__:
            return ""
        plain = _plain_activation(kind.forward)
        if plain is None or not all(kind.forward.__globals__.get(name) is value for name, value in plain[1]):
            return ""
        within, _, name = plain[0].partition(":")
        if within == "member":
            inner = getattr(act, name, None)
            return "" if isinstance(inner, nn.Module) else activation_of(inner)
        return name if _functions_hold() else ""
    if kind is functools.partial:
        return "" if act.args else _name_of(act.func, act.keywords)
    try:
        return _name_of(act, {})
    except TypeError:  # not hashable
        return ""


@functools.lru_cache(maxsize=256)
def _plain_activation(function: Any) -> tuple[str, Names] | None:
    """What a forward that is one call on x calls."""
    found = _expression(function)
    if found is None or not found[0].of or getattr(found[0].of[0], "made", "") != "x" or found[0].made == "*":
        return None
    return found[0].made, found[1]
