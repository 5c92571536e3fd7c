# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Training: a step of fine-tuning, beside the loss chunk by chunk and beside full-context fine-tuning."""

import argparse
import copy
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from phase15.commands.benchmarks.harness import ceilings, hypernet_parameters, make_models, peak_memory, rounds
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training.compilation import compile_layers


def chunk_by_chunk(model: Phase15ForCausalLM, ids: torch.LongTensor, query_length: int) -> torch.Tensor:
    """The loss in the recursion's own order: one call of the LLM per chunk."""
    embed, chunk_length = model.get_input_embeddings(), model.config.chunk_length
    length = torch.full_like(ids[:, 0], query_length)
    soft_prompt, loss = model.read(model.empty_soft_prompt(len(ids)), ids[:, :query_length], length), 0
    chunks = ids[:, query_length:].split(chunk_length, dim=1)
    for before, chunk in zip([None, *chunks], chunks, strict=False):
        if before is not None:
            soft_prompt = model.step(soft_prompt, embed(before), torch.full_like(length, chunk_length))
        hidden_states, _ = model.predict(soft_prompt, embed(chunk[:, :-1]))
        logits = model.get_output_embeddings()(hidden_states)
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), chunk.flatten(), reduction="sum")
    return loss / ids[:, query_length:].numel()


def train(args: argparse.Namespace) -> dict:
    """Times steps of fine-tuning: forward, backward and AdamW. Every row is a query and an answer of full length."""
    model, base = make_models(args)
    model.train()
    limits = ceilings(args.device, args.dtype)
    if args.stage == "hypernet":
        base.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})  # the same weights
    compile_layers(compiled)
    results = {f"batch_{size}": train_batch(args, model, base, compiled, limits, size) for size in args.batch_sizes}
    return {"ceilings": limits, "results": results}


def train_batch(args: argparse.Namespace, model, base, compiled, limits, batch_size: int) -> dict[str, dict]:
    config, query_length, answer_length = model.config, args.prompt_length, args.new_tokens
    ids = torch.randint(
        5, config.text_config.vocab_size, (batch_size, query_length + answer_length), device=args.device
    )
    labels = ids.clone()
    labels[:, :query_length] = -100
    losses = {
        "phase15": lambda: model(ids, labels=labels, skip_logits=True).loss,
        "phase15_chunk_by_chunk": lambda: chunk_by_chunk(model, ids, query_length),
        "base_full_context": lambda: base(ids, labels=labels).loss,
    }
    if args.stage == "hypernet":
        del losses["base_full_context"]  # frozen: there is nothing to train
    if args.compile:
        losses["phase15_compiled"] = lambda: compiled(ids, labels=labels, skip_logits=True).loss
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=True)  # rate 0: all variants keep the same weights

    def step(loss: Callable):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variants = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    with torch.no_grad():
        values = {name: loss().item() for name, loss in losses.items()}
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    # 6 FLOP per parameter and token, 4 without a weight gradient; recomputation does not count
    num_chunks = math.ceil(answer_length / config.chunk_length)
    layers, head = sum(p.numel() for p in base.model.layers.parameters()), base.lm_head.weight.numel()
    positions = num_chunks * (config.num_soft_tokens + config.chunk_length - 1)
    steps = math.ceil(query_length / config.max_query_length) + num_chunks - 1
    per_parameter = 4 if args.stage == "hypernet" else 6
    recursion = 6 * hypernet_parameters(model) * steps * config.num_soft_tokens
    flop = {
        "phase15": batch_size * (per_parameter * (layers * positions + head * answer_length) + recursion),
        "base": batch_size * 6 * (layers + head) * (query_length + answer_length),
    }
    rows = {}
    for name, seconds in medians.items():
        achieved = flop[name.partition("_")[0]] / seconds
        rows[name] = {
            "ms_per_step": 1e3 * seconds,
            "answer_tokens_per_second": batch_size * answer_length / seconds,
            "speedup_over_chunk_by_chunk": medians["phase15_chunk_by_chunk"] / seconds,
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "tflop_per_second": achieved / 1e12,
            "share_of_product": achieved / limits["flop_per_second"],
            "loss": values[name],
        }
    return rows


__all__ = ["train"]
