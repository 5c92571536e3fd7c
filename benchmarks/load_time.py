# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Time of `from_pretrained`: a Phase15 folder against its bare base, interleaved in one process, files in the page cache.

    python benchmarks/load_time.py PHASE15_DIR BASE_DIR
"""

import statistics
import sys
import time

from transformers import AutoModelForCausalLM


def seconds(folder: str) -> tuple[float, float]:
    """Wall-clock and processor time of one load."""
    wall, processor = time.perf_counter(), time.process_time()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return time.perf_counter() - wall, time.process_time() - processor


def compare(phase15: str, base: str, repeats: int = 25) -> dict[str, tuple[float, float]]:
    """Median seconds of both, by clock."""
    rounds = [(seconds(phase15), seconds(base)) for _ in range(repeats + 1)][1:]  # the first one imports
    clocks = enumerate(("wall-clock", "processor"))
    return {clock: tuple(statistics.median(row[i][c] for row in rounds) for i in (0, 1)) for c, clock in clocks}


if __name__ == "__main__":
    for clock, (ours, bare) in compare(*sys.argv[1:3]).items():
        print(f"{clock}: {1000 * ours:.0f} ms against {1000 * bare:.0f} ms, ratio {ours / bare:.2f}")
