# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading by processes that cannot see this repository: another folder, an empty module cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import SIZES, random_ids, randomise_alpha
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[2]
MODEL = ROOT / "phase15" / "model"
CODE = [path.name for path in MODEL.glob("*_phase15.py")]
BASE_OF = {"untied": "llama", "tied": "llama-tied"}
CLASSES = ["AutoModelForCausalLM", "AutoModel"]

LOADER = """
import importlib.util, json, sys
import torch, transformers

torch.set_num_threads(1)
assert importlib.util.find_spec("modeling_phase15") is None, "the repository is on this process's path"
source, target, *kinds = sys.argv[1:]
for kind in kinds:
    results = {}
    for auto_class in ("AutoModelForCausalLM", "AutoModel"):
        load = getattr(transformers, auto_class).from_pretrained
        model, info = load(f"{source}/{kind}", trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        ids = torch.load(f"{source}/{kind}/ids.pt")
        with torch.no_grad():
            results[auto_class] = model(ids).logits, model.generate(
                ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), pad_token_id=0, max_new_tokens=20
            )
    config = transformers.AutoConfig.from_pretrained(f"{source}/{kind}", trust_remote_code=True)
    results["config"] = type(config).__name__, type(model).__name__, type(model).__module__
    results["num_parameters"] = model.num_parameters()
    results["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(f"{target}/{kind}")
    torch.save(ids, f"{target}/{kind}/ids.pt")
    torch.save(results, f"{target}/{kind}/results.pt")
"""


def load_and_save_elsewhere(source: Path, target: Path, home: Path):
    """Runs LOADER in a fresh process with empty caches, in another folder."""
    home.mkdir()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    command = [sys.executable, "-c", LOADER, str(source), str(target), *BASE_OF]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def generations(bases, tmp_path_factory):
    """Models saved by this process, then loaded and saved by a second one, then by a third."""
    folder, models = tmp_path_factory.mktemp("hub"), {}
    for kind, base in BASE_OF.items():
        models[kind] = randomise_alpha(Phase15ForCausalLM.from_base(bases[base], **SIZES))
        models[kind].generation_config = GenerationConfig(repetition_penalty=1.2, eos_token_id=[58, 59])
        models[kind].save_pretrained(folder / "first" / kind)
        torch.save(random_ids(2, 50), folder / "first" / kind / "ids.pt")
    load_and_save_elsewhere(folder / "first", folder / "second", folder / "home-2")
    load_and_save_elsewhere(folder / "second", folder / "third", folder / "home-3")
    return folder, models


@pytest.mark.parametrize("kind", BASE_OF)
@pytest.mark.parametrize("auto_class", CLASSES)
@pytest.mark.parametrize("process", ["second", "third"])
def test_another_process_gives_the_same_logits_bit_for_bit(generations, kind, auto_class, process):
    folder, models = generations
    ids = random_ids(2, 50)
    with torch.no_grad():
        expected = models[kind](ids).logits
    logits, tokens = torch.load(folder / process / kind / "results.pt")[auto_class]
    assert torch.equal(logits, expected)
    mask = torch.ones(2, 9, dtype=torch.long)
    assert torch.equal(
        tokens, models[kind].generate(ids[:, :9], attention_mask=mask, pad_token_id=0, max_new_tokens=20)
    )


@pytest.mark.parametrize("kind", BASE_OF)
@pytest.mark.parametrize("process", ["second", "third"])
def test_another_process_has_the_remote_classes(generations, kind, process):
    folder, models = generations
    results = torch.load(folder / process / kind / "results.pt")
    config_class, model_class, module = results["config"]
    assert (config_class, model_class) == ("Phase15Config", "Phase15ForCausalLM")
    assert module.startswith("transformers_modules.")
    assert results["num_parameters"] == models[kind].num_parameters()
    assert results["tied"] is (kind == "tied")


@pytest.mark.parametrize("kind", BASE_OF)
@pytest.mark.parametrize("process", ["first", "second", "third"])
def test_a_saved_folder_holds_code_safetensors_and_auto_map(generations, kind, process):
    folder, models = generations
    saved = folder / process / kind
    for name in CODE:
        assert (saved / name).read_text() == (MODEL / name).read_text()
    assert not list(saved.glob("*.bin")) and not list(saved.glob("train_*.py"))
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_phase15.Phase15Config",
        "AutoModel": "modeling_phase15.Phase15ForCausalLM",
        "AutoModelForCausalLM": "modeling_phase15.Phase15ForCausalLM",
    }
    assert config["architectures"] == ["Phase15ForCausalLM"] and config["model_type"] == "phase15"
    assert {name: config[name] for name in SIZES} == SIZES
    generation_config = json.loads((saved / "generation_config.json").read_text())
    assert generation_config["eos_token_id"] == [58, 59]
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert ("model.llm.lm_head.weight" in names) is (kind == "untied")
        assert names | {"model.llm.lm_head.weight"} == set(models[kind].state_dict())
        assert torch.equal(file.get_tensor("model.hypernet.alpha"), models[kind].hypernet.alpha)
        assert file.metadata()["format"] == "pt"


def test_tied_weights_stay_tied_and_train_together(generations):
    folder, _ = generations
    model = Phase15ForCausalLM.from_pretrained(folder / "third" / "tied")
    model(random_ids(2, 20), labels=random_ids(2, 20)).loss.backward()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len([name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name]) == 1


def test_weights_that_a_folder_lacks_are_reported(generations, tmp_path):
    """By the library, which goes on; phase15/loading.py, the commands' loader, refuses the folder."""
    folder, _ = generations
    shutil.copytree(folder / "first" / "tied", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.hypernet.alpha"], weights["model.hypernet.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = Phase15ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.hypernet.alpha", "model.hypernet.norm.weight"}


def test_sharded_files(generations, tmp_path):
    _, models = generations
    models["tied"].save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = random_ids(2, 50)
    assert torch.equal(Phase15ForCausalLM.from_pretrained(tmp_path)(ids).logits, models["tied"](ids).logits)
