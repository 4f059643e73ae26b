"""Finding and loading a base model for a command: a local directory or the name of one on the Hugging Face hub."""

import contextlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import arguments
from .errors import UserError

# What of a hub repository is fetched: no weights in other formats.
WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# What transformers reads into Linear4bit layers, for training and for export alike.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def is_hub_name(text: str) -> bool:
    """Whether ``text`` can only be owner/name: a relative path of two parts whose first part is no directory here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not Path(text).exists() and not Path(text).parent.is_dir()


def directory_of(option: str, model: str) -> Path:
    """The directory that holds the model: ``model`` itself, or what the hub's cache has of that name, fetched if need be. Nothing is
    fetched where HF_HUB_OFFLINE is set.

    Raises:
        UserError: no such directory, no config.json in it, or a name that the hub does not give.
    """
    if is_hub_name(model):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, allow_patterns=list(WANTED_FILES)))
        except Exception as error:  # of requests, of the hub, of the disk: one line for all
            raise UserError(
                f"{option}: {model} is no directory here, and the hub does not give it: {arguments.first_line(error)}"
            ) from None
    else:
        path = Path(model)
    if not path.is_dir():
        kind = "is not a directory" if path.exists() else "does not exist"
        raise UserError(
            f"{option}: {path} {kind}; expected a local directory with config.json, or OWNER/NAME on the hub"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{option}: {path} holds no config.json; expected a directory saved by transformers")
    return path


def offline_unless_named(model: str) -> None:
    """Before the libraries are imported: a local directory needs no network, and none is asked for."""
    if not is_hub_name(model):
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextlib.contextmanager
def named(option: str, directory: str, what: str) -> Iterator[None]:
    """Errors that other libraries raise for a directory's contents, as a UserError that names it."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    # A file whose JSON is of another shape ends in a TypeError or an AttributeError, a config's field of another type in the hub's own.
    strict = getattr(errors, "StrictDataclassError", OSError)
    of_values = (ValueError, KeyError, TypeError, AttributeError, strict)
    bad = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError, *of_values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except bad as error:
            raise UserError(f"{option}: no usable {what} in {directory}: {arguments.first_line(error)}") from error


def auto_class(classify: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classify else AutoModelForCausalLM


def load(
    directory: str,
    config: Any,
    *,
    classify: bool,
    dtype: str,
    device: str,
    four_bit: bool = False,
    skip: Sequence[str] | None = None,
    option: str = "--model",
) -> tuple[Any, list[str]]:
    """(the base model, paths of its modules that the checkpoint has no weights for). ``skip`` names modules that are not quantised."""
    import torch

    settings: dict[str, Any] = {
        "config": config,
        "dtype": "auto" if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": True,
        "output_loading_info": True,
    }
    if four_bit:
        from transformers import BitsAndBytesConfig

        settings["device_map"] = {"": device}
        settings["quantization_config"] = BitsAndBytesConfig(
            **NF4, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=list(skip) if skip else None
        )
    with named(option, directory, "model"):
        model, info = auto_class(classify).from_pretrained(directory, **settings)
    if four_bit:
        forbid_repacking(model)
    return model, sorted({key.rpartition(".")[0] for key in info["missing_keys"]})


def forbid_repacking(model: Any) -> None:
    """Keep bitsandbytes from rewriting packed weights on a CPU with AVX512-BF16 at the first evaluation: gradients get lost."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
