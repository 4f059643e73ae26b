"""``python -m peftfast bench``: the benchmarks of an installed package. The first word may name another step than ``run``."""

import importlib
from collections.abc import Sequence

from .arguments import require

STEPS = ("run", "verify", "end_to_end", "plot", "growth", "record", "compare", "gpu")


def main(argv: Sequence[str]) -> int:
    """Run one step; ``run`` where none is named. Its exit status."""
    arguments = list(argv)
    step = arguments.pop(0) if arguments and arguments[0] in STEPS else "run"
    require("bench", {"matplotlib": "matplotlib"} if step in ("plot", "growth") else {})
    module = importlib.import_module(f"peftfast.benchmarks.{step}")
    status: int = module.main(arguments)
    return status
