"""PEFT's own tests of its LoRA and SHiRA layers, out of its source distribution, with every model patched.

What passes stock passes patched; what fails is compared with a list. ``--full`` runs all of it stock as well.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "support" / "peft_suite"
NEEDED = ("attr", "datasets", "diffusers", "parameterized", "scipy", "sklearn")


class Release(NamedTuple):
    """Of a release of PEFT: its source distribution, the fewest tests that must pass of what is run here and of what ``--full`` runs,
    and the fewest calls of peftfast's operators in the first, a call by the autograd library being one. Seen were 1 to 5 % more."""

    sha256: str
    fewest: int
    fewest_full: int
    fewest_fused: int


RELEASES = {
    "0.18.1": Release("2dd0d6bfce936d1850e48aaddbd250941c5c02fc8ef3237cd8fd5aac35e0bae2", 1620, 2140, 1425),
    "0.19.1": Release("0d97542fe96dcdaa20d3b81c06f26f988618f416a73544ab23c3618ccb674a40", 1990, 3660, 1490),
    "0.20.0": Release("4769c8093a4ca145fd6fb3fd4dd50449675f5fe46434ad1e98b285a132d4b1d0", 2615, 5030, 1565),
    "0.21.2": Release("b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e", 3100, 5900, 1750),
}
INSTALLED = Version(peft.__version__)
INITIALISATIONS = (
    Version("0.19") <= INSTALLED
)  # PEFT 0.18 asks the hub for a data set where its tests of these are collected
FILES = tuple(
    f"tests/test_{name}.py"
    for name in ("custom_models", "initialization", "lora_variants", "lorafa", "mixed", "shira")
    if name != "initialization" or INITIALISATIONS
)
HUB_TESTS = 16  # tests in exceptions.txt that need the hub
PATCHED_TESTS = 0  # tests in exceptions.txt that fail patched
LONGEST = 600  # seconds; it takes 50 of one core

WORDS = "(lora or test_mixed or shira)"
# --full runs these too. Tuners of LoRA's name alone: no class of theirs is LoRA's, so that patch finds nothing in them, which the tests
# that are kept of them see (AdaLoRA's layers inherit from LoRA's, and all of its tests are run). The second of CorDA's two ways to a
# start, which leaves the same layer as the first. The twelve dtypes and loadings of layers that are no linear.
OTHERS = "(delora or glora or gralora or randlora or tinylora or unilora or vblora)"
OF_OTHERS = (
    "(training_custom_models or merge_layers_is_idempotent or disable_adapters_with_merging or save_pretrained_pickle)"
)
NOT_LINEAR = "(test_adapter_dtype_autocast and not (MLP- or Shira))"
LESS = f"{WORDS} and (not {OTHERS} or {OF_OTHERS}) and not kpm and not {NOT_LINEAR}"
# One of those of initialisations is run once more with a fused layer that computes something else.
PLANTED = ("--planted", "test_lora_pissa_linear_init_default") if INITIALISATIONS else ()


def exceptions() -> dict[str, str]:
    """Name of a test -> "hub" or "patched"."""
    lines = (SUITE / "exceptions.txt").read_text().splitlines()
    rows = [[part.strip() for part in line.split("|")] for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 3 and row[0] in ("hub", "patched") and row[2] for row in rows), rows
    assert len({test for _, test, _ in rows}) == len(rows)
    return {test: kind for kind, test, _ in rows}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution: as `make` has put it into .venv, or fetched now."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"PEFT's tests need {', '.join(missing)}: pip install -r requirements.txt")
    name = f"peft-{peft.__version__}"
    archive = Path(sys.prefix, "peft-sdist", f"{name}.tar.gz")
    folder = tmp_path_factory.mktemp("peft")
    if not archive.exists():
        archive = folder / archive.name
        options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder))
        command = [sys.executable, "-m", "pip", "download", *options, f"peft=={peft.__version__}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            reason = ["no answer in 60 s"]
        if not archive.exists():
            pytest.skip(f"PEFT's source distribution cannot be had: {' '.join(reason)}")
    if peft.__version__ in RELEASES:
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == RELEASES[peft.__version__].sha256, f"{archive} is not PEFT's"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    # The sdist lacks it, and the tests import their neighbours relatively.
    (folder / name / "tests" / "__init__.py").touch()
    return folder / name


def run(source: Path, outcomes: Path, words: str, *more: str) -> dict:
    """One run of a selection in a process of its own: what failed, how many passed, how many calls ran fused. Without pytest's plugin
    for logs, which gives each of transformers' loggers two handlers for each test, and without its rewriting of assertions."""
    quiet = ("-o", "addopts=", "-q", "--assert=plain", "--tb=short", "--timeout=120")
    quiet = (*quiet, *(f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "logging")))
    select = (*FILES, "-k", words, "--outcomes", str(outcomes))
    dropped = ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER_COUNT", "PEFTFAST_BACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUITE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Names are from the root, which else is wherever above a pyproject.toml lies.
    root = ["--rootdir", str(source)]
    command = [sys.executable, "-m", "pytest", *root, "-p", "patch_every_model", *quiet, *select, *more]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=LONGEST)
    assert outcomes.exists(), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(outcomes.read_text()) | {"said": done.stdout[-6000:]}


@pytest.mark.slow
def test_peft_s_own_tests(source: Path, tmp_path: Path, full: bool) -> None:
    """In one process, since each spends ten seconds on its imports and on collecting."""
    known = exceptions()
    left_out = tmp_path / "left_out.txt"
    left_out.write_text("".join(f"{test}\n" for test, kind in known.items() if kind == "hub"))
    release = RELEASES[max((name for name in RELEASES if Version(name) <= INSTALLED), key=Version)]
    words, fewest = (WORDS, release.fewest_full) if full else (LESS, release.fewest)
    more = ("--leave-out", str(left_out))
    patched = run(source, tmp_path / "patched.json", words, *more, *PLANTED)
    assert set(patched["failed"]) <= {test for test, kind in known.items() if kind == "patched"}, patched["said"]
    assert patched["passed"] >= fewest, patched["said"]
    assert patched["fused_calls"] >= release.fewest_fused
    if PLANTED:
        unseen = "a fused layer that computes something else was not seen"
        assert patched["planted"] == ["failed"], f"{unseen}: {patched['said']}"
    if full:
        stock = run(source, tmp_path / "stock.json", words, *more, "--stock")
        assert stock["fused_calls"] == 0 and stock["failed"] == [], stock["said"]
        assert stock["passed"] == patched["passed"] + len(patched["failed"])


def test_the_list_of_exceptions_is_what_it_was() -> None:
    """It may not grow in silence: whoever adds a line changes these numbers too."""
    kinds = list(exceptions().values())
    assert (kinds.count("patched"), kinds.count("hub")) == (PATCHED_TESTS, HUB_TESTS)
