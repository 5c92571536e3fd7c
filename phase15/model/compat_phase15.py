# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Differences between the releases of transformers that this code runs on, and when the code for each can be deleted.

5.24    renamed `past_key_values` to `cache`, in `generate`, in every `forward` and in the outputs. CACHE_NAME and
        `with_cache_alias` go when OLDEST is 5.24. `past_key_values` stays an alias in this model's own `forward` and
        `generate` as long as tools pass it: transformers accepts it in `forward` until 5.40 and in `generate` until
        6.0.
5.23    renamed `gradient_checkpointing` to `activation_checkpointing`. Every release up to 6.0 accepts the old name,
        and the recipes use it. They can use the new one when OLDEST is 5.23.
5.24    mistakes a cache without layers for one of linear attention. `Phase15Cache.is_linear` prevents it, and stays.
5.24    with PEFT 0.21 loses the cache of a tuned prompt on a bare LLM. `use_cache=` in eval_sft.py goes when peft 0.22
        is required. Here `prepare_inputs_for_generation` gives the cache as `past_key_values`, which PEFT reads.

OLDEST and NEWEST are the ends of the tested range. requirements.txt has the same bounds; .ci/canary tries newer
releases.
"""

import re

import transformers
from transformers.utils import logging


OLDEST = (5, 17)  # minor releases of transformers
NEWEST = (5, 24)
TESTED = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
logger = logging.get_logger("transformers.phase15")  # one name for all copies of this file: they warn once


def release(version: str) -> tuple[int, ...]:
    """Returns the minor release of a version: (5, 24) for "5.24.1" and for "5.24.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def untested_version(version: str) -> str | None:
    """Returns a warning for the user of a transformers outside the tested range, None for one inside."""
    installed = release(version)
    if OLDEST <= installed <= NEWEST:
        return None
    bound = f"<{NEWEST[0]}.{NEWEST[1] + 1}" if installed > NEWEST else f">={OLDEST[0]}.{OLDEST[1]}"
    return (
        f"This Phase15 code was tested with transformers {TESTED}, but {version} is installed. If something fails: "
        f'pip install "transformers{bound}", or load the newest revision of the model, whose code may know {version}.'
    )


message = untested_version(transformers.__version__)
if message:  # first, because an untested version may lack something that is used below
    logger.warning_once(message)

# The name of the cache in the installed transformers.
CACHE_NAME = "cache" if release(transformers.__version__) >= (5, 24) else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def one_cache(cache=None, past_key_values=None):
    """Returns the cache that was given under either name. Raises a ValueError if two were given."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return past_key_values if cache is None else cache


def pop_cache(kwargs: dict):
    """Removes the cache from keyword arguments, under either name, and returns it."""
    return one_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})


def with_cache_alias(cls: type) -> type:
    """
    Class decorator: gives an output the attribute `cache` on releases that call it `past_key_values`. From 5.24 on the
    library's own outputs take and give both names. Goes when OLDEST is 5.24.
    """
    if CACHE_NAME == "past_key_values":
        cls.cache = property(lambda self: self.past_key_values)
    return cls


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "NEWEST",
    "OLDEST",
    "TESTED",
    "one_cache",
    "pop_cache",
    "untested_version",
    "with_cache_alias",
]
