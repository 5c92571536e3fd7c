# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The files that a run leaves in its folder and reads back, and the check of the folder in a new process."""

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
OF_FACTS = tuple(f.name for f in fields(FactsArguments))  # these too, of the data set `facts`


def held_out_by(data_args, training_args) -> dict:
    """The settings of `HELD_OUT`, for results.json. Files are named without their folders."""
    settings = {**vars(data_args), "seed": training_args.seed}
    names = HELD_OUT + OF_FACTS if settings["dataset_name"] == FACTS else HELD_OUT
    for name in {"dataset_name", "facts_text"} & {*names}:
        settings[name] = settings[name] and Path(settings[name]).name
    return {name: settings[name] for name in names}


def held_out(folder: str | Path) -> dict | None:
    """The settings that decided which records the run of a folder held out; None if no run made the folder."""
    run = read_run(folder)
    if run.results.get("held_out"):
        return run.results["held_out"]
    return before_held_out(run.recipes[0]) if run.recipes else None


def before_held_out(recipe: dict) -> dict:
    """The same from the recipe of a run that did not write it down: before 2026-11-26, with the defaults of then."""
    defaults = dict.fromkeys(HELD_OUT) | {"dataset_train_split": "train", "validation_split": 0.1, "seed": 42}
    defaults |= {"shuffle_records": False, "streaming": False}
    settings = {name: recipe.get(name, default) for name, default in defaults.items()}
    return settings | {"dataset_name": Path(str(settings["dataset_name"])).name}


def same_records(first: dict, second: dict) -> str | None:
    """The first setting in which two runs held out other records, or None."""
    left_out = set()
    if not first["shuffle_records"] and OF_FACTS[0] not in first:
        left_out.add("seed")
    if not first["streaming"]:
        left_out.add("max_validation_records")
    names = [name for name in HELD_OUT + OF_FACTS if name not in left_out]
    return next((name for name in names if first.get(name) != second.get(name)), None)


# What may differ where a run resumes: it changes no step, or only how many there are.
MAY_CHANGE = re.compile(
    r"(logging|save|eval|hub|log|report|dataloader(?!_drop_last)|ddp|include|trackio)_.*|output_dir|overwrite_output_dir|run_name|"
    r"resume_from_checkpoint|disable_tqdm|report_to|per_device_eval_batch_size|merge_adapter|use_cpu|compile_layers|"
    r"gradient_checkpointing|activation_checkpointing|accelerator_config|load_best_model_at_end|metric_for_best_model|"
    r"greater_is_better|project|do_.*|torch_empty_cache_steps|skip_memory_metrics|"
    r"hypernet_signed_alpha"  # Phase15Trainer compares it with the checkpoint's own
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def check_same_run(recipe: dict, checkpoint: Path, output_dir: Path, processes: int):
    """
    Raises a ValueError if a checkpoint is of a run with another recipe, unless what differs changes none of its steps.
    A larger `max_steps` or `num_train_epochs` goes on with the run. The batch of a process may change with the number
    of processes.
    """
    runs = read_run(checkpoint.parent).recipes
    if not runs:  # nobody knows
        return
    before = runs[0]
    names = {name for name in before.keys() | recipe.keys() if not MAY_CHANGE.fullmatch(name)}
    differing = {name for name in names if plain(before.get(name)) != plain(recipe.get(name))}
    for name in ("max_steps", "num_train_epochs"):
        if name in before and name in recipe and 0 < before[name] < recipe[name]:
            differing.discard(name)
    if differing & set(BATCH):
        processes_before = len(list(checkpoint.glob("rng_state*.pth")))
        batch, batch_before = (
            count * math.prod(values.get(name, default) for name, default in zip(BATCH, (8, 1), strict=True))
            for count, values in ((processes, recipe), (processes_before, before))
        )
        differing -= set(BATCH) if batch == batch_before else set()
    if differing:
        changes = ", ".join(f"`{name}` was {before.get(name)} and is {recipe.get(name)}" for name in sorted(differing))
        way_out = (
            "give another --output_dir, or --overwrite_output_dir true to start anew"
            if checkpoint.parent.resolve() == output_dir.resolve()
            else "give the checkpoint as --model_name_or_path to train its model further"
        )
        raise ValueError(f"{checkpoint} is of another run: {changes}; {way_out}.")


def plain(value):
    """A value of a recipe, for comparison: "./x.jsonl" is "x.jsonl"."""
    return os.path.normpath(value) if isinstance(value, str) else value


def save_recipe(recipe: dict, output_dir: Path):
    """Writes `recipe.yaml`, and `recipes_before.yaml` if the model that the run starts from has a recipe itself."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    if start := recipe.get("model_name_or_path"):
        before = [Path(start, name) for name in ("recipes_before.yaml", "recipe.yaml")]
        if before := [path.read_text("utf-8") for path in before if path.is_file()]:
            write_text(output_dir / "recipes_before.yaml", "---\n".join(before))


class Run(NamedTuple):
    """The files that train_sft.py and eval_sft.py left in a folder; empty where they did not run."""

    recipes: list[dict]  # of this run and of those before it, this one first
    results: dict
    evaluation: dict


def read_run(folder: str | Path) -> Run:
    """Reads the files of a run. Names are today's, whenever the run was."""
    folder = Path(folder)
    recipes = read_documents(folder / "recipe.yaml", {"dataset_name"})
    recipes += read_documents(folder / "recipes_before.yaml", {"dataset_name"})
    for recipe in recipes:
        if "rival" in recipe:  # its name before 2026-11-26
            recipe["baseline"] = recipe.pop("rival")
    results = read_documents(folder / "results.json", {"train", "steps", "records", "validation"})
    keys = {"dataset", "evaluated", "records", "validation", "context_recovery"}
    evaluation = read_documents(folder / "evaluation.json", keys, "eval_sft.py")
    return Run(recipes, *({} if not found else with_keys(found[0]) for found in (results, evaluation)))


def read_documents(path: Path, keys: set[str], script: str = "train_sft.py") -> list[dict]:
    """The documents of a YAML file (JSON is YAML), none if it is not there; each must have the keys."""
    documents = read_yaml(path) if path.is_file() else []
    for document in documents:
        if not isinstance(document, dict) or not keys <= set(document):
            raise ValueError(f"{path} was not written by {script}, which writes {', '.join(sorted(keys))}.")
    return documents


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


def with_keys(results: dict) -> dict:
    """Results with today's keys."""

    def key(name: str) -> str:
        return f"baseline_{name[len('rival: ') :]}" if name.startswith("rival: ") else OLD_KEYS.get(name, name)

    blocks = ("validation", "own_words", "free_running", "context_recovery", "exact_match")
    return {
        OLD_KEYS.get(block, block): {key(name): row for name, row in rows.items()} if block in blocks else rows
        for block, rows in results.items()
    }


LOAD_AND_ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, query, max_new_tokens, no_delta = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), *map(int, sys.argv[3:])
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
    The greedy answer of a saved model in a new process that knows nothing of this repository: in another folder, with
    an empty module cache and no network.

    Args:
        folder (`str` or `Path`): where the model, its code and its tokenizer are.
        query (`list[int]`): token ids.
        max_new_tokens (`int`): tokens of the answer, at most.
        no_delta (`bool`): answer with Δ = 0, behind the window alone.

    Returns:
        `list[int]`: the answer's token ids.

    Raises:
        ValueError: if the folder cannot be loaded or does not answer, with the last line of the process's error.
    """
    root = Path(__file__).resolve().parents[2]
    python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with TemporaryDirectory() as elsewhere:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in python_path if Path(path).resolve() != root),
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
        }
        arguments = [str(Path(folder).resolve()), json.dumps(query), str(max_new_tokens), str(int(no_delta))]
        command = [sys.executable, "-c", LOAD_AND_ANSWER, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{folder} cannot be loaded and used in a new process: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def without_folders(recipe: dict) -> dict:
    """A recipe with the last part of absolute paths alone: the rest is private, and of no use elsewhere."""
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in recipe.items()}


def as_yaml(documents: list[dict]) -> str:
    """Readable YAML: letters of any script as they are, invisible characters as escapes."""
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump_all(documents, sort_keys=False)


__all__ = [
    "Run",
    "answer_in_new_process",
    "as_yaml",
    "check_same_run",
    "held_out",
    "held_out_by",
    "read_run",
    "same_records",
    "save_recipe",
    "without_folders",
]
