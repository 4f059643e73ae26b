"""Every CUDA source compiles for sm_80, sm_90a and sm_100 without spilling a register."""

from pathlib import Path

import pytest

from .support import nvcc_gate

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


@needs_nvcc
@pytest.mark.parametrize("source", nvcc_gate.SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    reports = nvcc_gate.compile_report(source, tmp_path / "out.o")
    assert {report.arch for report in reports} == {f"sm_{arch}" for arch in nvcc_gate.ARCHITECTURES}
    faults = [fault for report in reports for fault in report.faults()]
    assert not faults, "\n".join(faults)


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
