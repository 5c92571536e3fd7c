# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 push`: see phase15/commands/push.py."""

from phase15.commands.push import main


if __name__ == "__main__":
    main(program="push_to_hub.py")
