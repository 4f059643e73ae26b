"""MoS, MTLoRA, Poly, MHR, MoLA, MixLoRA, LoRAMoE and MeteoRA against loops over experts in plain torch, and Poly against PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftfast
from peftfast.methods.routing import ExpertLinear, load_balance
from tests.support.method_checks import Mlp, adapted, batches, check_files, check_merging, stir
from tests.support.shared_checks import check_shared, formula_model

IDS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2])
UP, DOWN = 64 + 48, 40 + 64
P = dict[str, Tensor]


def on_tasks(handle: Any) -> None:
    """Every call of the model, and of its formulas, with the same tasks."""
    handle.runtime.current.ids = IDS


def base(layer: Any, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def test_mos(tmp_path: Path) -> None:
    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        number = 0 if layer.weight.shape[0] == 64 else 1
        a_pool, b_pool = shared[f"pools_{number}.pool_A"], shared[f"pools_{number}.pool_B"]
        adapter = layer.adapter[0]
        delta = torch.zeros_like(layer.weight)
        for i in range(6):
            row = torch.cat([a_pool[j] for j in adapter.index_A[i].tolist()])
            column = torch.cat([b_pool[j] for j in adapter.index_B[i].tolist()])
            delta = delta + 3.0 / 6 * torch.outer(column, row)
        return x @ (layer.weight + delta).T + (0 if layer.bias is None else layer.bias)

    given = {"r": 6, "budget": 2, "shards": 4, "private": 1, "lora_alpha": 3.0}
    handle = check_shared("mos", forward, count=2 * (UP + DOWN), tmp_path=tmp_path, **given)
    check_merging(handle)
    check_shared("mos", forward, count=2 * (UP + DOWN), four_bit=True, tmp_path=tmp_path / "nf4", **given)


def test_mos_shares_over_layers() -> None:
    """Pools of the layers of a kind; private shards are in one layer alone, A's and B's shards drawn apart."""
    model = nn.ModuleList([Mlp() for _ in range(3)])
    handle = peftfast.adapt(model, "mos", target_modules=["up", "down"], r=5, budget=3, shards=2, private=1)
    assert handle.trainable == 3 * 3 * (UP + DOWN)  # LoRA's at rank 3
    used = [handle.layers[f"{i}.up"].index_A for i in range(3)]
    private = 1 * 3 * 2
    for number, index in enumerate(used):
        assert index.flatten().unique().numel() == 10
        assert index[index < private].tolist() == [2 * number, 2 * number + 1]
        assert int(index.max()) < 3 * 3 * 2
    assert not torch.equal(used[0], handle.layers["0.up"].index_B)
    pools = handle.layers["0.up"].__dict__["pools"]
    assert pools is handle.layers["2.up"].__dict__["pools"] is model.peftfast_shared["pools_0"]
    twin = copy.deepcopy(model)
    assert twin[0].up.__dict__["pools"] is twin.peftfast_shared["pools_0"] is not pools


def test_mtlora(tmp_path: Path) -> None:
    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        rows = []
        for row, task in zip(x, IDS.tolist(), strict=True):
            delta = 6.0 / 3 * p["lora_B"] @ p["lora_A"] + 6.0 / 2 * p["task_B"][task] @ p["task_A"][task]
            rows.append(base(layer, row) + delta @ row)
        return torch.stack(rows)

    given = {"n_tasks": 3, "r": 3, "r_task": 2, "lora_alpha": 6.0, "prepare": on_tasks, "files": False}
    handle = check_shared("mtlora", forward, count=(3 + 3 * 2) * (UP + DOWN), tmp_path=tmp_path, **given)
    check_shared("mtlora", forward, count=(3 + 6) * (UP + DOWN), four_bit=True, tmp_path=tmp_path, **given)
    x = batches(1)[0]["x"]
    handle.runtime.current.ids = None
    with pytest.raises(ValueError, match="several tasks"):
        handle.model(x=x)
    with handle.runtime.tasks(IDS):
        expected = handle.model(x=x).logits
        peftfast.save_adapter(handle.model, tmp_path)
    for wrong, error in ((IDS[:3], ValueError), (IDS + 1, ValueError), (IDS.float(), TypeError)):
        with pytest.raises(error, match="task_ids"), handle.runtime.tasks(wrong):
            handle.model(x=x)
    assert handle.runtime.current.ids is None
    loaded = peftfast.load_adapter(Mlp(), tmp_path)
    with loaded.peftfast_handle.runtime.tasks(IDS):
        torch.testing.assert_close(loaded(x=x).logits, expected, rtol=1e-9, atol=1e-9)


class Sequences(Mlp):
    """The small model on [batch, 2, K], as PEFT's Poly takes it."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(torch.stack([x, x.flip(1)], 1)).logits.mean(1)


@pytest.mark.parametrize("heads", [1, 2])
def test_poly_is_pefts(heads: int, tmp_path: Path) -> None:
    """The same seed gives PEFT's noise: outputs in training and evaluation, gradients, and the files both ways."""
    given = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": heads}
    stock = peft.get_peft_model(Sequences(), peft.PolyConfig(target_modules=["up", "down"], **given))
    model = Sequences()
    handle = peftfast.adapt(model, "poly" if heads == 1 else "poly-mhr", target_modules=["up", "down"], **given)
    assert handle.trainable == 2 * 3 * (UP + DOWN) + 2 * 3 * 2 * heads
    x = batches(1)[0]["x"]
    with handle.runtime.tasks(IDS):
        torch.testing.assert_close(model(x), Sequences()(x), rtol=0, atol=1e-12)
    stir(handle, 0.3)
    pairs = []
    for path, layer in handle.layers.items():
        other = stock.base_model.model.get_submodule(path)
        pairs += [(layer.poly_lora_A, other.poly_lora_A["default"]), (layer.poly_lora_B, other.poly_lora_B["default"])]
        pairs.append((layer.module_logits, other.poly_router["default"].module_logits))
    with torch.no_grad():
        for mine, theirs in pairs:
            theirs.copy_(mine)
    for training in (True, False):
        model.train(training)
        stock.train(training)
        torch.manual_seed(9)
        expected = stock.base_model(x, task_ids=IDS)
        torch.manual_seed(9)
        with handle.runtime.tasks(IDS):
            found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # PEFT's router is float32
        expected.square().sum().backward()
        found.square().sum().backward()
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.grad, theirs.grad.to(mine.dtype), rtol=1e-4, atol=1e-5)
            mine.grad = theirs.grad = None
    peftfast.save_adapter(model, tmp_path / "mine")
    stock.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(Sequences(), tmp_path / "mine").eval()
    torch.testing.assert_close(loaded.base_model(x, task_ids=IDS), found, rtol=1e-6, atol=1e-6)
    back = peftfast.load_adapter(Sequences(), tmp_path / "theirs").eval()
    assert back.peftfast_handle.method.name == "poly" and back.peftfast_handle.options.n_splits == heads
    with back.peftfast_handle.runtime.tasks(IDS):
        torch.testing.assert_close(back(x), expected, rtol=1e-6, atol=1e-6)


def test_poly_formula(tmp_path: Path) -> None:
    """In evaluation, five steps without noise, each row on its own; and on a 4-bit base."""

    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        rows = []
        for row, task in zip(x, IDS.tolist(), strict=True):
            weights = p["module_logits"][task].sigmoid()
            weights = weights / (weights.sum() + 1e-12)
            a = sum(weights[s] * p["poly_lora_A"][0, s] for s in range(2))
            b = sum(weights[s] * p["poly_lora_B"][0, s] for s in range(2))
            rows.append(base(layer, row) + row @ a @ b / 3)
        return torch.stack(rows)

    def prepare(handle: Any) -> None:
        on_tasks(handle)
        handle.model.eval()

    given = {"r": 3, "n_tasks": 3, "n_skills": 2, "prepare": prepare, "files": False}
    count = 2 * 3 * (UP + DOWN) + 2 * 6
    check_shared("poly", forward, count=count, tmp_path=tmp_path, **given)
    check_shared("poly", forward, count=count, four_bit=True, tmp_path=tmp_path, **given)


def top(logits: Tensor, k: int) -> Tensor:
    """Gates [M, E] of each row's k largest logits by a loop: softmax over those."""
    rows = []
    for row in logits:
        chosen = row.argsort(descending=True)[:k]
        rows.append(torch.zeros_like(row).scatter(0, chosen, row[chosen].softmax(0)))
    return torch.stack(rows)


def loop_of(scaling: float, gates_of: Callable[[Any, Tensor, P], Tensor]) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        gates = gates_of(layer, x, p)
        y = base(layer, x)
        for e in range(gates.shape[1]):
            y = y + scaling * gates[:, e : e + 1] * (x @ p["lora_A"][e].T @ p["lora_B"][e].T)
        return y

    return forward


def balance_of(logits: Tensor, k: int) -> Tensor:
    experts = logits.shape[1]
    probabilities = logits.softmax(-1)
    counts = torch.zeros(experts, dtype=logits.dtype)
    for row in logits.argsort(descending=True)[:, :k].tolist():
        for e in row:
            counts[e] += 1 / (k * len(logits))
    return experts * (counts * probabilities.mean(0)).sum()


@pytest.mark.parametrize(("experts", "r", "top_k", "kernel"), [(5, 2, 2, False), (8, 6, 2, True), (3, 2, 1, True)])
def test_mola(experts: int, r: int, top_k: int, kernel: bool, tmp_path: Path) -> None:
    """By the several-adapters kernel, and as one factor with gates: both are the loop over experts, loss included."""

    def gates(layer: Any, x: Tensor, p: P) -> Tensor:
        layer.logits = x @ p["router"].T
        return top(layer.logits, top_k)

    def penalty(plain: Any) -> Tensor:
        return 0.5 * (balance_of(plain.up.logits, top_k) + balance_of(plain.down.logits, top_k)) / 2

    given = {"experts": (experts, experts), "r": r, "top_k": top_k, "lora_alpha": 2.0 * r, "balance": 0.5}
    count = experts * (r * (UP + DOWN) + 48 + 64)
    handle = check_shared("mola", loop_of(2.0, gates), count=count, penalty=penalty, tmp_path=tmp_path, **given)
    assert {layer.kernel_is_less(top_k) for layer in handle.layers.values()} == {kernel}
    check_shared(
        "mola", loop_of(2.0, gates), count=count, penalty=penalty, four_bit=True, tmp_path=tmp_path / "4", **given
    )
    with pytest.raises(RuntimeError, match="mola cannot be merged"):
        handle.merge()


def test_mola_counts_by_depth() -> None:
    model = nn.ModuleList([Mlp() for _ in range(4)])
    handle = peftfast.adapt(model, "mola", target_modules=["up", "down"], experts=(2, 3, 4, 5))
    assert [len(handle.layers[f"{i}.up"].lora_A) for i in range(4)] == [2, 3, 4, 5]
    model[0](**batches(1)[0]).loss.backward()  # a loss that is not taken does not stop a copy
    assert copy.deepcopy(model)[0].up.record is None
    assert 0 < float(handle.loss()) and handle.loss() == 0.0


def test_tokens_are_not_looped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the kernel a layer, whatever the experts and tokens."""
    calls = []
    original = peftfast.functional.multi_lora_linear

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(peftfast.functional, "multi_lora_linear", counted)
    adapted("mola", experts=(8,), r=6, top_k=2).model(**batches(1)[0])
    assert calls == [24, 24]


def test_balance_is_one_when_even() -> None:
    probabilities = torch.full((8, 4), 0.25)
    chosen = torch.arange(8)[:, None] % 4
    assert float(load_balance(probabilities, chosen)) == pytest.approx(1.0)
    assert (
        float(load_balance(torch.eye(4)[torch.zeros(8, dtype=torch.long)], torch.zeros(8, 1, dtype=torch.long))) == 4.0
    )


@pytest.mark.parametrize(("experts", "r", "top_k"), [(4, 2, 2), (8, 6, 2), (3, 2, 1)])
def test_mixlora(experts: int, r: int, top_k: int, tmp_path: Path) -> None:
    """Each expert's FFN by itself for all tokens, then weighed: ways of both costs."""
    state: dict[str, Any] = {}

    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        if layer.weight.shape[0] == 64:  # the first layer: the stack of all experts' outputs
            logits = x @ shared["router_0.weight"].T
            state.update(gates=top(logits, top_k), logits=logits)
            return torch.stack([base(layer, x) + 2.0 * x @ p["lora_A"][e].T @ p["lora_B"][e].T for e in range(experts)])
        y = 0.0
        for e in range(experts):
            own = base(layer, x[e]) + 2.0 * x[e] @ p["lora_A"][e].T @ p["lora_B"][e].T
            y = y + state["gates"][:, e : e + 1] * own
        return y

    given = {"experts": experts, "r": r, "top_k": top_k, "lora_alpha": 2.0 * r, "balance": 0.5}
    given |= {"entering": ("up",), "leaving": ("down",)}
    count = experts * (r * (UP + DOWN) + 48)

    def penalty(plain: Any) -> Tensor:
        return 0.5 * (experts * (state["logits"].softmax(-1).mean(0) * first_part(state["logits"])).sum())

    check_shared("mixlora", forward, count=count, penalty=penalty, tmp_path=tmp_path, **given)
    check_shared("mixlora", forward, count=count, penalty=penalty, four_bit=True, tmp_path=tmp_path / "4", **given)


def first_part(logits: Tensor) -> Tensor:
    return functional.one_hot(logits.argmax(-1), logits.shape[1]).to(logits.dtype).mean(0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_mixlora_finds_ffns(name: str, tmp_path: Path) -> None:
    """In a real model: exact at step 0, LoRA on attention, gradients everywhere, files."""
    from tests.support import small_models

    try:
        model, batch = small_models.base(name), small_models.text_batches(name, 1)[0]
    except (KeyError, ValueError):
        pytest.skip(f"no small {name}")
    before = model(**batch).logits.detach()
    handle = peftfast.adapt(model, "mixlora", experts=3, r=2, lora_alpha=4.0)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, ExpertLinear) for layer in handle.layers.values())
    assert any(not isinstance(layer, ExpertLinear) for layer in handle.layers.values())
    stir(handle)
    (model(**batch).loss + handle.loss()).backward()
    assert all(p.grad is not None for p in handle.adapter_parameters())
    peftfast.save_adapter(model, tmp_path)
    loaded = peftfast.load_adapter(small_models.base(name), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_mixlora_needs_whole_ffns() -> None:
    for targets, match in ((["up"], "no last one"), (["head"], "found no FFN")):
        with pytest.raises(ValueError, match=match):
            peftfast.adapt(Mlp(), "mixlora", target_modules=targets, entering=("up",), leaving=("down",))


def test_loramoe(tmp_path: Path) -> None:
    types = IDS % 2

    def gates(layer: Any, x: Tensor, p: P) -> Tensor:
        layer.gates = (x @ p["router"].T).softmax(-1)
        return layer.gates

    def penalty(plain: Any) -> Tensor:
        total = 0.0
        for layer in (plain.up, plain.down):
            rows = []
            for row, kind in zip(layer.gates, types.tolist(), strict=True):
                factor = torch.tensor([1.2 if (e >= 2) == (kind == 1) else 0.8 for e in range(4)], dtype=row.dtype)
                rows.append(row * factor)
            z = torch.stack(rows)
            total = total + (z - z.mean()).square().mean() / z.mean()
        return 0.5 * total / 2

    def prepare(handle: Any) -> None:
        handle.runtime.current.ids = types

    given = {"experts": 4, "r": 2, "lora_alpha": 4.0, "delta": 0.2, "balance": 0.5, "prepare": prepare}
    count = 4 * (2 * (UP + DOWN) + 48 + 64)
    check_shared("loramoe", loop_of(2.0, gates), count=count, penalty=penalty, tmp_path=tmp_path, **given)
    check_shared(
        "loramoe", loop_of(2.0, gates), count=count, penalty=penalty, four_bit=True, tmp_path=tmp_path / "4", **given
    )


def test_meteora(tmp_path: Path) -> None:
    """Adapters of several ranks and scalings from files, frozen; the routers trained with their cross-entropy."""
    folders = []
    for number, (r, alpha) in enumerate(((2, 4.0), (3, 9.0), (1, 1.0))):
        torch.manual_seed(number)
        one = peftfast.adapt(Mlp(), "lora", target_modules=["up", "down"][: 2 - number % 2], r=r, lora_alpha=alpha)
        stir(one, 0.3 + number / 10)
        folders.append(str(tmp_path / str(number)))
        peftfast.save_adapter(one.model, folders[-1])
    deltas: dict[int, list[Tensor]] = {64: [], 40: []}
    for folder in folders:
        loaded = peftfast.load_adapter(Mlp(), folder)
        for path, n in (("up", 64), ("down", 40)):
            layer = getattr(loaded, path)
            own = (
                layer.scaling * layer.lora_B @ layer.lora_A
                if hasattr(layer, "lora_A")
                else torch.zeros_like(layer.weight)
            )
            deltas[n].append(own.detach())

    def forward(layer: Any, x: Tensor, p: P, shared: P) -> Tensor:
        layer.logits = x @ p["router"].T
        gates, y = top(layer.logits, 2), base(layer, x)
        for j, delta in enumerate(deltas[len(layer.weight)]):
            y = y + gates[:, j : j + 1] * (x @ delta.T)
        return y

    def penalty(plain: Any) -> Tensor:
        return 0.5 * sum(functional.cross_entropy(layer.logits, IDS) for layer in (plain.up, plain.down)) / 2

    given = {"adapters": tuple(folders), "r": 3, "gate_loss": 0.5, "prepare": on_tasks, "exact": False}
    handle = check_shared("meteora", forward, count=3 * (48 + 64), penalty=penalty, tmp_path=tmp_path / "m", **given)
    handle.runtime.current.ids = None
    handle.model(**batches(1)[0])
    assert handle.loss() == 0.0
    with pytest.raises(ValueError, match="r: expected at least the largest rank among the adapters, 3, got 2"):
        adapted("meteora", adapters=tuple(folders), r=2)
    with pytest.raises(ValueError, match="adapters: no adapter_config.json in"):
        adapted("meteora", adapters=(str(tmp_path / "none"),), top_k=1)
    four = adapted("meteora", dtype=torch.float32, four_bit=True, n_adapters=3, train_adapters=True)
    stir(four)
    plain, values = formula_model(four, loop_of(2.0, lambda layer, x, p: top(x @ p["router"].T, 2)))
    batch = batches(1, torch.float32)[0]
    torch.testing.assert_close(four.model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
    check_files(four, tmp_path / "four", four_bit=True, tolerance=1e-5)
    assert values


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("mos", {"private": 3}, "private: expected 0 to 2"),
        ("mos", {"shards": 7}, "no multiples of shards = 7"),
        ("mos", {"private": 2, "budget": 2}, "nothing is left to share"),
        ("mtlora", {"n_tasks": 0}, "n_tasks: expected an int"),
        ("poly", {"n_splits": 7}, "no multiples of n_splits = 7"),
        ("mola", {"experts": ()}, "experts: expected a tuple"),
        ("mola", {"top_k": 3}, "top_k: expected at most the fewest experts, 2, got 3"),
        ("mixlora", {"top_k": 9}, "top_k: expected at most experts = 8"),
        ("loramoe", {"experts": 5}, "experts: expected a multiple of n_types = 2"),
        ("loramoe", {"delta": 2.0}, "delta, balance: expected"),
        ("meteora", {}, "n_adapters: expected an int"),
        ("meteora", {"n_adapters": 2, "top_k": 3}, "top_k: expected at most n_adapters = 2"),
        ("meteora", {"adapters": "folder"}, "adapters: expected a sequence"),
    ],
)
def test_bad_options(name: str, given: dict, match: str) -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        peftfast.adapt(model, name, target_modules=["up", "down"], **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
