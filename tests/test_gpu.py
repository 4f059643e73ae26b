"""What only a GPU can show: graphs, streams, more than 2^31 elements, the numerics of matrix units, the same bits run to run."""

import gc

import pytest
import torch

from benchmarks import timing
from peftfast import functional as F
from peftfast import nn as fast
from peftfast import ops
from peftfast.configs import nf4_product
from peftfast.ops import native, philox, replay
from peftfast.ops import nf4 as ops_nf4
from peftfast.reference import lora as definition
from peftfast.reference import nf4 as nf4_definition
from peftfast.reference import philox as philox_definition
from tests.support.functions_ran import calls_by_library

pytestmark = pytest.mark.gpu
BF16, F32 = torch.bfloat16, torch.float32
WAYS = ("slabs", "overlapped", "fused")
BACKENDS = ("cuda", "triton", "reference")


def layer_inputs(m: int, n: int, k: int, r: int, dtype: torch.dtype = BF16, adapters: torch.dtype = F32) -> dict:
    generator = torch.Generator("cuda").manual_seed(3)

    def draw(*size: int, std: float, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * std).to(dtype)

    return {
        "x": draw(m, k, std=1.0, dtype=dtype).requires_grad_(),
        "weight": draw(n, k, std=k**-0.5, dtype=dtype),
        "lora_a": draw(r, k, std=k**-0.5, dtype=BF16).to(adapters).requires_grad_(),
        "lora_b": draw(n, r, std=r**-0.5, dtype=BF16).to(adapters).requires_grad_(),
    }


def gradients(y: torch.Tensor, tensors: dict, dy: torch.Tensor) -> dict:
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    return dict(zip(names, torch.autograd.grad(y, [tensors[name] for name in names], dy), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("nf4", [False, True])
def test_a_replayed_layer_is_the_layer(nf4: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on launches come from a record, the library's where it is built: on another stream and in a captured graph
    too."""

    def results(shift: float) -> dict:
        tensors = layer_inputs(300, 256, 512, 16)
        tensors["x"] = (tensors["x"].detach() + shift).requires_grad_()
        weight = F.nf4_quantize(tensors["weight"]) if nf4 else tensors["weight"]
        seed = torch.tensor([5], device="cuda") if dropout else None
        y = F.lora_linear(**{**tensors, "weight": weight}, scaling=2.0, dropout_p=dropout, seed=seed)
        return {"y": y.detach(), **gradients(y, tensors, torch.ones_like(y) * 0.5)}

    monkeypatch.setenv("PEFTFAST_REPLAY", "never")
    expected = [results(float(step)) for step in range(5)]
    monkeypatch.delenv("PEFTFAST_REPLAY")
    before = calls_by_library()
    for step in range(4):
        for name, found in results(float(step)).items():
            assert torch.equal(found, expected[step][name]), (step, name)
    if native.autograd_available()[0]:
        assert tuple(b - a for a, b in zip(before, calls_by_library(), strict=True)) == (3, 3)
    else:
        assert any(isinstance(one, replay.Recording) for each in replay._all for one in each.recordings.values())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = results(4.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(aside[name], expected[4][name]) for name in aside)
    x = layer_inputs(300, 256, 512, 16)["x"].detach()
    a, b = torch.ones(16, 512, device="cuda", dtype=BF16), torch.ones(256, 16, device="cuda", dtype=BF16)
    with torch.no_grad():
        s = [ops.lora.lora_shrink(x, a, None, 0.0, 1.0, BF16) for _ in range(4)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.lora.lora_shrink(x, a, None, 0.0, 1.0, BF16) @ b.T
        x.mul_(2.0)
        graph.replay()
    assert torch.equal(captured, (s[0] * 2.0) @ b.T)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("sizes", [(4096, 4096, 4096, 16), (1027, 1021, 2053, 7), (64, 4096, 14336, 64)])
def test_matrix_units_keep_the_budget(sizes: tuple[int, int, int, int], nf4: bool, dropout: float) -> None:
    """Against float64, at sizes where every program and every pipeline stage is at work."""
    tensors = layer_inputs(*sizes)
    seed = torch.tensor([5], device="cuda") if dropout else None
    weight = F.nf4_quantize(tensors["weight"]) if nf4 else tensors["weight"]
    y = F.lora_linear(**{**tensors, "weight": weight}, scaling=2.0, dropout_p=dropout, seed=seed)
    dy = torch.randn_like(y)
    actual = {"y": y.detach(), **gradients(y, tensors, dy)}
    dense = F.nf4_dequantize(weight, BF16) if nf4 else weight

    def composed(dtype: torch.dtype) -> dict:
        inner = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()
        }
        inner["weight"] = dense.to(dtype)
        result = definition.lora_linear(
            inner["x"], inner["weight"], inner["lora_a"], inner["lora_b"], scaling=2.0, dropout_p=dropout, seed=seed
        )
        return {"y": result.detach(), **gradients(result, inner, dy.to(dtype))}

    exact, plain = composed(torch.float64), composed(BF16)
    for name, value in actual.items():
        largest = exact[name].abs().max()
        allowed = 2 * ((plain[name].double() - exact[name]).abs().max() + torch.finfo(BF16).eps / 2 * largest)
        assert (value.double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("route", WAYS)
@pytest.mark.parametrize("sizes", [(200, 4096, 4096, 16), (2048, 4096, 14336, 64), (65, 1028, 2050, 7)])
def test_every_way_of_a_4_bit_product_keeps_the_budget(
    sizes: tuple[int, int, int, int], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nf4_product.VARIABLE, route)
    test_matrix_units_keep_the_budget(sizes, True, 0.1)


@pytest.mark.parametrize("route", WAYS)
def test_every_way_of_a_4_bit_product_in_a_graph_and_on_two_streams(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of an eager call alone: again and again beside another, and from a graph that is replayed beside eager calls."""
    monkeypatch.setenv(nf4_product.VARIABLE, route)
    problems = [layer_inputs(512, 2048, 1024, 16), layer_inputs(777, 1024, 2048, 8)]
    weights = [F.nf4_quantize(tensors["weight"]) for tensors in problems]
    seed = torch.tensor([5], device="cuda")

    def step(i: int) -> list[torch.Tensor]:
        tensors = {**problems[i], "weight": weights[i]}
        y = F.lora_linear(**tensors, scaling=2.0, dropout_p=0.1, seed=seed)
        return [y.detach(), *gradients(y, problems[i], torch.ones_like(y)).values()]

    def same(found: list[torch.Tensor], i: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, alone[i], strict=True))

    alone = [step(0), step(1)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        beside = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                beside.append(step(i))
        torch.cuda.synchronize()
        assert same(beside[0], 0) and same(beside[1], 1)
    graph = torch.cuda.CUDAGraph()
    with timing.capturing(graph):
        captured = step(0)
    for _ in range(5):
        for tensor in captured:
            tensor.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            eager = step(1)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, 0) and same(eager, 1)


@pytest.mark.parametrize("nf4", [False, True])
def test_a_graph_draws_a_new_mask_at_every_replay(nf4: bool) -> None:
    tensors = layer_inputs(256, 512, 768, 16)
    weight = F.nf4_quantize(tensors["weight"]) if nf4 else tensors["weight"]
    dy = torch.randn(256, 512, device="cuda", dtype=BF16)

    def step() -> tuple[torch.Tensor, ...]:
        y = F.lora_linear(**{**tensors, "weight": weight}, scaling=2.0, dropout_p=0.5)
        return y, *gradients(y, tensors, dy).values()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with timing.capturing(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([tensor.clone() for tensor in captured])
    assert not torch.equal(replays[0][0], replays[1][0]), "the mask is frozen in the graph"
    torch.manual_seed(11)
    graph.replay()
    first = [tensor.clone() for tensor in captured]
    torch.manual_seed(11)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True)), "torch.manual_seed rules the mask"


def test_two_streams_do_not_meet() -> None:
    """Scratch is of the stream that asked for it: results beside each other equal those alone."""
    problems = [layer_inputs(512, 1024, 1024, 16), layer_inputs(777, 515, 2048, 8)]
    seeds = [torch.tensor([seed], device="cuda") for seed in (1, 2)]

    def step(i: int) -> list[torch.Tensor]:
        y = F.lora_linear(**problems[i], scaling=1.5, dropout_p=0.1, seed=seeds[i])
        return [y.detach(), *gradients(y, problems[i], torch.ones_like(y)).values()]

    alone = [step(0), step(1)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        beside = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                beside.append(step(i))
        torch.cuda.synchronize()
        for expected, actual in zip(alone, beside, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_what_another_stream_has_still_to_make_is_waited_for() -> None:
    """Tables of addresses, DoRA's norms: kept by the first call, on a stream whose work stays behind."""
    tensors, side = layer_inputs(64, 256, 512, 8), torch.cuda.Stream()
    x, weight, a, b = (tensors[name].detach() for name in ("x", "weight", "lora_a", "lora_b"))
    rows = torch.arange(64, device="cuda", dtype=torch.int32) % 3
    magnitude = torch.rand(256, device="cuda") + 0.5

    def several(scaling: float) -> torch.Tensor:
        return F.multi_lora_linear(x, weight, [F.Adapter(a, b, scaling * i) for i in (1, 2, 3)], rows)

    def dora(scaling: float) -> torch.Tensor:
        return F.lora_linear(x, weights[scaling], a, b, magnitude=magnitude)

    weights = {scaling: weight * scaling for scaling in (1.0, 2.0)}
    for call in (several, dora):
        with torch.no_grad():
            call(1.0)  # what is compiled now is not waited for below
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            call(2.0)
            with torch.cuda.stream(side):
                found = call(2.0)
            torch.cuda.synchronize()
            assert torch.equal(found, call(2.0)), call.__name__


def test_run_to_run_bits() -> None:
    tensors = layer_inputs(3001, 1111, 2222, 32)
    seed = torch.tensor([9], device="cuda")
    runs = []
    for _ in range(5):
        y = F.lora_linear(**tensors, scaling=2.0, dropout_p=0.2, seed=seed)
        runs.append([y.detach(), *gradients(y, tensors, torch.ones_like(y)).values()])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_every_backend_decodes_the_same_bits(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = {each.backend: each for each in ops_nf4.nf4_dequantize_out.implementations}
    if backend not in implementations or not implementations[backend].available()[0]:
        pytest.skip(f"{backend} does not serve it here")
    weight = F.nf4_quantize(torch.randn(1027, 320, device="cuda", dtype=BF16))
    packed, absmax, code, block_size, shape, *nested = weight.storage()
    expected = nf4_definition.nf4_dequantize(packed, absmax, code, block_size, tuple(shape), dtype, *nested)
    monkeypatch.setenv("PEFTFAST_BACKEND", backend)
    assert torch.equal(F.nf4_dequantize(weight, dtype), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_draws_the_same_mask(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = {each.backend: each for each in philox.dropout_mask.implementations}
    if backend not in implementations or not implementations[backend].available()[0]:
        pytest.skip(f"{backend} does not serve it here")
    seed = torch.tensor([2**62 + 17], device="cuda")
    expected = philox_definition.dropout_mask(seed, 1000, 1003, 0.3)
    monkeypatch.setenv("PEFTFAST_BACKEND", backend)
    assert torch.equal(philox.dropout_mask(seed, 1000, 1003, 0.3), expected)


def test_beyond_two_to_the_31_elements() -> None:
    """64-bit offsets: a weight of 2^31 + elements is decoded as its two halves are, and rows beyond count in a layer."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    n, k = 2**17 + 64, 2**14
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(n * k // 64, device="cuda") + 0.5
    table = nf4_definition.code_table("nf4", "cuda")
    whole = F.nf4_dequantize(F.NF4Weight(codes, absmax, table, 64, torch.Size((n, k)), BF16))
    rows = 256
    tail = F.NF4Weight(
        codes[(n - rows) * k // 2 :].contiguous(), absmax[(n - rows) * k // 64 :].contiguous(), table, 64,
        torch.Size((rows, k)), BF16,
    )  # fmt: skip
    assert torch.equal(whole[-rows:], F.nf4_dequantize(tail))
    del codes, absmax, tail
    gc.collect()
    # The same tensor as x of a layer: rows beyond 2^31 elements come out as they do alone.
    a, b, w = (torch.randn(*size, device="cuda").to(BF16) * 0.02 for size in ((8, k), (48, 8), (48, k)))
    seed = torch.tensor([4], device="cuda")
    with torch.no_grad():
        y = F.lora_linear(whole, w, a, b, scaling=2.0)
        alone = F.lora_linear(whole[-rows:].clone(), w, a, b, scaling=2.0)
        assert (y[-rows:].float() - alone.float()).abs().max() <= 2**-7 * alone.float().abs().max()
        mask = philox.dropout_mask(seed, n, k, 0.5)
    counters = philox_definition.dropout_mask(seed, 1, k, 0.5)
    assert torch.equal(mask[:1], counters) and not torch.equal(mask[-1:], counters)


def test_a_module_trains_in_a_graph_of_torch() -> None:
    """torch.cuda.make_graphed_callables over a layer: what CUDA-graphed trainers do."""
    base = torch.nn.Linear(256, 384, device="cuda", dtype=BF16)
    layer = fast.LoRALinear.from_linear(base, r=8, lora_alpha=16)
    torch.nn.init.normal_(layer.lora_B.weight if hasattr(layer.lora_B, "weight") else layer.lora_B, std=0.1)
    x = torch.randn(64, 256, device="cuda", dtype=BF16, requires_grad=True)
    eager = layer(x)
    eager.sum().backward()
    # Its graph holds the nodes that accumulate, which stay on the stream that made them: the default one can join no capture.
    eager = eager.detach()
    expected = x.grad.clone()
    x.grad = None
    graphed = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    y = graphed(x)
    assert torch.equal(y, eager)
    y.sum().backward()
    assert torch.equal(x.grad, expected)
