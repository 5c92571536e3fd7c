# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Lanes against `generate` on each request alone, and their sampling against the library's own warpers."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference import CHUNK, LLM_SIZES, QUERY, SIZES, SLOTS, VOCAB, random_ids, randomise_alpha
from test_decoding import Replayed
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from phase15.model import continuous_batching_phase15 as lanes_phase15
from phase15.model import decoding_phase15
from phase15.model.cache_phase15 import KeptConversations
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.continuous_batching_phase15 import Phase15Lanes
from phase15.model.decoding_phase15 import LibraryDecoder, Phase15Decoder
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.requests_phase15 import Phase15Request, Sampling, request_of, sample_tokens, width_of


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
    """Lanes on static buffers; as a CUDA graph would replay them; or by the calls of `generate`'s own loop."""
    if way == "replayed":
        replayed = Replayed()
        run, recorded = Phase15Decoder.run, set()  # what Python code picks is never recorded
        patch.setattr(Phase15Decoder, "prepare", lambda self, model: recorded.add(self))
        patch.setattr(
            Phase15Decoder, "run", lambda self, *args: (replayed.run if self in recorded else run)(self, *args)
        )
        patch.setattr(decoding_phase15, "compiled", lambda function: function)
        patch.setattr(lanes_phase15, "AUTOMATIC_ON", ("cpu",))
    elif way == "library":
        patch.setattr(lanes_phase15, "unsupported_model", lambda model: "forward hooks")


def alone(model, prompt: list[int], length: int = 9, **kwargs) -> list[int]:
    ids = torch.tensor([prompt])
    kwargs = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False} | kwargs
    return model.generate(ids, max_new_tokens=length, **kwargs)[0, len(prompt) :].tolist()


def answer(lanes: Phase15Lanes, *requests: Phase15Request) -> list[list[int]]:
    for request in requests:
        lanes.submit(request)
    while lanes.advance():
        pass
    return [request.generated_tokens for request in requests]


def asked(model, prompt: list[int], length: int = 9, **kwargs) -> Phase15Request:
    return request_of(model, prompt, max_new_tokens=length, **{"do_sample": False} | kwargs)


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
        lanes = Phase15Lanes(model, num_lanes, max_kept_conversations=kept)
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
    lanes = Phase15Lanes(model, 2)
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
    lanes = Phase15Lanes(model, 2)
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
    assert answer(Phase15Lanes(model, 3), *asks) == expected
    assert {ask.finish_reason for ask in asks} == {"stop"}


def test_nothing_is_said_when_all_answers_have_ended(model, monkeypatch):
    names, run = [], Phase15Decoder.run
    monkeypatch.setattr(Phase15Decoder, "run", lambda self, name, model: (names.append(name), run(self, name, model)))
    ends = alone(model, PROMPTS[0], CHUNK)[:1]
    answer(Phase15Lanes(model, 2), asked(model, PROMPTS[0], 50, eos_token_id=ends, on_token=lambda request: None))
    assert names == ["prefill"]
    names.clear()
    answer(Phase15Lanes(model, 2), asked(model, PROMPTS[0], 50, eos_token_id=ends))  # the host asks once a chunk
    assert names == ["prefill"] + ["decode"] * (CHUNK - 1)


def test_buffers_serve_lanes_of_every_number(model, way):
    lanes, prompts = Phase15Lanes(model, 5), [random_ids(3, seed=seed).tolist() for seed in range(5)]
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
    assert answer(Phase15Lanes(model, 3), *asks) == expected
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


@pytest.mark.parametrize(
    "given",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=5),
        Sampling(1.5, top_p=0.6),
        Sampling(1.0, min_p=0.1),
        Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_p=1e-6),
    ],
)
def test_every_number_draws_the_token_of_the_librarys_distribution(given):
    """The share of evenly spaced numbers that draw a token is its probability behind the library's warpers."""
    torch.manual_seed(0)
    logits = torch.linspace(0, -6, 50)[torch.randperm(50)][None]  # tokens on both sides of every bound
    scores = TemperatureLogitsWarper(given.temperature)(None, logits)
    if given.top_k:
        scores = TopKLogitsWarper(given.top_k)(None, scores)
    if given.top_p < 1:
        scores = TopPLogitsWarper(given.top_p)(None, scores)
    if given.min_p:
        scores = MinPLogitsWarper(given.min_p)(None, scores)
    number = 20_000
    uniform = torch.linspace(0, 1 - 2**-24, number)[:, None]
    request = Phase15Request([1], 1, given)
    greedy = Phase15Request([1], 1)
    for requests in ([request], [request, greedy]):
        width = width_of(requests, 50)
        settings = torch.tensor([request.sampling]).expand(number, -1)
        drawn = sample_tokens(logits.expand(number, -1), settings, uniform, width)
        share = torch.bincount(drawn, minlength=50) / number
        torch.testing.assert_close(share, scores.softmax(dim=-1)[0], atol=2 / number, rtol=0)
    assert width_of([greedy], 50) is None


def test_greedy_lanes_beside_sampled_ones_stay_greedy(model, way):
    asks = [asked(model, PROMPTS[4], 9), asked(model, PROMPTS[4], 9, do_sample=True, top_k=0)]
    asks += [asked(model, PROMPTS[4], 9, do_sample=True, top_p=0.5, top_k=0)]
    answer(Phase15Lanes(model, 3), *asks)
    assert asks[0].generated_tokens == alone(model, PROMPTS[4])
    assert len({tuple(ask.generated_tokens) for ask in asks}) == 3


@pytest.mark.parametrize("sampling", [{"top_k": 0}, {"top_k": 7, "top_p": 0.9}])
def test_a_seed_gives_the_same_tokens_whatever_the_neighbours(model, way, sampling):
    def ask(seed: int) -> Phase15Request:
        return asked(model, PROMPTS[2], 3 * CHUNK, do_sample=True, seed=seed, **sampling)

    (expected,) = answer(Phase15Lanes(model, 1), ask(7))
    (other,) = answer(Phase15Lanes(model, 1), ask(8))
    lanes = Phase15Lanes(model, 3)
    lanes.submit(asked(model, PROMPTS[3], 2 * CHUNK, do_sample=True, top_p=0.4))
    lanes.submit(asked(model, PROMPTS[5], CHUNK))
    lanes.advance()
    again, others = answer(lanes, ask(7), ask(8))
    assert again == expected and others == other != expected


def test_log_probabilities_are_those_of_forward(model, way):
    request = asked(model, PROMPTS[4], 2 * CHUNK + 1, num_logprobs=4, do_sample=True, top_k=0, seed=1)
    answer(Phase15Lanes(model, 2), request, asked(model, PROMPTS[0]))
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
    lengths, read = [], Phase15ForCausalLM.read

    def reading(self, soft_prompt, ids, length, *args):
        lengths.extend(length.tolist())
        return read(self, soft_prompt, ids, length, *args)

    monkeypatch.setattr(Phase15ForCausalLM, "read", reading)
    return lengths


def test_a_next_turn_reads_what_is_new_and_says_the_same(model, way, reads):
    lanes, ids = Phase15Lanes(model, 2, max_kept_conversations=5), random_ids(3 * QUERY + 2).tolist()
    for turn in range(20):
        expected = alone(model, ids, 2 * CHUNK)
        reads.clear()
        request = asked(model, ids, 2 * CHUNK)
        assert answer(lanes, request) == [expected]
        assert sum(reads) == len(ids) - request.num_kept_tokens
        if turn:  # what was said since, and what did not fill a segment
            assert sum(reads) <= 2 * CHUNK + 3 + QUERY
        ids = ids + request.generated_tokens + random_ids(3, seed=turn).tolist()
        assert len(lanes.kept.states) == 1
    assert len(ids) > 200


def test_an_edited_conversation_is_read_afresh(model, way, reads):
    lanes, ids = Phase15Lanes(model, 2, max_kept_conversations=5), random_ids(3 * QUERY + 2).tolist()
    answer(lanes, asked(model, ids))
    edited = [ids[0] - 1 if ids[0] > 3 else 4, *ids[1:], 5]
    expected = alone(model, edited)
    reads.clear()
    assert answer(lanes, asked(model, edited)) == [expected]
    assert sum(reads) == len(edited)
    late = [*ids[: 2 * QUERY + 3], *edited[2 * QUERY + 2 :]]
    assert answer(lanes, asked(model, late)) == [alone(model, late)]


def test_the_least_recently_used_conversation_goes_first(model, reads):
    lanes = Phase15Lanes(model, 1, max_kept_conversations=2)
    conversations = [random_ids(QUERY + 1, seed=seed).tolist() for seed in range(3)]
    for index in (0, 1, 0, 2):  # 1 is forgotten
        answer(lanes, asked(model, conversations[index]))
    for index, kept in ((0, QUERY), (2, QUERY), (1, 0)):
        request = asked(model, conversations[index])
        assert answer(lanes, request) == [alone(model, conversations[index])]
        assert request.num_kept_tokens == kept


def test_a_query_that_is_kept_whole_is_not_read_again(model, way, reads):
    lanes, ids = Phase15Lanes(model, 1, max_kept_conversations=2), random_ids(2 * QUERY).tolist()
    expected = alone(model, ids)
    for _ in range(2):
        reads.clear()
        assert answer(lanes, asked(model, ids)) == [expected]
    assert not reads


def test_what_is_kept_holds_one_row_each(model):
    lanes = Phase15Lanes(model, 4, max_kept_conversations=9)
    answer(lanes, *[asked(model, random_ids(QUERY, seed=seed).tolist()) for seed in range(4)])
    assert len(lanes.kept.states) == 4
    for soft_prompt in lanes.kept.states.values():
        assert soft_prompt.embeds.untyped_storage().nbytes() == soft_prompt.embeds.nbytes


def test_nothing_is_kept_unless_asked(model):
    lanes = Phase15Lanes(model, 1)
    answer(lanes, asked(model, PROMPTS[4]))
    assert not lanes.kept.states and KeptConversations(0, QUERY).get(PROMPTS[4]) == (None, 0, None)


# what goes wrong


def test_damaged_weights_are_an_error_of_the_answer(model, way):
    damaged = randomise_alpha(Phase15ForCausalLM(model.config)).eval()
    damaged.llm.lm_head.weight.data[3] = math.nan
    request = asked(damaged, PROMPTS[0])
    answer(Phase15Lanes(damaged, 1), request)
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
    answer(Phase15Lanes(model, 2), bad, good)
    assert (bad.finish_reason, type(bad.error)) == ("error", KeyError)
    assert good.generated_tokens == alone(model, PROMPTS[1])


def test_abort_ends_what_waits_and_what_is_under_way(model):
    lanes, asks = Phase15Lanes(model, 1), [asked(model, PROMPTS[0], 90) for _ in range(3)]
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
    monkeypatch.setattr(lanes_phase15, "AUTOMATIC_ON", ("cpu",))
    monkeypatch.setattr(lanes_phase15.logger, "warning", warnings.append)
    monkeypatch.setattr(Phase15Decoder, "prepare", fail)
    assert answer(Phase15Lanes(model, 2), asked(model, PROMPTS[4], 9)) == [alone(model, PROMPTS[4], 9)]
    assert len(warnings) == 1 and "no C compiler was found" in warnings[0]
    with pytest.raises(RuntimeError, match="no C compiler"):
        answer(Phase15Lanes(model, 2, compile=True), asked(model, PROMPTS[4]))


def test_a_model_with_hooks_answers_by_the_librarys_calls(model):
    hook = model.hypernet.register_forward_hook(lambda *args: None)
    try:
        lanes = Phase15Lanes(model, 3)
        asks = [asked(model, prompt) for prompt in PROMPTS]
        assert answer(lanes, *asks) == [alone(model, prompt) for prompt in PROMPTS]
        with pytest.raises(ValueError, match="`compile=True` cannot be honoured with forward hooks"):
            Phase15Lanes(model, 3, compile=True)
    finally:
        hook.remove()
    assert {type(decoder) for decoder in lanes._decoders.values()} == {LibraryDecoder}


def test_less_than_one_lane_is_refused(model):
    with pytest.raises(ValueError, match="`num_lanes` is 0"):
        Phase15Lanes(model, 0)
    for number in (0, -3):
        with pytest.raises(ValueError, match=f"`num_lanes` is {number}"):
            model.generate_batch(PROMPTS, num_lanes=number)


# generate_batch


def test_generate_batch_gives_the_librarys_result(model, way):
    outputs = model.generate_batch(PROMPTS, max_new_tokens=11, num_lanes=3, do_sample=False, record_timestamps=True)
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
    first = model.generate_batch(PROMPTS[:2], config, num_lanes=2)
    torch.manual_seed(0)
    again = model.generate_batch(PROMPTS[:2], config, num_lanes=5)
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
        ([[3], []], {}, r"`inputs\[1\]` holds no token"),
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
