# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer of a new model: trained on every text of its records, and lossless for any other."""

from test_examples import ids_of

from phase15.data.tokenizer import iter_strings, train_tokenizer


def test_a_tokenizer_is_trained_on_all_texts_of_a_record():
    """Of messages too; roles are no text."""
    word = "supercalifragilistic"
    flat = [{"question": word, "answer": f"{word}!"}] * 4
    turns = [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word}!"}]
    vocabularies = [train_tokenizer(records, 300).get_vocab() for records in (flat, [{"messages": turns}] * 4)]
    assert vocabularies[0] == vocabularies[1] and len(vocabularies[0]) > 270


def test_the_quickstarts_tokenizer(chat_tokenizer):
    """Any text survives it, and its marks are single tokens."""
    text = "Any tëxt at all: 日本語 🙂\n\tdef f(x): return x"
    assert chat_tokenizer.decode(ids_of(chat_tokenizer, text)) == text
    ids = ids_of(chat_tokenizer, "<|user|>\nHi<|end|>\n<|assistant|>\n")
    marks = chat_tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert [id for id in ids if id in marks] == marks
    assert chat_tokenizer.eos_token_id == marks[1] != chat_tokenizer.pad_token_id


def test_strings_of_a_record_come_in_order_without_roles():
    record = {"system": "a", "messages": [{"role": "user", "content": "b"}, {"content": ["c", 3, None]}], "id": 4}
    assert list(iter_strings(record)) == ["a", "b", "c"]
