"""Models whose linear layers lie in 4 bits in a checkpoint that bitsandbytes wrote; bitsandbytes need not be installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .hooks import replace
from .nf4 import NF4Linear, unpack_state, why_no_base
from .tensor_file import read_tensors

_MARK = ".weight.quant_state.bitsandbytes__"


def nf4_weights(state: Mapping[str, Tensor]) -> dict[str, F.NF4Weight]:
    """The 4-bit weights of a state dict, by their layers' names: the storage that is there, no copy and no re-encoding.

    Args:
        state: as ``safetensors.torch.load_file`` gives it: ``NAME.weight``, of any ``quant_storage`` dtype, and beneath it ``absmax``,
            ``quant_map``, ``nested_absmax``, ``nested_quant_map`` and ``quant_state.bitsandbytes__nf4`` (or ``fp4``).

    Raises:
        ValueError: a layer's entries are incomplete or do not fit together; the message names the layer.
    """
    found = {}
    for key in state:
        name, mark, _ = key.partition(_MARK)
        if not mark:
            continue
        stem = f"{name}.weight."
        entries = {other[len(stem) :]: value for other, value in state.items() if other.startswith(stem)}
        try:
            found[name] = unpack_state(state[f"{name}.weight"], entries)
        except KeyError as error:
            raise ValueError(f"{name}: the checkpoint has no entry {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: not the state of a 4-bit layer: {error}") from None
    return found


def _tensors(checkpoint: Any) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected a path or a mapping of tensors, got {type(checkpoint).__name__}")
    path = Path(checkpoint)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"checkpoint: no .safetensors file in {path}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors("load_nf4", "checkpoint", file)
    return tensors


def load_nf4(
    model: nn.Module, checkpoint: Any, *, compute_dtype: torch.dtype | None = None, strict: bool = True
) -> nn.Module:
    """Load a checkpoint that bitsandbytes wrote: each nn.Linear whose weight it holds in 4 bits becomes an :class:`NF4Linear` on that
    storage, everything else is loaded as ``load_state_dict`` does. In place; the model is returned.

    The model may be on the meta device, as ``with torch.device("meta")`` makes it: what the checkpoint holds is assigned.

    Args:
        checkpoint: a safetensors file, a folder of them, or a mapping of tensors.
        compute_dtype: of the 4-bit layers' products; autocast's or the input's if not given.
        strict: whether a key that is missing or unexpected is an error.

    Raises:
        TypeError: ``model`` is no module, or ``checkpoint`` none of these. ValueError: a file is torn, a 4-bit layer is incomplete, is
            no nn.Linear in the model, or has another shape there. RuntimeError: keys do not match, where strict, or shapes of what is
            not in 4 bits. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    tensors = _tensors(checkpoint)
    weights = nf4_weights(tensors)
    modules = dict(model.named_modules())
    # All that can fail for a layer is asked before the first is exchanged.
    for name, nf4 in weights.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear) or (reason := why_no_base(module)):
            found = reason if isinstance(module, nn.Linear) else f"got {type(module).__name__}"
            raise ValueError(f"{name}: expected an nn.Linear in the model, {found}")
        if tuple(nf4.shape) != (module.out_features, module.in_features):
            expected = (module.out_features, module.in_features)
            raise ValueError(f"{name}: expected a weight of shape {expected}, the checkpoint has {tuple(nf4.shape)}")
    rest = {
        key: value
        for key, value in tensors.items()
        if not any(key == f"{name}.weight" or key.startswith(f"{name}.weight.") for name in _owners(key, weights))
    }
    with _whole_or_not_at_all(model):
        for name, nf4 in weights.items():
            layer = NF4Linear(nf4, modules[name].bias, compute_dtype)
            layer.train(modules[name].training)
            replace(model, name, layer)
        missing, unexpected = model.load_state_dict(rest, strict=False, assign=True)
        missing = [
            key for key in missing if not any(key.startswith(f"{name}.weight") for name in _owners(key, weights))
        ]
        if strict and (missing or unexpected):
            raise RuntimeError(f"checkpoint: missing {missing}, unexpected {unexpected}")
    return model


@contextlib.contextmanager
def _whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """What is assigned within the block is taken back where it raises: keys and shapes are compared by what loads them alone."""
    before = [
        (held, dict(held))
        for module in model.modules()
        for held in (module._parameters, module._buffers, module._modules)
    ]
    try:
        yield
    except BaseException:
        for held, values in before:
            held.clear()  # type: ignore[attr-defined]
            held.update(values)  # type: ignore[arg-type]
        raise


def _owners(key: str, weights: Mapping[str, F.NF4Weight]) -> list[str]:
    """The 4-bit layer that a key belongs to, if there is one: what stands before ``.weight``."""
    name = key.partition(".weight")[0]
    return [name] if name in weights else []
