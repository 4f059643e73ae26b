"""4-bit weights: the storage and its conversions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..reference import nf4 as definition

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
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int4"``, symmetric integers, which bitsandbytes does not have.
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
        if not torch.compiler.is_compiling():
            self._check_kinds()
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

    def _check_kinds(self) -> None:
        shape, dtype = self.shape, self.dtype
        if type(shape) is not torch.Size:
            if not isinstance(shape, tuple | list) or not all(isinstance(n, int | torch.SymInt) for n in shape):
                raise TypeError(f"shape: expected a sequence of ints, got {shape!r}")
        if any(isinstance(n, int) and n < 0 for n in shape):
            raise ValueError(f"shape: expected no negative size, got {tuple(shape)}")
        if not isinstance(self.block_size, int):
            raise TypeError(f"block_size: expected an int, got {type(self.block_size).__name__}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
        for name in ("nested_absmax", "nested_code", "nested_offset"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")

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

    def to_bitsandbytes(self, quant_storage: torch.dtype = torch.uint8) -> bitsandbytes.nn.Params4bit:
        """A quantised Params4bit on the same storage, its bytes seen as ``quant_storage``. Needs bitsandbytes.

        Raises:
            ValueError: the bytes are no whole number of elements of ``quant_storage``, or bitsandbytes has no such quant_type.
        """
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        if self.quant_type not in definition.BITSANDBYTES_TYPES:
            raise ValueError(
                f"quant_type: bitsandbytes has {definition.BITSANDBYTES_TYPES}, this weight is {self.quant_type!r}"
            )
        if not isinstance(quant_storage, torch.dtype):
            raise TypeError(f"quant_storage: expected a dtype, got {type(quant_storage).__name__}")
        if self.packed.numel() % quant_storage.itemsize:
            raise ValueError(
                f"quant_storage: expected a dtype whose {quant_storage.itemsize} bytes divide {self.packed.numel()}, "
                f"got {quant_storage}"
            )
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
            self.packed.reshape(-1).view(quant_storage)[:, None],
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
            quant_storage=quant_storage,
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
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int4"``, integers -7 to 7 in units of a block's maximum over 7.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {got}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected elements, got shape {tuple(weight.shape)}")
    if weight.layout is not torch.strided:
        raise TypeError(f"weight: expected a dense tensor, got {weight.layout}")
    if not isinstance(block_size, int) or block_size not in definition.BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {definition.BLOCK_SIZES}, got {block_size!r}")
    if quant_type not in definition.QUANT_TYPES:
        raise ValueError(f"quant_type: expected one of {definition.QUANT_TYPES}, got {quant_type!r}")
    code = definition.code_table(quant_type, weight.device)
    with torch.no_grad():
        packed, absmax = ops.nf4.nf4_quantize(weight.detach(), block_size, code)
        absmax, nested = nest(absmax) if double_quant else (absmax, {})
    return NF4Weight(packed, absmax, code, block_size, weight.shape, weight.dtype, quant_type, **nested)


def nest(absmax: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Double quantisation of block maxima as bitsandbytes does it on their device: their bytes, and the three nested fields.

    bitsandbytes' kernel for CPU tensors takes a value to a grid of 65,536 first, its other backends do not; so do we.
    """
    code = definition.nested_code_table(absmax.device)
    offset = absmax.mean()
    index, nested_absmax = ops.nf4.nf4_nest(absmax - offset, code, absmax.device.type == "cpu")
    return index, {"nested_absmax": nested_absmax, "nested_code": code, "nested_offset": offset[None]}


def nf4_dequantize(
    nf4: NF4Weight, dtype: torch.dtype | None = None, *, out: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """The weight of ``nf4.shape``, bit for bit ``bitsandbytes.functional.dequantize_4bit``, in one launch without a temporary.

    Args:
        nf4: the weight.
        dtype: of the result; ``nf4.dtype`` if not given. Not together with ``out``.
        out: floating, on ``nf4.device``: written and returned. Either contiguous and of ``nf4.shape``; or, for a matrix, ``[rows,
        K]``
            whose rows are consecutive elements and may lie further than K apart: part of a wider buffer, or a slab of rows. One that
            needs a gradient is written under torch.no_grad alone.
        first_row: of the weight, where the rows of ``out`` begin.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4: expected an NF4Weight, got {type(nf4).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
    if not isinstance(first_row, int) or isinstance(first_row, bool):
        raise TypeError(f"first_row: expected an int, got {type(first_row).__name__}")
    if out is None:
        if first_row:
            raise ValueError(f"first_row: expected 0 without out, got {first_row}")
        out = torch.empty(nf4.shape, dtype=dtype or nf4.dtype, device=nf4.device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    elif dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype: {dtype} was asked for beside out of {out.dtype}")
    elif out.device != nf4.device:
        raise ValueError(f"out: expected on {nf4.device}, got on {out.device}")
    elif out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor that needs no gradient, or a call under torch.no_grad")
    try:
        ops.nf4.check_rows(out, nf4.shape, first_row)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    ops.nf4.nf4_dequantize_out(*nf4.storage(), out, first_row)
    # The kernel writes behind the counter by which a graph knows that it saved another value.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


def dequantized(packed: Tensor, quantisation: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """The dense weight in ``dtype`` from ``packed`` and the rest of :meth:`NF4Weight.storage`."""
    absmax, code, block_size, shape, *nested = quantisation
    return ops.nf4.nf4_dequantize(packed, absmax, code, block_size, shape, dtype, *nested)


def check_features(x: Tensor, shape: tuple[int, ...]) -> None:
    """x ``[..., K]`` against a weight ``[N, K]``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a dense tensor, got {x.layout}")
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
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} beside x, got on {value.device}")
