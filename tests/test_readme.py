"""The README's snippets run as they stand, its links lead somewhere, and its table of variables is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftfast.cli.doctor import INTERPRETER_VARIABLE, KNOWN_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path) -> None:
    """In a folder of its own and a fresh process, so that a snippet leans on nothing that stands above it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error::UserWarning:peftfast", "-c", SNIPPETS[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{SNIPPETS[number]}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (ROOT / target).exists(), target


def test_table_of_variables() -> None:
    assert set(re.findall(r"^\| `(\w+)`", README, flags=re.MULTILINE)) == {*KNOWN_VARIABLES, INTERPRETER_VARIABLE}
