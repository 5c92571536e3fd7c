# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from old_folder import NEW_TOKENS, PROMPT, weights
from packaging.requirements import Requirement
from reference import random_ids
from safetensors.torch import save_file
from torch.testing import assert_close

from phase15.model import decoding_phase15
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.compat_phase15 import CACHE_NAME, NEWEST, OLDEST, untested_version
from phase15.model.modeling_phase15 import Phase15CausalLMOutputWithPast


ROOT = Path(__file__).parents[2]
NAMES = ("cache", "past_key_values")
GIVEN = NAMES if CACHE_NAME == "cache" else (CACHE_NAME,)  # the names that the library's own outputs know
OTHER = {"cache": "past_key_values", "past_key_values": "cache"}
# For a process that finds only the folder's own copy of the code.
LOAD = """
import sys, transformers
transformers.__version__ = sys.argv[2] or transformers.__version__
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
GENERATE = """
import json, torch
ids = torch.tensor(json.loads(sys.argv[3]))
options = {"attention_mask": (ids > 0).long(), "max_new_tokens": int(sys.argv[4]), "do_sample": False}
print(json.dumps(model.generate(ids, **options).tolist()))
"""


def run_apart(code: str, *arguments, tmp_path: Path) -> subprocess.CompletedProcess:
    """Runs code in a process that has an empty module cache and does not see this repository."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# both names of the cache


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_and_gives_the_cache_under_both_names(tiny, name):
    ids, cache = random_ids(2, 15), Phase15Cache(tiny.config)
    query_lengths = torch.tensor([1, 1])
    expected = tiny(ids, query_lengths=query_lengths, use_cache=True)
    first = tiny(ids[:, :9], query_lengths=query_lengths, **{name: cache})
    second = tiny(ids[:, 9:], **{OTHER[name]: getattr(first, name)})
    assert_close(torch.cat([first.logits, second.logits], dim=1), expected.logits, atol=1e-5, rtol=1e-4)
    for given in NAMES:
        assert getattr(second, given) is cache
    for given in GIVEN:
        assert second[given] is second.get(given) is cache and given in second
    assert list(second).count(CACHE_NAME) == 1 and OTHER[CACHE_NAME] not in list(second)
    assert any(part is cache for part in tiny(ids[:, :1], **{name: cache}, return_dict=False))


@pytest.fixture
def uncompiled(monkeypatch):
    """The fast path without the compiler, which takes a minute: these tests are about names."""
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"compile": True}], ids=str)
def test_generate_takes_and_gives_the_cache_under_both_names(tiny, settings):
    ids = random_ids(1, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, **settings}
    got = {}
    for name in NAMES:
        first = tiny.generate(ids, attention_mask=torch.ones_like(ids), **options, **{name: Phase15Cache(tiny.config)})
        for given in GIVEN:
            assert getattr(first, given) is first[given] is first.get(given) and given in first
            assert isinstance(first[given], Phase15Cache)
        conversation = torch.cat([first.sequences, random_ids(1, 5, seed=1)], dim=1)
        second = tiny.generate(
            conversation, attention_mask=torch.ones_like(conversation), **options, **{name: first[CACHE_NAME]}
        )
        got[name] = second.sequences
    assert torch.equal(got["cache"], got["past_key_values"])
    assert got["cache"].shape[1] == 9 + 6 + 5 + 6


def test_without_a_cache_both_names_give_none(tiny):
    ids = random_ids(1, 5)
    outputs = tiny(ids), tiny.generate(ids, use_cache=False, max_new_tokens=2, return_dict_in_generate=True)
    for output in outputs:
        for given in GIVEN:
            assert getattr(output, given) is None and given not in output


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_two_caches_are_refused_and_none_beside_one_is_not(tiny, call):
    ids, caches = random_ids(1, 5), [Phase15Cache(tiny.config) for _ in range(2)]
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        getattr(tiny, call)(ids, cache=caches[0], past_key_values=caches[1])
    getattr(tiny, call)(ids, cache=None, past_key_values=caches[0])
    assert caches[0].seen_tokens


@pytest.mark.parametrize("name", GIVEN)
def test_an_output_takes_the_cache_under_its_names(tiny, name):
    cache, another = Phase15Cache(tiny.config), Phase15Cache(tiny.config)
    output = Phase15CausalLMOutputWithPast(logits=torch.zeros(1), **{name: cache})
    assert output.cache is output.past_key_values is cache
    setattr(output, name, another)
    assert output[CACHE_NAME] is output.cache is output.past_key_values is another
    output[name] = cache
    assert output.cache is output[CACHE_NAME] is cache
    assert dataclasses.replace(output, logits=None).past_key_values is cache
    copy = pickle.loads(pickle.dumps(output))
    assert isinstance(copy.cache, Phase15Cache) and copy.cache is copy.past_key_values


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("settings", [{"compile": False}, {"compile": True}, {"num_beams": 2}], ids=str)
def test_our_own_calls_use_the_installed_name(tiny, settings):
    """transformers warns of the old name. Our calls must not cause that warning."""
    ids, options = random_ids(1, 9), {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.generate(ids, **options, **settings)
        tiny(ids, use_cache=True)
    assert not [str(warning.message) for warning in caught if "past_key_values" in str(warning.message)]


# versions


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        ("5.17.0", None),
        ("5.23.1", None),
        (".".join(map(str, NEWEST)) + ".3", None),
        (f"{NEWEST[0]}.{NEWEST[1]}.0.dev0", None),
        (f"{NEWEST[0]}.{NEWEST[1] + 1}.0.dev0", f'pip install "transformers<{NEWEST[0]}.{NEWEST[1] + 1}"'),
        ("5.99.0", f'pip install "transformers<{NEWEST[0]}.{NEWEST[1] + 1}"'),
        ("6.0.0rc1", f'pip install "transformers<{NEWEST[0]}.{NEWEST[1] + 1}"'),
        ("5.16.2", 'pip install "transformers>=5.17"'),
        ("4.57.1", 'pip install "transformers>=5.17"'),
    ],
)
def test_an_untested_version_is_told_with_what_to_do(version, advice):
    message = untested_version(version)
    assert (message is None) == (advice is None)
    assert advice is None or (advice in message and version in message and "newest revision" in message)


def test_the_tested_range_is_that_of_requirements_txt():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = next(Requirement(line.split("#")[0]) for line in lines if line.startswith("transformers"))
    bounds = {specifier.operator: specifier.version for specifier in found.specifier}
    assert bounds == {">=": ".".join(map(str, OLDEST)), "<": f"{NEWEST[0]}.{NEWEST[1] + 1}"}


@pytest.fixture
def old_folder(tmp_path) -> tuple[Path, list]:
    """A folder that commit 5a7a497 saved with transformers 5.23, today's code beside its weights; and its tokens."""
    saved = json.loads((ROOT / "tests" / "folder_5a7a497.json").read_text())
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in saved["files"].items():
        (folder / name).write_text(json.dumps(content))
    save_file(weights(saved["shapes"]), folder / "model.safetensors", metadata={"format": "pt"})
    for path in (ROOT / "phase15" / "model").glob("*_phase15.py"):
        shutil.copy(path, folder)
    return folder, saved["tokens"]


@pytest.mark.integration
def test_a_folder_of_an_earlier_commit_gives_the_same_tokens(old_folder, tmp_path):
    """With today's code beside its weights."""
    folder, tokens = old_folder
    done = run_apart(LOAD + GENERATE, folder, "", json.dumps(PROMPT), NEW_TOKENS, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens
    assert ("was tested with" in done.stderr) == bool(untested_version(transformers.__version__))


@pytest.mark.integration
def test_saved_code_warns_once_of_an_untested_transformers(old_folder, tmp_path):
    """The version is made up; two copies of the folder still load."""
    version, (folder, _) = "5.99.0", old_folder
    shutil.copytree(folder, tmp_path / "copy")
    again = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'copy')!r}, trust_remote_code=True)"
    done = run_apart(LOAD + again, folder, version, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(untested_version(version)) == 1 == done.stderr.count("was tested with")
