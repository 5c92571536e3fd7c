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

from phase15.commands.benchmarks.harness import LABELS, commit, device_name, in_turn, make_models, synchronize
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.compat_phase15 import CACHE_NAME
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def state_bytes(cache) -> int:
    """Bytes that a cache carries from token to token."""
    if isinstance(cache, Phase15Cache):
        own = (*cache.soft_prompt, cache.chunk)
        return sum(tensor.nbytes for tensor in own) + state_bytes(cache.llm_cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def decoder_bytes(model: Phase15ForCausalLM) -> int:
    """Bytes of all buffers of the compiled path."""
    decoders = model.decoders.static.values()
    tensors = (
        (*d.soft_prompt, d.chunk, d.finished, d.column, *d.slot_cache.keys, *d.slot_cache.values) for d in decoders
    )
    return sum(tensor.nbytes for buffers in tensors for tensor in buffers)


class Clock(BaseStreamer):
    """A streamer that records the time of every token, and the size of the state at some lengths."""

    def __init__(self, state: Callable[[], int] | None, lengths: list[int]):
        self.state, self.lengths = state, lengths
        self.times, self.states, self.allocated = [], {}, {}

    def put(self, value):
        synchronize()
        self.times.append(time.perf_counter())  # of the prompt, then of each token
        if (length := len(self.times) - 1) in self.lengths:
            self.states[length] = self.state()
            if torch.cuda.is_available():
                self.allocated[length] = torch.cuda.memory_allocated()

    def end(self):
        pass


def long(args: argparse.Namespace) -> dict:
    """Times one long answer of each variant. It waits for every token, so a token costs more than in `decode`."""
    can_draw = importlib.util.find_spec("matplotlib") is not None
    model, base = make_models(args)
    lengths = [256 * 2**power for power in range(32) if 256 * 2**power <= args.new_tokens]
    if not lengths:
        raise ValueError("`long` needs --new_tokens of at least 256.")
    window = 128  # a figure is the mean of so many tokens: whole chunks
    prompt = torch.randint(5, model.config.text_config.vocab_size, (1, args.prompt_length), device=args.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    variants = {
        "base": (base, DynamicCache, {}),
        "phase15": (model, Phase15Cache, {"compile": False}),
        **({"phase15_compiled": (model, Phase15Cache, {"compile": True})} if args.compile else {}),
    }
    rows, curves, ends = {}, {}, {}
    for candidate, _, kwargs in variants.values():  # not counted
        candidate.generate(prompt, max_new_tokens=2 * window, **options, **kwargs)
    clocks = {name: [] for name in variants}
    for index in range(args.rounds):
        for name in in_turn(variants, index):
            candidate, cache_class, kwargs = variants[name]
            cache = cache_class(config=candidate.config)
            state = partial(decoder_bytes, model) if name == "phase15_compiled" else partial(state_bytes, cache)
            clock = Clock(state, lengths)
            started = time.perf_counter()
            candidate.generate(
                prompt, max_new_tokens=lengths[-1], streamer=clock, **{CACHE_NAME: cache}, **options, **kwargs
            )
            clock.times[0] = started
            clocks[name].append(clock)
    for name, runs in clocks.items():
        ends[name] = [
            statistics.median(run.times[n] - run.times[0] for run in runs) for n in range(1, lengths[-1] + 1)
        ]
        curves[name] = [
            statistics.median((run.times[n] - run.times[n - window]) / window for run in runs)
            for n in range(window, lengths[-1] + 1, window)
        ]
        rows[name] = {
            str(length): {
                "ms_per_token": 1e3 * curves[name][length // window - 1],
                "state_mb": runs[-1].states[length] / 2**20,
                "allocated_mb": runs[-1].allocated[length] / 2**20 if runs[-1].allocated else None,
            }
            for length in lengths
        }
        first, last = rows[name][str(lengths[0])], rows[name][str(lengths[-1])]
        rows[name]["growth"] = {
            key: last[key] / first[key] for key in ("ms_per_token", "state_mb", "allocated_mb") if first[key]
        }
    for name in variants.keys() - {"base"}:
        pairs = enumerate(zip(ends[name], ends["base"], strict=True), start=1)
        behind = [length for length, (ours, bases) in pairs if ours > bases]
        ahead = max(behind, default=0) + 1  # from here on the whole answer took less time than the base's
        rows[name]["faster_than_base_from_token"] = ahead if ahead <= len(ends[name]) else None
    picture = str(draw(curves, window, args)) if can_draw else "none, without matplotlib"
    return {"lengths": lengths, "window": window, "results": rows, "picture": picture}


def draw(curves: dict[str, list[float]], window: int, args: argparse.Namespace) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(
            [window * (i + 1) for i in range(len(values))], [1e3 * value for value in values], label=LABELS[name]
        )
    axes.set(xlabel="tokens generated", ylabel=f"ms per token, mean of {window}", ylim=(0, None))
    axes.set_title(f"{args.shape}, {device_name(args.device)}, {commit()}", fontsize=9)
    axes.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=120)
    return args.picture


__all__ = ["long"]
