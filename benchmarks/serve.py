# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Serving: time to the first token through scripts/serve.py and OpenAI's client, beside `generate` in this process."""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


ROOT = Path(__file__).parent.parent
CHAT = [{"role": "user", "content": "What is the function os.path.join for?"}]
ANSWER_LENGTH = 2  # only the first token is timed
WARM_UP = 2  # rounds that do not count


class TokenTimes(BaseStreamer):
    """A streamer that records the time of the prompt, then of each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def through_generate(model, tokenizer) -> float:
    """Seconds to the first token of `generate`."""
    start, streamer = time.perf_counter(), TokenTimes()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model.generate(
        **inputs.to(model.device), max_new_tokens=ANSWER_LENGTH, do_sample=False, pad_token_id=0, streamer=streamer
    )
    return streamer.times[1] - start


def through_server(client, model_dir: str) -> float:
    """Seconds to the first text of a streamed answer."""
    start = time.perf_counter()
    chunks = client.chat.completions.create(
        model=model_dir, messages=CHAT, max_tokens=ANSWER_LENGTH, temperature=0, stream=True
    )
    times = [time.perf_counter() for chunk in chunks if chunk.choices[0].delta.content]
    if not times:
        raise ValueError(f"the answer of {model_dir} to {CHAT[0]['content']!r} has no text: nothing to time.")
    return times[0] - start


def serve(args: argparse.Namespace) -> dict:
    """Times both in turn, so that the machine's other work affects both."""
    import openai  # of requirements-extra.txt, and no other benchmark needs it

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    flags = "--model_dir", args.model_dir, "--port", port, "--device", str(args.device)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, trust_remote_code=True).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir, trust_remote_code=True)
    command = [sys.executable, "-m", "scripts.serve", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
            client.models.list()  # retries until the server is up
            pairs = [
                (through_generate(model, tokenizer), through_server(client, args.model_dir))
                for _ in range(WARM_UP + args.rounds)
            ][WARM_UP:]
        finally:
            server.kill()
    direct, served = zip(*pairs, strict=True)
    ratio = statistics.median(served / direct for direct, served in pairs)
    return {
        "results": {
            "generate": {"first_token_ms": 1e3 * statistics.median(direct), "ratio_to_generate": 1.0},
            "server": {"first_token_ms": 1e3 * statistics.median(served), "ratio_to_generate": ratio},
        }
    }
