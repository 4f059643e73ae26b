"""The passes that support/throughput.py counts: a training step's sizes, and what a program of each moves."""

from collections.abc import Callable
from typing import Any

from peftfast.configs import nf4

from .throughput import Grid, Pass

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED = 0.5 + 1 / 64  # bytes of an element in blocks of 64 with nested maxima
CODES = {"float32": 0, "bfloat16": 1}  # csrc's DType
ROWS = ("x_ptr", "x_plus_ptr", "x_minus_ptr")  # of a product of a few
# Of csrc's Adam.
ADAM = {"table_ptr": 0, "layer_ptr": 8, "first_ptr": 16, "codes_ptr": 32, "hyper_ptr": 40, "corrections_ptr": 48}
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


def _tables(weight: int) -> dict[str, int]:
    """The pointers to csrc's Nf4Weight's tables, which lies at so many bytes of the parameters."""
    names = ("code_ptr", "nested_absmax_ptr", "nested_code_ptr", "nested_offset_ptr")
    return {name: weight + 16 + 8 * i for i, name in enumerate(names)}


def _cut(name: str, tile: Bytes, limits: tuple[float, float], options: dict[str, Any], launch: float) -> Pass:
    """A pass whose programs share a sum."""
    return Pass(f"_{name}_kernel", name, tile, limits[0], options, loop=True, launch=launch, speed=limits[1])


def _lora() -> list[Pass]:
    passes = []
    # x's dtype, dropout, rank: the limits of S, of what is added, of dA, of dS and dB, each the busiest unit's share and the speed.
    for wide, dropout, rank, *limits in (
        ("bfloat16", True, 16, (0.82, 0.88), (1.0, 0.81), (0.93, 0.85), None),
        ("bfloat16", True, 64, (1.27, 0.61), (1.13, 0.65), (1.02, 0.71), None),
        ("bfloat16", False, 16, (0.4, 0.9), (0.52, 0.94), (0.27, 0.89), (0.32, 0.73)),
        ("bfloat16", False, 64, (0.93, 0.81), (0.6, 0.89), (0.35, 0.81), None),
        ("float32", True, 16, (0.75, 0.91), (0.72, 0.95), (0.97, 0.9), None),
        ("float32", True, 64, (0.85, 0.85), (0.66, 0.92), (0.63, 0.87), None),
    ):
        size = SIZES[wide]
        kind = {"M": 8192, "R": rank, "wide": wide, "narrow": "float32", "compute": "bfloat16", "dropout": dropout}
        shrink, expand, weight_grad, dy_grads = limits
        tile, whole = _of(size, "BLOCK_M", "BLOCK_C"), 8192 * 4096 * size
        passes += [
            _cut("lora_shrink", tile, shrink, kind, whole),
            Pass(
                "_lora_expand_kernel",
                "lora_expand",
                _of(2 * size, "BLOCK_M", "BLOCK_C"),
                expand[0],
                kind,
                speed=expand[1],
                trips=lambda constants, rank=rank: -(-rank // constants["BLOCK_R"]),
            ),
            _cut("lora_weight_grad", tile, weight_grad, kind, whole),
        ]
        if dy_grads:
            passes.append(_cut("lora_dy_grads", tile, dy_grads, kind, whole))
    # What DoRA's norms ask of the weight: float32 products of bfloat16 and float32.
    for rank, *limit in ((16, 0.5, 0.84), (64, 0.8, 0.42)):
        kind = {"M": 4096, "R": rank, "wide": "bfloat16", "narrow": "float32", "compute": "float32", "dropout": False}
        passes.append(_cut("lora_shrink", _of(2, "BLOCK_M", "BLOCK_C"), (limit[0], limit[1]), kind, 4096 * 4096 * 2))
    # And dA of a layer that computes in float32.
    for rank, *limit in ((16, 0.55, 0.88), (64, 0.95, 0.48)):
        kind = {"M": 8192, "R": rank, "wide": "bfloat16", "narrow": "float32", "compute": "float32", "dropout": False}
        passes.append(
            _cut("lora_weight_grad", _of(2, "BLOCK_M", "BLOCK_C"), (limit[0], limit[1]), kind, 8192 * 4096 * 2)
        )
    for activation, *limits in (("silu", 0.62, 0.5), ("gelu_tanh", 0.72, 0.6)):
        kind = {"activation": activation, "dtype": "bfloat16"}
        forward, backward = (_of(2 * count, "BLOCK") for count in (3, 5))
        passes += [
            Pass("_gated_activation_kernel", "gated_activation", forward, limits[0], kind, speed=0.94),
            Pass(
                "_gated_activation_backward_kernel", "gated_activation_backward", backward, limits[1], kind, speed=0.95
            ),
        ]
    return passes


def _nf4() -> list[Pass]:
    passes = []
    for dtype, whole, columns, delta, beside, cuda in (
        ("bfloat16", 0.5, 0.6, 0.7, 0.72, (0.46, 0.84)),
        ("float32", 0.4, 0.5, 0.5, 0.9, (0.36, 0.93)),
    ):
        size = PACKED + SIZES[dtype]
        kind = {"dtype": dtype, "block_size": 64, "nested": True}
        of_blocks = _of(64 * size, "BLOCKS")
        passes += [
            Pass("_nf4_dequantize_kernel", "nf4_dequantize", of_blocks, whole, kind, speed=0.92),
            Pass(
                "_nf4_columns_kernel",
                "nf4_dequantize_columns",
                _of(size, "ROWS", "COLUMNS"),
                columns,
                {"dtype": dtype, "nested": True},
                speed=0.74,
            ),
            # Without the loops over the delta's entries, one in a hundred of the elements.
            Pass(
                "_nf4_dequantize_kernel",
                "sparse_delta_dequantize",
                of_blocks,
                delta,
                {"dtype": dtype},
                speed=beside,
                straight=True,
            ),
        ]
        for apart in ("false", "true"):
            name = f"dequantize_tiles<(DType){CODES[dtype]}, true, {apart}>"
            grid = Grid(8, 4096 * 4096 // (8 * 1024), _tables(0))
            moved = _fixed(8 * 1024 * size)
            passes.append(Pass(name, "nf4.cu", moved, cuda[0], speed=cuda[1], straight=True, grid=grid))
    return passes


def _few_rows() -> list[Pass]:
    """Products of a few rows, whose x stays in a cache. One lookup in shared memory an element is the memory's time by itself."""
    few = {"M": 16, "x": "bfloat16", "compute": "bfloat16", "out": "bfloat16", "nested": True}
    weights, packed = (_of(size, "BLOCK_N", "BLOCK_K") for size in (2, PACKED))
    whole, whole_packed = (4096 * 4096 * size for size in (2, PACKED))

    def part(name: str, tile: Bytes, limit: float, speed: float, options: dict[str, Any], launch: float) -> Pass:
        return Pass(f"_{name}_kernel", name, tile, limit, options, loop=True, launch=launch, speed=speed, cached=ROWS)

    passes = [part("nf4_linear", packed, 3.5, 0.2, few, whole_packed)]
    for transposed in (False, True):
        kind = {"M": 64, "R": 16, "transposed": transposed, "dropout": False, "nested": True, "candidate": 0}
        passes.append(part("nf4_product", packed, 2.8, 0.11, kind, whole_packed))
    for rademacher, limit, speed in ((False, 3.7, 0.18), (True, 1.55, 0.43)):
        kind = {"M": 16, "dtype": "bfloat16", "rademacher": rademacher}
        passes.append(part("zo_linear", weights, limit, speed, kind, whole))
    for distribution, limit, speed in (("gaussian", 17.5, 0.03), ("rademacher", 7.4, 0.06), ("scales", 5.3, 0.07)):
        kind = {"M": 16, "dtype": "bfloat16", "distribution": distribution, "nested": True}
        passes.append(part("zo_nf4_linear", packed, limit, speed, kind, whole_packed))
    of_a = {"VIADDMNMX.U32": 1}  # how much of a tile of A a warp has; few warps have any
    few_rows, more_rows = (nf4.BLOCK_WARPS, nf4.TILE_ROWS), (nf4.WIDE_BLOCK_WARPS, nf4.WIDE_TILE_ROWS)
    # Eights of rows of x, warps and rows of their tiles, rounds of the loop over a unit's columns, limits.
    for tiles, (warps, rows), rounds, N, limit, speed in (
        (1, few_rows, 1, 4096, 1.55, 0.46),
        (1, few_rows, 1, 14336, 1.55, 0.58),
        (2, few_rows, 1, 14336, 1.8, 0.47),
        (4, more_rows, 2, 4096, 1.8, 0.25),
        (4, more_rows, 2, 14336, 1.8, 0.36),
    ):
        unit = _fixed(warps * rows * nf4.UNIT_COLUMNS * PACKED)
        passes.append(
            Pass(
                f"multiply_part<(DType)1, (DType)1, {tiles}>", "nf4_linear.cu", unit, limit, {"N": N}, loop=True,
                rounds=rounds, launch=N * 4096 * PACKED, speed=speed, cached=ROWS, cold=of_a,
                grid=Grid(warps, 132, {"x_ptr": 32} | _tables(48)),
            )
        )  # fmt: skip
    return passes


def _zeroth_order() -> list[Pass]:
    """A normal is some fifty instructions by its definition."""
    passes = []
    for dtype, rademacher, triton, speed, cuda, cuda_speed in (
        ("bfloat16", False, 1.75, 0.49, 1.8, 0.49),
        ("bfloat16", True, 0.42, 0.92, 0.42, 0.88),
        ("float32", False, 0.85, 0.9, 0.9, 0.82),
    ):
        size = SIZES[dtype]
        kind = {"dtype": dtype, "rademacher": rademacher}
        # A ragged block's loads of elements of so many bytes: beside those a few of 4 bytes read settings and tables.
        cold = {"STG.E.U16": 1, "LDG.E.U16": 1} if size == 2 else {"STG.E": 1, "LDG.E": 4}
        cold["CALL.REL.NOINC"] = 1
        passes.append(Pass("_perturb_kernel", "perturb", _of(2 * size, "BLOCK"), triton, kind, speed=speed, cold=cold))
        elements = 32 if rademacher else 16  # a lane's
        name = f"apply<(DType){CODES[dtype]}, false, {str(rademacher).lower()}, true>"
        grid = Grid(8, 4096 * 4096 // (elements * 256), {"seeds_ptr": 0, "coefficients_ptr": 8, "decay_ptr": 24})
        moved = _fixed(2 * size * elements * 256)
        passes.append(Pass(name, "zeroth_order.cu", moved, cuda, speed=cuda_speed, cold=cold, grid=grid))
    return passes


def _others() -> list[Pass]:
    passes = []
    for small, states, triton, stochastic, speed, cuda in (
        (False, 16, 0.24, 0.33, 0.95, (0.57, 0.88)),
        (True, 4, 0.55, 0.71, 0.76, (0.97, 0.66)),
    ):
        # Value read and written, gradient, states, age, index, base, and the sector that the weight lies in.
        size = 8 + 4 + states + 4 + 4 + 2 + 32
        for rounded, limit in ((False, triton), (True, stochastic)):
            kind = {"dtype": "bfloat16", "stochastic": rounded, "small": small}
            # A ragged block's values are stored one by one.
            cold = {"STG.E": 4, "CALL.REL.NOINC": 1}
            tile = _of(size, "BLOCK")
            passes.append(Pass("_sparse_adamw_kernel", "sparse_adamw_step", tile, limit, kind, speed=speed, cold=cold))
        name = f"adamw<(DType)1, int, short, {str(small).lower()}>"
        grid = Grid(4 if small else 8, 2**24 // 1024, ADAM)
        passes.append(Pass(name, "sparse_adamw.cu", _fixed(1024 * size), cuda[0], speed=cuda[1], grid=grid))
    product = {"M": 64, "R": 16, "transposed": True, "dropout": False, "nested": True, "candidate": 0}
    passes.append(Pass("_reduce_partials_kernel", "nf4_product", _of(4, "BLOCK"), 0.55, product, loop=True))
    grid = Grid(8, 8192 * 4096 // (256 * 16), {"seed_ptr": 0})
    passes.append(Pass("mask_pairs(", "philox.cu", _fixed(256 * 16), 1.8, speed=0.47, grid=grid))
    # The rare paths once each too.
    name, moved = "quantize_blocks<(DType)1, true>", _fixed(8 * 256 * (2 + 0.5 + 4 / 64))
    grid = Grid(8, 4096 * 4096 // (8 * 256), {"bounds_ptr": 32, "order_ptr": 40})
    cached = ("bounds_ptr", "order_ptr")
    passes.append(Pass(name, "nf4_quantize.cu", moved, 4.5, speed=0.26, cached=cached, grid=grid))
    return passes


PASSES = _lora() + _nf4() + _few_rows() + _zeroth_order() + _others()
