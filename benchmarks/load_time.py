# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Time of `from_pretrained`: a Phase15 folder against its bare base, interleaved in one process, files in the page cache.

    python benchmarks/load_time.py PHASE15_DIR BASE_DIR
"""

import gc
import statistics
import sys
import time

from transformers import AutoModelForCausalLM


def seconds(folder: str) -> float:
    """Of one load, without garbage collection, as `timeit` measures."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def rounds(phase15: str, base: str, repeats: int = 30) -> list[tuple[float, float]]:
    """Seconds of both, in turn, each first in every second round."""
    times = []
    for index in range(repeats + 1):
        order = (phase15, base) if index % 2 else (base, phase15)
        measured = {folder: seconds(folder) for folder in order}
        times.append((measured[phase15], measured[base]))
    return times[1:]  # the first round imports


if __name__ == "__main__":
    ours, bare = zip(*rounds(*sys.argv[1:3]), strict=True)
    for name, statistic in (("median", statistics.median), ("fastest", min)):
        a, b = statistic(ours), statistic(bare)
        print(f"{name}: {1000 * a:.0f} ms against {1000 * b:.0f} ms, ratio {a / b:.2f}")
