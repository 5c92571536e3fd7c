# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 serve-ray`: see phase15/commands/serve_ray.py."""

from phase15.commands.serve_ray import main


if __name__ == "__main__":
    main(program="serve_ray.py")
