"""finetune on the pretended GPU: what it does there alone, such as drawing supports beside weights that lie on the device."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftfast.functional as F
from peftfast.__main__ import main
from peftfast.methods.registry import methods
from peftfast.nn import SparseDeltaLinear
from tests.support import pretended_gpu
from tests.test_cli_finetune import environment, labelled, llama, texts  # noqa: F401
from tests.test_cli_finetune_resume import stopped_at

pytestmark = pytest.mark.interpreter

# What a model of 64 features asks for.
LOW = ("--r", "8")
OPTIONS = dict.fromkeys(("ba-lora", "corda", "eora", "inttune", "loldu", "nlora", "pissa", "slora"), LOW) | {
    "lst": ("--method-option", "reduction=2"),
    "qst": ("--method-option", "reduction=2"),
    "owlore": ("--method-option", "active=1"),
}
# bitsandbytes' weights are a subclass of Tensor of their own, and so is the pretence; meteora wants adapters, unipt a classifier.
LEFT_OUT = {"qlora", "meteora", "unipt"}
METHODS = ["dora", *(name for name, one in methods().items() if one.build is not None and name not in LEFT_OUT)]
ALWAYS = {"galore", "id3", "lora-xs", "rosa", "shira", "spiel"}


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    short = ("--max-length", "16", "--per-device-train-batch-size", "2", "--device", "cuda")
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *short, *more]


@pytest.fixture
def gpu():
    with pretended_gpu.installed():
        yield


@pytest.fixture
def by_definition(monkeypatch):
    """Without Triton's interpreter, which would be the time of it; PEFT's LoRA is stock then."""
    monkeypatch.setenv("PEFTFAST_BACKEND", "reference")


@pytest.mark.parametrize(
    "method", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_every_method_trains(gpu, by_definition, llama, texts, tmp_path, method):  # noqa: F811
    out = tmp_path / "out"
    more = ("--method", method, "--max-steps", "2", *OPTIONS.get(method, ()))
    assert main(command(llama, texts, out, *more)) == 0
    assert any(out.glob("*.safetensors"))


@pytest.mark.parametrize("method", ["spiel", pytest.param("mezo", marks=pytest.mark.full)])
def test_resumed_is_as_never_stopped(gpu, by_definition, llama, texts, tmp_path, monkeypatch, method):  # noqa: F811
    through, out = tmp_path / "through", tmp_path / "out"
    more = ("--method", method, "--max-steps", "4", "--save-steps", "2")
    assert main(command(llama, texts, through, *more)) == 0
    argv = command(llama, texts, out, *more)
    stopped_at(2, monkeypatch, argv)
    assert main([*argv, "--resume"]) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (through, out))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_fused_lora_of_a_classifier_in_bfloat16(gpu, llama, labelled, tmp_path, capsys):  # noqa: F811
    more = ("--max-steps", "2", "--dtype", "bfloat16", "--eval_split", "0.2", "--r", "4")
    assert main(command(llama, labelled, tmp_path / "out", *more)) == 0
    said = capsys.readouterr().out
    assert "14 adapter layers fused, 0 stock" in said and "lora [triton]" in said and "held out" in said


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_a_generator_on_the_cpu_draws_a_support_for_the_gpu(gpu, density: float) -> None:
    """torch draws by no generator of another device. The support is the same wherever the weight lies."""
    weight = torch.randn(24, 40)
    here = F.choose_support(weight, density, generator=torch.Generator().manual_seed(3))
    there = F.choose_support(weight.cuda(), density, generator=torch.Generator().manual_seed(3))
    assert there.indices.is_cuda and torch.equal(there.indices.cpu(), here.indices)
    layer = torch.nn.Linear(40, 24, device="cuda")
    made = SparseDeltaLinear.from_linear(layer, density=density, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made.pattern.indices.cpu(), here.indices)
