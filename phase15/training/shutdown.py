# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The ends of a run: at the next step on SIGTERM or Ctrl-C, and on all processes together."""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from phase15.cli.errors import INPUT_ERRORS, line_of, print_any_text
from phase15.training.checkpoints import describe_restart


class Stopped(KeyboardInterrupt):
    """Ends a run outside of training, where no step can be lost."""


class StopOnSignal(TrainerCallback):
    """
    Ends a run on SIGTERM or Ctrl-C. During training it ends after the current step (or evaluation, or checkpoint),
    with a checkpoint, and on all processes at the same step. Before and after training it ends at once, as it does on
    a second Ctrl-C.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.process = os.getpid()
        self.signal: str | None = None  # received by this process
        self.is_training = False
        self.has_stopped = False  # agreed by all processes
        self.saved_step: int | None = None

    def __enter__(self):
        self.trainer.add_callback(self)
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.trainer.remove_callback(self)
        if kind in (Stopped, KeyboardInterrupt) and self.trainer.is_world_process_zero():
            print(self.report(), flush=True)
        return kind is Stopped

    def handle(self, number, frame):
        if os.getpid() != self.process:  # a data loader's worker, which ends with the run
            return
        is_second = self.signal is not None
        self.signal = signal.Signals(number).name
        if not self.is_training:
            raise Stopped
        if is_second and number == signal.SIGINT:
            raise KeyboardInterrupt

    def report(self) -> str:
        after = f" after step {self.trainer.state.global_step}" if self.has_stopped else ""
        return (
            f"Stopped by {self.signal or 'a signal'}{after}. The same command "
            f"{describe_restart(Path(self.trainer.args.output_dir))}."
        )

    def agree(self) -> bool:
        """Returns `True` if any process has received a signal. All processes must call this."""
        accelerator = self.trainer.accelerator
        is_signalled = self.signal is not None
        if accelerator.num_processes > 1 and not self.has_stopped:
            signalled = torch.tensor(float(is_signalled), device=accelerator.device)
            is_signalled = bool(accelerator.reduce(signalled, "sum"))
        self.has_stopped = self.has_stopped or is_signalled
        return self.has_stopped

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.agree():
            control.should_training_stop = True
            # at the end of an epoch, `on_epoch_end` saves after the evaluation
            control.should_save |= state.epoch % 1 > 0 or args.save_strategy == SaveStrategy.BEST

    def on_evaluate(self, args, state, control, **kwargs):
        if self.is_training and self.agree():
            control.should_training_stop = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        control.should_training_stop = self.agree() or control.should_training_stop

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.has_stopped:
            control.should_save = self.saved_step != state.global_step
            if state.epoch % 1 > 0:  # in the middle of an epoch; Trainer calls it the end
                control.should_log = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False


@contextmanager
def errors_together(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Ends all processes with one line if one of them has an error of some kinds, by default `INPUT_ERRORS`."""
    caught = kinds or INPUT_ERRORS
    problem = None
    print_any_text()
    try:
        yield
    except caught as error:
        problem = f"{program}: {line_of(error)}"
    stop_together(problem)


def stop_together(problem: str | None):
    """Ends all processes if one has a problem. If several have the same one, only the first prints it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if problem:
            raise SystemExit(problem)
        return
    if not torch.distributed.is_initialized():  # a problem in the arguments
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
    problems = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if problem and problem not in problems[: torch.distributed.get_rank()]:
        print(problem, file=sys.stderr, flush=True)
    if any(problems):
        torch.distributed.barrier()  # the launcher kills the others when the first leaves
        raise SystemExit(1)


def leave():
    """
    Ends one of several processes without tearing down its interpreter. The threads of a process group outlive the
    group while anything refers to it, as FSDP's meshes do. A thread that then frees a tensor aborts the process
    (https://github.com/pytorch/pytorch/pull/179291), and the launcher reports a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


__all__ = ["StopOnSignal", "errors_together", "leave"]
