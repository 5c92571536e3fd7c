# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 train`: see phase15/commands/train.py."""

from phase15.commands.train import main


if __name__ == "__main__":
    main(program="train_sft.py")
