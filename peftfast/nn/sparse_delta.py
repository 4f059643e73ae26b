"""Linear layers with a sparse delta on a frozen weight."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import ops
from ..functional import sparse_delta as layer_functions
from ..functional.derivatives import by_definition
from ..functional.precision import autocast_on, compute_dtype_of
from ..functional.sparse_pattern import SparsePattern, check_indices, smallest_index_dtype, trusted
from ..functional.sparse_support import choose_support
from ..reference import sparse_delta as definition
from ..reference.sparse_delta import wide_dtype
from .nf4 import NF4Linear, check_base, is_bitsandbytes_4bit

# id of a parameter -> the layer whose values it is. The parameter itself is not referred to: torch swaps no tensor that is, where a
# move, a cast or a loaded state swaps (torch.__future__.set_swap_module_params_on_conversion).
_layers: weakref.WeakValueDictionary[int, SparseDeltaLinear] = weakref.WeakValueDictionary()


def layer_of(parameter: Tensor) -> SparseDeltaLinear | None:
    """The layer whose delta a parameter is, or None."""
    layer = _layers.get(id(parameter))
    return layer if layer is not None and layer.delta_values is parameter else None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class SparseDeltaLinear(nn.Linear):
    """An nn.Linear with a sparse delta: y = x (W + Δ)ᵀ + b. Made by :meth:`from_linear`.

    ``weight`` and ``bias`` are frozen. Trained is ``delta_values`` ``[S]``, float32 beside a 16-bit or 4-bit weight, at the flat
    row-major positions ``delta_indices``; ``density`` is S over the number of weights. ``to(dtype)`` and ``half()`` leave the values in
    float32.

    A dense weight may hold its delta, :meth:`merge`: the weight is then round(W + Δ), both products are plain ones, and the values of
    W at the support are kept aside, so that :meth:`unmerge` gives back W bit for bit, after any number of steps. A merged layer is
    trained as any other: :class:`peftfast.optim.SparseAdamW` writes the weight in the same pass; values written by anyone else (another
    optimiser, load_state_dict) are noticed by their version counter, and written at the next forward; after writes to ``.data``, which
    no counter shows, call :meth:`resync`. A merged weight that was written or replaced by others is an error at the next forward:
    :meth:`rebase` takes what is there for the new W. ``state_dict`` holds W, merged or not.
    """

    delta_values: nn.Parameter
    delta_indices: Tensor
    base_values: Tensor | None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made by from_linear")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        density: float = 0.005,
        indices: Tensor | SparsePattern | None = None,
        support: str = "random",
        scores: Tensor | None = None,
        resident: bool = False,
        generator: torch.Generator | None = None,
    ) -> SparseDeltaLinear:
        """A layer on the storage of ``linear``: an nn.Linear, a bitsandbytes Linear4bit or an :class:`NF4Linear` (the last two give a
        :class:`SparseDeltaNF4Linear`). The shared weight and bias are frozen. Until it is trained, an nn.Linear's output is unchanged.

        Args:
            density: part of the weights that is trained, in (0, 1]; not used where ``indices`` are given.
            indices: the support: flat positions, ascending, or a :class:`SparsePattern`, which may be structured.
            support: "random", "smallest" (least magnitudes, SaRA) or "largest"; a 4-bit weight is decoded once for the last two.
            scores: ``[N, K]``: the largest of these instead.
            resident: :meth:`merge` at once. The weight is then written: not for one that others use too.
            generator: of the random choice, on any device: one on the CPU gives the same support wherever the weight is.

        Raises:
            TypeError, ValueError: naming the argument, before anything is changed.
        """
        layer: SparseDeltaLinear
        check_base(linear)
        if isinstance(linear, NF4Linear) or (isinstance(linear, nn.Linear) and is_bitsandbytes_4bit(linear)):
            if resident:
                raise ValueError("resident: a 4-bit weight cannot hold a delta")
            base = NF4Linear.from_linear(linear)
            layer = SparseDeltaNF4Linear.__new__(SparseDeltaNF4Linear)
            NF4Linear.__init__(layer, base.nf4, base.bias, base.compute_dtype)
        elif isinstance(linear, nn.Linear) and linear.weight.is_floating_point():
            if resident and not linear.weight.is_contiguous():
                raise ValueError("resident: expected a contiguous weight")
            layer = cls.__new__(cls)
            nn.Module.__init__(layer)
            layer.in_features, layer.out_features = linear.in_features, linear.out_features
            layer.weight = linear.weight
            layer.register_parameter("bias", linear.bias)
        else:
            raise TypeError(
                f"linear: expected an nn.Linear, a Linear4bit or an NF4Linear, got {type(linear).__name__}"
                + (f" with a weight of {linear.weight.dtype}" if isinstance(linear, nn.Linear) else "")
            )
        layer._adapt(layer._pattern_for(density, indices, support, scores, generator))
        layer.train(linear.training)
        if resident:
            layer.merge()
        return layer

    def _pattern_for(
        self,
        density: float,
        indices: Tensor | SparsePattern | None,
        support: str,
        scores: Tensor | None,
        generator: torch.Generator | None,
    ) -> SparsePattern:
        shape = torch.Size((self.out_features, self.in_features))
        if isinstance(indices, SparsePattern):
            if indices.shape != shape:
                raise ValueError(f"indices: expected a pattern of shape {tuple(shape)}, got {tuple(indices.shape)}")
            return indices.to(self.weight.device)
        if indices is not None:
            check_indices(indices, shape)
            if indices.is_meta and not self.weight.is_meta:
                raise ValueError(f"indices: expected on a device that holds them, got on {indices.device}")
            return trusted(smallest_index_dtype(indices, shape).to(self.weight.device), shape)
        if self.weight.is_meta:
            raise ValueError(
                "linear: expected a weight that is there, got one on meta, which takes a support by indices alone"
            )
        if support == "random" and scores is None:
            like = torch.empty((), device=self.weight.device).expand(shape)
        else:
            like = self._dense_weight()
        return choose_support(like, density, support, scores=scores, generator=generator)

    def _adapt(self, pattern: SparsePattern) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._seen: tuple[int, ...] | None = None
        dtype = wide_dtype(self._weight_dtype())
        self.delta_values = nn.Parameter(torch.zeros(pattern.count, dtype=dtype, device=self.weight.device))
        self.register_buffer("delta_indices", pattern.indices)
        self.register_buffer("base_values", None, persistent=False)
        self._pattern = pattern
        if pattern.structure is not None:
            pattern.taken()  # before a compiler traces the first backward, where no value may be asked for
        self._checked = _version(pattern.indices)
        self._enabled = True
        self._observer: layer_functions.Observer | None = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "delta_values":
            self._own_values()
            if self._seen is not None:
                self._seen = (*self._seen[:2], -1)  # other values than the weight holds

    def _own_values(self) -> None:
        _layers[id(self.delta_values)] = self
        self._own = id(self.delta_values)

    def _values_lent(self) -> bool:
        """Whether the values are of this call alone, as torch.func.functional_call puts them there."""
        return not torch.compiler.is_compiling() and id(self.delta_values) != self._own

    def _weight_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _dense_weight(self) -> Tensor:
        return self.weight.detach()

    def _base(self) -> Tensor | F.NF4Weight:
        return self.weight

    def _compute_dtype(self) -> torch.dtype | None:
        return None

    @property
    def pattern(self) -> SparsePattern:
        """The support. A layer's pattern changes when a method moves it (:class:`peftfast.methods.SpIEL`). Indices that others wrote
        or put into the place of ``delta_indices`` are validated here, once.

        Raises:
            TypeError, ValueError: those indices are none of a support.
        """
        known, indices = self._pattern, self.delta_indices
        version = self._checked if torch.compiler.is_compiling() else _version(indices)
        if known.indices is not indices or version != self._checked:
            parts = None if known.parts is None else known.parts.to(indices.device)
            self._pattern = SparsePattern(indices, known.shape, known.structure, parts, known.block_size)
            self._checked = version
        return self._pattern

    @property
    def density(self) -> float:
        return self.delta_values.numel() / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        if not self._enabled:
            return self._base_forward(input)
        merged, weight = self.merged, self._base()
        if merged and (by_definition() or self._values_lent()):
            # Beside the base: by a formula whose gradient of the values torch sees, or with values that the weight is not to keep.
            merged, weight = False, self._base_copy()
        elif merged:
            self._check_merged()
        asked = self._compute_dtype()
        dtype = compute_dtype_of(input, asked) if isinstance(input, Tensor) else torch.float32
        cast_weight = asked is not None or (isinstance(input, Tensor) and autocast_on(input.device.type))
        pattern = self.pattern
        layer_functions.check_arguments(input, weight, pattern, self.delta_values, self.bias, dtype, cast_weight)
        return layer_functions.apply(
            input,
            weight,
            pattern,
            self.delta_values,
            self.bias,
            dtype,
            input.dtype if asked is not None else dtype,
            resident=merged,
            observer=self._observer,
        )

    def _base_forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.base_values is not None:
            if not by_definition() and not self._values_lent():
                self._check_merged()
            weight = self._base_copy()
        return nn.functional.linear(input, weight, self.bias)

    def _base_copy(self) -> Tensor:
        """W of a merged layer. Written nowhere: between a policy's forward and its backward, autograd holds the merged weight."""
        base: Any = self.base_values
        if by_definition():
            if not torch._C._functorch.is_functorch_wrapped_tensor(self.weight):  # which has no address
                self.check_base()
            return definition.sparse_delta_write(self.weight.detach(), self.delta_indices, base, None)
        self.check_base()
        weight = self.weight.detach().clone()
        ops.sparse_delta.sparse_delta_write_(weight, self.delta_indices, base, None)
        return weight

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the layer is y = x Wᵀ + b. A merged weight is not written but patched into a copy, so that a reference
        forward may run between a forward and its backward, as DPO's does."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @property
    def merged(self) -> bool:
        """Whether the weight holds the delta."""
        return self.base_values is not None

    def _now(self) -> tuple[int, ...]:
        return self.weight.data_ptr(), self.weight._version, self.delta_values._version

    def _note(self) -> None:
        """What the weight and the values are now is what we have written."""
        self._seen = self._now()

    def check_base(self) -> None:
        """Raise RuntimeError where a merged weight was written or replaced by others. Writing to it what it held is none of that, as
        DDP does when it makes all workers' parameters and buffers the first one's."""
        if self._seen is None or self._seen[:2] == (self.weight.data_ptr(), self.weight._version):
            return
        what = "replaced" if self._seen[0] != self.weight.data_ptr() else "written"
        if what == "written" and self._holds_delta():
            self._note()
            return
        raise RuntimeError(
            f"weight: {what} by others while it holds this layer's delta; call rebase() to take what it holds now for the base, "
            "or unmerge() before writing to it"
        )

    @torch.no_grad()
    def _holds_delta(self) -> bool:
        """Whether the weight is, on the support, what merging these values into these base values gives."""
        held = self.weight.reshape(-1).index_select(0, self.pattern.indices)
        as_merged, places = held.clone().unsqueeze(0), torch.arange(held.numel(), device=held.device, dtype=torch.int32)
        ops.sparse_delta.sparse_delta_write_(as_merged, places, self.base_values, self.delta_values.detach())
        return torch.equal(as_merged[0], held)

    def _check_merged(self) -> None:
        if torch.compiler.is_compiling():
            # Which would take the addresses and versions of its first call for all. As a decorator this would import triton.
            torch.compiler.disable(SparseDeltaLinear._check_merged)(self)
            return
        self.check_base()
        if self._seen is not None and self._seen[2] != self.delta_values._version:
            self.resync()

    @torch.no_grad()
    def _put(self, values: Tensor | None) -> None:
        if self.base_values is None:
            raise RuntimeError("the layer is not merged")
        given = None if values is None else values.detach()
        ops.sparse_delta.sparse_delta_write_(self.weight.detach(), self.delta_indices, self.base_values, given)
        torch.autograd.graph.increment_version(self.weight)
        self._note()

    def resync(self) -> None:
        """Put the values into a merged weight again, after they were changed in a way that no version counter shows (``.data``). Does
        nothing where the layer is not merged."""
        if self.merged:
            self.check_base()
            self._put(self.delta_values)

    def rebase(self) -> None:
        """Take what a merged weight holds now for the base, and put the delta on it: for a weight that was written on purpose."""
        if self.merged:
            self._embed()

    @torch.no_grad()
    def _embed(self) -> None:
        self.base_values = self.weight.detach().reshape(-1).index_select(0, self.delta_indices)
        self._put(self.delta_values)

    def merge(self) -> None:
        """Put the delta into the weight; see the class. Does nothing when merged already. Keeps the weight's dtype for each active
        weight besides."""
        if self.merged:
            return
        if not self.weight.is_contiguous():
            raise RuntimeError("merge: expected a contiguous weight")
        self._embed()

    def unmerge(self) -> None:
        """Take the delta out of the weight again, which is then torch.equal to what it was. Does nothing when not merged."""
        if not self.merged:
            return
        self.check_base()
        self._put(None)
        self.base_values, self._seen = None, None

    @torch.no_grad()
    def move_support(self, changed: Tensor, positions: Tensor) -> Tensor:
        """Let the active weights numbered ``changed`` be those at ``positions`` instead, with a delta of 0; the others keep theirs.
        Indices stay sorted. Returns the order in which everything kept beside the values (an optimiser's states, with the new ones' in
        place of the changed ones') must be taken. A structured support becomes a plain one.

        Raises:
            TypeError: no vectors of integers. ValueError: positions are taken already, repeated or outside the weight, or changed are
                repeated or none of the layer's; nothing is changed then.
        """
        for name, given in (("changed", changed), ("positions", positions)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a vector of int32 or int64, got {type(given).__name__}")
            if given.dtype not in (torch.int32, torch.int64) or given.dim() != 1:
                raise TypeError(
                    f"{name}: expected a vector of int32 or int64, got {given.dtype} of shape {tuple(given.shape)}"
                )
        if changed.numel() != positions.numel():
            raise ValueError(f"positions: expected {changed.numel()} as of changed, got {positions.numel()}")
        count = self.delta_values.numel()
        ordered = changed.sort().values
        if changed.numel() and (
            bool((ordered[1:] == ordered[:-1]).any()) or int(ordered[0]) < 0 or int(ordered[-1]) >= count
        ):
            raise ValueError(f"changed: expected distinct and in [0, {count}), got {ordered.tolist()[:8]}")
        moved = self.delta_indices.clone()
        moved[changed] = positions.to(moved)
        moved, order = torch.sort(moved)
        shape = torch.Size((self.out_features, self.in_features))
        check_indices(moved, shape)
        was_merged = self.merged
        self.unmerge()
        self.delta_values[changed] = 0.0
        self.delta_values.copy_(self.delta_values[order])
        self.delta_indices = moved
        self._pattern = trusted(moved, shape)
        if was_merged:
            self.merge()
        return order

    def _apply(self, fn: Any, recurse: bool = True) -> SparseDeltaLinear:
        was_merged, was_meta = self.merged, self.delta_indices.is_meta
        self.unmerge()
        values = self.delta_values.detach()
        super()._apply(fn, recurse)
        if was_meta and not self.delta_indices.is_meta:
            # to_empty: what lies in fresh memory is no support, and what is loaded next is to find one.
            torch.arange(values.numel(), out=self.delta_indices)
            self._pattern = trusted(self.delta_indices, torch.Size((self.out_features, self.in_features)))
            self._checked = _version(self.delta_indices)
        dtype = wide_dtype(self._weight_dtype())
        if self.delta_values.dtype != dtype or self.delta_values.dtype != values.dtype:
            self.delta_values.data = values.to(self.delta_values.device, dtype)
        self._own_values()
        if was_merged:
            self.merge()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is observed by nobody. Its tensors lie and count elsewhere: what of them is as we left it stands in the place of _seen.
        kept = None
        if self.merged and self._seen is not None:
            kept = tuple(now == seen for now, seen in zip(self._now(), self._seen, strict=True))
        return {**self.__dict__, "_observer": None, "_seen": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_checked", -1)
        self._own_values()
        if self.merged:
            kept = self._seen or (True, True, True)
            self._seen = tuple(now if same else -1 for now, same in zip(self._now(), kept, strict=True))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base_values is not None:
            weight = self.weight.detach().clone()
            ops.sparse_delta.sparse_delta_write_(weight, self.delta_indices, self.base_values, None)
            destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        was_merged = self.merged
        self.unmerge()
        indices = state_dict.get(f"{prefix}delta_indices")
        if indices is not None:
            try:
                self._take_indices(indices, state_dict.get(f"{prefix}delta_values"))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}delta_indices: {error}")
                state_dict = {
                    key: value
                    for key, value in state_dict.items()
                    if key not in (f"{prefix}delta_indices", f"{prefix}delta_values")
                }
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if was_merged:
            self.merge()

    def _take_indices(self, indices: Tensor, values: Tensor | None) -> None:
        """Become a layer of this support, all of its values 0; the parameter stays the same object. ``values``: what is to be put there
        behind this."""
        shape = torch.Size((self.out_features, self.in_features))
        check_indices(indices, shape)
        count = self.delta_values.numel() if values is None else values.numel()
        if count != indices.numel():
            raise ValueError(f"indices: expected {count} as of delta_values, got {indices.numel()}")
        if not self.delta_indices.is_meta and torch.equal(indices.to(self.delta_indices), self.delta_indices):
            return
        self.delta_indices = smallest_index_dtype(indices, shape).to(self.weight.device, copy=True)
        self._pattern = trusted(self.delta_indices, shape)
        if indices.numel() != self.delta_values.numel():
            self.delta_values.data = self.delta_values.new_zeros(indices.numel())
        else:
            self.delta_values.detach().zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.delta_values.numel()} ({100 * self.density:.3g} %)"


class SparseDeltaNF4Linear(SparseDeltaLinear, NF4Linear):  # type: ignore[misc]  # from_linear is SparseDeltaLinear's
    """A :class:`SparseDeltaLinear` on a 4-bit weight, which stays packed: the delta is put into each decoded copy. Made by
    :meth:`SparseDeltaLinear.from_linear`."""

    def _weight_dtype(self) -> torch.dtype:
        return self.weight_dtype

    def _dense_weight(self) -> Tensor:
        return F.nf4_dequantize(self.nf4)

    def _base(self) -> F.NF4Weight:
        return self.nf4

    def _compute_dtype(self) -> torch.dtype | None:
        return self.compute_dtype

    def _base_forward(self, input: Tensor) -> Tensor:
        return NF4Linear.forward(self, input)

    def merge(self) -> None:
        """Not for a 4-bit weight, which cannot hold a delta exactly."""
        raise RuntimeError("merge: a 4-bit weight cannot hold a delta")
