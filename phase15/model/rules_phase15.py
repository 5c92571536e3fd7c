# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The registered HyperNetworks that a saved folder brings. Empty here; `save_pretrained` writes the folder's copy of this
file, which imports the HyperNetwork's own file and so registers it.
"""

RULES = []

__all__ = ["RULES"]
