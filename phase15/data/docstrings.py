# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The data set `python-docstrings`: questions answered by the standard library, so that every machine has it."""

import ast
import functools
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path


DOCSTRINGS = "python-docstrings"  # the name of the data set
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
MIN_CHARACTERS = 40  # of an answer
MAX_CHARACTERS = 1200


@functools.cache
def docstring_records() -> list[dict]:
    """Returns questions answered by the docstrings of public functions and classes in the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    records = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_private = any(part.startswith("_") and part != "__init__" for part in parts)
        if is_private or LEFT_OUT & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the standard library
            tree = ast.parse(path.read_bytes())
        module = ".".join(part for part in parts if part != "__init__")
        for kind, name, docstring in _definitions(tree, module):
            if MIN_CHARACTERS <= len(docstring) <= MAX_CHARACTERS and docstring not in seen:
                seen.add(docstring)
                records.append({"question": f"What is the {kind} {name} for?", "answer": docstring})
    return records


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yields kind, full name and docstring of each public function and class under a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            name = f"{prefix}.{child.name}"
            yield kind, name, textwrap.dedent(ast.get_docstring(child) or "").strip()
            yield from _definitions(child, name)


__all__ = ["DOCSTRINGS", "docstring_records"]
