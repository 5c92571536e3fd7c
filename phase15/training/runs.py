# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A run of `phase15 train` as it was asked for: a recipe and flags, parsed once, and checked together."""

import os
from argparse import Namespace
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from accelerate import DistributedType
from transformers import TrainingArguments

from phase15.cli.arguments import Phase15Parser, argument_names, check_least
from phase15.cli.errors import did_you_mean
from phase15.cli.files import check_output_dir, read_yaml
from phase15.training.arguments import (
    RECIPE,
    Phase15DataArguments,
    Phase15ModelArguments,
    Phase15TrainingFields,
    add_recipe,
)


# In a wheel the recipes lie in the package, in a checkout beside it.
PACKAGE = Path(__file__).parents[1]
RECIPES = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())
QUICKSTART = RECIPES / "quickstart.yaml"
METRICS = ("loss", "delta_share", "target_tokens_per_second", "runtime", "samples_per_second", "steps_per_second")
CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}


@dataclass
class Phase15TrainingArguments(Phase15TrainingFields, TrainingArguments):
    def __post_init__(self):
        """Checks values that the libraries would refuse only after the start of the run, or not at all."""
        least = dict.fromkeys(("learning_rate", "llm_learning_rate", "alpha_learning_rate"), 0)
        least |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1)
        check_least(self, least | {"gradient_accumulation_steps": 1, "bptt_chunks": 1})
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}, but it must be above 0.")
        unknown = set(self.gradient_checkpointing_kwargs or {}) - CHECKPOINTING
        if unknown:
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
            raise ValueError(f"`resume_from_checkpoint` is {checkpoint}, but that is not the folder of a checkpoint.")
        try:
            super().__post_init__()
        except TypeError as error:  # unknown fields of `accelerator_config`, for example
            raise ValueError(f"the training arguments do not fit together: {error}") from error


# Flags of one run, which the run of `after` does not inherit.
OWN_FLAGS = {
    "after",
    "baseline",
    "distill",
    "merge_adapter",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "stage",
}
# Left out of the recipe of a run: a token is private, and what `after` names has run when the recipe is run again.
NOT_IN_RECIPE = {"hub_token", "after"}
NOT_GIVEN = object()


class RunParser:
    """Parses the flags of a command line and the values of recipes, each text once."""

    def __init__(self, program: str = "phase15 train"):
        types = (Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments)
        self.parser = add_recipe(Phase15Parser(types, program))
        self.names = argument_names(self.parser)
        self.hints = {name: hint for cls in types for name, hint in get_type_hints(cls).items()}

    def parse(self, words: list[str]) -> dict[str, Any]:
        """Returns the values that stand in the words of a command line, without defaults."""
        names = [*self.names, RECIPE, "config"]
        # argparse puts a default only where the namespace has no value
        namespace = Namespace(**dict.fromkeys(names, NOT_GIVEN))
        known, unknown = self.parser.parse_known_args(words, namespace)
        if unknown:  # parse_args would take the value of a misspelt flag for the recipe
            self.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return {name: value for name, value in vars(known).items() if value is not NOT_GIVEN}

    def read_recipe(self, path: str | Path) -> dict[str, Any]:
        """
        Returns the values of a recipe, checked like flags.

        Raises:
            ValueError: for a recipe that is missing or not a mapping, for an unknown key or a value of another type.
        """
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
        words = []
        parsed = {}
        for name, value in values.items():
            if name not in self.names:
                raise ValueError(f"{path}: unknown key {name!r}{did_you_mean(name, self.names)}")
            hint = self.hints[name]
            kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
            if isinstance(value, list | dict) or value is None:
                if type(value) not in kinds:
                    kind = "null" if value is None else f"a {type(value).__name__}"
                    raise ValueError(f"{path}: `{name}` is {kind}, but one value was expected.")
                parsed[name] = value  # no flag can give an empty list, null, or a mapping that is not text
            if isinstance(value, list) and value and str not in kinds:
                words += [f"--{name}", *map(str, value)]
            elif name not in parsed:
                words.append(f"--{name}={value}")
        try:
            return parsed | self.parse(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass
class TrainingRun:
    """
    A run: its arguments, the values that they were made of, and the recipe that repeats it, which holds all values
    that are not the defaults.
    """

    path: str | Path | None  # the recipe, if there is one
    model: Phase15ModelArguments
    data: Phase15DataArguments
    training: Phase15TrainingArguments
    values: dict[str, Any]
    flags: dict[str, Any]  # those of `values` that the command line gave

    @classmethod
    def parse(cls, argv: list[str], parser: RunParser | None = None) -> "TrainingRun":
        """
        Returns the run of a command line: a recipe, `recipes/NAME.yaml` or `--config recipes/NAME.yaml`, then flags
        that override it. The recipe is the quickstart if there is neither a recipe nor a model or data set.
        """
        parser = parser or RunParser()
        flags = parser.parse(argv)
        recipes = (flags.pop(RECIPE, None), flags.pop("config", None))
        recipe = recipes[0] or recipes[1]
        if recipe is None and "model_name_or_path" not in flags and "dataset_name" not in flags:
            recipe = QUICKSTART
        return cls.from_recipe(parser, recipe, flags)

    @classmethod
    def from_recipe(cls, parser: RunParser, recipe: str | Path | None, flags: dict[str, Any]) -> "TrainingRun":
        """Returns the run of a recipe, if there is one, and of flags that override it."""
        values = {} if recipe is None else parser.read_recipe(recipe)
        if flags.get("dataset_name") not in (None, values.get("dataset_name")):
            for name in ("dataset_config", "dataset_train_split"):  # parts of the recipe's data set
                values.pop(name, None)
        values |= flags
        if values.get("after") and values.get("model_name_or_path") is None:
            values["model_name_or_path"] = str(folder_before(values))
        else:
            values.pop("after", None)  # the model to start from is given: nothing has to run first
        return cls.from_values(recipe, values, flags)

    @classmethod
    def from_values(cls, path: str | Path | None, values: dict[str, Any], flags: dict[str, Any]) -> "TrainingRun":
        parts = []
        for part in (Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments):
            parts.append(part(**{f.name: values[f.name] for f in fields(part) if f.name in values}))
        return cls(path, *parts, values, flags)

    def renewed(self) -> "TrainingRun":
        """Returns the same run with new arguments. Making them resets accelerate after a run before it."""
        return self.from_values(self.path, self.values, self.flags)

    @property
    def recipe(self) -> dict[str, Any]:
        """The values that are not the defaults, in the order of the flags."""
        recipe = {}
        for f in (f for part in (self.model, self.data, self.training) for f in fields(part)):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name in self.values and f.name not in NOT_IN_RECIPE and self.values[f.name] != default:
                recipe[f.name] = self.values[f.name]
        return recipe

    def run_before(self, parser: RunParser) -> "TrainingRun | None":
        """Returns the run that `after` asks for before this one: its recipe, with the flags of this run."""
        if not self.values.get("after"):
            return None
        flags = {name: value for name, value in self.flags.items() if name not in OWN_FLAGS}
        flags |= {"output_dir": self.values["model_name_or_path"], "overwrite_output_dir": True}
        return self.from_recipe(parser, self.values["after"], flags)


def folder_before(values: dict[str, Any]) -> Path:
    """Returns the folder of the run that `after` names."""
    return Path(values.get("output_dir") or "trainer_output", Path(values["after"]).stem)


def check_together(
    model_args: Phase15ModelArguments, data_args: Phase15DataArguments, training_args: Phase15TrainingArguments
):
    """Refuses arguments that do not go together."""
    start = model_args.model_name_or_path
    output_dir = training_args.output_dir
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


__all__ = ["Phase15TrainingArguments", "RunParser", "TrainingRun", "check_together"]
