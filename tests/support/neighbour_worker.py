"""Run as a module, in a process of its own: trains a small Llama beside Liger's kernels or under DeepSpeed ZeRO-3, both of which change
what is global, and writes losses and reports as JSON.

``python -m tests.support.neighbour_worker liger OUT.json``, or ``zero3 OUT.json`` with RANK and WORLD_SIZE in the environment.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS = 4


def liger(out: Path) -> None:
    """transformers' Trainer with ``use_liger_kernel=True``, stock and patched. On a CPU, Liger's kernels for the norm and SwiGLU do not
    run in Triton's interpreter either (0.8.5 casts a Python float), so these two functions are torch's; the rotary embedding, the fused
    loss, and every forward that Liger puts in place of transformers' are its own."""
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    from liger_kernel.transformers import rms_norm, swiglu
    from transformers import Trainer, TrainingArguments

    from peftfast.integrations.transformers import PatchCallback

    from . import small_models

    if not torch.cuda.is_available():
        rms_norm.LigerRMSNormFunction = _NormOfTorch
        swiglu.LigerSiLUMulFunction = _SwiGLUOfTorch
    rows = [
        {name: value[0].tolist() for name, value in batch.items()}
        for batch in small_models.text_batches("llama", STEPS, rows=1, length=12)
    ]
    found: dict[str, Any] = {}
    for name, patched, with_liger in (("plain", False, False), ("stock", False, True), ("patched", True, True)):
        model = small_models.adapted("llama", "lora", torch.float32)
        callback = PatchCallback(strict=True)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=STEPS,
                per_device_train_batch_size=1,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_liger_kernel=with_liger,
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback] if patched else [])
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        mlp = model.base_model.model.model.layers[0].mlp
        found[name] = {
            "losses": losses,
            "fused": len(callback.report.fused) if callback.report else 0,
            "liger": getattr(mlp.forward, "__module__", ""),
        }
    out.write_text(json.dumps(found))


class _NormOfTorch:
    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, eps: float, *_: Any) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class _SwiGLUOfTorch:
    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up


def zero3(out: Path) -> None:
    """DeepSpeed ZeRO-3 over gloo on a CPU: parameters are gathered by hooks around each module's forward."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    import peftfast

    from . import small_models

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(dist_backend="gloo")
    model = small_models.adapted("llama", "lora", torch.float32)
    before = len(peftfast.patch(model).fused)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    reasons = peftfast.report(model).reasons
    losses = []
    for batch in small_models.text_batches("llama", STEPS):
        part = batch["input_ids"].shape[0] // world
        loss = engine(**{name: value[rank * part : (rank + 1) * part] for name, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
    if rank == 0:
        out.write_text(json.dumps({"losses": losses, "fused": before, "reasons": reasons}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"liger": liger, "zero3": zero3}[sys.argv[1]](Path(sys.argv[2]))
