"""Every CUDA source compiles for sm_80, sm_90a and sm_100 without spilling a register, into the instructions that it should."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from .support import nvcc_gate
from .support.cuda_emulator.build import CSRC, run_compiler
from .support.sass import Code, read_cubin
from .support.throughput import faults as throughput_faults
from .support.throughput_passes import PASSES

needs_nvcc = pytest.mark.skipif(nvcc_gate.nvcc_path() is None, reason="nvcc is not on PATH")

# 200 values live at once, in 32 registers a thread.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float *values, int steps) {
    float kept[200];
#pragma unroll
    for (int i = 0; i < 200; ++i) kept[i] = values[i * 1024 + threadIdx.x];
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < 200; ++i) kept[i] = kept[i] * kept[(i + 7) % 200] + step;
    }
#pragma unroll
    for (int i = 0; i < 200; ++i) values[i * 1024 + threadIdx.x] = kept[i];
}
"""
SOUND = 'extern "C" __global__ void sound(float *values) { values[threadIdx.x] *= 2.0f; }'


def test_there_are_sources() -> None:
    assert nvcc_gate.SOURCES


def check_the_few_row_product(kernels: dict[str, str]) -> None:
    """16 bytes a load that pass L1 by; products on tensor cores; x and A in 16 bytes too."""
    (finish,) = [text for name, text in kernels.items() if "finish" in name]
    # The second launch begins beside the first, and reads and writes nothing of the device's memory before that has ended.
    waited, *more = [at.start() for at in re.finditer(r"griddepcontrol\.wait", finish)]
    assert not more and waited < min(at.start() for at in re.finditer(r"(ld|st)\.global", finish))
    kernels = {name: text for name, text in kernels.items() if "multiply_part" in name}
    assert all("griddepcontrol.launch_dependents" in text for text in kernels.values())
    assert len(kernels) == 12  # two dtypes, x of that dtype or float32, three numbers of rows
    for name, text in kernels.items():
        # Two or four weight rows, before the loop and in it. Two groups of rows of x read the weight after each other.
        read, rows = (r"\.v4", 4) if "ELi4E" in name else (r"\.L2::cache_hint\.v4", 2)
        assert len(re.findall(rf"ld\.global\.nc\.L1::no_allocate{read}\.u32", text)) >= 2 * rows, name
        assert ("createpolicy.fractional.L2::evict_first" in text) == (rows == 2), name
        assert "mma.sync.aligned.m16n8k16" in text
        wide = {"ld.global.nc.v4.u32", "ld.global.nc.v4.f32", "ld.global.nc.v4.b32"}
        assert any(one in text for one in wide), name
        assert not re.search(r"ld\.global\.nc\.(v2\.)?[ubs](16|64)\b", text), name


def check_the_dequantiser(kernels: dict[str, str]) -> None:
    tiles = {name: text for name, text in kernels.items() if "dequantize_tiles" in name}
    assert len(tiles) == 12  # three dtypes, nested or not, rows apart or not
    for name, text in tiles.items():
        assert re.search(r"ld\.global\.nc\.v4\.[ubf]32", text) and re.search(r"st\.global\.v4\.[ubf]32", text), name


def check_the_quantiser(kernels: dict[str, str]) -> None:
    blocks = {name: text for name, text in kernels.items() if "quantize_blocks" in name and "Lb1E" in name}
    assert len(blocks) == 3
    for name, text in blocks.items():
        assert re.search(r"ld\.global\.nc\.v4\.[ubf]32", text), name


WIDE = {
    "nf4_linear.cu": check_the_few_row_product,
    "nf4.cu": check_the_dequantiser,
    "nf4_quantize.cu": check_the_quantiser,
}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", nvcc_gate.SOURCES, ids=lambda path: path.name)
def test_a_source(source: Path, full: bool, tmp_path: Path) -> None:
    """No kernel spills, and those that only move bytes leave the memory time to, and read and write wide. sm_90a without --full: what
    is asked of a source is one test, since its compilation takes up to half a minute for each architecture."""
    reports = nvcc_gate.compiled(source.name).reports
    assert reports and {report.arch for report in reports} == {"sm_90a"}
    if full:
        rest = [arch for arch in nvcc_gate.ARCHITECTURES if arch != "90a"]
        others = nvcc_gate.compile_report(source, tmp_path / "out.o", rest)
        assert {report.arch for report in others} == {f"sm_{arch}" for arch in rest}
        reports = reports + others
    faults = [fault for report in reports for fault in report.faults()]
    faults += throughput_faults([one for one in PASSES if one.source == source.name])
    assert not faults, "\n".join(faults)
    if source.name in WIDE:
        WIDE[source.name](nvcc_gate.kernels_of(nvcc_gate.compiled(source.name).ptx))


@needs_nvcc
def test_a_planted_spill_is_found(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS + SOUND)
    reports = nvcc_gate.compile_report(source, tmp_path / "out.o")
    assert len(reports) == 2 * len(nvcc_gate.ARCHITECTURES)
    assert all(bool(report.faults()) == (report.name == "spills") for report in reports), reports


@needs_nvcc
def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken( {")
    with pytest.raises(RuntimeError, match="broken.cu does not compile"):
        nvcc_gate.compile_report(source, tmp_path / "out.o")


def code_of(text: str, folder: Path, arch: str = "90a") -> dict[str, Code]:
    """Machine instructions of a source's kernels, compiled as csrc/cuda is."""
    source, target = folder / "source.cu", folder / "out.cubin"
    source.write_text(text)
    nvcc_gate.run_nvcc(source, f"-arch=sm_{arch}", "-cubin", "-o", target)
    return read_cubin(target.read_bytes())


# Ties to either side, what rounds up into the next power of two, denormals of float32 and of the result, the largest finite
# numbers and what rounds past them, infinities.
AWKWARD = (
    *(0x00000000, 0x80000000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x3FFFFFFF, 0xBFFF8000),
    *(0x00000001, 0x00007FFF, 0x00008000, 0x00018000, 0x807F8000, 0x007FFFFF, 0x00800000, 0x80017FFF),
    *(0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F8000, 0x7F800000, 0xFF800000),
    *(0x3F801000, 0x3F803000, 0x3F801001, 0x33000000, 0x33000001, 0x33C00000, 0x387FFFFF, 0x38800000, 0xB87FE000),
    *(0x477FE000, 0x477FEFFF, 0x477FF000, 0x477FFFFF, 0xC77FF000),
)


NARROWING = """
#include "cuda/intrinsics.h"
using namespace peftfast;
__device__ uint16_t bf16_of(float value) {
    uint16_t half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
extern "C" __global__ void f16_pair(int* out) { FOLDED_PAIRS }
extern "C" __global__ void f16_one(int* out) { FOLDED_f16_from_float }
extern "C" __global__ void bf16_one(int* out) { FOLDED_bf16_of }
extern "C" __global__ void used(float* x, uint32_t* out) {
    out[0] = bf16_from_float(x[0]), out[1] = cuda::pack_pair<DType::bf16>(x[1], x[2]);
}
"""


def narrowing(values: tuple[int, ...], bf16: list[int], f16: list[int]) -> str:
    """Kernels that store a number for each constant that is not rounded to what is expected."""
    text = NARROWING
    for function, halves in (("bf16_of", bf16), ("f16_from_float", f16)):
        rows = enumerate(zip(values, halves, strict=True))
        checks = [f"if ({function}(bits_float({value}u)) != {half}u) out[{i}] = 1;" for i, (value, half) in rows]
        text = text.replace(f"FOLDED_{function}", "\n".join(checks))
    pack, pairs = "cuda::pack_pair<DType::f16>", []
    for i, half in enumerate(f16):
        both = f"bits_float({values[i]}u), bits_float({values[-1 - i]}u)"
        pairs.append(f"if ({pack}({both}) != {half | f16[-1 - i] << 16}u) out[{i}] = 1;")
    return text.replace("FOLDED_PAIRS", "\n".join(pairs))


@needs_nvcc
def test_a_gpu_narrows_as_integers_do(tmp_path: Path) -> None:
    """The assembler rounds constants as its GPU would: nothing is left to store where all are as defined. It leaves the pair of
    bfloat16 alone, which is the conversion without a modifier, as that of one number is. A NaN is not asked for: it may differ."""
    values = torch.tensor([one - (one >> 31 << 32) for one in AWKWARD], dtype=torch.int32).view(torch.float32)
    bf16, f16 = (
        [one & 0xFFFF for one in values.to(dtype).view(torch.int16).tolist()]
        for dtype in (torch.bfloat16, torch.float16)
    )
    for arch in nvcc_gate.ARCHITECTURES:
        names = {
            name: set(code.whole.names) for name, code in code_of(narrowing(AWKWARD, bf16, f16), tmp_path, arch).items()
        }
        packed = {one for one in names.pop("used") if one.startswith("F2F")}
        assert packed in ({"F2FP.BF16.PACK_AB"}, {"F2FP.BF16.F32.PACK_AB"}), (arch, packed)
        assert len(names) == 3 and not any("ST" in one for found in names.values() for one in found), (arch, names)
    wrong = ([one ^ (i == 2) for i, one in enumerate(halves)] for halves in (bf16, f16))
    for name, code in code_of(narrowing(AWKWARD, *wrong), tmp_path).items():
        assert any("ST" in one for one in code.whole.names), name


ROOTS = """
#include "philox.h"
extern "C" __global__ void ours(float* x) { x[threadIdx.x] = peftfast::philox::root(x[threadIdx.x]); }
extern "C" __global__ void theirs(float* x) { x[threadIdx.x] = __fsqrt_rn(x[threadIdx.x]); }
"""
# Every word's squared radius, each float that a word becomes once.
RADII = """
#include <math.h>
#include <stdio.h>

static float seen;
#define sqrtf(x) (seen = (x), 0.0f)
#include "philox.h"

int main() {
    float least = INFINITY, most = 0.0f;
    long zeros = 0;
    for (uint64_t word = 0; word <= 0xffffffffu;) {
        peftfast::philox::normal_pair(static_cast<uint32_t>(word), 0);
        if (seen == 0.0f) ++zeros;
        if (seen != 0.0f) least = seen < least ? seen : least, most = seen > most ? seen : most;
        if (!(seen >= 0.0f)) return 1;
        word += word < (1u << 24) ? 1 : 1ull << (39 - __builtin_clzll(word));
    }
    printf("%a %a %ld", least, most, zeros);
}
"""


@needs_nvcc
def test_the_root_of_a_radius_is_the_compilers_own(tmp_path: Path) -> None:
    """The instructions that __fsqrt_rn runs for numbers that its test lets through, and a squared radius is 0 or such a number."""
    steps = [r"MUFU\.RSQ (R\d+), ", r"FMUL(?:\.FTZ)? (R\d+), (R\d+), (R\d+)", r"FMUL(?:\.FTZ)? R\d+, R\d+, 0\.5 ",
             r"FFMA (R\d+), -(R\d+), \2, R\d+ ", r"FFMA R\d+, R\d+, R\d+, R\d+ "]  # fmt: skip
    from triton import knobs

    for arch in nvcc_gate.ARCHITECTURES:
        code_of(ROOTS, tmp_path, arch)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(tmp_path / "out.cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parts = re.split(r"\.section\s+\.text\.(\w+),", text)
        listing = dict(zip(parts[1::2], parts[2::2], strict=True))
        for name in ("ours", "theirs"):
            text = listing[name].split("RET.REL")[0]
            assert re.search(".*?".join(steps), text, re.DOTALL), (arch, name, text)
        assert "-0xd000000" in listing["theirs"] and "0x727fffff" in listing["theirs"], arch
        assert "MUFU" in listing["ours"] and "BRA `(.L_x_" not in listing["ours"].split("EXIT")[0]
    source, program = tmp_path / "radii.cpp", tmp_path / "radii"
    source.write_text(RADII)
    run_compiler("-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC}", source, "-o", program)
    least, most, zeros = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert float.fromhex(least) == 2.0**-23 and 45 < float.fromhex(most) < 46 and zeros == "1"
