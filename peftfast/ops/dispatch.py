"""How an operator is registered with torch.library and how one of its implementations is chosen.

An operator is a schema, a check (its contract), a fake built on that check, and an ordered table of implementations. Each
implementation answers ``(ok, reason)`` for given arguments; the first that accepts runs, and the reasons of the others are what
``doctor`` and the patch report print.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configs.variable import raw, watch
from ..kernels import launch as launches  # type: ignore[attr-defined]
from . import replay

logger = logging.getLogger("peftfast")

NAMESPACE = "peftfast"
BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "PEFTFAST_BACKEND"

Verdict = tuple[bool, str]

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_reported: set[tuple[str, str, str]] = set()
# Backend -> whether this process has it, from the tables of all operators: one may be asked of an operator that has no row for it.
_available: dict[str, Callable[[], Verdict]] = {}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    ``available`` says whether the backend can be used in this process at all; ``accepts`` and ``run`` take the operator's
    arguments. ``accepts`` may assume that the backend is available and the operator's check has passed.
    """

    backend: str
    available: Callable[[], Verdict]
    accepts: Callable[..., Verdict]
    run: Callable[..., Any]


_VARIABLE_KEY = watch(BACKEND_VARIABLE)


def requested_backend() -> str | None:
    """The backend named by the environment, or None. An unknown name is an error."""
    if not raw(_VARIABLE_KEY):
        return None
    name = os.environ.get(BACKEND_VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class Operator:
    """An operator of the ``peftfast`` namespace; calling it goes through torch's dispatcher, or does again what such a call did before
    (:mod:`peftfast.ops.replay`) where ``replayed`` allows it: on a GPU."""

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable[..., None],
        fake: Callable[..., Any],
        implementations: Sequence[Implementation],
    ) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        for implementation in self.implementations:
            _available.setdefault(implementation.backend, implementation.available)
        self._check = check
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, self._run, "CompositeExplicitAutograd")

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.replayed = replay.Replayed(self._run, self.overload)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if launches.recording():
            return self._run(*args)
        return self.replayed(*args) if replay.allowed(args[0]) else self.overload(*args)

    def verdicts(self, *args: Any) -> list[tuple[Implementation, bool, str]]:
        """Every implementation with whether it would serve these arguments and why not."""
        rows = []
        for implementation in self.implementations:
            ok, reason = implementation.available()
            if ok:
                ok, reason = implementation.accepts(*args)
            rows.append((implementation, ok, reason))
        return rows

    def select(self, *args: Any) -> Implementation:
        """The implementation that serves these arguments. A requested backend that is missing is an error; one that is there but
        does not take these arguments is passed over, with one log line for each reason."""
        requested = requested_backend()
        if requested is None:
            for implementation in self.implementations:
                if implementation.available()[0] and implementation.accepts(*args)[0]:
                    return implementation
            raise RuntimeError(f"peftfast::{self.name}: no implementation accepts these arguments")
        passed_over = f"{requested} does not implement this operator"
        own = {implementation.backend: implementation.available for implementation in self.implementations}
        ok, reason = own.get(requested, _available.get(requested, _unimplemented))()
        if not ok:
            raise RuntimeError(f"{BACKEND_VARIABLE}={requested} was asked for but is missing: {reason}")
        for implementation in self.implementations:
            if implementation.backend != requested:
                continue
            ok, passed_over = implementation.accepts(*args)
            if ok:
                return implementation
        for implementation in self.implementations:
            if (
                implementation.backend != requested
                and implementation.available()[0]
                and implementation.accepts(*args)[0]
            ):
                self._report_once(requested, implementation.backend, passed_over)
                return implementation
        raise RuntimeError(f"peftfast::{self.name}: no implementation accepts these arguments ({passed_over})")

    def _report_once(self, requested: str, chosen: str, reason: str) -> None:
        key = (self.name, requested, reason)
        if key not in _reported:
            _reported.add(key)
            logger.warning("peftfast::%s runs on %s, not on %s: %s", self.name, chosen, requested, reason)

    def _run(self, *args: Any) -> Any:
        self._check(*args)
        return self.select(*args).run(*args)


def require(condition: Any, message: Callable[[], str]) -> None:
    """torch._check, entered only where the condition is not plainly true: at 4 us a call, a layer's forty checks would cost more
    than its launches. A symbolic condition becomes a guard, as torch._check makes it."""
    if condition is not True:
        torch._check(condition, message)


def _unimplemented() -> Verdict:
    return False, "no operator has an implementation for it"


def always() -> Verdict:
    return True, ""


def accept(*_: Any) -> Verdict:
    return True, ""


def reference(run: Callable[..., Any]) -> Implementation:
    """The definition itself as the last row of a table: any device, any floating dtype."""
    return Implementation("reference", always, accept, run)
