# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
train_sft.py on two processes that talk through gloo: losses, gradients and weights equal those of one process,
checkpoints go from one number of processes to another, and failures end all processes. Tests of the launch use
`accelerate launch`. Other runs are forked from a server that has imported everything, because imports take longer than
such a run.
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
from reference import CHUNK, SIZES
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.testing import assert_close
from train_here import prepare
from transformers import AutoModelForCausalLM

from phase15.commands import training_run
from phase15.training.checkpoints import write_manifest


ROOT = Path(__file__).parents[2]
SCRIPTS = {"ddp": "train_sft.py", "fsdp2": "tests/fsdp2_on_cpu.py"}
# FSDP uses a GPU if torch sees one. transformers 5.17 cannot resume on "cpu:0", accelerate's name of the CPU.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
FLAGS = {"ddp": [], "fsdp2": ["--accelerator_config", '{"use_configured_state": true}']}
RECORDS, VALIDATION, BATCH = 16, 5, 4  # of all processes together; accelerate fills up the last batch
STEPS, FSDP_STEPS, SAVE = 24, 12, 4


# one process: pytest's own


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """
    Values for a recipe. None depends on the number of steps. ε is so large that Adam's steps show the scale of the
    gradient.
    """
    folder = tmp_path_factory.mktemp("data")
    letters, pairs = random.Random(0), []
    for index in range(RECORDS + VALIDATION):  # one token for each letter and one for the end; no full last chunk
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
    """Writes the recipe: four records a step, shared among the processes, in two steps of accumulation."""
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
    """What steps and evaluations logged, without their speed: losses, norms of gradients and of Δ."""
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
    The curve and the weights of a run are those of one process that was never stopped. The log of a run that resumed
    begins with the checkpoint's log, including its speed.
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


# two processes


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
        """Ends the workers with the launcher: they have their own sessions and would outlive it."""
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
        patch.setenv(
            "PYTHONPATH",
            f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests' / 'training'}",
            prepend=os.pathsep,
        )  # for the server
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
    if "fsdp_config" in settings:  # set as the launcher sets it
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
    training_run.answer_in_new_process = lambda folder, query, max_new_tokens: query  # slow; the launched runs do it
    sys.argv = [SCRIPTS[config], str(recipe), *FLAGS[config]]
    runpy.run_path(str(ROOT / SCRIPTS[config]), run_name="__main__")


def run_forked(forked, config: str, processes: int, recipe: Path) -> str:
    """A forked run that ends well; returns what it printed."""
    status, output = forked(config, processes, recipe)
    assert status == 0, output[-5000:]
    return output


def from_checkpoint(folder: Path, checkpoint: Path) -> Path:
    """A folder in which a run resumes from a checkpoint of another run."""
    shutil.copytree(checkpoint, folder / "run" / checkpoint.name)
    return folder


@pytest.fixture(scope="module")
def killed(forked, recipe, tmp_path_factory) -> SimpleNamespace:
    """A run under DDP: one process is killed, then the run is started again."""
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
    again = run_forked(forked, "ddp", 2, path)
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
    """Also if the run was killed in between."""
    last = max(int(name.split("-")[1]) for name in killed.left if name.startswith("checkpoint"))
    assert last < STEPS - SAVE and re.search(r"Resuming from .*checkpoint-\d+\.$", killed.again, re.M)
    assert_same_run(killed.folder, one, STEPS)


def test_fsdp2_trains_as_one_process(fsdp, one):
    assert_same_run(fsdp.folder, one, FSDP_STEPS)
    assert {path.name for path in (fsdp.folder / f"checkpoint-{SAVE}" / "optimizer_0").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }  # it was sharded


@pytest.mark.parametrize("run", ["killed", "fsdp"])
def test_what_two_processes_leave_and_say(run, request):
    """Everything is printed and written once, and anyone can load the folder."""
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
    assert_close(results["validation"]["model"]["loss"], evaluated, atol=1e-4, rtol=1e-4)
    for picture in ("loss_by_chunk.png", "training_curve.png"):
        assert (run.folder / picture).read_bytes().startswith(b"\x89PNG")
    once = ["| the model |", "Saved to", "\nQ: ", "\nA: ", "answers were cut at", "'train_runtime'"]
    assert {text: output.count(text) for text in once} == dict.fromkeys(once, 1)
    assert output.count("Resuming from") == (run.folder.parent.name.startswith("ddp"))
    assert not re.search(r"Traceback|[Ww]arning: find_unused", output), output[-3000:]


def test_a_process_of_several_leaves_its_interpreter_whole():
    """`leave` runs exit handlers and flushes output, but destroys no object."""
    code = """
import atexit
from phase15.training.shutdown import leave
class Thing:
    def __del__(self):
        print("taken apart", flush=True)
thing = Thing()
atexit.register(print, "at the end", end=".")
print("printed", end=", ")
leave()
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
    """From two to one, then from that one back to two."""
    checkpoint = fsdp.folder / f"checkpoint-{SAVE}"
    for processes in (1, 2):
        folder = from_checkpoint(tmp_path / str(processes), checkpoint)
        run_forked(forked, "fsdp2", processes, write(recipe, folder, processes, max_steps=FSDP_STEPS))
        assert_same_run(folder / "run", one, FSDP_STEPS, checkpoint)
        checkpoint = folder / "run" / f"checkpoint-{2 * SAVE}"


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_among_the_shards_is_refused(forked, fsdp, recipe, tmp_path):
    """In one line. The code replaces a plain value of the optimizer, which torch would unpickle."""
    checkpoint = from_checkpoint(tmp_path, fsdp.folder / f"checkpoint-{SAVE}") / "run" / f"checkpoint-{SAVE}"
    shards = checkpoint / "optimizer_0"
    metadata = dcp.FileSystemReader(shards).read_metadata()
    kinds, values = metadata.state_dict_metadata, metadata.storage_data
    value = next(value for index, value in values.items() if isinstance(kinds[index.fqn], BytesStorageMetadata))
    torch.save(Payload(tmp_path / "ran"), code := io.BytesIO())
    file = shards / value.relative_path
    value.offset, value.length = file.stat().st_size, len(code.getvalue())
    file.write_bytes(file.read_bytes() + code.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(checkpoint)  # an attacker can write the manifest, too
    status, output = forked("fsdp2", 1, write(recipe, tmp_path, 1, max_steps=FSDP_STEPS))
    told = [line for line in output.splitlines() if line.startswith("train_sft.py: ")]
    assert status == 1 and len(told) == 1 and "Traceback" not in output, output[-3000:]
    assert re.search(rf"cannot resume from {checkpoint}: its shards .* could run code\.$", told[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["tied", "hypernet"])
def test_other_kinds_of_models_under_fsdp2(kind, forked, recipe, tmp_path):
    """Tied embeddings, which FSDP2 puts into another unit, and a frozen LLM."""
    values = {"tied": {"base_config": recipe["base_config"] | {"tie_word_embeddings": True}}}
    values = {"max_steps": SAVE, **values.get(kind, {"stage": "hypernet"})}
    (tmp_path / "one").mkdir()
    one = train(write(recipe, tmp_path / "one", 1, **values))
    run_forked(forked, "fsdp2", 2, write(recipe, tmp_path, 2, **values))
    assert_same_run(tmp_path / "run", one, SAVE)


def test_fsdp2_in_bfloat16(forked, one, recipe, tmp_path):
    """The loss is close to float32's and is not rounded to the three digits of bfloat16."""
    run_forked(forked, "fsdp2", 2, write(recipe, tmp_path, 2, max_steps=SAVE, bf16=True))
    actual, expected = curve(log_of(tmp_path / "run"), SAVE), curve(log_of(one), SAVE)
    for step in range(1, SAVE + 1):
        loss = actual[f"loss at step {step}"]
        assert_close(loss, expected[f"loss at step {step}"], atol=0, rtol=1e-2)
        assert loss != torch.tensor(loss).bfloat16().item()
    assert_close(actual[f"eval_loss at step {SAVE}"], expected[f"eval_loss at step {SAVE}"], atol=0, rtol=1e-2)


# bad input


BAD = {  # configuration, values of the recipe, words of the message
    "column": ("ddp", {}, ["data.jsonl, record 1", "unknown format", "'text'"]),
    "file": ("ddp", {"dataset_name": "none.jsonl"}, ["none.jsonl", "no such file"]),
    "recipe": ("ddp", {"lerning_rate": 1.0}, ["lerning_rate", "'learning_rate'"]),
    "lora": ("fsdp2", {"stage": "lora"}, ["`stage` is lora", "accelerate_ddp.yaml"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_once(case, forked, recipe, tmp_path):
    """One process tells it; all processes end with an error status."""
    config, values, words = BAD[case]
    if case == "column":
        (tmp_path / "data.jsonl").write_text('{"text": "neither question nor answer"}\n' * 3)
        values = {"dataset_name": str(tmp_path / "data.jsonl")}
    path = write(recipe, tmp_path, 2, **values)
    status, output = forked(config, 2, path)
    told = [line for line in output.splitlines() if line.startswith("train_sft.py: ")]
    assert status == 1 and len(told) == 1 and all(word in told[0] for word in words), output[-3000:]
    assert not re.search(r"^\[rank\d\]|ValueError", output, re.M), output[-3000:]
    assert not (tmp_path / "run").exists()


def test_processes_do_not_train_alone(recipe, tmp_path, monkeypatch):
    """Without this error a launch on a machine without a GPU would be two separate runs, or not be sharded."""
    path = write(recipe, tmp_path, 2, use_cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="no FSDP without GPUs.*accelerate_ddp"):
        prepare([str(path)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes.*--use_cpu"):
        prepare([str(path)])
    assert not (tmp_path / "run").exists()
