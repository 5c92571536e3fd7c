# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The command `phase15`: `--help` and wrong flags without torch, old spellings, values that two places have."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import phase15
from phase15.__main__ import COMMANDS, main
from phase15.commands.benchmarks.__main__ import SHAPES
from phase15.commands.benchmarks.harness import SHAPES as MEASURED_SHAPES
from phase15.evaluation.arguments import EvaluationArguments
from phase15.evaluation.recovery import BOOTSTRAP_SAMPLES
from phase15.model.configuration_phase15 import VERSION, Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


ROOT = Path(__file__).parents[2]
# What the help of each command says: words of its text, a flag, and a word of the help of that flag.
HELP = {
    "train": ("chunk by chunk with teacher forcing", "--chunk_length", "--warmup_steps"),
    "eval": ("how much the soft prompt carries", "--model_dir", "(default: 10000)"),
    "eval-lm": ("options of lm_eval", "--model_dir", "--tasks"),
    "chat": ("Ctrl-C stops an answer", "--temperature", "greedy"),
    "app": ("in the browser", "--num_lanes", "default: 8"),
    "serve": ("OpenAI-compatible server", "--num_lanes", "--shutdown_seconds"),
    "serve-ray": ("Ray Serve", "--max_replicas", "Ray cluster"),
    "push": ("Publishes a trained model", "--repo_id", "USER/NAME"),
    "bench": ("Speed and memory", "--shape", "tinyllama"),
}
# By the old spelling, the command that it is.
SCRIPTS = {
    "train_sft.py": "train",
    "push_to_hub.py": "push",
    "scripts/app.py": "app",
    "scripts/eval_lm.py": "eval-lm",
    "scripts/eval_sft.py": "eval",
    "scripts/serve.py": "serve",
    "scripts/serve_ray.py": "serve-ray",
    "benchmarks/__main__.py": "bench",
}
# Runs command lines in one process; prints what each said and how it ended, and the heavy packages that it imported.
RUNNER = """
import contextlib, io, json, runpy, sys

for script, argv in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            sys.argv = [script, *argv]
            if script == "phase15":
                runpy.run_module("phase15", run_name="__main__")
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    heavy = [name for name in ("torch", "accelerate", "datasets", "gradio", "ray", "uvicorn") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""


def answers(commands: list[tuple[str, list[str]]]) -> list[tuple[int | str, str]]:
    """Runs command lines; returns the exit status and the output of each. None may import torch."""
    command = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [heavy for *_, heavy in results] == [[]] * len(commands)
    return [(code, said) for code, said, _ in results]


def installed(names: dict) -> dict:
    """Without lm_eval, its flags cannot be shown."""
    has_lm_eval = importlib.util.find_spec("lm_eval") is not None
    return {key: value for key, value in names.items() if has_lm_eval or "eval-lm" not in (key, value)}


def test_help_of_every_command():
    names = list(installed(HELP))
    assert set(HELP) == set(COMMANDS)
    for name, (code, said) in zip(names, answers([("phase15", [name, "--help"]) for name in names]), strict=True):
        assert code == 0 and said.startswith(f"usage: phase15 {name} "), (name, said[:200])
        assert all(word in said for word in HELP[name]), name
        assert said.count(f"{HELP[name][1]} ") or said.count(f"{HELP[name][1]},"), name


def test_help_prints_no_empty_defaults():
    (_, train), (_, serve) = answers([("phase15", ["train", "--help"]), ("phase15", ["serve", "--help"])])
    assert "None)" not in train and "None)" not in serve
    assert "(default: 8000)" in " ".join(serve.split())


def test_old_spellings_say_the_same():
    scripts = installed(SCRIPTS)
    old = answers([(script, ["--help"]) for script in scripts])
    new = answers([("phase15", [name, "--help"]) for name in scripts.values()])
    flags = [re.findall(r"--[a-z_]+", said.partition("\n\n")[2]) for _, said in new]
    for script, (code, said), expected in zip(scripts, old, flags, strict=True):
        program = {"benchmarks/__main__.py": "benchmarks"}.get(script, Path(script).name)
        assert code == 0 and said.startswith(f"usage: {program} "), said[:200]
        assert re.findall(r"--[a-z_]+", said.partition("\n\n")[2]) == expected, script


WRONG = [  # a command line, and what its last line says
    (
        ["train", "--lerning_rate", "3"],
        "unrecognized arguments: --lerning_rate; did you mean 'learning",
    ),
    (
        ["eval", "--model_dir", "x", "--dataset", "y", "--basee", "z"],
        "eval: unrecognized arguments: --basee z",
    ),
    (
        ["eval", "--model_dir", "x", "--dataset", "y", "--dtype", "int3"],
        "phase15 eval: `dtype` is 'int3', but",
    ),
    (["eval-lm", "--tasks", "x"], "the following arguments are required: --model_dir"),
    (
        ["chat", "--temprature", "1"],
        "chat: unrecognized arguments: --temprature 1; did you mean 'temperature'?",
    ),
    (["chat", "--temperature", "-1"], "phase15 chat: `temperature` is -1.0, but it must be 0 or more."),
    (["app", "--prot", "3"], "phase15 app: error: unrecognized arguments: --prot 3"),
    (["serve", "--prot", "3"], "phase15 serve: unrecognized arguments: --prot 3; did you mean 'port'?"),
    (["serve", "--num_lanes", "0"], "phase15 serve: `num_lanes` is 0, but it must be 1 or more."),
    (["serve-ray", "--max_replicas", "0"], "phase15 serve-ray: `min_replicas` and `max_replicas` are 1 and 0"),
    (["push", "--model_dir", "x"], "phase15 push: the following arguments are required: --repo_id"),
    (["push", "--model_dir", "no/such", "--repo_id", "me/x"], "phase15 push: no/such: no such folder."),
    (["bench", "fly"], "phase15 bench: error: argument kind: invalid choice: 'fly'"),
    (["trian"], "phase15: unknown command 'trian'; did you mean 'train'?"),
    (["--trian"], "phase15: unknown command '--trian'; did you mean 'train'?"),
]


def test_wrong_flags_end_in_one_line():
    results = answers([("phase15", argv) for argv, _ in WRONG])
    for (argv, expected), (code, said) in zip(WRONG, results, strict=True):
        last = code if isinstance(code, str) else said.splitlines()[-1]
        assert expected in last and code not in (0, None), (argv, code, said)


def test_the_commands_are_listed(capsys):
    for argv in (["--help"], ["-h"], []):
        main(argv)
        said = capsys.readouterr().out
        assert all(re.search(rf"^    {name}  +\w", said, re.MULTILINE) for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_the_package_gives_the_model_when_it_is_asked_for():
    assert phase15.Phase15ForCausalLM is Phase15ForCausalLM and phase15.Phase15Config is Phase15Config
    assert phase15.__version__ == VERSION and set(phase15.__all__) <= set(dir(phase15))
    assert all(getattr(phase15, name).__name__ == name for name in phase15.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Phase15Modle'"):
        phase15.Phase15Modle  # noqa: B018
    with pytest.raises(ImportError, match="Phase15Modle"):
        from phase15 import Phase15Modle  # noqa: F401


def test_values_that_light_modules_repeat():
    assert set(SHAPES) == set(MEASURED_SHAPES)
    assert EvaluationArguments("x", "y").bootstrap_samples == BOOTSTRAP_SAMPLES
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {VERSION} (" in (ROOT / "CHANGELOG.md").read_text("utf-8")
