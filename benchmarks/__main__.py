# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 bench`: see phase15/commands/benchmarks/__main__.py."""

from phase15.commands.benchmarks.__main__ import main


if __name__ == "__main__":
    main(program="benchmarks")
