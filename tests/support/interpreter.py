"""Where the tests of Triton kernels run: compiled on the GPU if there is one, else interpreted on the CPU.

triton decides that when it is first imported, by TRITON_INTERPRET; tests/conftest.py sets it before anything else.
Work that needs the compiler whatever the session does (tests/support/compile_gate.py) is a process of its own.
"""

import torch

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
