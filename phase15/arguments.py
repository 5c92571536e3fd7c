# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a run: dataclasses with their checks, recipes, and the parser of both."""

import difflib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate import DistributedType
from transformers import (
    HfArgumentParser,
    TrainingArguments,
)

from configuration_phase15 import Phase15Config


QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
BASELINES = {
    "window": "full",
    "full_context": "full",
    "prompt_tuning": "hypernet",
    "lora": "hypernet",
}  # of which stage


@dataclass
class Phase15ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The base LLM (Hub id, folder or .gguf file), or a Phase15 model to go on with."},
    )
    base_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of a LlamaConfig: without model_name_or_path, the size of a new Llama and tokenizer."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights in training; use bf16 to compute in it."})
    stage: str = field(
        default="full",
        metadata={
            "help": "What is trained: hypernet (LLM frozen), full (both), lora (HyperNetwork and LoRA on the LLM).",
            "choices": ["hypernet", "full", "lora"],
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Train a baseline instead. Of stage full: window (the LLM behind the sliding window, "
            "Δ = 0) or full_context (the LLM as an ordinary causal LM). Of hypernet: prompt_tuning (num_soft_tokens "
            "virtual tokens, at learning_rate) or lora, both by PEFT with the full context.",
            "choices": list(BASELINES),
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapter."})
    num_soft_tokens: int | None = field(default=None, metadata={"help": "This and what follows: see Phase15Config."})
    num_sink_tokens: int | None = None
    chunk_length: int | None = None
    max_query_length: int | None = None
    max_answer_length: int | None = None
    hypernet_hidden_size: int | None = None
    hypernet_num_hidden_layers: int | None = None
    hypernet_num_attention_heads: int | None = None
    hypernet_intermediate_size: int | None = None

    @property
    def config_fields(self) -> dict:
        """The fields of [`Phase15Config`] that were given."""
        names = [f.name for f in fields(self) if f.name in Phase15Config.__annotations__]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class Phase15DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A JSONL, JSON, CSV or Parquet file, a Hub id, or python-docstrings (see py)."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub data set to train on."})
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the records, the last, kept to validate."}
    )
    max_validation_records: int | None = field(
        default=None,
        metadata={"help": "Validate on so many of them; of a stream, which has no share, on the first so many."},
    )
    shuffle_records: bool = field(
        default=False,
        metadata={"help": "Shuffle the records before they are split; what a stream trains on, within a buffer."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the records while training, in their order and again and again, instead of before it: for "
            "JSONL, CSV or Parquet files ('data/*.jsonl') and Hub data sets that do not fit. Needs max_steps and "
            "max_validation_records."
        },
    )


@dataclass
class Phase15TrainingArguments(TrainingArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the HyperNetwork, or of prompt tuning."})
    llm_learning_rate: float = field(default=3e-5, metadata={"help": "Of the LLM, or of its LoRA."})
    alpha_learning_rate: float = field(
        default=1e-2, metadata={"help": "Of α, which scales Δ and starts at zero: at the others' it would stay there."}
    )
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Stop the gradient through the recursion after every so many chunks."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "torch.compile the layers of LLM and HyperNetwork (torch_compile: all)."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where output_dir holds a finished run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator decides what it needs."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every step uses all of them."})


def parse_args(
    argv: list[str],
) -> tuple[Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments, dict]:
    """
    Arguments of a run: a recipe, `recipes/NAME.yaml` or `--config recipes/NAME.yaml`, then flags that override it.
    The recipe is the quickstart when there is neither a recipe nor a model or data set.

    Returns:
        the arguments, and the recipe that alone would give them: all values that are not the defaults.

    Raises:
        ValueError: for a recipe that is missing or not a mapping, or for a key of it that does not exist.
    """
    parser = Phase15Parser((Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments))
    parser.add_argument("recipe", nargs="?", help="a YAML file with values for the flags below")
    parser.add_argument("--config", help="the same as recipe")
    defaults = vars(parser.parse_args([]))
    known, _ = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    recipe = known.recipe or known.config
    if recipe is None and known.model_name_or_path is None and known.dataset_name is None:
        recipe = QUICKSTART
    if recipe is not None:
        parser.set_defaults(**read_recipe(recipe, parser))
        try:
            parser.parse_args([])
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from error
    arguments = parser.parse_args(argv)
    if arguments.stage not in ("hypernet", "full", "lora"):  # argparse does not check defaults, and so recipes
        raise ValueError(f"`stage` is {arguments.stage!r}, but it must be hypernet, full or lora.")
    check_baseline(arguments)
    check_values(arguments)
    if not 0 <= arguments.validation_split < 1:
        raise ValueError(f"`validation_split` is {arguments.validation_split}, but it must be from 0 to below 1.")
    outputs = []
    for cls in parser.dataclass_types:
        outputs.append(cls(**{f.name: getattr(arguments, f.name) for f in fields(cls) if f.init}))
    not_in_recipe = ("recipe", "config", "hub_token")  # a token is nobody else's business
    recipe = {name: value for name, value in vars(arguments).items() if value != defaults[name]}
    return *outputs, {name: value for name, value in recipe.items() if name not in not_in_recipe}


class Phase15Parser(HfArgumentParser):
    """An `HfArgumentParser` whose errors are a line, without the usage of more than a hundred flags."""

    def error(self, message: str):
        found = re.match(r"unrecognized arguments: --(\w+)", message)
        raise ValueError(message + (did_you_mean(found[1], argument_names(self)) if found else ""))


def argument_names(parser: HfArgumentParser) -> list[str]:
    return [f.name for cls in parser.dataclass_types for f in fields(cls) if f.init]


def did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def read_recipe(path: str | Path, parser: HfArgumentParser) -> dict:
    """The values of a recipe, for argparse to check as those of flags."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such recipe.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flags to values, not a {type(values).__name__}.")
    names = argument_names(parser)
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{path}: unknown key {name!r}{did_you_mean(name, names)}")
        kinds = {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
        if isinstance(value, list | dict) or value is None:
            if type(value) not in kinds:
                kind = "null" if value is None else f"a {type(value).__name__}"
                raise ValueError(f"{path}: `{name}` is {kind}, but one value was expected.")
        else:
            values[name] = str(value)  # which argparse converts, or refuses
    return values


LEAST = {
    "learning_rate": 0,
    "llm_learning_rate": 0,
    "alpha_learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "bptt_chunks": 1,
    "max_validation_records": 0,
}


def check_values(arguments):
    """Refuses values that the libraries would refuse too, but only when the run has begun, or not at all."""
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:  # nan is refused too
            raise ValueError(f"`{name}` is {value}, but it must be {least} or more.")
    if arguments.max_steps < 1 and not arguments.num_train_epochs > 0:
        raise ValueError(f"`num_train_epochs` is {arguments.num_train_epochs}, but it must be above 0.")
    if arguments.push_to_hub:
        raise ValueError(
            "`push_to_hub` would upload the arguments as a pickle, the token among them; when the run has ended: "
            f"python push_to_hub.py --model_dir {arguments.output_dir} --repo_id USER/NAME."
        )
    check_dtype(arguments.dtype)
    if arguments.output_dir is not None:
        check_output_dir(arguments.output_dir)
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` is {checkpoint}, but that is no folder of a checkpoint.")


def check_baseline(args):
    """Refuses a baseline that is none of the stage's."""
    if args.baseline is None:
        return
    if args.baseline not in BASELINES:
        raise ValueError(f"`baseline` is {args.baseline!r}, but it must be {', '.join(BASELINES)}.")
    if args.stage != BASELINES[args.baseline]:
        raise ValueError(
            f"`baseline` is {args.baseline}, which goes with stage {BASELINES[args.baseline]}, but `stage` is "
            f"{args.stage}."
        )
    if args.merge_adapter:
        raise ValueError("`merge_adapter` is for stage lora; a baseline's adapter is saved as it is.")


def check_streaming(
    model_args: Phase15ModelArguments, data_args: Phase15DataArguments, training_args: Phase15TrainingArguments
):
    """Refuses what needs all records at once."""
    if training_args.max_steps < 1:
        raise ValueError("`max_steps` is missing: `streaming` data has no length that could give it.")
    if data_args.validation_split and data_args.max_validation_records is None:
        raise ValueError(
            "`max_validation_records` is missing: `streaming` data has no length to keep a share of. The first so "
            "many records validate; none do with 0."
        )
    if model_args.model_name_or_path is None and model_args.base_config:
        raise ValueError(
            "`base_config` trains a tokenizer on all records, which `streaming` data does not hold at once; give "
            "`model_name_or_path`."
        )
    if training_args.dataloader_num_workers > 1:
        raise ValueError(
            f"`dataloader_num_workers` is {training_args.dataloader_num_workers}, but `streaming` data is read in its "
            "order, by one at most."
        )


def check_processes(model_args: Phase15ModelArguments, training_args: Phase15TrainingArguments):
    """Refuses launches of several processes that would not train together."""
    if training_args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but there is no GPU, and each would train alone; "
            "add --use_cpu to train together on CPUs."
        )
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if training_args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise ValueError("accelerate has no FSDP without GPUs; use recipes/accelerate_ddp.yaml.")
        if model_args.stage == "lora":
            raise ValueError("`stage` is lora, which is not supported under FSDP; use recipes/accelerate_ddp.yaml.")
        if model_args.baseline:
            raise ValueError("`baseline` is not supported under FSDP; use recipes/accelerate_ddp.yaml.")


def check_dtype(name: str):
    if name != "auto" and not getattr(getattr(torch, str(name), None), "is_floating_point", False):
        raise ValueError(f"`dtype` is {name!r}, but it must be float32, bfloat16, float16 or auto.")


def check_output_dir(name: str | Path):
    """Raises an error for a folder that cannot be written to; makes nothing."""
    path = Path(name).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {name}, but {there} is a file.")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` is {name}, but {there} cannot be written to: {error.strerror}.") from error
