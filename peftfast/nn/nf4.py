"""A linear layer on a 4-bit weight, with the state_dict of bitsandbytes' Linear4bit."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..reference import nf4 as definition
from .hooks import why_own_forward

# Attribute of the module -> key beneath "weight." in the state_dict.
_STATE_KEYS = {
    "absmax": "absmax",
    "code": "quant_map",
    "nested_absmax": "nested_absmax",
    "nested_code": "nested_quant_map",
}

_LONGEST_FLOAT = len("-2.2250738585072014e-308")


class NF4Linear(nn.Linear):
    """y = x Wᵀ + b with W in 4 bits and frozen. Made by :meth:`from_linear`.

    ``weight`` is the packed uint8 parameter ``[ceil(N K / 2), 1]``; :attr:`nf4` is the whole :class:`NF4Weight`. ``to(dtype)`` and
    ``half()`` convert the bias only: bytes and statistics keep their dtypes. ``compute_dtype`` is the dtype of the product;
    None takes autocast's or x's.
    """

    block_size: int
    quant_type: str
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, nf4: F.NF4Weight, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None):
        if not isinstance(nf4, F.NF4Weight):
            raise TypeError(f"NF4Linear is made by from_linear, or of an NF4Weight; got {type(nf4).__name__}")
        if len(nf4.shape) != 2:
            raise ValueError(f"nf4: expected a weight of shape (N, K), got {tuple(nf4.shape)}")
        nn.Module.__init__(self)
        self.out_features, self.in_features = nf4.shape
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)
        self._hold(nf4)

    def _hold(self, nf4: F.NF4Weight) -> None:
        self.weight = nn.Parameter(nf4.packed, requires_grad=False)
        self.block_size, self.quant_type, self.weight_dtype = nf4.block_size, nf4.quant_type, nf4.dtype
        scales = self._parameters.get("absmax")  # see peftfast.optim.trainable_scales
        if scales is not None:
            nf4 = unnested(nf4)
            scales.data = nf4.absmax.clone()  # an optimiser keeps the parameter, and a merge what it held
        for name in (*_STATE_KEYS, "nested_offset"):
            if name not in self._parameters:
                self.register_buffer(name, getattr(nf4, name), persistent=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
    ) -> NF4Linear:
        """Quantise a linear layer, or take over a bitsandbytes Linear4bit, whose storage is then shared and the options ignored.

        Raises:
            TypeError: not a linear layer with a floating or a 4-bit weight, or one that computes more than that. ValueError: a 4-bit
                weight not quantised yet.
        """
        check_base(linear, copied=True)
        if isinstance(linear, NF4Linear):
            return cls(linear.nf4, linear.bias, linear.compute_dtype)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        if is_bitsandbytes_4bit(linear):
            quantised: Any = linear
            nf4 = F.NF4Weight.from_bitsandbytes(quantised.weight, getattr(quantised, "quant_state", None))
            return cls(nf4, quantised.bias, quantised.compute_dtype)
        nf4 = F.nf4_quantize(
            linear.weight.detach(), block_size=block_size, double_quant=double_quant, quant_type=quant_type
        )
        return cls(nf4, linear.bias)

    @property
    def nf4(self) -> F.NF4Weight:
        return F.NF4Weight(
            self.weight.detach(),
            self.absmax.detach() if "absmax" in self._parameters else self.absmax,
            self.code,
            self.block_size,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.quant_type,
            self.nested_absmax,
            self.nested_code,
            self.nested_offset,
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.nf4_linear(input, self.nf4, self.bias, compute_dtype=self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}, block_size={self.block_size}"

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        kept = {name: getattr(self, name) for name in (*_STATE_KEYS, "nested_offset")}
        kept = {name: tensor.detach() for name, tensor in kept.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype == before.dtype:
                continue
            if name in self._parameters:
                after.data = before.to(after.device)
            else:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A parameter where the scales are trained; it goes beside the weight, as any layer's.
        destination.pop(f"{prefix}absmax", None)
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.weight_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        if self.nested_offset is not None:
            meta |= {
                "nested_blocksize": definition.NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset.item(),
            }
        for name, key in _STATE_KEYS.items():
            tensor = getattr(self, name)
            if tensor is not None:
                # The code tables are shared between layers, which safetensors refuses: each layer saves its own.
                tensor = tensor.clone() if name in ("code", "nested_code") else tensor
                destination[f"{prefix}weight.{key}"] = tensor if keep_vars else tensor.detach()
        encoded = json.dumps(meta)
        if self.nested_offset is not None:
            # As long for every offset: torch.distributed.checkpoint reads into tensors of the size that another state_dict has.
            encoded = encoded.ljust(len(encoded) + _LONGEST_FLOAT - len(repr(meta["nested_offset"])))
        destination[f"{prefix}weight.quant_state.bitsandbytes__{self.quant_type}"] = torch.tensor(
            list(encoded.encode()), dtype=torch.uint8, device="cpu"
        )

    def _fqn_modifiers(self) -> dict[str, str]:
        """Asked by torch.distributed.checkpoint, which follows each key of the state_dict by attributes: those beneath "weight." lead
        to tensors of the module, the parameter itself has none."""
        return {"weight": "_followed"}

    @property
    def _followed(self) -> Any:
        statistics = {key: getattr(self, name) for name, key in _STATE_KEYS.items()}
        blob = types.SimpleNamespace(**{f"bitsandbytes__{self.quant_type}": None})
        return types.SimpleNamespace(weight=types.SimpleNamespace(**statistics, quant_state=blob))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stem = f"{prefix}weight."
        state = {key[len(stem) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(stem)}
        if state and f"{prefix}weight" not in state_dict:
            pass  # of a state without frozen parameters, as torch.distributed.checkpoint makes it; the weight is missed below
        elif state:
            try:
                nf4 = unpack_state(state_dict[f"{prefix}weight"], state)
                if tuple(nf4.shape) != (self.out_features, self.in_features):
                    raise ValueError(
                        f"expected a weight of shape {(self.out_features, self.in_features)}, got {tuple(nf4.shape)}"
                    )
                self._hold(nf4 if local_metadata.get("assign_to_params_buffers") else nf4.to(self.weight.device))
                state_dict[f"{prefix}weight"] = self.weight
                if "absmax" in self._parameters:
                    state_dict[f"{prefix}absmax"] = self.absmax
            except (KeyError, ValueError, TypeError) as error:
                error_msgs.append(f"{prefix}weight: not the state of a 4-bit layer: {error}")
        elif strict:
            missing_keys.extend(stem + key for name, key in _STATE_KEYS.items() if getattr(self, name) is not None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def unnested(weight: F.NF4Weight) -> F.NF4Weight:
    """The same weight with its block maxima in float32, not in bytes: equal when decoded, 4 bytes for a block in place of one."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        return weight
    absmax = definition.unnest_absmax(weight.absmax, weight.nested_absmax, weight.nested_code, weight.nested_offset)
    return dataclasses.replace(weight, absmax=absmax, nested_absmax=None, nested_code=None, nested_offset=None)


def unpack_state(packed: Tensor, state: dict[str, Tensor]) -> F.NF4Weight:
    """An NF4Weight from the tensors that a 4-bit checkpoint keeps beneath ``weight.``; bitsandbytes need not be installed."""
    blobs = [key for key in state if key.startswith("quant_state.bitsandbytes__")]
    if len(blobs) != 1:
        raise ValueError(f"expected one quant_state entry, got {blobs}")
    meta = json.loads(bytes(state[blobs[0]].tolist()))
    tensors = {name: state[key] for name, key in _STATE_KEYS.items() if key in state}
    dtype = getattr(torch, str(meta["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected the name of a torch dtype, got {meta['dtype']!r}")
    nested_block_size = meta.get("nested_blocksize", definition.NESTED_BLOCK_SIZE)
    if nested_block_size != definition.NESTED_BLOCK_SIZE:
        raise ValueError(f"expected nested blocks of {definition.NESTED_BLOCK_SIZE}, got {nested_block_size}")
    if "nested_offset" in meta:
        tensors["nested_offset"] = torch.tensor([meta["nested_offset"]], dtype=torch.float32, device=packed.device)
    return F.NF4Weight(
        packed=packed.reshape(-1).view(torch.uint8)[:, None],
        block_size=meta["blocksize"],
        shape=torch.Size(meta["shape"]),
        dtype=dtype,
        quant_type=meta["quant_type"],
        **tensors,
    )


def why_no_base(linear: Any, copied: bool = False) -> str:
    """Why a layer on the storage of ``linear`` would not compute what it does, as where it has an adapter, or where its weight is the
    work of a parametrization, and no parameter (which may be ``copied``); an empty string for what has nn.Linear's forward,
    NF4Linear's or bitsandbytes' own, and for what is no linear layer."""
    if not copied and isinstance(linear, nn.Linear) and "weight" not in linear._parameters:
        return f"{type(linear).__name__} has no parameter weight: it is computed, by a parametrization or a hook"
    forward = type(linear).forward if isinstance(linear, nn.Linear) else nn.Linear.forward
    if forward in (nn.Linear.forward, NF4Linear.forward) or is_bitsandbytes_4bit(linear):
        return why_own_forward(linear) if isinstance(linear, nn.Module) else ""
    return f"{type(linear).__name__} has a forward of its own"


def check_base(linear: Any, copied: bool = False) -> None:
    """Raises TypeError where :func:`why_no_base` says why."""
    reason = why_no_base(linear, copied)
    if reason:
        raise TypeError(f"linear: expected a layer without an adapter, which computes x Wᵀ + b alone; {reason}")


def is_bitsandbytes_4bit(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' Linear4bit, told without importing bitsandbytes. It subclasses nn.Linear: ask this first."""
    return any(
        base.__name__ == "Linear4bit" and base.__module__.startswith("bitsandbytes.") for base in type(module).__mro__
    )
