# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""How many facts of the data set `facts` a model answers, by the distance between the facts and the questions."""

import itertools
from contextlib import contextmanager, nullcontext

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_phase15 import Phase15ForCausalLM
from phase15.evaluation import (
    FULL_CONTEXT,
    MODEL,
    SHUFFLED_DELTA,
    WINDOW,
    Example,
    Losses,
    greedy_answers,
    llm_losses,
    measure,
    no_delta,
    phase15_losses,
    shuffled_delta_losses,
)
from phase15.examples import Phase15Encoder
from phase15.facts import Chat, fresh_chats


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    distances: list[int],
    facts_per_chat: int,
    num_chats: int = 64,
    seed: int = 0,
    batch_size: int = 64,
) -> list[dict]:
    """
    Asks a model for facts in fresh chats.

    Args:
        model (`PreTrainedModel`): a Phase15 model, measured with its controls, or a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        distances (`list[int]`): words between facts and questions.
        facts_per_chat (`int`): facts of a chat.
        num_chats (`int`): chats at each distance; 2 or more.
        seed (`int`): of the chats.
        batch_size (`int`): chats at a time; a few more where one would be left alone, with nothing to shuffle it with.

    Returns:
        `list[dict]`: for each distance `distance`; `tokens`, the mean number of tokens between facts and questions;
        `facts`, how many were asked for; and `rows`, by the keys of evaluation.py, with `right`, the share of them in
        the greedy answer, and `nats` per token of the reference answer.
    """
    model.eval()
    batch_size = next(size for size in itertools.count(max(batch_size, 2)) if num_chats % size != 1)
    return [
        at_distance(model, tokenizer, distance, fresh_chats(distance, num_chats, facts_per_chat, seed), batch_size)
        for distance in tqdm(distances, desc="Asking for facts")
    ]


def at_distance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, distance: int, chats: list[Chat], batch_size: int
) -> dict:
    """The rows of one distance."""
    examples, number = encoded(chats, tokenizer), sum(len(chat.answers) for chat in chats)
    longest = max(len(example.answer) for example in examples)
    result = {}
    for name, (answering, context, losses_of) in variants_of(model).items():
        with context:
            queries = [example.query for example in examples]
            said = greedy_answers(name, answering, tokenizer, queries, batch_size, longest)
        nats, tokens = (values.sum().item() for values in measure(name, batch_size, losses_of, examples))
        right = sum(chat.num_right(tokenizer.decode(ids)) for chat, ids in zip(chats, said, strict=True))
        result[name] = {"right": right / number, "nats": nats / tokens}
    num_tokens = [len(tokenizer(chat.text, add_special_tokens=False)["input_ids"]) for chat in chats]
    tokens = sum(num_tokens) / len(chats)
    return {"distance": distance, "tokens": tokens, "facts": number, "rows": result}


def variants_of(model: PreTrainedModel) -> dict[str, tuple]:
    """By key: the model that answers, the context in which it does, and what measures its losses."""
    if not isinstance(model, Phase15ForCausalLM):
        return {FULL_CONTEXT: (model, nullcontext(), lambda batch: llm_losses(model, batch, 16))}

    def losses(batch: list[Example]) -> Losses:
        return phase15_losses(model, batch, batch)

    def without_delta(batch: list[Example]) -> Losses:
        with no_delta(model):
            return losses(batch)

    def shuffled(batch: list[Example]) -> Losses:
        return shuffled_delta_losses(model, batch, batch[1:] + batch[:1])

    return {
        MODEL: (model, nullcontext(), losses),
        WINDOW: (model, no_delta(model), without_delta),
        SHUFFLED_DELTA: (model, shuffled_delta(model), shuffled),
        FULL_CONTEXT: (
            model.llm,
            nullcontext(),
            lambda batch: llm_losses(model.llm, batch, model.config.chunk_length),
        ),
    }


@contextmanager
def shuffled_delta(model: Phase15ForCausalLM):
    """Gives each row of a batch the Δ of the next row, at every step."""
    hook = model.hypernet.register_forward_hook(lambda module, inputs, delta: delta.roll(-1, dims=0))
    try:
        yield
    finally:
        hook.remove()


def encoded(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The token ids of each chat: what is before the answer, and the answer."""
    records = [
        {"fields": {"messages": chat.messages}, "number": number, "where": f"facts, chat {number}"}
        for number, chat in enumerate(chats, start=1)
    ]
    encoder = Phase15Encoder(records, tokenizer, max_answer_length=10_000, source="facts")
    rows = [encoder(record) for record in records]
    return [Example(row["input_ids"][: row["query_length"]], row["input_ids"][row["query_length"] :]) for row in rows]


def in_short(text: str) -> str:
    """The first words of a text, and how many it has."""
    words = text.split()
    return text if len(words) < 12 else f"{' '.join(words[:5])} [… {len(words)} words …]"


def show(chat: Chat, answer: str, without_delta: str) -> str:
    """A chat as lines of text, with what the model says, and what it says with Δ = 0."""
    *before, _ = chat.messages
    shortened = f"{in_short(chat.text)} {chat.questions}"
    lines = [f"User:      {before[0]['content']}", f"Assistant: {before[1]['content']}", f"User:      {shortened}"]
    return "\n".join([*lines, f"Assistant: {answer}", f"With Δ = 0: {without_delta}"])
