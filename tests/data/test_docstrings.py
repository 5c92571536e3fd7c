# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
import inspect
import re

from test_examples import ids_of

from phase15.data.docstrings import docstring_records
from phase15.data.tokenizer import train_tokenizer


def test_docstrings_of_the_standard_library():
    records = {record["question"]: record["answer"] for record in docstring_records()}
    assert len(records) > 1000 and len(set(records.values())) == len(list(records.values()))
    assert all(40 <= len(answer) <= 1200 for answer in records.values())
    assert records["What is the function textwrap.dedent for?"] == inspect.getdoc(__import__("textwrap").dedent)
    assert records["What is the class argparse.ArgumentParser for?"].startswith("Object for parsing command line")
    assert not any(re.search(r"\b(test|idlelib)\.|\._", question) for question in records)


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
