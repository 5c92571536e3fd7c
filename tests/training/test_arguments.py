# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Recipes, flags, and values that cannot work."""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from reference import SIZES
from test_train_sft import ROOT, RUN, STREAM, WORDS, argv, base, data, recipe, script, sentence, write  # noqa: F401
from train_here import parse

from phase15.commands.training_run import plan
from phase15.training.arguments import Phase15TrainingFields, check_names, library_names
from phase15.training.runs import Phase15TrainingArguments, RunParser, TrainingRun


RECIPES = sorted(path for path in ROOT.glob("recipes/*.yaml") if not path.stem.startswith("accelerate_"))


BAD_RECIPES = {  # text of the recipe, what the error says
    "list": ("- stage\n", ["mapping", "list"]),
    "empty": ("", ["mapping"]),
    "not-yaml": ("stage: [full\n", ["recipe.yaml"]),
    "unknown": ("lerning_rate: 1.0e-4\n", ["lerning_rate", "learning_rate"]),
    "unlike-any": ("xyzzy: 1\n", ["xyzzy"]),
    "number-key": ("1: 2\n", ["1"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes(case, argv, tmp_path):
    text, words = BAD_RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    message = script(str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"))
    assert all(word in message for word in ["recipe.yaml", *words]), message
    assert not (tmp_path / "run").exists()


BAD_VALUES = {
    "stream-without-steps": (STREAM | {"max_steps": -1}, ["max_steps", "streaming"]),
    "stream-with-a-share": (STREAM | {"max_validation_records": None}, ["max_validation_records", "0"]),
    "stream-without-tokenizer": (
        STREAM | {"model_name_or_path": None, "base_config": {"vocab_size": 270, "hidden_size": 30}},
        ["base_config", "model_name_or_path"],
    ),
    "stream-by-two": (STREAM | {"dataloader_num_workers": 2}, ["dataloader_num_workers", "2", "one"]),
    "stream-that-validates-all": (STREAM | {"max_validation_records": 15}, ["data.jsonl", "15 records"]),
    "stream-of-no-file": (STREAM | {"dataset_name": "no/*.jsonl"}, ["no/*.jsonl", "no such file"]),
    "no-data": ({"dataset_name": None}, ["dataset_name"]),
    "no-model": ({"model_name_or_path": None}, ["model_name_or_path", "base_config"]),
    "no-such-file": ({"dataset_name": "none.jsonl"}, ["none.jsonl"]),
    "no-such-data-set": ({"dataset_name": "nobody/nothing"}, ["nobody/nothing"]),
    "no-such-folder": ({"model_name_or_path": "/no/such/model"}, ["/no/such/model"]),
    "no-such-gguf": ({"model_name_or_path": "/no/such/model.gguf"}, ["/no/such/model.gguf"]),
    "size": ({"num_soft_tokens": 2}, ["num_sink_tokens", "num_soft_tokens"]),
    "heads": ({"hypernet_num_attention_heads": 5}, ["hypernet_num_attention_heads", "hypernet_hidden_size"]),
    "stage": ({"stage": "fulll"}, ["stage", "fulll"]),
    "no-training-record": ({"validation_split": 0.99}, ["data.jsonl", "15 records"]),
    "negative-split": ({"validation_split": -1.0}, ["validation_split", "-1"]),
    "not-json": ({"model_name_or_path": None, "base_config": "{vocab"}, ["base_config"]),
    "llm-heads": (
        {"model_name_or_path": None, "base_config": {"vocab_size": 270, "hidden_size": 30}},
        ["hidden size"],
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(case, recipe, argv, tmp_path):
    """One line, exit code 1, and nothing written."""
    values, words = BAD_VALUES[case]
    message = script(write(recipe, tmp_path, **values))
    assert all(word in message for word in words), message
    assert not Path(recipe["output_dir"]).exists()


def test_a_missing_recipe(argv):
    assert "none.yaml" in script("recipes/none.yaml")
    assert "none.yaml" in script("--config", "recipes/none.yaml")


def test_flags_override_the_recipe(recipe, tmp_path):
    path = write(recipe, tmp_path, stage="hypernet", warmup_steps=7)
    flags = ["--stage", "lora", "--chunk_length", "6", "--learning_rate", "3e-3", "--dataset_name", "x.csv"]
    for arguments in ([path, *flags], [*flags, path], ["--config", path, *flags]):
        model, data, training, _ = parse(arguments)
        assert (model.stage, model.chunk_length, data.dataset_name) == ("lora", 6, "x.csv")
        assert (training.learning_rate, training.warmup_steps, training.max_steps) == (3e-3, 7, 3)
        assert model.config_fields == {name: recipe[name] for name in model.config_fields} | {"chunk_length": 6}
        assert set(SIZES) | {"max_answer_length"} == set(model.config_fields)


def test_without_arguments_it_is_the_quickstart():
    model, data, _, _ = parse([])
    assert (data.dataset_name, model.stage) == ("facts", "hypernet")
    parser = RunParser()
    before = TrainingRun.parse([], parser).run_before(parser)
    assert (before.data.dataset_name, before.model.baseline) == ("facts", "full_context")
    assert before.model.base_config["hidden_size"] <= 256
    assert parse(["--model_name_or_path", "x", "--dataset_name", "y"])[0].base_config is None


def test_each_text_is_parsed_once(tmp_path, monkeypatch):
    """The command line, and each recipe."""
    parsed = []
    passes = ArgumentParser.parse_known_args
    monkeypatch.setattr(
        ArgumentParser, "parse_known_args", lambda self, *args: parsed.append(args[0]) or passes(self, *args)
    )
    runs = plan(["--seed", "7", "--output_dir", str(tmp_path / "run")])
    assert [Path(run.path).name for run in runs] == ["facts_base.yaml", "quickstart.yaml"]
    assert [run.training.seed for run in runs] == [7, 7]
    assert len(parsed) == 3 and parsed[0] == ["--seed", "7", "--output_dir", str(tmp_path / "run")]
    assert "--stage=hypernet" in parsed[1] and "--baseline=full_context" in parsed[2]


def test_a_value_of_a_recipe_is_checked_like_a_flag(argv, tmp_path):
    for values, flag in (({"facts_distances": [1, "far"]}, "facts_distances"), ({"max_steps": 1.5}, "max_steps")):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        message = script(str(path))
        assert "recipe.yaml" in message and f"--{flag}" in message and "invalid int value" in message


def test_a_wrong_flag_is_answered_without_torch():
    with pytest.raises(ValueError, match="unrecognized arguments: --lerning_rate=3; did you mean 'learning_rate'"):
        check_names(["recipes/quickstart.yaml", "--lerning_rate=3"])
    with pytest.raises(ValueError, match="--warmup-stepps; did you mean 'warmup_steps'"):
        check_names(["--warmup-stepps", "3"])
    check_names(
        ["--learning-rate", "-1", "--no_dataloader_pin_memory", "--rival", "lora", "--config", "x", "--max_st=3"]
    )
    names = {f.name for f in fields(Phase15TrainingArguments) if f.init}
    assert names == {*library_names(), *(f.name for f in fields(Phase15TrainingFields))}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_data_set_leaves_the_parts_of_the_recipes_own(tmp_path):
    """`recipes/smollm2_gsm8k.yaml --dataset_name FILE`, as the recipe says itself."""
    (path,) = [path for path in RECIPES if path.stem == "smollm2_gsm8k"]
    for flags, config in (
        ([], "main"),
        (["--dataset_name", "openai/gsm8k"], "main"),
        (["--dataset_name", "data.jsonl"], None),
        (["--dataset_name", "me/data", "--dataset_config", "mine"], "mine"),
    ):
        _, data, _, recipe = parse([str(path), "--use_cpu", "--output_dir", str(tmp_path), *flags])
        assert data.dataset_config == config == recipe.get("dataset_config"), flags


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path, tmp_path):
    """Every recipe parses; the ones of TinyLlama hold the values of the design."""
    model, data, training, _ = parse([str(path), "--use_cpu", "--output_dir", str(tmp_path)])
    assert data.dataset_name and (model.model_name_or_path or model.base_config)
    if "facts" in (data.dataset_name, path.stem) or path.stem == "docstrings":
        return
    fields = model.config_fields
    names = ("chunk_length", "num_soft_tokens", "max_query_length", "max_answer_length")
    assert tuple(fields[name] for name in names) == (16, 128, 256, 256)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert (training.learning_rate, training.llm_learning_rate, training.bf16) == (1e-4, 3e-5, True)
    if path.stem.startswith("tinyllama"):
        assert training.gradient_checkpointing
    stage = {"tinyllama_stage1": "hypernet"}.get(path.stem, "full")
    assert model.stage == stage
    if path.stem == "tinyllama_stage2":
        first = yaml.safe_load((path.parent / "tinyllama_stage1.yaml").read_text())
        assert model.model_name_or_path == first["output_dir"]
