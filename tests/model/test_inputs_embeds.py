# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Embeddings in place of token ids, as PEFT's prompt tuning gives them."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from reference import CHUNK, QUERY, SLOTS, VOCAB, pad, random_ids
from torch.testing import assert_close

from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.compat_phase15 import CACHE_NAME


ROWS = [random_ids(length, seed=length) for length in (3 * QUERY + 2, SLOTS + 5, 9)]
CLOSE = {"atol": 1e-9, "rtol": 1e-9}
NUM_VIRTUAL = 5


@pytest.fixture
def exact(tiny):
    """The tiny model in float64."""
    return tiny.double()


def embed(model, ids):
    return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("with_state", [False, True])
def test_loss_and_logits_are_those_of_the_ids(exact, side, with_state):
    ids, mask = pad(ROWS, side)
    state = exact.read(random_ids(1, 2 * QUERY, seed=4)) if with_state else None
    lengths = torch.tensor([QUERY + 1, 4, 2])
    labels = ids.masked_fill(mask == 0, -100)
    expected = exact(ids, mask, labels=labels, query_lengths=lengths, state=state)
    settings = {"attention_mask": mask, "query_lengths": lengths, "state": state}
    got = exact(inputs_embeds=embed(exact, ids), labels=labels, **settings)
    assert_close(got.loss, expected.loss)
    assert_close(got.logits, expected.logits, **CLOSE)
    body = exact.model(inputs_embeds=embed(exact, ids), **settings)
    assert_close(body.last_hidden_state, expected.last_hidden_state, **CLOSE)


def test_a_cache_reads_embeddings_and_goes_on_with_ids(exact):
    ids, mask = pad(ROWS)
    expected = exact(ids, mask, use_cache=True)
    got = exact(inputs_embeds=embed(exact, ids), attention_mask=mask, use_cache=True)
    assert_close(got.logits[:, -1], expected.logits[:, -1], **CLOSE)
    answer = random_ids(3, CHUNK + 2, seed=8)
    first = exact(answer, **{CACHE_NAME: expected.past_key_values}).logits
    second = exact(inputs_embeds=embed(exact, answer), **{CACHE_NAME: got.past_key_values}).logits
    assert_close(second, first, **CLOSE)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_tokens_of_the_ids(exact, mode):
    """Only the new tokens are returned, as everywhere in transformers."""
    ids, mask = pad(ROWS)
    settings = {"attention_mask": mask, "max_new_tokens": 2 * CHUNK + 1, "pad_token_id": 0, "do_sample": False}
    settings |= MODES[mode]
    for state in (None, exact.read(random_ids(1, QUERY, seed=4))):
        torch.manual_seed(0)
        expected = exact.generate(ids, state=state, return_dict_in_generate=True, **settings)
        torch.manual_seed(0)
        got = exact.generate(inputs_embeds=embed(exact, ids), state=state, return_dict_in_generate=True, **settings)
        assert torch.equal(got.sequences, expected.sequences[:, ids.shape[1] :])
        assert_close(got.state.soft_prompt.embeds, expected.state.soft_prompt.embeds, **CLOSE)
        assert got.state.num_tokens.tolist() == expected.state.num_tokens.tolist()
        assert set(got.state.text_digests) == {None} and None not in expected.state.text_digests
        assert set(exact.read([[3]] * len(got.state), state=got.state).text_digests) == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": random_ids(1, 4)}, "cannot be given with `input_ids`"),
        ({"use_cache": False}, "cannot be given with `use_cache=False`"),
        ({"compile": True}, "`compile=True` cannot be honoured with `inputs_embeds`"),
    ],
)
def test_what_generate_cannot_do_with_embeddings(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(inputs_embeds=embed(tiny, random_ids(1, 4)), max_new_tokens=3, pad_token_id=0, **arguments)


def test_what_forward_cannot_do_with_embeddings(tiny):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="two forms of one argument"):
        tiny(ids, inputs_embeds=embed(tiny, ids))
    with pytest.raises(ValueError, match="`input_ids` must have shape"):
        tiny(inputs_embeds=ids[..., None])
    with pytest.raises(ValueError, match="are 31 wide, but the model's embeddings 32"):
        tiny(inputs_embeds=embed(tiny, ids)[..., :31])
    with pytest.raises(ValueError, match="`input_ids` must have shape .*, not None; or give `inputs_embeds`"):
        tiny()
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 3\), but `inputs_embeds` \(1, 4\)"):
        tiny(inputs_embeds=embed(tiny, ids), attention_mask=torch.ones(1, 3))
    half = tiny(inputs_embeds=embed(tiny, ids).half(), use_cache=True).logits[:, -1]
    assert_close(half, tiny(ids, use_cache=True).logits[:, -1], atol=1e-2, rtol=1e-2)
    cache = Phase15Cache(tiny.config)
    tiny(ids, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="cannot be given with a `cache`"):
        tiny.generate(inputs_embeds=embed(tiny, ROWS[0][None]), max_new_tokens=3, **{CACHE_NAME: cache})


# PEFT


CONFIGS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, encoder_hidden_size=16),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_tuned_prompt_is_the_beginning_of_the_query(tiny, kind):
    ids, mask = pad(ROWS)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : -2 * CHUNK] = -100
    tuned = get_peft_model(tiny, CONFIGS[kind])
    virtual = tuned.get_prompt(len(ids))
    embeds = torch.cat([virtual, embed(tiny, ids)], dim=1)
    long_mask = torch.cat([torch.ones(len(ids), NUM_VIRTUAL, dtype=torch.long), mask], dim=1)
    long_labels = torch.cat([torch.full((len(ids), NUM_VIRTUAL), -100), labels], dim=1)
    expected = tiny(inputs_embeds=embeds, attention_mask=long_mask, labels=long_labels).loss
    assert_close(tuned(input_ids=ids, attention_mask=mask, labels=labels).loss, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompt_tuning_trains_only_its_prompt(tiny, kind):
    torch.manual_seed(0)
    ids = random_ids(4, 3 * CHUNK, seed=2)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < CHUNK, -100)
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    tuned = get_peft_model(tiny, CONFIGS[kind])
    trainable = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    losses = []
    for _ in range(25):
        loss = tuned(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_tuned_model_generates_after_its_prompt(tiny, kind):
    ids, mask = pad(ROWS)
    tuned = get_peft_model(tiny, CONFIGS[kind]).eval()
    embeds = torch.cat([tuned.get_prompt(len(ids)), embed(tiny, ids)], dim=1)
    long_mask = torch.cat([torch.ones(len(ids), NUM_VIRTUAL, dtype=torch.long), mask], dim=1)
    settings = {"max_new_tokens": 2 * CHUNK + 1, "do_sample": False, "pad_token_id": 0}
    expected = tiny.generate(inputs_embeds=embeds, attention_mask=long_mask, **settings)
    got = tuned.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert torch.equal(got.sequences[:, ids.shape[1] :], expected)
    lengths = [NUM_VIRTUAL + len(row) + expected.shape[1] for row in ROWS]
    assert got.state.num_tokens.tolist() == lengths and set(got.state.text_digests) == {None}
    for arguments, message in (
        ({"use_cache": False}, "`use_cache=False` does not work with a tuned prompt"),
        ({"compile": True}, "`compile=True` cannot be honoured with a tuned prompt"),
        ({CACHE_NAME: got.past_key_values}, "`cache` does not work with a tuned prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.generate(input_ids=ids, attention_mask=mask, **settings, **arguments)
    again = tuned.generate(input_ids=ids, attention_mask=mask, state=got.state, **settings)
    assert again.shape == got.sequences.shape
    tiny.generate(ids, attention_mask=mask, use_cache=False, **settings)  # PEFT no longer wraps it


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_prefix_tuning_is_refused(tiny, call):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL)
    ids = random_ids(1, VOCAB // 10)
    with pytest.raises(ValueError, match="must be a Phase15Cache") as error:
        getattr(get_peft_model(tiny, config), call)(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert "\n" not in str(error.value)
