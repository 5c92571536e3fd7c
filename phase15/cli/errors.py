# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""How a command ends on an error: in one line that names the command, with exit status 1."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError

from phase15.cli.help import print_any_text


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


def line_of(error: Exception) -> str:
    """The message of an error in one line. torch wraps a worker's error in a traceback: only its message is kept."""
    message = str(error).rpartition("Phase15RecordError: ")[2]
    return " ".join(message.split())


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


__all__ = ["INPUT_ERRORS", "line_of", "one_line_errors"]
