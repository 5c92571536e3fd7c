# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The model of phase15/model/modeling_phase15.py, under the name that the design card gives it."""

from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.modeling_phase15 import (
    Phase15CausalLMOutputWithPast,
    Phase15ForCausalLM,
    Phase15Model,
    Phase15PreTrainedModel,
)
from phase15.model.recursion_phase15 import HyperNetwork, SoftPrompt, carry
from phase15.model.state_phase15 import Phase15State


__all__ = [
    "HyperNetwork",
    "Phase15Cache",
    "Phase15CausalLMOutputWithPast",
    "Phase15ForCausalLM",
    "Phase15Model",
    "Phase15PreTrainedModel",
    "Phase15State",
    "SoftPrompt",
    "carry",
]
