# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Continuous batching against `generate` on each request by itself, and its manager against the library's."""

import inspect
import math
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference import CHUNK, LLM_SIZES, QUERY, SIZES, SLOTS, VOCAB, random_ids, randomise_alpha
from test_decoding import Replayed
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin, StoppingCriteria
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from phase15.model import continuous_batching_phase15, decoding_phase15
from phase15.model.cache_phase15 import KeptConversations
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.continuous_batching_phase15 import (
    Phase15ContinuousBatchingManager,
    Phase15Lanes,
    Phase15LaneThread,
)
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor as Processor
from phase15.model.decoding_phase15 import LibraryDecoder, Phase15Decoder
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.requests_phase15 import Phase15Request, make_reading_request, make_request


LENGTHS = (1, QUERY - 1, QUERY, QUERY + 1, 3 * QUERY, 3, 2 * SLOTS)
PROMPTS = [random_ids(length, seed=length).tolist() for length in LENGTHS]
WAYS = ("static", "replayed", "library")


@pytest.fixture(scope="module")
def model() -> Phase15ForCausalLM:
    """In float64, so that no other order of a sum can change a greedy token."""
    torch.manual_seed(1)
    config = Phase15Config(text_config=LlamaConfig(**LLM_SIZES), **SIZES)
    return randomise_alpha(Phase15ForCausalLM(config)).double().eval()


@pytest.fixture(params=WAYS)
def way(request, model, monkeypatch) -> str:
    take(request.param, model, monkeypatch)
    return request.param


def take(way: str, model, patch):
    """On static buffers; as a CUDA graph would replay them; or by the calls of the transformers loop."""
    if way == "replayed":
        replayed = Replayed()
        run, recorded = Phase15Decoder.run, set()  # what Python code picks is never recorded
        patch.setattr(Phase15Decoder, "prepare", lambda self, model: recorded.add(self))
        patch.setattr(
            Phase15Decoder, "run", lambda self, *args: (replayed.run if self in recorded else run)(self, *args)
        )
        patch.setattr(decoding_phase15, "compiled", lambda function: function)
        patch.setattr(decoding_phase15, "AUTOMATIC_ON", ("cpu",))
    elif way == "library":
        patch.setattr(continuous_batching_phase15, "unsupported_model", lambda model: "forward hooks")


def alone(model, prompt: list[int], length: int = 9, **kwargs) -> list[int]:
    ids = torch.tensor([prompt])
    kwargs = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False} | kwargs
    return model.generate(ids, max_new_tokens=length, **kwargs)[0, len(prompt) :].tolist()


def answer(processor: Processor, *requests: Phase15Request) -> list[list[int]]:
    for request in requests:
        processor.submit(request)
    while processor.advance():
        pass
    return [request.generated_tokens for request in requests]


def asked(model, prompt: list[int], length: int = 9, **kwargs) -> Phase15Request:
    return make_request(model, prompt, max_new_tokens=length, **{"do_sample": False} | kwargs)


# greedy tokens are those of `generate`


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(1, 3 * CHUNK + 1),  # tokens of the answer
        st.integers(0, 6),  # boundaries before it is asked
        st.one_of(st.none(), st.integers(0, 6)),  # boundaries after which its client leaves
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("way", WAYS)
@given(requests=REQUESTS, num_lanes=st.integers(1, 4), kept=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_any_order_of_arrival_and_departure_gives_the_same_tokens(model, way, requests, num_lanes, kept):
    with pytest.MonkeyPatch.context() as patch:
        take(way, model, patch)
        lanes = Processor(model, num_lanes, max_kept_conversations=kept)
        asks = [asked(model, PROMPTS[prompt], length) for prompt, length, *_ in requests]
        boundary, goes_on = 0, True
        while goes_on or boundary <= 6:
            for ask, (_, _, arrival, departure) in zip(asks, requests, strict=True):
                if arrival == boundary:
                    lanes.submit(ask)
                if departure is not None and arrival + departure == boundary:
                    ask.finish("cancelled")
            assert len(lanes.lanes) <= num_lanes
            goes_on = lanes.advance()
            boundary += 1
            assert boundary < 500
    for ask, (prompt, length, _, departure) in zip(asks, requests, strict=True):
        expected = alone(model, PROMPTS[prompt], length)
        assert ask.finish_reason == "length" or departure is not None
        if ask.finish_reason == "length":
            assert ask.generated_tokens == expected
        else:
            assert ask.generated_tokens == expected[: len(ask.generated_tokens)] and ask.finish_reason == "cancelled"


def test_a_finished_answer_leaves_at_the_next_boundary_and_a_waiting_one_takes_its_lane(model, way):
    lanes = Processor(model, 2)
    first, second, third = (asked(model, PROMPTS[0], length) for length in (CHUNK + 1, 5 * CHUNK, 2))
    for request in (first, second, third):
        lanes.submit(request)
    lanes.advance()
    assert [len(request.generated_tokens) for request in (first, second, third)] == [CHUNK, CHUNK, 0]
    lanes.advance()
    assert first.finish_reason == "length" and third.started < 0
    lanes.advance()
    assert third.finish_reason == "length" and len(second.generated_tokens) == 3 * CHUNK


def test_a_long_query_is_read_a_segment_at_a_boundary_beside_the_others(model, way):
    lanes = Processor(model, 2)
    short, long = asked(model, PROMPTS[0], 9 * CHUNK), asked(model, random_ids(5 * QUERY).tolist(), 3)
    lanes.submit(short)
    lanes.submit(long)
    for boundary in range(1, 5):
        lanes.advance()
        assert len(short.generated_tokens) == boundary * CHUNK and not long.generated_tokens
    lanes.advance()
    assert long.generated_tokens == alone(model, long.prompt_ids, 3)


def test_an_end_token_ends_its_answer_alone(model, way):
    free = [alone(model, prompt, 12) for prompt in PROMPTS]
    ends = [tokens[index] for index, tokens in enumerate(free)]
    asks = [asked(model, prompt, 12, eos_token_id=[end, 1]) for prompt, end in zip(PROMPTS, ends, strict=True)]
    expected = [alone(model, prompt, 12, eos_token_id=[end, 1]) for prompt, end in zip(PROMPTS, ends, strict=True)]
    assert answer(Processor(model, 3), *asks) == expected
    assert {ask.finish_reason for ask in asks} == {"stop"}


def test_nothing_is_decoded_when_all_answers_have_ended(model, monkeypatch):
    names, run = [], Phase15Decoder.run
    monkeypatch.setattr(Phase15Decoder, "run", lambda self, name, model: (names.append(name), run(self, name, model)))
    ends = alone(model, PROMPTS[0], CHUNK)[:1]
    answer(
        Processor(model, 2),
        asked(model, PROMPTS[0], 50, eos_token_id=ends, on_token=lambda request: None),
    )
    assert names == ["prefill"]
    names.clear()
    answer(Processor(model, 2), asked(model, PROMPTS[0], 50, eos_token_id=ends))  # the host checks once a chunk
    assert names == ["prefill"] + ["decode"] * (CHUNK - 1)


def test_buffers_serve_lanes_of_every_number(model, way):
    lanes, prompts = (
        Processor(model, 5),
        [random_ids(3, seed=seed).tolist() for seed in range(5)],
    )
    for number in (1, 5, 2, 4, 3):
        asks = [asked(model, prompt, 2 * CHUNK) for prompt in prompts[:number]]
        assert answer(lanes, *asks) == [alone(model, prompt, 2 * CHUNK) for prompt in prompts[:number]]
    sizes = {1, 2, 4, 5} if way == "replayed" else {1, 2, 3, 4, 5}
    assert {size for size, *_ in lanes._decoders} == sizes
    kind = LibraryDecoder if way == "library" else Phase15Decoder
    assert {type(decoder) for decoder in lanes._decoders.values()} == {kind}


def test_the_librarys_processors_and_criteria_work_in_a_lane(model, way):
    free = alone(model, PROMPTS[4], 20)
    cases = [
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": free[:3]},
        {"min_new_tokens": 7, "eos_token_id": free[2]},
        {"sequence_bias": {(free[5],): -100.0}},
        {"stopping_criteria": [After(6)]},
        {"logits_processor": LogitsProcessorList([Only(11)])},
        {},
    ]
    asks = [asked(model, PROMPTS[4], 20, **case) for case in cases]
    expected = [alone(model, PROMPTS[4], 20, **case) for case in cases]
    assert answer(Processor(model, 3), *asks) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(cases)
    assert asks[5].finish_reason == "stop" and len(expected[5]) == 6


class After(StoppingCriteria):
    def __init__(self, number: int):
        self.number, self.calls = number, 0

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPTS[4]) + self.number)


class Only(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([self.token]), 0)


# sampling


def test_greedy_lanes_beside_sampled_ones_stay_greedy(model, way):
    asks = [asked(model, PROMPTS[4], 9), asked(model, PROMPTS[4], 9, do_sample=True, top_k=0)]
    asks += [asked(model, PROMPTS[4], 9, do_sample=True, top_p=0.5, top_k=0)]
    answer(Processor(model, 3), *asks)
    assert asks[0].generated_tokens == alone(model, PROMPTS[4])
    assert len({tuple(ask.generated_tokens) for ask in asks}) == 3


@pytest.mark.parametrize("sampling", [{"top_k": 0}, {"top_k": 7, "top_p": 0.9}])
def test_a_seed_gives_the_same_tokens_whatever_the_neighbours(model, way, sampling):
    def ask(seed: int) -> Phase15Request:
        return asked(model, PROMPTS[2], 3 * CHUNK, do_sample=True, seed=seed, **sampling)

    (expected,) = answer(Processor(model, 1), ask(7))
    (other,) = answer(Processor(model, 1), ask(8))
    lanes = Processor(model, 3)
    lanes.submit(asked(model, PROMPTS[3], 2 * CHUNK, do_sample=True, top_p=0.4))
    lanes.submit(asked(model, PROMPTS[5], CHUNK))
    lanes.advance()
    again, others = answer(lanes, ask(7), ask(8))
    assert again == expected and others == other != expected


def test_log_probabilities_are_those_of_forward(model, way):
    request = asked(model, PROMPTS[4], 2 * CHUNK + 1, num_logprobs=4, do_sample=True, top_k=0, seed=1)
    answer(Processor(model, 2), request, asked(model, PROMPTS[0]))
    ids = torch.tensor([request.prompt_ids + request.generated_tokens])
    query = torch.tensor([len(request.prompt_ids)])
    with torch.no_grad():
        scores = model(ids, query_lengths=query).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(request.generated_tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(request.logprobs, dtype=chosen.dtype), chosen, atol=1e-5, rtol=1e-5)
    values, order = scores.topk(4)
    assert [[token for token, _ in likeliest] for likeliest in request.top_logprobs] == order.tolist()
    got = torch.tensor([[value for _, value in likeliest] for likeliest in request.top_logprobs]).double()
    torch.testing.assert_close(got, values, atol=1e-5, rtol=1e-5)


# kept conversations


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Tokens of every step that reads a query."""
    lengths = []
    read = Phase15ForCausalLM.read_segments

    def reading(self, soft_prompt, ids, length, *args):
        lengths.extend(length.tolist())
        return read(self, soft_prompt, ids, length, *args)

    monkeypatch.setattr(Phase15ForCausalLM, "read_segments", reading)
    return lengths


def test_a_next_turn_reads_what_is_new_and_gives_the_same(model, way, reads):
    lanes, ids = (
        Processor(model, 2, max_kept_conversations=5),
        random_ids(3 * QUERY + 2).tolist(),
    )
    for turn in range(20):
        expected = alone(model, ids, 2 * CHUNK)
        reads.clear()
        request = asked(model, ids, 2 * CHUNK)
        assert answer(lanes, request) == [expected]
        assert sum(reads) == len(ids) - request.num_kept_tokens
        if turn:  # what was said since, and what did not fill a segment
            assert sum(reads) <= 2 * CHUNK + 3 + QUERY
        ids = ids + request.generated_tokens + random_ids(3, seed=turn).tolist()
        assert len(lanes.conversations.states) <= 5
    assert len(ids) > 200


def test_an_edited_conversation_is_read_afresh(model, way, reads):
    lanes, ids = (
        Processor(model, 2, max_kept_conversations=5),
        random_ids(3 * QUERY + 2).tolist(),
    )
    answer(lanes, asked(model, ids))
    edited = [ids[0] - 1 if ids[0] > 3 else 4, *ids[1:], 5]
    expected = alone(model, edited)
    reads.clear()
    assert answer(lanes, asked(model, edited)) == [expected]
    assert sum(reads) == len(edited)
    late = [*ids[: 2 * QUERY + 3], *edited[2 * QUERY + 2 :]]
    assert answer(lanes, asked(model, late)) == [alone(model, late)]


def test_the_least_recently_used_conversation_goes_first(model, reads):
    lanes = Processor(model, 1, max_kept_conversations=2)
    conversations = [random_ids(QUERY + 1, seed=seed).tolist() for seed in range(3)]
    for index in (0, 1, 0, 2):  # 1 is forgotten
        answer(lanes, asked(model, conversations[index]))
    for index, kept in ((0, QUERY), (2, QUERY), (1, 0)):
        request = asked(model, conversations[index])
        assert answer(lanes, request) == [alone(model, conversations[index])]
        assert request.num_kept_tokens == kept


def test_a_query_that_is_kept_whole_is_not_read_again(model, way, reads):
    lanes, ids = Processor(model, 1, max_kept_conversations=2), random_ids(2 * QUERY).tolist()
    expected = alone(model, ids)
    for _ in range(2):
        reads.clear()
        assert answer(lanes, asked(model, ids)) == [expected]
    assert not reads


def test_what_is_kept_holds_one_row_each(model):
    lanes = Processor(model, 4, max_kept_conversations=9)
    answer(lanes, *[asked(model, random_ids(QUERY, seed=seed).tolist()) for seed in range(4)])
    assert len(lanes.conversations.states) == 4
    for soft_prompt in lanes.conversations.states.values():
        assert soft_prompt.embeds.untyped_storage().nbytes() == soft_prompt.embeds.nbytes


def test_nothing_is_kept_unless_asked(model):
    lanes = Processor(model, 1)
    answer(lanes, asked(model, PROMPTS[4]))
    assert not lanes.conversations.states and KeptConversations(0, QUERY).get(PROMPTS[4]) == (None, 0)


def test_conversations_share_a_system_prompt(model, way, reads):
    """The second client reads nothing of the first segments, whether the first has its answer yet or not."""
    system = random_ids(2 * QUERY + 3, seed=1).tolist()
    questions = [random_ids(QUERY, seed=seed).tolist() for seed in range(2, 6)]
    lanes = Processor(model, 2, max_kept_conversations=20)
    requests = [asked(model, system + question) for question in questions]
    assert answer(lanes, *requests) == [alone(model, system + question) for question in questions]
    kept = [request.num_kept_tokens for request in requests]
    assert kept[0] == 0 and kept[2:] == [2 * QUERY] * 2


def test_a_branch_leaves_the_other_branches_their_soft_prompts(model, way):
    beginning = random_ids(3 * QUERY, seed=1).tolist()
    branches = [beginning + random_ids(2 * QUERY, seed=seed).tolist() for seed in (2, 3, 4)]
    lanes = Processor(model, 1, max_kept_conversations=20)
    for turn in range(2):
        for index, branch in enumerate(branches):
            request = asked(model, branch)
            assert answer(lanes, request) == [alone(model, branch)]
            if turn:
                assert request.num_kept_tokens == len(branch)
            else:
                assert request.num_kept_tokens == (3 * QUERY if index else 0)


def test_a_long_prompt_keeps_few_soft_prompts(model):
    kept = KeptConversations(50, QUERY)
    read = [number for number in range(1, 201) if kept.is_kept(number * QUERY, 200 * QUERY + 1)]
    assert read == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 200]
    assert not kept.is_kept(QUERY + 1, 9 * QUERY) and not KeptConversations(0, QUERY).is_kept(QUERY, QUERY)
    lanes = Processor(model, 1, max_kept_conversations=50)
    answer(lanes, asked(model, random_ids(40 * QUERY + 2).tolist()))
    assert len(lanes.conversations.states) == 11


def test_soft_prompts_are_shared_only_with_the_same_salt(model):
    ids = random_ids(2 * QUERY + 1).tolist()
    lanes = Processor(model, 1, max_kept_conversations=20)
    kept = []
    for salt in (b"", b"a", b"b", b"a", b""):
        request = make_request(model, ids, max_new_tokens=3, salt=salt, pad_token_id=0)
        answer(lanes, request)
        kept.append(request.num_kept_tokens)
    assert kept == [0, 0, 0, 2 * QUERY, 2 * QUERY]


# states


def test_a_lane_starts_from_a_state(model, way):
    """Lanes with and without a state side by side, and soft prompts that are kept apart for each state."""
    states = [model.read(random_ids(2 * QUERY + shift, seed=shift)) for shift in (0, 1)]
    question = random_ids(2 * QUERY + 2, seed=9)
    lanes = Processor(model, 2, max_kept_conversations=20)
    for turn in range(2):
        requests = [
            make_request(model, question.tolist(), max_new_tokens=2 * CHUNK + 1, state=state, pad_token_id=0)
            for state in (*states, None)
        ]
        expected = [
            model.generate(question[None], max_new_tokens=2 * CHUNK + 1, state=state, pad_token_id=0, compile=False)
            for state in (*states, None)
        ]
        rows = [output[0, len(question) :].tolist() for output in expected]
        assert answer(lanes, *requests) == rows and len(set(map(tuple, rows))) == 3
        assert [request.num_kept_tokens for request in requests] == [2 * QUERY * turn] * 3


def test_generate_batch_from_one_state_and_from_one_for_each_prompt(model):
    states = [model.read(random_ids(2 * QUERY, seed=seed)) for seed in (1, 2)]
    prompts = [random_ids(5, seed=3).tolist(), random_ids(QUERY + 2, seed=4).tolist()]
    for before in (states[0], states):
        outputs = model.generate_batch(prompts, state=before, max_new_tokens=9, pad_token_id=0)
        for index, (output, prompt) in enumerate(zip(outputs.values(), prompts, strict=True)):
            state = before[index] if before is states else before
            expected = model.generate(torch.tensor([prompt]), state=state, max_new_tokens=9, pad_token_id=0)
            assert output.generated_tokens == expected[0, len(prompt) :].tolist()
    for wrong, message in ((states[:1], "1 states, but there are 2"), (type(states[0]).stack(states), "2 rows, but")):
        with pytest.raises(ValueError, match=message):
            model.generate_batch(prompts, state=wrong, max_new_tokens=9, pad_token_id=0)


@pytest.mark.parametrize("length", [3, QUERY, 3 * QUERY + 1])
def test_a_request_can_only_read(model, way, length):
    """Beside an answer; also if all of its tokens were read before."""
    ids = random_ids(length, seed=length)
    before = model.read(random_ids(QUERY, seed=2))
    lanes = Processor(model, 2, max_kept_conversations=9)
    for state in (None, before, before):
        other = asked(model, PROMPTS[4])
        request = make_reading_request(model, ids.tolist(), state=state)
        answer(lanes, other, request)
        assert other.generated_tokens == alone(model, PROMPTS[4])
        assert request.finish_reason == "stop" and request.generated_tokens == []
        expected = model.read(ids, state=state).soft_prompt
        torch.testing.assert_close(request.soft_prompt.embeds, expected.embeds)
        assert torch.equal(request.soft_prompt.length, expected.length)


# what goes wrong


def test_damaged_weights_are_an_error_of_the_answer(model, way):
    damaged = randomise_alpha(Phase15ForCausalLM(model.config)).eval()
    damaged.llm.lm_head.weight.data[3] = math.nan
    request = asked(damaged, PROMPTS[0])
    answer(Processor(damaged, 1), request)
    assert request.finish_reason == "error" and not request.generated_tokens
    with pytest.raises(FloatingPointError, match="not finite"):
        damaged.generate_batch([PROMPTS[0]])


def fails(*args, **kwargs):
    raise KeyError("the request's own")


class Fails(LogitsProcessor):
    __call__ = fails


class FailsToStop(StoppingCriteria):
    __call__ = fails


@pytest.mark.parametrize("part", ["processor", "criterion", "on_token", "on_step"])
def test_what_fails_of_a_request_ends_its_answer_alone(model, way, part):
    kwargs = {
        "processor": {"logits_processor": LogitsProcessorList([Fails()])},
        "criterion": {"stopping_criteria": [FailsToStop()]},
        "on_token": {"on_token": fails},
    }
    bad, good = asked(model, PROMPTS[0], **kwargs.get(part, {})), asked(model, PROMPTS[1])
    bad.on_step = fails if part == "on_step" else None
    answer(Processor(model, 2), bad, good)
    assert (bad.finish_reason, type(bad.error)) == ("error", KeyError)
    assert good.generated_tokens == alone(model, PROMPTS[1])


def test_abort_ends_what_waits_and_what_is_under_way(model):
    lanes, asks = Processor(model, 1), [asked(model, PROMPTS[0], 90) for _ in range(3)]
    for ask in asks:
        lanes.submit(ask)
    lanes.advance()
    lanes.abort(RuntimeError("out of memory"))
    assert {ask.finish_reason for ask in asks} == {"error"} and not lanes.advance()
    assert answer(lanes, asked(model, PROMPTS[1])) == [alone(model, PROMPTS[1])]


def test_what_cannot_be_compiled_goes_on_without(model, monkeypatch):
    def fail(decoder, model):
        raise RuntimeError("no C compiler\nwas found")

    warnings = []
    monkeypatch.setattr(decoding_phase15, "AUTOMATIC_ON", ("cpu",))
    monkeypatch.setattr(decoding_phase15.logger, "warning", warnings.append)
    monkeypatch.setattr(model.decoders, "has_failed", False)
    monkeypatch.setattr(Phase15Decoder, "prepare", fail)
    assert answer(Processor(model, 2), asked(model, PROMPTS[4], 9)) == [alone(model, PROMPTS[4], 9)]
    assert len(warnings) == 1 and "no C compiler was found" in warnings[0]
    with pytest.raises(RuntimeError, match="no C compiler"):
        answer(Processor(model, 2, compile=True), asked(model, PROMPTS[4]))


def test_a_model_with_hooks_answers_by_the_librarys_calls(model):
    hook = model.hypernet.register_forward_hook(lambda *args: None)
    try:
        lanes = Processor(model, 3)
        asks = [asked(model, prompt) for prompt in PROMPTS]
        assert answer(lanes, *asks) == [alone(model, prompt) for prompt in PROMPTS]
        with pytest.raises(ValueError, match="`compile=True` cannot be honoured with forward hooks"):
            Processor(model, 3, compile=True)
    finally:
        hook.remove()
    assert {type(decoder) for decoder in lanes._decoders.values()} == {LibraryDecoder}


def test_less_than_one_lane_is_refused(model):
    with pytest.raises(ValueError, match="`max_batch_size` is 0, but it must be at least 1"):
        Processor(model, 0)
    for number in (0, -3):
        with pytest.raises(ValueError, match=f"`max_batch_size` is {number}"):
            model.generate_batch(PROMPTS, max_batch_size=number)
        with pytest.raises(ValueError, match=f"`max_batch_size` is {number}"):
            model.init_continuous_batching(max_batch_size=number)


# generate_batch


def test_generate_batch_gives_the_librarys_result(model, way):
    outputs = model.generate_batch(
        PROMPTS, max_new_tokens=11, max_batch_size=3, do_sample=False, record_timestamps=True
    )
    assert list(outputs) == [f"req_{index}" for index in range(len(PROMPTS))]
    for prompt, (name, output) in zip(PROMPTS, outputs.items(), strict=True):
        assert type(output) is GenerationOutput and output.is_finished() and output.status == RequestStatus.FINISHED
        assert (output.request_id, output.prompt_ids, output.error) == (name, prompt, None)
        assert output.generated_tokens == alone(model, prompt, 11)
        start, end = output.lifespan
        assert len(output.timestamps) == 11 and sorted(output.timestamps) == output.timestamps
        assert start <= output.timestamps[0] and end <= output.timestamps[-1] + 1
    assert model.generate_batch([]) == {} == model.generate_batch([], persistent_manager=True, warmup=False)


def test_generate_batch_takes_settings_as_generate_does(model):
    free = alone(model, PROMPTS[4], 20)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=free[5], pad_token_id=0)
    expected = alone(model, PROMPTS[4], 20, eos_token_id=free[5])
    for kwargs in (
        {"return_logprobs": True},
        {"continuous_batching_config": ContinuousBatchingConfig(return_logprobs=True)},  # as TRL's GRPO gives one
    ):
        (output,) = model.generate_batch([PROMPTS[4]], config, **kwargs).values()
        assert output.generated_tokens == expected and len(output.logprobs) == len(expected)
    config = GenerationConfig(max_new_tokens=8, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    first = model.generate_batch(PROMPTS[:2], config, max_batch_size=2)
    torch.manual_seed(0)
    again = model.generate_batch(PROMPTS[:2], config, max_batch_size=5)
    names = ["req_0", "req_0__child#0", "req_0__child#1", "req_1", "req_1__child#0", "req_1__child#1"]
    assert list(first) == names
    tokens = [output.generated_tokens for output in first.values()]
    assert tokens == [output.generated_tokens for output in again.values()] and len(set(map(tuple, tokens))) == 6


def test_generate_batch_shows_its_progress(model, capsys):
    is_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    model.generate_batch(PROMPTS, max_new_tokens=3, progress_bar=True)
    if not is_on:
        logging.disable_progress_bar()
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
    model.generate_batch(PROMPTS, max_new_tokens=3)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "inputs, kwargs, message",
    [
        ([3, 4], {}, r"`inputs\[0\]` must be a list of token ids, not 3"),
        (["12"], {}, r"`inputs\[0\]` must be a list of token ids, not '12'"),
        ([[3], []], {}, r"`inputs\[1\]` is empty; give at least one token id"),
        ([[3], [4, VOCAB]], {}, rf"`inputs\[1\]` holds {VOCAB} at position 1, but ids must be from 0 to {VOCAB - 1}"),
        ([[3], [-1]], {}, r"`inputs\[1\]` holds -1 at position 0"),
        ([[3]], {"num_beams": 2}, "beam search"),
        ([[3]], {"output_scores": True, "return_dict_in_generate": True}, "`output_scores`"),
        ([[3]], {"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[3]], {"tempreature": 1}, "tempreature"),
    ],
)
def test_generate_batch_refuses_what_it_cannot_do(model, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate_batch(inputs, **kwargs)


# the manager


@pytest.fixture
def managers(model):
    """Makes managers, and stops them."""
    made = []

    def make(*args, **kwargs) -> Phase15ContinuousBatchingManager:
        made.append(model.init_continuous_batching(*args, **kwargs))
        return made[-1]

    yield make
    for manager in made:
        manager.stop(hard_stop=True)


def greedy(length: int = 9, **kwargs) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=0, **kwargs)


def test_the_managers_results_are_those_of_generate(model, managers):
    manager = managers(greedy(), max_batch_size=3)
    assert not manager.is_running() and manager.get_result() is None and list(manager) == []
    early = manager.add_request(PROMPTS[0], max_new_tokens=2 * CHUNK)
    manager.start()
    assert manager.is_running()
    ids = manager.add_requests(PROMPTS[1:], max_new_tokens=11)
    assert [early, *ids] == [f"req_{index}" for index in range(len(PROMPTS))]
    named = manager.add_request(PROMPTS[2], request_id="mine", eos_token_id=alone(model, PROMPTS[2])[3])
    result = manager.get_result(named, timeout=60)
    assert type(result) is GenerationOutput and result.request_id == "mine" and result.status == RequestStatus.FINISHED
    assert result.generated_tokens == alone(model, PROMPTS[2])[:4] and result.prompt_ids == PROMPTS[2]
    assert named not in manager._unfinished and manager.get_result(named) is None  # given once, and none can come
    manager.stop()
    assert not manager.is_running()
    results = {result.request_id: result for result in manager}
    assert list(results) != [] and set(results) == {early, *ids}
    for request_id, prompt in zip((early, *ids), PROMPTS, strict=True):
        length = 2 * CHUNK if request_id == early else 11
        assert results[request_id].generated_tokens == alone(model, prompt, length)
    with pytest.raises(RuntimeError, match="is stopping: call `start`"):
        manager.add_request(PROMPTS[0])
    manager.start()  # again
    assert manager.get_result(manager.add_request(PROMPTS[1]), 60).generated_tokens == alone(model, PROMPTS[1])


def test_a_manager_has_the_librarys_methods(managers):
    manager = managers(max_batch_size=1)
    for name in ("start", "stop", "join", "is_running", "add_request", "add_requests", "cancel_request", "get_result"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (type(manager), ContinuousBatchingManager))
        missing = set(theirs.parameters) - set(ours.parameters)
        assert missing <= {"logit_processor_kwargs", "keep_for_next_session", "stop_trigger_time"} | (
            {"streaming", "record_timestamps"} if name == "add_requests" else set()  # they are among its kwargs
        )
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        theirs = list(inspect.signature(getattr(GenerationMixin, name)).parameters)
        theirs = [parameter for parameter in theirs if parameter != "kwargs"]
        assert list(inspect.signature(getattr(Phase15ForCausalLM, name)).parameters)[: len(theirs)] == theirs


def test_a_streamed_request_gives_a_result_after_every_token(model, managers):
    config = ContinuousBatchingConfig(return_logprobs=True, max_requests_per_batch=2)
    manager = managers(greedy(), config)
    assert manager.processor.max_batch_size == 2
    manager.start()
    request_id = manager.add_request(PROMPTS[3], streaming=True, record_timestamps=True)
    results = list(manager.request_id_iter(request_id))
    expected = alone(model, PROMPTS[3])
    assert [result.generated_tokens for result in results] == [expected[: n + 1] for n in range(9)] + [expected]
    assert [result.is_finished() for result in results] == [False] * 9 + [True]
    assert {result.status for result in results[:-1]} == {RequestStatus.DECODING}
    assert [len(result.timestamps) for result in results] == [*range(1, 10), 9]
    assert [len(result.logprobs) for result in results] == [*range(1, 10), 9]


def test_a_managers_seeds_and_children(model, managers):
    sampled = {"max_new_tokens": 2 * CHUNK, "do_sample": True, "top_k": 0}
    manager = managers(GenerationConfig(num_return_sequences=3, do_sample=True, pad_token_id=0))
    manager.start()
    first, again = (manager.add_request(PROMPTS[2], seed=7, **sampled) for _ in range(2))
    names = [first, f"{first}__child#0", f"{first}__child#1"]
    answers = [manager.get_result(name, 60).generated_tokens for name in names]
    repeated = [manager.get_result(name.replace(first, again, 1), 60).generated_tokens for name in names]
    assert answers == repeated and len(set(map(tuple, answers))) == 3
    (expected,) = answer(Processor(model, 1), make_request(model, PROMPTS[2], seed=8, pad_token_id=0, **sampled))[:1]
    assert answers[1] == expected


def test_cancelled_and_failed_requests_give_results(model, managers, monkeypatch):
    manager = managers(greedy(10**6), max_batch_size=2)
    manager.start()
    endless, other = manager.add_requests(PROMPTS[:2])
    with pytest.raises(ValueError, match=f"`request_id` is '{endless}', which an unfinished request has"):
        manager.add_request(PROMPTS[2], request_id=endless)
    assert manager.get_result(endless, timeout=0.05) is None
    manager.cancel_request(endless)
    manager.cancel_request("unknown")
    result = manager.get_result(endless, timeout=60)
    assert (result.status, result.error, result.is_finished()) == (RequestStatus.FAILED, "cancelled", True)
    manager.stop(hard_stop=True)
    assert not manager.is_running() and [result.error for result in manager] == ["cancelled"]
    manager.start()
    monkeypatch.setattr(Processor, "_read_prompts", fails)
    failed = manager.add_request(PROMPTS[2])
    assert "the request's own" in manager.get_result(failed, timeout=60).error
    monkeypatch.undo()
    assert manager.get_result(manager.add_request(PROMPTS[2], max_new_tokens=3), 60).generated_tokens == alone(
        model, PROMPTS[2], 3
    )


@pytest.mark.parametrize(
    "input_ids, kwargs, message",
    [
        ([], {}, "`input_ids` is empty"),
        ([VOCAB], {}, f"`input_ids` holds {VOCAB} at position 0"),
        ([3], {"num_beams": 2}, "does not support beam search"),
        ([3], {"prompt_lookup_num_tokens": 2}, "assisted decoding"),
    ],
)
def test_a_manager_refuses_what_it_cannot_do(managers, input_ids, kwargs, message):
    manager = managers()
    with pytest.raises(ValueError, match=message):
        manager.add_request(input_ids, **kwargs)
    assert not manager.processor.waiting and not manager._unfinished


def test_the_context_manager_waits_for_what_was_added(model):
    with model.continuous_batching_context_manager(greedy(), max_batch_size=2) as manager:
        ids = manager.add_requests(PROMPTS)
    assert not manager.is_running()
    results = {result.request_id: result.generated_tokens for result in manager}
    assert [results[request_id] for request_id in ids] == [alone(model, prompt) for prompt in PROMPTS]


# names before 0.7


def test_earlier_names_go_on_working_with_a_warning(model):
    with pytest.warns(FutureWarning, match="`open_lanes` is now `init_continuous_batching`") as warned:
        thread = model.open_lanes(2)
    assert warned[0].filename == __file__ and type(thread) is Phase15LaneThread and type(thread.lanes) is Phase15Lanes
    thread.start()
    request = thread.lanes.request(PROMPTS[0], max_new_tokens=9, do_sample=False, pad_token_id=0)
    ended = threading.Event()
    request.on_finish = lambda request: ended.set()
    thread.submit([request])
    assert ended.wait(60) and request.generated_tokens == alone(model, PROMPTS[0])
    endless = thread.lanes.request(PROMPTS[0], max_new_tokens=10**6, do_sample=False, pad_token_id=0)
    thread.submit([endless])
    thread.stop()
    assert endless.finish_reason == "cancelled" and not thread.thread.is_alive()
    assert thread.lanes.num_lanes == 2 and thread.lanes.kept is thread.lanes.conversations
    with pytest.warns(FutureWarning, match="`num_lanes` is now `max_batch_size`") as warned:
        (output,) = model.generate_batch(PROMPTS[:1], greedy(), num_lanes=1).values()
    assert warned[0].filename == __file__ and output.generated_tokens == alone(model, PROMPTS[0])
