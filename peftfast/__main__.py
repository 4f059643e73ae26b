"""``python -m peftfast``: demo, finetune, merge, methods, doctor, bench. Standard library only until a command runs."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from .cli import UserError, bench, workers
from .cli.arguments import Parser

COMMANDS = {
    "demo": "fine-tune a real 4-bit model, stock and patched side by side; no network, minutes on two CPU cores",
    "finetune": "LoRA, DoRA or QLoRA on your model and your JSON lines through transformers' Trainer; writes a PEFT adapter",
    "merge": "base + adapter as one model, in bf16 or 4 bits, checked by reading it back",
    "methods": "the methods of the literature that peftfast.adapt puts on a model, or all of one",
    "doctor": "what is installed, which kernel serves each operator here, and whether each is right",
    "bench": f"the benchmarks of the kernels: {', '.join(bench.STEPS)}",
}
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as of a batch system whose time is up: what a command has begun is cleared away as at Ctrl+C."""


def _raise_at_sigterm() -> None:
    own = os.getpid()

    def handler(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if os.getpid() != own:  # a forked child has nothing of ours to clear away
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


def parser() -> Parser:
    width = max(map(len, COMMANDS))
    parse = Parser(
        prog="python -m peftfast",
        description="Fused kernels for parameter-efficient fine-tuning.",
        epilog="\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("command", choices=tuple(COMMANDS), help="its own options: COMMAND --help")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status, 2 with one line on stderr for bad input, 130 with one line when interrupted, 143 when
    terminated."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Only the first word: what follows is the command's own.
        command = parser().parse_args(arguments[:1]).command
        return importlib.import_module(f".cli.{command}", __package__).main(arguments[1:])
    except UserError as error:
        where = "" if workers.first() else f" on worker {workers.number()}"
        print(f"error{where}: {error}", file=sys.stderr)
        return BAD_INPUT
    except Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    _raise_at_sigterm()
    sys.exit(main())
