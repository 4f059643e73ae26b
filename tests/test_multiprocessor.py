"""The model of a multiprocessor: what each thing that a warp waits for costs, where it can be said beforehand."""

import pytest

from .support.multiprocessor import (
    _BARRIER,
    _START,
    DRAM,
    L2,
    SHARED,
    Step,
    Way,
    cycles,
    resident,
    steps_of,
    why_not,
)
from .support.sass import DRAM_BYTES, read_listing
from .test_throughput import LISTING

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
NONE = 7  # no scoreboard
EXIT = Step("EXIT", None, 0, 1, NONE, NONE, 0)


def step(
    kind: str = "", unit: str | None = None, waits: int = 0, done: int = NONE, stall: int = 1, **rest: int
) -> Step:
    return Step(kind, unit, int(unit is not None), stall, done, NONE, waits, **rest)


def load(size: int = 128, **rest: int) -> Step:
    return step("LDG", "memory", done=0, size=size, **rest)


def one_warp(*steps: Step) -> float:
    return cycles([*steps, EXIT], 1, 1, 1, 90)


def test_what_a_warp_waits_for() -> None:
    wait = step(waits=1)
    assert one_warp(load(), wait) == 1 + DRAM + 1
    assert one_warp(load(cached=1), wait) == 1 + L2 + 1
    assert one_warp(step("LDS", "memory", done=0), wait) == 1 + SHARED + 1
    assert one_warp(step("LDS", "memory", done=0), step(waits=2)) == 2  # of another scoreboard
    assert one_warp(step(stall=13), step()) == 14
    # Two loads one after the other are on their way together; the second that needs the first's result is not.
    assert one_warp(load(), load(), wait) == 2 + DRAM + 1
    assert one_warp(load(), step("LDG", "memory", waits=1, done=0, size=128), wait) == 2 * (1 + DRAM) + 1


def test_groups_of_copies_that_are_left_open() -> None:
    copy, close = step("LDGSTS", "memory", size=128), step("LDGDEPBAR")
    first = one_warp(copy, close, step(stall=500), copy, close, step("DEPBAR", keeps=1))
    second = one_warp(copy, close, step(stall=500), copy, close, step("DEPBAR", keeps=0))
    assert (first, second) == (1 + DRAM + 1, 503 + DRAM + 1)


def test_a_barrier_waits_for_every_warp() -> None:
    """Warps of one part of the multiprocessor begin one after the other."""
    assert cycles([step("BAR"), EXIT], 8, 1, 1, 90) == 1 + _BARRIER + 1
    assert cycles([load(), step("BAR", waits=1), EXIT], 4, 1, 1, 90) > DRAM + _BARRIER


def test_a_unit_that_is_taken() -> None:
    """An instruction takes a part's integer unit for two cycles; others are issued meanwhile."""
    alone = cycles([*[step(unit="alu")] * 100, EXIT], 16, 1, 1, 90)
    assert alone == pytest.approx(100 * 16 / 2, rel=0.02)
    mixed = cycles([*[step(unit="alu"), step(unit="float")] * 100, EXIT], 16, 1, 1, 90)
    assert mixed == pytest.approx(alone, rel=0.02)


def test_the_memory_that_is_taken() -> None:
    """Enough on its way at once takes the time of its bytes; too little waits."""
    steps = [load(512), step(waits=1), EXIT]
    for scale in (1.0, 0.5):
        bytes_ = 64 * 40 * 512 * scale
        assert cycles(steps, 8, 320, 8, 90, scale) == pytest.approx(bytes_ / DRAM_BYTES[90], rel=0.001)
    assert cycles(steps, 8, 320, 1, 90) == pytest.approx(320 * (DRAM + _START), rel=0.01)


def test_how_many_programs_fit() -> None:
    assert resident(128, 0, 8, 90) == 2
    assert resident(129, 0, 8, 90) == 1  # registers come in eights
    assert resident(32, 0, 4, 90) == 16  # warps
    assert resident(32, 110 * 1024, 4, 90) == 2 and resident(32, 110 * 1024, 4, 80) == 1
    assert resident(16, 0, 1, 90) == 32


def test_the_way_through_the_code() -> None:
    """LISTING has a loop in a loop: the inner one runs, the outer one once, or both."""
    code = read_listing(LISTING)
    for trips in (1, 5):
        kinds = [step.kind for step in steps_of(code, Way(trips), 90)]
        assert kinds == ["LDC", "LDG", *["IMAD", "LOP3", "BRA"] * trips, "IADD3", "BRA", "MUFU", "EXIT"]
        kinds = [step.kind for step in steps_of(code, Way(trips, rounds=3), 90)]
        around = ["LDG", *["IMAD", "LOP3", "BRA"] * 3, "IADD3", "BRA"]
        assert kinds == ["LDC", *around * trips, "MUFU", "EXIT"]


BRANCHES = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x218] ;     /* 0x0 */
                                                                    /* 0x000fe20000000a00 */
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ; /* 0x0 */
                                                                    /* 0x000ea2000c1e1d00 */
        /*0020*/              @!P0 BRA `(.L_x_1) ;                  /* 0x0 */
                                                                    /* 0x000fea0003800000 */
        /*0030*/                   STG.E.U16 desc[UR6][R2.64], R4 ; /* 0x0 */
                                                                    /* 0x004fe8000c101506 */
        /*0040*/                   EXIT ;                           /* 0x0 */
                                                                    /* 0x000fea0003800000 */
.L_x_1:
        /*0050*/                   IADD3 R8, R9, UR4, RZ ;          /* 0x0 */
                                                                    /* 0x000fe2000fffe0ff */
        /*0060*/                   LDG.E.64 R10, desc[UR6][R8.64] ; /* 0x0 */
                                                                    /* 0x000ee2000c1e1b00 */
        /*0070*/                   EXIT ;                           /* 0x0 */
                                                                    /* 0x000fea0003800000 */
"""


def test_the_way_avoids_what_is_cold_and_knows_what_it_loads() -> None:
    code = read_listing(BRANCHES)
    assert [one.done for one in code.instructions][:3] == [7, 2, 7] and code.instructions[3].waits == 4
    ragged = steps_of(code, Way(), 90)
    assert [(step.kind, step.size) for step in ragged][-2:] == [("STG", 64), ("EXIT", 0)]
    whole = steps_of(code, Way(cold={"STG.E.U16": 1}, cached={8}), 90)
    loads = [(step.size, step.cached) for step in whole if step.kind == "LDG"]
    assert loads == [(512, False), (256, True)]  # the second from the second pointer's tensor, which the cache holds
