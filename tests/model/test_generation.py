# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
import copy
import io

import pytest
import torch
from reference import (
    BASES,
    CHUNK,
    QUERY,
    SLOTS,
    VOCAB,
    pad,
    random_ids,
    reference_carry,
    reference_predict,
    reference_read,
    reference_step,
)
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, TextStreamer
from transformers.generation.streamers import BaseStreamer

from phase15.model.cache_phase15 import Phase15Cache


MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sample-3": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 4},
    "beam-3-of-5": {"num_beams": 5, "num_return_sequences": 3, "length_penalty": 0.3},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "processors": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 10]]},
}
PROMPTS = [random_ids(8, seed=1), random_ids(3, seed=2), random_ids(1, seed=3)]
LONG_PROMPTS = [random_ids(31, seed=4), random_ids(QUERY, seed=5), random_ids(QUERY + 1, seed=6)]


def generate(model, prompts, *, seed=0, **kwargs):
    """The library's `generate` on a left-padded batch; only the new tokens, unless a dict was asked for."""
    input_ids, attention_mask = pad(prompts)
    torch.manual_seed(seed)
    output = model.generate(input_ids, attention_mask=attention_mask, **{"pad_token_id": 0, **kwargs})
    return output if kwargs.get("return_dict_in_generate") else output[:, input_ids.shape[1] :]


def reference_greedy(model, slots, num_tokens, chunk=None, chunk_length=None):
    """
    Greedy answer from a soft prompt and an open chunk on, whole chunks being read; returns the tokens and the state
    after them.
    """
    chunk_length = chunk_length or model.config.chunk_length
    answer, chunk = [], torch.tensor([], dtype=torch.long) if chunk is None else chunk
    for _ in range(num_tokens):
        if len(chunk) >= chunk_length:
            slots, chunk = reference_step(model, slots, chunk), chunk[:0]
        chunk = torch.cat([chunk, reference_predict(model, slots, chunk)[-1:].argmax(dim=-1)])
        answer.append(int(chunk[-1]))
    return answer, slots, chunk


def reference_turn(model, slots, chunk, message, num_tokens):
    """As `reference_greedy`, after a message that follows an answer: what was answered last is read with it."""
    if len(chunk) > 1:
        slots = reference_step(model, slots, chunk[:-1])
    slots = reference_read(model, slots, torch.cat([chunk[-1:], message]))
    return reference_greedy(model, slots, num_tokens)


# warm start: the base's own output


@pytest.mark.parametrize("mode", MODES)
def test_warm_start_generates_what_the_base_generates(pair, mode):
    base, model = pair
    room = SLOTS - len(PROMPTS[0])  # more than three chunks
    assert torch.equal(
        generate(model, PROMPTS, max_new_tokens=room, **MODES[mode]),
        generate(base, PROMPTS, max_new_tokens=room, **MODES[mode]),
    )


def test_warm_start_gives_the_bases_scores(pair):
    base, model = pair
    settings = {"max_new_tokens": 12, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    outputs, expected = generate(model, PROMPTS, **settings), generate(base, PROMPTS, **settings)
    assert torch.equal(outputs.sequences, expected.sequences)
    torch.testing.assert_close(outputs.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.scores[0], expected.scores[0], atol=1e-4, rtol=1e-4)
    assert isinstance(outputs.past_key_values, Phase15Cache)


def test_warm_start_is_the_base_far_past_its_position_limit(pair):
    base, model = pair
    length = 3 * BASES["llama"].max_position_embeddings
    got = generate(model, LONG_PROMPTS, max_new_tokens=length)
    for row, prompt in zip(got, LONG_PROMPTS, strict=True):
        answer = []
        while len(answer) < length:
            full = len(answer) // CHUNK * CHUNK
            context = reference_carry([], [*prompt.tolist(), *answer[:full]])
            answer.append(int(base(torch.tensor([context + answer[full:]])).logits[0, -1].argmax()))
        assert row.tolist() == answer


# trained models: the equations, and the same tokens with and without a cache


def test_greedy_equals_the_reference(tiny):
    got = generate(tiny, LONG_PROMPTS, max_new_tokens=45)
    assert len(set(got.flatten().tolist())) > 10  # not a loop of a few tokens, which would hide errors
    for row, prompt in zip(got, LONG_PROMPTS, strict=True):
        answer, _, _ = reference_greedy(tiny, reference_read(tiny, [], prompt), 45)
        assert row.tolist() == answer


@pytest.mark.parametrize("mode", MODES)
def test_without_a_cache_the_tokens_are_the_same(tiny, mode):
    expected = generate(tiny, LONG_PROMPTS, max_new_tokens=22, **MODES[mode])
    assert torch.equal(generate(tiny, LONG_PROMPTS, max_new_tokens=22, use_cache=False, **MODES[mode]), expected)


def test_without_a_cache_no_cache_is_made(tiny):
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True}
    assert generate(tiny, PROMPTS, use_cache=False, **settings).past_key_values is None
    config = GenerationConfig(use_cache=False, max_new_tokens=6, return_dict_in_generate=True, pad_token_id=0)
    input_ids, attention_mask = pad(PROMPTS)
    output = tiny.generate(input_ids, config, attention_mask=attention_mask)
    assert output.past_key_values is None
    assert torch.equal(output.sequences, generate(tiny, PROMPTS, **settings).sequences)


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_left_padded_batch_equals_single_rows(tiny, mode):
    batch = generate(tiny, LONG_PROMPTS, max_new_tokens=22, **MODES[mode])
    for row, prompt in zip(batch, LONG_PROMPTS, strict=True):
        assert torch.equal(row, generate(tiny, [prompt], max_new_tokens=22, **MODES[mode])[0])


def test_a_row_that_ends_early_leaves_the_others_alone(tiny):
    free = generate(tiny, LONG_PROMPTS, max_new_tokens=22)
    end = int(free[0, 5])
    got = generate(tiny, LONG_PROMPTS, max_new_tokens=22, eos_token_id=end)
    for row, expected in zip(got.tolist(), free.tolist(), strict=True):
        stop = expected.index(end) + 1 if end in expected else len(expected)
        assert row == (expected[:stop] + [0] * 22)[: len(row)]
    assert (got[0, 6:] == 0).all() and (got[:, -1] != 0).any()


def test_calls_do_not_influence_each_other(tiny):
    expected = generate(tiny, LONG_PROMPTS, max_new_tokens=10)
    generate(tiny, PROMPTS, max_new_tokens=7, num_beams=2)
    assert torch.equal(generate(tiny, LONG_PROMPTS, max_new_tokens=10), expected)


# the library's arguments


def test_max_length_counts_the_prompt(tiny):
    assert generate(tiny, LONG_PROMPTS, max_length=31 + 9).shape == (3, 9)
    config = GenerationConfig(max_new_tokens=9, pad_token_id=0)
    input_ids, attention_mask = pad(LONG_PROMPTS)
    by_keywords = tiny.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    assert torch.equal(by_keywords[:, 31:], generate(tiny, LONG_PROMPTS, max_new_tokens=9))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_starts_from_a_bos_token_when_given_nothing(tiny, use_cache):
    expected = generate(tiny, [torch.tensor([1])], max_new_tokens=9)
    assert torch.equal(tiny.generate(max_new_tokens=9, pad_token_id=0, use_cache=use_cache)[:, 1:], expected)


def test_token_streamer(tiny):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collector()
    answer = generate(tiny, [PROMPTS[0]], max_new_tokens=11, streamer=streamer)
    assert streamer.tokens == PROMPTS[0].tolist() + answer[0].tolist() and streamer.ended


def test_text_streamer(tiny, tokenizer, capsys):
    answer = generate(tiny, [PROMPTS[0]], max_new_tokens=11, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(answer[0])


@pytest.mark.parametrize("start", [1, CHUNK - 1, CHUNK])  # inside a chunk, across its end, at its end
def test_stop_strings(tiny, tokenizer, start):
    free = generate(tiny, [PROMPTS[0]], max_new_tokens=16)[0]
    text = tokenizer.decode(free)
    stop = text[start : start + 2]
    got = generate(tiny, [PROMPTS[0]], max_new_tokens=16, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert tokenizer.decode(got) == text[: text.index(stop) + 2]


def test_a_custom_logits_processor_sees_every_token(tiny):
    class Only(LogitsProcessor):
        """Allows, at each position, one token alone."""

        def __call__(self, input_ids, scores):
            allowed = torch.full_like(scores, -float("inf"))
            allowed[:, (input_ids.shape[1] * 7) % VOCAB] = 0
            assert scores.shape == (3, VOCAB) and scores.any()
            return allowed

    got = generate(tiny, PROMPTS, max_new_tokens=14, logits_processor=[Only()])
    assert got[0].tolist() == [((8 + index) * 7) % VOCAB for index in range(14)] and (got == got[:1]).all()


def test_return_dict_has_logits_and_hidden_states(tiny):
    settings = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    outputs = generate(tiny, PROMPTS, max_new_tokens=10, **settings)
    assert len(outputs.logits) == len(outputs.hidden_states) == 10
    assert torch.equal(torch.stack(outputs.logits, dim=1).argmax(dim=-1), outputs.sequences[:, 8:])


# the cache


def test_memory_is_flat_however_long_the_answer(tiny):
    def size(num_tokens):  # of everything that can be reached from the cache, whole storages of views included
        output = generate(tiny, LONG_PROMPTS, max_new_tokens=num_tokens, return_dict_in_generate=True)
        assert output.past_key_values.get_seq_length() == 31 + num_tokens - 1
        file = io.BytesIO()
        torch.save(output.past_key_values, file)
        return file.tell()

    few, many = size(3 + 8 * CHUNK), size(3 + 70 * CHUNK)  # at the same position of a chunk
    assert many == pytest.approx(few, abs=100)  # one number of one token is 4 bytes, one vector 128


@pytest.mark.parametrize("lengths", [(1, 1), (CHUNK, 6), (CHUNK + 1, 2 * CHUNK + 1), (6, 11)])
def test_a_returned_cache_continues_the_conversation(tiny, lengths):
    """
    Three messages, the later ones of different lengths in each row. The last token of an answer was not read when the
    call returned, so it opens the next message; the message closes the open chunk.
    """
    messages = [LONG_PROMPTS, PROMPTS, [random_ids(4, seed=7), random_ids(9, seed=8), random_ids(2, seed=9)]]
    sequences, mask = torch.empty(3, 0, dtype=torch.long), torch.empty(3, 0, dtype=torch.long)
    cache, states = None, [([], torch.tensor([], dtype=torch.long))] * 3  # slots, tokens of the open chunk
    for message, length in zip(messages, [*lengths, 5], strict=True):
        ids, new_mask = pad(message)
        sequences, mask = torch.cat([sequences, ids], dim=1), torch.cat([mask, new_mask], dim=1)
        output = tiny.generate(
            sequences,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=length,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        answers = output.sequences[:, sequences.shape[1] :]
        for row, (slots, chunk) in enumerate(states):
            answer, slots, chunk = reference_turn(tiny, slots, chunk, message[row], length)
            states[row] = (slots, chunk)
            assert answers[row].tolist() == answer
        sequences, cache = output.sequences, output.past_key_values
        mask = torch.cat([mask, torch.ones_like(answers)], dim=1)


def test_a_returned_cache_continues_the_answer(tiny):
    """Nothing new was said, so the one unread token is the answer's."""
    expected = generate(tiny, LONG_PROMPTS, max_new_tokens=20)
    for length in (1, CHUNK, CHUNK + 1, 7):
        output = generate(tiny, LONG_PROMPTS, max_new_tokens=length, return_dict_in_generate=True)
        mask = torch.cat([pad(LONG_PROMPTS)[1], torch.ones(3, length, dtype=torch.long)], dim=1)
        rest = tiny.generate(
            output.sequences,
            attention_mask=mask,
            past_key_values=output.past_key_values,
            max_new_tokens=20 - length,
            pad_token_id=0,
        )
        assert torch.equal(rest[:, 31:], expected)


def test_a_repeated_cache_continues_the_conversation_twice(tiny):
    first = generate(tiny, [PROMPTS[0]], max_new_tokens=6, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences, PROMPTS[1][None]], dim=1)
    cache = first.past_key_values
    cache.batch_repeat_interleave(2)
    both = conversation.repeat(2, 1)
    got = tiny.generate(
        both, attention_mask=torch.ones_like(both), past_key_values=cache, max_new_tokens=6, pad_token_id=0
    )
    slots = reference_read(tiny, [], PROMPTS[0])
    answer, slots, chunk = reference_greedy(tiny, slots, 6)
    slots = reference_read(tiny, reference_step(tiny, slots, chunk[:-1]), torch.cat([chunk[-1:], PROMPTS[1]]))
    assert got[:, conversation.shape[1] :].tolist() == [reference_greedy(tiny, slots, 6)[0]] * 2


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_a_returned_cache_is_widened(tiny, settings):
    """As the prompts are. After a step alone the answers are those without a cache of before."""
    first = generate(tiny, PROMPTS[:1], max_new_tokens=1, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences, PROMPTS[1][None]], dim=1)
    whole = {"attention_mask": torch.ones_like(conversation), "max_new_tokens": 6, "pad_token_id": 0, **settings}
    expected = []
    for cache in (first.past_key_values, None):
        torch.manual_seed(0)
        expected.append(tiny.generate(conversation, past_key_values=copy.deepcopy(cache), **whole))
    assert expected[0].shape == expected[1].shape and torch.equal(expected[0][0, :-6], conversation[0])
    cache = first.past_key_values
    cache.batch_repeat_interleave(5)
    with pytest.raises(ValueError, match="the cache has 5 rows, but `inputs` has 1, each repeated"):
        tiny.generate(conversation, past_key_values=cache, **whole)


# what cannot be honoured


@pytest.mark.parametrize("through", ["keyword", "argument", "model"])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("prompt_lookup_num_tokens", 3, "assisted decoding"),
        ("assistant_early_exit", 1, "assisted decoding"),
        ("penalty_alpha", 0.6, "contrastive search"),
        ("cache_implementation", "paged", "paged"),
        ("cache_implementation", "static", "other caches"),
        ("prefill_chunk_size", 4, "chunked prefill"),
    ],
)
def test_generation_modes_that_are_refused(tiny, name, value, message, through):
    kwargs = {"attention_mask": torch.ones(1, 8, dtype=torch.long), "pad_token_id": 0, "max_new_tokens": 4}
    if through == "keyword":
        kwargs[name] = value
    elif through == "argument":
        kwargs["generation_config"] = GenerationConfig(**{name: value})
    else:
        setattr(tiny.generation_config, name, value)
    with pytest.raises(ValueError, match=f"Phase15 does not support .*{message}.*`{name}`"):
        tiny.generate(PROMPTS[0][None], **kwargs)


def test_assisted_decoding_is_refused(tiny, pair):
    with pytest.raises(ValueError, match="Phase15 does not support assisted decoding"):
        generate(tiny, [PROMPTS[0]], max_new_tokens=4, assistant_model=pair[0])


def test_a_foreign_cache_is_refused(tiny):
    with pytest.raises(ValueError, match="`cache`.* DynamicCache"):
        generate(tiny, [PROMPTS[0]], max_new_tokens=4, past_key_values=DynamicCache())


def test_a_conversation_must_be_given_whole(tiny):
    output = generate(tiny, [PROMPTS[0]], max_new_tokens=6, return_dict_in_generate=True)
    for columns in (3, 8 + 5):
        with pytest.raises(ValueError, match="the cache has already seen 13; give the whole conversation"):
            generate(tiny, [output.sequences[0, :columns]], past_key_values=output.past_key_values)


def test_a_prompt_without_a_token_is_refused(tiny):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="Row 1 has 0 tokens"):
        tiny.generate(random_ids(2, 3), attention_mask=mask, pad_token_id=0, max_new_tokens=3)


@pytest.mark.parametrize("compile", [None, True])
def test_a_row_that_ends_in_padding_is_refused(tiny, compile):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="Row 1 of `attention_mask` ends in padding"):
        tiny.generate(random_ids(2, 3), attention_mask=mask, pad_token_id=0, max_new_tokens=3, compile=compile)


def test_the_library_itself_refuses_to_roll_the_model_back(tiny):
    """`generate` refuses before; tools that ask the class, as transformers' own tests do, are told the same."""
    with pytest.raises(ValueError, match="stateful"):
        GenerationMixin.generate(tiny, PROMPTS[0][None], max_new_tokens=4, prompt_lookup_num_tokens=2)
