# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Shared by the benchmarks: alternating timing, memory, ceilings, models of random weights, tables."""

import argparse
import gc
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from phase15.model.configuration_phase15 import TINYLLAMA, Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
# The arguments of the base's config, and of the Phase15 model's.
SHAPES = {
    "tinyllama": (TINYLLAMA, {}),
    "smollm2": (SMOLLM2, {}),
    "tiny": (TINY, {"hypernet_hidden_size": 64, "hypernet_intermediate_size": 256, "hypernet_num_attention_heads": 4}),
}
# Names of the variants in tables and curves. The keys are those of the JSON.
LABELS = {
    "base": "base",
    "base_compiled": "base, static cache, compiled",
    "base_full_context": "base, full context",
    "base_int8": "base, int8 weights",
    "base_reads_again": "base, no cache kept",
    "base_server": "transformers serve, the base",
    "base_server_batching": "the same, continuous batching",
    "generate": "generate, with a streamer",
    "phase15": "phase15",
    "phase15_chunk_by_chunk": "phase15, chunk by chunk",
    "phase15_compiled": "phase15, compiled",
    "phase15_int8": "phase15, int8 weights",
    "phase15_small": "phase15, the facts recipe's HyperNetwork",
    "phase15_small_reads_layers": "the same, reads 2 layers",
    "server": "scripts.serve",
    "server_before": "serve.py of the earlier checkout",
}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the seconds of one call by a clock, without garbage collection, as `timeit` does."""
    gc.collect()
    gc.disable()
    synchronize()
    start = clock()
    function()
    synchronize()
    elapsed = clock() - start
    gc.enable()
    return elapsed


def rounds(variants: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """
    Times calls of several variants. They take turns, so that a change of the machine's speed does not favour one. One
    call of each before is not counted: it compiles, and fills caches.

    Returns:
        `dict[str, list[float]]`: seconds of each counted call, by variant.
    """
    for function in variants.values():
        function()
    seconds = {name: [] for name in variants}
    for index in range(repeats):
        for name in in_turn(variants, index):
            seconds[name].append(timed(variants[name]))
    return seconds


def in_turn(variants: dict, index: int) -> list[str]:
    """Returns the names of the variants, reversed in odd rounds, so that none always follows the same one."""
    names = list(variants)
    return names if index % 2 == 0 else names[::-1]


def peak_memory(function: Callable) -> int | None:
    """Returns the maximum of the bytes that a call adds to the GPU's allocated memory, or `None` on a CPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures the bytes/s that a large copy reads and writes, and the FLOP/s of a large matrix product."""
    if device.type == "cuda":
        num_bytes = 2**30
        size = 8192
    else:
        num_bytes = 2**27
        size = 1536
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    copy = statistics.median(rounds({"copy": lambda: target.copy_(source)}, 5)["copy"])
    product = statistics.median(rounds({"product": lambda: left @ right}, 5)["product"])
    return {"bytes_per_second": 2 * num_bytes / copy, "flop_per_second": 2 * size**3 / product}


def commit() -> str:
    """Returns the commit of the checkout that this file lies in, with "-dirty" after it if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git repository"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def make_models(args: argparse.Namespace) -> tuple[Phase15ForCausalLM, torch.nn.Module]:
    """Returns a Phase15 model of random weights whose Δ is not zero, and the base inside it."""
    text_arguments, arguments = SHAPES[args.shape]
    torch.manual_seed(0)
    text_config = LlamaConfig(**text_arguments, bos_token_id=1, eos_token_id=None)  # no answer ends early
    config = Phase15Config(text_config=text_config, **arguments)
    with torch.device(args.device):
        model = Phase15ForCausalLM(config).to(args.dtype).eval()
        torch.nn.init.normal_(model.hypernet.alpha)
    return model, model.llm


def read_parameters(module: torch.nn.Module) -> int:
    """Counts the parameters that a forward pass reads: all except input embeddings, of which it reads single rows."""
    number = sum(parameter.numel() for parameter in module.parameters())
    embeddings = module.get_input_embeddings().weight
    if module.get_output_embeddings().weight is not embeddings:
        number -= embeddings.numel()
    return number


def hypernet_parameters(model: Phase15ForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.hypernet.parameters())


def compiled_decoders(model: Phase15ForCausalLM) -> list:
    """Returns the decoders, with their buffers, that `generate(compile=True)` has made for a model."""
    return list(model.decoders.static.values())


@contextmanager
def quiet():
    """Silences transformers' advice about single calls, and its progress bars."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


def table(rows: dict[str, dict]) -> str:
    """Returns a Markdown table with a row for each variant, or for each length."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))  # each once, in order
    header = [column.replace("_", " ") for column in columns]
    lines = [f"| | {' | '.join(header)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [label(name), *(shown(row.get(column)) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label(name: str) -> str:
    """Returns the name of a variant in tables."""
    match = re.fullmatch(r"(phase15|server)_k(\d+)(_compiled)?", name)
    if match is None:
        return LABELS.get(name, name)
    variant, chunk_length, compiled = match.groups()
    text = f"{LABELS[variant]}, K = {chunk_length}"
    if compiled:
        text += ", compiled"
    return text


def shown(value) -> str:
    """Returns a value, or a range of values, as text, with three digits, or all of a large number."""
    if value is None:
        return "not measured"
    if isinstance(value, list):
        return " to ".join(shown(item) for item in value)
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def device(name: str) -> torch.device:
    """Returns a device of this machine, for argparse."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from error
    return torch.device(name)


__all__ = [
    "LABELS",
    "SHAPES",
    "ceilings",
    "commit",
    "compiled_decoders",
    "device",
    "device_name",
    "hypernet_parameters",
    "in_turn",
    "make_models",
    "peak_memory",
    "quiet",
    "read_parameters",
    "rounds",
    "shown",
    "synchronize",
    "table",
    "timed",
]
