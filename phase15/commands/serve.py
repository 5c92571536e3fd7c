# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server for a Phase15 model, with many answers at once in lanes that never grow.

    pip install -r requirements-extra.txt -c requirements.lock
    phase15 serve                                          outputs/quickstart, at http://127.0.0.1:8000/v1
    phase15 serve --model_dir DIR_OR_HUB_ID --port 8001
    phase15 serve --num_lanes 64 --dtype bfloat16 --device cuda
    phase15 serve --help                                   every flag, with the limits

The model's name in requests is `--model_dir`, as /v1/models shows. No code of the model's folder is run. Only this
machine can reach the server unless `--host` allows others; then set an API key. docs/serving.md has the rest.
"""

import signal
from dataclasses import dataclass, field

from phase15.cli.arguments import parse_flags
from phase15.cli.errors import one_line_errors
from phase15.serving.arguments import Phase15ServerArguments


@dataclass
class ServeArguments(Phase15ServerArguments):
    shutdown_seconds: int = field(
        default=30, metadata={"help": "Maximum time for unfinished answers after SIGTERM or Ctrl-C, in seconds."}
    )


def serve(args: ServeArguments):
    # these imports take seconds: after `--help` and wrong flags
    import uvicorn

    from phase15.serving.openai_api import Server, build_app

    app = build_app(Server.load(args))
    config = uvicorn.Config(app, host=args.host, port=args.port, timeout_graceful_shutdown=args.shutdown_seconds)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again at its end: a clean stop exits 0
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()


def main(argv: list[str] | None = None, program: str = "phase15 serve"):
    with one_line_errors(program):
        serve(parse_flags(ServeArguments, program, __doc__, argv))


__all__ = ["ServeArguments", "main"]
