"""transformers' Trainer and TRL's trainers over patched models, and what they bring: accumulation, checkpointing, autocast, scaling."""

import copy
import gc
import json
import logging
import pickle
import sys
import types
import warnings
from typing import Any

import peft
import pytest
import torch

import peftfast
from peftfast.configs import lora as configs_lora
from peftfast.functional import lora as functional_lora
from peftfast.integrations import peft_call, peft_gated_mlp, peft_group_call, peft_group_state
from peftfast.integrations.transformers import PatchCallback
from tests.support import small_models

STEPS = 3
LAYERS = 14  # seven projections of two decoder layers
ARMS = ("callback", "patch", "stock")


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    batch = small_models.text_batches("llama", 1, rows=count, length=24)[0]
    return [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"].tolist()]


def arguments(tmp_path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 7,
    } | options


def logged(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def losses(arm: str, tmp_path, method: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> list[float]:
    """The losses of a Trainer's run, patched by one way or another."""
    from transformers import Trainer, TrainingArguments

    model = small_models.adapted("llama", method, dtype)
    if options.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    callback = PatchCallback(strict=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=rows(),
        callbacks=[callback] if arm == "callback" else [],
    )
    if arm == "patch":
        peftfast.patch(trainer.model)
    assert len(peftfast.report(trainer.model).fused) == LAYERS
    assert [row.patched for row in peftfast.report(trainer.model).layers] == [arm != "stock"] * LAYERS
    if arm == "callback":
        assert callback.report is not None and len(callback.report.fused) == LAYERS
    return logged(trainer)


# Options of TrainingArguments, the adapted model's, and how far losses of about 5 may be apart.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "plain": ({}, {}, 1e-4),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}, 1e-4),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {},
        1e-4,
    ),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
        1e-4,
    ),
    "bf16 autocast": ({"bf16": True}, {}, 1e-2),
    "qlora in bf16": ({"bf16": True}, {"method": "qlora", "dtype": torch.bfloat16}, 1e-2),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainer(name: str, tmp_path) -> None:
    options, model, tolerance = RUNS[name]
    by_callback, by_patch, stock = (losses(arm, tmp_path / arm, **model, **options) for arm in ARMS)
    assert by_callback == by_patch
    assert len(stock) == STEPS and stock[-1] < stock[0]
    torch.testing.assert_close(torch.tensor(by_patch), torch.tensor(stock), rtol=0.0, atol=tolerance)


def test_model_init_is_patched_when_training_begins(tmp_path) -> None:
    """With model_init the Trainer makes another model in train()."""
    from transformers import Trainer, TrainingArguments

    callback = PatchCallback()
    made = []

    def model_init() -> torch.nn.Module:
        made.append(small_models.adapted("llama", "lora", torch.float32))
        return made[-1]

    trainer = Trainer(
        model_init=model_init,
        args=TrainingArguments(**arguments(tmp_path, max_steps=1)),
        train_dataset=rows(),
        callbacks=[callback],
    )
    trainer.train()
    assert len(made) == 2 and trainer.model is made[1]
    assert all(row.patched for row in peftfast.report(trainer.model).layers)


def test_callback_without_an_adapter_warns_and_strict_raises(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(**arguments(tmp_path))
    with pytest.warns(UserWarning, match="no PEFT adapter layer found"):
        Trainer(model=small_models.base("llama"), args=settings, train_dataset=rows(), callbacks=[PatchCallback()])
    stays_stock = small_models.adapted("llama", "lora", torch.float32).double()
    with pytest.raises(RuntimeError, match="would stay stock"):
        Trainer(model=stays_stock, args=settings, train_dataset=rows(), callbacks=[PatchCallback(strict=True)])


def scaled(method: str, patched: bool, scale: float, steps: int) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses and scales of steps in fp16 under a GradScaler. By hand: transformers refuses fp16 on a CPU."""
    model = small_models.adapted("llama", method, torch.float16 if method == "qlora" else torch.float32)
    if patched:
        peftfast.patch(model, strict=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    values, scales = [], []
    for batch in small_models.text_batches("llama", steps):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
        scales.append(scaler.get_scale())
    return values, scales, model


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fp16_autocast_with_a_scaler(method: str) -> None:
    stock, stock_scales, _ = scaled(method, False, 2.0**14, 8)
    patched, scales, _ = scaled(method, True, 2.0**14, 8)
    assert scales == stock_scales == [2.0**14] * 8
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(stock), rtol=0.0, atol=1e-2)
    assert stock[-1] < stock[0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_overflow_reaches_the_scaler(method: str) -> None:
    """A scale that fp16 gradients cannot bear: both see infinities, skip the step and halve the scale."""
    for patched in (False, True):
        _, scales, model = scaled(method, patched, 2.0**40, 1)
        assert scales == [2.0**39]
        assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    # The fused backward rounds less often on its way, and overflows no earlier.
    _, stock, _ = scaled(method, False, 2.0**24, 8)
    _, fused, _ = scaled(method, True, 2.0**24, 8)
    assert all(a >= b for a, b in zip(fused, stock, strict=True))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_generates_the_same_tokens(method: str) -> None:
    """Greedy, with a cache and without, and sampled, in float32."""
    model = small_models.adapted("llama", method, torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    prompt = small_models.text_batches("llama", 1, rows=2, length=8)[0]["input_ids"]
    ways = ({"do_sample": False}, {"do_sample": False, "use_cache": False}, {"do_sample": True, "temperature": 2.0})

    def generate() -> list[torch.Tensor]:
        made = []
        for way in ways:
            torch.manual_seed(3)
            made.append(model.generate(input_ids=prompt, max_new_tokens=24, pad_token_id=0, **way))
        return made

    stock = generate()
    peftfast.patch(model, strict=True)
    for expected, tokens in zip(stock, generate(), strict=True):
        assert torch.equal(tokens, expected)
    assert len(set(stock[2].flatten().tolist())) > 8  # not one token again and again


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups always pay, and a draw of several seeds moves the generator no further than a draw of one."""

    def draw(x: torch.Tensor, count: int = 1) -> torch.Tensor:
        one = torch.Generator().manual_seed(int(torch.randint(0, 2**62, (1,))))
        return torch.randint(0, 2**63 - 1, (count,), generator=one)

    monkeypatch.setattr(configs_lora, "group_pays", lambda *_: True)
    for module in (functional_lora, peft_call, peft_group_call, peft_gated_mlp):
        monkeypatch.setattr(module, "draw_seed", draw)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 2}, True),
        ({"restore_callback_states_from_checkpoint": True}, True),
    ],
)
def test_a_resumed_run_knows_its_groups(as_on_a_gpu, tmp_path, options: dict[str, Any], kept: bool) -> None:
    """Without what the checkpoint keeps of them its first step draws other seeds, and every step after it."""
    from transformers import Trainer, TrainingArguments

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4} | options

    def trainer() -> Any:
        model = small_models.adapted("llama", "lora", torch.float32)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.2)
        made = TrainingArguments(**arguments(tmp_path, **settings))
        return Trainer(model=model, args=made, train_dataset=rows(), callbacks=[PatchCallback(strict=True)])

    def trained(one: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}

    through = trainer()
    through.train()
    groups = peftfast.report(through.model).groups
    assert len(groups) == 4

    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    if not kept:
        state["stateful_callbacks"]["PatchCallback"]["attributes"]["groups"] = {}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed = trainer()
    assert not peftfast.report(resumed.model).groups
    begun: list[Any] = []
    first = resumed.model.register_forward_pre_hook(lambda model, _: begun.append(peftfast.report(model).groups))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    first.remove()
    assert begun[0] == (groups if kept else [])
    assert peftfast.report(resumed.model).groups == groups
    one, other = trained(through), trained(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one) == kept


def test_the_callback_is_copied_and_pickled_without_the_model() -> None:
    callback = PatchCallback(strict=True)
    model = small_models.adapted("llama", "lora", torch.float32)
    callback.on_init_end(None, None, None, model=model)
    model(**small_models.text_batches("llama", 1)[0])
    assert len(callback.state()["attributes"]["groups"]) == 4  # an attention and an MLP in each of two layers
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert again.strict and len(again.report.fused) == LAYERS
    del model
    gc.collect()
    assert callback.state() == {"args": {"strict": True}, "attributes": {"groups": {}}}


def test_what_a_checkpoint_knows_of_another_model_is_passed_over() -> None:
    model = small_models.adapted("llama", "lora", torch.float32)
    peftfast.patch(model)
    batch = small_models.text_batches("llama", 1)[0]
    model(**batch)
    known = peft_group_state.state_of(model)
    groups = peftfast.report(model).groups
    other = small_models.adapted("llama", "lora", torch.float32)
    peftfast.patch(other)
    attention = next(name for name in known if name.endswith("layers.0.self_attn"))
    renamed = json.loads(json.dumps(known))
    renamed[attention]["groups"][0]["layers"][0] = "query"
    peft_group_state.restore(other, renamed | {"nowhere": renamed[attention]})
    assert peftfast.report(other).groups == groups[1:]
    assert [torch.isfinite(other(**batch).loss).item() for _ in range(2)] == [True, True]
    assert sorted(peftfast.report(other).groups) == sorted(groups)
    # With a graph that may be computed anew, a block goes on as it has begun.
    recorded = other(**batch).loss
    peft_group_state.restore(other, {name: one | {"groups": []} for name, one in known.items()})
    assert sorted(peftfast.report(other).groups) == sorted(groups)
    recorded.backward()
    peft_group_state.restore(other, {name: one | {"groups": []} for name, one in known.items()})
    assert not peftfast.report(other).groups


@pytest.fixture
def tokenizer(tmp_path):
    from transformers import AutoTokenizer

    from tests.test_cli_finetune import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer", unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))


def trl_model(tokenizer) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = small_models.SIZES | {"vocab_size": len(tokenizer)}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


LORA = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def test_trl_sft_builds_the_model_and_the_callback_patches_it(tokenizer, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    import datasets

    data = datasets.Dataset.from_list([{"text": f"the quick brown fox {k} jumps over the lazy dog"} for k in range(16)])

    def run(callbacks: list) -> list[float]:
        settings = trl.SFTConfig(**arguments(tmp_path, bf16=False), max_length=32)
        trainer = trl.SFTTrainer(
            trl_model(tokenizer),
            settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LORA,
            callbacks=callbacks,
        )
        assert all(row.patched for row in peftfast.report(trainer.model).layers) == bool(callbacks)
        return logged(trainer)

    callback = PatchCallback(strict=True)
    patched, stock = run([callback]), run([])
    assert len(callback.report.fused) == LAYERS
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(stock), rtol=0.0, atol=1e-3)


def test_trl_dpo_takes_its_reference_from_the_disabled_adapter(tokenizer, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    import datasets

    pairs = [{"prompt": "the quick", "chosen": f" brown fox {k}", "rejected": f" lazy dog {k}"} for k in range(16)]
    data = datasets.Dataset.from_list(pairs)

    def run(callbacks: list) -> tuple[list[float], list[float]]:
        settings = trl.DPOConfig(**arguments(tmp_path, bf16=False), max_length=32, beta=1.0)
        trainer = trl.DPOTrainer(
            trl_model(tokenizer),
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LORA,
            callbacks=callbacks,
        )
        assert trainer.ref_model is None
        values = logged(trainer)
        return values, [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]

    callback = PatchCallback()
    (patched, margins), (stock, stock_margins) = run([callback]), run([])
    assert len(callback.report.fused) == LAYERS
    # At first policy and reference are one: log 2. A reference with the adapter in it would leave it there.
    assert abs(stock[0] - 0.6931) < 1e-3 and stock[-1] < 0.65
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(stock), rtol=0.0, atol=1e-3)
    torch.testing.assert_close(torch.tensor(margins), torch.tensor(stock_margins), rtol=0.0, atol=1e-2)


# Unsloth, and axolotl's LoRA kernels


def foreign(module: str, name: str) -> types.FunctionType:
    """A function as another package's module defines it."""
    made: dict[str, Any] = {"__name__": module}
    exec(f"def {name}(self, *args, **kwargs):\n    return 0", made)
    return made[name]


@pytest.mark.parametrize(
    ("module", "name", "place", "reason"),
    [
        ("unsloth.kernels.fast_lora", "forward", "mlp.forward", "Unsloth has patched this model"),
        ("unsloth.kernels.fast_lora", "apply_qkv", "self_attn.apply_qkv", "Unsloth has patched this model"),
        ("axolotl.kernels.lora", "apply_lora_mlp_swiglu", "mlp.forward", "axolotl's LoRA kernels are on"),
        ("axolotl.kernels.lora", "apply_lora_qkv", "self_attn.apply_qkv", "axolotl's LoRA kernels are on"),
        ("axolotl.kernels.lora", "apply_lora_o", "self_attn.apply_o", "axolotl's LoRA kernels are on"),
        ("axolotl.monkeypatch.lora_kernels", "apply_out_proj", "self_attn.apply_out_proj", "axolotl's LoRA kernels"),
    ],
)
def test_a_model_that_bypasses_its_layers_is_left_alone(
    module: str, name: str, place: str, reason: str, monkeypatch
) -> None:
    """Such functions are bound to the modules and read the adapters' weights themselves."""
    package = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    model = small_models.adapted("llama", "lora", torch.float32)
    part, attribute = place.split(".")
    holder = getattr(model.base_model.model.model.layers[1], part)
    holder.__dict__[attribute] = types.MethodType(foreign(module, name), holder)
    with pytest.warns(UserWarning, match=reason):
        report = peftfast.patch(model)
    assert len(report.stock) == LAYERS and [reason in found for found in report.reasons] == [True]
    assert not any(row.patched for row in peftfast.report(model).layers)
    with pytest.raises(RuntimeError, match=reason):
        peftfast.patch(model, strict=True)
    del holder.__dict__[attribute]
    assert len(peftfast.patch(model).fused) == LAYERS


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [
        ("unsloth", "", ""),
        ("axolotl", "", ""),
        ("axolotl.monkeypatch.lora_kernels", "original_apply_qkv", "self_attn.apply_qkv"),
        ("axolotl.monkeypatch.lora_kernels", "original_apply_o", "self_attn.apply_o"),
        ("axolotl.monkeypatch.lora_kernels", "axolotl_attn_forward", "self_attn.forward"),
    ],
)
def test_what_calls_the_layers_is_no_reason(module: str, name: str, place: str, monkeypatch) -> None:
    """Neither is a package in the process, nor what axolotl binds where its kernels do not serve a layer."""
    package = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    model = small_models.adapted("llama", "lora", torch.float32)
    if name:
        part, attribute = place.split(".")
        holder = getattr(model.base_model.model.model.layers[1], part)
        holder.__dict__[attribute] = types.MethodType(foreign(module, name), holder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = peftfast.patch(model)
    assert len(report.fused) == LAYERS


def test_modules_with_a_forward_of_their_own_call_the_layers(caplog) -> None:
    """Liger's way (use_liger_kernel=True): an MLP, a norm and a loss with other forwards, which call the projections as modules."""
    stock, patched = (small_models.adapted("llama", "lora", torch.float32) for _ in range(2))
    batch = small_models.text_batches("llama", 1)[0]
    for model in (stock, patched):
        for layer in model.base_model.model.model.layers:
            mlp = layer.mlp

            def forward(self, x):
                return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

            mlp.forward = types.MethodType(forward, mlp)
    assert len(peftfast.patch(patched, strict=True).fused) == LAYERS
    with caplog.at_level(logging.WARNING, "peftfast"):
        loss = patched(**batch).loss
    assert not [record for record in caplog.records if record.name == "peftfast"]
    torch.testing.assert_close(loss, stock(**batch).loss, rtol=1e-5, atol=0.0)
