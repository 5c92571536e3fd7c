# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server for a Phase15 model, with many answers at once in lanes that never grow.

    pip install -r requirements-extra.txt -c requirements.lock
    python -m scripts.serve                                          outputs/quickstart, at http://127.0.0.1:8000/v1
    python -m scripts.serve --model_dir DIR_OR_HUB_ID --port 8001
    python -m scripts.serve --num_lanes 64 --dtype bfloat16 --device cuda
    python -m scripts.serve --help                                   every flag, with the limits

The model's name in requests is `--model_dir`, as /v1/models shows. No code of the model's folder is run. Only this
machine can reach the server unless `--host` allows others; then set an API key. docs/serving.md has the rest.
"""

import signal
import sys
from dataclasses import dataclass, field

import torch
import uvicorn
from transformers.utils import logging

from phase15.arguments import Phase15Parser
from phase15.errors import one_line_errors
from phase15.models import QUICKSTART, load_served
from phase15.openai_api import Server, build_app
from phase15.serving import Phase15ServerArguments


logger = logging.get_logger("transformers.phase15.serve")


@dataclass
class ServeArguments(Phase15ServerArguments):
    model_dir: str = field(default=QUICKSTART, metadata={"help": "Folder or Hub id of a Phase15 model."})
    revision: str | None = field(default=None, metadata={"help": "Of a model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 lets other machines in."})
    port: int = field(default=8000, metadata={"help": "0 takes a free one, which the log names."})
    shutdown_seconds: int = field(
        default=30, metadata={"help": "After SIGTERM or Ctrl-C answers under way have so long to end."}
    )


def main(argv: list[str]):
    parser = Phase15Parser(ServeArguments, prog="serve.py", description=__doc__.strip().splitlines()[0])
    args = ServeArguments(**vars(parser.parse_args(argv)))
    server = make_server(args)
    config = uvicorn.Config(
        build_app(server), host=args.host, port=args.port, timeout_graceful_shutdown=args.shutdown_seconds
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again at its end: a clean stop exits 0
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()


def make_server(args: ServeArguments) -> Server:
    """Loads the model, and says in the log what its lanes take."""
    args.key()  # refuse a missing one before the weights are read
    name = args.model_dir.rstrip("/")  # the shell appends a slash; the name has none
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` is {device!r}: {str(error).splitlines()[0]}") from error
    model, tokenizer = load_served(name, args.dtype, args.revision)
    server = Server(model.to(device).eval(), tokenizer, name, args)
    state = model.config.num_soft_tokens * model.config.text_config.hidden_size * model.dtype.itemsize
    text, columns = model.config.text_config, model.config.num_soft_tokens + model.config.chunk_length
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    lane = state + 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * columns * model.dtype.itemsize
    logger.warning(
        f"{name} on {device}: {args.num_lanes} lanes of {lane / 2**20:,.1f} MB, and up to "
        f"{args.max_kept_conversations} kept conversations of {state / 2**20:,.2f} MB, at any length."
    )
    return server


if __name__ == "__main__":
    with one_line_errors("serve.py"):
        main(sys.argv[1:])
