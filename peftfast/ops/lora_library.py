"""LoRA's passes as products of torch's library, where a CPU multiplies bfloat16 and the rank is high.

The kernels of csrc/cpu/lora.cpp multiply in float32, which reads x once, masks it on the way and rounds once; from some rank on the
instruction for bfloat16 products, which oneDNN uses, is worth more than that. What is served is exactly a product: no dropout, no
bias, bfloat16 in and out. A gradient of a float32 adapter is not: it would be rounded to bfloat16 on its way.
"""

import functools

import torch
from torch import Tensor

from ..configs import lora as configs
from . import native
from .dispatch import Verdict


@functools.cache
def _multiplies_bf16() -> bool:
    """By the instruction set that is chosen at the first question: only speed hangs on it."""
    ok, _ = native.cpu_available()
    return ok and torch.backends.mkldnn.is_available() and torch.ops.peftfast_cpu.nf4_linear_has_dot()


def serves(rows: int, ranks: int, *dtypes: torch.dtype) -> Verdict:
    """Whether the library takes a pass over ``rows`` rows whose operands and result have these dtypes."""
    if any(dtype != torch.bfloat16 for dtype in dtypes):
        return False, f"the library multiplies bfloat16, asked for {', '.join(map(str, dtypes))}"
    if ranks < configs.LIBRARY_RANKS or rows < configs.LIBRARY_ROWS:
        return False, f"{rows} rows of rank {ranks} are below {configs.LIBRARY_ROWS} of {configs.LIBRARY_RANKS}"
    if torch.is_autocast_enabled("cpu"):
        return False, "autocast would cast the library's products"
    if not _multiplies_bf16():
        return False, "no instruction for bfloat16 products"
    return True, ""


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, rounded once; both in bfloat16."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(out, left, right, beta=0, alpha=scaling)


def shrink(x: Tensor, w: Tensor, scaling: float) -> Tensor:
    return _product(x, w.to(x.dtype).T, scaling)


def expand_(base: Tensor, s: Tensor, w: Tensor, scaling: float) -> None:
    base.addmm_(s, w.to(base.dtype).T, alpha=scaling)


def weight_grad(ds: Tensor, x: Tensor, scaling: float) -> Tensor:
    return _product(ds.T, x, scaling)


def dy_grads(dy: Tensor, s: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dS by the library, and dB too where it is bfloat16; else by the kernel, whose sums leave it as float32."""
    ds = _product(dy, b.to(dy.dtype), scaling)
    if dtype == torch.bfloat16:
        return ds, _product(dy.T, s, scaling)
    db = torch.empty(b.shape, dtype=dtype)
    torch.ops.peftfast_cpu.lora_weight_grad.default(s, dy, None, 0.0, scaling, db.T)
    return ds, db
