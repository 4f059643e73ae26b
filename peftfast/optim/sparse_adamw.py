"""AdamW on the values of sparse deltas: one launch for all layers, the weights that hold a delta written in the same pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels import streams  # type: ignore[attr-defined]
from ..nn.sparse_delta import SparseDeltaLinear, layer_of
from ..ops.dispatch import Operator
from ..ops.sparse_adamw import sparse_adamw8_, sparse_adamw_
from ..reference.sparse_delta import adam_corrections, adam_hyper, compress_states, state_codes

_OLDEST_SHORT = 2**15 - 1
_STATES = {"exp_avg", "exp_avg_sq", "age"}
_STATES8 = _STATES | {"exp_avg_max", "exp_avg_sq_max"}
_Tensors = dict[Any, tuple[Tensor, streams.Made]]


class SparseAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with an age for every weight, so that weights which joined the support later are corrected for their own
    number of steps, as in SpIEL (arXiv 2401.16405). Bit for bit :func:`peftfast.reference.sparse_delta.sparse_adamw`, with states in
    8 bits ``sparse_adamw8`` there.

    A merged :class:`peftfast.nn.SparseDeltaLinear` has its weight written from base + Δ in the same pass. Weight decay is that of Δ,
    which draws the weights back to the base. State: ``exp_avg`` and ``exp_avg_sq`` in float32 or 8 bits, ``age`` in int16, or int32
    where a beta is so near to 1 that its correction outlives 32,767 steps. Other float32 parameters may be among the given.

    Args:
        params: parameters or groups of them, float32.
        lr: a number, or a one-element tensor, which may change without a host synchronisation.
        betas, eps, weight_decay: as in torch.optim.AdamW, but for the default of weight_decay.
        stochastic_rounding: round weights in bfloat16 up with the probability of the part cut off; float32 weights need none, float16
            ones are refused.
        seed: of that rounding.
        state_bits: 32, or 8: exp_avg and exp_avg_sq as bytes with a float32 for 256 of them, decoded and encoded within the step, at
            most 6 % from the float32 they stand for.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        state_bits: int = 32,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "state_bits": state_bits,
        }
        self._forget()
        self._seed = torch.tensor([_checked_seed("seed", seed)], dtype=torch.int64, device="cpu")
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Nothing is on a device that a step puts there."""
        self._corrections: _Tensors = {}
        self._still: _Tensors = {}  # adam_hyper's numbers with a rate and a decay of 0
        self._hypers: _Tensors = {}
        self._codes: dict[torch.device, Tensor] = {}
        self._seeds: dict[torch.device, Tensor] = {}  # where each step counts on: a copy would wait

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seed": self._counted()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        _check_group(group)
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for parameter in params:
            if not isinstance(parameter, Tensor) or parameter.dtype != torch.float32:
                got = getattr(parameter, "dtype", type(parameter).__name__)
                raise TypeError(f"params: expected float32 tensors, got {got}")
            sharded = sys.modules.get("torch.distributed.tensor")  # not imported: nobody can have made one
            if sharded is not None and isinstance(parameter, sharded.DTensor):
                raise TypeError(
                    "params: expected tensors of one worker, got a DTensor; torch.optim.AdamW takes sharded ones"
                )
            layer = layer_of(parameter)
            if group["stochastic_rounding"] and layer is not None and layer._weight_dtype() == torch.float16:
                raise ValueError("stochastic_rounding: expected bfloat16 or float32 weights, got float16")
        super().add_param_group({**param_group, "params": params})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Nothing is written where a merged weight was written or replaced by others: RuntimeError."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, self._by_device(group)) for group in self.param_groups]
        layers = [layer for _, devices in work for members in devices.values() for _, _, layer in members if layer]
        for layer in layers:
            if layer.merged:
                layer.check_base()
                _ = layer.pattern  # raises where its indices were replaced by wrong ones
        rounds = any(group["stochastic_rounding"] for group in self.param_groups)
        self._count(rounds)
        try:
            calls = [
                self._call(group, device, members) for group, devices in work for device, members in devices.items()
            ]
            # All of them first: a state that does not fit is found before any weight is written.
            for operator, arguments in calls if len(calls) > 1 else ():
                operator._check(*arguments)
        except Exception:
            self._count(-rounds)
            raise
        for operator, arguments in calls:
            operator(*arguments)
        # Operators write past autograd: whoever saved a parameter for a backward must see that it changed.
        for _, devices in work:
            for members in devices.values():
                torch.autograd.graph.increment_version([parameter for _, parameter, _ in members])
        for layer in layers:
            if layer.merged:
                torch.autograd.graph.increment_version(layer.weight)
                layer._note()
        return loss

    def _by_device(
        self, group: dict[str, Any]
    ) -> dict[torch.device, list[tuple[int, Tensor, SparseDeltaLinear | None]]]:
        """Parameters that have a gradient, with their number among all parameters and their layer."""
        before = 0
        for other in self.param_groups:
            if other is group:
                break
            before += len(other["params"])
        found: dict[torch.device, list[tuple[int, Tensor, SparseDeltaLinear | None]]] = {}
        for k, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                if parameter.grad.is_sparse or parameter.grad.dtype != torch.float32:
                    raise TypeError(f"grad: expected dense float32, got {parameter.grad.dtype} {parameter.grad.layout}")
                found.setdefault(parameter.device, []).append((before + k, parameter, layer_of(parameter)))
        return found

    def _call(
        self,
        group: dict[str, Any],
        device: torch.device,
        members: list[tuple[int, Tensor, SparseDeltaLinear | None]],
    ) -> tuple[Operator, tuple[Any, ...]]:
        """The operator that steps a group's parameters on a device, and its arguments."""
        small = group["state_bits"] == 8
        names = ("exp_avg_max", "exp_avg_sq_max") if small else ()
        lists: list[list[Tensor]] = [[] for _ in range(8 + len(names))]
        ids = []
        nothing = torch.empty(0, device=device)
        for number, parameter, layer in members:
            state = self.state[parameter]
            if not state:
                self._start(state, parameter, group)
            row = [parameter.detach().reshape(-1), parameter.grad.detach().reshape(-1).contiguous()]  # type: ignore[union-attr]
            row += [state[name].reshape(-1) for name in ("exp_avg", "exp_avg_sq", "age")]
            if layer is not None and layer.base_values is not None:
                row += [layer.weight.detach(), layer.delta_indices, layer.base_values]
            else:
                row += [nothing, nothing.to(torch.int32), nothing]
            row += [state[name] for name in names]
            for given, tensor in zip(lists, row, strict=True):
                given.append(tensor)
            ids.append(number)
        corrections = self._corrections_for(group["betas"], device)
        seed = self._seed_on(device) if group["stochastic_rounding"] else None
        numbers = (self._hyper_for(group, device), corrections, seed, ids)
        if small:
            return sparse_adamw8_, (*lists, self._codes_on(device), *numbers)
        return sparse_adamw_, (*lists, *numbers)

    def _start(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        if not parameter.is_contiguous():
            raise ValueError("params: expected contiguous parameters")
        if group["state_bits"] == 8:
            codes = self._codes_on(parameter.device)
            zeros = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            for name, code in zip(("exp_avg", "exp_avg_sq"), codes, strict=True):
                state[name], state[f"{name}_max"] = compress_states(zeros, code)
        else:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["age"] = torch.zeros_like(parameter, dtype=age_dtype(group["betas"]))

    def _count(self, steps: int) -> None:
        for seed in (self._seed, *self._seeds.values()) if steps else ():
            seed += steps

    def _seed_on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._seed
        if device not in self._seeds:
            self._seeds[device] = self._seed.to(device)
        return self._seeds[device]

    def _counted(self) -> Tensor:
        """The seed of the next step, on the host. A graph's replay counts on the device alone."""
        return next(iter(self._seeds.values()), self._seed).to("cpu", copy=True)

    def _codes_on(self, device: torch.device) -> Tensor:
        if device not in self._codes:
            self._codes[device] = state_codes().to(device)
        return self._codes[device]

    def _corrections_for(self, betas: tuple[float, float], device: torch.device) -> Tensor:
        made = lambda: adam_corrections(*betas, ages_of(betas)).to(device)  # noqa: E731
        return _kept(self._corrections, (*betas, device), made)

    def _hyper_for(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """What a schedule changes is written on the device: a copy from the host would wait, at every step."""
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            lr = lr.item()

        def still() -> Tensor:
            made = lambda: adam_hyper(0.0, beta1, beta2, eps, 0.0).to(device)  # noqa: E731
            return _kept(self._still, (beta1, beta2, eps, device), made).clone()

        if isinstance(lr, Tensor):
            hyper, rate = still(), lr.to(device, torch.float64).reshape(())
            hyper[0], hyper[6] = rate, 1.0 - rate * decay
            return hyper

        def filled() -> Tensor:
            hyper = still()
            hyper[0].fill_(lr)
            hyper[6].fill_(1 - lr * decay)
            return hyper

        return _kept(self._hypers, (beta1, beta2, eps, lr, decay, device), filled)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounding_seed": int(self._counted())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave.

        Raises:
            TypeError, ValueError: a group's option or a parameter's state is none of this optimiser's; nothing is taken then.
        """
        given = dict(state_dict)
        seed = given.pop("rounding_seed", None)
        if seed is not None:
            _checked_seed("rounding_seed", seed)
        for group in given["param_groups"]:
            _check_group({**self.defaults, **group})
            wanted = _STATES if group.get("state_bits", 32) == 32 else _STATES8
            for number in group["params"]:
                found = given["state"].get(number, {})
                if found and found.keys() != wanted:
                    raise ValueError(f"state: expected {sorted(wanted)} of parameter {number}, got {sorted(found)}")
        super().load_state_dict(given)
        if seed is not None:
            self._seed.fill_(seed)
            self._seeds.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                # torch casts states to their parameter's dtype; a float32 holds an age exactly up to 2**24.
                state = self.state.get(parameter, {})
                if "age" in state:
                    state["age"] = state["age"].to(age_dtype(group["betas"]))
                if "exp_avg_max" in state:
                    state["exp_avg"], state["exp_avg_sq"] = (
                        state[n].to(torch.uint8) for n in ("exp_avg", "exp_avg_sq")
                    )


def _kept(made: _Tensors, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """``made[key]``, made where it is missing. A schedule changes a number at every step: no more than the last 64 are kept, but for
    good what a captured graph reads, and none that it makes, which is there when that is replayed and not before."""
    if key not in made:
        fresh = make()
        if fresh.is_cuda and torch.cuda.is_current_stream_capturing():
            return fresh
        if len(made) >= 64:
            del made[next(iter(made))]
        made[key] = fresh, streams.Made(fresh)
    found, since = made[key]
    since.meet()
    return found


def ages_of(betas: tuple[float, float]) -> int:
    """Ages that the table of corrections needs: to where both are 1 in float32, as they stay from there on."""
    longest = 2
    for beta in betas:
        power, age = 1.0, 0
        while beta > 0.0 and 1.0 - power < 1.0 - 2.0**-26 and age < 2**24:
            age = max(1, 2 * age)
            power = beta**age
        longest = max(longest, age + 1)
    return longest


def age_dtype(betas: tuple[float, float]) -> torch.dtype:
    """int16 where every correction is 1 before ages end, else int32."""
    return torch.int16 if max(betas) ** _OLDEST_SHORT < 2.0**-26 else torch.int32


def _checked_seed(name: str, seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: expected 64 bits, got {seed}")
    return seed


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr: expected one element, got shape {tuple(value.shape)}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        elif not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits: expected 8 or 32, got {group['state_bits']!r}")
    betas = group["betas"]
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas: expected two numbers, got {type(betas).__name__}")
    if len(betas) != 2 or not all(isinstance(b, float | int) and 0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
