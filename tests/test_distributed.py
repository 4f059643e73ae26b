"""Several devices by torch's and accelerate's own engines: DDP, FSDP2, torch.distributed.checkpoint, device maps, offload."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfast
from tests.support import distributed_worker as worker

ROOT = Path(__file__).resolve().parents[1]
# float32 sums over a batch in halves and in one: the order of the sums differs, and AdamW at 1e-2 makes more of it with each step.
TOLERANCE = 2e-4
LAYERS = 14  # seven projections of two decoder layers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every scenario of the worker, run once by two processes; rank 0's results."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.distributed_worker", str(rank), str(folder / "meet"), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(worker.WORLD)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)[-6000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(worker.WORLD)]
    for name, result in ranks[1].items():
        if "error" in result:
            ranks[0].setdefault(name, {})["error"] = result["error"]
    return ranks[0]


def of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def assert_same(losses: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize("base", ["dense", "4-bit"])
def test_single_is_stock(results, base: str) -> None:
    """What the sharded runs are compared with; the losses move, so that equal losses say something."""
    single = of(results, f"single {base}")
    assert_same(single["patched"], single["stock"])
    assert single["fused"] > 0
    assert max(single["stock"]) - min(single["stock"]) > 50 * TOLERANCE * single["stock"][0]


@pytest.mark.parametrize("base", ["dense", "4-bit"])
def test_ddp(results, base: str) -> None:
    ddp = of(results, f"ddp {base}")
    assert ddp["fused"] > 0 and not ddp["reasons"]
    assert_same(ddp["losses"], of(results, f"single {base}")["stock"])


def test_ddp_patched_through_the_wrapper(results) -> None:
    inside = of(results, "ddp patched inside")
    assert inside["layers"] == LAYERS and inside["fused"] > 0
    assert_same(inside["losses"], of(results, "single dense")["stock"])


def test_disable_adapter_before_the_backward_under_ddp(results) -> None:
    disabled = of(results, "ddp disabled")
    assert_same(disabled["patched"], disabled["stock"])


@pytest.mark.parametrize("layers", ["sparse ddp", "sparse ddp resident"])
def test_ddp_moves_all_workers_supports_alike(results, layers: str) -> None:
    sparse = of(results, layers)
    assert sparse["same_supports"]
    assert_same(sparse["ddp"], sparse["single"])
    assert sparse["single"][-1] > 0  # weights that changed place
    assert any("process_group is not given" in message for message in sparse["warned"])


@pytest.mark.parametrize("base", ["dense", "4-bit uint8", "4-bit bfloat16"])
def test_fsdp2_by_decoder_layer_stays_fused(results, base: str) -> None:
    fsdp = of(results, f"fsdp {base}")
    if "unsupported" in fsdp:
        pytest.skip(fsdp["unsupported"])
    assert fsdp["is_dtensor"] == "DTensor" and fsdp["same_keys"]
    assert fsdp["fused"] > 0 and not fsdp["reasons"]
    assert_same(fsdp["losses"], of(results, f"single {base.split()[0]}")["stock"])


def test_dora_on_a_sharded_base_that_was_written(results) -> None:
    written = of(results, "fsdp dora")
    assert_same(written["patched"], written["stock"])


def test_fsdp2_by_linear_falls_back(results) -> None:
    fsdp = of(results, "fsdp each linear")
    assert fsdp["fused"] == 0
    # fully_shard gives the base layer a class of its own, which patch does not know; the weight in it is a DTensor.
    assert any("FSDPLinear" in reason or "DTensor" in reason for reason in fsdp["reasons"]), fsdp
    assert any("FSDPLinear" in reason or "DTensor" in reason for reason in fsdp["report"]), fsdp
    assert_same(fsdp["losses"], of(results, "single dense")["stock"])


def test_fsdp2_before_patch_falls_back(results) -> None:
    fsdp = of(results, "fsdp patched after")
    assert fsdp["fused"] == 0
    assert fsdp["report"] == ["wrapped by fully_shard before patching: patch first"]
    assert_same(fsdp["losses"], of(results, "single dense")["stock"])


@pytest.mark.parametrize("base", ["dense", "4-bit"])
def test_distributed_checkpoint(results, base: str) -> None:
    saved = of(results, f"checkpoint {base}")
    if torch.cuda.is_available():
        # Few rows run as a group there, but not in a model's first forward: sums of another order.
        assert_same(saved["went_on"], saved["resumed"])
    else:
        assert saved["went_on"] == saved["resumed"]
    assert saved["unexpected"] == [] and saved["adapter_keys"] == 2 * LAYERS
    assert_same(saved["whole"], saved["went_on"])


def test_distributed_checkpoint_of_own_4_bit_layers(results) -> None:
    own = of(results, "checkpoint own 4-bit")
    if "unsupported" in own:
        pytest.skip(own["unsupported"])
    assert len(own["same"]) == 10 and all(own["same"].values()), own


def batch() -> torch.Tensor:
    return worker.batches()[0]


def logged(
    model: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
    """Loss, gradients and what the log says of one step."""
    worker.logged.clear()
    caplog.clear()
    model.zero_grad()
    with caplog.at_level(logging.WARNING, "peftfast"):
        loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, caplog.text


@pytest.mark.parametrize("patched_first", [False, True])
def test_accelerate_offload_runs_stock(patched_first: bool, caplog) -> None:
    """Weights that hooks of accelerate bring in for the length of a module's forward: the fused path would read them before that."""
    from accelerate import cpu_offload

    reference = worker.llama()
    loss, grads, _ = logged(reference, caplog)
    model = worker.llama()
    if patched_first:
        peftfast.patch(model)
    cpu_offload(model.base_model.model, execution_device="cpu")
    report = peftfast.patch(model)
    assert len(report.stock) == LAYERS, report
    assert any(
        "on the meta device" in reason or "hook" in reason or "overridden" in reason for reason in report.reasons
    )
    offloaded, offloaded_grads, _ = logged(model, caplog)
    assert torch.equal(offloaded, loss)
    for name, grad in offloaded_grads.items():
        assert torch.equal(grad, grads[name]), name


def test_accelerate_device_map(caplog, tmp_path) -> None:
    """dispatch_model over a map of the processor and the disk: the same numbers."""
    from accelerate import dispatch_model

    loss, grads, _ = logged(worker.llama(), caplog)
    model = worker.llama()
    inner = model.base_model.model
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    names |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(inner, device_map=names, main_device="cpu", offload_dir=str(tmp_path))
    report = peftfast.patch(model)
    # Layer 1 lies on the disk. Layer 0's modules have hooks that bring their arguments to where they are already.
    assert len(report.stock) == LAYERS // 2 and all(".layers.1." in name for name in report.stock), report
    mapped, mapped_grads, _ = logged(model, caplog)
    torch.testing.assert_close(mapped, loss, rtol=1e-5, atol=0.0)
    for name, grad in mapped_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_second_gpu() -> None:
    """The current device is the first one: a launch without a guard would go there."""
    torch.cuda.set_device(0)
    stock, patched = worker.llama().to("cuda:1"), worker.llama().to("cuda:1")
    report = peftfast.patch(patched)
    assert len(report.fused) == LAYERS
    rows = batch().to("cuda:1")
    expected, loss = (model(input_ids=rows, labels=rows).loss for model in (stock, patched))
    expected.backward()
    loss.backward()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0.0)
    for (name, parameter), other in zip(patched.named_parameters(), stock.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
