# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of a command: see phase15/commands/benchmarks/recovery.py."""

from phase15.commands.benchmarks.recovery import main


if __name__ == "__main__":
    main(program="benchmarks.recovery")
