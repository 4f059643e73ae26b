"""MeZO (Malladi et al., arXiv 2305.17333) and Sparse MeZO (arXiv 2402.15751): training by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.zeroth_order import is_rademacher, seeds_tensor, signed_seed
from . import exchange, low_rank
from .arguments import (
    Closure,
    check_number,
    check_parameters,
    closures_of,
    float32,
    groups_of,
    magnitude_thresholds,
    momentum_weights,
    window_of,
)
from .discovery import Layout
from .evaluation import ExactEvaluations, InplaceEvaluations
from .readback import Unread
from .seed_log import SeedLog, Step

MODES = ("exact", "inplace")
# Seeds of consecutive directions are this far apart (2**64 over the golden ratio); Philox makes any two keys unrelated.
SEED_STEP = signed_seed("SEED_STEP", 0x9E3779B97F4A7C15)


class MeZO(ExactEvaluations, InplaceEvaluations, torch.optim.Optimizer):
    """SGD along a random direction: g = (L(θ + ε z) - L(θ - ε z)) / 2 ε, θ ← θ (1 - lr wd) - lr g z.

    ``step(closure)`` calls the closure at moved weights; it returns the loss and does no backward. z is Philox's and never stored: a
    run is its seeds and its g's.

    mode="exact" (the default) never writes a perturbation: after a step with lr = 0 every weight has the bits it had. A layer sees
    its weights moved while its forward runs, in scratch of one layer's size; the update is one pass over all weights, rounded
    stochastically in 16 bits. Which layers can be served so is found by one extra call of the closure in the first step (and when the
    layers that are called change). Parameters that are read outside the forward of the module that holds them, or by no module at all,
    are copied: that costs their size once more, and is all of them when the closure uses bare tensors. So a module and a list of its
    parameters come to the same; the module gives the parameters names.

    mode="inplace" writes θ + ε z, θ - ε z and the update into the weights. In bfloat16 that changes about 46 % of the weights by
    roundings in one step, and the drift grows with the square root of the steps (4 % of a weight's size after 100 steps at ε = 1e-3 and
    weights of 0.02): for float32, or to compare. An exception restores the weights to within that rounding.

    Args:
        params: a module (its parameters that require grad), or what torch.optim takes: tensors, (name, tensor) pairs, or groups.
        lr, weight_decay: of a group. lr is rounded to float32.
        eps: ε, above 0.
        distribution: "gaussian", or "rademacher", which costs no transcendental function.
        two_sided: False: g = (L(θ + ε z) - L(θ)) / ε.
        directions: n directions a step, their updates averaged.
        momentum: β: the update is the sum of β^age g z over the last ``momentum_window`` steps, whose z's are drawn again. The default
            window ends where β^age falls below 0.05; each step in it costs one more z for each weight in the update.
        clip: |g| is cut to it.
        density: Sparse MeZO: of each tensor of two or more dimensions only the elements with |θ| ≤ h move, h being the ``density``
            quantile of |θ| at construction. The mask is told from the unperturbed weight in the kernel and never stored.
        rank: directions of matrices larger than it are z = U Vᵀ / sqrt(rank) (LOZO, arXiv 2410.07698): a linear layer then reads its
            weight as it is, and its move is an adapter's forward, which takes fewer normals by far. The update is rounded to
            nearest, which 16 bits lose when it is small.
        filter: (name, parameter) -> whether it is trained. Ids of z count all parameters, before it.
        seed: of the whole run, 64 bits; drawn by torch's generator if not given.
        stochastic_rounding: of the update in 16 bits; without it bfloat16 loses 97 % of an update at lr g = 1e-6.
        log: a new file to which each step adds 16 bytes a direction; :func:`peftfast.optim.replay` gives the weights back from it.
        process_group: data parallel: workers exchange their losses and nothing else, and all take the same step, of as many
            micro-batches each. ``True`` is the default group. The first step compares the workers' weights, which must be the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        mode: str = "exact",
        distribution: str = "gaussian",
        two_sided: bool = True,
        directions: int = 1,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        momentum_window: int | None = None,
        clip: float | None = None,
        density: float | None = None,
        rank: int | None = None,
        filter: Callable[[str, Tensor], bool] | None = None,
        seed: int | None = None,
        stochastic_rounding: bool = True,
        log: str | Path | None = None,
        process_group: Any = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        check_number("lr", lr, low=0.0)
        check_number("eps", eps, low=0.0, open_=True)
        if torch.tensor(eps, dtype=torch.float32, device="cpu").item() == 0.0:
            raise ValueError(f"eps: expected a number above 0 in float32, got {eps}")
        check_number("weight_decay", weight_decay, low=0.0)
        check_number("momentum", momentum, low=0.0, high=1.0)
        if not isinstance(directions, int) or isinstance(directions, bool) or directions < 1:
            raise ValueError(f"directions: expected an int of at least 1, got {directions!r}")
        if clip is not None:
            check_number("clip", clip, low=0.0, open_=True)
        if density is not None:
            check_number("density", density, low=0.0, high=1.0, open_=True, closed_top=True)
            if mode == "inplace":
                raise ValueError(
                    "density: Sparse MeZO needs mode='exact': the mask is a function of the unperturbed weight"
                )
        if rank is not None:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank: expected an int of at least 1, got {rank!r}")
            if mode == "inplace" or density is not None:
                raise ValueError("rank: expected mode='exact' and no density")
        if momentum_window is not None and (not isinstance(momentum_window, int) or momentum_window < 1):
            raise ValueError(f"momentum_window: expected an int of at least 1, got {momentum_window!r}")
        self._rademacher = is_rademacher(distribution)
        groups, self._names, self._ids = groups_of(params, filter)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._device = check_parameters(self._names, self._parameters)
        window = 1 if momentum == 0.0 else momentum_window or window_of(momentum)
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu").item())
        self._exchange = exchange.Exchange(process_group)
        self._seed = self._exchange.agree_on(
            signed_seed("seed", seed), self._names, [p.shape for p in self._parameters]
        )
        self.mode, self.eps, self.two_sided, self.directions = mode, float(eps), bool(two_sided), directions
        self.momentum, self.clip, self.density, self.rank = float(momentum), clip, density, rank
        self.distribution, self.stochastic_rounding = distribution, bool(stochastic_rounding)
        self.paired_fallbacks: list[str] = []
        self._modules = {id(m): n for n, m in params.named_modules()} if isinstance(params, nn.Module) else {}
        self._steps = 0
        self._compared = False
        self._layout: Layout | None = None
        self._saved: list[Tensor] = []
        self._unread: list[Unread] = []
        self._failed: list[int] = []
        with torch.no_grad():
            self._thresholds = (
                None if density is None else magnitude_thresholds(self._parameters, density, self._device)
            )
            self._eps = torch.full((1,), self.eps, dtype=torch.float32, device=self._device)
            self._minus_eps = -self._eps
            self._weights = momentum_weights(self.momentum, window, directions).to(self._device)
            self._seeds = torch.zeros(window * directions, dtype=torch.int64, device=self._device)
            self._scalars = torch.zeros(window * directions, dtype=torch.float32, device=self._device)
        self._log = None if log is None else SeedLog.create(Path(log), self._header())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are those of the construction: z counts their tensors, and so does the log. Raises ValueError after it."""
        if hasattr(self, "_parameters"):
            raise ValueError(
                "param_group: expected all groups when the optimiser is made: ids of z and the log count them"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> Any:
        raise TypeError(
            "MeZO: expected no copy and no pickle, since it moves the modules that it was made with; make another one and give it the "
            "state_dict"
        )

    # What a step needs of the run; also what the log's header holds and a replay reads.
    def _header(self) -> dict[str, Any]:
        thresholds = None if self._thresholds is None else self._thresholds.tolist()
        return {
            "parameters": [
                {"name": name, "id": tensor_id, "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
                for name, tensor_id, p in zip(self._names, self._ids, self._parameters, strict=True)
            ],
            "groups": [
                {"count": len(g["params"]), "lr": float32(g["lr"]), "weight_decay": g["weight_decay"]}
                for g in self.param_groups
            ],
            "seed": self._seed,
            "steps": self._steps,
            "mode": self.mode,
            "eps": self.eps,
            "distribution": self.distribution,
            "directions": self.directions,
            "momentum": self.momentum,
            "window": self._seeds.numel() // self.directions,
            "stochastic_rounding": self.stochastic_rounding,
            "thresholds": thresholds,
            "rank": self.rank,
        }

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return self._steps

    @property
    def copied(self) -> list[str]:
        """Names of the parameters that are copied, not moved in flight; empty before the first exact step."""
        return [] if self._layout is None else [self._names[i] for i in self._layout.copied]

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None, *, paired: bool = False) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the loss, one element, without backward; or a sequence of closures, one for each micro-batch, whose losses
                are averaged. It is called once for each evaluation, always at the same random numbers, so that both sides of
                an estimate see one dropout mask; it must not move on to other data by itself.
            paired: the closure runs both sides in one forward: its batch is doubled along the first dimension, the upper half sees
                θ + ε z and the lower θ - ε z, and it returns both losses, ``[2]`` or a pair. A linear layer then reads its weight
                once, a 4-bit one (:func:`peftfast.optim.trainable_scales`) its packed bytes. Layers that can only be served side by
                side are named in ``paired_fallbacks``.

        Returns:
            The mean loss of the evaluations, one float32 on the device; in between nothing waits for the device.

        Raises:
            TypeError, ValueError: a closure that is none or returns something else; workers whose weights differ; also, at the step
                after it, that a loss was not finite: that step changed nothing. What the closure itself raises passes through. Weights
                are as before the step.
        """
        self._raise_if_failed()
        if self._log is not None:
            self._log.check_decays([group["weight_decay"] for group in self.param_groups])
        closures = closures_of(closure)
        if paired and (self.mode != "exact" or not self.two_sided):
            raise ValueError("paired: expected mode='exact' and two_sided=True")
        if not self._compared:  # not earlier: weights may be loaded when the optimiser is there
            self._exchange.check_same(self._names, self._parameters)
            self._compared = True
        seeds = self._step_seeds(self._steps)
        device_seeds = seeds_tensor("seed", seeds, self._device)
        if self.mode == "exact":
            losses = self._exact_losses(closures, device_seeds, paired)
        else:
            losses = self._inplace_losses(closures, device_seeds)
        scalars, ok = self._projected(losses)
        self._record(seeds, scalars, ok)
        restoring = device_seeds[-1:] if self.mode == "inplace" else None
        lrs = [float32(group["lr"]) for group in self.param_groups]
        self._update(device_seeds, scalars, ok, lrs, restoring)
        self._steps += 1
        return losses.mean().float()

    def check(self) -> None:
        """Wait for the device, and raise ValueError if a loss since the last check was not finite; write the log to its file."""
        self._settle(wait=True)
        self._raise_if_failed()
        if self._log is not None:
            self._log.flush()

    def resume_log(self, path: str | Path) -> None:
        """After ``load_state_dict``: go on with the log that the run wrote up to that state; what it wrote later is cut off. Raises
        ValueError for another run's log, or one that ends before."""
        self._log = SeedLog.resume(Path(path), self._header(), self._steps)

    def _step_seeds(self, step: int) -> list[int]:
        return [
            signed_seed("seed", (self._seed + (step * self.directions + i) * SEED_STEP) % (1 << 64))
            for i in range(self.directions)
        ]

    def _projected(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(g of each direction, float32; whether all are finite, one bool). Differences are summed in the order of ranks and
        micro-batches, one after the other, so that who computed them does not show."""
        differences = self._exchange.gather(losses[:, 0] - losses[:, 1])  # [directions, all micro-batches]
        total = differences[:, 0]
        for k in range(1, differences.shape[1]):
            total = total + differences[:, k]
        scalars = (total / (differences.shape[1] * (2.0 if self.two_sided else 1.0) * self.eps)).float()
        ok = scalars.isfinite().all()
        if self.clip is not None:
            scalars = scalars.clamp(-self.clip, self.clip)
        return torch.where(ok, scalars, torch.zeros_like(scalars)), ok

    def _update(
        self, seeds: Tensor, scalars: Tensor, ok: Tensor, lrs: Sequence[float], restoring: Tensor | None
    ) -> None:
        """θ ← decay θ + Σ coefficients z, one pass. A step that is not ``ok`` changes nothing."""
        count = self.directions
        if self._seeds.numel() > count:
            self._seeds.copy_(torch.cat((seeds, self._seeds[:-count])))
            self._scalars.copy_(torch.cat((scalars, self._scalars[:-count])))
            seeds, scalars = self._seeds, self._scalars
        first = 0
        for group, lr in zip(self.param_groups, lrs, strict=True):
            members = range(first, first + len(group["params"]))
            first += len(group["params"])
            if not members:
                continue
            coefficients = torch.where(ok, scalars * self._weights * (-lr / count), torch.zeros_like(scalars))
            decay = None
            if group["weight_decay"]:
                factor = torch.full((1,), 1.0 - lr * group["weight_decay"], dtype=torch.float32, device=self._device)
                decay = torch.where(ok, factor, torch.ones_like(factor))
            terms = seeds
            if restoring is not None:
                back = self._eps if self.two_sided else self._minus_eps
                terms = torch.cat((restoring, seeds))
                coefficients = torch.cat((back if decay is None else back * decay, coefficients))
                # One z where the direction to restore is the one of the update, as it is without momentum.
                if seeds.numel() == 1:
                    terms, coefficients = seeds, coefficients[:1] + coefficients[1:]
            limits = None
            if self._thresholds is not None:
                limits = self._thresholds[members.start : members.stop]
            dense = [i for i in members if not low_rank.serves(self._parameters[i], self.rank)]
            F.perturb_(
                [self._parameters[i].detach() for i in dense],
                terms,
                coefficients,
                distribution=self.distribution,
                tensor_ids=[self._ids[i] for i in dense],
                decay=decay,
                thresholds=limits,
                rounding_seed=seeds[:1] if self.stochastic_rounding else None,
            )
            for i in members:
                if self.rank is not None and low_rank.serves(self._parameters[i], self.rank):
                    weight = self._parameters[i].detach()
                    if decay is not None:
                        weight.mul_(decay)
                    low_rank.update_(weight, terms, coefficients, self._ids[i], self.rank, self._rademacher)

    # What the device knows is read when it has come, and raised a step later.

    def _record(self, seeds: Sequence[int], scalars: Tensor, ok: Tensor) -> None:
        lrs = [float32(group["lr"]) for group in self.param_groups]
        self._unread.append(Unread(self._steps, list(seeds), lrs, torch.cat((scalars, ok.reshape(1).float()))))
        self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        while self._unread and (wait or self._unread[0].ready()):
            unread = self._unread.pop(0)
            *scalars, ok = unread.values()
            if not ok:
                self._failed.append(unread.step)
            if self._log is not None:
                self._log.append(Step(unread.seeds, scalars if ok else None, unread.lrs))

    def _raise_if_failed(self) -> None:
        self._settle(wait=False)
        if self._failed:
            steps, self._failed = self._failed, []
            raise ValueError(
                f"closure: the loss was not finite in step {', '.join(map(str, steps))}; the weights are as before it"
            )

    def _replay(self, header: dict[str, Any], records: Iterable[Step], limit: int | None) -> int:
        """Take the steps of a log that this optimiser was made for."""
        self._ids = [entry["id"] for entry in header["parameters"]]
        if header["thresholds"] is not None:
            self._thresholds = torch.tensor(header["thresholds"], dtype=torch.float32, device="cpu").to(self._device)
        taken = 0
        for step in records:
            if taken == limit:
                break
            seeds = seeds_tensor("seed", step.seeds, self._device)
            scalars = torch.tensor(step.scalars or [0.0] * self.directions, dtype=torch.float32, device="cpu").to(
                self._device
            )
            ok = torch.tensor(step.scalars is not None, device="cpu").to(self._device)
            self._update(seeds, scalars, ok, step.lrs, None)
            taken += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the run's seed, its count of steps and its momentum under "mezo"."""
        state = super().state_dict()
        state["mezo"] = {
            "seed": self._seed,
            "steps": self._steps,
            "seeds": self._seeds.clone(),
            "scalars": self._scalars.clone(),
            "thresholds": None if self._thresholds is None else self._thresholds.clone(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, and takes nothing, for a state of another kind of run, and where the log that this optimiser writes is not
        at that state: make it without a log, load, and then :meth:`resume_log`."""
        state = dict(state_dict)
        own = state.pop("mezo", None)
        if (
            own is None
            or own["seeds"].numel() != self._seeds.numel()
            or (own["thresholds"] is None) != (self._thresholds is None)
        ):
            raise ValueError(
                "state_dict: expected that of a MeZO with the same directions, momentum window and density"
            )
        if self._log is not None and (own["seed"], own["steps"]) != (self._seed, self._steps):
            raise ValueError(
                f"log: expected none, or one at the state's step {own['steps']} of its run, got one at step {self._steps}; make the "
                "optimiser without a log, load, and call resume_log"
            )
        super().load_state_dict(state)
        self._seed, self._steps = own["seed"], own["steps"]
        self._seeds.copy_(own["seeds"])
        self._scalars.copy_(own["scalars"])
        if self._thresholds is not None:
            self._thresholds.copy_(own["thresholds"])
