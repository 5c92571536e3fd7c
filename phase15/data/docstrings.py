# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The embedded default: questions answered by the standard library's docstrings, and a tokenizer trained on them."""

import ast
import functools
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path


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


__all__ = ["DOCSTRINGS", "docstring_records"]
