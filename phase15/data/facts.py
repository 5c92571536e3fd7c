# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The data set `facts`: chats in which a user states facts about themselves, then gives a text to read, then asks for the
facts. The distance of a chat is the number of words between facts and questions. All their tokens pass through the
soft prompt before the first question comes.

A greeting comes first, because the sinks always keep the stream's first tokens. Values and texts are drawn at random,
so only the chat itself determines which value is right.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from phase15.data.docstrings import docstring_records


FACTS = "facts"  # the name of the data set
BLOCK = 16  # records in a row that have the same distance, so that a batch needs little padding
COMMON_WORDS = 1000  # the text between has no others, so that a small vocabulary holds it


class Kind(NamedTuple):
    """A kind of fact: its statement, question and answer with a `{}` for the value, and the 16 values it can have."""

    statement: str
    question: str
    answer: str
    values: list[str]


FACT_KINDS = [
    Kind(
        "My dog is called {}.",
        "What is my dog called?",
        "Your dog is called {}.",
        "Rex Bella Max Luna Rocky Daisy Buddy Molly Toby Lucy Duke Sadie Bear Zoe Oscar Ruby".split(),
    ),
    Kind(
        "I live in {}.",
        "Where do I live?",
        "You live in {}.",
        "Paris London Rome Madrid Berlin Vienna Tokyo Cairo Boston Dublin Athens Moscow Lisbon Prague Oslo "
        "Delhi".split(),
    ),
    Kind(
        "My favourite colour is {}.",
        "What is my favourite colour?",
        "Your favourite colour is {}.",
        "red blue green yellow purple orange black white pink brown grey gold silver violet crimson turquoise".split(),
    ),
    Kind(
        "I work as a {}.",
        "What is my job?",
        "You work as a {}.",
        "teacher doctor nurse farmer baker pilot lawyer painter singer driver chef dentist plumber writer soldier "
        "tailor".split(),
    ),
    Kind(
        "I am allergic to {}.",
        "What am I allergic to?",
        "You are allergic to {}.",
        "milk eggs nuts fish wheat soy shrimp pollen dust cats honey corn garlic onions celery mustard".split(),
    ),
    Kind(
        "I play the {}.",
        "What do I play?",
        "You play the {}.",
        "piano guitar violin drums flute cello trumpet harp organ banjo viola tuba oboe clarinet saxophone "
        "trombone".split(),
    ),
]
GREETING = "Hello! It is nice to meet you. Before we begin, let me tell you a few things about me."
THANKS = "Thank you, I will remember that."


@dataclass
class FactsArguments:
    facts_distances: list[int] = field(
        default_factory=lambda: [0, 32, 128, 512],
        metadata={
            "help": "Words between facts and questions in the data set facts. Over the records the distance grows "
            "from the first to the last; half of the records have an earlier one again."
        },
    )
    facts_records: int = field(default=2000, metadata={"help": "Number of records of the data set facts."})
    facts_per_chat: int = field(
        default=4, metadata={"help": "Facts in each record of the data set facts, at most one of each kind."}
    )
    facts_text: str | None = field(
        default=None,
        metadata={
            "help": "Text between facts and questions in the data set facts: a JSONL, JSON, CSV or Parquet file or a "
            "Hub id, of whose records the longest text is taken; sentences of python-docstrings by default."
        },
    )

    def __post_init__(self):
        self.facts_distances = list(self.facts_distances)
        if not self.facts_distances or min(self.facts_distances) < 0:
            raise ValueError(
                f"`facts_distances` is {self.facts_distances}, but it must be numbers of words, 0 or more."
            )
        if self.facts_records < 1:
            raise ValueError(f"`facts_records` is {self.facts_records}, but it must be 1 or more.")
        if not 1 <= self.facts_per_chat <= len(FACT_KINDS):
            raise ValueError(f"`facts_per_chat` is {self.facts_per_chat}, but it must be from 1 to {len(FACT_KINDS)}.")


class Chat(NamedTuple):
    """A chat of the data set. `answers` has one sentence for each question, in their order; `values` their values."""

    statements: str
    text: str
    questions: str
    answers: list[str]
    values: list[str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of the chat. The last, of the assistant, is the answer."""
        return [
            {"role": "user", "content": f"{GREETING} {self.statements}"},
            {"role": "assistant", "content": THANKS},
            {"role": "user", "content": f"{self.text} {self.questions}".strip()},
            {"role": "assistant", "content": " ".join(self.answers)},
        ]

    def count_right(self, text: str) -> int:
        """Returns the number of answers in a text, each counted only as the sentence of its own position."""
        sentences = [sentence for sentence in re.split(r"(?<=\.)\s+", text.strip()) if sentence]
        return sum(expected == sentence for expected, sentence in zip(self.answers, sentences, strict=False))


def draw_chat(draw: random.Random, distance: int, num_facts: int, texts: list[str]) -> Chat:
    """Returns a chat with `distance` words of texts between the facts and the questions."""
    facts = [(kind, draw.choice(kind.values)) for kind in draw.sample(FACT_KINDS, num_facts)]
    words = []
    while len(words) < distance:
        words += draw.choice(texts).split()
    in_question_order = draw.sample(facts, num_facts)
    return Chat(
        statements=" ".join(kind.statement.format(value) for kind, value in facts),
        text=" ".join(words[:distance]),
        questions=" ".join(kind.question for kind, _ in in_question_order),
        answers=[kind.answer.format(value) for kind, value in in_question_order],
        values=[value for _, value in in_question_order],
    )


def training_records(arguments: FactsArguments, seed: int, texts: list[str] | None = None) -> Iterator[dict]:
    """
    Yields the records of the data set: `messages`. The same arguments, seed and texts give the same records. The texts
    are `plain_sentences` by default; the last tenth of them is left to `fresh_chats`.
    """
    draw = random.Random(seed)
    distances = arguments.facts_distances
    texts = texts or plain_sentences()
    texts = texts[: -count_fresh(texts)]
    for number in range(arguments.facts_records):
        if number % BLOCK == 0:
            longest = len(distances) * number // arguments.facts_records
            if draw.random() < 0.5:
                distance = distances[longest]
            else:
                distance = draw.choice(distances[: longest + 1])
        yield {"messages": draw_chat(draw, distance, arguments.facts_per_chat, texts).messages}


def fresh_chats(
    distance: int, number: int, num_facts: int, seed: int = 0, texts: list[str] | None = None
) -> list[Chat]:
    """Returns chats of one distance, with texts that no training record has."""
    draw = random.Random(f"fresh {seed} {distance}")
    texts = texts or plain_sentences()
    texts = texts[-count_fresh(texts) :]
    return [draw_chat(draw, distance, num_facts, texts) for _ in range(number)]


def count_fresh(texts: list[str]) -> int:
    """Returns the number of texts, from the end, held out for evaluation."""
    return max(len(texts) // 10, 1)


@functools.cache
def plain_sentences() -> list[str]:
    """Returns plain sentences of the standard library's docstrings, shuffled once with a fixed seed."""
    candidates = set()
    for record in docstring_records():
        for paragraph in re.split(r"\n\s*\n", record["answer"]):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][A-Za-z' ,;-]+\.", sentence) and 6 <= len(sentence.split()) <= 30:
                    candidates.add(sentence)

    def words(sentence: str) -> list[str]:
        return re.findall(r"[a-z']+", sentence.lower())

    count = Counter(word for sentence in sorted(candidates) for word in words(sentence))  # sorted: ties keep an order
    common = {word for word, _ in count.most_common(COMMON_WORDS)}
    sentences = sorted(sentence for sentence in candidates if common.issuperset(words(sentence)))
    random.Random(0).shuffle(sentences)
    return sentences


__all__ = ["FACTS", "Chat", "FactsArguments", "fresh_chats", "training_records"]
