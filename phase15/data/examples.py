# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Raw records to examples: token ids of a query and its answer. A record has one of these sets of columns (TRL's dataset
formats and the common pairs; the first that matches is used):

    messages               the conversation; its last turn, the assistant's, is the answer
    prompt, completion     two strings, which no template changes, or two lists of messages
    question, answer
    query, answer
    instruction (, input), output

All but the string prompt/completion go through the tokenizer's chat template, and take these columns too, as TRL does:

    system                 the text of a system turn
    tools                  functions as JSON schemas, a list or its JSON text
    chat_template_kwargs   variables of the template

Query and answer are tokenized as one text, and the end token closes every answer once. Columns and fields of messages
that nobody reads are named in the log.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from phase15.data.records import Phase15RecordError


logger = logging.get_logger("phase15.data")
FORMATS = (
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "answer"),
    ("instruction", "output"),
)
CHAT_COLUMNS = {"system", "tools", "chat_template_kwargs"}
# Fields of a message that an answer may depend on. A template that does not read them would lose them.
MEANINGFUL = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
SHUFFLE_BUFFER = 10_000  # records of a stream that are held to be shuffled
MAX_QUERY_TOKENS = 65_536  # training holds every step over a query in memory: a longer one is a mistake in the data


class Turns(NamedTuple):
    """A record: strings that no template changes, or messages, the last of which is the answer."""

    query: str | list[dict]
    answer: str | dict
    variables: dict[str, Any]  # what the chat template gets beside the messages


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
        self.told = set()  # columns and fields that the log has named
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
            turns = split_record(record["fields"], self.fields, where)
            self.tell("columns", unused_columns(record["fields"], self.fields, turns))
            if isinstance(turns.query, str):
                query_ids, answer_ids = self.split(turns.query, turns.answer)
            else:
                query_ids, answer_ids = self.split(*self.render(turns, where), add_special_tokens=False)
            answer_ids = self.close(answer_ids)
            self.check(query_ids, answer_ids, where)
        except ValueError as error:
            raise Phase15RecordError(str(error)) from error
        example = {
            "input_ids": query_ids + answer_ids[: self.max_answer_length],
            "query_length": len(query_ids),
            "record": record["number"],
        }
        return example, len(answer_ids) > self.max_answer_length

    def tell(self, what: str, names: set[str]):
        """Names once in the log what nobody reads."""
        if new := sorted(names - self.told):
            self.told |= names
            logger.warning(f"{self.source}: these {what} are not used: {', '.join(new)}.")

    def render(self, turns: Turns, where: str) -> tuple[str, str]:
        """
        The texts of query and answer in the chat template: what it renders up to the answer, and what it adds for it.
        A template that rewrites the answer or what was before it, as those of reasoning models do, gets the answer's
        own text, without a tag such as `<think>` that the query ends in already.
        """
        messages = [{**message} for message in (*turns.query, turns.answer)]
        for message in messages:
            message.pop("weight", None)  # ours
        self.check_template(messages, turns.variables, where)
        query = self.apply_template(messages[:-1], turns.variables, where, add_generation_prompt=True)
        whole, content = self.apply_template(messages, turns.variables, where), turns.answer["content"]
        if whole.startswith(query) and content.strip() in whole[len(query) :]:
            return query, whole[len(query) :]
        if lost := MEANINGFUL & fields_with_values(turns.answer):
            raise ValueError(
                f"{where}: the chat template does not render the answer behind its query, so its `{lost.pop()}` would "
                "be lost."
            )
        tags = re.match(r"(<[^<>\s]+>\s*)+", content)
        overlap = max((n for n in range(1, tags.end() + 1) if query.endswith(content[:n])), default=0) if tags else 0
        return query, content[overlap:]

    def apply_template(self, messages: list[dict], variables: dict, where: str, **kwargs) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **variables, **kwargs)
        except Exception as error:  # templates can raise anything
            raise ValueError(f"{where}: the tokenizer's chat template cannot be used: {error}") from error

    def check_template(self, messages: list[dict], variables: dict, where: str):
        """Refuses a record whose tools or fields with a meaning the template does not read; names other fields."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{where}: the tokenizer has no chat template; use string columns prompt, completion.")
        template = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        names = set().union(*map(fields_with_values, messages)) - {"role", "content"}
        names |= {"tools"} & set(variables)
        unread = {name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)}
        if lost := sorted(unread & (MEANINGFUL | {"tools"})):
            raise ValueError(f"{where}: the tokenizer's chat template does not read `{lost[0]}`, which would be lost.")
        self.tell("fields of messages", unread)

    def split(self, query: str, answer: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """
        Token ids of query and answer, tokenized as one text: some tokenizers put a space before every text. Where a
        token would hold the end of one and the start of the other, the query is tokenized alone, as in `generate`, and
        the answer behind another text.
        """
        encode = lambda text, special=False: self.tokenizer(text, add_special_tokens=special)["input_ids"]  # noqa: E731
        query_ids, whole = encode(query, add_special_tokens), encode(query + answer, add_special_tokens)
        if whole[: len(query_ids)] == query_ids:
            return query_ids, whole[len(query_ids) :]
        for text in ("\n", ":", "a", "。"):
            before, both = encode(text), encode(text + answer)
            if both[: len(before)] == before:
                return query_ids, both[len(before) :]
        return query_ids, encode(answer)

    def close(self, answer_ids: list[int]) -> list[int]:
        """The answer with one end token, which it may have brought, and no white space behind that."""
        end = self.tokenizer.eos_token_id
        if end in answer_ids:
            last = len(answer_ids) - 1 - answer_ids[::-1].index(end)
            if not self.tokenizer.decode(answer_ids[last + 1 :]).strip():
                return answer_ids[: last + 1]
        return [*answer_ids, end]

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


def split_record(record: dict, fields: tuple[str, ...], where: str) -> Turns:
    """A record in the format of `fields`."""
    if fields == ("messages",):
        *query, answer = check_messages(record.get("messages"), f"{where}: `messages`", at_least=2)
        return chat(query, check_answer(answer, f"{where}: the last of `messages`"), record, where)
    prompt, completion = (record.get(name) for name in fields)
    if fields == ("prompt", "completion") and isinstance(prompt, list):
        prompt = check_messages(prompt, f"{where}: `prompt`")
        *more, answer = check_messages(completion, f"{where}: `completion`")
        return chat(prompt + more, check_answer(answer, f"{where}: the last of `completion`"), record, where)
    for name in fields:
        check_text(record.get(name), f"{where}: `{name}`", seen=record)
    if fields == ("prompt", "completion"):
        return Turns(prompt, completion, {})
    if fields == ("instruction", "output") and record.get("input"):
        prompt = f"{prompt}\n\n{check_text(record['input'], f'{where}: `input`', seen=record)}"
    return chat([{"role": "user", "content": prompt}], {"role": "assistant", "content": completion}, record, where)


def chat(query: list[dict], answer: dict, record: dict, where: str) -> Turns:
    """Adds what the columns beside the messages say."""
    if record.get("system"):
        if query[0]["role"] == "system":
            raise ValueError(f"{where} has a `system` beside messages that begin with one of their own.")
        query = [
            {"role": "system", "content": check_text(record["system"], f"{where}: `system`", seen=record)},
            *query,
        ]
    variables = {}
    if tools := from_json(record.get("tools"), f"{where}: `tools`"):
        if not isinstance(tools, list):
            raise ValueError(f"{where}: `tools` is a {type(tools).__name__}, but a list was expected.")
        variables["tools"] = without_nulls(tools)
    if given := from_json(record.get("chat_template_kwargs"), f"{where}: `chat_template_kwargs`"):
        if not isinstance(given, dict) or {"messages", "tools", "add_generation_prompt", "tokenize"} & set(given):
            raise ValueError(f"{where}: `chat_template_kwargs` must be variables of the template, not {given!r:.80}.")
        variables |= without_nulls(given)
    return Turns(query, answer, variables)


def unused_columns(record: dict, fields: tuple[str, ...], turns: Turns) -> set[str]:
    """The columns with a value that no format reads."""
    used = set(fields) | (CHAT_COLUMNS if isinstance(turns.query, list) else set())
    used |= {"input"} if fields == ("instruction", "output") else set()
    return {str(name) for name in fields_with_values(record) - used}


def fields_with_values(record: dict) -> set:
    return {name for name, value in record.items() if value not in (None, "", [], {})}


def from_json(value, where: str):
    """What a column holds that may be given as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error


def without_nulls(value):
    """Without the fields that Arrow filled in: in a column all records have the same."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


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
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must hold messages with `role` and `content`, not {message!r:.80}.")
        message = without_nulls(message)
        if MEANINGFUL & fields_with_values(message) and not message.get("content"):  # calls without a word
            message["content"] = ""
        else:
            what = f"the `content` of a message of role {message['role']!r}"
            check_text(message.get("content"), f"{where}: {what}", message)
        messages.append(message)
    return messages


def check_answer(message: dict, where: str) -> dict:
    if message["role"] != "assistant":
        raise ValueError(f"{where} is the answer, so its role must be 'assistant', not {message['role']!r}.")
    if not message.get("weight", 1):
        raise ValueError(f"{where} is the answer, but its `weight` of 0 says that it is not to be trained on.")
    return message


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


__all__ = ["Phase15Encoder", "Phase15Stream", "load_examples", "prepare_data"]
