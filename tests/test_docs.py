"""The documents: links lead somewhere, the tables name what there is, and every script runs as it stands."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from peftfast.__main__ import COMMANDS
from peftfast.cli.doctor import BENCHMARKS_VARIABLE, INTERPRETER_VARIABLE, KNOWN_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SCRIPTS = sorted(path for path in (DOCS / "scripts").glob("*.py") if path.name != "small_model.py")

# Half a minute of compiling; tests/test_compile_block.py has such a block.
COMPILED = pytest.param(DOCS / "scripts" / "compiled.py", marks=pytest.mark.full)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_and_script_is_listed() -> None:
    index = (DOCS / "README.md").read_text()
    for path in [*PAGES, *SCRIPTS]:
        assert path.name == "README.md" or path.name in index, path


def test_table_of_variables() -> None:
    text = (DOCS / "environment.md").read_text()
    own = text.partition("Of other programs")[0]
    assert set(re.findall(r"^\| `(\w+)`", own, flags=re.MULTILINE)) == {
        *KNOWN_VARIABLES,
        BENCHMARKS_VARIABLE,
        INTERPRETER_VARIABLE,
    }


def test_every_variable_that_is_read_is_listed() -> None:
    """By name where it is read, or as a constant of a PEFTFAST_ name."""
    listed = set(re.findall(r"`(\w+)`", (DOCS / "environment.md").read_text()))
    sources = [ROOT / "setup.py", *ROOT.glob("peftfast/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    read = {}
    for path in [*sources, *ROOT.glob("kernels/**/*.py")]:
        code = path.read_text(encoding="utf-8")
        found = re.findall(r"""environ(?:\.\w+)?[(\[]["'](\w+)["']""", code) + re.findall(
            r"[\"'](PEFTFAST_[A-Z_]+)[\"']", code
        )
        read |= dict.fromkeys(found, path)
    assert len(read) > 12
    assert not {name: path for name, path in read.items() if name not in listed}


def test_commands_that_are_named_exist() -> None:
    for page in PAGES:
        for command in re.findall(r"python -m peftfast (\w+)", page.read_text(encoding="utf-8")):
            assert command in COMMANDS, f"{page.name}: {command}"


def test_options_that_are_named_exist() -> None:
    """Those of finetune that the page for people from axolotl gives."""
    from peftfast.cli import finetune

    known = {option for action in finetune.parser()._actions for option in action.option_strings}
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|$", (DOCS / "from_unsloth_and_axolotl.md").read_text(), flags=re.MULTILINE)
    named = {option for row in rows for option in re.findall(r"`(--\w+)", row)}
    assert len(named) > 8 and named <= known, named - known


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(
    "script", [one if one.stem != "compiled" else COMPILED for one in SCRIPTS], ids=lambda one: one.stem
)
def test_script(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In this process, which has the libraries imported already, and in a folder of its own."""
    if script.stem == "sft_trl":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(script.parent))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    torch._dynamo.reset()
    runpy.run_path(str(script), run_name="__main__")
    sys.modules.pop("small_model", None)
    said = capsys.readouterr().out
    assert "loss" in said
    assert not re.search(r"\bnan\b", said)
    if script.stem in ("lora_loop", "qlora_trainer", "fsdp2"):
        assert "14 adapter layers fused, 0 stock" in said
