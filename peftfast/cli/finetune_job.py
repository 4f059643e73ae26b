"""One fine-tuning: the model, its adapter, the trainer, and what is saved."""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import atomic, checkpoint, models, records, workers
from .arguments import first_line
from .errors import UserError
from .finetune_base import Method, Target
from .texts import Encoder

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

ALL_LINEAR = "all-linear"
LABEL_NAMES = "label_names.json"
PLOT = "loss.png"


class Job:
    """What was asked for, and the model and tokenizer once ``prepare`` has run.

    Args:
        options: of the command, see finetune.py.
        method: what adapts the model and trains it, see finetune_methods.py.
        data: the records.
        device: of torch.
        directory: of the base model.
        extra: further TrainingArguments, by name.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        method: Method,
        data: records.Records,
        device: str,
        directory: Path,
        extra: dict[str, Any],
    ) -> None:
        self.options, self.method, self.data, self.device, self.extra = options, method, data, device, extra
        self.classify = data.kind == "label"
        self.four_bit = method.four_bit or options.load_in_4bit
        self.directory = str(directory)
        self.saved_at: int | None = None
        self.resume_from: int | None = None
        self.tokenizer: Any = None
        self.model: Any = None
        self.encoder: Any = None
        self.learn: Sequence[int] = ()
        self.fingerprint = checkpoint.fingerprint(options, options.data, directory) | {
            "extra": {k: str(v) for k, v in extra.items()}
        }
        if workers.count() > 1:
            self.fingerprint["workers"] = workers.count()

    def prepare(self) -> None:
        """Everything that can fail for bad input: config, tokenizer, module names, weights. Writes nothing."""
        from transformers import AutoConfig, AutoTokenizer

        options = self.options
        if options.resume and options.out.exists():
            self.resume_from = checkpoint.check_same(options.out, self.fingerprint)
        with models.named("--model", self.directory, "config"):
            config = AutoConfig.from_pretrained(self.directory, local_files_only=True)
        with models.named("--model", self.directory, "tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
            if set(self.tokenizer.get_vocab()) <= set(self.tokenizer.all_special_tokens):
                raise ValueError("its vocabulary is empty")  # transformers 5.0 makes one of no files
        self._pad()
        if options.chat_template_path is not None:
            with models.named("--chat_template_path", str(options.chat_template_path), "template"):
                self.tokenizer.chat_template = options.chat_template_path.read_text(encoding="utf-8")
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < options.max_length:
            print(f"--max-length: {options.max_length} tokens cut to the model's {longest}")
            options.max_length = longest
        self.encoder = Encoder(
            self.tokenizer,
            self.data,
            options.max_length,
            completion_only=options.completion_only_loss,
            assistant_only=options.assistant_only_loss,
        )
        if self.classify:
            names = [str(name) for name in self.data.names]
            config.num_labels = len(names)
            config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
            config.pad_token_id = self.tokenizer.pad_token_id
        self.model = self._adapted(config, self._targets(config))

    def _pad(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            # Padding is masked and never learnt from, so any known token will do.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(
                f"--model: the tokenizer in {self.directory} has no pad, eos or unk token to pad batches with"
            )

    def _targets(self, config: Any) -> str | list[str]:
        """The target modules as PEFT takes them, after a look at the model without its weights."""
        import torch

        with models.named("--model", self.directory, "config"), torch.device("meta"):
            skeleton = models.auto_class(self.classify).from_config(config)
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
        return models.load(
            self.directory,
            config,
            classify=self.classify,
            dtype=self.options.dtype,
            device=self.device,
            four_bit=self.four_bit,
            skip=fresh if self.classify else None,
        )

    def _adapted(self, config: Any, targets: str | list[str]) -> Any:
        import torch
        from peft import prepare_model_for_kbit_training
        from peft.utils.constants import SEQ_CLS_HEAD_NAMES

        options = self.options
        torch.manual_seed(options.seed)
        model, fresh = self._load(config, SEQ_CLS_HEAD_NAMES)
        if fresh and not self.classify:
            raise UserError(
                f"--model: {self.directory} has no weights for {', '.join(fresh)}; is it a causal language model?"
            )
        # What is new beside the head, as a pooler, would be random again at the next load: it is trained and saved whole.
        outside = [name for name in fresh if not any(part in SEQ_CLS_HEAD_NAMES for part in name.split("."))]
        if outside and self.four_bit:
            torch.manual_seed(options.seed)
            model, _ = self._load(config, [*SEQ_CLS_HEAD_NAMES, *outside])
        if self.four_bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
        else:
            if options.gradient_checkpointing:
                model.enable_input_require_grads()
            model.to(self.device)
        if options.gradient_checkpointing:
            model.config.use_cache = False
        with models.named("--target-modules", self.directory, "adapter"):
            target = Target(
                options,
                self.classify,
                targets,
                outside,
                self.four_bit,
                self._first_batches,
                self._total_steps(),
                self.tokenizer,
            )
            return self.method.adapt(model, target)

    def _first_batches(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` batches of the records to learn from, on the device."""
        size = self.options.per_device_train_batch_size
        rows = self.encoder.encode(self.learn[: count * size])
        found = [
            self.encoder.collate([rows[i] for i in range(k, min(k + size, len(rows)))])
            for k in range(0, len(rows), size)
        ]
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in found]

    def _total_steps(self) -> int:
        """Optimiser steps of the run, as the Trainer will count them."""
        options = self.options
        if options.max_steps:
            return int(options.max_steps)
        batches = -(-len(self.learn) // options.per_device_train_batch_size)
        batches = -(-batches // workers.count())
        each = -(-batches // options.gradient_accumulation_steps)
        return max(1, math.ceil(each * options.num_train_epochs))

    def save(self, step: int, state: Path | None = None, history: Sequence[dict[str, Any]] = ()) -> None:
        """Put the adapter as it is now in place of what ``--out`` holds, with the Trainer's checkpoint in ``state`` or, at the end,
        without one and with a picture of the losses."""
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if broken:
            kept = (
                f"; the {self.method.result} of step {self.saved_at} stays in place"
                if self.saved_at is not None
                else ""
            )
            raise UserError(f"{broken[0]} is not finite at step {step}: lower --learning_rate{kept}")
        try:
            workers.check_same(self.method.trained(self.model))
        except ValueError as error:
            told = str(error).partition(": ")[2].partition(";")[0]
            raise UserError(
                f"--method {self.options.method}: step {step}: {told}; it trains on one worker alone"
            ) from None
        # Each worker has the state of its own random numbers.
        states = workers.to_the_first(state, "rng_state_*") if state is not None else {}
        if workers.first():
            self._write(step, state, states, history)
        self.saved_at = step

    def _write(
        self, step: int, state: Path | None, states: dict[str, bytes], history: Sequence[dict[str, Any]]
    ) -> None:
        with atomic.replace_directory(self.options.out) as new:
            self.method.save(self.model, new)
            if self.classify:
                # PEFT's files have no place for the names of the classes.
                names = json.dumps(list(self.data.names), ensure_ascii=False)
                (new / LABEL_NAMES).write_text(names + "\n", encoding="utf-8")
            if history:
                _plot(history, new / PLOT)
            if state is not None:
                shutil.copytree(state, new / checkpoint.FOLDER, ignore=shutil.ignore_patterns("training_args.bin"))
                for name, contents in states.items():
                    (new / checkpoint.FOLDER / name).write_bytes(contents)
                self.method.save_state(new / checkpoint.FOLDER)
                checkpoint.write_marker(new / checkpoint.FOLDER, step, self.fingerprint)
            else:
                self.method.finish(new)

    def run(self, learn: Sequence[int], held_out: Sequence[int]) -> None:
        """Train on some records, save every ``--save_steps`` and at the end, evaluate on the others."""
        with tempfile.TemporaryDirectory() as scratch:
            resume = None if self.resume_from is None else self.options.out / checkpoint.FOLDER
            self.method.begin(Path(scratch), resume)
            trainer = self._trainer(learn, held_out, scratch)
            print(f"learnt from: {self.encoder.learnt()}")
            if resume is not None:
                print(f"resumed from step {self.resume_from}")
                self.saved_at = self.resume_from
            trained = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            steps = trainer.state.global_step
            held = f"held out: {len(held_out)} lines" if held_out else ""
            if held_out:
                metrics = trainer.evaluate()
                held += f", loss {metrics['eval_loss']:.4f}"
                held += f", accuracy {100 * metrics['eval_accuracy']:.1f} %" if self.classify else ""
            self.save(steps, history=trainer.state.log_history)
            loss = workers.mean(trained.training_loss)  # the Trainer adds up its own where no line of the log follows
            print(f"loss {loss:.4f} over {steps} steps; {self.method.result} in {self.options.out}")
            if held:
                print(held)

    def _trainer(self, learn: Sequence[int], held_out: Sequence[int], scratch: str) -> "Trainer":
        from transformers import TrainingArguments

        options = self.options
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "per_device_eval_batch_size": options.per_device_train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "learning_rate": options.learning_rate,
            "num_train_epochs": options.num_train_epochs,
            "max_steps": options.max_steps or -1,
            "warmup_steps": options.warmup_steps,
            "lr_scheduler_type": _schedule(options),
            "weight_decay": options.weight_decay,
            "max_grad_norm": options.max_grad_norm,
            "gradient_checkpointing": options.gradient_checkpointing,
            "bf16": options.bf16,
            "seed": options.seed,
            "logging_steps": options.logging_steps,
            "logging_first_step": True,
            # The Trainer's own checkpoints are not atomic: they go to a scratch folder, and from there into --out in one step.
            "save_strategy": "steps",
            "save_steps": options.save_steps,
            "save_total_limit": 1,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "use_cpu": self.device == "cpu",
            "dataloader_pin_memory": self.device != "cpu",
            "disable_tqdm": not sys.stderr.isatty(),
        }
        try:
            arguments = TrainingArguments(**(settings | self.extra))
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"TrainingArguments: {str(error).splitlines()[0]}") from None
        if arguments.n_gpu > 1:
            # The Trainer would copy the model to each of them at every step (DataParallel): no patched layer is made for that, and the
            # batch would be of another size than --per_device_train_batch_size says.
            print(
                f"trains on one of {arguments.n_gpu} GPUs; CUDA_VISIBLE_DEVICES chooses which, torchrun takes all (see --help)"
            )
            arguments._n_gpu = 1
        learnt, held = self.encoder.encode(learn), self.encoder.encode(held_out) if held_out else None
        try:
            made = self.method.trainer(
                model=self.model,
                args=arguments,
                data_collator=self.encoder.collate,
                train_dataset=learnt,
                eval_dataset=held,
                compute_metrics=_accuracy if self.classify else None,
                callbacks=[_saver(self), *self.method.callbacks()],
            )
        except (ValueError, ImportError, RuntimeError) as error:
            if self.extra:  # which do not go together, or need a package that is not there
                raise UserError(f"TrainingArguments: {first_line(error)}") from None
            raise
        if self.classify:
            # A classifier's forward takes the step's number of labels, and its loss is the mean of its own batch all the same: the
            # Trainer would take it for a part of the step's, and multiply by the workers and the batches of a step.
            made.model_accepts_loss_kwargs = False
        if workers.count() > 1:
            _evaluate_apart(made)
        return made


def _evaluate_apart(trainer: Any) -> None:
    """Let each worker's loss of a held-out batch be the mean of its own tokens. The Trainer makes it a part of all workers' mean, which
    it is no longer when the lines that fill up the last batches are left out."""
    step = trainer.prediction_step

    def apart(*args: Any, **kwargs: Any) -> Any:
        averaged, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
        try:
            return step(*args, **kwargs)
        finally:
            trainer.args.average_tokens_across_devices = averaged

    trainer.prediction_step = apart


def _schedule(options: argparse.Namespace) -> str:
    """The name of the schedule; transformers' "constant" passes over the warm-up."""
    warm = options.warmup_steps and options.lr_scheduler_type == "constant"
    return "constant_with_warmup" if warm else str(options.lr_scheduler_type)


def _saver(job: Job) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        """Puts adapter and checkpoint in place when the Trainer has written one, at every ``--save_steps`` optimiser steps."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            job.save(state.global_step, state=written)

    return Saver()


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _plot(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The logged losses against the steps, where matplotlib is installed."""
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    if not losses:
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), color="#1b6ca8", label="training")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#d95f02", marker="o", label="held out")
        axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.grid(alpha=0.3)
    figure.savefig(str(path), format="png", dpi=130)
