# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The plan of the house (CONTRIBUTING.md), held against the imports and the statements of the code."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "phase15").rglob("*.py"))
# Each room may import the rooms of lower floors, and itself.
FLOORS = {"cli": 0, "model": 0, "data": 1, "loading": 2, "evaluation": 2, "training": 3, "hub": 3, "serving": 3}
FLOORS |= {"commands": 4, "__main__": 5, "__init__": 5}
SAME_FLOOR = {("data", "cli"), ("hub", "evaluation"), ("evaluation", "loading")}
# Inside model/, from the lowest file.
ORDER = (
    "rules compat configuration recursion state cache batch base adapter decoding requests continuous_batching "
    "generation modeling"
).split()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """The modules of the project that a file imports, and the names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = f"phase15.model.{node.module}" if node.level else node.module
            if module.split(".")[0] == "phase15":
                found.append((module, [alias.name for alias in node.names]))
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards_and_take_what_is_public(path):
    own = room(name_of(path))
    for module, names in imports(path):
        other = room(module)
        if own == other == "model":
            file, imported = (re.sub("_phase15$", "", m.split(".")[-1]) for m in (name_of(path), module))
            assert ORDER.index(imported) < ORDER.index(file), f"{file} imports {imported}"
        elif own == other == "commands":
            assert is_own_work(name_of(path), module), f"{name_of(path)} imports the command {module}"
        elif own != other and own != "__init__":
            is_lower = FLOORS[other] < FLOORS[own] or (own, other) in SAME_FLOOR
            assert is_lower, f"{name_of(path)} imports {module}"
        target = ROOT / (module.replace(".", "/") + ".py")
        if target.is_file() and target != path:
            public = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", target.read_text("utf-8"), re.M | re.S)[1])
            assert set(names) <= set(public), f"{module} does not list {set(names) - set(public)} in __all__"


def is_own_work(module: str, imported: str) -> bool:
    """A command's arguments and its work, which takes seconds to import, are two files."""
    halves = [
        {"train", "training_run"},
        {"evaluate", "evaluation_run"},
        {"push", "push_run"},
        {"eval_lm", "lm_harness"},
        {"serve_ray", "ray_replicas"},
    ]
    pair = {module.split(".")[2], imported.split(".")[2]}
    return pair in halves or pair == {"benchmarks"}


def test_model_files_import_only_siblings_and_installed_packages():
    """What travels with a saved model finds nothing else of the project."""
    for path in (ROOT / "phase15" / "model").glob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*(from|import) phase15\b", text, re.M), path
        # transformers finds the files to copy by this form only
        assert all("." not in module for module in re.findall(r"^\s*from \.(\S+) import", text, re.M)), path
        assert not re.search(r"^\s*from \. import", text, re.M), path
        assert path.stem == "__init__" or path.stem.endswith("_phase15"), path


def packed_assignments(tree: ast.Module) -> list[int]:
    """Lines of the form `a, b = x, y`; a call that returns a tuple is not one."""
    allowed = ast.Call | ast.Await | ast.Name | ast.Attribute | ast.Subscript
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if not isinstance(node.value, allowed):
                lines.append(node.lineno)
    return lines


def test_one_statement_a_line():
    num_packed = 0
    num_lines = 0
    for path in FILES:
        text = path.read_text("utf-8")
        num_packed += len(packed_assignments(ast.parse(text)))
        num_lines += sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
    assert 100 * num_packed / num_lines <= 0.5


def test_packed_assignments_are_counted():
    code = "a, b = 1, 2\nc, d = f()\ne = 1, 2\n(g, h) = (x for x in y)\ni, j = k\n"
    assert packed_assignments(ast.parse(code)) == [1, 4]
