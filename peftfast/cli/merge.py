"""``python -m peftfast merge``: an adapter put into its base model, written as a model of its own and checked by reading it back."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import arguments, atomic, models
from .errors import UserError
from .finetune_job import LABEL_NAMES

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers>=5",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
}
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT takes the first that is there
# Of the logits, in float32, adapter beside the base against adapter in it: sums in another order, over a model's depth. A scale or a
# layer that is missing is orders of magnitude larger.
TOLERANCE = 1e-3
PROBE_TOKENS = 64

DESCRIPTION = """\
Writes base + adapter as one model. The base is read in float32 (four bytes a parameter), merged by PEFT (an adapter of a method
that PEFT has not: by peftfast), and the merged model must give the logits of the model with its adapter beside it. It is written
in --dtype or in 4 bits, read back, and each tensor compared bit for bit."""


def parser() -> arguments.Parser:
    parse = arguments.Parser(prog="python -m peftfast merge", description=DESCRIPTION, allow_abbrev=False)
    parse.add_argument("--adapter", type=Path, required=True, help="PEFT directory")
    parse.add_argument("--out", type=Path, required=True, help="directory for the merged model")
    parse.add_argument("--model", help="the base: a directory or OWNER/NAME (default: what the adapter names)")
    parse.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    parse.add_argument("--four-bit", action="store_true", help="write NF4 weights, nested, as bitsandbytes does")
    parse.add_argument(
        "--four-bit-base",
        action="store_true",
        help="merge into the base as 4 bits left it: what an adapter of --method qlora was trained on",
    )
    parse.add_argument("--overwrite", action="store_true", help="replace the model that --out holds")
    parse.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")
    return parse


def main(argv: Sequence[str]) -> int:
    """Merge, write and check; 0 when the merged model is in place. Raises UserError for bad input and where a check fails; ``--out`` is
    left as it was then."""
    options = parser().parse_args(argv)
    config = _adapter_config(options.adapter)
    name = options.model or config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"--model: the adapter in {options.adapter} names no base model; give it")
    directory = None if models.is_hub_name(name) else models.directory_of("--model", name)
    if directory is not None and options.out.resolve() == directory.resolve():
        raise UserError(
            f"--out: {options.out} is the adapter's base, which it could not be loaded on again; expected another directory"
        )
    _check_out(options.out, options.overwrite)
    packages = PACKAGES | ({"bitsandbytes": "bitsandbytes"} if options.four_bit or options.four_bit_base else {})
    arguments.require("merge", packages)
    device = arguments.device_name(options.device)
    models.offline_unless_named(name)
    arguments.quiet_libraries()
    directory = directory or models.directory_of("--model", name)
    started = _started_from(options.adapter)

    arguments.writable_directory("--out", options.out.absolute().parent)
    _run(options, str(directory), device, started)
    return 0


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"--adapter: no adapter_config.json in {adapter}; expected a PEFT directory")
    config: dict[str, Any] = _read(path, dict, "an object")
    if not any((adapter / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"--adapter: no {' or '.join(WEIGHTS)} in {adapter}; expected a PEFT directory with its weights"
        )
    return config


def _read(path: Path, kind: type, expected: str) -> Any:
    """What a JSON file of the adapter holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--adapter: {path} is not JSON: {error}") from None
    if not isinstance(found, kind):
        raise UserError(f"--adapter: {path}: expected {expected}, got {type(found).__name__}")
    return found


def _started_from(adapter: Path) -> dict[str, Any] | None:
    """The 4 bits whose losses LoftQ's and EoRA's adapters make up for, named in their file; a file that is not whole fails here,
    before a base is loaded."""
    from ..integrations.adapter_start import started_from

    with models.named("--adapter", str(adapter / WEIGHTS[0]), "weights"):
        return started_from(adapter / WEIGHTS[0])


def _check_out(out: Path, overwrite: bool) -> None:
    atomic.recover(out)
    if not os.path.lexists(out):  # a link that leads nowhere is there
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"--out: {out} is not a directory")
    if any(out.iterdir()) and not (overwrite and (out / "config.json").exists()):
        if (out / "config.json").exists():
            raise UserError(f"--out: {out} holds a model already; --overwrite replaces it")
        raise UserError(f"--out: {out} holds files and no model; expected a new, an empty or a model's directory")


def _run(options: argparse.Namespace, directory: str, device: str, started: dict[str, Any] | None) -> None:
    import torch
    from transformers import AutoConfig

    with models.named("--model", directory, "config"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    labels = options.adapter / LABEL_NAMES
    classify = labels.is_file() or _adapter_config(options.adapter).get("task_type") == "SEQ_CLS"
    if labels.is_file():
        names = _names_of(labels)
        config.num_labels = len(names)
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    elif classify and (count := _labels_of(options.adapter)) is not None:
        config.num_labels = count  # names of as many stay
    merged, probe, expected, gap = _merged(options, directory, config, classify, device, started)
    print(f"merged: logits of the probe within {gap:.1e} of the adapter's, in float32")

    merged.to(getattr(torch, options.dtype))
    with atomic.replace_directory(options.out) as new:
        if options.four_bit:
            with atomic.beside(options.out, "dense") as dense:
                merged.save_pretrained(str(dense))
                del merged
                written, _ = models.load(
                    str(dense),
                    AutoConfig.from_pretrained(str(dense)),
                    classify=classify,
                    dtype=options.dtype,
                    device=device,
                    four_bit=True,
                    skip=_heads() if classify else None,
                )
        else:
            written = merged
        written.save_pretrained(str(new))
        _copy_tokenizer(directory, new)
        _check(written.state_dict(), new, classify, device, probe, expected)
    print(f"written to {options.out}")


def _names_of(labels: Path) -> list[str]:
    """The names of the classes that finetune wrote beside the adapter."""
    return [str(name) for name in _read(labels, list, "a list of the classes' names")]


def _labels_of(adapter: Path) -> int | None:
    """How many classes the head has that an adapter's file holds; None where it holds none."""
    from safetensors import safe_open

    if not (adapter / WEIGHTS[0]).is_file():
        return None
    ends = tuple(f".{name}{inner}.weight" for name in _heads() for inner in ("", ".out_proj"))
    with safe_open(adapter / WEIGHTS[0], framework="pt") as file:
        return next((file.get_slice(name).get_shape()[0] for name in file.keys() if name.endswith(ends)), None)  # noqa: SIM118


def _heads() -> list[str]:
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    return list(SEQ_CLS_HEAD_NAMES)


def _merged(
    options: argparse.Namespace,
    directory: str,
    config: Any,
    classify: bool,
    device: str,
    started: dict[str, Any] | None,
) -> tuple[Any, Any, Any, float]:
    """(the merged model in float32, token ids, the adapted model's logits of them, how far the merged model's are from these)."""
    import torch
    from peft import PeftModel

    from ..integrations.adapter_files import load_adapter

    base, _ = models.load(
        directory,
        config,
        classify=classify,
        dtype="auto" if options.four_bit_base and started is None else "float32",
        device=device,
        four_bit=options.four_bit_base and started is None,
        skip=_heads() if classify else None,
    )
    if started is not None:
        _through_4_bits(base, options.adapter, started)
    elif options.four_bit_base:
        _unquantise(base)
        base.to(torch.float32)
    base.to(device).eval()
    own = _adapter_config(options.adapter).get("peft_type") == "PEFTFAST"
    with models.named("--adapter", str(options.adapter), "adapter"):
        if own:
            model: Any = load_adapter(base, options.adapter).eval()
        else:
            model = PeftModel.from_pretrained(base, str(options.adapter)).eval()
            if model.active_peft_config.peft_type == "ADALORA":
                model.active_peft_config.rank_pattern = None  # the layers are cut to it, which loading would do again
            # Which of the file's tensors found no place, as those of layers that the base has not, only a second loading says.
            found = model.load_adapter(str(options.adapter), model.active_adapter)
            _check_whole(options.adapter, directory, found, model.state_dict())
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    probe = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)
    with torch.no_grad():
        try:
            expected = model(input_ids=probe).logits.float().cpu()
            if not own:
                _unwrap(model)
            merged = _own_merged(model) if own else model.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise UserError(f"--adapter: it cannot be merged: {arguments.first_line(error)}") from None
        gap = _relative(merged(input_ids=probe).logits, expected)
    if not gap <= TOLERANCE:
        raise UserError(
            f"--adapter: merging changes the logits by {gap:.1e} of their size, {TOLERANCE:g} at most expected; this adapter cannot be "
            "merged, or it is not of this base"
        )
    return merged, probe, expected, gap


def _unwrap(model: Any) -> None:
    """Put the modules that were saved whole in their places, which some of PEFT's tuners do for a single layer alone."""
    from peft.utils import ModulesToSaveWrapper

    from ..nn.hooks import replace

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            replace(model, name, module.modules_to_save[module.active_adapters[0]])


def _own_merged(model: Any) -> Any:
    """The model of an adapter of our own peft_type, merged. What the adapter brought a 4-bit weight for becomes dense: in these 4 bits
    the sum would be rounded anew."""
    import torch

    from ..nn import LoRANF4Linear
    from ..nn.hooks import replace

    handle = model.peftfast_handle
    for path, layer in list(handle.layers.items()):
        if isinstance(layer, LoRANF4Linear):
            replace(model, path, layer.merged_linear(torch.float32))
            del handle.layers[path]
    return handle.merge_and_unload()


def _check_whole(adapter: Path, directory: str, found: Any, state: dict[str, Any]) -> None:
    """Raises UserError unless each tensor of the adapter has a place in the base, and each place a tensor, which it may have under
    another name, as layers share VB-LoRA's bank of vectors."""
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in set(found.missing_keys)}
    missing = [name for name in found.missing_keys if name not in state or state[name].data_ptr() not in loaded]
    for keys, said in ((found.unexpected_keys, f"{directory} has no place for"), (missing, f"{adapter} lacks")):
        if keys:
            raise UserError(
                f"--adapter: it is not of the base in {directory}: {said} {len(keys)} tensors, {min(keys)} the first"
            )


def _relative(values: Any, expected: Any) -> float:
    return float((values.float().cpu() - expected).norm() / expected.norm())


def _through_4_bits(model: Any, adapter: Path, settings: dict[str, Any]) -> None:
    """Give the layers that the adapter has the values that they have in 4 bits."""
    import torch
    from safetensors import safe_open

    import peftfast.functional as F

    from ..integrations.adapter_files import PREFIX

    with safe_open(adapter / WEIGHTS[0], framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118
    for name in names:
        try:
            weight = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight")).weight
        except AttributeError:
            continue  # what PEFT will say of it is clearer
        with torch.no_grad():
            weight.copy_(F.nf4_dequantize(F.nf4_quantize(weight.float(), **settings)))


def _unquantise(model: Any) -> None:
    """A dense nn.Linear of the same values in place of each Linear4bit."""
    import bitsandbytes
    import torch

    import peftfast.functional as F

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear4bit):
                dense = torch.nn.Linear(
                    child.in_features, child.out_features, bias=child.bias is not None, device="meta"
                )
                values = F.nf4_dequantize(F.NF4Weight.from_bitsandbytes(child.weight), torch.float32)
                dense.weight = torch.nn.Parameter(values, requires_grad=False)
                if child.bias is not None:
                    dense.bias = child.bias
                setattr(parent, name, dense)
    # What transformers left to say that the model is quantised, which save_pretrained would repeat.
    for attribute in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _copy_tokenizer(directory: str, new: Path) -> None:
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*"):
        for path in Path(directory).glob(pattern):
            if path.is_file() and not (new / path.name).exists():
                shutil.copyfile(path, new / path.name)


def _check(written: dict[str, Any], new: Path, classify: bool, device: str, probe: Any, expected: Any) -> None:
    """Read back what was written. Raises UserError unless every tensor is what it was, bit for bit, and the logits are numbers."""
    import torch

    with models.named("--out", str(new), "merged model"):
        again = models.auto_class(classify).from_pretrained(
            str(new), dtype="auto", local_files_only=True, device_map={"": device}
        )
    if hasattr(again, "hf_quantizer"):
        models.forbid_repacking(again)
    read = again.state_dict()
    different = sorted(
        name
        for name in written.keys() | read.keys()
        if name not in written or name not in read or not torch.equal(written[name].cpu(), read[name].cpu())
    )
    if different:
        raise UserError(
            f"--out: read back, {len(different)} tensors are not what was written, {different[0]} the first"
        )
    with torch.no_grad():
        logits = again.eval()(input_ids=probe).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError("--out: read back, the model gives logits that are not finite")
    print(f"read back: {len(read)} tensors, bit for bit; logits {_relative(logits, expected):.1e} from the adapter's")
