# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""train_sft.py: stages, resuming, streams, and what a run leaves."""

import functools
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from reference import LLM_SIZES, SIZES
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from train_here import parse, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

from phase15.commands import training_run
from phase15.commands.training_run import plan, train
from phase15.commands.training_run import prepare as prepare_run
from phase15.evaluation.losses import display_label
from phase15.hub.runs import save_recipe
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training.runs import TrainingRun


pytestmark = pytest.mark.usefixtures("answers_here")
ROOT = Path(__file__).parents[2]


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


WORDS = "the cat and a dog ran over the hill to see seven red birds under some old tree by the river at night".split()


def sentence(*numbers):
    return " ".join(WORDS[number % len(WORDS)] for number in numbers)


@pytest.fixture(scope="module")
def base(chat_tokenizer, tmp_path_factory) -> str:
    """A tiny Llama with a tokenizer and a chat template."""
    folder = str(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    config = LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    pairs = [{"question": sentence(i), "answer": sentence(*range(i, 2 * i % 5 + i + 1))} for i in range(15)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


RUN = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "llm_learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture
def recipe(base, data, tmp_path) -> dict:
    """Values for a recipe of three steps."""
    return SIZES | {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": str(tmp_path / "run"),
        "max_answer_length": 14,
        "max_steps": 3,
        **RUN,
    }


def write(recipe: dict, folder: Path, **values) -> str:
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(yaml.safe_dump({**recipe, **values}))
    return str(path)


@pytest.mark.parametrize("stage", ["hypernet", "full"])
def test_what_a_stage_trains(stage, recipe, tmp_path):
    trainer, *_ = prepare([write(recipe, tmp_path, stage=stage)])
    before = state(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model.state_dict())
    hypernet = {name for name in before if name.startswith("model.hypernet.")} - {"model.hypernet.embedding_scale"}
    llm = {name for name in before if name.startswith("model.llm.")}
    assert llm and hypernet and moved == (hypernet if stage == "hypernet" else hypernet | llm)


def test_stage_2_starts_from_stage_1(recipe, tmp_path):
    first, *_ = prepare([write(recipe, tmp_path, stage="hypernet")])
    first.train()
    first.save_model(tmp_path / "stage1")
    recipe = {**recipe, "model_name_or_path": str(tmp_path / "stage1")}
    second, *_ = prepare([write(recipe, tmp_path, stage="full", output_dir=str(tmp_path / "stage2"))])
    assert not changed(state(first.model), state(second.model)) and second.model.hypernet.alpha.abs().min() > 0
    assert all(parameter.requires_grad for parameter in second.model.parameters())
    assert second.train_dataset[:] == first.train_dataset[:]
    with pytest.raises(ValueError, match=r"(?s)chunk_length.*\b8\b.*stage1.*\b4\b"):
        prepare([write(recipe, tmp_path, chunk_length=8)])


def test_compiled_layers_train_as_others_do(recipe, tmp_path, monkeypatch):
    """Compiled once for each kind of layer and once more for shapes that change, not for every layer or batch."""
    counter = CompileCounterWithBackend("aot_eager")  # inductor takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    logs = {}
    for compiled in (False, True):
        values = {"compile_layers": compiled, "output_dir": str(tmp_path / f"run{compiled}"), "logging_steps": 1}
        trainer, *_ = prepare([write(recipe, tmp_path, **values)])
        trainer.train()
        logs[compiled] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert bool(counter.frame_count) == compiled
    assert_close(logs[True], logs[False], atol=1e-5, rtol=1e-5)
    assert len(set(logs[True])) > 2 and counter.frame_count <= 6


def inputs_of(trainer):
    return {k: v for k, v in trainer.data_collator(list(trainer.train_dataset)).items() if k != "records"}


@pytest.mark.filterwarnings("ignore:.*merge.*")
def test_lora(recipe, tmp_path, capfd):
    """Adapter beside a frozen LLM; loaded onto the base again, and merged."""
    trainer, *rest = prepare([write(recipe, tmp_path, stage="lora", lora_r=2)])
    before = state(trainer.model)
    train(trainer, *rest)
    moved = changed(before, trainer.model.state_dict())
    lora = {name for name in before if "lora_" in name}
    hypernet = {name for name in before if "model.hypernet.modules_to_save" in name and "embedding_scale" not in name}
    assert len(hypernet) == len(list(trainer.model.get_base_model().hypernet.original_module.parameters()))
    assert len(lora) == 2 * 7 * LLM_SIZES["num_hidden_layers"] and moved == lora | hypernet

    fields = {name: recipe[name] for name in [*SIZES, "max_answer_length"]}
    base = Phase15ForCausalLM.from_base(recipe["model_name_or_path"], **fields)
    batch = inputs_of(trainer)
    with torch.no_grad():
        expected, warm = trainer.model.eval()(**batch).logits, base(**batch).logits
        loaded = PeftModel.from_pretrained(base, recipe["output_dir"]).eval()
        assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - warm).abs().max() > 1e-2
    results = json.loads((Path(recipe["output_dir"]) / "results.json").read_text())["validation"]
    loss = trainer.evaluate()["eval_loss"]
    assert_close(results["model"]["loss"], loss, atol=1e-5, rtol=1e-5)
    assert abs(results["window"]["loss"] - loss) > 1e-5

    others = Phase15ForCausalLM.from_base(recipe["model_name_or_path"], **fields | {"chunk_length": 8})
    with pytest.raises(ValueError, match="trained with other sizes.*num_soft_tokens=24.*chunk_length=4"):
        PeftModel.from_pretrained(others, recipe["output_dir"])
    others = Phase15ForCausalLM.from_base(recipe["model_name_or_path"], **fields | {"hypernet_slot_gate": False})
    with pytest.raises(ValueError, match="trained with other sizes.*hypernet_slot_gate=True"):
        PeftModel.from_pretrained(others, recipe["output_dir"])

    folder = str(tmp_path / "merged")
    train(*prepare([write(recipe, tmp_path, stage="lora", lora_r=2), "--merge_adapter", "--output_dir", folder]))
    merged, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert re.search(r"^A: ", capfd.readouterr().out, re.M)


class Killed(Exception):
    pass


def kill(model):
    raise Killed


@pytest.mark.parametrize("stage", ["hypernet", "lora"])
def test_a_stage_resumes(stage, recipe, tmp_path):
    """The same weights and losses, over several epochs and with dropout."""
    recipe |= {"stage": stage, "lora_dropout": 0.3, "max_steps": 8, "save_steps": 3}
    whole, *_ = prepare([write(recipe, tmp_path, output_dir=str(tmp_path / "whole"))])
    whole.train()
    path = write(recipe, tmp_path)
    killed, *_ = prepare([path])
    killed.add_callback(At(5, kill))
    with pytest.raises(Killed):
        killed.train()
    resumed, *_ = prepare([path])
    resumed.train(resume_from_checkpoint=True)
    assert not changed(state(whole.model), state(resumed.model))
    assert losses_of(resumed.state.log_history) == losses_of(whole.state.log_history)


def test_checkpoints_of_stage_hypernet_hold_no_base(recipe, tmp_path, caplog):
    """They are loaded as folders, resume, also as the best model, and so does a checkpoint that holds the base."""
    recipe |= {"stage": "hypernet", "max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    recipe |= {"load_best_model_at_end": True, "validation_split": 0.3}
    path = write(recipe, tmp_path, output_dir=str(tmp_path / "whole"))
    whole, *_ = prepare([path])
    whole.train()
    for folder in (tmp_path / "whole").glob("checkpoint-*"):
        assert all(name.startswith("model.hypernet.") for name in load_file(folder / "model.safetensors"))
        assert (
            Phase15ForCausalLM.from_pretrained(folder).config.base_model_name_or_path == recipe["model_name_or_path"]
        )
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for earlier in (False, True):
        if earlier:
            Phase15ForCausalLM.from_pretrained(checkpoint).merge(checkpoint)
        resumed, *_ = prepare([path])
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert not changed(state(whole.model), state(resumed.model))
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]


def test_what_a_run_without_a_base_to_fetch_saves(recipe, tmp_path):
    """A base that exists only in the run's start is saved; asked otherwise, the run ends at its start."""
    first, *_ = prepare([write(recipe, tmp_path, stage="full")])
    first.save_model(tmp_path / "stage1")
    recipe = {**recipe, "model_name_or_path": str(tmp_path / "stage1"), "stage": "hypernet"}
    second, *_ = prepare([write(recipe, tmp_path)])
    assert second.model.saves_base
    with pytest.raises(ValueError, match="`save_only_hypernet` needs a base that loading can fetch.*stage1"):
        prepare([write(recipe, tmp_path, save_only_hypernet=True)])
    with pytest.raises(ValueError, match="`save_only_hypernet` is for stage hypernet"):
        prepare([write(recipe, tmp_path, stage="full", save_only_hypernet=True)])


class NoEpoch(TrainerCallback):
    """Fails where a run without end would begin, too."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        raise AssertionError("an epoch begins")


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_run_that_has_all_its_steps_takes_no_more(kind, recipe, tmp_path):
    """The run was stopped after its last step, in the middle of an epoch."""
    recipe |= STREAM if kind == "stream" else {}
    path = write(recipe, tmp_path, max_steps=2, save_steps=2)
    whole, *_ = prepare([path])
    whole.train()
    resumed, *_ = prepare([path])
    batches = watched(resumed)
    resumed.add_callback(NoEpoch)
    result = resumed.train(resume_from_checkpoint=True)
    assert not batches and result.global_step == resumed.state.global_step == 2
    assert not changed(state(whole.model), state(resumed.model))
    assert losses_of(resumed.state.log_history) == losses_of(whole.state.log_history)


def losses_of(log_history) -> dict[int, list[float]]:
    """Everything that a step logs, but for its speed."""
    return {
        log["step"]: [log[name] for name in sorted(log) if name != "target_tokens_per_second"]
        for log in log_history
        if "loss" in log
    }


def test_records_are_split(recipe, tmp_path):
    """The last ones validate; all train where none shall."""
    trainer, *_ = prepare([write(recipe, tmp_path), "--validation_split", "0.3", "--max_validation_records", "4"])
    assert trainer.train_dataset["record"][:] == list(range(1, 11))
    assert trainer.eval_dataset["record"][:] == list(range(11, 15))
    arguments = [write(recipe, tmp_path, stage="lora", validation_split=0.0), "--max_steps", "1"]
    trainer, *rest = prepare(arguments)
    assert trainer.train_dataset["record"][:] == list(range(1, 16)) and trainer.eval_dataset is None
    train(trainer, *rest)
    assert json.loads((Path(recipe["output_dir"]) / "results.json").read_text())["validation"] == {}


STREAM = {"streaming": True, "max_validation_records": 3}


def epochless(log_history) -> dict[int, dict]:
    """What a step logs, but for its speed and the epoch, of which a stream has none."""
    logs = [log for log in log_history if "loss" in log]
    return {
        log["step"]: {k: v for k, v in log.items() if k not in ("epoch", "target_tokens_per_second")} for log in logs
    }


def watched(trainer) -> list[list[int]]:
    """The numbers of the records of each batch that the trainer will train on."""
    batches, compute_loss = [], trainer.compute_loss

    def watch(model, inputs, **kwargs):
        batches.append(inputs["records"].tolist())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watch
    return batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_trains_as_its_file_does(workers, recipe, tmp_path):
    """In its order; and none of its records validate where no share shall."""
    recipe |= {"train_sampling_strategy": "sequential", "validation_split": 0.0, "dataloader_num_workers": workers}
    whole, *_ = prepare([write(recipe, tmp_path)])
    streamed, *_ = prepare([write(recipe, tmp_path, streaming=True, max_validation_records=3)])
    batches = watched(whole), watched(streamed)
    whole.train()
    streamed.train()
    assert batches[0] == batches[1] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert not changed(state(whole.model), state(streamed.model))
    assert epochless(whole.state.log_history) == epochless(streamed.state.log_history)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_resumes(shuffle, recipe, tmp_path):
    """With the same weights, losses and batches, in the third pass over the records; no pass ends with a batch."""
    recipe |= STREAM | {
        "stage": "lora",
        "lora_dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "shuffle_records": shuffle,
    }
    recipe |= {"max_steps": 9, "save_steps": 4, "per_device_train_batch_size": 2}
    whole, *_ = prepare([write(recipe, tmp_path, output_dir=str(tmp_path / "whole"))])
    expected = watched(whole)
    whole.train()
    path = write(recipe, tmp_path)
    killed, *_ = prepare([path])
    killed.add_callback(At(7, kill))
    with pytest.raises(Killed):
        killed.train()
    resumed, *_ = prepare([path])
    batches = watched(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert batches == expected[8:] and len(expected) == 18
    assert not changed(state(whole.model), state(resumed.model))
    assert losses_of(resumed.state.log_history) == losses_of(whole.state.log_history)
    numbers = [number for batch in expected for number in batch]
    assert [sorted(numbers[i : i + 12]) for i in (0, 12)] == [list(range(4, 16))] * 2
    assert (numbers == [*range(4, 16)] * 3) != shuffle


def test_a_resumed_stream_after_one_that_ends(recipe, tmp_path):
    """A stopped run that is given more steps goes on where it stopped."""
    recipe |= STREAM | {"save_steps": 4, "lr_scheduler_type": "constant"}
    first, *_ = prepare([write(recipe, tmp_path, max_steps=4)])
    first.train()
    more, *_ = prepare([write(recipe, tmp_path, max_steps=6)])
    batches = watched(more)
    more.train(resume_from_checkpoint=True)
    assert batches == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_bad_record_of_a_stream(recipe, monkeypatch, tmp_path):
    """It is no matter until it is reached; then it is named in one line, and the run goes on when it is mended."""
    monkeypatch.setattr(sys, "argv", ["script"])
    pairs = Path(recipe["dataset_name"]).read_text().splitlines(keepends=True)
    path = tmp_path / "bad.jsonl"
    path.write_text("".join([*pairs, "{broken"]))
    recipe |= STREAM | {"dataset_name": str(path), "per_device_train_batch_size": 2, "save_steps": 1}
    trainer, *_ = prepare([write(recipe, tmp_path, max_steps=5, output_dir=str(tmp_path / "short"))])
    trainer.train()
    assert trainer.state.global_step == 5
    recipe = write(recipe, tmp_path, max_steps=9)
    for workers in ("0", "1"):
        message = script(recipe, "--dataloader_num_workers", workers)
        assert message.startswith(f"train_sft.py: {path}: record 16 (line 16) is not JSON"), message
    path.write_text("".join([*pairs, pairs[0]]))
    resumed, *_ = prepare([recipe])
    batches = watched(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert batches == [[14, 15], [16, 4], [5, 6], [7, 8]]


def test_a_bad_record_that_shall_validate_a_stream(recipe, tmp_path):
    """Is told before the first step."""
    lines = Path(recipe["dataset_name"]).read_text().splitlines(keepends=True)
    lines[1] = '{"question": "a"}\n'
    (tmp_path / "bad.jsonl").write_text("".join(lines))
    path = write(recipe | STREAM, tmp_path, dataset_name=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match=r"bad\.jsonl, record 2: `answer` is missing"):
        prepare([path])
    prepare([path, "--max_validation_records", "1"])


def test_what_a_run_on_a_stream_leaves(recipe, tmp_path, capfd):
    recipe |= STREAM | {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer, *rest = prepare([write(recipe, tmp_path)])
    folder = Path(recipe["output_dir"])
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text("{}")  # of another model
    train(trainer, *rest)
    assert not (folder / "evaluation.json").exists()
    results = json.loads((folder / "results.json").read_text())
    assert results["records"] == {"training": 24, "validation": 3}  # three steps of two batches of four
    assert [row["number"] for row in trainer.eval_dataset] == [1, 2, 3]
    assert_close(results["validation"]["model"]["loss"], trainer.evaluate()["eval_loss"], atol=1e-5, rtol=1e-5)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log][:1] == [2]
    first = json.loads(Path(recipe["dataset_name"]).read_text().splitlines()[3])
    assert re.search(rf"^Q: .*{re.escape(first['question'])}.*^A: ", capfd.readouterr().out, re.M | re.S)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["streaming"] is True


ON_TWO = """
import json, os, sys
from pathlib import Path

from test_train_sft import At, Killed, epochless, kill, watched
from phase15.training.shutdown import leave
from train_here import prepare

runs = []
for recipe, killed_after, checkpoint in json.loads(sys.argv[1]):
    trainer, *_ = prepare([recipe])
    batches, encoded, encode = watched(trainer), [], trainer.data_collator.encode
    trainer.data_collator.encode = lambda row, encode=encode: (encoded.append(row["number"]), encode(row))[1]
    if killed_after:
        trainer.add_callback(At(killed_after, kill))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Killed:
        pass
    runs.append({"batches": batches, "encoded": encoded, "logs": epochless(trainer.state.log_history)})
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(runs))
leave()
"""


def test_two_processes_share_a_stream(recipe, tmp_path):
    """
    Each has its half of the batches that one process would have, over several files, shuffled, in several passes; also
    when the run is killed and resumed, on two or on one.
    """
    lines = Path(recipe["dataset_name"]).read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:7]), ("b", lines[7:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    recipe |= STREAM | {"dataset_name": str(tmp_path / "[ab].jsonl"), "max_validation_records": 2}
    recipe |= {"shuffle_records": True, "max_steps": 8, "save_steps": 4}
    one, *_ = prepare([write(recipe, tmp_path, output_dir=str(tmp_path / "one"))])
    expected = watched(one)
    one.train()
    assert sorted(number for batch in expected for number in batch)[:4] == [3, 3, 3, 4]

    on_two = write(recipe, tmp_path, per_device_train_batch_size=2, ddp_backend="gloo")
    checkpoint = str(Path(recipe["output_dir"]) / "checkpoint-4")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "on_two.py").write_text(ON_TWO)
    runs = json.dumps([(on_two, 6, None), (on_two, None, checkpoint)])
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "training")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment["ACCELERATE_TORCH_DEVICE"] = "cpu"  # torch 2.11 cannot resume on accelerate's "cpu:0"
    command = [*launch, str(tmp_path / "on_two.py"), runs, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (killed, resumed), others = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    for run, other, steps in ((killed, others[0], range(6)), (resumed, others[1], range(4, 8))):
        assert [a + b for a, b in zip(run["batches"], other["batches"], strict=True)] == [expected[i] for i in steps]
        assert all(len(batch) == 2 for batch in run["batches"])
    for run in (killed, others[0]):  # no process tokenizes what another trains on, but for the next batch
        assert run["encoded"][:12] == [number for batch in run["batches"] for number in batch]
        assert len(run["encoded"]) <= 14
    logs = {str(step): log for step, log in epochless(one.state.log_history).items()}
    for step, log in [*killed["logs"].items(), *resumed["logs"].items()]:
        assert_close(log, logs[step], atol=1e-4, rtol=1e-3)
    assert list(resumed["logs"]) == list(logs)

    resumed, *_ = prepare([write(recipe, tmp_path)])
    batches = watched(resumed)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert batches == expected[4:]


@pytest.fixture(scope="module")
def killed_run(chat_tokenizer, data, tmp_path_factory):
    """A run of the script that is killed, with half a checkpoint left behind, and then started again."""
    folder = tmp_path_factory.mktemp("killed")
    llm = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = SIZES | {
        "base_config": llm | {"vocab_size": 270, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "dataset_name": data,
        "shuffle_records": True,
        "output_dir": str(folder / "run"),
        "max_steps": 60,
        **RUN,
    }
    path = write(recipe, folder)
    command = [sys.executable, str(ROOT / "train_sft.py"), path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("run/checkpoint-*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()[-3000:]
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    checkpoints = {path.parent for path in folder.glob("run/checkpoint-*/manifest.json")}
    last = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    step = int(last.name.split("-")[1])
    assert step < 50 and not (folder / "run" / "model.safetensors").exists()
    half = folder / "run" / f"checkpoint-{step + 2}"  # what a run leaves that is killed while it saves
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(last / name, half)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return path, folder / "run", step, done


def test_a_killed_run_resumes_bit_for_bit(killed_run, tmp_path):
    path, folder, step, done = killed_run
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"[Rr]esum.*checkpoint-{step}\b", done.stderr)
    whole, *_ = prepare([path, "--output_dir", str(tmp_path)])
    whole.train()
    resumed = json.loads((folder / "trainer_state.json").read_text())
    assert losses_of(resumed["log_history"]) == losses_of(whole.state.log_history)
    assert len(losses_of(resumed["log_history"])) == 60
    saved, expected = load_file(folder / "model.safetensors"), state(whole.model)
    assert set(expected) - set(saved) == {"model.llm.lm_head.weight"} and not changed(saved, expected)


def test_what_a_run_leaves_and_says(killed_run):
    path, folder, _, done = killed_run
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    rows = ["model", "window", "first_soft_prompt", "shuffled_soft_prompt", "shuffled_delta"]
    assert list(results["validation"]) == [*rows, "full_context"]
    assert list(results["context_recovery"]) == ["same_llm", "same_llm_shuffled_delta"]
    assert all(f"- context recovery, {display_label(name)}: " in done.stdout for name in results["context_recovery"])
    for variant, result in results["validation"].items():
        assert f"| {display_label(variant)} | {result['loss']:.4f} |" in done.stdout
    assert results["records"] == {"training": 13, "validation": 2} and results["steps"] == 60
    assert results["versions"]["transformers"] == transformers.__version__ and results["device"] == "cpu"
    for picture in ("loss_by_chunk.png", "training_curve.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^Q: .*^A: ", done.stdout, re.M | re.S) and "100%" in done.stderr
    assert "loss_chunk" not in done.stdout  # the log of a step stays one line
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).chat_template


def test_a_run_leaves_the_recipe_that_repeats_it(killed_run, tmp_path):
    path, folder, *_ = killed_run
    *arguments, recipe = parse([path])
    *repeated, again = parse([str(folder / "recipe.yaml")])
    assert recipe == again == yaml.safe_load((folder / "recipe.yaml").read_text())
    assert [vars(values) for values in arguments[:2]] == [vars(values) for values in repeated[:2]]
    assert arguments[2].to_dict() == repeated[2].to_dict()
    assert not {"bf16", "stage", "recipe"} & set(recipe)  # defaults, and no flag
    flags = ["--learning_rate", "0.5", "--stage", "lora", "--hub_token", "hf_secret"]
    assert parse([path, *flags])[3] == recipe | {"learning_rate": 0.5, "stage": "lora"}


def test_the_recipes_of_earlier_stages_are_kept(recipe, tmp_path):
    recipes = [{**recipe, "stage": stage, "output_dir": str(tmp_path / stage)} for stage in ("hypernet", "full")]
    recipes[1]["model_name_or_path"] = recipes[0]["output_dir"]
    recipes.append({**recipes[1], "model_name_or_path": recipes[1]["output_dir"], "output_dir": str(tmp_path / "3")})
    for values in recipes:
        save_recipe(values, Path(values["output_dir"]))
    assert not (tmp_path / "hypernet" / "recipes_before.yaml").exists()
    for index, values in enumerate(recipes):
        folder = Path(values["output_dir"])
        assert yaml.safe_load((folder / "recipe.yaml").read_text()) == values
        if index:
            assert list(yaml.safe_load_all((folder / "recipes_before.yaml").read_text())) == recipes[:index]


def script(*argv: str) -> str:
    """Runs the script in this process, and returns its one line of complaint, which ends it with exit code 1."""
    sys.argv = ["train_sft.py", *argv]
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
    message = exit.value.code
    assert isinstance(message, str) and message.startswith("train_sft.py: ") and "\n" not in message.strip(), message
    return message


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py"])


def test_a_finished_run_is_not_overwritten_unasked(killed_run, argv, tmp_path):
    path, folder, *_ = killed_run
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert re.search(rf"{folder}.*finished.*--overwrite_output_dir", script(path))
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_overwriting_starts_anew(recipe, tmp_path, caplog):
    arguments = [write(recipe, tmp_path, stage="lora", save_steps=1)]
    train(*prepare(arguments))
    folder = Path(recipe["output_dir"])
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        prepare(arguments)
    trainer, *rest = prepare([*arguments, "--overwrite_output_dir", "--max_steps", "2"])
    with caplog.at_level("WARNING"):
        train(trainer, *rest)
    assert f"{folder} holds a finished run, which is replaced" in caplog.text
    assert list(losses_of(trainer.state.log_history)) == [1, 2] and (folder / "results.json").is_file()
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("chunk_length", [4, 16])
def test_a_chunk_that_holds_every_answer_is_said(recipe, tmp_path, caplog, chunk_length):
    sizes = {"chunk_length": chunk_length, "max_answer_length": 16}
    with caplog.at_level("WARNING"):
        prepare([write(recipe, tmp_path, **sizes)])
    assert ("every answer is one chunk" in caplog.text) == (chunk_length == 16)


@pytest.fixture
def half(recipe, tmp_path):
    """A run as if killed after step 2 of 4; returns its recipe."""

    def run(**values):
        values = recipe | {"max_steps": 4, "save_steps": 2, "validation_split": 0} | values
        train(*prepare([write(values, tmp_path)]))
        folder = Path(recipe["output_dir"])
        for name in ("results.json", "model.safetensors"):
            (folder / name).unlink()
        shutil.rmtree(folder / "checkpoint-4")
        return values

    return run


def test_a_checkpoint_of_another_run_is_refused(half, argv, tmp_path):
    """In one line, with what differs and the way out; nothing is written. Asked to overwrite, the run starts anew."""
    values = half()
    folder, other = Path(values["output_dir"]), str(tmp_path / "other.jsonl")
    shutil.copy(values["dataset_name"], other)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for changes in (
        {"dataset_name": other},
        {"stage": "hypernet"},
        {"learning_rate": 0.5, "seed": 7},
        {"max_steps": 3},
        {"dataloader_drop_last": True},
        {"per_device_train_batch_size": 1},
    ):
        message = script(write(values | changes, tmp_path))
        for word in ("checkpoint-2 is of another run", *changes, "--overwrite_output_dir", "--output_dir"):
            assert word in message
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    trainer, *rest = prepare([write(values | {"seed": 7}, tmp_path), "--overwrite_output_dir"])
    train(trainer, *rest)
    assert min(losses_of(trainer.state.log_history)) == 1


def test_what_changes_no_step_may_change(half, tmp_path):
    values = half(logging_steps=1)
    changes = {"save_steps": 3, "report_to": "none", "save_total_limit": 1, "max_steps": 5, "eval_steps": 9}
    trainer, *rest = prepare([write(values | changes, tmp_path)])
    train(trainer, *rest)
    assert trainer.steps_before == 2 and trainer.state.global_step == 5


def test_a_checkpoint_without_optimizer_is_told(half, tmp_path, caplog):
    values = half(save_only_model=True)
    with caplog.at_level("WARNING"):
        train(*prepare([write(values, tmp_path)]))
    assert "checkpoint-2 holds no optimizer (`save_only_model`)" in caplog.text


def test_a_run_does_not_overwrite_its_base(base, argv, recipe, tmp_path):
    shutil.copytree(base, tmp_path / "b")
    recipe |= {"model_name_or_path": str(tmp_path / "b"), "output_dir": f"{tmp_path}/b/"}
    assert re.search("`output_dir` is .*the folder of `model_name_or_path`", script(write(recipe, tmp_path)))
    assert not (tmp_path / "b" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": "grokadamw"}, "`optim` is grokadamw: .*grokadamw"),
        ({"optim": "lomo"}, "`optim` is lomo: .*lomo"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"pow": 1}}, "`lr_scheduler_kwargs` is .*pow"),
        ({"metric_for_best_model": "accuracy"}, "`metric_for_best_model` is 'accuracy'.*loss"),
        ({"gradient_checkpointing_kwargs": {"nope": 1}}, "`gradient_checkpointing_kwargs` has 'nope'"),
        ({"report_to": "comet_ml"}, "comet"),
        ({"accelerator_config": {"nope": 1}}, "nope"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` is not supported"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
    ],
    ids=str,
)
def test_what_would_fail_later_is_refused_at_the_start(values, words, argv, recipe, tmp_path):
    assert re.search(words, script(write(recipe | values, tmp_path)))
    assert not Path(recipe["output_dir"]).exists()


def test_a_number_of_yaml_1_2_is_a_number(recipe, tmp_path):
    path = write(recipe, tmp_path)
    with open(path, "a") as file:
        file.write("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\nweight_decay: 1e-2\n")
    trainer, *_ = prepare([path])
    assert trainer.args.lr_scheduler_kwargs == {"min_lr": 1e-5} and trainer.args.weight_decay == 0.01


def test_a_pipe_without_greek_letters(recipe, tmp_path, monkeypatch):
    """As on Windows: results.json is written, and Δ printed as an escape."""
    said = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", write(recipe, tmp_path, max_steps=1)])
    runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
    said.flush()
    assert b"\\u0394 = 0" in said.buffer.getvalue()
    assert (Path(recipe["output_dir"]) / "results.json").is_file()


def test_an_error_in_a_process_of_its_own(recipe, tmp_path):
    """A `null` record has crashed pyarrow, so this is not run in the tests' own."""
    (tmp_path / "null.jsonl").write_text("null\n")
    path = write(recipe, tmp_path, dataset_name=str(tmp_path / "null.jsonl"))
    if (child := os.fork()) == 0:
        try:
            (tmp_path / "said").write_text(script(path))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert re.search(r"^train_sft.py: .*null\.jsonl.*record 1\b", (tmp_path / "said").read_text())
    assert not Path(recipe["output_dir"]).exists()


def test_the_padding_of_a_tokenizer_whose_padding_is_its_end(base, recipe, tmp_path):
    """End tokens stay labels: every answer that was not cut has one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    shutil.copytree(base, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer, *_ = prepare([write(recipe, tmp_path, model_name_or_path=str(tmp_path / "base"), max_answer_length=256)])
    for batch in trainer.get_train_dataloader():
        assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()
        assert batch["attention_mask"].min() == 0 or len(batch["labels"]) < 4


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> tuple[list[str], Path]:
    """The arguments of a run behind that of a base, both tiny, and its folder."""
    common = {"dataset_name": "facts", "facts_records": 16, "facts_distances": [2], "facts_per_chat": 1, **RUN}
    common |= {"validation_split": 0, "max_steps": 2, "overwrite_output_dir": True}
    monkeypatch.setattr(
        training_run, "recall", functools.partial(training_run.recall, num_chats=4)
    )  # 64 take a minute
    llm = {name: LLM_SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    base = {"base_config": {**llm, "vocab_size": 300, "intermediate_size": 64}, "baseline": "full_context"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**common, **base, "output_dir": "not/here"}))
    recipe = {**common, **SIZES, "after": "base.yaml", "stage": "hypernet", "output_dir": str(tmp_path / "run")}
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(recipe))
    return [str(tmp_path / "last.yaml"), "--seed", "7"], tmp_path / "run"


def do(todo: list[TrainingRun]) -> list[bool]:
    return [train(prepare_run(run), run) for run in todo]


def names(todo: list[TrainingRun]) -> list[str]:
    return [Path(run.path).name for run in todo]


def test_a_recipe_names_the_one_before_it(two_runs, capsys):
    """Both run, the second from the model of the first, and with the same flags."""
    arguments, folder = two_runs
    todo = plan(arguments)
    assert names(todo) == ["base.yaml", "last.yaml"] and do(todo) == [True, True]
    last, before = (yaml.safe_load((path / "recipe.yaml").read_text()) for path in (folder, folder / "base"))
    assert (last["seed"], before["seed"], last["model_name_or_path"]) == (7, 7, str(folder / "base"))
    assert (last["stage"], before["baseline"]) == ("hypernet", "full_context") and "after" not in last
    base, own = (load_file(path / "model.safetensors") for path in (folder / "base", folder))
    assert all(name.startswith("model.hypernet.") for name in own)  # stage hypernet saves no base
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == "base"  # both can move
    weights = Phase15ForCausalLM.from_pretrained(folder).llm.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in base.items())
    results = json.loads((folder / "results.json").read_text())
    assert [at["distance"] for at in results["recall"]] == [2, 4] and (folder / "recall.png").is_file()
    said = capsys.readouterr().out
    assert "| words between" in said and "\nWith Δ = 0: " in said

    assert len(plan(arguments)) == 2, "the whole is done anew"
    with pytest.raises(ValueError, match="holds a finished run"):
        plan([*arguments, "--overwrite_output_dir", "false"])
    (folder / "results.json").unlink()  # as after a kill in the second run
    assert names(plan(arguments)) == ["last.yaml"]
    assert len(plan([*arguments, "--seed", "8"])) == 2, "the base is another"
    start = ["--model_name_or_path", str(folder / "base")]
    assert names(plan([*arguments, *start])) == ["last.yaml"]


def test_what_is_wrong_with_the_last_run_is_told_before_the_first(two_runs):
    arguments, folder = two_runs
    for flags, word in ((["--stage", "fulll"], "fulll"), (["--after", "no.yaml"], "no.yaml: no such recipe")):
        with pytest.raises(ValueError, match=word):
            plan([*arguments, *flags])
    assert not folder.exists()
