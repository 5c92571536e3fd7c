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
            if "right_interval" in rows[0]:  # not in a folder saved before 2026-12-01
                bounds = [[100 * bound for bound in row["right_interval"]] for row in rows]
                draw_band(axes, words, bounds, line.get_color())
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
            (line,) = axes.plot(result["loss_by_chunk"], marker="o", markersize=3, label=label)
            if "interval_by_chunk" in result:  # only an evaluation has intervals
                bounds = result["interval_by_chunk"]
                draw_band(axes, list(range(len(bounds))), bounds, line.get_color())
        only_whole_numbers(axes)
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
        only_whole_numbers(axes)
        axes.set(xlabel="step", ylabel="nats per answer token", title="Training")
        share = axes.twinx()
        share.plot(steps, [log["delta_share"] for log in logs], "--", color="grey")
        share.set(ylabel="share of Δ in the soft prompt's norm (dashed)", ylim=(0, None))
        axes.legend(loc="center right")


def draw_band(axes, positions: list[int], bounds: list[list[float]], color):
    """Draws intervals, one for each position, as a band."""
    lows = [low for low, _ in bounds]
    highs = [high for _, high in bounds]
    axes.fill_between(positions, lows, highs, color=color, alpha=0.15, linewidth=0)


def only_whole_numbers(axes):
    """Keeps the ticks of an axis of steps or chunks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def check_picture(path: str | Path):
    """Raises a ValueError for the name of a picture whose format matplotlib cannot write."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower().removeprefix(".") not in suffixes:
        raise ValueError(f"`picture` is {path}, but it must end in one of: {', '.join(suffixes)}.")


@contextmanager
def picture(path: str | Path):
    """Yields the axes of a new picture, which is saved when the block ends. Equal drawings give equal PNG files."""
    import matplotlib  # here, since it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


__all__ = ["check_picture", "picture", "plot_losses", "plot_recall", "plot_training"]
