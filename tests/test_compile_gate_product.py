"""The product kernel as cubins for every architecture of the gate: tensor cores, the copy engine, no spills, programs that fit beside
each other. PEFTFAST_FULL_GATE=1 compiles all that the heuristics can produce."""

import os
from typing import Any

import pytest

from peftfast.configs import lora_product as configs
from peftfast.configs.device import Device

from .support.compile_gate import SHARED_LIMIT, Finding, run_gate
from .support.launches import DEVICES

pytestmark = pytest.mark.slow
FULL = bool(os.environ.get("PEFTFAST_FULL_GATE"))
# Of one multiprocessor of sm_90: CUDA programming guide, table of compute capabilities. Each program takes 1 KiB beside its own.
REGISTERS, SHARED, RESERVED = 65536, 228 * 1024, 1024


def _chosen(arch: int, rank: int, out: str, dropout: bool, by_rows: bool, tma: bool, number: int) -> bool:
    """sm_90: every candidate where it is hardest, the first also as the forward asks for it; elsewhere one of each form."""
    if FULL:
        return True
    if arch == 90:
        hardest = dropout and tma and (rank, out) == (64, "bfloat16")
        return hardest or (tma and number < 2 and by_rows and rank == 16 and (out == "bfloat16" or number == 1))
    return dropout and rank == 64 and out == "bfloat16" and number == 0 and tma == (arch == 100)


def _requests() -> list[dict[str, Any]]:
    found = []
    for arch, device in DEVICES.items():
        for rank, out, by_rows, dropout, tma, number, _ in configs.launch_matrix(device):
            if _chosen(arch, rank, out, dropout, by_rows, tma, number):
                options = dict(R=rank, out=out, by_rows=by_rows, dropout=dropout, tma=tma, candidate=number)
                found.append({"launcher": "lora_product_tile", "arch": arch, **options})
    # Sizes that 16 does not divide, by pointers.
    ragged = dict(R=13, out="bfloat16", by_rows=True, dropout=True, tma=False, candidate=0, N=4099, K=4093)
    return [*found, {"launcher": "lora_product_tile", "arch": 90, **ragged}]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return run_gate(_requests())


def test_cubins(findings: list[Finding]) -> None:
    """No spills, shared memory within the limit, the architecture's matrix instruction; by pointers rows of x in 16 bytes."""
    faults = []
    for finding in findings:
        by_pointers = "tma=False" in finding.label and "N=4099" not in finding.label
        faults += finding.faults(wide=("x", "w") if by_pointers else (), matrix=True)
    assert not faults, "\n".join(faults)
    assert {finding.arch for finding in findings} == set(SHARED_LIMIT)


def test_tiles_are_moved_by_the_copy_engine(findings: list[Finding]) -> None:
    """Both operands' tiles for as many steps as run ahead, and the result in two halves; x, w and out are touched by nothing else."""
    seen = 0
    for finding in findings:
        if "tma=True" not in finding.label:
            assert finding.bulk == {"load": 0, "store": 0}, finding
            continue
        seen += 1
        assert finding.bulk["load"] >= 4 and finding.bulk["store"] == 2, finding
        assert not {"x", "w", "out"} & set(finding.streams), finding
        assert {"s_ptr", "b_ptr"} <= set(finding.streams), finding
    assert seen >= 7


def test_one_product_is_in_flight_while_the_next_is_issued(findings: list[Finding]) -> None:
    """The long loop's wait leaves one wgmma; the adapter's step and the end of a tile wait for all."""
    for finding in findings:
        if finding.arch == 90 and "N=4099" not in finding.label:  # element by element nothing runs ahead
            assert finding.waits.count(1) == 1, finding


def test_programs_fit_beside_each_other(findings: list[Finding]) -> None:
    """Two programs of the second candidate share a multiprocessor of sm_90, in registers and in shared memory."""
    device, seen = DEVICES[90], 0
    for finding in findings:
        if finding.arch != 90 or "tma=True" not in finding.label:
            continue
        options = dict(word.split("=") for word in finding.label.split()[1:])
        config = configs.candidates(int(options["R"]), options["out"], True, device)[int(options["candidate"])]
        registers = -(-finding.registers // 8) * 8 * 32 * config.num_warps
        assert config.programs * registers <= REGISTERS, finding
        assert config.programs * (finding.shared + RESERVED) <= SHARED, finding
        seen += config.programs == 2
    assert seen >= 2


def test_a_mask_is_drawn_once(findings: list[Finding]) -> None:
    """A thread computes its own counters and no other's: 32 rows of a tile at once, four counters a thread or two."""
    for finding in findings:
        if "dropout=True" in finding.label:
            assert 1 <= finding.philox_calls <= 4, finding
        else:
            assert finding.philox_calls == 0, finding


def test_the_gate_sees_what_it_should(findings: list[Finding]) -> None:
    """One stage more than the deepest candidate has is past sm_90's shared memory, and that candidate is past sm_89's."""
    (planted,) = run_gate([{"launcher": "crowded_product", "arch": 90}])
    assert any("bytes of shared memory" in fault for fault in planted.faults())
    assert configs.candidates(16, "bfloat16", True, Device("", (9, 0), 1))[2].num_stages == 4
    assert max(finding.shared for finding in findings if finding.arch == 90) > SHARED_LIMIT[89]
