# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The embedded default: questions answered by the standard library's docstrings, and a tokenizer trained on them."""

import ast
import functools
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast


DOCSTRINGS = "python-docstrings"  # the name of the embedded data set


@functools.cache
def docstring_records() -> list[dict]:
    """Questions answered by the docstrings of the public functions and classes in Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    seen, records = set(), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if left_out & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the standard library
            tree = ast.parse(path.read_bytes())
        module = ".".join(part for part in parts if part != "__init__")
        for kind, name, docstring in _definitions(tree, module):
            if 40 <= len(docstring) <= 1200 and docstring not in seen:
                seen.add(docstring)
                records.append({"question": f"What is the {kind} {name} for?", "answer": docstring})
    return records


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
