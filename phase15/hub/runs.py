# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The files of a run: recipe, results, the records that it held out; and the test of its folder in a new process."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml

from phase15.cli.files import read_yaml, write_text
from phase15.data.facts import FACTS, FactsArguments


HELD_OUT = (  # the settings that decide which records a run holds out
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "validation_split",
    "shuffle_records",
    "seed",
    "streaming",
    "max_validation_records",
)
FACTS_FIELDS = tuple(f.name for f in fields(FactsArguments))  # these decide too, for the data set `facts`
# Settings that may differ when a run resumes, since they do not change a step, or only the number of steps.
MAY_CHANGE = re.compile(
    r"(logging|save|eval|hub|log|report|dataloader(?!_drop_last)|ddp|include|trackio)_.*|output_dir|overwrite_output_dir|run_name|"
    r"resume_from_checkpoint|disable_tqdm|report_to|per_device_eval_batch_size|merge_adapter|use_cpu|compile_layers|"
    r"gradient_checkpointing|activation_checkpointing|accelerator_config|load_best_model_at_end|metric_for_best_model|"
    r"greater_is_better|project|do_.*|torch_empty_cache_steps|skip_memory_metrics|"
    r"hypernet_signed_alpha"  # Phase15Trainer compares it with the checkpoint's own
)
BATCH_DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # as in TrainingArguments
# The keys of results.json and evaluation.json, by their names before 2026-11-26.
OLD_KEYS = {
    "the model": "model",
    "Δ = 0": "window",
    "soft prompt at sp_0": "first_soft_prompt",
    "another record's soft prompt": "shuffled_soft_prompt",
    "another record's Δ": "shuffled_delta",
    "full context": "full_context",
    "the untrained base, full context": "base_full_context",
    "same LLM": "same_llm",
    "same LLM, with another record's Δ": "same_llm_shuffled_delta",
    "same LLM, behind the model's own words": "free_running",
    "rivals fine-tuned on their own": "baselines",
    "own_words": "free_running",
}
OLD_BASELINE_PREFIX = "rival: "
BLOCKS = ("validation", "own_words", "free_running", "context_recovery", "exact_match")  # whose rows have such keys


class Run(NamedTuple):
    """The files that train_sft.py and eval_sft.py left in a folder; empty if they did not run."""

    recipes: list[dict]  # of this run and of those before it, this one first
    results: dict
    evaluation: dict


def held_out_settings(data_args, training_args) -> dict:
    """Returns the settings that decide which records a run holds out, for results.json, without folders of files."""
    settings = {**vars(data_args), "seed": training_args.seed}
    names = HELD_OUT
    if settings["dataset_name"] == FACTS:
        names += FACTS_FIELDS
    for name in ("dataset_name", "facts_text"):
        if name in names and settings[name]:
            settings[name] = Path(settings[name]).name
    return {name: settings[name] for name in names}


def read_held_out(folder: str | Path) -> dict | None:
    """Returns the settings that decided which records a folder's run held out; `None` for a folder without a run."""
    run = read_run(folder)
    if run.results.get("held_out"):
        return run.results["held_out"]
    if run.recipes:
        return infer_held_out(run.recipes[0])
    return None


def infer_held_out(recipe: dict) -> dict:
    """Returns the settings of a run before 2026-11-26, which did not save them, with the defaults of that time."""
    defaults = dict.fromkeys(HELD_OUT)
    defaults |= {"dataset_train_split": "train", "validation_split": 0.1, "seed": 42}
    defaults |= {"shuffle_records": False, "streaming": False}
    settings = {name: recipe.get(name, default) for name, default in defaults.items()}
    settings["dataset_name"] = Path(str(settings["dataset_name"])).name
    return settings


def find_differing_setting(first: dict, second: dict) -> str | None:
    """Returns the first setting by which two runs held out different records, or `None`."""
    ignored = set()
    if not first["shuffle_records"] and FACTS_FIELDS[0] not in first:
        ignored.add("seed")
    if not first["streaming"]:
        ignored.add("max_validation_records")
    for name in HELD_OUT + FACTS_FIELDS:
        if name not in ignored and first.get(name) != second.get(name):
            return name
    return None


def check_same_run(recipe: dict, checkpoint: Path, output_dir: Path, processes: int):
    """
    Raises a ValueError if a checkpoint is of a run with another recipe, unless what differs changes none of its steps.
    A larger `max_steps` or `num_train_epochs` goes on with the run. The batch of a process may change with the number
    of processes.
    """
    recipes = read_run(checkpoint.parent).recipes
    if not recipes:  # a folder without a recipe, so nothing to compare
        return
    before = recipes[0]
    names = {name for name in before.keys() | recipe.keys() if not MAY_CHANGE.fullmatch(name)}
    differing = {name for name in names if normalize(before.get(name)) != normalize(recipe.get(name))}
    for name in ("max_steps", "num_train_epochs"):
        if name in before and name in recipe and 0 < before[name] < recipe[name]:
            differing.discard(name)
    if not differing.isdisjoint(BATCH_DEFAULTS):
        processes_before = len(list(checkpoint.glob("rng_state*.pth")))  # Trainer saves one for each process
        if global_batch_size(recipe, processes) == global_batch_size(before, processes_before):
            differing -= set(BATCH_DEFAULTS)
    if differing:
        changes = ", ".join(f"`{name}` was {before.get(name)} and is {recipe.get(name)}" for name in sorted(differing))
        if checkpoint.parent.resolve() == output_dir.resolve():
            fix = "give another --output_dir, or --overwrite_output_dir true to start anew"
        else:
            fix = "give the checkpoint as --model_name_or_path to train its model further"
        raise ValueError(f"{checkpoint} is of another run: {changes}; {fix}.")


def global_batch_size(recipe: dict, processes: int) -> int:
    """Returns the number of records of one step over all processes."""
    factors = [recipe.get(name, default) for name, default in BATCH_DEFAULTS.items()]
    return processes * math.prod(factors)


def normalize(value):
    """Returns a value of a recipe for comparison: "./x.jsonl" is "x.jsonl"."""
    return os.path.normpath(value) if isinstance(value, str) else value


def save_recipe(recipe: dict, output_dir: Path):
    """Writes `recipe.yaml`, and `recipes_before.yaml` if the model that the run starts from has a recipe itself."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    start = recipe.get("model_name_or_path")
    if not start:
        return
    paths = [Path(start, name) for name in ("recipes_before.yaml", "recipe.yaml")]
    texts = [path.read_text("utf-8") for path in paths if path.is_file()]
    if texts:
        write_text(output_dir / "recipes_before.yaml", "---\n".join(texts))


def read_run(folder: str | Path) -> Run:
    """Reads the files of a run, with the current keys whenever the run was."""
    folder = Path(folder)
    recipes = read_documents(folder / "recipe.yaml", {"dataset_name"})
    recipes += read_documents(folder / "recipes_before.yaml", {"dataset_name"})
    for recipe in recipes:
        if "rival" in recipe:  # its name before 2026-11-26
            recipe["baseline"] = recipe.pop("rival")
    results = read_documents(folder / "results.json", {"train", "steps", "records", "validation"})
    keys = {"dataset", "evaluated", "records", "validation", "context_recovery"}
    evaluation = read_documents(folder / "evaluation.json", keys, "eval_sft.py")
    return Run(
        recipes,
        results=rename_old_keys(results[0]) if results else {},
        evaluation=rename_old_keys(evaluation[0]) if evaluation else {},
    )


def read_documents(path: Path, keys: set[str], script: str = "train_sft.py") -> list[dict]:
    """Returns the documents of a YAML file (JSON is YAML), none if it is missing; each must have the keys."""
    documents = read_yaml(path) if path.is_file() else []
    for document in documents:
        if not isinstance(document, dict) or not keys <= set(document):
            raise ValueError(f"{path} was not written by {script}, which writes {', '.join(sorted(keys))}.")
    return documents


def rename_old_keys(results: dict) -> dict:
    """Returns results with the current keys."""

    def rename(key: str) -> str:
        if key.startswith(OLD_BASELINE_PREFIX):
            return "baseline_" + key.removeprefix(OLD_BASELINE_PREFIX)
        return OLD_KEYS.get(key, key)

    renamed = {}
    for name, value in results.items():
        if name in BLOCKS:
            value = {rename(key): row for key, row in value.items()}
        renamed[OLD_KEYS.get(name, name)] = value
    return renamed


def read_commit() -> str | None:
    """
    Returns the commit of this checkout, with "-dirty" after it if files were changed since; `None` where the code is
    not a git checkout, or git is not installed.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a wheel may lie inside the checkout of another project
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


LOAD_AND_ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
query = torch.tensor([json.loads(sys.argv[2])])
max_new_tokens = int(sys.argv[3])
no_delta = bool(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert torch.isfinite(model(query).logits).all(), "the logits are not finite"
if no_delta:
    model.hypernet.alpha.data.zero_()
mask = torch.ones_like(query)
output = model.generate(query, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
tokenizer.decode(output[0])
print(json.dumps(output[0, query.shape[1]:].tolist()))
"""


def answer_in_new_process(
    folder: str | Path, query: list[int], max_new_tokens: int, no_delta: bool = False
) -> list[int]:
    """
    Returns the greedy answer of a saved model in a new process that knows nothing of this repository: in another
    folder, with an empty module cache and no network.

    Args:
        folder (`str` or `Path`): the folder of the model, its code and its tokenizer.
        query (`list[int]`): token ids.
        max_new_tokens (`int`): maximum number of tokens of the answer.
        no_delta (`bool`): answer with Δ = 0, with only the window.

    Returns:
        `list[int]`: the answer's token ids.

    Raises:
        ValueError: if the folder cannot be loaded or does not answer, with the last line of the process's error.
    """
    root = Path(__file__).resolve().parents[2]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    python_path = os.pathsep.join(path for path in paths if path and Path(path).resolve() != root)
    with TemporaryDirectory() as elsewhere:
        environment = os.environ | {
            "PYTHONPATH": python_path,
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
        }
        arguments = [str(Path(folder).resolve()), json.dumps(query), str(max_new_tokens), str(int(no_delta))]
        command = [sys.executable, "-c", LOAD_AND_ANSWER, *arguments]
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise ValueError(f"{folder} cannot be loaded and used in a new process: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def strip_folders(recipe: dict) -> dict:
    """Returns a recipe with only the last part of absolute paths: the rest is private, and of no use elsewhere."""
    stripped = {}
    for name, value in recipe.items():
        if isinstance(value, str) and Path(value).is_absolute():
            value = Path(value).name
        stripped[name] = value
    return stripped


def dump_yaml(documents: list[dict]) -> str:
    """Returns readable YAML: letters of any script unchanged, invisible characters as escapes."""
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump_all(documents, sort_keys=False)


__all__ = [
    "Run",
    "answer_in_new_process",
    "check_same_run",
    "dump_yaml",
    "find_differing_setting",
    "held_out_settings",
    "read_commit",
    "read_held_out",
    "read_run",
    "save_recipe",
    "strip_folders",
]
