# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The configuration of phase15/model/configuration_phase15.py, under the name that the design card gives it."""

from phase15.model.configuration_phase15 import Phase15Config


__all__ = ["Phase15Config"]
