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
    hypernet_parameters,
    make_models,
    peak_memory,
    read_parameters,
    rounds,
)
from phase15.model.modeling_phase15 import Phase15ForCausalLM


CALLS = 10  # of a step, timed together


def decode(args: argparse.Namespace) -> dict:
    """Times whole calls of `generate`, prompt included, and with `--compile` each step of a chunk alone."""
    model, base = make_models(args)
    quantised = quantise(model, base) if args.int8 else {}
    limits, results = ceilings(args.device, args.dtype), {}
    for size in args.batch_sizes:
        results[f"batch_{size}"] = rows = decode_batch(args, model, base, quantised, limits, size)
        if args.compile:
            results[f"steps_of_batch_{size}"] = steps_of(args, model, rows, size)
    return {"ceilings": limits, "results": results}


def quantise(model, base) -> dict[str, torch.nn.Module]:
    """Both models with int8 weights, as a user loads them."""
    from torchao.quantization import Int8WeightOnlyConfig

    quantised = {}
    for name, candidate in (("base_int8", base), ("phase15_int8", model)):
        with tempfile.TemporaryDirectory() as folder:
            candidate.save_pretrained(folder)
            cls = type(model) if candidate is model else AutoModelForCausalLM
            config = TorchAoConfig(Int8WeightOnlyConfig())
            quantised[name] = cls.from_pretrained(folder, quantization_config=config, device_map=model.device).eval()
    return quantised


def compile_everywhere() -> CompileConfig:
    """A configuration with which the library compiles on a CPU, too. By default it compiles on GPUs alone."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def name_of(chunk_length: int, own: int, suffix: str = "") -> str:
    """The key of a row; the model's own length is not named."""
    return "phase15" + ("" if chunk_length == own else f"_k{chunk_length}") + suffix


def decode_batch(
    args: argparse.Namespace, model, base, quantised: dict, limits: dict[str, float], batch_size: int
) -> dict[str, dict]:
    config, text = model.config, model.config.text_config
    lengths = list(dict.fromkeys([config.chunk_length, *args.chunk_lengths]))
    prompt = torch.randint(5, text.vocab_size, (batch_size, args.prompt_length), device=args.device)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": args.sample,
        "pad_token_id": 0,
    }
    variants: dict[str, Callable] = {"base": partial(base.generate, prompt, **options)}
    chunk_of = {}  # by variant
    for compiled in (False, True) if args.compile else (False,):
        if compiled:
            static = {"cache_implementation": "static", "compile_config": compile_everywhere()}
            variants["base_compiled"] = partial(base.generate, prompt, **static, **options)
        for length in lengths:
            name = name_of(length, config.chunk_length, "_compiled" if compiled else "")
            chunk_of[name] = length
            variants[name] = partial(model.generate, prompt, compile=compiled, chunk_length=length, **options)
    for name, candidate in quantised.items():
        variants[name] = partial(candidate.generate, prompt, **options)
        chunk_of |= {name: config.chunk_length} if name.startswith("phase15") else {}
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    size = torch.finfo(args.dtype).bits // 8
    head_dim = text.hidden_size // text.num_attention_heads
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
    weights, num_slots = read_parameters(base), config.num_soft_tokens
    rows = {}
    for name, seconds in medians.items():
        step, chunk_length = seconds / args.new_tokens, chunk_of.get(name)
        # per step of the whole batch: weights once, keys and values of every row
        if chunk_length is None:
            context, longest = args.prompt_length + args.new_tokens / 2, args.prompt_length + args.new_tokens - 1
            read, state = weights + batch_size * context * position, longest * position
        else:
            read = weights + hypernet_parameters(model) / chunk_length
            read += batch_size * (num_slots + chunk_length / 2) * position
            state = (num_slots + chunk_length) * position + num_slots * text.hidden_size
        bandwidth = None if name in quantised else size * read / step
        rows[name] = {
            "ms_per_token": 1e3 * step,
            "tokens_per_second": batch_size / step,
            "ratio_to_base": seconds / medians["base"],
            **({"ratio_to_compiled_base": seconds / medians["base_compiled"]} if args.compile else {}),
            "state_mb": size * batch_size * state / 2**20,
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "gb_per_second": bandwidth and bandwidth / 1e9,
            "share_of_copy": bandwidth and bandwidth / limits["bytes_per_second"],
        }
    if args.compile and not args.sample:
        for length in lengths:
            compiled = name_of(length, config.chunk_length, "_compiled")
            same = variants[compiled]() == variants[name_of(length, config.chunk_length)]()
            share = same[:, args.prompt_length :].float().mean().item()
            rows[compiled]["share_of_tokens_equal_to_phase15"] = share
            if args.dtype == torch.float32 and not same.all():
                raise ValueError(f"the compiled path gives other tokens than the library's loop: {rows}")
    return rows


def steps_of(args: argparse.Namespace, model: Phase15ForCausalLM, rows: dict, batch_size: int) -> dict[str, dict]:
    """What a token of the compiled path costs, by step, for each length of a chunk."""
    decoders = {
        decoder.chunk.shape[1]: decoder
        for decoder in model.decoders.static.values()
        if len(decoder.chunk) == batch_size
    }
    variants = {
        (length, name): partial(run_step, model, decoder, name)
        for length, decoder in sorted(decoders.items())
        for name in ("prefill", "step", "decode")
    }
    with torch.no_grad():
        seconds = {key: statistics.median(times) / CALLS for key, times in rounds(variants, args.rounds).items()}
    table = {}
    for length in sorted(decoders):
        prefill, step, token = (1e3 * seconds[length, name] for name in ("prefill", "step", "decode"))
        row = {
            "slots_prefill": prefill / length,
            "hypernetwork": step / length,
            "token_steps": token * (length - 1) / length,
        }
        measured = rows[name_of(length, model.config.chunk_length, "_compiled")]["ms_per_token"]
        table[f"K = {length}, ms per token"] = row | {"sum": sum(row.values()), "measured": measured}
    if base := rows.get("base_compiled"):
        table["base, static cache, compiled"] = {"measured": base["ms_per_token"]}
    return table


def run_step(model: Phase15ForCausalLM, decoder, name: str):
    """A step of a full soft prompt and a chunk that is half said, several times."""
    for _ in range(CALLS):
        decoder.column.fill_(decoder.num_slots + decoder.chunk.shape[1] // 2 - 1)
        decoder.run(name, model)


__all__ = ["decode"]
