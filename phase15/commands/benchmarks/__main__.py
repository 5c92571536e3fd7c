# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Speed and memory of Phase15 beside its baselines, with random weights at a named shape or with saved folders.

    phase15 bench decode --shape tinyllama    ms per token, beside the base under transformers' `generate`
    phase15 bench long --shape tinyllama      the same as the answer grows: a table and a curve
    phase15 bench train --shape tinyllama     a step, beside chunk by chunk and full-context fine-tuning
    phase15 bench load --shape smollm2        `from_pretrained`, beside the bare base's
    phase15 bench state --shape smollm2       reading a text into a state, beside the base's prefill of it
    phase15 bench serve --shape smollm2       the server at 1, 4 and 16 clients, beside `transformers serve`

Every variant first runs uncounted. Then all take turns; figures are medians over the rounds. Ceilings are measured in
the same run: bytes/s of a large copy, FLOP/s of a large matrix product. The last line is JSON,
and the only one with --json.
"""

import argparse
from pathlib import Path

from phase15.cli.errors import one_line_errors


KINDS = ["decode", "long", "train", "load", "state", "serve"]
SHAPES = ["tinyllama", "smollm2", "tiny"]
# The flags that not every kind has.
KINDS_OF = {
    "rounds": ("decode", "long", "train", "load", "state"),
    "batch_sizes": ("decode", "train"),
    "prompt_length": ("decode", "long", "train"),
    "new_tokens": ("decode", "long", "train"),
    "chunk_lengths": ("decode", "serve"),
    **dict.fromkeys(("int8", "sample"), ("decode",)),
    **dict.fromkeys(("stage", "gradient_checkpointing"), ("train",)),
    "folders": ("load",),
    **dict.fromkeys(("clients", "requests", "turns", "rivals", "soak", "before"), ("serve",)),
    "picture": ("long",),
    **dict.fromkeys(("lengths", "max_prefill"), ("state",)),
}


def parse_args(argv: list[str] | None = None, program: str = "phase15 bench") -> argparse.Namespace:
    """Returns the flags. Defaults that depend on the machine are `None`: `measuring.resolve` sets them."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=formatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=SHAPES, help="default: tinyllama on CUDA, else smollm2")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--rounds", type=int, help="counted calls of each variant (default 5; load 30; long 1)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="rows (default: decode 1, on CUDA 1 64; train 8)")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of the prompt or query")
    parser.add_argument("--new_tokens", type=int, help="tokens of the answer (default 256; long 8192)")
    parser.add_argument(
        "--chunk_lengths", type=int, nargs="+", default=[], help="decode, serve: other lengths of a chunk, too"
    )
    parser.add_argument("--int8", action="store_true", help="decode: both models with torchao's int8 weights, too")
    parser.add_argument("--sample", action="store_true", help="decode: sampling instead of greedy search")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the compiled variants (default: on CUDA)"
    )
    parser.add_argument("--stage", choices=["hypernet", "full"], default="full", help="train: what is trained")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="train: recompute the LLM's activations")
    parser.add_argument("--folders", nargs=2, metavar=("PHASE15", "BASE"), help="load: these, not random weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="serve: how many ask at a time")
    parser.add_argument("--requests", type=int, default=2, help="serve: of each client")
    parser.add_argument("--turns", type=int, default=20, help="serve: of a conversation")
    rivals = ["base_server", "base_server_batching"]
    parser.add_argument(
        "--rivals", nargs="*", choices=rivals, default=rivals, help="serve: the base under transformers serve"
    )
    parser.add_argument("--soak", type=int, default=0, help="serve: number of further requests, to measure memory")
    parser.add_argument(
        "--before", nargs=2, metavar=("CHECKOUT", "SITE"), help="serve: an earlier checkout, and packages for it"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 8192, 65536], help="state: tokens of the texts"
    )
    parser.add_argument("--max_prefill", type=int, default=8192, help="state: the base reads texts of up to N tokens")
    parser.add_argument("--picture", type=Path, help="long: the curve (default outputs/long_SHAPE.png)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    for name, kinds in KINDS_OF.items():
        if args.kind not in kinds and getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name}: {args.kind} has none, only {', '.join(kinds)}")
    for name in (
        "rounds",
        "batch_sizes",
        "prompt_length",
        "new_tokens",
        "clients",
        "requests",
        "chunk_lengths",
        "lengths",
    ):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value], default=1) < 1:
            parser.error(f"argument --{name}: must be 1 or more, not {value}")
    for folder in args.folders or ():
        if not Path(folder, "config.json").is_file():
            parser.error(f"argument --folders: {folder} is no folder of a model, it has no config.json")
    return args


def main(argv: list[str] | None = None, program: str = "phase15 bench"):
    with one_line_errors(program):
        args = parse_args(argv, program)
        from phase15.commands.benchmarks.measuring import measure, resolve  # imports torch: seconds

        measure(resolve(args))


if __name__ == "__main__":
    main()


__all__ = ["KINDS", "SHAPES", "main", "parse_args"]
