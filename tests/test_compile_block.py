"""torch.compile over a patched Llama-shaped block: one graph, forward and backward, any sequence length. opcheck of every operator."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfast
import peftfast.ops
from peftfast.integrations.peft_guards import forget_backends
from peftfast.ops import native
from tests.support import small_models

pytestmark = pytest.mark.compiled
LENGTHS = (24, 36)  # of two rows each, beyond the few on which a 4-bit layer goes another way and is traced again


class Block(nn.Module):
    """A decoder layer with the rotary embedding that the model would hand to it."""

    def __init__(self, method: str, dtype: torch.dtype, dropout: float = 0.0) -> None:
        super().__init__()
        model = small_models.adapted("llama", method, dtype)
        peftfast.patch(model, strict=True)
        inner = model.base_model.model.model
        self.layer, self.rotary = inner.layers[0], inner.rotary_emb
        for name, module in self.named_modules():
            if name.endswith("lora_dropout"):
                module["default"] = nn.Dropout(dropout)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        y = self.layer(x, position_embeddings=self.rotary(x, positions))
        return y[0] if isinstance(y, tuple) else y


def results(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x)
    y.float().square().sum().backward()
    grads = {
        name.removeprefix("_orig_mod."): p.grad.clone() for name, p in block.named_parameters() if p.grad is not None
    }
    return {"y": y.detach(), "x": x.grad} | grads


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


CASES = {
    "lora": ("lora", torch.float32, 1e-4),
    "lora bf16": ("lora", torch.bfloat16, 0.03),
    "4-bit": ("qlora", torch.float32, 1e-4),
    "4-bit in bf16": ("qlora", torch.bfloat16, 0.03),
}


def check(name: str, backend: str, lengths: tuple[int, ...]) -> None:
    method, dtype, tolerance = CASES[name]
    block = Block(method, dtype)
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counted)
    warnings.filterwarnings("error", "Dynamo detected a call to a `functools.lru_cache`")
    for length in lengths:
        x = torch.randn(2, length, small_models.HIDDEN, generator=torch.Generator().manual_seed(length))
        x = x.to(torch.bfloat16 if name == "lora bf16" else torch.float32)
        eager, graph = results(block, x), results(compiled, x)
        assert eager.keys() == graph.keys() and len(eager) == 2 + 14
        for key, value in eager.items():
            assert graph[key].dtype == value.dtype
            assert relative(graph[key], value) < tolerance, (length, key)
    # One graph for all lengths. bf16 through a 4-bit layer may settle the compute dtype in the first call and be traced once more.
    assert len(graphs) <= 2, len(graphs)


def full(name: str) -> Any:
    """Twenty seconds of tracing."""
    return pytest.param(name, marks=pytest.mark.full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", full("lora bf16"), full("4-bit"), "4-bit in bf16"])
def test_block_in_one_graph(name: str) -> None:
    """Each kind of layer and each dtype once, with --full each with each."""
    check(name, "aot_eager", LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [full("lora"), "4-bit"])
def test_block_of_triton_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the kernels are Triton's: no compiler looks for it. A 4-bit layer is LoRA's and NF4's at once."""
    monkeypatch.setitem(native._verdicts, "cpu", (False, "planted"))
    forget_backends()
    try:
        check(name, "aot_eager", LENGTHS[:1])
    finally:
        forget_backends()


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", ["lora", "4-bit"])
def test_block_by_inductor(name: str) -> None:
    check(name, "inductor", LENGTHS[:2])


def test_dropout_in_one_graph() -> None:
    """The seed is drawn inside the graph: masks differ from call to call, and the seed of torch rules them."""
    block = Block("lora", torch.float32, dropout=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, small_models.HIDDEN)
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    torch.testing.assert_close(compiled(x), first)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_of_the_random_numbers(p: float) -> None:
    from peftfast.ops import philox

    seed = torch.tensor([987654321])
    torch.library.opcheck(philox.dropout_mask.overload, (seed, 3, 19, p))
    torch.library.opcheck(philox.philox_words.overload, (seed, 5, 7, 2, 1))


def test_every_operator_is_opchecked() -> None:
    """A family's own tests run opcheck on its operators: no operator is without it."""
    folder = Path(__file__).parent
    texts = [path.read_text() for path in folder.glob("test_*.py")]
    checked = "".join(text for text in texts if "opcheck(" in text)
    checked += "".join(path.read_text() for path in (folder / "support").glob("*_checks.py"))
    every = torch._C._dispatch_get_all_op_names()
    names = sorted({name.rpartition("::")[2].partition(".")[0] for name in every if name.startswith("peftfast::")})
    assert len(names) > 5
    assert [name for name in names if name not in checked] == []


@pytest.mark.gpu
def test_cuda_graph_of_a_block() -> None:
    """mode="reduce-overhead" captures forward and backward; a replay gives what eager gives."""
    block = Block("lora", torch.bfloat16).cuda()
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = torch.randn(2, 64, small_models.HIDDEN, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()
        torch.compiler.cudagraph_mark_step_begin()
        graph, eager = results(compiled, x), results(block, x)
        for key, value in eager.items():
            assert relative(graph[key], value) < 0.03, key
