# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The server of `phase15 serve` on several GPUs or machines: a Ray Serve application whose replicas each have lanes.

    pip install -r requirements-extra.txt -c requirements.lock
    phase15 serve-ray --model_dir DIR_OR_HUB_ID --max_replicas 8
    phase15 serve-ray --help                               every flag; the limits are those of each replica

A replica has a GPU of its own, if there is any. Ray starts replicas while requests wait, and stops idle ones. A
conversation goes back to the replica that keeps it. If a replica dies, requests that it has not answered yet go to
another. docs/serving.md has the rest.
"""

from phase15.cli.arguments import parse_flags
from phase15.cli.errors import one_line_errors
from phase15.serving.arguments import RayArguments


def main(argv: list[str] | None = None, program: str = "phase15 serve-ray"):
    with one_line_errors(program):
        args = parse_flags(RayArguments, program, __doc__, argv)
        from phase15.commands.ray_replicas import serve_replicas  # imports torch: seconds

        serve_replicas(args)


__all__ = ["main"]
