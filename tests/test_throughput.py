"""The kernels that only move bytes leave the memory time to: what their instructions take of a multiprocessor, read from the binary."""

import re
from dataclasses import replace

import pytest

from .support import nvcc_gate
from .support.compile_gate import run_gate
from .support.sass import folded_by_ptxas, read_listing
from .support.throughput import Pass, loads, speed_of
from .support.throughput_passes import PASSES

pytestmark = pytest.mark.slow

LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/              @!P1 IMAD.HI.U32 R8, R12, -0x2daee0ad, RZ ;
        /*0030*/                   LOP3.LUT R8, R8, 0x1, R9, 0x96, !PT ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   IADD3 R2, P4, R2, UR4, RZ ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   MUFU.RSQ R3, R4 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP ;
"""


def test_a_listing_is_read() -> None:
    code = read_listing(LISTING)
    assert code.whole.units == {"issue": 10, "memory": 4, "imad": 2, "alu": 2, "special": 1}
    assert [loop.names for loop in code.loops] == [{"IMAD.HI.U32": 1, "LOP3.LUT": 1, "BRA": 1}]  # the inner one
    assert code.whole.cycles(warps=8, arch=90) == {
        "issue": 20.0, "alu": 8.0, "imad": 8.0, "float": 0.0, "special": 16.0, "memory": 32.0
    }  # fmt: skip


def _faults(passes: list[Pass]) -> list[str]:
    found = []
    for one, load in zip(passes, loads(passes, 90), strict=True):
        if load.share > one.limit:
            found.append(
                f"{one.label}: {load.busiest} works {load.share:.2f} of the memory's time, at most {one.limit}: {load.units}"
            )
        if load.speed is not None and load.speed < one.speed:
            found.append(f"{one.label}: {load.speed:.2f} of the memory's speed, at least {one.speed}")
    return found


def test_triton() -> None:
    """All at once: it is one process that compiles them."""
    assert not _faults([one for one in PASSES if not one.cuda])


def test_programs_that_do_not_fit_are_seen() -> None:
    """The same code with so much shared memory that one program is there where four were."""
    one = next(one for one in PASSES if one.source == "lora_expand" and one.options["dropout"])
    (finding,) = run_gate([{"launcher": one.source, "arch": 90, "code": True} | one.options])
    speeds = [speed_of(one, replace(finding, shared=shared)) or 0.0 for shared in (finding.shared, 200 * 1024)]
    assert speeds[0] >= one.speed > 1.5 * speeds[1]


@pytest.mark.skipif(nvcc_gate.nvcc_path() is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", sorted({one.source for one in PASSES if one.cuda}))
def test_cuda(source: str) -> None:
    assert not _faults([one for one in PASSES if one.source == source])


def test_a_limit_that_is_passed_is_told() -> None:
    one = next(one for one in PASSES if one.source == "gated_activation")
    (share, speed) = _faults([replace(one, limit=0.1, speed=1.1)])
    assert "of the memory's time, at most 0.1" in share and "of the memory's speed, at least 1.1" in speed


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_product_of_philox_is_one_instruction(arch: int) -> None:
    """Both halves at once; written in the language the same products take an instruction each, which the count shows."""
    ours, planted = (
        finding.code.whole.names
        for finding in run_gate(
            [{"launcher": name, "arch": arch, "code": True} for name in ("philox_words", "philox_in_halves")]
        )
        if finding.code is not None
    )
    count = lambda names, text: sum(times for name, times in names.items() if re.match(text, name))  # noqa: E731
    assert not count(ours, r"IMAD\.HI") and count(planted, r"IMAD\.HI") >= 8
    assert count(ours, r"IMAD") + count(ours, r"LOP3") < 0.8 * (count(planted, r"IMAD") + count(planted, r"LOP3"))


def test_the_assembly_multiplies() -> None:
    """What the interpreter does not run: ptxas computes the product of constants itself, and its code shows the result."""
    from peftfast.kernels import numerics

    for a in (1, 0x80000000, 0xFFFFFFFF, 0x89ABCDEF, 0x10001):
        for factor in (0xD2511F53, 0xCD9E8D57):
            assert folded_by_ptxas(numerics._PRODUCT.value, [a, factor], 2) == [
                a * factor >> 32,
                a * factor & 0xFFFFFFFF,
            ]
