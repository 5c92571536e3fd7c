# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Requests: what `make_request` takes from the settings of `generate`, and what it refuses."""

import pytest
import torch
from reference import VOCAB, random_ids
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor, StoppingCriteria

from phase15.model.decoding_phase15 import Sampling, draw_seed
from phase15.model.requests_phase15 import TOP_LOGPROBS, make_request, request_of


PROMPT = random_ids(5, seed=5).tolist()


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Same(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def test_settings_of_generate_become_the_fields_of_a_request(tiny):
    never = Never()
    request = make_request(
        tiny,
        torch.tensor(PROMPT),
        seed=3,
        num_logprobs=2,
        max_new_tokens=7,
        do_sample=True,
        temperature=0.5,
        top_k=9,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.5,
        eos_token_id=[7, 8],
        stopping_criteria=[never],
        chunk_length=3,
    )
    assert request.prompt_ids == PROMPT and {type(token) for token in request.prompt_ids} == {int}
    assert (request.max_new_tokens, request.seed, request.num_logprobs, request.chunk_length) == (7, 3, 2, 3)
    assert request.sampling == Sampling(0.5, 9, 0.8, 0.1) and request.eos_token_ids == {7, 8}
    assert [type(part) for part in request.processors] == [RepetitionPenaltyLogitsProcessor]
    assert request.criteria == [never] and request.needs_every_token


def test_a_config_gives_the_settings_and_is_left_alone(tiny):
    config = GenerationConfig(max_length=9, do_sample=True, num_return_sequences=3, chunk_length=4)
    before = config.to_dict()
    request = make_request(tiny, PROMPT, config)
    assert (request.max_new_tokens, request.chunk_length) == (9 - len(PROMPT), 4) and request.sampling.temperature == 1
    assert config.to_dict() == before
    assert make_request(tiny, PROMPT, config, chunk_length=2).chunk_length == 2
    assert make_request(tiny, PROMPT, max_new_tokens=1).chunk_length is None


def test_a_seed_is_drawn_from_torchs_generator_when_sampling(tiny):
    torch.manual_seed(0)
    seeds = [make_request(tiny, PROMPT, max_new_tokens=2, do_sample=True).seed for _ in range(2)]
    torch.manual_seed(0)
    assert seeds == [draw_seed(), draw_seed()]
    after = torch.random.get_rng_state()
    greedy = make_request(tiny, PROMPT, max_new_tokens=2, do_sample=False)
    given = make_request(tiny, PROMPT, max_new_tokens=2, do_sample=True, seed=0)
    assert greedy.sampling == Sampling() and greedy.seed == given.seed == 0
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, False),
        ({"on_token": print}, True),
        ({"num_logprobs": 0}, True),
        ({"logits_processor": LogitsProcessorList([Same()])}, True),
        ({"stopping_criteria": [Never()]}, True),
        ({"do_sample": True, "top_p": 0.5}, False),
    ],
)
def test_the_host_sees_every_token_only_where_it_must(tiny, kwargs, expected):
    request = make_request(tiny, PROMPT, **{"max_new_tokens": 2, "do_sample": False, **kwargs})
    assert request.needs_every_token is expected


def test_a_request_ends_once(tiny):
    ended = []
    request = make_request(tiny, PROMPT, max_new_tokens=2)
    request.on_finish = ended.append
    request.finish("cancelled")
    request.finish("error", ValueError())
    assert ended == [request] and (request.finish_reason, request.error) == ("cancelled", None)


@pytest.mark.parametrize(
    "prompt_ids, kwargs, message",
    [
        (3, {}, "`prompt_ids` must be a list of token ids, not 3"),
        ("12", {}, "`prompt_ids` must be a list of token ids, not '12'"),
        ([], {}, "`prompt_ids` is empty; give at least one token id"),
        ([], {"name": "inputs"}, "`inputs` is empty"),
        ([4, VOCAB], {}, f"`prompt_ids` holds {VOCAB} at position 1, but ids must be from 0 to {VOCAB - 1}"),
        ([-1], {}, "`prompt_ids` holds -1 at position 0"),
        ([3], {"num_logprobs": TOP_LOGPROBS + 1}, f"`num_logprobs` is {TOP_LOGPROBS + 1}, but it must be from 0 to"),
        ([3], {"num_beams": 2}, "does not support beam search"),
        ([3], {"output_logits": True, "return_dict_in_generate": True}, "does not support `output_logits`"),
        ([3], {"prefill_chunk_size": 2}, "chunked prefill"),
        ([3], {"chunk_length": 0}, "`chunk_length` is 0"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(tiny, prompt_ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_request(tiny, prompt_ids, **{"max_new_tokens": 3, **kwargs})


def test_the_earlier_name_goes_on_working():
    assert request_of is make_request
