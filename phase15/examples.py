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

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jinja2
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from phase15.records import Phase15RecordError, check_encodes


logger = logging.get_logger("phase15.data")
FORMATS = (
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "answer"),
    ("instruction", "output"),
)
SHUFFLE_BUFFER = 10_000  # records of a stream that are held to be shuffled
MAX_QUERY_TOKENS = 65_536  # training holds every step over a query in memory: a longer one is a mistake in the data


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
