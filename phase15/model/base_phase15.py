# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loads and checks the pretrained LLM that a model wraps, and the weights of adapters and earlier folders."""

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from .compat_phase15 import CACHE_NAME


# Fields of the config that no shape of a weight shows. PEFT drops weights that a model does not have.
SIZES = (
    "num_soft_tokens",
    "num_sink_tokens",
    "chunk_length",
    "max_query_length",
    "hypernet_slot_gate",
    "hypernet_signed_alpha",
    "hypernet_reads_layers",
)
EARLIER = (0, 1, 0)  # the last three, in adapters that were saved before these fields existed


def load_base(base: str | os.PathLike, **kwargs) -> tuple[PreTrainedModel, dict]:
    """
    Loads a causal LM that can be given a soft prompt.

    Args:
        base (`str` or `os.PathLike`): Hub id, local folder, or `.gguf` file.
        kwargs: of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        the LLM and the library's loading info.

    Raises:
        ValueError: for a file that cannot be read, and for an LLM that cannot be a base (see `check_base`).
    """
    base, gguf_file = split_gguf(base)
    if gguf_file:
        kwargs["gguf_file"] = gguf_file
    if kwargs.get("gguf_file"):
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    kwargs.setdefault("use_safetensors", True)
    with reading_gguf(base, kwargs.get("gguf_file")):
        llm, loading_info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, **kwargs)
    check_base(llm)
    if os.path.isdir(base):
        llm.config.name_or_path = ""  # a path of this machine means nothing where the model is loaded later
    return llm, loading_info


def split_gguf(name: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """Returns the folder and the file of a path that ends in `.gguf`; for any other name, the name and None."""
    if str(name).lower().endswith(".gguf"):
        return os.path.split(os.path.abspath(name))
    return name, None


@contextmanager
def reading_gguf(base: str | os.PathLike, gguf_file: str | None) -> Iterator[None]:
    """Re-raises any error of the GGUF readers as a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if gguf_file is None:
            raise
        rename = "" if gguf_file.endswith(".gguf") else "the library asks for a name that ends in .gguf: rename it. "
        raise ValueError(f"{os.path.join(base, gguf_file)} cannot be read: {rename}{error}") from error


def check_base(llm: PreTrainedModel):
    """Raises a ValueError for an LLM that cannot be given a soft prompt."""
    refusal = f"{type(llm).__name__} cannot be a base of Phase15"
    arguments = inspect.signature(llm.base_model.forward).parameters
    missing = [name for name in ("inputs_embeds", "position_ids", CACHE_NAME) if name not in arguments]
    if missing:
        raise ValueError(f"{refusal}: it takes no {', '.join(missing)}.")
    width = llm.get_input_embeddings().weight.shape[-1]
    hidden_size = llm.config.get_text_config().hidden_size
    if width != hidden_size:
        raise ValueError(f"{refusal}: its embeddings are {width} wide, and its hidden states {hidden_size}.")
    device = llm.device if llm.device.type != "meta" else "cpu"
    tokens = torch.arange(8, device=device)[None]
    with torch.no_grad():
        try:
            hidden_states = llm.base_model(inputs_embeds=llm.get_input_embeddings()(tokens)).last_hidden_state
            expected = llm.get_output_embeddings()(hidden_states)
            logits = llm(tokens).logits
        except Exception as error:  # other architectures raise any
            raise ValueError(f"{refusal}: its body cannot be called with embeddings alone: {error}") from error
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{refusal}: its logits are not finite. Its weights are damaged, or too large for {llm.dtype}."
        )
    if not torch.equal(expected, logits):
        raise ValueError(
            f"{refusal}: its logits are more than its output embeddings applied to the hidden states of its input "
            "embeddings."
        )


def check_sizes(model: PreTrainedModel, state_dict: dict, prefix: str, *_):
    """
    Raises a ValueError for an adapter of another recursion: PEFT loads it onto a model whose config it does not
    compare. A hook of `load_state_dict`; the trainer saves the sizes beside the adapter's weights.
    """
    sizes = state_dict.get(f"{prefix}hypernet.sizes")
    if sizes is None:
        return
    sizes = [*sizes.tolist(), *EARLIER[len(sizes) - 4 :]]  # the first adapters had four
    own = [getattr(model.config, name) for name in SIZES]
    if sizes != own:
        fields = ", ".join(f"{name}={type(value)(size)}" for name, size, value in zip(SIZES, sizes, own, strict=True))
        raise ValueError(f"The adapter was trained with other sizes than the model's: give `from_base` {fields}.")


def weights_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    Returns a SHA-256 over names, shapes and values of weights. Floating-point values are rounded to bfloat16, so that
    weights loaded in float32 and in bfloat16 have one digest.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        values = weight.detach().cpu()
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        digest.update(f"{name} {tuple(values.shape)};".encode())
        # NumPy has no bfloat16: its bytes are hashed as they lie in memory.
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rename_earlier_weights(model: PreTrainedModel, state_dict: dict, prefix: str, *_):
    """
    Renames the weights of checkpoints that were saved before 0.6.0, when the head was its own body. A hook of
    `load_state_dict`; `from_pretrained` finds them by the model's `base_model_prefix`.
    """
    for name in list(state_dict):
        weight = name.removeprefix(prefix)
        if name.startswith(prefix) and weight.startswith(("llm.", "hypernet.")):
            state_dict[f"{prefix}{model.base_model_prefix}.{weight}"] = state_dict.pop(name)


__all__ = ["SIZES", "check_base", "check_sizes", "load_base", "rename_earlier_weights", "split_gguf", "weights_digest"]
