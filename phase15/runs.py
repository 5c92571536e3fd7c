# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves in its folder and reads back, and the check of the folder in a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml

from phase15.checkpoints import write_text


def save_recipe(recipe: dict, output_dir: Path):
    """Writes `recipe.yaml`, and `recipes_before.yaml` if the model that the run starts from has a recipe itself."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    if start := recipe.get("model_name_or_path"):
        before = [Path(start, name) for name in ("recipes_before.yaml", "recipe.yaml")]
        if before := [path.read_text("utf-8") for path in before if path.is_file()]:
            write_text(output_dir / "recipes_before.yaml", "---\n".join(before))


RUN_DEFAULTS = {  # of what train_sft.py holds out
    "validation_split": 0.1,
    "shuffle_records": False,
    "seed": 42,
    "streaming": False,
    "dataset_config": None,
    "dataset_train_split": "train",
}


def read_recipe(folder: str) -> dict:
    """The recipe.yaml that train_sft.py left in a model's folder; empty where it did not run."""
    path = Path(folder, "recipe.yaml")
    try:
        recipe = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} was not written by train_sft.py: it is no mapping.")
    return recipe


def held_out(folder: str) -> dict | None:
    """What says which records the run that made a folder held out, None where there was no run."""
    recipe = read_recipe(folder)
    if "dataset_name" not in recipe:
        return None
    run = {**RUN_DEFAULTS, **recipe, "dataset_name": Path(str(recipe["dataset_name"])).name}
    keys = ["dataset_name", *RUN_DEFAULTS]
    if not run["shuffle_records"]:
        keys.remove("seed")
    if run["streaming"]:
        keys.append("max_validation_records")
    return {key: run[key] for key in keys}


LOAD_AND_ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, query, max_new_tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert torch.isfinite(model(query).logits).all(), "the logits are not finite"
mask = torch.ones_like(query)
output = model.generate(query, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
tokenizer.decode(output[0])
print(json.dumps(output[0, query.shape[1]:].tolist()))
"""


def answer_in_new_process(folder: str | Path, query: list[int], max_new_tokens: int) -> list[int]:
    """
    What a saved model answers, greedily, where nothing is known of this repository: in a new process, in another
    folder, with an empty module cache and no network.

    Args:
        folder (`str` or `Path`): where the model, its code and its tokenizer are.
        query (`list[int]`): token ids.
        max_new_tokens (`int`): tokens of the answer, at most.

    Returns:
        `list[int]`: the answer's token ids.

    Raises:
        ValueError: if the folder cannot be loaded or does not answer, with the last line of the process's error.
    """
    here = Path(__file__).resolve().parent.parent
    python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with TemporaryDirectory() as elsewhere:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in python_path if Path(path).resolve() != here),
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
        }
        arguments = [str(Path(folder).resolve()), json.dumps(query), str(max_new_tokens)]
        command = [sys.executable, "-c", LOAD_AND_ANSWER, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{folder} cannot be loaded and used in a new process: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


class Run(NamedTuple):
    """What train_sft.py and py left in a model's folder; empty where they did not run."""

    recipes: list[dict]  # of this run and of those before it, this one first
    results: dict
    evaluation: dict


def read_run(folder: Path) -> Run:
    """Reads a run's files. Absolute paths are cut to their last part: they are private, and good for nobody else."""
    recipes = read_documents(folder / "recipe.yaml", {"dataset_name"})
    recipes += read_documents(folder / "recipes_before.yaml", {"dataset_name"})
    for recipe in recipes:
        for name, value in recipe.items():
            if isinstance(value, str) and Path(value).is_absolute():
                recipe[name] = Path(value).name
    results = read_documents(folder / "results.json", {"train", "steps", "records", "validation"})
    if results and not recipes:
        raise ValueError(f"{folder} holds results.json, but not the recipe.yaml that says of what.")
    keys = {"dataset", "evaluated", "records", "validation", "context_recovery"}
    evaluation = read_documents(folder / "evaluation.json", keys, "py")
    return Run(recipes, results[0] if results else {}, evaluation[0] if evaluation else {})


def read_documents(path: Path, keys: set[str], script: str = "train_sft.py") -> list[dict]:
    """The documents of a YAML file (JSON is YAML), none if it is not there; each must have the keys."""
    try:
        documents = list(yaml.safe_load_all(path.read_text("utf-8"))) if path.is_file() else []
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or not keys <= set(document):
            raise ValueError(f"{path} was not written by {script}, which writes {', '.join(sorted(keys))}.")
    return documents


def as_yaml(documents: list[dict]) -> str:
    """YAML that reads as it is: letters of any script, but what cannot be seen as its escape."""
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump_all(documents, sort_keys=False)
