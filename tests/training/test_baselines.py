# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""train_sft.py --baseline: the fair baselines of a Phase15 model, against plain transformers, PEFT and PyTorch."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from reference import CHUNK, LLM_SIZES, SIZES, SLOTS, randomise_alpha, reference_carry
from safetensors.torch import load_file
from test_train_sft import RUN, At, Killed, changed, epochless, kill, losses_of, sentence, state, watched, write
from torch.testing import assert_close
from train_here import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from phase15.commands.training_run import train
from phase15.evaluation.losses import display_label
from phase15.hub.arguments import PushArguments
from phase15.hub.cards import model_card
from phase15.hub.runs import read_run
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training.arguments import BASELINES


pytestmark = pytest.mark.usefixtures("answers_here")


@pytest.fixture(scope="module")
def llm(chat_tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)})).eval()


@pytest.fixture(scope="module")
def start(llm, chat_tokenizer, tmp_path_factory) -> str:
    """A trained Phase15 model around `llm`: Δ ≠ 0."""
    folder = str(tmp_path_factory.mktemp("start"))
    llm.save_pretrained(f"{folder}/llm")
    model = randomise_alpha(Phase15ForCausalLM.from_base(f"{folder}/llm", **SIZES, max_answer_length=14))
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(start, tmp_path) -> dict:
    """Three steps over ten records, whose answers differ in length, and five to validate."""
    pairs = [{"question": sentence(i), "answer": sentence(*range(i, i + 4))[: 1 + 5 * i % 13]} for i in range(1, 16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return RUN | {
        "model_name_or_path": start,
        "dataset_name": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "validation_split": 0.3,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 2e-2,
        "lora_r": 2,
        "lora_dropout": 0.3,
    }


def baseline_run(baseline: str, recipe: dict, folder: Path, **values):
    stage = BASELINES[baseline]
    return prepare([write(recipe, folder, baseline=baseline, stage=stage, **values)])


def records_of(trainer, batches) -> list[dict]:
    by_number = {record["record"]: record for record in trainer.train_dataset}
    return [by_number[number] for batch in batches for number in batch]


def naive_losses(llm, record, baseline: str = "full_context", prompt: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each answer token of one record, by plain calls of the LLM."""
    ids, query = torch.tensor(record["input_ids"]), record["query_length"]
    losses = []
    length = CHUNK if baseline == "window" else len(ids)
    for first in range(query, len(ids), length):
        chunk = ids[first : first + length]
        context = torch.tensor(reference_carry([], ids[:first].tolist())) if baseline == "window" else ids[:first]
        embeds = llm.get_input_embeddings()(torch.cat([context, chunk]))
        embeds = embeds if prompt is None else torch.cat([prompt, embeds])
        logits = llm(inputs_embeds=embeds[None]).logits[0, -len(chunk) - 1 : -1]
        losses.append(F.cross_entropy(logits, chunk, reduction="none"))
    return torch.cat(losses)


def by_chunk(losses: list[torch.Tensor]) -> list[float]:
    longest = max(len(row) for row in losses)
    return [torch.cat([row[i : i + CHUNK] for row in losses]).mean().item() for i in range(0, longest, CHUNK)]


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_a_baseline_trains(baseline, llm, recipe, tmp_path):
    """All of what its name says, and nothing else."""
    trainer, *_ = baseline_run(baseline, recipe, tmp_path)
    before = state(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model.state_dict())
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    expected = {
        "window": {name for name in before if name.startswith("model.llm.")},
        "full_context": set(llm.state_dict()),
        "prompt_tuning": {"prompt_encoder.default.embedding.weight"},
        "lora": {name for name in before if ".lora_" in name},
    }[baseline]
    assert moved == trained == expected
    rate = recipe["learning_rate" if baseline == "prompt_tuning" else "llm_learning_rate"]
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}
    if baseline == "window":
        assert not trainer.model.hypernet.alpha.any()
    elif baseline == "lora":
        assert len(moved) == 2 * 7 * LLM_SIZES["num_hidden_layers"]
    elif baseline == "prompt_tuning":
        prompt, vocabulary = before.pop(*moved), llm.get_input_embeddings().weight
        assert len(prompt) == SLOTS and (prompt[:, None] == vocabulary).all(dim=2).any(dim=1).all()


@torch.no_grad()
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_first_loss_of_a_baseline(baseline, llm, recipe, tmp_path):
    """The mean over the answer tokens of both batches, and of each chunk, by the LLM that it starts from."""
    trainer, *_ = baseline_run(baseline, recipe, tmp_path, max_steps=1)
    prompt = trainer.model.get_prompt(1)[0].clone() if baseline == "prompt_tuning" else None
    batches = watched(trainer)
    with torch.enable_grad():
        trainer.train()
    losses = [naive_losses(llm, record, baseline, prompt) for record in records_of(trainer, batches)]
    log = trainer.state.log_history[0]
    assert_close(log["loss"], torch.cat(losses).mean().item(), atol=1e-4, rtol=1e-4)
    logged = [log[name] for name in sorted(log) if name.startswith("loss_chunk")]
    assert_close(logged, by_chunk(losses), atol=1e-4, rtol=1e-4)
    assert len(logged) > 2 and log["target_tokens_per_second"] > 0


def test_full_context_trains_as_a_plain_loop(llm, recipe, tmp_path):
    """On the batches that the model itself would be trained on."""
    ours, *_ = prepare([write(recipe, tmp_path, output_dir=str(tmp_path / "model"))])
    trainer, *_ = baseline_run("full_context", recipe, tmp_path)
    batches = watched(trainer), watched(ours)
    trainer.train()
    ours.train()
    assert batches[0] == batches[1] and len(batches[0]) == 5  # the last step is half as large
    expected = copy.deepcopy(llm)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=recipe["llm_learning_rate"], weight_decay=0)
    records = records_of(trainer, batches[0])
    for step in range(3):
        rows = records[4 * step : 4 * step + 4]
        num_tokens = sum(len(row["input_ids"]) - row["query_length"] for row in rows)
        for row in rows:
            (naive_losses(expected, row).sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert changed(state(llm), state(expected)) == set(state(llm))
    for name, value in trainer.model.state_dict().items():
        assert_close(value, expected.state_dict()[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def loaded(baseline: str, folder: str, llm) -> torch.nn.Module:
    """What a run left, by the library's own means."""
    if baseline in ("prompt_tuning", "lora"):
        assert (Path(folder) / "adapter_model.safetensors").is_file()
        return PeftModel.from_pretrained(copy.deepcopy(llm), folder).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True if baseline == "window" else None)
    assert type(model).__name__ == ("Phase15ForCausalLM" if baseline == "window" else "LlamaForCausalLM")
    return model


@torch.no_grad()
@pytest.mark.parametrize("baseline", BASELINES)
def test_what_a_baseline_leaves(baseline, llm, recipe, tmp_path, capfd):
    """Loaded again it has the loss that was reported: its own row, and the validation loss of the training."""
    trainer, *rest = baseline_run(baseline, recipe, tmp_path)
    with torch.enable_grad():
        train(trainer, *rest)
    folder = recipe["output_dir"]
    model = loaded(baseline, folder, llm)
    losses = []
    for record in trainer.eval_dataset:
        ids, query = torch.tensor(record["input_ids"]), record["query_length"]
        labels = ids.masked_fill(torch.arange(len(ids)) < query, -100)
        loss = model(input_ids=ids[None], labels=labels[None]).loss
        losses.append(loss.expand(len(ids) - query))
    results = json.loads((Path(folder) / "results.json").read_text())["validation"]
    ((name, row),) = results.items()
    assert name == f"baseline_{baseline}" and set(row) == {"loss", "loss_by_chunk", "tokens_by_chunk"}
    assert_close(row["loss"], torch.cat(losses).mean().item(), atol=1e-4, rtol=1e-4)
    nats = sum(x * n for x, n in zip(row["loss_by_chunk"], row["tokens_by_chunk"], strict=True))
    assert_close(nats / len(torch.cat(losses)), row["loss"], atol=1e-5, rtol=1e-5)
    metrics = trainer.evaluate()
    assert_close(metrics["eval_loss"], row["loss"], atol=1e-5, rtol=1e-5)
    chunks = [metrics[key] for key in sorted(metrics) if key.startswith("eval_loss_chunk")]
    assert_close(chunks, row["loss_by_chunk"], atol=1e-5, rtol=1e-5)
    assert yaml.safe_load((Path(folder) / "recipe.yaml").read_text())["baseline"] == baseline
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert all((Path(folder) / picture).is_file() for picture in ("training_curve.png", "loss_by_chunk.png"))
    output = capfd.readouterr().out
    assert f"| {display_label(name)} | {row['loss']:.4f} |" in output
    assert bool(re.search(r"^A: ", output, re.M)) == (baseline == "window")
    if baseline == "window":
        assert not load_file(f"{folder}/model.safetensors")["model.hypernet.alpha"].any()
        arguments, run = PushArguments(model_dir=folder, repo_id="me/window"), read_run(Path(folder))
        card = model_card(arguments, run, model, trainer.processing_class, []).text
        assert f"| {display_label(name)} | {row['loss']:.4f} |" in card and "as a baseline of" in card
        assert "HyperNetwork and LLM:" not in card and "share this model" not in card


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_under_gradient_checkpointing(baseline, recipe, tmp_path):
    runs = []
    for checkpointing in (False, True):
        values = {"gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / f"run{checkpointing}")}
        trainer, *_ = baseline_run(baseline, recipe, tmp_path, **values)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        runs.append([list(log.values()) for log in epochless(trainer.state.log_history).values()])
    assert_close(*runs, atol=1e-4, rtol=1e-4)
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_resumes(baseline, recipe, tmp_path):
    """With the same weights and losses, over several epochs and with dropout."""
    recipe |= {"max_steps": 6, "save_steps": 3}
    whole, *_ = baseline_run(baseline, recipe, tmp_path, output_dir=str(tmp_path / "whole"))
    whole.train()
    killed, *_ = baseline_run(baseline, recipe, tmp_path)
    killed.add_callback(At(4, kill))
    with pytest.raises(Killed):
        killed.train()
    resumed, *_ = baseline_run(baseline, recipe, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert not changed(state(whole.model), state(resumed.model))
    assert losses_of(resumed.state.log_history) == losses_of(whole.state.log_history)


@pytest.mark.parametrize("baseline", ["full_context", "prompt_tuning"])
def test_a_baseline_on_a_stream(baseline, recipe, tmp_path):
    recipe |= {"train_sampling_strategy": "sequential", "validation_split": 0.0}
    whole, *_ = baseline_run(baseline, recipe, tmp_path)
    streamed, *_ = baseline_run(baseline, recipe, tmp_path, streaming=True)
    whole.train()
    streamed.train()
    assert not changed(state(whole.model), state(streamed.model))
    assert epochless(whole.state.log_history) == epochless(streamed.state.log_history)


@pytest.mark.parametrize("baseline", ["window", "full_context"])
def test_a_baseline_whose_loss_is_not_a_number_stops(baseline, recipe, tmp_path):
    trainer, *_ = baseline_run(baseline, recipe, tmp_path)
    trainer.add_callback(At(1, lambda model: model.get_output_embeddings().weight.data.fill_(float("nan"))))
    with pytest.raises(FloatingPointError, match=r"nan at step 2, .*records \d+, \d+$"):
        trainer.train()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"baseline": "window", "stage": "hypernet"}, "window.*stage full.*hypernet"),
        ({"baseline": "full_context", "stage": "lora"}, "full_context.*stage full.*lora"),
        ({"baseline": "prompt_tuning"}, "prompt_tuning.*stage hypernet.*full"),
        ({"baseline": "lora", "stage": "lora"}, "lora.*stage hypernet.*lora"),
        ({"baseline": "prefix"}, "'prefix'.*window.*full_context.*prompt_tuning.*lora"),
        ({"baseline": "lora", "stage": "hypernet", "merge_adapter": True}, "merge_adapter.*stage lora"),
    ],
)
def test_baselines_that_cannot_be(values, message, recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare([write(recipe, tmp_path, **values)])
    assert not Path(recipe["output_dir"]).exists()
