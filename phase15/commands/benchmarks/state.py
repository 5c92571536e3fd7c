# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Reading a text into a state, beside the base's prefill of the same text: time, bytes, and a second question."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache, LlamaConfig

from phase15.commands.benchmarks.harness import SHAPES, hypernet_parameters, in_turn, timed
from phase15.commands.benchmarks.long import state_bytes
from phase15.model.compat_phase15 import CACHE_NAME
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.state_phase15 import Phase15State


FACTS_HYPERNET = {  # of recipes/smollm2_facts.yaml
    "num_soft_tokens": 64,
    "num_sink_tokens": 32,
    "chunk_length": 32,
    "hypernet_hidden_size": 384,
    "hypernet_num_hidden_layers": 1,
    "hypernet_num_attention_heads": 6,
    "hypernet_intermediate_size": 1536,
    "hypernet_slot_gate": True,
}
READS_LAYERS = 2
QUESTION_LENGTH = 20  # tokens
ANSWER_LENGTH = 16


def make_readers(args: argparse.Namespace) -> dict[str, Phase15ForCausalLM]:
    """
    Returns Phase15 models of random weights around one LLM: with the HyperNetwork of the shape, with the small one of
    the facts recipe, and with the small one that reads layers of the LLM.
    """
    text_arguments, arguments = SHAPES[args.shape]
    torch.manual_seed(0)
    small = arguments if args.shape == "tiny" else FACTS_HYPERNET
    models = {}
    llm = None
    for name, fields in {
        "phase15": arguments,
        "phase15_small": small,
        "phase15_small_reads_layers": {**small, "hypernet_reads_layers": READS_LAYERS},
    }.items():
        text_config = LlamaConfig(**text_arguments, bos_token_id=1, eos_token_id=None)  # no answer ends early
        config = Phase15Config(text_config=text_config, **fields)
        with torch.device(args.device):
            model = Phase15ForCausalLM(config, llm).to(args.dtype).eval()
            torch.nn.init.normal_(model.hypernet.alpha, std=0.1)  # not zero: nothing is left out
        llm = model.llm
        models[name] = model
    return models


@torch.no_grad()
def prefill(llm: torch.nn.Module, ids: torch.LongTensor) -> DynamicCache:
    """Reads a text as the base does: keys and values of all layers, and the logits of the next token."""
    cache = DynamicCache(config=llm.config)
    llm(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    return cache


def ask_base(llm: torch.nn.Module, cache: DynamicCache, ids: torch.LongTensor):
    """Answers a question about a text whose keys and values are kept. Each question needs a copy of them."""
    options = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, "pad_token_id": 0}
    llm.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: copy.deepcopy(cache)}, **options)


def ask_base_again(llm: torch.nn.Module, ids: torch.LongTensor):
    """Answers a question about a text of which nothing is kept: the base reads the text again."""
    options = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, "pad_token_id": 0}
    llm.generate(ids, attention_mask=torch.ones_like(ids), **options)


def ask_state(model: Phase15ForCausalLM, state: Phase15State, question: torch.LongTensor):
    options = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, "pad_token_id": 0, "compile": False}
    model.generate(question, attention_mask=torch.ones_like(question), state=state, **options)


def choose_clock(device: torch.device) -> Callable[[], float]:
    """Returns the clock of all times here. With one thread on a CPU it leaves out the time that other work takes."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread else time.perf_counter


def measure_in_turn(variants: dict[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Times calls in turn. Unlike `rounds` it makes no uncounted call: a prefill of a long text takes minutes."""
    seconds = {name: [] for name in variants}
    for index in range(repeats):
        for name in in_turn(variants, index):
            seconds[name].append(timed(variants[name], clock))
    return seconds


def state(args: argparse.Namespace) -> dict:
    """Measures each length of text; the base's prefill only up to `--max_prefill` tokens."""
    models = make_readers(args)
    llm = models["phase15"].llm
    vocab_size = llm.config.vocab_size
    warm_up = torch.randint(5, vocab_size, (1, 300), device=args.device)
    prefill(llm, warm_up)
    for model in models.values():
        ask_state(model, model.read(warm_up), warm_up[:, :QUESTION_LENGTH])
    results = {}
    for length in args.lengths:
        ids = torch.randint(5, vocab_size, (1, length), device=args.device)
        results[f"{length}_tokens"] = measure_length(args, models, llm, ids)
    hypernets = {name: hypernet_parameters(model) for name, model in models.items()}
    return {
        "threads": torch.get_num_threads(),
        "clock": choose_clock(args.device).__name__,
        "hypernet_parameters": hypernets,
        "results": results,
    }


def measure_length(
    args: argparse.Namespace, models: dict[str, Phase15ForCausalLM], llm: torch.nn.Module, ids: torch.LongTensor
) -> dict[str, dict]:
    """Returns a row for each variant: seconds and speedup over the base to read and to answer a question, bytes."""
    length = ids.shape[1]
    question = ids[:, :QUESTION_LENGTH]
    has_base = length <= args.max_prefill
    clock = choose_clock(args.device)
    reads: dict[str, Callable] = {}
    for name, model in models.items():
        reads[name] = partial(model.read, ids, progress_bar=False)
    if has_base:
        reads["base"] = partial(prefill, llm, ids)
    read_times = measure_in_turn(reads, args.rounds, clock)

    asks: dict[str, Callable] = {}
    sizes = {"base_reads_again": 0}  # nothing is kept between questions
    for name, model in models.items():
        text = model.read(ids, progress_bar=False)
        asks[name] = partial(ask_state, model, text, question)
        sizes[name] = text.nbytes
    sizes["base"] = length * bytes_per_position(llm)
    if has_base:
        text_and_question = torch.cat([ids, question], dim=1)
        cache = prefill(llm, ids)
        sizes["base"] = state_bytes(cache)
        asks["base"] = partial(ask_base, llm, cache, text_and_question)
        asks["base_reads_again"] = partial(ask_base_again, llm, text_and_question)
    ask_times = measure_in_turn(asks, args.rounds, clock)

    rows = {}
    for name in (*models, "base", "base_reads_again"):
        read_speedups = speedups(read_times, name)
        question_speedups = speedups(ask_times, name)
        rows[name] = {
            "seconds_to_read": median(read_times.get(name)),
            "read_speedup": median(read_speedups),
            "read_speedup_range": value_range(read_speedups),
            "bytes": sizes[name],
            "seconds_of_a_question": median(ask_times.get(name)),
            "question_speedup": median(question_speedups),
            "question_speedup_range": value_range(question_speedups),
        }
    return rows


def speedups(seconds: dict[str, list[float]], name: str) -> list[float] | None:
    """Returns the base's seconds over a variant's, by round: the machine's speed changes between rounds."""
    if name not in seconds or "base" not in seconds:
        return None
    return [base / own for base, own in zip(seconds["base"], seconds[name], strict=True)]


def median(values: list[float] | None) -> float | None:
    return None if values is None else statistics.median(values)


def value_range(values: list[float] | None) -> list[float] | None:
    return None if values is None else [min(values), max(values)]


def bytes_per_position(llm: torch.nn.Module) -> int:
    """Returns the bytes of the keys and values of one position, in all layers."""
    config = llm.config
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * llm.dtype.itemsize


__all__ = ["state"]
