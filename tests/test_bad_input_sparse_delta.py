"""What a stranger hands to the sparse delta: a clear error, and nothing written."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.methods import S2FT, SpIEL, load_shira, save_shira
from peftfast.methods.compact import compress, decompress
from peftfast.nn import LoRALinear, SparseDeltaLinear
from peftfast.optim import SparseAdamW, SparseSM3
from tests.test_methods_sparse_delta import Net, batches, llama, spiel, train

N, K = 48, 64


def layer(**options: Any) -> SparseDeltaLinear:
    torch.manual_seed(0)
    return SparseDeltaLinear.from_linear(nn.Linear(K, N), **{"density": 0.05, **options})


def tensors(*modules: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


def assert_unwritten(before: list[Tensor], *modules: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(*modules), strict=True))


ONE = torch.tensor([1])
PATTERNS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "more than 2**63": (ValueError, "shape: expected at most", lambda: F.SparsePattern(ONE, (2**40, 2**40))),
    "rows of floats": (TypeError, "rows: expected integers", lambda: F.SparsePattern.from_rows([0.5], (3, 4))),  # type: ignore[list-item]
    "rows of words": (TypeError, "rows: expected integers", lambda: F.SparsePattern.from_rows("ab", (3, 4))),  # type: ignore[arg-type]
    "one row": (TypeError, "rows: expected integers", lambda: F.SparsePattern.from_rows(3, (3, 4))),  # type: ignore[arg-type]
    "size of a block": (
        ValueError,
        "block_size: expected",
        lambda: F.SparsePattern.from_blocks([0], 16.0, (32, 32)),  # type: ignore[arg-type]
    ),
    "indices that are not there": (ValueError, "indices: expected on a device", lambda: layer(indices=ONE.to("meta"))),
    "generator": (TypeError, "generator: expected", lambda: layer(generator=3)),
    "weight that is not there": (
        ValueError,
        "linear: expected a weight that is there",
        lambda: SparseDeltaLinear.from_linear(nn.Linear(8, 8, device="meta")),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_supports(name: str) -> None:
    kind, message, call = PATTERNS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["x", "weight", "values"])
def test_operands_that_are_not_dense(name: str) -> None:
    pattern = F.SparsePattern(torch.tensor([1, 7]), (3, 4))
    given = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "values": torch.ones(2)}
    given[name] = given[name].to_sparse()
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor"):
        F.sparse_delta_linear(given["x"], given["weight"], pattern, given["values"])


def test_a_product_in_eight_bits_is_refused() -> None:
    pattern, x, weight = F.SparsePattern(ONE, (3, 4)), torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(TypeError, match="compute_dtype: expected a floating dtype of at least 16 bits"):
        F.sparse_delta_linear(x, weight, pattern, torch.ones(1), compute_dtype=torch.float8_e4m3fn)


INDICES: dict[str, tuple[type[Exception], str, Callable[[Tensor], Tensor]]] = {
    "unsorted": (ValueError, "unsorted", lambda at: at.flip(0)),
    "repeated": (ValueError, "repeated", lambda at: at.index_copy(0, torch.tensor([1]), at[:1])),
    "beyond": (ValueError, "all below", lambda at: at + N * K),
    "negative": (ValueError, "none below 0", lambda at: at - N * K),
    "floats": (TypeError, "int32 or int64", lambda at: at.float()),
    "spaced": (ValueError, "contiguous", lambda at: at.repeat_interleave(2)[::2]),
}


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("name", INDICES)
def test_indices_replaced_behind_a_layer(name: str, resident: bool) -> None:
    """Found at the next forward of many or few rows, and before an optimiser's step writes."""
    kind, message, change = INDICES[name]
    for optimiser_of in (SparseAdamW, SparseSM3):
        found = layer(resident=resident)
        optimiser: Any = optimiser_of([found.delta_values], lr=0.1)
        found(torch.ones(40, K)).sum().backward()
        found.delta_indices = change(found.delta_indices)
        before = tensors(found)
        for rows in (40, 2):
            with pytest.raises(kind, match=message):
                found(torch.ones(rows, K))
        if resident or optimiser_of is SparseSM3:
            with pytest.raises(kind, match=message):
                optimiser.step()
        assert_unwritten(before, found)


def test_an_input_that_is_no_tensor() -> None:
    for resident in (False, True):
        with pytest.raises(TypeError, match="x: expected"):
            layer(resident=resident)(None)


def test_indices_written_behind_a_layer() -> None:
    found = layer()
    found(torch.ones(2, K))
    found.delta_indices[0] = 10**6
    with pytest.raises(ValueError, match="indices: expected ascending"):
        found(torch.ones(2, K))
    slab = layer(indices=F.SparsePattern.from_columns([1, 2], (N, K)))
    slab.delta_indices = slab.delta_indices + 3
    with pytest.raises(ValueError, match="indices: expected those of the columns"):
        slab(torch.ones(2, K))
    slab.delta_indices = slab.delta_indices - 3
    assert slab(torch.ones(2, K)).shape == (2, N) and slab.pattern.structure == "columns"


@pytest.mark.parametrize(
    ("kind", "message", "changed", "positions"),
    [
        (ValueError, "changed: expected distinct", [10**6], [1]),
        (ValueError, "changed: expected distinct", [0, 0], [1, 2]),
        (ValueError, "changed: expected distinct", [-1], [1]),
        (TypeError, "positions: expected a vector", [0], [1.0]),
        (TypeError, "changed: expected a vector", [[0]], [1]),
    ],
)
def test_moving_a_support(kind: type[Exception], message: str, changed: Any, positions: Any) -> None:
    found = layer(indices=torch.tensor([5, 9]))
    before = tensors(found)
    with pytest.raises(kind, match=message):
        found.move_support(torch.tensor(changed), torch.tensor(positions))
    with pytest.raises(TypeError, match="changed: expected a vector of int32 or int64, got list"):
        found.move_support([0], [1])  # type: ignore[arg-type]
    assert_unwritten(before, found)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"delta_values": torch.ones(3)},
        {"delta_values": torch.ones(3), "delta_indices": torch.tensor([1, 2])},
        {"delta_indices": torch.tensor([1, 2])},
        {"delta_indices": [1, 2]},
    ],
    ids=["values", "both", "indices", "list"],
)
def test_state_dicts_that_do_not_fit(change: dict[str, Any], resident: bool) -> None:
    found = layer(resident=resident)
    before = tensors(found)
    with pytest.raises(RuntimeError, match="delta_indices: indices: expected"):
        found.load_state_dict({**copy.deepcopy(found.state_dict()), **change})
    assert_unwritten(before, found)


def test_a_support_without_its_values_starts_from_zero() -> None:
    found = layer(indices=torch.tensor([5, 9]))
    with torch.no_grad():
        found.delta_values.fill_(1.0)
    found.load_state_dict({"delta_indices": torch.tensor([3, 4])}, strict=False)
    assert found.delta_indices.tolist() == [3, 4] and found.delta_values.tolist() == [0, 0]


def test_optimiser_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [layer().delta_values]
    for kind, message, options in (
        (TypeError, "betas: expected two numbers, got float", {"betas": 0.9}),
        (TypeError, "betas: expected two numbers, got NoneType", {"betas": None}),
        (TypeError, "seed: expected an int", {"seed": 1.5}),
        (ValueError, "seed: expected 64 bits", {"seed": 2**64}),
    ):
        with pytest.raises(kind, match=message):
            SparseAdamW(values, **options)  # type: ignore[arg-type]
    import torch.distributed.tensor as sharded

    monkeypatch.setattr(sharded, "DTensor", type("DTensor", (Tensor,), {}))
    with pytest.raises(TypeError, match="params: expected tensors of one worker, got a DTensor"):
        SparseAdamW([torch.zeros(4).as_subclass(sharded.DTensor)])


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (ValueError, "state: expected .'age', 'exp_avg'", lambda s: s["state"][0].pop("age")),
        (ValueError, "state: expected", lambda s: s["param_groups"][0].update(state_bits=8)),
        (ValueError, "betas: expected", lambda s: s["param_groups"][0].update(betas=(2, 3))),
        (TypeError, "rounding_seed: expected", lambda s: s.update(rounding_seed="x")),
        (ValueError, "lr: expected", lambda s: s["param_groups"][0].update(lr=float("nan"))),
    ],
)
def test_optimiser_states(kind: type[Exception], message: str, change: Callable[[Any], Any]) -> None:
    found = layer()
    optimiser = SparseAdamW([found.delta_values], lr=0.1)
    found(torch.ones(40, K)).sum().backward()
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    change(state)
    with pytest.raises(kind, match=message):
        optimiser.load_state_dict(state)
    optimiser.step()
    assert optimiser.state[found.delta_values]["age"].tolist() == [2] * 154


def test_no_group_is_stepped_where_another_cannot_be() -> None:
    first, second = layer(), layer()
    groups = [{"params": [one.delta_values], "lr": rate} for one, rate in ((first, 0.1), (second, 0.2))]
    optimiser = SparseAdamW(groups)
    for one in (first, second):
        one(torch.ones(40, K)).sum().backward()
    optimiser.step()
    optimiser.state[second.delta_values]["exp_avg"] = torch.ones(3)
    before = tensors(first, second)
    with pytest.raises(RuntimeError, match="exp_avg: expected"):
        optimiser.step()
    assert_unwritten(before, first, second)


def _candidates(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["candidates"][0].update({name: change(state["candidates"][0][name])})


SPIEL: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], Any]]] = {
    "no steps": (ValueError, "state: expected", lambda s: s.pop("completed_steps")),
    "words": (ValueError, "completed_steps: expected", lambda s: s.update(completed_steps="3")),
    "before the first": (ValueError, "completed_steps: expected", lambda s: s.update(completed_steps=-1)),
    "beyond": (ValueError, "indices: expected all below", _candidates("indices", lambda at: at + 10**6)),
    "unsorted": (ValueError, "indices: expected ascending", _candidates("indices", lambda at: at.flip(0))),
    "floats": (TypeError, "indices: expected an int32", _candidates("indices", lambda at: at.float())),
    "sums": (ValueError, "sums: expected", _candidates("sums", lambda t: t[:-1])),
    "squares": (ValueError, "squares: expected", _candidates("squares", lambda t: None)),
    "too many steps": (ValueError, "steps: expected at most 3", _candidates("steps", lambda _: 4)),
    "no step": (ValueError, "steps: expected", _candidates("steps", lambda _: 0)),
    "another layer": (ValueError, "candidates: expected", lambda s: s["candidates"].update({9: s["candidates"][0]})),
    "a field": (ValueError, "candidates: expected", lambda s: s["candidates"][0].pop("pending")),
}


@pytest.mark.parametrize("name", SPIEL)
def test_states_of_spiel(name: str) -> None:
    kind, message, change = SPIEL[name]
    net = Net()
    optimiser = SparseAdamW(net.values(), lr=1e-2)
    method = spiel(net, optimiser)
    train(net, optimiser, method, batches(2))
    state, kept = copy.deepcopy(method.state_dict()), method._candidates
    change(state)
    with pytest.raises(kind, match=message):
        method.load_state_dict(state)
    assert method._candidates is kept and method.completed_steps == 2


def test_spiel_moves_no_layer_where_a_base_was_written() -> None:
    net = Net(resident=True)
    optimiser = SparseAdamW(net.values(), lr=1e-2)
    method = spiel(net, optimiser)
    train(net, optimiser, method, batches(2))
    train(net, optimiser, None, batches(1))
    with torch.no_grad():
        net.b.weight.add_(1.0)
    before = tensors(net)
    with pytest.raises(RuntimeError, match="weight: written by others"):
        method.step()
    assert_unwritten(before, net)


def test_spiel_arguments() -> None:
    net = Net()
    for kind, message, model, rate in (
        (TypeError, "initial_rate: expected a number", net, "a"),
        (ValueError, "initial_rate: expected", net, float("nan")),
        (TypeError, "model: expected a module", None, 0.2),
    ):
        with pytest.raises(kind, match=message):
            SpIEL(model, SparseAdamW(net.values()), total_steps=3, initial_rate=rate)  # type: ignore[arg-type]


COMPACT: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "gaps of floats": (TypeError, "gaps: expected a vector of torch.int16", {"gaps": torch.ones(3)}),
    "gaps of 64 bits": (TypeError, "gaps: expected", {"gaps": torch.tensor([2**40, 1, 1])}),
    "a list": (TypeError, "gaps: expected", {"gaps": [1, 2, 3]}),
    "a matrix": (TypeError, "gaps: expected a vector", {"gaps": torch.ones(1, 3, dtype=torch.int16)}),
    "a long gap below 0": (
        ValueError,
        "long_gaps: expected from 0",
        {"gaps": torch.tensor([-1, 1, 1], dtype=torch.int16), "long_gaps": torch.tensor([-7])},
    ),
    "long gaps that wrap around": (
        ValueError,
        "long_gaps: expected from 0",
        {"gaps": torch.tensor([-1, -1, 1], dtype=torch.int16), "long_gaps": torch.tensor([2**62, 2**62])},
    ),
    "a shape of floats": (TypeError, "shape: expected", {"shape": torch.tensor([3.0, 4.0])}),
    "a shape beyond": (ValueError, "shape: expected at most", {"shape": torch.tensor([2**62, 2**62])}),
    "values of ints": (TypeError, "values: expected", {"values": torch.tensor([1, 2, 3])}),
    "nothing": (TypeError, "values: expected", {"values": None}),
    "values and signs": (ValueError, "packed: expected", {"signs": torch.ones(1).byte(), "scale": torch.ones(1)}),
}


@pytest.mark.parametrize("name", COMPACT)
def test_compact_forms(name: str) -> None:
    kind, message, change = COMPACT[name]
    packed = compress(torch.tensor([1, 5, 9]), torch.ones(3), (3, 4))
    with pytest.raises(kind, match=message):
        decompress({**packed, **change})


def test_ternary_forms() -> None:
    packed = compress(torch.tensor([1, 5, 9]), torch.ones(3), (3, 4), kept_as="ternary")
    for kind, message, change in (
        (TypeError, "signs: expected a vector of torch.uint8", {"signs": torch.ones(1)}),
        (ValueError, "scale: expected one", {"scale": torch.ones(2)}),
        (ValueError, "scale: expected one", {"scale": torch.ones(0)}),
    ):
        with pytest.raises(kind, match=message):
            decompress({**packed, **change})
    with pytest.raises(TypeError, match="packed: expected"):
        decompress(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="indices: expected on a device"):
        compress(torch.tensor([1]).to("meta"), torch.ones(1), (3, 4))


def shira_net(adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Module()
    for name, (k, n) in {"first": (64, 128), "second": (128, 64)}.items():
        linear = nn.Linear(k, n)
        net.add_module(name, SparseDeltaLinear.from_linear(linear, density=384 / 8192) if adapted else linear)
    return net


VALUES, PLACES = (f"base_model.model.first.shira_{end}" for end in ("weight", "indices"))
SHIRA: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "indices of floats": ("in int32 or int64", lambda t: t.update({PLACES: t[PLACES].float()})),
    "indices of bytes": ("in int32 or int64", lambda t: t.update({PLACES: t[PLACES].byte()})),
    "values of ints": ("expected a floating vector", lambda t: t.update({VALUES: t[VALUES].int()})),
    "a matrix of values": ("floating vector", lambda t: t.update({VALUES: t[VALUES].reshape(2, -1).contiguous()})),
    "no values": ("expected a floating vector shira_weight, got none", lambda t: t.pop(VALUES)),
    "no indices": ("expected shira_indices", lambda t: t.pop(PLACES)),
}


@pytest.mark.parametrize("name", SHIRA)
def test_shira_files(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    message, change = SHIRA[name]
    save_shira(shira_net(True), tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    change(found)
    save_file(found, tmp_path / "adapter_model.safetensors")
    net = shira_net(False)
    with pytest.raises(ValueError, match=message):
        load_shira(net, tmp_path)
    assert all(type(module) is nn.Linear for module in net.children())


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    save_shira(shira_net(True), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_shira(shira_net(False), tmp_path)
    for config in ([], None):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="expected the peft_type SHIRA"):
            load_shira(shira_net(False), tmp_path)
    for call in (save_shira, load_shira):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got NoneType"):
            call(None, tmp_path)
    with pytest.raises(ValueError, match="modules_to_save: expected modules"):
        save_shira(shira_net(True), tmp_path / "other", modules_to_save=["head"])
    assert not (tmp_path / "other").exists()


def test_an_adapter_of_other_shapes(tmp_path: Path) -> None:
    """r (N + K) of the file's layer is no such number of the model's, whose indices would all lie within it."""
    net: Any = shira_net(True)
    save_shira(net, tmp_path)
    other: Any = shira_net(False)
    wide = other.first
    other.first = nn.Linear(wide.in_features + 1, wide.out_features)
    with pytest.raises(ValueError, match=r"first: expected r \(N \+ K\)"):
        load_shira(other, tmp_path)
    other.first, other.second = wide, LoRALinear.from_linear(other.second)
    with pytest.raises(ValueError, match="second: expected a layer of the model without an adapter; LoRALinear"):
        load_shira(other, tmp_path)
    assert other.first is wide


def test_an_adapter_into_a_base_that_was_written_changes_no_layer(tmp_path: Path) -> None:
    save_shira(shira_net(True), tmp_path)
    net: Any = shira_net(True)
    net.second.merge()
    with torch.no_grad():
        net.first.delta_values.fill_(1.0)
        net.second.weight.add_(1.0)
    before = tensors(net)
    with pytest.raises(RuntimeError, match="weight: written by others"):
        load_shira(net, tmp_path)
    assert_unwritten(before, net)


def _shared_module(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _shared_weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _spaced(model: Any) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().T.contiguous().T)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("expected layers with a weight of their own", _shared_module),
        ("expected layers with a weight of their own", _shared_weight),
        ("resident: model.layers.1.mlp.down_proj: expected a contiguous weight", _spaced),
    ],
    ids=["module", "weight", "strides"],
)
def test_s2ft_of_blocks_that_cannot_be_permuted(message: str, change: Callable[[Any], None]) -> None:
    model = llama()
    change(model)
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        S2FT(model)
    assert_unwritten(before, model)
    assert not any(isinstance(module, SparseDeltaLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_s2ft_arguments() -> None:
    for message, call in (
        ("model: expected a module", lambda: S2FT(None)),  # type: ignore[arg-type]
        ("generator: expected", lambda: S2FT(llama(), generator=3)),  # type: ignore[arg-type]
        ("head_ratio: expected a number", lambda: S2FT(llama(), head_ratio="a")),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            call()
