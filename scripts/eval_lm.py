# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 eval-lm`: see phase15/commands/eval_lm.py."""

from phase15.commands.eval_lm import main


if __name__ == "__main__":
    main(program="eval_lm.py")
