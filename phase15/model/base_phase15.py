# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""What `forward` and `from_base` refuse: arguments, batches and LLMs that the recursion cannot take."""

import inspect
import os
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .compat_phase15 import CACHE_NAME


# No shape of a weight shows them, and PEFT leaves out weights that a model does not have.
SIZES = (
    "num_soft_tokens",
    "num_sink_tokens",
    "chunk_length",
    "max_query_length",
    "hypernet_slot_gate",
    "hypernet_signed_alpha",
    "hypernet_reads_layers",
)
EARLIER = (0, 1, 0)  # the last three, for adapters from before them


def check_sizes(model: PreTrainedModel, state_dict: dict, prefix: str, *_):
    """
    Raises a ValueError for an adapter of another recursion: PEFT loads it onto a model that knows nothing of its
    config. train_sft.py saves the sizes beside the adapter's weights.
    """
    sizes = state_dict.get(f"{prefix}hypernet.sizes")
    if sizes is None:
        return
    sizes = [*sizes.tolist(), *EARLIER[len(sizes) - 4 :]]  # there were four at first
    own = [getattr(model.config, name) for name in SIZES]
    if sizes != own:
        fields = ", ".join(f"{name}={type(of)(size)}" for name, size, of in zip(SIZES, sizes, own, strict=True))
        raise ValueError(f"The adapter was trained with other sizes than the model's: give `from_base` {fields}.")


def check_base(llm: PreTrainedModel):
    """Raises a ValueError for an LLM that cannot be given a soft prompt."""
    arguments, problem = inspect.signature(llm.base_model.forward).parameters, None
    if missing := [name for name in ("inputs_embeds", "position_ids", CACHE_NAME) if name not in arguments]:
        raise ValueError(f"{type(llm).__name__} cannot be a base of Phase15: it takes no {', '.join(missing)}.")
    width, hidden_size = llm.get_input_embeddings().weight.shape[-1], llm.config.get_text_config().hidden_size
    if width != hidden_size:
        reason = f"its embeddings are {width} wide, and its hidden states {hidden_size}"
        raise ValueError(f"{type(llm).__name__} cannot be a base of Phase15: {reason}.")
    with torch.no_grad():
        tokens = torch.arange(8, device=llm.device if llm.device.type != "meta" else "cpu")[None]
        try:
            hidden_states = llm.base_model(inputs_embeds=llm.get_input_embeddings()(tokens)).last_hidden_state
            hidden_states = llm.get_output_embeddings()(hidden_states)
            logits = llm(tokens).logits
        except Exception as error:  # any that other architectures raise
            reason = f"its body cannot be called with embeddings alone: {error}"
            raise ValueError(f"{type(llm).__name__} cannot be a base of Phase15: {reason}") from error
        if not torch.isfinite(logits).all():
            problem = f"not finite. Its weights are damaged, or too large for {llm.dtype}"
        elif not torch.equal(hidden_states, logits):
            problem = "more than its output embeddings applied to the hidden states of its input embeddings"
    if problem:
        raise ValueError(f"{type(llm).__name__} cannot be a base of Phase15: its logits are {problem}.")


def split_gguf(name: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """The folder and the file of a path that ends in `.gguf`; any other name, and None."""
    if str(name).lower().endswith(".gguf"):
        return os.path.split(os.path.abspath(name))
    return name, None


@contextmanager
def reading_gguf(base: str | os.PathLike, gguf_file: str | None):
    """Gives an error of the GGUF readers, which may be any, the file's name."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if gguf_file is None:
            raise
        rename = "" if gguf_file.endswith(".gguf") else "the library asks for a name that ends in .gguf: rename it. "
        raise ValueError(f"{os.path.join(base, gguf_file)} cannot be read: {rename}{error}") from error


__all__ = ["SIZES", "check_base", "check_sizes", "reading_gguf", "split_gguf"]
