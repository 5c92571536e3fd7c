# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Bad input at every entry point ends in one line: it names the mistake, where it is, and what was expected. Nothing is
written.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset
from reference import LLM_SIZES, SIZES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from phase15.data.records import open_records
from phase15.data.tokenizer import train_tokenizer
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[2]
WORDS = "blue red grey black".split()
GOOD = [{"question": f"Why is the sky {word}?", "answer": f"Light is {word}."} for word in WORDS]
RECIPE = SIZES | {
    "model_name_or_path": "{base}",
    "dataset_name": "{data}",
    "output_dir": "{out}",
    "max_answer_length": 14,
    "max_steps": 1,
    "validation_split": 0.0,
    "report_to": "none",
    "use_cpu": True,
}
OF_THE_MODEL = dict.fromkeys((*SIZES, "max_answer_length"))  # a Phase15 model has its own
EVAL = ["--model_dir", "{model}", "--dataset", "{data}", "--device", "cpu", "--output_dir", "{out}"]
EVAL += ["--validation_split", "0.5", "--generated_records", "0"]
PUSH = ["--model_dir", "{model}", "--repo_id", "USER/NAME", "--dry_run", "--output_dir", "{out}"]


@pytest.fixture(scope="module")
def home(chat_tokenizer, tmp_path_factory) -> Path:
    """A good base, a good Phase15 model made of it, and good records. Cases spoil a copy."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    ids = {"eos_token_id": chat_tokenizer.eos_token_id, "pad_token_id": chat_tokenizer.pad_token_id}
    config = LlamaConfig(**LLM_SIZES | ids | {"vocab_size": len(chat_tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "base")
    Phase15ForCausalLM.from_base(home / "base", max_answer_length=14, **SIZES).save_pretrained(home / "model")
    for name in ("base", "model"):
        chat_tokenizer.save_pretrained(home / name)
    (home / "data.jsonl").write_text(lines(*GOOD))
    return home


@pytest.fixture(scope="module")
def model(home) -> Phase15ForCausalLM:
    return Phase15ForCausalLM.from_pretrained(home / "model")


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# how a case spoils its folder


def content(name: str, value: str | bytes) -> Callable:
    return lambda folder: (folder / name).write_bytes(value if isinstance(value, bytes) else value.encode())


def removed(*names: str) -> Callable:
    return lambda folder: [(folder / name).unlink() for name in names]


def fields(name: str, **values) -> Callable:
    """Fields of a JSON file."""

    def change(folder: Path):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(name: str, change: Callable) -> Callable:
    def rewrite(folder: Path):
        path = folder / name / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return rewrite


def bytes_of(name: str, change: Callable) -> Callable:
    def rewrite(folder: Path):
        path = folder / name / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def all_of(*changes: Callable) -> Callable:
    return lambda folder: [change(folder) for change in changes]


def other_tokenizer(name: str) -> Callable:
    """Saves a tokenizer that encodes the records with more tokens than the model knows."""
    tokenizer = train_tokenizer(Dataset.from_list([*GOOD] * 3), 400)
    return lambda folder: tokenizer.save_pretrained(folder / name)


def baseline(**recipe) -> Callable:
    """Copies the model as a baseline whose run held out other records."""

    def make(folder: Path):
        shutil.copytree(folder / "model", folder / "baseline")
        for name, values in (("model", {}), ("baseline", recipe)):
            values = {"dataset_name": "data.jsonl", "validation_split": 0.5, **values}
            (folder / name / "recipe.yaml").write_text(yaml.safe_dump(values))

    return make


def shrunk(state: dict):
    state["model.norm.weight"] = torch.ones(3)


def swollen(state: dict):
    for name in state:
        state[name] *= 1e5


def damaged(state: dict):
    state["model.llm.model.norm.weight"].fill_(float("nan"))


class Case(NamedTuple):
    words: list[str]  # the line must have them
    command: str | None = None
    flags: list[str] | None = None
    recipe: dict | str | bytes | None = None  # values over RECIPE, or the whole text of the recipe
    data: str | bytes | None = None  # content of the data file
    build: Callable = lambda folder: None
    call: Callable | None = None  # takes the model and the folder; instead of a command
    error: type[Exception] = ValueError
    process: bool = False  # run in a new process: lm_eval cannot register a model twice in one
    needs: str | None = None  # a package
    begun: bool = False  # training had begun: recipe.yaml may be written


def train(*words: str, data=None, build=lambda folder: None, recipe=None, flags=(), **rest) -> Case:
    return Case(list(words), "train_sft.py", list(flags), recipe or {}, data, build, **rest)


def file_of(name: str, data: str | bytes, *words: str) -> Case:
    return train(name, *words, data=data, recipe={"dataset_name": "{folder}/" + name})


def command(script: str, flags: list[str], *words: str, **rest) -> Case:
    return Case(list(words), script, flags, **rest)


def api(call: Callable, *words: str, **rest) -> Case:
    return Case(list(words), call=call, **rest)


IDS = torch.tensor([[5, 6, 7]])
MODEL_ERROR = "the model that config.json describes"
CASES = {
    # recipes and flags of train_sft.py
    "misspelt key": train("recipe.yaml", "'lerning_rate'", "did you mean 'learning_rate'", recipe={"lerning_rate": 1}),
    "key like no other": train("recipe.yaml", "unknown key 'xyzzy'", recipe={"xyzzy": 1}),
    "misspelt flag without a recipe": command(
        "train_sft.py", ["--lerning_rate", "1"], "--lerning_rate", "did you mean 'learning_rate'"
    ),
    "misspelt flag": train("--lerning_rate", "did you mean 'learning_rate'", flags=["--lerning_rate", "1"]),
    "flag without value": train("--max_steps", "expected one argument", flags=["--max_steps"]),
    "recipe is no YAML": train("recipe.yaml", "not YAML", "line 2", recipe="a: 1\nstage: [full\n"),
    "recipe is no UTF-8": train("recipe.yaml", "not YAML", "0xff", recipe=b"stage: \xff\n"),
    "recipe is a list": train("recipe.yaml", "mapping", "list", recipe="- full\n"),
    "word for a number": train("recipe.yaml", "max_steps", "int", "'many'", recipe={"max_steps": "many"}),
    "list for a number": train("recipe.yaml", "`max_steps` is a list", "one value", recipe={"max_steps": [1]}),
    "null for a number": train("recipe.yaml", "`learning_rate` is null", recipe={"learning_rate": None}),
    "word for a switch": train("recipe.yaml", "bf16", "true/false", "maybe", recipe={"bf16": "maybe"}),
    "number for a switch": train("recipe.yaml", "bf16", "true/false", "3", recipe={"bf16": 3}),
    "word for a share": train("recipe.yaml", "validation_split", "float", "'x'", recipe={"validation_split": "x"}),
    "unknown stage": train("--stage", "'fulll'", "'hypernet', 'full', 'lora'", recipe={"stage": "fulll"}),
    "unknown dtype": train("`dtype` is 'float99'", "bfloat16", recipe={"dtype": "float99"}),
    "integer dtype": train("`dtype` is 'int8'", "bfloat16", recipe={"dtype": "int8"}),
    "unknown optimizer": train("--optim", "'adamm'", "adamw_torch", recipe={"optim": "adamm"}),
    "learning rate below 0": train("`learning_rate` is -1.0", "0 or more", recipe={"learning_rate": -1.0}),
    "learning rate nan": train("`llm_learning_rate` is nan", "0 or more", recipe={"llm_learning_rate": "nan"}),
    "no batch": train("`per_device_train_batch_size` is 0", "1 or more", recipe={"per_device_train_batch_size": 0}),
    "no accumulation": train("`gradient_accumulation_steps` is 0", recipe={"gradient_accumulation_steps": 0}),
    "bptt below 1": train("`bptt_chunks` is -1", "1 or more", recipe={"bptt_chunks": -1}),
    "pickled arguments": train("`push_to_hub`", "the token", "push_to_hub.py --model_dir", flags=["--push_to_hub"]),
    "no epoch": train("`num_train_epochs` is -1", "above 0", recipe={"num_train_epochs": -1, "max_steps": -1}),
    "negative records": train("`max_validation_records` is -3", recipe={"max_validation_records": -3}),
    "chunk of nothing": train("`chunk_length` is 0", "positive integer", recipe={"chunk_length": 0}),
    "all slots sinks": train("`num_sink_tokens` is 2", "`num_soft_tokens` (2)", recipe={"num_soft_tokens": 2}),
    "unknown tracker": train("nonsense is not supported", "wandb", recipe={"report_to": "nonsense"}),
    "no checkpoint": train(
        "`resume_from_checkpoint` is none", "checkpoint", flags=["--resume_from_checkpoint", "none"]
    ),
    "misspelt size": train(
        "`base_config`",
        "'hidden_sise'",
        "'hidden_size'",
        recipe={"model_name_or_path": None, "base_config": {"hidden_sise": 8}},
    ),
    "size in words": train(
        "`vocab_size` is 'many'", "integer", recipe={"model_name_or_path": None, "base_config": {"vocab_size": "many"}}
    ),
    # where to write
    "output below a file": train("output_dir", "data.jsonl is a file", flags=["--output_dir", "{data}/run"]),
    "output is a file": train("output_dir", "data.jsonl is a file", flags=["--output_dir", "{data}"], process=True),
    "output cannot be written": train("output_dir", "/proc cannot be written", flags=["--output_dir", "/proc/run"]),
    # data
    "empty file": train("data.jsonl", "empty", data=""),
    "no record": file_of("data.csv", "question,answer\n", "no usable record"),
    "wrong columns": train("record 1", "['text']", "prompt, completion; question, answer", data=lines({"text": "a"})),
    "ids for text": train("record 1", "['input_ids']", "question, answer", data=lines({"input_ids": [1, 2]})),
    "broken line": train("record 2 (line 3) is not JSON", "column", data=lines(GOOD[0]) + '\n{"question": \n'),
    "broken JSON": file_of("data.json", '[\n{"question": "a", }]', "not JSON", "line 2, column"),
    "deep JSON": train("record 1 (line 1)", "nested", data="[" * 100_000),
    "number for a record": train("record 2 is a int", "object", data=lines(GOOD[0]) + "5\n"),
    "line is no UTF-8": train(
        "record 2 (line 2)", "not UTF-8", "0xff", data=lines(GOOD[0]).encode() + b'{"a": "\xff"}'
    ),
    "JSON is no UTF-8": file_of("data.json", b'[\n{"question": "\xff"}]', "line 2", "not UTF-8", "0xff"),
    "CSV is no UTF-8": file_of("data.csv", b"question,answer\na,b\nc,\xff\n", "line 3", "not UTF-8", "0xff"),
    "not Parquet": file_of("data.parquet", b"PAR1 nothing PAR1", "arquet"),
    "wide CSV": file_of("data.csv", "question,answer\na,b,c\n", "record 1", "more values"),
    "blank answer": train(
        "record 2", "`answer` is missing or empty", data=lines(GOOD[0], GOOD[1] | {"answer": " \n"})
    ),
    "number for an answer": train("record 2", "`answer` is a int", data=lines(GOOD[0], GOOD[1] | {"answer": 5})),
    "half a character": train("record 2", "not text", data=lines(GOOD[0], GOOD[1] | {"answer": "\ud800"})),
    "a million tokens": train(
        "record 3", "65,536 are the most", data=lines(*GOOD[:2], {"question": "z " * 500_000, "answer": "b"})
    ),
    "no file": train("none.jsonl: no such file", recipe={"dataset_name": "none.jsonl"}),
    # bases and tokenizers
    "no base": train("/no/such/base", recipe={"model_name_or_path": "/no/such/base"}),
    "base without config": train("base", "neither config.json", build=removed("base/config.json")),
    "broken config": train("base/config.json", "JSON", build=content("base/config.json", "{")),
    "no weights": train("base", "no file named model.safetensors", build=removed("base/model.safetensors")),
    "truncated weights": train(
        "base/model.safetensors", "cannot be read", build=bytes_of("base", lambda b: b[: len(b) // 2])
    ),
    "altered header": train(
        "base/model.safetensors", "cannot be read", build=bytes_of("base", lambda b: b[:8] + b"x" + b[9:])
    ),
    "renamed weight": train(
        "2 of the weights do not fit",
        "q_proj.weight is missing",
        "z_proj.weight is left over",
        build=bytes_of("base", lambda b: b.replace(b"layers.0.self_attn.q_proj", b"layers.0.self_attn.z_proj")),
    ),
    "weight of another shape": train(
        MODEL_ERROR, "model.norm.weight is of another shape", build=weights("base", shrunk)
    ),
    "fewer layers in the config": train(
        MODEL_ERROR, "left over", build=fields("base/config.json", num_hidden_layers=1)
    ),
    "weights too large for float16": train(
        "not finite", "float16", build=weights("base", swollen), recipe={"dtype": "float16"}
    ),
    "overflow in training": train(
        "the loss is nan at step 1",
        "records",
        recipe=OF_THE_MODEL | {"model_name_or_path": "{model}"},
        build=weights("model", damaged),
        begun=True,
    ),
    "tokenizer of another model": train(
        "record 1", "does not fit", "vocabulary has 270", build=other_tokenizer("base")
    ),
    "broken tokenizer": train("base", "tokenizer cannot be loaded", build=content("base/tokenizer.json", "{")),
    "no chat template": train("record 1", "no chat template", build=removed("base/chat_template.jinja")),
    "broken chat template": train(
        "record 1", "chat template cannot be used", build=content("base/chat_template.jinja", "{% for %}")
    ),
    "template that refuses": train(
        "record 1", "no users", build=content("base/chat_template.jinja", "{{ raise_exception('no users') }}")
    ),
    "no end token": train("eos_token", build=fields("base/tokenizer_config.json", eos_token=None)),
    # Phase15 models
    "misspelt field of the config": train(
        "model: `num_soft_token` is not a field",
        "`num_soft_tokens`",
        build=fields("model/config.json", num_soft_token=8),
        recipe=OF_THE_MODEL | {"model_name_or_path": "{model}"},
    ),
    "other size than the model's": train(
        "`num_soft_tokens` is 8",
        "made with 24",
        recipe=OF_THE_MODEL | {"model_name_or_path": "{model}", "num_soft_tokens": 8},
    ),
    # eval_sft.py
    "evaluate nothing": command("eval_sft.py", ["--model_dir", "none", "--dataset", "{data}"], "none: no such folder"),
    "evaluate a base": command("eval_sft.py", [*EVAL, "--model_dir", "{base}"], "base is not a Phase15 model"),
    "evaluate in a dtype": command("eval_sft.py", [*EVAL, "--dtype", "float99"], "`dtype` is 'float99'"),
    "evaluate on a device": command("eval_sft.py", [*EVAL, "--device", "abacus"], "`device` is 'abacus'"),
    "evaluate no batch": command("eval_sft.py", [*EVAL, "--batch_size", "0"], "`batch_size` is 0", "1 or more"),
    "evaluate a batch of words": command("eval_sft.py", [*EVAL, "--batch_size", "x"], "--batch_size", "int", "'x'"),
    "evaluate into a file": command("eval_sft.py", [*EVAL, "--output_dir", "{data}/x"], "data.jsonl is a file"),
    "evaluate broken data": command("eval_sft.py", EVAL, "record 1 (line 1) is not JSON", data="{\n"),
    "evaluate truncated weights": command(
        "eval_sft.py", EVAL, "model.safetensors", "cannot be read", build=bytes_of("model", lambda b: b[:-9])
    ),
    "evaluate without Δ": command(
        "eval_sft.py",
        EVAL,
        "model.hypernet.alpha is missing",
        build=weights("model", lambda w: w.pop("model.hypernet.alpha")),
    ),
    "evaluate without an output layer": command(
        "eval_sft.py",
        EVAL,
        MODEL_ERROR,
        "model.llm.lm_head.weight is missing",
        build=weights("model", lambda w: w.pop("model.llm.lm_head.weight")),
    ),
    "evaluate a cut base": command(
        "eval_sft.py",
        [*EVAL, "--baselines", "{base}"],
        "base/model.safetensors",
        "cannot be read",
        build=bytes_of("base", lambda b: b[:99]),
    ),
    "evaluate nan": command(
        "eval_sft.py", EVAL, "the model", "record 1", "not finite", build=weights("model", damaged)
    ),
    "evaluate with another tokenizer": command(
        "eval_sft.py", EVAL, "does not fit", "vocabulary has 270", build=other_tokenizer("model")
    ),
    "evaluate behind a broken recipe": command(
        "eval_sft.py", EVAL, "recipe.yaml cannot be read", build=content("model/recipe.yaml", "a: [")
    ),
    "baseline with other records": command(
        "eval_sft.py",
        [*EVAL, "--baselines", "{folder}/baseline"],
        "baseline did not hold out",
        "`validation_split` was 0.25",
        build=baseline(validation_split=0.25),
    ),
    "baseline with other data": command(
        "eval_sft.py",
        [*EVAL, "--baselines", "{folder}/baseline"],
        "`dataset_name` was 'x.csv'",
        build=baseline(dataset_name="x.csv"),
    ),
    # push_to_hub.py
    "push to nobody": command("push_to_hub.py", [*PUSH, "--repo_id", "name"], "`repo_id` is 'name'", "USER/NAME"),
    "push a base": command(
        "push_to_hub.py", [*PUSH, "--model_dir", "{base}"], "base is not a Phase15 model", "a causal LM"
    ),
    "push below a file": command("push_to_hub.py", [*PUSH, "--output_dir", "{data}/x"], "data.jsonl is a file"),
    "push dry to nowhere": command("push_to_hub.py", PUSH[:5], "`dry_run` and `output_dir` go together"),
    "push truncated weights": command(
        "push_to_hub.py", PUSH, "model.safetensors", "cannot be read", build=bytes_of("model", lambda b: b[:-9])
    ),
    "push a weight too many": command(
        "push_to_hub.py", PUSH, "extra is left over", build=weights("model", lambda w: w.update(extra=torch.ones(1)))
    ),
    "push nan": command("push_to_hub.py", PUSH, "not finite", "damaged", build=weights("model", damaged)),
    "push a misspelt field": command(
        "push_to_hub.py", PUSH, "`num_soft_token` is not a field", build=fields("model/config.json", num_soft_token=8)
    ),
    "push without a tokenizer": command(
        "push_to_hub.py", PUSH, "tokenizer cannot be loaded", build=removed("model/tokenizer.json")
    ),
    "push a broken template": command(
        "push_to_hub.py", PUSH, "chat template cannot be used", build=content("model/chat_template.jinja", "{% if %}")
    ),
    "push in shards of words": command("push_to_hub.py", [*PUSH, "--max_shard_size", "many"], "many", "GB"),
    # benchmarks, serve.py, eval_lm.py, app.py
    "benchmark nothing": command("benchmarks", ["fly"], "invalid choice: 'fly'", "decode"),
    "benchmark on a device": command("benchmarks", ["decode", "--device", "abacus"], "--device", "abacus"),
    "benchmark no batch": command("benchmarks", ["decode", "--batch_sizes", "0"], "--batch_sizes", "1 or more"),
    "benchmark too few tokens": command(
        "benchmarks", ["long", "--shape", "tiny", "--new_tokens", "9"], "--new_tokens of at least 256"
    ),
    "benchmark no folders": command("benchmarks", ["load", "--folders", "a", "b"], "a is no folder of a model"),
    "serve in batches": command(
        "serve.py", ["--continuous-batching"], "unrecognized arguments: --continuous-batching", needs="uvicorn"
    ),
    "serve without lanes": command("serve.py", ["--num_lanes", "0"], "`num_lanes` is 0", needs="uvicorn"),
    "serve a base": command("serve.py", ["--model_dir", "{base}"], "not a Phase15 model", needs="uvicorn"),
    "serve nothing": command("serve.py", ["--model_dir", "none"], "none", needs="uvicorn"),
    "serve with no key": command(
        "serve.py", ["--model_dir", "{model}", "--api_key", "no/key"], "no/key", needs="uvicorn"
    ),
    "serve on a device": command(
        "serve.py", ["--model_dir", "{model}", "--device", "abacus"], "abacus", needs="uvicorn"
    ),
    "lm_eval of nothing": command(
        "eval_lm.py", ["--model_dir", "none", "--tasks", "a"], "none: no such folder", needs="lm_eval", process=True
    ),
    "page of a base": command("app.py", ["--model_dir", "{base}"], "not a Phase15 model", "'llama'", needs="gradio"),
    "page of truncated weights": command(
        "app.py",
        ["--model_dir", "{model}"],
        "model.safetensors",
        "cannot be read",
        needs="gradio",
        build=bytes_of("model", lambda b: b[:-9]),
    ),
    # Python
    "config, misspelt": api(lambda *_: Phase15Config(num_soft_token=8), "did you mean `num_soft_tokens`"),
    "config, no number": api(lambda *_: Phase15Config(chunk_length="4"), "`chunk_length` is '4'", "positive integer"),
    "config, unknown LLM": api(
        lambda *_: Phase15Config(text_config={"model_type": "x"}), "`text_config.model_type` is 'x'"
    ),
    "from_pretrained, misspelt": api(
        lambda _, folder: Phase15ForCausalLM.from_pretrained(folder / "model"),
        "model: `num_soft_token` is not a field",
        build=fields("model/config.json", num_soft_token=8),
    ),
    "forward, large id": api(lambda model, _: model(IDS + 264), "Row 0 ", "holds 270", " 1, but", "0 to 269"),
    "forward, negative id": api(lambda model, _: model(IDS - 7), "Row 0 ", "holds -2", " 0, but", "0 to 269"),
    "forward, large label": api(lambda model, _: model(IDS, labels=IDS + 264), "label", "270", " 1, but"),
    "forward, float ids": api(lambda model, _: model(IDS.float()), "`input_ids` must hold integers", "float32"),
    "forward, one row": api(lambda model, _: model(IDS[0]), "`input_ids` must have shape", "(3,)"),
    "forward, short mask": api(lambda model, _: model(IDS, attention_mask=IDS[:, :2]), "`attention_mask`", "(1, 2)"),
    "forward, no target": api(
        lambda model, _: model(IDS, labels=IDS * 0 - 100, skip_logits=True), "`labels` hold no target"
    ),
    "forward, another cache": api(
        lambda model, _: model(IDS, past_key_values=DynamicCache()), "Phase15Cache", "DynamicCache"
    ),
    "generate, large id": api(lambda model, _: model.generate(IDS + 264, max_new_tokens=2), "Row 0 ", "holds 270"),
    "generate, no query": api(
        lambda model, _: model.generate(IDS, attention_mask=IDS * 0, max_new_tokens=2), "Row 0 has 0 tokens"
    ),
    "generate, old cache": api(
        lambda model, _: model.generate(IDS[:, :1], past_key_values=model(IDS, use_cache=True).past_key_values),
        "already seen 3",
        "whole conversation",
    ),
    "generate, speculation": api(
        lambda model, _: model.generate(IDS, prompt_lookup_num_tokens=2), "`prompt_lookup_num_tokens`"
    ),
    "generate, nan": api(
        lambda _, folder: Phase15ForCausalLM.from_pretrained(folder / "model").generate(IDS, do_sample=True),
        "not finite",
        "float32",
        build=weights("model", damaged),
        error=FloatingPointError,
    ),
    "cache, other rows": api(
        lambda model, _: model(
            IDS.expand(2, 3), query_lengths=torch.tensor([1, 2]), past_key_values=Phase15Cache(model.config)
        ),
        "chunks of all rows",
        "together",
    ),
    "data, no such pattern": api(lambda *_: open_records("no/*.jsonl"), "no/*.jsonl: no such file"),
    "data, unknown type": api(
        lambda _, folder: open_records(str(folder / "model" / "config.txt")),
        "config.txt",
        ".jsonl, .json, .csv",
        build=content("model/config.txt", "x"),
    ),
}


def tree(folder: Path) -> dict[str, tuple]:
    """Of each file and folder: size, time and hash."""
    files = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {
        str(path): (stat.st_size, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        if path.is_file()
        else ()
        for path, stat in files.items()
    }


def run(case: Case, argv: list[str], monkeypatch) -> tuple[int, list[str]]:
    """Runs the command, in this process without `process`; returns its exit code and the lines of stderr."""
    paths = case.command, f"scripts/{case.command}", "benchmarks/__main__.py"
    path = str(next(ROOT / path for path in paths if (ROOT / path).exists()))
    if case.process:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, path, *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr.splitlines()
    monkeypatch.setattr(sys, "argv", [path, *argv])
    said = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(said):
        runpy.run_path(path, run_name="__main__")
    code = ended.value.code
    return (
        (1, [*said.getvalue().splitlines(), *code.splitlines()])
        if isinstance(code, str)
        else (code, said.getvalue().splitlines())
    )


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, home, model, tmp_path, monkeypatch):
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"{case.needs} is not installed")
    folder = tmp_path / "work"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    case.build(folder)
    paths = {name: str(folder / name) for name in ("base", "model", "out")}
    paths |= {"data": str(folder / "data.jsonl"), "folder": str(folder)}
    fill = lambda value: value.format(**paths) if isinstance(value, str) else value  # noqa: E731
    if case.call is not None:
        before = tree(tmp_path)
        with pytest.raises(case.error) as raised:
            case.call(model, folder)
        said = str(raised.value)
    else:
        argv = [fill(flag) for flag in case.flags]
        if isinstance(case.recipe, dict):
            recipe = {key: fill(value) for key, value in (RECIPE | case.recipe).items()}
            if case.data is not None:
                Path(recipe["dataset_name"]).write_bytes(
                    case.data if isinstance(case.data, bytes) else case.data.encode()
                )
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        elif case.recipe is not None:
            content("recipe.yaml", case.recipe)(folder)
        elif case.data is not None:
            content("data.jsonl", case.data)(folder)
        if case.recipe is not None:
            argv.insert(0, str(folder / "recipe.yaml"))
        before = tree(tmp_path)
        code, stderr = run(case, argv, monkeypatch)
        assert code not in (0, None) and "Traceback" not in "\n".join(stderr), stderr
        (said,) = [line for line in stderr if line.startswith((f"{case.command}: ", f"{case.command}: error: "))]
        assert said == stderr[-1]
    missing = [word for word in case.words if word not in said]
    assert not missing, (missing, said)
    after = tree(tmp_path)
    if case.begun:
        after = {
            path: state
            for path, state in after.items()
            if path not in (f"{folder}/out", f"{folder}/out/recipe.yaml", f"{folder}/out/recipes_before.yaml")
        }
    assert after == before, set(after) ^ set(before)


def test_there_are_sixty_cases_without_extras():
    assert sum(case.needs is None for case in CASES.values()) >= 60
