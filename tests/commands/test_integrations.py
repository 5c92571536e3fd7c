# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The model in other people's tools, loaded as their users load it: a saved folder, with remote code."""

import copy
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from reference import LLM_SIZES, SIZES, aligned, randomise_alpha
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from phase15.model.modeling_phase15 import Phase15ForCausalLM


pytestmark = pytest.mark.extra
ROOT = Path(__file__).parents[2]
TEXTS = ["Why is the sky blue?", "Why?", "Light scatters most when the sky is blue"]
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"do_sample": False, "max_new_tokens": 50}  # past the LLM's 40 positions


@pytest.fixture(scope="module")
def base(chat_tokenizer, tmp_path_factory) -> str:
    """Folder of a tiny Llama."""
    folder = str(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    config = LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, chat_tokenizer, tmp_path_factory) -> str:
    """Folder of a tiny Phase15 model with Δ ≠ 0, and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("saved"))
    torch.manual_seed(1)
    model = randomise_alpha(Phase15ForCausalLM.from_base(base, **SIZES))
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


@pytest.fixture
def model(saved):
    return load(saved)


@pytest.fixture(scope="module")
def tokenizer(saved):
    return AutoTokenizer.from_pretrained(saved, trust_remote_code=True)


@pytest.fixture(scope="module")
def ids() -> torch.LongTensor:
    return torch.randint(5, 260, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model, ids) -> torch.Tensor:
    return aligned(model).eval()(input_ids=ids).logits


ELSEWHERE = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert importlib.util.find_spec("modeling_phase15") is None, "the repository is on this process's path"
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
for weight in model.parameters():  # as conftest.aligned
    weight.data = weight.data.clone()
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def logits_elsewhere(folder, ids, home: Path) -> torch.Tensor:
    """Of a model that a process loads which knows nothing of this repository."""
    home.mkdir()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_MODULES_CACHE": str(home / "modules")}
    torch.save(ids, home / "ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(home / "ids.pt"), str(home / "logits.pt")]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(home / "logits.pt")


# transformers' pipeline


@pytest.fixture(scope="module")
def generator(saved):
    return pipeline("text-generation", model=saved, trust_remote_code=True)


def generated(model, tokenizer, query) -> str:
    """The answer to one query, from `generate`."""
    if isinstance(query, str):
        inputs = tokenizer(query, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            query, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    output = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **GREEDY)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_pipeline_gives_what_generate_gives(generator, model, tokenizer):
    """Texts one by one and in batches with padding, and a chat."""
    expected = [generated(model, tokenizer, text) for text in TEXTS]
    assert len(set(expected)) == len(TEXTS) and all(expected)
    for text, answer in zip(TEXTS, expected, strict=True):
        assert generator(text, **GREEDY) == [{"generated_text": text + answer}]
    outputs = generator(TEXTS, batch_size=2, return_full_text=False, **GREEDY)
    assert outputs == [[{"generated_text": answer}] for answer in expected]
    (output,) = generator(CHAT, **GREEDY)
    answer = {"role": "assistant", "content": generated(model, tokenizer, CHAT)}
    assert output["generated_text"] == [*CHAT, answer]


def test_the_pipeline_streams(generator, model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=1)
    generator(TEXTS[0], streamer=streamer, **GREEDY)
    pieces = list(streamer)
    assert "".join(pieces) == generated(model, tokenizer, TEXTS[0]) and len(pieces) > 5


def test_the_pipeline_does_not_alarm_its_user(saved, caplog):
    """Neither that the model is not supported nor that it went past a maximum length."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pipeline("text-generation", model=saved, trust_remote_code=True)(TEXTS[0], **GREEDY)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert "predefined maximum length" not in caplog.text


# PEFT


LORA = {
    "the LLM, and the HyperNetwork whole": {"target_modules": r".*llm\..*_proj", "modules_to_save": ["hypernet"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, and the HyperNetwork whole": {"target_modules": "all-linear", "modules_to_save": ["hypernet"]},
}


def train(model, ids) -> list[float]:
    """Two steps; the loss before each, and after both."""
    labels = ids.where(torch.arange(ids.shape[1]) > 6, -100)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model.train()(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [*losses, model.eval()(input_ids=ids, labels=labels).loss.item()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_is_trained_saved_loaded_and_merged(kind, saved, model, ids, tmp_path):
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    whole = [name for name in names if "model.hypernet.modules_to_save.default." in name]
    assert bool(whole) is ("modules_to_save" in LORA[kind])
    assert any("hypernet" in name and "lora_A" in name for name in names) is (kind == "all-linear")
    assert len([name for name in names if ".llm." in name and "lora_A" in name]) == 7 * LLM_SIZES["num_hidden_layers"]
    losses = train(adapted, ids)
    assert losses[2] < losses[1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (Path(saved) / "model.safetensors").stat().st_size * (0.6 if whole else 0.2)

    expected = logits_of(adapted, ids)
    assert (expected - logits_of(load(saved), ids)).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(load(saved), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, ids), expected)
    tokens = {"input_ids": ids[:, :9], "attention_mask": torch.ones_like(ids[:, :9]), "pad_token_id": 1, **GREEDY}
    assert torch.equal(loaded.generate(**tokens), adapted.generate(**tokens))
    merged = loaded.merge_and_unload()
    assert_close(logits_of(merged, ids), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**tokens), adapted.generate(**tokens))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_names_its_base_and_a_merged_model_travels(model, ids, tmp_path):
    """`AutoPeftModelForCausalLM` finds the Phase15 folder; what was merged loads in another process."""
    kind = LORA["the LLM, and the HyperNetwork whole"]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **kind))
    train(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted, ids)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert torch.equal(logits_of(loaded, ids), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits_elsewhere(tmp_path / "merged", ids, tmp_path / "home"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_through_transformers(saved, model, ids, tmp_path):
    """`add_adapter`, `save_pretrained` and `load_adapter`, which keep the model's class."""
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for 0.22, which is not out yet
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}"):
            model.add_adapter(LoraConfig(r=2, **LORA["all-linear"]))
        return
    model.add_adapter(LoraConfig(r=2, **LORA["all-linear"]))  # transformers 5.17 does not load modules_to_save
    train(model, ids)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    loaded = load(saved)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(loaded, ids), expected)
    loaded.disable_adapters()
    assert torch.equal(logits_of(loaded, ids), logits_of(load(saved), ids))


# TRL


WORDS = "the cat and a dog ran over the hill to see seven red birds under some old tree by the river at night".split()
PAIRS = [(" ".join(WORDS[: 2 + i]), " ".join(WORDS[i : 3 * i + 2])) for i in range(4)]  # of several chunks
# our template with marks around what the assistant wrote
MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|end|>\n{% endgeneration %}{% else %}{{ message['content'] }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def turn(role, content) -> list[dict]:
    return [{"role": role, "content": content}]


FORMATS = {
    "strings": lambda query, answer: {"prompt": query, "completion": answer},
    "messages": lambda query, answer: {"prompt": turn("user", query), "completion": turn("assistant", answer)},
    "assistant-only": lambda query, answer: {"messages": turn("user", query) + turn("assistant", answer)},
}


@pytest.fixture(scope="module")
def sft(tokenizer, tmp_path_factory):
    """Makes a trainer."""
    trl = pytest.importorskip("trl", reason="requirements-extra.txt")

    def trainer(model, form="strings", peft_config=None, **settings):
        defaults = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        defaults |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        processing_class = copy.deepcopy(tokenizer)
        template = {}
        if form == "assistant-only":
            processing_class.chat_template = MARKED
            template = {"assistant_only_loss": True}
        records = Dataset.from_list([FORMATS[form](*pair) for pair in PAIRS])
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(tmp_path_factory.mktemp("sft")), **defaults | template | settings),
            train_dataset=records,
            eval_dataset=records,
            processing_class=processing_class,
            peft_config=peft_config,
        )

    return trainer


def records_of(tokenizer, form) -> list[tuple[torch.LongTensor, int]]:
    """Each pair's ids and how many of them are the query, tokenized here."""
    records = []
    for query, answer in PAIRS:
        if form == "strings":
            start = tokenizer(query)["input_ids"]
            whole = [*tokenizer(query + answer)["input_ids"], tokenizer.eos_token_id]
        else:
            chat = {"return_dict": True, "add_generation_prompt": True}
            start = tokenizer.apply_chat_template(turn("user", query), **chat)["input_ids"]
            chat["add_generation_prompt"] = False
            whole = tokenizer.apply_chat_template(turn("user", query) + turn("assistant", answer), **chat)["input_ids"]
        assert whole[: len(start)] == start
        records.append((torch.tensor([whole]), len(start)))
    return records


@torch.no_grad()
def naive_loss_and_accuracy(model, records) -> tuple[float, float]:
    """Means over all answer tokens, row by row and without padding."""
    logits = [model.eval()(ids, query_lengths=[query]).logits[0, query - 1 : -1] for ids, query in records]
    logits = torch.cat(logits)
    targets = torch.cat([ids[0, query:] for ids, query in records])
    accuracy = (logits.argmax(dim=1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets).item(), accuracy


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_sft_trainer_reads_prompts_as_queries_and_has_our_loss(form, sft, model, tokenizer):
    records = records_of(tokenizer, form)
    expected, _ = naive_loss_and_accuracy(model, records)
    read = model.model.read_segments
    lengths = []
    model.model.read_segments = lambda sp, ids, length, *states: (
        lengths.extend(length.tolist()) or read(sp, ids, length, *states)
    )
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False}
    trainer = sft(model, form, gradient_checkpointing=False, **settings)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_close(losses[0], expected, atol=1e-4, rtol=1e-4)
    assert losses[2] < losses[1] < losses[0]
    assert sorted(lengths[:4]) == sorted(query for _, query in records) and len(lengths) == 3 * 4
    del model.model.read_segments
    metrics = trainer.evaluate()
    expected = naive_loss_and_accuracy(model, records)
    assert_close((metrics["eval_loss"], metrics["eval_mean_token_accuracy"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_saves_a_model_that_travels(sft, saved, model, ids, tmp_path):
    """bfloat16 and gradient checkpointing."""
    trainer = sft(model)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[2] < losses[1] < losses[0] and not torch.is_autocast_enabled("cpu")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"model.hypernet.embedding_scale"}
    trainer.save_model(tmp_path / "model")
    expected = load(saved)  # the trained one stays under the trainer's autocast
    expected.load_state_dict(model.state_dict())
    assert torch.equal(logits_elsewhere(tmp_path / "model", ids, tmp_path / "home"), logits_of(expected, ids))
    assert (tmp_path / "model" / "chat_template.jinja").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_trains_an_adapter(sft, saved, model, tokenizer, ids, tmp_path):
    kind = LORA["the LLM, and the HyperNetwork whole"]
    expected, _ = naive_loss_and_accuracy(model, records_of(tokenizer, "strings"))
    trainer = sft(model, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, **kind), bf16=False)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_close(losses[0], expected, atol=1e-4, rtol=1e-4)
    assert losses[2] < losses[1] < losses[0]
    trainer.save_model(tmp_path)
    loaded = PeftModel.from_pretrained(load(saved), tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(trainer.model, ids))


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_grpo_generates_in_lanes(chatter, chat_tokenizer, tmp_path, monkeypatch):
    """TRL's continuous batching is the library's `generate_batch`."""
    trl = pytest.importorskip("trl", reason="requirements-extra.txt")
    generate_batch = Phase15ForCausalLM.generate_batch
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs)
        return generate_batch(*args, **kwargs)

    monkeypatch.setattr(Phase15ForCausalLM, "generate_batch", record)
    settings = {"use_transformers_continuous_batching": True, "num_generations": 2, "per_device_train_batch_size": 2}
    settings |= {"max_completion_length": 9, "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    model = copy.deepcopy(chatter)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": "Why?"}, {"prompt": "What is the sky?"}]),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    assert len(calls) == 1 and not torch.equal(model.hypernet.alpha, chatter.hypernet.alpha)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_trains_an_adapter_around_a_4_bit_llm(sft, saved):
    model = load(saved, quantization_config=QUANTISED["bitsandbytes-nf4"]())
    kind = LORA["the LLM, and the HyperNetwork whole"]
    trainer = sft(model, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, **kind), learning_rate=3e-3)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_rows_are_refused(settings, sft, model):
    with pytest.raises(ValueError, match="position_ids.*packed"):
        sft(model, **settings).train()


# quantised LLMs


def torchao_config():
    quantization = pytest.importorskip("torchao.quantization", reason="requirements-extra.txt")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_config(**kwargs):
    pytest.importorskip("bitsandbytes", reason="requirements-extra.txt")
    return BitsAndBytesConfig(**kwargs)


QUANTISED = {
    "torchao-int8": torchao_config,
    "bitsandbytes-int8": lambda: bitsandbytes_config(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
# of the logits' norm; measured: 0.020, 0.032, 0.500 (a random model of so few channels suffers more than a real one)
TOLERANCE = {"torchao-int8": 0.04, "bitsandbytes-int8": 0.06, "bitsandbytes-nf4": 0.7}


@pytest.fixture(scope="module")
def wide(chat_tokenizer, tmp_path_factory) -> tuple[str, str]:
    """`base` and `saved` with 64 channels."""
    base = str(tmp_path_factory.mktemp("wide_base"))
    saved = str(tmp_path_factory.mktemp("wide_saved"))
    torch.manual_seed(0)
    config = LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer), "hidden_size": 64, "intermediate_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    randomise_alpha(Phase15ForCausalLM.from_base(base, **SIZES)).save_pretrained(saved)
    return base, saved


@pytest.fixture
def folders(kind, base, saved, wide) -> tuple[str, str]:
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights in blocks of 64, and fails on narrower ones."""
    return wide if kind == "bitsandbytes-nf4" else (base, saved)


def is_quantised(linear: torch.nn.Linear) -> bool:
    return type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor


def linears(module) -> dict[str, torch.nn.Linear]:
    return {name: linear for name, linear in module.named_modules() if isinstance(linear, torch.nn.Linear)}


@pytest.mark.parametrize("kind", QUANTISED)
def test_only_the_llm_is_quantised(kind, folders, ids, tmp_path):
    """No module needs to be named; saving and loading again changes nothing."""
    _, saved = folders
    quantised = load(saved, quantization_config=QUANTISED[kind]())
    assert {name for name, linear in linears(quantised.llm).items() if not is_quantised(linear)} == {"lm_head"}
    assert not any(is_quantised(linear) for linear in linears(quantised.hypernet).values())
    expected = logits_of(load(saved), ids)
    logits = logits_of(quantised, ids)
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < TOLERANCE[kind]
    tokens = {"input_ids": ids[:, :9], "attention_mask": torch.ones_like(ids[:, :9]), "pad_token_id": 1, **GREEDY}
    assert quantised.generate(**tokens).shape == (2, 59)
    quantised.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), ids), logits)
    sizes = [(Path(folder) / "model.safetensors").stat().st_size for folder in (tmp_path, saved)]
    assert sizes[0] < 0.9 * sizes[1]


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_wrapped_trained_around_and_saved(kind, folders, ids, tmp_path):
    """Equal to its base as ever; the HyperNetwork learns in full precision."""
    base, _ = folders
    config = QUANTISED[kind]()
    llm = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model = Phase15ForCausalLM.from_base(base, quantization_config=QUANTISED[kind](), **SIZES)
    short = ids[:, :20]
    assert_close(logits_of(model, short), logits_of(llm, short), atol=1e-4, rtol=1e-4)
    model.llm.requires_grad_(False)
    losses = train(model, ids)
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert is_quantised(loaded.llm.get_submodule("model.layers.0.mlp.up_proj"))


# the documentation


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_examples_of_the_docs_run(saved, ids, tmp_path, monkeypatch, capsys):
    for package in ("trl", "torchao"):
        pytest.importorskip(package, reason="requirements-extra.txt")
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    shutil.copytree(saved, tmp_path / "outputs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert "'role': 'assistant'" in capsys.readouterr().out
    assert (tmp_path / "outputs" / "adapter" / "adapter_model.safetensors").is_file()
    quantised = linears(names["model"].llm.model)
    assert quantised and all(is_quantised(linear) for linear in quantised.values())


# what else one does to a model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, saved, base, model, ids, tmp_path):
    """Cast or loaded; in float16 the HyperNetwork stays in float32, in a new model as in a loaded one."""
    expected = logits_of(model, ids)
    loaded = load(saved, dtype=dtype)
    for half in (loaded, model.to(dtype)):
        assert half.llm.dtype == dtype
        assert_close(logits_of(half, ids).float(), expected, atol=0.3, rtol=0)
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert {parameter.dtype for parameter in loaded.hypernet.parameters()} == {kept}
    new = randomise_alpha(Phase15ForCausalLM.from_base(base, dtype=dtype, **SIZES))
    new.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path, dtype=dtype), ids), logits_of(new, ids))


def test_more_tokens(model, ids, tmp_path):
    """`resize_token_embeddings`: the config follows, and the model is saved with it."""
    expected = logits_of(model, ids)
    size = model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 5)
    assert model.config.get_text_config().vocab_size == size + 5
    logits = logits_of(model, ids)
    assert logits.shape[-1] == size + 5 and torch.equal(logits[..., :size], expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), ids), logits)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name, model, ids):
    assert torch.equal(logits_of(COPIES[name](model), ids), logits_of(model, ids))


def test_other_ways_to_load(saved, model, ids):
    """A device map, and a new model of the same configuration."""
    assert torch.equal(logits_of(load(saved, device_map="auto"), ids), logits_of(model, ids))
    config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {name: value.shape for name, value in new.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert not new.hypernet.alpha.any()
