"""Every CUDA source compiles for sm_80, sm_90a and sm_100 without spilling a register."""

import re
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """PTX for sm_90 of each kernel of the nf4 family, by source and mangled name."""
    folder, texts = tmp_path_factory.mktemp("ptx"), {}
    for source in nvcc_gate.SOURCES:
        if source.stem.startswith("nf4"):
            texts[source.stem] = nvcc_gate.kernels_of(nvcc_gate.compile_ptx(source, folder / f"{source.stem}.ptx"))
    return texts


@needs_nvcc
def test_the_few_row_product_streams_its_weight(ptx: dict[str, dict[str, str]]) -> None:
    """16 bytes a load that pass L1 by and leave L2 first; products on tensor cores; x and A in 16 bytes too."""
    kernels = {name: text for name, text in ptx["nf4_linear"].items() if "multiply_part" in name}
    assert len(kernels) == 8  # two dtypes, four numbers of rows
    for name, text in kernels.items():
        streamed = re.findall(r"ld\.global\.nc\.L1::no_allocate\.L2::cache_hint\.v4\.u32", text)
        assert len(streamed) >= 4, name  # two weight rows, before the loop and in it
        assert "createpolicy.fractional.L2::evict_first" in text and "mma.sync.aligned.m16n8k16" in text
        wide = {"ld.global.nc.v4.u32", "ld.global.nc.v4.f32", "ld.global.nc.v4.b32"}
        assert any(one in text for one in wide), name
        assert not re.search(r"ld\.global\.nc\.(v2\.)?[ubs](16|64)\b", text), name


@needs_nvcc
def test_the_dequantiser_and_the_quantiser_read_and_write_wide(ptx: dict[str, dict[str, str]]) -> None:
    tiles = {name: text for name, text in ptx["nf4"].items() if "dequantize_tiles" in name}
    assert len(tiles) == 12  # three dtypes, nested or not, rows apart or not
    for name, text in tiles.items():
        assert re.search(r"ld\.global\.nc\.v4\.[ubf]32", text) and re.search(r"st\.global\.v4\.[ubf]32", text), name
    blocks = {name: text for name, text in ptx["nf4_quantize"].items() if "quantize_blocks" in name and "Lb1E" in name}
    assert len(blocks) == 3
    for name, text in blocks.items():
        assert re.search(r"ld\.global\.nc\.v4\.[ubf]32", text), name
