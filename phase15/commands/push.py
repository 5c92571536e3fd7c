# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Publishes a trained model on the Hugging Face Hub: weights, tokenizer, code, pictures, recipe and model card, in one
commit. Before, a new process loads the files and must give the same answer.

    phase15 push --model_dir outputs/quickstart --repo_id USER/NAME --dry_run --output_dir outputs/staged
    hf auth login                                               (or HF_TOKEN=…)
    phase15 push --model_dir outputs/quickstart --repo_id USER/NAME --private
    phase15 push --help                                every flag

The dry run writes the whole repository into a folder and touches no network. A push that changes nothing makes no
commit.
"""

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from phase15.cli.arguments import parse_flags
from phase15.cli.errors import one_line_errors
from phase15.hub.arguments import AGAIN, PushArguments


def explain(error: Exception) -> str:
    """One line for an error of the input or of the connection to the Hub, without the token."""
    line = " ".join(describe(error).split())
    token = get_token()
    return line.replace(token, "***") if token else line  # some libraries print the header with the token


def describe(error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and only a dry run needs no network."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = {401: "the token is not valid", 403: "the token may not write there"}.get(status, f"error {status}")
        return f"{constants.ENDPOINT} refuses: {reason}. {error.server_message or ''} {AGAIN if status >= 500 else ''}"
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached, or the connection broke: {error}. {AGAIN}"
    return str(error)


def main(argv: list[str] | None = None, program: str = "phase15 push"):
    with one_line_errors(program, explain=explain):
        args = parse_flags(PushArguments, program, __doc__, argv)
        from phase15.commands.push_run import push  # imports torch: seconds

        push(args)


__all__ = ["main"]
