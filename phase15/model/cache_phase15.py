# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The state of the recursion during generation.

- `Phase15Cache` holds the soft prompt, the open chunk, and the LLM's keys and values of both;
- `KeptConversations` stores the soft prompts of finished answers by the tokens that they have read.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from transformers import Cache, DynamicCache

from .configuration_phase15 import Phase15Config
from .recursion_phase15 import SoftPrompt
from .state_phase15 import Phase15State


class Phase15Cache(Cache):
    """
    State of one generation: the soft prompt, the tokens of the open chunk, and the LLM's key-value cache of
    [soft prompt ; open chunk]. Its size does not depend on the number of tokens seen.

    Args:
        config (`Phase15Config`): of the model.
        chunk_length (`int`, *optional*): tokens of a chunk; by default the state's, or the config's.
        state (`Phase15State`, *optional*): what was read before the first token of `input_ids`, for each row. Make it
            fit with [`Phase15Model.match_state`].

    Attributes:
        soft_prompt (`SoftPrompt`, *optional*): None before the first token, unless a state was given.
        message_prompt (`SoftPrompt`, *optional*): the soft prompt after the newest message, before its answer. The
            rows keep their order in beam search.
        message_end (`int`): columns of `input_ids` up to the end of that message.
        chunk (`torch.Tensor` of shape `(batch_size, open, hidden_size)`): embeddings of the open chunk. The chunks of
            all rows begin and end together.
        chunk_length (`int`): tokens of a chunk. An open chunk that has as many already ends with the next token.
        llm_cache (`DynamicCache`): of the `soft_prompt` and `chunk` above.
        seen_tokens (`int`): columns of `input_ids` consumed, padding included.

    `generate(..., return_dict_in_generate=True)` returns its cache. A second call may take it, with the whole
    conversation as `input_ids`: the tokens that the cache has not seen are read as the next message.
    """

    def __init__(self, config: Phase15Config, chunk_length: int | None = None, state: Phase15State | None = None):
        super().__init__(layers=[])
        self.config = config
        self.state = state
        self.chunk_length = config.resolve_chunk_length(chunk_length, cache=state)
        self.reset()

    def reset(self):
        self.soft_prompt: SoftPrompt | None = None
        self.message_prompt: SoftPrompt | None = None
        self.message_end = 0
        self.chunk: torch.Tensor | None = None
        self.llm_cache: DynamicCache | None = None
        self.seen_tokens = 0
        if self.state is not None:
            self.start_chunk(self.state.soft_prompt)

    def start_chunk(self, soft_prompt: SoftPrompt):
        """Starts an empty chunk after a new soft prompt. The LLM's old keys and values do not belong to it."""
        self.soft_prompt = soft_prompt
        self.chunk = soft_prompt.embeds[:, :0]
        self.llm_cache = DynamicCache(config=self.config.text_config)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # unlimited

    @property
    def max_cache_len(self) -> int:
        return -1  # PEFT's prefix tuning reads it, before its own cache is refused

    @property
    def batch_size(self) -> int:
        return -1 if self.soft_prompt is None else self.soft_prompt.length.shape[0]

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        # transformers 5.24 takes a cache without layers for linear attention, and loses the positions.
        return [False]

    def crop(self, tokens_to_remove: int):
        raise ValueError("A Phase15Cache cannot be cropped: a step of the recursion cannot be undone.")

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        if self.soft_prompt is not None:
            self.soft_prompt = SoftPrompt(*(state.index_select(0, indices) for state in self.soft_prompt))
            self.chunk = self.chunk.index_select(0, indices)
            self.llm_cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int):
        if self.soft_prompt is not None:
            self.soft_prompt = SoftPrompt(*(state.repeat_interleave(repeats, dim=0) for state in self.soft_prompt))
            self.chunk = self.chunk.repeat_interleave(repeats, dim=0)
            self.llm_cache.batch_repeat_interleave(repeats)


def check_cache(cache: Cache | None):
    """Raises a ValueError for a cache of another class, or of another copy of this file."""
    if cache is not None and not isinstance(cache, Phase15Cache):
        raise ValueError(
            f"`cache` (or `past_key_values`) must be a Phase15Cache of {Phase15Cache.__module__}, not a "
            f"{type(cache).__name__} of {type(cache).__module__}."
        )


class KeptConversations:
    """
    Stores the soft prompts of prompts by the tokens that they have read.

    A prompt is read in segments of `max_query_length` tokens, from its beginning. What is stored is the soft prompt
    after a full segment: a prompt that begins with the same segments gets the same soft prompt as if it were read from
    the start. So conversations share a system prompt, a document and earlier turns, and no branch takes the soft
    prompt of another.

    Of a prompt the soft prompts after the first `FIRST_SEGMENTS` segments are stored, after 16, 32, 64, …, and after
    the last full one: a long prompt does not replace many others.

    Args:
        size (`int`): maximum number of soft prompts; the least recently used go first.
        segment_length (`int`): tokens of a segment.
    """

    FIRST_SEGMENTS = 8

    def __init__(self, size: int, segment_length: int):
        self.size = size
        self.segment_length = segment_length
        self.states: OrderedDict[bytes, SoftPrompt] = OrderedDict()

    def keys(self, ids: list[int], salt: bytes = b"") -> Iterator[bytes]:
        """Yields a digest of the salt and all tokens up to the end of each full segment."""
        digest = hashlib.sha256(salt)
        for end in range(self.segment_length, len(ids) + 1, self.segment_length):
            digest.update(torch.tensor(ids[end - self.segment_length : end]).numpy().tobytes())
            yield digest.digest()

    def is_kept(self, num_read: int, num_tokens: int) -> bool:
        """Returns `True` if the soft prompt is stored that has read `num_read` of a prompt's `num_tokens` tokens."""
        index, remainder = divmod(num_read, self.segment_length)
        if not self.size or remainder:
            return False
        is_power_of_two = index & (index - 1) == 0
        is_last = num_tokens - num_read < self.segment_length
        return index <= self.FIRST_SEGMENTS or is_power_of_two or is_last

    def get(self, ids: list[int], salt: bytes = b"") -> tuple[SoftPrompt | None, int]:
        """
        Returns the soft prompt of the longest stored prefix of a prompt and the number of tokens that it has read;
        None and 0 if no prefix is stored.
        """
        if self.size:
            for index, key in reversed(list(enumerate(self.keys(ids, salt), start=1))):
                soft_prompt = self.find(key)
                if soft_prompt is not None:
                    return soft_prompt, index * self.segment_length
        return None, 0

    def find(self, key: bytes) -> SoftPrompt | None:
        """Returns the soft prompt of a key, which is now the most recently used; None if it is not stored."""
        if key not in self.states:
            return None
        self.states.move_to_end(key)
        return self.states[key]

    def put(self, ids: list[int], soft_prompt: SoftPrompt, salt: bytes = b""):
        """Stores the soft prompt that has read `ids`, which end with a full segment."""
        *_, key = self.keys(ids, salt)
        # Clones, because the tensors may be views of a batch that would stay in memory with them.
        self.add(key, SoftPrompt(*(state.clone() for state in soft_prompt)))

    def add(self, key: bytes, soft_prompt: SoftPrompt):
        """Stores a soft prompt by its key."""
        self.states[key] = soft_prompt
        self.states.move_to_end(key)
        while len(self.states) > self.size:
            self.states.popitem(last=False)


__all__ = ["KeptConversations", "Phase15Cache", "check_cache"]
