# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a run: dataclasses with their checks, recipes, and the parser of both."""

import re
from dataclasses import fields

import torch
from transformers import (
    HfArgumentParser,
)

from phase15.cli.help import did_you_mean


class Phase15Parser(HfArgumentParser):
    """Overrides HfArgumentParser to give errors in one line, without the usage of more than a hundred flags."""

    def error(self, message: str):
        found = re.match(r"unrecognized arguments: --(\w+)", message)
        raise ValueError(message + (did_you_mean(found[1], argument_names(self)) if found else ""))


def argument_names(parser: HfArgumentParser) -> list[str]:
    return [f.name for cls in parser.dataclass_types for f in fields(cls) if f.init]


def check_choice(name: str, value: str, choices: list[str]):
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but it must be {', '.join(choices[:-1])} or {choices[-1]}.")


def check_least(arguments, least: dict[str, float]):
    """Raises a ValueError for a value below its least; None is no value."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:  # refuses nan too
            raise ValueError(f"`{name}` is {value}, but it must be {minimum} or more.")


def check_dtype(name: str):
    if name != "auto" and not getattr(getattr(torch, str(name), None), "is_floating_point", False):
        raise ValueError(f"`dtype` is {name!r}, but it must be float32, bfloat16, float16 or auto.")


__all__ = ["Phase15Parser", "argument_names", "check_choice", "check_dtype", "check_least"]
