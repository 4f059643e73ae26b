"""A wheel, an sdist, an editable install and a bare checkout give the same package; none shadows HF's ``kernels``."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftfast.ops import native
from tests.support.forked import forking

ROOT = Path(__file__).resolve().parents[1]
MOVED_FOLDERS = ("kernels", "benchmarks")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")

# Runs in a fresh interpreter; arguments: the folder that the package must come from, then the modules it must hold.
CHECK = """
import importlib.util, sys
from pathlib import Path
import torch
import peftfast
from peftfast.reference import philox
assert Path(peftfast.__file__).is_relative_to(sys.argv[1]), peftfast.__file__
assert philox.dropout_mask(torch.tensor([1]), 2, 9, 0.5).shape == (2, 9)
assert "triton" not in sys.modules, "importing peftfast imports triton"
for name in sys.argv[2:]:
    spec = importlib.util.find_spec(name)
    assert spec is not None and Path(spec.origin).is_file(), name
from peftfast.kernels import numerics
assert numerics.__name__ == "peftfast.kernels.numerics"
"""

# A namespace spec has no origin: it is what a plain folder of that name gives, and the real package wins over it.
NOT_SHADOWED = """
import importlib.util, sys
from pathlib import Path
import peftfast, peftfast.kernels, peftfast.benchmarks
from transformers.utils.import_utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
if spec is None or spec.origin is None:
    assert not is_kernels_available()
else:
    assert not Path(spec.origin).is_relative_to(sys.argv[1]), spec.origin
"""


def moved_files() -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in MOVED_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_names() -> list[str]:
    return ["peftfast." + ".".join(path.with_suffix("").parts) for path in moved_files()]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PEFTFAST_BUILD")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that building leaves nothing in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "peftfast-src", ignore=LEFT_OUT))


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    folder = checkout.parent / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w")
    run(*pip, folder, checkout, cwd=checkout.parent)
    return next(folder.glob("*.whl"))


def install(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def check_package(python: str | Path, folder: Path, cwd: Path, **variables: str) -> None:
    run(python, "-c", CHECK, folder, *module_names(), cwd=cwd, **variables)


def test_kernels_is_no_package() -> None:
    assert moved_files()
    for folder in MOVED_FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()


def test_checkout(tmp_path: Path) -> None:
    check_package(sys.executable, ROOT, tmp_path, PYTHONPATH=str(ROOT))


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert not [name for name in names if name.split("/")[0] in (*MOVED_FOLDERS, "tests", "csrc")]
    assert not [name for name in names if name.endswith(".so")]
    for path in moved_files():
        assert f"peftfast/{path.as_posix()}" in names
    target = install(wheel, tmp_path / "site")
    check_package(sys.executable, target, tmp_path, PYTHONPATH=str(target))
    run(sys.executable, "-c", NOT_SHADOWED, target, cwd=tmp_path, PYTHONPATH=str(target))


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (*moved_files(), *(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file())):
        assert path.as_posix() in names
    assert not [name for name in names if name.endswith((".so", ".o"))]
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w")
    run(*pip, tmp_path, sdist, cwd=tmp_path)
    built = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(built) as first, zipfile.ZipFile(wheel) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
    target = install(built, tmp_path / "site")
    check_package(sys.executable, target, tmp_path, PYTHONPATH=str(target))


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    # The packages of this environment, but not what its own .pth files add: a peftfast installed in it must not answer.
    outer = sysconfig.get_path("purelib")
    (site / "outer.pth").write_text(f"{outer}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-build-isolation", "--no-deps", "-q", "-e")
    run(*pip, checkout, cwd=tmp_path)
    check_package(python, checkout, tmp_path)
    run(python, "-c", NOT_SHADOWED, checkout, cwd=checkout)


def test_import_kernels_is_not_shadowed_from_the_root() -> None:
    run(sys.executable, "-c", NOT_SHADOWED, ROOT, cwd=ROOT)


MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_autograd"};
PyMODINIT_FUNC PyInit__autograd() {
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddIntConstant(module, "interface", INTERFACE);
    return module;
}
"""


def rebuilt(tree: Path) -> Path:
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, PEFTFAST_BUILD="cpu")
    return tree


def test_cpu_library_in_a_wheel(checkout: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w")
    # What is proved is that a library is built, found and loaded: of a few sources, unoptimised. Of all of them is the one that the
    # suite runs on.
    tree = shutil.copytree(checkout, tmp_path / "tree")
    for source in [*(tree / "csrc" / "cpu").glob("*.cpp"), *(tree / "csrc" / "bind").glob("*.cpp")]:
        if source.stem.removesuffix("_cpu") not in ("isa", "philox"):
            source.unlink()
    for source in (tree / "csrc" / "autograd").glob("*.cpp"):
        source.unlink()
    module = tree / "csrc" / "autograd" / "module.cpp"
    module.write_text(MODULE.replace("INTERFACE", str(native.AUTOGRAD_INTERFACE)))
    setup = (tree / "setup.py").read_text()
    assert '"-O3",' in setup
    (tree / "setup.py").write_text(setup.replace('"-O3",', '"-O0",'))
    run(*pip, tmp_path, tree, cwd=tmp_path, PEFTFAST_BUILD="cpu")
    built = next(tmp_path.glob("*.whl"))
    assert "-cp311-abi3-" in built.name
    target = install(built, tmp_path / "site")
    assert (target / "peftfast" / "_cpu.abi3.so").is_file()
    code = """
from peftfast.ops import native
assert native.cpu_available() == (True, ''), native.cpu_available()
native.cpu_isa()
assert native.autograd_available() == (True, ''), native.autograd_available()
assert native.autograd_module().__name__ == "peftfast._autograd"
"""
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    # For another torch it is not there, and says so.
    (own,) = (target / "peftfast").glob("_autograd.*.so")
    assert f"torch-{torch.__version__}." in own.name
    own.rename(own.with_name(own.name.replace(torch.__version__, "2.10.0")))
    code = "from peftfast.ops import native; print(native.autograd_available())"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert "built for another torch or Python: _autograd.torch-2.10.0." in said
    own.with_name(own.name.replace(torch.__version__, "2.10.0")).unlink()
    # A source that is changed shows in what is built where an older one lies.
    module.write_text(MODULE.replace("INTERFACE", str(native.AUTOGRAD_INTERFACE + 1)))
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(rebuilt(tree)))
    assert "is of another version of peftfast" in said
    # One that does not compile leaves the rest as it was.
    module.write_text("#error planted")
    rebuilt(tree)
    assert (tree / "peftfast" / "_cpu.abi3.so").is_file() and not list((tree / "peftfast").glob("_autograd*"))
    assert "not built" in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tree))


def test_build_variable_is_checked(checkout: Path) -> None:
    def build(value: str) -> str:
        environment = {**os.environ, "PEFTFAST_BUILD": value}
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    assert "expected none, cpu, cuda or cpu,cuda, got 'gpu'" in build("gpu")
    if torch.version.cuda is None:
        assert "is built without CUDA" in build("cuda")


# torch of a CUDA build, and an nvcc that notes how it is called; the C++ part is not compiled.
CUDA_BUILD = """
import sys, types
import torch
torch.version.cuda = "13.0"
from setuptools.command import build_ext
def rest(self, ext):
    left, known = ([one for one in given if one.endswith(".cu")] for given in (ext.sources, ext.depends))
    print("objects", len(ext.extra_objects), left, "known", len(known))  # linked anew where one that is known is newer
build_ext.build_ext.build_extension = rest
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", TEMP]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__", "__file__": "setup.py"})
"""
NVCC = """#!/bin/sh
case "$*" in *--dryrun*) echo "#$ TOP=/nowhere" >&2; exit 0;; esac
echo "$*" >> "$NOTES"
case "$*" in *"$FAILS"*) echo "error: planted" >&2; exit 2;; esac
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for nvcc")
def test_cuda_sources_are_compiled_side_by_side(checkout: Path, tmp_path: Path) -> None:
    nvcc, notes = tmp_path / "nvcc", tmp_path / "notes"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    sources = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))

    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME", "MAX_JOBS")}
    environment |= {"PEFTFAST_BUILD": "cuda", "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes)}
    environment |= {"FAILS": "no such file", "CXX": "true"}

    def build(**variables: str) -> tuple[int, str]:
        notes.unlink(missing_ok=True)
        given = (
            f"import os\nos.environ |= {variables!r}\nos.chdir({str(checkout)!r})\nTEMP = {str(tmp_path / 'temp')!r}"
        )
        return process.run(given + CUDA_BUILD, tmp_path)

    with forking("setuptools.command.build_ext", "torch", environment=environment) as process:
        check_cuda_builds(build, sources, notes)


def check_cuda_builds(build: Callable[..., tuple[int, str]], sources: list[str], notes: Path) -> None:
    status, said = build(MAX_JOBS=str(2 * len(sources)), PEFTFAST_CUDA_ARCHITECTURES="90a;100")
    assert status == 0, said
    assert f"objects {len(sources)} [] known {len(sources)}" in said
    called = notes.read_text().splitlines()
    assert sorted(line.split(" -c ")[1].split()[0].rpartition("/")[2] for line in called) == sources
    for line in called:
        assert "--threads 2 " in line and "code=sm_90a" in line and "code=sm_100" in line and "sm_80" not in line
        assert "code=compute_100" in line
    assert build(FAILS="sparse_delta.cu")[0] != 0
    refused = build(PEFTFAST_CUDA_ARCHITECTURES="80,90")[1]
    assert "PEFTFAST_CUDA_ARCHITECTURES: expected such as 80;90a;100, got '80,90'" in refused
    refused = build(PEFTFAST_CUDA_ARCHITECTURES="75;90a")[1]
    assert "PEFTFAST_CUDA_ARCHITECTURES: expected 80 or newer, got '75' in '75;90a'" in refused
    assert "MAX_JOBS: expected a whole number of at least 1, got '0'" in build(MAX_JOBS="0")[1]
