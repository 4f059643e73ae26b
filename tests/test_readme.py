"""The README's snippets run as they stand, its links lead somewhere, and its table of variables is complete."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftfast.cli.doctor import INTERPRETER_VARIABLE, KNOWN_VARIABLES
from tests.support.forked import Forked, forking

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    libraries = ("torch", "peft", "transformers.models.llama.modeling_llama")
    with forking(*libraries, options=("-W", "error::UserWarning:peftfast"), environment=environment) as process:
        yield process


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path, forked: Forked) -> None:
    """In a folder and a process of its own, so that a snippet leans on nothing that stands above it."""
    status, said = forked.run(SNIPPETS[number], tmp_path)
    assert status == 0, f"{SNIPPETS[number]}\n{said}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (ROOT / target).exists(), target


def test_table_of_variables() -> None:
    assert set(re.findall(r"^\| `(\w+)`", README, flags=re.MULTILINE)) == {*KNOWN_VARIABLES, INTERPRETER_VARIABLE}


FLOORS = ("peftfast/nn", "peftfast/functional", "peftfast/ops", "peftfast/configs", "peftfast/reference", "kernels")


def test_each_family_has_its_file_on_every_floor() -> None:
    """But for the one that the README and CONTRIBUTING.md name; the files that the README names are there."""
    folders = {floor: "*.py" for floor in FLOORS} | {"csrc/cpu": "*.cpp", "csrc/cuda": "*.cu", "benchmarks": "*.py"}
    missing = {
        (floor, family)
        for floor, pattern in folders.items()
        for family in ("lora", "nf4", "sparse_delta", "zeroth_order")
        if family not in {path.stem for path in (ROOT / floor).glob(pattern)}
    }
    assert missing == {("peftfast/nn", "zeroth_order")}
    section = README.partition("## Where things are")[2].partition("```")[0]
    for name in re.findall(r"`([a-z_/]+\.\w+)`", section):
        assert (ROOT / name).is_file() or (ROOT / "peftfast" / name).is_file(), name
    for name in re.findall(r"`([a-z_]+)`", section):
        assert any((ROOT / floor / f"{name}.py").is_file() for floor in FLOORS), name


def test_every_benchmark_that_runs_is_a_step_and_is_listed() -> None:
    from peftfast.cli import bench

    runnable = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text(encoding="utf-8")}
    assert set(bench.STEPS) == runnable - {"dram"}  # what ncu watches, started by run
    (tree,) = re.findall(r"python -m benchmarks\.(run \|.*?);", README, flags=re.DOTALL)
    assert set(tree.split()) - {"|"} == set(bench.STEPS)
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| `python -m benchmarks.` | |")[2]
    named = re.findall(r"^\| (`.*?) \|", table.partition("\n\n")[0], flags=re.MULTILINE)
    assert {word for cell in named for word in re.findall(r"`(\w+)", cell)} == set(bench.STEPS)
