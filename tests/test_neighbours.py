"""Liger's kernels and DeepSpeed, really run, where they are installed: ``pip install liger-kernel``, ``DS_BUILD_OPS=0 pip install
deepspeed``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import neighbour_worker, small_models

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 14


def run(what: str, tmp_path: Path, processes: int = 1) -> dict[str, Any]:
    out = tmp_path / "out.json"
    started = []
    for rank in range(processes):
        # The path of this process, too: the libraries may be installed beside the environment.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + os.getpid() % 20000),
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tests.support.neighbour_worker", what, str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)[-5000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_use_liger_kernel_beside_patch(tmp_path: Path) -> None:
    """The forwards that Liger swaps in call the adapter layers as modules, so that they stay fused, with stock's losses."""
    found = run("liger", tmp_path)
    assert found["stock"]["liger"] == found["patched"]["liger"] == "liger_kernel.transformers.swiglu"
    assert "liger" not in found["plain"]["liger"]
    assert found["patched"]["fused"] == LAYERS
    stock, patched, plain = (torch.tensor(found[name]["losses"]) for name in ("stock", "patched", "plain"))
    assert len(stock) == neighbour_worker.STEPS and stock[-1] < stock[0]
    torch.testing.assert_close(patched, stock, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(plain, stock, rtol=2e-4, atol=0.0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_runs_stock_and_learns_as_one_process(tmp_path: Path) -> None:
    found = run("zero3", tmp_path, processes=2)
    assert found["fused"] == LAYERS
    assert found["reasons"] == {"the base weight is partitioned by DeepSpeed ZeRO-3": LAYERS}
    model = small_models.adapted("llama", "lora", torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    expected = []
    for batch in small_models.text_batches("llama", neighbour_worker.STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected), rtol=2e-4, atol=0.0)
