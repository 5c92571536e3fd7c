# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Training: a step of fine-tuning, beside the loss chunk by chunk and beside full-context fine-tuning."""

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from phase15.commands.benchmarks.harness import ceilings, hypernet_parameters, make_models, peak_memory, rounds
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training.compilation import compile_layers


def chunk_by_chunk(model: Phase15ForCausalLM, ids: torch.LongTensor, query_length: int) -> torch.Tensor:
    """Returns the loss of `forward`, computed in the order of the recursion: one call of the LLM per chunk."""
    embed = model.get_input_embeddings()
    chunk_length = model.config.chunk_length
    num_query_tokens = torch.full_like(ids[:, 0], query_length)  # (B,)
    num_chunk_tokens = torch.full_like(ids[:, 0], chunk_length)  # (B,)
    soft_prompt = model.read_segments(model.empty_soft_prompt(len(ids)), ids[:, :query_length], num_query_tokens)
    answer = ids[:, query_length:]
    loss = 0
    previous = None
    for chunk in answer.split(chunk_length, dim=1):
        if previous is not None:
            soft_prompt = model.step(soft_prompt, embed(previous), num_chunk_tokens)
        hidden_states, _ = model.predict(soft_prompt, embed(chunk[:, :-1]))
        logits = model.get_output_embeddings()(hidden_states)
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), chunk.flatten(), reduction="sum")
        previous = chunk
    return loss / answer.numel()


def train(args: argparse.Namespace) -> dict:
    """Times steps of fine-tuning: forward, backward and AdamW. Every row has a query and an answer of full length."""
    model, base = make_models(args)
    model.train()
    limits = ceilings(args.device, args.dtype)
    if args.stage == "hypernet":
        base.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    same_weights = {id(parameter): parameter for parameter in model.parameters()}
    compiled = copy.deepcopy(model, same_weights)  # copies all but these: a second model without second weights
    compile_layers(compiled)
    results = {}
    for batch_size in args.batch_sizes:
        results[f"batch_{batch_size}"] = train_batch(args, model, base, compiled, limits, batch_size)
    return {"ceilings": limits, "results": results}


def train_batch(
    args: argparse.Namespace,
    model: Phase15ForCausalLM,
    base: torch.nn.Module,
    compiled: Phase15ForCausalLM,
    limits: dict[str, float],
    batch_size: int,
) -> dict[str, dict]:
    """Returns the results of one batch size, by variant."""
    shape = (batch_size, args.prompt_length + args.new_tokens)
    ids = torch.randint(5, model.config.text_config.vocab_size, shape, device=args.device)
    labels = ids.clone()
    labels[:, : args.prompt_length] = -100
    losses = {
        "phase15": lambda: model(ids, labels=labels, skip_logits=True).loss,
        "phase15_chunk_by_chunk": lambda: chunk_by_chunk(model, ids, args.prompt_length),
    }
    if args.stage != "hypernet":  # which freezes the base
        losses["base_full_context"] = lambda: base(ids, labels=labels).loss
    if args.compile:
        losses["phase15_compiled"] = lambda: compiled(ids, labels=labels, skip_logits=True).loss
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=True)  # a rate of 0: all variants have the same weights

    def step(loss: Callable):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variants = {name: partial(step, loss) for name, loss in losses.items()}
    with torch.no_grad():
        values = {name: loss().item() for name, loss in losses.items()}
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    rows = {}
    for name, seconds in medians.items():
        flop = base_flop(args, base) if name.startswith("base") else phase15_flop(args, model, base)
        flop_per_second = batch_size * flop / seconds
        rows[name] = {
            "ms_per_step": 1e3 * seconds,
            "answer_tokens_per_second": batch_size * args.new_tokens / seconds,
            "speedup_over_chunk_by_chunk": medians["phase15_chunk_by_chunk"] / seconds,
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "tflop_per_second": flop_per_second / 1e12,
            "share_of_product": flop_per_second / limits["flop_per_second"],
            "loss": values[name],
        }
    return rows


def layer_parameters(base: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in base.model.layers.parameters())


def phase15_flop(args: argparse.Namespace, model: Phase15ForCausalLM, base: torch.nn.Module) -> int:
    """
    Counts the FLOP of a row in a training step: 6 per parameter and position, 4 without a weight gradient. Neither
    attention scores nor recomputed activations count.
    """
    config = model.config
    num_chunks = math.ceil(args.new_tokens / config.chunk_length)
    num_segments = math.ceil(args.prompt_length / config.max_query_length)
    num_positions = num_chunks * (config.num_soft_tokens + config.chunk_length - 1)
    num_steps = num_segments + num_chunks - 1
    llm = layer_parameters(base) * num_positions + base.lm_head.weight.numel() * args.new_tokens
    hypernet = hypernet_parameters(model) * num_steps * config.num_soft_tokens
    flop_per_parameter = 4 if args.stage == "hypernet" else 6
    return flop_per_parameter * llm + 6 * hypernet


def base_flop(args: argparse.Namespace, base: torch.nn.Module) -> int:
    """Counts the FLOP of a row in a training step of the base, as `phase15_flop` does."""
    parameters = layer_parameters(base) + base.lm_head.weight.numel()
    return 6 * parameters * (args.prompt_length + args.new_tokens)


__all__ = ["train"]
