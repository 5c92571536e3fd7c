# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The parser of the commands, and checks of values. Imports no torch, so that `--help` is fast."""

import re
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import fields
from typing import NoReturn

from transformers import HfArgumentParser

from phase15.cli.errors import did_you_mean


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double")  # torch's names


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a module's docstring, and leaves out empty defaults."""

    def _get_help_string(self, action: Action) -> str:
        if action.default in (None, [], ""):
            return action.help
        return super()._get_help_string(action)


class Phase15Parser(HfArgumentParser):
    """
    Overrides HfArgumentParser to give errors in one line, without the usage of more than a hundred flags.

    Args:
        dataclass_types (`type` or `Iterable[type]`): the dataclasses whose fields are flags.
        program (`str`): the command as the user typed it.
        doc (`str`): what `--help` begins with.
        positional (`str`, *optional*): the name of the one word that is not a flag, for the usage.
    """

    def __init__(self, dataclass_types, program: str, doc: str = "", positional: str | None = None):
        words = f" [{positional}]" if positional else ""
        usage = f"{program}{words} [--flag value …]"
        super().__init__(
            dataclass_types, prog=program, usage=usage, description=doc.strip(), formatter_class=HelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"unrecognized arguments: --([\w-]+)", message)
        hint = did_you_mean(flag[1].replace("-", "_"), argument_names(self)) if flag else ""
        raise ValueError(message + hint)


def parse_flags(dataclass_type: type, program: str, doc: str, argv: list[str] | None):
    """Returns a dataclass filled from `argv`, by default the words after the command; `--help` prints and exits."""
    parser = Phase15Parser(dataclass_type, program, doc)
    return dataclass_type(**vars(parser.parse_args(argv)))


def argument_names(parser: HfArgumentParser) -> list[str]:
    return [f.name for cls in parser.dataclass_types for f in fields(cls) if f.init]


def check_choice(name: str, value: str, choices: list[str]):
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but it must be {', '.join(choices[:-1])} or {choices[-1]}.")


def check_least(arguments, least: dict[str, float]):
    """Raises a ValueError for a value below its minimum; `None` is not checked."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:  # refuses nan too
            raise ValueError(f"`{name}` is {value}, but it must be {minimum} or more.")


def check_dtype(name: str):
    if name not in DTYPES:
        raise ValueError(f"`dtype` is {name!r}, but it must be float32, bfloat16, float16 or auto.")


__all__ = [
    "Phase15Parser",
    "argument_names",
    "check_choice",
    "check_dtype",
    "check_least",
    "parse_flags",
]
