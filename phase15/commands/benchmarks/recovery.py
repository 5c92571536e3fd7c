# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Makes one table and one picture of all that `benchmarks/recovery_gpu.sh` has measured so far.

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
    display_label,
)
from phase15.evaluation.plots import picture


def evaluations(folder: Path) -> dict[str, dict]:
    """Returns the evaluation.json of each compared model by the name of its folder, smallest soft prompts first."""
    paths = sorted(folder.glob("*/evaluation.json"), key=lambda path: (num_slots(path.parent), path.parent.name))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def num_slots(folder: Path) -> int:
    """Returns the number at the end of a folder's name."""
    return int(re.search(r"\d+$", folder.name)[0])


def recovery(result: dict | None) -> str:
    """Returns R and its interval as text, empty if it was not measured."""
    if result is None:
        return ""
    if result["recovery"] is None:
        return "undefined"
    low, high = result["interval"]
    return f"{result['recovery']:.1%} [{low:.1%}, {high:.1%}]"


def recovery_table(results_by_model: dict[str, dict]) -> str:
    """Returns a table of losses in nats per answer token, and of R against the baselines and within the own LLM."""
    rows = (MODEL, WINDOW, FULL_CONTEXT, BASELINE_WINDOW, BASELINE_FULL_CONTEXT)
    header = ["model", *map(display_label, rows), "R against the baselines", "R within its LLM"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, results in results_by_model.items():
        cells = [name]
        for row in rows:
            losses = results["validation"].get(row)
            cells.append(f"{losses['loss']:.4f}" if losses else "")
        for kind in (OWN_BASELINES, SAME_LLM):
            cells.append(recovery(results["context_recovery"].get(kind)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_losses(results_by_model: dict[str, dict], path: Path):
    """Draws the loss by chunk index of each model and, dashed, of its window into a picture file."""
    full_context = None
    with picture(path) as axes:
        for name, results in results_by_model.items():
            rows = results["validation"]
            (line,) = axes.plot(rows[MODEL]["loss_by_chunk"], marker="o", markersize=3, label=name)
            window = rows.get(BASELINE_WINDOW, rows[WINDOW])
            axes.plot(window["loss_by_chunk"], "--", color=line.get_color())
            full_context = full_context or rows.get(BASELINE_FULL_CONTEXT)  # the same model for all
        if full_context is not None:
            axes.plot(full_context["loss_by_chunk"], color="black", label=display_label(BASELINE_FULL_CONTEXT))
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
