"""The passes that support/throughput.py counts: a training step's sizes, and what a program of each moves."""

from collections.abc import Callable

from .throughput import Pass

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED = 0.5 + 1 / 64  # bytes of an element in blocks of 64 with nested maxima
CODES = {"float32": 0, "bfloat16": 1}  # csrc's DType
Bytes = Callable[[dict[str, int]], float]


def _of(size: float, *names: str) -> Bytes:
    """``size`` bytes for each element of a tile of these constants."""

    def moved(constants: dict[str, int]) -> float:
        total = size
        for name in names:
            total *= constants[name]
        return total

    return moved


def _fixed(size: float) -> Bytes:
    return lambda _: size


def _lora() -> list[Pass]:
    passes = []
    # x's dtype, dropout, rank: the limits of S, of what is added, of dA, of dS and dB.
    for wide, dropout, rank, *limits in (
        ("bfloat16", True, 16, 0.82, 1.0, 0.93, None),
        ("bfloat16", True, 64, 0.88, 1.03, 1.02, None),
        ("bfloat16", False, 16, 0.4, 0.6, 0.27, 0.32),
        ("bfloat16", False, 64, 0.52, 0.72, 0.35, 0.42),
        ("float32", True, 16, 0.75, 0.67, 0.95, None),
        ("float32", True, 64, 0.8, 0.72, 0.61, None),
    ):
        size = SIZES[wide]
        kind = {"M": 8192, "R": rank, "wide": wide, "narrow": "float32", "compute": "bfloat16", "dropout": dropout}
        shrink, expand, weight_grad, dy_grads = limits
        tile = _of(size, "BLOCK_M", "BLOCK_C")
        passes += [
            Pass("_lora_shrink_kernel", "lora_shrink", tile, shrink, kind, loop=True),
            Pass("_lora_expand_kernel", "lora_expand", _of(2 * size, "BLOCK_M", "BLOCK_C"), expand, kind),
            Pass("_lora_weight_grad_kernel", "lora_weight_grad", tile, weight_grad, kind, loop=True),
        ]
        if dy_grads:
            passes.append(Pass("_lora_dy_grads_kernel", "lora_dy_grads", tile, dy_grads, kind, loop=True))
    for activation, *limits in (("silu", 0.62, 0.5), ("gelu_tanh", 0.72, 0.6)):
        kind = {"activation": activation, "dtype": "bfloat16"}
        forward, backward = (_of(2 * count, "BLOCK") for count in (3, 5))
        passes += [
            Pass("_gated_activation_kernel", "gated_activation", forward, limits[0], kind),
            Pass("_gated_activation_backward_kernel", "gated_activation_backward", backward, limits[1], kind),
        ]
    return passes


def _nf4() -> list[Pass]:
    passes = []
    for dtype, whole, columns, delta, cuda in (
        ("bfloat16", 0.5, 0.6, 0.7, 0.46),
        ("float32", 0.4, 0.5, 0.5, 0.36),
    ):
        size = PACKED + SIZES[dtype]
        kind = {"dtype": dtype, "block_size": 64, "nested": True}
        of_blocks = _of(64 * size, "BLOCKS")
        passes += [
            Pass("_nf4_dequantize_kernel", "nf4_dequantize", of_blocks, whole, kind),
            Pass(
                "_nf4_columns_kernel",
                "nf4_dequantize_columns",
                _of(size, "ROWS", "COLUMNS"),
                columns,
                {"dtype": dtype, "nested": True},
            ),
            # Without the loops over the delta's entries, one in a hundred of the elements.
            Pass(
                "_nf4_dequantize_kernel", "sparse_delta_dequantize", of_blocks, delta, {"dtype": dtype}, straight=True
            ),
        ]
        for apart in ("false", "true"):
            name = f"dequantize_tiles<(DType){CODES[dtype]}, true, {apart}>"
            passes.append(Pass(name, "nf4.cu", _fixed(1024 * size), cuda, straight=True))
    return passes


def _few_rows() -> list[Pass]:
    """Products of a few rows, whose x stays in a cache. One lookup in shared memory an element is the memory's time by itself."""
    few = {"M": 16, "x": "bfloat16", "compute": "bfloat16", "out": "bfloat16", "nested": True}
    weights, packed = (_of(size, "BLOCK_N", "BLOCK_K") for size in (2, PACKED))
    passes = [Pass("_nf4_linear_kernel", "nf4_linear", packed, 3.5, few, loop=True)]
    for transposed in (False, True):
        kind = {"M": 64, "R": 16, "transposed": transposed, "dropout": False, "nested": True, "candidate": 0}
        passes.append(Pass("_nf4_product_kernel", "nf4_product", packed, 2.8, kind, loop=True))
    for rademacher, limit in ((False, 3.7), (True, 1.55)):
        kind = {"M": 16, "dtype": "bfloat16", "rademacher": rademacher}
        passes.append(Pass("_zo_linear_kernel", "zo_linear", weights, limit, kind, loop=True))
    for distribution, limit in (("gaussian", 17.5), ("rademacher", 7.4), ("scales", 5.3)):
        kind = {"M": 16, "dtype": "bfloat16", "distribution": distribution, "nested": True}
        passes.append(Pass("_zo_nf4_linear_kernel", "zo_nf4_linear", packed, limit, kind, loop=True))
    # 16 rows of 128 columns, their bytes and nested maxima.
    product = _fixed(16 * (128 / 2 + 128 / 64))
    passes.append(Pass("multiply_part<(DType)1, (DType)1, 1>", "nf4_linear.cu", product, 1.6, loop=True))
    return passes


def _zeroth_order() -> list[Pass]:
    """A normal is some fifty instructions by its definition."""
    passes = []
    for dtype, rademacher, triton, cuda in (
        ("bfloat16", False, 1.75, 2.05),
        ("bfloat16", True, 0.42, 0.56),
        ("float32", False, 0.85, 1.0),
    ):
        size = SIZES[dtype]
        kind = {"dtype": dtype, "rademacher": rademacher}
        # A ragged block's loads of elements of so many bytes: beside those a few of 4 bytes read settings and tables.
        cold = {"STG.E.U16": 1, "LDG.E.U16": 1} if size == 2 else {"STG.E": 1, "LDG.E": 8}
        passes.append(
            Pass("_perturb_kernel", "perturb", _of(2 * size, "BLOCK"), triton, kind, cold=cold | {"CALL.REL.NOINC": 1})
        )
        elements = 32 if rademacher else 16  # a lane's
        name = f"apply<(DType){CODES[dtype]}, false, {str(rademacher).lower()}, true>"
        passes.append(Pass(name, "zeroth_order.cu", _fixed(2 * size * elements * 32), cuda))
    return passes


def _others() -> list[Pass]:
    passes = []
    for small, states, triton, stochastic, cuda in ((False, 16, 0.24, 0.33, 0.57), (True, 4, 0.55, 0.71, 0.97)):
        # Value read and written, gradient, states, age, index, base, and the sector that the weight lies in.
        size = 8 + 4 + states + 4 + 4 + 2 + 32
        for rounded, limit in ((False, triton), (True, stochastic)):
            kind = {"dtype": "bfloat16", "stochastic": rounded, "small": small}
            # A ragged block's values are stored one by one.
            cold = {"STG.E": 4, "CALL.REL.NOINC": 1}
            passes.append(Pass("_sparse_adamw_kernel", "sparse_adamw_step", _of(size, "BLOCK"), limit, kind, cold=cold))
        name = f"adamw<(DType)1, int, short, {str(small).lower()}>"
        passes.append(Pass(name, "sparse_adamw.cu", _fixed(32 * (8 if small else 4) * size), cuda))
    product = {"M": 64, "R": 16, "transposed": True, "dropout": False, "nested": True, "candidate": 0}
    passes.append(Pass("_reduce_partials_kernel", "nf4_product", _of(4, "BLOCK"), 0.55, product, loop=True))
    passes.append(Pass("mask_pairs(", "philox.cu", _fixed(32 * 16), 1.8))
    # The rare paths once each too.
    passes.append(Pass("quantize_blocks<(DType)1, true>", "nf4_quantize.cu", _fixed(256 * (2 + 0.5 + 4 / 64)), 4.5))
    return passes


PASSES = _lora() + _nf4() + _few_rows() + _zeroth_order() + _others()
