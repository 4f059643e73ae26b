"""SpIEL, S2FT and the compact form of a sparse delta."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast.functional as F
from peftfast.functional.sparse_delta import dvalues as layer_dvalues
from peftfast.methods import S2FT, SpIEL
from peftfast.methods.compact import compress, decompress
from peftfast.nn import SparseDeltaLinear
from peftfast.optim import SparseAdamW, SparseSM3
from peftfast.reference import sparse_delta as definition

N, K = 12, 10


class Net(nn.Module):
    def __init__(self, resident: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = SparseDeltaLinear.from_linear(nn.Linear(K, N), density=0.1, resident=resident)
        self.b = SparseDeltaLinear.from_linear(nn.Linear(N, 3), density=0.2, resident=resident)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def values(self) -> list[nn.Parameter]:
        return [self.a.delta_values, self.b.delta_values]


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, K, generator=generator) for _ in range(count)]


def train(net: Net, optimizer: torch.optim.Optimizer, method: SpIEL | None, given: list[Tensor]) -> list[bool]:
    moved = []
    for x in given:
        optimizer.zero_grad()
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if method is not None:
            moved.append(method.step())
    return moved


def spiel(net: Net, optimizer: torch.optim.Optimizer, **options: Any) -> SpIEL:
    given = {"total_steps": 40, "reselection_steps": 10, "accumulation_steps": 3, **options}
    return SpIEL(net, optimizer, **given)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulated_gradients_choose_as_dense_ones_do(parts: int) -> None:
    """Every state after a phase, from dense gradients and the published rules; g is the gradient of the whole batch, also where it is
    the sum of backward passes over micro-batches of a loss that is divided by their number."""
    net = Net()
    optimizer = SparseAdamW(net.values(), lr=1e-2, betas=(0.9, 0.99))
    method = spiel(net, optimizer)
    layer = net.a
    seen: list[Tensor] = []
    inner = layer._observer

    def observer(dy: Tensor, x: Tensor) -> None:
        seen.append(dy.T @ x)
        inner(dy, x)

    layer._observer = observer
    count = layer.delta_values.numel()
    for batch in batches(3):
        optimizer.zero_grad()
        for x in batch.chunk(parts):
            ((net(x) - x.sum(1, keepdim=True)).square().mean() / parts).backward()
        optimizer.step()
        before = {
            "indices": layer.delta_indices.clone(),
            "values": layer.delta_values.detach().clone(),
            **{name: state.clone() for name, state in optimizer.state[layer.delta_values].items()},
        }
        moved = method.step()
    assert moved and len(seen) == 3 * parts and method.completed_steps == 3
    whole = [torch.stack(seen[k : k + parts]).sum(0) for k in range(0, len(seen), parts)]
    # The first phase drops everything (p = 1): the new support is the candidates, those kept by having been active among them.
    candidates = definition.top_positions(seen[0].abs(), count)
    assert torch.equal(layer.delta_indices.long(), candidates)
    stayed = torch.isin(candidates, before["indices"].long())
    at = torch.searchsorted(before["indices"].long(), candidates[stayed])
    assert 0 < int(stayed.sum()) < count
    sums = sum(whole).flatten()[candidates]
    squares = sum(g * g for g in whole).flatten()[candidates]
    state = optimizer.state[layer.delta_values]
    for name, grown, old in (
        ("exp_avg", sums / 3 * (1 - 0.9**3), before["exp_avg"]),
        ("exp_avg_sq", squares / 3 * (1 - 0.99**3), before["exp_avg_sq"]),
        ("age", torch.full((count,), 3), before["age"]),
        ("values", torch.zeros(count), before["values"]),
    ):
        expected = grown.clone().to(old.dtype)
        expected[stayed] = old[at]
        actual = layer.delta_values.detach() if name == "values" else state[name]
        assert torch.allclose(actual.double(), expected.double(), rtol=1e-5, atol=1e-7), name
    assert layer.delta_values.grad is None and layer._observer is None


def test_drops_the_smallest_and_grows_the_largest() -> None:
    net = Net()
    optimizer = SparseAdamW(net.values(), lr=1e-2)
    method = spiel(net, optimizer, initial_rate=0.5)
    train(net, optimizer, method, batches(12))
    before, values = net.a.delta_indices.long().clone(), net.a.delta_values.detach().clone()
    assert net.a._observer is not None and method._candidates[0].steps == 3
    candidates = method._candidates[0]
    sums, positions = candidates.sums.clone(), candidates.indices.long().clone()
    net.a._observer = None  # the sums stay as they are
    optimizer.zero_grad()
    method.completed_steps = 12
    rate = 0.5 * (1 - 13 / 40)
    drop = int(values.numel() * rate)
    assert method.step() and method.completed_steps == 13
    dropped = torch.topk(values.abs(), drop, largest=False).indices
    staying = before[~torch.isin(torch.arange(before.numel()), dropped)]
    free = ~torch.isin(positions, staying)
    grown = positions[free][torch.topk(sums[free].abs(), min(drop, int(free.sum()))).indices]
    lost = before[dropped]
    unreplaced = lost[~torch.isin(lost, grown)][: int((~torch.isin(grown, lost)).sum())]
    expected = torch.cat((before[~torch.isin(before, unreplaced)], grown[~torch.isin(grown, lost)])).sort().values
    assert torch.equal(net.a.delta_indices.long(), expected)
    kept = torch.isin(net.a.delta_indices.long(), before)
    assert torch.equal(net.a.delta_values[kept], values[torch.isin(before, net.a.delta_indices.long())])
    assert (net.a.delta_values[~kept] == 0).all() and (~kept).any()


def test_by_accumulators() -> None:
    net = Net()
    optimizer = SparseSM3(net.values(), lr=1e-2)
    method = spiel(net, optimizer)
    train(net, optimizer, None, batches(2))
    method.completed_steps = 2
    train(net, optimizer, None, batches(1, 4))
    state = optimizer.state[net.a.delta_values]
    before = net.a.delta_indices.long().clone()
    rows, columns = state["rows"].clone(), state["columns"].clone()
    assert net.a._observer is None and method.step()
    # p = 1: every active weight goes, and the largest free products come.
    expected = definition.top_positions(torch.outer(rows, columns), before.numel(), before)
    assert torch.equal(net.a.delta_indices.long(), expected)
    assert torch.equal(state["rows"], rows) and torch.equal(state["columns"], columns)
    assert (net.a.delta_values == 0).all()


def test_sm3_takes_a_closure() -> None:
    """Which is called once, with gradients on, whatever is around the step."""
    stepped, closed = Net(), Net()
    (x,) = batches(1)
    train(stepped, SparseSM3(stepped.values(), lr=0.1), None, [x])
    optimizer = SparseSM3(closed.values(), lr=0.1)

    def closure() -> Tensor:
        loss = (closed(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) > 0
    assert all(torch.equal(a, b) for a, b in zip(stepped.values(), closed.values(), strict=True))
    assert stepped.a.delta_values.any()


def test_sm3_is_the_definition() -> None:
    net = Net()
    optimizer = SparseSM3(net.values(), lr=0.1, eps=1e-6)
    value, rows, columns = net.a.delta_values.detach().clone(), torch.zeros(N), torch.zeros(K)
    row, column = net.a.delta_indices.long() // K, net.a.delta_indices.long() % K
    for x in batches(3):
        net.zero_grad()
        net(x).square().mean().backward()
        g = net.a.delta_values.grad.clone()
        optimizer.step()
        bound = torch.minimum(rows[row], columns[column]) + g * g
        value = value - 0.1 * g / (bound + 1e-6).sqrt()
        for k in range(bound.numel()):
            rows[row[k]] = max(rows[row[k]], bound[k])
            columns[column[k]] = max(columns[column[k]], bound[k])
    state = optimizer.state[net.a.delta_values]
    assert torch.allclose(net.a.delta_values, value) and torch.equal(state["rows"], rows)
    assert torch.equal(state["columns"], columns)


@pytest.mark.parametrize("kind", ["accumulated", "accumulators"])
@pytest.mark.parametrize("resident", [False, True])
def test_a_run_trains_and_its_bases_survive(kind: str, resident: bool) -> None:
    net = Net(resident)
    bases = [layer.state_dict()["weight"] for layer in (net.a, net.b)]
    optimizer: Any = SparseAdamW(net.values(), lr=2e-2) if kind == "accumulated" else SparseSM3(net.values(), lr=0.2)
    method = spiel(net, optimizer)
    given = batches(2) * 20

    def loss() -> float:
        with torch.no_grad():
            return sum((net(x) - x.sum(1, keepdim=True)).square().mean().item() for x in given[:2])

    first = loss()
    moved = train(net, optimizer, method, given)
    assert [k + 1 for k, m in enumerate(moved) if m] == [3, 13, 23, 33]
    assert loss() < 0.8 * first
    for layer, base in zip((net.a, net.b), bases, strict=True):
        assert torch.equal(layer.delta_indices, layer.delta_indices.sort().values)
        assert layer.delta_indices.unique().numel() == layer.delta_values.numel()
        layer.unmerge()
        assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("optimizer_of", [SparseAdamW, SparseSM3])
@pytest.mark.parametrize("stop", [1, 2, 5, 11])
def test_resumes_in_the_middle(stop: int, optimizer_of: Any) -> None:
    """In a phase, between phases, and in the second phase: a resumed run ends where the whole one does, bit for bit."""
    given = batches(16)
    resident = stop == 2
    whole = Net(resident)
    optimizer = optimizer_of(whole.values(), lr=1e-2)
    train(whole, optimizer, spiel(whole, optimizer), given)
    first = Net(resident)
    optimizer = optimizer_of(first.values(), lr=1e-2)
    method = spiel(first, optimizer)
    train(first, optimizer, method, given[:stop])
    assert all(found.steps == stop for found in method._candidates.values()) or stop > 2
    stream = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), method.state_dict()], stream)
    stream.seek(0)
    states = torch.load(stream)
    second = Net(resident)
    optimizer = optimizer_of(second.values(), lr=1e-2)
    method = spiel(second, optimizer)
    for one, state in zip((second, optimizer, method), states, strict=True):
        one.load_state_dict(state)
    train(second, optimizer, method, given[stop:])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_resumes_between_the_passes_of_a_step() -> None:
    """Saved after the first of two backward passes, their gradients beside it: the sum of both is what is squared."""

    def half(net: Net, x: Tensor) -> None:
        ((net(x) - x.sum(1, keepdim=True)).square().mean() / 2).backward()

    def finish(net: Net, optimizer: torch.optim.Optimizer, method: SpIEL) -> Net:
        half(net, given[1])
        optimizer.step()
        method.step()
        train(net, optimizer, method, given[2:])
        return net

    given, runs = batches(8), []
    for resumed in (False, True):
        net = Net()
        optimizer = SparseAdamW(net.values(), lr=1e-2)
        method = spiel(net, optimizer)
        half(net, given[0])
        if resumed:
            states = copy.deepcopy([net.state_dict(), optimizer.state_dict(), method.state_dict()])
            grads = [p.grad for p in net.values()]
            net = Net()
            optimizer = SparseAdamW(net.values(), lr=1e-2)
            method = spiel(net, optimizer)
            for one, state in zip((net, optimizer, method), states, strict=True):
                one.load_state_dict(state)
            for parameter, grad in zip(net.values(), grads, strict=True):
                parameter.grad = grad.clone()
            assert method._candidates[0].pending is not None
        runs.append(finish(net, optimizer, method))
    for name, tensor in runs[0].state_dict().items():
        assert torch.equal(tensor, runs[1].state_dict()[name]), name


@pytest.mark.parametrize("optimizer_of", [SparseAdamW, SparseSM3])
def test_a_selection_holds_no_matrix(optimizer_of: Any) -> None:
    """Of 2048 x 2048 weights, 16 MiB in float32, 0.05 % are active: no allocation of a phase is larger than one slab of scores, 2^18,
    and what is chosen from it."""
    layer = SparseDeltaLinear.from_linear(nn.Linear(2048, 2048, bias=False), density=5e-4)
    optimizer = optimizer_of([layer.delta_values])
    method = SpIEL([layer], optimizer, total_steps=9, reselection_steps=2, accumulation_steps=1)
    x, dy = torch.randn(4, 2048), torch.randn(4, 2048)
    with torch.profiler.profile(profile_memory=True) as profile:
        if layer._observer is not None:
            layer._observer(dy, x)
        layer.delta_values.grad = layer_dvalues(dy, x, layer.pattern, torch.float32)
        optimizer.step()
        assert method.step() and method.moved > 0
    largest = max((event.self_cpu_memory_usage for event in profile.events() if event.name), default=0)
    assert 0 < largest <= 8 << 18


def test_phases_that_follow_each_other_at_once() -> None:
    """Candidates of a phase that ends in the step ahead of which the next begins are used before they are dropped."""
    net = Net()
    optimizer = SparseAdamW(net.values(), lr=1e-2)
    method = spiel(net, optimizer, reselection_steps=4, accumulation_steps=3, total_steps=20, initial_rate=1.0)
    counts = []
    for x in batches(19):
        if train(net, optimizer, method, [x])[0]:
            counts.append(method.moved)
    assert len(counts) == 5 and min(counts[:3]) > 0, counts
    # No phase begins that would end behind the last step.
    assert net.a._observer is None


def test_schedules() -> None:
    net = Net()
    optimizer = SparseAdamW(net.values())
    for schedule, expected in (("linear", 0.2 * 0.75), ("cosine", 0.1 * (1 + math.cos(math.pi * 0.25)))):
        method = spiel(net, optimizer, schedule=schedule)
        method.completed_steps = 3
        assert method.rate() == 1.0
        method.completed_steps = 10
        assert method.rate() == pytest.approx(expected)


def test_a_copied_layer_is_observed_by_nobody() -> None:
    net = Net()
    spiel(net, SparseAdamW(net.values()))
    assert net.a._observer is not None and copy.deepcopy(net).a._observer is None


def bad_spiel() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    net = Net()
    optimizer = SparseAdamW(net.values())
    return {
        "layers": (
            ValueError,
            "model: expected SparseDeltaLinear",
            lambda: SpIEL(nn.Linear(2, 2), optimizer, total_steps=9),
        ),
        "optimizer": (
            TypeError,
            "optimizer: expected a SparseAdamW",
            lambda: spiel(net, torch.optim.SGD(net.values(), lr=1.0)),
        ),
        "other layers": (ValueError, "optimizer: expected the delta_values", lambda: spiel(Net(), optimizer)),
        "steps": (ValueError, "total_steps: expected", lambda: spiel(net, optimizer, total_steps=0)),
        "accumulation": (
            ValueError,
            "accumulation_steps: expected fewer",
            lambda: spiel(net, optimizer, accumulation_steps=10),
        ),
        "rate": (ValueError, "initial_rate: expected", lambda: spiel(net, optimizer, initial_rate=0.0)),
        "schedule": (ValueError, "schedule: expected", lambda: spiel(net, optimizer, schedule="step")),
        "sm3 params": (
            TypeError,
            "params: expected the delta_values",
            lambda: SparseSM3([nn.Parameter(torch.ones(2))]),
        ),
        "sm3 lr": (ValueError, "lr: expected", lambda: SparseSM3(net.values(), lr=-1)),
    }


@pytest.mark.parametrize("name", bad_spiel())
def test_bad_spiel(name: str) -> None:
    kind, message, call = bad_spiel()[name]
    with pytest.raises(kind, match=message):
        call()


# S2FT.


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        **options,
    )
    return LlamaForCausalLM(config)


TOKENS = torch.arange(40).reshape(2, 20) % 64


@pytest.mark.parametrize("bias", [False, True])
def test_s2ft_permutes_and_trains_and_restores(bias: bool) -> None:
    model = llama(attention_bias=bias, mlp_bias=bias)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    method = S2FT(model, head_ratio=0.34, channel_ratio=0.1, generator=torch.Generator().manual_seed(3))
    assert set(method.layers) == {
        f"model.layers.{k}.{name}" for k in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert [layer.pattern.parts.tolist() for layer in method.layers.values()][:2] == [list(range(16)), list(range(8))]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=TOKENS).logits, expected, atol=1e-5)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in method.parameters()}
    optimizer = SparseAdamW(trained, lr=3e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        adapted = model(input_ids=TOKENS).logits
        method.restore()
        method.restore()
        assert torch.allclose(model(input_ids=TOKENS).logits, adapted, atol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert {name.rsplit(".", 1)[1] for name in state.keys() - before.keys()} == {"delta_values", "delta_indices"}


def test_s2ft_gradients_are_those_of_the_columns() -> None:
    model, plain = llama(), llama()
    method = S2FT(model, head_ratio=0.34, channel_ratio=0.1, resident=False, generator=torch.Generator().manual_seed(3))
    for net in (model, plain):
        net(input_ids=TOKENS, labels=TOKENS).loss.backward()
    method_order = method._coupled["model.layers.1.mlp.down_proj"].order
    dense = plain.model.layers[1].mlp.down_proj.weight.grad[:, method_order[:8]]
    slab = method.layers["model.layers.1.mlp.down_proj"].delta_values.grad.reshape(48, 8)
    assert torch.allclose(slab, dense, atol=1e-6)


def test_s2ft_of_bert() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=32,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=TOKENS)[0]
        method = S2FT(model, head_ratio=0.34, channel_ratio=0.1)
        assert torch.allclose(model(input_ids=TOKENS)[0], expected, atol=1e-5)
    assert len(method.layers) == 4
    assert [layer.pattern.parts.numel() for layer in method.layers.values()] == [16, 8, 16, 8]
    method.restore()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


# What a model has beside its layers that heads or channels would be moved past: norms over all heads or channels, a norm for each
# head, numbers by which heads are paired.
MOVED_PAST: dict[str, tuple[str, dict]] = {
    "Olmo2": ("q_norm.weight", {}),
    "Cohere": ("q_norm.weight", {"use_qk_norm": True}),
    "StableLm": ("q_layernorm.norms.0.weight", {"qk_layernorm": True}),
    "DiffLlama": ("lambda_q1", {}),
    "BitNet": ("attn_sub_norm.weight", {}),
}


@pytest.mark.parametrize("name", [*MOVED_PAST, "Qwen3"])
def test_s2ft_moves_heads_past_no_weights(name: str) -> None:
    import transformers

    held, options = MOVED_PAST.get(name, ("", {"head_dim": 8}))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(num_attention_heads=4, num_key_value_heads=2, **sizes, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # norms do not begin as all of them do
        expected = model(input_ids=TOKENS).logits
        if held:
            with pytest.raises(ValueError, match=f"^model: .*{held} of shape .* which s2ft would move past it"):
                S2FT(model, head_ratio=0.5, channel_ratio=0.3)
            assert torch.equal(model(input_ids=TOKENS).logits, expected)
        else:
            S2FT(model, head_ratio=0.5, channel_ratio=0.3)
            assert torch.allclose(model(input_ids=TOKENS).logits, expected, atol=1e-4)


def test_bad_s2ft() -> None:
    with pytest.raises(ValueError, match="model: expected blocks"):
        S2FT(nn.Linear(3, 3))
    model = llama()
    with pytest.raises(ValueError, match="head_ratio"):
        S2FT(model, head_ratio=0.0)
    model.model.layers[1].mlp.up_proj = nn.Identity()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="up_proj: expected an nn.Linear"):
        S2FT(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# The compact form.


@pytest.mark.parametrize("kept_as", ["bfloat16", "float16", "ternary"])
def test_compact_form(kept_as: str) -> None:
    pattern = F.choose_support(torch.empty(300, 500), 0.01, generator=torch.Generator().manual_seed(0))
    values = torch.randn(pattern.count)
    packed = compress(pattern.indices, values, pattern.shape, kept_as=kept_as)
    size = sum(tensor.nbytes for tensor in packed.values())
    assert size <= (2.2 if kept_as == "ternary" else 4.1) * pattern.count
    indices, found, shape = decompress(packed)
    assert torch.equal(indices, pattern.indices) and shape == pattern.shape
    if kept_as == "ternary":
        assert torch.equal(found, torch.where(values < 0, -1.0, 1.0) * values.abs().mean())
    else:
        assert torch.equal(found, values.to(getattr(torch, kept_as)).float())


def test_compact_form_of_long_gaps() -> None:
    """A distance less 1 of 65,534 is the longest that fits; 65,535 is the sign of a long one."""
    indices = torch.tensor([0, 65535, 65535 + 65536, 2**31 + 5, 2**31 + 6])
    packed = compress(indices, torch.ones(5), (2**16, 2**16), kept_as="float16")
    assert packed["long_gaps"].tolist() == [65535, 2**31 + 4 - (65535 + 65536)]
    found, _, _ = decompress(packed)
    assert torch.equal(found, indices)


def test_bad_compact_forms() -> None:
    indices, values = torch.tensor([1, 5]), torch.ones(2)
    packed = compress(indices, values, (2, 3))
    for change, message in (
        ({"gaps": packed["gaps"] + 9}, "indices: expected all below"),
        ({"long_gaps": torch.ones(1, dtype=torch.int64)}, "long_gaps: expected 0"),
        ({"values": torch.ones(3)}, "values: expected 2"),
        ({"shape": torch.tensor([2, 0])}, "shape: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress({**packed, **change})
    with pytest.raises(ValueError, match="packed: expected"):
        decompress({"gaps": packed["gaps"]})
    with pytest.raises(ValueError, match="kept_as"):
        compress(indices, values, (2, 3), kept_as="int8")
    with pytest.raises(ValueError, match="values: expected"):
        compress(indices, torch.ones(3), (2, 3))
    ternary = compress(indices, values, (2, 3), kept_as="ternary")
    with pytest.raises(ValueError, match="signs: expected 1"):
        decompress({**ternary, "signs": torch.zeros(2, dtype=torch.uint8)})
