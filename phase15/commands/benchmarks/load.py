# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loading: `from_pretrained` of a Phase15 folder, beside that of the bare base."""

import argparse
import os
import statistics
import tempfile

from transformers import AutoModelForCausalLM

from phase15.commands.benchmarks.harness import make_models, rounds


def load(args: argparse.Namespace) -> dict:
    """Times `from_pretrained`, with the files in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        if args.folders is None:
            model, base = make_models(args)
            folders = [os.path.join(work, name) for name in ("phase15", "base")]
            model.save_pretrained(folders[0])
            base.save_pretrained(folders[1])
            del model, base
        else:
            folders = args.folders
        variants = {
            name: lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            for name, folder in zip(("phase15", "base"), folders, strict=True)
        }
        seconds = rounds(variants, args.rounds)
    return {
        "results": {
            name: {
                "median_ms": 1e3 * statistics.median(times),
                "fastest_ms": 1e3 * min(times),
                "ratio_to_base": statistics.median(times) / statistics.median(seconds["base"]),
            }
            for name, times in seconds.items()
        }
    }


__all__ = ["load"]
