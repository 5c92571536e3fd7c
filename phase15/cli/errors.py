# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Ends a command on an error: in one line that names the command, with exit status 1."""

import difflib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError


# Errors about the input, the machine or the network. Any other error is a bug, and shows its traceback.
INPUT_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    StrictDataclassError,
    SafetensorError,
    HTTPError,  # of httpx or httpx2, whichever huggingface_hub uses
)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Returns the end of an error message about an unknown name, with the most similar known one."""
    similar = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else "."


def line_of(error: Exception) -> str:
    """The message of an error in one line. torch wraps a worker's error in a traceback: only its message is kept."""
    message = str(error).rpartition("Phase15RecordError: ")[2]
    return " ".join(message.split())


def print_any_text():
    """Prints characters that the output's encoding lacks as escapes: a pipe on Windows has no Δ."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def one_line_errors(
    program: str, *kinds: type[Exception], explain: Callable[[Exception], str] = line_of
) -> Iterator[None]:
    """Ends `program` in one line on errors of some kinds, by default `INPUT_ERRORS`; on Ctrl-C with status 130."""
    caught = kinds or INPUT_ERRORS
    print_any_text()
    try:
        yield
    except caught as error:
        raise SystemExit(f"{program}: {explain(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


__all__ = ["INPUT_ERRORS", "did_you_mean", "line_of", "one_line_errors", "print_any_text"]
