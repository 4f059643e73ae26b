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
