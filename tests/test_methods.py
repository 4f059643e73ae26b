"""peftfast.adapt: the registry, the handle, the files; LoRA, LoRA-XS and the sparse methods by name."""

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftfast
from peftfast.methods import registry
from peftfast.methods.adapting import Runtime, Targets
from peftfast.methods.factored import FactoredLinear, Factors
from peftfast.methods.registry import KINDS, get, methods
from peftfast.nn import LoRALinear, NF4Linear
from tests.support.method_checks import (
    Mlp,
    adapted,
    batches,
    check_files,
    check_four_bit,
    check_layer_method,
    check_merging,
    check_steps,
    plain_model,
    stir,
)

TARGETS = ["up", "down"]


def test_every_method_is_described() -> None:
    found = methods()
    assert {"lora", "lora-xs", "dora", "shira", "spiel", "s2ft", "rosa"} <= set(found)
    for name, method in found.items():
        assert name == name.lower() and " " not in name
        assert method.kind in KINDS and (method.build or method.operation), name
        assert method.paper.title and method.paper.authors and 2017 <= method.paper.year <= 2026, name
        assert method.paper.arxiv is None or len(method.paper.arxiv) == 10, name
        assert method.formula and method.reduces_to and method.fused, name
        assert set(method.demo) <= set(method.defaults()), name
        assert method.options.__doc__ and (method.build or method.operation).__module__.startswith("peftfast."), name


def test_errors_before_anything_is_changed() -> None:
    def refused(error: type[Exception], match: str, model: object = None, name: str = "lora", **given: object) -> None:
        model = Mlp() if model is None else model
        before = [(n, p.requires_grad) for n, p in model.named_parameters()] if isinstance(model, nn.Module) else []
        with pytest.raises(error, match=match):
            peftfast.adapt(model, name, **{"target_modules": TARGETS, **given})
        if isinstance(model, nn.Module):
            assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
            assert not hasattr(model, "peftfast_handle")

    refused(TypeError, "model: expected a torch.nn.Module, got int", 3)
    refused(ValueError, "no method 'lora-sx'; did you mean lora-xs", name="lora-sx")
    refused(TypeError, "method: expected a name", name=3)
    refused(TypeError, "lora: no option 'rank'; it has r, lora_alpha, lora_dropout", rank=3)
    refused(ValueError, "r: expected an int of at least 1, got 0", r=0)
    refused(TypeError, "modules_to_save: expected a sequence of paths, got None", modules_to_save=None)
    doubled = Mlp()
    doubled.up = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(48, 64)
    refused(ValueError, "Doubled has a forward of its own", doubled, target_modules=["up"])
    refused(ValueError, "matches no layer", target_modules=["nothing"])
    refused(
        ValueError, "matches no layer that lora adapts: Mlp is not Linear", nn.Sequential(Mlp()), target_modules=["0"]
    )
    refused(ValueError, "shira adapts none of the layers", name="shira", r=60)
    with pytest.raises(ValueError, match="a PEFT model has adapters already"):
        peftfast.adapt(peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=TARGETS)), "lora")
    bytes_ = Mlp(torch.float32)
    bytes_.up.weight = nn.Parameter(torch.zeros(64, 48, dtype=torch.int8), requires_grad=False)
    bytes_.down = nn.Linear(64, 40, bias=False, device="meta")
    handle = peftfast.adapt(bytes_, "lora", target_modules="all-linear")
    assert handle.skipped == {"up": "its weight is torch.int8", "down": "its weight is on the meta device"}
    model = Mlp()
    peftfast.adapt(model, "lora", target_modules=TARGETS)
    with pytest.raises(ValueError, match="model: adapted already, by lora"):
        peftfast.adapt(model, "lora", target_modules=TARGETS)


def test_handle() -> None:
    handle = adapted("lora", r=3)
    assert repr(handle).startswith("lora(r=3, lora_alpha=16.0, lora_dropout=0.0): 2 layers, 648 trained of ")
    assert handle.loss() == 0.0
    handle.step()
    assert handle.state_dict() == {"completed_steps": 1, "runtime": {}}
    other = adapted("lora", r=3)
    other.load_state_dict(handle.state_dict())
    assert other.completed_steps == 1
    for bad in (-1.0, float("nan"), "x", None):
        with pytest.raises(ValueError, match="^lr: expected a number from 0.0"):
            handle.optimizer(lr=bad)
        if bad is not None:
            with pytest.raises(ValueError, match="^head_lr: expected a number from 0.0"):
                handle.optimizer(lr=0.1, head_lr=bad)
    optimiser = handle.optimizer(lr=0.1)
    assert isinstance(optimiser, torch.optim.AdamW) and optimiser.param_groups[0]["lr"] == 0.1
    partly = peftfast.adapt(nn.Sequential(Mlp(), nn.Linear(3, 3)), "shira", target_modules=r".*(up|head)", r=8)
    assert list(partly.layers) == ["0.up"] and "more than it has" in partly.skipped["0.head"]
    assert "1 layers stay as they were: r (N + K) = 344 weights are more than it has" in repr(partly)
    for twin in (copy.deepcopy(handle.model), pickle.loads(pickle.dumps(handle.model))):
        assert twin.peftfast_handle.model is twin and twin.peftfast_handle.layers["up"] is twin.up


def test_targets_are_pefts() -> None:
    """As PEFT chooses them: all linear layers, ends of paths, a pattern, exclusions."""
    for given in ("all-linear", TARGETS, r".*up", ["0.up"]):
        for excluded in (None, ["0.down"]):
            model = nn.Sequential(Mlp(), Mlp())
            stock = peft.get_peft_model(
                copy.deepcopy(model), peft.LoraConfig(target_modules=given, exclude_modules=excluded)
            )
            expected = {
                n.removeprefix("base_model.model.")
                for n, m in stock.named_modules()
                if isinstance(m, peft.tuners.lora.Linear)
            }
            assert set(peftfast.adapt(model, "lora", target_modules=given, exclude_modules=excluded).layers) == expected


def test_lora(tmp_path: Path) -> None:
    def weight(layer: LoRALinear, base: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        return base + 16.0 / 4 * p["lora_B"] @ p["lora_A"]

    handle = check_layer_method("lora", weight, count=4 * (112 + 104), r=4, tmp_path=tmp_path)
    stock = peft.PeftModel.from_pretrained(Mlp(), tmp_path).eval()
    batch = batches(1)[0]
    torch.testing.assert_close(stock(**batch).logits, handle.model.eval()(**batch).logits, rtol=1e-9, atol=1e-9)
    check_four_bit("lora", tmp_path / "nf4", weight, r=4)


def test_rslora_and_dora(tmp_path: Path) -> None:
    check_layer_method(
        "rslora", lambda layer, base, p: base + 8.0 * p["lora_B"] @ p["lora_A"], count=4 * 216, r=4, tmp_path=tmp_path
    )

    def weight(layer: LoRALinear, base: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = base + 4.0 * p["lora_B"] @ p["lora_A"]
        return p["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True).detach()

    check_layer_method("dora", weight, count=4 * 216 + 104, r=4, tmp_path=tmp_path / "dora")


def xs(layer: nn.Module, base: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    u, s, v = torch.linalg.svd(base, full_matrices=False)
    signs = torch.sign((u[:, :4] * layer.frozen_B.to(base) * s[:4]).sum(0))  # an SVD's signs are free
    return base + 16.0 / 4 * (u[:, :4] * signs * s[:4]) @ p["latent"] @ (signs[:, None] * v[:4])


def test_lora_xs(tmp_path: Path) -> None:
    handle = check_layer_method("lora-xs", xs, count=2 * 4 * 4, r=4, exact=False, tmp_path=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEFTFAST" and config["peftfast_method"] == "lora-xs"
    assert config["peftfast_options"]["r"] == 4 and config["target_modules"] == TARGETS
    assert "base_model.model.up.latent" in load_file(tmp_path / "adapter_model.safetensors")
    fresh = adapted("lora-xs", r=4, init_std=1e-12)
    torch.testing.assert_close(fresh.model(**batches(1)[0]).logits, Mlp()(**batches(1)[0]).logits, rtol=0, atol=1e-9)
    check_four_bit("lora-xs", tmp_path / "nf4", xs, r=4)
    assert handle.model.up.latent.shape == (4, 4)


def test_lora_xs_keeps_no_x() -> None:
    """What is saved for backward is x A^T, r numbers a row, and what is of the weights' size."""
    model = Mlp(torch.float32)
    layer = peftfast.adapt(model, "lora-xs", r=2, target_modules=TARGETS).layers["up"]
    x = torch.randn(1000, 48)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x).sum()
    assert torch.Size((1000, 2)) in kept and torch.Size((1000, 48)) not in kept


def test_spiel_is_told_of_other_workers(monkeypatch) -> None:
    """Which move its supports alike: DDP's own test is of SpIEL itself."""
    from peftfast.methods import sparse

    groups = []
    monkeypatch.setattr(sparse, "SparseAdamW", lambda groups: None)
    monkeypatch.setattr(sparse, "SpIEL", lambda *args, process_group, **options: groups.append(process_group))
    for given in ({}, {"data_parallel": True}, {"data_parallel": False}):
        adapted("spiel", r=2, **given).runtime.optimizer([])
    assert groups == [None, True, False]
    with pytest.raises(TypeError, match="data_parallel: expected True, False or None, got 1"):
        adapted("spiel", r=2, data_parallel=1)


@pytest.mark.parametrize("name", ["shira", "spiel", "rosa"])
def test_sparse_methods(name: str, tmp_path: Path) -> None:
    """The delta as a dense matrix in plain torch, trained beside it; the files; SHiRA's by stock PEFT."""
    options: dict = {"shira": {"r": 2}, "spiel": {"r": 2, "total_steps": 100}, "rosa": {"r": 2, "density": 0.05}}[name]
    handle = adapted(name, **options)
    stir(handle)

    def weight(layer: nn.Module, base: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        delta = torch.zeros(base.numel(), dtype=base.dtype).index_add(0, layer.delta_indices.long(), p["delta_values"])
        low = 8.0 * p["lora_B"] @ p["lora_A"] if "lora_A" in p else 0.0
        return base + delta.view_as(base) + low

    check_steps(handle, plain_model(handle, weight), None, 1e-9, steps=4)
    check_files(handle, tmp_path, tolerance=1e-6 if name == "shira" else 1e-9)  # SHiRA's files are float32
    if name == "rosa":
        return
    assert handle.trainable == 2 * (112 + 104)
    check_merging(handle)
    if name == "shira":
        stock = peft.PeftModel.from_pretrained(Mlp(torch.float32), tmp_path).eval()
        batch = batches(1, torch.float32)[0]
        mine = peftfast.load_adapter(Mlp(torch.float32), tmp_path).eval()
        torch.testing.assert_close(stock(**batch).logits, mine(**batch).logits, rtol=1e-5, atol=1e-5)
    handle = adapted(name, dtype=torch.float32, **options)
    optimiser = handle.optimizer(lr=0.01)
    assert type(optimiser).__name__ == "SparseAdamW"
    places = handle.layers["up"].delta_indices.clone()
    for batch in batches(6, torch.float32):
        handle.model(**batch).loss.backward()
        optimiser.step()
        handle.step(optimiser)
        optimiser.zero_grad()
    assert torch.equal(places, handle.layers["up"].delta_indices) == (name == "shira")
    check_files(handle, tmp_path, tolerance=1e-5)


def test_s2ft_by_name(tmp_path: Path) -> None:
    from tests.support.small_models import base, text_batches

    model, batch = base("llama"), text_batches("llama", 1)[0]
    before = model(**batch).logits.detach()
    handle = peftfast.adapt(model, "s2ft", head_ratio=0.5, channel_ratio=0.1)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    stir(handle, 0.02)
    after = model(**batch).logits.detach()
    assert (after - before).abs().max() > 0.01
    for folder in (tmp_path / "permuted", tmp_path / "restored"):
        peftfast.save_adapter(model, folder)
        loaded = peftfast.load_adapter(base("llama"), folder)
        torch.testing.assert_close(loaded(**batch).logits, after, rtol=1e-4, atol=1e-5)
        peftfast.save_adapter(loaded, folder)
        loaded = peftfast.load_adapter(base("llama"), folder)
        torch.testing.assert_close(loaded(**batch).logits, after, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**batch).logits, after, rtol=1e-4, atol=1e-5)
        handle.runtime.s2ft.restore()


def test_a_head_is_trained_and_saved_whole(tmp_path: Path) -> None:
    for name in ("lora", "lora-xs"):
        torch.manual_seed(0)
        model = Mlp(torch.float32)
        handle = peftfast.adapt(model, name, modules_to_save=["head"], r=2)
        assert list(handle.layers) == TARGETS and model.head.weight.requires_grad
        assert handle.trainable == {"lora": 2 * 216, "lora-xs": 8}[name]
        optimiser = handle.optimizer(lr=0.01, head_lr=0.1)
        assert [group["lr"] for group in optimiser.param_groups] == [0.01, 0.1]
        stir(handle)
        peftfast.save_adapter(model, tmp_path / name)
        batch = batches(1, torch.float32)[0]
        expected = model(**batch).logits
        loaded = peftfast.load_adapter(Mlp(torch.float32), tmp_path / name)
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    again = peftfast.load_adapter(Mlp(torch.float32), tmp_path / "lora")
    peftfast.save_adapter(again, tmp_path / "again")
    first, second = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("lora", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    stock = peft.PeftModel.from_pretrained(Mlp(torch.float32), tmp_path / "lora").eval()
    mine = peftfast.load_adapter(Mlp(torch.float32), tmp_path / "lora")
    torch.testing.assert_close(stock(**batch).logits, mine(**batch).logits, rtol=1e-5, atol=1e-5)


def test_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    handle = adapted("lora-xs", r=4)
    peftfast.save_adapter(handle.model, tmp_path)
    config_file = tmp_path / "adapter_config.json"
    good = json.loads(config_file.read_text())

    def refused(match: str, error: type[Exception] = ValueError, **changed: object) -> None:
        config_file.write_text(json.dumps({**good, **changed}))
        model = Mlp()
        with pytest.raises(error, match=match):
            peftfast.load_adapter(model, tmp_path)
        assert type(model.up) is nn.Linear and not hasattr(model, "peftfast_handle")
        assert all(p.requires_grad for p in model.parameters())

    refused("no method 'lora-ys'", peftfast_method="lora-ys")
    refused("expected the shape", peftfast_options={**good["peftfast_options"], "r": 3})
    refused("belongs to no layer", target_modules=["up"])
    refused("no option 'x'", TypeError, peftfast_options={"x": 1})
    handle.merge()
    with pytest.raises(RuntimeError, match="up is merged"):
        peftfast.save_adapter(handle.model, tmp_path)


@pytest.mark.parametrize("name", ["lora", "pissa", "lora-xs", "vera", "shira"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_merged_and_unloaded(name: str, four_bit: bool) -> None:
    """Plain layers, and what they compute: the adapter's to rounding, or to what 4 bits leave."""
    handle = adapted(name, dtype=torch.float32, four_bit=four_bit, r=2)
    stir(handle)
    if name == "shira" and four_bit:
        with pytest.raises(RuntimeError, match="a 4-bit weight cannot hold a delta"):
            handle.merge_and_unload()
        return
    model, batch = handle.model.eval(), batches(1, torch.float32)[0]
    before, unit = model(**batch).logits.detach(), torch.eye(64)
    weight = model.down(unit).detach()
    assert handle.merge_and_unload() is model and not hasattr(model, "peftfast_handle")
    assert type(model.up) is type(model.down) is (NF4Linear if four_bit else nn.Linear)
    assert not any("peftfast_shared" in key or "lora" in key for key in model.state_dict())
    # 16 levels for normal values in blocks of 64 leave a tenth.
    assert (model.down(unit) - weight).norm() < (0.12 if four_bit else 1e-5) * weight.norm()
    if not four_bit:
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-5)


def test_a_layer_prints_and_moves() -> None:
    handle = adapted("lora-xs", dtype=torch.bfloat16, r=4)
    layer = handle.layers["up"]
    assert layer.latent.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert "latent=[4, 4]" in repr(layer)
    assert layer(torch.randn(5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert isinstance(adapted("lora-xs", dtype=torch.float32, four_bit=True).layers["up"].base_layer, NF4Linear)


@dataclass(frozen=True)
class Together:
    """A method of this test: one core for all layers, a penalty and a count."""

    r: int = 2


class TogetherLinear(FactoredLinear):
    def __init__(self, linear: nn.Linear, shared: nn.Module) -> None:
        super().__init__(linear)
        self.__dict__["shared"] = shared
        self.gain = self.new_parameter(1)

    def factors(self) -> Factors:
        core = self.__dict__["shared"].weight
        a = torch.eye(2, self.in_features, dtype=core.dtype)
        return Factors(a, self.gain * torch.eye(self.out_features, 2, dtype=core.dtype) @ core)


class TogetherRuntime(Runtime):
    def __init__(self, shared: nn.Module) -> None:
        self.shared, self.seen = shared, []

    def step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.seen.append((step, optimizer is not None and self.shared.weight.grad is not None))

    def loss(self) -> torch.Tensor:
        return self.shared.weight.square().sum()

    def state_dict(self) -> dict:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]


def test_what_layers_share_and_what_a_runtime_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.register(
        "together",
        paper=registry.Paper("None", "None", 2026),
        formula="",
        options=Together,
        reduces_to="lora",
        kind="layer",
        fused="",
    )
    def build(targets: Targets, options: Together) -> Runtime:
        shared = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        targets.share("core", shared)
        targets.replace(lambda name, linear: TogetherLinear(linear, shared))
        return TogetherRuntime(shared)

    handle = adapted("together")
    assert handle.trainable == 4 + 2 and "peftfast_shared.core.weight" in dict(handle.model.named_parameters())
    assert handle.loss().requires_grad
    stir(handle)
    optimiser = handle.optimizer(lr=0.01)
    for batch in batches(2):
        (handle.model(**batch).loss + handle.loss()).backward()
        optimiser.step()
        handle.step(optimiser)
        optimiser.zero_grad()
    assert handle.state_dict() == {"completed_steps": 2, "runtime": {"seen": [(1, True), (2, True)]}}
    loaded = check_files(handle, tmp_path)
    assert torch.equal(loaded.peftfast_shared.core.weight, handle.model.peftfast_shared.core.weight)
    assert "base_model.model.peftfast_shared.core.weight" in load_file(tmp_path / "adapter_model.safetensors")
    twin = copy.deepcopy(handle.model)
    assert twin.up.__dict__["shared"] is twin.peftfast_shared.core is not handle.model.peftfast_shared.core
    half = copy.deepcopy(handle.model).float()
    assert half(batches(1, torch.float32)[0]["x"]).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="registered already"):
        registry.register(
            "lora", paper=get("lora").paper, formula="", options=Together, reduces_to="", kind="layer", fused=""
        )


@pytest.mark.parametrize("name", ["lora-xs", "vera", "pissa", "inttune"])
def test_bitsandbytes_layers_are_taken_over(name: str, tmp_path: Path) -> None:
    """A Llama-shaped model in 4 bits: trained a step, saved, and read into another one."""
    from tests.support.small_models import base, quantise, text_batches

    def four_bit() -> nn.Module:
        model = base("llama")
        quantise(model, torch.float32)
        return model

    batch = text_batches("llama", 1)[0]
    model = four_bit()
    handle = peftfast.adapt(model, name, r=8)
    assert len(handle.layers) == 14 and not handle.skipped
    optimiser = handle.optimizer(lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    peftfast.save_adapter(model, tmp_path)
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(
        peftfast.load_adapter(four_bit(), tmp_path).eval()(**batch).logits, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.compiled
def test_layers_trace_as_one_graph() -> None:
    handle = adapted("lora-xs", dtype=torch.float32, r=4)
    layer, x = handle.layers["up"], torch.randn(6, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x).square().sum().backward()
        found, layer.latent.grad = layer.latent.grad, None
        layer(x).square().sum().backward()
        torch.testing.assert_close(found, layer.latent.grad)
        layer.latent.grad = None


def test_optimisers_are_not_put_on_a_model() -> None:
    for name, method in methods().items():
        if method.build is None:
            with pytest.raises(ValueError, match="not put on a model by adapt"):
                peftfast.adapt(Mlp(), name)
