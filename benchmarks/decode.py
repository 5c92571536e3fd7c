# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Decoding: ms per token of whole calls of `generate`, beside the base's."""

import argparse
import statistics

import torch
from transformers import CompileConfig

from benchmarks.harness import ceilings, hypernet_parameters, make_models, peak_memory, read_parameters, rounds


def decode(args: argparse.Namespace) -> dict:
    """Times whole calls of `generate`, prompt included."""
    model, base = make_models(args)
    limits = ceilings(args.device, args.dtype)
    results = {f"batch_{size}": decode_batch(args, model, base, limits, size) for size in args.batch_sizes}
    return {"ceilings": limits, "results": results}


def compile_everywhere() -> CompileConfig:
    """A configuration with which the library compiles on a CPU, too. By default it compiles on GPUs alone."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def decode_batch(args: argparse.Namespace, model, base, limits: dict[str, float], batch_size: int) -> dict[str, dict]:
    config = model.config
    prompt = torch.randint(5, config.text_config.vocab_size, (batch_size, args.prompt_length), device=args.device)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": args.sample,
        "pad_token_id": 0,
    }
    everywhere = compile_everywhere()
    variants = {
        "base": lambda: base.generate(prompt, **options),
        "phase15": lambda: model.generate(prompt, compile=False, **options),
    }
    if args.compile:
        variants["base_compiled"] = lambda: base.generate(
            prompt, cache_implementation="static", compile_config=everywhere, **options
        )
        variants["phase15_compiled"] = lambda: model.generate(prompt, compile=True, **options)
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    size = torch.finfo(args.dtype).bits // 8
    num_slots, chunk_length = config.num_soft_tokens, config.chunk_length
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    position = 2 * config.text_config.num_hidden_layers * config.text_config.num_key_value_heads * head_dim
    context = args.prompt_length + args.new_tokens / 2
    weights, window = read_parameters(base), num_slots + chunk_length / 2
    bytes_read = {  # per step of the whole batch: weights once, keys and values of every row
        "phase15": size * (weights + hypernet_parameters(model) / chunk_length + batch_size * window * position),
        "base": size * (weights + batch_size * context * position),
    }
    rows = {}
    for name, seconds in medians.items():
        step = seconds / args.new_tokens
        bandwidth = bytes_read[name.removesuffix("_compiled")] / step
        rows[name] = {
            "ms_per_token": 1e3 * step,
            "tokens_per_second": batch_size / step,
            "ratio_to_base": seconds / medians["base"],
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "gb_per_second": bandwidth / 1e9,
            "share_of_copy": bandwidth / limits["bytes_per_second"],
        }
    if args.compile and not args.sample:
        same = variants["phase15_compiled"]() == variants["phase15"]()
        share = same[:, args.prompt_length :].float().mean().item()
        rows["phase15_compiled"]["share_of_tokens_equal_to_phase15"] = share
        if args.dtype == torch.float32 and not same.all():
            raise ValueError(f"the compiled path gives other tokens than the library's loop: {rows}")
    return rows
