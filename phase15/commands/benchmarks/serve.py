# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Serving: tokens per second, time to the first token and between tokens, memory, and the share of the compute limit, of
scripts/serve.py beside the base under `transformers serve`, an earlier checkout's server, and `generate`.
"""

import argparse
import asyncio
import functools
import json
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
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from phase15.commands.benchmarks.harness import SHAPES, ceilings, make_models, timed
from phase15.model.compat_phase15 import CACHE_NAME


ROOT = Path(__file__).parents[3]
PROMPTS, ANSWERS = (64, 512), (16, 256)  # tokens
LENGTHS = 512, 2048, 8192  # of the base's cache
MESSAGE, REPLY = 128, 32  # tokens of a turn of the conversation
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
# What makes a model of a shape and saves it: with the code of a checkout, whose folders later code may not read.
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
    """A request of the workload, and when its tokens came."""

    prompt: list[int]
    length: int
    sent: float = 0.0
    times: tuple[float, ...] = ()


class TokenTimes(BaseStreamer):
    """A streamer that records the time of the prompt, then of each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def workload(number: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """Prompts and answers of many lengths, the same for every server."""
    draw = random.Random(seed)
    lengths = [(draw.randint(*PROMPTS), draw.randint(*ANSWERS)) for _ in range(number)]
    return [Job([draw.randrange(3, vocab_size) for _ in range(prompt)], answer) for prompt, answer in lengths]


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def save_tokenizer(folder: str, vocab_size: int):
    """One word per token, so that texts have known lengths and every token shows."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace(replacement=" ", prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "w0"
    tokenizer.save_pretrained(folder)


async def ask(port: int, name: str, messages: list[dict], job: Job) -> str:
    """
    One streamed request; returns its text. Reads the events itself, since a client's library takes longer than a tiny
    model.
    """
    body = {"model": name, "messages": messages, "max_tokens": job.length, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    job.sent, times, text = time.perf_counter(), [], ""
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise ValueError(f"{name}: {status.decode().strip()} {(await reader.read(2000)).decode()}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices")
            if choices and (piece := choices[0]["delta"].get("content")):
                text += piece
                times.append(time.perf_counter())
    writer.close()
    job.times = tuple(times)
    return text


async def clients(port: int, name: str, jobs: list[Job], number: int) -> float:
    """So many clients, each with one request at a time; returns seconds."""
    waiting = iter(jobs)

    async def client():
        for job in waiting:
            await ask(port, name, [{"role": "user", "content": words(job.prompt)}], job)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(number)))
    return time.perf_counter() - start


async def conversation(port: int, name: str, turns: int, vocab_size: int, seed: int) -> list[float]:
    """Seconds to the first token of each turn."""
    draw, messages, seconds = random.Random(100 + seed), [], []
    for _ in range(turns):
        job = Job([], REPLY)
        messages.append({"role": "user", "content": words([draw.randrange(3, vocab_size) for _ in range(MESSAGE)])})
        messages.append({"role": "assistant", "content": await ask(port, name, messages, job)})
        seconds.append(job.times[0] - job.sent)
    return seconds


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, cwd: Path = ROOT, site: str | None = None) -> Iterator[subprocess.Popen]:
    """A server in a process of its own, from when it answers."""
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


def resident(pid: int) -> float | None:
    """MB of memory that a process has in use (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantiles(values: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    values = sorted(values)
    return statistics.median(values), values[min(int(0.95 * len(values)), len(values) - 1)]


def summary(jobs: list[Job], seconds: float, process) -> dict:
    """A row of the table."""
    first = quantiles([1e3 * (job.times[0] - job.sent) for job in jobs])
    gaps = quantiles([1e3 * (b - a) for job in jobs for a, b in zip(job.times, job.times[1:], strict=False)])
    return {
        "tokens_per_second": sum(job.length for job in jobs) / seconds,
        "first_token_ms": first[0],
        "first_token_ms_95": first[1],
        "gap_ms": gaps[0],
        "gap_ms_95": gaps[1],
        "memory_mb": resident(process.pid),
    }


def flops_of(model, jobs: list[Job], chunk_length: int | None = None) -> float:
    """
    Floating-point operations that N, K and the HyperNetwork demand for a workload: each query read once, each chunk
    stepped over, its slots and its tokens put through the LLM once.
    """
    config, embed = model.config, model.get_input_embeddings()
    chunk_length = chunk_length or config.chunk_length

    def counted(function, *args) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*args)
        return counter.get_total_flops()

    def step(length: int):
        tokens = embed(torch.zeros(1, length, dtype=torch.long, device=model.device))
        model.step(full, tokens, torch.full((1,), length, device=model.device))

    full = model.empty_soft_prompt(1)
    full = full._replace(length=torch.full_like(full.length, config.num_soft_tokens))
    one_token = functools.partial(model.llm.base_model, inputs_embeds=full.embeds[:, :1])
    body, segments = counted(one_token), {}
    head = counted(model.get_output_embeddings(), full.embeds[:, 0])
    chunk_step, total = counted(step, chunk_length), 0.0
    for job in jobs:
        for start in range(0, len(job.prompt), config.max_query_length):
            length = min(config.max_query_length, len(job.prompt) - start)
            if length not in segments:
                segments[length] = counted(step, length)
            total += segments[length]
        num_chunks = -(-job.length // chunk_length)
        slots = [min(config.num_soft_tokens, len(job.prompt) + c * chunk_length) for c in range(num_chunks)]
        total += (num_chunks - 1) * chunk_step + job.length * head + (sum(slots) + job.length - num_chunks) * body
    return total


@torch.no_grad()
def order(model, base, rows: int) -> dict:
    """
    Milliseconds in which `rows` answers each grow by a token: of the lanes, and of the base behind caches of several
    lengths; and from which length on the lanes are faster, by a straight line through the base's times.
    """
    manager = model.init_continuous_batching(max_batch_size=rows)
    for job in workload(rows, model.config.text_config.vocab_size):
        manager.processor.submit(
            manager.processor.request(job.prompt[:64], max_new_tokens=10**6, do_sample=False, pad_token_id=0)
        )
    for _ in range(3 + model.config.num_soft_tokens // model.config.chunk_length):  # until all slots are used
        manager.processor.advance()
    ours = statistics.median(timed(manager.processor.advance) for _ in range(3)) / model.config.chunk_length
    text, times = model.config.text_config, {}
    shape = (rows, text.num_key_value_heads, text.hidden_size // text.num_attention_heads)
    for length in LENGTHS:
        cache, ids = DynamicCache(config=text), torch.zeros(rows, 1, dtype=torch.long, device=base.device)
        for layer in range(text.num_hidden_layers):
            states = torch.randn(*shape[:2], length, shape[2], device=base.device, dtype=base.dtype)
            cache.update(states, states.clone(), layer)
        step = functools.partial(base, ids, position_ids=ids + length, **{CACHE_NAME: cache})
        times[length] = statistics.median(timed(step) for _ in range(7))
    slope, start = statistics.linear_regression(list(times), list(times.values()))
    lengths = {f"base_ms_behind_{length}": 1e3 * seconds for length, seconds in times.items()}
    turns = max((ours - start) / slope, 0) if slope > 0 else None
    return {"lanes_ms": 1e3 * ours, **lengths, "lanes_are_faster_from_length": turns}


def one_client(model, jobs: list[Job]) -> dict:
    """`generate` in this process, with a streamer."""
    model.generate(torch.tensor([jobs[0].prompt], device=model.device), max_new_tokens=20)  # not counted
    start = time.perf_counter()
    for job in jobs:
        streamer, ids = TokenTimes(), torch.tensor([job.prompt], device=model.device)
        job.sent = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.length,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        job.times = tuple(streamer.times[1:])
    return summary(jobs, time.perf_counter() - start, argparse.Namespace(pid=os.getpid()))


def save_with(checkout: str, site: str, folder: str, args: argparse.Namespace, dtype: str):
    """A model of the same shape, made by the code of an earlier checkout."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([checkout, site])}
    given = json.dumps([*SHAPES[args.shape], folder, dtype])
    done = subprocess.run([sys.executable, "-c", MAKE, given], cwd=checkout, env=environment, capture_output=True)
    if done.returncode:
        raise ValueError(f"{checkout} makes no model: {done.stderr.decode()[-300:]}")


def measure(args: argparse.Namespace, name: str, process, port: int, flops_limit: Callable | None) -> dict:
    """All rows of one server: by number of clients, of a conversation, and of many requests."""
    vocab_size, rows = SHAPES[args.shape][0]["vocab_size"], {}
    asyncio.run(clients(port, name, workload(1, vocab_size, seed=99), 1))  # not counted
    for number in args.clients:
        jobs = workload(number * args.requests, vocab_size, seed=number)
        seconds = asyncio.run(clients(port, name, jobs, number))
        rows[f"{number}_clients"] = summary(jobs, seconds, process)
        if flops_limit is not None:
            rows[f"{number}_clients"]["share_of_compute_limit"] = flops_limit(jobs) / seconds
    if args.turns > 1:
        talks = [asyncio.run(conversation(port, name, args.turns, vocab_size, seed)) for seed in range(3)]
        first, last = (1e3 * statistics.median(talk[turn] for talk in talks) for turn in (0, -1))
        rows["conversation"] = {"first_turn_ms": first, f"turn_{args.turns}_ms": last, "ratio": last / first}
    if args.soak:
        jobs = [Job(job.prompt[:64], 16) for job in workload(args.soak, vocab_size, seed=7)]
        before = asyncio.run(clients(port, name, jobs[: args.soak // 4], max(args.clients))) and resident(process.pid)
        asyncio.run(clients(port, name, jobs[args.soak // 4 :], max(args.clients)))
        rows["many_requests"] = {
            "requests": args.soak,
            "mb_after_a_quarter": before,
            "mb_after_all": resident(process.pid),
        }
    return rows


def serve(args: argparse.Namespace) -> dict:
    """The same requests to each server in turn, then a conversation, then many requests for the memory."""
    model, base = make_models(args)
    limits, vocab_size = ceilings(args.device, args.dtype), model.config.text_config.vocab_size
    dtype, flag = str(args.dtype).removeprefix("torch."), ["--device", str(args.device)]
    model.generation_config.pad_token_id = base.generation_config.pad_token_id = 0
    rows, failures = {"generate": {"1_clients": one_client(model, workload(args.requests, vocab_size, seed=1))}}, {}

    def limit(jobs: list[Job], chunk_length: int | None = None) -> float:
        return flops_of(model, jobs, chunk_length) / limits["flop_per_second"]

    with TemporaryDirectory() as folder:
        model.save_pretrained(ours := f"{folder}/phase15")
        base.save_pretrained(theirs := f"{folder}/base")
        lanes = ["--num_lanes", str(max(args.clients)), "--max_prompt_tokens", str(10**6)]
        of_base = ["-m", "transformers.cli.transformers", "serve", theirs, *flag]
        servers = {
            "server": (ours, ["-m", "scripts.serve", "--model_dir", ours, *lanes, *flag]),
            "base_server": (theirs, of_base),
            "base_server_batching": (theirs, [*of_base, "--continuous-batching"]),
        }
        servers = {name: server for name, server in servers.items() if name in ("server", *args.rivals)}
        lengths = {f"server_k{length}": length for length in args.chunk_lengths}
        for name, length in lengths.items():
            servers[name] = (ours, [*servers["server"][1], "--chunk_length", str(length)])
        checkout, site = args.before or (None, None)
        if checkout:
            save_with(checkout, site, before := f"{folder}/before", args, dtype)
            servers["server_before"] = (before, ["serve.py", "--model_dir", before, *flag])
        for name, (model_dir, command) in servers.items():
            save_tokenizer(model_dir, vocab_size)
            place = (Path(checkout), site) if name == "server_before" else (ROOT, None)
            try:
                port = free_port()
                with running([sys.executable, *command, "--port", str(port)], port, *place) as process:
                    of_chunks = functools.partial(limit, chunk_length=lengths.get(name))
                    is_ours = name.startswith("server")
                    rows[name] = measure(args, model_dir, process, port, of_chunks if is_ours else None)
            except (ValueError, OSError, IndexError, asyncio.IncompleteReadError) as error:
                failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "server" not in rows:
        raise ValueError(f"scripts.serve gave no answer: {failures['server']}")
    kinds = dict.fromkeys(kind for row in rows.values() for kind in row)
    results = {kind: {name: row[kind] for name, row in rows.items() if kind in row} for kind in kinds}
    for kind, table in results.items():
        if kind.endswith("_clients"):
            for row in table.values():
                rate, alone = row["tokens_per_second"], rows["server"][f"{min(args.clients)}_clients"]
                row["ratio_to_one_client"] = rate / alone["tokens_per_second"]
    results["order"] = {f"{rows}_rows": order(model, base, rows) for rows in args.clients}
    return {"ceilings": limits, "results": results, "not_measured": failures}


__all__ = ["serve"]
