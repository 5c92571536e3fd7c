# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Long answers: time per token and size of the state as an answer grows, as a table and a curve."""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from phase15.commands.benchmarks.harness import (
    LABELS,
    commit,
    compiled_decoders,
    device_name,
    in_turn,
    make_models,
    synchronize,
)
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.compat_phase15 import CACHE_NAME
from phase15.model.modeling_phase15 import Phase15ForCausalLM


WINDOW = 128  # tokens: a figure is the mean of this number of tokens, whole chunks


def state_bytes(cache) -> int:
    """Returns the bytes that a cache carries from token to token."""
    if isinstance(cache, Phase15Cache):
        own = (*cache.soft_prompt, cache.chunk)
        return sum(tensor.nbytes for tensor in own) + state_bytes(cache.llm_cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def decoder_bytes(model: Phase15ForCausalLM) -> int:
    """Returns the bytes of all buffers of the compiled path."""
    tensors = []
    for decoder in compiled_decoders(model):
        tensors += [*decoder.soft_prompt, decoder.chunk, decoder.finished, decoder.column]
        tensors += [*decoder.slot_cache.keys, *decoder.slot_cache.values]
    return sum(tensor.nbytes for tensor in tensors)


class Clock(BaseStreamer):
    """
    Streamer that records the time of every token, and the size of the state at some lengths.

    Args:
        state (`Callable`): returns the bytes of the state.
        lengths (`list[int]`): lengths of the answer at which to call it.
    """

    def __init__(self, state: Callable[[], int], lengths: list[int]):
        self.state = state
        self.lengths = lengths
        self.times = []  # of the prompt, then of each token
        self.states = {}  # bytes of the state, by length
        self.allocated = {}  # bytes of all tensors on the GPU, by length

    def put(self, value):
        synchronize()
        self.times.append(time.perf_counter())
        length = len(self.times) - 1
        if length in self.lengths:
            self.states[length] = self.state()
            if torch.cuda.is_available():
                self.allocated[length] = torch.cuda.memory_allocated()

    def end(self):
        pass


def long(args: argparse.Namespace) -> dict:
    """
    Times one long answer of each variant. The streamer waits for every token, so a token costs more than in `decode`.
    """
    lengths = []
    length = 256
    while length <= args.new_tokens:
        lengths.append(length)
        length *= 2
    if not lengths:
        raise ValueError("`long` needs --new_tokens of at least 256.")
    model, base = make_models(args)
    prompt = torch.randint(5, model.config.text_config.vocab_size, (1, args.prompt_length), device=args.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    variants = {
        "base": (base, DynamicCache, {}),
        "phase15": (model, Phase15Cache, {"compile": False}),
    }
    if args.compile:
        variants["phase15_compiled"] = (model, Phase15Cache, {"compile": True})
    for candidate, _, kwargs in variants.values():  # not counted
        candidate.generate(prompt, max_new_tokens=2 * WINDOW, **options, **kwargs)
    clocks = {name: [] for name in variants}
    for index in range(args.rounds):
        for name in in_turn(variants, index):
            candidate, cache_class, kwargs = variants[name]
            cache = cache_class(config=candidate.config)
            if name == "phase15_compiled":  # it keeps its state in buffers, and fills the cache at the end
                clock = Clock(partial(decoder_bytes, model), lengths)
            else:
                clock = Clock(partial(state_bytes, cache), lengths)
            kwargs = {CACHE_NAME: cache, "streamer": clock, **options, **kwargs}
            start = time.perf_counter()
            candidate.generate(prompt, max_new_tokens=lengths[-1], **kwargs)
            clock.times[0] = start  # the time to read the prompt counts, in the first token
            clocks[name].append(clock)
    results = {name: growth_table(runs, lengths) for name, runs in clocks.items()}
    base_times = total_times(clocks["base"])
    for name, runs in clocks.items():
        if name != "base":
            results[name]["faster_than_base_from_token"] = faster_from_token(total_times(runs), base_times)
    if importlib.util.find_spec("matplotlib") is None:
        picture = "none, without matplotlib"
    else:
        picture = str(draw({name: curve(runs) for name, runs in clocks.items()}, args))
    return {"lengths": lengths, "window": WINDOW, "results": results, "picture": picture}


def total_times(runs: list[Clock]) -> list[float]:
    """Returns the seconds to each token of the answer: the medians of the runs."""
    num_tokens = len(runs[0].times) - 1
    return [statistics.median(run.times[n] - run.times[0] for run in runs) for n in range(1, num_tokens + 1)]


def curve(runs: list[Clock]) -> list[float]:
    """Returns the seconds per token of each window of the answer: the medians of the runs."""
    num_tokens = len(runs[0].times) - 1
    medians = []
    for end in range(WINDOW, num_tokens + 1, WINDOW):
        medians.append(statistics.median((run.times[end] - run.times[end - WINDOW]) / WINDOW for run in runs))
    return medians


def growth_table(runs: list[Clock], lengths: list[int]) -> dict[str, dict]:
    """Returns time and memory at each length, and their growth from the first length to the last."""
    seconds_per_token = curve(runs)
    rows = {}
    for length in lengths:
        rows[str(length)] = {
            "ms_per_token": 1e3 * seconds_per_token[length // WINDOW - 1],
            "state_mb": runs[-1].states[length] / 2**20,
            "allocated_mb": runs[-1].allocated[length] / 2**20 if runs[-1].allocated else None,
        }
    first = rows[str(lengths[0])]
    last = rows[str(lengths[-1])]
    rows["growth"] = {key: last[key] / first[key] for key in first if first[key]}
    return rows


def faster_from_token(times: list[float], base_times: list[float]) -> int | None:
    """Returns the length from which on the whole answer took less time than the base's, or `None` if none is."""
    slower = [n for n, (ours, bases) in enumerate(zip(times, base_times, strict=True), start=1) if ours > bases]
    first = max(slower, default=0) + 1
    return first if first <= len(times) else None


def draw(curves: dict[str, list[float]], args: argparse.Namespace) -> Path:
    """Draws the time per token over the length of the answer. Returns the path of the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, seconds in curves.items():
        tokens = [WINDOW * (index + 1) for index in range(len(seconds))]
        axes.plot(tokens, [1e3 * value for value in seconds], label=LABELS[name])
    axes.set(xlabel="tokens generated", ylabel=f"ms per token, mean of {WINDOW}", ylim=(0, None))
    axes.set_title(f"{args.shape}, {device_name(args.device)}, {commit()}", fontsize=9)
    axes.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=120)
    return args.picture


__all__ = ["long", "state_bytes"]
