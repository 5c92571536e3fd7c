# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Differences between the releases of transformers that this code runs on, and when the code for each can be deleted.

5.24    renamed `past_key_values` to `cache`, in `generate`, in every `forward` and in the outputs. CACHE_NAME goes
        when OLDEST is 5.24. `past_key_values` stays an alias in this model's own `forward`, `generate` and outputs as
        long as tools pass it: transformers accepts it in `forward` until 5.40 and in `generate` until 6.0.
5.23    renamed `gradient_checkpointing` to `activation_checkpointing`. Every release up to 6.0 accepts the old name,
        and the recipes use it. They can use the new one when OLDEST is 5.23.
5.24    mistakes a cache without layers for one of linear attention. `Phase15Cache.is_linear` prevents it, and stays.
5.24    with PEFT 0.21 loses the cache of prompt tuning. `use_cache=` in eval_sft.py goes when peft 0.22 is required.

OLDEST and NEWEST are the ends of the tested range. requirements.txt has the same bounds; .ci/canary tries newer
releases.
"""

import re
from dataclasses import dataclass

import transformers
from transformers import generation
from transformers.utils import logging


OLDEST, NEWEST = (5, 17), (5, 24)  # minor releases of transformers
TESTED = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
logger = logging.get_logger("transformers.phase15")  # one name for all copies of this file: they warn once


def release(version: str) -> tuple[int, ...]:
    """The minor release of a version: (5, 24) for "5.24.1" and for "5.24.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def untested_version(version: str) -> str | None:
    """A warning for the user of a transformers outside the tested range; None for one inside."""
    installed = release(version)
    if OLDEST <= installed <= NEWEST:
        return None
    bound = f"<{NEWEST[0]}.{NEWEST[1] + 1}" if installed > NEWEST else f">={OLDEST[0]}.{OLDEST[1]}"
    return (
        f"This Phase15 code was tested with transformers {TESTED}, but {version} is installed. If something fails: "
        f'pip install "transformers{bound}", or load the newest revision of the model, whose code may know {version}.'
    )


if message := untested_version(transformers.__version__):  # first: an untested version may lack something below
    logger.warning_once(message)

# The name of the cache in the installed transformers.
CACHE_NAME = "cache" if release(transformers.__version__) >= (5, 24) else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def one_cache(cache=None, past_key_values=None):
    """
    The cache that was given, under either name.

    Raises:
        ValueError: if two were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return past_key_values if cache is None else cache


def pop_cache(kwargs: dict):
    """Removes the cache from keyword arguments, under either name, and returns it."""
    return one_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})


def both_cache_names(cls: type) -> type:
    """Class decorator: an output that takes and gives its cache as `cache` and as `past_key_values`."""
    init, get_item, set_item = cls.__init__, cls.__getitem__, cls.__setitem__
    contains, get = cls.__contains__, cls.get
    alias = next(name for name in CACHE_NAMES if name != CACHE_NAME)

    def to_field(key):
        return CACHE_NAME if key == alias else key

    def __init__(self, *args, **kwargs):
        if (cache := pop_cache(kwargs)) is not None:
            kwargs[CACHE_NAME] = cache
        init(self, *args, **kwargs)

    type.__setattr__(cls, "__init__", __init__)  # 5.24's metaclass would wrap it and warn of the old name
    cls.__getitem__ = lambda self, key: get_item(self, to_field(key))
    cls.__setitem__ = lambda self, key, value: set_item(self, to_field(key), value)
    cls.__contains__ = lambda self, key: contains(self, to_field(key))
    cls.get = lambda self, key, default=None: get(self, to_field(key), default)
    values = property(lambda self: getattr(self, CACHE_NAME), lambda self, cache: setattr(self, CACHE_NAME, cache))
    setattr(cls, alias, values)
    return cls


@both_cache_names
@dataclass
class Phase15GenerateOutput(generation.GenerateDecoderOnlyOutput):
    """The output of greedy search and sampling with `return_dict_in_generate=True`."""


@both_cache_names
@dataclass
class Phase15GenerateBeamOutput(generation.GenerateBeamDecoderOnlyOutput):
    """The output of beam search with `return_dict_in_generate=True`."""


def give_both_cache_names(output):
    """Turns an output of the library's `generate` into one that gives its cache under both names."""
    for ours in (Phase15GenerateOutput, Phase15GenerateBeamOutput):
        if type(output) is ours.__base__:
            return ours(**output)
    return output


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "NEWEST",
    "OLDEST",
    "TESTED",
    "Phase15GenerateBeamOutput",
    "Phase15GenerateOutput",
    "both_cache_names",
    "give_both_cache_names",
    "one_cache",
    "pop_cache",
    "untested_version",
]
