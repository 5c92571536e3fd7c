# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
lm-evaluation-harness for a Phase15 model, as it was trained: the context is the query, which is read into the soft
prompt, and the continuation is predicted chunk by chunk.

    pip install -r requirements-extra.txt -c requirements.lock
    phase15 eval-lm --model_dir outputs/quickstart --tasks hellaswag --limit 100 --batch_size 8
    phase15 eval-lm --model_dir outputs/quickstart --tasks mine --include_path FOLDER --output_path results
    phase15 eval-lm --help                              every flag: all but --model_dir are lm_eval's own

    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks hellaswag

The last command evaluates the same model without this file, as a causal LM over text. Its query is the first token,
and lm_eval cuts texts longer than the base's `max_position_embeddings`. This file cuts nothing.
"""

import argparse
import sys
from pathlib import Path

from phase15.cli.errors import one_line_errors


def evaluate(argv: list[str], program: str):
    parser = argparse.ArgumentParser(
        usage=f"{program} --model_dir DIR --tasks TASK … [options of lm_eval]", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--model_dir", required=True, metavar="DIR", help="Folder or Hub id of a Phase15 model")
    parser.add_argument("--model", "-M", help=argparse.SUPPRESS)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        print("\noptions of lm_eval (--model is set):\n")
        from lm_eval.__main__ import cli_evaluate  # imports no torch by itself

        sys.argv = [program, "run", "--help"]  # where lm_eval's command reads its flags
        cli_evaluate()  # exits
    args, flags = parser.parse_known_args(argv)
    if args.model is not None:
        raise ValueError("`--model` cannot be given: it is phase15. Other models: use lm_eval itself.")
    if not Path(args.model_dir).is_dir() and args.model_dir.count("/") != 1:
        raise ValueError(f"{args.model_dir}: no such folder, and no USER/NAME on the Hub.")
    from phase15.commands.lm_harness import evaluate_model  # imports torch: seconds

    evaluate_model(args.model_dir, flags)


def main(argv: list[str] | None = None, program: str = "phase15 eval-lm"):
    with one_line_errors(program):
        evaluate(sys.argv[1:] if argv is None else argv, program)


__all__ = ["main"]
