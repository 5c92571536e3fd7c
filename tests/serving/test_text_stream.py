# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tokens as text: whole characters, and the end before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase15.serving.text_stream import TextStream


TEXTS = ["Return the list of lists.", "naïve café — 日本語 🙂🙂", "<|user|> a\n\n  b\t", "\x00\x07é", "a" * 40]


def stream(tokenizer, ids: list[int], stops: list[str] = ()) -> list[str]:
    text = TextStream(tokenizer, list(stops))
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    return [*pieces, text.close()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_hold_no_half_character(chat_tokenizer, text):
    ids = chat_tokenizer(text)["input_ids"]
    pieces = stream(chat_tokenizer, ids)
    assert "".join(pieces) == chat_tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces) and sum(map(bool, pieces)) >= 3


@given(st.lists(st.integers(0, 269), max_size=30))
@settings(deadline=None)
def test_any_tokens_give_the_text_that_decode_gives(chat_tokenizer, ids):
    assert "".join(stream(chat_tokenizer, ids)) == chat_tokenizer.decode(ids, skip_special_tokens=True)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_a_stop_string_ends_the_text_before_it(chat_tokenizer, text, stops):
    pieces = stream(chat_tokenizer, chat_tokenizer(text)["input_ids"], stops)
    spans = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    _, end = min(spans, default=(0, len(text)))  # the stop string that is complete first; of those, the longest
    assert "".join(pieces) == text[:end]


def test_only_the_possible_beginning_of_a_stop_string_is_held_back(chat_tokenizer):
    text = TextStream(chat_tokenizer, ["the end", "list"])
    pieces = [text.add(chat_tokenizer(letter)["input_ids"][0]) for letter in "a the enough"]
    assert pieces == ["a", " ", "", "", "", "", "", "", "the eno", "u", "g", "h"]
