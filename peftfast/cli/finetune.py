"""``python -m peftfast finetune``: a thin front on transformers' Trainer. The methods are those of finetune_methods.py."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import arguments, checkpoint, finetune_methods, models, records, workers
from .errors import UserError
from .finetune_job import LABEL_NAMES, PLOT, Job
from .finetune_methods import METHODS
from .finetune_methods import option as _both

__all__ = ["LABEL_NAMES", "METHODS", "PLOT", "Job", "main", "parser"]

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers>=5",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
# TrainingArguments that this command sets itself, for what it promises of --out.
OWN_ARGUMENTS = {
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "save_strategy": "--save_steps",
    "save_total_limit": "--save_steps",
    "use_cpu": "--device",
    "no_cuda": "--device",
    "remove_unused_columns": "the kind of --data",
    "label_names": "the kind of --data",
    "eval_on_start": "--eval_split",
    "load_best_model_at_end": "--save_steps",
    "overwrite_output_dir": "--overwrite",
    "push_to_hub": "PEFT's own push_to_hub on the result",
}

# TrainingArguments that are not taken -> why.
REFUSED_ARGUMENTS = dict.fromkeys(
    ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    "each worker keeps the whole model here; docs/scripts/fsdp2.py shards a patched model",
)
# What accelerate launch sets for the same.
REFUSED_VARIABLES = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

DESCRIPTION = """\
Trains an adapter on a file of JSON lines and writes a PEFT directory (--method mezo --full_model: a model's).
What the lines hold says what is trained.
TRL's formats train a causal language model:
  {"text": "..."}
  {"messages": [{"role": ..., "content": ...}, ...]}
  {"prompt": ..., "completion": ...}
and {"text": "...", "label": "..."} trains a sequence classifier (labels are strings or whole numbers).
A local --model needs no network.

On several GPUs: torchrun --nproc-per-node N -m peftfast finetune ... --lora_r 16
A batch is then one of each worker, and a step's are N; --out, --model and --data are seen by all. (torchrun takes --r for its own.)

Any other flag of transformers.TrainingArguments is taken by its own name, such as --optim or --dataloader_num_workers."""


def parser() -> arguments.Parser:
    parse = arguments.Parser(prog="python -m peftfast finetune", description=DESCRIPTION, allow_abbrev=False)
    parse.formatter_class = argparse.RawDescriptionHelpFormatter
    whole, above_zero = arguments.integer, arguments.number(0, above_lowest=True)
    parse.add_argument(
        "--model", required=True, help="directory with config.json, weights and tokenizer, or OWNER/NAME on the hub"
    )
    parse.add_argument("--data", type=Path, required=True, help="JSON lines, UTF-8")
    parse.add_argument("--out", type=Path, required=True, help="directory for the result, replaced whole at each save")
    parse.add_argument("--overwrite", action="store_true", help="replace the result of another run that --out holds")
    parse.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in --out; begin where there is none"
    )
    parse.add_argument(
        "--device",
        default="auto",
        help="auto, cpu or cuda, which is the first GPU, or each worker's own (default: cuda where there is one)",
    )

    finetune_methods.add_options(parse)

    data = parse.add_argument_group("data")
    _both(data, "max_length", type=whole(2), default=512, help="tokens of a text; the rest is cut off")
    _both(
        data, "eval_split", type=arguments.number(0, 1), default=0.0, help="part of the lines held out (default: none)"
    )
    _both(
        data,
        "completion_only_loss",
        type=_yes_or_no,
        default=True,
        metavar="true|false",
        help="for prompts with completions: learn from the completion alone (default: true, as in TRL)",
    )
    _both(
        data,
        "assistant_only_loss",
        action="store_true",
        help="for conversations: learn from the assistant's messages alone; the chat template must mark them",
    )
    _both(data, "chat_template_path", type=Path, help="a Jinja file, instead of the tokenizer's own template")

    # Named as in transformers.TrainingArguments.
    training = parse.add_argument_group("training of every method")
    _both(training, "per_device_train_batch_size", type=whole(1), default=8)
    _both(training, "gradient_accumulation_steps", type=whole(1), default=1)
    _both(training, "num_train_epochs", type=above_zero, default=3.0)
    _both(training, "max_steps", type=whole(1), help="stop after so many; rules over --num_train_epochs")
    _both(training, "warmup_steps", type=whole(0), default=0)
    _both(training, "gradient_checkpointing", action="store_true")
    _both(training, "bf16", action="store_true", help="train under bf16 autocast")
    _both(training, "seed", type=whole(0, 2**32), default=42)  # what NumPy takes
    _both(training, "logging_steps", type=whole(1), default=10)
    _both(training, "save_steps", type=whole(1), default=100, help="put adapter and checkpoint in place so often")
    return parse


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def main(argv: Sequence[str]) -> int:
    """Train and save; 0 when the adapter is in place. Raises UserError for bad input, before anything is written."""
    with workers.heard():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    options, rest = parser().parse_known_args(argv)
    for variable in REFUSED_VARIABLES:
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(f"{variable}: {REFUSED_ARGUMENTS['fsdp']}")
    # Without the libraries first: what can be told at once is told at once.
    if rest and not rest[0].startswith("--"):
        raise UserError(f"unrecognized arguments: {' '.join(rest)} (see `python -m peftfast finetune --help`)")
    directory = None if models.is_hub_name(options.model) else models.directory_of("--model", options.model)
    if options.chat_template_path is not None and not options.chat_template_path.is_file():
        raise UserError(f"--chat_template_path: no file {options.chat_template_path}")
    method = finetune_methods.resolve(options)
    if options.resume and options.overwrite:
        raise UserError("--resume: cannot go with --overwrite, which begins anew")
    data = records.read(options.data)
    learn, held_out = records.split(len(data.rows), options.eval_split, options.seed)
    if workers.first():  # it puts things in order, too
        checkpoint.check(options.out, overwrite=options.overwrite, resume=options.resume)
    packages = PACKAGES | ({"bitsandbytes": "bitsandbytes"} if options.load_in_4bit else {})
    arguments.require(f"--method {options.method}", packages | dict(method.packages))
    device = arguments.device_name(options.device)
    if device.startswith("cuda:") and int(device.partition(":")[2]) > 0:
        number = device.partition(":")[2]
        raise UserError(
            f"--device: the Trainer trains on the first GPU that it sees; CUDA_VISIBLE_DEVICES={number} and --device cuda for {device}"
        )
    device = workers.device(device.partition(":")[0])
    models.offline_unless_named(options.model)
    arguments.quiet_libraries()
    extra = training_arguments(rest)
    method.check(options, extra)

    job = Job(options, method, data, device, directory or models.directory_of("--model", options.model), extra)
    job.learn = learn
    try:
        with workers.together(device, extra):
            job.prepare()
            arguments.writable_directory("--out", options.out.absolute().parent)
            job.run(learn, held_out)
    except KeyboardInterrupt:
        if job.saved_at is not None and workers.first():
            print(
                f"\nthe {method.result} of step {job.saved_at} is whole in {options.out}; --resume goes on from there",
                file=sys.stderr,
            )
        raise
    return 0


def training_arguments(rest: Sequence[str]) -> dict[str, Any]:
    """Flags that this command does not list, as TrainingArguments reads them; only those that were given.

    Raises:
        UserError: TrainingArguments has no such flag, its value is not of its type, this command sets it itself, or it is not taken.
    """
    if not rest:
        return {}
    from transformers import HfArgumentParser, TrainingArguments

    parse = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message} (see `python -m peftfast finetune --help`)")

    parse.error = fail  # type: ignore[method-assign]
    known = {action.dest for action in parse._actions}
    given = []
    for word in rest:
        if not word.startswith("--"):
            continue
        name = word[2:].partition("=")[0].replace("-", "_")
        if name in OWN_ARGUMENTS:
            raise UserError(f"--{name}: set by this command, by {OWN_ARGUMENTS[name]}")
        if name in REFUSED_ARGUMENTS:
            raise UserError(f"--{name}: {REFUSED_ARGUMENTS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *(action.dest for action in parser()._actions)], 1)
            raise UserError(f"unrecognized argument --{name}" + (f"; did you mean --{near[0]}?" if near else ""))
        given.append(name)
    values = vars(parse.parse_args(list(rest)))
    return {name: values[name] for name in given}
