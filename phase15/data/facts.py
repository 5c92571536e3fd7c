# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The data set `facts`: chats in which somebody tells facts about themselves, then gives a text to read, then asks for
the facts. Between facts and questions stand as many words as the chat's distance. Every token of them has to pass
through the soft prompt before the first question comes.

A greeting comes first, because the sinks keep the stream's first tokens whatever happens. Values and texts are drawn
at random, so nothing but the chat itself says which value is right.
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
    """A kind of fact: how it is told, asked for and answered, and the 16 values it can have."""

    told: str
    question: str
    answer: str
    values: list[str]


KINDS = [
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
            "help": "Of the data set facts: words between facts and questions. Over the records the distance grows "
            "from the first to the last; half of the records have an earlier one again."
        },
    )
    facts_records: int = field(default=2000, metadata={"help": "How many records the data set facts has."})
    facts_per_chat: int = field(default=4, metadata={"help": "Facts of each of them, at most one of each kind."})
    facts_text: str | None = field(
        default=None,
        metadata={
            "help": "What stands between facts and questions: a JSONL, JSON, CSV or Parquet file or a Hub id, of "
            "whose records the longest text is taken; sentences of python-docstrings by default."
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
        if not 1 <= self.facts_per_chat <= len(KINDS):
            raise ValueError(f"`facts_per_chat` is {self.facts_per_chat}, but it must be from 1 to {len(KINDS)}.")


class Chat(NamedTuple):
    """A chat of the data set. `answers` has one sentence for each question, in their order; `values` their values."""

    told: str
    text: str
    questions: str
    answers: list[str]
    values: list[str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its turns. The last, the assistant's, is the answer."""
        turns = f"{GREETING} {self.told}", THANKS, f"{self.text} {self.questions}".strip(), " ".join(self.answers)
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]

    def num_right(self, said: str) -> int:
        """How many of the answers a text says, each as the sentence of its own place."""
        sentences = [sentence for sentence in re.split(r"(?<=\.)\s+", said.strip()) if sentence]
        return sum(right == found for right, found in zip(self.answers, sentences, strict=False))


def draw_chat(draw: random.Random, distance: int, num_facts: int, texts: list[str]) -> Chat:
    """A chat with so many words of texts between the facts and the questions."""
    facts = [(kind, draw.choice(kind.values)) for kind in draw.sample(KINDS, num_facts)]
    words = []
    while len(words) < distance:
        words += draw.choice(texts).split()
    asked = draw.sample(facts, num_facts)
    return Chat(
        " ".join(kind.told.format(value) for kind, value in facts),
        " ".join(words[:distance]),
        " ".join(kind.question for kind, _ in asked),
        [kind.answer.format(value) for kind, value in asked],
        [value for _, value in asked],
    )


def training_records(arguments: FactsArguments, seed: int, texts: list[str] | None = None) -> Iterator[dict]:
    """
    The records of the data set: `messages`. The same arguments, seed and texts give the same records. The texts are
    `plain_sentences` by default; the last tenth of them is left to `fresh_chats`.
    """
    draw, distances, texts = random.Random(seed), arguments.facts_distances, texts or plain_sentences()
    texts = texts[: -num_fresh(texts)]
    for number in range(arguments.facts_records):
        if number % BLOCK == 0:
            longest = len(distances) * number // arguments.facts_records
            distance = distances[longest] if draw.random() < 0.5 else draw.choice(distances[: longest + 1])
        yield {"messages": draw_chat(draw, distance, arguments.facts_per_chat, texts).messages}


def fresh_chats(
    distance: int, number: int, num_facts: int, seed: int = 0, texts: list[str] | None = None
) -> list[Chat]:
    """Chats of one distance, with texts that are in no training record."""
    draw, texts = random.Random(f"fresh {seed} {distance}"), texts or plain_sentences()
    return [draw_chat(draw, distance, num_facts, texts[-num_fresh(texts) :]) for _ in range(number)]


def num_fresh(texts: list[str]) -> int:
    """How many of the texts, the last, no training record has."""
    return max(len(texts) // 10, 1)


@functools.cache
def plain_sentences() -> list[str]:
    """Plain sentences of the docstrings of Python's standard library, in a fixed order at random."""
    found = set()
    for record in docstring_records():
        for paragraph in re.split(r"\n\s*\n", record["answer"]):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][A-Za-z' ,;-]+\.", sentence) and 6 <= len(sentence.split()) <= 30:
                    found.add(sentence)

    def words(sentence: str) -> list[str]:
        return re.findall(r"[a-z']+", sentence.lower())

    count = Counter(word for sentence in sorted(found) for word in words(sentence))
    common = {word for word, _ in count.most_common(COMMON_WORDS)}
    sentences = sorted(sentence for sentence in found if common.issuperset(words(sentence)))
    random.Random(0).shuffle(sentences)
    return sentences


__all__ = ["FACTS", "Chat", "FactsArguments", "fresh_chats", "training_records"]
