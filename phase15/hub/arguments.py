# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `phase15 push`. Imports no torch, which takes seconds, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from phase15.cli.files import check_output_dir


AGAIN = "The same command again does what is left to do."


@dataclass
class PushArguments:
    model_dir: str = field(metadata={"help": "A model's folder: train_sft.py's output_dir, or save_pretrained's."})
    repo_id: str = field(metadata={"help": "USER/NAME or ORGANISATION/NAME on the Hub."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Push to this branch, made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of a commit."})
    commit_message: str = field(default="Upload Phase15 model", metadata={"help": "Title of the commit."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Weights above this are split in several files."})
    license: str | None = field(
        default=None, metadata={"help": "Of the weights; the base model's must allow it; default: that of its card."}
    )
    language: list[str] | None = field(
        default=None, metadata={"help": "ISO 639 codes of the languages, such as en; default: of embedded data only."}
    )
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


__all__ = ["AGAIN", "PushArguments"]
