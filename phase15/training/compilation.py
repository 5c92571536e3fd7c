# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Compiled layers for training. The benchmarks import this file too, so it needs only torch and transformers."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from phase15.model.recursion_phase15 import HyperNetworkLayer


def compile_layers(model: torch.nn.Module):
    """
    Compiles the layers of LLM and HyperNetwork in place. All layers of a kind share one compilation. The code between
    them is not compiled, since its shapes change with the batch.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | HyperNetworkLayer):
            module.compile()


__all__ = ["compile_layers"]
