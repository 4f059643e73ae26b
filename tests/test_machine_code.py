"""Machine code run on the CPU (tests/support/machine_code): what its instructions do is what ptxas computes with them, planted faults
are found, and Triton's kernels, compiled for sm_90, agree with their definitions."""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support.machine_code import launch
from tests.support.machine_code.program import program_text
from tests.support.sass import PARAMETERS, assembled, folded_by_ptxas, kernel_of, read_cubin

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
LATE = launch.Order()
ROOT = Path(__file__).resolve().parents[1]


@cache
def _program(ptx: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (code,) = read_cubin(assembled(ptx, Path(folder))).values()
    return launch.load(program_text(code), "planted")


def _run(
    ptx: str,
    tensors: list[torch.Tensor],
    numbers: list[int],
    threads: int = 32,
    shared: int = 0,
    order: launch.Order = LATE,
) -> None:
    """A kernel of these tensors' addresses and these numbers of 32 bits, in one block."""
    constants = launch.constants_of(threads, (1, 1, 1))
    packed = b"".join(tensor.data_ptr().to_bytes(8, "little") for tensor in tensors)
    packed += b"".join(number.to_bytes(4, "little") for number in numbers)
    constants[PARAMETERS[90] : PARAMETERS[90] + len(packed)] = packed
    extents = [launch.extent(tensor) for tensor in tensors]
    launch.execute(_program(ptx), "planted", extents, [], constants, (1, 1, 1), threads, shared, order)


def _computed(assembly: str, inputs: list[int], outputs: int) -> list[int]:
    """What the machine code makes of inline assembly for 32-bit registers whose inputs ptxas does not know."""
    given = [f"ld.param.u32 %in{i}, [from{i}];" for i in range(len(inputs))]
    parameters = "".join(f", .param .u32 from{i}" for i in range(len(inputs)))
    out = torch.zeros(outputs, dtype=torch.int32)
    _run(kernel_of(assembly, len(inputs), outputs, given, parameters), [out], inputs)
    return [value & 0xFFFFFFFF for value in out.tolist()]


WIDE = ".reg .b64 %a, %b, %c; mov.b64 %a, {$2, $3}; mov.b64 %b, {$4, $5}; OPERATION mov.b64 {$0, $1}, %c;"
# Of five inputs that may be anything.
INTEGERS = {
    "sums": "add.u32 $0, $1, $2; sub.u32 $0, $0, $3; add.u32 $0, $0, 1234567;",
    "a product and a sum": "mad.lo.u32 $0, $1, $2, $3;",
    "upper halves": ".reg .b32 %h; mul.hi.u32 $0, $1, $2; mul.hi.s32 %h, $3, $4; xor.b32 $0, $0, %h;",
    "shifts": ".reg .b32 %h, %n; and.b32 %n, $2, 63; shl.b32 $0, $1, %n; shr.s32 %h, $3, %n; xor.b32 $0, $0, %h; "
    "shr.u32 %h, $4, %n; add.u32 $0, $0, %h;",
    "funnel shifts": ".reg .b32 %h; shf.l.wrap.b32 $0, $1, $2, $3; shf.r.clamp.b32 %h, $3, $4, $5; xor.b32 $0, $0, %h;",
    "logic": ".reg .b32 %h; lop3.b32 $0, $1, $2, $3, 0x6b; lop3.b32 %h, $3, $4, $5, 0xe8; add.u32 $0, $0, %h;",
    "bytes": ".reg .b32 %h; prmt.b32 $0, $1, $2, 0xbb97; prmt.b32 %h, $3, $4, $5; xor.b32 $0, $0, %h;",
    "the smaller and the larger": ".reg .b32 %h; min.s32 $0, $1, $2; max.u32 %h, $3, $4; xor.b32 $0, $0, %h; "
    "min.u32 %h, $2, $3; add.u32 $0, $0, %h; abs.s32 %h, $5; add.u32 $0, $0, %h;",
    "comparisons": ".reg .pred %p, %q; .reg .b32 %h; setp.lt.s32 %p, $1, $2; setp.ge.u32.or %q, $3, $4, %p; "
    "selp.b32 $0, $1, $5, %q; selp.b32 %h, $2, $3, %p; xor.b32 $0, $0, %h;",
    "bits that are set": ".reg .b32 %h; popc.b32 $0, $1; bfe.s32 %h, $2, 7, 9; add.u32 $0, $0, %h; bfe.u32 %h, $3, 3, 17; "
    "xor.b32 $0, $0, %h;",
    "a quotient": ".reg .b32 %h, %d; or.b32 %d, $2, 1; shr.u32 %d, %d, 11; or.b32 %d, %d, 1; div.u32 $0, $1, %d; "
    "rem.s32 %h, $3, %d; xor.b32 $0, $0, %h;",
}
PAIRS = {
    "sums of 64 bits": "add.u64 %c, %a, %b; sub.u64 %c, %c, 1311768467463790320;",
    "products of 64 bits": "mul.lo.u64 %c, %a, %b; add.u64 %c, %c, %a;",
    "wide products": "mul.wide.u32 %c, $2, $4; add.u64 %c, %c, %a; .reg .b64 %d; mul.wide.s32 %d, $3, $5; xor.b64 %c, %c, %d;",
    "shifts of 64 bits": ".reg .b32 %n; and.b32 %n, $4, 63; shl.b64 %c, %a, %n; .reg .b64 %d; shr.s64 %d, %b, %n; "
    "xor.b64 %c, %c, %d; shr.u64 %d, %a, %n; add.u64 %c, %c, %d;",
    "comparisons of 64 bits": ".reg .pred %p, %q; setp.lt.s64 %p, %a, %b; setp.gt.u64.xor %q, %a, %b, %p; "
    "selp.b64 %c, %a, %b, %p; .reg .b32 %h; selp.b32 %h, 1, 0, %q; .reg .b64 %d; cvt.u64.u32 %d, %h; add.u64 %c, %c, %d;",
    "addresses": ".reg .b64 %d; shl.b64 %d, %a, 3; add.u64 %c, %d, %b; cvt.s64.s32 %d, $5; shl.b64 %d, %d, 2; add.u64 %c, %c, %d;",
}


def _signed(value: int, bits: int = 32) -> int:
    return value - (value >> bits - 1 << bits)


def _table(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def _permuted(a: int, b: int, picks: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    found = [(source[picks >> 4 * i & 7], picks >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes(255 * (byte >> 7) if sign else byte for byte, sign in found), "little")


def _quotient(a: int, b: int, c: int, *_: int) -> int:
    divisor = (b | 1) >> 11 | 1
    remainder = abs(_signed(c)) % divisor
    return a // divisor ^ (-remainder if c >> 31 else remainder)


def _shifted(a: int, b: int) -> int:
    by = b & 63
    return ((a << by) ^ (_signed(b, 64) >> by)) + (a >> by)


def _compared(a: int, b: int) -> int:
    less = _signed(a, 64) < _signed(b, 64)
    return (a if less else b) + ((a > b) != less)


# What ptxas leaves to the processor even of constants.
LEFT: dict[str, Callable[..., int]] = {
    "logic": lambda a, b, c, d, e: _table(a, b, c, 0x6B) + _table(c, d, e, 0xE8),
    "bytes": lambda a, b, c, d, e: _permuted(a, b, 0xBB97) ^ _permuted(c, d, e),
    "a quotient": _quotient,
    "shifts of 64 bits": _shifted,
    "comparisons of 64 bits": _compared,
}


@pytest.mark.parametrize("name", [*INTEGERS, *PAIRS])
def test_integers_are_those_that_ptxas_computes(name: str, full: bool) -> None:
    draw = random.Random(name)
    wide = name in PAIRS
    assembly, inputs, outputs = (WIDE, 4, 2) if wide else (INTEGERS[name], 5, 1)
    assembly = assembly.replace("OPERATION", PAIRS.get(name, ""))
    for _ in range(8 if full else 1):
        given = [
            draw.choice([draw.getrandbits(32), draw.getrandbits(32), 0xFFFFFFFF, 0, 1 << 31]) for _ in range(inputs)
        ]
        if name in LEFT:
            value = LEFT[name](*([given[0] | given[1] << 32, given[2] | given[3] << 32] if wide else given))
            expected = [value >> 32 * i & 0xFFFFFFFF for i in range(outputs)]
        else:
            expected = folded_by_ptxas(assembly, given, outputs)
        assert _computed(assembly, given, outputs) == expected, (name, given)


def _bits(values: torch.Tensor) -> list[int]:
    kind = {4: torch.int32, 2: torch.int16}[values.element_size()]
    return [value & (1 << 8 * values.element_size()) - 1 for value in values.view(kind).tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """Of a number, of numbers halfway between two and beside, of the smallest and past the largest; and back."""
    exponents = torch.arange(-150, 128, 7)
    near = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-8 + 2**-20, 1.9999, -1.0009765])
    x = torch.cat(
        [torch.ldexp(near, one) for one in exponents]
        + [torch.tensor([0.0, -0.0, 65519.0, 65520.0, float("inf"), 3.4e38])]
    )
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    there = f".reg .b16 %h; cvt.rn.{name}.f32 %h, $2; cvt.u32.u16 $0, %h; cvt.f32.{name} $1, %h;"
    for value in x[:: 1 + len(x) // 60]:
        narrow, wide = _computed(there, _bits(value.reshape(1)), 2)
        expected = value.to(dtype).reshape(1)
        assert [narrow] == _bits(expected) and [wide] == _bits(expected.float()), value


@pytest.mark.parametrize("operation", ["div.rn.f32 $0, $1, $2;", "fma.rn.f32 $0, $1, $2, $3;", "sqrt.rn.f32 $0, $1;"])
def test_float32_is_rounded_once(operation: str) -> None:
    """Quotients and roots are programs of many instructions, with other roundings inside."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(12, 3, generator=generator) * torch.exp2(torch.randint(-60, 60, (12, 3), generator=generator))
    numbers[:2] *= 2.0**-80  # below the normal numbers
    for a, b, c in numbers.abs():
        exact = {"div": a / b, "fma": (a.double() * b.double() + c.double()).float(), "sqr": a.double().sqrt().float()}[
            operation[:3]
        ]
        got = _computed(operation, [_bits(one.reshape(1))[0] for one in (a, b, c)], 1)
        assert got == _bits(exact.reshape(1)), (a, b, c)


EXCHANGE = """.visible .entry planted(.param .u64 to, .param .u32 by) {
.shared .align 16 .b8 held[512];
.reg .b32 %t, %a, %v, %by;
.reg .b64 %to, %at;
ld.param.u64 %to, [to];
ld.param.u32 %by, [by];
cvta.to.global.u64 %to, %to;
mov.u32 %t, %tid.x;
mov.u32 %a, held;
mad.lo.u32 %a, %t, 4, %a;
st.shared.u32 [%a], %t;
BARRIER
mov.u32 %a, held;
xor.b32 %v, %t, 33;
mad.lo.u32 %a, %v, 4, %a;
ld.shared.u32 %v, [%a];
mad.wide.u32 %at, %t, %by, %to;
st.global.u32 [%at], %v;
ret;
}
"""


@pytest.mark.parametrize("order", launch.ORDERS, ids=str)
def test_a_missing_barrier_is_found(order: launch.Order) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    _run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), [out], [4], 128, 512, order)
    assert out.tolist() == [i ^ 33 for i in range(128)]
    with pytest.raises(RuntimeError, match="a race: warp [0-3] (reads|writes) shared memory"):
        _run(EXCHANGE.replace("BARRIER", ""), [out], [4], 128, 512, order)


def test_an_access_outside_is_found() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    right = EXCHANGE.replace("BARRIER", "bar.sync 0;")
    with pytest.raises(RuntimeError, match="a store of 4 bytes at .*, outside of the launch's tensors"):
        _run(right, [out], [8], 128, 512)
    with pytest.raises(RuntimeError, match="a misaligned store"):
        _run(right, [out], [3], 128, 512)
    with pytest.raises(RuntimeError, match="outside of the block's"):
        _run(right, [out], [4], 128, 256)


def test_an_instruction_that_is_not_known_is_named() -> None:
    with pytest.raises(RuntimeError, match="not known: NANOSLEEP"):
        _run(".visible .entry planted(.param .u64 to) { nanosleep.u32 40; ret; }", [torch.zeros(1)], [])


SHUFFLES = """.visible .entry planted(.param .u64 to, .param .align 4 .b8 values[16]) {
.reg .b32 %t, %a, %v, %other;
.reg .b64 %to, %at;
ld.param.u64 %to, [to];
mov.u32 %t, %tid.x;
and.b32 %a, %t, 3;
shl.b32 %a, %a, 2;
mov.b64 %at, values;
cvt.u32.u64 %v, %at;
add.u32 %a, %a, %v;
ld.param.u32 %v, [%a];
add.u32 %v, %v, %t;
mad.wide.u32 %to, %t, 8, %to;
shfl.sync.idx.b32 %other, %v, 13, 0x181f, -1;
st.u32 [%to], %other;
shfl.sync.bfly.b32 %other, %v, 6, 0x1f, -1;
st.u32 [%to+4], %other;
ret;
}
"""


def test_shuffles_within_parts_of_a_warp_and_parameters_by_their_number() -> None:
    """Stored where the processor is not told which memory it is."""
    values, out = [1000, 2000, 3000, 4000], torch.zeros(32, 2, dtype=torch.int32)
    _run(SHUFFLES, [out], values)
    own = [values[lane % 4] + lane for lane in range(32)]
    assert out.tolist() == [[own[lane // 8 * 8 + 13 % 8], own[lane ^ 6]] for lane in range(32)]
    with pytest.raises(RuntimeError, match="outside of the launch's tensors"):
        _run(SHUFFLES, [out[:31]], values)


COPY = """.visible .entry planted(.param .u64 from, .param .u64 to) {
.shared .align 16 .b8 held[512];
.reg .b32 %t, %a, %v;
.reg .b64 %from, %to, %at;
ld.param.u64 %from, [from];
ld.param.u64 %to, [to];
cvta.to.global.u64 %from, %from;
cvta.to.global.u64 %to, %to;
mov.u32 %t, %tid.x;
mov.u32 %a, held;
mad.lo.u32 %a, %t, 16, %a;
mad.wide.u32 %at, %t, 16, %from;
cp.async.cg.shared.global [%a], [%at], 16;
cp.async.commit_group;
WAIT
ld.shared.u32 %v, [%a+8];
mad.wide.u32 %at, %t, 4, %to;
st.global.u32 [%at], %v;
ret;
}
"""


def test_a_missing_wait_is_found() -> None:
    """As late as may be: only a copy that is waited for is there."""
    given, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_group 1;"):
        for late in (False, True):
            _run(COPY.replace("WAIT", wait), [given, out], [], 32, 512, launch.Order(late))
            assert torch.equal(out, given[2::4]) == (wait.endswith(" 0;") or not late)


@pytest.mark.parametrize("waiting", [32, 7])
def test_a_barrier_that_nobody_arrives_at_is_found(waiting: int) -> None:
    """Of the copy engine; the rest of the warp waits for these threads."""
    body = f"""mov.u32 %a, held; mov.u32 %t, %tid.x; setp.ge.u32 %p, %t, {waiting};
    mbarrier.init.shared.b64 [%a], 1;
    @%p bra on;
    again: mbarrier.try_wait.parity.shared.b64 %q, [%a], 0;
    @!%q bra again;
    on: bar.sync 0;
    ret;"""
    declared = ".shared .align 8 .b64 held; .reg .b32 %t, %a; .reg .pred %p, %q;"
    with pytest.raises(RuntimeError, match="a deadlock"):
        _run(f".visible .entry planted(.param .u64 to) {{ {declared} {body} }}", [torch.zeros(1)], [], 32, 16)


def _in_machine_code(*arguments: str) -> str:
    """What pytest says of tests whose kernels are run as machine code."""
    left_out = ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [sys.executable, "-m", "tests.support.machine_code", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


# Of each way in which a kernel of ours works a test: nvcc's code, random words, bits of NF4, products of a warp and of a warp group,
# copies that run ahead, the copy engine's tiles.
SOME = [
    "tests/test_cuda_emulated_lora.py::test_the_mask",
    "tests/support/machine_code/planted.py",
    "tests/test_triton_philox.py::test_known_answers",
    "tests/test_triton_nf4.py::test_both_codes",
    "tests/test_triton_lora.py::test_the_order_of_the_sum_is_fixed",
    "tests/test_lora_product.py::test_the_order_of_tiles_does_not_show",
    "tests/test_nf4_product.py::test_the_order_of_tiles_does_not_show",
    "tests/test_ops_sparse_delta.py::test_triton_tiled",
]


@pytest.mark.slow
def test_kernels_in_machine_code() -> None:
    assert int(re.findall(r"(\d+) passed", _in_machine_code(*SOME))[0]) > len(SOME)


@pytest.mark.full
def test_every_kernel_in_machine_code() -> None:
    """Triton's and nvcc's: twenty minutes."""
    files = sorted(path.name for path in (ROOT / "tests").glob("test_triton_*.py"))
    files += [f"test_{name}.py" for name in ("lora_product", "nf4_product", "nf4_linear", "nf4_quantize")]
    files += [f"test_ops_{name}.py" for name in ("gated_activation", "lora_terms", "sparse_delta", "zeroth_order")]
    files += sorted(path.name for path in (ROOT / "tests").glob("test_cuda_emulated*.py"))
    done = _in_machine_code("-m", "not planted", *(f"tests/{name}" for name in files))
    assert int(re.findall(r"(\d+) passed", done)[0]) > 500
