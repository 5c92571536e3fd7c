# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""What `forward` and `from_base` refuse: arguments, batches and LLMs that the recursion cannot take."""

import inspect

import torch
from transformers import PreTrainedModel


try:  # inside a package: how transformers loads this file from a Hub repository or a saved folder
    from .compat_phase15 import CACHE_NAME
    from .generation_phase15 import check_cache
except ImportError:  # at the root of this repository
    from compat_phase15 import CACHE_NAME
    from generation_phase15 import check_cache


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


# Arguments of other models that would be ignored in silence; PEFT gives None.
UNSUPPORTED_ARGUMENTS = {
    "inputs_embeds": "the recursion reads `input_ids`",
    "position_ids": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_q": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_k": "a row is one text, so packed data cannot be read",
    "shift_labels": "`labels` are aligned with `input_ids`, and a row is not split among devices",
}


def check_arguments(kwargs: dict):
    """Raises a ValueError for an argument that cannot be honoured."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"`{name}` cannot be given: {reason}.")


def check_batch(input_ids, attention_mask, cache, labels=None):
    """Raises a ValueError for arguments of `forward` that have another kind or shape."""
    check_cache(cache)
    shape, mask_shape = (None if tensor is None else tuple(tensor.shape) for tensor in (input_ids, attention_mask))
    if shape is None or len(shape) != 2:
        raise ValueError(f"`input_ids` must have shape (batch_size, sequence_length), not {shape}.")
    if input_ids.is_floating_point():
        raise ValueError(f"`input_ids` must hold integers, not {input_ids.dtype}.")
    seen_tokens = 0 if cache is None else cache.seen_tokens
    if mask_shape not in (None, shape, (shape[0], seen_tokens + shape[1])):
        raise ValueError(f"`attention_mask` has shape {mask_shape}, but `input_ids` {shape}.")
    if labels is not None and labels.shape != shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, but `input_ids` {shape}.")
    if labels is not None and cache is not None:
        raise ValueError("`labels` cannot be given with `cache` or `use_cache=True`.")


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


__all__ = ["SIZES", "check_arguments", "check_base", "check_batch", "check_sizes"]
