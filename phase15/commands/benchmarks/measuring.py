# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 bench`: one benchmark, its tables and its JSON."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch

from phase15.commands.benchmarks.decode import decode
from phase15.commands.benchmarks.harness import LABELS, commit, device, device_name, quiet, shown, table
from phase15.commands.benchmarks.load import load
from phase15.commands.benchmarks.long import long
from phase15.commands.benchmarks.serve import serve
from phase15.commands.benchmarks.state import state
from phase15.commands.benchmarks.train import train
from phase15.model.decoding_phase15 import MAX_DECODERS


KINDS = {"decode": decode, "long": long, "train": train, "load": load, "state": state, "serve": serve}


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Sets the defaults that depend on the machine and on the kind of benchmark."""
    cuda = torch.cuda.is_available()
    if args.compile is None:
        args.compile = cuda
    if args.compile and 1 in args.chunk_lengths:
        raise ValueError("argument --chunk_lengths: a chunk of 1 has no token step to be timed")
    if args.compile and len(args.chunk_lengths) >= MAX_DECODERS:
        raise ValueError(
            f"argument --chunk_lengths: {MAX_DECODERS - 1} at most, or the model drops a compiled decoder"
        )
    args.shape = args.shape or ("tinyllama" if cuda else "smollm2")
    try:
        args.device = device(args.device or ("cuda" if cuda else "cpu"))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument --device: {error}") from error
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
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


def measure(args: argparse.Namespace) -> dict:
    """Runs a benchmark; prints its tables and its JSON, and returns what the JSON holds."""
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


__all__ = ["measure", "resolve"]
