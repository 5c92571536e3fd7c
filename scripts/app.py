# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The earlier spelling of `phase15 app`: see phase15/commands/app.py."""

from phase15.commands.app import main


if __name__ == "__main__":
    main(program="app.py")
