"""That the compiler takes every kernel at sizes of 1, which it makes constants of: they have no type to convert from."""

import inspect

import pytest

from tests.support import launches
from tests.support.compile_gate import Finding, run_gate

BF16, F32 = "bfloat16", "float32"
LORA = {"wide": BF16, "narrow": F32, "compute": BF16}
TERMS = {"wide": BF16, "compute": BF16, "rows": True}
NF4 = {"dtype": BF16, "block_size": 64, "nested": True}

REQUESTS = (
    *({"launcher": "lora_shrink", "M": 1, "K": 1, "R": 1, "dropout": dropout, **LORA} for dropout in (False, True)),
    *({"launcher": "lora_expand", "M": 1, "N": 1, "R": 1, "dropout": d, "bias": d, **LORA} for d in (False, True)),
    {"launcher": "lora_weight_grad", "M": 1, "K": 1, "R": 1, "dropout": True, **LORA},
    {"launcher": "lora_dy_grads", "M": 1, "N": 1, "R": 1, **LORA},
    {"launcher": "lora_dy_grads", "M": 1, "N": 1, "R": 200, **LORA},
    {"launcher": "lora_terms_shrink", "M": 1, "ranks": [1], "K": 1, "dropout": True, **TERMS},
    {"launcher": "lora_terms_expand", "M": 1, "ranks": [1], "N": 1, "dropout": True, "bias": True, **TERMS},
    {"launcher": "lora_terms_weight_grad", "M": 1, "ranks": [1], "K": 1, "dropout": True, **TERMS},
    {"launcher": "lora_terms_dy_grads", "M": 1, "ranks": [1], "compute": BF16, "rows": True, "N": 1},
    {"launcher": "lora_dora_expand", "M": 1, "rank": 1, "wide": BF16, "compute": BF16, "N": 1, "plain": True},
    {"launcher": "lora_gain_grads", "M": 1, "wide": BF16, "N": 1},
    {"launcher": "lora_dropout_add", "M": 1, "wide": BF16, "base": True, "N": 1},
    {"launcher": "nf4_dequantize", "N": 1, "K": 2, **NF4},
    {"launcher": "nf4_dequantize", "N": 3, "K": 64, "first": 1, "spare": 1, **NF4},
    {"launcher": "sparse_delta_dequantize", "dtype": BF16},
    *({"launcher": "gated_activation", "activation": act, "dtype": BF16, "M": 1, "N": 1} for act in ("silu", "gelu")),
    {"launcher": "gated_activation_backward", "activation": "silu", "dtype": BF16, "M": 1, "N": 1, "recompute": True},
    *({"launcher": "lora_product_tile", "R": 1, "out": BF16, "by_rows": by_rows, "dropout": not by_rows, "tma": False, "candidate": 0,
       "M": 1, "N": 1, "K": 1} for by_rows in (False, True)),
    {"launcher": "nf4_quantize", "dtype": BF16, "block_size": 64, "N": 1, "K": 1},
    *({"launcher": "nf4_nest", "snapped": snapped, "count": 256} for snapped in (False, True)),
    {"launcher": "nf4_linear", "M": 1, "x": BF16, "compute": BF16, "out": BF16, "nested": True, "N": 1, "K": 64},
    *({"launcher": "nf4_product", "M": 1, "R": 1, "transposed": transposed, "dropout": transposed, "nested": True, "candidate": 0,
       "N": 1, "K": 2} for transposed in (False, True)),
    {"launcher": "nf4_product", "M": 1, "R": 0, "transposed": True, "dropout": False, "nested": False, "candidate": 0, "N": 3, "K": 64},
    *({"launcher": "nf4_dequantize_columns", "dtype": BF16, "nested": True, "N": 1, "K": 2, "first": first, "width": 2 - first}
      for first in (0, 1)),
    {"launcher": "dropout_mask", "rows": 1, "columns": 1},
    {"launcher": "philox_words", "count": 1},
    {"launcher": "sparse_delta_gather", "dtype": BF16, "M": 1, "N": 1, "K": 1, "S": 1},
    {"launcher": "sparse_delta_tiled", "dtype": BF16, "M": 1, "N": 1, "K": 1, "S": 1},
    {"launcher": "sparse_delta_blocks", "dtype": BF16, "side": 16, "M": 1, "N": 16, "K": 16},
    {"launcher": "sparse_delta_product", "dtype": BF16, "M": 1},
    *({"launcher": "sparse_delta_scatter", "dtype": BF16, "write": write} for write in (False, True)),
    {"launcher": "sparse_adamw_step", "dtype": BF16, "stochastic": True, "small": True},
    *({"launcher": "perturb", "dtype": BF16, "rademacher": r, "terms": 1, "tensors": 1} for r in (False, True)),
    # The second tensor of a model.
    *({"launcher": "zo_linear", "M": 1, "dtype": BF16, "rademacher": False, "N": 1, "K": 4, "tensor_id": i} for i in (0, 1)),
    {"launcher": "zo_nf4_linear", "M": 1, "dtype": BF16, "distribution": "rademacher", "N": 1, "K": 64, "tensor_id": 1},
)  # fmt: skip


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return run_gate([{"arch": 90, "front": True, **request} for request in REQUESTS])


def test_the_compiler_takes_sizes_of_one(findings: list[Finding]) -> None:
    assert len(findings) >= len(REQUESTS)


def test_every_launcher_is_among_them() -> None:
    public = {
        name
        for name, one in vars(launches).items()
        if inspect.isfunction(one) and one.__module__ == launches.__name__ and not name.startswith("_")
    }
    assert public == {request["launcher"] for request in REQUESTS}


def test_a_constant_that_is_converted_is_a_failure() -> None:
    """Of its call; the next one is answered."""
    with pytest.raises(RuntimeError, match="has no attribute 'to'"):
        run_gate([{"launcher": "planted_constant", "tensor_id": 1, "arch": 90, "front": True}])
    assert run_gate([{"arch": 90, "front": True, **REQUESTS[0]}])[0].kernel == "_lora_shrink_kernel"
