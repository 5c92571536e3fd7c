# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""`Phase15Trainer`: steps, learning rates, logs and evaluation against naive ones."""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from reference import CHUNK, SIZES, VOCAB, random_ids, reference_carry, reference_logits, reference_step
from test_train_sft import At, state
from torch.testing import assert_close

from phase15.data.examples import Phase15DataCollator
from phase15.training.runs import Phase15TrainingArguments
from phase15.training.trainer import Phase15Trainer


QUERIES, ANSWERS = (3, 9, 5, 1, 4), (1, 4, 10, 13, 7)  # lengths; 9 is more than one segment, 4 one whole chunk


RATES = {"learning_rate": 0.5, "llm_learning_rate": 0.2, "alpha_learning_rate": 3.0}


def records(queries=QUERIES, answers=ANSWERS) -> Dataset:
    rows = zip(queries, answers, strict=True)
    return Dataset.from_list(
        [
            {"input_ids": random_ids(query + answer, seed=i).tolist(), "query_length": query, "record": 11 + i}
            for i, (query, answer) in enumerate(rows)
        ]
    )


def trainer_of(
    model, folder, data=None, eval_dataset=None, callbacks=None, trainer_class=Phase15Trainer, **settings
) -> Phase15Trainer:
    defaults = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return trainer_class(
        model=model,
        args=Phase15TrainingArguments(output_dir=str(folder), **{**defaults, "disable_tqdm": True, **settings}),
        train_dataset=records() if data is None else data,
        eval_dataset=eval_dataset,
        data_collator=Phase15DataCollator(),
        callbacks=callbacks,
    )


def naive_losses(model, record) -> torch.Tensor:
    """Cross-entropy of each answer token of one record, from the reference recursion."""
    ids, query = torch.tensor(record["input_ids"]), record["query_length"]
    return F.cross_entropy(reference_logits(model, ids, query)[0][query - 1 : -1], ids[query:], reduction="none")


def check_step(before: dict[str, torch.Tensor], stepped, expected):
    """Each parameter moved by its learning rate times the gradient that `expected` holds."""
    for name, parameter in expected.named_parameters():
        rate = 3.0 if name.endswith("alpha") else 0.5 if name.startswith("model.hypernet") else 0.2
        step = before[name] - stepped.get_parameter(name).detach()
        assert parameter.grad.abs().max() > 0 and step.abs().max() > 0, name
        assert_close(step, rate * parameter.grad, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rows, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_that_of_the_mean_over_all_answer_tokens(rows, accumulation, tiny, tmp_path):
    """However the batch is accumulated; plain gradient descent shows the gradient's scale and each learning rate."""
    expected, data = copy.deepcopy(tiny), records(QUERIES[:4], ANSWERS[:4])
    loss = torch.cat([naive_losses(expected, record) for record in data]).mean()
    loss.backward()
    trainer = trainer_of(
        tiny,
        tmp_path,
        data,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        **RATES,
    )
    before = state(tiny)
    trainer.train()
    check_step(before, tiny, expected)
    assert_close(trainer.state.log_history[0]["loss"], loss.item(), atol=1e-4, rtol=1e-4)


def test_optimizer_groups(tiny, tmp_path):
    tiny.llm.lm_head.requires_grad_(False)
    optimizer = trainer_of(tiny, tmp_path, weight_decay=0.1, **RATES).create_optimizer()
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {}
    for name, parameter in tiny.named_parameters():
        rate = 3.0 if name == "model.hypernet.alpha" else 0.5 if name.startswith("model.hypernet.") else 0.2
        expected[id(parameter)] = (rate, 0.0 if "norm" in name or "alpha" in name else 0.1)
    expected.pop(id(tiny.llm.lm_head.weight))
    assert groups == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)


def test_logs_of_one_row(tiny, tmp_path):
    """Loss by chunk index and the share of Δ, recomputed token by token."""
    record = records()[2]
    ids, query = torch.tensor(record["input_ids"]), record["query_length"]
    with torch.no_grad():
        losses, slots, norms = naive_losses(tiny, record), [], []
        answer = ids[query:]
        num_read = (len(answer) - 1) // CHUNK * CHUNK  # what follows the last prediction is not
        for tokens in [*ids[:query].split(SIZES["max_query_length"]), *answer[:num_read].split(CHUNK)]:
            carried = reference_carry(slots, list(tiny.llm.get_input_embeddings()(tokens)))
            slots = reference_step(tiny, slots, tokens)
            norms.append((torch.stack(slots) - torch.stack(carried), torch.stack(slots)))
    deltas, prompts = (sum(x.norm().item() for x in values) for values in zip(*norms, strict=True))
    trainer = trainer_of(tiny, tmp_path, records().select([2]))
    trainer.train()
    log = trainer.state.log_history[0]
    by_chunk = [log.pop(name) for name in sorted(log) if name.startswith("loss_chunk")]
    assert_close(by_chunk, [chunk.mean().item() for chunk in losses.split(CHUNK)], atol=1e-4, rtol=1e-4)
    assert 0.01 < deltas / prompts < 10
    assert_close(log["delta_share"], deltas / prompts, atol=1e-4, rtol=1e-4)
    assert log["target_tokens_per_second"] > 0


def test_logs_average_since_the_last_log(tiny, tmp_path):
    """Every step sees all records and trains nothing; between the two logs the LLM forgets all it knows."""
    losses = [naive_losses(tiny, record).split(CHUNK) for record in records()]
    naive = [torch.cat([row[i] for row in losses if len(row) > i]).mean().item() for i in range(4)]
    trainer = trainer_of(
        tiny,
        tmp_path,
        eval_dataset=records().select([0, 3]),
        callbacks=[At(2, lambda model: model.llm.lm_head.weight.data.zero_())],
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0,
        llm_learning_rate=0,
        alpha_learning_rate=0,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log, expected in zip(logs, (naive, [math.log(VOCAB)] * 4), strict=True):
        assert_close([log[f"loss_chunk_0{i}"] for i in range(4)], expected, atol=1e-4, rtol=1e-4)
        assert {"delta_share", "target_tokens_per_second", "learning_rate", "grad_norm"} <= set(log)


@torch.no_grad()
def test_evaluation_loss_is_the_mean_over_tokens(tiny, tmp_path):
    """Three batches of 5, 23 and 7 answer tokens: the mean over batches would be another."""
    losses = [naive_losses(tiny, record) for record in records()]
    by_batch = torch.stack([torch.cat(losses[i : i + 2]).mean() for i in (0, 2, 4)]).mean().item()
    loss = torch.cat(losses).mean().item()
    assert abs(by_batch - loss) > 1e-2
    metrics = trainer_of(tiny, tmp_path, per_device_eval_batch_size=2).evaluate(records())
    assert_close(metrics["eval_loss"], loss, atol=1e-4, rtol=1e-4)
    assert_close(
        [metrics[f"eval_loss_chunk_0{i}"] for i in (0, 3)],
        [torch.cat([row[:4] for row in losses]).mean().item(), losses[3][12:].mean().item()],
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_checkpoint_with_another_meaning_of_alpha_is_refused(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    file = tmp_path / "checkpoint-1" / "config.json"
    values = json.loads(file.read_text())
    trainer.train(resume_from_checkpoint=str(file.parent))
    del values["hypernet_signed_alpha"]  # as saved before there was a choice
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="checkpoint-1: it was trained with.* Give --hypernet_signed_alpha true"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_a_loss_that_is_not_a_number_stops_the_run(tiny, tmp_path):
    poison = At(2, lambda model: model.llm.lm_head.weight.data.fill_(float("nan")))
    trainer = trainer_of(tiny, tmp_path, callbacks=[poison], max_steps=5, per_device_train_batch_size=5)
    with pytest.raises(FloatingPointError, match=r"nan.*step 3\b") as error:
        trainer.train()
    assert sorted(re.findall(r"\b1[1-5]\b", str(error.value))) == ["11", "12", "13", "14", "15"]


def test_the_record_behind_a_bad_loss_is_named(tiny, tmp_path):
    data = records().to_list()
    data[3]["input_ids"][0] = 2  # which random_ids never gives
    tiny.llm.get_input_embeddings().weight.data[2] = float("inf")
    trainer = trainer_of(tiny, tmp_path, Dataset.from_list(data), max_steps=5, per_device_train_batch_size=1)
    with pytest.raises(FloatingPointError, match=r"nan.*step [1-5]\b.*\b14$"):
        trainer.train()


def test_bptt_chunks_reach_the_training_form(tiny, tmp_path):
    expected = copy.deepcopy(tiny)
    ids = torch.tensor(records()[3]["input_ids"])
    logits, _ = reference_logits(expected, ids, 1, bptt_chunks=2)
    F.cross_entropy(logits[:-1], ids[1:]).backward()
    settings = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", **RATES}
    before = state(tiny)
    trainer_of(tiny, tmp_path, records().select([3]), bptt_chunks=2, **settings).train()
    step = before["model.hypernet.alpha"] - tiny.hypernet.alpha
    assert_close(step, 3 * expected.hypernet.alpha.grad, atol=2e-5, rtol=2e-3)


def test_the_units_of_fsdp_are_the_llms_layers(tiny, tmp_path):
    """Not the HyperNetwork's, which processes call in different numbers."""
    trainer, plugin = trainer_of(tiny, tmp_path), SimpleNamespace(mixed_precision_policy=None)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer._prepare_fsdp()
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
