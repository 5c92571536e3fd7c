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

R with shuffled Δ is the part that a static prompt could give too. Only the rest was carried.

`phase15 train` ends with these rows. This command adds the untrained base, baselines that were fine-tuned on
their own, free-running R, and exact match where answers end in `#### 72`. It writes evaluation.json and the picture.

    phase15 eval --model_dir DIR --dataset gsm8k_train.jsonl
    phase15 eval --model_dir DIR --dataset gsm8k_train.jsonl --base BASE --baselines WINDOW LORA
    phase15 eval --model_dir DIR --dataset facts --facts_distances 0 512 4096     right answers
    phase15 eval --help                             every flag

**Free-running**: the model answers each query greedily, without an end token. Chunk c of the *reference* is then
scored after the query and the first c chunks of that answer. The targets and their context are the same for the
model, for Δ = 0 and for full context.
"""

from dataclasses import dataclass, field

from phase15.cli.arguments import check_dtype, parse_flags
from phase15.cli.errors import one_line_errors
from phase15.cli.files import check_output_dir
from phase15.data.facts import FACTS, FactsArguments


@dataclass
class EvaluationArguments:
    model_dir: str = field(metadata={"help": "Folder of a Phase15 model, as `phase15 train` leaves it."})
    dataset: str = field(metadata={"help": "Data set, as `--dataset_name` of `phase15 train`."})
    base: str | None = field(
        default=None, metadata={"help": "The untrained base (Hub id, folder or .gguf file); adapters go on it too."}
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of models trained on the same records: Phase15, causal LM or PEFT adapter.",
            "aliases": ["--rivals"],  # its name before 2026-11-26
        },
    )
    validation_split: float | None = field(
        default=None,
        metadata={"help": "Share of the records, from the end, to evaluate; default: that of the run, else 0.1."},
    )
    max_records: int | None = field(
        default=None, metadata={"help": "Evaluate up to N of them; default: as in the run."}
    )
    shuffle_records: bool | None = field(
        default=None, metadata={"help": "Shuffle the records before they are split; default: as in the run."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the shuffling and the bootstrap; default: that of the run, else 42."}
    )
    chunk_length: int | None = field(
        default=None, metadata={"help": "Tokens of a chunk, in every row; default: as in `generate`."}
    )
    batch_size: int = field(default=8, metadata={"help": "Records at a time."})
    generated_records: int = field(default=32, metadata={"help": "Generate answers to the first N records."})
    facts_distances: list[int] = field(
        default_factory=list,
        metadata={"help": "Data set facts: words between facts and questions; default: those of the run."},
    )
    facts_text: str | None = field(
        default=None, metadata={"help": "Data set facts: the text in between; default: that of the run."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of these answers, in tokens."})
    bootstrap_samples: int = field(default=10_000, metadata={"help": "Bootstrap samples of each interval."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the weights."})
    device: str | None = field(default=None, metadata={"help": "Where to compute; cuda if there is one, else cpu."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the figures and the picture; default: model_dir."}
    )

    def __post_init__(self):
        for name, minimum in {
            "batch_size": 1,
            "generated_records": 0,
            "max_new_tokens": 1,
            "bootstrap_samples": 1,
        }.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be {minimum} or more.")
        if self.dataset == FACTS:
            FactsArguments(facts_distances=self.facts_distances or [0])
            if self.generated_records < 2 or self.base or self.baselines:
                raise ValueError("facts are asked for in 2 `generated_records` or more, without base and baselines.")
        check_dtype(self.dtype)
        if self.output_dir:
            check_output_dir(self.output_dir)


def main(argv: list[str] | None = None, program: str = "phase15 eval"):
    with one_line_errors(program):
        args = parse_flags(EvaluationArguments, program, __doc__, argv)
        from phase15.commands.evaluation_run import evaluate  # imports torch: seconds

        evaluate(args)


__all__ = ["EvaluationArguments", "main"]
