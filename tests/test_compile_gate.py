"""Every launch configuration as a cubin for sm_80, sm_89, sm_90, sm_100 and sm_120, without a GPU: no spills, shared memory
within the limit, 16-byte accesses, tensor cores.

The matrix is fixed here. PEFTFAST_FULL_GATE=1 compiles all that the heuristics can produce, on every architecture
(about 4,500 launches).
"""

import itertools
import os
from typing import Any

import pytest
import triton
from packaging.version import Version

from peftfast.configs import lora, nf4, zeroth_order
from peftfast.configs.device import Device

from .support.compile_gate import SHARED_LIMIT, Finding, run_gate

pytestmark = pytest.mark.slow
FULL = bool(os.environ.get("PEFTFAST_FULL_GATE"))
CAPABILITY = {80: (8, 0), 89: (8, 9), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
WIDE = {
    "_lora_shrink_kernel": ("x_ptr", "w_ptr"),
    "_lora_expand_kernel": ("base_ptr", "w_ptr", "out_ptr"),
    "_lora_weight_grad_kernel": ("x_ptr", "out_ptr"),
    "_lora_dy_grads_kernel": ("dy_ptr", "b_ptr", "db_ptr"),
    "_reduce_partials_kernel": ("partial_ptr",),
    "_reduce_two_kernel": ("partial_ptr", "other_partial_ptr"),
    "_nf4_dequantize_kernel": ("packed_ptr", "out_ptr"),
    "_nf4_quantize_kernel": ("weight_ptr",),
    "_nf4_nest_kernel": (),
    "_nf4_linear_kernel": ("packed_ptr",),
    "_dropout_mask_kernel": ("mask_ptr",),
    "_philox_words_kernel": (),
    "_perturb_kernel": (),  # its tensors come from a table: below
    "_zo_linear_kernel": ("weight_ptr", "x_plus_ptr", "x_minus_ptr"),
    "_zo_nf4_linear_kernel": ("packed_ptr", "x_plus_ptr", "x_minus_ptr"),
}
QLORA, PEFT = lora.DTYPES[:2]
DORA = lora.DTYPES[-1]  # norms, in float32 on tensor cores
# x, compute and output dtype of a product of a few rows.
FEW_ROWS = (("float32", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("float16", "float16", "float16"))
WHOLE = {"lora_shrink": 2**20, "lora_weight_grad": 64, "lora_dy_grads": 64}  # rows at which no sum is cut
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _case_request(case: lora.Case, arch: int, **options: Any) -> dict[str, Any]:
    return {
        "launcher": case.op,
        "arch": arch,
        "M": 8192 if case.rows == 64 else 8,
        "R": case.rank,
        "wide": case.wide,
        "narrow": case.narrow,
        "compute": case.compute,
        "dropout": case.dropout,
        **options,
    }


def _chosen(case: lora.Case, arch: int) -> bool:
    """On sm_90 QLoRA's and PEFT's dtypes, every rank under dropout and the ends of the rank buckets without, and of the other dtypes
    the largest rank; elsewhere that alone, where registers and memory run out. float16 compiles as bfloat16 does."""
    if FULL:
        return True
    if "float16" in (case.wide, case.narrow, case.compute):
        return False
    largest = case.rank == (lora.LARGEST_ONE_PASS_RANK if case.op == "lora_dy_grads" else 128)
    kind = (case.wide, case.narrow, case.compute)
    if arch == 90 and case.rows == 64 and kind in (QLORA, PEFT):
        return case.dropout or largest or case.rank == 16
    if arch == 90 and case.rows == 64:
        return largest and case.dropout
    if case.rows == 16 and arch != 90:
        return False
    return largest and kind in (QLORA, PEFT) and case.dropout == (kind == QLORA)


def _lora_requests() -> list[dict[str, Any]]:
    requests = []
    for arch, capability in CAPABILITY.items():
        for case, _ in lora.launch_matrix(Device("", capability, 132)):
            if not case.ragged and _chosen(case, arch):
                requests.append(_case_request(case, arch))
                # The sums whole in one program, which writes the result itself: the type of out is another.
                usual = case.rank == 128 and (case.wide, case.narrow, case.compute) in (QLORA, PEFT)
                if case.op in WHOLE and case.rows == 64 and (FULL or usual or case.op == "lora_dy_grads"):
                    requests.append(_case_request(case, arch) | {"M": WHOLE[case.op]})
    # PEFT's default rank: 16 does not divide it, and all is to be as wide all the same.
    for arch, op, (wide, narrow, compute) in itertools.product((80, 90, 100), lora.OPS, (QLORA, PEFT)):
        if op != "lora_dy_grads" or wide == compute:
            either = (False, True) if FULL or arch == 90 else (True,)
            for dropout in (False,) if op == "lora_dy_grads" else either:
                case = lora.Case(op, wide, narrow, compute, 16, 64, dropout)
                requests.append(_case_request(case, arch) | {"R": 8})
    # w as the backward hands it over, and the other options of expand.
    for arch, (wide, narrow, compute) in itertools.product((80, 90, 100), (QLORA, PEFT)):
        case = lora.Case("lora_expand", wide, narrow, compute, 16, 64, True)
        requests.append(_case_request(case, arch, transposed=True))
        requests.append(_case_request(case, arch, bias=True))
    return requests


def _ragged_requests() -> list[dict[str, Any]]:
    """Sizes that 16 does not divide, where addresses and masks take more registers."""
    requests = []
    for arch, capability in CAPABILITY.items():
        for case, _ in lora.launch_matrix(Device("", capability, 132)):
            some = case.rows == 64 and (case.wide, case.narrow, case.compute) in (QLORA, PEFT)
            some &= case.dropout == (case.wide == "float32")
            some &= case.rank in {80: (64,), 89: (), 90: (16, 64), 100: (64,), 120: ()}[arch]
            if case.ragged and (FULL or some):
                width = "N" if case.op in ("lora_expand", "lora_dy_grads") else "K"
                requests.append(_case_request(case, arch) | {"R": case.rank - 3, width: 4099})
    case = lora.Case("lora_shrink", *PEFT, 128, 64, True, True)
    return [*requests, _case_request(case, 120) | {"R": 125, "K": 4099}]


def _crowded_requests() -> list[dict[str, Any]]:
    """What sm_120 alone spilled."""
    cases = [
        lora.Case("lora_shrink", *DORA, 16, 64, True),
        lora.Case("lora_shrink", *DORA, 32, 64, False),
        lora.Case("lora_weight_grad", *DORA, 16, 64, False),
        lora.Case("lora_weight_grad", *DORA, 128, 16, False),
    ]
    cases += [lora.Case(op, *QLORA, 64, 64, False) for op in ("lora_shrink", "lora_weight_grad")]
    return [_case_request(case, 120) for case in cases]


def _other_requests() -> list[dict[str, Any]]:
    """On sm_89 what multiplies alone: the rest compiles as on sm_80."""
    requests: list[dict[str, Any]] = []
    for arch in CAPABILITY:
        for m, (x, compute, out) in itertools.product(
            (1, 16) if arch == 90 else (16,), FEW_ROWS if arch == 90 or FULL else FEW_ROWS[:1]
        ):
            few = {"launcher": "nf4_linear", "arch": arch, "x": x, "compute": compute, "out": out}
            requests.append(few | {"M": m, "nested": m == 16})
            if arch == 90:
                requests.append(few | {"M": m, "nested": m == 16, "warps": 4})
        if arch == 89 and not FULL:
            continue
        sizes = nf4.BLOCK_SIZES if FULL else (64, 4096) if arch == 90 else (64,)
        dtypes = nf4.DTYPES if arch == 90 or FULL else ("float32", "bfloat16")  # float16 compiles as bfloat16 does
        for dtype, block_size, nested in itertools.product(dtypes, sizes, (False, True)):
            if arch == 90 or nested or FULL:
                requests.append(
                    {
                        "launcher": "nf4_dequantize",
                        "arch": arch,
                        "dtype": dtype,
                        "block_size": block_size,
                        "nested": nested,
                    }
                )
        requests += [{"launcher": "dropout_mask", "arch": arch}, {"launcher": "philox_words", "arch": arch}]
        rows = {"launcher": "nf4_dequantize", "arch": arch, "dtype": "bfloat16", "block_size": 64, "nested": True}
        requests.append(rows | {"spare": 16, "first": 64})
        for dtype, block_size in itertools.product(dtypes, (64, 4096) if arch == 90 else (64,)):
            requests.append({"launcher": "nf4_quantize", "arch": arch, "dtype": dtype, "block_size": block_size})
        requests += [{"launcher": "nf4_nest", "arch": arch, "snapped": snapped} for snapped in (False, True)]
    return requests


def _zeroth_order_requests() -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = []
    for arch, capability in CAPABILITY.items():
        for op, dtype, rademacher, rows, _ in zeroth_order.launch_matrix(Device("", capability, 132)):
            if dtype == "float16" and not FULL:
                continue
            kind = {"dtype": dtype, "rademacher": rademacher, "arch": arch}
            if op == "zo_linear":
                chosen = rows in (16, 128) if arch in (80, 100) else arch == 90
                if FULL or (chosen and not rademacher):
                    requests.append({"launcher": "zo_linear", "M": rows, **kind})
                continue
            if FULL or arch in (80, 90) or (dtype == "bfloat16" and arch != 89):
                requests.append({"launcher": "perturb", **kind})
            if FULL or (arch == 90 and not rademacher):
                requests.append({"launcher": "perturb", "pair": True, **kind})
                requests.append({"launcher": "perturb", "rounding": True, "options": True, "terms": 3, **kind})
    kind = {"dtype": "bfloat16", "arch": 90}
    requests.append({"launcher": "perturb", "rademacher": False, "source": False, **kind})
    requests.append({"launcher": "zo_linear", "M": 64, "rademacher": True, "options": True, **kind})
    # Rows a sign, distribution, nested maxima, by architecture; sm_90 in full.
    packed = [(16, "gaussian", True), (64, "gaussian", False)]
    more = [(rows, name, False) for rows in (16, 32, 64) for name in ("gaussian", "rademacher", "scales")]
    low = [(64, "scales", False)]  # where shared memory is little
    for arch in CAPABILITY:
        others = more if FULL or arch == 90 else low if arch in (89, 120) else []
        for rows, distribution, nested in sorted({*packed, *others}):
            few = {"M": rows, "dtype": "bfloat16", "distribution": distribution, "nested": nested, "arch": arch}
            requests.append({"launcher": "zo_nf4_linear", **few})
    return requests


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return run_gate(_lora_requests() + _crowded_requests() + _other_requests() + _zeroth_order_requests())


def test_ragged_sizes_do_not_spill() -> None:
    findings = run_gate(_ragged_requests())
    faults = [fault for finding in findings for fault in finding.faults(matrix=_is_matrix_kernel(finding))]
    assert not faults, "\n".join(faults)


def _is_matrix_kernel(finding: Finding) -> bool:
    """Products of 16-bit operands on the 64 rows that wgmma and tcgen05 take."""
    if finding.kernel in ("_zo_linear_kernel", "_zo_nf4_linear_kernel"):
        return "M=64 " in finding.label or "M=128 " in finding.label
    return "M=8 " not in finding.label and "compute=float32" not in finding.label and finding.kernel.startswith("_lora")


def test_a_whole_block_is_moved_by_16_byte_accesses(findings: list[Finding]) -> None:
    """Straight from registers: a thread draws the normals of its 16 elements itself, and one counter of signs for its 32. What is
    narrower serves the ragged end of a tensor, which goes another way through the code, where all that is drawn is drawn again."""
    seen = 0
    for finding in findings:
        if finding.kernel == "_perturb_kernel":
            width = 4 if "dtype=float32" in finding.label else 2
            signs = "rademacher=True" in finding.label
            elements = 32 if signs else 16
            wide = elements * width // 16
            streams = finding.streams["*table_ptr"]
            stores = 2 * wide if "pair=True" in finding.label else wide
            assert streams["store"]["16"] == stores, finding.label
            assert "source=False" in finding.label or streams["load"]["16"] == wide, finding.label
            assert set(streams["store"]) == {"16", str(width)}, finding.label
            seen += 1
            if "source=False" in finding.label:  # z alone, for the curious: nothing there sets the layout
                continue
            assert signs or finding.shared == 0, finding.label
            calls = (1 if signs else elements // 4) + (elements // 8 if "rounding=True" in finding.label else 0)
            assert finding.philox_calls <= 2 * calls, finding.label
    assert seen >= 12


def test_a_packed_tile_draws_each_counter_once(findings: list[Finding]) -> None:
    """A thread owns 32 elements of one row, which are 8 counters of normals or a part of one counter of signs."""
    seen = 0
    for finding in findings:
        # On sm_100 the compiler peels a step off the loop.
        if finding.kernel == "_zo_nf4_linear_kernel" and finding.arch < 100:
            assert 1 <= finding.philox_calls <= (8 if "gaussian" in finding.label else 1), finding.label
            seen += 1
    assert seen >= 10


def test_every_launch_is_sound(findings: list[Finding]) -> None:
    faults = [
        fault
        for finding in findings
        for fault in finding.faults(WIDE[finding.kernel], matrix=_is_matrix_kernel(finding))
    ]
    assert not faults, "\n".join(faults)
    assert {finding.kernel for finding in findings} == set(WIDE)
    assert {finding.arch for finding in findings} == set(SHARED_LIMIT)


def test_narrow_operands_are_read_as_wide_as_their_tile_allows(findings: list[Finding]) -> None:
    """s of dy_grads and expand, ds of weight_grad: 64 x 16 elements of two bytes are 8 bytes for each of 256
    threads."""
    for finding in findings:
        for argument in {"s_ptr", "ds_ptr"} & set(finding.streams):
            if "M=8192" in finding.label and "load" in finding.streams[argument]:
                assert min(map(int, finding.streams[argument]["load"])) >= 8, (finding.label, argument, finding.streams)


def test_a_counter_is_computed_once_for_the_columns_a_thread_owns(findings: list[Finding]) -> None:
    """A thread owns the 8 columns of a counter where x is of two bytes; of a float32 x it owns 4 and two threads share
    a counter.

    sm_100 is left out: there the compiler peels a step off the loop, and calls in straight-line code count twice. So are products of
    float32 with Triton 3.9, whose threads own two rows by two columns and which draws in that layout.
    """
    two_rows = Version(triton.__version__) >= Version("3.8")
    tiles = {}
    for arch, capability in CAPABILITY.items():
        for case, config in lora.launch_matrix(Device("", capability, 132)):
            if not case.ragged and not (two_rows and case.compute == "float32"):
                tiles[_label(_case_request(case, arch)), arch] = config, BYTES[case.wide]
    seen = 0
    for finding in findings:
        if (finding.label, finding.arch) in tiles and finding.philox_calls and finding.arch < 100:
            config, width = tiles[finding.label, finding.arch]
            elements = config.block_m * config.block_c // (32 * config.num_warps)
            owned = min(8, 16 // width, elements)
            assert finding.philox_calls <= elements // owned, finding.label
            seen += 1
    assert seen > 20


def _label(request: dict[str, Any]) -> str:
    options = {name: value for name, value in request.items() if name not in ("launcher", "arch")}
    return f"{request['launcher']} " + " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(
    ("launcher", "expected", "wide"),
    [
        ("spilled", "registers are spilled", ()),
        ("too_much_shared_memory", "bytes of shared memory, the limit is", ()),
        ("without_tensor_cores", "no wgmma.mma_async", ()),
        ("strided_copy", "source_ptr: loads of 4 bytes", ("source_ptr", "target_ptr")),
        ("product_in_flight", "a wgmma is in flight while", ()),
        ("narrow_places", "a product with a stride in 32 bits", ()),
        ("ragged_copy", "target_ptr: stores of 4 bytes", ("source_ptr", "target_ptr")),
        ("wide_copy", "no_such_ptr: never accessed", ("source_ptr", "target_ptr", "no_such_ptr")),
    ],
)
def test_the_gate_reports_a_planted_fault(
    planted: dict[str, Finding], launcher: str, expected: str, wide: tuple[str, ...]
) -> None:
    faults = planted[launcher].faults(wide, matrix=launcher == "without_tensor_cores")
    assert len(faults) == (2 if launcher == "ragged_copy" else 1), faults
    assert any(expected in fault for fault in faults)


def test_the_gate_passes_a_sound_kernel(planted: dict[str, Finding]) -> None:
    assert planted["wide_copy"].faults(("source_ptr", "target_ptr")) == []


@pytest.fixture(scope="module")
def planted() -> dict[str, Finding]:
    names = (
        "spilled",
        "too_much_shared_memory",
        "without_tensor_cores",
        "product_in_flight",
        "strided_copy",
        "narrow_places",
        "ragged_copy",
        "wide_copy",
    )
    found = run_gate([{"launcher": name, "arch": 90} for name in names])
    return {finding.label.strip(): finding for finding in found if not finding.kernel.startswith("_reduce")}
