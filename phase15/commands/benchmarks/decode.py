# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Decoding: ms per token of whole calls of `generate`, beside the base's, with chunks of several lengths."""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, CompileConfig, TorchAoConfig

from phase15.commands.benchmarks.harness import (
    ceilings,
    compiled_decoders,
    hypernet_parameters,
    make_models,
    peak_memory,
    read_parameters,
    rounds,
)
from phase15.model.modeling_phase15 import Phase15ForCausalLM


CALLS = 10  # of a step, timed together: one call is too short


def decode(args: argparse.Namespace) -> dict:
    """Times whole calls of `generate`, prompt included, and with `--compile` each step of a chunk separately."""
    model, base = make_models(args)
    quantised = quantise(model, base) if args.int8 else {}
    limits = ceilings(args.device, args.dtype)
    results = {}
    for batch_size in args.batch_sizes:
        rows = decode_batch(args, model, base, quantised, limits, batch_size)
        results[f"batch_{batch_size}"] = rows
        if args.compile:
            results[f"steps_of_batch_{batch_size}"] = time_steps(args, model, rows, batch_size)
    return {"ceilings": limits, "results": results}


def quantise(model: Phase15ForCausalLM, base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Returns both models with int8 weights, loaded as a user loads them."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = {}
    for name, candidate in (("base_int8", base), ("phase15_int8", model)):
        model_class = type(model) if candidate is model else AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            candidate.save_pretrained(folder)
            loaded = model_class.from_pretrained(folder, quantization_config=config, device_map=model.device)
        quantised[name] = loaded.eval()
    return quantised


def compile_everywhere() -> CompileConfig:
    """Returns a configuration with which transformers compiles on a CPU, too. By default it compiles only on GPUs."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def variant_name(chunk_length: int, model: Phase15ForCausalLM, is_compiled: bool = False) -> str:
    """Returns the key of a row of the results. It leaves out the model's own chunk length."""
    name = "phase15"
    if chunk_length != model.config.chunk_length:
        name += f"_k{chunk_length}"
    if is_compiled:
        name += "_compiled"
    return name


def decode_batch(
    args: argparse.Namespace,
    model: Phase15ForCausalLM,
    base: torch.nn.Module,
    quantised: dict[str, torch.nn.Module],
    limits: dict[str, float],
    batch_size: int,
) -> dict[str, dict]:
    """Returns the results of one batch size, by variant."""
    config = model.config
    prompt = torch.randint(5, config.text_config.vocab_size, (batch_size, args.prompt_length), device=args.device)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": args.sample,
        "pad_token_id": 0,
    }
    chunk_lengths = list(dict.fromkeys([config.chunk_length, *args.chunk_lengths]))  # each once, in order
    variants: dict[str, Callable] = {"base": partial(base.generate, prompt, **options)}
    chunk_length_by_variant = {}  # without those of the base
    for length in chunk_lengths:
        name = variant_name(length, model)
        chunk_length_by_variant[name] = length
        variants[name] = partial(model.generate, prompt, compile=False, chunk_length=length, **options)
    if args.compile:
        static = {"cache_implementation": "static", "compile_config": compile_everywhere()}
        variants["base_compiled"] = partial(base.generate, prompt, **static, **options)
        for length in chunk_lengths:
            name = variant_name(length, model, is_compiled=True)
            chunk_length_by_variant[name] = length
            variants[name] = partial(model.generate, prompt, compile=True, chunk_length=length, **options)
    for name, candidate in quantised.items():
        variants[name] = partial(candidate.generate, prompt, **options)
        if name.startswith("phase15"):
            chunk_length_by_variant[name] = config.chunk_length
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    number_size = torch.finfo(args.dtype).bits // 8
    rows = {}
    for name, seconds in medians.items():
        seconds_per_token = seconds / args.new_tokens
        chunk_length = chunk_length_by_variant.get(name)
        numbers_read, state_size = count_numbers(args, model, base, batch_size, chunk_length)
        bandwidth = number_size * numbers_read / seconds_per_token
        if name in quantised:
            bandwidth = None  # the sizes above are not those of int8 weights
        row = {
            "ms_per_token": 1e3 * seconds_per_token,
            "tokens_per_second": batch_size / seconds_per_token,
            "ratio_to_base": seconds / medians["base"],
        }
        if args.compile:
            row["ratio_to_compiled_base"] = seconds / medians["base_compiled"]
        row["state_mb"] = number_size * state_size / 2**20
        row["peak_mb"] = None if peaks[name] is None else peaks[name] / 2**20
        row["gb_per_second"] = None if bandwidth is None else bandwidth / 1e9
        row["share_of_copy"] = None if bandwidth is None else bandwidth / limits["bytes_per_second"]
        rows[name] = row
    if args.compile and not args.sample:
        for length in chunk_lengths:
            compiled_name = variant_name(length, model, is_compiled=True)
            is_equal = variants[compiled_name]() == variants[variant_name(length, model)]()
            share = is_equal[:, args.prompt_length :].float().mean().item()
            rows[compiled_name]["share_of_tokens_equal_to_phase15"] = share
            # In bfloat16 two tokens may have equal scores, and another kernel may prefer the other one.
            if args.dtype == torch.float32 and not is_equal.all():
                raise ValueError(f"the compiled path gives other tokens than the library's loop: {rows}")
    return rows


def count_numbers(
    args: argparse.Namespace,
    model: Phase15ForCausalLM,
    base: torch.nn.Module,
    batch_size: int,
    chunk_length: int | None,
) -> tuple[float, float]:
    """
    Counts what one token costs at least in memory traffic: all weights once for the batch, and the keys and values of
    every row, half full in the mean.

    Args:
        chunk_length (`int`, *optional*): tokens per chunk; `None` for the base.

    Returns:
        `tuple[float, float]`: the numbers that a token of the whole batch reads, and those that stay between tokens.
    """
    config = model.config
    text_config = config.text_config
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    # keys and values of one position, in all layers
    position = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim
    weights = read_parameters(base)
    if chunk_length is None:
        mean_length = args.prompt_length + args.new_tokens / 2
        last_length = args.prompt_length + args.new_tokens - 1  # the last token is not read
        return weights + batch_size * mean_length * position, batch_size * last_length * position
    num_slots = config.num_soft_tokens
    weights += hypernet_parameters(model) / chunk_length  # read once a chunk
    state = (num_slots + chunk_length) * position + num_slots * text_config.hidden_size
    return weights + batch_size * (num_slots + chunk_length / 2) * position, batch_size * state


def time_steps(args: argparse.Namespace, model: Phase15ForCausalLM, rows: dict, batch_size: int) -> dict[str, dict]:
    """Returns the time of each step of the compiled path, per token, by chunk length."""
    decoders = {}  # by chunk length
    for decoder in compiled_decoders(model):
        if len(decoder.chunk) == batch_size:
            decoders[decoder.chunk.shape[1]] = decoder
    variants = {}
    for length, decoder in sorted(decoders.items()):
        for name in ("prefill", "step", "decode"):
            variants[length, name] = partial(run_step, model, decoder, name)
    with torch.no_grad():
        times_by_step = rounds(variants, args.rounds)
    milliseconds = {key: 1e3 * statistics.median(times) / CALLS for key, times in times_by_step.items()}
    table = {}
    for length in sorted(decoders):
        row = {
            "slots_prefill": milliseconds[length, "prefill"] / length,
            "hypernetwork": milliseconds[length, "step"] / length,
            # the prefill gives the first token of a chunk
            "token_steps": milliseconds[length, "decode"] * (length - 1) / length,
        }
        row["sum"] = sum(row.values())
        row["measured"] = rows[variant_name(length, model, is_compiled=True)]["ms_per_token"]
        table[f"K = {length}, ms per token"] = row
    if "base_compiled" in rows:
        table["base, static cache, compiled"] = {"measured": rows["base_compiled"]["ms_per_token"]}
    return table


def run_step(model: Phase15ForCausalLM, decoder, name: str):
    """Runs a step `CALLS` times, with a full soft prompt and a half-full chunk."""
    for _ in range(CALLS):
        decoder.column.fill_(decoder.num_slots + decoder.chunk.shape[1] // 2 - 1)  # a step moves it
        decoder.run(name, model)


__all__ = ["decode"]
