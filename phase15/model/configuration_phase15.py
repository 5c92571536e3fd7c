# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Phase15 model configuration."""

import difflib
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from .compat_phase15 import CACHE_NAMES


VERSION = "0.6.0"  # of the package, of the code in a saved folder, and of the model card

# TinyLlama-1.1B (Zhang et al. 2024, arXiv 2401.02385), the default `text_config`.
TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}

# The library puts these into any config. Any other name that is not a field is a mistake.
LIBRARY_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "quantization_config",
    "use_cache",
    *GenerationConfig().to_dict(),
    *dir(PreTrainedConfig()),  # including fields of later releases
}


def auto_map(model_class: str = "Phase15ForCausalLM") -> dict[str, str]:
    """
    Returns the classes that transformers loads with `trust_remote_code`, by auto class. `AutoModel` gives the class
    that was saved: the causal LM, which generates, or a body that was saved by itself.
    """
    is_body = model_class == "Phase15Model"
    return {
        "AutoConfig": "configuration_phase15.Phase15Config",
        "AutoModel": "modeling_phase15.Phase15Model" if is_body else "modeling_phase15.Phase15ForCausalLM",
        "AutoModelForCausalLM": "modeling_phase15.Phase15ForCausalLM",
    }


class Phase15Config(PreTrainedConfig):
    r"""
    Configuration of a [`Phase15ForCausalLM`]: an LLM that sees a soft prompt and one chunk of the answer, and a
    HyperNetwork that steps the soft prompt from chunk to chunk. The defaults are TinyLlama-1.1B with a HyperNetwork
    of 75.8 million parameters.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the LLM, Llama unless its `model_type` says otherwise. Defaults to TinyLlama-1.1B's.
        num_soft_tokens (`int`, defaults to 128):
            Slots of the soft prompt, in vectors of the LLM's hidden size.
        num_sink_tokens (`int`, defaults to 4):
            Slots that keep the first tokens of the stream; fewer than `num_soft_tokens`.
        chunk_length (`int`, defaults to 16):
            Answer tokens between two steps of the soft prompt.
        max_query_length (`int`, defaults to 256):
            Query tokens read in one step; a longer query takes several.
        max_answer_length (`int`, defaults to 256):
            Answer tokens of a training example; longer answers are cut. It does not limit generation.
        hypernet_hidden_size (`int`, defaults to 1024):
            Width of the HyperNetwork; a multiple of `hypernet_num_attention_heads`.
        hypernet_num_hidden_layers (`int`, defaults to 4):
            Blocks of the HyperNetwork.
        hypernet_num_attention_heads (`int`, defaults to 16):
            Attention heads of each block, in its self-attention and its cross-attention.
        hypernet_intermediate_size (`int`, defaults to 4096):
            Width of each block's MLP.
        hypernet_type (`str`, defaults to `"gated_overwrite"`):
            Name of the rule that computes Δ, as registered with `register_hypernet`.
        hypernet_slot_gate (`bool`, defaults to `False`):
            Give Δ's gate a part that all channels of a slot share. The tiny model learned facts in half the steps.
        hypernet_reads_layers (`int`, defaults to 0):
            Number of the LLM's first layers whose hidden states of the new tokens the HyperNetwork reads besides their
            embeddings. The layers run only over the new tokens.
        hypernet_signed_alpha (`bool`, *optional*):
            Let the sign of α count, so that a slot's carried part can grow from step to step. Only for weights trained
            before 2026-11-27: defaults to `True` in a saved config that does not name it, else to `False`.
        hypernet_digest (`str`, *optional*):
            Digest of the source of a step, written by `save_pretrained`. Code with another formula warns at loading.
        phase15_version (`str`, *optional*):
            Version of the code that saved the model, written by `save_pretrained`.
        base_model_name_or_path (`str`, *optional*):
            The base that `from_base` was given: a Hub id, or a path. In a folder without the base a path inside it is
            relative.
        base_revision (`str`, *optional*):
            Commit of the base on the Hub.
        base_digest (`str`, *optional*):
            Digest of the base's weights. Only in a folder that holds the HyperNetwork without its base.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the HyperNetwork's initial weights.

    Raises:
        ValueError: for a value that cannot work, naming the field, the value and the rule; for an unknown field.

    ```python
    >>> config = Phase15Config(num_soft_tokens=64)
    >>> config.text_config.hidden_size
    2048
    ```"""

    model_type = "phase15"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        "last_hidden_state",
        "soft_prompt",
        "chunk_losses",
        "chunk_tokens",
    ]

    text_config: dict | PreTrainedConfig | None = None
    num_soft_tokens: int = 128
    num_sink_tokens: int = 4
    chunk_length: int = 16
    max_query_length: int = 256
    max_answer_length: int = 256
    hypernet_hidden_size: int = 1024
    hypernet_num_hidden_layers: int = 4
    hypernet_num_attention_heads: int = 16
    hypernet_intermediate_size: int = 4096
    hypernet_type: str = "gated_overwrite"
    hypernet_slot_gate: bool = False
    hypernet_reads_layers: int = 0
    hypernet_signed_alpha: bool | None = None
    hypernet_digest: str | None = None
    phase15_version: str | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_digest: str | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Overrides the library to name the folder in errors."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Overrides the library to keep attributes that are not fields, as `save_pretrained` may have written them. A
        misspelt field is an error.
        """
        extra = {k: v for k, v in config_dict.items() if not is_known(k) and not close_field(k, cutoff=0.9)}
        result = super().from_dict({k: v for k, v in config_dict.items() if k not in extra}, **kwargs)
        for name, value in extra.items():
            setattr(result[0] if isinstance(result, tuple) else result, name, value)
        return result

    def __post_init__(self, **kwargs: Any):
        for name in kwargs:
            if not is_known(name):
                close = close_field(name)
                hint = f"; did you mean `{close}`?" if close else "."
                raise ValueError(f"`{name}` is not a field of Phase15Config{hint}")
        if self.text_config is None:
            self.text_config = dict(TINYLLAMA)
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "llama")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"`text_config.model_type` is {model_type!r}, which transformers does not know.")
            self.text_config = CONFIG_MAPPING[model_type](**self.text_config)
        # The LLM ties its own embeddings; the library asks the outer config whether anything is tied.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        if self.hypernet_signed_alpha is None:
            self.hypernet_signed_alpha = self.transformers_version is not None  # saved before the choice
        # save_pretrained copies the code into every folder, so no other place may be named
        self.auto_map = auto_map(*(self.architectures or ())[:1])
        self.check()

    def check(self):
        """Raises a ValueError for a field that no model can have: here, and where a model is made of the config."""
        for name in POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but it must be a positive integer.")
        num_read = self.hypernet_reads_layers
        num_layers = self.text_config.num_hidden_layers
        if not isinstance(num_read, int) or isinstance(num_read, bool) or not 0 <= num_read <= num_layers:
            raise ValueError(
                f"`hypernet_reads_layers` is {num_read!r}, but it must be a number of layers, 0 to {num_layers}."
            )
        if not isinstance(self.hypernet_type, str):
            raise ValueError(f"`hypernet_type` is {self.hypernet_type!r}, but it must be the name of a rule.")
        for name in ("hypernet_slot_gate", "hypernet_signed_alpha"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but it must be true or false.")
        if self.num_sink_tokens >= self.num_soft_tokens:
            raise ValueError(
                f"`num_sink_tokens` is {self.num_sink_tokens}, but it must be smaller than `num_soft_tokens` "
                f"({self.num_soft_tokens}): the other slots hold the newest tokens."
            )
        if self.hypernet_hidden_size % self.hypernet_num_attention_heads:
            raise ValueError(
                f"`hypernet_hidden_size` is {self.hypernet_hidden_size}, but it must be a multiple of "
                f"`hypernet_num_attention_heads` ({self.hypernet_num_attention_heads})."
            )
        window = getattr(self.text_config, "sliding_window", None)
        if window is not None and window < self.num_soft_tokens + self.chunk_length:
            raise ValueError(
                f"`text_config.sliding_window` is {window}, but it must be at least `num_soft_tokens` + "
                f"`chunk_length` ({self.num_soft_tokens} + {self.chunk_length}), so that the LLM sees all slots."
            )

    @property
    def num_positions(self) -> int:
        """Returns the number of positions of the HyperNetwork: the maximum number of tokens of a step."""
        return max(self.num_soft_tokens, self.max_query_length, self.chunk_length)

    @property
    def max_chunk_length(self) -> int:
        """
        Returns the maximum number of tokens of a chunk: the HyperNetwork has positions for them, and the LLM sees them
        beside all slots.
        """
        window = getattr(self.text_config, "sliding_window", None)
        return self.num_positions if window is None else min(self.num_positions, window - self.num_soft_tokens)

    def resolve_chunk_length(self, *sources: int | GenerationConfig | None, cache=None) -> int:
        """
        Returns the chunk length of a call, in tokens. Every caller resolves it here.

        Args:
            sources (`int`, `GenerationConfig` or `None`): in order of precedence; the first with a length counts.
            cache (`Phase15Cache` or `Phase15State`, *optional*): counts after them, and before the config.

        Raises:
            ValueError: if the length is not an integer from 1 to `max_chunk_length`.
        """
        for source in sources:
            if isinstance(source, GenerationConfig):
                source = getattr(source, "chunk_length", None)
            if source is not None:
                self.check_chunk_length(source)
                return source
        return self.chunk_length if cache is None else cache.chunk_length

    def check_chunk_length(self, chunk_length: int | None):
        """Raises a ValueError unless a chunk has 1 to `max_chunk_length` tokens. `None` keeps the default."""
        if chunk_length is None:
            return
        maximum = self.max_chunk_length
        reason = "the HyperNetwork has no more positions"
        if maximum < self.num_positions:
            window = self.text_config.sliding_window
            reason = f"the LLM's sliding window of {window} has the {self.num_soft_tokens} slots in it, too"
        is_integer = isinstance(chunk_length, int) and not isinstance(chunk_length, bool)
        if not (is_integer and 1 <= chunk_length <= maximum):
            raise ValueError(
                f"`chunk_length` is {chunk_length!r}, but it must be an integer from 1 to {maximum}: {reason}."
            )


# The fields that must be positive integers.
POSITIVE = [
    name for name, kind in Phase15Config.__annotations__.items() if kind is int and name != "hypernet_reads_layers"
]


def is_known(name: str) -> bool:
    return name in LIBRARY_KEYS or name in Phase15Config.__annotations__ or name.startswith("_")


def close_field(name: str, cutoff: float = 0.6) -> str | None:
    """Returns the field that a name resembles most, or None if it resembles none by a `cutoff` from 0 to 1."""
    matches = difflib.get_close_matches(name, Phase15Config.__annotations__, n=1, cutoff=cutoff)
    return matches[0] if matches else None


Phase15Config.register_for_auto_class()


__all__ = ["TINYLLAMA", "VERSION", "Phase15Config", "auto_map"]
