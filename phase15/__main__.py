# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""`phase15 COMMAND`, and `python -m phase15 COMMAND`."""

import importlib
import sys

import phase15
from phase15.cli.errors import did_you_mean, print_any_text


# By the word of the command: its module, and a line for `phase15 --help`.
COMMANDS = {
    "train": ("train", "train a model: a recipe, then flags that override it"),
    "eval": ("evaluate", "measure the losses, context recovery and recall of a trained model"),
    "eval-lm": ("eval_lm", "run lm-evaluation-harness on a model"),
    "chat": ("chat", "chat with a model in the terminal"),
    "app": ("app", "chat with a model in the browser, and watch the soft prompt"),
    "serve": ("serve", "serve a model with OpenAI's API"),
    "serve-ray": ("serve_ray", "serve a model on several GPUs or machines"),
    "push": ("push", "publish a trained model on the Hugging Face Hub"),
    "bench": ("benchmarks.__main__", "measure speed and memory beside the base model"),
}


def help_text() -> str:
    lines = [f"    {name:<11}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: phase15 COMMAND [--flag value …]",
            "",
            *lines,
            "",
            "phase15 COMMAND --help lists the flags of a command; phase15 --version prints the version.",
        ]
    )


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    print_any_text()
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(phase15.__version__)
    elif name in COMMANDS:
        module = importlib.import_module(f"phase15.commands.{COMMANDS[name][0]}")
        module.main(argv[1:], program=f"phase15 {name}")
    else:
        raise SystemExit(f"phase15: unknown command {name!r}{did_you_mean(name, list(COMMANDS))}")


if __name__ == "__main__":
    main()
