# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `phase15 eval`. Imports no torch, which takes seconds, so that `--help` answers at once."""

from dataclasses import dataclass, field

from phase15.cli.arguments import check_dtype
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
        metadata={"help": "Share of the records, from the end, to evaluate; default: as in the run, else 1."},
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
    picture: str | None = field(
        default=None,
        metadata={"help": "Picture file, as .png, .pdf or another format of matplotlib; default: in output_dir."},
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


__all__ = ["EvaluationArguments"]
