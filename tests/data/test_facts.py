# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The data set `facts`: what its chats say, and what their order is."""

import json

import pytest

from phase15.data.facts import BLOCK, FACT_KINDS, Chat, FactsArguments, fresh_chats, plain_sentences, training_records
from phase15.data.records import open_records, read_texts


def chats(seed: int = 0, **arguments) -> list[list[dict]]:
    return [record["messages"] for record in training_records(FactsArguments(**arguments), seed)]


def num_words(messages: list[dict]) -> int:
    """Words between the facts and the questions."""
    questions = sum(messages[2]["content"].count(kind.question) for kind in FACT_KINDS)
    asked = messages[2]["content"]
    for kind in FACT_KINDS:
        asked = asked.replace(kind.question, "")
    assert questions == messages[3]["content"].count(".")
    return len(asked.split())


def test_answers_are_what_was_told():
    for messages in chats(facts_records=200):
        assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
        told, (asked, answer) = messages[0]["content"], (turn["content"] for turn in messages[2:])
        at = {asked.index(kind.question): kind for kind in FACT_KINDS if kind.question in asked}
        expected = []
        for _, kind in sorted(at.items()):  # in the order of the questions
            (value,) = [value for value in kind.values if kind.statement.format(value) in told]
            expected.append(kind.answer.format(value))
        assert len(expected) == 4 and answer == " ".join(expected)


def test_a_seed_decides_everything():
    assert chats(3, facts_records=40) == chats(3, facts_records=40) != chats(4, facts_records=40)
    rows = open_records("facts", facts=FactsArguments(facts_records=40), seed=3)
    assert [row["fields"]["messages"] for row in rows] == chats(3, facts_records=40)
    assert [row["where"] for row in rows][-1] == "facts, record 40"


def test_the_distance_grows_over_the_records():
    records = 120 * BLOCK
    distances = [num_words(messages) for messages in chats(facts_records=records, facts_distances=[0, 16, 40])]
    assert all(len(set(distances[start : start + BLOCK])) == 1 for start in range(0, records, BLOCK))
    assert set(distances[: records // 3]) == {0}
    assert set(distances[: 2 * records // 3]) == {0, 16}
    late = distances[2 * records // 3 :]
    assert set(late) == {0, 16, 40} and late.count(40) > len(late) // 2, "half of them, and a third of the other half"


def test_every_value_is_as_likely_as_the_others():
    """So a guess is right one time in 16."""
    assert all(len(set(kind.values)) == 16 for kind in FACT_KINDS)
    told = " ".join(messages[0]["content"] for messages in chats(facts_records=4800))
    for kind in FACT_KINDS:
        counts = [told.count(kind.statement.format(value)) for value in kind.values]
        assert 130 < min(counts) and max(counts) < 270, "about 200 each"


def test_fresh_chats_have_sentences_of_their_own():
    seen = " ".join(messages[2]["content"] for messages in chats(facts_records=800, facts_distances=[300]))
    used = [sentence for sentence in plain_sentences() if sentence in seen]
    fresh = " ".join(chat.text for chat in fresh_chats(300, 100, 4))
    assert len(used) > 800 and not [sentence for sentence in used if len(sentence) > 40 and sentence in fresh]
    assert fresh_chats(20, 2, 4) == fresh_chats(20, 2, 4) != fresh_chats(20, 2, 4, seed=1)
    assert {len(chat.text.split()) for chat in fresh_chats(77, 9, 4)} == {77}


def test_text_of_a_file_stands_between(tmp_path):
    """The longest text of each record; the last tenth of them is for fresh chats alone."""
    path = tmp_path / "text.jsonl"
    rows = [{"query": "Why?", "answer": f"Because {number}\n\nit is."} for number in range(20)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"n": 1}]))
    texts = read_texts(str(path))
    assert texts == [f"Because {number} it is." for number in range(20)] and read_texts(None) is None
    facts = FactsArguments(facts_records=200, facts_distances=[8], facts_text=str(path))
    rows = list(open_records("facts", facts=facts, seed=3))
    assert [row["fields"] for row in rows] == list(training_records(facts, 3, texts))
    between = {row["fields"]["messages"][2]["content"].partition(" is. ")[0] for row in rows}
    assert between == {f"Because {number} it" for number in range(18)}
    between = {chat.text for chat in fresh_chats(8, 50, 4, texts=texts)}
    assert between == {f"Because {a} it is. Because {b} it is." for a in (18, 19) for b in (18, 19)}


@pytest.mark.parametrize("text", ['{"a": "one text"}\n', '{"a": 1}\n{"a": 2}\n', "no JSON"])
def test_a_file_without_text_is_refused(text, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="text.jsonl: .*(2 records with a text|not JSON)"):
        next(iter(open_records("facts", facts=FactsArguments(facts_text=str(path)))))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("You live in Oslo. You play the cello.", 2),
        (" You live in Rome. You play the cello.", 1),
        ("You play the cello. You live in Oslo.", 0),  # not what was asked for
        ("You live in Oslo", 0),
        ("You live in Oslo. You play the cello. You live in Oslo.", 2),
        ("", 0),
    ],
)
def test_each_answer_counts_in_its_place(said, right):
    chat = Chat("", "", "", ["You live in Oslo.", "You play the cello."], ["Oslo", "cello"])
    assert chat.count_right(said) == right


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"facts_distances": []}, "facts_distances"),
        ({"facts_distances": [3, -1]}, "-1"),
        ({"facts_records": 0}, "facts_records"),
        ({"facts_per_chat": 7}, "from 1 to 6"),
        ({"facts_per_chat": 0}, "facts_per_chat"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        FactsArguments(**arguments)
