# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a run: loss by chunk, recall by distance, and the curve of training."""

from contextlib import contextmanager
from pathlib import Path

from phase15.evaluation.losses import FIRST_SOFT_PROMPT, SHUFFLED_DELTA, SHUFFLED_SOFT_PROMPT, display_label


def plot_recall(distances: list[dict], path: str | Path):
    """Draws the share of right answers by distance into a picture file, without the shuffled control."""
    words = [measured["distance"] for measured in distances]
    with picture(path) as axes:
        for name in distances[0]["rows"]:
            if name == SHUFFLED_DELTA:
                continue
            rows = [measured["rows"][name] for measured in distances]
            right = [100 * row["right"] for row in rows]
            (line,) = axes.plot(words, right, marker="o", label=display_label(name))
            if "completed" in rows[0]:  # not in a folder saved before 2026-11-27
                completed = [100 * row["completed"] for row in rows]
                axes.plot(words, completed, "--", color=line.get_color())
        axes.set_xscale("symlog", base=2, linthresh=32)  # distances are powers of two, and 0
        axes.set_xticks(words, [f"{number:,}" for number in words])
        axes.set(xlabel="words between the facts and the questions", ylabel="right answers, %", ylim=(0, 103))
        axes.set_title("dashed: values completed after the reference's own words", fontsize="small")
        axes.legend()


def plot_losses(results: dict[str, dict], path: str | Path):
    """Draws the loss by chunk index into a picture file, without the two controls that are far above the others."""
    with picture(path) as axes:
        for variant, result in results.items():
            if variant in (FIRST_SOFT_PROMPT, SHUFFLED_SOFT_PROMPT):
                continue
            label = f"{display_label(variant)} ({result['loss']:.3f})".replace("$", r"\$")  # `$` would begin a formula
            axes.plot(result["loss_by_chunk"], marker="o", markersize=3, label=label)
        axes.set(xlabel="chunk index", ylabel="nats per answer token", title="Validation loss by chunk")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_training(log_history: list[dict], path: str | Path):
    """Draws the loss and the share of Δ in the soft prompt's norm, by step, into a picture file."""
    logs = [log for log in log_history if "loss" in log and "delta_share" in log]
    evaluations = [log for log in log_history if "eval_loss" in log]
    steps = [log["step"] for log in logs]
    with picture(path) as axes:
        axes.plot(steps, [log["loss"] for log in logs], label="training loss")
        if evaluations:
            evaluation_steps = [log["step"] for log in evaluations]
            evaluation_losses = [log["eval_loss"] for log in evaluations]
            axes.plot(evaluation_steps, evaluation_losses, marker="o", label="validation loss")
        axes.set(xlabel="step", ylabel="nats per answer token", title="Training")
        share = axes.twinx()
        share.plot(steps, [log["delta_share"] for log in logs], "--", color="grey")
        share.set(ylabel="share of Δ in the soft prompt's norm (dashed)", ylim=(0, None))
        axes.legend(loc="center right")


@contextmanager
def picture(path: str | Path):
    """Yields the axes of a new picture, which is saved when the block ends. Equal drawings give equal bytes."""
    import matplotlib  # here, since it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


__all__ = ["picture", "plot_losses", "plot_recall", "plot_training"]
