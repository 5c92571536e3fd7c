# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The arguments of `phase15 train`: dataclasses with their checks. Imports no torch, which takes seconds, so that
`--help` and a wrong flag answer at once; runs.py adds transformers' TrainingArguments.
"""

import importlib.util
import re
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path

from phase15.cli.arguments import Phase15Parser, argument_names, check_choice, check_dtype, check_least
from phase15.cli.errors import did_you_mean
from phase15.data.facts import FactsArguments


STAGES = ["hypernet", "full", "lora"]
# The stage that each belongs to.
BASELINES = {
    "window": "full",
    "full_context": "full",
    "prompt_tuning": "hypernet",
    "lora": "hypernet",
}


@dataclass
class Phase15ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The base LLM (Hub id, folder or .gguf file), or a Phase15 model to go on with."},
    )
    after: str | None = field(
        default=None,
        metadata={
            "help": "A recipe to run first, with the same flags, into a folder of its own in output_dir; this run "
            "starts from its model. In a recipe it is a path from the recipe's folder. Not with model_name_or_path."
        },
    )
    base_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of a LlamaConfig: without model_name_or_path, the size of a new Llama and tokenizer."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the weights in training. With --bf16 the computation is in bfloat16."},
    )
    stage: str = field(
        default="full",
        metadata={
            "help": "Trained parts: hypernet (LLM frozen), full (both), lora (HyperNetwork and LoRA on the LLM).",
            "choices": STAGES,
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Train a baseline instead. Of stage full: window (the LLM with the sliding window, "
            "Δ = 0) or full_context (the LLM as an ordinary causal LM). Of hypernet: prompt_tuning (num_soft_tokens "
            "virtual tokens, at learning_rate) or lora, both by PEFT with the full context.",
            "choices": list(BASELINES),
            "aliases": ["--rival"],  # its name before 2026-11-26
        },
    )
    distill: str | None = field(
        default=None,
        metadata={
            "help": "A teacher with full context (Hub id, folder or .gguf file; of a Phase15 model its LLM), for the "
            "model and for baseline window."
        },
    )
    distill_share: float = field(default=0.7, metadata={"help": "Weight of the teacher's loss, 0 to 1."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Divisor of the logits of teacher and student."})
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA, divided by lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA, 0 to 1."})
    save_only_hypernet: bool | None = field(
        default=None,
        metadata={
            "help": "Save the HyperNetwork without its base, which loading fetches, in checkpoints too. Default: in "
            "stage hypernet, if it starts from a base."
        },
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapter."})
    num_soft_tokens: int | None = field(default=None, metadata={"help": "Slots of the soft prompt."})
    num_sink_tokens: int | None = field(default=None, metadata={"help": "Slots that keep the first tokens."})
    chunk_length: int | None = field(default=None, metadata={"help": "Answer tokens between two steps."})
    max_query_length: int | None = field(default=None, metadata={"help": "Maximum query tokens of a step."})
    max_answer_length: int | None = field(default=None, metadata={"help": "Maximum answer length, in tokens."})
    hypernet_hidden_size: int | None = field(default=None, metadata={"help": "Width of the HyperNetwork."})
    hypernet_num_hidden_layers: int | None = field(default=None, metadata={"help": "Blocks of the HyperNetwork."})
    hypernet_num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of a block."})
    hypernet_intermediate_size: int | None = field(default=None, metadata={"help": "Width of a block's MLP."})
    hypernet_type: str | None = field(
        default=None, metadata={"help": "Name of a registered HyperNetwork: docs/hypernetworks.md."}
    )
    hypernet_file: str | None = field(
        default=None,
        metadata={"help": "Python file that registers hypernet_type. It is run, and saved with the model."},
    )
    hypernet_slot_gate: bool | None = field(
        default=None, metadata={"help": "Add a gate that all channels of a slot share."}
    )
    hypernet_reads_layers: int | None = field(
        default=None, metadata={"help": "Number of the LLM's first layers whose hidden states the HyperNetwork reads."}
    )
    hypernet_signed_alpha: bool | None = field(
        default=None, metadata={"help": "Use the sign of α. Only for weights trained before 2026-11-27."}
    )

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_dtype(self.dtype)
        self.check_distill()
        if self.save_only_hypernet and (self.stage != "hypernet" or self.baseline):
            raise ValueError("`save_only_hypernet` is for stage hypernet, in which the base does not change.")
        if self.baseline is None:
            return
        check_choice("baseline", self.baseline, list(BASELINES))
        if self.stage != BASELINES[self.baseline]:
            raise ValueError(
                f"`baseline` is {self.baseline}, which goes with stage {BASELINES[self.baseline]}, but `stage` is "
                f"{self.stage}."
            )
        if self.merge_adapter:
            raise ValueError("`merge_adapter` is for stage lora; the adapter of a baseline is saved unmerged.")

    def check_distill(self):
        if not 0 <= self.distill_share <= 1:
            raise ValueError(f"`distill_share` is {self.distill_share}, but it must be from 0 to 1.")
        if not 0 < self.distill_temperature < float("inf"):
            raise ValueError(f"`distill_temperature` is {self.distill_temperature}, but it must be above 0.")
        if self.distill and self.baseline not in (None, "window"):
            raise ValueError(
                f"`distill` is {self.distill}, but `baseline` is {self.baseline}; a teacher is for the model and for "
                "baseline window."
            )

    @property
    def config_fields(self) -> dict:
        """Returns the fields of [`Phase15Config`] that are set."""
        from phase15.model.configuration_phase15 import Phase15Config  # imports torch

        names = [f.name for f in fields(self) if f.name in Phase15Config.__annotations__]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class Phase15DataArguments(FactsArguments):
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "JSONL, JSON, CSV or Parquet files, a Hub id, facts, or python-docstrings."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub data set to train on."})
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the records, from the end, held out for validation, 0 to 1."}
    )
    max_validation_records: int | None = field(
        default=None,
        metadata={"help": "Maximum number of validation records. A stream validates on its first N records."},
    )
    shuffle_records: bool = field(
        default=False,
        metadata={"help": "Shuffle the records before the split; of a stream, those to train on, in a buffer."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the records during training, in their order and pass after pass, instead of before it: for "
            "files ('data/*.jsonl') and Hub data sets that do not fit into memory. Needs max_steps and "
            "max_validation_records."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"`validation_split` is {self.validation_split}, but it must be from 0 to below 1.")
        check_least(self, {"max_validation_records": 0})


@dataclass
class Phase15TrainingFields:
    """The fields that Phase15 adds to transformers' TrainingArguments, or whose default differs."""

    learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the HyperNetwork, or of prompt tuning."}
    )
    llm_learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of the LLM, or of its LoRA."})
    alpha_learning_rate: float = field(
        default=1e-2,
        metadata={
            "help": "Learning rate of α, which scales Δ and starts at zero. At smaller rates it stays near zero."
        },
    )
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Stop the gradient through the recursion every N chunks."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "torch.compile the layers of LLM and HyperNetwork (torch_compile: all)."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished run in output_dir."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator selects the columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every step uses all of them."})


RECIPE = "recipe"  # the word that is not a flag
DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"


def add_recipe(parser: Phase15Parser) -> Phase15Parser:
    parser.add_argument(RECIPE, nargs="?", help="a YAML file with values for the flags below")
    parser.add_argument("--config", help=f"the same as {RECIPE}")
    return parser


def library_names() -> list[str]:
    """Returns the names of transformers' TrainingArguments, read from its file, as the import takes seconds."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    source = Path(folder, "training_args.py").read_text("utf-8")
    body = source.partition("class TrainingArguments")[2].partition("    def ")[0]
    return re.findall(r"^    ([a-z]\w*): ", body, re.MULTILINE)


def print_help(program: str, doc: str):
    """Prints our flags in full, and the names of those that transformers documents."""
    types = (Phase15ModelArguments, Phase15DataArguments, Phase15TrainingFields)
    parser = add_recipe(Phase15Parser(types, program, doc, RECIPE))
    ours = argument_names(parser)
    others = [f"--{name}" for name in library_names() if name not in ours]
    print(parser.format_help())
    print(f"flags of transformers' TrainingArguments ({DOCS}):")
    print(textwrap.fill(" ".join(others), 118, initial_indent="  ", subsequent_indent="  "))


def check_names(argv: list[str]):
    """
    Raises a ValueError for an unknown flag, before torch is imported. Only names are compared, as the parser that
    reads values needs transformers' TrainingArguments. That parser reports unknown flags too.
    """
    library = library_names()
    if not library:
        return
    types = (Phase15ModelArguments, Phase15DataArguments, Phase15TrainingFields)
    names = [f.name for cls in types for f in fields(cls)] + library
    flags = {*names, *(f"no_{name}" for name in names), "config", "rival", "help"}
    for word in argv:
        name = word.partition("=")[0][2:].replace("-", "_")
        if word.startswith("--") and not any(flag.startswith(name) for flag in flags):  # argparse takes a prefix
            raise ValueError(f"unrecognized arguments: {word}{did_you_mean(name, names)}")


__all__ = [
    "BASELINES",
    "RECIPE",
    "Phase15DataArguments",
    "Phase15ModelArguments",
    "Phase15TrainingFields",
    "add_recipe",
    "check_names",
    "library_names",
    "print_help",
]
