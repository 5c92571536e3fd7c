# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
What `benchmarks/recovery_gpu.sh` has measured so far, as one table and one picture.

    python -m benchmarks.recovery outputs/recovery
"""

import argparse
import json
import re
from pathlib import Path

from phase15.cli.files import write_text
from phase15.evaluation.losses import (
    BASELINE_FULL_CONTEXT,
    BASELINE_WINDOW,
    FULL_CONTEXT,
    MODEL,
    OWN_BASELINES,
    SAME_LLM,
    WINDOW,
    label,
)
from phase15.evaluation.plots import picture


def evaluations(folder: Path) -> dict[str, dict]:
    """The evaluation.json of each model that was compared, by its folder's name, the smallest soft prompt first."""
    found = sorted(folder.glob("*/evaluation.json"), key=lambda path: (num_slots(path.parent), path.parent.name))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def num_slots(folder: Path) -> int:
    return int(re.search(r"\d+$", folder.name)[0])


def recovery(result: dict | None) -> str:
    if result is None:
        return ""
    if result["recovery"] is None:
        return "undefined"
    low, high = result["interval"]
    return f"{result['recovery']:.1%} [{low:.1%}, {high:.1%}]"


def recovery_table(found: dict[str, dict]) -> str:
    """Losses in nats per answer token, and R against the baselines and within the model's own LLM."""
    rows = (MODEL, WINDOW, FULL_CONTEXT, BASELINE_WINDOW, BASELINE_FULL_CONTEXT)
    header = ["model", *map(label, rows), "R against the baselines", "R within its LLM"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, results in found.items():
        losses = [results["validation"].get(row) for row in rows]
        cells = [name, *(f"{loss['loss']:.4f}" if loss else "" for loss in losses)]
        cells += [recovery(results["context_recovery"].get(kind)) for kind in (OWN_BASELINES, SAME_LLM)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_losses(found: dict[str, dict], path: Path):
    """Draws the loss by chunk index of each model and, dashed, of its window into a picture file."""
    with picture(path) as axes:
        for name, results in found.items():
            rows = results["validation"]
            (line,) = axes.plot(rows[MODEL]["loss_by_chunk"], marker="o", markersize=3, label=name)
            window = rows.get(BASELINE_WINDOW, rows[WINDOW])
            axes.plot(window["loss_by_chunk"], "--", color=line.get_color())
        full = [
            r["validation"][BASELINE_FULL_CONTEXT] for r in found.values() if BASELINE_FULL_CONTEXT in r["validation"]
        ]
        if full:  # the same model for all
            axes.plot(full[0]["loss_by_chunk"], color="black", label=label(BASELINE_FULL_CONTEXT))
        axes.set(xlabel="chunk index", ylabel="nats per answer token", title="dashed: the window")
        axes.legend()


def main(argv: list[str] | None = None, program: str = "benchmarks.recovery"):
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what benchmarks/recovery_gpu.sh writes")
    folder = parser.parse_args(argv).folder
    results = evaluations(folder)
    if not results:
        raise SystemExit(f"{folder}: no evaluation.json in any folder of it.")
    text = recovery_table(results)
    print(f"\n{text}\n")
    write_text(folder / "recovery.md", f"{text}\n")
    plot_losses(results, folder / "recovery.png")


if __name__ == "__main__":
    main()


__all__ = ["evaluations", "main", "plot_losses", "recovery_table"]
