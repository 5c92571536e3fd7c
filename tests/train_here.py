# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A run of `phase15 train` in this process, for tests."""

from phase15.commands import training_run
from phase15.training.runs import TrainingRun
from phase15.training.trainer import Phase15Trainer


def prepare(argv: list[str]) -> tuple[Phase15Trainer, TrainingRun]:
    """Returns what `training_run.train` takes."""
    run = TrainingRun.parse(argv)
    return training_run.prepare(run), run


def parse(argv: list[str]) -> tuple:
    """Returns the model's, the data's and the training arguments of a command line, and the recipe that repeats it."""
    run = TrainingRun.parse(argv)
    return run.model, run.data, run.training, run.recipe
