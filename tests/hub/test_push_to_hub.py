# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""push_to_hub.py against a Hub on 127.0.0.1: what it uploads, what others then load, and what ends it in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hub_server import Commit, HubServer, Request
from reference import SIZES, aligned
from safetensors.torch import load_file, save_file
from train_here import prepare
from transformers import AutoTokenizer

from phase15.commands.evaluation_run import evaluate
from phase15.commands.training_run import train
from phase15.evaluation.arguments import EvaluationArguments
from phase15.evaluation.losses import display_label
from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "push_to_hub.py")
ALICE, BOB, READER = "hf_aliceAliceAliceAliceAlice", "hf_bobBobBobBobBob", "hf_readerReaderReaderReader"
REPO, ANOTHER = "alice/phase15-tiny", "alice/phase15-another"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "evaluation.json",
    "generation_config.json",
    "loss_by_chunk.png",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_curve.png",
}
FILES |= {path.name for path in (ROOT / "phase15" / "model").glob("*_phase15.py")}
RUN = ("evaluation.json", "loss_by_chunk.png", "recipe.yaml", "results.json", "training_curve.png")

# Runs the script once per line of its input, in a copy of itself: importing torch for each would take minutes.
# Without "load" the copy does itself what the script would have a new process do.
RUNNER = """
import gc, json, os, runpy, sys, traceback

script = sys.argv[1]
sys.path[0] = os.path.dirname(script)
sys.path.append(os.path.join(sys.path[0], "tests"))
from phase15.commands import push_run  # imports everything that the script needs; each run executes the script again
from reference import answer_here

gc.freeze()  # so that forks share what there is
for line in sys.stdin:
    run = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.update(run["environment"])
for number, name in enumerate([os.devnull, *run["output"]]):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
if not run["load"]:
    push_run.answer_in_new_process = answer_here
sys.argv, status = run["argv"], 0
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:  # as Python ends, without the second that it takes to clear away all modules
    status = end.code or 0
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)
"""


@dataclass
class Run:
    returncode: int
    stdout: str
    stderr: str
    requests: list[Request]
    log: list[Commit]  # the repository's main branch afterwards, without the Hub's initial commit

    @property
    def error(self) -> str:
        """The one line that a failure is to say, beside libraries' warnings and progress bars."""
        assert self.returncode == 1, (self.returncode, self.stderr[-3000:])
        assert "Traceback" not in self.stderr, self.stderr[-3000:]
        lines = [line for line in self.stderr.splitlines() if line.startswith("push_to_hub.py: ")]
        assert len(lines) == 1, self.stderr[-3000:]
        return lines[0]

    def succeeded(self) -> "Run":
        assert self.returncode == 0, self.stderr[-3000:]
        return self


class Shell:
    """A user's shell with a Hub of its own."""

    def __init__(self, folder: Path, fork: bool):
        folder.mkdir()
        self.hub = HubServer(users={ALICE: "alice", BOB: "bob"}, read_only={READER: "alice"}).start()
        self.folder, self.runs = folder, []
        unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_MODULES_CACHE")
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
        self.environment = {name: value for name, value in os.environ.items() if name not in unset} | {
            "PYTHONPATH": os.pathsep.join(paths),
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": "1",
        }
        self.runner = fork and subprocess.Popen(
            [sys.executable, "-c", RUNNER, SCRIPT],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def push(
        self, model_dir, *flags, repo_id: str = REPO, token: str | None = ALICE, load: bool = False, **environment: str
    ) -> Run:
        """A run. Where the shell forks, only with `load` does a new process load what is staged: it takes long."""
        argv = [SCRIPT, "--model_dir", str(model_dir), "--repo_id", repo_id, *map(str, flags)]
        environment |= {"HF_TOKEN": token} if token else {}
        before = len(self.hub.requests)
        if self.runner:
            output = [str(self.folder / f"{len(self.runs)}.{name}") for name in ("out", "err")]
            run = {"argv": argv, "environment": environment, "output": output, "load": load}
            json.dump(run, self.runner.stdin)
            self.runner.stdin.write("\n")
            self.runner.stdin.flush()
            returncode = int(self.runner.stdout.readline())
            output = [Path(name).read_text() for name in output]
        else:
            command = [sys.executable, *argv]
            streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
            done = subprocess.run(command, cwd=self.folder, env=self.environment | environment, **streams)
            returncode, output = done.returncode, [done.stdout, done.stderr]
        repo = self.hub.repos.get(repo_id)
        self.runs.append(Run(returncode, *output, self.hub.requests[before:], repo.log()[1:] if repo else []))
        return self.runs[-1]

    def close(self):
        if self.runner:
            self.runner.stdin.close()
            self.runner.wait(60)
        self.hub.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def shells(folder):
    """Started before the models are made: the runners import meanwhile."""
    shells = {name: Shell(folder / f"shell-{name}", fork=name != "alone") for name in ("story", "faults", "alone")}
    yield shells
    for shell in shells.values():
        shell.close()


@pytest.fixture(scope="module")
def models(shells, folder, answers_here, chat_tokenizer) -> dict[str, Path]:
    """Folders to push: a training run, two that differ in their weights, and folders that cannot be pushed."""
    data = [{"query": f"Why is {i}?", "answer": "Blue light scatters most. " * 2} for i in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in data))
    llm = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = SIZES | {
        "dataset_name": str(folder / "data.jsonl"),
        "validation_split": 0.3,
        "base_config": llm | {"vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.2},
        "output_dir": str(folder / "first"),
        "max_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    train(*prepare([str(folder / "recipe.yaml")]))
    shutil.copytree(folder / "first", folder / "baselines" / "a|<b>")
    (folder / "baselines" / "a|<b>" / "recipe.yaml").unlink()
    numbers = [{"query": f"What is {i}?", "answer": f"Blue light.\n#### {i}"} for i in range(3)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in numbers))
    flags = {"validation_split": 1.0, "max_new_tokens": 4, "bootstrap_samples": 50, "device": "cpu"}
    flags["baselines"] = [str(folder / "baselines" / "a|<b>")]
    evaluate(EvaluationArguments(str(folder / "first"), str(folder / "numbers.jsonl"), **flags))

    def variant(name: str, **tensors: float) -> Path:
        shutil.copytree(folder / "first", folder / name)
        weights = load_file(folder / name / "model.safetensors")
        for tensor, value in tensors.items():
            weights[f"model.hypernet.{tensor}"].fill_(value)
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        return folder / name

    second = variant("second", alpha=0.5)
    for name in RUN:  # as save_pretrained leaves a model
        (second / name).unlink()
    (variant("third", alpha=0.7) / "evaluation.json").unlink()
    variant("nan", alpha=float("nan"))
    cut = variant("truncated weights") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (variant("broken evaluation") / "evaluation.json").write_text('{"validation": {}}')
    (variant("broken template") / "chat_template.jinja").write_text("{% for message in messages %}")
    (variant("broken tokenizer") / "tokenizer.json").write_text("{}")
    (variant("broken config") / "config.json").write_text('{"model_type": "phase15", ')
    (variant("another model") / "config.json").write_text('{"model_type": "llama"}')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file({"base_model.model.x": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
    (folder / "empty").mkdir()
    return {path.name: path for path in folder.iterdir() if path.is_dir()} | {"missing": folder / "missing"}


SHARDS = ("--max_shard_size", "60KB")
REFUSALS = {  # folder, flags, keywords of push(), what the line says
    "wrong token": ("first", (), {"token": "hf_wrongWrongWrongWrong"}, r"(?i)token"),
    "no token": ("first", (), {"token": None}, r"hf auth login.*HF_TOKEN"),
    "read-only token": ("first", (), {"token": READER}, r"(?i)token|permission|right"),
    "somebody else's namespace": ("first", (), {"repo_id": "bob/phase15-tiny"}, r"(?i)permission|right|bob"),
    "no namespace": ("first", (), {"repo_id": "phase15-tiny"}, r"phase15-tiny"),
    "three parts": ("first", (), {"repo_id": "alice/phase15/tiny"}, r"alice/phase15/tiny"),
    "spaces": ("first", (), {"repo_id": "alice/bad name!"}, r"alice/bad name!"),
    "two hyphens": ("first", (), {"repo_id": "alice/x--y"}, r"alice/x--y"),
    "a name with .git": ("first", (), {"repo_id": "alice/x.git"}, r"alice/x\.git"),
    "pull request and branch": ("first", ("--create_pr", "--revision", "dev"), {}, r"create_pr.*revision"),
    "no title": ("first", ("--commit_message", ""), {}, r"commit_message"),
    "unknown licence": ("first", ("--license", "do what you like"), {}, r"license.*apache-2\.0"),
    "missing": ("missing", (), {}, r"missing"),
    "empty": ("empty", (), {}, r"empty.*config\.json"),
    "another model": ("another model", (), {}, r"another model.*(?i:phase15)"),
    "adapter": ("adapter", (), {}, r"(?i)adapter.*merge"),
    "broken config": ("broken config", (), {}, r"config\.json"),
    "truncated weights": ("truncated weights", (), {}, r"safetensors|weights"),
    "broken tokenizer": ("broken tokenizer", (), {}, r"(?i)tokenizer"),
    "broken evaluation": ("broken evaluation", (), {}, r"evaluation\.json was not written by eval_sft\.py"),
    "broken template": ("broken template", (), {}, r"(?i)template"),
    "nan": ("nan", (), {}, r"/nan: .*finite"),
}
FAULTS = {"500": (500, False), "403": (403, False), "answer lost": ("cut", True)}


def push_story(shell, models, staged) -> dict[str, Run]:
    """One repository's life."""
    first = (models["first"], *SHARDS)
    changes = ("--private", "--commit_message", "First release")
    return {
        "dry": shell.push(*first, "--dry_run", "--output_dir", staged, token=None),
        "first": shell.push(*first, *changes, load=True),
        "again": shell.push(*first, *changes),
        "changed": shell.push(models["second"]),
        "pr": shell.push(models["third"], "--create_pr"),
        "branch": shell.push(models["third"], "--revision", "dev/x"),
    } | push_over_an_edit(shell, models)


EDITED = b"---\nlicense: mit\n---\nMy own words.\n"


def push_over_an_edit(shell, models) -> dict[str, Run]:
    """Somebody edits the card on the Hub, then the same model is pushed."""
    shell.push(models["first"], repo_id=ANOTHER)
    repo = shell.hub.repos[ANOTHER]
    last = repo.log()[-1]
    edited = last.files | {"README.md": replace(last.files["README.md"], data=EDITED)}
    repo.add("main", Commit("Edit", "", "alice", last.sha, edited))
    return {
        "edited": shell.push(models["first"], repo_id=ANOTHER),
        "replaced": shell.push(models["first"], "--overwrite_card", repo_id=ANOTHER),
    }


def push_in_vain(shell, models) -> dict[str, Run]:
    """What is wrong with the input, then a Hub that fails at the commit, in the end does not, dies and is gone."""
    runs = {}
    for case, (model_dir, flags, keywords, _) in REFUSALS.items():
        runs[case] = shell.push(models[model_dir], *flags, **keywords)
    for case, (action, after) in FAULTS.items():
        shell.hub.fail("POST", f"/api/models/{REPO}/commit/", action, after, times=1)
        runs[case] = shell.push(models["first"])
    runs["at last"] = shell.push(models["first"])
    runs["public"] = shell.push(models["second"], "--private")
    shell.hub.fail("PUT", "/lfs/", "die", times=1)
    runs["died"] = shell.push(models["first"], repo_id=ANOTHER)
    shell.hub.start()
    runs["completed"] = shell.push(models["first"], repo_id=ANOTHER)
    shell.hub.stop()
    return runs | {"no network": shell.push(models["first"])}


def push_without_a_hub(shell, models, staged) -> Run:
    return shell.push(models["first"], "--dry_run", "--output_dir", staged, *SHARDS, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def lanes(shells, models, folder):
    """The three shells at work at the same time: they spend most of theirs importing, and waiting to try again."""
    with ThreadPoolExecutor() as pool:
        yield {
            "story": pool.submit(push_story, shells["story"], models, folder / "staged"),
            "faults": pool.submit(push_in_vain, shells["faults"], models),
            "alone": pool.submit(push_without_a_hub, shells["alone"], models, folder / "staged-offline"),
        }


@pytest.fixture(scope="module")
def story(lanes) -> dict[str, Run]:
    return lanes["story"].result()


@pytest.fixture(scope="module")
def faults(lanes) -> dict[str, Run]:
    return lanes["faults"].result()


@pytest.fixture(scope="module")
def alone(lanes) -> Run:
    return lanes["alone"].result()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploaded(commit: Commit) -> dict[str, bytes]:
    return {path: file.data for path, file in commit.files.items() if path != ".gitattributes"}


# what is uploaded


def test_a_push_is_one_commit_of_the_files_that_a_dry_run_stages(story, folder):
    staged = contents(folder / "staged")
    shards = {name for name in staged if "safetensors" in name}
    assert set(staged) - shards == FILES
    assert len(shards) > 2 and "model.safetensors.index.json" in shards and "model.safetensors" not in shards
    assert story["first"].succeeded().stderr.count("Traceback") == 0
    (commit,) = story["first"].log
    assert uploaded(commit) == staged and commit.title == "First release"


def test_weights_and_pictures_are_uploaded_as_large_files(story):
    files = story["first"].log[0].files
    assert {name for name, file in files.items() if file.lfs} == {
        name for name in files if name.endswith((".safetensors", ".png"))
    }


def test_the_same_push_again_makes_no_commit(story):
    assert story["again"].succeeded().log == story["first"].log


def test_another_model_makes_one_commit(story, models):
    """Here its many shards, and its training run."""
    first, second = story["changed"].succeeded().log
    assert [first] == story["first"].log and second.parent == first.sha
    files = uploaded(second)
    assert set(files) == FILES - set(RUN) | {"model.safetensors"}
    assert files["model.safetensors"] == (models["second"] / "model.safetensors").read_bytes()


def test_a_private_repository_is_private(story, faults, shells):
    assert shells["story"].hub.repos[REPO].private
    assert not shells["faults"].hub.repos[REPO].private


def test_a_pull_request_leaves_main_alone(story, shells, models):
    assert story["pr"].succeeded().log == story["changed"].log
    commit = shells["story"].hub.repos[REPO].log("refs/pr/1")[-1]
    assert commit.parent == story["changed"].log[-1].sha
    assert uploaded(commit)["model.safetensors"] == (models["third"] / "model.safetensors").read_bytes()
    assert "/discussions/1" in story["pr"].stdout


def test_a_new_branch_leaves_main_alone(story, shells, models):
    assert story["branch"].succeeded().log == story["changed"].log
    repo = shells["story"].hub.repos[REPO]
    assert set(repo.refs) == {"main", "refs/pr/1", "dev/x"}
    commit = repo.log("dev/x")[-1]
    assert commit.parent == story["changed"].log[-1].sha
    assert uploaded(commit)["model.safetensors"] == (models["third"] / "model.safetensors").read_bytes()


def test_a_dry_run_needs_neither_the_hub_nor_a_token(story, alone, folder):
    """Offline or not makes no difference to what is staged."""
    for run in (story["dry"], alone):
        assert run.succeeded().requests == []
    assert contents(folder / "staged-offline") == contents(folder / "staged")


def test_the_server_of_these_tests_had_no_errors_of_its_own(story, faults, alone, shells):
    assert [shell.hub.errors for shell in shells.values()] == [[], [], []]


def test_an_edited_card_is_kept_unless_asked(story):
    assert "somebody has edited it. `--overwrite_card true` replaces it." in story["edited"].error
    assert uploaded(story["edited"].log[-1])["README.md"] == EDITED
    assert b"My own words" not in uploaded(story["replaced"].succeeded().log[-1])["README.md"]


# what others load

LOAD = """
import importlib.util, json, sys
import huggingface_hub, torch, transformers
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoTokenizer

torch.set_num_threads(1)
assert importlib.util.find_spec("modeling_phase15") is None, "the repository is on this process's path"
repo_id, revisions, prompt = sys.argv[1], sys.argv[2:-1], sys.argv[-1]
results = {"refused": {}}
for revision in revisions:
    remote = {"trust_remote_code": True, "revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(repo_id, **remote)
    inputs = tokenizer.apply_chat_template(json.loads(prompt), add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")
    for name in ("AutoModelForCausalLM", "AutoModel"):
        model, info = getattr(transformers, name).from_pretrained(repo_id, output_loading_info=True, **remote)
        assert not any(info.values()), info
        for weight in model.parameters():  # as conftest.aligned
            weight.data = weight.data.clone()
        with torch.no_grad():
            results[revision, name] = inputs["input_ids"], model(**inputs).logits, model.generate(
                **inputs, max_new_tokens=20, do_sample=False
            )
    results[revision, "config"] = transformers.AutoConfig.from_pretrained(repo_id, **remote).to_diff_dict()
for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel"):
    try:
        getattr(transformers, name).from_pretrained(repo_id, revision=revisions[0])
    except ValueError as error:
        results["refused"][name] = str(error)
card = ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revisions[0]))
if huggingface_hub.__version__ >= "2":  # before, it asks huggingface.co whatever HF_ENDPOINT says
    card.validate()
results["card"] = card.data.to_dict(), card.data.eval_results, card.text
torch.save(results, "results.pt")
"""
PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def elsewhere(story, shells, folder) -> dict:
    """What a process got that knows the repository's name and has a token, and nothing else."""
    shell, home = shells["story"], folder / "elsewhere"
    home.mkdir()
    revisions = [story["first"].succeeded().log[0].sha, "dev/x"]
    command = [sys.executable, "-c", LOAD, REPO, *revisions, json.dumps(PROMPT)]
    environment = shell.environment | {"HF_HOME": str(home / "hf"), "HF_TOKEN": ALICE}
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=home, env=environment, **streams)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(home / "results.pt", weights_only=False)


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
@pytest.mark.parametrize(("name", "revision"), [("first", 0), ("third", "dev/x")])
def test_another_process_gets_the_same_logits_bit_for_bit(elsewhere, story, models, name, revision, auto_class):
    revision = revision or story["first"].log[0].sha
    model, tokenizer = (c.from_pretrained(models[name]) for c in (Phase15ForCausalLM, AutoTokenizer))
    aligned(model)
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    ids, logits, tokens = elsewhere[revision, auto_class]
    assert torch.equal(ids, inputs["input_ids"]) and torch.equal(logits, expected)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=20, do_sample=False))


def test_another_process_gets_the_same_config(elsewhere, models):
    config = elsewhere["dev/x", "config"]
    assert config["model_type"] == "phase15" and {name: config[name] for name in SIZES} == SIZES


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForCausalLM", "AutoModel"])
def test_nothing_is_run_without_trust_remote_code(elsewhere, auto_class):
    assert "trust_remote_code=True" in elsewhere["refused"][auto_class]


def test_the_card_is_valid_and_its_results_are_the_runs(elsewhere, models):
    data, eval_results, text = elsewhere["card"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    validation = json.loads((models["first"] / "evaluation.json").read_text())["validation"]
    assert eval_results and any(abs(r.metric_value - validation["model"]["loss"]) < 1e-3 for r in eval_results)
    assert {r.dataset_name for r in eval_results} == {"numbers.jsonl"}  # not what it was trained on
    assert "trust_remote_code=True" in text and REPO in text


def test_the_card_shows_what_eval_sft_measured(story, models):
    files, evaluation = uploaded(story["first"].log[0]), json.loads((models["first"] / "evaluation.json").read_text())
    assert json.loads(files["evaluation.json"]) == evaluation
    assert set(evaluation["exact_match"]) < set(evaluation["validation"]) and len(evaluation["validation"]) == 7
    card = files["README.md"].decode().split("\n---\n", 1)[1]  # behind the metadata, which YAML escapes
    assert f"on {evaluation['evaluated']} (" in card and "held out of this run" not in card
    for name, row in evaluation["validation"].items():
        name = "`baseline: a¦<b>`" if "a|<b>" in name else display_label(name)
        low, high = row["interval"]
        assert f"\n| {name} | {row['loss']:.4f} | [{low:.4f}, {high:.4f}] | " in card
    assert "| the model | " in card and "/3 (" in card and "a|<b>" not in card
    for name, result in evaluation["context_recovery"].items():
        number = result["gap" if result["recovery"] is None else "recovery"]
        number = f"{number:.4f} nats" if result["recovery"] is None else f"{number:.1%}"
        assert re.search(rf"\n- context recovery, {re.escape(display_label(name))}: .*{re.escape(number)}", card)
    assert "](loss_by_chunk.png)" in card


def test_without_it_the_card_shows_the_runs_own_table(story, shells, models):
    files = uploaded(shells["story"].hub.repos[REPO].log("dev/x")[-1])
    card, results = files["README.md"].decode(), json.loads((models["third"] / "results.json").read_text())
    assert "evaluation.json" not in files and "2 validation records of data.jsonl, held out of this run" in card
    for name, row in results["validation"].items():
        assert f"\n| {display_label(name)} | {row['loss']:.4f} |\n" in card
    assert "\n- context recovery, same LLM: " in card


# what goes wrong


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_push_says_why_in_one_line_and_writes_nothing(case, faults, shells):
    run = faults[case]
    assert re.search(REFUSALS[case][3], run.error.removeprefix("push_to_hub.py: ")), run.error
    assert not any(request.writes and request.status == 200 for request in run.requests), run.requests
    assert run.log == [] and set(shells["faults"].hub.repos) <= {REPO, ANOTHER}


@pytest.mark.parametrize("case", FAULTS)
def test_a_commit_that_fails_leaves_nothing_to_be_seen(case, faults):
    run = faults[case]
    assert run.error and len(run.log) == (1 if case == "answer lost" else 0)


def test_after_failures_the_same_command_makes_the_one_commit(faults):
    assert faults["at last"].succeeded().log == faults["answer lost"].log


def test_a_public_repository_gets_no_private_push(faults):
    assert "public" in faults["public"].error and faults["public"].log == faults["at last"].log


def test_a_second_run_completes_an_upload_that_died(faults):
    assert faults["died"].error and faults["died"].log == []
    assert any(r.method == "PUT" and r.status is None for r in faults["died"].requests)
    (commit,) = faults["completed"].succeeded().log
    assert set(uploaded(commit)) == FILES | {"model.safetensors"}


def test_no_network(faults):
    assert re.search(r"(?i)127\.0\.0\.1:\d+|connect|network|reach", faults["no network"].error)


def test_no_token_is_said_or_uploaded(story, faults, alone, shells, folder):
    runs = [run for shell in shells.values() for run in shell.runs]
    said = [text for run in runs for text in (run.stdout, run.stderr)]
    files = [data for staged in ("staged", "staged-offline") for data in contents(folder / staged).values()]
    for shell in shells.values():
        files += [data for repo in shell.hub.repos.values() for data in repo.lfs.values()]
        commits = [commit for repo in shell.hub.repos.values() for commit in repo.commits.values()]
        files += [data for commit in commits for data in uploaded(commit).values()]
        said += [text for commit in commits for text in (commit.title, commit.description)]
    for token in (ALICE, BOB, READER, "hf_wrong"):
        assert not any(token in text for text in said)
        assert not any(token.encode() in data for data in files)
    sent = [r for shell in shells.values() for r in shell.hub.requests]
    assert not any(r.path.startswith("/lfs/") and "Authorization" in r.headers for r in sent)
    assert not any(token in r.path for r in sent for token in (ALICE, BOB, READER))
