# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Raw records to examples: token ids of a query and its answer. A record has one of these sets of columns (TRL's dataset
formats and the common pairs; the first that matches is used):

    messages               the conversation; its last turn, the assistant's, is the answer
    prompt, completion     two strings, which no template changes, or two lists of messages
    question, answer
    query, answer
    instruction (, input), output

All but the string prompt/completion go through the tokenizer's chat template. The end token closes every answer.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jinja2
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from phase15.records import Phase15RecordError


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


class Phase15Encoder:
    """
    Turns records, rows of `phase15.records.open_records`, into examples: `input_ids` (query, then answer),
    `query_length`, and `record`, the number of the record. The first record decides the format.

    Args:
        records (iterable of `dict`): only the first is read.
        tokenizer (`PreTrainedTokenizerBase`): with an end token, and a chat template if the format needs one.
        max_answer_length (`int`): longer answers are cut.
        source (`str`): the name of the data set in errors.
        vocab_size (`int`, *optional*): of the model.

    Raises:
        ValueError: for a data set without a record, an unknown format, or a tokenizer without an end token.
            [`Phase15RecordError`] for a record with a missing or empty field or one of the wrong type, with a query of
            more than `MAX_QUERY_TOKENS`, or with a token that the model does not have.
    """

    def __init__(
        self,
        records: Iterable[dict],
        tokenizer: PreTrainedTokenizerBase,
        max_answer_length: int,
        source: str = "data set",
        vocab_size: int | None = None,
    ):
        self.tokenizer, self.max_answer_length = tokenizer, max_answer_length
        self.source, self.vocab_size = source, vocab_size
        first = next(iter(records), None)
        if first is None:
            raise ValueError(f"{source}: there is no usable record.")
        columns = list(first["fields"])
        self.fields = next((names for names in FORMATS if set(names) <= set(columns)), None)
        if self.fields is None:
            expected = "; ".join(", ".join(names) for names in FORMATS)
            raise ValueError(
                f"{source}, record 1: unknown format with columns {columns}; expected one of: {expected}."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{source}: the tokenizer has no end token (`eos_token`) to close the answers with.")
        self.encode(first)

    def __call__(self, record: dict) -> dict:
        example, is_cut = self.encode(record)
        if is_cut:
            logger.warning_once(
                f"{self.source}: answers are cut at {self.max_answer_length} tokens; not counted here."
            )
        return example

    def encode(self, record: dict) -> tuple[dict, bool]:
        """The example of a record, and whether its answer was cut."""
        where = record["where"]
        try:
            query, answer = split_record(record["fields"], self.fields, where)
            query_ids = self.query_ids(query, where)
            answer_ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            self.check(query_ids, answer_ids, where)
        except ValueError as error:
            raise Phase15RecordError(str(error)) from error
        example = {
            "input_ids": query_ids + answer_ids[: self.max_answer_length],
            "query_length": len(query_ids),
            "record": record["number"],
        }
        return example, len(answer_ids) > self.max_answer_length

    def query_ids(self, query: str | list[dict], where: str) -> list[int]:
        if isinstance(query, str):
            return self.tokenizer(query)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{where}: the tokenizer has no chat template; use string columns prompt, completion.")
        try:
            chat = self.tokenizer.apply_chat_template(query, add_generation_prompt=True, return_dict=True)
        except jinja2.TemplateError as error:  # a syntax error, or a refusal of the template itself
            raise ValueError(f"{where}: the tokenizer's chat template cannot be used: {error}") from error
        return chat["input_ids"]

    def check(self, query_ids: list[int], answer_ids: list[int], where: str):
        if not query_ids:
            raise ValueError(f"{where}: the tokenizer makes no token of the query.")
        if len(query_ids) > MAX_QUERY_TOKENS:
            length = f"{len(query_ids):,} tokens, but {MAX_QUERY_TOKENS:,} are the most"
            raise ValueError(f"{where}: the query has {length}.")
        largest = max(query_ids + answer_ids)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ValueError(
                f"{where}: the tokenizer does not fit the model: {self.tokenizer.convert_ids_to_tokens(largest)!r} is "
                f"token {largest}, but the model's vocabulary has {self.vocab_size}."
            )


def load_examples(records: Iterable[dict], encoder: Phase15Encoder) -> Dataset:
    """All records as examples, in memory. Answers that are cut are counted in the log."""
    parts, num_cut = [], 0
    progress = iter(tqdm(records, desc=f"Tokenizing {encoder.source}", unit=" records"))
    while batch := [encoder.encode(record) for record in itertools.islice(progress, 1000)]:
        parts.append(Dataset.from_list([example for example, _ in batch]))  # Arrow: a tenth of Python's memory
        num_cut += sum(is_cut for _, is_cut in batch)
    examples = concatenate_datasets(parts)
    if num_cut:
        logger.warning(
            f"{encoder.source}: {num_cut} of {len(examples)} answers were cut at {encoder.max_answer_length} tokens."
        )
    return examples


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
            self.dataset.set_epoch(number)  # shuffles anew
            row = None
            for row in self.dataset:
                yield row
            if row is None:  # or the loop would never end
                raise Phase15RecordError("the stream has no more record to train on; were its files changed?")


def split_stream(
    dataset: IterableDataset, num_validation: int, shuffle_seed: int | None = None, source: str = "data set"
) -> tuple[Phase15Stream, list[dict] | None]:
    """
    The rows to train on, and the first `num_validation`, which are read now, to validate. A `shuffle_seed` shuffles
    the rows to train on, within a buffer of `SHUFFLE_BUFFER` records.
    """
    validation, training = list(dataset.take(num_validation)), dataset.skip(num_validation)
    if next(iter(training), None) is None:
        raise ValueError(f"{source}: of {len(validation)} records none is left to train on.")
    if shuffle_seed is not None:
        training = training.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    return Phase15Stream(training), validation or None


@dataclass
class Phase15DataCollator:
    """
    Pads a list of examples on the right. With `encode`, it is a list of records, which are encoded first.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `torch.LongTensor` of shape `(batch_size, sequence_length)`, with
        -100 as the label of query and padding; and `records` of shape `(batch_size,)`, the numbers of the records.
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


def prepare_data(data_args, training_args, records: IterableDataset, tokenizer: PreTrainedTokenizerBase, config):
    """The data to train on, the data to validate on (or None), and the collator of a run."""
    name, num_validation = data_args.dataset_name, data_args.max_validation_records
    pad_token_id = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    encoder = Phase15Encoder(records, tokenizer, config.max_answer_length, name, config.text_config.vocab_size)
    if data_args.streaming:
        collator = Phase15DataCollator(pad_token_id, encode=encoder)
        seed = training_args.seed if data_args.shuffle_records else None
        training, validation = split_stream(records, num_validation if data_args.validation_split else 0, seed, name)
        if validation:
            collator(validation)  # an unusable record is reported before the run
        return training, validation, collator
    examples = load_examples(records, encoder)
    if data_args.shuffle_records:  # after they were numbered
        examples = examples.shuffle(seed=training_args.seed)
    share = math.ceil(len(examples) * data_args.validation_split)
    num_training = len(examples) - share
    if num_training < 1:
        raise ValueError(f"{name}: of {len(examples)} records none is left to train on.")
    num_validation = share if num_validation is None else min(num_validation, share)
    rest = range(num_training, num_training + num_validation)
    validation = examples.select(rest) if num_validation else None
    return examples.select(range(num_training)), validation, Phase15DataCollator(pad_token_id)
