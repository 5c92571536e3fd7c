# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Measures how much the soft prompt carries, and whether the recursion is worth its cost: the loss on the same validation
records, in nats per answer token and by chunk index, of

    the model               as it was trained
    Δ = 0                   its LLM with only the sliding window
    soft prompt at sp_0     every chunk after the query's soft prompt: no recursion
    shuffled soft prompt    chunk c after sp_c of the next record: a negative control
    shuffled Δ              its own window, but the Δ of the next record at every step
    full context            its LLM on the whole query and answer, as an ordinary causal LM

and from them **context recovery**, with 95 % intervals from a bootstrap over the records:

    R = (loss of the window − loss of the model) / (loss of the window − loss of full context)

R with shuffled Δ is the part that a static prompt could give too. Only the rest was carried. The report ends with a
sentence on what Δ is worth, with intervals, and the next command.

`phase15 train` ends with these rows. This command adds the untrained base, baselines that were fine-tuned on
their own, free-running R, and exact match where answers end in `#### 72`. It writes evaluation.json, which keeps one
entry for each data set, and the picture. Of a data set that is not the run's, all records are evaluated.

    phase15 eval --model_dir DIR --dataset gsm8k_train.jsonl
    phase15 eval --model_dir DIR --dataset gsm8k_train.jsonl --base BASE --baselines WINDOW LORA
    phase15 eval --model_dir DIR --dataset facts --facts_distances 0 512 4096     right answers
    phase15 eval --help                             every flag

**Free-running**: the model answers each query greedily, without an end token. Chunk c of the *reference* is then
scored after the query and the first c chunks of that answer. The targets and their context are the same for the
model, for Δ = 0 and for full context.
"""

from phase15.cli.arguments import parse_flags
from phase15.cli.errors import one_line_errors
from phase15.evaluation.arguments import EvaluationArguments


def main(argv: list[str] | None = None, program: str = "phase15 eval"):
    with one_line_errors(program):
        args = parse_flags(EvaluationArguments, program, __doc__, argv)
        from phase15.commands.evaluation_run import evaluate  # imports torch: seconds

        evaluate(args)


__all__ = ["main"]
