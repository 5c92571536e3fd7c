# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Other rules for Δ: docs/hypernetworks.md as it stands, the registry, and the digest of the formula."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import SIZES, random_ids, randomise_alpha
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from phase15.model import modeling_phase15, recursion_phase15
from phase15.model.configuration_phase15 import VERSION, Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM, Phase15Model
from phase15.model.recursion_phase15 import HYPERNETS, HyperNetwork, formula_digest, register_hypernet


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hypernetworks.md").read_text("utf-8")
EXAMPLE = re.search(r"```python\n(\"\"\"A GRU.*?)```", PAGE, re.S)[1]
# For a process that finds only the folder: it generates, and saves what it has loaded.
ELSEWHERE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("phase15") is None, "the repository is on this process's path"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[2]))
output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
model.save_pretrained(sys.argv[3])
print(json.dumps([type(model.hypernet).__name__, output.tolist()]))
"""


@pytest.fixture
def gru_slots(tmp_path, monkeypatch):
    """The page's file, imported as a user would."""
    (tmp_path / "rule").mkdir()
    (tmp_path / "rule" / "gru_slots.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "rule")
    monkeypatch.setattr(recursion_phase15, "HYPERNETS", HYPERNETS)
    yield importlib.import_module("gru_slots")
    del sys.modules["gru_slots"]
    del HYPERNETS["gru_slots"]


def elsewhere(folder: Path, ids: torch.LongTensor, to: Path, home: Path) -> list:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps(ids.tolist()), str(to)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_page_s_rule_trains_is_saved_and_loads_elsewhere(gru_slots, bases, tmp_path):
    torch.manual_seed(0)
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_type": "gru_slots"})
    assert type(model.hypernet) is gru_slots.GRUSlots
    ids = random_ids(2, 30)
    labels = ids.where(torch.arange(30) > 8, -100)
    base = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    assert torch.equal(model(ids).logits, base(ids).logits)  # Δ is zero at first
    optimizer = torch.optim.AdamW(model.hypernet.parameters(), lr=1e-2)
    before = copy.deepcopy(model.hypernet.state_dict())
    losses = []
    for _ in range(4):
        loss = model.train()(ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    same = [name for name, weight in model.hypernet.state_dict().items() if torch.equal(weight, before[name])]
    assert same == ["embedding_scale"]

    model.eval().save_pretrained(tmp_path / "saved")
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = ["GRUSlots", model.generate(ids, **settings).tolist()]
    assert elsewhere(tmp_path / "saved", ids, tmp_path / "again", tmp_path) == expected
    assert elsewhere(tmp_path / "again", ids, tmp_path / "third", tmp_path) == expected
    here = Phase15ForCausalLM.from_pretrained(tmp_path / "again")
    assert here.generate(ids, **settings).tolist() == expected[1]

    model.save_hypernet(tmp_path / "adapter")  # the rule travels without the base, too
    assert elsewhere(tmp_path / "adapter", ids, tmp_path / "whole", tmp_path) == expected
    assert Phase15ForCausalLM.from_pretrained(tmp_path / "adapter").generate(ids, **settings).tolist() == expected[1]


def test_padding_does_not_reach_the_page_s_rule(gru_slots, bases):
    """Batched and padded rows give what each row gives alone."""
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_type": "gru_slots"}))
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with torch.no_grad():
        batched = model(ids, mask, query_lengths=torch.tensor([13, 7])).logits[1, 11:]
        alone = model(ids[1:, 11:], query_lengths=torch.tensor([7])).logits[0]
    assert_close(batched, alone, atol=1e-5, rtol=1e-5)


def test_a_type_that_is_not_registered_is_refused(bases):
    with pytest.raises(ValueError, match="`hypernet_type` is 'wishful', but the registered types are gated_overwrite"):
        Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_type": "wishful"})
    with pytest.raises(ValueError, match="`hypernet_type` is 7, but it must be the name"):
        Phase15Config(hypernet_type=7)
    with pytest.raises(TypeError, match="cannot be registered as 'linear'"):
        register_hypernet("linear")(torch.nn.Linear)


@pytest.mark.parametrize("fault", ["no file", "foreign import"])
def test_a_rule_that_could_not_travel_is_refused_at_saving(fault, bases, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from phase15.model.recursion_phase15 import HyperNetwork\n"
    code += "import phase15.cli.files\n" if fault == "foreign import" else ""
    code += "class Rule(HyperNetwork):\n    pass\n"
    if fault == "no file":
        space = {"__name__": "nowhere"}
        exec(code, space)
        rule = space["Rule"]
    else:
        (tmp_path / "foreign_rule.py").write_text(code)
        rule = importlib.import_module("foreign_rule").Rule
    monkeypatch.setitem(HYPERNETS, "rule", rule)
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_type": "rule"})
    message = {"no file": "Rule cannot be saved: define it in a file", "foreign import": "`import phase15.cli.files`"}
    with pytest.raises(ValueError, match=message[fault]):
        model.save_pretrained(tmp_path / "saved")


# the digest


def test_a_folder_of_another_formula_is_named_in_one_warning(tiny, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_phase15.logger, "warning_once", warnings.append)  # the library's: once a text
    tiny.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    assert config["hypernet_digest"] == formula_digest(tiny.hypernet) and config["phase15_version"] == VERSION
    Phase15ForCausalLM.from_pretrained(tmp_path / "saved")
    assert not warnings
    path.write_text(json.dumps(config | {"hypernet_digest": "0123456789abcdef"}))
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path / "saved")
    (message,) = warnings
    assert message.startswith(f"{tmp_path / 'saved'} was saved by code with another formula of the step")
    assert "`hypernet_digest` 0123456789abcdef" in message
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["hypernet_digest"] == config["hypernet_digest"]
    del config["hypernet_digest"], config["phase15_version"]  # saved before 0.6.0
    path.write_text(json.dumps(config))
    Phase15ForCausalLM.from_pretrained(tmp_path / "saved")
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda code: code.replace("torch.tanh(alpha)", "torch.sin(alpha)"), True),
        (lambda code: code.replace("(written - carried.embeds)", "(written + carried.embeds)"), True),
        (lambda code: code.replace("num_evicted * (slot >= num_sinks)", "num_evicted * (slot > num_sinks)"), True),
        (lambda code: code.replace("stepped = carried.embeds + delta", "stepped = carried.embeds - delta"), True),
        (lambda code: code.replace("slots = slots + self.cross_attn", "slots = slots - self.cross_attn"), True),
        (lambda code: code.replace('"""The default rule.', '"""The rule.').replace("# (B, N, h)", "#"), False),
        (lambda code: code.replace("def check_first_layers", "def checks_first_layers"), False),
    ],
)
def test_the_digest_is_that_of_the_formula(change, is_another, tiny, tmp_path, monkeypatch):
    code = Path(recursion_phase15.__file__).read_text("utf-8")
    changed = change(code)
    assert changed != code
    changed = changed.replace("from .configuration_phase15", "from phase15.model.configuration_phase15")
    (tmp_path / "changed_recursion.py").write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("changed_recursion")
    digest = module.formula_digest(module.HyperNetwork(tiny.config))
    del sys.modules["changed_recursion"]
    assert (digest != formula_digest(tiny.hypernet)) is is_another


def test_the_digest_is_the_same_for_every_size(tiny):
    other = HyperNetwork(Phase15Config(**SIZES | {"hypernet_reads_layers": 0, "hypernet_slot_gate": True}))
    assert formula_digest(other) == formula_digest(tiny.hypernet)


# the body by itself


def test_a_body_that_is_saved_by_itself_loads(tiny, tmp_path, monkeypatch):
    # lm_harness.py registers the config, and AutoModel then keeps to the class that it loaded first
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "phase15", raising=False)
    ids = random_ids(2, 20)
    expected = tiny.model(ids).last_hidden_state
    tiny.model.save_pretrained(tmp_path / "body")
    body = AutoModel.from_pretrained(tmp_path / "body", trust_remote_code=True)
    assert type(body).__name__ == "Phase15Model" and torch.equal(body(ids).last_hidden_state, expected)
    assert torch.equal(Phase15Model.from_pretrained(tmp_path / "body")(ids).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again).__name__ == "Phase15Model" and torch.equal(again(ids).last_hidden_state, expected)
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "body", trust_remote_code=True)  # it has no other weights
    assert torch.equal(head(ids).logits, tiny(ids).logits)
    tiny.save_pretrained(tmp_path / "head")  # whose config the body has shared
    assert type(AutoModel.from_pretrained(tmp_path / "head", trust_remote_code=True)).__name__ == "Phase15ForCausalLM"
