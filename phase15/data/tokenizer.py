# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The embedded default: questions answered by the standard library's docstrings, and a tokenizer trained on them."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def texts_of(value, name: str = "") -> Iterator[str]:
    """The strings of a record at any depth, messages for example; roles are no text."""
    if isinstance(value, str):
        yield from () if name == "role" else (value,)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_of(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def train_tokenizer(records: Iterable[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on the strings of records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text for record in records for text in texts_of(record)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


__all__ = ["train_tokenizer"]
