# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Training with a teacher, against a loss that is computed record by record."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import CHUNK, LLM_SIZES, reference_logits
from test_train_sft import base, data, recipe, script, write  # noqa: F401 - fixtures
from test_trainer import ANSWERS, QUERIES, RATES, check_step, records, state, trainer_of
from torch.testing import assert_close
from train_here import prepare
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.commands.training_run import train
from phase15.data.tokenizer import train_tokenizer
from phase15.training.distillation import DistillationTrainer, load_teacher


pytestmark = pytest.mark.usefixtures("answers_here")


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLM_SIZES | {"initializer_range": 0.3})).eval()


def naive_losses(model, teacher, record, share: float, temperature: float) -> torch.Tensor:
    """Of each answer token, from the definition of the Kullback-Leibler divergence, in float64."""
    ids, query = torch.tensor(record["input_ids"]), record["query_length"]
    student = reference_logits(model, ids, query)[0][query - 1 : -1].double()
    with torch.no_grad():
        teacher = teacher(ids[None]).logits[0, query - 1 : -1].double()
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    divergence = (p * (p.log() - q.log())).sum(dim=-1)
    right = torch.softmax(student, dim=-1).gather(1, ids[query:, None])[:, 0]
    return -(1 - share) * right.log() + share * temperature**2 * divergence


@pytest.mark.parametrize("rows, accumulation", [(4, 1), (2, 2)])
@pytest.mark.parametrize(("share", "temperature"), [(0.7, 1.0), (1.0, 2.5), (0.0, 1.0)])
def test_a_step_is_that_of_both_losses(rows, accumulation, share, temperature, tiny, teacher, tmp_path):
    expected, before = copy.deepcopy(tiny), copy.deepcopy(teacher.state_dict())
    rows_of_data = records(QUERIES[:4], ANSWERS[:4])
    losses = [naive_losses(expected, teacher, record, share, temperature) for record in rows_of_data]
    loss = torch.cat(losses).mean()
    loss.backward()
    trainer = trainer_of(
        tiny,
        tmp_path,
        rows_of_data,
        trainer_class=lambda **kwargs: DistillationTrainer(
            **kwargs, teacher=teacher, share=share, temperature=temperature
        ),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        **RATES,
    )
    start = state(tiny)
    trainer.train()
    check_step(start, tiny, expected)
    log = trainer.state.log_history[0]
    assert_close(log["loss"], loss.item(), atol=1e-4, rtol=1e-4)
    own = [naive_losses(expected, teacher, row, 0.0, 1.0)[:CHUNK] for row in rows_of_data]
    assert_close(log["loss_chunk_00"], torch.cat(own).mean().item(), atol=1e-4, rtol=1e-4)  # cross-entropy alone
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_evaluation_is_cross_entropy_without_the_teacher(tiny, teacher, tmp_path, monkeypatch):
    def run(**kwargs):
        return trainer_of(copy.deepcopy(tiny), tmp_path, eval_dataset=records(), **kwargs).evaluate()["eval_loss"]

    monkeypatch.setattr(teacher, "forward", None)
    distilled = {"teacher": teacher, "share": 0.7, "temperature": 1.0}
    assert run(trainer_class=partial(DistillationTrainer, **distilled)) == run()


@pytest.mark.parametrize("baseline", [None, "window"])
def test_model_and_window_are_distilled_from_one_command(baseline, base, recipe, tmp_path):  # noqa: F811
    """The run ends like any other, and is another than without a teacher."""
    losses = []
    for name, values in (("plain", {}), ("distilled", {"distill": base, "distill_share": 0.9})):
        values |= {"output_dir": str(tmp_path / name), "max_steps": 2, "baseline": baseline}
        run = prepare([write({k: v for k, v in (recipe | values).items() if v is not None}, tmp_path)])
        assert isinstance(run[0], DistillationTrainer) == (name == "distilled")
        train(*run)
        results = json.loads((tmp_path / name / "results.json").read_text())
        losses.append(results["validation"]["model" if baseline is None else "baseline_window"]["loss"])
    assert losses[0] != losses[1]


def test_a_teacher_may_be_the_llm_of_a_phase15_model(base, recipe, tmp_path, chat_tokenizer):  # noqa: F811
    train(*prepare([write(recipe | {"max_steps": 1, "stage": "hypernet"}, tmp_path)]))
    ours, bases = (load_teacher(name, chat_tokenizer) for name in (recipe["output_dir"], base))
    assert type(ours) is type(bases)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in bases.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distill": "no/such"}, "no/such"),
        ({"distill_share": 1.5}, "`distill_share` is 1.5"),
        ({"distill_temperature": 0}, "`distill_temperature` is 0"),
        ({"distill": "x", "baseline": "full_context"}, "`distill` is x, but `baseline` is full_context"),
    ],
    ids=str,
)
def test_bad_teachers(values, words, recipe, tmp_path):  # noqa: F811
    assert re.search(words, script(write(recipe | values, tmp_path)))
    assert not Path(recipe["output_dir"]).exists()


def test_a_teacher_of_other_words_is_refused(base, recipe, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(other)
    train_tokenizer([{"text": "Other words make other tokens."}], 265).save_pretrained(other)
    message = script(write(recipe | {"distill": str(other)}, tmp_path))
    assert re.search(r"`distill` is .*other, but its vocabulary is not the student's: \d+ tokens and \d+", message)
