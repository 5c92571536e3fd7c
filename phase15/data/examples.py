# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Turns raw records into examples: token ids of a query and its answer. A record has one of these sets of columns (TRL's
dataset formats and the common pairs; the first that matches is used):

    messages               the conversation; its last turn, the assistant's, is the answer
    prompt, completion     two strings, which no template changes, or two lists of messages
    question, answer
    query, answer
    instruction (, input), output

All but the string prompt/completion go through the tokenizer's chat template, and take these columns too, as TRL does:

    system                 the text of a system turn
    tools                  functions as JSON schemas, a list or its JSON text
    chat_template_kwargs   variables of the template

Query and answer are tokenized as one text, and the end token closes every answer once. A warning names unused columns
and message fields.
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
RESERVED_VARIABLES = {"messages", "tools", "add_generation_prompt", "tokenize"}  # of `apply_chat_template` itself
# Message fields that an answer may depend on. A template that does not read them would lose them.
MEANINGFUL = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
SHUFFLE_BUFFER = 10_000  # records of a stream that are held to be shuffled
BATCH_SIZE = 1_000  # examples that are held as Python lists
MAX_QUERY_TOKENS = 65_536  # training holds every step over a query in memory: a longer one is a mistake in the data


class Turns(NamedTuple):
    """A record in two parts: strings that no template changes, or messages, the last of which is the answer."""

    query: str | list[dict]
    answer: str | dict
    variables: dict[str, Any]  # of the chat template, beside the messages


def read_first(records: Iterable[dict], source: str) -> tuple[dict, tuple[str, ...]]:
    """
    Returns the first record and the format that its columns have. Raises a ValueError for a data set without a record,
    and for unknown columns.
    """
    first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{source}: there is no usable record.")
    columns = list(first["fields"])
    for names in FORMATS:
        if set(names) <= set(columns):
            return first, names
    expected = "; ".join(", ".join(names) for names in FORMATS)
    raise ValueError(f"{source}, record 1: unknown format with columns {columns}; expected one of: {expected}.")


class Phase15Encoder:
    """
    Turns records, rows of `phase15.data.records.open_records`, into examples: `input_ids` (query, then answer),
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
        self.tokenizer = tokenizer
        self.max_answer_length = max_answer_length
        self.source = source
        self.vocab_size = vocab_size
        self.warned_names = set()  # unused columns and message fields that the log has named
        first, self.fields = read_first(records, source)
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
        """Returns the example of a record, and `True` if its answer was cut."""
        where = record["where"]
        try:
            turns = split_record(record["fields"], self.fields, where)
            self.warn_unused("columns", unused_columns(record["fields"], self.fields, turns))
            if isinstance(turns.query, str):
                query_ids, answer_ids = self.tokenize_pair(turns.query, turns.answer)
            else:  # the template has the special tokens
                query, answer = self.render(turns, where)
                query_ids, answer_ids = self.tokenize_pair(query, answer, add_special_tokens=False)
            answer_ids = self.end_once(answer_ids)
            self.check(query_ids, answer_ids, where)
        except ValueError as error:
            raise Phase15RecordError(str(error)) from error
        example = {
            "input_ids": query_ids + answer_ids[: self.max_answer_length],
            "query_length": len(query_ids),
            "record": record["number"],
        }
        return example, len(answer_ids) > self.max_answer_length

    def warn_unused(self, kind: str, names: set[str]):
        """Warns once about each unused column or message field."""
        new_names = sorted(names - self.warned_names)
        if new_names:
            self.warned_names |= names
            logger.warning(f"{self.source}: these {kind} are not used: {', '.join(new_names)}.")

    def render(self, turns: Turns, where: str) -> tuple[str, str]:
        """
        Returns the texts of query and answer in the chat template: the rendering up to the answer, and what the answer
        adds to it. Templates of reasoning models rewrite the answer or the text before it. For these the answer is its
        own text, without a tag such as `<think>` if the query already ends in one.
        """
        messages = [{**message} for message in (*turns.query, turns.answer)]
        for message in messages:
            message.pop("weight", None)  # ours
        self.check_template(messages, turns.variables, where)
        query = self.apply_template(messages[:-1], turns.variables, where, add_generation_prompt=True)
        whole = self.apply_template(messages, turns.variables, where)
        content = turns.answer["content"]
        if whole.startswith(query) and content.strip() in whole[len(query) :]:
            return query, whole[len(query) :]
        lost = MEANINGFUL & fields_with_values(turns.answer)
        if lost:
            raise ValueError(
                f"{where}: the chat template does not render the answer after its query, so its `{lost.pop()}` would "
                "be lost."
            )
        return query, content[count_repeated_tags(query, content) :]

    def apply_template(self, messages: list[dict], variables: dict, where: str, **kwargs) -> str:
        """Returns the rendered messages; raises a ValueError for any error of the template."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **variables, **kwargs)
        except Exception as error:  # templates can raise anything
            raise ValueError(f"{where}: the tokenizer's chat template cannot be used: {error}") from error

    def check_template(self, messages: list[dict], variables: dict, where: str):
        """Raises a ValueError if the template would lose tools or meaningful fields; warns about other fields."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{where}: the tokenizer has no chat template; use string columns prompt, completion.")
        template = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        names = set().union(*map(fields_with_values, messages)) - {"role", "content"}
        if "tools" in variables:
            names.add("tools")
        unread = {name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)}
        lost = sorted(unread & (MEANINGFUL | {"tools"}))
        if lost:
            raise ValueError(f"{where}: the tokenizer's chat template does not read `{lost[0]}`, which would be lost.")
        self.warn_unused("fields of messages", unread)

    def tokenize_pair(self, query: str, answer: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """
        Returns the token ids of query and answer, tokenized as one text, since some tokenizers put a space before
        every text. If a token would hold the end of the query and the start of the answer, the query is tokenized by
        itself, as in `generate`, and the answer after another text.
        """
        query_ids = self.tokenize(query, add_special_tokens)
        whole_ids = self.tokenize(query + answer, add_special_tokens)
        if whole_ids[: len(query_ids)] == query_ids:
            return query_ids, whole_ids[len(query_ids) :]
        for prefix in ("\n", ":", "a", "。"):  # which of them merges with the answer depends on the tokenizer
            prefix_ids = self.tokenize(prefix)
            whole_ids = self.tokenize(prefix + answer)
            if whole_ids[: len(prefix_ids)] == prefix_ids:
                return query_ids, whole_ids[len(prefix_ids) :]
        return query_ids, self.tokenize(answer)

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def end_once(self, answer_ids: list[int]) -> list[int]:
        """Returns the answer with one end token, which may be the answer's own, and no white space after it."""
        end = self.tokenizer.eos_token_id
        if end in answer_ids:
            last = len(answer_ids) - 1 - answer_ids[::-1].index(end)
            if not self.tokenizer.decode(answer_ids[last + 1 :]).strip():
                return answer_ids[: last + 1]
        return [*answer_ids, end]

    def check(self, query_ids: list[int], answer_ids: list[int], where: str):
        """Raises a ValueError for a query without tokens or with too many, and for a token that the model lacks."""
        if not query_ids:
            raise ValueError(f"{where}: the tokenizer makes no token of the query.")
        if len(query_ids) > MAX_QUERY_TOKENS:
            raise ValueError(
                f"{where}: the query has {len(query_ids):,} tokens, but {MAX_QUERY_TOKENS:,} are the most."
            )
        largest = max(query_ids + answer_ids)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ValueError(
                f"{where}: the tokenizer does not fit the model: {self.tokenizer.convert_ids_to_tokens(largest)!r} is "
                f"token {largest}, but the model's vocabulary has {self.vocab_size}."
            )


def load_examples(records: Iterable[dict], encoder: Phase15Encoder) -> Dataset:
    """Returns all records as examples, in memory. A warning counts the answers that were cut."""
    parts = []
    batch = []
    num_cut = 0
    for record in tqdm(records, desc=f"Tokenizing {encoder.source}", unit=" records"):
        example, is_cut = encoder.encode(record)
        batch.append(example)
        num_cut += is_cut
        if len(batch) == BATCH_SIZE:
            parts.append(Dataset.from_list(batch))  # Arrow: a tenth of Python's memory
            batch = []
    if batch:
        parts.append(Dataset.from_list(batch))
    examples = concatenate_datasets(parts)
    if num_cut:
        logger.warning(
            f"{encoder.source}: {num_cut} of {len(examples)} answers were cut at {encoder.max_answer_length} tokens."
        )
    return examples


def split_record(record: dict, fields: tuple[str, ...], where: str) -> Turns:
    """Returns the turns of a record in the format of `fields`."""
    if fields == ("messages",):
        *query, answer = check_messages(record.get("messages"), f"{where}: `messages`", at_least=2)
        check_answer(answer, f"{where}: the last of `messages`")
        return make_chat(query, answer, record, where)
    prompt = record.get(fields[0])
    completion = record.get(fields[1])
    if fields == ("prompt", "completion") and isinstance(prompt, list):
        prompt = check_messages(prompt, f"{where}: `prompt`")
        *query_end, answer = check_messages(completion, f"{where}: `completion`")
        check_answer(answer, f"{where}: the last of `completion`")
        return make_chat(prompt + query_end, answer, record, where)
    for name in fields:
        check_text(record.get(name), f"{where}: `{name}`", seen=record)
    if fields == ("prompt", "completion"):
        return Turns(prompt, completion, {})
    if fields == ("instruction", "output") and record.get("input"):
        check_text(record["input"], f"{where}: `input`", seen=record)
        prompt = f"{prompt}\n\n{record['input']}"
    query = [{"role": "user", "content": prompt}]
    return make_chat(query, {"role": "assistant", "content": completion}, record, where)


def make_chat(query: list[dict], answer: dict, record: dict, where: str) -> Turns:
    """Returns the turns of a chat with the columns `system`, `tools` and `chat_template_kwargs` of its record."""
    if record.get("system"):
        if query[0]["role"] == "system":
            raise ValueError(f"{where} has a `system` beside messages that begin with one of their own.")
        check_text(record["system"], f"{where}: `system`", seen=record)
        query = [{"role": "system", "content": record["system"]}, *query]
    variables = {}
    tools = parse_json(record.get("tools"), f"{where}: `tools`")
    if tools:
        if not isinstance(tools, list):
            raise ValueError(f"{where}: `tools` is a {type(tools).__name__}, but a list was expected.")
        variables["tools"] = drop_nulls(tools)
    kwargs = parse_json(record.get("chat_template_kwargs"), f"{where}: `chat_template_kwargs`")
    if kwargs:
        if not isinstance(kwargs, dict) or RESERVED_VARIABLES & set(kwargs):
            raise ValueError(f"{where}: `chat_template_kwargs` must be variables of the template, not {kwargs!r:.80}.")
        variables |= drop_nulls(kwargs)
    return Turns(query, answer, variables)


def count_repeated_tags(query: str, content: str) -> int:
    """Returns the number of characters of the answer's leading tags, such as `<think>`, that the query ends in."""
    tags = re.match(r"(<[^<>\s]+>\s*)+", content)
    if tags is None:
        return 0
    for length in range(tags.end(), 0, -1):
        if query.endswith(content[:length]):
            return length
    return 0


def unused_columns(record: dict, fields: tuple[str, ...], turns: Turns) -> set[str]:
    """Returns the columns with a value that no format reads."""
    used = set(fields)
    if isinstance(turns.query, list):
        used |= CHAT_COLUMNS
    if fields == ("instruction", "output"):
        used.add("input")
    return {str(name) for name in fields_with_values(record) - used}


def fields_with_values(record: dict) -> set:
    return {name for name, value in record.items() if value not in (None, "", [], {})}


def parse_json(value, where: str):
    """Returns the value of a column that may be JSON text; `None` if it is empty."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error


def drop_nulls(value):
    """Returns a value without the fields that Arrow filled in: all records of a column have the same fields."""
    if isinstance(value, dict):
        return {name: drop_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def check_text(value, where: str, seen: dict):
    """Raises a ValueError unless a field is a string that is not blank. `seen` is the record, for the error."""
    if value is None or (isinstance(value, str) and not value.strip()):
        columns = [name for name, column in seen.items() if column is not None]
        raise ValueError(f"{where} is missing or empty; the record has {columns}.")
    if not isinstance(value, str):
        raise ValueError(f"{where} is a {type(value).__name__} ({value!r:.40}), but a string was expected.")


def check_messages(value, where: str, at_least: int = 1) -> list[dict]:
    """Returns a list of messages, each with a role and a content; raises a ValueError for any other value."""
    if not isinstance(value, list) or len(value) < at_least:
        raise ValueError(f"{where} must be a list of {at_least} or more messages, not {value!r:.80}.")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must hold messages with `role` and `content`, not {message!r:.80}.")
        message = drop_nulls(message)
        if MEANINGFUL & fields_with_values(message) and not message.get("content"):
            message["content"] = ""  # a tool call needs no text
        else:
            content = f"the `content` of a message of role {message['role']!r}"
            check_text(message.get("content"), f"{where}: {content}", message)
        messages.append(message)
    return messages


def check_answer(message: dict, where: str):
    """Raises a ValueError for a message that is not the assistant's, or not to be trained on."""
    if message["role"] != "assistant":
        raise ValueError(f"{where} is the answer, so its role must be 'assistant', not {message['role']!r}.")
    if not message.get("weight", 1):
        raise ValueError(f"{where} is the answer, but its `weight` of 0 says that it is not to be trained on.")


class Phase15Stream(torch.utils.data.IterableDataset):
    """
    Yields the rows of a stream, pass after pass without an end. Trainer counts passes too, but not when it resumes
    (huggingface/transformers#26413): of an endless stream it only has to skip batches.

    The stream is the same in every process, and one source to accelerate, however many files it reads. So each process
    takes its share of every global batch instead of its own files, and the number of processes does not change a run.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict]:
        for number in itertools.count():
            self.dataset.set_epoch(number)  # each pass has another order
            is_empty = True
            for row in self.dataset:
                is_empty = False
                yield row
            if is_empty:  # otherwise the outer loop would spin forever
                raise Phase15RecordError("the stream has no more record to train on; were its files changed?")


def split_stream(
    dataset: IterableDataset, num_validation: int, shuffle_seed: int | None = None, source: str = "data set"
) -> tuple[Phase15Stream, list[dict] | None]:
    """
    Returns the rows to train on, and the first `num_validation` rows, which are read now, to validate. A
    `shuffle_seed` shuffles the rows to train on, within a buffer of `SHUFFLE_BUFFER` records.
    """
    validation = list(dataset.take(num_validation))
    training = dataset.skip(num_validation)
    if next(iter(training), None) is None:
        raise ValueError(f"{source}: of {len(validation)} records none is left to train on.")
    if shuffle_seed is not None:
        training = training.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    return Phase15Stream(training), validation or None


@dataclass
class Phase15DataCollator:
    """
    Pads a list of examples on the right. With `encode`, the list holds records, which are encoded first.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `torch.LongTensor` of shape `(batch_size, sequence_length)`, with
        -100 as the label of query and padding; and `records` of shape `(batch_size,)`, the numbers of the records.
    """

    pad_token_id: int = 0
    encode: Callable[[dict], dict] | None = None

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        if self.encode is not None:
            features = [self.encode(row) for row in features]
        length = max(len(feature["input_ids"]) for feature in features)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in features:
            ids = list(feature["input_ids"])
            query_length = feature["query_length"]
            padding = length - len(ids)
            batch["input_ids"].append(ids + [self.pad_token_id] * padding)
            batch["attention_mask"].append([1] * len(ids) + [0] * padding)
            batch["labels"].append([-100] * query_length + ids[query_length:] + [-100] * padding)
        batch["records"] = [feature["record"] for feature in features]
        return {name: torch.tensor(values) for name, values in batch.items()}


def prepare_data(data_args, training_args, records: IterableDataset, tokenizer: PreTrainedTokenizerBase, config):
    """Returns the data to train on, the data to validate on (or `None`), and the collator of a run."""
    name = data_args.dataset_name
    num_validation = data_args.max_validation_records
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # 0 may be a token: the mask hides padding
    pad_token_id = next(token for token in candidates if token is not None)
    encoder = Phase15Encoder(records, tokenizer, config.max_answer_length, name, config.text_config.vocab_size)
    if data_args.streaming:
        collator = Phase15DataCollator(pad_token_id, encode=encoder)
        if not data_args.validation_split:
            num_validation = 0
        shuffle_seed = training_args.seed if data_args.shuffle_records else None
        training, validation = split_stream(records, num_validation, shuffle_seed, name)
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
    training = examples.select(range(num_training))
    validation = None
    if num_validation:
        validation = examples.select(range(num_training, num_training + num_validation))
    return training, validation, Phase15DataCollator(pad_token_id)


__all__ = ["Phase15Encoder", "Phase15Stream", "load_examples", "prepare_data", "read_first", "split_record"]
