"""SpIEL (arXiv 2401.16405): a support that moves while it is trained. Weights of small delta are dropped, others are grown where their
gradients say so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.sparse_delta import dvalues
from ..functional.sparse_pattern import check_indices, smallest_index_dtype, trusted
from ..functional.sparse_support import top_of_outer, top_of_product
from ..nn.sparse_delta import SparseDeltaLinear
from ..optim.exchange import Exchange
from ..optim.sparse_adamw import SparseAdamW, age_dtype
from ..optim.sparse_sm3 import SparseSM3

SCHEDULES = ("linear", "cosine")


@dataclass
class _Candidates:
    """Positions, ascending, that may be grown; the sum of their gradients over ``steps`` optimiser steps, the sum of the squares, and
    what the backward passes since the last step add up to."""

    indices: Tensor
    sums: Tensor
    squares: Tensor
    steps: int
    pending: Tensor | None


class SpIEL:
    """Moves the supports of sparse layers as their optimiser steps: call :meth:`step` after each ``optimizer.step()``.

    With :class:`peftfast.optim.SparseAdamW` this is SpIEL-AG: a phase begins ahead of every ``reselection_steps``-th step. In its first
    backward the positions of the largest gradients, as many as are active, become candidates, and their gradients are accumulated
    through ``accumulation_steps`` steps. Then the part p of the active weights with the smallest |Δ| is dropped and as many candidates
    with the largest |Σ g| are grown, from Δ = 0, with age a, the number of those steps, and the states m = (Σ g / a) (1 - beta1^a),
    v = (Σ g² / a) (1 - beta2^a). g is a step's gradient, the sum over all its backward passes, as the optimiser sees it: where a batch
    is split into micro-batches, only the choice of the candidates is of the first alone. One that is dropped and grown again stays as
    it was.

    With :class:`peftfast.optim.SparseSM3` it is SpIEL-MA: grown are the inactive positions with the largest product of their row's
    and their column's accumulator, from Δ = 0, the accumulators as they are.

    Where several workers train one model on other data each (DDP), their supports must move alike: with ``process_group`` the first
    worker chooses the candidates, and what is accumulated is the mean of all workers' gradients, as the optimiser sees it.

    p is 1 the first time, then ``initial_rate`` times 1 - t / T (linear) or (1 + cos(pi t / T)) / 2, with t of T steps done.
    Temporaries are of the order of what is active and what is a candidate, and one slab of rows; never of the whole weight.

    Args:
        model: a module that holds :class:`SparseDeltaLinear` layers, or such layers.
        optimizer: SparseAdamW or SparseSM3 over their ``delta_values``.
        total_steps: T.
        reselection_steps, accumulation_steps: as above, in optimiser steps.
        initial_rate: p at the beginning, in (0, 1].
        schedule: "linear" or "cosine".
        process_group: of the workers that train this model together; ``True`` is the default group, ``False`` says that there are
            none. Of a ``model`` in DDP's wrapper it is known.

    Raises:
        TypeError, ValueError: naming the argument.

    Warns:
        UserWarning: torch.distributed runs several processes, and whether they train one model is not said.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[SparseDeltaLinear],
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        reselection_steps: int = 20,
        accumulation_steps: int = 5,
        initial_rate: float = 0.2,
        schedule: str = "linear",
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module | Iterable):
            raise TypeError(f"model: expected a module or layers, got {type(model).__name__}")
        modules = model.modules() if isinstance(model, nn.Module) else model
        self.layers = [module for module in modules if isinstance(module, SparseDeltaLinear)]
        if not self.layers:
            raise ValueError("model: expected SparseDeltaLinear layers, got none")
        if not isinstance(optimizer, SparseAdamW | SparseSM3):
            raise TypeError(f"optimizer: expected a SparseAdamW or SparseSM3, got {type(optimizer).__name__}")
        counts = {
            "total_steps": total_steps,
            "reselection_steps": reselection_steps,
            "accumulation_steps": accumulation_steps,
        }
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {count!r}")
        if accumulation_steps >= reselection_steps:
            raise ValueError(f"accumulation_steps: expected fewer than reselection_steps, got {accumulation_steps}")
        if isinstance(initial_rate, bool) or not isinstance(initial_rate, int | float):
            raise TypeError(f"initial_rate: expected a number, got {type(initial_rate).__name__}")
        if not 0.0 < initial_rate <= 1.0:
            raise ValueError(f"initial_rate: expected a part in (0, 1], got {initial_rate}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
        self._exchange = Exchange(_group_of(model) if process_group is None else process_group)
        if process_group is None and not self._exchange.active and _several_workers():
            warnings.warn(
                "SpIEL: several processes run and process_group is not given: workers that train one model on other data each would "
                "move its supports apart. process_group=True (peftfast.adapt: data_parallel=True) for these, False for models of "
                "their own",
                UserWarning,
                stacklevel=2,
            )
        self.optimizer = optimizer
        if any(group.get("state_bits", 32) != 32 for group in optimizer.param_groups):
            raise ValueError("optimizer: expected states in 32 bits, which can be moved one by one")
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            if id(layer.delta_values) not in self._groups:
                raise ValueError("optimizer: expected the delta_values of every layer among its parameters")
        self.total_steps, self.reselection_steps = total_steps, reselection_steps
        self.accumulation_steps, self.initial_rate = accumulation_steps, initial_rate
        self.schedule = schedule
        self.completed_steps = 0
        self.moved = 0  # weights that changed place in the last selection
        self._candidates: dict[int, _Candidates] = {}
        self._observe(True)

    @property
    def _accumulates(self) -> bool:
        return isinstance(self.optimizer, SparseAdamW)

    def _observe(self, on: bool) -> None:
        for number, layer in enumerate(self.layers):
            layer._observer = _Observer(self, number) if on and self._accumulates else None

    @torch.no_grad()
    def _add(self, number: int, dy: Tensor, x: Tensor) -> None:
        """One backward's gradients at a layer's candidates, which its first backward of a phase chooses."""
        layer = self.layers[number]
        shape = torch.Size((layer.out_features, layer.in_features))
        known = self._candidates.get(number)
        if known is None:
            positions, entries = top_of_product(dy, x, layer.delta_values.numel())
            indices = smallest_index_dtype(positions, shape)
            if self._exchange.active:
                self._exchange.of_the_first_(indices)
                entries = dvalues(dy, x, trusted(indices, shape), entries.dtype)
            zeros = torch.zeros_like(entries)
            self._candidates[number] = _Candidates(indices, zeros, zeros.clone(), 0, entries)
            return
        entries = dvalues(dy, x, trusted(known.indices, shape), known.sums.dtype)
        known.pending = entries if known.pending is None else known.pending.add_(entries)

    def _close_step(self) -> None:
        """The passes since the last step were one gradient: its square is not the sum of theirs."""
        for known in self._candidates.values():
            if known.pending is not None:
                self._exchange.mean_(known.pending)
                known.sums += known.pending
                known.squares.addcmul_(known.pending, known.pending)
                known.steps += 1
                known.pending = None

    def rate(self) -> float:
        """p now."""
        if self.completed_steps == self.accumulation_steps:
            return 1.0
        part = min(1.0, self.completed_steps / self.total_steps)
        left = 1.0 - part if self.schedule == "linear" else (1.0 + math.cos(math.pi * part)) / 2.0
        return self.initial_rate * left

    @torch.no_grad()
    def step(self) -> bool:
        """After an optimiser's step. Returns whether the supports were moved; gradients are then None, since they belong to the old
        ones."""
        self.completed_steps += 1
        self._close_step()
        moved = self.completed_steps % self.reselection_steps == self.accumulation_steps and self._end_phase()
        # Behind the end of the last phase, which may be now: the next begins ahead of its first backward.
        ahead = self.completed_steps + 1
        if ahead % self.reselection_steps == 0 and ahead + self.accumulation_steps <= self.total_steps:
            self._candidates.clear()
            self._observe(True)
        return moved

    def _end_phase(self) -> bool:
        """Move the supports. Returns whether it was time to."""
        if self.completed_steps > self.total_steps:
            self._observe(False)
            return False
        for layer in self.layers:
            if layer.merged:
                layer.check_base()  # before the first is moved
        rate, self.moved = self.rate(), 0
        for number, layer in enumerate(self.layers):
            count = int(layer.delta_values.numel() * rate)
            if self._accumulates:
                self._move_accumulated(layer, self._candidates.get(number), count)
            else:
                self._move_by_accumulators(layer, count)
            layer.delta_values.grad = None
        self._candidates.clear()
        self._observe(False)
        return True

    @staticmethod
    def _smallest(values: Tensor, count: int) -> Tensor:
        """The numbers of the ``count`` smallest magnitudes, smallest first; of equal ones the first."""
        return torch.sort(values.abs(), stable=True).indices[:count]

    def _move_accumulated(self, layer: SparseDeltaLinear, candidates: _Candidates | None, count: int) -> None:
        if candidates is None or count == 0:
            return
        outgoing = self._smallest(layer.delta_values.detach(), count)
        remains = torch.ones_like(layer.delta_values, dtype=torch.bool)
        remains[outgoing] = False
        staying = layer.delta_indices[remains]
        valid = (~torch.isin(candidates.indices, staying)).nonzero()[:, 0]
        scores = candidates.sums[valid].abs()
        order = torch.sort(scores, descending=True, stable=True).indices[:count]
        grown = valid[order]
        back = torch.isin(candidates.indices[grown], layer.delta_indices[outgoing])
        dropped = outgoing[~torch.isin(layer.delta_indices[outgoing], candidates.indices[grown])]
        grown = grown[~back]
        dropped = dropped[: grown.numel()]
        new_states = self._grown_states(layer, candidates, grown)
        order = layer.move_support(dropped, candidates.indices[grown])
        self.moved += dropped.numel()
        state = self.optimizer.state[layer.delta_values]
        for name, new in new_states.items():
            state[name][dropped] = new.to(state[name].dtype)
            state[name].copy_(state[name][order])

    def _grown_states(self, layer: SparseDeltaLinear, candidates: _Candidates, grown: Tensor) -> dict[str, Tensor]:
        group = self._groups[id(layer.delta_values)]
        state = self.optimizer.state[layer.delta_values]
        if not state:
            state["exp_avg"] = torch.zeros_like(layer.delta_values)
            state["exp_avg_sq"] = torch.zeros_like(layer.delta_values)
            state["age"] = torch.zeros_like(layer.delta_values, dtype=age_dtype(group["betas"]))
        age = candidates.steps
        beta1, beta2 = group["betas"]
        return {
            "exp_avg": candidates.sums[grown] / age * (1.0 - beta1**age),
            "exp_avg_sq": candidates.squares[grown] / age * (1.0 - beta2**age),
            "age": torch.full_like(grown, age),
        }

    def _move_by_accumulators(self, layer: SparseDeltaLinear, count: int) -> None:
        state = self.optimizer.state[layer.delta_values]
        if not state or count == 0:
            return
        grown = top_of_outer(state["rows"], state["columns"], count, layer.delta_indices)
        outgoing = self._smallest(layer.delta_values.detach(), grown.numel())
        layer.move_support(outgoing, grown)
        self.moved += grown.numel()

    def state_dict(self) -> dict[str, Any]:
        """To go on from, beside the model's and the optimiser's own."""
        return {
            "completed_steps": self.completed_steps,
            "observing": any(layer._observer is not None for layer in self.layers),
            "candidates": {number: dict(vars(found)) for number, found in self._candidates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, into a model that holds its layers' supports already.

        Raises:
            TypeError, ValueError: it does not fit these layers; nothing is taken then.
        """
        missing = {"completed_steps", "observing", "candidates"} - state.keys()
        if missing:
            raise ValueError(f"state: expected what state_dict gave, got none of {sorted(missing)}")
        done = state["completed_steps"]
        if isinstance(done, bool) or not isinstance(done, int) or done < 0:
            raise ValueError(f"completed_steps: expected an int of at least 0, got {done!r}")
        candidates = {number: self._checked(number, found) for number, found in state["candidates"].items()}
        self.completed_steps, self._candidates = done, candidates
        self._observe(state["observing"])

    def _checked(self, number: int, found: dict[str, Any]) -> _Candidates:
        if number not in range(len(self.layers)) or found.keys() != _Candidates.__annotations__.keys():
            raise ValueError(
                f"candidates: expected those of {len(self.layers)} layers, got of layer {number} {sorted(found)}"
            )
        layer, indices = self.layers[number], found["indices"]
        check_indices(indices, (layer.out_features, layer.in_features))
        for name in ("sums", "squares", "pending"):
            entries = found[name]
            if entries is None and name == "pending":
                continue
            if not isinstance(entries, Tensor) or not entries.is_floating_point() or entries.shape != indices.shape:
                got = getattr(entries, "shape", type(entries).__name__)
                raise ValueError(f"{name}: expected floating {tuple(indices.shape)} of layer {number}, got {got}")
        steps, within = found["steps"], range(self.accumulation_steps + 1)
        if steps not in within or (steps == 0 and found["pending"] is None):
            raise ValueError(f"steps: expected at most {self.accumulation_steps} of layer {number}, got {steps!r}")
        device = layer.delta_values.device
        placed: dict[str, Any] = {
            name: one.to(device) if isinstance(one, Tensor) else one for name, one in found.items()
        }
        return _Candidates(**placed)


def _group_of(model: Any) -> Any:
    wrapped = torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel)
    return model.process_group if wrapped else None


def _several_workers() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Observer:
    """What a layer's backward calls. An object, not a closure: layers are copied and pickled."""

    def __init__(self, method: SpIEL, number: int) -> None:
        self._method, self._number = method, number

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        self._method._add(self._number, dy, x)
