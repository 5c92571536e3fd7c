# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 eval`: see phase15/commands/evaluate.py."""

from phase15.commands.evaluate import main


if __name__ == "__main__":
    main(program="eval_sft.py")
