"""PEFT's adapter files for models that were adapted without PEFT, by :class:`peftfast.nn.LoRALinear` or :func:`peftfast.adapt`.

A directory holds ``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.save_pretrained`` writes them: stock PEFT
loads what :func:`save_adapter` saved, and :func:`load_adapter` loads what PEFT saved. PEFT is not imported.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..extras import imported
from ..nn import LoRALinear
from ..nn.hooks import replace
from ..nn.nf4 import why_no_base
from ..nn.tensor_file import read_tensors, written_apart
from .adapter_start import STARTED_FROM, in_its_4_bits, started_from

if TYPE_CHECKING:
    from ..methods.lora import LoRAOptions

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# The last part of a tensor's name in the file -> the parameter of a LoRALinear.
PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
# What a LoraConfig may say beyond the layers' sizes, with the values under which a LoRALinear computes the same.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    # Other initialisations rewrite the base weight, so that the adapter does not fit the base that is saved.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, base_model_name_or_path: str = "") -> None:
    """Write the adapters of all :class:`~peftfast.nn.LoRALinear` in ``model`` as a PEFT adapter directory; of a model that
    :func:`peftfast.adapt` adapted what its method trains: PEFT's files where PEFT has the method, else files of our own peft_type.

    Parameter names are the modules' paths in ``model``, ``[r, in]`` for A and ``[out, r]`` for B. Files of an adapter that the
    directory holds are replaced, each in one step.

    Args:
        model: the module whose paths PEFT will look for: what ``get_peft_model`` would be given.
        directory: made if need be.
        base_model_name_or_path: what the file says of its base; empty: the model's own ``name_or_path``, if it has one.

    Raises:
        TypeError: not a module. ValueError: no LoRALinear in it, or layers that one LoraConfig cannot describe: some with
            DoRA or a LoRA bias and some without, or several dropouts. RuntimeError: a layer is merged.
    """
    handle = getattr(model, "__dict__", {}).get("peftfast_handle")
    if handle is not None:
        from ..methods.saved import contents

        config, tensors = contents(handle)
    else:
        layers = _layers_of(model)
        if not layers:
            raise ValueError("model: expected at least one peftfast.nn.LoRALinear, found none")
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"save_adapter: {merged[0]} is merged; unmerge it first")
        config = _config_of(model, layers)
        found = {
            f"{PREFIX}{path}.{part}": getattr(layer, attribute)
            for path, layer in layers.items()
            for part, attribute in PARTS.items()
        }
        tensors = written_apart({name: tensor for name, tensor in found.items() if tensor is not None})
    name = base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config |= {"base_model_name_or_path": name}
    save = imported("safetensors.torch", "save_adapter").save

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    own = (handle.layers if handle is not None else layers).values()
    started = next((one.__dict__["started_from"] for one in own if "started_from" in one.__dict__), None)
    if started is not None:
        metadata[STARTED_FROM] = json.dumps(started, sort_keys=True)
    _replace(folder / WEIGHTS, save(tensors, metadata=metadata))
    _replace(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a PEFT LoRA adapter, or the adapter of a method that :func:`peftfast.adapt` knows, into a model that PEFT has not touched.

    A linear layer that the file has an adapter for (nn.Linear, bitsandbytes Linear4bit, :class:`~peftfast.nn.NF4Linear`) is replaced by
    :meth:`LoRALinear.from_linear <peftfast.nn.LoRALinear.from_linear>`, which shares its storage; a LoRALinear takes the values, if
    rank and options are the file's. Scaling, dropout, rsLoRA, DoRA and LoRA bias come from the file.

    Args:
        model: the base model, as saved; changed in place unless it is a single linear layer.
        directory: holds adapter_model.safetensors and adapter_config.json.

    An adapter of LoftQ or EoRA makes up for what its base lost in 4 bits: dense layers become 4-bit ones, as they were in training.

    Returns:
        ``model``.

    Warns:
        UserWarning: such an adapter, and layers in other 4 bits than those it began on.

    Raises:
        FileNotFoundError: one of the files is missing. TypeError: ``model`` is not a module, or a layer is not one of those above.
        ValueError: not a LoRA adapter, one that uses what a LoRALinear does not compute, or one whose names or shapes are not the
            model's, or a layer whose weight lacks what its adapter began as (adapt's PiSSA and its like). Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"directory: no {name} in {folder}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"directory: {folder / CONFIG} is not JSON ({error})") from None
    imported("safetensors", "load_adapter")  # before the files are looked at
    check_modules(config, folder)
    if isinstance(config, dict) and config.get("peft_type") != "LORA":
        from ..methods.saved import restore, serving

        method = serving(config)
        if method is not None:
            restore(model, method, config, read_tensors("load_adapter", "directory", folder / WEIGHTS), folder)
            return model
    if isinstance(config, dict) and config.get("init_lora_weights") in ("pissa", "olora"):
        from ..methods.saved import restore_residual

        _check_config(config | {"init_lora_weights": True}, folder)
        restore_residual(model, config, read_tensors("load_adapter", "directory", folder / WEIGHTS), folder)
        return model
    _check_config(config, folder)
    tensors = read_tensors("load_adapter", "directory", folder / WEIGHTS)
    heads = taken_heads(tensors, config, model, folder)
    grouped = _grouped(tensors, folder)
    if config.get("use_dora"):
        plain = [path for path, parts in grouped.items() if "lora_magnitude_vector" not in parts]
        if plain:
            raise ValueError(f"directory: {folder / CONFIG}: use_dora, but {plain[0]} has no lora_magnitude_vector")
    started = started_from(folder / WEIGHTS)
    # All is made ready before the first module is exchanged; from_linear freezes what it shares.
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        options = _options(config) if heads or started is not None else None
        ready = {path: _adapted(model, path, tensors, config, started) for path, tensors in grouped.items()}
    except BaseException:
        for parameter, flag in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(flag)
        raise
    for path, layer in ready.items():
        if started is not None:
            layer.__dict__["started_from"] = started
        for attribute, value in grouped[path].items():
            with torch.no_grad():
                getattr(layer, attribute).copy_(value)
        replace(model, path, layer)
    for module, state in heads.items():
        model.get_submodule(module).load_state_dict(state)
    if options is not None:
        _remember(model, ready, options, config, list(heads))
    return model


def _options(config: dict[str, Any]) -> LoRAOptions:
    from ..methods.lora import LoRAOptions

    return LoRAOptions(int(config["r"]), float(config["lora_alpha"]), config.get("lora_dropout") or 0.0)


def _remember(
    model: nn.Module, layers: dict[str, LoRALinear], options: LoRAOptions, config: dict[str, Any], heads: list[str]
) -> None:
    """A handle as :func:`peftfast.adapt` gives it, so that what is saved again holds the modules that were saved whole."""
    from ..methods.adapting import HANDLE, AdapterHandle, Runtime
    from ..methods.registry import get

    method = get("dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora")
    handle = AdapterHandle(model, method, options, dict(layers), {}, heads, Runtime())
    handle.task_type = config.get("task_type")
    model.__dict__[HANDLE] = handle


def taken_heads(
    tensors: dict[str, Tensor], config: dict[str, Any], model: nn.Module, folder: Path, by_path: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Path of a module that was saved whole (``modules_to_save``) -> its state, taken out of ``tensors``. ``by_path``: names are paths,
    as in files of our own peft_type.

    Raises:
        ValueError: tensors are not a module's of the model.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    # Each once: PEFT adds a classifier's names to the config that it is given, again where that is used again.
    for name in dict.fromkeys(config.get("modules_to_save") or []):
        paths = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
        # A name is the end of a path, as in PEFT; of adapt's files it is a path, and what else ends so is not in them.
        others = tuple(f"{PREFIX}{path}." for path in paths if path != name)
        ours = by_path or not any(key.startswith(others) and not key.endswith(tuple(PARTS)) for key in tensors)
        if name in paths and ours:
            paths = [name]
        for path in paths:
            start = f"{PREFIX}{path}."
            state = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
            expected = {key: tuple(value.shape) for key, value in model.get_submodule(path).state_dict().items()}
            found = {key: tuple(value.shape) for key, value in state.items()}
            if found != expected:
                raise ValueError(
                    f"directory: {folder / CONFIG}: modules_to_save: {path}: expected the tensors {expected}, got {found}"
                )
            heads[path] = state
        # With a classifier's task_type PEFT names "classifier" and "score", whichever of them the model has.
        if not paths and any(f".{name}." in key for key in tensors):
            raise ValueError(f"directory: {folder / CONFIG}: modules_to_save: the model has no {name}")
    return heads


def _layers_of(model: nn.Module) -> dict[str, LoRALinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, LoRALinear):
        raise ValueError(
            "model: expected a module that holds LoRALinear layers, got a single one: it has no name to be saved by"
        )
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _one(layers: dict[str, LoRALinear], what: str, value: Any) -> Any:
    """The value that all layers share."""
    values = {name: value(layer) for name, layer in layers.items()}
    if len(set(values.values())) > 1:
        first, *others = values
        other = next(name for name in others if values[name] != values[first])
        raise ValueError(
            f"model: a PEFT adapter has one {what}, but {first} has {values[first]} and {other} has {values[other]}"
        )
    return next(iter(values.values()))


def _config_of(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    # The layers keep their scaling, not the rule that gave it: rsLoRA is what all of them fit, and plain LoRA fits by its alpha.
    rslora = all(_close(layer.scaling, layer.lora_alpha / math.sqrt(layer.r)) for layer in layers.values()) and not all(
        _close(layer.scaling, layer.lora_alpha / layer.r) for layer in layers.values()
    )
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _plain(layer.lora_alpha if rslora else layer.scaling * layer.r) for name, layer in layers.items()}
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "target_modules": targets_of(model, list(layers)),
        "r": rank,
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": _one(layers, "use_dora", lambda layer: layer.lora_magnitude_vector is not None),
        "lora_bias": _one(layers, "lora_bias", lambda layer: layer.lora_bias is not None),
        "lora_dropout": _one(layers, "lora_dropout", lambda layer: layer.lora_dropout),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _plain(alpha: float) -> int | float:
    """An alpha as people write it: 16, not 16.000000000000004."""
    return int(round(alpha)) if _close(alpha, round(alpha)) else alpha


def _most_frequent(values: dict[str, Any]) -> Any:
    listed = list(values.values())
    return max(dict.fromkeys(listed), key=listed.count)


def targets_of(model: nn.Module, names: list[str]) -> list[str] | str:
    """Short names where they select these layers and no other module; else a pattern that does. PEFT takes a list's entry as the end of
    a path, and matches a string as a whole; it adapts a convolution or an embedding of such a name too, and refuses a container."""
    chosen = set(names)
    inside = tuple(f"{name}." for name in names)  # what an adapter layer holds, the base does not have
    known = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for candidates in ({name.rpartition(".")[2] for name in names}, chosen):
        hit = {name for name in known if any(name == end or name.endswith("." + end) for end in candidates)}
        # "all-linear" is the one string that PEFT reads as a word; a list never is.
        if hit == chosen:
            return sorted(candidates)
    return "(" + "|".join(re.escape(name) for name in sorted(names)) + ")"


def _replace(path: Path, contents: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(contents)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_modules(config: Any, folder: Path) -> None:
    """Of a config of any kind the lists of names that are read of it."""
    saved = config.get("modules_to_save") if isinstance(config, dict) else None
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ValueError(f"directory: {folder / CONFIG}: modules_to_save: expected a list of names, got {saved!r}")


def _check_config(config: Any, folder: Path) -> None:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"directory: {folder / CONFIG}: expected peft_type LORA, got {kind!r}")
    for name in ("r", "lora_alpha"):
        if not _is_number(config.get(name)):
            raise ValueError(f"directory: {folder / CONFIG}: {name}: expected a number, got {config.get(name)!r}")
    dropout = config.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0.0 <= dropout <= 1.0):
        raise ValueError(f"directory: {folder / CONFIG}: lora_dropout: expected a number in [0, 1], got {dropout!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name)
        if patterns is not None and not isinstance(patterns, dict):
            raise ValueError(f"directory: {folder / CONFIG}: {name}: expected patterns and numbers, got {patterns!r}")
        for pattern, number in (patterns or {}).items():
            if not _is_number(number):
                raise ValueError(f"directory: {folder / CONFIG}: {name}: {pattern}: expected a number, got {number!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"directory: {folder / CONFIG}: {name}: {pattern!r} is no regular expression: {error}"
                ) from None
    for name, accepted in NEUTRAL.items():
        if name in config and config[name] not in accepted:
            raise ValueError(
                f"directory: {folder / CONFIG}: {name}={config[name]!r} is not served; expected {accepted[0]!r}"
            )


def _grouped(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Path of a layer -> LoRALinear's attribute -> tensor."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part in PARTS if name.endswith("." + part)), None)
        if part is None or not name.startswith(PREFIX):
            raise ValueError(f"directory: {folder / WEIGHTS}: {name} is no part of a LoRA adapter of linear layers")
        if not tensor.is_floating_point():
            raise ValueError(f"directory: {folder / WEIGHTS}: {name}: expected a floating tensor, got {tensor.dtype}")
        path = name.removeprefix(PREFIX).removesuffix("." + part)
        grouped.setdefault(path, {})[PARTS[part]] = tensor
    if not grouped:
        raise ValueError(f"directory: {folder / WEIGHTS} holds no tensors")
    for path, parts in grouped.items():
        missing = {"lora_A", "lora_B"} - set(parts)
        if missing:
            raise ValueError(f"directory: {folder / WEIGHTS}: {path} has no {sorted(missing)[0]}")
    return grouped


def _of_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the path, or its end behind a dot."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _adapted(
    model: nn.Module,
    path: str,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    started: dict[str, Any] | None,
) -> LoRALinear:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"directory: the adapter has a layer {path}, and the model has none of that name") from None
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"model: {path}: expected a linear layer, got {type(layer).__name__}")
    if not isinstance(layer, LoRALinear) and (reason := why_no_base(layer)):
        raise TypeError(f"model: {path}: expected a layer without an adapter; {reason}")
    if getattr(layer, "initial_A", None) is not None:
        raise ValueError(
            f"model: {path}: its weight lacks what its adapter began as, and others' values would give another function; expected "
            "the model as it was before adapt"
        )
    if started is not None:
        layer = in_its_4_bits(layer, path, started)
    r = _of_pattern(config.get("rank_pattern"), path, config["r"])
    expected = {
        "lora_A": (r, layer.in_features),
        "lora_B": (layer.out_features, r),
        "lora_bias": (layer.out_features,),
        "lora_magnitude_vector": (layer.out_features,),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"directory: {path}.{name}: expected the shape {expected[name]}, got {tuple(tensor.shape)}"
            )
    r = int(r)
    options = {
        "r": r,
        "lora_alpha": _of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]),
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        "lora_bias": "lora_bias" in tensors,
        "use_dora": "lora_magnitude_vector" in tensors,
    }
    if not isinstance(layer, LoRALinear):
        return LoRALinear.from_linear(layer, **options)
    scaling = options["lora_alpha"] / (math.sqrt(r) if options["use_rslora"] else r)
    found = (layer.r, layer.lora_bias is not None, layer.lora_magnitude_vector is not None)
    wanted = (r, options["lora_bias"], options["use_dora"])
    if found != wanted or not _close(layer.scaling, scaling):
        raise ValueError(
            f"directory: {path}: (r, lora_bias, use_dora) {wanted} and scaling {scaling:g}, "
            f"but the model's layer has {found} and {layer.scaling:g}"
        )
    if layer.merged:
        raise ValueError(f"model: {path} is merged; unmerge it first")
    return layer
