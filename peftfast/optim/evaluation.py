"""The losses of a step at its moved weights, by the two ways to move them: float64 ``[directions, sides, micro-batches]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional as F
from . import in_flight, low_rank
from .arguments import Closure, loss_of, same_random_numbers
from .discovery import Layout, discover


class Evaluations:
    """What both ways share, and what they ask of the optimiser that they are mixed into."""

    eps: float
    distribution: str
    directions: int
    rank: int | None
    two_sided: bool
    paired_fallbacks: list[str]
    _parameters: list[Tensor]
    _names: list[str]
    _ids: list[int]
    _device: torch.device
    _eps: Tensor
    _minus_eps: Tensor
    _thresholds: Tensor | None
    _rademacher: bool
    _modules: dict[int, str]
    _layout: Layout | None
    _saved: list[Tensor]

    def _run(self, closures: Sequence[Closure], paired: bool = False) -> Tensor:
        """float64 ``[micro-batches]``, or ``[2, micro-batches]`` of a paired closure."""
        torch.clear_autocast_cache()  # an autocast around the step would remember copied weights where they were before
        losses = [loss_of(closure(), self._device, 2 if paired else 1) for closure in closures]
        stacked = torch.stack(losses)
        return stacked.T.contiguous() if paired else stacked.reshape(-1)


class ExactEvaluations(Evaluations):
    """Layers moved in flight, the few other parameters copied: the weights are as before when this returns."""

    def _exact_losses(self, closures: Sequence[Closure], seeds: Tensor, paired: bool) -> Tensor:
        with same_random_numbers(self._device) as rewind:
            base = None
            if self._layout is None:
                found = self._discover(closures, paired)
                base = None if paired else found
                rewind()
            assert self._layout is not None
            self._keep_copies()
            if paired:
                self._check_paired()
            try:
                sides = []
                if not self.two_sided and base is None:
                    base = self._run(closures)
                    rewind()
                for i in range(self.directions):
                    seed = seeds[i : i + 1]
                    if paired:
                        sides.append(self._evaluate(closures, seed, self._eps, rewind, paired=True))
                    else:
                        plus, minus = self._evaluate(closures, seed, self._eps, rewind), base
                        if self.two_sided:
                            rewind()
                            minus = self._evaluate(closures, seed, self._minus_eps, rewind)
                        sides.append(torch.stack((plus, minus)))  # type: ignore[arg-type]
                    if i + 1 < self.directions:
                        rewind()
            finally:
                if self._layout.copied:
                    torch._foreach_copy_([self._parameters[i].detach() for i in self._layout.copied], self._saved)
        return torch.stack(sides)

    def _discover(self, closures: Sequence[Closure], paired: bool = False) -> Tensor:
        found: list[Tensor] = []
        self._layout = discover(lambda: found.append(self._run(closures, paired)), self._parameters)
        return found[0]

    def _keep_copies(self) -> None:
        assert self._layout is not None
        copied = [self._parameters[i].detach() for i in self._layout.copied]
        kinds = [[(p.dtype, p.shape) for p in held] for held in (self._saved, copied)]
        if kinds[0] != kinds[1]:  # the first time, or the model was cast
            self._saved = [p.clone(memory_format=torch.contiguous_format) for p in copied]
        elif copied:
            torch._foreach_copy_(self._saved, copied)

    def _evaluate(
        self, closures: Sequence[Closure], seed: Tensor, scale: Tensor, rewind: Callable[[], None], paired: bool = False
    ) -> Tensor:
        assert self._layout is not None
        layout = self._layout
        direction = in_flight.Direction(
            seed, scale, self._eps, self._ids, self._thresholds, self._rademacher, self.rank, paired=paired
        )
        self._move_copies(layout, seed, scale)
        with in_flight.perturbing(layout, direction):
            losses = self._run(closures, paired)
        calls = frozenset(direction.called)
        if calls not in layout.known_calls and self._found_outside(closures, rewind, paired):
            rewind()
            return self._evaluate(closures, seed, scale, rewind, paired)
        self._layout.known_calls.add(calls)
        if paired:
            named = [self._modules.get(id(m), type(m).__name__) for m in direction.fallbacks]
            self.paired_fallbacks = sorted({*self.paired_fallbacks, *named})
        return losses

    def _move_copies(self, layout: Layout, seed: Tensor, scale: Tensor) -> None:
        dense = [k for k, i in enumerate(layout.copied) if not low_rank.serves(self._parameters[i], self.rank)]
        if dense:
            indices = [layout.copied[k] for k in dense]
            limits = None
            if self._thresholds is not None:
                limits = torch.cat([self._thresholds[i : i + 1] for i in indices])
            F.perturb_(
                [self._parameters[i].detach() for i in indices],
                seed,
                scale,
                distribution=self.distribution,
                tensor_ids=[self._ids[i] for i in indices],
                thresholds=limits,
                sources=[self._saved[k] for k in dense],
            )
        for k, i in enumerate(layout.copied):
            if self.rank is not None and k not in dense:
                target = self._parameters[i].detach()
                target.copy_(self._saved[k])
                low_rank.move_(target, seed, scale, self._ids[i], self.rank, self._rademacher)

    def _found_outside(self, closures: Sequence[Closure], rewind: Callable[[], None], paired: bool) -> bool:
        """Other layers were called than ever before: whether some weight is now read where it was not moved. The closure is watched
        again, and such weights are copied from now on."""
        assert self._layout is not None
        old = self._layout
        if old.copied:
            torch._foreach_copy_([self._parameters[i].detach() for i in old.copied], self._saved)
        rewind()
        self._discover(closures, paired)
        new = self._layout
        served = {held.index for helds in old.modules.values() for held in helds}
        read = {held.index for helds in new.modules.values() for held in helds}
        silent = served - read - new.read_outside
        # Layers that this call does not use at all stay as they were.
        for module, helds in old.modules.items():
            kept = [held for held in helds if held.index in silent]
            if kept:
                new.modules[module] = [*new.modules.get(module, []), *kept]
        new.copied = sorted(set(new.copied) - silent | set(old.copied))
        for module in list(new.modules):
            new.modules[module] = [held for held in new.modules[module] if held.index not in set(new.copied)]
        new.modules = {module: helds for module, helds in new.modules.items() if helds}
        new.known_calls |= old.known_calls
        changed = set(new.copied) != set(old.copied)
        if changed:
            new.known_calls = {frozenset(id(module) for module in new.modules)}
            self._saved = []
        self._keep_copies()
        return changed

    def _check_paired(self) -> None:
        assert self._layout is not None
        # A module with others inside it cannot be run half by half: those inside would halve their batches again.
        outer = [h.index for m, helds in self._layout.modules.items() if any(m.children()) for h in helds]
        if left := sorted({*self._layout.copied, *outer}):
            raise ValueError(
                "paired: these parameters cannot have two values at once: they are read outside the forward of the module that holds "
                f"them, or it has modules inside: {', '.join(self._names[i] for i in left)}"
            )
        if self._layout.random:
            raise ValueError(
                "paired: the closure draws random numbers, which would differ between the two halves of the batch; switch dropout "
                "off (model.eval()), or do not pair"
            )


class InplaceEvaluations(Evaluations):
    """The moves written into the weights."""

    def _inplace_losses(self, closures: Sequence[Closure], seeds: Tensor) -> Tensor:
        """Leaves the weights at the last side of the last direction; :meth:`_update` restores and updates in one pass."""
        at: list[tuple[Tensor, Tensor]] = []  # what the weights are moved by now: (seed, scale)
        away = self._eps + self._eps
        sides: list[Tensor] = []
        with same_random_numbers(self._device) as rewind:
            try:
                base = None
                if not self.two_sided:
                    base = self._run(closures)
                    rewind()
                for i in range(self.directions):
                    seed = seeds[i : i + 1]
                    # Back from the direction before and out along this one, in one pass.
                    self._move([(s, -c) for s, c in at] + [(seed, self._eps)])
                    at = [(seed, self._eps)]
                    plus = self._run(closures)
                    if self.two_sided:
                        rewind()
                        self._move([(seed, -away)])
                        at = [(seed, self._minus_eps)]
                        minus = self._run(closures)
                    else:
                        assert base is not None
                        minus = base
                    sides.append(torch.stack((plus, minus)))
                    if i + 1 < self.directions:
                        rewind()
                return torch.stack(sides)
            except BaseException:
                if at:
                    self._move([(s, -c) for s, c in at])
                raise

    def _move(self, terms: Sequence[tuple[Tensor, Tensor]]) -> None:
        seeds, scales = (torch.cat(part) for part in zip(*terms, strict=True))
        parameters = [p.detach() for p in self._parameters]
        F.perturb_(parameters, seeds, scales, distribution=self.distribution, tensor_ids=self._ids)
