# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Greedy answers against naive ones, token by token."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from reference import CHUNK
from test_losses import Tokenizer, naive_greedy, records
from transformers import AutoModelForCausalLM

from phase15.evaluation.answers import cut, greedy_answers


def test_an_answer_ends_before_its_end_token(tiny):
    query = records()[2].query
    whole = naive_greedy(tiny, query, 8, -1)
    end = whole[3]
    (answer,) = greedy_answers("", tiny, Tokenizer(end), [query], 2, 8)
    assert answer == whole[: whole.index(end)]


@pytest.mark.parametrize("kind", ["LLM", "prompt tuning"])
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(kind, bases):
    """Though queries of other lengths are padded, and an adapter may put virtual tokens in front of that."""
    base, queries = AutoModelForCausalLM.from_pretrained(bases["llama"]), [record.query for record in records()]
    model, virtual = base, torch.zeros(0, base.config.hidden_size)
    if kind == "prompt tuning":
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        model.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
        virtual = model.get_prompt(1)[0]
    for query, answer in zip(queries, greedy_answers("", model, Tokenizer(59), queries, 3, 6), strict=True):
        ids = list(query)
        while len(ids) < len(query) + 6 and ids[-1] != 59:
            embeds = torch.cat([virtual, base.get_input_embeddings()(torch.tensor(ids))])
            ids.append(int(base(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
        assert answer == [token for token in ids[len(query) :] if token != 59]


def test_the_chunk_length_of_answers_is_the_argument(tiny):
    """By default that of the config, and not that of the generation config."""
    queries = [record.query for record in records()]

    def answers(**settings) -> list[list[int]]:
        return greedy_answers("", tiny, Tokenizer(59), queries, 3, 12, min_new_tokens=12, **settings)

    by_default = answers()
    tiny.generation_config.chunk_length = CHUNK + 3
    assert answers() == answers(chunk_length=CHUNK) == by_default
    assert answers(chunk_length=CHUNK + 3) != by_default
    tiny.config.chunk_length = CHUNK + 3
    assert answers(chunk_length=CHUNK) == by_default


def test_an_answer_is_cut_at_its_first_end_token():
    assert cut([1, 9, 2, 9], 9) == [1] and cut([1, 2], 9) == [1, 2] and cut([9], 9) == []
