"""What two gloo processes do for tests/test_distributed.py: each scenario's losses, keys and reports, as JSON of rank 0.

Run as a program, once a rank: ``python -m tests.support.distributed_worker RANK RENDEZVOUS_FILE OUT_DIRECTORY``. One start serves all
scenarios, since importing torch, PEFT and bitsandbytes costs more than any of them.
"""

import copy
import datetime
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.functional.lora import LoRALinearFunction
from peftfast.integrations.patch_report import logged
from peftfast.methods import SpIEL
from peftfast.nn import LoRALinear, NF4Linear, SparseDeltaLinear
from peftfast.ops.dispatch import Operator
from peftfast.optim import SparseAdamW
from tests.support.functions_ran import calls_by_library

WORLD = 2
STEPS = 4
ROWS, LENGTH, VOCABULARY = 4, 24, 128
LEARNING_RATE = 1e-2


def llama(four_bit: str | None = None, device_map: dict[str, Any] | None = None) -> nn.Module:
    """A PEFT model of two decoder layers, the same in every process. ``four_bit`` names the storage dtype of a quantised base;
    with ``device_map`` the base is spread before PEFT gets it, with accelerate's hooks even where all of it lies on one device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    if four_bit:
        quantise(model.model.layers, getattr(torch, four_bit))
        model.is_loaded_in_4bit = True
    if device_map is not None:
        dispatch_model(model, device_map=device_map, force_hooks=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def quantise(module: nn.Module, storage: torch.dtype) -> None:
    import bitsandbytes as bnb

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    quant_type="nf4",
                    compute_dtype=torch.float32,
                    quant_storage=storage,
                )
                # FSDP2 makes parameters of its own, without the quantisation state: the layer keeps that only if the weight knows it.
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", quant_storage=storage, module=layer
                )
                layer.support_avx512bf16_for_cpu = False
                setattr(parent, name, layer.to("cpu"))


def batches() -> list[torch.Tensor]:
    """One batch of few words again and again, so that a few steps move the loss far."""
    words = torch.randint(0, VOCABULARY, (8,), generator=torch.Generator().manual_seed(1))
    batch = words[torch.randint(0, 8, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))]
    return [batch] * STEPS


def train(model: nn.Module, *, shard: bool, steps: slice = slice(None), optimizer: Any = None) -> list[float]:
    """AdamW steps; with ``shard`` on this rank's half of each batch, the mean of both ranks' losses."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for batch in batches()[steps]:
        rows = batch[dist.get_rank() :: WORLD] if shard else batch
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.detach().clone()
        if shard:
            dist.all_reduce(value)
            value /= WORLD
        losses.append(value.item())
    return losses


def sharded(model: nn.Module) -> nn.Module:
    """fully_shard by decoder layer, then the whole, as torchtitan and accelerate do."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def integer_storage() -> str:
    """The storage dtype of a sharded 4-bit base: torch 2.11's fully_shard takes floating-point parameters alone."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    try:
        fully_shard(holder)
    except RuntimeError:
        return "bfloat16"
    return "uint8"


class Watched:
    """``with Watched() as watched``: how often peftfast's operators and its LoRA layer were called, the autograd library's recordings
    included, and the reasons logged."""

    def __enter__(self) -> "Watched":
        self._fused, self.reasons = -calls_by_library()[0], []
        self._call = Operator.__call__

        def counted(operator: Operator, *args: Any) -> Any:
            self._fused += 1
            return self._call(operator, *args)

        Operator.__call__ = counted  # type: ignore[method-assign]
        # On a CPU a dense layer is one call of the library, past the operators.
        self._forward = LoRALinearFunction.forward

        def counted_forward(*args: Any) -> Any:
            self._fused += 1
            return self._forward(*args)

        LoRALinearFunction.forward = staticmethod(counted_forward)  # type: ignore[method-assign]
        logged.clear()
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.reasons.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("peftfast").addHandler(self._handler)
        return self

    @property
    def fused(self) -> int:
        return self._fused + calls_by_library()[0]

    def __exit__(self, *_: object) -> None:
        Operator.__call__ = self._call  # type: ignore[method-assign]
        LoRALinearFunction.forward = staticmethod(self._forward)  # type: ignore[method-assign]
        logging.getLogger("peftfast").removeHandler(self._handler)


def single(four_bit: str | None) -> dict[str, Any]:
    """One process and the whole batch: stock and patched."""
    stock = train(llama(four_bit), shard=False)
    model = llama(four_bit)
    peftfast.patch(model)
    with Watched() as watched:
        return {"stock": stock, "patched": train(model, shard=False), "fused": watched.fused}


def ddp(four_bit: str | None) -> dict[str, Any]:
    model = llama(four_bit)
    peftfast.patch(model)
    wrapped = DistributedDataParallel(model)
    with Watched() as watched:
        losses = train(wrapped, shard=True)
    return {"losses": losses, "fused": watched.fused, "reasons": watched.reasons}


def ddp_patched_inside() -> dict[str, Any]:
    """patch reaches through the wrapper as well."""
    wrapped = DistributedDataParallel(llama())
    report = peftfast.patch(wrapped)
    with Watched() as watched:
        losses = train(wrapped, shard=True)
    return {"losses": losses, "fused": watched.fused, "layers": len(report.fused)}


def fsdp(four_bit: str | None) -> dict[str, Any]:
    # bitsandbytes writes the quantisation state's keys from the parameter, which FSDP2 has replaced: stock loses them too.
    keys = sorted(sharded(llama(four_bit)).state_dict())
    model = llama(four_bit)
    peftfast.patch(model)
    sharded(model)
    with Watched() as watched:
        losses = train(model, shard=True)
    return {
        "losses": losses,
        "fused": watched.fused,
        "reasons": watched.reasons,
        "same_keys": keys == sorted(model.state_dict()),
        "is_dtensor": type(next(p for p in model.parameters() if p.requires_grad)).__name__,
    }


def fsdp_dora_base_written() -> dict[str, Any]:
    """A frozen base whose shards are written, as by a loader: DoRA's norms of the gathered weight are of another weight then, in the
    same version and, every few turns, at the same address."""
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))

    def outputs(patched: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512, bias=False))
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False))
        if patched:
            peftfast.patch(model)
        fully_shard(model)
        found = []
        for _ in range(12):
            with torch.no_grad():
                found.append(model(x).norm().item())
                model.reshard()
                model.base_model.model[0].base_layer.weight.to_local().mul_(1.2)
        return found

    return {"stock": outputs(False), "patched": outputs(True)}


def fsdp_each_linear() -> dict[str, Any]:
    """Every base layer is a unit of its own: outside that unit's forward its weight is a DTensor."""
    model = llama()
    peftfast.patch(model)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            fully_shard(module)
    sharded(model)
    with Watched() as watched:
        losses = train(model, shard=True)
    report = peftfast.report(model)
    return {"losses": losses, "fused": watched.fused, "reasons": watched.reasons, "report": list(report.reasons)}


def fsdp_patched_after() -> dict[str, Any]:
    """fully_shard on the adapter layers themselves, then patch: exchanging the class would take FSDPModule away."""
    model = llama()
    for module in list(model.modules()):
        if isinstance(module, peft_lora.Linear):
            fully_shard(module)
    sharded(model)
    report = peftfast.patch(model)
    with Watched() as watched:
        losses = train(model, shard=True)
    return {"losses": losses, "fused": watched.fused, "report": list(report.reasons)}


def checkpoint(folder: Path, four_bit: str | None) -> dict[str, Any]:
    """Two steps, saved by torch.distributed.checkpoint, loaded into a fresh sharded model and a whole one, two more steps of each."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = llama(four_bit)
        peftfast.patch(model)
        sharded(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.SGD(trained, lr=LEARNING_RATE)

    adapters = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = fresh()
    train(model, shard=True, steps=slice(0, 2), optimizer=optimizer)
    state_dict_saver.save(get_model_state_dict(model, options=adapters), checkpoint_id=folder)
    whole = get_model_state_dict(
        model, options=StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
    )
    went_on = train(model, shard=True, steps=slice(2, None), optimizer=optimizer)

    other, optimizer = fresh()
    state = get_model_state_dict(other, options=adapters)
    state_dict_loader.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state, options=StateDictOptions(ignore_frozen_params=True, strict=False))
    resumed = train(other, shard=True, steps=slice(2, None), optimizer=optimizer)

    result: dict[str, Any] = {"went_on": went_on, "resumed": resumed}
    if dist.get_rank() == 0:  # the whole state dict is rank 0's
        plain = llama(four_bit)  # stock, in one process
        missing = plain.load_state_dict(whole, strict=False)
        optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=LEARNING_RATE)
        result["unexpected"] = list(missing.unexpected_keys)
        result["whole"] = train(plain, shard=False, steps=slice(2, None), optimizer=optimizer)
        result["adapter_keys"] = len(whole)
    return result


def own_layers(folder: Path) -> dict[str, Any]:
    """4-bit layers of peftfast.nn, whose state_dict has keys beneath "weight.": from sharded and whole models into others."""

    if integer_storage() != "uint8":
        return {"unsupported": f"fully_shard of torch {torch.__version__} takes no integer parameters"}

    def made(seed: int, shard: bool) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        model[0] = LoRALinear.from_linear(NF4Linear.from_linear(model[0]), r=4)
        model[2] = NF4Linear.from_linear(model[2])
        nn.init.normal_(model[0].lora_B)
        return fully_shard(model) if shard else model

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    same = {}
    for saved_sharded in (False, True):
        source = made(0, saved_sharded)
        expected = source(x)
        path = folder / str(saved_sharded)
        state_dict_saver.save(get_model_state_dict(source), checkpoint_id=path)
        whole = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True))
        trained = get_model_state_dict(source, options=StateDictOptions(ignore_frozen_params=True))
        for shard in (False, True):
            case = f"{saved_sharded} to {shard}"
            model = made(7, shard)
            model(x).sum().backward()
            state = get_model_state_dict(model)
            state_dict_loader.load(state, checkpoint_id=path)
            set_model_state_dict(model, state)
            same[case] = torch.equal(model(x), expected)
            model(x).sum().backward()
            model = made(8, shard)
            set_model_state_dict(model, dict(whole), options=StateDictOptions(full_state_dict=True))
            same[f"{case}, whole"] = torch.equal(model(x), expected)
            model = made(0, shard)
            nn.init.zeros_(model[0].lora_B)
            if saved_sharded is shard:
                set_model_state_dict(model, trained, options=StateDictOptions(strict=False))
                same[f"{case}, adapters"] = torch.equal(model(x), expected)
    return {"same": same}


def disabled_under_fsdp() -> dict[str, Any]:
    """A reference forward by disable_adapter between the policy's forward and its backward, sharded and not."""

    def losses_of(model: nn.Module, shard: bool) -> list[float]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        values = []
        for batch in batches():
            rows = batch[dist.get_rank() :: WORLD] if shard else batch
            policy = model(input_ids=rows, labels=rows).loss
            with torch.no_grad(), peft_of(model).disable_adapter():
                reference = model(input_ids=rows, labels=rows).loss
            loss = (policy - reference).square() + policy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = torch.stack([policy.detach(), reference])
            if shard:
                dist.all_reduce(value)
                value /= WORLD
            values += value.tolist()
        return values

    def peft_of(model: nn.Module) -> Any:
        return model.module if isinstance(model, DistributedDataParallel) else model

    model = llama()
    peftfast.patch(model)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    # The square is of the mean over a rank's rows, so the whole batch is no reference here: two stock ranks are.
    stock = DistributedDataParallel(llama())
    return {"patched": losses_of(wrapped, True), "stock": losses_of(stock, True)}


def sparse_ddp(resident: bool) -> dict[str, Any]:
    """Sparse layers whose supports move: two workers, and one process that takes their batches one after the other."""

    def made() -> tuple[nn.Module, SparseAdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
        for i in (0, 2):
            model[i] = SparseDeltaLinear.from_linear(model[i], density=0.1, resident=resident)
        return model, SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def batch(step: int, rank: int) -> Tensor:
        return torch.randn(6, 24, generator=torch.Generator().manual_seed(10 * step + rank))

    def run(spiel: SpIEL, optimizer: SparseAdamW, call: nn.Module, ranks: list[int]) -> list[float]:
        losses, moved = [], 0
        for step in range(8):
            optimizer.zero_grad()
            for rank in ranks:
                loss = call(batch(step, rank)).square().mean() / len(ranks)
                loss.backward()
            optimizer.step()
            moved += spiel.moved if spiel.step() else 0
            losses.append(call(batch(0, 0)).square().mean().item())
        return [*losses, moved]

    options = {"total_steps": 8, "reselection_steps": 3, "accumulation_steps": 2}
    model, optimizer = made()
    single = run(SpIEL(model, optimizer, process_group=False, **options), optimizer, model, [0, 1])
    supports = [layer.delta_indices.tolist() for layer in (model[0], model[2])]
    model, optimizer = made()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        SpIEL(model, optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the wrapper says which workers there are
        wrapped = DistributedDataParallel(model)
        spiel = SpIEL(wrapped, optimizer, **options)
    found = run(spiel, optimizer, wrapped, [dist.get_rank()])
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, [layer.delta_indices.tolist() for layer in (model[0], model[2])])
    said = [str(one.message) for one in warned]
    return {"single": single, "ddp": found, "same_supports": all(one == supports for one in every), "warned": said}


def fsdp_uint8() -> dict[str, Any]:
    if integer_storage() != "uint8":
        return {
            "unsupported": f"fully_shard of torch {torch.__version__} takes no integer parameters: quant_storage=bfloat16"
        }
    return fsdp("uint8")


def scenarios(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "single dense": lambda: single(None),
        "single 4-bit": lambda: single("uint8"),
        "ddp dense": lambda: ddp(None),
        "ddp 4-bit": lambda: ddp("uint8"),
        "ddp patched inside": ddp_patched_inside,
        "ddp disabled": disabled_under_fsdp,
        "sparse ddp": lambda: sparse_ddp(False),
        "sparse ddp resident": lambda: sparse_ddp(True),
        "fsdp dense": lambda: fsdp(None),
        "fsdp 4-bit uint8": fsdp_uint8,
        "fsdp 4-bit bfloat16": lambda: fsdp("bfloat16"),
        "fsdp dora": fsdp_dora_base_written,
        "fsdp each linear": fsdp_each_linear,
        "fsdp patched after": fsdp_patched_after,
        "checkpoint dense": lambda: checkpoint(folder / "dense", None),
        "checkpoint own 4-bit": lambda: own_layers(folder / "own"),
        "checkpoint 4-bit": lambda: checkpoint(folder / "4bit", integer_storage()),
    }


def main(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name, scenario in scenarios(Path(out)).items():
        try:
            results[name] = scenario()
        except Exception:
            # Both ranks fail alike, or the other one runs into the timeout.
            results[name] = {"error": traceback.format_exc()}
    Path(out, f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
