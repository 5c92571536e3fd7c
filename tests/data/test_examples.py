# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Records of every format to examples, from files and streams, and the errors of records that cannot be used."""

import copy
import itertools
import json
import logging
import re

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from phase15.data import examples, records
from phase15.data.examples import FORMATS, Phase15DataCollator, Phase15Encoder, load_examples, split_stream
from phase15.data.records import Phase15RecordError, open_records


USER, ASSISTANT = "<|user|>\n{}<|end|>\n", "<|assistant|>\n"
ASKED = USER.format("Why is the sky blue?") + ASSISTANT
ANSWER = "Blue light scatters most."
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": ANSWER},
]
CHAT = "<|system|>\nBe brief.<|end|>\n" + USER.format("Hello") + "<|assistant|>\nHi.<|end|>\n" + ASKED
QUESTION = "Why is the sky blue?"
CASES = {  # record, text of its query
    "messages": ({"messages": TURNS}, CHAT),
    "prompt-completion": ({"prompt": "The sky is ", "completion": ANSWER}, "The sky is "),
    "message-lists": ({"prompt": TURNS[:-1], "completion": TURNS[-1:]}, CHAT),
    "long-completion": ({"prompt": TURNS[:2], "completion": TURNS[2:]}, CHAT),
    "question-answer": ({"question": QUESTION, "answer": ANSWER, "source": "a book"}, ASKED),
    "query-answer": ({"query": QUESTION, "answer": ANSWER}, ASKED),
    "instruction-output": ({"instruction": QUESTION, "output": ANSWER}, ASKED),
    "instruction-input": (
        {"instruction": "Why so?", "input": "A blue sky.", "output": ANSWER},
        USER.format("Why so?\n\nA blue sky.") + ASSISTANT,
    ),
}
SUFFIXES = [".jsonl", ".json", ".csv", ".parquet"]


def write(path, records):
    if path.suffix == ".csv":
        Dataset.from_list(records).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path, tokenizer, max_answer_length=64):
    rows = open_records(str(path))
    return load_examples(rows, Phase15Encoder(rows, tokenizer, max_answer_length, str(path)))


def stream(path, tokenizer, max_answer_length=64):
    rows = open_records(str(path))
    return map(Phase15Encoder(rows, tokenizer, max_answer_length, str(path)), rows)


def encoded(records, tokenizer, max_answer_length=64, source="some data"):
    """Examples of records that are in memory."""
    rows = [{"fields": r, "number": i, "where": f"{source}, record {i}"} for i, r in enumerate(records, start=1)]
    return load_examples(rows, Phase15Encoder(rows, tokenizer, max_answer_length, source))


def numbers_of(rows, count):
    return [row["number"] for row in itertools.islice(rows, count)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_ids_of_every_format_from_every_file(case, suffix, chat_tokenizer, tmp_path):
    record, query = CASES[case]
    if suffix == ".csv" and any(isinstance(value, list) for value in record.values()):
        assert set(record) <= {"messages", "prompt", "completion"}  # which a CSV file cannot hold
        return
    plain = {"prompt": "a", "completion": "b"} if case == "prompt-completion" else record
    first, second = read(write(tmp_path / f"data{suffix}", [record, plain]), chat_tokenizer)
    query_ids, answer_ids = ids_of(chat_tokenizer, query), ids_of(chat_tokenizer, ANSWER)
    assert first == {
        "input_ids": query_ids + answer_ids + [chat_tokenizer.eos_token_id],
        "query_length": len(query_ids),
        "record": 1,
    }
    assert second["record"] == 2


def test_every_format_has_a_case():
    assert {tuple(name for name in record if name not in ("input", "source")) for record, _ in CASES.values()} == {
        *FORMATS
    }


def test_an_empty_input_is_no_input(chat_tokenizer, tmp_path):
    records = [{"instruction": QUESTION, "input": value, "output": ANSWER} for value in ("", None, "x")]
    rows = read(write(tmp_path / "data.jsonl", records), chat_tokenizer)
    assert rows[0]["input_ids"] == rows[1]["input_ids"] != rows[2]["input_ids"]
    assert chat_tokenizer.decode(rows[0]["input_ids"][: rows[0]["query_length"]]) == ASKED


def test_a_csv_file_holds_text(chat_tokenizer, tmp_path):
    """Answers that look like numbers or like missing values are answers."""
    (tmp_path / "data.csv").write_text("question,answer\n3+4?,7\n1/0?,NA\nNothing?,None\n007?,007\n")
    rows = read(tmp_path / "data.csv", chat_tokenizer)
    answers = [chat_tokenizer.decode(row["input_ids"][row["query_length"] : -1]) for row in rows]
    assert answers == ["7", "NA", "None", "007"]


def decode_parts(row, tokenizer) -> tuple[str, str]:
    ids, length = row["input_ids"], row["query_length"]
    return tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:])


def with_template(tokenizer, template: str):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky", "page": None}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks a word up."}}]
RENDERS_CALLS = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.arguments | tojson }}]{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_are_rendered(as_text, chat_tokenizer):
    """Also a turn of calls alone, and tools as JSON text; Arrow's nulls in the arguments are left out."""
    tokenizer = with_template(chat_tokenizer, RENDERS_CALLS)
    turns = [TURNS[1], {"role": "assistant", "content": None, "tool_calls": CALLS}]
    tools = json.dumps(TOOLS) if as_text else TOOLS
    row = encoded([{"messages": turns, "tools": tools}], tokenizer)[0]
    expected = "<look_up><|user|>Hello<|end|>\n<|assistant|>", '[{"word": "sky"}]<|end|>'
    assert decode_parts(row, tokenizer) == expected
    turns[1]["content"] = "I look it up."
    row = encoded([{"prompt": turns[:1], "completion": turns[1:], "tools": tools}], tokenizer)[0]
    assert decode_parts(row, tokenizer)[1] == 'I look it up.[{"word": "sky"}]<|end|>'


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content", "thinking", "tools"])
def test_what_the_template_would_lose_is_refused(name, chat_tokenizer):
    turns = [{**TURNS[1], **({name: ["x"]} if name != "tools" else {})}, TURNS[-1]]
    record = {"messages": turns, "tools": TOOLS if name == "tools" else None}
    with pytest.raises(Phase15RecordError, match=f"record 1: .*chat template does not read `{name}`"):
        encoded([record], chat_tokenizer)
    turns[0].pop(name, None)
    assert encoded([{"messages": turns, "tools": []}], chat_tokenizer)  # no value, no loss


def test_columns_and_fields_that_nobody_reads_are_named_once(chat_tokenizer, caplog):
    records = [
        {"context": "c", "question": QUESTION, "answer": ANSWER, "empty": None},
        {"context": "d", "question": QUESTION, "answer": ANSWER, "page": 3},
    ]
    with caplog.at_level(logging.WARNING):
        encoded(records, chat_tokenizer)
        encoded([{"messages": [TURNS[1] | {"name": "Ann"}, TURNS[-1]]}], chat_tokenizer, source="chats")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "some data: these columns are not used: context.",
        "some data: these columns are not used: page.",
        "chats: these fields of messages are not used: name.",
    ]


@pytest.mark.parametrize("case", ["messages", "message-lists", "question-answer", "instruction-input"])
def test_a_system_column_is_a_turn(case, chat_tokenizer):
    record = {**CASES[case][0], "system": "Be kind."}
    if case in ("messages", "message-lists"):
        with pytest.raises(Phase15RecordError, match="record 1 has a `system` beside messages"):
            encoded([record], chat_tokenizer)
        name = "messages" if case == "messages" else "prompt"
        record[name] = record[name][1:]
    query, answer = decode_parts(encoded([record], chat_tokenizer)[0], chat_tokenizer)
    expected = CASES[case][1].removeprefix("<|system|>\nBe brief.<|end|>\n")
    assert (query, answer) == (f"<|system|>\nBe kind.<|end|>\n{expected}", f"{ANSWER}<|end|>")


def test_variables_of_the_template(chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, "{{ mood }}" + chat_tokenizer.chat_template)
    record = {**CASES["messages"][0], "chat_template_kwargs": {"mood": "calm", "other": None}}
    assert decode_parts(encoded([record], tokenizer)[0], tokenizer)[0] == "calm" + CHAT
    record["chat_template_kwargs"] = {"add_generation_prompt": False}
    with pytest.raises(Phase15RecordError, match="`chat_template_kwargs` must be variables"):
        encoded([record], tokenizer)


def test_an_answer_of_weight_0_is_refused(chat_tokenizer):
    turns = [TURNS[1], TURNS[2] | {"weight": 0}, TURNS[3], TURNS[4] | {"weight": 1}]
    row = encoded([{"messages": turns}], chat_tokenizer)[0]
    assert decode_parts(row, chat_tokenizer) == (CHAT.partition("<|end|>\n")[2], f"{ANSWER}<|end|>")
    with pytest.raises(Phase15RecordError, match="`weight` of 0"):
        encoded([{"messages": turns[:2]}], chat_tokenizer)


THINKS = (  # as DeepSeek-R1's: the generation prompt opens the tag, and earlier answers lose their thoughts
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize("content", ["<think>\nEasy.\n</think>\nBlue.", "Easy.\n</think>\nBlue.", "Blue."])
def test_a_thought_is_opened_once(content, chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, THINKS)
    query, answer = decode_parts(encoded([{"question": QUESTION, "answer": content}], tokenizer)[0], tokenizer)
    assert query == f"<|user|>{QUESTION}<|end|><|assistant|><think>\n"
    assert answer == content.removeprefix("<think>\n") + "<|end|>"


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'a' }}", "{{ raise_exception('no') }}", "{% if %}", "{{ messages[9].x.y }}"]
)
def test_whatever_a_template_raises_is_an_error_of_the_record(template, chat_tokenizer):
    with pytest.raises(
        Phase15RecordError, match="some data, record 1: the tokenizer's chat template cannot be used: "
    ):
        encoded([PAIR], with_template(chat_tokenizer, template))


def test_no_text_is_taken_for_a_tag(chat_tokenizer):
    """The query ends in what the answer begins with, but that is the answer's own."""
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    tokenizer = with_template(chat_tokenizer, template)
    assert decode_parts(encoded([{"question": "a", "answer": ":b"}], tokenizer)[0], tokenizer) == ("A:", ":b<|end|>")


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", ""])
def test_an_answer_ends_once(end, chat_tokenizer):
    row = encoded([{"prompt": "The sky is", "completion": f" blue.{end}"}], chat_tokenizer)[0]
    assert decode_parts(row, chat_tokenizer) == ("The sky is", " blue.<|end|>")
    row = encoded([{"prompt": "a", "completion": "b<|end|>c"}], chat_tokenizer)[0]
    assert decode_parts(row, chat_tokenizer)[1] == "b<|end|>c<|end|>"  # an end within is the data's


@pytest.fixture(scope="module")
def sentence_tokenizer():
    """As TinyLlama's: it puts a space before every text, and spaces begin its tokens."""
    pieces = ["<unk>", "▁", *"1234567890+=abcdehlnorstuwy.<>|", "▁the", "re", "there", "▁there", "<s>", "</s>"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(pieces) - 2)])
    template = "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template + "{% if add_generation_prompt %}<|a|>{% endif %}",
    )


@pytest.mark.parametrize(
    "prompt, completion", [("1+1=", "2"), ("the", "re"), ("a", " b"), ("a ", "b"), ("a ", " b"), ("the", " there")]
)
def test_query_and_answer_are_one_text(prompt, completion, sentence_tokenizer):
    """No space comes in between, and the query's tokens are those that `generate` would get."""
    row = encoded([{"prompt": prompt, "completion": completion}], sentence_tokenizer)[0]
    assert sentence_tokenizer.decode(row["input_ids"]) == f"<s> {prompt}{completion}</s>"
    assert row["input_ids"][: row["query_length"]] == sentence_tokenizer(prompt)["input_ids"]
    row = encoded([{"question": prompt, "answer": completion}], sentence_tokenizer)[0]
    assert sentence_tokenizer.decode(row["input_ids"]).endswith(f"<|a|>{completion}</s>")


def test_start_token_before_a_string_prompt_only(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    start = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", start)]
    )
    for case, count in (("prompt-completion", 1), ("question-answer", 0)):
        ids = encoded([CASES[case][0]], tokenizer, 64)[0]["input_ids"]
        assert ids.count(start) == count and ids[1:].count(start) == 0, case


def test_cut_answers_are_counted(chat_tokenizer, caplog):
    length = len(ids_of(chat_tokenizer, ANSWER)) + 1  # and the end token
    records = [{"question": QUESTION, "answer": text} for text in (ANSWER, f"{ANSWER}!", "No.")]
    with caplog.at_level(logging.WARNING):
        rows = encoded(records, chat_tokenizer, length)
        assert re.search(rf"some data.* 1 of 3 .*cut.* {length} ", caplog.text)
        caplog.clear()
        encoded(records, chat_tokenizer, length + 1)
        assert "cut" not in caplog.text
    answers = [row["input_ids"][row["query_length"] :] for row in rows]
    assert answers[0] == ids_of(chat_tokenizer, ANSWER) + [chat_tokenizer.eos_token_id]
    assert answers[1] == ids_of(chat_tokenizer, f"{ANSWER}!")[:length]  # and so it has no end
    assert set(rows.column_names) == {"input_ids", "query_length", "record"}


@pytest.mark.parametrize("pad", [0, 2])
def test_collator_masks_by_length(pad):
    """2 is the end token; with `pad=2` it is the padding too, and must stay a label where it is an answer's end."""
    features = [
        {"input_ids": [5, 2, 7, 2], "query_length": 2, "record": 4},
        {"input_ids": [2, 2], "query_length": 1, "record": 9},
        {"input_ids": [1, 2, 3, 4, 2], "query_length": 4, "record": 1},
    ]
    batch = Phase15DataCollator(pad)(features)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 2, 7, 2, pad], [2, 2, pad, pad, pad], [1, 2, 3, 4, 2]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, -100, 7, 2, -100], [-100, 2, -100, -100, -100], [-100, -100, -100, -100, 2]],
        "records": [4, 9, 1],
    }
    assert all(values.dtype == torch.long for values in batch.values())


GOOD = '{"question": "a", "answer": "b"}\n'


def chat(*roles, **fields):
    return {"messages": [{"role": role, "content": "a", **fields} for role in roles]}


PAIR = {"question": "a", "answer": "b"}
UNUSABLE = {  # the second record, what the error says besides the file and the record
    "missing": ({"question": "c"}, ["answer", "missing", "['question']"]),
    "null": (PAIR | {"answer": None}, ["answer", "missing", "['question']"]),
    "empty": (PAIR | {"answer": ""}, ["answer", "empty"]),
    "blank": (PAIR | {"question": " \n\t"}, ["question", "empty"]),
    "number": (PAIR | {"answer": 3}, ["answer", "int", "string"]),
    "list": (PAIR | {"question": ["x"]}, ["question", "list", "string"]),
    "object": (PAIR | {"answer": {"x": 1}}, ["answer", "dict", "string"]),
    "input": ({"instruction": "a", "input": 5, "output": "b"}, ["input", "int", "string"]),
    "empty-completion": ({"prompt": "a", "completion": ""}, ["completion", "empty"]),
    "user-last": (chat("user", "assistant", "user"), ["last", "'assistant'", "'user'"]),
    "user-completes": ({"prompt": chat("user")["messages"], "completion": chat("user")["messages"]}, ["'assistant'"]),
    "one-message": (chat("assistant"), ["messages", "2 or more"]),
    "no-messages": ({"messages": []}, ["messages", "2 or more"]),
    "text-messages": ({"messages": "hello"}, ["messages", "list", "'hello'"]),
    "strange-message": ({"messages": [{"from": "user", "value": "a"}] * 2}, ["role", "content"]),
    "empty-content": (chat("user", "assistant", content=" "), ["content", "'user'", "empty"]),
    "number-content": (chat("user", "assistant", content=3), ["content", "'user'", "int"]),
}


@pytest.mark.parametrize("how", [read, stream])
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_records(case, how, chat_tokenizer, tmp_path):
    record, words = UNUSABLE[case]
    good = {
        "question": PAIR,
        "instruction": {"instruction": "a", "input": "i", "output": "b"},
        "prompt": {"prompt": "a", "completion": "b"},
        "messages": chat("user", "assistant"),
    }[next(iter(record))]
    if case == "user-completes":
        good = {name: chat(role)["messages"] for name, role in (("prompt", "user"), ("completion", "assistant"))}
    path = write(tmp_path / "data.jsonl", [good, record, good])
    with pytest.raises(Phase15RecordError) as error:
        list(how(path, chat_tokenizer))
    for word in [path, "record 2", *words]:
        assert word in str(error.value)


def test_a_mixture_of_strings_and_messages_is_refused(chat_tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}])
    with pytest.raises(ValueError, match=r"data\.jsonl, record 1: `completion` .*list"):
        read(path, chat_tokenizer)


@pytest.mark.parametrize("how, suffix", list(itertools.product((read, stream), SUFFIXES)))
def test_unknown_columns(how, suffix, chat_tokenizer, tmp_path):
    path = write(tmp_path / f"data{suffix}", [{"text": "a", "answer": "b"}])
    with pytest.raises(ValueError) as error:
        how(path, chat_tokenizer)  # before a record of a stream is asked for
    for word in [path, "record 1", "['text', 'answer']", *("; ".join(", ".join(names) for names in FORMATS)).split()]:
        assert word in str(error.value)


def test_a_data_set_without_records(chat_tokenizer):
    with pytest.raises(ValueError, match="some data: .*no usable record"):
        encoded([], chat_tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_without_chat_template(case, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    records = [CASES[case][0]]
    if case == "prompt-completion":
        assert encoded(records, tokenizer)[0] == encoded(records, chat_tokenizer)[0]
    else:
        with pytest.raises(ValueError, match="some data, record 1: .*chat template.*prompt, completion"):
            encoded(records, tokenizer)


def test_a_tokenizer_without_end_token(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="some data: .*eos_token"):
        encoded([PAIR], tokenizer, 64, "some data")


# streams


class TooFar(Exception):
    pass


def test_a_stream_is_read_as_it_is_needed(chat_tokenizer, monkeypatch, tmp_path):
    """Of a file without an end, and not one record more than is asked for; all are read as the first pass goes on."""
    given = []

    def endless(path):
        for number in itertools.count(1):
            if number > 50:
                raise TooFar
            given.append(number)
            yield PAIR

    monkeypatch.setitem(records.READERS, ".jsonl", endless)
    rows = open_records(write(tmp_path / "data.jsonl", [PAIR]))
    Phase15Encoder(rows, chat_tokenizer, 64)
    assert given == [1]
    training, validation = split_stream(rows, 10)
    assert max(given) <= 12 and numbers_of(validation, 99) == list(range(1, 11))
    given.clear()
    assert numbers_of(training, 5) == list(range(11, 16))
    assert given == list(range(1, 16))


def test_passes_over_a_stream(tmp_path):
    """One after another, without the records that validate."""
    rows = open_records(write(tmp_path / "data.jsonl", [PAIR] * 7))
    training, validation = split_stream(rows, 2)
    assert numbers_of(training, 12) == [3, 4, 5, 6, 7] * 2 + [3, 4] and numbers_of(validation, 9) == [1, 2]
    training, validation = split_stream(rows, 0)
    assert numbers_of(training, 9) == [1, 2, 3, 4, 5, 6, 7, 1, 2] and validation is None


def test_a_stream_whose_file_is_cut_between_two_passes(tmp_path):
    training, _ = split_stream(open_records(write(tmp_path / "data.jsonl", [PAIR] * 3)), 2)
    rows = iter(training)
    assert next(rows)["number"] == 3
    write(tmp_path / "data.jsonl", [PAIR] * 2)
    with pytest.raises(Phase15RecordError, match="no more record"):
        next(rows)


def test_a_shuffled_stream(monkeypatch, tmp_path):
    """Every pass has every record, in an order of its own that the seed gives, moved no further than the buffer."""
    rows = open_records(write(tmp_path / "data.jsonl", [PAIR] * 42))
    training, validation = split_stream(rows, 2, shuffle_seed=0)
    order = numbers_of(training, 120)
    passes = [order[:40], order[40:80], order[80:]]
    assert all(sorted(numbers) == list(range(3, 43)) for numbers in passes) and numbers_of(validation, 9) == [1, 2]
    assert len(set(map(tuple, [*passes, sorted(passes[0])]))) == 4
    assert numbers_of(training, 120) == numbers_of(split_stream(rows, 2, shuffle_seed=0)[0], 120) == order
    assert numbers_of(split_stream(rows, 2, shuffle_seed=1)[0], 40) != passes[0]
    monkeypatch.setattr(examples, "SHUFFLE_BUFFER", 8)
    order = numbers_of(split_stream(rows, 0, shuffle_seed=0)[0], 42)
    assert sorted(order) == list(range(1, 43)) != order
    assert all(number <= position + 8 for position, number in enumerate(order, start=1))


def test_a_stream_with_too_few_records(tmp_path):
    rows = open_records(write(tmp_path / "data.jsonl", [PAIR] * 3))
    assert numbers_of(split_stream(rows, 2)[0], 2) == [3, 3]
    for num_validation in (3, 4):
        with pytest.raises(ValueError, match="some data: of 3 records none is left"):
            split_stream(rows, num_validation, source="some data")


def test_a_stream_that_a_tokenizer_cannot_take(chat_tokenizer, tmp_path):
    """Is refused before the first step, as a file is."""
    rows = open_records(write(tmp_path / "data.jsonl", [PAIR]))
    for name, words in (("chat_template", "record 1: .*no chat template"), ("eos_token", "eos_token")):
        tokenizer = copy.deepcopy(chat_tokenizer)
        setattr(tokenizer, name, None)
        with pytest.raises(ValueError, match=words):
            Phase15Encoder(rows, tokenizer, 64)


def test_half_a_surrogate_pair_in_a_stream(chat_tokenizer, tmp_path):
    """JSON may spell it; the tokenizer would end in a TypeError that names nothing."""
    path = write(tmp_path / "data.jsonl", [PAIR, {"question": "a", "answer": "\ud800"}])
    with pytest.raises(Phase15RecordError, match=r"data\.jsonl: record 2 is not text: .*surrogate"):
        list(stream(path, chat_tokenizer))


def test_cut_answers_of_a_stream_are_told_once(chat_tokenizer, caplog, tmp_path):
    path = write(tmp_path / "data.jsonl", [PAIR, *[PAIR | {"answer": ANSWER}] * 3])
    with caplog.at_level(logging.WARNING):
        rows = list(stream(path, chat_tokenizer, 5))
    assert len(re.findall(r"data\.jsonl: answers are cut at 5 tokens", caplog.text)) == 1
    assert [len(row["input_ids"]) - row["query_length"] for row in rows] == [2, 5, 5, 5]
