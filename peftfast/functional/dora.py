"""DoRA's row gains, by low-rank norms: ‖W + s B A‖² without W + s B A."""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import ops
from ..kernels import streams  # type: ignore[attr-defined]
from ..reference.lora import weight_norm
from .nf4 import NF4Weight, nf4_dequantize

# In rows this short, or no longer than twice the rank, B A may cancel most of a row of W, and a difference of squares would lose the
# digits of what is left; there the sum itself is small.
SHORT_ROW = 64
_KEPT = "_row_norms"  # in the __dict__ of a weight that is frozen: what was computed of it


class _Kept:
    """A weight's row norms, and all by which a change of it shows.

    They lie on the tensor itself and not in a table of weak references: torch.utils.swap_tensors, by which a module is moved, cast or
    loaded where torch.__future__ asks for it, refuses a tensor to which anything refers weakly, and hands what lies on a tensor on
    with its contents. Storages are referred to weakly, so that the address of one that is freed is not taken for it again.
    """

    def __init__(self, tensors: list[Tensor], key: tuple[object, ...], norms: Tensor, shard: Any) -> None:
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self.key, self.norms, self.shard = key, norms, shard
        self.made = streams.Made(norms)

    def __reduce__(self) -> tuple[type[set[object]], tuple[()]]:
        # A copy or a pickle of the weight is another tensor: it gets what any loader reads and nobody takes for norms.
        return set, ()


def forget_norms(weight: Tensor | None) -> None:
    """Called where a weight changes behind its version counter (``.data``): its row norms are computed anew at the next call. A layer
    that keeps its weight in another form may have None here; and a compiler, which neither reads nor keeps norms, sees nothing."""
    if weight is not None and not torch.compiler.is_compiling():
        weight.__dict__.pop(_KEPT, None)


def _unrounded(weight: Tensor | NF4Weight, dense: Tensor) -> Tensor:
    """A magnitude begins as the norm of the weight in its own dtype, not of what a product in 16 bits rounds it to."""
    if isinstance(weight, NF4Weight) and weight.dtype != dense.dtype:
        return nf4_dequantize(weight, weight.dtype)
    return dense


def _memory(tensor: Tensor) -> tuple[int, int, int]:
    """Which memory a tensor shows, and in which version."""
    return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version


def _shard_of(tensor: Tensor) -> Any:
    """What FSDP2 knows of the parameter that it gathered into a tensor's memory, weakly; None where it did not."""
    composed = sys.modules.get("torch.distributed._composable_state")
    memory = tensor.untyped_storage()._cdata
    for module in list(getattr(composed, "_module_state_mapping", ())):
        state: Any = composed._get_module_state(module)  # type: ignore[union-attr]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in itertools.chain.from_iterable(getattr(group, "fsdp_params", ()) for group in groups):
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None and gathered.untyped_storage()._cdata == memory:
                return weakref.ref(parameter)
    return None


def _shard_memory(shard: Any) -> tuple[int, ...]:
    """Of the part of a gathered weight that lies here. It is written, by a loader or an optimiser, where the gathered weight is not,
    which is then gathered anew in the same version and often at the same address."""
    parameter = None if shard is None else shard()
    local = getattr(getattr(parameter, "sharded_param", None), "_local_tensor", None)
    return _memory(local) if type(local) is Tensor else ()


def _row_norms(weight: Tensor | NF4Weight, dense: Tensor, dtype: torch.dtype) -> Tensor:
    how: tuple[object, ...]
    if isinstance(weight, NF4Weight):  # the layout of its parts follows from what it is
        tensors = [part for part in weight.storage() if isinstance(part, Tensor)]
        how = dtype, weight.block_size, weight.shape, weight.dtype
    else:
        tensors, how = [weight], (dtype, weight.dtype, weight.shape, weight.stride())
    # A weight that is trained has other norms after every step, of which no version need tell: FSDP gathers behind it.
    if torch.compiler.is_compiling() or any(part.requires_grad or part.is_inference() for part in tensors):
        return torch.linalg.vector_norm(dense.to(dtype), dim=1)
    known = tensors[0].__dict__.get(_KEPT)
    shard = known.shard if isinstance(known, _Kept) else _shard_of(tensors[0])
    key = (how, *map(_memory, tensors), _shard_memory(shard))
    if not isinstance(known, _Kept) or known.key != key:
        norms = torch.linalg.vector_norm(_unrounded(weight, dense).to(dtype), dim=1)
        if norms.is_cuda and torch.cuda.is_current_stream_capturing():
            return norms  # which are there when the graph is replayed, and not before
        known = tensors[0].__dict__[_KEPT] = _Kept(tensors, key, norms, shard)
    known.made.meet()
    return known.norms


def row_gain(
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    magnitude: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """magnitude / ‖W + scaling B A‖ over rows, ``[N]`` in float32 (float64 where ``dtype``, the compute dtype, is); the norm carries no
    gradient (arXiv 2402.09353, section 4.3).

    ‖W + s B A‖² = ‖W‖² + 2 s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B over the rank: one pass over W, and R columns beside it instead of a
    second W. ‖W‖² is kept from call to call.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        dense = nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight.detach()
        a, b = lora_a.detach().to(wide), lora_b.detach().to(wide)
        if dense.shape[1] <= max(SHORT_ROW, 2 * a.shape[0]):
            norm = weight_norm(_unrounded(weight, dense).to(wide), a, b, scaling)
        else:
            crossed = ops.lora.lora_shrink(dense, a, None, 0.0, 2.0 * scaling, wide)
            squares = crossed + (b @ (a @ a.T)) * scaling**2
            total = (squares * b) @ squares.new_ones(b.shape[1])  # a product: torch sums short rows slowly
            plain = _row_norms(weight, dense, wide)
            # Where B is 0, as DoRA begins, the norm is W's own to the bit, and the gain exactly 1.
            norm = torch.where(total == 0, plain, (plain * plain + total).clamp_min_(0.0).sqrt_())
    return magnitude.to(wide) / norm
