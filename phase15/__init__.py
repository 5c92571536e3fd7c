# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Phase15: a recursive soft prompt of constant size around any causal LM.

    from phase15 import Phase15Config, Phase15ForCausalLM
"""

import importlib
import re
from pathlib import Path


# Imported when they are first used (PEP 562): they import torch, which takes seconds.
MODULES = {
    "Phase15Cache": "phase15.model.cache_phase15",
    "Phase15Config": "phase15.model.configuration_phase15",
    "Phase15ForCausalLM": "phase15.model.modeling_phase15",
    "Phase15Model": "phase15.model.modeling_phase15",
    "Phase15State": "phase15.model.state_phase15",
}


def __getattr__(name: str):
    if name == "__version__":
        # read, not imported, as setuptools reads it too
        source = Path(__file__).with_name("model") / "configuration_phase15.py"
        return re.search(r'^VERSION = "(.+?)"', source.read_text("utf-8"), re.MULTILINE)[1]
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *MODULES, "__version__"]


__all__ = ["Phase15Cache", "Phase15Config", "Phase15ForCausalLM", "Phase15Model", "Phase15State"]  # noqa: F822
