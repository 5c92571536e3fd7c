# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Generation and scoring with chunks of another length than the model was trained with."""

import copy

import pytest
import torch
from reference import BASES, CHUNK, QUERY, SLOTS, pad, random_ids, reference_carry, reference_read, reference_step
from test_decoding import fast, uncompiled  # noqa: F401
from test_generation import LONG_PROMPTS, PROMPTS, generate, reference_greedy
from transformers import AutoModelForCausalLM, GenerationConfig

from phase15.model import continuous_batching_phase15, decoding_phase15
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor
from phase15.model.decoding_phase15 import Phase15Decoder
from phase15.model.modeling_phase15 import Phase15ForCausalLM


LENGTHS = (1, 3, CHUNK + 1, QUERY + 5, SLOTS)


def answers_of_the_reference(model, chunk_length, num_tokens=45):
    answers = (
        reference_greedy(model, reference_read(model, [], prompt), num_tokens, chunk_length=chunk_length)[0]
        for prompt in LONG_PROMPTS
    )
    return torch.tensor(list(answers))


# warm start: the base's own output


@pytest.mark.parametrize("chunk_length", range(1, SLOTS + 1))
def test_warm_start_is_the_base_with_any_chunk(pair, chunk_length):
    base, model = pair
    if base.config.model_type == "mistral":  # a window of SLOTS + CHUNK
        chunk_length = min(chunk_length, CHUNK)
    room = SLOTS - len(PROMPTS[0])
    expected = generate(base, PROMPTS, max_new_tokens=room)
    assert torch.equal(generate(model, PROMPTS, max_new_tokens=room, chunk_length=chunk_length), expected)


@pytest.mark.parametrize("chunk_length", LENGTHS)
def test_warm_start_past_the_slots_is_sinks_window_and_chunk(pair, chunk_length):
    base, model = pair
    if base.config.model_type == "mistral":
        chunk_length = min(chunk_length, CHUNK)
    length = 2 * BASES["llama"].max_position_embeddings
    got = generate(model, LONG_PROMPTS, max_new_tokens=length, chunk_length=chunk_length)
    for row, prompt in zip(got, LONG_PROMPTS, strict=True):
        answer = []
        while len(answer) < length:
            full = len(answer) // chunk_length * chunk_length
            context = reference_carry([], [*prompt.tolist(), *answer[:full]])
            answer.append(int(base(torch.tensor([context + answer[full:]])).logits[0, -1].argmax()))
        assert row.tolist() == answer


def test_a_longer_chunk_leaves_more_to_see(pair):
    """Where a short chunk has dropped the query's first tokens, a long one still has them in the slots."""
    base, model = pair
    prompt = random_ids(SLOTS, seed=7)
    length = CHUNK if base.config.model_type == "mistral" else SLOTS
    expected = generate(base, [prompt], max_new_tokens=length)
    assert torch.equal(generate(model, [prompt], max_new_tokens=length, chunk_length=length), expected)
    assert not torch.equal(generate(model, [prompt], max_new_tokens=length, chunk_length=1), expected)


# trained models: the equations


@pytest.mark.parametrize("chunk_length", LENGTHS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_reference(tiny, chunk_length, use_cache):
    got = generate(tiny, LONG_PROMPTS, max_new_tokens=45, chunk_length=chunk_length, use_cache=use_cache)
    assert torch.equal(got, answers_of_the_reference(tiny, chunk_length))


def test_the_length_makes_a_difference(tiny):
    answers = [generate(tiny, LONG_PROMPTS, max_new_tokens=45, chunk_length=length).tolist() for length in LENGTHS]
    assert all(one != other for number, one in enumerate(answers) for other in answers[:number])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
def test_without_a_cache_a_config_names_the_length_too(tiny, mode, monkeypatch):
    """The library takes an argument that its own config has, and gives it to nobody."""
    settings = {"max_new_tokens": 22, **mode}
    expected = generate(tiny, LONG_PROMPTS, chunk_length=QUERY, **settings)
    given = GenerationConfig(chunk_length=QUERY, use_cache=False, pad_token_id=0, **settings)
    assert torch.equal(generate(tiny, LONG_PROMPTS, generation_config=given), expected)
    for saved, argument in ((QUERY, {}), (3, {"chunk_length": QUERY})):
        monkeypatch.setattr(tiny.generation_config, "chunk_length", saved, raising=False)
        assert torch.equal(generate(tiny, LONG_PROMPTS, use_cache=False, **argument, **settings), expected)


@pytest.mark.parametrize("mode", [{"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=str)
def test_sampling_and_beams_with_and_without_a_cache(tiny, mode):
    settings = {"max_new_tokens": 22, "chunk_length": QUERY, **mode}
    expected = generate(tiny, LONG_PROMPTS, **settings)
    assert torch.equal(generate(tiny, LONG_PROMPTS, use_cache=False, **settings), expected)


@pytest.mark.parametrize("chunk_length", LENGTHS)
def test_the_fast_path_gives_the_same_tokens(tiny, fast, chunk_length):  # noqa: F811
    settings = {"max_new_tokens": 45, "chunk_length": chunk_length}
    expected = answers_of_the_reference(tiny, chunk_length)
    assert torch.equal(generate(tiny, LONG_PROMPTS, compile=True, **settings), expected)
    assert torch.equal(generate(tiny, LONG_PROMPTS, compile=False, **settings), expected)


def test_each_length_has_buffers_of_its_own(tiny, fast):  # noqa: F811
    for chunk_length in (3, SLOTS, 3):
        got = generate(tiny, LONG_PROMPTS, max_new_tokens=45, chunk_length=chunk_length, compile=True)
        assert torch.equal(got, answers_of_the_reference(tiny, chunk_length))


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("chunk_length", LENGTHS)
def test_continuous_batching_gives_the_same_tokens(tiny, chunk_length, is_static, monkeypatch):
    if not is_static:
        monkeypatch.setattr(continuous_batching_phase15, "unsupported_model", lambda model: "forward hooks")
    prompts = [prompt.tolist() for prompt in LONG_PROMPTS]
    settings = {"max_new_tokens": 45, "do_sample": False, "max_batch_size": 2}
    outputs = tiny.generate_batch(prompts, chunk_length=chunk_length, **settings)
    answers = torch.tensor([output.generated_tokens for output in outputs.values()])
    assert torch.equal(answers, answers_of_the_reference(tiny, chunk_length))


@pytest.mark.parametrize("chunk_length", LENGTHS)
def test_forward_is_that_of_a_model_with_this_length(tiny, tmp_path, chunk_length):
    tiny.save_pretrained(tmp_path)
    other = Phase15ForCausalLM.from_pretrained(tmp_path, chunk_length=chunk_length)
    ids, mask = pad([torch.cat([prompt, random_ids(20, seed=9)]) for prompt in LONG_PROMPTS])
    labels = ids.clone()
    labels[:, :-20] = -100
    got = tiny(ids, attention_mask=mask, labels=labels, chunk_length=chunk_length)
    expected = other(ids, attention_mask=mask, labels=labels)
    for name in ("loss", "logits", "soft_prompt", "chunk_losses", "chunk_tokens"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=name)
    cache = Phase15Cache(tiny.config, chunk_length)
    query_lengths = mask.sum(dim=1) - 20
    logits = tiny(ids, attention_mask=mask, query_lengths=query_lengths, cache=cache).logits
    torch.testing.assert_close(logits[:, -20:], expected.logits[:, -20:], atol=1e-4, rtol=1e-4)
    assert tiny(ids, use_cache=True, chunk_length=chunk_length).cache.chunk_length == chunk_length


@pytest.fixture
def ending(tiny, monkeypatch) -> tuple[torch.LongTensor, dict, list[int], list[str]]:
    """A prompt, settings with which its answer ends inside a long chunk, the answer, and the steps that run for it."""
    for module in (decoding_phase15, continuous_batching_phase15):
        monkeypatch.setattr(module, "SYNC_INTERVAL", 4)
    for seed in range(99):
        prompt = random_ids(9, seed=seed)
        free = generate(tiny, [prompt], max_new_tokens=SLOTS, chunk_length=SLOTS)[0].tolist()
        ends = [number for number, token in enumerate(free) if 4 < number < SLOTS - 8 and token not in free[:number]]
        if ends:
            break
    ran, run = [], Phase15Decoder.run
    monkeypatch.setattr(Phase15Decoder, "run", lambda self, *args: ran.append(args[0]) or run(self, *args))
    settings = {"max_new_tokens": SLOTS, "chunk_length": SLOTS, "eos_token_id": free[ends[0]], "do_sample": False}
    return prompt, settings, free[: ends[0] + 1], ran


def test_a_short_answer_does_not_cost_a_long_chunk(tiny, fast, ending):  # noqa: F811
    """The host checks every N tokens whether all rows have ended."""
    prompt, settings, expected, ran = ending
    assert generate(tiny, [prompt], compile=True, **settings)[0].tolist() == expected
    assert len(expected) <= len(ran) < len(expected) + 4


def test_nor_does_it_in_continuous_batching(tiny, ending):
    prompt, settings, expected, ran = ending
    outputs = tiny.generate_batch([prompt.tolist()], max_batch_size=1, **settings)
    assert outputs["req_0"].generated_tokens == expected
    assert len(expected) <= len(ran) < len(expected) + 4


# where the length comes from


def test_the_argument_then_the_given_config_then_the_models(tiny, monkeypatch):
    answers = {length: answers_of_the_reference(tiny, length) for length in (CHUNK, *LENGTHS)}

    def said(**kwargs) -> int:
        got = generate(tiny, LONG_PROMPTS, max_new_tokens=45, **kwargs)
        return next(length for length, answer in answers.items() if torch.equal(answer, got))

    given = GenerationConfig(chunk_length=3, max_new_tokens=45, pad_token_id=0)
    assert said() == CHUNK
    assert said(generation_config=given) == 3
    monkeypatch.setattr(tiny.generation_config, "chunk_length", QUERY + 5, raising=False)
    assert said() == QUERY + 5
    assert said(generation_config=given) == 3
    assert said(generation_config=given, chunk_length=1) == 1
    assert said(past_key_values=Phase15Cache(tiny.config, 1), chunk_length=SLOTS) == SLOTS
    assert tiny.generation_chunk_length == tiny.spoken_chunk_length == QUERY + 5
    assert Phase15ContinuousBatchProcessor(tiny).chunk_length == QUERY + 5
    assert Phase15ContinuousBatchProcessor(tiny, chunk_length=1).chunk_length == 1
    for arguments, length in (((), QUERY + 5), ((given,), 3), ((given, None, None, 1, None, 0, 1), 1)):
        assert tiny.init_continuous_batching(*arguments).processor.chunk_length == length
    outputs = tiny.generate_batch([LONG_PROMPTS[0].tolist()], given, max_batch_size=1)
    assert outputs["req_0"].generated_tokens == answers[3][0].tolist()


def test_a_cache_keeps_its_length_unless_another_is_asked_for(tiny):
    cache = Phase15Cache(tiny.config, QUERY + 5)
    got = generate(tiny, LONG_PROMPTS, max_new_tokens=45, past_key_values=cache)
    assert torch.equal(got, answers_of_the_reference(tiny, QUERY + 5))


def test_a_saved_choice_is_loaded_and_training_keeps_its_own(tiny, tmp_path):
    tiny = copy.deepcopy(tiny)
    tiny.generation_config.chunk_length = SLOTS
    tiny.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.generation_config.chunk_length == SLOTS and loaded.config.chunk_length == CHUNK
    got = generate(loaded, LONG_PROMPTS, max_new_tokens=45)
    assert torch.equal(got, answers_of_the_reference(tiny, SLOTS))


def test_saving_leaves_the_settings_to_who_holds_them(tiny, tmp_path):
    tiny = copy.deepcopy(tiny)
    held = tiny.generation_config
    tiny.save_pretrained(tmp_path)
    assert tiny.generation_config is held


@pytest.mark.parametrize("length", [0, -1, "64", 2.0])
def test_a_length_that_no_model_can_have_is_refused_at_loading(tiny, tmp_path, length):
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`chunk_length` is {length!r}, but it must be a positive integer"):
        Phase15ForCausalLM.from_pretrained(tmp_path, chunk_length=length)


def test_a_config_that_outgrows_its_model_is_refused(tiny):
    tiny = copy.deepcopy(tiny)
    most = tiny.config.max_chunk_length
    tiny.config.chunk_length = most + 1
    with pytest.raises(ValueError, match=f"A step reads {most} tokens at most, not {most + 1}"):
        generate(tiny, PROMPTS, max_new_tokens=2 * most + 2)


def test_nothing_is_saved_unless_chosen(tiny, tmp_path):
    generate(tiny, PROMPTS, max_new_tokens=3, chunk_length=SLOTS)
    tiny.save_pretrained(tmp_path)
    assert "chunk_length" not in (tmp_path / "generation_config.json").read_text()


# it may change in a conversation


@pytest.mark.parametrize("lengths", [(CHUNK, SLOTS), (SLOTS, CHUNK)], ids=str)
def test_the_next_turn_may_have_another_length(tiny, lengths):
    prompt, message = LONG_PROMPTS[0], random_ids(5, seed=8)
    first = generate(
        tiny, [prompt], max_new_tokens=11, chunk_length=lengths[0], return_dict_in_generate=True, do_sample=False
    )
    conversation = torch.cat([first.sequences, message[None]], dim=1)
    got = tiny.generate(
        conversation,
        attention_mask=torch.ones_like(conversation),
        past_key_values=first.past_key_values,
        max_new_tokens=30,
        chunk_length=lengths[1],
        pad_token_id=0,
    )
    slots = reference_read(tiny, [], prompt)
    _, slots, chunk = reference_greedy(tiny, slots, 11, chunk_length=lengths[0])
    slots = reference_step(tiny, slots, chunk[:-1])
    slots = reference_read(tiny, slots, torch.cat([chunk[-1:], message]))
    expected, _, _ = reference_greedy(tiny, slots, 30, chunk_length=lengths[1])
    assert got[0, conversation.shape[1] :].tolist() == expected


def test_an_open_chunk_that_is_too_long_ends_with_its_next_token(tiny):
    """The answer is continued with a shorter chunk than the open one."""
    first = generate(tiny, [PROMPTS[0]], max_new_tokens=11, chunk_length=SLOTS, return_dict_in_generate=True)
    got = tiny.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=20,
        chunk_length=3,
        pad_token_id=0,
    )
    _, slots, chunk = reference_greedy(tiny, reference_read(tiny, [], PROMPTS[0]), 11, chunk_length=SLOTS)
    expected, _, _ = reference_greedy(tiny, slots, 20, chunk=chunk, chunk_length=3)
    assert got[0, first.sequences.shape[1] :].tolist() == expected


# what is refused


@pytest.mark.parametrize("length", [0, -1, SLOTS + 1, 2.0, "4", True], ids=repr)
def test_lengths_that_cannot_work_are_refused(tiny, length, monkeypatch):
    message = f"`chunk_length` is {length!r}, but it must be an integer from 1 to {SLOTS}: the HyperNetwork"
    prompt = PROMPTS[0].tolist()
    with pytest.raises(ValueError, match=message):
        generate(tiny, PROMPTS, max_new_tokens=3, chunk_length=length)
    with pytest.raises(ValueError, match=message):
        tiny(PROMPTS[0][None], chunk_length=length)
    with pytest.raises(ValueError, match=message):
        tiny.generate_batch([prompt], max_new_tokens=3, chunk_length=length)
    monkeypatch.setattr(tiny.generation_config, "chunk_length", length, raising=False)
    with pytest.raises(ValueError, match=message):
        generate(tiny, PROMPTS, max_new_tokens=3)


def test_a_chunk_beyond_the_sliding_window_is_refused(bases):
    from reference import SIZES

    model = Phase15ForCausalLM.from_base(bases["mistral"], **SIZES)
    generate(model, PROMPTS, max_new_tokens=3, chunk_length=CHUNK)
    with pytest.raises(ValueError, match=f"from 1 to {CHUNK}: the LLM's sliding window of {SLOTS + CHUNK}"):
        generate(model, PROMPTS, max_new_tokens=3, chunk_length=CHUNK + 1)


def test_a_length_that_is_not_the_caches_is_refused(tiny):
    cache = Phase15Cache(tiny.config)
    with pytest.raises(ValueError, match=f"`chunk_length` is 3, but the cache's is {CHUNK}"):
        tiny(PROMPTS[0][None], cache=cache, chunk_length=3)
    assert cache.seen_tokens == 0
    with pytest.raises(ValueError, match="`chunk_length` is 1000"):
        Phase15Cache(tiny.config, 1000)


def test_a_request_with_another_length_than_its_batch_is_refused(tiny):
    manager = tiny.init_continuous_batching(max_batch_size=1, chunk_length=3)
    processor, prompt = manager.processor, PROMPTS[0].tolist()
    processor.submit(processor.request(prompt, max_new_tokens=5, chunk_length=3))
    for settings in ({"chunk_length": 4}, {"generation_config": GenerationConfig(chunk_length=4)}):
        with pytest.raises(ValueError, match="`chunk_length` is 4, but this batch decodes chunks of 3"):
            processor.submit(processor.request(prompt, **settings))
    assert len(processor.waiting) == 1
    with pytest.raises(ValueError, match="`chunk_length` is 4"):
        manager.submit([processor.request(prompt), processor.request(prompt, chunk_length=4)])  # all or none
    with pytest.raises(ValueError, match="`chunk_length` is 4"):
        manager.add_request(prompt, chunk_length=4)
    assert len(processor.waiting) == 1


def test_the_argument_of_generate_batch_comes_before_its_config(tiny):
    prompts = [prompt.tolist() for prompt in LONG_PROMPTS]
    given = GenerationConfig(chunk_length=3, max_new_tokens=45)
    outputs = tiny.generate_batch(prompts, given, chunk_length=SLOTS)
    answers = torch.tensor([output.generated_tokens for output in outputs.values()])
    assert torch.equal(answers, answers_of_the_reference(tiny, SLOTS))
