# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Estimates what larger bases and more GPUs would need: the tables of docs/scaling.md, from one measured training step.

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
TOKENS = 256  # length of a query, and of an answer
CHUNK_LENGTH = 16  # of the measured step
ROWS = 64  # rows per step in the table
GPUS = (1, 8, 64)
MEMORY = 80.0  # of a GPU, in GB
BANDWIDTH = 3.35e12  # of an H100, in bytes/s
OTHER_ACTIVATIONS = 0.70e9  # bytes per row, measured: the HyperNetwork, not checkpointed, and some logits


class Parameters(NamedTuple):
    """Numbers of parameters of a model and its parts."""

    layers: int
    head: int
    hypernet: int
    total: int
    config: Phase15Config

    @property
    def llm(self) -> int:
        return self.total - self.hypernet

    @property
    def position_size(self) -> int:
        """Returns the number of keys and values of one position, in all layers."""
        text_config = self.config.text_config
        head_dim = text_config.hidden_size // text_config.num_attention_heads
        return 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim


class Work(NamedTuple):
    """Work of a row in a training step."""

    full_flop: int  # stage 2, which trains everything
    frozen_flop: int  # stage 1, which trains only the HyperNetwork
    positions: int  # of the LLM


def count(shape: dict) -> Parameters:
    """Counts the parameters of a shape on the meta device, without memory for them."""
    with torch.device("meta"):
        model = Phase15ForCausalLM(Phase15Config(text_config=LlamaConfig(**shape)))
    parts = (model.llm.model.layers, model.llm.lm_head, model.hypernet, model)
    numbers = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    return Parameters(*numbers, model.config)


def work(parameters: Parameters, chunk_length: int, chunks_per_record: int | None = None) -> Work:
    """
    Counts the work of a row: 6 FLOP per parameter and position, 4 without a weight gradient.

    Args:
        parameters (`Parameters`): of the model.
        chunk_length (`int`): tokens per chunk.
        chunks_per_record (`int`, *optional*): chunks of a record that the LLM sees; all by default.
    """
    config = parameters.config
    num_chunks = math.ceil(TOKENS / chunk_length)
    num_segments = math.ceil(TOKENS / config.max_query_length)
    num_seen = min(chunks_per_record or num_chunks, num_chunks)
    positions = num_seen * (config.num_soft_tokens + chunk_length - 1)
    targets = min(num_seen * chunk_length, TOKENS)
    steps = num_segments + num_chunks - 1  # the recursion takes all steps, whatever the LLM sees
    layers_flop = parameters.layers * positions
    head_flop = parameters.head * targets
    hypernet_flop = parameters.hypernet * steps * config.num_soft_tokens
    full_flop = 6 * (layers_flop + head_flop + hypernet_flop)
    return Work(full_flop, full_flop - 2 * layers_flop, positions)


def training_table(args: argparse.Namespace, models: dict[str, Parameters]) -> str:
    """Returns the table of memory and seconds of a training step."""
    measured = next(iter(models.values()))
    flop_per_second = args.rows * work(measured, CHUNK_LENGTH).full_flop / args.seconds
    header = ["base", "stage", "states", "activations a row"]
    header += [f"{number} GPU" if number == 1 else f"{number} GPUs" for number in GPUS]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, parameters in models.items():
        row_work = work(parameters, args.chunk_length, args.chunks_per_record)
        text_config = parameters.config.text_config
        # The input of each checkpointed layer, in bfloat16. The rest grows with the number of steps.
        activations = row_work.positions * text_config.hidden_size * text_config.num_hidden_layers * 2
        num_steps = math.ceil(TOKENS / args.chunk_length)
        activations += OTHER_ACTIVATIONS * num_steps / (TOKENS / CHUNK_LENGTH)
        # Bytes per parameter: 16 with gradient and AdamW's states, 2 if frozen, in bfloat16.
        stages = (
            (1, row_work.frozen_flop, 2 * parameters.llm + 16 * parameters.hypernet),
            (2, row_work.full_flop, 16 * parameters.total),
        )
        for stage, flop, states in stages:
            cells = [name if stage == 1 else "", str(stage)]
            cells += [f"{shown(states / 1e9)} GB", f"{activations / 1e9:.1f} GB"]
            for number in GPUS:
                gigabytes = states / number / 1e9
                if gigabytes < MEMORY:
                    seconds = ROWS * flop / flop_per_second / number
                    cells.append(f"{shown(seconds)} s, {shown(gigabytes)} GB")
                else:
                    cells.append(f"does not fit ({shown(gigabytes)} GB)")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def inference_table(args: argparse.Namespace, models: dict[str, Parameters]) -> str:
    """Returns the table of memory and time of decoding."""
    header = ["base", "state of a row", "a plain cache at 8,192 tokens", "LLM tokens per generated token", "at least"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, parameters in models.items():
        length = parameters.config.num_soft_tokens + args.chunk_length
        # 2 bytes per number, in bfloat16
        state_bytes = 2 * length * parameters.position_size
        plain_bytes = 2 * 8192 * parameters.position_size
        # Of the input embeddings, which are as large as the head, a token reads single rows. The HyperNetwork runs
        # once per chunk.
        read_bytes = 2 * (parameters.llm - parameters.head + parameters.hypernet / args.chunk_length)
        cells = [
            name,
            f"{shown(state_bytes / 1e6)} MB",
            f"{shown(plain_bytes / 1e6)} MB",
            f"{length / args.chunk_length:.1f}",
            f"{shown(1e3 * read_bytes / BANDWIDTH)} ms a token",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    """Returns a number with at most three digits, or all of a large one before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2g}"


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
