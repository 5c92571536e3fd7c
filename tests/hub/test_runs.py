# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The files of a run: today's, and those of earlier versions."""

import json
from types import SimpleNamespace

import pytest
import yaml

from phase15.evaluation.losses import LABELS
from phase15.hub.runs import (
    FACTS_FIELDS,
    HELD_OUT,
    OLD_KEYS,
    find_differing_setting,
    held_out_settings,
    read_held_out,
    read_run,
    rename_old_keys,
    strip_folders,
)


def folder_of(tmp_path, recipe: dict | None = None, results: dict | None = None):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if results is not None:
        base = {"train": {}, "steps": 1, "records": {}, "validation": {}}
        (tmp_path / "results.json").write_text(json.dumps(base | results))
    return tmp_path


def test_a_run_writes_down_the_records_it_held_out(tmp_path):
    data = SimpleNamespace(**dict.fromkeys(HELD_OUT, 1) | {"dataset_name": "/home/me/x.jsonl"})
    written = held_out_settings(data, SimpleNamespace(seed=7))
    assert set(written) == set(HELD_OUT) and written["seed"] == 7 and written["dataset_name"] == "x.jsonl"
    assert read_held_out(folder_of(tmp_path, {"dataset_name": "y"}, {"held_out": written})) == written


def test_earlier_runs_are_read_with_the_defaults_of_their_time(tmp_path):
    recipe = {"dataset_name": "/home/me/x.jsonl", "shuffle_records": True, "rival": "window"}
    settings = read_held_out(folder_of(tmp_path, recipe, {}))
    assert (settings["dataset_name"], settings["validation_split"], settings["seed"]) == ("x.jsonl", 0.1, 42)
    assert settings["shuffle_records"] is True and settings["dataset_train_split"] == "train"
    assert read_run(tmp_path).recipes[0]["baseline"] == "window"


def test_a_folder_without_a_run(tmp_path):
    assert read_held_out(tmp_path) is None and read_run(tmp_path) == ([], {}, {})


def test_the_setting_that_differs_is_named():
    one = dict.fromkeys(HELD_OUT) | {"seed": 1, "shuffle_records": False, "max_validation_records": 3}
    assert find_differing_setting(one, one | {"seed": 2, "max_validation_records": 4}) is None  # neither decides here
    assert find_differing_setting(one, one | {"validation_split": 0.5}) == "validation_split"
    shuffled = one | {"shuffle_records": True}
    assert find_differing_setting(shuffled, shuffled | {"seed": 2}) == "seed"
    streamed = one | {"streaming": True}
    assert find_differing_setting(streamed, streamed | {"max_validation_records": 4}) == "max_validation_records"


def test_results_of_earlier_versions_get_todays_keys():
    old = {"validation": {"the model": 1, "Δ = 0": 2, "rival: lora": 3}, "own_words": {"full context": 4}, "seed": 5}
    assert rename_old_keys(old) == {
        "validation": {"model": 1, "window": 2, "baseline_lora": 3},
        "free_running": {"full_context": 4},
        "seed": 5,
    }
    assert rename_old_keys(rename_old_keys(old)) == rename_old_keys(old)
    new = {"baselines_window", "baselines_shuffled_delta", "free_running_shuffled_delta"}  # since 2026-12-01
    assert set(LABELS) - new <= {*OLD_KEYS.values()}


@pytest.mark.parametrize("name, content", [("recipe.yaml", "a: ["), ("results.json", "{}"), ("recipe.yaml", "- 1")])
def test_files_that_no_run_wrote_are_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} (cannot be read|was not written by train_sft.py)"):
        read_run(tmp_path)


def test_folders_are_private():
    assert strip_folders({"a": "/home/me/x", "b": "me/x", "c": 3}) == {"a": "x", "b": "me/x", "c": 3}


def test_the_data_set_facts_is_known_by_its_whole_name():
    files = {"dataset_name": "facts", "facts_text": "folder/text.jsonl"}
    data = SimpleNamespace(**dict.fromkeys(HELD_OUT + FACTS_FIELDS, 1) | files)
    facts = held_out_settings(data, SimpleNamespace(seed=1))
    assert facts["facts_text"] == "text.jsonl"
    assert facts["facts_distances"] == 1 and find_differing_setting(facts, facts | {"seed": 2}) == "seed"
    assert find_differing_setting(facts, facts | {"facts_records": 2}) == "facts_records"
    data.dataset_name = "me/facts"  # of the Hub
    assert "facts_distances" not in held_out_settings(data, SimpleNamespace(seed=1))
