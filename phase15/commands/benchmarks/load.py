# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loading: `from_pretrained` of a Phase15 folder, beside that of the bare base."""

import argparse
import os
import statistics
import tempfile
from functools import partial

from transformers import AutoModelForCausalLM

from phase15.commands.benchmarks.harness import make_models, rounds


def load(args: argparse.Namespace) -> dict:
    """Times `from_pretrained`, with the files in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        if args.folders is None:
            folder = os.path.join(work, "phase15")
            base_folder = os.path.join(work, "base")
            model, base = make_models(args)
            model.save_pretrained(folder)
            base.save_pretrained(base_folder)
            del model, base  # memory for the models that are loaded
        else:
            folder, base_folder = args.folders
        load_model = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
        variants = {"phase15": partial(load_model, folder), "base": partial(load_model, base_folder)}
        seconds = rounds(variants, args.rounds)
    base_median = statistics.median(seconds["base"])
    results = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        results[name] = {
            "median_ms": 1e3 * median,
            "fastest_ms": 1e3 * min(times),
            "ratio_to_base": median / base_median,
        }
    return {"results": results}


__all__ = ["load"]
