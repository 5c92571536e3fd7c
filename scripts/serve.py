# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server for a Phase15 model: `transformers serve` with the model's class registered.

    pip install -r requirements-extra.txt -c requirements.lock
    python -m scripts.serve                                          outputs/quickstart, at http://127.0.0.1:8000/v1
    python -m scripts.serve --model_dir DIR_OR_HUB_ID --port 8001    other flags: see transformers serve --help

The model's name in requests is `--model_dir`, as /v1/models shows. Requests are answered one after another, each with
its own cache, in at most 1024 tokens unless they set `max_tokens`. `temperature` needs a model whose
generation_config.json has `do_sample`, as in `transformers serve`. No code of the model's folder is run.

Only this machine can reach the server unless `--host` allows others. The server asks for no key. It limits neither the
size of a request, nor `max_tokens`, nor the number of waiting requests. It finishes an answer that is not streamed
even if the client has left. If others can reach it, put a proxy before it that limits these.
"""

import argparse
import asyncio
import signal
import sys

import transformers
from huggingface_hub import typer_factory
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from configuration_phase15 import Phase15Config
from phase15.models import StrictPhase15ForCausalLM


class EndWithTheClient:
    """
    Middleware that reports a client's departure only while the response's generator waits for a token. There the
    generator is cancelled, and ends its generation. A generator that Starlette cancels while it sends, or before it
    starts, is left to the garbage collector, and no other request is answered until that answer ends.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        is_read = has_left = False
        waiting = asyncio.Event()  # for the next message of the response

        async def receive_in_time():
            nonlocal is_read, has_left
            message = await receive()
            if message["type"] == "http.disconnect" and is_read:  # a request that was cut short gets no response
                has_left = True
                await waiting.wait()
            is_read = is_read or (message["type"] == "http.request" and not message.get("more_body", False))
            return message

        async def send_if_here(message):
            waiting.clear()
            if not has_left or message["type"] != "http.response.body":
                await send(message)
            waiting.set()  # no other task runs until the generator waits

        await self.app(scope, receive_in_time, send_if_here)


def command_for(model_dir: str) -> type[Serve]:
    """The class of `transformers serve`, for this model alone."""

    class ServeOne(Serve):
        def start_server(self):
            """Overrides Serve, which calls this under `--non-blocking` when it has built the server."""
            from starlette.middleware import Middleware

            config = self.server.config
            app = config.app
            # Every client could make the server load other models, or drop this one. Before transformers 5.24 its list
            # of models was the Hub's cache, whose models it refuses to serve.
            replaced = "/load_model", "/reset", "/v1/models"
            app.router.routes[:] = [route for route in app.routes if route.path not in replaced]
            models = [{"id": model_dir, "object": "model", "created": 0, "owned_by": ""}]
            app.add_api_route("/v1/models", lambda: {"object": "list", "data": models}, methods=["GET", "OPTIONS"])
            app.user_middleware.append(Middleware(EndWithTheClient))  # the innermost, next to the generator
            # the running answer may never end
            config.timeout_graceful_shutdown = 3
            self.server.run()

    return ServeOne


def main(argv: list[str]):
    parser = argparse.ArgumentParser("serve.py", description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_dir", default="outputs/quickstart", help="Folder or Hub id of a Phase15 model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8000")
    args, rest = parser.parse_known_args(argv)
    model_dir = args.model_dir.rstrip("/")  # the shell appends a slash; the name has none
    for flag in {"--continuous-batching", "--compile"} & set(rest):
        parser.error(f"{flag} needs a paged or a static cache, which a Phase15 model cannot have")
    if not is_serve_available():
        raise SystemExit("serve.py: first pip install -r requirements-extra.txt")
    try:
        repository, _, revision = model_dir.partition("@")
        config, _ = Phase15Config.get_config_dict(repository, revision=revision or "main")
        if config.get("model_type") != Phase15Config.model_type:
            raise ValueError(f"it has no config.json with the model_type {Phase15Config.model_type!r}")
        # The server looks up a model's class by name, in transformers itself.
        AutoConfig.register(Phase15Config.model_type, Phase15Config)
        AutoModelForCausalLM.register(Phase15Config, StrictPhase15ForCausalLM)
        transformers.Phase15ForCausalLM = StrictPhase15ForCausalLM
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: Python's shutdown aborts while a thread generates
        cli = typer_factory(help="Phase15")
        cli.command(name="serve")(command_for(model_dir))
        # `--non-blocking` makes `Serve` call `start_server`
        cli(["serve", model_dir, "--host", args.host, "--port", args.port, *rest, "--non-blocking"])
    except (OSError, ValueError) as error:  # about the model; the server reports its own errors
        raise SystemExit(f"serve.py: cannot serve {model_dir!r}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
