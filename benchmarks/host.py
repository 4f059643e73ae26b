"""What a layer costs the host before its kernels run: ``python -m benchmarks.host``.

A frozen layer, PEFT's LoRA layer and the patched one, as it is installed, with its Functions in Python, and without replay, on
matrices so small that a GPU waits for the host. What an adapter adds to the frozen layer is also given as a part of what PEFT's
adds. The clock is the thread's processor time. Without a GPU Triton compiles for sm_90 and its launches do nothing, which leaves
out what a launch itself costs: about 3 us each, of which PEFT's layer has more than twice as many.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

CALLS, ROUNDS = 200, 15
ARMS: dict[str, dict[str, str]] = {
    "frozen": {},
    "peft": {},
    "peftfast": {},
    "peftfast in Python": {"PEFTFAST_AUTOGRAD": "python"},
    "peftfast without replay": {"PEFTFAST_REPLAY": "never"},
}


class _Launcher:
    """In the place of Triton's: takes what a launch takes and does nothing."""

    launched: list[tuple[Any, ...]] | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, metadata: Any, *rest: Any) -> None:
        if _Launcher.launched is not None:
            _Launcher.launched.append((self.name, (x, y, z), rest[3:]))


class PretendedDriver:
    """A driver of Triton's for an H200 that is not there: kernels are compiled, launches are told to nobody or, within
    :meth:`watched`, written down as (kernel, grid, arguments)."""

    launcher_cls = _Launcher
    stream = 0

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[tuple[Any, ...]]]:
        _Launcher.launched = []
        try:
            yield _Launcher.launched
        finally:
            _Launcher.launched = None


@contextlib.contextmanager
def pretended_driver() -> Iterator[PretendedDriver]:
    """Within the block CPU tensors are served by the Triton kernels as a GPU's are, compiled and not interpreted; their results are
    what was in memory."""
    import triton

    from peftfast.kernels import numerics
    from peftfast.ops import backends, replay

    if numerics.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: expected 0 where kernels are to be compiled")
    driver = PretendedDriver()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver, create=True))
        stack.enter_context(mock.patch.dict(os.environ, {"PEFTFAST_BACKEND": "triton"}))
        stack.enter_context(mock.patch.object(backends, "_interpreted", lambda: True))
        stack.enter_context(mock.patch.object(replay, "_on_gpu", lambda tensor: True))
        backends.triton_available.cache_clear()
        replay.forget()
        try:
            yield driver
        finally:
            backends.triton_available.cache_clear()
            replay.forget()


def host_us(calls: Sequence[tuple[dict[str, str], Callable[[], Any]]], device: str) -> list[float]:
    """Microseconds of this thread each call takes under its variables of the environment, the lower quartile of the rounds. A round
    has a turn of every call, so that a time at which the machine is slow meets them all."""
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for (variables, call), took in zip(calls, rounds, strict=True):
            with mock.patch.dict(os.environ, variables):
                for _ in range(CALLS // 4):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                begun = time.process_time()
                for _ in range(CALLS):
                    call()
                took.append((time.process_time() - begun) / CALLS * 1e6)
    return [sorted(took)[ROUNDS // 4] for took in rounds]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)  # type: ignore[no-any-return]


def layer(arm: str, dropout: float, device: str) -> nn.Module:
    """The linear layer: ``frozen``, ``peft`` or ``peftfast``, in bfloat16."""
    torch.manual_seed(0)
    model = _Model().to(device, torch.bfloat16)
    if arm == "frozen":
        return model.requires_grad_(False).q_proj
    import peft

    import peftfast

    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()  # type: ignore[arg-type]
    if arm == "peftfast":
        peftfast.patch(adapted)
    return adapted.base_model.model.q_proj  # type: ignore[no-any-return]


def rows(device: str) -> list[dict[str, Any]]:
    """One row an arm and dropout: ``forward_us`` and ``step_us``, the forward with its backward."""
    found: list[dict[str, Any]] = []
    x = torch.randn(2, 16, dtype=torch.bfloat16, device=device).requires_grad_()
    dy = torch.randn(2, 16, dtype=torch.bfloat16, device=device)
    for dropout in (0.0, 0.1):
        layers = {arm: layer(arm.split()[0], dropout, device) for arm in ARMS}
        forwards = [(ARMS[arm], lambda own=own: own(x)) for arm, own in layers.items()]
        steps = [(ARMS[arm], lambda own=own: own(x).backward(dy)) for arm, own in layers.items()]
        for arm, forward, step in zip(ARMS, host_us(forwards, device), host_us(steps, device), strict=True):
            found.append({"arm": arm, "dropout": dropout, "forward_us": forward, "step_us": step})
    return found


def added(found: list[dict[str, Any]], row: dict[str, Any], column: str) -> float:
    """What this row's layer costs beyond the frozen one, over what PEFT's does."""
    of = {one["arm"]: one[column] for one in found if one["dropout"] == row["dropout"]}
    return float((row[column] - of["frozen"]) / (of["peft"] - of["frozen"]))


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--out", metavar="FILE.json", type=Path, help="write the rows")
    args = parse.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if device == "cpu":
        os.environ.pop("TRITON_INTERPRET", None)
        print("no GPU: Triton's launches do nothing, torch's operators run on the CPU", flush=True)
    with contextlib.nullcontext() if device == "cuda" else pretended_driver():
        found = rows(device)
    print(f"{'us of the host':26s} {'dropout':>7s} {'forward':>8s} {'and backward':>13s} {'of what PEFT adds':>19s}")
    for row in found:
        parts = [added(found, row, column) for column in ("forward_us", "step_us")]
        shares = "" if row["arm"] == "frozen" else " ".join(f"{part:9.2f}" for part in parts)
        print(f"{row['arm']:26s} {row['dropout']:7.1f} {row['forward_us']:8.1f} {row['step_us']:13.1f} {shares}")
    if args.out:
        args.out.write_text(json.dumps({"device": device, "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
