# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Answers as text for many clients at once: a thread that advances the lanes, and their tokens in an event loop."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from phase15.cli.files import QUICKSTART


@dataclass
class Phase15ServerArguments:
    """A server's place, model, lanes and limits. The defaults protect a machine that others can reach."""

    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 lets other machines in."})
    port: int = field(default=8000, metadata={"help": "With serve.py 0 takes a free one, which the log names."})
    model_dir: str = field(default=QUICKSTART, metadata={"help": "Folder or Hub id of a Phase15 model."})
    revision: str | None = field(default=None, metadata={"help": "Of a model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    num_lanes: int = field(default=16, metadata={"help": "Answers at once. Memory grows with it, and nothing else."})
    chunk_length: int | None = field(
        default=None, metadata={"help": "Tokens of a chunk, as in `generate`; a longer chunk costs less a token."}
    )
    compile: bool | None = field(
        default=None, metadata={"help": "Compiled steps, as in `generate`: by default on CUDA, where possible."}
    )
    max_kept_conversations: int = field(
        default=64, metadata={"help": "Soft prompts kept after their answers; a next turn reads what is new."}
    )
    max_body_bytes: int = field(default=4 * 2**20, metadata={"help": "Of a request."})
    max_prompt_tokens: int = field(default=32768, metadata={"help": "Of a prompt. The model itself has no limit."})
    max_tokens: int = field(default=4096, metadata={"help": "The most that a request may ask for."})
    default_tokens: int = field(default=1024, metadata={"help": "Of an answer whose request gives no max_tokens."})
    max_waiting: int = field(default=64, metadata={"help": "Requests without a lane; others get status 429."})
    retry_after: int = field(default=1, metadata={"help": "Seconds after which those may try again."})
    api_key: str | None = field(
        default=None,
        metadata={"help": "File with the key that clients must send; or set PHASE15_API_KEY to the key itself."},
    )

    def __post_init__(self):
        at_least = {"max_kept_conversations": 0, "max_waiting": 0, "retry_after": 0}
        least_1 = ("num_lanes", "max_body_bytes", "max_prompt_tokens", "max_tokens", "default_tokens", "chunk_length")
        for name in (*least_1, *at_least):
            value = getattr(self, name)
            if value is not None and value < at_least.get(name, 1):
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be {at_least.get(name, 1)} or more.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"`port` is {self.port}, but it must be from 0 to 65535.")

    @property
    def name(self) -> str:
        """Of the model, in requests and answers."""
        return self.model_dir.rstrip("/")  # the shell appends a slash

    def read_key(self) -> str | None:
        """The API key, if clients need one."""
        key = os.environ.get("PHASE15_API_KEY")
        if self.api_key is not None:
            key = Path(self.api_key).read_text("utf-8")
        if key is not None and not key.strip():
            raise ValueError(f"{self.api_key or 'PHASE15_API_KEY'} holds no API key.")
        return key and key.strip()


__all__ = ["Phase15ServerArguments"]
