"""The benchmark kit: what it counts by hand, that a slow provider is named, and that a wrong one shows no speed."""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import (
    compare,
    dram,
    growth,
    layers,
    limits,
    memory,
    plot,
    record,
    registry,
    run,
    shapes,
    table,
    timing,
    verify,
)
from benchmarks.registry import Case, Cost, Provider, Work
from tests.support.forked import forking

ROOT = Path(__file__).resolve().parents[1]
OPS = registry.load()
FIELDS = {
    *run.KEY,
    *("p20", "p50", "p80", "rounds", "calls_a_round", "graph", "preempted", "note", "spread", "self_pair", "noise"),
    *("bytes", "flops", "dram_bytes", "limit_s", "bound", "percent_of_limit", "computes", "copies"),
    *("error", "budget", "worst_result", "checked_at_dropout", "within_budget"),
    *("peak_bytes", "saved_bytes", "scratch_bytes"),
}
SMALL = ("--device", "cpu", "--tokens", "16", "--shapes", "64x128", "--rank", "4", "--quick", "--seconds", "0.02")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine copies and multiplies is measured as ever, in less time: no number of it is looked at here."""
    for sizes, value in ((limits._COPY_BYTES, 2**22), (limits._MATRIX_SIZE, 128), (limits._REPEATS, 3)):
        monkeypatch.setitem(sizes, "cpu", value)


def measured(tmp_path: Path, *arguments: str, status: int = 0) -> dict:
    out = tmp_path / "rows.json"
    assert run.main([*SMALL, *arguments, "--out", str(out)]) == status
    return json.loads(out.read_text())


def with_provider(monkeypatch: pytest.MonkeyPatch, op: str, provider: Provider) -> None:
    found = OPS[op]
    monkeypatch.setitem(OPS, op, dataclasses.replace(found, providers=(*found.providers, provider)))


def test_formulas_by_hand() -> None:
    case = Case("lora_linear", "", m=8, n=32, k=64, rank=4, dtype="bfloat16", dropout=0.1, device="cpu", mode="fwd")
    # x 8*64*2, W 32*64*2, A and B 4*(32+64)*4, y 8*32*2, S 8*4*2; products 2*8*32*64 and 2*8*4*(32+64).
    forward = Cost(1024 + 4096 + 1536 + 512 + 64, 32768 + 6144)
    # dy 512, W 4096, dx 1024; x 1024 and S 64 again; A and B 1536 read, dA and dB 1536 written.
    backward = Cost(512 + 4096 + 1024 + 1024 + 64 + 1536 + 1536, 32768 + 12288)
    assert layers.cost(case, "whole", nf4=False) == forward
    assert layers.cost(dataclasses.replace(case, mode="bwd"), "whole", nf4=False) == backward
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    assert layers.cost(dataclasses.replace(case, mode="full"), "whole", nf4=False) == both
    assert layers.cost(case, "frozen", nf4=False) == Cost(1024 + 4096 + 512, 32768)
    # 1024 bytes of pairs, 32 block bytes, one float32 for 256 of them, the two code tables and the offset.
    assert layers.nf4_bytes(32, 64) == 1024 + 32 + 4 + 4 * (16 + 256 + 1)
    found = limits.Limits(1e9, {"bfloat16": 1e9})
    assert found.seconds(Cost(2000, 1000), "bfloat16") == (pytest.approx(2e-6), "memory")
    assert found.seconds(Cost(1000, 2000), "bfloat16") == (pytest.approx(2e-6), "matrix")


def test_nf4_bytes_are_those_of_the_weight() -> None:
    weight = torch.randn(48, 192)
    from peftfast.functional import nf4_quantize

    assert nf4_quantize(weight).nbytes == layers.nf4_bytes(48, 192)


def test_shapes() -> None:
    sizes = {shape.name: (shape.n, shape.k) for shape in shapes.parse("llama3-8b")}
    assert sizes == {
        "llama3-8b:q+o": (4096, 4096),
        "llama3-8b:k+v": (1024, 4096),
        "llama3-8b:gate+up": (14336, 4096),
        "llama3-8b:down": (4096, 14336),
    }
    assert [(s.n, s.k) for s in shapes.parse("gemma2-9b:o_proj")] == [(3584, 4096)]
    assert [(s.n, s.k) for s in shapes.parse("96x160")] == [(96, 160)]
    for text in ("llama3-8b:x", "0x4", "4x", "gpt"):
        with pytest.raises(ValueError, match="expected squares"):
            shapes.parse(text)


@pytest.mark.slow
def test_every_operator_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured(tmp_path)
    assert {row["op"] for row in report["rows"]} == set(OPS)
    for row in report["rows"]:
        assert set(row) == FIELDS, row["provider"]
        assert row["within_budget"], row
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["noise"] >= row["spread"]
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_s"] / row["p50"])
        assert math.isfinite(row["error"]) and row["rounds"] >= timing.FEWEST_ROUNDS
    machine = report["machine"]
    assert machine["cpu"]["name"] and machine["cpu"]["threads"] == 1 and machine["versions"]["torch"]
    left_out = {(entry["provider"], entry["reason"]) for entry in report["left_out"]}
    assert not [reason for _, reason in left_out if reason.startswith("failed")]
    assert ("torch.compile", "compiles for seconds: left out by --quick") in left_out
    printed = capsys.readouterr().out
    assert "limits measured in this run" in printed and "left out: torch.compile" in printed
    saved = {row["provider"]: row["saved_bytes"] for row in report["rows"] if row["op"] == "lora_linear"}
    assert saved["peftfast"] == 16 * 128 * 2 + 16 * 4 * 2 + 8  # x, S and the seed
    assert saved["frozen"] == 0 < saved["peftfast"] < saved["peft:16bit"]

    written = plot.plot(report, tmp_path / "plots")
    assert {path.name for path in written} == {*(f"{op}.png" for op in OPS), "roofline.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{record.BEGIN}\nstale\n{record.END}\nafter\n")
    arguments = [str(tmp_path / "rows.json"), "--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert record.main(arguments) == 0
    assert len(list((tmp_path / "results").glob("*/*.json"))) == len(OPS)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "`qlora_linear`, forward and backward" in text and "64x128" in text
    assert record.main(arguments) == 0 and readme.read_text() == text
    listed = (tmp_path / "results" / "README.md").read_text()
    assert all(f"`{op}`" in listed for op in OPS) and "`lora_shrink`" not in text
    assert "torch.compile: compiles for seconds" in listed and "Nothing has been measured on a GPU" in listed
    readme.write_text("no markers")
    assert record.main(arguments) == 0 and readme.read_text() == "no markers"


def test_a_planted_slow_down_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"repeat": 1}
    (ours,) = (p for p in OPS["lora_expand"].providers if p.name == "peftfast")

    def build(case: Case, inputs: registry.Inputs) -> Work:
        inner = ours.build(case, inputs)
        return Work(lambda: [inner.forward() for _ in range(times["repeat"])][-1])

    with_provider(monkeypatch, "lora_expand", Provider("planted", build))
    options = ("--op", "lora_expand", "--shapes", "512", "--provider", "peftfast", "planted", "torch")
    old = measured(tmp_path, *options)
    (tmp_path / "rows.json").rename(tmp_path / "old.json")
    times["repeat"] = 8
    new = measured(tmp_path, *options)
    slower = {change.row["provider"]: change.slower for change in compare.compare(old, new)}
    # A machine that became slower between the runs slows torch's row too; nothing else may slow ours.
    unplanted = not slower["peftfast"] or slower["torch"]
    assert slower["planted"] and unplanted, compare.text(compare.compare(old, new), everything=True)
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "rows.json")]) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOWER")]
    assert any("planted" in line for line in named)
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0


@pytest.mark.parametrize("fault", ["result", "gradient", "nan", "shape"])
def test_a_planted_wrong_kernel_shows_no_speed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ours,) = (p for p in OPS["lora_linear"].providers if p.name == "peftfast")

    def build(case: Case, inputs: registry.Inputs) -> Work:
        work = ours.build(case, inputs)
        forward = work.forward
        if fault == "gradient":
            work.leaves["dx"].register_hook(lambda gradient: gradient * 1.1)
        elif fault == "nan":
            work.forward = lambda: {"y": forward()["y"] * math.nan}
        elif fault == "shape":
            work.forward = lambda: {"y": forward()["y"][:, 1:]}
            work.grad = inputs["dy"][:, 1:]
        else:
            work.forward = lambda: {"y": forward()["y"] * 1.02}
        return work

    # Of our own name, so that the exit status tells.
    with_provider(monkeypatch, "lora_linear", Provider("peftfast:planted", build))
    report = measured(tmp_path, "--op", "lora_linear", "--provider", "peftfast", "*:planted", status=1)
    planted = {row["mode"]: row for row in report["rows"] if row["provider"] == "peftfast:planted"}
    assert set(planted) == {"fwd", "bwd", "full"}
    for mode, row in planted.items():
        caught = not (fault == "gradient" and mode == "fwd")
        assert (not row["within_budget"]) == caught
        assert (row["p50"] is None and row["percent_of_limit"] is None) == caught
    assert all(row["p50"] is not None for row in report["rows"] if row["provider"] == "peftfast")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("peftfast:planted")]
    assert sum("over budget" in line for line in lines) == (2 if fault == "gradient" else 3)


def test_verify_times_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert verify.main([*SMALL, "--op", "lora_dy_grads", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["within_budget"] and row["p50"] is None for row in rows)
    assert "not timed" in capsys.readouterr().out


def report_of(p50: float | None, noise: float, within_budget: bool = True) -> dict:
    row = {name: 1 for name in run.KEY} | {
        "op": "lora_linear",
        "provider": "peftfast",
        "shape": "",
        "dtype": "bfloat16",
        "mode": "fwd",
        "dropout": 0.0,
    }
    return {"rows": [{**row, "p50": p50, "noise": noise, "within_budget": within_budget}]}


def test_compare_by_the_noise_of_both() -> None:
    (change,) = compare.compare(report_of(1.0, 0.04), report_of(1.08, 0.05))
    assert not change.slower and not change.faster
    (change,) = compare.compare(report_of(1.0, 0.04), report_of(1.10, 0.05))
    assert change.slower
    (change,) = compare.compare(report_of(1.0, 0.04), report_of(None, 0.05, within_budget=False))
    assert change.lost and "OVER BUDGET" in compare.text([change])
    merged = compare.merge(report_of(1.0, 0.01), report_of(1.4, 0.01))["rows"][0]
    assert merged["p50"] == pytest.approx(1.2) and merged["noise"] == pytest.approx(0.2 / 1.2)


def test_rounds_are_interleaved_and_both_of_a_self_pair_agree() -> None:
    order: list[str] = []

    def runner(name: str) -> timing.Runner:
        return timing.Runner([lambda: order.append(name) or sum(range(2000))])

    times = timing.measure({"a": runner("a"), "b": runner("b")}, "cpu", timing.Settings(1, 0.01, 1e-4))
    changes = sum(first != second for first, second in zip(order, order[1:], strict=False))
    assert changes >= timing.FEWEST_ROUNDS
    assert times["a"].p50 == pytest.approx(times["b"].p50, rel=0.5)


def test_memory_counts_what_is_held_and_what_is_scratch() -> None:
    x = torch.ones(1024, requires_grad=True)
    weight = torch.ones(1024)

    def forward() -> registry.Results:
        wide = torch.cat((x.detach(),) * 8)  # 32 KiB, gone at the end
        return {"y": x * weight + wide.sum()}

    work = Work(forward, {"dx": x}, torch.ones(1024), (weight,))
    found = memory.measure({"it": (work, timing.nullcontext)}, "fwd", "cpu")["it"]
    assert found["saved_bytes"] == 0  # the product keeps the weight only, which is owned
    assert found["peak_bytes"] >= 8 * 4096 and 8 * 4096 <= found["scratch_bytes"] <= found["peak_bytes"]


def test_backend_is_asked_for_only_while_the_provider_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "cpu")
    provider = next(p for p in OPS["lora_linear"].providers if p.name == "peftfast:reference")
    with provider.active():
        assert os.environ[registry.BACKEND_VARIABLE] == "reference"
    assert os.environ[registry.BACKEND_VARIABLE] == "cpu"


def test_copies_share_no_memory() -> None:
    case = Case("qlora_linear", "", 4, 64, 64, 2, "bfloat16", 0.0, "cpu", "fwd")
    inputs = OPS["qlora_linear"].inputs(case, torch.Generator().manual_seed(0))
    copied = registry.copy_inputs(inputs)
    assert copied["x"].data_ptr() != inputs["x"].data_ptr() and torch.equal(copied["x"], inputs["x"])
    assert copied["weight"].packed.data_ptr() != inputs["weight"].packed.data_ptr()
    assert timing.copies_for(1, "cpu") == timing.MOST_COPIES and timing.copies_for(2**40, "cpu") == 1


def test_warm_inputs_are_the_same_in_every_call_and_filed_apart(tmp_path: Path) -> None:
    cold = measured(tmp_path, "--op", "dropout_mask", "--provider", "peftfast")
    warm = measured(tmp_path, "--op", "dropout_mask", "--provider", "peftfast", "--warm")
    assert all(row["copies"] > 1 for row in cold["rows"]) and all(row["copies"] == 1 for row in warm["rows"])
    folders = [record.file_report(report, tmp_path / "results")[0].parent.name for report in (cold, warm)]
    assert folders[1] == f"{folders[0]}-warm"
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda", "--warm"])


def test_growth_finds_the_slope(tmp_path: Path) -> None:
    base = {"op": "lora_shrink", "mode": "fwd", "provider": "peftfast", "dtype": "bfloat16", "dropout": 0.0}
    sizes = [{**base, "m": m, "n": 8, "k": 8, "rank": 4, "p50": 1e-6 * m**1.5} for m in (16, 64, 256)]
    (points,) = growth.curves({"rows": sizes}, "m").values()
    assert growth.slope(points) == pytest.approx(1.5)
    assert not growth.curves({"rows": sizes}, "rank")
    (path,) = growth.plot({"rows": sizes}, "m", tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_growth_measures_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    words = ["--op", "lora_shrink", "--over", "rank", "--rank", "2", "8", "32", "--shapes", "64x128", "--tokens", "32"]
    few = ["--out", str(out), "--provider", "peftfast", "torch", "--seconds", "0.02", "--device", "cpu"]
    assert growth.main([*words, *few]) == 0
    printed = capsys.readouterr().out
    assert "2 8 32" in printed
    assert {row["rank"] for row in json.loads((out / "growth-rank.json").read_text())["rows"]} == {2, 8, 32}
    assert (out / "growth-rank-lora_shrink.png").is_file()
    # The file that it wrote can be taken up again; run's options have no place beside it.
    assert growth.main([str(out / "growth-rank.json"), "--over", "rank"]) == 0
    for wrong in (["--over", "rank"], [str(out / "growth-rank.json"), "--over", "m"], ["no.json", "--over", "m"]):
        with pytest.raises(SystemExit):
            growth.main(wrong)
    with pytest.raises(SystemExit):
        growth.main([str(out / "growth-rank.json"), "--over", "rank", "--rank", "4"])


def test_a_stopped_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = run.Run.problem, []

    def problem(self: run.Run, op: registry.Op, case: Case) -> None:
        if seen:
            os.kill(os.getpid(), signal.SIGTERM)  # a time limit
        seen.append(case)
        original(self, op, case)

    monkeypatch.setattr(run.Run, "problem", problem)
    report = measured(tmp_path, "--op", "lora_shrink", "lora_expand", "--provider", "peftfast", status=130)
    assert report["stopped"] and {row["op"] for row in report["rows"]} == {"lora_shrink"}
    arguments = [
        str(tmp_path / "rows.json"),
        "--results",
        str(tmp_path / "results"),
        "--readme",
        str(tmp_path / "none"),
    ]
    with pytest.raises(SystemExit):
        record.main(arguments)
    assert record.main([*arguments, "--stopped"]) == 0


def test_a_run_ends_at_its_limit_and_writes_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written = run.Run.problem, []

    def problem(self: run.Run, op: registry.Op, case: Case) -> None:
        if written:
            written.append(json.loads((tmp_path / "rows.json").read_text()))
        written.append(case)
        original(self, op, case)

    monkeypatch.setattr(run.Run, "problem", problem)
    words = ("--provider", "peftfast", "--shapes", "32", "48")
    report = measured(tmp_path, "--op", "lora_shrink", "lora_expand", *words)
    assert not report["stopped"] and [(row["op"], row["n"]) for row in report["rows"]] == [
        ("lora_shrink", 32), ("lora_expand", 32), ("lora_shrink", 48), ("lora_expand", 48)
    ]  # fmt: skip
    partial = [one for one in written if isinstance(one, dict)]
    assert [len(one["rows"]) for one in partial] == [1, 2, 3] and all(one["stopped"] for one in partial)
    assert all(row["limit_s"] > 0 and row["noise"] > 0 for row in partial[-1]["rows"])
    written.clear()
    report = measured(tmp_path, "--op", "lora_shrink", "lora_expand", *words, "--limit", "0", status=130)
    assert report["stopped"] and len(report["rows"]) == 1


def test_compare_with_what_is_filed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--op", "lora_shrink", "--provider", "peftfast")
    now = measured(tmp_path, *words)
    filed = copy.deepcopy(now)
    for row in filed["rows"]:
        row["p50"] /= 1000
        del row["density"], row["adapters"]  # filed before they were added
    record.file_report(filed, tmp_path / "results")
    monkeypatch.setattr(compare, "measure", lambda *_: now)
    recorded = compare.recorded
    monkeypatch.setattr(compare, "recorded", lambda report: recorded(report, tmp_path / "results"))
    assert compare.main(["--recorded", *words]) == 1
    assert "SLOWER" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing is filed"):
        recorded(now, tmp_path / "empty")


def test_shapes_of_one_product_stand_side_by_side() -> None:
    places = plot._places([{"n": n, "k": k} for n, k in ((64, 32), (32, 64), (8, 8), (64, 32))])
    assert places[8, 8] == 64 and places[32, 64] == 2048 < places[64, 32]


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        # In the order in which their modules came, of which another test may have imported some before.
        (["--op", "nothing"], f"--op: expected some of {', '.join(OPS)}, got nothing"),
        (["--provider", "nobody"], "--provider: expected some of"),
        (["--shapes", "4y4"], "--shapes: expected squares"),
        (["--dropout", "1"], "--dropout: expected probabilities"),
        (["--rank", "0"], "--rank: expected at least 1"),
        (["--out", str(tmp_path / "no" / "file.json")], "--out: no folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_from_the_root_and_from_the_package(tmp_path: Path) -> None:
    with forking("torch", "peft", environment={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        for module in ("benchmarks.run", "peftfast.benchmarks.run"):
            argv = ["run", "--list", "--device", "cpu"]  # a GPU cannot be asked in a forked process
            listed = f"import runpy, sys; sys.argv = {argv}; runpy.run_module({module!r}, run_name='__main__')"
            status, said = process.run(listed, tmp_path)
            assert status == 0 and "qlora_linear" in said, said
    from peftfast.cli import bench

    assert bench.main(["run", "--list", "--op", "lora_shrink"]) == 0
    assert importlib.util.find_spec("peftfast.benchmarks.compare") is not None


def test_steps_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a help of its own name; what is none is named with those that there are."""
    from peftfast.__main__ import main
    from peftfast.cli import bench

    for step in bench.STEPS:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", step, "--help"])
        assert stopped.value.code == 0
        assert f"usage: python -m peftfast.benchmarks.{step} " in capsys.readouterr().out
    assert main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {step} " in said for step in bench.STEPS)
    assert main(["bench", "nope"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "got 'nope'" in line and all(step in line for step in bench.STEPS)


def test_table_shows_no_speed_over_budget() -> None:
    row = copy.deepcopy(report_of(None, 0.0, within_budget=False)["rows"][0]) | {
        **{"provider": "planted", "error": 1.0, "budget": 0.5, "saved_bytes": None},
        **{"peak_bytes": None, "scratch_bytes": None},
    }
    assert table.cells(row)[:2] == ("planted", "over budget")


@pytest.mark.gpu
def test_on_a_gpu_everything_is_timed_by_graph_replays(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--op", "lora_linear", "qlora_linear", "nf4_dequantize", "--shapes", "1024", "--tokens", "256", "--quick"]
    assert run.main([*words, "--provider", "peftfast", "torch", "frozen", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {row["mode"] for row in report["rows"]} == {"fwd", "bwd", "full"}
    for row in report["rows"]:
        assert row["graph"], (row["provider"], row["mode"], row["note"])
        assert row["copies"] > 1 and row["peak_bytes"] > 0
        # Events around replays: no call of these sizes takes less than a launch, or a hundred times the limit's time.
        assert row["limit_s"] / 2 < row["p50"] < 1e-2
    assert report["machine"]["gpu"]["multiprocessors"] > 0


@pytest.mark.gpu
def test_dram_bytes_of_a_copy(tmp_path: Path) -> None:
    if reason := dram.missing("cuda"):
        pytest.skip(reason)
    out = tmp_path / "rows.json"
    words = ["--op", "nf4_dequantize", "--shapes", "8192", "--provider", "peftfast", "--quick", "--dram"]
    assert run.main([*words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    if report["left_out"] and any(entry["provider"] == "DRAM bytes" for entry in report["left_out"]):
        pytest.skip(str(report["left_out"]))
    for row in report["rows"]:
        # What is read is cold; of what is written up to the size of L2 may still lie there.
        assert row["bytes"] - timing.cache_bytes("cuda") < row["dram_bytes"] < 1.2 * row["bytes"]
