# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
train_sft.py on two processes that talk through gloo: the losses, gradients and weights of one process, checkpoints
from one number of processes to another, and what happens when something goes wrong. `accelerate launch` starts what is
about the launch; other runs are forked from a server that has imported everything, which is most of so short a run.
"""

import io
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.utils.other import get_free_port
from conftest import CHUNK, SIZES
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from phase15 import runs
from phase15.checkpoints import write_manifest
from train_sft import prepare


ROOT = Path(__file__).parent.parent
SCRIPTS = {"ddp": "train_sft.py", "fsdp2": "tests/fsdp2_on_cpu.py"}
# where torch sees a GPU, FSDP uses it; and transformers 5.17 cannot resume on the "cpu:0" that accelerate would name
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
FLAGS = {"ddp": [], "fsdp2": ["--accelerator_config", '{"use_configured_state": true}']}
RECORDS, VALIDATION, BATCH = 16, 5, 4  # of all processes; what does not fill it, accelerate repeats
STEPS, FSDP_STEPS, SAVE = 24, 12, 4


# one process, in this one


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """
    Values for a recipe. Nothing in it depends on the number of steps, and ε is so large that Adam's steps show the
    scale of the gradient.
    """
    folder = tmp_path_factory.mktemp("data")
    letters, pairs = random.Random(0), []
    for index in range(RECORDS + VALIDATION):  # a token a letter, one for the end, and no chunk that is exactly full
        question, answer = 1 + index * 5 % 12, (1, 13, 4, 2, 9, 8, 14, 1, 6)[index % 9]
        assert (answer + 1) % CHUNK
        pairs.append(["".join(letters.choices("abcdefgh", k=length)) for length in (question, answer)])
    records = [{"question": question, "answer": answer} for question, answer in pairs]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    llm = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SIZES | {
        "base_config": llm | {"vocab_size": 261, "num_key_value_heads": 1, "initializer_range": 0.2},
        "dataset_name": str(folder / "data.jsonl"),
        "validation_split": VALIDATION / len(records),
        "max_answer_length": 14,
        "max_steps": STEPS,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": SAVE,
        "learning_rate": 1e-2,
        "llm_learning_rate": 3e-3,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_grad_norm": 2.0,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_steps": SAVE,
        "report_to": "none",
        "use_cpu": True,
    }


def write(recipe: dict, folder: Path, processes: int, **values) -> Path:
    """The recipe in a file: four records a step, in two steps of accumulation and from so many processes."""
    batch = {"per_device_train_batch_size": BATCH // processes // 2, "gradient_accumulation_steps": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **batch, "output_dir": str(folder / "run"), **values}))
    return path


def train(path: Path, checkpoint: Path | None = None) -> Path:
    """Trains and saves in this process; returns the folder of the run."""
    trainer, *_ = prepare([str(path)])
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    trainer.save_state()
    return Path(trainer.args.output_dir)


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory) -> Path:
    """A run of one process."""
    return train(write(recipe, tmp_path_factory.mktemp("one"), 1))


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def curve(log_history: list[dict], steps: int) -> dict[str, float]:
    """Everything that the steps and evaluations logged, but for their speed: losses, norms of gradients and of Δ."""
    left_out = ("step", "epoch", "total_flos", "per_second", "runtime", "preparation_time")
    return {
        f"{name} at step {log['step']}": value
        for log in log_history
        if ("loss" in log or "eval_loss" in log) and log["step"] <= steps
        for name, value in log.items()
        if not name.endswith(left_out)
    }


def assert_same_run(folder: Path, one: Path, steps: int, checkpoint: Path | None = None):
    """
    The curve and the weights of a run are those of one process that was never stopped. The log of one that went on
    from a checkpoint begins with the checkpoint's, speed and all.
    """
    if checkpoint is not None:
        assert log_of(folder)[: len(log_of(checkpoint))] == log_of(checkpoint)
    actual, expected = curve(log_of(folder), steps), curve(log_of(one), steps)
    assert len(expected) > 6 * steps and actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, atol=2e-5, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    weights = load_file(one / f"checkpoint-{steps}" / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        assert_close(saved[name], value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


# two


class Launch:
    """`accelerate launch` with one of the recipes' configurations."""

    def __init__(self, config: str, processes: int, recipe: Path):
        self.log = recipe.parent / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / "recipes" / f"accelerate_{config}.yaml")]
        command += ["--num_processes", str(processes), str(ROOT / SCRIPTS[config]), str(recipe), *FLAGS[config]]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=recipe.parent,
                env=os.environ | ON_CPU,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text().replace("\r", "\n")

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self, timeout: float = 120) -> int:
        """The launcher's exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {timeout} s:\n{self.output[-5000:]}")
        finally:
            self.end()

    def end(self):
        """Ends what is left: the launcher's workers have sessions of their own, and would outlive it."""
        if self.process.poll() is None:
            for process in [*self.workers(), self.process]:
                process.kill()
            self.process.wait()


def launch(config: str, processes: int, recipe: Path) -> str:
    """A launch that ends well; returns what it printed."""
    launched = Launch(config, processes, recipe)
    assert launched.wait() == 0, launched.output[-5000:]
    return launched.output


@pytest.fixture(scope="module")
def forked():
    """Runs the script with a recipe as `accelerate launch` would, and returns its exit status and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])

    def run(config: str, processes: int, recipe: Path) -> tuple[int, str]:
        log, port = recipe.parent / f"{time.monotonic_ns()}.log", get_free_port()
        workers = [
            context.Process(target=work, args=(rank, processes, port, config, recipe, log))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 90
        try:
            for worker in workers:
                worker.join(max(deadline - time.monotonic(), 0))
            output = log.read_text().replace("\r", "\n")
            statuses = {worker.exitcode for worker in workers}
            assert len(statuses) == 1 and None not in statuses, f"{statuses}:\n{output[-5000:]}"
            return statuses.pop(), output
        finally:
            for worker in workers:
                worker.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}", prepend=os.pathsep)  # for the server
        yield run


def work(rank: int, processes: int, port: int, config: str, recipe: Path, log: Path):
    """One process of a run."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, processes, processes, "127.0.0.1", port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    os.environ |= ON_CPU
    settings = yaml.safe_load((ROOT / "recipes" / f"accelerate_{config}.yaml").read_text())
    if "fsdp_config" in settings:  # which the launcher gives to the script in the same way
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
    runs.answer_in_new_process = lambda folder, query, max_new_tokens: query  # slow, and done in the launched runs
    sys.argv = [SCRIPTS[config], str(recipe), *FLAGS[config]]
    runpy.run_path(str(ROOT / SCRIPTS[config]), run_name="__main__")


def run_forked(forked, config: str, processes: int, recipe: Path) -> str:
    """A forked run that ends well; returns what it printed."""
    status, output = forked(config, processes, recipe)
    assert status == 0, output[-5000:]
    return output


def from_checkpoint(folder: Path, checkpoint: Path) -> Path:
    """A folder in which a run goes on from a checkpoint of another."""
    shutil.copytree(checkpoint, folder / "run" / checkpoint.name)
    return folder


@pytest.fixture(scope="module")
def killed(recipe, tmp_path_factory) -> SimpleNamespace:
    """A run under DDP of which a process is killed, and then the same command again."""
    folder = tmp_path_factory.mktemp("ddp")
    path = write(recipe, folder, 2)
    first = Launch("ddp", 2, path)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("run/checkpoint-*/manifest.json")):
            assert first.process.poll() is None and time.monotonic() < deadline, first.output[-5000:]
            time.sleep(0.01)
        victims = [process for process in first.workers() if process.environ().get("RANK") == "1"]
        for process in victims:
            process.kill()
        since = time.monotonic()
        status = first.wait(60)
        took = time.monotonic() - since
    finally:
        first.end()
    left = sorted(path.name for path in folder.glob("run/*"))
    again = launch("ddp", 2, path)
    return SimpleNamespace(
        folder=folder / "run", victims=victims, status=status, took=took, left=left, output=first.output, again=again
    )


@pytest.fixture(scope="module")
def fsdp(recipe, tmp_path_factory) -> SimpleNamespace:
    """A run under FSDP2."""
    folder = tmp_path_factory.mktemp("fsdp2")
    output = launch("fsdp2", 2, write(recipe, folder, 2, max_steps=FSDP_STEPS))
    return SimpleNamespace(folder=folder / "run", output=output)


def test_a_killed_process_ends_the_launch(killed):
    assert len(killed.victims) == 1 and killed.status != 0 and killed.took < 30
    assert re.search(r"rank +: 1\b.*\n.*exitcode +: -9\b.*\n(.*\n)*?.*SIGKILL", killed.output), killed.output[-3000:]
    assert "results.json" not in killed.left and "model.safetensors" not in killed.left


def test_ddp_trains_as_one_process(killed, one):
    """Even where the run was killed on the way."""
    last = max(int(name.split("-")[1]) for name in killed.left if name.startswith("checkpoint"))
    assert last < STEPS - SAVE and re.search(r"Resuming from .*checkpoint-\d+\.$", killed.again, re.M)
    assert_same_run(killed.folder, one, STEPS)


def test_fsdp2_trains_as_one_process(fsdp, one):
    assert_same_run(fsdp.folder, one, FSDP_STEPS)
    assert {path.name for path in (fsdp.folder / f"checkpoint-{SAVE}" / "optimizer_0").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }  # so that it was sharded indeed


@pytest.mark.parametrize("run", ["killed", "fsdp"])
def test_what_two_processes_leave_and_say(run, request):
    """All once, and a folder that anyone can load."""
    run = request.getfixturevalue(run)
    output = getattr(run, "again", None) or run.output
    results = json.loads((run.folder / "results.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(
        run.folder, trust_remote_code=True, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.config.architectures == ["Phase15ForCausalLM"]
    assert all((run.folder / name).is_file() for name in ("modeling_phase15.py", "configuration_phase15.py"))
    assert (run.folder / "tokenizer.json").is_file() and not list(run.folder.rglob("training_args.bin"))
    assert results["processes"] == 2 and results["records"] == {"training": RECORDS, "validation": VALIDATION}
    evaluated = [entry["eval_loss"] for entry in log_of(run.folder) if "eval_loss" in entry][-1]
    assert_close(results["validation"]["the model"]["loss"], evaluated, atol=1e-4, rtol=1e-4)
    for picture in ("loss_by_chunk.png", "training_curve.png"):
        assert (run.folder / picture).read_bytes().startswith(b"\x89PNG")
    once = ["| the model |", "Saved to", "\nQ: ", "\nA: ", "answers were cut at", "'train_runtime'"]
    assert {text: output.count(text) for text in once} == dict.fromkeys(once, 1)
    assert output.count("Resuming from") == (run.folder.parent.name.startswith("ddp"))
    assert not re.search(r"Traceback|[Ww]arning: find_unused", output), output[-3000:]


def test_a_process_of_several_leaves_its_interpreter_whole():
    """What is registered for the end is done and what was printed comes out, but nothing is taken apart."""
    code = """
import atexit, train_sft
class Thing:
    def __del__(self):
        print("taken apart", flush=True)
thing = Thing()
atexit.register(print, "at the end", end=".")
print("printed", end=", ")
train_sft.leave()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "printed, at the end."), done.stderr[-3000:]


# from one number of processes to another


def test_a_checkpoint_of_two_processes_resumes_on_one(killed, one, recipe, tmp_path):
    checkpoint = killed.folder / f"checkpoint-{2 * SAVE}"
    assert_same_run(train(write(recipe, tmp_path, 1), checkpoint), one, STEPS, checkpoint)


def test_a_checkpoint_of_one_process_resumes_on_two(forked, one, recipe, tmp_path):
    checkpoint = one / f"checkpoint-{2 * SAVE}"
    folder = from_checkpoint(tmp_path, checkpoint)
    run_forked(forked, "ddp", 2, write(recipe, folder, 2))
    assert_same_run(folder / "run", one, STEPS, checkpoint)


def test_sharded_checkpoints_resume_on_any_number_of_processes(forked, fsdp, one, recipe, tmp_path):
    """From two to one, and what that one saves back to two."""
    checkpoint = fsdp.folder / f"checkpoint-{SAVE}"
    for processes in (1, 2):
        folder = from_checkpoint(tmp_path / str(processes), checkpoint)
        run_forked(forked, "fsdp2", processes, write(recipe, folder, processes, max_steps=FSDP_STEPS))
        assert_same_run(folder / "run", one, FSDP_STEPS, checkpoint)
        checkpoint = folder / "run" / f"checkpoint-{2 * SAVE}"


class Payload:
    """Whoever loads this with pickle makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_among_the_shards_is_refused(forked, fsdp, recipe, tmp_path):
    """In one line. It stands for a plain value of the optimizer, and torch would load it as a pickle."""
    checkpoint = from_checkpoint(tmp_path, fsdp.folder / f"checkpoint-{SAVE}") / "run" / f"checkpoint-{SAVE}"
    shards = checkpoint / "optimizer_0"
    metadata = dcp.FileSystemReader(shards).read_metadata()
    kinds, places = metadata.state_dict_metadata, metadata.storage_data
    place = next(place for index, place in places.items() if isinstance(kinds[index.fqn], BytesStorageMetadata))
    torch.save(Payload(tmp_path / "ran"), code := io.BytesIO())
    file = shards / place.relative_path
    place.offset, place.length = file.stat().st_size, len(code.getvalue())
    file.write_bytes(file.read_bytes() + code.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(checkpoint)  # whoever can write the one can write the other
    status, output = forked("fsdp2", 1, write(recipe, tmp_path, 1, max_steps=FSDP_STEPS))
    told = [line for line in output.splitlines() if line.startswith("train_sft.py: ")]
    assert status == 1 and len(told) == 1 and "Traceback" not in output, output[-3000:]
    assert re.search(rf"cannot resume from {checkpoint}: its shards .* could run code\.$", told[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["tied", "hypernet"])
def test_other_kinds_of_models_under_fsdp2(kind, forked, recipe, tmp_path):
    """Embeddings that are the output's too, which are another unit; an LLM that is frozen."""
    values = {"tied": {"base_config": recipe["base_config"] | {"tie_word_embeddings": True}}}
    values = {"max_steps": SAVE, **values.get(kind, {"stage": "hypernet"})}
    (tmp_path / "one").mkdir()
    one = train(write(recipe, tmp_path / "one", 1, **values))
    run_forked(forked, "fsdp2", 2, write(recipe, tmp_path, 2, **values))
    assert_same_run(tmp_path / "run", one, SAVE)


def test_fsdp2_in_bfloat16(forked, one, recipe, tmp_path):
    """Close to float32, and not a loss that was rounded to bfloat16's three digits."""
    run_forked(forked, "fsdp2", 2, write(recipe, tmp_path, 2, max_steps=SAVE, bf16=True))
    actual, expected = curve(log_of(tmp_path / "run"), SAVE), curve(log_of(one), SAVE)
    for step in range(1, SAVE + 1):
        loss = actual[f"loss at step {step}"]
        assert_close(loss, expected[f"loss at step {step}"], atol=0, rtol=1e-2)
        assert loss != torch.tensor(loss).bfloat16().item()
    assert_close(actual[f"eval_loss at step {SAVE}"], expected[f"eval_loss at step {SAVE}"], atol=0, rtol=1e-2)


# bad input


BAD = {  # configuration, values of the recipe, what the message says
    "column": ("ddp", {}, ["data.jsonl, record 1", "unknown format", "'text'"]),
    "file": ("ddp", {"dataset_name": "none.jsonl"}, ["none.jsonl", "no such file"]),
    "recipe": ("ddp", {"lerning_rate": 1.0}, ["lerning_rate", "'learning_rate'"]),
    "lora": ("fsdp2", {"stage": "lora"}, ["`stage` is lora", "accelerate_ddp.yaml"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_once(case, forked, recipe, tmp_path):
    """By one process; all end, and with a status."""
    config, values, words = BAD[case]
    if case == "column":
        (tmp_path / "data.jsonl").write_text('{"text": "neither question nor answer"}\n' * 3)
        values = {"dataset_name": str(tmp_path / "data.jsonl")}
    path = write(recipe, tmp_path, 2, **values)
    if case == "column":
        launched = Launch(config, 2, path)
        status, output = launched.wait(), launched.output
    else:
        status, output = forked(config, 2, path)
    told = [line for line in output.splitlines() if line.startswith("train_sft.py: ")]
    assert status == 1 and len(told) == 1 and all(word in told[0] for word in words), output[-3000:]
    assert not re.search(r"^\[rank\d\]|ValueError", output, re.M), output[-3000:]
    assert not (tmp_path / "run").exists()


def test_processes_do_not_train_alone(recipe, tmp_path, monkeypatch):
    """Nothing else would tell that a launch on a machine without a GPU is two runs, or that it is not sharded."""
    path = write(recipe, tmp_path, 2, use_cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="no FSDP without GPUs.*accelerate_ddp"):
        prepare([str(path)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes.*--use_cpu"):
        prepare([str(path)])
    assert not (tmp_path / "run").exists()
