"""``python -m peftfast finetune``: a thin front on transformers' Trainer for LoRA and QLoRA, patched before it trains."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, atomic, records
from .errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
ALL_LINEAR = "all-linear"
LABEL_NAMES = "label_names.json"

DESCRIPTION = """\
Trains a PEFT LoRA adapter for a local model on a file of JSON lines and writes a PEFT directory. What the lines hold says what is
trained: {"text": "...", "label": "..."} on every line a sequence classifier (labels are strings or whole numbers),
{"text": "..."} on every line a causal language model. Nothing is fetched from a network."""


def parser() -> arguments.Parser:
    parse = arguments.Parser(prog="python -m peftfast finetune", description=DESCRIPTION)
    whole, above_zero = arguments.integer, arguments.number(0, above_lowest=True)
    parse.add_argument("--model", type=Path, required=True, help="directory with config.json, weights and tokenizer")
    parse.add_argument("--data", type=Path, required=True, help="JSON lines, UTF-8")
    parse.add_argument("--out", type=Path, required=True, help="directory for the adapter, replaced whole at each save")
    parse.add_argument("--overwrite", action="store_true", help="replace the adapter that --out holds")
    parse.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")

    method = parse.add_argument_group("adapter")
    method.add_argument("--method", choices=("lora", "qlora"), default="lora", help="qlora: on a 4-bit NF4 base")
    _both(method, "r", type=whole(1), default=16, help="rank (default: %(default)s)")
    _both(method, "lora_alpha", type=above_zero, help="default: the rank")
    _both(method, "lora_dropout", type=arguments.number(0, 1), default=0.05)
    _both(
        method,
        "target_modules",
        nargs="+",
        default=[ALL_LINEAR],
        help="names of linear modules, or the default, all-linear: every one but the output layer",
    )
    _both(method, "dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base's weights")

    data = parse.add_argument_group("data")
    _both(data, "max_length", type=whole(2), default=512, help="tokens of a text; the rest is cut off")
    _both(
        data, "eval_split", type=arguments.number(0, 1), default=0.0, help="part of the lines held out (default: none)"
    )

    # Named as in transformers.TrainingArguments.
    training = parse.add_argument_group("training")
    _both(training, "learning_rate", type=above_zero, default=2e-4)
    _both(training, "per_device_train_batch_size", type=whole(1), default=8)
    _both(training, "gradient_accumulation_steps", type=whole(1), default=1)
    _both(training, "num_train_epochs", type=above_zero, default=3.0)
    _both(training, "max_steps", type=whole(1), help="stop after so many; rules over --num_train_epochs")
    _both(training, "warmup_steps", type=whole(0), default=0)
    _both(training, "lr_scheduler_type", choices=("linear", "cosine", "constant"), default="linear")
    _both(training, "weight_decay", type=arguments.number(0), default=0.0)
    _both(training, "max_grad_norm", type=arguments.number(0), default=1.0)
    _both(training, "gradient_checkpointing", action="store_true")
    _both(training, "bf16", action="store_true", help="train under bf16 autocast")
    _both(training, "seed", type=whole(0), default=42)
    _both(training, "logging_steps", type=whole(1), default=10)
    _both(training, "save_steps", type=whole(1), default=100, help="put the adapter in place every so many steps")
    return parse


def _both(group: argparse._ArgumentGroup, name: str, **settings: Any) -> None:
    """An option that may be written --with_underscores, as transformers does, or --with-hyphens."""
    spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    group.add_argument(*spellings, dest=name, **settings)


def main(argv: Sequence[str]) -> int:
    """Train and save; 0 when the adapter is in place. Raises UserError for bad input, before anything is written."""
    options = parser().parse_args(argv)
    _check_model(options.model)
    data = records.read(options.data)
    learn, held_out = records.split(len(data.texts), options.eval_split, options.seed)
    _check_out(options.out, options.overwrite)
    packages = PACKAGES | ({"bitsandbytes": "bitsandbytes"} if options.method == "qlora" else {})
    arguments.require(f"--method {options.method}", packages)
    device = arguments.device_name(options.device)
    arguments.quiet_libraries()

    job = Job(options, data, device)
    job.prepare()
    arguments.writable_directory("--out", options.out.absolute().parent)
    try:
        job.run(learn, held_out)
    except KeyboardInterrupt:
        if job.saved_at is not None:
            print(f"\nthe adapter of step {job.saved_at} is whole in {options.out}", file=sys.stderr)
        raise
    return 0


def _check_model(model: Path) -> None:
    if not model.is_dir():
        kind = "is not a directory" if model.exists() else "does not exist"
        raise UserError(f"--model: {model} {kind}; expected a local directory with config.json")
    if not (model / "config.json").is_file():
        raise UserError(f"--model: {model} holds no config.json; expected a directory saved by transformers")


def _check_out(out: Path, overwrite: bool) -> None:
    atomic.recover(out)
    if not out.exists():
        nearest = next(path for path in out.absolute().parents if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--out: cannot write into {nearest}")
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"--out: {out} is not a directory")
    if (out / "adapter_config.json").exists():
        if not overwrite:
            raise UserError(f"--out: {out} holds an adapter already; --overwrite replaces it")
    elif any(out.iterdir()):
        raise UserError(f"--out: {out} holds files and no adapter; expected a new, an empty or an adapter's directory")


class _Texts:
    """Encoded texts as transformers' Trainer reads them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Job:
    """One fine-tuning: what was asked for, and the model and tokenizer once ``prepare`` has run."""

    def __init__(self, options: argparse.Namespace, data: records.Records, device: str) -> None:
        self.options, self.data, self.device = options, data, device
        self.classify = data.labels is not None
        self.directory = str(options.model)
        self.saved_at: int | None = None
        self.tokenizer: Any = None
        self.model: Any = None

    def prepare(self) -> None:
        """Everything that can fail for bad input: config, tokenizer, module names, weights. Writes nothing."""
        from transformers import AutoConfig, AutoTokenizer

        with _named("--model", self.directory, "config"):
            config = AutoConfig.from_pretrained(self.directory, local_files_only=True)
        with _named("--model", self.directory, "tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        self._pad()
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < self.options.max_length:
            print(f"--max-length: {self.options.max_length} tokens cut to the model's {longest}")
            self.options.max_length = longest
        if self.classify:
            names = [str(name) for name in self.data.names]
            config.num_labels = len(names)
            config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
            config.pad_token_id = self.tokenizer.pad_token_id
        targets = self._targets(config)
        self.model = self._adapted(config, targets)

    def _pad(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            # Padding is masked and never learnt from, so any known token will do.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(
                f"--model: the tokenizer in {self.directory} has no pad, eos or unk token to pad batches with"
            )

    def _auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        return AutoModelForSequenceClassification if self.classify else AutoModelForCausalLM

    def _targets(self, config: Any) -> str | list[str]:
        """The target modules as PEFT takes them, after a look at the model without its weights."""
        import torch

        with _named("--model", self.directory, "config"), torch.device("meta"):
            skeleton = self._auto_class().from_config(config)
        linear = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
        wanted = self.options.target_modules
        if not linear:
            raise UserError(f"--model: {type(skeleton).__name__} in {self.directory} has no torch.nn.Linear to adapt")
        if wanted == [ALL_LINEAR]:
            return ALL_LINEAR
        for name in wanted:
            if not any(module == name or module.endswith("." + name) for module in linear):
                known = sorted({module.rpartition(".")[2] for module in linear})
                raise UserError(
                    f"--target-modules: no linear module {name!r} in {self.directory}; it has {', '.join(known)}"
                )
        return list(wanted)

    def _load(self, config: Any, fresh: Sequence[str]) -> tuple[Any, list[str]]:
        """(the base model, paths of its modules that the checkpoint has no weights for). ``fresh`` modules are not quantised."""
        import torch

        dtype: Any = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.options.dtype, "auto")
        settings: dict[str, Any] = {
            "config": config,
            "dtype": dtype,
            "local_files_only": True,
            "output_loading_info": True,
        }
        if self.options.method == "qlora":
            from transformers import BitsAndBytesConfig

            settings["device_map"] = {"": self.device}
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=list(fresh) if self.classify else None,
            )
        with _named("--model", self.directory, "model"):
            model, info = self._auto_class().from_pretrained(self.directory, **settings)
        return model, sorted({key.rpartition(".")[0] for key in info["missing_keys"]})

    def _adapted(self, config: Any, targets: str | list[str]) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from peft.utils.constants import SEQ_CLS_HEAD_NAMES

        import peftfast

        options = self.options
        torch.manual_seed(options.seed)
        model, fresh = self._load(config, SEQ_CLS_HEAD_NAMES)
        if fresh and not self.classify:
            raise UserError(
                f"--model: {self.directory} has no weights for {', '.join(fresh)}; is it a causal language model?"
            )
        # What is new beside the head, as a pooler, would be random again at the next load: it is trained and saved whole.
        outside = [name for name in fresh if not any(part in SEQ_CLS_HEAD_NAMES for part in name.split("."))]
        if outside and options.method == "qlora":
            torch.manual_seed(options.seed)
            model, _ = self._load(config, [*SEQ_CLS_HEAD_NAMES, *outside])
        if options.method == "qlora":
            _forbid_repacking(model)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
        else:
            if options.gradient_checkpointing:
                model.enable_input_require_grads()
            model.to(self.device)
        if options.gradient_checkpointing:
            model.config.use_cache = False
        alpha = options.lora_alpha if options.lora_alpha is not None else options.r
        lora = LoraConfig(
            task_type="SEQ_CLS" if self.classify else "CAUSAL_LM",
            r=options.r,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=options.lora_dropout,
            target_modules=targets,
            modules_to_save=outside or None,
            exclude_modules=outside or None,
        )
        with _named("--target-modules", self.directory, "adapter"):
            model = get_peft_model(model, lora)
        print(peftfast.patch(model))
        model.print_trainable_parameters()
        return model

    def _encode(self, indices: Sequence[int]) -> _Texts:
        options, tokenizer = self.options, self.tokenizer
        classes = self.data.class_indices()
        rows = []
        for index in indices:
            ids = tokenizer(self.data.texts[index], truncation=True, max_length=options.max_length)["input_ids"]
            if self.classify:
                rows.append({"input_ids": ids, "labels": classes[index]})
                continue
            end = tokenizer.eos_token_id
            if end is not None and len(ids) < options.max_length and ids[-1:] != [end]:
                ids = [*ids, end]
            rows.append({"input_ids": ids, "labels": list(ids)})
        return _Texts(rows)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows padded on the right. The mask comes from the lengths: the padding token may be a real one."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (width - len(values))

        # -100 is the label that cross_entropy ignores.
        labels = [row["labels"] if self.classify else padded(row["labels"], -100) for row in rows]
        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.tokenizer.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor(labels),
        }

    def save(self, step: int) -> None:
        """Put the adapter as it is now in place of what ``--out`` holds."""
        with atomic.replace_directory(self.options.out) as new:
            self.model.save_pretrained(str(new))
            if self.classify:
                # PEFT's files have no place for the names of the classes.
                (new / LABEL_NAMES).write_text(json.dumps(list(self.data.names), ensure_ascii=False) + "\n")
        self.saved_at = step

    def run(self, learn: Sequence[int], held_out: Sequence[int]) -> None:
        """Train on some records, save every ``--save_steps`` and at the end, evaluate on the others."""
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(learn, held_out, scratch)
            trained = trainer.train()
            self.save(trainer.state.global_step)
            print(
                f"loss {trained.training_loss:.4f} over {trainer.state.global_step} steps; adapter in {self.options.out}"
            )
            if held_out:
                metrics = trainer.evaluate()
                line = f"held out: {len(held_out)} lines, loss {metrics['eval_loss']:.4f}"
                print(line + (f", accuracy {100 * metrics['eval_accuracy']:.1f} %" if self.classify else ""))

    def _trainer(self, learn: Sequence[int], held_out: Sequence[int], scratch: str) -> "Trainer":
        from transformers import Trainer, TrainingArguments

        options = self.options
        settings = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=options.per_device_train_batch_size,
            per_device_eval_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            learning_rate=options.learning_rate,
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps or -1,
            warmup_steps=options.warmup_steps,
            lr_scheduler_type=options.lr_scheduler_type,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            gradient_checkpointing=options.gradient_checkpointing,
            bf16=options.bf16,
            seed=options.seed,
            logging_steps=options.logging_steps,
            # Adapters go to --out by the callback; the Trainer's own checkpoints are not atomic.
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device != "cpu",
            disable_tqdm=not sys.stderr.isatty(),
        )
        return Trainer(
            model=self.model,
            args=settings,
            data_collator=self._collate,
            train_dataset=self._encode(learn),  # type: ignore[arg-type]
            eval_dataset=self._encode(held_out) if held_out else None,  # type: ignore[arg-type]
            compute_metrics=_accuracy if self.classify else None,
            callbacks=[_saver(self)],
        )


def _saver(job: Job) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        """Puts the adapter in place every ``--save_steps`` optimiser steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % job.options.save_steps == 0:
                job.save(state.global_step)

    return Saver()


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _forbid_repacking(model: Any) -> None:
    """Keep bitsandbytes from rewriting packed weights on a CPU with AVX512-BF16 at the first evaluation: gradients get lost."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _named(option: str, directory: str, what: str) -> Iterator[None]:
    """Errors that other libraries raise for a directory's contents, as a UserError that names it."""
    from safetensors import SafetensorError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{option}: no usable {what} in {directory}: {arguments.first_line(error)}") from error
