# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
What larger bases and more GPUs would need, on paper: the tables of docs/scaling.md, from one measured training step.

    python -m benchmarks.scaling                                     chunks of 16 tokens, as in training
    python -m benchmarks.scaling --chunk_length 64
    python -m benchmarks.scaling --chunks_per_record 4               if the LLM saw four chunks of each record
    python -m benchmarks.scaling --seconds 1.743 --rows 32           another measured step of TinyLlama's shape
"""

import argparse
import math
from typing import NamedTuple

import torch
from transformers import LlamaConfig

from phase15.model.configuration_phase15 import TINYLLAMA, Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


SHAPES = {
    "1.1 B (TinyLlama's shape)": TINYLLAMA,
    "7 B (Llama-2's shape)": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70 B (Llama-3's shape)": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
TOKENS = 256  # of a query, and of an answer
CHUNK_LENGTH = 16  # in the measured step
ROWS = 64  # of a step in the table
GPUS = (1, 8, 64)
MEMORY = 80.0  # GB of a GPU
BANDWIDTH = 3.35e12  # bytes/s of an H100
OTHER_ACTIVATIONS = 0.70e9  # bytes a row, measured: HyperNetwork, not checkpointed, and, less, logits


class Parameters(NamedTuple):
    """Of a model, counted on the meta device; `column` is the keys and values of one position."""

    layers: int
    head: int
    hypernet: int
    total: int
    config: Phase15Config

    @property
    def column(self) -> int:
        text = self.config.text_config
        return 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads


def count(shape: dict) -> Parameters:
    with torch.device("meta"):
        model = Phase15ForCausalLM(Phase15Config(text_config=LlamaConfig(**shape)))
    parts = (model.llm.model.layers, model.llm.lm_head, model.hypernet, model)
    return Parameters(*(sum(p.numel() for p in part.parameters()) for part in parts), model.config)


def work(parameters: Parameters, chunk_length: int, chunks_per_record: int | None = None) -> tuple[int, int, int]:
    """FLOP of a row in stage 2 and in stage 1, and the LLM's positions; 6 FLOP a parameter and position."""
    num_slots, num_chunks = parameters.config.num_soft_tokens, math.ceil(TOKENS / chunk_length)
    seen = min(chunks_per_record or num_chunks, num_chunks)
    positions, targets = seen * (num_slots + chunk_length - 1), min(seen * chunk_length, TOKENS)
    steps = math.ceil(TOKENS / parameters.config.max_query_length) + num_chunks - 1
    flop = parameters.layers * positions + parameters.head * targets + parameters.hypernet * steps * num_slots
    return 6 * flop, 6 * flop - 2 * parameters.layers * positions, positions


def training_table(args: argparse.Namespace, models: dict[str, Parameters]) -> str:
    first = next(iter(models.values()))
    rate = args.rows * work(first, CHUNK_LENGTH)[0] / args.seconds  # FLOP/s
    lines = [
        "| base | stage | states | activations a row | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |",
        "|---" * (4 + len(GPUS)) + "|",
    ]
    for name, parameters in models.items():
        full, frozen, positions = work(parameters, args.chunk_length, args.chunks_per_record)
        text = parameters.config.text_config
        kept = positions * text.hidden_size * text.num_hidden_layers * 2
        kept += OTHER_ACTIVATIONS * math.ceil(TOKENS / args.chunk_length) / (TOKENS / CHUNK_LENGTH)
        llm = parameters.total - parameters.hypernet
        for stage, flop, states in (
            (1, frozen, 2 * llm + 16 * parameters.hypernet),
            (2, full, 16 * parameters.total),
        ):
            cells = [name if stage == 1 else "", str(stage), f"{shown(states / 1e9)} GB", f"{kept / 1e9:.1f} GB"]
            for number in GPUS:
                each = states / number / 1e9
                fits = f"{shown(ROWS * flop / rate / number)} s, {shown(each)} GB"
                cells.append(fits if each < MEMORY else f"does not fit ({shown(each)} GB)")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def inference_table(args: argparse.Namespace, models: dict[str, Parameters]) -> str:
    lines = [
        "| base | state of a row | a plain cache at 8,192 tokens | LLM tokens for one said | at least |",
        "|---" * 5 + "|",
    ]
    for name, parameters in models.items():
        num_slots = parameters.config.num_soft_tokens
        state, plain = (2 * columns * parameters.column for columns in (num_slots + args.chunk_length, 8192))
        llm = parameters.total - parameters.hypernet - parameters.head  # of the input embeddings it reads single rows
        read = 2 * (llm + parameters.hypernet / args.chunk_length)
        cells = [
            name,
            f"{shown(state / 1e6)} MB",
            f"{shown(plain / 1e6)} MB",
            f"{(num_slots + args.chunk_length) / args.chunk_length:.1f}",
            f"{shown(1e3 * read / BANDWIDTH)} ms a token",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    """Three digits at most."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def parse_args(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk_length", type=int, default=CHUNK_LENGTH, help="tokens of a chunk")
    parser.add_argument("--chunks_per_record", type=int, help="chunks of a record that the LLM sees; all by default")
    parser.add_argument("--seconds", type=float, default=1.743, help="of the measured step, stage 2, chunks of 16")
    parser.add_argument("--rows", type=int, default=32, help="of the measured step")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"argument --seconds: {args.seconds} is not possible")
    for name in ("chunk_length", "chunks_per_record", "rows"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= (TOKENS if name == "chunk_length" else value):
            parser.error(f"argument --{name}: {value} is not possible")
    return args


def main(argv: list[str] | None = None, program: str = "benchmarks.scaling"):
    args = parse_args(argv, program)
    models = {name: count(shape) for name, shape in SHAPES.items()}
    print(f"{training_table(args, models)}\n\n{inference_table(args, models)}")


if __name__ == "__main__":
    main()
