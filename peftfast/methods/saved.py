"""Adapter files of a model that :func:`peftfast.adapt` adapted: PEFT's own where PEFT has the method, else the same two files with the
peft_type ``PEFTFAST``, which names the method and its options. Called by ``peftfast.save_adapter`` and ``load_adapter``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LoRALinear, SparseDeltaLinear
from ..nn.hooks import replace
from ..nn.tensor_file import written_apart
from .adapting import HANDLE, SHARED, AdapterHandle, _adapt
from .registry import Method, get, methods

PREFIX = "base_model.model."
OWN_TYPE = "PEFTFAST"


def contents(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(entries of adapter_config.json, tensors by their names in the file) of an adapted model.

    Raises:
        RuntimeError: a layer is merged. ValueError: PEFT's class cannot express what was trained.
    """
    merged = [
        name
        for name, layer in handle.layers.items()
        if getattr(layer, "merged", False)
        and not isinstance(layer, SparseDeltaLinear)  # whose files are the same either way
    ]
    if merged:
        raise RuntimeError(f"save_adapter: {merged[0]} is merged; unmerge it first")
    if handle.method.files is not None:
        config, tensors = handle.method.files.write(handle)
        config = {"peft_type": handle.method.files.peft_type, **config}
    elif all(
        isinstance(layer, LoRALinear) and not getattr(layer, "own_files", False) for layer in handle.layers.values()
    ):
        config, tensors = lora_contents(handle)
    else:
        config, tensors = own_contents(handle)
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in handle.runtime.file_tensors().items()}
    for module in handle.modules_to_save:
        for name, tensor in handle.model.get_submodule(module).state_dict().items():
            tensors[f"{PREFIX}{module}.{name}"] = tensor
    config |= {"modules_to_save": handle.modules_to_save or None, "task_type": handle.task_type}
    return config, written_apart(tensors)


def lora_contents(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries and tensors of a LoRA adapter of PEFT. A layer whose weight was replaced when it was made has ``initial_A`` and
    ``initial_B``, and is written as the rank-2r adapter B A - B0 A0 of the weight as it was."""
    from ..integrations.adapter_files import PARTS, _config_of

    layers: dict[str, Any] = handle.layers
    config = _config_of(handle.model, {name: _Described(layer) for name, layer in layers.items()})  # type: ignore[misc]
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        parts = {part: getattr(layer, attribute) for part, attribute in PARTS.items()}
        if _replaced(layer):
            parts["lora_A.weight"] = torch.cat([layer.lora_A.detach(), layer.initial_A])
            parts["lora_B.weight"] = torch.cat([layer.lora_B.detach(), -layer.initial_B], dim=1)
        tensors |= {f"{PREFIX}{path}.{part}": value for part, value in parts.items() if value is not None}
    return config, tensors


def _replaced(layer: Any) -> bool:
    return getattr(layer, "initial_A", None) is not None


class _Described:
    """What a LoraConfig says of a layer, with the rank that its file has."""

    def __init__(self, layer: Any) -> None:
        twice = 2 if _replaced(layer) else 1
        self.r, self.scaling, self.lora_alpha = layer.r * twice, layer.scaling, layer.lora_alpha * twice
        self.lora_dropout, self.lora_bias = layer.lora_dropout, layer.lora_bias
        self.lora_magnitude_vector = layer.lora_magnitude_vector


def own_contents(handle: AdapterHandle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(entries of the config, tensors) of the project's own peft_type: every tensor of the method's layers."""
    tensors = {
        f"{PREFIX}{path}.{name}": tensor
        for path, layer in handle.layers.items()
        for name, tensor in adapter_tensors(layer).items()
    }
    shared = getattr(handle.model, SHARED, None)
    if shared is not None:
        tensors |= {f"{PREFIX}{SHARED}.{name}": tensor for name, tensor in shared.state_dict().items()}
    config = {
        "peft_type": OWN_TYPE,
        "peftfast_method": handle.method.name,
        "peftfast_options": dataclasses.asdict(handle.options),
        "target_modules": list(handle.layers),
        "peftfast_shapes": {path: shape for path, layer in handle.layers.items() if (shape := _shape(layer))},
        "task_type": None,
        "inference_mode": True,
    }
    return config, tensors


def _shape(layer: nn.Module) -> list[int] | None:
    """Outputs and inputs of a linear layer: positions of a sparse delta are flat, and would be others' in a weight of another shape."""
    sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def adapter_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors but for those of what it replaced: ``layer.adapter_tensors()`` where it has that."""
    if hasattr(layer, "adapter_tensors"):
        found: dict[str, Tensor] = layer.adapter_tensors()  # type: ignore[operator]
        return found
    own = layer.state_dict()
    return {
        name: tensor for name, tensor in own.items() if name.partition(".")[0] not in ("weight", "bias", "base_layer")
    }


@torch.no_grad()
def _fill(layer: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    try:
        if hasattr(layer, "load_adapter_tensors"):
            layer.load_adapter_tensors(tensors)  # type: ignore[operator]
            return
        own = adapter_tensors(layer)
        if set(own) != set(tensors):
            raise ValueError(f"expected the tensors {sorted(own)}, got {sorted(tensors)}")
        layer.load_state_dict(dict(tensors), strict=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"directory: {path}: {' '.join(str(error).split())}") from None


def serving(config: Mapping[str, Any]) -> Method | None:
    """The method that reads such files, None for PEFT's LoRA and for what nothing here reads."""
    kind = config.get("peft_type")
    if kind == OWN_TYPE:
        name = config.get("peftfast_method")
        if not isinstance(name, str):
            raise ValueError(f"directory: peftfast_method: expected a method's name, got {name!r}")
        return get(name)
    if kind == "LORA":
        return None
    return next(
        (method for method in methods().values() if method.files is not None and method.files.peft_type == kind), None
    )


def _own_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    options, names = config.get("peftfast_options"), config.get("target_modules")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"directory: peftfast_options: expected names and values, got {options!r}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"directory: target_modules: expected a list of paths, got {names!r}")
    return dict(options or {}), names


def _check_shapes(model: nn.Module, config: Mapping[str, Any]) -> None:
    shapes = config.get("peftfast_shapes")  # which older files do not have
    modules = dict(model.named_modules())
    for name, expected in shapes.items() if isinstance(shapes, dict) else ():
        module = modules.get(name)
        if isinstance(module, nn.Linear) and (found := _shape(module)) != expected:
            raise ValueError(
                f"directory: {name}: expected a layer of [outputs, inputs] {expected}, the model has {found}"
            )


def restore(
    model: nn.Module, method: Method, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> AdapterHandle:
    """Adapt ``model`` as the files say and copy their tensors in.

    Raises:
        ValueError, TypeError: the files do not fit the model or each other; the model is as it was then.
    """
    from ..integrations.adapter_files import taken_heads

    own = config.get("peft_type") == OWN_TYPE
    heads = taken_heads(tensors, config, model, folder, by_path=own)
    if own:
        options, names = _own_config(config)
        _check_shapes(model, config)
    elif method.files is not None:
        options, names = method.files.read(config, tensors)
    fill = fill_own if own else method.files.fill  # type: ignore[union-attr]
    return _restored(model, method.name, options, names, heads, lambda handle: fill(handle, tensors))


def restore_residual(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> AdapterHandle:
    """PEFT's files of an initialisation that is a function of the weight alone (PiSSA, OLoRA): the residual is formed again, as
    PEFT does it, and A and B are copied in.

    Raises:
        ValueError, TypeError: the files do not fit the model, or the ranks of their layers differ; the model is as it was then.
    """
    from ..integrations.adapter_files import taken_heads

    for name in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"):
        if config.get(name):
            raise ValueError(f"directory: {name}={config[name]!r} is not served with {config['init_lora_weights']}")
    heads = taken_heads(tensors, config, model, folder)
    parts = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part in parts if name.endswith("." + part)), None)
        if part is None or not name.startswith(PREFIX):
            raise ValueError(f"directory: {name} is no part of a LoRA adapter of linear layers")
        grouped.setdefault(name.removeprefix(PREFIX).removesuffix("." + part), {})[parts[part]] = tensor
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    options = {"r": config["r"], "lora_alpha": float(alpha), "lora_dropout": config.get("lora_dropout") or 0.0}

    def fill(handle: AdapterHandle) -> None:
        for path, own in grouped.items():
            layer: Any = handle.layers[path]
            for name in ("lora_A", "lora_B"):
                if name not in own or own[name].shape != getattr(layer, name).shape:
                    raise ValueError(f"directory: {path}: expected {name} of shape {tuple(getattr(layer, name).shape)}")
            for name, tensor in own.items():
                getattr(layer, name).data.copy_(tensor)

    return _restored(model, config["init_lora_weights"], options, list(grouped), heads, fill)


def _restored(
    model: nn.Module,
    method: str,
    options: dict[str, Any],
    names: list[str] | str,
    heads: dict[str, dict[str, Tensor]],
    fill: Callable[[AdapterHandle], None],
) -> AdapterHandle:
    """The model adapted and filled, or as it was and an error."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    targets = names if isinstance(names, str) else "(" + "|".join(re.escape(name) for name in names) + ")"
    before = dict(model.named_modules())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handle = _adapt(model, method, targets, None, list(heads), None, None, options, True)
    try:
        if not isinstance(names, str) and set(handle.layers) != set(names):
            missing = sorted(set(names) - set(handle.layers))
            raise ValueError(
                f"directory: the adapter has a layer {missing[0]}, which the model's is not: {handle.skipped}"
            )
        fill(handle)
        for module, state in heads.items():
            model.get_submodule(module).load_state_dict(state)
    except BaseException:
        handle.runtime.detach()
        for path in handle.layers:
            replace(model, path, before[path])
        if SHARED in model._modules:
            del model._modules[SHARED]
        del model.__dict__[HANDLE]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return handle


def fill_own(handle: AdapterHandle, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of :func:`own_contents` into an adapted model's layers. ValueError: they do not fit."""
    known = handle.model.__dict__[HANDLE].layers
    grouped: dict[str, dict[str, Tensor]] = {path: {} for path in known}
    shared: dict[str, Tensor] = {}
    ordered = sorted(known, key=len, reverse=True)
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIX)
        if inner.startswith(SHARED + "."):
            shared[inner.removeprefix(SHARED + ".")] = tensor
            continue
        path = next((path for path in ordered if inner.startswith(path + ".")), None)
        if path is None:
            raise ValueError(f"directory: {name} belongs to no layer that the model has")
        grouped[path][inner.removeprefix(path + ".")] = tensor
    if shared:
        try:
            getattr(handle.model, SHARED).load_state_dict(shared)
        except RuntimeError as error:
            raise ValueError(f"directory: {SHARED}: {' '.join(str(error).split())}") from None
    for path, layer in known.items():
        _fill(layer, grouped[path], path)
