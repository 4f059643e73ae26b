"""The end-to-end step: losses of stock and patched lie on each other, and a planted fault does not."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import activity, arms, end_to_end, llama
from benchmarks.arms import Arm, Problem, Trainee
from benchmarks.run import SELF_PAIR

WORDS = ("--device", "cpu", "--quick", "--threads", "1", "--steps", "6", "--length", "32")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(tmp_path: Path, *words: str, status: int = 0) -> dict:
    out = tmp_path / "step.json"
    assert end_to_end.main([*WORDS, *words, "--out", str(out)]) == status
    return json.loads(out.read_text())


@pytest.mark.slow
def test_stock_and_patched_lie_on_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path)
    rows = {(row["method"], row["arm"]): row for row in report["arms"]}
    for method in ("lora", "qlora"):
        stock, ours = rows[method, "peft"], rows[method, "peftfast"]
        assert ours["fused"] == [14, 14] and not ours["apart"] and 0 < ours["loss_gap"] < end_to_end.APART
        assert stock["losses"][-1] < stock["losses"][0]
        assert rows[method, "peft" + SELF_PAIR]["losses"] == stock["losses"]
        assert rows[method, "frozen"]["limit_s"] == stock["limit_s"] > 0
    assert rows["qlora", "peft"]["model_bytes"] < rows["lora", "peft"]["model_bytes"]
    assert rows["mezo", "torch"]["losses"][0] == pytest.approx(rows["lora", "peft"]["losses"][0], rel=0.01)
    for row in report["arms"]:
        assert row["tokens_per_second"] == pytest.approx(32 / row["p50"]) and len(row["losses"]) >= 6
        assert row["p20"] <= row["p50"] <= row["p80"] and row["steps"] == 3
    printed = capsys.readouterr().out
    assert "left out: lora, peft + liger: liger_kernel not installed" in printed and "14 of 14" in printed
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_planted_fault_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem) -> Trainee:
        trainee = arms.lora(problem, quantised=False, patched=True)
        for module in trainee.model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling = {name: 8 * value for name, value in module.scaling.items()}
        return trainee

    def breaks(problem: Problem) -> Trainee:
        raise RuntimeError("planted")

    planted = (
        next(arm for arm in arms.ARMS if arm.name == "peft" and arm.method == "lora"),
        Arm("peftfast", "lora", wrong),
        Arm("peftfast:breaks", "lora", breaks),
    )
    monkeypatch.setattr(end_to_end, "ARMS", planted)
    report = run(tmp_path, "--method", "lora", "--sequential", status=1)
    ours = next(row for row in report["arms"] if row["arm"] == "peftfast")
    assert ours["apart"] and ours["loss_gap"] > end_to_end.APART
    assert report["left_out"] == [
        {"method": "lora", "arm": "peftfast:breaks", "reason": "failed: RuntimeError: planted"}
    ]


def test_operations_by_hand() -> None:
    problem = Problem("tiny", None, 2, 16, 4, 0.0, 0.01, "cpu", torch.bfloat16, False)
    # q and o 128 x 128, k and v 64 x 128, gate, up and down 352 x 128; two blocks; a head of 256 x 128.
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128) + 256 * 128
    assert problem.size.linear_elements() == linear
    # Scores and values, two operations each, over half of 16 x 16 positions, 4 heads of 32, 2 rows, 2 blocks.
    attention = 2 * (2 * 16 * 16) * 4 * 32 * 2
    forward = 2 * 32 * linear + attention
    assert end_to_end.cost(problem, "mezo") == 2 * forward
    assert end_to_end.cost(problem, "lora") == 2 * forward + attention  # four products where the forward has two


def test_text_and_model_are_the_same_in_every_run() -> None:
    first, second = (list(llama.batches(3, 2, 16, "cpu")) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])
    models = [llama.build(llama.SIZES["tiny"], torch.bfloat16, "cpu", seed=3, layers=1) for _ in range(2)]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert llama.nbytes(models[0]) >= 2 * (llama.SIZES["tiny"].vocabulary * 128)


def test_busy_time_is_a_union() -> None:
    assert activity.union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert activity.union([]) == 0
    assert activity.measure(lambda: None, "cpu") is None


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, expected in (
        (["--arm", "no-such"], "--arm: expected some of"),
        (["--steps", "3"], "--steps: expected at least 4"),
        (["--dropout", "1"], "--dropout"),
        (["--density", "0"], "--density"),
        (["--out", str(tmp_path / "no" / "x.json")], "--out: no folder"),
    ):
        with pytest.raises(SystemExit) as error:
            end_to_end.main(words)
        assert error.value.code == 2 and expected in capsys.readouterr().err
