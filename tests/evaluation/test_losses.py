# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Every row of an evaluation against a naive one; context recovery and its intervals."""

import json
import math
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import (
    CHUNK,
    LLM_SIZES,
    QUERY,
    SIZES,
    as_soft_prompt,
    random_ids,
    randomise_alpha,
    reference_carry,
    reference_logits,
    reference_predict,
    reference_read,
    reference_step,
    window_logits,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.commands.evaluate import EvaluationArguments
from phase15.data.examples import Phase15DataCollator
from phase15.evaluation import losses as evaluation
from phase15.evaluation import recovery
from phase15.evaluation.answers import greedy_answers
from phase15.evaluation.losses import Example, Losses
from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROWS = [
    "model",
    "window",
    "first_soft_prompt",
    "shuffled_soft_prompt",
    "shuffled_delta",
    "full_context",
]


# lengths: 9 is more than one segment, 4 is one whole chunk, and the longest answers do not fit in the slots
QUERIES, ANSWERS = (3, 9, 5, 1, 4), (1, 30, 4, 10, 22)


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


def naive_behind(model, record: Example, soft_prompts: list[list[torch.Tensor]]) -> torch.Tensor:
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
        (read,) = model.first_layers(padded, padded.shape[1])
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
        "first_soft_prompt": naive_behind(model, record, naive_soft_prompts(model, record)[:1]),
        "shuffled_soft_prompt": naive_behind(model, record, naive_soft_prompts(model, other)),
        "shuffled_delta": naive_behind(model, record, naive_soft_prompts_with_the_delta_of(model, record, other)),
        "full_context": naive(model.llm(ids[None]).logits[0, query - 1 : -1], record.answer),
    }


def assert_rows(losses: Losses, rows: list[torch.Tensor]):
    """Each record's sums over chunks, and no token lost."""
    for nats, tokens, row in zip(*losses, rows, strict=True):
        chunks = row.split(CHUNK)
        close(nats[: len(chunks)].tolist(), [chunk.sum().item() for chunk in chunks])
        assert tokens.tolist()[: len(chunks)] == [len(chunk) for chunk in chunks]
        assert not tokens[len(chunks) :].any() and not nats[len(chunks) :].any()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_compare_equals_naive_references(kind, bases):
    model, data = randomise_alpha(Phase15ForCausalLM.from_base(bases[kind], **SIZES)).train(), records()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = recovery.compare(model, batches_of(data))["validation"]
    expected = [naive_variants(model, *pair) for pair in zip(data, data[1:] + data[:1], strict=True)]
    assert list(results) == ROWS
    for variant, result in results.items():
        rows = [row[variant] for row in expected]
        chunks = [torch.cat([row[i : i + CHUNK] for row in rows]) for i in range(0, max(ANSWERS), CHUNK)]
        close(result["loss"], torch.cat(rows).mean().item())
        close(result["loss_by_chunk"], [chunk.mean().item() for chunk in chunks])
        assert result["tokens_by_chunk"] == [len(chunk) for chunk in chunks]
        assert set(result) == {"loss", "loss_by_chunk", "tokens_by_chunk"}
    assert len({round(result["loss"], 6) for result in results.values()}) == 6  # none could stand for another
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_record_has_its_own_losses(tiny):
    data = records()
    for variant, losses in evaluation.variants(tiny, data, 2).items():
        expected = [naive_variants(tiny, *pair)[variant] for pair in zip(data, data[1:] + data[:1], strict=True)]
        assert_rows(losses, expected)


def test_the_models_losses_are_those_of_its_training_form(tiny):
    batch = batches_of(records(), 5)[0]
    batch.pop("records")
    with torch.no_grad():
        outputs = tiny(**batch, skip_logits=True)
    nats, tokens = (values.sum(0) for values in evaluation.variants(tiny, records(), 5)["model"])
    close(nats.float(), outputs.chunk_losses)
    assert torch.equal(tokens, outputs.chunk_tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 4])  # of five records
def test_losses_do_not_depend_on_the_batch_size(batch_size, tiny):
    expected, actual = (evaluation.variants(tiny, records(), size) for size in (5, batch_size))
    for variant in ROWS:
        close(actual[variant], expected[variant])


def test_the_soft_prompt_of_an_equal_record_is_as_good(tiny):
    losses = evaluation.variants(tiny, records()[3:4] * 3, 2)
    close(losses["shuffled_soft_prompt"], losses["model"])
    close(losses["shuffled_delta"], losses["model"])


def test_one_record_has_no_other(tiny):
    assert list(evaluation.variants(tiny, records()[2:3], 2)) == [name for name in ROWS if "shuffled" not in name]


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
    """Whatever its own are."""
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


@torch.no_grad()
def test_losses_behind_the_models_own_words(tiny):
    data, longest = records(), 32
    end = naive_greedy(tiny, data[2].query, 1, -1)[0]  # which it would say at once
    answers = greedy_answers("", tiny, Tokenizer(end), [r.query for r in data], 2, longest, min_new_tokens=longest)
    assert answers == [naive_greedy(tiny, record.query, longest, end) for record in data]
    losses = evaluation.free_running(tiny, data, answers, 2)
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
    assert list(losses) == ["model", "window", "full_context"]
    for name, rows in expected.items():
        assert_rows(losses[name], rows)
    references = evaluation.variants(tiny, data, 5)
    for name in losses:
        assert not torch.equal(losses[name].nats, references[name].nats)
        close(losses[name].nats[:, 0], references[name].nats[:, 0])  # the first chunk has only the query before it


def losses_of(seed: int, mean: float, num_records: int = 20, num_chunks: int = 3) -> Losses:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 17, size=(num_records, num_chunks))
    nats = tokens * (mean + 0.05 * random.standard_normal((num_records, num_chunks)))
    return Losses(torch.from_numpy(nats), torch.from_numpy(tokens))


def mixed(window: Losses, full_context: Losses, share: float) -> Losses:
    return Losses(window.nats + share * (full_context.nats - window.nats), window.tokens)


@pytest.fixture
def window() -> Losses:
    return losses_of(0, 1.5)


@pytest.fixture
def full_context(window) -> Losses:
    return window._replace(nats=window.nats - window.tokens * (0.1 + 0.02 * losses_of(1, 0).nats.sign()))


def test_the_interval_is_that_of_a_naive_loop(window, full_context):
    """Records drawn one by one; numerator and denominator of R from the same draw."""
    random, ratios = np.random.default_rng(7), []
    model = mixed(window, full_context, 0.6)._replace(
        nats=losses_of(3, 1.44).nats * window.tokens / losses_of(3, 1).tokens
    )
    for _ in range(200):
        drawn = [int(random.integers(20)) for _ in range(20)]
        nats = [sum(float(row.nats[i].sum()) for i in drawn) for row in (window, model, full_context)]
        tokens = sum(int(window.tokens[i].sum()) for i in drawn)
        w, m, f = (value / tokens for value in nats)
        ratios.append((w - m) / (w - f))
    result = recovery.context_recovery(window, model, full_context, samples=200, seed=7)
    assert_close(result["interval"], [float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))])
    low, high = result["interval"]
    assert low < result["recovery"] < high and high - low > 0.01
    assert recovery.context_recovery(window, model, full_context, samples=200, seed=8)["interval"] != [low, high]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 1.5, -1.0])
def test_context_recovery_is_the_share_of_the_gap(share, window, full_context):
    result = recovery.context_recovery(window, mixed(window, full_context, share), full_context)
    assert_close(result["recovery"], share, atol=1e-9, rtol=0)
    assert_close(result["interval"], [share, share], atol=1e-9, rtol=0)  # in every sample


def test_tokens_weigh_the_records():
    tokens = torch.tensor([[1], [9]])
    rows = [Losses(torch.tensor(nats, dtype=torch.float64)[:, None], tokens) for nats in ([2.0, 27], [1, 20], [1, 18])]
    window, model, full_context = rows
    assert recovery.summary(window)["loss"] == 2.9
    result = recovery.context_recovery(window, model, full_context)
    assert_close((result["gap"], result["recovery"]), (1.0, 0.8))


def test_equal_records_have_no_interval():
    rows = [losses_of(0, mean, num_records=1) for mean in (2, 1.2, 1)]
    rows = [Losses(*(values.repeat(9, 1) for values in row)) for row in rows]
    result = recovery.context_recovery(*rows)
    assert_close(result["interval"], [result["recovery"]] * 2)
    assert_close(recovery.interval(recovery.resampled_loss(rows[0])), [recovery.summary(rows[0])["loss"]] * 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory, chat_tokenizer) -> Path:
    """A base, a model of it, a baseline of each kind, and 40 records."""
    home = tmp_path_factory.mktemp("home")
    sizes = LLM_SIZES | {"vocab_size": len(chat_tokenizer), "max_position_embeddings": 128}
    sizes |= {"eos_token_id": chat_tokenizer.eos_token_id}

    def save(name: str, model, **recipe):
        model.save_pretrained(home / name)
        chat_tokenizer.save_pretrained(home / name)
        if recipe:
            (home / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    torch.manual_seed(0)
    save("base", AutoModelForCausalLM.from_config(LlamaConfig(**sizes)))
    save("small", AutoModelForCausalLM.from_config(LlamaConfig(**sizes | {"vocab_size": 64})))
    torch.manual_seed(1)
    model = randomise_alpha(Phase15ForCausalLM.from_base(str(home / "base"), **SIZES))
    run = {"dataset_name": str(home / "data.jsonl"), "validation_split": 0.25}
    save("model", model, **run)
    model.hypernet.alpha.data.zero_()
    save("window", model, baseline="window", **run)
    torch.manual_seed(2)
    save("other", AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), baseline="full_context", **run)
    adapters = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"]),
        "tuned": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in adapters.items():
        save(name, get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config))
    (home / "tuned" / "recipe.yaml").write_text(yaml.safe_dump({"rival": "prompt_tuning", **run}))  # its old name
    (home / "unknown").mkdir()
    lines = [
        {"question": f"Why is {i}?", "answer": "Blue light scatters. " * (1 + i % 3) + f"#### {i}"} for i in range(40)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def arguments(home: Path, folder: Path, **flags) -> EvaluationArguments:
    defaults = {"dataset": str(home / "data.jsonl"), "output_dir": str(folder), "generated_records": 3}
    defaults |= {"max_new_tokens": 6, "batch_size": 3, "bootstrap_samples": 50, "device": "cpu"}
    return EvaluationArguments(**{"model_dir": str(home / "model"), **defaults, **flags})
