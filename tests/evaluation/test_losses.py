# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Every row of an evaluation against a naive one."""

import math
from functools import partial
from itertools import zip_longest

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, get_peft_model
from reference import (
    CHUNK,
    QUERY,
    as_soft_prompt,
    random_ids,
    reference_carry,
    reference_logits,
    reference_predict,
    reference_read,
    reference_step,
    window_logits,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from phase15.data.examples import Phase15DataCollator
from phase15.evaluation import losses as evaluation
from phase15.evaluation.answers import greedy_answers
from phase15.evaluation.losses import Example, Losses


ROWS = [
    "model",
    "window",
    "first_soft_prompt",
    "shuffled_soft_prompt",
    "shuffled_delta",
    "full_context",
]
# Lengths: 9 is more than one segment, 4 is one whole chunk, and the longest answers do not fit in the slots.
QUERIES = (3, 9, 5, 1, 4)
ANSWERS = (1, 30, 4, 10, 22)
close = partial(assert_close, atol=1e-4, rtol=1e-4)


def records(queries=QUERIES, answers=ANSWERS) -> list[Example]:
    rows = [(random_ids(q + a, seed=i).tolist(), q) for i, (q, a) in enumerate(zip(queries, answers, strict=True))]
    return [Example(ids[:query], ids[query:]) for ids, query in rows]


def batches_of(records: list[Example], size: int = 3) -> list[dict]:
    rows = [
        {"input_ids": record.query + record.answer, "query_length": len(record.query), "record": 1}
        for record in records
    ]
    return [Phase15DataCollator()(rows[start : start + size]) for start in range(0, len(rows), size)]


def naive(scores: torch.Tensor, answer: list[int]) -> torch.Tensor:
    return F.cross_entropy(scores, torch.tensor(answer), reduction="none")


def chunks_of(answer: list[int]) -> list[list[int]]:
    return [answer[start : start + CHUNK] for start in range(0, len(answer), CHUNK)]


def naive_soft_prompts(model, history: Example) -> list[list[torch.Tensor]]:
    """Slots before each chunk of a history."""
    soft_prompts = [reference_read(model, [], torch.tensor(history.query))]
    for chunk in chunks_of(history.answer)[:-1]:
        soft_prompts.append(reference_step(model, soft_prompts[-1], torch.tensor(chunk)))
    return soft_prompts


def naive_given(model, record: Example, soft_prompts: list[list[torch.Tensor]]) -> torch.Tensor:
    losses = []
    for index, chunk in enumerate(chunks_of(record.answer)):
        slots = soft_prompts[min(index, len(soft_prompts) - 1)]
        losses.append(naive(reference_predict(model, slots, torch.tensor(chunk)[:-1]), chunk))
    return torch.cat(losses)


def naive_soft_prompts_with_the_delta_of(model, record: Example, other: Example) -> list[list[torch.Tensor]]:
    """Slots before each chunk of a record, stepped side by side with another's."""

    def steps(record):
        return [*torch.tensor(record.query).split(QUERY)], [torch.tensor(x) for x in chunks_of(record.answer)[:-1]]

    def step(slots, other_slots, ids, other_ids):
        tokens, none = model.get_input_embeddings()(other_ids), torch.zeros(1, model.config.text_config.hidden_size)
        carried = reference_carry(other_slots, list(tokens))
        arguments = (as_soft_prompt(state, tokens.shape[1]) for state in (carried, other_slots))
        padded = torch.cat([tokens, none])[None]
        (read,) = model.model.first_layers(padded, padded.shape[1])
        delta = model.hypernet(*arguments, padded, torch.tensor([len(tokens)]), read)[0]
        other_slots = [slot + delta[i] for i, slot in enumerate(carried)] if len(tokens) else other_slots
        if ids is not None:
            slots = reference_carry(slots, list(model.get_input_embeddings()(ids)))
            slots = [slot + delta[i] for i, slot in enumerate(slots)]
        return slots, other_slots

    slots, other_slots, nothing = [], [], torch.tensor([], dtype=torch.long)
    (query, chunks), (other_query, other_chunks) = steps(record), steps(other)
    for ids, other_ids in zip_longest(query, other_query):
        slots, other_slots = step(slots, other_slots, ids, nothing if other_ids is None else other_ids)
    soft_prompts = [slots]
    for ids, other_ids in zip_longest(chunks, other_chunks[: len(chunks)], fillvalue=nothing):
        slots, other_slots = step(slots, other_slots, ids, other_ids)
        soft_prompts.append(slots)
    return soft_prompts


@torch.no_grad()
def naive_variants(model, record: Example, other: Example) -> dict[str, torch.Tensor]:
    """Cross-entropy of each answer token of one record."""
    ids, query = torch.tensor(record.query + record.answer), len(record.query)
    return {
        "model": naive(reference_logits(model, ids, query)[0][query - 1 : -1], record.answer),
        "window": naive(window_logits(model.llm, ids, query)[query - 1 : -1], record.answer),
        "first_soft_prompt": naive_given(model, record, naive_soft_prompts(model, record)[:1]),
        "shuffled_soft_prompt": naive_given(model, record, naive_soft_prompts(model, other)),
        "shuffled_delta": naive_given(model, record, naive_soft_prompts_with_the_delta_of(model, record, other)),
        "full_context": naive(model.llm(ids[None]).logits[0, query - 1 : -1], record.answer),
    }


def assert_rows(losses: Losses, rows: list[torch.Tensor]):
    """Each record's sums over chunks, and no token lost."""
    for nats, tokens, row in zip(*losses, rows, strict=True):
        chunks = row.split(CHUNK)
        close(nats[: len(chunks)].tolist(), [chunk.sum().item() for chunk in chunks])
        assert tokens.tolist()[: len(chunks)] == [len(chunk) for chunk in chunks]
        assert not tokens[len(chunks) :].any() and not nats[len(chunks) :].any()


def test_every_record_has_its_own_losses(tiny):
    data = records()
    for variant, losses in evaluation.measure_variants(tiny, data, 2, CHUNK).items():
        expected = [naive_variants(tiny, *pair)[variant] for pair in zip(data, data[1:] + data[:1], strict=True)]
        assert_rows(losses, expected)


def test_the_models_losses_are_those_of_its_training_form(tiny):
    batch = batches_of(records(), 5)[0]
    batch.pop("records")
    with torch.no_grad():
        outputs = tiny(**batch, skip_logits=True)
    nats, tokens = (values.sum(0) for values in evaluation.measure_variants(tiny, records(), 5, CHUNK)["model"])
    close(nats.float(), outputs.chunk_losses)
    assert torch.equal(tokens, outputs.chunk_tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 4])  # of five records
def test_losses_do_not_depend_on_the_batch_size(batch_size, tiny):
    expected, actual = (evaluation.measure_variants(tiny, records(), size, CHUNK) for size in (5, batch_size))
    for variant in ROWS:
        close(actual[variant], expected[variant])


def test_the_soft_prompt_of_an_equal_record_is_as_good(tiny):
    losses = evaluation.measure_variants(tiny, records()[3:4] * 3, 2, CHUNK)
    close(losses["shuffled_soft_prompt"], losses["model"])
    close(losses["shuffled_delta"], losses["model"])


def test_one_record_has_no_other(tiny):
    assert list(evaluation.measure_variants(tiny, records()[2:3], 2, CHUNK)) == [
        name for name in ROWS if "shuffled" not in name
    ]


def test_no_delta_restores_alpha_after_an_error(tiny):
    alpha = tiny.hypernet.alpha.detach().clone()
    with pytest.raises(KeyError), evaluation.no_delta(tiny):
        assert not tiny.hypernet.alpha.any()
        raise KeyError
    assert torch.equal(tiny.hypernet.alpha, alpha)


@torch.no_grad()
def test_virtual_tokens_of_an_adapter_shift_no_target(bases):
    """Prompt tuning puts them in front of the text."""
    base, data = AutoModelForCausalLM.from_pretrained(bases["llama"]), records()
    tuned = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    virtual = tuned.get_prompt(1)[0]
    expected = []
    for record in data:
        embeds = base.get_input_embeddings()(torch.tensor(record.query + record.answer))
        logits = base(inputs_embeds=torch.cat([virtual, embeds])[None]).logits[0]
        expected.append(naive(logits[3 + len(record.query) - 1 : -1], record.answer))
    losses = evaluation.measure("adapter", 2, lambda batch: evaluation.llm_losses(tuned, batch, CHUNK), data)
    assert_rows(losses, expected)


def test_a_baselines_chunks_are_those_of_the_evaluated_model(tiny):
    """Its own chunks decide only the steps of its soft prompt."""
    losses = evaluation.baseline_losses("baseline", tiny, records(), 2, 6)
    expected = [naive_variants(tiny, record, record)["model"] for record in records()]
    for nats, tokens, row in zip(*losses, expected, strict=True):
        close(nats.tolist()[: math.ceil(len(row) / 6)], [chunk.sum().item() for chunk in row.split(6)])
        assert tokens.sum() == len(row)


@torch.no_grad()
def naive_greedy(model, query: list[int], length: int, end: int) -> list[int]:
    """Token by token, the whole text anew; without the end token."""
    ids = list(query)
    while len(ids) < len(query) + length:
        scores = reference_logits(model, torch.tensor(ids), len(query))[0][-1]
        scores[end] = -torch.inf
        ids.append(int(scores.argmax()))
    return ids[len(query) :]


class Tokenizer:
    """One letter a token."""

    def __init__(self, end: int):
        self.eos_token_id = end

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("0") + index) for index in ids)


def test_the_chunk_length_decides_the_steps(tiny):
    """Not that of the config, which is neither read nor changed; and bins are apart from chunks."""
    data = records()
    expected = evaluation.measure_variants(tiny, data, 5, CHUNK)
    tiny.config.chunk_length = CHUNK + 3
    for variant, losses in evaluation.measure_variants(tiny, data, 5, CHUNK).items():
        close(losses, expected[variant])
    other = evaluation.measure_variants(tiny, data, 5, CHUNK + 3)
    assert tiny.config.chunk_length == CHUNK + 3
    assert not torch.equal(other["model"].nats.sum(dim=1), expected["model"].nats.sum(dim=1))
    with torch.no_grad():
        by_token = evaluation.phase15_losses(tiny, data, data, CHUNK, bin_size=1)
        by_default = evaluation.phase15_losses(tiny, data, data, CHUNK)
    assert by_token.tokens.max() == 1 and by_token.tokens.shape[1] == max(ANSWERS)
    for row, losses in zip(by_default.nats, by_token.nats, strict=True):
        close(row.tolist(), [part.sum().item() for part in losses.split(CHUNK)])


@torch.no_grad()
def test_losses_after_the_models_own_answers(tiny):
    data, longest = records(), 32
    end = naive_greedy(tiny, data[2].query, 1, -1)[0]  # which is its first token
    answers = greedy_answers("", tiny, Tokenizer(end), [r.query for r in data], 2, longest, min_new_tokens=longest)
    assert answers == [naive_greedy(tiny, record.query, longest, end) for record in data]
    losses = evaluation.measure_free_running(tiny, data, answers, 2, CHUNK)
    expected = {name: [] for name in ("model", "window", "full_context")}
    for record, answer in zip(data, answers, strict=True):
        histories = [torch.tensor(record.query + answer[:i]) for i in range(0, len(record.answer), CHUNK)]
        rows = {name: [] for name in expected}
        for history, chunk in zip(histories, chunks_of(record.answer), strict=True):
            ids = torch.cat([history, torch.tensor(chunk)])
            for name, logits in {
                "model": reference_logits(tiny, ids, len(record.query))[0],
                "window": window_logits(tiny.llm, ids, len(record.query)),
                "full_context": tiny.llm(ids[None]).logits[0],
            }.items():
                rows[name].append(naive(logits[len(history) - 1 : -1], chunk))
        for name, chunks in rows.items():
            expected[name].append(torch.cat(chunks))
    assert list(losses) == ["model", "window", "shuffled_delta", "full_context"]
    for name, rows in expected.items():
        assert_rows(losses[name], rows)
    own = evaluation.measure_free_running(tiny, data, [record.answer for record in data], 2, CHUNK)
    references = evaluation.measure_variants(tiny, data, 2, CHUNK)  # whose histories are the references
    close(own["shuffled_delta"].nats, references["shuffled_delta"].nats)
    references = evaluation.measure_variants(tiny, data, 5, CHUNK)
    for name in losses:
        assert not torch.equal(losses[name].nats, references[name].nats)
        close(losses[name].nats[:, 0], references[name].nats[:, 0])  # the first chunk has only the query before it
