# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of a command: see phase15/commands/serve_ray.py."""

from phase15.commands.serve_ray import run_command


if __name__ == "__main__":
    run_command()
