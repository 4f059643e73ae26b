"""What ``finetune --method NAME`` may be: one table, a class of :class:`.finetune_base.Method` a line; and all that ``python -m
peftfast methods`` lists, by :mod:`.finetune_named`."""

import argparse

from . import arguments
from .errors import UserError
from .finetune_base import COMMON, Method, option
from .finetune_lora import LORA_OPTIONS, DoRA, LoRA, QLoRA
from .finetune_mezo import MeZOMethod
from .finetune_named import named
from .finetune_spiel import SpIELMethod

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "qlora": QLoRA,
    "dora": DoRA,
    "spiel": SpIELMethod,
    "mezo": MeZOMethod,
}


def resolve(options: argparse.Namespace) -> Method:
    """The method that is asked for; its defaults are put where ``options`` says None.

    Raises:
        UserError: an option of another method was given.
    """
    method = METHODS[options.method].chosen(options) if options.method in METHODS else named(options.method)
    if options.method in METHODS and options.method_option:
        raise UserError(f"--method-option: {options.method} has options of the command's own, see --help")
    own = COMMON | dict(method.options)
    for name in sorted({name for other in METHODS.values() for name in other.options} - set(own)):
        if getattr(options, name) is not None:
            owners = [key for key, other in METHODS.items() if name in other.options]
            raise UserError(f"--{name}: is of --method {' or '.join(owners)}, not of {method.title or options.method}")
    for name, default in own.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return method()


def add_options(parse: argparse.ArgumentParser) -> None:
    """The options that are of methods, in the parser."""
    adapter = parse.add_argument_group("adapter")
    listed = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
    listed += "; or any that `python -m peftfast methods` lists, with its own learning rate"
    adapter.add_argument("--method", metavar="NAME", default="lora", help=f"{listed} (default: %(default)s)")
    option(
        adapter,
        "method_option",
        action="append",
        metavar="NAME=VALUE",
        help="an option of a method that `python -m peftfast methods` lists; may be given several times",
    )
    whole, above_zero = arguments.integer, arguments.number(0, above_lowest=True)
    option(adapter, "r", "lora_r", type=whole(1), help=f"rank (default: {_default('r')})")
    option(adapter, "lora_alpha", type=above_zero, help="default: the rank")
    option(adapter, "lora_dropout", type=arguments.number(0, 1), help=f"default: {_default('lora_dropout')}")
    option(adapter, "use_rslora", action="store_true", default=None, help="scale by alpha / sqrt(r)")
    option(
        adapter,
        "target_modules",
        nargs="+",
        default=["all-linear"],
        help="names of linear modules, or the default, all-linear: every one but the output layer",
    )
    option(adapter, "dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base's weights")
    option(adapter, "load_in_4bit", action="store_true", help="a 4-bit NF4 base for the other methods too")
    for method in METHODS.values():
        if "add_options" in vars(method):
            method.add_options(parse)
    training = parse.add_argument_group("training")
    option(training, "learning_rate", type=above_zero, help=f"default: {_default('learning_rate')}")
    option(
        training,
        "lr_scheduler_type",
        choices=("linear", "cosine", "constant"),
        help=f"default: {_default('lr_scheduler_type')}",
    )
    option(training, "weight_decay", type=arguments.number(0), help=f"default: {_default('weight_decay')}")
    option(training, "max_grad_norm", type=arguments.number(0), help=f"default: {_default('max_grad_norm')}")


def _default(name: str) -> str:
    """A default, and those of the methods that have another."""
    usual = COMMON.get(name, LORA_OPTIONS.get(name))
    others = {key: method.options[name] for key, method in METHODS.items() if name in method.options}
    listed = [
        f"; {key}: {value:g}" if isinstance(value, float) else f"; {key}: {value}"
        for key, value in others.items()
        if value != usual
    ]
    return f"{usual:g}{''.join(listed)}" if isinstance(usual, float) else f"{usual}{''.join(listed)}"
