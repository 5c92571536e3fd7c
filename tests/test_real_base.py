# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Real weights: SmolLM2-135M-Instruct (tied embeddings, Llama architecture) as a GGUF file.

    PHASE15_REAL_BASE=path/to/SmolLM2-135M-Instruct.Q4_1.gguf python -m pytest tests/test_real_base.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from reference import pad, reference_carry
from torch.testing import assert_close
from train_here import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from phase15.data.records import read_texts
from phase15.evaluation.recall import recall
from phase15.loading import load_phase15
from phase15.model.modeling_phase15 import Phase15ForCausalLM


REAL_BASE = os.environ.get("PHASE15_REAL_BASE")
pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        not REAL_BASE, reason="no real weights: the environment variable PHASE15_REAL_BASE does not name a GGUF file"
    ),
]
SLOTS, SINKS, CHUNK = 128, 4, 16
TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
    "did Natalia sell altogether in April and May? In April she sold 48 clips. In May she sold half of that, which "
    "is 24. So in April and May she sold 48 + 24 = 72 clips. The answer is 72. "
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small robot who wanted to",
    "To make a good cup of tea, first",
]


@pytest.fixture(scope="module")
def real():
    """The base under plain transformers, the Phase15 model made of it (the weights are shared), and the tokenizer."""
    model = Phase15ForCausalLM.from_base(REAL_BASE, dtype=torch.float32)
    folder, name = os.path.split(os.path.abspath(REAL_BASE))
    return model.llm, model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def batch_of(tokenizer, texts):
    ids, mask = pad([tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def test_the_file_is_the_base_that_is_wanted(real):
    _, model, _ = real
    assert model.config.text_config.model_type == "llama" and model.config.num_soft_tokens == SLOTS
    assert 130e6 < model.llm.num_parameters() < 140e6
    assert_close(model.hypernet.embedding_scale, model.get_input_embeddings().weight.square().mean().sqrt()[None])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@torch.no_grad()
def test_warm_start_equals_the_base_within_the_slots(real):
    base, model, tokenizer = real
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert 64 < ids.shape[1] <= SLOTS
    expected = base(ids).logits
    for query in (1, 40):
        logits = model(ids, query_lengths=torch.tensor([query])).logits
        assert_close(logits[:, query - 1 :], expected[:, query - 1 :], atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_warm_start_equals_the_base_on_sinks_and_window(real):
    base, model, tokenizer = real
    ids = tokenizer(TEXT * 5, return_tensors="pt").input_ids[0, :330]
    query = 290  # more than one segment
    logits = model(ids[None], query_lengths=torch.tensor([query])).logits[0]
    for start in range(query, len(ids) + 1, CHUNK):
        context = torch.tensor(reference_carry([], ids[:start].tolist(), SLOTS, SINKS))
        scores = base(torch.cat([context, ids[start : start + CHUNK]])[None]).logits[0, len(context) - 1 :][:CHUNK]
        assert_close(logits[start - 1 :][: len(scores)], scores, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_greedy_and_beam_output_equal_the_bases(real, settings):
    """A left-padded batch, over three chunks."""
    base, model, tokenizer = real
    arguments = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **settings}
    batch = batch_of(tokenizer, PROMPTS)
    assert torch.equal(model.generate(**batch, **arguments), base.generate(**batch, **arguments))


def test_the_capital_of_france_is_paris(real):
    _, model, tokenizer = real
    batch = batch_of(tokenizer, ["The capital of France is"])
    output = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert "Paris" in tokenizer.decode(output[0, batch["input_ids"].shape[1] :])


@torch.no_grad()
def test_save_and_reload(real, tmp_path):
    _, model, tokenizer = real
    batch = batch_of(tokenizer, PROMPTS)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


# training on real data

HYPERNET = ["--num_soft_tokens=32", "--hypernet_hidden_size=256", "--hypernet_intermediate_size=512"]


def train(data, folder, *flags):
    """Three steps of the script's trainer on all records of `data`, saved to `folder`."""
    settings = {
        "dataset_name": data,
        "output_dir": folder,
        "validation_split": 0,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "llm_learning_rate": 5e-5,
        "alpha_learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    trainer, *_ = prepare([*flags, "--use_cpu", *(f"--{name}={value}" for name, value in settings.items())])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return trainer, losses, moved


@pytest.fixture(scope="module")
def medquad(tmp_path_factory):
    """A file with the four records of MedQuAD whose answers are the shortest."""
    folder = Path(os.environ.get("PHASE15_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "medquad_train.jsonl").is_file():
        pytest.skip(f"no real data: {folder} (or the environment variable PHASE15_DATA) has no medquad_train.jsonl")
    lines = (folder / "medquad_train.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("medquad") / "data.jsonl"
    path.write_text("\n".join(sorted(lines, key=lambda line: len(json.loads(line)["answer"]))[:4]))
    return str(path)


@pytest.fixture(scope="module")
def stage_1(medquad, tmp_path_factory):
    """Stage 1 from the GGUF file, and the folder it was saved to."""
    folder = str(tmp_path_factory.mktemp("stage1"))
    return *train(medquad, folder, f"--model_name_or_path={REAL_BASE}", "--stage=hypernet", *HYPERNET), folder


def test_stage_1_on_real_data(stage_1):
    trainer, losses, moved, _ = stage_1
    assert len(losses) == 3 and losses[0] < 4 and losses[-1] < losses[0] - 0.02
    names = {name for name, _ in trainer.model.named_parameters() if name.startswith("model.hypernet.")}
    assert moved == names
    template = trainer.processing_class.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    record = trainer.train_dataset[0]
    text = trainer.processing_class.decode(record["input_ids"])
    assert text.startswith(template[: template.index("?")].rsplit("\n")[0]) and text.endswith("<|im_end|>")
    assert text[: -len("<|im_end|>")].count("<|im_end|>") >= 1 and record["input_ids"][-1] == 2


@torch.no_grad()
def test_stage_2_on_real_data_then_save_and_reload(stage_1, medquad, tmp_path):
    """Starts where stage 1 ended."""
    *_, folder = stage_1
    _, losses_1, _, _ = stage_1
    with torch.enable_grad():
        trainer, losses, moved = train(medquad, str(tmp_path), f"--model_name_or_path={folder}", "--stage=full")
    assert losses[0] < losses_1[0] and losses[-1] < losses[0] - 0.2
    assert moved == {name for name, _ in trainer.model.named_parameters()} | {"model.llm.lm_head.weight"}
    ids = torch.tensor(trainer.train_dataset[0]["input_ids"])[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True).eos_token_id == 2


def test_the_fast_path_gives_the_same_answers(real):
    """A chunk after the slots are full, with Δ ≠ 0."""
    _, model, tokenizer = real
    alpha, generator = model.hypernet.alpha.detach().clone(), torch.Generator().manual_seed(0)
    inputs = batch_of(tokenizer, [TEXT + prompt for prompt in PROMPTS])
    settings = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 2}
    with torch.no_grad():
        model.hypernet.alpha.normal_(std=0.1, generator=generator)
        expected = model.generate(**inputs, **settings)
        with torch.compiler.set_stance("force_eager"):  # `python -m benchmarks decode` compiles
            assert torch.equal(model.generate(**inputs, compile=True, **settings), expected)
        model.hypernet.alpha.copy_(alpha)


def test_a_file_name_in_capitals(tmp_path):
    (tmp_path / "MODEL.GGUF").symlink_to(os.path.abspath(REAL_BASE))
    model, tokenizer = load_phase15(tmp_path / "MODEL.GGUF")
    assert model.num_parameters() > 130e6 and len(tokenizer) == model.config.text_config.vocab_size
    with pytest.raises(ValueError, match="MODEL.GGUF cannot be read: .*rename it"):
        Phase15ForCausalLM.from_base(tmp_path / "MODEL.GGUF")


def test_a_file_in_a_folder_is_saved_unquantised(tmp_path):
    folder, name = os.path.split(os.path.abspath(REAL_BASE))
    Phase15ForCausalLM.from_base(folder, gguf_file=name).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).num_parameters() > 130e6


def test_facts_are_known_in_context_and_lost_behind_the_window(medquad, tmp_path):
    """The start of recipes/smollm2_facts.yaml: what its HyperNetwork has to win back, and one step towards it."""
    recipe = Path(__file__).parent.parent / "recipes" / "smollm2_facts.yaml"
    flags = ["--model_name_or_path", REAL_BASE, "--facts_text", str(medquad), "--output_dir", str(tmp_path / "run")]
    flags += ["--facts_records", "4"]
    trainer, *_ = prepare([str(recipe), *flags, "--max_steps", "1", "--warmup_steps", "0", "--use_cpu"])
    model, texts = trainer.model, read_texts(str(medquad))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (at,) = recall(model, trainer.processing_class, [64], 4, num_chats=8, batch_size=8, texts=texts)
    completed = {name: row["completed"] for name, row in at["rows"].items()}
    assert completed["full_context"] > 0.8 and completed["window"] < 0.2, completed
    assert at["rows"]["model"] == at["rows"]["window"], "Δ = 0 before training"
    assert at["rows"]["full_context"]["right"] < completed["full_context"], "it has words of its own"
    trainer.train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
    assert changed and all(name.startswith("model.hypernet.") for name in changed)
