"""The sparse delta's Triton kernels as cubins: no spills, 16-byte accesses of every operand that is read as it lies, tensor cores.

PEFTFAST_FULL_GATE=1 compiles float16 too, and float32 for every architecture."""

import os

import pytest

from peftfast.configs import sparse_delta as configs
from peftfast.configs.device import Device

from .support.compile_gate import Finding, run_gate

pytestmark = pytest.mark.slow
ARCHITECTURES = (80, 90, 100)
FULL = bool(os.environ.get("PEFTFAST_FULL_GATE"))
WIDE = {
    "_gather_kernel": ("dyt_ptr", "xt_ptr"),
    "_tile_kernel": ("dy_ptr", "x_ptr"),
    "_block_kernel": ("dy_ptr", "x_ptr"),
    "_nf4_dequantize_kernel": ("packed_ptr",),  # out is patched, element by element, besides
}


def _requests() -> list[dict[str, object]]:
    requests: list[dict[str, object]] = []
    for arch in ARCHITECTURES:
        # float16 compiles as bfloat16 does.
        for dtype in configs.DTYPES if FULL else ("float32", "bfloat16") if arch == 90 else ("bfloat16",):
            requests += [
                {"launcher": name, "arch": arch, "dtype": dtype}
                for name in ("sparse_delta_gather", "sparse_delta_tiled")
            ]
            requests += [
                {"launcher": "sparse_delta_blocks", "arch": arch, "dtype": dtype, "side": side}
                for side in ((16, 32, 64, 128, 256) if arch == 90 and dtype == "bfloat16" else (16, 256))
            ]
            product = {"launcher": "sparse_delta_product", "arch": arch, "dtype": dtype}
            requests += [{**product, "M": 1}, {**product, "M": 16, "narrow": True}, {**product, "M": 40, "wide": True}]
            decoder = {"launcher": "sparse_delta_dequantize", "arch": arch, "dtype": dtype}
            requests += [decoder, {**decoder, "wide": True, "nested": False}]
            if arch == 80 and not FULL:  # what multiplies nothing compiles as on sm_90
                continue
            scatter = {"launcher": "sparse_delta_scatter", "arch": arch, "dtype": dtype}
            requests += [
                {**scatter, "write": False},
                {**scatter, "write": True},
                {**scatter, "write": True, "values": False},
            ]
            requests += [
                {"launcher": "sparse_adamw_step", "arch": arch, "dtype": dtype},
                {"launcher": "sparse_adamw_step", "arch": arch, "dtype": dtype, "index": "int64", "age": "int32"},
            ]
        requests += [
            {"launcher": "sparse_adamw_step", "arch": arch, "dtype": None},
            {"launcher": "sparse_adamw_step", "arch": arch, "dtype": "bfloat16", "stochastic": True},
            {"launcher": "sparse_adamw_step", "arch": arch, "dtype": "float32", "small": True},
            {"launcher": "sparse_adamw_step", "arch": arch, "dtype": "bfloat16", "stochastic": True, "small": True},
            {"launcher": "sparse_delta_gather", "arch": arch, "dtype": "bfloat16", "wide": True, "M": 1, "K": 4099},
            {"launcher": "sparse_delta_tiled", "arch": arch, "dtype": "bfloat16", "M": 2047, "N": 4099, "K": 4097},
        ]
    return requests


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return run_gate(_requests())


def test_every_launch_is_sound(findings: list[Finding]) -> None:
    faults = []
    for finding in findings:
        ragged = "K=4097" in finding.label  # rows of dy and x that no 16-byte access can read
        # Blocks below 64 are too small for the matrix instructions of sm_90 and sm_100: plain mma serves them.
        small = finding.kernel == "_block_kernel" and any(f"side={side}" in finding.label for side in (16, 32))
        tiled = finding.kernel in ("_tile_kernel", "_block_kernel") and not small
        matrix = tiled and "float32" not in finding.label
        faults += finding.faults(() if ragged else WIDE.get(finding.kernel, ()), matrix=matrix and not ragged)
    assert not faults, "\n".join(faults)
    assert {finding.arch for finding in findings} == set(ARCHITECTURES)
    assert {f.kernel for f in findings} == {
        *WIDE,
        "_product_kernel",
        "_patch_kernel",
        "_write_kernel",
        "_sparse_adamw_kernel",
    }


def test_configurations() -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        assert len(list(configs.launch_matrix(Device("", capability, 132)))) == 35
    with pytest.raises(ValueError, match="block_m: expected at most 64"):
        configs.GatherConfig(block_m=128)
    with pytest.raises(ValueError, match="power of two"):
        configs.TileConfig(block_n=96)
    assert 0 < configs.crossover("bfloat16", Device()) < 1
