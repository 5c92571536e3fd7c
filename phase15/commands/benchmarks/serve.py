# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Serving: `phase15 serve` beside the base under `transformers serve`, an earlier checkout's server, and `generate`.
Tokens per second, time to the first token and between tokens, memory, and the share of the compute limit.
"""

import argparse
import asyncio
import functools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from phase15.commands.benchmarks.harness import SHAPES, ceilings, make_models, timed
from phase15.model.compat_phase15 import CACHE_NAME
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor
from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[3]
PROMPT_LENGTHS = (64, 512)  # range, in tokens
ANSWER_LENGTHS = (16, 256)  # range, in tokens
CACHE_LENGTHS = (512, 2048, 8192)  # of the base, in tokens
MESSAGE_LENGTH = 128  # of the user in a conversation, in tokens
REPLY_LENGTH = 32  # of the model in a conversation, in tokens
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
# Saves a model of a shape with the code of an earlier checkout, which may not read the folders of later code.
MAKE = """
import json, sys, torch
from transformers import LlamaConfig
from configuration_phase15 import Phase15Config
from modeling_phase15 import Phase15ForCausalLM
text_config, config, folder, dtype = json.loads(sys.argv[1])
torch.manual_seed(0)
text_config = LlamaConfig(**text_config, bos_token_id=1, eos_token_id=None)
model = Phase15ForCausalLM(Phase15Config(text_config=text_config, **config)).eval()
torch.nn.init.normal_(model.hypernet.alpha)
model.generation_config.pad_token_id = 0
model.to(getattr(torch, dtype)).save_pretrained(folder)
"""


@dataclass
class Job:
    """
    A request of the workload, and when it was sent and answered.

    Args:
        prompt (`list[int]`): token ids.
        length (`int`): number of tokens of the answer.
        sent (`float`): `time.perf_counter()` when it was sent.
        times (`tuple[float, ...]`): `time.perf_counter()` at each token.
    """

    prompt: list[int]
    length: int
    sent: float = 0.0
    times: tuple[float, ...] = ()


class TokenTimes(BaseStreamer):
    """Streamer that records the time of the prompt, then of each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def workload(number: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """Returns requests with prompts and answers of various lengths, the same for every server."""
    draw = random.Random(seed)
    lengths = [(draw.randint(*PROMPT_LENGTHS), draw.randint(*ANSWER_LENGTHS)) for _ in range(number)]
    jobs = []
    for prompt_length, answer_length in lengths:
        jobs.append(Job(random_tokens(draw, prompt_length, vocab_size), answer_length))
    return jobs


def random_tokens(draw: random.Random, number: int, vocab_size: int) -> list[int]:
    return [draw.randrange(3, vocab_size) for _ in range(number)]


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def save_tokenizer(folder: str, vocab_size: int):
    """Saves a tokenizer with one word per token, so that texts have known lengths and every token has a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace(replacement=" ", prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = "w0"
    tokenizer.save_pretrained(folder)


async def ask(port: int, name: str, messages: list[dict], job: Job) -> str:
    """
    Sends one streamed request, and records its times in the job. Reads the events without a client library, which
    would take longer than a tiny model.

    Returns:
        `str`: the text of the answer.
    """
    body = {"model": name, "messages": messages, "max_tokens": job.length, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    job.sent = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        error = await reader.read(2000)
        raise ValueError(f"{name}: {status.decode().strip()} {error.decode()}")
    times = []
    text = ""
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        choices = json.loads(line.removeprefix(b"data: ")).get("choices")
        piece = choices[0]["delta"].get("content") if choices else None
        if piece:
            text += piece
            times.append(time.perf_counter())
    writer.close()
    job.times = tuple(times)
    return text


async def run_clients(port: int, name: str, jobs: list[Job], number: int) -> float:
    """Sends the jobs with a number of clients, each of which has one request at a time. Returns the seconds."""
    waiting = iter(jobs)  # shared by all clients

    async def run_client():
        for job in waiting:
            await ask(port, name, [{"role": "user", "content": words(job.prompt)}], job)

    start = time.perf_counter()
    await asyncio.gather(*(run_client() for _ in range(number)))
    return time.perf_counter() - start


async def conversation(port: int, name: str, turns: int, vocab_size: int, seed: int) -> list[float]:
    """Returns the seconds to the first token of each turn of a conversation."""
    draw = random.Random(100 + seed)
    messages = []
    seconds = []
    for _ in range(turns):
        job = Job([], REPLY_LENGTH)
        messages.append({"role": "user", "content": words(random_tokens(draw, MESSAGE_LENGTH, vocab_size))})
        reply = await ask(port, name, messages, job)
        messages.append({"role": "assistant", "content": reply})
        seconds.append(job.times[0] - job.sent)
    return seconds


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, cwd: Path = ROOT, site: str | None = None) -> Iterator[subprocess.Popen]:
    """
    Runs a server in a process of its own. Yields the process once the server answers.

    Args:
        command (`list[str]`): command line.
        port (`int`): port of the server.
        cwd (`Path`): folder in which it runs.
        site (`str`, *optional*): folder of packages for the server.
    """
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, **streams) as process:
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    raise ValueError(f"{' '.join(command[:5])} ended with exit status {process.returncode}.")
                with suppress(OSError, HTTPException):
                    connection = HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/health")
                    connection.getresponse()
                    break
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def resident_mb(pid: int) -> float | None:
    """Returns the MB of memory that a process has in use (Linux), or `None` elsewhere."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def percentile_95(values: list[float]) -> float:
    index = min(int(0.95 * len(values)), len(values) - 1)
    return sorted(values)[index]


def summary(jobs: list[Job], seconds: float, pid: int) -> dict:
    """Returns a row of the table: rate, latencies and memory."""
    first_token_ms = [1e3 * (job.times[0] - job.sent) for job in jobs]
    gap_ms = []
    for job in jobs:
        for before, after in pairwise(job.times):
            gap_ms.append(1e3 * (after - before))
    return {
        "tokens_per_second": sum(job.length for job in jobs) / seconds,
        "first_token_ms": statistics.median(first_token_ms),
        "first_token_ms_95": percentile_95(first_token_ms),
        "gap_ms": statistics.median(gap_ms),
        "gap_ms_95": percentile_95(gap_ms),
        "memory_mb": resident_mb(pid),
    }


def count_flops(model: Phase15ForCausalLM, jobs: list[Job], chunk_length: int | None = None) -> float:
    """
    Counts the floating-point operations that the LLM's layers, its head and the HyperNetwork need for a workload: each
    query is read once, each chunk is stepped over, its slots and its tokens pass through the LLM once.
    """
    config = model.config
    embed = model.get_input_embeddings()
    chunk_length = chunk_length or config.chunk_length
    soft_prompt = model.empty_soft_prompt(1)
    soft_prompt = soft_prompt._replace(length=torch.full_like(soft_prompt.length, config.num_soft_tokens))  # all used

    def measure_flops(function: Callable, *args, **kwargs) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*args, **kwargs)
        return counter.get_total_flops()

    def measure_step(length: int) -> float:
        tokens = embed(torch.zeros(1, length, dtype=torch.long, device=model.device))
        return measure_flops(model.step, soft_prompt, tokens, torch.full((1,), length, device=model.device))

    position_flops = measure_flops(model.llm.base_model, inputs_embeds=soft_prompt.embeds[:, :1])
    head_flops = measure_flops(model.get_output_embeddings(), soft_prompt.embeds[:, 0])
    chunk_flops = measure_step(chunk_length)
    segment_flops = {}  # by length
    total = 0.0
    for job in jobs:
        prompt_length = len(job.prompt)
        for start in range(0, prompt_length, config.max_query_length):
            length = min(config.max_query_length, prompt_length - start)
            if length not in segment_flops:
                segment_flops[length] = measure_step(length)
            total += segment_flops[length]
        num_chunks = math.ceil(job.length / chunk_length)
        # The LLM reads the slots in use before each chunk, and all tokens of a chunk except the last.
        num_positions = job.length - num_chunks
        for chunk in range(num_chunks):
            num_positions += min(config.num_soft_tokens, prompt_length + chunk * chunk_length)
        total += (num_chunks - 1) * chunk_flops + job.length * head_flops + num_positions * position_flops
    return total


@torch.no_grad()
def time_order(model: Phase15ForCausalLM, base: torch.nn.Module, rows: int) -> dict:
    """
    Times how long `rows` answers take to grow by a token each.

    Returns:
        `dict`: milliseconds of the lanes, and of the base with caches of several lengths, and the length from which on
        the lanes are faster, by a straight line through the base's times (`None` if that does not rise).
    """
    config = model.config
    processor = Phase15ContinuousBatchProcessor(model, rows)
    for job in workload(rows, config.text_config.vocab_size):
        request = processor.request(job.prompt[:64], max_new_tokens=10**6, do_sample=False, pad_token_id=0)
        processor.submit(request)
    for _ in range(3 + config.num_soft_tokens // config.chunk_length):  # until all slots are in use
        processor.advance()
    lanes_seconds = statistics.median(timed(processor.advance) for _ in range(3)) / config.chunk_length
    base_seconds = {}  # by length of the cache
    for length in CACHE_LENGTHS:
        cache = random_cache(base, rows, length)
        ids = torch.zeros(rows, 1, dtype=torch.long, device=base.device)
        step = functools.partial(base, ids, position_ids=ids + length, **{CACHE_NAME: cache})
        base_seconds[length] = statistics.median(timed(step) for _ in range(7))
    slope, intercept = statistics.linear_regression(list(base_seconds), list(base_seconds.values()))
    lanes_are_faster_from = None
    if slope > 0:
        lanes_are_faster_from = max((lanes_seconds - intercept) / slope, 0)
    row = {"lanes_ms": 1e3 * lanes_seconds}
    for length, seconds in base_seconds.items():
        row[f"base_ms_behind_{length}"] = 1e3 * seconds
    row["lanes_are_faster_from_length"] = lanes_are_faster_from
    return row


def random_cache(base: torch.nn.Module, rows: int, length: int) -> DynamicCache:
    """Returns a cache of the base with random keys and values of `length` tokens."""
    config = base.config
    shape = (rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        states = torch.randn(shape, device=base.device, dtype=base.dtype)
        cache.update(states, states.clone(), layer)
    return cache


def measure_generate(model: Phase15ForCausalLM, jobs: list[Job]) -> dict:
    """Measures `generate` in this process, with a streamer, for one request after the other."""
    options = {"do_sample": False, "pad_token_id": 0}
    model.generate(torch.tensor([jobs[0].prompt], device=model.device), max_new_tokens=20)  # not counted
    start = time.perf_counter()
    for job in jobs:
        ids = torch.tensor([job.prompt], device=model.device)
        mask = torch.ones_like(ids)
        streamer = TokenTimes()
        job.sent = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=job.length, streamer=streamer, **options)
        job.times = tuple(streamer.times[1:])  # without the prompt's
    return summary(jobs, time.perf_counter() - start, os.getpid())


def save_with(checkout: str, site: str, folder: str, args: argparse.Namespace, dtype: str):
    """Saves a model of the same shape with the code of an earlier checkout."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([checkout, site])}
    make_arguments = json.dumps([*SHAPES[args.shape], folder, dtype])
    command = [sys.executable, "-c", MAKE, make_arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True)
    if done.returncode:
        raise ValueError(f"{checkout} makes no model: {done.stderr.decode()[-300:]}")


def measure_server(args: argparse.Namespace, name: str, pid: int, port: int, min_seconds: Callable | None) -> dict:
    """
    Returns the rows of one server: for each number of clients, of a conversation, and of many requests.

    Args:
        name (`str`): name of the model in requests.
        pid (`int`): process of the server.
        port (`int`): its port.
        min_seconds (`Callable`, *optional*): returns the seconds of jobs at the compute limit.
    """
    vocab_size = SHAPES[args.shape][0]["vocab_size"]
    rows = {}
    asyncio.run(run_clients(port, name, workload(1, vocab_size, seed=99), 1))  # not counted
    for number in args.clients:
        jobs = workload(number * args.requests, vocab_size, seed=number)
        seconds = asyncio.run(run_clients(port, name, jobs, number))
        row = summary(jobs, seconds, pid)
        if min_seconds is not None:
            row["share_of_compute_limit"] = min_seconds(jobs) / seconds
        rows[f"{number}_clients"] = row
    if args.turns > 1:
        runs = [asyncio.run(conversation(port, name, args.turns, vocab_size, seed)) for seed in range(3)]
        first_ms = 1e3 * statistics.median(seconds[0] for seconds in runs)
        last_ms = 1e3 * statistics.median(seconds[-1] for seconds in runs)
        rows["conversation"] = {
            "first_turn_ms": first_ms,
            f"turn_{args.turns}_ms": last_ms,
            "ratio": last_ms / first_ms,
        }
    if args.soak:
        jobs = [Job(job.prompt[:64], 16) for job in workload(args.soak, vocab_size, seed=7)]
        quarter = args.soak // 4
        asyncio.run(run_clients(port, name, jobs[:quarter], max(args.clients)))
        mb_after_a_quarter = resident_mb(pid)
        asyncio.run(run_clients(port, name, jobs[quarter:], max(args.clients)))
        rows["many_requests"] = {
            "requests": args.soak,
            "mb_after_a_quarter": mb_after_a_quarter,
            "mb_after_all": resident_mb(pid),
        }
    return rows


@dataclass
class ServerCommand:
    """
    How to run a server.

    Args:
        model_dir (`str`): folder of its model.
        command (`list[str]`): arguments of Python, without the port.
        chunk_length (`int`, *optional*): tokens per chunk, if not the model's own.
        is_ours (`bool`): has a compute limit, which is that of our model.
        cwd (`Path`): folder in which it runs.
        site (`str`, *optional*): folder of packages for it.
    """

    model_dir: str
    command: list[str]
    chunk_length: int | None = None
    is_ours: bool = True
    cwd: Path = ROOT
    site: str | None = None


def server_commands(args: argparse.Namespace, folder: str, base_folder: str) -> dict[str, ServerCommand]:
    """Returns the servers of this checkout and of transformers, by name."""
    device_flags = ["--device", str(args.device)]
    lane_flags = ["--num_lanes", str(max(args.clients)), "--max_prompt_tokens", str(10**6)]
    ours = ["-m", "scripts.serve", "--model_dir", folder, *lane_flags, *device_flags]
    transformers_serve = ["-m", "transformers.cli.transformers", "serve", base_folder, *device_flags]
    servers = {"server": ServerCommand(folder, ours)}
    if "base_server" in args.rivals:
        servers["base_server"] = ServerCommand(base_folder, transformers_serve, is_ours=False)
    if "base_server_batching" in args.rivals:
        command = [*transformers_serve, "--continuous-batching"]
        servers["base_server_batching"] = ServerCommand(base_folder, command, is_ours=False)
    for length in args.chunk_lengths:
        command = [*ours, "--chunk_length", str(length)]
        servers[f"server_k{length}"] = ServerCommand(folder, command, chunk_length=length)
    return servers


def serve(args: argparse.Namespace) -> dict:
    """Sends the same requests to each server, then conversations, then many requests to measure the memory."""
    model, base = make_models(args)
    model.generation_config.pad_token_id = 0
    base.generation_config.pad_token_id = 0
    limits = ceilings(args.device, args.dtype)
    vocab_size = model.config.text_config.vocab_size
    dtype = str(args.dtype).removeprefix("torch.")
    rows = {"generate": {"1_clients": measure_generate(model, workload(args.requests, vocab_size, seed=1))}}
    failures = {}

    def min_seconds(jobs: list[Job], chunk_length: int | None) -> float:
        return count_flops(model, jobs, chunk_length) / limits["flop_per_second"]

    with TemporaryDirectory() as work:
        model_folder = f"{work}/phase15"
        base_folder = f"{work}/base"
        model.save_pretrained(model_folder)
        base.save_pretrained(base_folder)
        servers = server_commands(args, model_folder, base_folder)
        if args.before:
            checkout, site = args.before
            before_folder = f"{work}/before"
            save_with(checkout, site, before_folder, args, dtype)
            command = ["serve.py", "--model_dir", before_folder, "--device", str(args.device)]
            servers["server_before"] = ServerCommand(before_folder, command, cwd=Path(checkout), site=site)
        for name, server in servers.items():
            save_tokenizer(server.model_dir, vocab_size)
            limit = functools.partial(min_seconds, chunk_length=server.chunk_length) if server.is_ours else None
            try:
                port = free_port()
                command = [sys.executable, *server.command, "--port", str(port)]
                with running(command, port, server.cwd, server.site) as process:
                    rows[name] = measure_server(args, server.model_dir, process.pid, port, limit)
            except (ValueError, OSError, IndexError, asyncio.IncompleteReadError) as error:
                message = f"{type(error).__name__}: {error}"
                failures[name] = " ".join(message.split())[:300]
    if "server" not in rows:
        raise ValueError(f"scripts.serve gave no answer: {failures['server']}")
    results = by_kind(rows)
    one_client = rows["server"][f"{min(args.clients)}_clients"]
    for kind, table in results.items():
        if kind.endswith("_clients"):
            for row in table.values():
                row["ratio_to_one_client"] = row["tokens_per_second"] / one_client["tokens_per_second"]
    results["order"] = {f"{number}_rows": time_order(model, base, number) for number in args.clients}
    return {"ceilings": limits, "results": results, "not_measured": failures}


def by_kind(rows: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Returns rows by kind and server, from rows by server and kind."""
    results = {}
    for name, row_by_kind in rows.items():
        for kind, row in row_by_kind.items():
            results.setdefault(kind, {})[name] = row
    return results


__all__ = ["serve"]
