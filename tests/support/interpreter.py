"""Where the tests of Triton kernels run: compiled on the GPU if there is one, else interpreted on the CPU.

triton decides that when it is first imported, by TRITON_INTERPRET; tests/conftest.py sets it before anything else.
Work that needs the compiler whatever the session does (tests/support/compile_gate.py) is a process of its own.
"""

import dataclasses
import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_runnable_kernels() -> None:
    """Fail, with the cause, where kernels were imported in a state in which this machine cannot run them."""
    from peftfast.kernels.numerics import INTERPRETED

    if DEVICE.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "no GPU, and triton was imported without TRITON_INTERPRET=1: tests/conftest.py must come first"
        )


def seed_of(value: int) -> torch.Tensor:
    """A dropout seed as operators take it: one int64 on the device."""
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def quicken() -> None:
    """Take out of triton's interpreter what it does again at every call: more than half of its time. What is computed stays as it is.

    - For each call of one kernel's function by another it searches the language's modules for builtins to replace, all of which the
      launch has replaced already.
    - For each array it builds its table of dtypes, and for each tensor its type with the sizes and their product.
    - Whether an integer overflows it computes by ten operations of its own, and does nothing with the answer.
    """
    _patch_once()
    _remember_types()
    _refuse_masks_of_integers()
    count_to_a_tensor()
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # device_assert, which the answer goes to, is nothing without
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once() -> None:
    patch_lang = interpreter._patch_lang
    running: list[set[int]] = []  # the languages that the launch that runs has replaced
    of_function: dict[Any, set[int]] = {}
    builtins: dict[Any, list[str]] = {}

    def patch_lang_once(fn: Any) -> Any:
        if fn not in of_function:
            languages = (tl, tl.core)
            of_function[fn] = {id(one) for one in languages if any(value is one for value in fn.__globals__.values())}
        if running:
            return None if of_function[fn] <= running[0] else patch_lang(fn)
        scope = patch_lang(fn)
        restore = scope.restore

        def restored() -> None:
            running.clear()
            restore()

        scope.restore = restored
        running.append(of_function[fn])
        return scope

    def patch_known_builtins(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_lang = patch_lang_once
    interpreter._patch_builtin = patch_known_builtins


def _remember_types() -> None:
    np_dtype_of, make_type, make_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    dtypes: dict[Any, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def known_np_dtype(dtype: Any) -> Any:
        one = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(one, tl.pointer_type):  # cannot be hashed
            return np_dtype_of(one)
        if one not in dtypes:
            dtypes[one] = np_dtype_of(one)
        return dtypes[one]

    def make_known_type(self: Any, element_ty: Any, shape: Any) -> None:
        if isinstance(element_ty, tl.pointer_type):
            return make_type(self, element_ty, shape)
        key = (element_ty, tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape))
        if key not in blocks:
            make_type(self, element_ty, shape)
            blocks[key] = vars(self) | {"sizes_of_tensor": {}}
        vars(self).update(blocks[key])

    def make_known_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = getattr(type, "sizes_of_tensor", None)
        if sizes:
            vars(self).update(sizes, handle=handle, type=type, dtype=type.scalar)
            return
        make_tensor(self, handle, type)
        if sizes is not None:
            sizes.update(numel=self.numel, shape=self.shape)

    interpreter._get_np_dtype = known_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = make_known_type, make_known_tensor


def _refuse_masks_of_integers() -> None:
    """As Triton 3.9 does: its interpreter calls what compares two numbers an integer, and a mask that such a number is part of too."""
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        plain = getattr(interpreter.InterpreterBuilder, name)

        def checked(self: Any, *args: Any, _plain: Any = plain, _place: int = place, **named: Any) -> Any:
            mask = np.asarray((args[_place] if len(args) > _place else named["mask"]).data)
            if mask.dtype != bool:
                raise ValueError(f"a mask of {mask.dtype}, expected bool")
            return _plain(self, *args, **named)

        setattr(interpreter.InterpreterBuilder, name, checked)


def count_to_a_tensor() -> None:
    """As Triton 3.7 does: the number at which a loop of 3.6 ends is an array of one element, no number to numpy 2.4."""
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
