# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Time to the first token of an answer: through serve.py's endpoint, streamed to OpenAI's client, and by `generate` with
a streamer in this process. In turn, so that whatever else the machine does hits both.

    python -m benchmarks.serve --model_dir outputs/quickstart --repetitions 15
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import openai
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


ROOT = Path(__file__).parent.parent
CHAT = [{"role": "user", "content": "What is the function os.path.join for?"}]
ANSWER_LENGTH = 2  # the rest of an answer is not measured


class FirstToken(BaseStreamer):
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def through_generate(model, tokenizer) -> float:
    start, streamer = time.perf_counter(), FirstToken()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=ANSWER_LENGTH, do_sample=False, streamer=streamer)
    return streamer.times[1] - start  # the prompt came before it


def through_server(client: openai.OpenAI, model_dir: str) -> float:
    start = time.perf_counter()
    chunks = client.chat.completions.create(
        model=model_dir, messages=CHAT, max_tokens=ANSWER_LENGTH, temperature=0, stream=True
    )
    times = [time.perf_counter() for chunk in chunks if chunk.choices[0].delta.content]
    return times[0] - start


def main(model_dir: str, repetitions: int):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "scripts.serve", "--model_dir", model_dir, "--port", port]
    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
            client.models.list()  # comes back when the server is up
            pairs = [
                (through_generate(model, tokenizer), through_server(client, model_dir)) for _ in range(repetitions + 2)
            ][2:]  # without the first ones, which warm up
        finally:
            server.kill()
    direct, served = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    ratio = statistics.median(served / direct for direct, served in pairs)
    print(f"generate {direct:.1f} ms, server {served:.1f} ms; median of the ratios {ratio:.3f}, n = {repetitions}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="outputs/quickstart")
    parser.add_argument("--repetitions", type=int, default=15)
    main(**vars(parser.parse_args()))
