"""One call for a group of patched layers: whether they may run together on an input, and the call itself."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.lora import draw_seed
from ..functional.lora_multi import apply_group
from ..functional.lora_projections import by_library, projections_of
from ..functional.nf4_product import has_a_way_alone
from ..functional.precision import compute_dtype_of
from ..nn.hooks import hooked
from . import bitsandbytes as bnb
from .peft_call import VERDICT, Verdict, active_names, remember
from .peft_guards import has_dora, plain_layout, why_stock, why_stock_for

_VERSION = operator.attrgetter("_version")
_NEEDS = operator.attrgetter("requires_grad")

Numbers = tuple[Any, ...]  # scalings, dropout probabilities, then what is compared alone


def numbers_of(layer: Any, verdict: Verdict) -> Numbers:
    """What a result depends on beside the tensors that a verdict knows: scalings and dropout of the adapters, the versions of the
    parameters, and which of them need gradients."""
    if verdict.short:  # the common case, at half the time
        name, a, b, _, dropout, _ = verdict.adapters[0]
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        own = (a._version, b._version, verdict.weight._version, a.requires_grad, b.requires_grad)
        return (layer.scaling[name],), (p,), own
    scalings, ps = [], []
    for name, _, _, _, dropout, magnitude in verdict.adapters:
        scalings.append(layer.scaling[name])
        # PEFT drops nothing of DoRA's input where the layer itself is not in training.
        active = dropout.training and type(dropout) is nn.Dropout and (magnitude is None or layer.training)
        ps.append(dropout.p if active else 0.0)
    parameters = verdict.parameters
    return tuple(scalings), tuple(ps), tuple(map(_VERSION, parameters)), tuple(map(_NEEDS, parameters))


def _verdict_of(layer: Any) -> Verdict | None:
    """The layer's verdict, made anew where the last one does not hold; None where it runs stock."""
    verdict: Verdict | None = layer.__dict__.get(VERDICT)
    if verdict is not None and verdict.holds(layer):
        return verdict
    names = active_names(layer)
    if not names or layer.disable_adapters or layer.merged or why_stock(layer, names):
        return None
    active = layer._active_adapter
    remember(layer, active if isinstance(active, str) else list(active), names)
    return layer.__dict__[VERDICT]  # type: ignore[no-any-return]


class _Known:
    """What follows from the members' verdicts alone."""

    def __init__(self, verdicts: tuple[Verdict, ...]) -> None:
        self.verdicts = verdicts
        first = verdicts[0]
        self.width, self.dtype, self.device, self.device_type = (
            first.width,
            first.dtype,
            first.device,
            first.device_type,
        )
        self.alike = all(
            one.width == first.width and one.device == first.device and not one.inference for one in verdicts
        )
        self.short = self.alike and all(one.short and one.dtype is first.dtype for one in verdicts)
        self.plain = None
        if self.short:
            adapters = [verdict.adapters[0] for verdict in verdicts]
            self.plain = projections_of(
                first.dtype,
                [verdict.weight for verdict in verdicts],
                [a for _, a, *_ in adapters],
                [b for _, _, b, *_ in adapters],
                [verdict.bias for verdict in verdicts],
                [lora_bias for _, _, _, lora_bias, *_ in adapters],
            )

    def takes(self, x: Tensor) -> bool:
        """Whether nothing more has to be asked: one LoRA adapter each, on dense bases of x's own dtype."""
        return (
            self.short
            and type(x) is Tensor
            and plain_layout(x)
            and x.dtype is self.dtype
            and x.device == self.device
            and not torch.is_autocast_enabled(self.device_type)
        )


class Shared:
    """What the calls of a group share. It keeps no member alive."""

    def __init__(self, members: tuple[Any, ...]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self.hooks = [
            hooks
            for member in members
            for hooks in (
                member._forward_hooks,
                member._forward_pre_hooks,
                member._backward_hooks,
                member._backward_pre_hooks,
            )
        ]
        self.known: _Known | None = None

    def members(self) -> list[Any]:
        """None where one is no more."""
        return [member() for member in self._members]

    def verdicts(self, x: Tensor) -> tuple[Verdict, ...] | None:
        """The members' verdicts, where all may run together on x."""
        if torch.is_grad_enabled() and x.grad_fn is None:
            # Two heads on features may be trained by a backward pass each, and one node cannot be run twice. Where there is a graph
            # behind x, it is in the same case.
            return None
        if any(self.hooks):
            return None
        found = []
        members = self.members()
        for member in members:
            if member is None or ("forward" in member.__dict__ and hooked(member)):
                return None
            verdict = _verdict_of(member)
            if verdict is None:
                return None
            found.append(verdict)
        known = self.known
        if known is None or not all(map(operator.is_, known.verdicts, found)):
            known = self.known = _Known(tuple(found))
        if not known.alike or not x.dim() or x.shape[-1] != known.width:
            return None
        if known.takes(x):
            return known.verdicts
        for member, verdict in zip(members, found, strict=True):
            if why_stock_for(member, x) or (verdict.nf4 is not None and _served_alone(member, verdict, x)):
                return None
        kinds = {_dtypes(member, verdict, x) for member, verdict in zip(members, found, strict=True)}
        return known.verdicts if len(kinds) == 1 else None

    def run(self, x: Tensor, verdicts: tuple[Verdict, ...], numbers: Sequence[Numbers]) -> tuple[Tensor, ...]:
        known = self.known
        if known is None or known.verdicts is not verdicts:  # another thread has asked meanwhile, of other adapters
            known = _Known(verdicts)
        if known.plain is not None and known.takes(x) and known.plain.uniform():
            ps = tuple([own[1][0] for own in numbers])
            scalings = tuple([own[0][0] for own in numbers])
            plain = known.plain
            return by_library.call(x, _seeds(x, ps), ps, scalings, plain, *plain.a, *plain.b)  # type: ignore[no-any-return]
        return self._general(x, verdicts, numbers)

    def _general(self, x: Tensor, verdicts: tuple[Verdict, ...], numbers: Sequence[Numbers]) -> tuple[Tensor, ...]:
        projections, terms = [], []
        members = self.members()
        for member, verdict, (scalings, ps, *_) in zip(members, verdicts, numbers, strict=True):
            # On a CPU each layer draws its own seeds, as it does alone; else one draw follows for all, see _seeds.
            seeds: Any = draw_seed(x, len(ps)).split(1) if x.is_cpu and any(ps) else (None,) * len(ps)
            own = [
                F.Adapter(a, b, scaling, lora_bias, p, seed)
                for (_, a, b, lora_bias, _, _), scaling, p, seed in zip(
                    verdict.adapters, scalings, ps, seeds, strict=True
                )
            ]
            magnitude = verdict.adapters[0][5] if has_dora(member, verdict.adapters[0][0]) else None
            weight = verdict.weight if verdict.nf4 is None else verdict.nf4
            projections.append((weight, verdict.bias, None if magnitude is None else magnitude.weight))
            terms.append(own)
        dtype, out_dtype = _dtypes(members[0], verdicts[0], x)
        return apply_group(x, projections, terms, None, True, dtype, out_dtype)


def _compute_dtype(layer: Any, verdict: Verdict, x: Tensor) -> torch.dtype | None:
    return bnb.compute_dtype_for(layer.base_layer, x) if verdict.four_bit else None


def _dtypes(layer: Any, verdict: Verdict, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the products and of the result."""
    if verdict.short and x.dtype is verdict.dtype and not torch.is_autocast_enabled(verdict.device_type):
        return x.dtype, x.dtype
    asked = _compute_dtype(layer, verdict, x)
    dtype = compute_dtype_of(x, asked)
    return dtype, dtype if asked is None else x.dtype


def _served_alone(layer: Any, verdict: Verdict, x: Tensor) -> bool:
    """Whether a 4-bit layer has a way of its own for this input, which a group has not."""
    assert verdict.nf4 is not None
    ranks = sum(b.shape[1] for _, _, b, *_ in verdict.adapters)
    return has_a_way_alone(x, verdict.nf4, ranks, _dtypes(layer, verdict, x)[0])


def _seeds(x: Tensor, ps: tuple[float, ...]) -> Tensor | None:
    """An int64 for each projection. On a CPU those that the layers alone would draw, so that what follows in the generator's sequence
    is the same, too: a CPU's generator gives for one draw of several what it gives for several draws. A GPU's does not, and each draw
    is a launch: there it is one for all, of masks as independent as those of the layers alone, but not the same ones."""
    if not any(ps):
        return None
    if all(ps) or not x.is_cpu:
        return draw_seed(x, len(ps))
    seeds = torch.zeros(len(ps), dtype=torch.int64, device="cpu")
    for t, p in enumerate(ps):
        if p:
            seeds[t : t + 1].random_(0, 2**63 - 1)
    return seeds
