# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Files and Hub ids to raw records, loaded or streamed."""

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Json, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from phase15.quickstart import DOCSTRINGS, docstring_records


logger = logging.get_logger("phase15.data")
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_records(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Opens a data set.

    Args:
        name (`str`): a JSONL, JSON, CSV or Parquet file, a Hub id, or "python-docstrings", which every machine has.
        config (`str`, *optional*): configuration of a Hub data set.
        split (`str`): split of a Hub data set.

    Raises:
        ValueError: for a file that is missing, empty, of another type or not readable, with the first bad record.
    """
    if name == DOCSTRINGS:
        return Dataset.from_list(list(docstring_records()))
    path = Path(name)
    if path.suffix.lower() not in BUILDERS:
        if path.exists():
            raise ValueError(
                f"{name}: expected a file that ends in {', '.join(BUILDERS)}, or the id of a Hub data set."
            )
        return load_dataset(name, config, split=split)
    if not path.is_file():
        raise ValueError(f"{name}: no such file.")
    if not path.stat().st_size:
        raise ValueError(f"{name}: the file is empty.")
    try:
        if path.suffix.lower() == ".csv":
            return Dataset.from_list(list(_csv_records(path)))
        if path.suffix.lower() in (".jsonl", ".json"):  # not by pyarrow, to which "2020-01-01" is a date
            records = list(_json_records(path))
            columns = dict.fromkeys(name for record in records for name in record)
            values = {name: [record.get(name) for record in records] for name in columns}
            try:
                return Dataset.from_dict(values, features=Features({name: Json() for name in columns}))
            except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold
                for number, record in enumerate(records, start=1):
                    check_encodes(json.dumps(record, ensure_ascii=False), f"record {number}")
                raise
        return load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def stream_records(name: str, config: str | None = None, split: str = "train") -> IterableDataset:
    """
    As `load_records`, but nothing is read before it is needed, and one record at a time.

    Args:
        name (`str`): a JSONL, CSV or Parquet file or a pattern of several ("data/*.jsonl"), which are read in the
            order of their names, a Hub id, or "python-docstrings".

    Returns:
        `IterableDataset`: rows of `fields`, the record; `number`, its number from 1; and `where`, its file and its
        number in that.

    Raises:
        ValueError: for files that are missing, empty or of another type; for what is in them when it is reached.
    """
    suffix = Path(name).suffix.lower()
    if name == DOCSTRINGS:
        sources = ((name, docstring_records),)
    elif suffix in READERS:
        paths = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise ValueError(f"{name}: no such file.")
        for path in paths:
            if not Path(path).stat().st_size:
                raise ValueError(f"{path}: the file is empty.")
        sources = tuple((path, partial(READERS[suffix], Path(path))) for path in paths)
    elif suffix in BUILDERS or Path(name).exists():
        raise ValueError(
            f"{name}: expected a file that ends in {', '.join(READERS)}, which can be read record by record, "
            "or the id of a Hub data set."
        )
    else:
        sources = ((name, partial(_numbered, load_dataset(name, config, split=split, streaming=True))),)
    # in a tuple: `datasets` takes a list for shards, which it would read apart, shuffle and number each from 1
    return IterableDataset.from_generator(_rows, gen_kwargs={"sources": sources})


class Phase15RecordError(ValueError):
    """What is wrong with a record of a stream, with its file and number; known only when the record is reached."""


def _rows(sources: tuple[tuple[str, Callable], ...]) -> Iterator[dict]:
    numbers = itertools.count(1)
    for name, read in sources:
        try:
            for in_file, record in enumerate(read(), start=1):
                yield {"fields": record, "number": next(numbers), "where": f"{name}, record {in_file}"}
        except (ValueError, OSError) as error:
            raise Phase15RecordError(f"{name}: {error}") from error


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    """Every value is a string: 007 stays 007, and an answer may be NA."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for number, record in enumerate(csv.DictReader(file, restkey="", restval=""), start=1):
                if "" in record:
                    raise ValueError(f"record {number} has more values than the header has columns.")
                yield record
        except UnicodeDecodeError:  # of a block of lines, so that neither its place nor `number` helps
            with path.open("rb") as lines:
                for place, line in enumerate(lines, start=1):
                    _decode(line, f"line {place} is ")
            raise
        except csv.Error as error:
            raise ValueError(f"record {number + 1} is not CSV: {error}") from error
    if not number:
        raise ValueError("there is no usable record.")


def _json_records(path: Path) -> Iterator[dict]:
    """A JSON Lines file, line by line, or the whole of a JSON file."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".jsonl":
            records = _json_lines(file)
        else:
            records = _from_json(file.read(), "")
            records = records if isinstance(records, list) else [records]
        number = 0
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"record {number} is a {kind}, but an object with named fields was expected.")
            if not record:
                raise ValueError(f"record {number} has no field.")
            yield record
    if not number:
        raise ValueError("there is no usable record.")


def _json_lines(file: Iterable[bytes]) -> Iterator:
    lines = ((place, line) for place, line in enumerate(file, start=1) if line.strip())
    for number, (place, line) in enumerate(lines, start=1):
        yield _from_json(line, f"record {number} (line {place}) is ")


def _from_json(text: bytes, where: str):
    try:
        return json.loads(_decode(text, where))
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if where else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}not JSON: {error.msg}, {place}.") from error
    except RecursionError as error:
        raise ValueError(f"{where}not a record: it is nested too deeply.") from error


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise ValueError(f"{where or f'line {line} is '}not UTF-8: it has the byte {text[error.start]:#x}.") from error


def _parquet_records(path: Path) -> Iterator[dict]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _numbered(record for batch in file.iter_batches(1000) for record in batch.to_pylist())


def _numbered(records: Iterable[dict]) -> Iterator[dict]:
    """The records, until one cannot be read."""
    number = 0
    try:
        for record in records:
            yield record
            number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"the records from number {number + 1} on cannot be read: {error}") from error


READERS = {".jsonl": _json_records, ".csv": _csv_records, ".parquet": _parquet_records}


def check_encodes(text: str, where: str):
    """Refuses half a surrogate pair: JSON may hold it, a tokenizer stumbles over it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not text: {error}.") from error
