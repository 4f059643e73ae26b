"""Checkpoints and parameters exchanged with bitsandbytes, which need not be there to load one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftfast.functional as F
from peftfast.nn import NF4Linear, load_nf4, nf4_weights
from tests.support.lora_checks import BF16, F16, F32

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
ROOT = Path(__file__).resolve().parents[1]


class Model(nn.Module):
    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 128)
        self.block = nn.ModuleDict({"up": linear(128, 192), "down": linear(192, 128, bias=False)})
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.block["down"](torch.relu(self.block["up"](x)))))


def written(folder: Path, **options: Any) -> tuple[Path, Model]:
    """A file that bitsandbytes' own layers wrote, and the model that wrote it."""
    torch.manual_seed(0)

    def linear(k: int, n: int, **rest: Any) -> nn.Module:
        layer = bnb.nn.Linear4bit(k, n, compute_dtype=F32, **rest, **options)
        layer.support_avx512bf16_for_cpu = False
        return layer

    model = Model(linear).to("cpu")
    path = folder / "model.safetensors"
    save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, path)
    return path, model


KINDS = [
    {"quant_type": "nf4"},
    {"quant_type": "fp4", "compress_statistics": False},
    {"quant_type": "nf4", "quant_storage": BF16},
    {"quant_type": "nf4", "quant_storage": F32},
    {"quant_type": "fp4", "quant_storage": F16},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("meta", [False, True])
def test_load(options: dict[str, Any], meta: bool, tmp_path: Path) -> None:
    path, theirs = written(tmp_path, **options)
    with torch.device("meta" if meta else "cpu"):
        model = Model()
    assert load_nf4(model, path if meta else load_file(path)) is model
    assert isinstance(model.block["up"], NF4Linear) and type(model.head) is nn.Linear
    tokens = torch.arange(10).repeat(4)[None]
    assert torch.equal(model(tokens), theirs(tokens))
    for name in ("up", "down"):
        given = F.NF4Weight.from_bitsandbytes(theirs.block[name].weight)
        assert (
            torch.equal(model.block[name].weight, given.packed)
            and model.block[name].quant_type == options["quant_type"]
        )
    load_nf4(Model(), tmp_path)  # a folder


def test_weights_share_the_checkpoints_storage(tmp_path: Path) -> None:
    state = load_file(written(tmp_path, quant_type="nf4", quant_storage=BF16)[0])
    weights = nf4_weights(state)
    assert set(weights) == {"block.up", "block.down"}
    for name, nf4 in weights.items():
        assert nf4.packed.data_ptr() == state[f"{name}.weight"].data_ptr() and nf4.packed.dtype == torch.uint8
        assert nf4.absmax.data_ptr() == state[f"{name}.weight.absmax"].data_ptr()


def test_load_refuses(tmp_path: Path) -> None:
    path, _ = written(tmp_path, quant_type="nf4")
    state = load_file(path)

    def without(*names: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in state.items() if name not in names}

    def described(name: str, **changed: Any) -> dict[str, torch.Tensor]:
        key = f"{name}.weight.quant_state.bitsandbytes__nf4"
        text = json.dumps(json.loads(bytes(state[key].tolist())) | changed)
        return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got NoneType"):
        load_nf4(None, path)  # type: ignore[arg-type]
    for message, error, checkpoint in (
        ("checkpoint: .*torn.safetensors: expected a whole safetensors file", ValueError, torn),
        ("checkpoint: expected a path or a mapping", TypeError, 3),
        ("checkpoint: no .safetensors file in", ValueError, tmp_path / ".."),
        ("block.up: the checkpoint has no entry", ValueError, without("block.up.weight")),
        ("block.up: not the state of a 4-bit layer", ValueError, without("block.up.weight.absmax")),
        ("block.up: not the state", ValueError, state | {"block.up.weight": state["block.down.weight"][1:]}),
        ("missing .*norm.weight", RuntimeError, without("norm.weight")),
        ("unexpected .*other", RuntimeError, state | {"other": torch.zeros(1)}),
        ("size mismatch for norm.weight", RuntimeError, state | {"norm.weight": torch.zeros(3)}),
        ("block.up: .*nested blocks of 256, got 128", ValueError, described("block.up", nested_blocksize=128)),
        ("block.up: .*name of a torch dtype, got 'nope'", ValueError, described("block.up", dtype="nope")),
    ):
        model = Model()
        before = [*model.modules(), *model.parameters()]
        with pytest.raises(error, match=message):
            load_nf4(model, checkpoint)
        after = [*model.modules(), *model.parameters()]
        assert all(one is other for one, other in zip(before, after, strict=True)), message
    load_nf4(Model(), without("norm.weight"), strict=False)
    small = Model()
    small.block["up"] = nn.Linear(64, 192)
    with pytest.raises(ValueError, match=r"block.up: expected a weight of shape \(192, 64\)"):
        load_nf4(small, state)
    assert type(small.block["down"]) is nn.Linear  # nothing was exchanged
    small.block["up"] = nn.Identity()
    with pytest.raises(ValueError, match="block.up: expected an nn.Linear in the model, got Identity"):
        load_nf4(small, state)


def test_load_without_bitsandbytes(tmp_path: Path) -> None:
    """In a process in which importing it fails; the layer then gives what bitsandbytes gave here."""
    path, theirs = written(tmp_path, quant_type="nf4", quant_storage=BF16)
    tokens = torch.arange(10).repeat(4)[None]
    torch.save(theirs(tokens).detach(), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["bitsandbytes"] = None
import torch
from peftfast.nn import load_nf4
from tests.test_nf4_checkpoint_model import Model
model = load_nf4(Model(), {str(path)!r})
assert torch.equal(model(torch.arange(10).repeat(4)[None]), torch.load({str(tmp_path / "expected.pt")!r}))
"""
    source = Path(__file__).read_text()
    model = source[source.index("class Model(") : source.index("def written(")]
    head = "from typing import Any\n\nimport torch\nfrom torch import nn\n\n\n"
    script = script.replace("from tests.test_nf4_checkpoint_model import Model\n", head + model)
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, BF16, F16, F32, torch.float64])
@pytest.mark.parametrize("nested", [False, True])
def test_to_bitsandbytes_in_every_storage(storage: torch.dtype, nested: bool) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)).to(BF16)
    nf4 = F.nf4_quantize(weight, double_quant=nested)
    given = nf4.to_bitsandbytes(storage)
    assert given.dtype == storage and given.quant_storage == storage and given.data_ptr() == nf4.packed.data_ptr()
    back = F.NF4Weight.from_bitsandbytes(given)
    assert back.packed.data_ptr() == nf4.packed.data_ptr() and back.packed.dtype == torch.uint8
    assert torch.equal(F.nf4_dequantize(back), F.nf4_dequantize(nf4))
    theirs = bnb.functional.dequantize_4bit(given, given.quant_state)
    assert torch.equal(theirs, F.nf4_dequantize(nf4))


def test_to_bitsandbytes_refuses() -> None:
    nf4 = F.nf4_quantize(torch.randn(3, 5))  # 8 bytes hold 15 elements and one more
    assert nf4.to_bitsandbytes(F32).numel() == 2
    with pytest.raises(ValueError, match="quant_storage: expected a dtype whose 4 bytes divide 6"):
        F.nf4_quantize(torch.randn(3, 4)).to_bitsandbytes(F32)
    with pytest.raises(TypeError, match="quant_storage: expected a dtype, got str"):
        nf4.to_bitsandbytes("uint8")
