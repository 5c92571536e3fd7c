# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A state that has read texts: equal to one call on the whole, kept in a file, refused where it does not belong."""

import copy
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    CHUNK,
    QUERY,
    SIZES,
    SLOTS,
    VOCAB,
    pad,
    random_ids,
    randomise_alpha,
    reference_read,
    reference_step,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from phase15 import Phase15State
from phase15.evaluation.losses import no_delta
from phase15.model import decoding_phase15
from phase15.model.base_phase15 import weights_digest
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.state_phase15 import STATE_FILE, encode_turn, write_bytes


DOCUMENT = random_ids(1, 4 * QUERY, seed=5)
QUESTION = random_ids(1, 5, seed=6)
WHOLE = torch.cat([DOCUMENT, QUESTION], dim=1)
MODES = {
    "greedy": {},
    "compiled": {"compile": True},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling of several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams of several": {"num_beams": 4, "num_return_sequences": 2},
    "sampling beams": {"num_beams": 3, "do_sample": True},
    "longer chunks": {"chunk_length": 2 * CHUNK},
    "without a cache": {"use_cache": False},
}


@pytest.fixture
def exact(tiny):
    """The tiny model in float64."""
    return tiny.double()


def generate(model, input_ids, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 3 * CHUNK + 2, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(input_ids, **settings)


def answers(sequences, prompt):
    return sequences[:, prompt.shape[1] :].tolist()


def naive(model, *texts: torch.Tensor) -> torch.Tensor:
    """The slots after some texts, by the reference: one row, one vector at a time."""
    slots = []
    for text in texts:
        slots = reference_read(model, slots, text)
    return torch.stack(slots)


def used(state: Phase15State, row: int = 0) -> torch.Tensor:
    return state.soft_prompt.embeds[row, : state.soft_prompt.length[row]]


# reading


def test_a_state_is_what_the_reference_reads(tiny):
    state = tiny.read(DOCUMENT)
    assert_close(used(state), naive(tiny, DOCUMENT[0]), atol=1e-4, rtol=1e-4)
    assert state.num_tokens.tolist() == [DOCUMENT.shape[1]] and state.soft_prompt.length.tolist() == [SLOTS]
    assert not state.soft_prompt.embeds.requires_grad


@pytest.mark.parametrize("split", [QUERY, 2 * QUERY, 3 * QUERY])
def test_reading_on_from_a_segment_boundary_is_reading_at_once(tiny, split):
    first = tiny.read(DOCUMENT[:, :split])
    before = first.soft_prompt.embeds.clone()
    second = tiny.read(DOCUMENT[:, split:], state=first)
    whole = tiny.read(DOCUMENT)
    assert torch.equal(second.soft_prompt.embeds, whole.soft_prompt.embeds)
    assert second.num_tokens.tolist() == whole.num_tokens.tolist() and second.text_digests == whole.text_digests
    assert torch.equal(first.soft_prompt.embeds, before) and first.num_tokens.tolist() == [split]


def test_at_another_boundary_only_the_digest_of_the_text_is_the_same(tiny):
    other = tiny.read(DOCUMENT[:, QUERY + 1 :], state=tiny.read(DOCUMENT[:, : QUERY + 1]))
    whole = tiny.read(DOCUMENT)
    assert other.text_digests == whole.text_digests
    assert not torch.allclose(other.soft_prompt.embeds, whole.soft_prompt.embeds, atol=1e-3)
    with no_delta(tiny):  # the window alone does not depend on segments
        other = tiny.read(DOCUMENT[:, QUERY + 1 :], state=tiny.read(DOCUMENT[:, : QUERY + 1]))
        assert torch.equal(other.soft_prompt.embeds, tiny.read(DOCUMENT).soft_prompt.embeds)


def test_rows_of_a_batch_are_read_as_by_themselves(tiny):
    texts = [random_ids(length, seed=length) for length in (3, QUERY, 3 * QUERY + 2)]
    ids, mask = pad(texts)
    ragged = [text.tolist() for text in texts]
    for state in (tiny.read(ids, mask), tiny.read(*pad(texts, "right")), tiny.read(ragged)):
        assert state.num_tokens.tolist() == [len(text) for text in texts]
        for row, text in enumerate(texts):
            alone = tiny.read(text)
            assert_close(used(state, row), used(alone), atol=1e-5, rtol=1e-4)
            assert state.text_digests[row] == alone.text_digests[0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "Row 0 has 0 tokens"),
        ([[1, 2], []], "Row 1 has 0 tokens"),
        ([1, VOCAB], f"holds {VOCAB} at position 1"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "must have shape"),
    ],
)
def test_texts_that_cannot_be_read(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        tiny.read(ids)


def test_a_long_text_shows_a_bar_and_a_short_one_does_not(tiny, capfd):
    transformers_logging.enable_progress_bar()  # an earlier test in this process may have turned them off
    tiny.read(DOCUMENT)
    assert "Reading" not in capfd.readouterr().err
    step = tiny.model.step
    tiny.model.step = lambda *args: slow(step, *args)
    tiny.read(random_ids(1, 8 * QUERY))
    assert "Reading" in capfd.readouterr().err
    tiny.read(random_ids(1, 8 * QUERY), progress_bar=False)
    assert "Reading" not in capfd.readouterr().err


def slow(step, *args):
    time.sleep(0.2)
    return step(*args)


# generation and forward from a state


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled path without torch.compile, which takes a minute."""
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)


@pytest.mark.parametrize("mode", MODES)
def test_a_question_to_a_state_is_answered_as_after_the_whole_text(exact, uncompiled, mode):
    state = exact.read(DOCUMENT)
    before = state.soft_prompt.embeds.clone()
    expected = answers(generate(exact, WHOLE, **MODES[mode]), WHOLE)
    for _ in range(2):  # the state is not changed
        assert answers(generate(exact, QUESTION, state=state, **MODES[mode]), QUESTION) == expected
    assert torch.equal(state.soft_prompt.embeds, before)


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_after_a_state_are_those_of_the_whole_text(exact, use_cache):
    answer = random_ids(1, 2 * CHUNK + 1, seed=9)
    state = exact.read(DOCUMENT)
    lengths = torch.tensor([QUESTION.shape[1]])
    question = torch.cat([QUESTION, answer], dim=1)
    got = exact(question, state=state, query_lengths=lengths, use_cache=use_cache).logits
    expected = exact(torch.cat([WHOLE, answer], dim=1), query_lengths=lengths + DOCUMENT.shape[1]).logits
    number = answer.shape[1] + 1
    assert_close(got[:, -number:], expected[:, -number:], atol=1e-9, rtol=1e-9)


def test_the_loss_of_an_answer_to_a_state(exact):
    answer = random_ids(1, 2 * CHUNK + 1, seed=9)
    question = torch.cat([QUESTION, answer], dim=1)
    whole = torch.cat([WHOLE, answer], dim=1)
    labels = question.clone()
    labels[:, : QUESTION.shape[1]] = -100
    whole_labels = whole.clone()
    whole_labels[:, : WHOLE.shape[1]] = -100
    output = exact(question, labels=labels, state=exact.read(DOCUMENT))
    assert_close(output.loss, exact(whole, labels=whole_labels).loss)
    output.loss.backward()
    assert exact.hypernet.alpha.grad.abs().sum() > 0


def test_one_state_serves_a_batch_of_questions(exact):
    questions = [random_ids(length, seed=length) for length in (2, 5, 9)]
    state = exact.read(DOCUMENT)
    ids, mask = pad(questions)
    rows = answers(generate(exact, ids, attention_mask=mask, state=state), ids)
    for question, row in zip(questions, rows, strict=True):
        assert answers(generate(exact, question[None], state=state), question[None]) == [row]


def test_each_row_has_its_own_state(exact):
    states = [exact.read(random_ids(1, 2 * QUERY, seed=seed)) for seed in range(3)]
    batch = Phase15State.stack(states)
    assert len(batch) == 3 and [state.text_digests for state in batch] == [state.text_digests for state in states]
    rows = answers(generate(exact, QUESTION.expand(3, -1), state=batch), QUESTION)
    expected = [answers(generate(exact, QUESTION, state=state), QUESTION)[0] for state in states]
    assert rows == expected and len(set(map(tuple, rows))) == 3
    assert torch.equal(batch[1:].soft_prompt.embeds, Phase15State.stack(states[1:]).soft_prompt.embeds)
    assert torch.equal(batch[-1].soft_prompt.embeds, states[2].soft_prompt.embeds)
    with pytest.raises(IndexError):
        batch[3]


def test_a_streamer_gets_the_answer_to_a_state(exact, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    sequences = generate(exact, QUESTION, state=exact.read(DOCUMENT), streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(sequences[0, QUESTION.shape[1] :])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.generate(state=s), "`state` needs `inputs`"),
        (lambda m, s: m.generate(QUESTION, state=s, cache=Phase15Cache(m.config)), "`state` starts a new answer"),
        (lambda m, s: m(QUESTION, state=s, cache=Phase15Cache(m.config)), "`state` starts a new answer"),
        (lambda m, s: m(QUESTION, state=s.soft_prompt), "must be a Phase15State"),
        (lambda m, s: m.generate(QUESTION, state="contract"), "must be a Phase15State"),
        (lambda m, s: m(QUESTION.expand(3, -1), state=Phase15State.stack([s, s])), "2 rows, but `input_ids` has 3"),
        (lambda m, s: Phase15State.stack([]), "`states` is empty"),
        (lambda m, s: Phase15State.stack([s, randomise(m).read(QUESTION)]), r"states\[1\] was read by another model"),
    ],
)
def test_states_that_cannot_be_used(tiny, call, message):
    state = tiny.read(DOCUMENT)
    with pytest.raises(ValueError, match=message):
        call(tiny, state)


def randomise(model):
    with torch.no_grad():
        model.hypernet.alpha.mul_(1.5)
    return model


# the state after an answer


def after(model, prompt, answer, state=None) -> torch.Tensor:
    """The slots after an answer, by the reference: the prompt's segments, then chunks of the answer."""
    slots = [] if state is None else list(used(state))
    slots = reference_read(model, slots, prompt)
    for chunk in answer.split(CHUNK):
        slots = reference_step(model, slots, chunk)
    return torch.stack(slots)


@pytest.mark.parametrize("mode", [name for name in MODES if name not in ("longer chunks", "without a cache")])
def test_the_state_after_an_answer_has_read_all_of_it(tiny, uncompiled, mode):
    state = tiny.read(DOCUMENT)
    output = generate(tiny, QUESTION, state=state, return_dict_in_generate=True, **MODES[mode])
    assert output["state"] is output.state and len(output.state) == len(output.sequences)
    for row, sequence in enumerate(output.sequences):
        answer = sequence[QUESTION.shape[1] :]
        assert_close(used(output.state, row), after(tiny, QUESTION[0], answer, state), atol=1e-4, rtol=1e-4)
        text = torch.cat([DOCUMENT[0], sequence])
        assert output.state.text_digests[row] == tiny.read(text).text_digests[0]
        assert output.state.num_tokens[row] == len(text)


def test_the_states_of_several_beams_follow_their_own_prompts(tiny):
    prompts = [random_ids(length, seed=length) for length in (3, 6, 9)]
    ids, mask = pad(prompts)
    output = generate(
        tiny, ids, attention_mask=mask, num_beams=4, num_return_sequences=2, return_dict_in_generate=True
    )
    for row, sequence in enumerate(output.sequences):
        expected = after(tiny, prompts[row // 2], sequence[ids.shape[1] :])
        assert_close(used(output.state, row), expected, atol=1e-4, rtol=1e-4)


def test_answers_of_a_batch_end_at_their_end_tokens(tiny):
    """Rows of different lengths: padding after an end token is not read."""
    prompts = [random_ids(length, seed=length) for length in (3, 6, 9, 4)]
    ids, mask = pad(prompts)
    free = generate(tiny, ids, attention_mask=mask)[:, ids.shape[1] :]
    end = int(free[1, 4])
    output = generate(tiny, ids, attention_mask=mask, eos_token_id=end, pad_token_id=7, return_dict_in_generate=True)
    lengths = set()
    for row, prompt in enumerate(prompts):
        answer = output.sequences[row, ids.shape[1] :]
        if end in answer.tolist():
            answer = answer[: answer.tolist().index(end) + 1]
        lengths.add(len(answer))
        assert_close(used(output.state, row), after(tiny, prompt, answer), atol=1e-4, rtol=1e-4)
        assert output.state.num_tokens[row] == len(prompt) + len(answer)
    assert len(lengths) > 1


def test_the_state_after_a_row_that_a_stop_string_ends(tiny, tokenizer):
    prompts = [random_ids(4, seed=1), random_ids(4, seed=2)]
    ids, mask = pad(prompts)
    free = generate(tiny, ids, attention_mask=mask)[:, ids.shape[1] :]
    stop = tokenizer.decode(free[0, 1:4])
    settings = {"stop_strings": stop, "tokenizer": tokenizer, "eos_token_id": 1, "pad_token_id": 2}
    output = generate(tiny, ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert_close(used(output.state), after(tiny, prompts[0], free[0, :4]), atol=1e-4, rtol=1e-4)
    assert output.state.num_tokens[0] == 8 < output.state.num_tokens[1]


def test_a_conversation_goes_on_from_the_state_after_its_answer(tiny):
    first = generate(tiny, QUESTION, state=tiny.read(DOCUMENT), return_dict_in_generate=True)
    second = generate(tiny, QUESTION, state=first.state, return_dict_in_generate=True)
    slots = after(tiny, QUESTION[0], first.sequences[0, QUESTION.shape[1] :], tiny.read(DOCUMENT))
    slots = torch.stack(reference_read(tiny, list(slots), QUESTION[0]))
    answer = second.sequences[0, QUESTION.shape[1] :]
    for chunk in answer.split(CHUNK):
        slots = torch.stack(reference_step(tiny, list(slots), chunk))
    assert_close(used(second.state), slots, atol=1e-4, rtol=1e-4)
    continued = generate(
        tiny, torch.cat([first.sequences, QUESTION], dim=1), cache=first.past_key_values, return_dict_in_generate=True
    )
    assert continued.state.num_tokens.tolist() == second.state.num_tokens.tolist()


# the value


def test_repr_size_copies_and_devices(tiny):
    state = tiny.read(DOCUMENT)
    width = tiny.config.text_config.hidden_size
    size = 4 * SLOTS * width + 8 + 8
    assert repr(state) == f"Phase15State({SLOTS} slots × {width}, {DOCUMENT.shape[1]} tokens read, {size:,} bytes)"
    assert state.nbytes == size and tiny.read(DOCUMENT.repeat(1, 30)).nbytes == size
    assert repr(Phase15State.stack([state, state])).startswith(f"Phase15State(2 rows of {SLOTS} slots")
    half = state.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and state.dtype == torch.float32 and half.nbytes < state.nbytes
    assert state.to("cpu", torch.float64).dtype == torch.float64
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), half):
        assert generate(tiny, QUESTION, state=other).shape[1] > QUESTION.shape[1]
    with pytest.raises(AttributeError):
        state.chunk_length = 3


def test_a_state_does_not_keep_its_model_in_memory(bases, tokenizer):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    state = model.read(QUESTION)
    body = weakref.ref(model.model)
    del model
    gc.collect()
    assert body() is None
    with pytest.raises(ValueError, match="not in memory"):
        state.nearest_tokens(tokenizer)


def test_nearest_tokens_of_an_untrained_model_are_the_newest_tokens(bases, tokenizer):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    ids = random_ids(1, SLOTS - 3)
    (row,) = model.read(ids).nearest_tokens(tokenizer)
    assert [token.text for token in row] == [tokenizer.decode([token]) for token in ids[0].tolist()]
    assert all(token.cosine > 0.999 for token in row)


# the file


@pytest.mark.parametrize("name", ["contract", "contract.safetensors"])
def test_a_state_is_kept_in_a_file(tiny, tmp_path, name):
    state = Phase15State.stack([tiny.read(DOCUMENT, chunk_length=3), tiny.read(QUESTION)])
    state.save_pretrained(tmp_path / name)
    file = tmp_path / name / STATE_FILE if name == "contract" else tmp_path / name
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]  # no temporary file
    loaded = Phase15State.from_pretrained(tmp_path / name, tiny)
    assert torch.equal(loaded.soft_prompt.embeds, state.soft_prompt.embeds)
    for field in ("text_digests", "model_digest", "sizes", "chunk_length"):
        assert getattr(loaded, field) == getattr(state, field)
    assert loaded.num_tokens.tolist() == state.num_tokens.tolist()
    ids = QUESTION.expand(2, -1)
    assert torch.equal(generate(tiny, ids, state=loaded), generate(tiny, ids, state=state))
    assert torch.equal(tiny.load_state(tmp_path / name).soft_prompt.embeds, state.soft_prompt.embeds)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "phase15-state" and metadata["num_soft_tokens"] == str(SLOTS)


@pytest.mark.parametrize(
    ("made", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_state_loads_in_another_dtype(tiny, tmp_path, made, loaded):
    tiny.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    state = Phase15ForCausalLM.from_pretrained(folder, dtype=made).read(DOCUMENT)
    state.save_pretrained(tmp_path / "state")
    other = Phase15ForCausalLM.from_pretrained(folder, dtype=loaded)
    state = Phase15State.from_pretrained(tmp_path / "state", other)
    assert state.dtype == loaded
    assert_close(state.soft_prompt.embeds.float(), tiny.read(DOCUMENT).soft_prompt.embeds, atol=0.3, rtol=0.1)
    generate(other, QUESTION, state=state)


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
state = model.load_state(sys.argv[2])
question = torch.tensor([json.loads(sys.argv[3])])
settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
same = type(state).from_pretrained(sys.argv[2], model)
assert torch.equal(same.soft_prompt.embeds, state.soft_prompt.embeds)
print(json.dumps(model.generate(question, state=state, **settings)[0].tolist()))
"""


def test_another_process_and_a_folder_of_another_name(tiny, tmp_path):
    state = tiny.read(DOCUMENT)
    expected = generate(tiny, QUESTION, state=state)[0].tolist()
    state.save_pretrained(tmp_path / "state")
    tiny.save_pretrained(tmp_path / "another name")
    arguments = [str(tmp_path / "another name"), str(tmp_path / "state"), json.dumps(QUESTION[0].tolist())]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == expected


def edited(change):
    """Saves a state with other metadata or tensors."""

    def edit(state, file, model):
        state.save_pretrained(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(metadata, tensors)
        save_file(tensors, file, metadata)
        return model

    return edit


def of_other_weights(state, file, model):
    state.save_pretrained(file)
    return randomise(model)


def of_another_size(state, file, model):
    state.save_pretrained(file)
    config = copy.deepcopy(model.config)
    config.num_soft_tokens = SLOTS + 1
    return Phase15ForCausalLM(config)


def cut(state, file, model):
    state.save_pretrained(file)
    file.write_bytes(file.read_bytes()[:-9])
    return model


def of_no_model(state, file, model):
    state.save_pretrained(file)
    return torch.nn.Linear(2, 2)


REFUSED = {
    "another model": (of_other_weights, "was read by another model: the digest of its HyperNetwork"),
    "another size": (of_another_size, f"`num_soft_tokens` {SLOTS}, but the model has {SLOTS + 1}"),
    "a cut file": (cut, "is cut or damaged"),
    "no Phase15 model": (of_no_model, "`model` is a Linear"),
    "another format": (edited(lambda metadata, _: metadata.pop("format")), "is not a Phase15 state"),
    "another version": (
        edited(lambda metadata, _: metadata.update(format_version="2")),
        "format version 2, but Phase15",
    ),
    "no digest": (edited(lambda metadata, _: metadata.pop("model_digest")), "metadata lack 'model_digest'"),
    "a chunk too long": (edited(lambda metadata, _: metadata.update(chunk_length="999")), "`chunk_length` is 999"),
    "not finite": (edited(lambda _, tensors: tensors["embeds"].fill_(float("nan"))), "not finite"),
    "too many slots": (edited(lambda _, tensors: tensors["length"].fill_(99)), "more used slots than there are"),
    "a missing tensor": (edited(lambda _, tensors: tensors.pop("num_tokens")), "num_tokens"),
    "too few digests": (edited(lambda metadata, _: metadata.update(text_digests=",")), "`embeds` is torch.float32 of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_belong_is_refused_in_one_line(tiny, tmp_path, case):
    save, message = REFUSED[case]
    file = tmp_path / "state.safetensors"
    model = save(tiny.read(DOCUMENT), file, tiny)
    with pytest.raises(ValueError, match=message) as error:
        Phase15State.from_pretrained(file, model)
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(saved_state, share):
    model, content, folder = saved_state
    file = folder / "cut.safetensors"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="cut or damaged"):
        Phase15State.from_pretrained(file, model)


@pytest.fixture(scope="module")
def saved_state(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES))
    model.read(DOCUMENT).save_pretrained(folder / "whole.safetensors")
    return model, (folder / "whole.safetensors").read_bytes(), folder


def test_a_missing_file_is_named(tiny, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Phase15State.from_pretrained(tmp_path / "nowhere", tiny)
    with pytest.raises(OSError, match=r"nowhere\.safetensors"):
        Phase15State.from_pretrained(tmp_path / "nowhere.safetensors", tiny)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "state.safetensors"
    write_bytes(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


# digests


def test_the_digest_of_weights_depends_on_names_shapes_and_values():
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    digest = weights_digest(weights.items())
    assert weights_digest(reversed(weights.items())) == digest
    assert weights_digest({**weights, "a": weights["a"].to(torch.bfloat16)}.items()) == digest
    for other in (
        {**weights, "a": weights["a"].view(4, 3)},
        {**weights, "a": weights["a"] * 1.02},
        {**weights, "b": weights["b"] + 1},
        {"a": weights["a"], "c": weights["b"]},
    ):
        assert weights_digest(other.items()) != digest


def test_the_digest_of_a_model_follows_its_weights(tiny):
    digest = tiny.model.model_digest()
    assert tiny.model.model_digest() == digest == copy.deepcopy(tiny).model.model_digest()
    with no_delta(tiny):
        assert tiny.model.model_digest() != digest
    assert tiny.model.model_digest() == digest
    with torch.no_grad():
        tiny.get_input_embeddings().weight[3, 0] += 1
    assert tiny.model.model_digest() != digest
    with torch.no_grad():
        tiny.get_input_embeddings().weight[3, 0] -= 1
    digest = tiny.model.model_digest()
    tiny(WHOLE, labels=WHOLE).loss.backward()
    torch.optim.SGD([tiny.hypernet.layers[0].up_proj.weight], lr=1.0).step()
    assert tiny.model.model_digest() != digest


# untrained models


def test_an_untrained_model_warns_once_of_the_tokens_that_it_loses(bases, caplog):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    with caplog.at_level(logging.WARNING, "transformers.phase15"), propagating("transformers"):
        model.read(random_ids(1, SLOTS))
        assert not caplog.messages
        generate(model, random_ids(1, SLOTS + 6))
        model.read(random_ids(1, SLOTS + 9))
    (message,) = set(caplog.messages)  # a second warning would name another number
    assert f"6 of {SLOTS + 6} tokens lie outside the {SLOTS} slots" in message and "untrained" in message


def test_trained_models_and_delta_set_to_zero_do_not_warn(tiny, bases, caplog):
    ids = random_ids(1, SLOTS + 6)
    untrained = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    with caplog.at_level(logging.WARNING, "transformers.phase15"), propagating("transformers"):
        generate(tiny, ids)
        with no_delta(tiny):
            generate(tiny, ids)
        untrained.train()(ids, labels=ids)
        assert tiny.model.warns_untrained
    assert not caplog.messages


class propagating:
    """transformers' logger does not hand messages to the root logger, where caplog listens."""

    def __init__(self, name):
        self.logger = logging.getLogger(name)

    def __enter__(self):
        self.before = self.logger.propagate
        self.logger.propagate = True

    def __exit__(self, *_):
        self.logger.propagate = self.before


# chats


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}SYSTEM be kind.\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}",
}
DOCUMENT_TURN = [{"role": "user", "content": "I live in Rome. I play the cello."}]
ACKNOWLEDGED = [*DOCUMENT_TURN, {"role": "assistant", "content": "I will remember that."}]
QUESTION_TURN = [{"role": "user", "content": "Where do I live?"}]


@pytest.fixture(params=[None, *TEMPLATES])
def templated(request, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    if request.param is not None:
        tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def test_turns_are_those_of_the_whole_chat(chatter, templated):
    state = chatter.read_chat(ACKNOWLEDGED, templated)
    question = state.next_turn(QUESTION_TURN, templated)
    text = templated.apply_chat_template([*ACKNOWLEDGED, *QUESTION_TURN], tokenize=False, add_generation_prompt=True)
    whole = templated(text, add_special_tokens=False)["input_ids"]
    read = templated(templated.apply_chat_template(ACKNOWLEDGED, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    assert read + question["input_ids"][0].tolist() == whole
    assert state.text_digests == chatter.read(read).text_digests
    output = generate(chatter, **question, state=state, return_dict_in_generate=True)
    expected = generate(chatter, **question, state=chatter.read(read))
    assert torch.equal(output.sequences, expected)
    more = chatter.read_chat(QUESTION_TURN, templated, state=state)
    assert more.num_tokens > state.num_tokens


def test_templates_that_refuse_or_drop_a_turn(chatter, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    cases = {
        TEMPLATES["strict"]: "roles must alternate",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}": "does not render",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}\n{% endfor %}": "cannot be read one by one",
        None: "no chat template",
    }
    for template, message in cases.items():
        tokenizer.chat_template = template
        is_first = template is not None and "length" not in template
        role = "user" if template == TEMPLATES["strict"] else "system"
        messages = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
        with pytest.raises(ValueError, match=message):
            encode_turn(messages, tokenizer, is_first=is_first)
    with pytest.raises(ValueError, match="`messages` is empty"):
        chatter.read_chat([], chat_tokenizer)
