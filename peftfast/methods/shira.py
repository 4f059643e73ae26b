"""Files of PEFT's SHiRA (arXiv 2406.13175) for models adapted with :class:`peftfast.nn.SparseDeltaLinear`: what is saved here, stock
PEFT loads, and the other way round. Needs safetensors, not PEFT."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import imported
from ..functional.sparse_pattern import SparsePattern, smallest_index_dtype
from ..nn.hooks import replace
from ..nn.nf4 import why_no_base
from ..nn.sparse_delta import SparseDeltaLinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def save_shira(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Write the sparse deltas of a model as a SHiRA adapter: two files, each replaced as a whole.

    Args:
        model: its :class:`SparseDeltaLinear` layers all have r (N + K) active weights with one r, which is SHiRA's count.
        directory: made if need be.
        base_model, task_type: what PEFT's config names as the base and the task, such as "CAUSAL_LM".
        modules_to_save: paths of modules whose parameters are written whole, as a new classification head.

    Raises:
        ValueError: no such layer or module, or another count of active weights; nothing is written then.
    """
    from ..integrations.adapter_files import targets_of

    save = imported("safetensors.torch", "save_shira").save
    _check_model(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseDeltaLinear)}
    if not layers:
        raise ValueError("model: expected SparseDeltaLinear layers, got none")
    ranks = {name: _rank(name, layer.delta_values.numel(), layer) for name, layer in layers.items()}
    if len(set(ranks.values())) != 1:
        raise ValueError(f"model: expected one r for all layers, since SHiRA's config has one, got {ranks}")
    tensors = {}
    for name, layer in layers.items():
        flat = layer.delta_indices.cpu().to(torch.int64)
        at = torch.stack((flat // layer.in_features, flat % layer.in_features)).to(torch.int32)
        tensors[f"{PREFIX}{name}.shira_indices"] = at
        tensors[f"{PREFIX}{name}.shira_weight"] = layer.delta_values.detach().cpu().float().contiguous()
    for name in modules_to_save:
        if name not in dict(model.named_modules()):
            raise ValueError(f"modules_to_save: expected modules of the model, got {name!r}")
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value.detach().cpu().contiguous()
    config = {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "SHIRA",
        "r": next(iter(ranks.values())),
        "random_seed": None,
        "revision": None,
        "target_modules": targets_of(model, list(layers)),
        "task_type": task_type,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _replace(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_shira(model: nn.Module, directory: str | os.PathLike[str], *, resident: bool = False) -> list[str]:
    """Give a model the sparse deltas of a SHiRA adapter: each nn.Linear (or 4-bit linear) that the file names becomes a
    :class:`SparseDeltaLinear` on its storage, and one that is a SparseDeltaLinear already takes the file's support and values. Modules
    that were saved whole take the file's tensors.

    Args:
        model: the base that the adapter was trained on.
        directory: holds the two files.
        resident: hold the deltas in the weights.

    Returns:
        The names of the layers.

    Raises:
        ValueError: not a SHiRA adapter, a layer that the model lacks, or indices or a saved module that do not fit it; nothing is
            changed then.
        OSError: a file cannot be read.
    """
    load = imported("safetensors.torch", "load_shira").load
    from safetensors import SafetensorError

    from ..integrations.adapter_files import check_modules, taken_heads

    _check_model(model)
    folder = Path(directory)
    config = json.loads((folder / CONFIG).read_text())
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != "SHIRA":
        raise ValueError(f"{CONFIG}: expected the peft_type SHIRA, got {kind!r}")
    try:
        tensors = load((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS}: expected a safetensors file: {error}") from None
    check_modules(config, folder)
    heads = taken_heads(tensors, config, model, folder)
    ends = (".shira_weight", ".shira_indices")
    names = sorted({key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)})
    if not names:
        raise ValueError(f"{WEIGHTS}: expected shira_weight tensors, got {sorted(tensors)[:4]}")
    known = dict(model.named_modules())
    ready: dict[str, tuple[Any, SparsePattern, torch.Tensor]] = {}
    for key in names:
        name = key.removeprefix(PREFIX)
        linear: Any = known.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{WEIGHTS}: {name}: expected a linear layer of the model, got {type(linear).__name__}")
        if not isinstance(linear, SparseDeltaLinear) and (reason := why_no_base(linear)):
            raise ValueError(f"{WEIGHTS}: {name}: expected a layer of the model without an adapter; {reason}")
        values, at = (tensors.get(f"{key}{end}") for end in ends)
        shape = (linear.out_features, linear.in_features)
        if values is None or values.dim() != 1 or not values.is_floating_point():
            raise ValueError(f"{WEIGHTS}: {name}: expected a floating vector shira_weight, got {_described(values)}")
        if at is None or at.shape != (2, values.numel()) or at.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{WEIGHTS}: {name}: expected shira_indices of shape {(2, values.numel())} in int32 or int64, got {_described(at)}"
            )
        _rank(f"{WEIGHTS}: {name}", values.numel(), linear)
        if bool((at < 0).any()) or bool((at >= torch.tensor(shape)[:, None]).any()):
            raise ValueError(f"{WEIGHTS}: {name}: shira_indices lie outside a weight of {shape}")
        flat = at[0].to(torch.int64) * shape[1] + at[1]
        try:
            pattern, order = SparsePattern.from_unsorted(smallest_index_dtype(flat, shape), shape)
        except ValueError as error:
            raise ValueError(f"{WEIGHTS}: {name}: {error}") from None
        if isinstance(linear, SparseDeltaLinear):
            linear.check_base()
        elif resident and not linear.weight.is_contiguous():
            raise ValueError(f"resident: {name}: expected a contiguous weight")
        ready[name] = linear, pattern, values[order].float()
    for name, (linear, pattern, values) in ready.items():
        if isinstance(linear, SparseDeltaLinear):
            layer, was_merged = linear, linear.merged
            layer.unmerge()
            layer._take_indices(pattern.indices, values)
        else:
            layer, was_merged = SparseDeltaLinear.from_linear(linear, indices=pattern), False
            replace(model, name, layer)
        with torch.no_grad():
            layer.delta_values.copy_(values)
        if resident or was_merged:
            layer.merge()
    for module, state in heads.items():
        model.get_submodule(module).load_state_dict(state)
    return list(ready)


def _described(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _rank(name: str, count: int, layer: nn.Linear) -> int:
    together = layer.out_features + layer.in_features
    if count % together:
        raise ValueError(f"{name}: expected r (N + K) = r * {together} active weights, as SHiRA has, got {count}")
    return count // together


def _replace(path: Path, data: bytes) -> None:
    """The old file or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
