# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a run: dataclasses with their checks, recipes, and the parser of both."""

import os
from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from accelerate import DistributedType
from transformers import (
    HfArgumentParser,
    TrainingArguments,
)

from phase15.cli.arguments import Phase15Parser, argument_names, check_choice, check_dtype, check_least
from phase15.cli.files import check_output_dir, read_yaml
from phase15.cli.help import did_you_mean
from phase15.data.facts import FactsArguments
from phase15.model.configuration_phase15 import Phase15Config


QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
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
    dtype: str = field(default="float32", metadata={"help": "Of the weights in training; use bf16 to compute in it."})
    stage: str = field(
        default="full",
        metadata={
            "help": "What is trained: hypernet (LLM frozen), full (both), lora (HyperNetwork and LoRA on the LLM).",
            "choices": STAGES,
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Train a baseline instead. Of stage full: window (the LLM behind the sliding window, "
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
    distill_share: float = field(default=0.7, metadata={"help": "Share of the loss that is the teacher's."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both."})
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapter."})
    num_soft_tokens: int | None = field(default=None, metadata={"help": "These sizes: see Phase15Config."})
    num_sink_tokens: int | None = None
    chunk_length: int | None = None
    max_query_length: int | None = None
    max_answer_length: int | None = None
    hypernet_hidden_size: int | None = None
    hypernet_num_hidden_layers: int | None = None
    hypernet_num_attention_heads: int | None = None
    hypernet_intermediate_size: int | None = None
    hypernet_slot_gate: bool | None = None
    hypernet_reads_layers: int | None = None
    hypernet_signed_alpha: bool | None = None

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_dtype(self.dtype)
        self.check_distill()
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
        """The fields of [`Phase15Config`] that were given."""
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
        default=0.1, metadata={"help": "Share of the records, the last ones, held out to validate."}
    )
    max_validation_records: int | None = field(
        default=None,
        metadata={"help": "Validate on at most so many of them; of a stream, on the first so many."},
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


METRICS = ("loss", "delta_share", "target_tokens_per_second", "runtime", "samples_per_second", "steps_per_second")
CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}


@dataclass
class Phase15TrainingArguments(TrainingArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the HyperNetwork, or of prompt tuning."})
    llm_learning_rate: float = field(default=3e-5, metadata={"help": "Of the LLM, or of its LoRA."})
    alpha_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Of α, which scales Δ and starts at zero: at other rates it would stay there."},
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
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator selects the columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every step uses all of them."})

    def __post_init__(self):
        """Checks values that the libraries would refuse only after the start of the run, or not at all."""
        least = dict.fromkeys(("learning_rate", "llm_learning_rate", "alpha_learning_rate"), 0)
        least |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1)
        check_least(self, least | {"gradient_accumulation_steps": 1, "bptt_chunks": 1})
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}, but it must be above 0.")
        if unknown := set(self.gradient_checkpointing_kwargs or {}) - CHECKPOINTING:
            raise ValueError(f"`gradient_checkpointing_kwargs` has {sorted(unknown)[0]!r}, which torch does not know.")
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in METRICS and not metric.startswith("loss_chunk_"):
            raise ValueError(f"`metric_for_best_model` is {metric!r}, but it must be one of {', '.join(METRICS)}.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` is not supported: the model computes the loss of its chunks.")
        if self.use_liger_kernel:
            raise ValueError("`use_liger_kernel` is not supported: Liger knows no Phase15 model.")
        if self.push_to_hub:
            raise ValueError(
                "`push_to_hub` would upload the arguments as a pickle, the token among them; when the run has ended: "
                f"python push_to_hub.py --model_dir {self.output_dir} --repo_id USER/NAME."
            )
        if self.output_dir is not None:
            check_output_dir(self.output_dir)
        checkpoint = self.resume_from_checkpoint
        if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint` is {checkpoint}, but that is no folder of a checkpoint.")
        try:
            super().__post_init__()
        except TypeError as error:  # unknown fields of `accelerator_config`, for example
            raise ValueError(f"the training arguments do not fit together: {error}") from error


def parse_args(
    argv: list[str],
) -> tuple[Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments, dict]:
    """
    Arguments of a run: a recipe, `recipes/NAME.yaml` or `--config recipes/NAME.yaml`, then flags that override it.
    The recipe is the quickstart when there is neither a recipe nor a model or data set.

    Returns:
        the arguments, and the recipe that repeats them: all values that are not the defaults.

    Raises:
        ValueError: for a recipe that is missing or not a mapping, or for a key of it that does not exist.
    """
    parser, arguments, defaults = read_arguments(argv)
    if arguments.after and arguments.model_name_or_path is None:
        arguments.model_name_or_path = str(folder_before(arguments))
    outputs = []
    for cls in parser.dataclass_types:
        outputs.append(cls(**{f.name: getattr(arguments, f.name) for f in fields(cls) if f.init}))
    # a token is private; what `after` names has run when the recipe is run again
    not_in_recipe = ("recipe", "config", "hub_token", "after")
    recipe = {name: value for name, value in vars(arguments).items() if value != defaults[name]}
    return *outputs, {name: value for name, value in recipe.items() if name not in not_in_recipe}


def read_arguments(argv: list[str]) -> tuple["Phase15Parser", Namespace, dict]:
    """The parser, what it reads from the recipe and the flags, and the defaults without them."""
    parser = Phase15Parser((Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments))
    parser.add_argument("recipe", nargs="?", help="a YAML file with values for the flags below")
    parser.add_argument("--config", help="the same as recipe")
    defaults = vars(parser.parse_args([]))
    known, unknown = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    if unknown:  # first: the value of a misspelt flag would be taken for the recipe
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    recipe = known.recipe or known.config
    if recipe is None and known.model_name_or_path is None and known.dataset_name is None:
        recipe = QUICKSTART
    if recipe is not None:
        values = read_recipe(recipe, parser)
        if known.dataset_name not in (None, values.get("dataset_name")):  # these parts are of the recipe's data set
            values = {k: v for k, v in values.items() if k not in ("dataset_config", "dataset_train_split")}
        parser.set_defaults(**values)
        try:
            parser.parse_args([])
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from error
    return parser, parser.parse_args(argv), defaults


# What makes the run that it is: not handed on to the run before it.
OWN_FLAGS = {
    "after",
    "baseline",
    "config",
    "distill",
    "merge_adapter",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "rival",
    "stage",
}


def argv_before(argv: list[str]) -> list[str] | None:
    """
    The arguments of the run that `after` asks for before this one: its recipe and the flags of this run. None without
    `after`, or where `model_name_or_path` says what to start from.
    """
    _, arguments, _ = read_arguments(argv)
    if not arguments.after or arguments.model_name_or_path is not None:
        return None
    kept, is_kept = [], True
    for word in argv:
        if word.startswith("--"):
            is_kept = word[2:].partition("=")[0].replace("-", "_") not in OWN_FLAGS
        if is_kept and word != arguments.recipe:
            kept.append(word)
    return [arguments.after, *kept, "--output_dir", str(folder_before(arguments)), "--overwrite_output_dir", "true"]


def folder_before(arguments: Namespace) -> Path:
    """Where the run of `after` leaves its model."""
    return Path(arguments.output_dir, Path(arguments.after).stem)


def read_recipe(path: str | Path, parser: HfArgumentParser) -> dict:
    """The values of a recipe, as strings that argparse checks like flags."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such recipe.")
    documents = read_yaml(Path(path))
    values = documents[0] if len(documents) == 1 else documents
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flags to values, not a {type(values).__name__}.")
    if "rival" in values:  # its name before 2026-11-26
        values["baseline"] = values.pop("rival")
    if isinstance(values.get("after"), str):
        values["after"] = str(Path(path).parent / values["after"])
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
            values[name] = str(value)
    return values


def check_together(
    model_args: Phase15ModelArguments, data_args: Phase15DataArguments, training_args: Phase15TrainingArguments
):
    """Refuses arguments that do not go together."""
    start, output_dir = model_args.model_name_or_path, training_args.output_dir
    if start is not None and Path(start).exists() and Path(start).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"`output_dir` is {output_dir}, the folder of `model_name_or_path`, which the run would overwrite; give "
            "another."
        )
    if data_args.dataset_name is None:
        raise ValueError(
            "`dataset_name` is missing: a JSONL, JSON, CSV or Parquet file, a Hub id, facts, or python-docstrings."
        )
    if data_args.streaming:
        check_streaming(model_args, data_args, training_args)
        if training_args.accelerator_config.dispatch_batches is None:
            # or the main process would join the batches of all, and fail where their widths differ
            training_args.accelerator_config.dispatch_batches = False
    check_processes(model_args, training_args)


def check_streaming(
    model_args: Phase15ModelArguments, data_args: Phase15DataArguments, training_args: Phase15TrainingArguments
):
    """Refuses arguments that need all records at once."""
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
    """Refuses launches whose processes would not train together."""
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


__all__ = ["Phase15ModelArguments", "Phase15TrainingArguments", "argv_before", "check_together", "parse_args"]
