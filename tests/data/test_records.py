# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Files of every type and Hub data sets to records, and the errors of files that cannot be read."""

import itertools
import re

import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Json, load_dataset
from test_examples import CASES, GOOD, PAIR, SUFFIXES, read, stream, write

from phase15.data import records
from phase15.data.examples import Phase15Encoder, split_stream
from phase15.data.records import Phase15RecordError, open_records


UNREADABLE = {  # file, content, what the error says besides the file
    "missing": ("none.jsonl", None, ["no such file"]),
    "empty": ("data.jsonl", "", ["empty"]),
    "extension": ("data.txt", "a", [".jsonl", ".json", ".csv", ".parquet"]),
    "long-csv": ("data.csv", "question,answer\na,b\nc," + "x" * 140_000, ["record 2", "CSV"]),
    "broken-jsonl": ("data.jsonl", GOOD + '{"question": "c", "answer": }\n' + GOOD, ["record 2", "JSON"]),
    "cut-off-jsonl": ("data.jsonl", GOOD * 2 + '{"question": "c", "ans', ["record 3", "JSON"]),
    "broken-json": ("data.json", f'[{GOOD}, {{"question": "c", "answer": }}]', ["line 2"]),
    "not-utf8-jsonl": ("data.jsonl", GOOD.encode() + GOOD.encode().replace(b"b", b"\xff"), ["record 2", "utf-8"]),
    "not-utf8-json": ("data.json", f"[{GOOD}]".encode().replace(b"b", b"\xff"), ["utf-8"]),
    "not-utf8-csv": ("data.csv", b"question,answer\na,b\nc,\xff\n", ["utf-8"]),
    "list-jsonl": ("data.jsonl", GOOD + "[1]\n", ["record 2", "list", "object"]),
    "number-jsonl": ("data.jsonl", "1\n" + GOOD, ["record 1", "int", "object"]),
    "string-jsonl": ("data.jsonl", '"a"\n"b"\n', ["record 1", "str", "object"]),
    "number-json": ("data.json", f"[{GOOD}, 5]", ["record 2", "int"]),
    "not-parquet": ("data.parquet", "PAR2", ["parquet"]),
    "wide-csv": ("data.csv", "question,answer\na,b,c\n", ["record 1"]),
    "open-quote-csv": (
        "data.csv",
        'question,answer\nq1,a1\nq2,"a2\nq3,a3\nq4,a4\n',
        ["record 2 (line 3)", "not closed"],
    ),
    "loose-quote-csv": ("data.csv", 'question,answer\nq1,"a" 1\n', ["record 1 (line 2)", "CSV"]),
    "column-twice-csv": ("data.csv", "question,answer,answer\na,b,c\n", ["'answer' twice"]),
    "field-twice-jsonl": (
        "data.jsonl",
        GOOD + '{"question": "a", "answer": "b", "answer": "c"}\n',
        ["record 2", "'answer' twice"],
    ),
    "no-records-csv": ("data.csv", "question,answer\n", ["no usable record"]),
    "no-records-json": ("data.json", "[]", ["no usable record"]),
    "no-fields-jsonl": ("data.jsonl", "{}\n{}\n", []),
}


@pytest.mark.parametrize("how", [read, stream])
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files(case, how, chat_tokenizer, tmp_path):
    name, content, words = UNREADABLE[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        list(how(tmp_path / name, chat_tokenizer))
    for word in [str(tmp_path / name), *words]:
        assert re.search(rf"{re.escape(word)}\b" if word[-1].isdigit() else re.escape(word), str(error.value), re.I)
    assert "Instruction" not in str(error.value)  # the library's "train" corresponds to no data


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_stream_of_several_files(suffix, chat_tokenizer, tmp_path):
    """By name, with their records numbered on; what is wrong with one is said of the record's own file."""
    pairs = [{"question": "a" * (i + 1), "answer": "b"} for i in range(7)]
    for name, part in (("b", pairs[4:]), ("a", pairs[:2]), ("aa", pairs[2:4])):
        write(tmp_path / f"{name}{suffix}", part)
    (tmp_path / "whole").mkdir()
    whole = write(tmp_path / "whole" / f"x{suffix}", pairs)
    rows = list(stream(tmp_path / f"*{suffix}", chat_tokenizer))
    assert rows == list(read(whole, chat_tokenizer))
    write(tmp_path / f"aa{suffix}", [pairs[2], {"question": "", "answer": "b"}])
    rows = stream(tmp_path / f"*{suffix}", chat_tokenizer)
    assert [next(rows)["record"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(Phase15RecordError, match=rf"/aa\{suffix}, record 2: `question`"):
        next(rows)
    (tmp_path / f"aa{suffix}").write_text("")
    with pytest.raises(ValueError, match=rf"/aa\{suffix}: the file is empty"):
        open_records(str(tmp_path / f"*{suffix}"))


def test_the_lines_of_a_stream_are_read_one_by_one(chat_tokenizer, tmp_path):
    """Not the file at once, nor a block of megabytes: the broken line is met when it is its turn."""
    (tmp_path / "data.jsonl").write_text(GOOD * 40 + "broken\n")
    rows = stream(tmp_path / "data.jsonl", chat_tokenizer)
    assert [next(rows)["record"] for _ in range(40)] == list(range(1, 41))
    with pytest.raises(Phase15RecordError, match=r"data\.jsonl: record 41 \(line 41\) is not JSON"):
        next(rows)


def test_the_broken_part_of_a_parquet_file(chat_tokenizer, tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR] * 3000), path, row_group_size=1000)
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)
    rows = stream(path, chat_tokenizer)
    assert [next(rows)["record"] for _ in range(2000)] == list(range(1, 2001))
    with pytest.raises(Phase15RecordError, match=r"data\.parquet: the records from number 2001 on cannot be read"):
        list(rows)


def test_a_stream_from_the_hub(chat_tokenizer, monkeypatch, tmp_path):
    """One of several files, which stay in their order in every pass; what is wrong with a record is said of it."""
    parts = [[{"question": f"{i}{j}", "answer": "b"} for j in range(3)] for i in range(4)]
    files = [write(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(parts)]
    asked = []

    def hub(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return load_dataset("json", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(records, "load_dataset", hub)
    rows = open_records("me/data", "main", "test")
    assert asked == [("me/data", "main", "test", True)]
    encode = Phase15Encoder(rows, chat_tokenizer, 64, "me/data")
    training, _ = split_stream(rows, 1)
    numbered = [(i + 1, record) for i, record in enumerate(record for part in parts for record in part)]
    assert [(row["number"], row["fields"]) for row in itertools.islice(training, 22)] == numbered[1:] * 2
    parts[1][1]["answer"] = None
    write(tmp_path / "1.jsonl", parts[1])
    with pytest.raises(Phase15RecordError, match="me/data, record 5: `answer` is missing"):
        list(map(encode, rows))
    (tmp_path / "2.jsonl").write_text(GOOD + "broken\n")
    with pytest.raises(Phase15RecordError, match="me/data: the records from number 7 on cannot be read: .*JSON"):
        list(rows)


def test_docstrings_are_streamed_too(chat_tokenizer):
    first, second = itertools.islice(stream("python-docstrings", chat_tokenizer), 2)
    assert (first["record"], second["record"]) == (1, 2) and first["input_ids"] != second["input_ids"]


def test_a_stream_gives_what_a_file_does(chat_tokenizer, tmp_path):
    for suffix, (case, (record, _)) in itertools.product(SUFFIXES, CASES.items()):
        if suffix == ".csv" and any(isinstance(value, list) for value in record.values()):
            continue  # which a CSV file cannot hold
        plain = {"prompt": "a", "completion": "b"} if case == "prompt-completion" else record
        path = write(tmp_path / f"{case}{suffix}", [record, plain, record])
        rows = list(read(path, chat_tokenizer))
        assert list(stream(path, chat_tokenizer)) == rows and [row["record"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("parts", [{"split": "train[:4]"}, {"split": "test"}, {"config": "main"}])
def test_files_have_no_parts(parts, tmp_path):
    """A file would be read whole, whatever part was asked for."""
    for name in (write(tmp_path / "x.jsonl", [PAIR]), "python-docstrings"):
        with pytest.raises(ValueError, match=f"{name}: `dataset_(config|train_split)` is '{[*parts.values()][0][:4]}"):
            open_records(name, **parts)


def test_a_column_without_a_name_is_a_column(tmp_path):
    """pandas writes its index so."""
    (tmp_path / "x.csv").write_text(",question,answer\n0,a,b\n")
    assert next(iter(open_records(str(tmp_path / "x.csv"))))["fields"] == {"": "0", **PAIR}


def test_text_stays_text_in_every_file(tmp_path):
    """Also where it reads as JSON, a number, a date or nothing."""
    values = ["7", "[1, 2]", "null", "2020-01-01", '{"a": 1}', "NA", "007"]
    pairs = [{"question": value, "answer": value} for value in values]
    for suffix in SUFFIXES:
        rows = open_records(write(tmp_path / f"data{suffix}", pairs))
        assert [row["fields"] for row in rows] == pairs


def test_a_json_column_of_a_parquet_file_is_decoded(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    Dataset.from_dict({"messages": [turns]}, features=Features({"messages": Json()})).to_parquet(
        tmp_path / "x.parquet"
    )
    (row,) = open_records(str(tmp_path / "x.parquet"))
    assert row == {"fields": {"messages": turns}, "number": 1, "where": f"{tmp_path}/x.parquet, record 1"}
