# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tables in Markdown, and plots."""

from contextlib import contextmanager
from pathlib import Path

from phase15.evaluation.losses import FIRST_SOFT_PROMPT, SHUFFLED_DELTA, SHUFFLED_SOFT_PROMPT, label


def plot_recall(distances: list[dict], path: str | Path):
    """Draws the share of right answers by distance into a picture file, without the shuffled control."""
    with picture(path) as axes:
        for name in distances[0]["rows"]:
            if name != SHUFFLED_DELTA:
                rows, words = [at["rows"][name] for at in distances], [at["distance"] for at in distances]
                (line,) = axes.plot(words, [100 * row["right"] for row in rows], marker="o", label=label(name))
                if "completed" in rows[0]:
                    axes.plot(words, [100 * row["completed"] for row in rows], "--", color=line.get_color())
        axes.set_xscale("symlog", base=2, linthresh=32)
        axes.set_xticks([at["distance"] for at in distances], [f"{at['distance']:,}" for at in distances])
        axes.set(xlabel="words between the facts and the questions", ylabel="right answers, %", ylim=(0, 103))
        axes.set_title("dashed: values completed behind the reference's own words", fontsize="small")
        axes.legend()


def plot(results: dict[str, dict], path: str | Path):
    """Draws the loss by chunk index into a picture file, without the two controls that are far above the others."""
    with picture(path) as axes:
        for variant, result in results.items():
            if variant in (FIRST_SOFT_PROMPT, SHUFFLED_SOFT_PROMPT):
                continue
            axes.plot(
                result["loss_by_chunk"],
                marker="o",
                markersize=3,
                label=f"{label(variant)} ({result['loss']:.3f})".replace("$", r"\$"),
            )
        axes.set(xlabel="chunk index", ylabel="nats per answer token", title="Validation loss by chunk")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_training(log_history: list[dict], path: str | Path):
    """Draws the loss and the share of Δ in the soft prompt's norm, by step, into a picture file."""
    logs = [log for log in log_history if "loss" in log and "delta_share" in log]
    evaluations = [log for log in log_history if "eval_loss" in log]
    with picture(path) as axes:
        axes.plot([log["step"] for log in logs], [log["loss"] for log in logs], label="training loss")
        if evaluations:
            steps, losses = [log["step"] for log in evaluations], [log["eval_loss"] for log in evaluations]
            axes.plot(steps, losses, marker="o", label="validation loss")
        axes.set(xlabel="step", ylabel="nats per answer token", title="Training")
        share = axes.twinx()
        share.plot([log["step"] for log in logs], [log["delta_share"] for log in logs], "--", color="grey")
        share.set(ylabel="share of Δ in the soft prompt's norm (dashed)", ylim=(0, None))
        axes.legend(loc="center right")


@contextmanager
def picture(path: str | Path):
    """The axes of a new picture. It is saved when the block ends; equal drawings give equal bytes."""
    import matplotlib  # here, since it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


__all__ = ["picture", "plot", "plot_recall", "plot_training"]
