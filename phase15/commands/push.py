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

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from phase15.cli.arguments import parse_flags
from phase15.cli.errors import one_line_errors
from phase15.cli.files import check_output_dir


@dataclass
class PushArguments:
    model_dir: str = field(metadata={"help": "A model's folder: train_sft.py's output_dir, or save_pretrained's."})
    repo_id: str = field(metadata={"help": "USER/NAME or ORGANISATION/NAME on the Hub."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Push to this branch, made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of a commit."})
    commit_message: str = field(default="Upload Phase15 model", metadata={"help": "Title of the commit."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Weights above this are split in several files."})
    license: str = field(default="apache-2.0", metadata={"help": "Of the weights; the base model's must allow it."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base LLM, where the model was not made from a Hub id."}
    )
    datasets: list[str] | None = field(
        default=None, metadata={"help": "Hub ids of the training data, where it was not read from a Hub id."}
    )
    overwrite_card: bool = field(
        default=False, metadata={"help": "Replace a model card that was edited on the Hub since the last push."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Write the repository into output_dir; no network."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the dry run writes."})

    def __post_init__(self):
        for name in (self.repo_id, self.base_model, *(self.datasets or ())):
            if name is not None:
                validate_repo_id(name)
        if self.repo_id.count("/") != 1:
            raise ValueError(f"`repo_id` is {self.repo_id!r}, but it must be USER/NAME.")
        if self.dry_run != (self.output_dir is not None):
            raise ValueError("`dry_run` and `output_dir` go together: the folder to which a dry run writes.")
        if self.output_dir is not None:
            check_output_dir(self.output_dir)
        if self.create_pr and self.revision is not None:
            raise ValueError("`create_pr` and `revision` exclude each other: a pull request is always against main.")
        if not self.commit_message.strip():
            raise ValueError("`commit_message` is empty, but a commit needs a title.")
        if not Path(self.model_dir).is_dir():
            raise ValueError(f"{self.model_dir}: no such folder.")


AGAIN = "The same command again does what is left to do."


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


__all__ = ["AGAIN", "PushArguments", "main"]
