# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server for a Phase15 model: `transformers serve`, told where the model's class is.

    pip install -r requirements-extra.txt
    python serve.py                                          outputs/quickstart, at http://127.0.0.1:8000/v1
    python serve.py --model_dir DIR_OR_HUB_ID --port 8001    other flags go on: see transformers serve --help

The model's name in requests is `--model_dir`, as /v1/models says. Requests are answered one after another, each with a
cache of its own, and in at most 1024 tokens unless they set `max_tokens`; `temperature` is for models whose
generation_config.json has `do_sample`, as everywhere in `transformers serve`. No code of the model's folder is run.

Only this machine reaches the server unless `--host` says otherwise. It asks for no key, and limits neither the size of
a request, nor `max_tokens`, nor how many requests wait; an answer that is not streamed is finished though its client
has gone. Where others reach it, put a proxy before it that limits these.
"""

import argparse
import signal
import sys
from contextvars import ContextVar
from functools import partial

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager
from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from configuration_phase15 import Phase15Config
from modeling_phase15 import Phase15ForCausalLM


STREAMERS: ContextVar[list] = ContextVar("STREAMERS")  # of the request


class EndWithTheClient:
    """
    Middleware that ends what a request has generated when its response ends. The library does so too, but not if the
    client leaves before the response has begun, and then no other request is answered until that one's answer ends.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        STREAMERS.set(streamers := [])
        try:
            await self.app(scope, receive, send)
        finally:
            for streamer in streamers:
                streamer.cancel()


def main(argv: list[str]):
    parser = argparse.ArgumentParser("serve.py", description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_dir", default="outputs/quickstart", help="Folder or Hub id of a Phase15 model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8000")
    args, rest = parser.parse_known_args(argv)
    model_dir = args.model_dir.rstrip("/")  # which the shell appends; the name has none
    for flag in {"--continuous-batching", "--compile"} & set(rest):
        parser.error(f"{flag} needs a paged or a static cache, which a Phase15 model cannot have")
    if not is_serve_available():
        raise SystemExit("serve.py: first pip install -r requirements-extra.txt")
    try:
        repository, _, revision = model_dir.partition("@")
        config, _ = Phase15Config.get_config_dict(repository, revision=revision or "main")
        if config.get("model_type") != Phase15Config.model_type:
            raise ValueError(f"it has no config.json with the model_type {Phase15Config.model_type!r}")
        prepare(model_dir)
        app(["serve", model_dir, "--host", args.host, "--port", args.port, *rest])
    except (OSError, ValueError) as error:  # about the model: the server answers for itself
        raise SystemExit(f"serve.py: cannot serve {model_dir!r}: {' '.join(str(error).split())}") from error


def prepare(model_dir: str):
    """Puts the model where the server looks, and sets what none of its flags does."""
    import uvicorn
    from transformers.cli.serving import server

    # It looks a model's class up by its name, in transformers itself.
    AutoConfig.register(Phase15Config.model_type, Phase15Config)
    AutoModelForCausalLM.register(Phase15Config, Phase15ForCausalLM)
    transformers.Phase15ForCausalLM = Phase15ForCausalLM
    # Its list of models is what lies in the Hub's cache, which it refuses to serve beside the one it was given.
    ModelManager.get_gen_models = lambda self: [{"id": model_dir, "object": "model", "created": 0, "owned_by": ""}]
    # Anybody who reaches the server could have it load other models, or drop this one.
    build_server = server.build_server

    def build_without(*args, **kwargs):
        built = build_server(*args, **kwargs)
        built.router.routes[:] = [route for route in built.routes if route.path not in ("/load_model", "/reset")]
        built.add_middleware(EndWithTheClient)
        return built

    server.build_server = build_without
    generate_streaming = GenerateManager.generate_streaming

    def generate_for_the_request(self, *args, **kwargs):
        queue, streamer = generate_streaming(self, *args, **kwargs)
        STREAMERS.get().append(streamer)
        return queue, streamer

    GenerateManager.generate_streaming = generate_for_the_request
    # Without a limit it ends with its last answer, and an answer has no end that is sure to come.
    uvicorn.Config = partial(uvicorn.Config, timeout_graceful_shutdown=3)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: Python's own way out aborts if a thread is generating


if __name__ == "__main__":
    main(sys.argv[1:])
