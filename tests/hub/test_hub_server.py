# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""tests/hub_server.py through the unmodified client: answers that test_push_to_hub.py relies on."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer


CLIENT = """
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

alice, bob, nobody = (HfApi(token=token) for token in ("hf_alice", "hf_bob", False))
answers = {}

def ask(name, call):
    try:
        answers[name] = str(call())
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

def card(metadata):
    text = f"---\\n{metadata}\\n---\\n# Title\\n"
    return lambda: alice.upload_file(repo_id="alice/m", path_or_fileobj=text.encode(), path_in_repo="README.md")

folder = Path("folder")
(folder / "sub").mkdir(parents=True)
files = {"a.safetensors": os.urandom(250_000), "sub/b.txt": b"b", "README.md": b"---\\nlicense: mit\\n---\\n"}
for name, data in files.items():
    (folder / name).write_bytes(data)
alice.create_repo("alice/m", private=True)
first = alice.upload_folder(repo_id="alice/m", folder_path=folder, commit_message="One").oid
assert alice.upload_folder(repo_id="alice/m", folder_path=folder).oid == first
copy = Path(snapshot_download("alice/m", token="hf_alice"))
assert all((copy / path.relative_to(folder)).read_bytes() == path.read_bytes() for path in folder.rglob("*.*"))
assert alice.model_info("alice/m").card_data.license == "mit"

add = [CommitOperationAdd("c.txt", b"c")]
stale = alice.list_repo_refs("alice/m").branches[0].target_commit
alice.create_commit("alice/m", add, commit_message="Two", parent_commit=stale)
more = [CommitOperationAdd("d.txt", b"d")]
ask("stale parent", lambda: alice.create_commit("alice/m", more, commit_message="Three", parent_commit=stale))
ask("no file", lambda: alice.delete_file("nope", "alice/m"))
ask("no entry", lambda: hf_hub_download("alice/m", "nope", token="hf_alice"))
ask("no revision", lambda: hf_hub_download("alice/m", "c.txt", revision="nope", token="hf_alice"))
ask("private, another user", lambda: bob.model_info("alice/m"))
ask("private, no token", lambda: nobody.model_info("alice/m"))
ask("another namespace", lambda: bob.create_repo("alice/n"))
ask("read-only", lambda: HfApi(token="hf_read").create_repo("alice/n"))
ask("wrong token", lambda: HfApi(token="hf_wrong").whoami())
ask("licence", card("license: my own"))
ask("not a mapping", card("- license"))
ask("base model", card("base_model: /home/alice/base"))
ask("twice", card("license: mit\\nlicense: mit"))
results = "model-index: [{name: m, results: [{task: {type: x}, dataset: {type: y}, metrics: []}]}]"
ask("results", card(results))
ask("valid", card("license: [mit]\\nbase_model: alice/m\\nlanguage: en"))
print(json.dumps(answers))
"""
ANSWERS = {
    "stale parent": "412",
    "no file": "RemoteEntryNotFoundError",
    "no entry": "RemoteEntryNotFoundError",
    "no revision": "RevisionNotFoundError",
    "private, another user": "RepositoryNotFoundError: 404",
    "private, no token": "RepositoryNotFoundError: 401",
    "another namespace": "403 Forbidden",
    "read-only": "403 Forbidden",
    "wrong token": "Invalid user token",
    "licence": "apache-2.0",
    "not a mapping": "must be an object",
    "base model": "/home/alice/base",
    "twice": "duplicated",
    "results": "model-index[0].results[0].dataset.name",
    "valid": "/alice/m/commit/",
}


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visit")
    users = {"hf_alice": "alice", "hf_bob": "bob"}
    with HubServer(users, read_only={"hf_read": "alice"}, multipart_size=100_000) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment["NO_PROXY"] = "127.0.0.1"
        del environment["HF_HUB_OFFLINE"]
        command = [sys.executable, "-c", CLIENT]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not hub.errors, (done.stderr[-3000:], hub.errors)
    return hub, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("question", ANSWERS)
def test_the_client_understands_the_answer(visit, question):
    assert ANSWERS[question] in visit[1][question]


def test_large_files_come_in_parts_and_are_committed_once(visit):
    hub, _ = visit
    titles = [commit.title for commit in hub.repos["alice/m"].log()]
    assert titles == ["initial commit", "One", "Two", "Upload README.md with huggingface_hub"]
    assert sum(request.method == "PUT" and "part=" in request.path for request in hub.requests) == 3
