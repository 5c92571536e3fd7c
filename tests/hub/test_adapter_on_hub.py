# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A HyperNetwork and its base, each in a repository of its own: pushed by the command, fetched by another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from reference import LLM_SIZES, SIZES, random_ids, randomise_alpha
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[2]
ALICE = "hf_aliceAliceAliceAliceAlice"

UPLOAD = """
import sys
from huggingface_hub import HfApi

HfApi().create_repo("alice/base", exist_ok=True)
HfApi().upload_folder(repo_id="alice/base", folder_path=sys.argv[1])
"""
# As a user: the base from the Hub, a HyperNetwork on it, saved without the base.
MAKE = """
import sys, torch
from phase15 import Phase15ForCausalLM

torch.set_num_threads(1)
made = torch.load("made.pt")
model = Phase15ForCausalLM.from_base("alice/base", **made["sizes"])
model.hypernet.load_state_dict(made["hypernet"])
model.save_hypernet("adapter")
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("alice/adapter", trust_remote_code=True)
AutoTokenizer.from_pretrained("alice/adapter", trust_remote_code=True)
torch.save(model(torch.load("made.pt")["ids"]).logits.detach(), "logits.pt")
print(model.config.base_model_name_or_path, model.config.base_revision)
"""


def upload(hub, folder: Path, shell: dict):
    """Commits the files of a folder to alice/base."""
    run([sys.executable, "-c", UPLOAD, folder], shell)


def run(command: list, shell: dict) -> str:
    done = subprocess.run(list(map(str, command)), **shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_base_is_fetched_at_the_commit_that_it_had(chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)}))
    base.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    model = randomise_alpha(Phase15ForCausalLM.from_base(tmp_path / "base", **SIZES))
    ids = random_ids(2, 30)
    made = {"sizes": SIZES, "hypernet": model.hypernet.state_dict(), "ids": ids}
    torch.save(made, tmp_path / "made.pt")
    with HubServer(users={ALICE: "alice"}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": ALICE,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        environment.pop("HF_MODULES_CACHE", None)
        shell = {"cwd": tmp_path, "env": environment}
        upload(hub, tmp_path / "base", shell)
        revision = hub.repos["alice/base"].resolve("main").sha
        run([sys.executable, "-c", MAKE], shell)
        config = json.loads((tmp_path / "adapter" / "config.json").read_text())
        assert (config["base_model_name_or_path"], config["base_revision"]) == ("alice/base", revision)
        chat_tokenizer.save_pretrained(tmp_path / "adapter")
        push = [sys.executable, ROOT / "push_to_hub.py", "--model_dir", "adapter", "--repo_id", "alice/adapter"]
        run(push, shell)
        files = hub.repos["alice/adapter"].resolve("main").files
        assert len(files["model.safetensors"].data) < 1.2 * sum(w.nbytes for w in made["hypernet"].values()) + 8000
        assert "base_model: alice/base" in files["README.md"].data.decode()

        with torch.no_grad():
            base.lm_head.weight.add_(1)
        base.save_pretrained(tmp_path / "base")
        upload(hub, tmp_path / "base", shell)
        assert hub.repos["alice/base"].resolve("main").sha != revision
        asked = len(hub.requests)
        elsewhere = environment | {"HF_HOME": str(tmp_path / "elsewhere"), "PYTHONPATH": ""}
        said = run([sys.executable, "-c", LOAD], {"cwd": tmp_path, "env": elsewhere})
        assert said.split()[-2:] == ["alice/base", revision]
        fetched = [r.path for r in hub.requests[asked:] if r.path.startswith("/alice/base/resolve/")]
        assert fetched and all(path.startswith(f"/alice/base/resolve/{revision}/") for path in fetched)
        assert not hub.errors
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)
