"""The recorder of the product kernel's table, on rows made up here: no GPU has measured any."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import product, registry
from benchmarks.registry import Case, Cost
from peftfast.configs import device as devices
from peftfast.configs import lora_product as configs
from peftfast.configs import nf4_product as nf4_configs
from peftfast.configs.device import Device

OPS = registry.load()
H200 = Device("NVIDIA H200", (9, 0), 132)
GPU = {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}


def rows(op: str, m: int, n: int, k: int, times: dict[str, float | None], dropout: float = 0.0) -> list[dict[str, Any]]:
    case = {"op": op, "shape": f"{n}x{k}", "m": m, "n": n, "k": k, "rank": 16, "dtype": "bfloat16", "dropout": dropout}
    found = [
        case | {"mode": "fwd", "provider": name, "p50": seconds, "within_budget": seconds is not None}
        for name, seconds in times.items()
    ]
    return found


def report(*groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {"machine": {"gpu": GPU}, "limits": {}, "rows": [row for group in groups for row in group]}


BARE = {"frozen": 100e-6, "peftfast:library": 108e-6}
FAST = {**BARE, "peftfast:product 1": 103e-6, "peftfast:product 2": 101e-6, "peftfast:product 3": None}
SLOW = {**BARE, "peftfast:product 1": 105e-6}


def test_what_is_kept_and_why_not() -> None:
    kept, below, odd, pointers, beaten = product.verdicts(
        report(
            rows("lora_product", 8192, 14336, 4096, FAST),
            rows("lora_product_dx", 8192, 14336, 4096, SLOW, 0.1),
            rows("lora_product", 5000, 4096, 4096, FAST),
            rows("lora_product", 8192, 4099, 4096, {**BARE, "peftfast:product 1": 99e-6}),
            rows("lora_product", 2048, 4096, 4096, {**FAST, "peftfast:library": 101e-6}),
            rows("lora_product", 2048, 64, 64, {"frozen": 1e-6, "peftfast:library": 2e-6}),
            rows("lora_product", 2048, 128, 128, {**FAST, "frozen": None}),
            rows("lora_linear", 2048, 64, 64, FAST),
        )
    )
    assert kept.kept and kept.candidate == "product 2" and kept.share == pytest.approx(100 / 101)
    assert kept.key == "bfloat16 rows n14336 k4096 m8192 r16 plain"
    assert kept.config is not None and kept.config.share == 0.9901
    assert kept.config.block_n == configs.candidates(16, "bfloat16", True, H200)[1].block_n
    assert below.key == "bfloat16 columns n4096 k14336 m8192 r16 dropout"  # dX has the layer's K columns
    assert (below.kept, below.reason) == (False, "below 98 % of the bare product")
    assert odd.key is None and "2048, 4096" in odd.reason and not pointers.kept and "copy engine" in pointers.reason
    assert beaten.reason == "the product and a pass are as fast"
    assert "95.2 %" in product.text([kept, below]) and "no: below" in product.text([kept, below])
    assert next(
        iter(product.verdicts(report(rows("lora_product_dx", 8192, 8, 8, SLOW, 0.1)), product.Standards(0.95)))
    ).kept


WAYS = {
    "frozen": 11e-6,
    "peftfast:dequantize": 20e-6,
    "peftfast:slabs 2": 19e-6,
    "peftfast:overlapped 2": 19.8e-6,
    "peftfast:fused 1": 18e-6,
    "peftfast:fused 2": 16e-6,
    "peftfast:fused 3": None,
}


def test_ways_of_a_4_bit_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {**WAYS, "peftfast:few rows": 15e-6}
    large = {
        "frozen": 100e-6,
        "peftfast:dequantize": 110e-6,
        "peftfast:overlapped 4": 103e-6,
        "peftfast:fused 1": 150e-6,
    }
    fused, beaten, beside, alike, other = product.verdicts(
        report(
            rows("nf4_product", 256, 14336, 4096, WAYS),
            rows("nf4_product", 64, 4096, 4096, few),
            rows("nf4_product_dx", 2048, 14336, 4096, large, 0.1),
            rows("nf4_product", 512, 4096, 4096, {**WAYS, "peftfast:fused 2": 19.5e-6, "peftfast:slabs 2": 19.6e-6,
                                                  "peftfast:fused 1": 20e-6}),
            rows("nf4_product", 300, 4096, 4096, WAYS),
            rows("nf4_product", 256, 128, 128, {"frozen": 1e-6, "peftfast:fused 1": 2e-6}),
        )
    )  # fmt: skip
    assert fused.kept and (fused.table, fused.candidate) == ("nf4_product", "fused 2")
    assert fused.key == "bfloat16 forward n14336 k4096 b64 nested m256 r16 plain"
    assert (fused.config.route, fused.config.gain, fused.config.block_n) == ("fused", 1.25, 128)
    assert not beaten.kept and beaten.reason == "not 1.03 times as fast as without"  # the few-row kernel is taken there
    assert beside.kept and (beside.config.route, beside.config.parts) == ("overlapped", 4)
    assert beside.key == "bfloat16 dx n14336 k4096 b64 nested m2048 r16 dropout"
    assert not alike.kept and other.key is None and "1024, 1536" in other.reason
    assert "overlapped 4" in product.text([beside])
    path = tmp_path / "nvidia-h200.json"
    assert product.renew(path, [fused, beaten, beside]) == (2, 0)
    devices._table.cache_clear()
    found = devices.measured(H200, "nf4_product", str(beside.key), nf4_configs.ProductConfig, tmp_path)
    assert found is not None and found.route == "overlapped" and found.gain == round(110 / 103, 4)
    slower = dataclasses.replace(fused, kept=False, reason="slower")
    assert product.renew(path, [slower]) == (0, 1) and list(json.loads(path.read_text())["nf4_product"]) == [beside.key]
    devices._table.cache_clear()


def test_the_rows_of_the_4_bit_product_by_hand() -> None:
    case = Case("nf4_product_dx", "", m=8, n=32, k=64, rank=4, dtype="bfloat16", dropout=0.1, device="cpu", mode="fwd")
    # dY 8*32*2, dX 8*64*2, dS 8*4*2, A 4*64*4, and the packed weight; products 2*8*64*(32+4).
    packed = 1024 + 32 + 4 + 4 * (16 + 256 + 1)
    assert OPS["nf4_product_dx"].cost(case, "whole") == Cost(512 + 1024 + 64 + 1024 + packed, 2 * 8 * 64 * 36)
    forward = dataclasses.replace(case, op="nf4_product", dropout=0.0)
    # And S = x Aᵀ here: B 4*32*4 beside A, 2*8*4*64 operations more.
    assert OPS["nf4_product"].cost(forward, "whole") == Cost(
        512 + 1024 + 1536 + packed, 2 * 8 * 32 * 68 + 2 * 8 * 4 * 64
    )
    assert OPS["nf4_product"].cost(forward, "frozen") == Cost(512 + 1024 + packed, 2 * 8 * 32 * 64)
    for name in ("nf4_product", "nf4_product_dx"):
        inputs = OPS[name].inputs(case, torch.Generator().manual_seed(0))
        (exact,), (base,) = (
            OPS[name].formula(case, inputs, part, torch.float64).values() for part in ("whole", "frozen")
        )
        assert 0.5 < (exact - base).std() / base.std() < 2  # the adapter's part is as large as the base's


def test_the_table_is_renewed_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nvidia-h200.json"
    path.write_text(json.dumps({"nf4_nest": {"any": {"num_warps": 4}}}))
    source = tmp_path / "product.json"

    def write(*groups: list[dict[str, Any]]) -> dict[str, Any]:
        source.write_text(json.dumps(report(*groups)))
        assert product.main(["--from", str(source), "--write", "--configs", str(tmp_path)]) == 0
        devices._table.cache_clear()
        return json.loads(path.read_text())

    forward, other = (rows("lora_product", 8192, n, 4096, FAST) for n in (4096, 8192))
    tables = write(forward, other)
    assert len(tables["lora_product"]) == 2 and tables["nf4_nest"]
    assert "2 entries written, 0 taken out" in capsys.readouterr().out
    key = configs.case(8000, 4096, 4096, 9, "bfloat16", True, False).key
    found = devices.measured(H200, "lora_product", key, configs.ProductConfig, tmp_path)
    assert found is not None and found.programs == 2 and found.share == 0.9901
    slower = rows("lora_product", 8192, 4096, 4096, SLOW)
    assert list(write(slower)["lora_product"]) == [configs.case(8192, 8192, 4096, 16, "bfloat16", True, False).key]
    assert write(rows("lora_product", 8192, 8192, 4096, SLOW)) == {"nf4_nest": {"any": {"num_warps": 4}}}
    path.unlink()
    assert product.renew(path, list(product.verdicts(report(slower)))) == (0, 0) and not path.exists()
    devices._table.cache_clear()


def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    few = ["--shapes", "16x24", "--tokens", "8", "--rank", "2", "--seconds", "0.01", "--device", "cpu"]
    assert product.main([*few, "--write", "--configs", str(tmp_path), "--out", str(out)]) == 2
    assert "no rows of a GPU" in capsys.readouterr().err
    measured = json.loads(out.read_text())
    assert {row["provider"] for row in measured["rows"]} == {"peftfast", "torch", "frozen"}
    assert all(row["within_budget"] for row in measured["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    with pytest.raises(SystemExit):
        product.main(["--from", str(tmp_path / "nothing.json")])


def test_the_rows_by_hand() -> None:
    case = Case("lora_product_dx", "", m=8, n=32, k=64, rank=4, dtype="bfloat16", dropout=0.1, device="cpu", mode="fwd")
    op = OPS["lora_product_dx"]
    # dY 8*32*2, W 32*64*2, dX 8*64*2, dS 8*4*2, A 4*64*4; products 2*8*64*(32+4).
    assert op.cost(case, "whole") == Cost(512 + 4096 + 1024 + 64 + 1024, 2 * 8 * 64 * 36)
    assert op.cost(case, "frozen") == Cost(512 + 4096 + 1024, 2 * 8 * 64 * 32)
    inputs = op.inputs(case, torch.Generator().manual_seed(0))
    exact = op.formula(case, inputs, "whole", torch.float64)["dx"]
    base = op.formula(case, inputs, "frozen", torch.float64)["dx"]
    assert 0.5 < (exact - base).std() / base.std() < 2  # the adapter's part is as large as the base's


def test_a_layer_by_the_kernel_is_a_provider() -> None:
    provider = next(one for one in OPS["lora_linear"].providers if one.name == "peftfast:product")
    before = os.environ.get(configs.VARIABLE)
    with provider.active():
        assert configs.choice() == "always"
    assert os.environ.get(configs.VARIABLE) == before
