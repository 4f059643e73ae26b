"""peftfast/configs: a choice for every size and device, and tables that are used or refused with their file's name."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftfast.configs import device as devices
from peftfast.configs import lora, lora_product, lora_terms, nf4, nf4_product, philox, sparse_delta, zeroth_order
from peftfast.configs.device import Device, measured

H200 = Device("NVIDIA H200", (9, 0), 132)
UNKNOWN = (Device(), Device("Some GPU of 2031", (13, 7), 500), Device("", (7, 5), 40), Device("x", (12, 0), 1))


def test_slug() -> None:
    assert H200.slug == "nvidia-h200"
    assert Device("NVIDIA GeForce RTX 5090 (Laptop)").slug == "nvidia-geforce-rtx-5090-laptop"
    assert Device().slug == ""


@pytest.mark.parametrize("device", (H200, *UNKNOWN), ids=lambda device: str(device.capability))
@pytest.mark.parametrize("M", [0, 1, 17, 8192, 2**33])
@pytest.mark.parametrize("R", [0, 1, 16, 100, 513])
def test_there_is_always_a_choice(device: Device, M: int, R: int) -> None:
    for wide, narrow, compute in (*lora.DTYPES, ("float16", "bfloat16", "bfloat16")):
        for size in (0, 1, 53, 4096):
            shrink = lora.lora_shrink(M, size, R, wide, narrow, compute, True, device)
            grad = lora.lora_weight_grad(M, size, R, wide, compute, False, device)
            assert 1 <= shrink.splits <= max(1, size // shrink.block_c)
            assert 1 <= grad.splits <= max(1, M // grad.block_m)
            lora.lora_expand(M, size, R, wide, narrow, compute, True, device)
            pair = lora.lora_dy_grads(M, size, R, compute, narrow, device)
            assert (pair.one_pass is None) == (R > lora.LARGEST_ONE_PASS_RANK)
            assert (pair.ds_pass is None) == (pair.db_pass is None) == (pair.one_pass is not None)


@pytest.mark.parametrize("device", (H200, *UNKNOWN), ids=lambda device: str(device.capability))
@pytest.mark.parametrize("ranks", [[16, 16, 16], [1], [3, 500], [0, 8], [16] * 300])
def test_there_is_always_a_choice_of_several(device: Device, ranks: list[int]) -> None:
    matrix = {(case.key, case.op) for case, _ in lora_terms.launch_matrix(device)}
    for wide, compute in lora_terms.DTYPES:
        for M, size in ((0, 8), (1, 4096), (8192, 53), (8192, 4096)):
            shrink = lora_terms.lora_terms_shrink(M, size, ranks, wide, compute, True, device)
            grad = lora_terms.lora_terms_weight_grad(M, size, ranks, wide, compute, False, device)
            assert 1 <= shrink.splits <= max(1, size // shrink.block_c)
            assert 1 <= grad.splits <= max(1, M // grad.block_m)
            lora_terms.lora_terms_expand(M, size, ranks, wide, compute, True, device)
            assert lora_terms.lora_terms_dy_grads(M, size, ranks, compute, compute, device)[0].block_r <= 32
            lora_terms.lora_dora_expand(M, size, ranks[0], wide, compute, device)
            assert lora_terms.lora_gain_grads(M, size, device).splits >= 1
            assert (
                lora_terms._case("lora_terms_shrink", M, ranks, wide, compute, True).key,
                "lora_terms_shrink",
            ) in matrix


def test_a_sum_is_cut_until_the_gpu_is_full() -> None:
    one_block = lora.lora_shrink(16, 4096, 16, "bfloat16", "bfloat16", "bfloat16", False, H200)
    assert one_block.splits == 32  # 64 steps of 64 columns, at least two for each
    many = lora.lora_shrink(2**20, 4096, 16, "bfloat16", "bfloat16", "bfloat16", False, H200)
    assert many.splits == 1


@pytest.mark.parametrize("device", (H200, *UNKNOWN), ids=lambda device: str(device.capability))
def test_a_few_rows_are_cut_until_the_gpu_is_full(device: Device) -> None:
    for M, N, K, R in (
        (1, 4096, 4096, 16),
        (64, 64, 128, 0),
        (16, 14336, 4096, 16),
        (33, 1, 256, 500),
        (1, 2**20, 128, 1),
    ):
        warps, scratch = nf4.nf4_linear_shares(M, N, K, R, device)
        assert warps == (12 if M > 16 else 16) * device.multiprocessors and scratch >= M * (N + R)
        few = nf4.nf4_linear(M, N, K, "bfloat16", device)
        assert 1 <= few.splits <= max(1, K // few.block_k // 2)
    # 8256 units for 2112 warps: a row tile's 32 lie with 12 warps at most, a tile's 64 of A with 22.
    assert nf4.nf4_linear_shares(1, 4096, 4096, 16, H200) == (2112, 12 * 4096 + 22 * 16)
    # 64 units of A and two times 4096 for 1584 warps: a tile's 32 with 8 warps at most, for 32 rows of x.
    assert nf4.nf4_linear_shares(64, 4096, 4096, 16, H200) == (1584, 64 * (8 * 4096 + 8 * 16))
    assert nf4.nf4_linear_shares(3, 16, 0, 4, H200) == (2112, 0)
    with pytest.raises(ValueError, match="block_k: expected at most 128"):
        nf4.LinearConfig(block_k=256)


@pytest.mark.parametrize(
    ("config", "field", "least"),
    [
        (lora.LoraConfig(64, 64, 16), "num_stages", 1),
        (lora.LoraConfig(64, 64, 16), "block_r", 16),
        (lora_terms.TileConfig(64, 64), "splits", 1),
        (lora_product.ProductConfig(), "programs", 1),
        (nf4.LinearConfig(), "splits", 1),
        (nf4.LinearConfig(), "num_stages", 1),
        (nf4_product.ProductConfig(), "splits", 0),
        (zeroth_order.ZoLinearConfig(16), "splits", 1),
        (zeroth_order.ZoLinearConfig(16), "block_n", 16),
        (sparse_delta.TileConfig(), "num_stages", 1),
    ],
)
def test_a_table_s_numbers_are_checked(config: object, field: str, least: int) -> None:
    """A field of a table that no kernel can run is an error when the table is read, not at a launch."""
    wrong = least // 2 if least else -1
    with pytest.raises(ValueError, match=f"^{field}: expected an integer of at least {least}, got {wrong}$"):
        dataclasses.replace(config, **{field: wrong})  # type: ignore[type-var]
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        dataclasses.replace(config, **{field: "3"})  # type: ignore[type-var]


def test_adapter_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    for route, casts, keeps_dtype, taken in (
        ("expand", True, True, "expand"),
        ("accumulate", False, True, "accumulate"),
        ("accumulate", False, False, "expand"),  # y has another dtype than the products: a pass over it is made anyway
        ("concatenate", True, True, "concatenate"),
        ("concatenate", False, True, "expand"),  # x would be copied for nothing
    ):
        monkeypatch.setitem(nf4.ADAPTER_ROUTES, "cpu", route)
        assert nf4.adapter_route("cpu", casts, keeps_dtype) == taken
    assert nf4.adapter_route("xpu", True, True) == "expand"


def test_the_matrix_holds_every_choice() -> None:
    """What the functions choose for some size is compiled by the gate."""
    matrix = {(case, config) for case, config in lora.launch_matrix(H200)}
    for wide, narrow, compute in lora.DTYPES:
        for M, R in ((1, 1), (100, 33), (5000, 500)):
            case = lora.case("lora_shrink", M, 4099, R, wide, narrow, compute, True)
            assert (case, lora.tile(case, H200)) in matrix
    assert len(list(nf4.launch_matrix(H200))) == 3 * len(nf4.BLOCK_SIZES) * 2
    assert [op for op, _ in philox.launch_matrix(H200)] == ["dropout_mask", "philox_words"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "_FOLDER", tmp_path)
    monkeypatch.setattr(measured, "__defaults__", (tmp_path,))
    return tmp_path


CASE = lora.Case("lora_shrink", "float32", "float32", "bfloat16", 16, 64, True)


def test_a_table_wins_over_the_heuristic(folder: Path) -> None:
    entry = {"block_m": 128, "block_c": 32, "block_r": 16, "num_warps": 8}
    (folder / "nvidia-h200.json").write_text(json.dumps({"lora_shrink": {CASE.key: entry}}))
    assert lora.tile(CASE, H200) == lora.LoraConfig(128, 32, 16, num_warps=8)
    assert lora.tile(CASE, Device("NVIDIA H100", (9, 0), 132)) != lora.tile(CASE, H200)
    assert lora.lora_shrink(8192, 4096, 16, "float32", "float32", "bfloat16", True, H200).block_m == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object of operators"),
        ('{"lora_shrink": []}', "lora_shrink: expected an object"),
        ('{"lora_shrink": {"%s": {"block_q": 1}}}', "unknown fields"),
        ('{"lora_shrink": {"%s": {"block_m": 16}}}', "missing"),
        ('{"lora_shrink": {"%s": {"block_m": 48, "block_c": 32, "block_r": 16}}}', "block_m: expected a power of two"),
        ('{"lora_shrink": {"%s": {"block_m": 16, "block_c": 8, "block_r": 16}}}', "block_c: expected an integer of at"),
    ],
)
def test_a_malformed_table_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "nvidia-h200.json").write_text(text.replace("%s", CASE.key))
    with pytest.raises(ValueError, match="nvidia-h200.json") as error:
        lora.tile(CASE, H200)
    assert message in str(error.value)


def test_configurations_need_neither_torch_nor_triton() -> None:
    """Loaded as files, since importing the package itself may bring torch."""
    program = (
        "import sys, types; package = types.ModuleType('peftfast'); package.__path__ = ['peftfast'];"
        "sys.modules['peftfast'] = package;"
        "from peftfast.configs import lora, nf4, philox;"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[1])


@pytest.mark.parametrize(
    ("rows", "dropout", "ranks", "pays"),
    [
        (512, False, (16, 16), True),
        (511, False, (16, 16), False),
        (512, True, (16, 16), False),
        (512, False, (16, 64), False),  # the high one has the library alone, and together not
        (512, False, (32, 40), True),
        (512, True, (32, 40), False),
        (128, True, (64, 80), True),
        (127, False, (64, 80), False),
    ],
)
def test_where_a_group_pays_on_a_cpu(rows: int, dropout: bool, ranks: tuple[int, ...], pays: bool) -> None:
    assert lora.group_pays("cpu", rows, dropout, ranks) is pays
    assert lora.group_pays("cuda", rows, dropout, ranks)
