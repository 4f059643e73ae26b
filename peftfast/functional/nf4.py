"""4-bit weights: the storage, its conversions, and a linear layer on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ops
from ..reference import nf4 as definition
from .precision import autocast_off, cache_signature, compute_dtype_of

if TYPE_CHECKING:
    import bitsandbytes


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A 4-bit weight in bitsandbytes' own storage.

    Attributes:
        packed: uint8 ``[ceil(numel / 2), 1]``; the even element of the flattened row-major weight in the high nibble.
        absmax: maxima of blocks, float32 ``[blocks]``, or their uint8 codes when double quantised.
        code: float32 ``[16]``.
        block_size: elements to a block, 32 to 4096; a block may straddle rows.
        shape: of the weight, ``(N, K)`` for a linear layer.
        dtype: of the weight before quantisation, and what it is dequantised to unless asked otherwise.
        quant_type: ``"nf4"`` or ``"fp4"``.
        nested_absmax, nested_code, nested_offset: float32 ``[ceil(blocks / 256)]``, ``[256]``, ``[1]``; all three or none.

    Raises:
        TypeError, ValueError: a field has another dtype or size than this, named.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    block_size: int
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        for name in ("packed", "absmax", "code"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(getattr(self, name)).__name__}")
        if self.quant_type not in definition.QUANT_TYPES:
            raise ValueError(f"quant_type: expected one of {definition.QUANT_TYPES}, got {self.quant_type!r}")
        if torch.compiler.is_compiling():
            return  # the operator's fake checks the same, where symbolic sizes can be checked
        try:
            ops.nf4.check_weight(*self.storage())
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def storage(self) -> tuple[Any, ...]:
        """The operators' arguments: packed, absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset."""
        return (
            self.packed,
            self.absmax,
            self.code,
            self.block_size,
            self.shape,
            self.nested_absmax,
            self.nested_code,
            self.nested_offset,
        )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device; itself if it is there already."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    @classmethod
    def from_bitsandbytes(cls, weight: Any, quant_state: Any = None) -> NF4Weight:
        """The storage of a ``bitsandbytes.nn.Params4bit``: no copy, no re-encoding.

        Args:
            weight: a quantised Params4bit, of any ``quant_storage`` dtype.
            quant_state: where the parameter has lost its own (FSDP2 keeps it on the module only).

        Raises:
            TypeError: not a 4-bit parameter. ValueError: not quantised yet, repacked for CPU inference, or of another layout.
        """
        state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
        if not isinstance(weight, Tensor) or (state is None and not hasattr(weight, "quant_state")):
            raise TypeError(f"weight: expected a bitsandbytes Params4bit, got {type(weight).__name__}")
        if state is None:
            raise ValueError(
                "weight: this 4-bit parameter is not quantised yet; bitsandbytes quantises when the layer is moved to a "
                "device, as in layer.to('cuda') or layer.to('cpu')"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "weight: bitsandbytes has repacked it for inference on this CPU (bytes permuted, statistics rounded to "
                "bfloat16), which training cannot use; set support_avx512bf16_for_cpu = False on the layer before its first "
                "evaluation forward"
            )
        nested: dict[str, Any] = {}
        if state.state2 is not None:
            if state.state2.blocksize != definition.NESTED_BLOCK_SIZE:
                raise ValueError(
                    f"weight: expected nested blocks of {definition.NESTED_BLOCK_SIZE}, got {state.state2.blocksize}"
                )
            nested = {
                "nested_absmax": state.state2.absmax,
                "nested_code": state.state2.code,
                "nested_offset": state.offset.reshape(1),
            }
        packed = weight.detach()
        if type(packed) is not Tensor:
            packed = packed.as_subclass(Tensor)
        return cls(
            packed=packed.reshape(-1).view(torch.uint8)[:, None],
            absmax=state.absmax,
            code=state.code,
            block_size=state.blocksize,
            shape=state.shape,
            dtype=state.dtype,
            quant_type=state.quant_type,
            **nested,
        )

    def to_bitsandbytes(self) -> bitsandbytes.nn.Params4bit:
        """A quantised Params4bit on the same storage. Needs bitsandbytes."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        state2 = offset = None
        if self.nested_absmax is not None and self.nested_offset is not None:
            state2 = QuantState(
                absmax=self.nested_absmax,
                code=self.nested_code,
                blocksize=definition.NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
            offset = self.nested_offset.reshape(())
        state = QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.code,
            blocksize=self.block_size,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=offset,
            state2=state2,
        )
        return Params4bit(
            self.packed,
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
            bnb_quantized=True,
        )


def nf4_quantize(
    weight: Tensor, *, block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
) -> NF4Weight:
    """Quantise a weight to 4 bits (QLoRA, arXiv 2305.14314), as ``bitsandbytes.functional.quantize_4bit`` does.

    Args:
        weight: float32, bfloat16 or float16 of any shape with elements; on any device.
        block_size: elements that share a maximum: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: quantise the maxima to bytes as well, in blocks of 256.
        quant_type: ``"nf4"`` or ``"fp4"``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {got}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected elements, got shape {tuple(weight.shape)}")
    if block_size not in definition.BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {definition.BLOCK_SIZES}, got {block_size}")
    code = definition.code_table(quant_type, weight.device)
    with torch.no_grad():
        packed, absmax = ops.nf4.nf4_quantize(weight.detach(), block_size, code)
        nested: dict[str, Any] = {}
        if double_quant:
            absmax, nested_absmax, nested_offset = definition.nest_absmax(absmax)
            nested_code = definition.nested_code_table(weight.device)
            nested = {"nested_absmax": nested_absmax, "nested_code": nested_code, "nested_offset": nested_offset}
    return NF4Weight(packed, absmax, code, block_size, weight.shape, weight.dtype, quant_type, **nested)


def nf4_dequantize(nf4: NF4Weight, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The weight of ``nf4.shape``, bit for bit ``bitsandbytes.functional.dequantize_4bit``.

    Args:
        nf4: the weight.
        dtype: of the result; ``nf4.dtype`` if not given. Not together with ``out``.
        out: contiguous, of ``nf4.shape``, floating, on ``nf4.device``: written and returned.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4: expected an NF4Weight, got {type(nf4).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype or nf4.dtype, device=nf4.device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    elif dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype: {dtype} was asked for beside out of {out.dtype}")
    elif tuple(out.shape) != tuple(nf4.shape) or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(
            f"out: expected contiguous floating {tuple(nf4.shape)}, got {out.dtype} {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    elif out.device != nf4.device:
        raise ValueError(f"out: expected on {nf4.device}, got on {out.device}")
    ops.nf4.nf4_dequantize_out(*nf4.storage(), out)
    return out


def dequantized(packed: Tensor, quantisation: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """The dense weight in ``dtype`` from ``packed`` and the rest of :meth:`NF4Weight.storage`."""
    absmax, code, block_size, shape, *nested = quantisation
    return ops.nf4.nf4_dequantize(packed, absmax, code, block_size, shape, dtype, *nested)


@cache_signature
class NF4LinearFunction(torch.autograd.Function):
    """x Wᵀ + b on a 4-bit W: the dense weight lives during each product and no longer."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        block_size: int,
        shape: Any,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        nested_offset: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        quantisation = (absmax, code, block_size, shape, nested_absmax, nested_code, nested_offset)
        weight = dequantized(packed, quantisation, compute_dtype)
        return functional.linear(x.to(compute_dtype), weight, None if bias is None else bias.to(compute_dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, packed, absmax, code, block_size, shape, *nested, compute_dtype = inputs
        ctx.save_for_backward(packed, absmax, code, *nested)
        ctx.block_size, ctx.shape, ctx.compute_dtype = block_size, shape, compute_dtype
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax, code, *nested = ctx.saved_tensors
        dx = dbias = None
        with autocast_off(dy.device.type):
            dy = dy.to(ctx.compute_dtype)
            if ctx.needs_input_grad[0]:
                quantisation = (absmax, code, ctx.block_size, ctx.shape, *nested)
                dx = (dy @ dequantized(packed, quantisation, ctx.compute_dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                wide = torch.float64 if ctx.compute_dtype == torch.float64 else torch.float32
                dbias = dy.sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, dbias, *(None,) * 9


def nf4_linear(
    x: Tensor, nf4: NF4Weight, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """x Wᵀ + b with a 4-bit W; gradients to x and bias.

    Args:
        x: ``[..., K]`` floating. nf4: of shape ``(N, K)``. bias: ``[N]``.
        compute_dtype: of the product; autocast's or x's if not given. The result has x's dtype where this is given.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4: expected an NF4Weight, got {type(nf4).__name__}")
    check_features(x, tuple(nf4.shape))
    check_vector("bias", bias, nf4.shape[0], x)
    if nf4.device != x.device:
        raise ValueError(f"nf4: expected on {x.device} beside x, got on {nf4.device}")
    dtype = compute_dtype_of(x, compute_dtype)
    with autocast_off(x.device.type):
        rows = x.reshape(-1, x.shape[-1])
        y = NF4LinearFunction.apply(rows, bias, *nf4.storage(), dtype)
        return y.to(x.dtype if compute_dtype is not None else dtype).reshape(*x.shape[:-1], nf4.shape[0])


def check_features(x: Tensor, shape: tuple[int, ...]) -> None:
    """x ``[..., K]`` against a weight ``[N, K]``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if len(shape) != 2:
        raise ValueError(f"weight: expected shape (N, K), got {shape}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x: expected [..., {shape[1]}] for a weight of shape {shape}, got {tuple(x.shape)}")


def check_vector(name: str, value: Tensor | None, size: int, x: Tensor) -> None:
    """A bias-like ``[size]`` on x's device, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} beside x, got on {value.device}")
