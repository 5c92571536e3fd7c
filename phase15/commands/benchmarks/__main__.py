# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Speed and memory of Phase15 beside its baselines, with random weights at a named shape or with saved folders.

    python -m benchmarks decode --shape tinyllama    ms per token, beside the base under transformers' `generate`
    python -m benchmarks long --shape tinyllama      the same as the answer grows: a table and a curve
    python -m benchmarks train --shape tinyllama     a step, beside chunk by chunk and full-context fine-tuning
    python -m benchmarks load --shape smollm2        `from_pretrained`, beside the bare base's
    python -m benchmarks serve --shape smollm2       the server at 1, 4 and 16 clients, beside `transformers serve`

Every variant first runs uncounted. Then all take turns; figures are medians over the rounds. Ceilings are measured in
the same run: bytes/s of a large copy, FLOP/s of a large matrix product. The last line is JSON,
with --json the only one.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch

from phase15.cli.errors import one_line_errors
from phase15.commands.benchmarks.decode import decode
from phase15.commands.benchmarks.harness import LABELS, SHAPES, commit, device, device_name, quiet, shown, table
from phase15.commands.benchmarks.load import load
from phase15.commands.benchmarks.long import long
from phase15.commands.benchmarks.serve import serve
from phase15.commands.benchmarks.train import train
from phase15.model.decoding_phase15 import MAX_DECODERS


KINDS = {"decode": decode, "long": long, "train": train, "load": load, "serve": serve}
# The flags that not every kind has.
KINDS_OF = {
    "rounds": ("decode", "long", "train", "load"),
    "batch_sizes": ("decode", "train"),
    "prompt_length": ("decode", "long", "train"),
    "new_tokens": ("decode", "long", "train"),
    "chunk_lengths": ("decode", "serve"),
    **dict.fromkeys(("int8", "sample"), ("decode",)),
    **dict.fromkeys(("stage", "gradient_checkpointing"), ("train",)),
    "folders": ("load",),
    **dict.fromkeys(("clients", "requests", "turns", "rivals", "soak", "before"), ("serve",)),
    "picture": ("long",),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama" if cuda else "smollm2")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--rounds", type=int, help="counted calls of each variant (default 5; load 30; long 1)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="rows (default: decode 1, on CUDA 1 64; train 8)")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of the prompt or query")
    parser.add_argument("--new_tokens", type=int, help="tokens of the answer (default 256; long 8192)")
    parser.add_argument(
        "--chunk_lengths", type=int, nargs="+", default=[], help="decode, serve: other lengths of a chunk, too"
    )
    parser.add_argument("--int8", action="store_true", help="decode: both models with torchao's int8 weights, too")
    parser.add_argument("--sample", action="store_true", help="decode: sampling instead of greedy search")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="the compiled variants")
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
    parser.add_argument("--soak", type=int, default=0, help="serve: so many more requests, for the memory")
    parser.add_argument(
        "--before", nargs=2, metavar=("CHECKOUT", "SITE"), help="serve: an earlier checkout, and packages for it"
    )
    parser.add_argument("--picture", type=Path, help="long: the curve (default outputs/long_SHAPE.png)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", type=device, default=torch.device("cuda" if cuda else "cpu"))
    args = parser.parse_args(argv)
    for name, kinds in KINDS_OF.items():
        if args.kind not in kinds and getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name}: {args.kind} has none, only {', '.join(kinds)}")
    for name in ("rounds", "batch_sizes", "prompt_length", "new_tokens", "clients", "requests", "chunk_lengths"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value], default=1) < 1:
            parser.error(f"argument --{name}: must be 1 or more, not {value}")
    for folder in args.folders or ():
        if not Path(folder, "config.json").is_file():
            parser.error(f"argument --folders: {folder} is no folder of a model, it has no config.json")
    if args.compile and 1 in args.chunk_lengths:
        parser.error("argument --chunk_lengths: a chunk of 1 has no token step to be timed")
    if args.compile and len(args.chunk_lengths) >= MAX_DECODERS:
        parser.error(f"argument --chunk_lengths: {MAX_DECODERS - 1} at most, or the model drops a compiled decoder")
    args.dtype = getattr(torch, args.dtype)
    args.rounds = args.rounds or {"load": 30, "long": 1}.get(args.kind, 5)
    args.new_tokens = args.new_tokens or (8192 if args.kind == "long" else 256)
    if args.batch_sizes is None:
        args.batch_sizes = {"decode": [1, 64] if cuda else [1], "train": [8]}.get(args.kind, [1])
    args.picture = args.picture or Path("outputs") / f"long_{args.shape}.png"
    return args


def print_tables(report: dict):
    settings = report["settings"]
    results = report["results"]
    kind = report["benchmark"]
    print(f"{kind}, {settings['shape']}, {settings['dtype']}, {report['device']}, commit {report['commit']}")
    if "ceilings" in report:
        copy = report["ceilings"]["bytes_per_second"] / 1e9
        product = report["ceilings"]["flop_per_second"] / 1e12
        print(f"ceilings: a large copy {copy:.0f} GB/s, a large matrix product {product:.2f} TFLOP/s")
    if kind == "load":  # one table
        print(f"\n{table(results)}")
        results = {}
    for name, rows in results.items():
        heading = LABELS.get(name, name.replace("_", " "))
        if "faster_than_base_from_token" in rows:
            token = shown(rows["faster_than_base_from_token"])
            heading += f"; whole answer faster than the base's from token: {token}"
        rows = {key: row for key, row in rows.items() if isinstance(row, dict)}  # without the heading's number
        print(f"\n{heading}\n{table(rows)}")
    for name, reason in report.get("not_measured", {}).items():
        print(f"\n{LABELS.get(name, name)}: not measured, {reason}")
    print()


def main(args: argparse.Namespace) -> dict:
    with quiet():
        report = KINDS[args.kind](args)
    settings = {
        name: value for name, value in vars(args).items() if name not in ("json", "picture", "folders", "before")
    }
    settings |= {name: str(settings[name]).removeprefix("torch.") for name in ("dtype", "device")}
    report = {
        "benchmark": args.kind,
        "commit": commit(),
        "device": device_name(args.device),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "settings": settings,
        **report,
    }
    if not args.json:
        print_tables(report)
    print(json.dumps(report))
    return report


def run_command():
    with one_line_errors("benchmarks"):
        main(parse_args())


if __name__ == "__main__":
    run_command()
