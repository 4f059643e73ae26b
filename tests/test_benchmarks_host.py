"""benchmarks.host: what a layer costs the host, on a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interpreter


def test_the_layer_is_timed_with_and_without_replay(tmp_path: Path) -> None:
    """Replay must pay by more than any noise: it leaves out two thirds of a launch's way."""
    out = tmp_path / "host.json"
    code = f"import benchmarks.host as h; h.CALLS, h.ROUNDS = 20, 12; h.main(['--out', {str(out)!r}])"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    rows = {(row["arm"], row["dropout"]): row for row in report["rows"]}
    arms = ("frozen", "peft", "peftfast", "peftfast in Python", "peftfast without replay")
    assert set(rows) == {(arm, p) for arm in arms for p in (0.0, 0.1)}
    assert rows["peftfast in Python", 0.0]["forward_us"] < 0.6 * rows["peftfast without replay", 0.0]["forward_us"]
    assert rows["peftfast in Python", 0.1]["step_us"] < 0.6 * rows["peftfast without replay", 0.1]["step_us"]
    # The library leaves out half of the rest, or more, and costs no more than PEFT's layer.
    assert rows["peftfast", 0.1]["step_us"] < 0.7 * rows["peftfast in Python", 0.1]["step_us"]
    assert rows["peftfast", 0.0]["forward_us"] < 0.7 * rows["peft", 0.0]["forward_us"]
    assert "replay" in run.stdout
