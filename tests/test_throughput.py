"""The kernels that only move bytes leave the memory time to: what their instructions take of a multiprocessor, read from the binary."""

import re
from dataclasses import replace

import pytest
import triton
from packaging.version import Version

from .support.compile_gate import run_gate
from .support.multiprocessor import why_not
from .support.sass import folded_by_ptxas, read_listing
from .support.throughput import faults, load_of
from .support.throughput_passes import PASSES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
# Triton 3.9 writes other code, a few percent to either side (0.77 of the memory's speed in the place of 0.88 at most).
of_this_compiler = pytest.mark.skipif(
    not Version("3.6") <= Version(triton.__version__) < Version("3.9"), reason="limits are those of Triton 3.6 to 3.8"
)

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
    around = {"LDG.E.128": 1, "IMAD.HI.U32": 3, "LOP3.LUT": 3, "BRA": 4, "IADD3": 1}
    assert code.longest_nest == ((2, 4), (1, 6)) and code.nested(3).names == around
    assert code.whole.cycles(warps=8, arch=90) == {
        "issue": 20.0, "alu": 8.0, "imad": 8.0, "float": 0.0, "special": 16.0, "memory": 32.0
    }  # fmt: skip


@of_this_compiler
def test_triton(full: bool) -> None:
    """All at once: it is one process that compiles them. Those of csrc/cuda are in test_nvcc_gate.py. Of LoRA's passes those of rank
    64 with --full alone: disassembling a kernel and running it in the model take a second each."""
    assert not faults([one for one in PASSES if not one.cuda and (full or one.options.get("R") != 64)])


@of_this_compiler
def test_what_is_past_a_limit_is_told() -> None:
    """And the same code with so much shared memory that one program is there where four were."""
    one = next(one for one in PASSES if one.source == "lora_expand" and one.options["dropout"])
    (finding,) = run_gate([{"launcher": one.source, "arch": 90, "code": one.name} | one.options])
    assert one.faults(load_of(one, finding)) == []
    (share, speed) = replace(one, limit=0.1, speed=1.1).faults(load_of(one, finding))
    assert "of the memory's time, at most 0.1" in share and "of the memory's speed, at least 1.1" in speed
    alone = load_of(one, replace(finding, shared=200 * 1024))
    assert alone.speed is not None and one.speed > 1.5 * alone.speed
    (fault,) = one.faults(alone)
    assert "of the memory's speed" in fault


def test_a_product_of_philox_is_one_instruction() -> None:
    """Both halves at once; written in the language the same products take an instruction each, which the count shows."""
    launchers = ("philox_words", "philox_in_halves")
    requests = [
        {"launcher": name, "arch": arch, "code": f"_{name}_kernel"} for arch in (80, 90, 100) for name in launchers
    ]
    names = [finding.code.whole.names for finding in run_gate(requests) if finding.code is not None]
    count = lambda names, text: sum(times for name, times in names.items() if re.match(text, name))  # noqa: E731
    for ours, planted in zip(names[::2], names[1::2], strict=True):
        assert not count(ours, r"IMAD\.HI") and count(planted, r"IMAD\.HI") >= 8
        assert count(ours, r"IMAD") + count(ours, r"LOP3") < 0.8 * (count(planted, r"IMAD") + count(planted, r"LOP3"))
    assert len(names) == len(requests)


def test_the_assembly_multiplies() -> None:
    """What the interpreter does not run: ptxas computes the product of constants itself, and its code shows the result."""
    from peftfast.kernels import numerics

    for a in (1, 0x80000000, 0xFFFFFFFF, 0x89ABCDEF, 0x10001):
        for factor in (0xD2511F53, 0xCD9E8D57):
            assert folded_by_ptxas(numerics._PRODUCT.value, [a, factor], 2) == [
                a * factor >> 32,
                a * factor & 0xFFFFFFFF,
            ]
