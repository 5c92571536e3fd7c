# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""`--help` and errors about flags: at once, and as the commands' own parsers say them."""

import importlib
import os
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from phase15 import flags
from phase15.arguments import Phase15Parser, read_arguments
from phase15.flags import QuickParser, answer_at_once, quick_parser


ROOT = Path(__file__).parent.parent
COMMANDS = ["train_sft", "push_to_hub", "scripts.eval_sft", "scripts.serve", "scripts.serve_ray"]
NEEDS = {"scripts.serve": "uvicorn", "scripts.serve_ray": "ray"}


def quick(command: str, monkeypatch) -> QuickParser:
    """The parser that a command makes before its imports."""
    made = []
    monkeypatch.setattr(flags, "quick_parser", lambda *args: made.append(quick_parser(*args)) or made[0])
    path = ROOT / f"{command.replace('.', '/')}.py"
    with pytest.raises(SystemExit):
        beginning = path.read_text("utf-8").partition("\nimport json\n")[0].partition("\nimport s")
        code = beginning[0] + beginning[1] + beginning[2].partition("\n\nimport ")[0]
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        exec(compile(code, str(path), "exec"), {"__name__": "__main__", "__doc__": "what it does"})
    return made[0]


def full(command: str) -> HfArgumentParser:
    """The parser that a command makes after its imports."""
    pytest.importorskip(NEEDS.get(command, "torch"))
    if command == "train_sft":
        return read_arguments(["recipes/docstrings.yaml"])[0]
    module = importlib.import_module(command)
    names = {"push_to_hub": "PushArguments", "scripts.eval_sft": "EvaluationArguments"}
    names |= {"scripts.serve": "ServeArguments", "scripts.serve_ray": "RayArguments"}
    return Phase15Parser(getattr(module, names[command]))


def declared(command: str) -> HfArgumentParser:
    """As `full`, with the defaults of the dataclasses instead of a recipe's."""
    parser = full(command)
    if command == "train_sft":
        parser = Phase15Parser(parser.dataclass_types)
        parser.add_argument("recipe", nargs="?")
        parser.add_argument("--config")
    return parser


@pytest.mark.extra
@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_are_those_of_the_commands_own_parser(command, monkeypatch, capsys):
    ours, theirs = quick(command, monkeypatch), declared(command)
    capsys.readouterr()

    def by_option(parser) -> dict:
        return {option: action for action in parser._actions for option in action.option_strings or [action.dest]}

    mine, own = by_option(ours), by_option(theirs)
    assert mine.keys() == own.keys() and len(own) > 8
    for option, expected in own.items():
        action, default = mine[option], expected.default
        default = default.value if isinstance(default, Enum) else default
        assert (action.dest, action.nargs, action.required) == (expected.dest, expected.nargs, expected.required), (
            option
        )
        assert action.const == expected.const, option
        if action.nargs == "+":  # an empty default of a list is none
            assert (action.default or None) == (default or None), option
        elif action.default is not None or default is None:
            assert action.default == default, option
        if action.type is not None:
            assert action.type == expected.type, option
        if action.choices is not None:
            assert list(action.choices) == list(expected.choices), option
    known = [action for action in own.values() if action.default not in (None, [])]
    told = [action for action in known if mine[action.option_strings[0]].default is not None]
    assert len(told) > 0.7 * len(known)  # the rest is worked out at import


@pytest.mark.extra
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_what_every_flag_is_for(command, monkeypatch, capsys):
    ours, theirs = quick(command, monkeypatch), declared(command)
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken
    text = " ".join(ours.format_help().split())
    for action in theirs._actions:
        if action.dest not in ("help", "recipe", "config") and not action.option_strings[0].startswith("--no_"):
            assert action.option_strings[0] in text
            help_text = " ".join((action.help or "").replace("%%", "%").split())
            assert help_text in text, action.dest


BAD = {
    "train_sft": [
        ["--lerning_rate", "3"],
        ["--max_steps", "many"],
        ["--max_steps"],
        ["--stage", "half"],
        ["recipes/docstrings.yaml", "--report_to"],
        ["--learning_rate", "fast", "--nonsense"],
    ],
    "push_to_hub": [["--repo_id", "a/b"], ["--model_dir", "x", "--repo_id", "a/b", "--privat_", "1"]],
    "scripts.eval_sft": [["--dataset", "x"], ["--model_dir", "x", "--dataset", "y", "--batch_size", "1.5"]],
}


@pytest.mark.parametrize("command, argv", [(command, argv) for command, rows in BAD.items() for argv in rows], ids=str)
def test_errors_are_those_of_the_commands_own_parser(command, argv, monkeypatch):
    ours, theirs = quick(command, monkeypatch), declared(command)
    with pytest.raises(SystemExit) as said:
        ours.parse_args(argv)
    with pytest.raises(ValueError) as expected:
        theirs.parse_args(argv)
    program = command.rpartition(".")[2]
    assert str(said.value) == f"{program}.py: {expected.value}"


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes/docstrings.yaml", "--max_steps", "3", "--bf16", "--no_skip_memory_metrics", "--save-steps", "0.5"],
        ["--rival", "window", "--report_to", "none", "tensorboard", "--lr_scheduler_kwargs", '{"a": 1}'],
        ["--max_st", "3"],  # argparse takes the beginning of a name
        [],
    ],
    ids=str,
)
def test_what_is_right_goes_on(argv, monkeypatch):
    quick("train_sft", monkeypatch).parse_args(argv)
    declared("train_sft").parse_args(argv)


@pytest.mark.parametrize("command", [*COMMANDS, "scripts.app"])
def test_nothing_that_takes_seconds_is_imported(command):
    """Not timed: a busy machine is slow. The page is one file that stands alone, and has argparse's own errors."""
    words = ["-m", command] if "." in command else [f"{command}.py"]
    for argv, code in ((["--help"], 0), (["--nonsense", "1"], 2 if command == "scripts.app" else 1)):
        run = subprocess.run(
            [sys.executable, "-X", "importtime", *words, *argv], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        imported = set(re.findall(r"\| +(\w+)", run.stderr))
        assert run.returncode == code and "argparse" in imported
        assert not imported & {"torch", "transformers", "numpy", "peft", "datasets", "huggingface_hub", "ray"}
        if code:
            assert re.search(r"^\w+\.py: .*(nonsense|required)", run.stderr, re.MULTILINE)
        else:
            assert "--model" in run.stdout and "default" in run.stdout


@pytest.mark.parametrize("command", ["train_sft.py", "scripts/eval_sft.py"])
def test_help_on_a_pipe_without_greek_letters(command):
    words = ["-m", "scripts.eval_sft"] if "/" in command else [command]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    flag = "--batch_size" if "/" in command else "--max_steps"
    assert run.returncode == 0 and flag in run.stdout, run.stderr


@pytest.mark.parametrize(
    "text",
    ["class A(B):\n    a: int = 1", "class A:\n    a: Optional[int] = 1", "class A:\n    a: int | List[int] = 1"],
)
def test_other_ways_to_declare_fields_are_not_guessed(text, tmp_path, monkeypatch):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "__init__.py").write_text("")
    (tmp_path / "others" / "arguments.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="others.arguments:A declares its fields in a way that is not known here"):
        flags.flags_of("others.arguments:A")


def test_flags_that_cannot_be_read_are_left_to_the_commands_parser():
    """In another release of transformers they may be elsewhere."""
    for source in ("transformers.nowhere:TrainingArguments", "no_such_package:A", "train_sft.py:NoSuchClass"):
        answer_at_once("train_sft.py", "", {"flags": [source]}, ["--help"])
