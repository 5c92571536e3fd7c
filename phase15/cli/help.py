# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
`--help` and errors about flags, at once. Importing torch and transformers takes seconds, so the flags are read from
the source of the dataclasses that declare them. What is right here, the command itself then reads again.
"""

import argparse
import ast
import difflib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


ROOT = Path(__file__).parents[2]
KINDS = {"int": int, "float": float, "str": str}
TYPES = {"list", "dict", "Literal"}  # that may have brackets


class Flag(NamedTuple):
    """A field of a dataclass. A default or a part of the metadata that is worked out at import is left out."""

    name: str
    kind: str
    is_optional: bool
    is_required: bool
    default: Any
    metadata: dict

    @property
    def options(self) -> list[str]:
        """As [`~transformers.HfArgumentParser`] makes them."""
        dashed = [f"--{self.name.replace('_', '-')}"] if "_" in self.name else []
        return [f"--{self.name}", *dashed, *self.metadata.get("aliases", [])]

    @property
    def nargs(self) -> str | None:
        if self.kind == "bool" and not (self.is_optional and self.default is None):
            return "?"
        return "+" if self.kind.startswith("list") else None


def flags_of(source: str) -> list[Flag]:
    """
    The fields of a dataclass, given as `path/of/file.py:Class` from the project's root, or as `module:Class` of an
    installed package, which is not imported.
    """
    where, _, name = source.partition(":")
    path = ROOT / where
    if not where.endswith(".py"):
        package, _, rest = where.partition(".")
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        path = Path(folder, *rest.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = value_of(node.value, constants)
    (declared,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in declared.body if isinstance(node, ast.AnnAssign)]
    bracketed = {part.partition("[")[0] for field in fields for part in kinds_of(field) if "[" in part}
    if bracketed - TYPES or (declared.bases and not where.endswith(".py")):
        raise ValueError(f"{source} declares its fields in a way that is not known here")
    return [flag_of(node, constants) for node in fields if not node.target.id.startswith("_")]


def kinds_of(node: ast.AnnAssign) -> list[str]:
    return [part.strip() for part in ast.unparse(node.annotation).split("|")]


def flag_of(node: ast.AnnAssign, constants: dict[str, Any]) -> Flag:
    kinds = kinds_of(node)
    given, default = {}, node.value
    if isinstance(default, ast.Call):
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        default = given.get("default") or given.get("default_factory")
    metadata = given.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if metadata else ()
    known = {key.value: value_of(value, constants) for key, value in pairs}
    known = {key: value for key, value in known.items() if value is not None}
    value = None if default is None else value_of(default, constants)
    return Flag(node.target.id, chosen(kinds), "None" in kinds, default is None, value, known)


def chosen(kinds: list[str]) -> str:
    """The one of several types that [`~transformers.HfArgumentParser`] takes."""
    first, second = [*kinds, "None"][:2]
    if "bool" in kinds and "None" in kinds:
        return "bool" if len(kinds) == 2 else "str"
    return first if second == "None" or (second == "str" and "None" not in kinds) else second


def value_of(node: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of a constant or of the name of one; of a lambda its body's; None for what is worked out at import."""
    if isinstance(node, ast.Lambda):
        return value_of(node.body, constants)
    if isinstance(node, ast.Name):
        return [] if node.id == "list" else constants.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "list":
        keys = value_of(node.args[0], constants)
        return None if keys is None else list(keys)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


class QuickParser(argparse.ArgumentParser):
    """Gives an error in one line that names the program, and the one of `names` that was likely meant."""

    names: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: --(\w+)", message)
        raise SystemExit(f"{self.prog}: {message}{did_you_mean(found[1], self.names) if found else ''}")


def print_any_text():
    """Prints what the output's encoding does not have as an escape: a pipe on Windows has no Δ."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def quick_parser(program: str, doc: str, groups: dict[str, list[str]], positional: str | None = None) -> QuickParser:
    """A parser of the flags of some dataclasses, by the titles of their groups. A flag's first declaration counts."""
    usage = f"{program} [{positional}] [--flag value …]" if positional else f"{program} --flag value …"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = QuickParser(program, usage, doc.strip(), formatter_class=formatter)
    if positional:
        parser.add_argument(positional, nargs="?", help="a YAML file with values for the flags below")
        parser.add_argument("--config", help=f"the same as {positional}")
    flags = {title: [flag for source in sources for flag in flags_of(source)] for title, sources in groups.items()}
    for title, declared in flags.items():
        group = parser.add_argument_group(title)
        for flag in declared:
            if flag.name not in parser.names:
                parser.names += (flag.name,)
                add_flag(group.add_argument, flag)
    return parser


def add_flag(add_argument: Callable, flag: Flag):
    settings = {"dest": flag.name, "nargs": flag.nargs, "type": KINDS.get(flag.kind), "default": flag.default}
    if flag.nargs == "?":
        settings["const"] = True
    if flag.is_required:
        settings["required"] = True
    settings |= {key: value for key, value in flag.metadata.items() if key not in ("help", "aliases")}
    text = flag.metadata.get("help", "")
    if flag.default not in (None, [], ""):
        shown = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        text += f" (default: {shown})".replace("%", "%%")
    metavar = "true|false" if flag.kind == "bool" else flag.kind.removeprefix("list[").rstrip("]").upper()
    if settings.get("choices"):
        metavar = None
    add_argument(*flag.options, help=text, metavar=metavar, **settings)
    if flag.default is True and flag.kind == "bool":
        options = f"--no_{flag.name}", f"--no-{flag.name.replace('_', '-')}"
        add_argument(*options, dest=flag.name, action="store_false", default=False, help=argparse.SUPPRESS)


def answer_at_once(
    program: str, doc: str, groups: dict[str, list[str]], argv: list[str], positional: str | None = None
):
    """
    Ends the command on `--help` and on errors about flags. Returns where there are none, and where the flags cannot be
    read, for the command's own parser, which is slower.

    Args:
        program (`str`): what errors begin with.
        doc (`str`): what `--help` begins with.
        groups (`dict[str, list[str]]`): by title the dataclasses, as for [`flags_of`].
        argv (`list[str]`): the words behind the command.
        positional (`str`, *optional*): the name of the one word that is no flag.
    """
    print_any_text()
    try:
        parser = quick_parser(program, doc, groups, positional)
    except Exception:  # another release of transformers may declare its flags in any way
        return
    parser.parse_args(argv)


__all__ = ["did_you_mean", "print_any_text"]
