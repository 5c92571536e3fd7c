# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The app: its parts against the naive reference, then the page in a browser, as a user starts and uses it."""

import copy
import html
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import listening, wait_until_idle
from huggingface_hub import SpaceCard
from reference import (
    CHUNK,
    LLM_SIZES,
    QUERY,
    SINKS,
    SIZES,
    SLOTS,
    VOCAB,
    as_soft_prompt,
    random_ids,
    randomise_alpha,
    reference_carry,
    reference_step,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.state_phase15 import Phase15State, nearest_tokens


gradio = pytest.importorskip("gradio", reason="needs requirements-extra.txt")

from phase15.commands import app  # noqa: E402


pytestmark = pytest.mark.extra
ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
PAGE_CHUNK = 16  # a picture is drawn for every chunk


def large_delta(model: Phase15ForCausalLM) -> Phase15ForCausalLM:
    """Makes Δ turn slots into other tokens."""
    model.hypernet.output_proj.weight.data *= 50
    return randomise_alpha(model)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, chat_tokenizer) -> str:
    """A folder as train_sft.py saves it: a random model that never ends and writes words of printable characters."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLM_SIZES, "vocab_size": len(chat_tokenizer)})
    texts = [chat_tokenizer.decode([token]) for token in range(config.vocab_size)]
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for token, text in enumerate(texts):
            base.lm_head.weight[token] *= text.isascii() and text.isprintable() and "<" not in text
            base.lm_head.weight[token] *= 3 if text.startswith(" ") else 1  # streamers give whole words
    base_folder = str(tmp_path_factory.mktemp("base"))
    base.save_pretrained(base_folder)
    model = large_delta(Phase15ForCausalLM.from_base(base_folder, **SIZES | {"chunk_length": PAGE_CHUNK}))
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_dir) -> Phase15ForCausalLM:
    return Phase15ForCausalLM.from_pretrained(model_dir).eval()


def nearest(slot: torch.Tensor, embeddings: torch.Tensor) -> int:
    return int(torch.cosine_similarity(slot[None], embeddings, dim=1).argmax())


@torch.no_grad()
def reference_steps(
    model, ids: torch.LongTensor, query_length: int, slots: list[torch.Tensor] | None = None
) -> list[tuple[list[torch.Tensor], list]]:
    """Returns the slots after only carry, and after carry and Δ, for every step over one row after `slots`."""
    embed = model.llm.get_input_embeddings()
    chunk = model.config.chunk_length
    slots = slots or []
    steps = []
    answer = ids[query_length:]
    answer = answer[: len(answer) // chunk * chunk]
    for segment in [*ids[:query_length].split(QUERY), *answer.split(chunk)]:
        if len(segment):
            carried = reference_carry(slots, list(embed(segment)))
            slots = reference_step(model, slots, segment)
            steps.append((carried, slots))
    return steps


def expected_table(model, tokenizer, chat: list[dict], max_new_tokens: int) -> tuple[str, list[list[str]], list]:
    """Returns the answer to a conversation, and what the page must show: the cells by row, and which of them moved."""
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    query_length = inputs["input_ids"].shape[1]
    embeddings = model.get_input_embeddings().weight
    steps = reference_steps(model, ids[:-1], query_length)  # the last token is never read
    num_reads = -(-query_length // QUERY)
    names = [f"read {i}" for i in range(1, num_reads)] + [f"sp_{c}" for c in range(len(steps) - num_reads + 1)]
    rows = [["slot", *names[-app.COLUMNS :]]]
    rows += [[f"sink {slot}" if slot < SINKS else str(slot)] for slot in range(SLOTS)]
    moved = set()
    for column, (carried, slots) in enumerate(steps[-app.COLUMNS :]):
        for slot in range(SLOTS):
            text = ""
            if slot < len(slots):
                token = nearest(slots[slot], embeddings)
                text = app.visible(tokenizer.decode([token]))
                if token != nearest(carried[slot], embeddings):
                    moved.add((slot, column))
            rows[slot + 1].append(text)
    return tokenizer.decode(ids[query_length:], skip_special_tokens=True), rows, moved


def handler(demo: gradio.Blocks, name: str):
    """Returns the function that the page calls at an event."""
    (function,) = {block.fn for block in demo.fns.values() if block.fn and block.fn.__name__ == name}
    return function


# the parts


def test_nearest_tokens_equal_a_loop_over_slots_and_vocabulary():
    torch.manual_seed(0)
    slots = torch.randn(9, 16)
    embeddings = torch.randn(40, 16) * torch.rand(40, 1) * 5
    tokens, cosines = nearest_tokens(slots, embeddings)
    cosine = [[torch.cosine_similarity(slot, embedding, 0).item() for embedding in embeddings] for slot in slots]
    assert tokens.tolist() == [row.index(max(row)) for row in cosine]
    torch.testing.assert_close(cosines, torch.cosine_similarity(slots, embeddings[tokens]))
    assert not torch.equal(tokens, (slots @ embeddings.T).argmax(1))  # the lengths of the embeddings mattered


@pytest.fixture
def lanes():
    """Makes started lanes of a model, and stops them."""
    started = []

    def start(model):
        started.append(model.open_lanes(4))
        started[-1].start()
        return started[-1]

    yield start
    for thread in started:
        thread.stop()


def test_a_reply_shows_every_step_of_the_reference(tiny, tokenizer, lanes):
    large_delta(tiny)
    text = "".join(map(chr, 65 + random_ids(2 * QUERY + 3)))
    *_, (answer, steps) = app.reply(lanes(tiny), tokenizer, [{"role": "user", "content": text}], 0, 3 * CHUNK + 1)
    ids = torch.tensor(tokenizer(text + answer)["input_ids"])
    assert [step.name for step in steps] == ["read 1", "read 2", "sp_0", "sp_1", "sp_2", "sp_3"]
    assert [step.seen for step in steps] == [7, 14, 17, 21, 25, 29]
    embeddings = tiny.get_input_embeddings().weight
    for step, (carried, slots) in zip(steps, reference_steps(tiny, ids[:-1], len(text)), strict=True):
        assert step.tokens == [nearest(slot, embeddings) for slot in slots]
        assert step.carried == [nearest(slot, embeddings) for slot in carried]
        shares = [((slot - old).norm() / slot.norm()).item() for slot, old in zip(slots, carried, strict=True)]
        assert step.shares == pytest.approx(shares, rel=1e-3)
    assert any(step.tokens != step.carried for step in steps)


def test_embeddings_unknown_to_the_tokenizer_are_never_shown(tiny):
    embeddings = tiny.get_input_embeddings().weight
    shown = []
    slots = as_soft_prompt([embeddings[50]] * 5, embeddings.shape[1])
    for vocab_size in (60, 50):
        recorder = app.Recorder(5, embeddings[:vocab_size], nearest_tokens)
        recorder(slots, slots, 5)
        shown.append(recorder.read()[0].tokens)
    assert shown[0] == [50] * 5 and all(token < 50 for token in shown[1])


def test_without_delta_the_slots_show_the_window(bases, tokenizer, lanes):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    chat = [{"role": "user", "content": "PHASEFIFTEEN"}]
    *_, (text, steps) = app.reply(lanes(model), tokenizer, chat, max_new_tokens=40)
    query = tokenizer("PHASEFIFTEEN")["input_ids"]  # a tokenizer without a chat template: plain text
    stream = query + tokenizer(text)["input_ids"]
    assert len(text) == 40 and [step.name for step in steps][:3] == ["read 1", "sp_0", "sp_1"]
    for step in steps:
        assert step.tokens == step.carried == reference_carry([], stream[: step.seen])
        assert set(step.shares) == {0.0} and step.cosines == pytest.approx([1] * len(step.cosines))
    assert 'class="moved"' not in app.table(steps, tokenizer, SLOTS, SINKS)
    app.picture(steps, SLOTS, SINKS).savefig(os.devnull, format="png")


# a text that is read first

DOCUMENT = "I live in Oslo.\n  My job is <b>teacher</b>, and I play the trumpet. " * 3
LINE = ["text", "file", "state", "line", "save", "chat", "facts", "plot", "slots"]  # outputs of "read_input"


def read_all(thread, ids: list[int], state: Phase15State | None = None) -> Phase15State:
    *_, (_, state) = app.read(thread, ids, state)
    return state


def assert_same_state(state: Phase15State, expected: Phase15State):
    names = ("text_digests", "model_digest", "chunk_length", "sizes")
    assert [getattr(state, name) for name in names] == [getattr(expected, name) for name in names]
    assert state.num_tokens.tolist() == expected.num_tokens.tolist()
    torch.testing.assert_close(state.soft_prompt, expected.soft_prompt)


def test_a_text_is_read_into_the_state_of_read_chat(model, chat_tokenizer, lanes):
    thread = lanes(model)
    ids = app.encode_text(model, chat_tokenizer, DOCUMENT, None)
    steps = list(app.read(thread, ids))
    assert len(ids) > 3 * QUERY
    assert [num_read for num_read, _ in steps] == [*range(QUERY, len(ids), QUERY), len(ids), len(ids)]
    assert [state for _, state in steps[:-1]] == [None] * (len(steps) - 1)
    state = steps[-1][1]
    expected = model.read_chat([{"role": "user", "content": DOCUMENT}], chat_tokenizer)
    assert_same_state(state, expected)
    more = app.encode_text(model, chat_tokenizer, "And more.", state)
    assert_same_state(
        read_all(thread, more, state),
        model.read_chat([{"role": "user", "content": "And more."}], chat_tokenizer, state=expected),
    )
    assert_same_state(state, expected)  # it was not changed


def test_without_a_template_a_text_goes_on_as_plain_text(tiny, tokenizer, lanes):
    thread = lanes(tiny)
    state = read_all(thread, app.encode_text(tiny, tokenizer, "ABCDEFGHIJ", None))
    assert_same_state(state, tiny.read(tokenizer("ABCDEFGHIJ")["input_ids"]))
    state = read_all(thread, app.encode_text(tiny, tokenizer, "KLM", state), state)
    question = tokenizer("\nNOP", return_tensors="pt")
    ids = tiny.generate(**question, state=state, max_new_tokens=9, do_sample=False)[0, 4:]
    *_, (answer, steps) = app.reply(thread, tokenizer, [{"role": "user", "content": "NOP"}], 0, 9, state)
    assert answer == tokenizer.decode(ids, skip_special_tokens=True)
    assert state.num_tokens.tolist() == [14] and steps[0][:2] == ("sp_0", 18)


def test_an_answer_from_a_state_is_that_of_generate(model, chat_tokenizer, lanes):
    thread = lanes(model)
    state = read_all(thread, app.encode_text(model, chat_tokenizer, DOCUMENT, None))
    chat = [*CHAT, {"role": "assistant", "content": "Air."}, {"role": "user", "content": "Where do I live?"}]
    question = state.next_turn(chat, chat_tokenizer)
    num_columns = question["input_ids"].shape[1]
    ids = model.generate(**question, state=state, max_new_tokens=3 * PAGE_CHUNK, do_sample=False)[0]
    *_, (answer, steps) = app.reply(thread, chat_tokenizer, chat, 0, 3 * PAGE_CHUNK, state)
    assert answer == chat_tokenizer.decode(ids[num_columns:], skip_special_tokens=True)
    *_, (other, _) = app.reply(thread, chat_tokenizer, chat, 0, 3 * PAGE_CHUNK)
    assert answer != other  # the state mattered
    slots = list(state.soft_prompt.embeds[0, : int(state.soft_prompt.length[0])])
    embeddings = model.get_input_embeddings().weight
    expected = reference_steps(model, ids[:-1], num_columns, slots)
    num_reads = -(-num_columns // QUERY)
    assert [step.name for step in steps[num_reads - 2 :]] == [f"read {num_reads - 1}", "sp_0", "sp_1", "sp_2"]
    assert steps[num_reads - 1].seen == int(state.num_tokens[0]) + num_columns
    for step, (_, slots) in zip(steps, expected, strict=True):
        assert step.tokens == [nearest(slot, embeddings) for slot in slots]


def test_a_long_text_does_not_hold_up_an_answer(model, chat_tokenizer, lanes):
    thread = lanes(model)
    ids = [5] * (QUERY * 20_000)
    steps = app.read(thread, ids)
    next(steps)
    (lane,) = thread.processor.lanes
    *_, (answer, _) = app.reply(thread, chat_tokenizer, CHAT, max_new_tokens=PAGE_CHUNK)
    assert answer and lane.num_read < len(ids)
    steps.close()
    wait_until_free(thread)


def page_handlers(model, tokenizer, **limits):
    """Returns the handlers of a page of its own."""
    demo = app.build_demo(model, tokenizer, "tiny", **limits)
    return {name: handler(demo, name) for name in ("read_input", "load_file", "respond")}


def last_outputs(updates, folder: Path | None = None) -> dict:
    """Returns the last outputs of a new state, by name; copies its file, which lies there only until the next step."""
    for outputs in updates:
        named = dict(zip(LINE[-len(outputs) :], outputs, strict=True))
        if folder is not None and "value" in named["save"]:
            named["save"] = Path(shutil.copy(named["save"]["value"], folder))
    return named


def ask_handler(page: dict, state: Phase15State | None) -> str:
    *_, outputs = page["respond"]("Where do I live?", [], 0, 32, state)
    return html.unescape(outputs[1][-1]["content"][0]["text"])


def test_read_ask_save_load_in_another_page(model_dir, model, chat_tokenizer, tmp_path):
    page = page_handlers(model, chat_tokenizer)
    shown = last_outputs(page["read_input"](DOCUMENT, None, None), tmp_path)
    state = shown["state"]
    assert_same_state(state, model.read_chat([{"role": "user", "content": DOCUMENT}], chat_tokenizer))
    assert shown["line"] == f"`{state!r}`" and shown["text"] == "" and shown["chat"] == []
    question = state.next_turn([{"role": "user", "content": "Where do I live?"}], chat_tokenizer)
    ids = model.generate(**question, state=state, max_new_tokens=32, do_sample=False)[0]
    expected = chat_tokenizer.decode(ids[question["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ask_handler(page, state) == expected != ask_handler(page, None)

    other_page = page_handlers(Phase15ForCausalLM.from_pretrained(model_dir).eval(), chat_tokenizer)
    loaded = last_outputs(other_page["load_file"](str(shown["save"])))
    assert_same_state(loaded["state"], state)
    assert [loaded[name] for name in ("line", "facts", "slots")] == [shown[n] for n in ("line", "facts", "slots")]
    assert ask_handler(other_page, loaded["state"]) == expected


def test_the_slots_of_a_state_are_its_nearest_tokens(model, chat_tokenizer):
    page = page_handlers(model, chat_tokenizer)
    shown = last_outputs(page["read_input"](DOCUMENT, None, None))
    cells = re.findall(r"<td[^>]*title=\"(.*?)\">(.*?)</td>", shown["slots"])
    (nearest_to_slots,) = shown["state"].nearest_tokens(chat_tokenizer)
    assert len(cells) == SLOTS
    assert [html.unescape(text) for _, text in cells] == [app.visible(token.text) for token in nearest_to_slots]
    assert [title for title, _ in cells] == [f"cosine {token.cosine:.2f}" for token in nearest_to_slots]
    num_tokens = int(shown["state"].num_tokens[0])
    assert f"state\n{num_tokens:,} tokens" in shown["facts"] and shown["plot"] is None


def test_a_file_is_read_like_a_pasted_text(model, chat_tokenizer, tmp_path):
    page = page_handlers(model, chat_tokenizer)
    file = tmp_path / "text.md"
    file.write_bytes("\ufeffNaïve".encode())  # some editors begin a file with a byte order mark
    pasted = last_outputs(page["read_input"]("Naïve", None, None))["state"]
    assert_same_state(last_outputs(page["read_input"]("", str(file), None))["state"], pasted)


def test_progress_is_shown_while_a_text_is_read(model, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(app, "PROGRESS_SECONDS", -1)
    page = page_handlers(model, chat_tokenizer)
    *progress, last = page["read_input"](DOCUMENT, None, None)
    num_tokens = int(last[2].num_tokens[0])
    lines = [outputs[3] for outputs in progress]
    assert (
        lines[0] == f"{QUERY} of {num_tokens} tokens read" and lines[-1] == f"{num_tokens} of {num_tokens} tokens read"
    )
    assert len(lines) > 3


def test_what_cannot_be_read_is_refused_in_one_line(model, chat_tokenizer, tmp_path):
    page = page_handlers(model, chat_tokenizer, max_read_tokens=40)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\xfa")
    cases = {
        "Paste a text or choose a file: one of them.": [("  ", None), ("A", str(bad))],
        "The file is not a text in UTF-8.": [("", str(bad))],
        "The text has 321 bytes, and this page reads 320 at most.": [("A" * 321, None)],
        "tokens, and this page reads 40 at most.": [("zqxjk " * 40, None)],
    }
    for message, inputs in cases.items():
        for text, file in inputs:
            with pytest.raises(gradio.Error) as raised:
                list(page["read_input"](text, file, None))
            assert raised.value.message.endswith(message) and "\n" not in raised.value.message


def test_a_file_that_is_not_a_state_of_this_model_is_refused(model, chat_tokenizer, tmp_path):
    page = page_handlers(model, chat_tokenizer)
    state = model.read_chat(CHAT, chat_tokenizer)
    state.save_pretrained(tmp_path / "state.safetensors")
    content = (tmp_path / "state.safetensors").read_bytes()
    other = copy.deepcopy(model)
    other.hypernet.output_proj.weight.data.add_(1)
    other.read_chat(CHAT, chat_tokenizer).save_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    (tmp_path / "<b>.safetensors").write_bytes(b"not a state")
    Phase15State.stack([state, state]).save_pretrained(tmp_path / "two.safetensors")
    cases = {
        "other": "read by another model",
        "cut": "is cut or damaged",
        "<b>": "is cut or damaged",
        "two": "holds 2 rows",
    }
    for name, problem in cases.items():
        with pytest.raises(gradio.Error) as raised:
            list(page["load_file"](str(tmp_path / f"{name}.safetensors")))
        message = raised.value.message
        assert problem in message and html.escape(name) + ".safetensors" in message
        assert str(tmp_path) not in message and "<" not in message and "\n" not in message
    assert last_outputs(page["load_file"](str(tmp_path / "state.safetensors")))["state"].num_tokens.tolist()


# the picture and the table


class Tags:
    def decode(self, ids):
        return f'<b id="{ids[0]}">&\n'


def test_the_table_of_slots():
    step = app.Step("sp_0", 2, tokens=[7, 8], cosines=[0.5, 1.0], carried=[7, 9], shares=[0.1, 0.2])
    page = app.table([step], Tags(), num_slots=3, num_sinks=1)
    cells = re.findall(r"<td( class=\"moved\")?(?: style=\"--d:([\d.]+)\" title=\"([^\"]*)\")?>(.*?)</td>", page)
    assert [(bool(moved), share) for moved, share, _, _ in cells] == [(False, "0.50"), (True, "1.00"), (False, "")]
    assert [html.unescape(text) for *_, text in cells] == ['<b·id="7">&⏎', '<b·id="8">&⏎', ""]
    assert "<b" not in page and 'carried <b·id="9">' in html.unescape(cells[1][2])
    assert re.findall(r"<tr( class=\"last-sink\")?><th>(.*?)</th>", page)[1:] == [
        (' class="last-sink"', "sink 0"),
        ("", "1"),
        ("", "2"),
    ]


def test_every_character_of_a_token_can_be_seen():
    assert app.visible("a b\n\x00é\u202e\u200b") == "a·b⏎�é��"


def test_the_table_holds_the_last_steps_and_the_picture_all():
    steps = [app.Step(f"sp_{i}", i, [1], [1.0], [1], [i / 100]) for i in range(app.COLUMNS + 5)]
    page = app.table(steps, Tags(), 2, 1)
    assert re.findall(r"<th>(sp_\d+)</th>", page) == [f"sp_{i}" for i in range(5, app.COLUMNS + 5)]
    image = app.picture(steps, 2, 1).axes[0].images[0].get_array()
    assert image.shape == (2, app.COLUMNS + 5) and image.mask[1].all()
    assert image[0].tolist() == pytest.approx([step.shares[0] for step in steps])


def test_a_reply_streams_what_generate_gives(model, chat_tokenizer, lanes):
    seen = list(app.reply(lanes(model), chat_tokenizer, CHAT, max_new_tokens=60))
    answer, _, _ = expected_table(model, chat_tokenizer, CHAT, 60)
    assert seen[-1][0] == answer and len({len(text) for text, _ in seen}) > 3


def test_two_replies_grow_beside_each_other(model, chat_tokenizer, lanes):
    thread = lanes(model)
    first = app.reply(thread, chat_tokenizer, CHAT, max_new_tokens=2000)
    second = app.reply(thread, chat_tokenizer, [{"role": "user", "content": "Hello"}], max_new_tokens=2000)
    for length in (0, 10, 20):
        for reply in (first, second):
            assert next(text for text, _ in reply if len(text) > length)
    first.close()
    second.close()


def test_temperature_zero_is_greedy_and_any_other_samples(tiny, tokenizer, lanes, monkeypatch):
    thread = lanes(tiny)
    make_request = thread.lanes.request
    requests = []

    def record(*args, **kwargs):
        requests.append(make_request(*args, **kwargs))
        return requests[-1]

    monkeypatch.setattr(thread.lanes, "request", record)
    for temperature in (0, 1):
        list(app.reply(thread, tokenizer, CHAT, temperature, 7))
    assert [(request.sampling.temperature, request.max_new_tokens) for request in requests] == [(0, 7), (1, 7)]


def test_an_error_in_the_thread_reaches_the_caller_and_the_user(tiny, tokenizer, lanes, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    thread = lanes(tiny)
    monkeypatch.setattr(type(thread.lanes), "_decode_chunk", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(app.reply(thread, tokenizer, CHAT))
    demo = app.build_demo(tiny, tokenizer, "tiny")
    with pytest.raises(gradio.Error, match="RuntimeError: out of memory"):
        list(handler(demo, "respond")("Why?", [], 0, 16))
    lines = []
    monkeypatch.setattr(type(thread.lanes), "_read_prompts", fail)
    with pytest.raises(gradio.Error, match="RuntimeError: out of memory"):
        for outputs in handler(demo, "read_input")("A text", None, None):
            lines.append(outputs[3])
    assert lines == [""]  # no progress stays


def test_closing_the_reply_frees_the_lane(model, chat_tokenizer, lanes):
    thread = lanes(model)
    answer = app.reply(thread, chat_tokenizer, CHAT, max_new_tokens=100_000)
    next(answer)
    assert thread.lanes.lanes
    answer.close()
    wait_until_free(thread)


def wait_until_free(thread):
    deadline = time.monotonic() + 30
    while thread.lanes.lanes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_with_earlier_code_is_named(model_dir, monkeypatch):
    model_and_info = (torch.nn.Linear(1, 1), {"missing_keys": []})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model_and_info)
    with pytest.raises(ValueError, match="holds code from before .* save it again with `save_pretrained`"):
        app.load(model_dir)


# the command


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """What main would load: it ends there."""
    names = []

    def load(name):
        names.append(str(name))
        raise ValueError("end")

    monkeypatch.setattr(app, "load", load)
    return names


def test_the_model_is_the_flag_the_variable_or_the_quickstart(loaded, monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)  # nothing can be trained
    monkeypatch.setattr(app, "QUICKSTART", tmp_path)
    for argv in (["--model_dir", "a"], []):
        monkeypatch.setenv("PHASE15_MODEL", "b")
        with pytest.raises(ValueError, match="end"):
            app.start(argv)
    monkeypatch.delenv("PHASE15_MODEL")
    with pytest.raises(ValueError, match="end"):
        app.start([])
    assert loaded[:2] == ["a", "b"] and Path(loaded[2]).resolve() == tmp_path


def test_the_quickstart_is_trained_if_it_is_not_there(loaded, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("PHASE15_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="--model_dir"),
    ):
        # a Space that holds only app.py
        patch.setattr(app.importlib.util, "find_spec", lambda name: None)
        app.start([])
    assert app.TRAIN[1:] == ["-m", "phase15", "train"]
    monkeypatch.setattr(app, "TRAIN", [sys.executable, "train.py"])
    (tmp_path / "train.py").write_text("print('step 1')\nraise SystemExit(3)")
    with pytest.raises(ValueError, match="exit status 3"):
        app.start([])
    out = capfd.readouterr().out
    assert re.search(r"training it.*minutes.*\nstep 1", out) and loaded == []
    make = "import pathlib as p; d = p.Path('outputs/quickstart'); d.mkdir(parents=True); (d / 'config.json').touch()"
    (tmp_path / "train.py").write_text(make)
    for _ in range(2):  # the second time it is there, and the script would fail
        with pytest.raises(ValueError, match="end"):
            app.start([])
    assert len(loaded) == 2


def test_a_folder_that_is_not_a_phase15_model_is_named(bases, tmp_path):
    with pytest.raises(ValueError, match="not a Phase15 model.*'llama'"):
        app.load(bases["llama"])
    with pytest.raises((ValueError, OSError), match="empty"):
        (tmp_path / "empty").mkdir()
        app.load(str(tmp_path / "empty"))


def test_bad_input_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model_dir", "no/such/folder"])
    with pytest.raises(SystemExit, match=r"^app\.py: .*no/such/folder.*") as ended:
        runpy.run_path(str(ROOT / "scripts" / "app.py"), run_name="__main__")
    assert "\n" not in ended.value.code  # a text is printed, and the exit status is 1


# the page


@contextmanager
def started(folder: Path, model_dir: str):
    """The app as a user starts it, from a folder that holds app.py alone: its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(ROOT / "phase15" / "commands" / "app.py", folder)
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    settings |= {"PHASE15_MODEL": model_dir, "HF_MODULES_CACHE": str(folder / "modules")}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log
        )
    try:
        while "Running on" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    with started(tmp_path_factory.mktemp("space"), model_dir) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    """A browser that reaches nothing but this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements-extra.txt")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("needs Chromium")
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=path, args=arguments) as browser,
    ):
        yield browser


@contextmanager
def visit(chromium, address: str):
    """
    Yields a function that opens the page, and a list of the problems of its pages: errors, dialogs, requests to other
    addresses. At the end the list must be empty.
    """
    problems = []

    def look_at(request):
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append(request.url)

    with chromium.new_context(viewport={"width": 1400, "height": 900}) as context:
        context.set_default_timeout(120_000)
        context.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        context.on("request", look_at)

        def open_page():
            page = context.new_page()
            page.goto(address)
            return page

        yield open_page, problems
    assert problems == []


@pytest.fixture
def page(server, chromium):
    with visit(chromium, server[1]) as (open_page, _):
        yield open_page()


def ask(page, question: str):
    page.get_by_placeholder("Ask something").fill(question)
    page.keyboard.press("Enter")


def answers(page) -> list[str]:
    return [bot.text_content() for bot in page.get_by_test_id("bot").all()]


def wait_for_some_answer(page, index: int = 0):
    page.wait_for_function(
        "index => document.querySelectorAll('[data-testid=bot]')[index]?.textContent.length > 20", arg=index
    )


def wait_for_answer(page, index: int, answer: str, rows: list[list[str]], moved: set):
    """Waits until the answer and the last step of its table are there, and compares all cells."""
    page.wait_for_function(
        "([index, text]) => document.querySelectorAll('[data-testid=bot]')[index]?.textContent === text",
        arg=[index, answer],
    )
    page.wait_for_function(
        "name => [...document.querySelectorAll('#slots thead th')].at(-1).textContent === name", arg=rows[0][-1]
    )
    cells = page.eval_on_selector_all(
        "#slots tr", "rows => rows.map(row => [...row.cells].map(cell => [cell.textContent, cell.className]))"
    )
    assert [[text for text, _ in row] for row in cells] == rows
    shown = {(i - 1, j - 1) for i, row in enumerate(cells) for j, (_, name) in enumerate(row) if name == "moved"}
    assert shown == moved


def ask_for_a_long_answer(page, question: str = "Why is the sky blue?"):
    page.get_by_text("Sampling").click()
    while page.get_by_label("range slider for Most new tokens").input_value() != "4096":
        page.get_by_label("number input for Most new tokens").fill("4096")
        page.keyboard.press("Tab")
        page.wait_for_timeout(1000)  # a slider that has just appeared goes back to its first value
    ask(page, question)
    wait_for_some_answer(page)


def test_an_answer_grows_beside_its_soft_prompt(page, model, chat_tokenizer):
    page.evaluate(
        """() => {
            window.grown = new Set();
            const look = () => document.querySelectorAll('[data-testid=bot]').forEach(bot => {
                if (!document.querySelectorAll('[data-testid=bot]')[1]) grown.add(bot.textContent)
            });
            new MutationObserver(look).observe(document, {subtree: true, childList: true, characterData: true});
        }"""
    )
    chat = []
    pictures = []
    assert page.locator("#slots tr").count() == page.locator("#picture img").count() == 0
    for turn, question in enumerate(["Why is the sky blue?", "<b>And</b>  light?"]):
        chat.append({"role": "user", "content": question})
        answer, rows, moved = expected_table(model, chat_tokenizer, chat, 256)
        ask(page, question)
        wait_for_answer(page, turn, answer, rows, moved)
        prompt = chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert (
            moved and f"{len(prompt) + 240:,} tokens" in page.locator("#facts").text_content()
        )  # whole chunks of 256
        pictures.append(page.locator("#picture img").get_attribute("src"))
        chat.append({"role": "assistant", "content": answer})
    assert page.get_by_test_id("user").all()[1].text_content() == "<b>And</b>  light?"
    assert pictures[0] != pictures[1]
    grown = sorted(page.evaluate("[...grown]"), key=len)
    assert len(grown) > 2 and all(chat[1]["content"].startswith(text) for text in grown)


def test_an_empty_message_does_nothing(page):
    ask(page, "  ")
    page.wait_for_timeout(1000)
    assert page.get_by_test_id("user").count() == 0 and answers(page) == []


def test_stop_ends_the_generation(page, server):
    ask_for_a_long_answer(page)
    page.get_by_role("button", name="Stop").click()
    wait_until_idle(server[0])
    stopped = answers(page)
    assert 20 < len(stopped[0]) < 4000
    ask(page, "Blue?")
    wait_for_some_answer(page, 1)
    assert answers(page)[0] == stopped[0]


def test_leaving_the_page_ends_the_generation(page, server):
    ask_for_a_long_answer(page)
    page.close()
    wait_until_idle(server[0])


def test_two_visitors_get_the_answers_that_each_gets_alone(chromium, server, model, chat_tokenizer):
    with visit(chromium, server[1]) as (open_page, _):
        visitors = {question: open_page() for question in ("Why is the sky blue?", "What is a soft prompt?")}
        for question, page in visitors.items():
            ask(page, question)
        for question, page in visitors.items():
            chat = [{"role": "user", "content": question}]
            wait_for_answer(page, 0, *expected_table(model, chat_tokenizer, chat, 256))


def test_the_answers_to_two_visitors_grow_at_once(chromium, server):
    with visit(chromium, server[1]) as (open_page, _):
        first = open_page()
        second = open_page()
        ask_for_a_long_answer(first, "Why is the sky blue?")
        ask_for_a_long_answer(second, "What is a soft prompt?")
        for page in (first, second):
            page.wait_for_function(
                "length => document.querySelector('[data-testid=bot]').textContent.length > length",
                arg=len(answers(page)[0]),
            )
        for page in (first, second):
            page.get_by_role("button", name="Stop").click()
    wait_until_idle(server[0])


def wait_for_line(page, line: str):
    page.wait_for_function("line => document.querySelector('#state').textContent.trim() === line", arg=line)


def wait_for_text(page, answer: str):
    page.wait_for_function("text => document.querySelector('[data-testid=bot]')?.textContent === text", arg=answer)


def cells(page) -> list[list[str]]:
    return page.eval_on_selector_all("#slots tr", "rows => rows.map(row => [...row.cells].map(c => c.textContent))")


def upload(page, label: str, file: Path):
    with page.expect_file_chooser() as chooser:
        page.get_by_text(label, exact=True).click()
    chooser.value.set_files(file)


def test_a_visitor_reads_asks_saves_and_loads(chromium, server, model, chat_tokenizer, tmp_path):
    question = {"role": "user", "content": "Where do I live?"}
    state = model.read_chat([{"role": "user", "content": DOCUMENT}], chat_tokenizer)
    turn = state.next_turn([question], chat_tokenizer)
    ids = model.generate(**turn, state=state, max_new_tokens=256, do_sample=False)[0, turn["input_ids"].shape[1] :]
    answer = chat_tokenizer.decode(ids, skip_special_tokens=True)
    answer_to_others, _, _ = expected_table(model, chat_tokenizer, [question], 256)
    (nearest_to_slots,) = state.nearest_tokens(chat_tokenizer)
    names = [f"sink {slot}" if slot < SINKS else str(slot) for slot in range(SLOTS)]
    tokens = [app.visible(token.text) for token in nearest_to_slots]
    rows = [["slot", "state"], *map(list, zip(names, tokens, strict=True))]
    with visit(chromium, server[1]) as (open_page, _):
        first = open_page()
        second = open_page()
        for page in (first, second):
            page.get_by_text("Read a text first").click()
        assert first.get_by_role("button", name="Save state").is_disabled()
        first.get_by_placeholder("Paste a text").fill(DOCUMENT)
        first.get_by_role("button", name="Read", exact=True).click()
        wait_for_line(first, repr(state))
        assert cells(first) == rows
        ask(first, question["content"])
        wait_for_text(first, answer)
        with first.expect_download() as download:
            first.get_by_text("Save state").click()
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        assert_same_state(model.load_state(saved), state)

        ask(second, question["content"])
        wait_for_text(second, answer_to_others)
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(saved.read_bytes()[:-1])
        upload(second, "Load state", cut)
        assert toast(second).startswith("cut.safetensors is cut or damaged")
        wait_for_line(second, "")
        upload(second, "Load state", saved)
        wait_for_line(second, repr(state))
        assert cells(second) == rows and answers(second) == []
        ask(second, question["content"])
        wait_for_text(second, answer)
        second.get_by_role("button", name="Forget").click()
        wait_for_line(second, "")
        assert answers(second) == cells(second) == []


def test_a_visitor_uploads_a_text(page, model, chat_tokenizer, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    page.get_by_text("Read a text first").click()
    page.locator("input[type=file]").first.set_input_files(file)
    page.get_by_text("document", exact=False).last.wait_for()
    page.get_by_role("button", name="Read", exact=True).click()
    wait_for_line(page, repr(model.read_chat([{"role": "user", "content": DOCUMENT}], chat_tokenizer)))


def request(address: str, data: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_app_is_local_gives_no_file_and_takes_small_ones(server, model):
    process, address = server
    assert listening(int(address.rpartition(":")[2])) == {"127.0.0.1"}
    for path in ("/etc/passwd", "app.py", f"{os.getcwd()}/README.md", "../app.py"):
        assert request(f"{address}/gradio_api/file={path}") in (403, 404)
    limit = app.max_upload_bytes(model, app.MAX_READ_TOKENS)
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for num_bytes, status in ((limit, 200), (limit + 1, 413)):
        body = head + b"x" * num_bytes + b"\r\n--b--\r\n"
        assert request(f"{address}/gradio_api/upload", body, **headers) == status


def test_a_state_in_float32_may_be_uploaded(model, chat_tokenizer, tmp_path):
    state = model.read_chat(CHAT, chat_tokenizer).to(dtype=torch.float32)
    state.save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= app.max_upload_bytes(model, max_read_tokens=1)


# untrusted text, and how much of it

RUN = "window.pwned = 1"
HOSTILE = [  # tokens of a vocabulary
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<svg/onload={RUN}>",
    f'" onmouseover="{RUN}',
    f"<a href='javascript:{RUN}'>",
    "<iframe src=//evil.test>",
    "<style>*{display:none}</style>",
    "</td></tr></table></div>",
    "<!--",
    "{{",
    "{{#each value}}",
    "${" + RUN + "}",
    "`${" + RUN + "}`",
    "@children",
    "[x](http://evil.test)",
    "![x](http://evil.test/x)",
    "&lt;b&gt;",
    "**x**",
]


@pytest.fixture(scope="module")
def hostile(tokenizer, tmp_path_factory):
    """
    A model in a folder with a bad name that generates only bad tokens, its tokenizer, whose chat template raises at
    "fail", and the address of its app, with tight limits, in this process.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(HOSTILE)
    say = "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('BAD') }}{% endif %}{{ m.content }}"
    tokenizer.chat_template = (say + "{% endfor %}").replace("BAD", HOSTILE[1])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLM_SIZES, "vocab_size": len(tokenizer)}))
    base_folder = str(tmp_path_factory.mktemp("base"))
    base.save_pretrained(base_folder)
    model = randomise_alpha(Phase15ForCausalLM.from_base(base_folder, **SIZES | {"chunk_length": PAGE_CHUNK}))
    model.hypernet.alpha.data *= 0.3  # the slots stay near the tokens that they carry
    model.generation_config.suppress_tokens = list(range(VOCAB))
    folder = tmp_path_factory.mktemp("hostile") / f"{HOSTILE[1]} [x](y) **z**"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        demos = []
        launch = gradio.Blocks.launch
        patch.setattr(
            gradio.Blocks,
            "launch",
            lambda demo, **settings: demos.append(demo) or launch(demo, **settings, prevent_thread_lock=True),
        )
        app.start(["--model_dir", str(folder), "--max_characters", "1700", "--max_waiting", "1", "--num_lanes", "1"])
    yield model.eval(), tokenizer, folder, demos[0].local_url.rstrip("/")
    demos[0].close()


def toast(page) -> str:
    page.get_by_test_id("toast-text").wait_for()
    return " ".join(page.get_by_test_id("toast-text").all_text_contents())


def test_untrusted_text_is_text_on_the_page(hostile, chromium):
    model, tokenizer, folder, address = hostile
    question = "".join(HOSTILE)
    answer, rows, moved = expected_table(model, tokenizer, [{"role": "user", "content": question}], 256)
    shown = {text for row in rows[1:] for text in row[1:]}
    assert {text.replace(" ", "·") for text in HOSTILE} <= shown and sum(text in answer for text in HOSTILE) > 3
    with visit(chromium, address) as (open_page, _):
        page = open_page()
        ask(page, question)
        wait_for_answer(page, 0, answer, rows, moved)
        assert page.get_by_test_id("user").text_content() == question
        assert page.locator("h2").first.text_content() == f"Phase15 · {folder}"
        assert page.locator("#slots, #chat, h2").locator("script, iframe, a, img:not([src^=data])").count() == 0
        assert page.evaluate("window.pwned") is None
        page = open_page()
        ask(page, "fail")
        assert toast(page) == f"TemplateError: {HOSTILE[1]}"
        assert page.locator("[data-testid=toast-text] *").count() == 0
        assert page.evaluate("window.pwned") is None


def test_a_conversation_above_the_limit_is_refused(hostile, chromium):
    with visit(chromium, hostile[3]) as (open_page, _):
        page = open_page()
        ask(page, "A" * 1701)
        assert "would have 1,701 characters, and this page reads 1,700 at most: ask something shorter" in toast(page)
        assert page.get_by_placeholder("Ask something").input_value() == "A" * 1701
        assert page.get_by_test_id("user").count() == 0
        ask(page, "A" * 1700)
        wait_for_some_answer(page)


def test_no_more_questions_than_lanes_are_answered_at_once_and_only_so_many_wait(hostile, chromium):
    with visit(chromium, hostile[3]) as (open_page, problems):
        first, second, third = (open_page() for _ in range(3))
        ask_for_a_long_answer(first, "A")
        ask(second, "B")
        second.get_by_test_id("user").or_(second.locator(".progress-text, .eta-bar")).first.wait_for(state="attached")
        ask(third, "C")
        assert "busy. Please try again" in toast(third)
        assert third.get_by_placeholder("Ask something").input_value() == "C"
        assert answers(second) == []
        first.get_by_role("button", name="Stop").click()
        wait_for_some_answer(second)
        ask(third, "C")
        wait_for_some_answer(third)
        assert "503" in problems.pop()


def test_the_limits_are_flags_with_defaults(monkeypatch, tiny, tokenizer):
    made = {}
    monkeypatch.setattr(app, "load", lambda name: (tiny, tokenizer))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda demo, **settings: made.update(demo=demo, **settings))
    small = ("--max_characters", "5", "--max_waiting", "2", "--max_read_tokens", "9")
    for flags, limit, waiting, num_tokens in (((), 100_000, 16, 200_000), (small, 5, 2, 9)):
        app.start(["--model_dir", "m", *flags])
        assert made["max_file_size"] == app.max_upload_bytes(tiny, num_tokens)
        with pytest.raises(
            gradio.Error, match=f"{num_tokens + 1:,} tokens, and this page reads {num_tokens:,} at most"
        ):
            list(handler(made["demo"], "read_input")("A" * (num_tokens + 1), None, None))
        respond = handler(made["demo"], "respond")
        assert made["demo"]._queue.max_size == waiting and made.get("server_name") is None
        history = [{"role": "assistant", "content": [{"type": "text", "text": "&lt;"}]}]  # one character
        with pytest.raises(gradio.Error, match=f"{limit + 1:,} characters.*reads {limit:,} at most"):
            list(respond("A" * limit, history, 0, 16))
        assert next(respond("A" * (limit - 1), history, 0, 16))


def test_the_card_of_the_space():
    card = SpaceCard.load(ROOT / "docs" / "space.md")
    assert (card.data.sdk, card.data.app_file) == ("gradio", "phase15/commands/app.py")
    assert (ROOT / card.data.app_file).is_file()
    assert card.data.sdk_version.split(".")[0] == gradio.__version__.split(".")[0]


# the chat that the page opens on


def test_the_page_opens_on_a_chat_with_its_answer(model, chat_tokenizer, lanes):
    chat = [*CHAT, {"role": "assistant", "content": "Air."}, {"role": "user", "content": "<b>Why?"}]
    demo = app.build_demo(model, chat_tokenizer, "tiny", opening=chat)
    props = {c["props"].get("elem_id"): c["props"].get("value") for c in demo.get_config_file()["components"]}
    *_, (answer, steps) = app.reply(lanes(model), chat_tokenizer, chat)
    shown = ["".join(html.unescape(part["text"]) for part in turn["content"]) for turn in props["chat"]]
    assert shown == [*(turn["content"] for turn in chat), answer]
    assert props["slots"] == app.table(steps, chat_tokenizer, SLOTS, SINKS) and steps[-1].name in props["facts"]


def test_the_chat_is_the_one_in_results(tmp_path):
    assert app.opening_chat(str(tmp_path)) == []
    (tmp_path / "results.json").write_text("{}")
    assert app.opening_chat(str(tmp_path)) == []
    (tmp_path / "results.json").write_text(json.dumps({"chat": CHAT}))
    assert app.opening_chat(str(tmp_path)) == CHAT
    for text in ("[]", "{", '{"chat": [{"role": 1}]}', '{"chat": ["a"]}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="results.json was not written by train_sft.py"):
            app.opening_chat(str(tmp_path))
