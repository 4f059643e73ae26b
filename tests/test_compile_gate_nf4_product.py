"""The 4-bit product of many rows as cubins for every architecture of the gate: tensor cores, 16-byte accesses of both operands, no
spills, programs that fit beside each other. PEFTFAST_FULL_GATE=1 compiles all that the heuristics can produce."""

import os
from typing import Any

import pytest

from peftfast.configs import nf4_product as configs

from .support.compile_gate import SHARED_LIMIT, Finding, run_gate
from .support.launches import DEVICES

pytestmark = pytest.mark.slow
FULL = bool(os.environ.get("PEFTFAST_FULL_GATE"))
# Of one multiprocessor: CUDA programming guide, table of compute capabilities. A program takes 1 KiB beside its own.
REGISTERS, RESERVED = 65536, 1024
SHARED = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}


def _options(M: int, rank: int, transposed: bool) -> dict[str, Any]:
    """The hardest form: nested scales, dX under a mask, the forward with both biases."""
    return {"M": M, "R": rank, "transposed": transposed, "dropout": transposed, "nested": True}


# (rows, transposed, candidate) that are compiled always: every tile of sm_90; of the others the one with most registers.
CHOSEN = {
    80: {(1024, True, 1)},
    89: {(64, True, 0)},
    90: {(64, False, 0), (64, False, 1), (1024, False, 1), (1024, True, 2)},
    100: {(1024, True, 1)},
    120: {(64, True, 0), (1024, True, 0)},
}


def _requests() -> list[dict[str, Any]]:
    found = []
    for arch, device in DEVICES.items():
        for M, rank, transposed, number, _ in configs.launch_matrix(device):
            if FULL or (rank == 64 and (M, transposed, number) in CHOSEN[arch]):
                request = {
                    "launcher": "nf4_product",
                    "arch": arch,
                    **_options(M, rank, transposed),
                    "candidate": number,
                }
                found.append(request)
                if FULL:
                    found += [request | {"R": 0, "nested": False, "dropout": False}, request | {"out": "float32"}]
                    found += [request | {"dtype": "float16", "out": "float16"}, request | {"block_size": 4096}]
        if FULL or arch == 90:
            found.append({"launcher": "nf4_dequantize_columns", "arch": arch, "dtype": "bfloat16", "nested": True})
    # Columns that 32 divides and 64 does not, where a block of 64 straddles rows: as wide; others: no spills.
    straddling = {**_options(1024, 16, False), "candidate": 0, "K": 4096 + 32}
    ragged = {**_options(64, 13, True), "candidate": -1, "N": 4099, "K": 4094}
    awkward = (straddling, ragged) if FULL else (straddling,)
    return [*found, *({"launcher": "nf4_product", "arch": 90, **one} for one in awkward)]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return [one for one in run_gate(_requests()) if one.kernel != "_reduce_partials_kernel"]


def _is_whole(finding: Finding) -> bool:
    return "N=4099" not in finding.label


def test_cubins(findings: list[Finding]) -> None:
    faults = []
    for finding in findings:
        product = finding.kernel == "_nf4_product_kernel"
        operands = ("packed_ptr", "x_ptr", "out_ptr") if product else ("packed_ptr", "out_ptr")
        faults += finding.faults(operands if _is_whole(finding) else (), matrix=product)
    assert not faults, "\n".join(faults)
    assert {finding.arch for finding in findings} == set(SHARED_LIMIT)
    assert {finding.kernel for finding in findings} == {"_nf4_product_kernel", "_nf4_columns_kernel"}


def _config(finding: Finding) -> configs.ProductConfig:
    options = dict(word.split("=") for word in finding.label.split()[1:])
    device, transposed = DEVICES[finding.arch], options["transposed"] == "True"
    return configs.candidates(int(options["M"]), int(options["R"]), transposed, device)[int(options["candidate"])]


def test_programs_fit_beside_each_other(findings: list[Finding]) -> None:
    """As many as the configuration counts on, in registers and in shared memory: one decodes while another multiplies."""
    seen = 0
    for finding in findings:
        if finding.kernel == "_nf4_product_kernel" and _is_whole(finding):
            config = _config(finding)
            registers = -(-finding.registers // 8) * 8 * 32 * config.num_warps
            assert config.programs * registers <= REGISTERS, finding
            assert config.programs * (finding.shared + RESERVED) <= SHARED[finding.arch], finding
            seen += config.programs > 1
    assert seen >= 5


def test_bytes_and_maxima_are_asked_for_ahead(findings: list[Finding]) -> None:
    """The packed bytes of a step and its maxima of both levels are loaded before the loop for as many steps as run ahead, and in it."""
    for finding in findings:
        if finding.kernel == "_nf4_product_kernel" and _is_whole(finding) and finding.arch == 90:
            stages = _config(finding).num_stages
            nested = ("nested_absmax_ptr",) if "nested=True" in finding.label else ()
            for argument in ("absmax_ptr", *nested):
                assert sum(finding.streams[argument]["load"].values()) >= stages, finding


def test_a_mask_is_drawn_once(findings: list[Finding]) -> None:
    for finding in findings:
        if "dropout=True" in finding.label:
            assert 1 <= finding.philox_calls <= 4, finding
        else:
            assert finding.philox_calls == 0, finding
