# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a server, shared by `serve` and `serve_ray`. Imports no torch, so that `--help` is fast."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from phase15.cli.files import QUICKSTART


MINIMUMS = {
    "num_lanes": 1,
    "chunk_length": 1,
    "max_kept_conversations": 0,
    "max_state_bytes": 1,
    "max_state_tokens": 1,
    "max_body_bytes": 1,
    "max_prompt_tokens": 1,
    "max_tokens": 1,
    "default_tokens": 1,
    "max_waiting": 0,
    "retry_after": 0,
}


@dataclass
class Phase15ServerArguments:
    """Address, model, lanes and limits of a server. The defaults protect a machine that others can reach."""

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on. 0.0.0.0 accepts requests of other machines."}
    )
    port: int = field(
        default=8000, metadata={"help": "Port to listen on, 0 to 65535. With `serve`, 0 takes a free one and logs it."}
    )
    model_dir: str = field(
        default=QUICKSTART, metadata={"help": "Folder or Hub id of a Phase15 model. Its name in requests."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights: auto, float32 or bfloat16."})
    device: str | None = field(
        default=None, metadata={"help": "Device of the model. Default: cuda if available, else cpu."}
    )
    num_lanes: int = field(
        default=16, metadata={"help": "Maximum number of concurrent answers. Memory grows only with this number."}
    )
    chunk_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per chunk, as in `generate`. Longer chunks reduce the cost per token."},
    )
    compile: bool | None = field(
        default=None,
        metadata={"help": "Compiled decoding, as in `generate`. Default: on CUDA, if the model supports it."},
    )
    max_kept_conversations: int = field(
        default=64,
        metadata={"help": "Maximum number of soft prompts of prefixes in memory. A prompt reads only new text."},
    )
    state_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for states and prefixes, which then survive a restart. Default: only memory."},
    )
    max_state_bytes: int = field(
        default=2**30,
        metadata={"help": "Maximum size of the states, in bytes, in memory and in state_dir each."},
    )
    max_state_tokens: int = field(
        default=2**20, metadata={"help": "Maximum length of a text that POST /v1/states reads, in tokens."}
    )
    max_body_bytes: int = field(default=4 * 2**20, metadata={"help": "Maximum size of a request body, in bytes."})
    max_prompt_tokens: int = field(
        default=32768, metadata={"help": "Maximum length of a prompt, in tokens. The model itself has no limit."}
    )
    max_tokens: int = field(default=4096, metadata={"help": "Maximum length of an answer, in tokens."})
    default_tokens: int = field(
        default=1024, metadata={"help": "Maximum length of an answer whose request sets no max_tokens, in tokens."}
    )
    max_waiting: int = field(
        default=64, metadata={"help": "Maximum number of requests without a lane. Others get status 429."}
    )
    retry_after: int = field(default=1, metadata={"help": "Retry-After header of a status 429, in seconds."})
    api_key: str | None = field(
        default=None,
        metadata={"help": "File with the keys that clients may send, one per line. PHASE15_API_KEY can hold them."},
    )

    def __post_init__(self):
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` is {value}, but it must be {minimum} or more.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"`port` is {self.port}, but it must be from 0 to 65535.")

    @property
    def name(self) -> str:
        """Returns the name of the model in requests and answers."""
        return self.model_dir.rstrip("/")  # shells complete a folder's name with a slash

    def read_keys(self) -> list[str]:
        """Returns the API keys of `api_key` or PHASE15_API_KEY, one per line; none if clients need none."""
        if self.api_key is not None:
            source = self.api_key
            key = Path(self.api_key).read_text("utf-8")
        else:
            source = "PHASE15_API_KEY"
            key = os.environ.get("PHASE15_API_KEY")
        if key is None:
            return []
        keys = [line.strip() for line in key.splitlines() if line.strip()]
        if not keys:
            raise ValueError(f"{source} is empty, but it must hold the API key.")
        return keys


@dataclass
class RayArguments(Phase15ServerArguments):
    min_replicas: int = field(default=1, metadata={"help": "Minimum number of replicas, kept while idle."})
    max_replicas: int = field(default=1, metadata={"help": "Maximum number of replicas, started while requests wait."})
    address: str | None = field(
        default=None, metadata={"help": "Address of a Ray cluster; default: one on this machine."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.min_replicas <= self.max_replicas:
            values = f"{self.min_replicas} and {self.max_replicas}"
            raise ValueError(f"`min_replicas` and `max_replicas` are {values}, but 1 <= min_replicas <= max_replicas.")


__all__ = ["Phase15ServerArguments", "RayArguments"]
