"""What importing costs and needs, and what happens where a library cannot be loaded."""

import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peftfast import extras
from peftfast.integrations.peft_versions import TESTED_PEFT
from peftfast.ops import native
from tests.support.forked import Forked, forking

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = 0.35  # of the processor time that importing torch takes: a machine that others keep busy is slow at both

TIMED = """
import sys, time
began = time.process_time()
import torch
torch_took = time.process_time() - began
sys.pycache_prefix = BYTECODE
began = time.process_time()
import peftfast
peftfast.patch, peftfast.nn.LoRALinear, peftfast.functional.lora_linear, peftfast.save_adapter, peftfast.adapt
print((time.process_time() - began) / torch_took)
print([name for name in ("triton", "peft", "bitsandbytes", "transformers", "safetensors") if name in sys.modules])
"""

# As on a system that has none of these: every module of the package is imported, and the functions run on the definitions.
BARE = """
import importlib, pkgutil, sys
GONE = {"triton", "fcntl", "resource", "pwd", "grp", "termios", "peft", "bitsandbytes", "transformers", "safetensors", "matplotlib"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import torch
for name in GONE:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Finder())
import peftfast
left_out = ("peftfast.kernels.", "peftfast.benchmarks.", "peftfast.integrations.peft", "peftfast.integrations.transformers",
            "peftfast.integrations.shira", "peftfast.cli.classifier", "peftfast.cli.arms", "peftfast.__main__")
names = [m.name for m in pkgutil.walk_packages(peftfast.__path__, "peftfast.") if not m.name.startswith(left_out)]
assert len(names) > 20, names
for name in names:
    if not name.rpartition(".")[2].startswith("_"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # a part of a command may need what the command asks for before it imports the part
            if not (name.startswith("peftfast.cli.") and error.name.partition(".")[0] in ("peft", "transformers", "bitsandbytes")):
                raise
layer = peftfast.nn.LoRALinear(8, 4, r=2)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad is not None
quantised = peftfast.functional.nf4_quantize(torch.randn(8, 64))
assert peftfast.functional.nf4_dequantize(quantised).shape == (8, 64)
print("whole")
"""

# As on a system of another name: what is there is torch, PEFT and transformers, which are imported as they are on this one; then the
# name changes, Triton and what only POSIX has cannot be imported, and no library was built. The whole package and patch come after.
ELSEWHERE = """
import importlib, pathlib, pkgutil, sys, tempfile
import torch, peft, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
GONE = {"triton", "fcntl", "resource", "termios", "pwd", "grp"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in GONE else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
for name in [name for name in sys.modules if name.partition(".")[0] in GONE]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.platform = PLATFORM
import peftfast
from peftfast.ops import native
native._FOLDER = pathlib.Path(tempfile.mkdtemp())
names = [m.name for m in pkgutil.walk_packages(peftfast.__path__, "peftfast.")
         if not m.name.startswith(("peftfast.kernels.", "peftfast.benchmarks.", "peftfast.__main__")) and "._" not in m.name]
assert len(names) > 100, len(names)
for name in names:
    importlib.import_module(name)

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
ids = torch.randint(0, 64, (2, 5))
def results():
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
stock = results()
report = peftfast.patch(model)
assert len(report.fused) + len(report.stock) == 7, str(report)
patched = results()
assert stock.keys() == patched.keys() and all(torch.equal(stock[n], patched[n]) for n in stock)
peftfast.unpatch(model)
layer = peftfast.nn.LoRALinear.from_linear(torch.nn.Linear(8, 4), r=2)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad is not None
out = pathlib.Path(tempfile.mkdtemp()) / "out"
from peftfast.cli import atomic
for text in ("one", "two"):  # a directory that is replaced whole, by the renames that every system has
    with atomic.replace_directory(out) as new:
        (new / "file").write_text(text)
    assert (out / "file").read_text() == text
print(len(report.stock), *report.reasons)
"""


BARE_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "HOME": "/nowhere"}


def run(code: str, **variables: str) -> str:
    environment = BARE_ENVIRONMENT | variables
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_lazy(tmp_path: Path) -> None:
    """Of an installed package, whose bytecode the installer has written; here the first of a few runs writes it (0.22 s; 0.14 s
    after that, of which 0.09 s are a collection of torch's garbage; torch itself 1.2 s). The least of them is what the import costs."""
    shares: list[float] = []
    while not shares or (min(shares) >= OF_TORCH and len(shares) < 5):
        said, loaded = run(f"BYTECODE = {str(tmp_path)!r}\n{TIMED}", OMP_NUM_THREADS="1").splitlines()
        assert loaded == "[]"
        shares.append(float(said))
    assert min(shares) < OF_TORCH, shares


def test_import_without_triton_and_posix() -> None:
    assert run(BARE).strip() == "whole"


USES = """
import pathlib, sys, torch
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peft", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
import peftfast, peftfast.methods
from peftfast.methods import deltas
linear = torch.nn.Linear(8, 4)
pathlib.Path("adapter_config.json").write_text("{}")
pathlib.Path("adapter_model.safetensors").write_bytes(b"")
model = torch.nn.Sequential(peftfast.nn.LoRALinear(8, 4, r=2))
for name, call in {
    "save_adapter": lambda: peftfast.save_adapter(model, "new"),
    "load_adapter": lambda: peftfast.load_adapter(torch.nn.Sequential(linear), "."),
    "load_nf4": lambda: peftfast.nn.load_nf4(linear, "."),
    "save_shira": lambda: peftfast.methods.save_shira(model, "new"),
    "load_shira": lambda: peftfast.methods.load_shira(linear, "."),
    "read_sparse": lambda: deltas.read_sparse("."),
    "adapt": lambda: peftfast.adapt(torch.nn.Sequential(linear), "lora", target_modules="all-linear"),
}.items():
    try:
        call()
    except ModuleNotFoundError as error:
        package = "peft" if name == "adapt" else "safetensors"
        said = f"{name} needs {package}, which is not installed: pip install {package} (peftfast's extra [methods] or [peft] brings it)"
        assert str(error) == said and error.name == package, str(error)
    else:
        raise SystemExit(name)
assert not pathlib.Path("new").exists()
print("named")
"""


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r})\n{USES}"
    assert run(code).strip() == "named"


def test_the_extras_bring_what_their_errors_say() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {
        extra: {one.name: one.specifier for one in map(Requirement, brought)} for extra, brought in declared.items()
    }
    for package, names in extras.EXTRAS.items():
        assert names == tuple(sorted(name for name, brought in asked.items() if package in brought)), package
    oldest = SpecifierSet(TESTED_PEFT.split(",")[0])
    assert all(asked[extra]["peft"] == oldest for extra in extras.EXTRAS["peft"])
    for page in ("README.md", "docs/installing.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(re.search(rf"`\W*{name}\W*`", text) for name in declared), page


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    environment = BARE_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with forking("torch", "peft", "transformers.models.llama.modeling_llama", environment=environment) as process:
        yield process


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_import_and_patch_on_other_systems(platform: str, tmp_path: Path, forked: Forked) -> None:
    """Layers stay stock there, with their bits, and the report says why."""
    status, said = forked.run(f"PLATFORM = {platform!r}\n{ELSEWHERE}", tmp_path)
    assert status == 0, said
    count, _, reasons = said.splitlines()[-1].partition(" ")
    assert count == "7" and "no fused implementation" in reasons and "triton is not installed" in reasons, said


def test_a_library_that_does_not_load_leaves_a_warning_and_the_next_backend(tmp_path, monkeypatch, caplog) -> None:
    """As after a build for another machine."""
    (tmp_path / "_cpu.abi3.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    # The autograd library is the one that is there: what the Functions are told of it they keep.
    monkeypatch.setattr(native, "_verdicts", {"autograd": native.autograd_available()})
    with caplog.at_level(logging.WARNING, "peftfast"):
        ok, reason = native.cpu_available()
        native.cpu_available()
    assert not ok and "_cpu.abi3.so does not load" in reason
    assert len([r for r in caplog.records if "does not load" in r.message]) == 1
    import torch

    import peftfast.functional as F

    y = F.lora_linear(torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2))
    assert torch.equal(y, torch.full((2, 4), 24.0))
    with pytest.raises(RuntimeError, match="the CPU kernels are not available: _cpu.abi3.so does not load"):
        native.cpu_isa()
