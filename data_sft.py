# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Records to token ids. A record is one question with its answer, in any of these columns (TRL's dataset formats and the
common pairs; the first that matches is used):

    messages               the conversation; its last turn, the assistant's, is the answer
    prompt, completion     two strings, taken as they are, or two lists of messages
    question, answer
    query, answer
    instruction (, input), output

All but the string prompt/completion go through the tokenizer's chat template. The end token closes every answer.
"""

import ast
import csv
import glob
import itertools
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import pyarrow.parquet
import torch
from datasets import Dataset, Features, IterableDataset, Json, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger("phase15.data")

FORMATS = (
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "answer"),
    ("instruction", "output"),
)
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DOCSTRINGS = "python-docstrings"  # the embedded data set
SHUFFLE_BUFFER = 10_000  # records of a stream that are held to be shuffled
MAX_QUERY_TOKENS = 65_536  # training holds every step over a query in memory: a longer one is a mistake in the data


def load_tokenizer(name: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`; raises a ValueError that names what cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{name}: the tokenizer cannot be loaded: {error}") from error


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


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    source: str = "data set",
    vocab_size: int | None = None,
) -> Dataset:
    """
    Turns records into `input_ids` (query, then answer), `query_length` and `record`, the record's number from 1.
    Answers longer than `max_answer_length` tokens are cut, and the cuts counted in the log.

    Raises:
        ValueError: for a data set without a record, an unknown format, a missing or empty field or one of the wrong
            type, a query of more than `MAX_QUERY_TOKENS`, a tokenizer without an end token or chat template where one
            is needed, or one that gives a token which a model of `vocab_size` tokens does not have.
    """
    columns = dataset.column_names
    if not len(dataset):
        raise ValueError(f"{source}: there is no usable record.")
    fields = record_format(columns, tokenizer, source)

    def encode_record(record: dict, index: int) -> dict:
        number = index + 1
        return encode(record, number, f"{source}, record {number}", fields, tokenizer, max_answer_length, vocab_size)

    encoded = dataset.map(encode_record, with_indices=True, remove_columns=columns, desc=f"Tokenizing {source}")
    if num_cut := sum(encoded["cut"]):
        logger.warning(f"{source}: {num_cut} of {len(encoded)} answers were cut at {max_answer_length} tokens.")
    return encoded.remove_columns("cut")


def record_format(columns: list[str], tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, ...]:
    """The fields that hold query and answer, from the columns of the first record."""
    fields = next((names for names in FORMATS if set(names) <= set(columns)), None)
    if fields is None:
        expected = "; ".join(", ".join(names) for names in FORMATS)
        raise ValueError(f"{source}, record 1: unknown format with columns {columns}; expected one of: {expected}.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: the tokenizer has no end token (`eos_token`) to close the answers with.")
    return fields


def encode(
    record: dict,
    number: int,
    where: str,
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    vocab_size: int | None = None,
) -> dict:
    """One tokenized record; `cut` says whether its answer is not whole."""
    query, answer = split_record(record, fields, where)
    if isinstance(query, str):
        query_ids = tokenizer(query)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(f"{where}: the tokenizer has no chat template; use string columns prompt, completion.")
    else:
        try:
            query_ids = tokenizer.apply_chat_template(query, add_generation_prompt=True, return_dict=True)["input_ids"]
        except jinja2.TemplateError as error:  # a syntax error, or what the template itself refuses
            raise ValueError(f"{where}: the tokenizer's chat template cannot be used: {error}") from error
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if not query_ids:
        raise ValueError(f"{where}: the tokenizer makes no token of the query.")
    if len(query_ids) > MAX_QUERY_TOKENS:
        raise ValueError(f"{where}: the query has {len(query_ids):,} tokens, but {MAX_QUERY_TOKENS:,} are the most.")
    largest = max(query_ids + answer_ids)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{where}: the tokenizer does not fit the model: {tokenizer.convert_ids_to_tokens(largest)!r} is token "
            f"{largest}, but the model's vocabulary has {vocab_size}."
        )
    return {
        "input_ids": query_ids + answer_ids[:max_answer_length],
        "query_length": len(query_ids),
        "record": number,
        "cut": len(answer_ids) > max_answer_length,
    }


def split_record(record: dict, fields: tuple[str, ...], where: str) -> tuple[str | list[dict], str]:
    """The query, a string or a list of messages, and the answer of a record in the format of `fields`."""
    if fields == ("messages",):
        *query, answer = check_messages(record.get("messages"), f"{where}: `messages`", at_least=2)
        return query, answer_of(answer, f"{where}: the last of `messages`")
    prompt, completion = (record.get(name) for name in fields)
    if fields == ("prompt", "completion") and isinstance(prompt, list):
        prompt = check_messages(prompt, f"{where}: `prompt`")
        *more, answer = check_messages(completion, f"{where}: `completion`")
        return prompt + more, answer_of(answer, f"{where}: the last of `completion`")
    for name in fields:
        check_text(record.get(name), f"{where}: `{name}`", seen=record)
    if fields == ("prompt", "completion"):
        return prompt, completion
    if fields == ("instruction", "output") and record.get("input"):
        prompt = f"{prompt}\n\n{check_text(record['input'], f'{where}: `input`', seen=record)}"
    return [{"role": "user", "content": prompt}], completion


def check_text(value, where: str, seen: dict) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(
            f"{where} is missing or empty; the record has {[k for k, v in seen.items() if v is not None]}."
        )
    if not isinstance(value, str):
        raise ValueError(f"{where} is a {type(value).__name__} ({value!r:.40}), but a string was expected.")
    check_encodes(value, where)
    return value


def check_encodes(text: str, where: str):
    """Refuses half a surrogate pair: JSON may hold it, a tokenizer stumbles over it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not text: {error}.") from error


def check_messages(value, where: str, at_least: int = 1) -> list[dict]:
    if not isinstance(value, list) or len(value) < at_least:
        raise ValueError(f"{where} must be a list of {at_least} or more messages, not {value!r:.80}.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must hold messages with `role` and `content`, not {message!r:.80}.")
        check_text(message.get("content"), f"{where}: the `content` of a message of role {message['role']!r}", message)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def answer_of(message: dict, where: str) -> str:
    if message["role"] != "assistant":
        raise ValueError(f"{where} is the answer, so its role must be 'assistant', not {message['role']!r}.")
    return message["content"]


# streams: the records are numbered, shuffled and dealt out as they are, and tokenized where they are trained on


class Phase15Stream(torch.utils.data.IterableDataset):
    """
    The rows of a stream, pass after pass without an end. Trainer would count passes too, but not when it resumes
    (huggingface/transformers#26413): of one that does not end it has only batches to skip.

    It is the same in every process, and one source to accelerate, however many files it reads: so each process takes
    its share of every global batch, instead of files of its own, and a run is the same on any number of them.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict]:
        for number in itertools.count():
            self.dataset.set_epoch(number)  # shuffled records come in another order
            row = None
            for row in self.dataset:
                yield row
            if row is None:  # or this would go on for ever
                raise Phase15RecordError("the stream has no more record to train on; were its files changed?")


def split_stream(
    dataset: IterableDataset, num_validation: int, shuffle_seed: int | None = None, source: str = "data set"
) -> tuple[Phase15Stream, list[dict] | None]:
    """
    The rows to train on, and the first `num_validation`, which are read now, to validate. With a `shuffle_seed` the
    former are shuffled, as far as a buffer of `SHUFFLE_BUFFER` records goes.
    """
    validation, training = list(dataset.take(num_validation)), dataset.skip(num_validation)
    if next(iter(training), None) is None:
        raise ValueError(f"{source}: of {len(validation)} records none is left to train on.")
    if shuffle_seed is not None:
        training = training.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    return Phase15Stream(training), validation or None


def stream_encoder(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    source: str = "data set",
    vocab_size: int | None = None,
) -> Callable[[dict], dict]:
    """
    A function that turns a row of `dataset` into what `tokenize` turns a record into. Only the first record is looked
    at before it is needed, and cut answers are not counted.

    Raises:
        ValueError: for what `tokenize` refuses, a [`Phase15RecordError`] where it is about a record that is reached.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source}: there is no usable record.")
    fields = record_format(list(first["fields"]), tokenizer, source)
    encode_row = partial(_encode_row, (fields, tokenizer, max_answer_length, vocab_size), source)
    encode_row(first)
    return encode_row


def _encode_row(how: tuple, source: str, row: dict) -> dict:
    try:
        encoded = encode(row["fields"], row["number"], row["where"], *how)
    except ValueError as error:
        raise Phase15RecordError(str(error)) from error
    if encoded.pop("cut"):
        logger.warning_once(f"{source}: answers are cut at {how[2]} tokens (in a stream they are not counted).")
    return encoded


@dataclass
class Phase15DataCollator:
    """
    Pads a list of tokenized records on the right; or of what `encode`, as from `stream_encoder`, makes such of.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `torch.LongTensor` of shape `(batch_size, sequence_length)`, with
        -100 as the label of query and padding; and `records` of shape `(batch_size,)`, the records' numbers.
    """

    pad_token_id: int = 0
    encode: Callable[[dict], dict] | None = None

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        features = [self.encode(row) for row in features] if self.encode else features
        length = max(len(feature["input_ids"]) for feature in features)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in features:
            ids, query_length = list(feature["input_ids"]), feature["query_length"]
            padding = length - len(ids)
            batch["input_ids"].append(ids + [self.pad_token_id] * padding)
            batch["attention_mask"].append([1] * len(ids) + [0] * padding)
            batch["labels"].append([-100] * query_length + ids[query_length:] + [-100] * padding)
        batch["records"] = [feature["record"] for feature in features]
        return {name: torch.tensor(values) for name, values in batch.items()}


# what the quickstart runs on, with no network


def docstring_records() -> Iterator[dict]:
    """Questions answered by the docstrings of the public functions and classes in Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if left_out & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the library's own old escapes
            tree = ast.parse(path.read_bytes())
        module = ".".join(part for part in parts if part != "__init__")
        for kind, name, docstring in _definitions(tree, module):
            if 40 <= len(docstring) <= 1200 and docstring not in seen:
                seen.add(docstring)
                yield {"question": f"What is the {kind} {name} for?", "answer": docstring}


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            name = f"{prefix}.{child.name}"
            yield kind, name, textwrap.dedent(ast.get_docstring(child) or "").strip()
            yield from _definitions(child, name)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(dataset: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on the strings of a data set."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (text for record in dataset for text in record.values() if isinstance(text, str))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )
