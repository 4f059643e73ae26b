"""kernels/lora_terms.py and kernels/lora_dora.py as cubins for sm_80, sm_90, sm_100 and, in part, sm_120: no spills,
shared memory within the limit, 16-byte accesses of the wide operands, tensor cores.

PEFTFAST_FULL_GATE=1 compiles all that the heuristics can produce.
"""

import itertools
import os
from typing import Any

import pytest

from peftfast.configs import lora_terms
from peftfast.configs.device import Device

from .support.compile_gate import Finding, run_gate

pytestmark = pytest.mark.slow
FULL = bool(os.environ.get("PEFTFAST_FULL_GATE"))
ARCHES = (80, 90, 100)
WIDE = {
    "_lora_terms_shrink_kernel": ("x_ptr",),
    "_lora_terms_expand_kernel": ("base_ptr", "out_ptr"),
    "_lora_terms_weight_grad_kernel": ("x_ptr",),
    "_lora_dora_expand_kernel": ("base_ptr", "y_ptr", "z_ptr"),
    "_lora_gain_grads_kernel": ("dy_ptr", "z_ptr", "out_ptr"),
    "_lora_dropout_add_kernel": ("x_ptr", "out_ptr"),
    "_reduce_partials_kernel": ("partial_ptr",),
}


def _requests(arch: int) -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for case, _ in lora_terms.launch_matrix(Device("", (arch // 10, 0), 132)):
        half = case.compute == "bfloat16"
        largest = half and case.rank == 64 and case.rows == 64 and case.dropout == (case.wide == "float32")
        single = case.compute == "float32" and case.rank == 16 and case.rows == 64 and case.dropout
        others = half and case.rank == 16 and case.wide == "bfloat16" and case.dropout
        if not (FULL or largest or (arch == 90 and (single or others))):
            continue
        M = 8192 if case.rows == 64 else 8
        common = {"launcher": case.op, "arch": arch, "M": M, "wide": case.wide, "compute": case.compute}
        if case.op == "lora_dora_expand":
            requests += [common | {"rank": case.rank, "plain": plain} for plain in (False, True)]
            continue
        # A group has masks, a batch has rows; both at once is the training of a batch.
        for rows in (False, True):
            if not FULL and rows != (case.wide == "bfloat16"):
                continue
            request = common | {"ranks": [case.rank] * 3, "dropout": case.dropout, "rows": rows}
            requests.append(request)
            if case.op == "lora_terms_expand" and case.rows == 64 and (FULL or half):
                requests.append(request | {"transposed": True} | ({"bias": True} if rows else {}))
        if half and case.op == "lora_terms_weight_grad" and (case.rank, case.rows) not in seen:
            seen.add((case.rank, case.rows))
            requests.append(
                {
                    "launcher": "lora_terms_dy_grads",
                    "arch": arch,
                    "M": M,
                    "ranks": [case.rank] * 3,
                    "compute": "bfloat16",
                    "rows": True,
                }
            )
    for op, dropout in itertools.product(
        ("lora_terms_shrink", "lora_terms_expand", "lora_terms_weight_grad"), (False, True)
    ):
        common = {"launcher": op, "arch": arch, "M": 8192, "wide": "bfloat16", "compute": "bfloat16", "rows": False}
        if FULL or arch == 90 or dropout:
            requests += [common | {"ranks": ranks, "dropout": dropout} for ranks in ([8] * 3, [64] * 3)]
    for wide in ("float32", "bfloat16") if FULL or arch == 90 else ("bfloat16",):
        requests.append({"launcher": "lora_gain_grads", "arch": arch, "M": 8192, "wide": wide})
        requests += [
            {"launcher": "lora_dropout_add", "arch": arch, "M": 8192, "wide": wide, "base": base}
            for base in (False, True)
        ]
    return requests


def _crowded_requests() -> list[dict[str, Any]]:
    """What sm_120 alone spilled."""
    common = {
        "launcher": "lora_terms_expand",
        "arch": 120,
        "M": 8192,
        "wide": "bfloat16",
        "compute": "bfloat16",
        "rows": False,
    }
    few = common | {"M": 8, "wide": "float32", "dropout": False}
    return [
        common | {"ranks": [16] * 3, "dropout": True, "transposed": True},
        common | {"ranks": [64] * 3, "dropout": False},
        few | {"ranks": [16] * 3},
        few | {"ranks": [64] * 3, "launcher": "lora_terms_weight_grad"},
    ]


def _is_matrix_kernel(finding: Finding) -> bool:
    products = ("_lora_terms", "_lora_dora_expand")
    return (
        "M=8 " not in finding.label and "compute=float32" not in finding.label and finding.kernel.startswith(products)
    )


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return run_gate([*(request for arch in ARCHES for request in _requests(arch)), *_crowded_requests()])


def test_every_launch_is_sound(findings: list[Finding]) -> None:
    faults = [fault for finding in findings for fault in finding.faults(WIDE[finding.kernel])]
    assert not faults, "\n".join(faults)
    assert {finding.kernel for finding in findings} == set(WIDE)


def test_products_are_on_tensor_cores(findings: list[Finding]) -> None:
    found = [finding for finding in findings if _is_matrix_kernel(finding)]
    assert len(found) > 20
    for finding in found:
        assert finding.matrix, finding.label
