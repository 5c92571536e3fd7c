# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Reads raw records from files and Hub data sets, one after another. There is one reader for each type of file. Whoever
needs all records reads to the end.
"""

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet
from datasets import Features, IterableDataset, load_dataset

from phase15.data.docstrings import DOCSTRINGS, docstring_records
from phase15.data.facts import FACTS, FactsArguments, training_records


class Phase15RecordError(ValueError):
    """A record that cannot be used, with its file and number. It is known only when the record is reached."""


def open_records(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = True,
    facts: FactsArguments | None = None,
    seed: int = 42,
) -> IterableDataset:
    """
    Opens a data set. Nothing is read before it is needed, and then one record at a time.

    Args:
        name (`str`): a JSONL, JSON, CSV or Parquet file; a pattern of several ("data/*.jsonl"), which are read in the
            order of their names; a Hub id; or "facts" or "python-docstrings", which every machine has.
        config (`str`, *optional*): configuration of a Hub data set. Files have none.
        split (`str`): split of a Hub data set. Files have only "train".
        streaming (`bool`): do not download the files of a Hub data set.
        facts (`FactsArguments`, *optional*): of the data set "facts".
        seed (`int`): of the data set "facts".

    Returns:
        `IterableDataset`: rows of `fields`, the record; `number`, from 1; and `where`, its file and its number there.

    Raises:
        ValueError: for files that are missing, empty or of another type, or with a configuration or a split.
            [`Phase15RecordError`] when a record that cannot be read is reached.
    """
    suffix = Path(name).suffix.lower()
    if name in EMBEDDED or suffix in READERS:
        check_no_parts(name, config, split)
    if name == FACTS:
        sources = [(name, partial(_facts_records, facts or FactsArguments(), seed))]
    elif name == DOCSTRINGS:
        sources = [(name, docstring_records)]
    elif suffix in READERS:
        sources = [(path, partial(READERS[suffix], Path(path))) for path in find_files(name)]
    elif Path(name).exists():
        raise ValueError(f"{name}: expected a file that ends in {', '.join(READERS)}, or the id of a Hub data set.")
    else:
        dataset = load_dataset(name, config, split=split, streaming=streaming)
        sources = [(name, partial(_count_until_error, dataset))]
    # `datasets` would take a list for shards, and read, shuffle and number each of them apart
    return IterableDataset.from_generator(_iter_rows, gen_kwargs={"sources": tuple(sources)})


def find_files(name: str) -> list[str]:
    """Returns the paths of a name or a pattern, sorted; raises a ValueError for no file or an empty one."""
    if Path(name).is_file():  # a name may hold glob characters itself
        paths = [name]
    else:
        paths = [path for path in sorted(glob.glob(name, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise ValueError(f"{name}: no such file.")
    for path in paths:
        if not Path(path).stat().st_size:
            raise ValueError(f"{path}: the file is empty.")
    return paths


def check_no_parts(name: str, config: str | None, split: str):
    """Raises a ValueError for a configuration or a split, which only Hub data sets have."""
    if config is not None:
        raise ValueError(f"{name}: `dataset_config` is {config!r}, but only a Hub data set has configurations.")
    if split != "train":
        raise ValueError(
            f"{name}: `dataset_train_split` is {split!r}, but only a Hub data set has splits; a file is read whole."
        )


def _facts_records(facts: FactsArguments, seed: int) -> Iterator[dict]:
    return training_records(facts, seed, read_texts(facts.facts_text))


def read_texts(name: str | None) -> list[str] | None:
    """
    Returns the longest text of each record of a data set, without line breaks; `None` without a name.

    Raises:
        ValueError: when the data set has fewer than 2 texts. [`Phase15RecordError`] for a record that cannot be read.
    """
    if name is None:
        return None
    texts = []
    for row in open_records(name):
        strings = [value for value in row["fields"].values() if isinstance(value, str)]
        text = " ".join(max(strings, key=len, default="").split())
        if text:
            texts.append(text)
    if len(texts) < 2:
        raise ValueError(f"{name}: at least 2 records with a text were expected.")
    return texts


def _iter_rows(sources: tuple[tuple[str, Callable], ...]) -> Iterator[dict]:
    """Yields the rows of `open_records`, numbered over all sources."""
    number = 0
    for name, read in sources:
        try:
            for number_in_file, record in enumerate(read(), start=1):
                number += 1
                yield {"fields": record, "number": number, "where": f"{name}, record {number_in_file}"}
        except (ValueError, OSError) as error:
            raise Phase15RecordError(f"{name}: {error}") from error


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    """Yields records whose values are all strings: 007 stays 007, and an answer may be NA."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        number = 0
        begin = 1  # the line at which the next record begins
        try:
            names = reader.fieldnames or []
            repeated = sorted(name for name in names if names.count(name) > 1)
            if repeated:
                raise ValueError(f"the header has the column {repeated[0]!r} twice.")
            begin = reader.line_num + 1
            for number, record in enumerate(reader, start=1):
                if None in record:
                    raise ValueError(f"record {number} has more values than the header has columns.")
                yield record
                begin = reader.line_num + 1
        except UnicodeDecodeError:  # in a block of lines: find the line
            with path.open("rb") as lines:
                for position, line in enumerate(lines, start=1):
                    _decode(line, f"line {position} is ")
            raise
        except csv.Error as error:
            reason = "its quote is not closed" if "unexpected end of data" in str(error) else error
            raise ValueError(f"record {number + 1} (line {begin}) is not CSV: {reason}.") from error
    if not number:
        raise ValueError("there is no usable record.")


def _json_records(path: Path) -> Iterator[dict]:
    """Yields the records of a JSON Lines file, line by line, or of a JSON file that is read whole."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".jsonl":
            records = _json_lines(file)
        else:
            content = _parse_json(file.read(), "")
            records = content if isinstance(content, list) else [content]
        number = 0
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"record {number} is a {kind}, but an object with named fields was expected.")
            if not record:
                raise ValueError(f"record {number} has no field.")
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # half a surrogate pair: JSON may hold one, and no tokenizer reads it
                raise ValueError(f"record {number} is not text: {error}.") from error
            yield record
    if not number:
        raise ValueError("there is no usable record.")


def _json_lines(file: Iterable[bytes]) -> Iterator:
    """Yields the value of each line that is not blank."""
    number = 0
    for position, line in enumerate(file, start=1):
        if line.strip():
            number += 1
            yield _parse_json(line, f"record {number} (line {position}) is ")


def _parse_json(text: bytes, where: str):
    try:
        return json.loads(_decode(text, where), object_pairs_hook=partial(_unique_fields, where=where))
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if where else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}not JSON: {error.msg}, {position}.") from error
    except RecursionError as error:
        raise ValueError(f"{where}not a record: it is nested too deeply.") from error


def _unique_fields(pairs: list[tuple[str, object]], where: str) -> dict:
    """Returns the fields of a JSON object. `json` would keep the last of two with one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}not a record: it has the field {twice!r} twice.")
    return fields


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise ValueError(f"{where or f'line {line} is '}not UTF-8: it has the byte {text[error.start]:#x}.") from error


def _parquet_records(path: Path) -> Iterator[dict]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise ValueError(f"two columns have the same name: {', '.join(file.schema_arrow.names)}.")
        features = Features.from_arrow_schema(file.schema_arrow)  # decodes JSON columns, as pyarrow does not
        batches = (batch.to_pylist() for batch in file.iter_batches(1000))
        records = itertools.chain.from_iterable(batches)
        yield from _count_until_error(map(features.decode_example, records))


def _count_until_error(records: Iterable[dict]) -> Iterator[dict]:
    """Yields the records; an error of reading names the number of the first record that is lost."""
    number = 0
    try:
        for record in records:
            yield record
            number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"the records from number {number + 1} on cannot be read: {error}") from error


EMBEDDED = (FACTS, DOCSTRINGS)
READERS = {".jsonl": _json_records, ".json": _json_records, ".csv": _csv_records, ".parquet": _parquet_records}


__all__ = ["EMBEDDED", "READERS", "Phase15RecordError", "open_records", "read_texts"]
