# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Runs of train_sft.py that are killed, stopped or cannot write, and checkpoints that are torn or hold code. A run is a
process of its own, forked from a server that has imported everything; some are the real command.
"""

import ctypes
import json
import multiprocessing
import os
import pickle
import pkgutil
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from accelerate.utils.other import get_free_port
from peft import LoraConfig, PeftModel, get_peft_model
from reference import SIZES
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from train_here import prepare
from transformers import AutoModelForCausalLM, PreTrainedModel

from phase15 import loading
from phase15.cli.files import write_text
from phase15.commands import training_run
from phase15.commands.training_run import train
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training.checkpoints import (
    MANIFEST,
    Phase15CheckpointError,
    find_checkpoint,
    find_problem,
    last_complete,
    load_tensors_only,
    write_manifest,
)


ROOT = Path(__file__).parents[2]
STEPS, SAVE = 98, 3  # 5 steps an epoch; the last is in the middle of one
SAVING = (  # the files of a checkpoint, in their order, and what writes them
    ("config.json", "transformers.configuration_utils.PreTrainedConfig.to_json_file"),
    ("model.safetensors", "transformers.modeling_utils.safe_save_file"),
    ("optimizer.pt", "torch.save"),
    ("scheduler.pt", "torch.save"),
    ("rng_state.pth", "torch.save"),
    ("trainer_state.json", "transformers.trainer_callback.TrainerState.save_to_json"),
    (MANIFEST, "os.replace"),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """Values for a recipe: two steps of accumulation, dropout, and an evaluation now and then."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    letters = random.Random(0)
    pairs = [["".join(letters.choices("abcdefgh", k=n)) for n in (1 + i % 5, 1 + i % 9)] for i in range(22)]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    llm = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SIZES | {
        "base_config": llm | {"vocab_size": 261, "num_key_value_heads": 1, "attention_dropout": 0.2},
        "dataset_name": str(path),
        "max_answer_length": 14,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": SAVE,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def write(recipe: dict, folder: Path, **values) -> Path:
    """The recipe in a file; its run is beside it."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "run"), **values}))
    return path


# runs


def owner_of(target: str) -> tuple:
    """The module or class of a function, and its name there."""
    owner, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner), name


def patch(target: str, file: str, number: int, action):
    """Instead of a function's n-th call for a file of such a name, calls `action(call, path)`."""
    owner, name = owner_of(target)
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        paths = [Path(arg) for arg in args if isinstance(arg, str | Path)]
        if paths and re.fullmatch(file, paths[-1].name):
            calls.append(paths)
            if len(calls) == number:
                return action(lambda: original(*args, **kwargs), paths[-1])
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def die(call, path: Path):
    """Killed before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(call, path: Path):
    """Killed when a file is half written."""
    call()
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def die_removing(call, path: Path):
    """Killed when a folder is half removed."""
    (path / "model.safetensors").unlink(missing_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds: float):
    """Killed by the clock, wherever that is."""

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def work(recipe: Path, log: Path, prepare_process):
    """One process that runs the script."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # slow, and done in the runs of the real command
    training_run.answer_in_new_process = lambda folder, query, max_new_tokens: query
    if prepare_process is not None:
        function, *arguments = prepare_process
        function(*arguments)
    run_script(recipe)


def run_script(recipe: Path):
    sys.argv, since = ["train_sft.py", str(recipe)], time.monotonic()
    runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
    print(f"took {time.monotonic() - since} s")


class Run:
    """A forked run of the script."""

    def __init__(self, process, log: Path):
        self.process, self.log = process, log

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 120) -> int:
        """Its exit status, the negative number of the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"no end after {timeout} s:\n{self.output[-3000:]}"
        return self.process.exitcode

    @property
    def lines(self) -> list[str]:
        """What it complained of, or said at its end."""
        return [line for line in self.output.splitlines() if line.startswith(("train_sft.py: ", "Stopped by "))]


@pytest.fixture(scope="module")
def fork():
    """Starts runs."""
    context, runs = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["test_faults"])

    def start(recipe: Path, *prepare_process, target=work) -> Run:
        log = recipe.parent / f"{time.monotonic_ns()}.log"
        runs.append(context.Process(target=target, args=(recipe, log, prepare_process or None)))
        runs[-1].start()
        return Run(runs[-1], log)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(
            "PYTHONPATH",
            f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests' / 'training'}",
            prepend=os.pathsep,
        )
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def whole(fork, recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run = fork(write(recipe, folder))
    assert run.wait() == 0, run.output[-3000:]
    (folder / "seconds").write_text(re.search(r"^took (\S+) s$", run.output, re.M)[1])
    return folder / "run"


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def losses_of(folder: Path) -> dict:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {(entry["step"], name): entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry}


def assert_same_run(folder: Path, whole: Path):
    """The same bytes of weights, the same optimizer state and the same log, and nothing half done beside them."""
    last = last_complete(whole).name
    for name in ("", last):
        weights = [(path / name / "model.safetensors").read_bytes() for path in (folder, whole)]
        assert weights[0] == weights[1], name
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(path / last / name, weights_only=True) for path in (folder, whole)]
        assert same(*states), name
    assert losses_of(folder) == losses_of(whole)
    names = [{path.name for path in run.iterdir() if path.is_file()} for run in (folder, whole)]
    assert names[0] == names[1] and not list(folder.rglob(".*"))


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


# killed


def kills() -> list[tuple]:
    """
    Twenty moments: in every file of a checkpoint, before and during the removal of an older one, by the clock, in the
    real command, and in the final save.
    """
    moments = [("call", target, name, 1 + number % 2, die_writing) for number, (name, target) in enumerate(SAVING)]
    moments[-1] = (*moments[-1][:-1], die)  # the manifest is not half written, but not moved to its place
    moments.append(("call", "phase15.training.trainer.rotate_checkpoints", "run", 2, die))
    moments.append(("call", "shutil.rmtree", r"checkpoint-\d+", 1, die_removing))
    moments += [("clock",)] * 6 + [("command", "optimizer.pt"), ("command", "trainer_state.json")]
    random.Random(1).shuffle(moments)
    return moments + [
        ("end", dict(SAVING)["model.safetensors"], "model.safetensors", die_writing),
        ("end", "os.replace", "tokenizer.json", die),
        ("end", "os.replace", "results.json", die),
    ]


@pytest.mark.slow
def test_twenty_kills_change_nothing(fork, recipe, whole, tmp_path):
    """Not a bit of the weights, not the optimizer's state, not the log."""
    path, folder, clock = write(recipe, tmp_path), tmp_path / "run", random.Random(0)
    training = json.loads((whole / "results.json").read_text())["train"]["train_runtime"]
    started = json.loads((whole.parent / "seconds").read_text()) - training
    assert len(kills()) == 20
    last, num_torn = 0, 0
    for kill in kills():
        if kill[0] == "command":
            status, output = killed_command(path, folder, kill[1])
        else:
            if kill[0] == "clock":  # at the latest on the way to the third checkpoint or so
                kill = ("clock", clock.uniform(started / 4, started / 3 + training * 2 * SAVE / STEPS))
            run = fork(path, {"call": patch, "end": patch_the_end, "clock": die_after}[kill[0]], *kill[1:])
            status, output = run.wait(), run.output
        assert status == -signal.SIGKILL and not (folder / "results.json").exists(), (kill, output[-3000:])
        resumed = re.findall(r"Resuming from .*checkpoint-(\d+)\.$", output, re.M)
        is_early = kill[0] == "clock" or kill[1] == "shutil.rmtree"  # maybe before it resumed
        assert resumed == ([str(last)] if last else []) or is_early and not resumed, (kill, output[-3000:])
        num_torn += output.count("Removing the torn checkpoint")
        assert step_of(last_complete(folder)) >= last, kill
        last = step_of(last_complete(folder))
        assert len(list(folder.glob("checkpoint-*"))) <= recipe["save_total_limit"] + 1
        print(*kill[:3], last, num_torn, sep="\t")
    run = fork(path)
    assert run.wait() == 0, run.output[-3000:]
    assert num_torn >= len(SAVING) and last == STEPS
    assert_same_run(folder, whole)
    assert len(losses_of(whole)) == STEPS + STEPS // 7


def patch_the_end(target: str, name: str, action):
    """As `patch`, for the first call after the training."""
    train = transformers.Trainer.train

    def trained(*args, **kwargs):
        result = train(*args, **kwargs)
        patch(target, name, 1, action)
        return result

    transformers.Trainer.train = trained


def killed_command(path: Path, folder: Path, name: str) -> tuple[int, str]:
    """The real command, killed when it begins to write a file of a checkpoint."""
    before = {path.parent for path in folder.glob(f"checkpoint-*/{name}")}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (path.parent / "command.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_sft.py"), str(path)], env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        while not {path.parent for path in folder.glob(f"checkpoint-*/{name}")} - before:
            assert process.poll() is None and time.monotonic() < deadline, (path.parent / "command.log").read_text()
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    return process.returncode, (path.parent / "command.log").read_text()


# stopped


SHORT = {"max_steps": 16, "save_steps": 6, "save_total_limit": 2}


@pytest.fixture(scope="module")
def short(fork, recipe, tmp_path_factory) -> Path:
    """The folder of a short run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("short")
    run = fork(write(recipe, folder, **SHORT))
    assert run.wait() == 0, run.output[-3000:]
    return folder / "run"


STOPS = {  # at the call of which function that comes, what it says: after which step, and where it goes on
    "before the first step": ("transformers.Trainer.get_train_dataloader", 1, None, 0),
    "in the first half of a step": ("transformers.Trainer.training_step", 17, 9, 9),
    "in the last step of an epoch": ("transformers.Trainer.training_step", 20, 10, 10),
    "in an evaluation": ("transformers.Trainer.evaluation_loop", 1, 7, 7),
    "in a checkpoint": (dict(SAVING)["trainer_state.json"], 1, 6, 6),
    "in the last step": ("transformers.Trainer.training_step", 32, 16, 16),
    "while the model is saved": ("transformers.Trainer.save_model", 4, None, 16),
    "while rows are compared": ("phase15.commands.training_run.compare", 1, None, 16),
}


def signal_at(target: str, number: int, *signals: int):
    """Signals come with the n-th call of a function."""
    owner, name = owner_of(target)
    original, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            for each in signals:
                os.kill(os.getpid(), each)
        return original(*args, **kwargs)

    setattr(owner, name, called)


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPS)
def test_sigterm_stops_a_run_that_goes_on(case, fork, recipe, short, tmp_path):
    """Exit code 0, one line, nothing torn; the same command makes the same run of it."""
    target, number, after, last = STOPS[case]
    path, folder = write(recipe, tmp_path, **SHORT), tmp_path / "run"
    run = fork(path, signal_at, target, number, signal.SIGTERM)
    assert run.wait() == 0, run.output[-3000:]
    where = rf"goes on from {folder}/checkpoint-{last}, which is complete" if last else "starts again: .*"
    after = f" after step {after}" if after else ""
    assert len(run.lines) == 1 and re.fullmatch(
        rf"Stopped by SIGTERM{after}\. The same command {where}\.", run.lines[0]
    ), run.output
    assert "Traceback" not in run.output and not (folder / "results.json").exists()
    assert step_of(last_complete(folder)) == last and not any(map(find_problem, folder.glob("checkpoint-*")))
    again = fork(path)
    assert again.wait() == 0 and "torn" not in again.output, again.output[-3000:]
    assert_same_run(folder, short)


@pytest.mark.slow
def test_ctrl_c_stops_at_the_end_of_the_step_and_twice_at_once(fork, recipe, tmp_path):
    for number, status, after in ((1, 0, " after step 3"), (2, 130, "")):
        (tmp_path / str(number)).mkdir()
        path = write(recipe, tmp_path / str(number), **SHORT)
        run = fork(path, signal_at, "transformers.Trainer.training_step", 5, *[signal.SIGINT] * number)
        assert run.wait() == status and len(run.lines) == 1, run.output[-3000:]
        assert run.lines[0].startswith(f"Stopped by SIGINT{after}. The same command ")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(fork, recipe, tmp_path):
    path, port = write(recipe, tmp_path, **SHORT | {"per_device_train_batch_size": 1}), get_free_port()
    runs = [fork(path, one_of_two, rank, port) for rank in (0, 1)]
    outputs = [(run.wait(), run.output[-3000:]) for run in runs]
    assert [status for status, _ in outputs] == [0, 0], outputs
    lines = [line for run in runs for line in run.lines]
    assert len(lines) == 1 and re.match(r"Stopped by a signal after step (4|5)\. .*checkpoint-\1, ", lines[0]), outputs
    found = last_complete(tmp_path / "run")
    assert {path.name for path in found.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    (found / "rng_state_1.pth").unlink()
    assert "rng_state_1.pth" in find_problem(found)


def one_of_two(rank: int, port: int):
    """The second of two processes gets the signal."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, 2, 2, "127.0.0.1", port)), strict=True))
    if rank == 1:
        signal_at("transformers.Trainer.training_step", 8, signal.SIGTERM)


# no space


SPACES = {  # what is short: KiB left on the disk, or bytes that a file may have; and what cannot be written for it
    "disk-60": ("disk", 60),
    "disk-300": ("disk", 300),
    "disk-440": ("disk", 440),
    "file-60000": ("file", 60_000),
    "file-150000": ("file", 150_000),
}


def mount(folder: Path, size: int, again: bool = False):
    """A disk of so many KiB, which only this process sees. Raises an OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, remount, private = 0x20000, 0x10000000, 32, 0x40000 | 0x4000
    calls = [lambda: libc.mount(b"none", bytes(folder), b"tmpfs", remount if again else 0, b"size=%dk" % size)]
    if not again:
        calls.insert(0, lambda: libc.unshare(new_namespace | (new_user if os.geteuid() else 0)))
        calls.insert(1, lambda: libc.mount(b"none", b"/", None, private, None))
    for call in calls:
        if call():
            raise OSError(ctypes.get_errno(), f"cannot mount {folder}")


def without_space(kind: str, size: int, outside: Path, recipe: Path):
    """A run that is stopped after step 3, goes on without space, and then with it; all in this process."""
    folder = recipe.parent / "run"
    folder.mkdir()
    try:
        if kind == "disk":
            mount(folder, 8000)
    except OSError:
        kind, size = "file", {60: 60_000, 300: 150_000, 440: 10_000}[size]
    signal_at("transformers.Trainer.training_step", 6, signal.SIGTERM)
    run_script(recipe)
    used = sum(path.stat().st_blocks for path in folder.rglob("*")) // 2
    if kind == "disk":
        mount(folder, used + size, again=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(SystemExit) as error:
        run_script(recipe)
    if kind == "disk":
        mount(folder, 8000, again=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = {path.name: find_problem(path) for path in folder.glob("checkpoint-*")}
    (outside / "report.json").write_text(json.dumps({"message": error.value.code, "left": left}))
    run_script(recipe)
    shutil.copytree(folder, outside / "run")
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("case", SPACES)
def test_without_space_the_earlier_checkpoint_stays(case, fork, recipe, short, tmp_path):
    """One line that says so; with space, the same command makes the same run of it."""
    path, folder = write(recipe, tmp_path, **SHORT), tmp_path / "run"
    (tmp_path / "outside").mkdir()
    run = fork(path, without_space, *SPACES[case], tmp_path / "outside", path)
    assert run.wait() == 0, run.output[-3000:]
    report = json.loads((tmp_path / "outside" / "report.json").read_text())
    assert re.fullmatch(
        rf"train_sft\.py: {folder}/checkpoint-6 could not be written: .*(No space left|too large|os "
        rf"error|torch).* \([\d,]+ MiB are free there\)\. Once it can be, the same command goes on from "
        rf"{folder}/checkpoint-3, which is complete\.",
        report["message"],
    ), report
    assert report["left"] == {"checkpoint-3": None}
    assert_same_run(tmp_path / "outside" / "run", short)


@pytest.mark.slow
def test_without_space_for_the_model(fork, recipe, short, tmp_path):
    """Nothing half written is left, and the last checkpoint finishes the run."""
    path, folder = write(recipe, tmp_path, **SHORT), tmp_path / "run"
    run = fork(path, patch_the_end, dict(SAVING)["model.safetensors"], "model.safetensors", full)
    assert run.wait() == 1 and len(run.lines) == 1, run.output[-3000:]
    half, last = folder / ".saving", folder / "checkpoint-16"
    assert re.search(rf": {half} could not be written: .*too large.* goes on from {last}, which is", run.lines[0])
    assert not list(folder.glob("*.safetensors")) and not (folder / ".saving").exists()
    again = fork(path)
    assert again.wait() == 0, again.output[-3000:]
    assert_same_run(folder, short)


def full(call, path: Path):
    """No file may have more than 50,000 bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return call()


def test_a_text_is_written_wholly_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match="space"):
                write_text(path, "new")
        assert [file.name for file in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


# torn


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "changed": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "removed": Path.unlink,
}


def flipped(data: bytes) -> bytes:
    """One bit is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.fixture
def folder(short, tmp_path) -> Path:
    """The short run, unfinished, with its checkpoints of steps 12 and 16."""
    shutil.copytree(short, tmp_path / "run", ignore=shutil.ignore_patterns("results.json"))
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_recognised(damage, folder):
    checkpoint = folder / "checkpoint-16"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {MANIFEST, "model.safetensors", "optimizer.pt", "trainer_state.json"} <= {path.name for path in files}
    assert find_problem(checkpoint) is None
    for path in files:
        data = path.read_bytes()
        DAMAGES[damage](path)
        problem = find_problem(checkpoint)
        # a bit of the manifest can be one of another file's digest or size, which then is told
        assert problem and (path.name in problem or (path.name, damage) == (MANIFEST, "changed"))
        if damage != "changed":
            assert path.name in find_problem(checkpoint, contents=False)
        path.write_bytes(data)
    assert find_problem(checkpoint) is None


def test_the_newest_complete_checkpoint_is_used(folder, caplog):
    """Torn ones are told, each in one line, and removed; what is no checkpoint is left alone."""
    names = ("checkpoint-best", "checkpoint-3", "checkpoint-9", "checkpoint-100")
    for name in names:
        shutil.copytree(folder / "checkpoint-12", folder / name)
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    (folder / "checkpoint-100" / MANIFEST).unlink()
    path = folder / "checkpoint-16" / "scheduler.pt"
    path.write_bytes(flipped(path.read_bytes()))
    assert find_checkpoint(folder) == folder / "checkpoint-12"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-best", "checkpoint-9", "checkpoint-12"}
    told = [record.getMessage() for record in caplog.records]
    torn = {100: "it has no manifest.json.*", 16: "scheduler.pt is not what.*", 3: "optimizer.pt is missing"}
    assert len(told) == 3
    for line, (step, problem) in zip(told, torn.items(), strict=True):
        assert re.fullmatch(rf"Removing the torn checkpoint {folder}/checkpoint-{step}: {problem}\.", line)


def test_a_torn_checkpoint_that_is_named_is_refused(recipe, folder):
    (named := folder / "checkpoint-12").joinpath("optimizer.pt").unlink()
    path = write(recipe, folder.parent, **SHORT, resume_from_checkpoint=str(named))
    with pytest.raises(SystemExit, match=rf"^phase15 train: cannot resume from {named}: optimizer.pt is missing\.$"):
        train(*prepare([str(path)]))
    assert named.exists() and not find_problem(folder / "checkpoint-16")


def test_only_the_torn_checkpoint_of_one(folder):
    """Nothing is left to resume from."""
    shutil.rmtree(folder / "checkpoint-12")
    (folder / "checkpoint-16" / "config.json").unlink()
    assert find_checkpoint(folder) is None and not list(folder.glob("checkpoint-*"))


# code in a checkpoint


class Payload:
    """Whoever loads this with pickle makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin")


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("name", [*PICKLES, "optimizer_0/.metadata"])
def test_code_in_a_checkpoint_is_refused(name, form, folder, tmp_path):
    path, ran = folder / "checkpoint-16" / name, tmp_path / "ran"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        {"torch": torch.save, "pickle": pickle.dump}[form]({"state": Payload(ran)}, file)
    write_manifest(folder / "checkpoint-16")  # whoever can write the one can write the other
    with pytest.raises(Phase15CheckpointError, match=rf"checkpoint-16: {re.escape(name)} holds .* could run code\.$"):
        find_checkpoint(folder)
    assert not ran.exists() and not find_problem(folder / "checkpoint-16")
    if form == "pickle":
        pickle.loads(path.read_bytes())["state"].close()
        assert ran.exists()


def test_a_run_refuses_code_in_one_line(recipe, folder, tmp_path):
    checkpoint = folder / "checkpoint-16"
    torch.save({"state": Payload(tmp_path / "ran")}, checkpoint / "optimizer.pt")
    write_manifest(checkpoint)
    with pytest.raises(
        SystemExit, match=rf"^phase15 train: cannot resume from {checkpoint}: optimizer\.pt holds .*\.$"
    ):
        train(*prepare([str(write(recipe, tmp_path, **SHORT))]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_checkpoints_are_checked_and_loaded_without_code(folder, tmp_path):
    """What torch.distributed.checkpoint writes passes; a value in it that is a pickle is not loaded."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "checkpoint-16" / "optimizer_0"))
    write_manifest(folder / "checkpoint-16")
    assert find_checkpoint(folder) == folder / "checkpoint-16"
    with load_tensors_only("16"):
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "checkpoint-16" / "optimizer_0"))
    dcp.save({"x": Payload(tmp_path / "ran")}, storage_writer=dcp.FileSystemWriter(tmp_path / "code"))
    with pytest.raises(Phase15CheckpointError, match="resume from 16: .* could run code"), load_tensors_only("16"):
        dcp.load({"x": 0}, storage_reader=dcp.FileSystemReader(tmp_path / "code"))
    assert not (tmp_path / "ran").exists()


def test_a_run_leaves_no_pickled_arguments(short):
    """Trainer saves its arguments beside every model, and a token for the Hub among them."""
    assert len(list(short.rglob("model.safetensors"))) == 3 and not list(short.rglob("training_args.bin"))


def watch_pickles():
    """Prints what names a pickle has looked up, and how torch.load is called, in the training."""
    train, load, on = transformers.Trainer.train, torch.load, []

    def watched(*args, **kwargs):
        on.append(True)
        result = train(*args, **kwargs)
        on.clear()
        return result

    def checked(file, *args, weights_only=None, **kwargs):
        print(f"torch.load {Path(file).name} {weights_only}")
        return load(file, *args, weights_only=weights_only, **kwargs)

    transformers.Trainer.train, torch.load = watched, checked
    sys.addaudithook(lambda event, args: on and event == "pickle.find_class" and print(event, *args))


@pytest.mark.slow
def test_resuming_unpickles_nothing(fork, recipe, folder):
    shutil.rmtree(folder / "checkpoint-16")
    run = fork(write(recipe, folder.parent, **SHORT), watch_pickles)
    assert run.wait() == 0 and "Resuming from" in run.output, run.output[-3000:]
    assert "pickle.find_class" not in run.output
    loads = re.findall(r"^torch\.load (\S+) (.*)$", run.output, re.M)
    assert {name for name, _ in loads} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"} and len(loads) == 6
    assert {how for _, how in loads} == {"True"}
    assert not list(folder.rglob("training_args.bin"))


# pickled weights


def pickled(source: str | Path, folder: Path, name: str = "model") -> str:
    """A copy of a model's folder whose weights are a pickle."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(folder / f"{name}.safetensors")
    torch.save(weights, folder / f"{'pytorch_' * (name == 'model')}{name}.bin")
    (folder / f"{name}.safetensors").unlink()
    return str(folder)


def test_pickled_weights_are_refused(bases, short, recipe, tmp_path):
    """Of bases, models and adapters, by every command; and loaded where a caller asks for just that."""
    base, model = pickled(bases["llama"], tmp_path / "base"), pickled(short, tmp_path / "model")
    ways = [
        lambda: Phase15ForCausalLM.from_base(base),
        lambda: loading.load_phase15(model),
        lambda: loading.load_any(model),
        lambda: loading.load_any(base),
        lambda: prepare([str(write(recipe, tmp_path, model_name_or_path=base))]),
        lambda: prepare([str(write(recipe, tmp_path, model_name_or_path=model))]),
    ]
    for way in ways:
        with pytest.raises(OSError, match="safetensors"):
            way()
    assert isinstance(Phase15ForCausalLM.from_base(base, use_safetensors=False), PreTrainedModel)
    assert isinstance(Phase15ForCausalLM.from_pretrained(model), PreTrainedModel)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), adapter).save_pretrained(tmp_path / "lora")
    assert isinstance(loading.load_any(str(tmp_path / "lora"), base=bases["llama"]), PeftModel)
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        loading.load_any(pickled(tmp_path / "lora", tmp_path / "adapter", "adapter_model"), base=bases["llama"])
