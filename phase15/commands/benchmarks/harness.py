# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Shared by the benchmarks: interleaved timing, memory, ceilings, models of random weights, tables."""

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
SHAPES = {
    "tinyllama": (TINYLLAMA, {}),
    "smollm2": (SMOLLM2, {}),
    "tiny": (TINY, {"hypernet_hidden_size": 64, "hypernet_intermediate_size": 256, "hypernet_num_attention_heads": 4}),
}
# How tables and curves name the variants, whose names are the keys of the JSON.
LABELS = {
    "base": "base",
    "base_compiled": "base, static cache, compiled",
    "base_full_context": "base, full context",
    "base_int8": "base, int8 weights",
    "base_server": "transformers serve, the base",
    "base_server_batching": "the same, continuous batching",
    "generate": "generate, with a streamer",
    "phase15": "phase15",
    "phase15_chunk_by_chunk": "phase15, chunk by chunk",
    "phase15_compiled": "phase15, compiled",
    "phase15_int8": "phase15, int8 weights",
    "server": "scripts.serve",
    "server_before": "serve.py of the earlier checkout",
}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable) -> float:
    """Seconds of one call, without garbage collection, as `timeit` measures."""
    gc.collect()
    gc.disable()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def rounds(variants: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every counted call of each variant. They take turns, after one call each that does not count."""
    for function in variants.values():
        function()
    seconds = {name: [] for name in variants}
    for index in range(repeats):
        for name in in_turn(variants, index):
            seconds[name].append(timed(variants[name]))
    return seconds


def in_turn(variants: dict, index: int) -> list[str]:
    """The names of the variants, backwards in every other round: none always follows the same one."""
    return list(variants)[:: -1 if index % 2 else 1]


def peak_memory(function: Callable) -> int | None:
    """Most bytes that a call adds to the GPU's allocated memory; not measured on a CPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s read and written by a large copy, FLOP/s of a large matrix product."""
    is_cuda = device.type == "cuda"
    source = torch.empty(2**30 if is_cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if is_cuda else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = statistics.median(rounds({"copy": lambda: target.copy_(source)}, 5)["copy"])
    product = statistics.median(rounds({"product": lambda: left @ right}, 5)["product"])
    return {"bytes_per_second": 2 * source.numel() / copy, "flop_per_second": 2 * size**3 / product}


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git repository"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def make_models(args: argparse.Namespace) -> tuple[Phase15ForCausalLM, torch.nn.Module]:
    """A Phase15 model whose Δ is not zero, and the base inside it."""
    text_config, config = SHAPES[args.shape]
    torch.manual_seed(0)
    text_config = LlamaConfig(**text_config, bos_token_id=1, eos_token_id=None)
    with torch.device(args.device):
        model = Phase15ForCausalLM(Phase15Config(text_config=text_config, **config)).to(args.dtype).eval()
        torch.nn.init.normal_(model.hypernet.alpha)
    return model, model.llm


def read_parameters(module: torch.nn.Module) -> int:
    """Parameters that a pass reads: all but the input embeddings, of which it reads single rows."""
    table = module.get_input_embeddings().weight
    tied = module.get_output_embeddings().weight is table
    return sum(parameter.numel() for parameter in module.parameters()) - (0 if tied else table.numel())


def hypernet_parameters(model: Phase15ForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.hypernet.parameters())


@contextmanager
def quiet():
    """Silences the library's advice about single calls, and its progress bars."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


def table(rows: dict[str, dict]) -> str:
    """A Markdown table: a row for each variant, or for each length."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| |" + "|".join(f" {column.replace('_', ' ')} " for column in columns) + "|"]
    lines.append("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        lines.append(f"| {label(name)} |" + "|".join(f" {shown(row.get(column))} " for column in columns) + "|")
    return "\n".join(lines)


def label(name: str) -> str:
    """How tables name a variant."""
    if found := re.fullmatch(r"(phase15|server)_k(\d+)(_compiled)?", name):
        return f"{LABELS[found[1]]}, K = {found[2]}" + (", compiled" if found[3] else "")
    return LABELS.get(name, name)


def shown(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "not measured" if value is None else str(value)


def device(name: str) -> torch.device:
    """A device of this machine."""
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
