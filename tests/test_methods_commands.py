"""The methods from the command line, the page that lists them, and their measurement."""

import json
from pathlib import Path

import pytest

from peftfast.__main__ import main
from peftfast.methods.registry import get, methods
from peftfast.methods.unserved import UNSERVED
from tests.support.method_checks import adapted, trained


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in methods())
    assert main(["methods", "lora-xs"]) == 0
    assert "2405.17604" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(methods())
    assert main(["methods", "lora-sx"]) == 2
    assert "did you mean lora-xs" in capsys.readouterr().err
    assert main(["methods", "s-lora"]) == 2
    assert "'s-lora' is not served: a server" in capsys.readouterr().err
    assert get("lora").name == "lora" and trained(adapted("lora", r=1))


def test_page_of_methods(tmp_path: Path) -> None:
    """The page in the tree names every method as it is; a row with a result shows it, one without says so."""
    from benchmarks.methods import PAGE, page, read

    text = PAGE.read_text(encoding="utf-8")
    for name, method in methods().items():
        assert f"### {name}\n" in text and method.formula in text, (
            f"{name}: run python -m benchmarks.methods --page-only"
        )
    assert not set(UNSERVED) & set(methods())
    assert all(f"- {name}: {reason}\n" in text for name, reason in UNSERVED.items())
    row = {
        "trained": 12,
        "accuracy": 0.5,
        "final_loss": 1.0,
        "milliseconds": 7.0,
        "peak_bytes": None,
        "saved_bytes": 3_000_000,
    }
    row |= {"options": {"r": 4}, "learning_rate": 0.01}
    results = {"setting": {"steps": 1, "batch_size": 2, "held_out": 3}, "rows": {"lora": row}}
    assert "| [lora](#lora) | 12 | 50.0 % | 1.000 | 7 | not known | 3 MB |" in page(results)
    assert "| [lora-xs](#lora-xs) | not measured |" in page(results)
    assert "Nothing has been measured" in page(read(tmp_path / "none.json"))


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The runs themselves are the demo's; here a method's row is a stand-in."""
    from benchmarks import methods as bench

    ran: list[str] = []
    tried: set[str] = set()

    def trained(task: object, name: str, order: list, data: list, held_out: int) -> dict:
        if name == "lora" and name not in tried:
            tried.add(name)
            raise RuntimeError("stopped")
        ran.append(name)
        return {
            "accuracy": 0.5, "final_loss": 1.0, "milliseconds": 7.0, "peak_bytes": None, "saved_bytes": 0, "trained": 1,
            "options": {}, "learning_rate": 0.1,
        }  # fmt: skip

    monkeypatch.setattr(bench, "trained", trained)
    argv = [
        "--out",
        str(tmp_path / "r.json"),
        "--page",
        str(tmp_path / "m.md"),
        "--only",
        "lora,lora-xs,dora",
        "--steps",
        "1",
    ]
    assert bench.main(argv) == 1 and "lora: RuntimeError: stopped" in capsys.readouterr().err
    assert bench.main(argv) == 0 and ran == ["dora", "lora-xs", "lora"]
    assert bench.main([*argv, "--again"]) == 0 and len(ran) == 6
    assert bench.main([*argv[:-1], "2"]) == 2 and "was run with" in capsys.readouterr().err
    assert bench.main(["--only", "nothing"]) == 2
    text = (tmp_path / "m.md").read_text()
    assert text.count("| 50.0 % |") == 3 and "1 steps of 16 docstrings" in text


@pytest.mark.slow
def test_demo_trains_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--quick", "--steps", "2", "--batch-size", "4", "--max-length", "16", "--out", str(tmp_path)]
    assert main(["demo", "--method", "lora-xs", *small]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [one["arm"] for one in results["arms"]] == ["lora", "lora-xs"]
    assert [one["trained"] for one in results["arms"]] == [663552, 36 * 256]
    assert "lora-xs(r=16" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert main(["demo", "--method", "nothing", *small]) == 2
    assert "--method: no method 'nothing'" in capsys.readouterr().err
