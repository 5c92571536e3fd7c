# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A request to continuous_batching_phase15.py: a prompt, how its tokens are picked, and the answer so far.

`make_request` takes the settings of a call of `generate`, and lets the library make its own logits processors and
stopping criteria of them.
"""

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessorList

from .decoding_phase15 import Sampling, draw_seed, eos_tokens, max_new_tokens, other_criteria, split_processors
from .recursion_phase15 import SoftPrompt
from .state_phase15 import Phase15State


TOP_LOGPROBS = 20  # maximum number of likely tokens to return for each token
UNSUPPORTED_IN_REQUESTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Phase15Request:
    """
    One answer, and the settings that it is generated with. Make it with [`make_request`].

    Args:
        prompt_ids (`list[int]`): token ids of the prompt.
        max_new_tokens (`int`): maximum length of the answer.
        sampling (`Sampling`): how tokens are picked.
        eos_token_ids (`frozenset[int]`): tokens that end the answer.
        seed (`int`): of the numbers that sampling draws. Other requests do not change them.
        processors (`LogitsProcessorList`): the library's, other than those in `sampling`.
        criteria (`list`): the library's, other than length and end tokens.
        num_logprobs (`int`, *optional*): return each token's log-probability, and those of the N most likely tokens.
        on_token (`Callable`, *optional*): called with the request after every token, in the thread of `advance`.
        chunk_length (`int`, *optional*): tokens of a chunk, if the settings name it; a processor with another length
            refuses the request.
        on_step (`Callable`, *optional*): called after every step of the recursion with the carried soft prompt, the
            stepped one, each of one row, and the number of tokens that entered.
        on_finish (`Callable`, *optional*): called with the request at its end, in the thread that ends it.
        state (`Phase15State`, *optional*): of one row, what was read before the prompt.
        salt (`bytes`): only requests with the same salt share stored soft prompts.
        reads_only (`bool`): end when the prompt has been read, with `soft_prompt` instead of an answer.

    Attributes:
        generated_tokens (`list[int]`): the answer so far, an end token included.
        logprobs (`list[float]`): in nats, of each of them.
        top_logprobs (`list[list[tuple[int, float]]]`): ids and log-probabilities, the most likely first.
        finish_reason (`str`, *optional*): "stop", "length", "cancelled", or "error"; None before the end.
        error (`Exception`, *optional*): why there is no answer.
        started, finished (`float`): `time.perf_counter()` when the request got its lane, and at its end.
        num_kept_tokens (`int`): number of the prompt's tokens that a stored soft prompt had read.
        soft_prompt (`SoftPrompt` of one row, *optional*): after the prompt, of a request that only reads.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: list = field(default_factory=list)
    num_logprobs: int | None = None
    on_token: Callable | None = None
    chunk_length: int | None = None
    on_step: Callable | None = None
    on_finish: Callable | None = None
    state: Phase15State | None = None
    salt: bytes = b""
    reads_only: bool = False
    soft_prompt: SoftPrompt | None = None
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    started: float = -1.0
    finished: float = -1.0
    num_kept_tokens: int = 0

    @property
    def needs_every_token(self) -> bool:
        """`True` if the host must see each token before the next is picked."""
        return bool(self.on_token or self.processors or self.criteria or self.num_logprobs is not None)

    def finish(self, reason: str, error: Exception | None = None):
        """Ends the request, from any thread. Its lane is free at the next boundary."""
        if self.finish_reason is None:
            self.error = error
            self.finished = time.perf_counter()
            self.finish_reason = reason
            if self.on_finish is not None:
                self.on_finish(self)


def make_request(
    model,
    prompt_ids: list[int],
    generation_config: GenerationConfig | None = None,
    *,
    seed: int | None = None,
    num_logprobs: int | None = None,
    on_token: Callable | None = None,
    name: str = "prompt_ids",
    state: Phase15State | None = None,
    salt: bytes = b"",
    **kwargs,
) -> Phase15Request:
    """
    Makes a request with the settings of a call of `generate`.

    Args:
        prompt_ids (`list[int]`): token ids of the prompt.
        generation_config, kwargs: as for `generate`, for one answer.
        seed (`int`, *optional*): of sampling; by default drawn from torch's default generator.
        num_logprobs, on_token: see [`Phase15Request`].
        name (`str`): what errors call the prompt.
        state (`Phase15State`, *optional*): of one row, what was read before the prompt.
        salt (`bytes`): only requests with the same salt and the same state share stored soft prompts.

    Raises:
        ValueError: for a prompt without tokens or with ids outside the vocabulary, for settings that `generate`
            refuses or that continuous batching does not support, and for a state of another model or of several rows.
    """
    prompt_ids = check_prompt_ids(prompt_ids, model.config.text_config.vocab_size, name)
    if num_logprobs is not None and not 0 <= num_logprobs <= TOP_LOGPROBS:
        raise ValueError(f"`num_logprobs` is {num_logprobs}, but it must be from 0 to {TOP_LOGPROBS}.")
    chunk_length = kwargs.get("chunk_length")
    if chunk_length is None:
        chunk_length = getattr(generation_config, "chunk_length", None)
    processors, criteria, settings = library_parts(model, prompt_ids, generation_config, kwargs)
    check_settings(settings)
    sampling, other_processors = split_processors(processors, settings.do_sample)
    if seed is None:
        seed = draw_seed() if settings.do_sample else 0
    return Phase15Request(
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens(criteria, len(prompt_ids)),
        sampling=sampling,
        eos_token_ids=frozenset(eos_tokens(criteria)),
        seed=seed,
        processors=other_processors,
        criteria=other_criteria(criteria),
        num_logprobs=num_logprobs,
        on_token=on_token,
        chunk_length=chunk_length,
        **starting_point(model, state, salt),
    )


def make_reading_request(
    model, prompt_ids: list[int], *, state: Phase15State | None = None, salt: bytes = b"", name: str = "prompt_ids"
) -> Phase15Request:
    """Makes a request that reads a text and gives the soft prompt after it. Arguments as in [`make_request`]."""
    prompt_ids = check_prompt_ids(prompt_ids, model.config.text_config.vocab_size, name)
    return Phase15Request(prompt_ids, max_new_tokens=0, reads_only=True, **starting_point(model, state, salt))


def starting_point(model, state: Phase15State | None, salt: bytes) -> dict:
    """Returns the fields `state` and `salt` of a request: soft prompts are stored for each state."""
    if state is None:
        return {"salt": salt}
    if state.batch_size != 1:
        raise ValueError(f"`state` has {state.batch_size} rows, but a request has one.")
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    state = model.model.match_state(state, token)
    digest = hashlib.sha256(salt)
    for tensor in state.soft_prompt:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return {"state": state, "salt": digest.digest()}


def check_prompt_ids(prompt_ids, vocab_size: int, name: str) -> list[int]:
    """Returns the prompt as a list of integers. Raises a ValueError that calls it `name` if it is not a prompt."""
    try:
        if isinstance(prompt_ids, str):
            raise TypeError
        ids = [int(token) for token in prompt_ids]
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a list of token ids, not {prompt_ids!r:.80}.") from None
    if not ids:
        raise ValueError(f"`{name}` is empty; give at least one token id.")
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"`{name}` holds {token} at position {position}, but ids must be from 0 to {vocab_size - 1}."
            )
    return ids


def library_parts(model, prompt_ids: list[int], generation_config: GenerationConfig | None, kwargs: dict) -> tuple:
    """
    Returns the logits processors, the stopping criteria and the resolved generation config that the library makes for
    a call of `generate` on one prompt. A `custom_generate` that returns its arguments stops the call before decoding.
    """

    def return_parts(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return logits_processor, stopping_criteria, generation_config

    input_ids = torch.tensor([prompt_ids], device=model.device)
    kwargs = {"attention_mask": torch.ones_like(input_ids)} | kwargs
    # one answer for each request; the library refuses a config together with arguments that are in it
    kwargs.pop("num_return_sequences", None)
    if generation_config is None:
        kwargs["num_return_sequences"] = 1
    else:
        generation_config = copy.copy(generation_config)
        generation_config.num_return_sequences = 1
    return model.generate(input_ids, generation_config, custom_generate=return_parts, compile=False, **kwargs)


def check_settings(settings: GenerationConfig):
    """Raises a ValueError for generation settings that continuous batching does not support."""
    if (settings.num_beams or 1) > 1:
        raise ValueError("Continuous batching does not support beam search (`num_beams`).")
    for name in UNSUPPORTED_IN_REQUESTS:
        if getattr(settings, name):
            raise ValueError(f"Continuous batching does not support `{name}`: call `generate`.")


request_of = make_request  # the name before 0.7, for one version


__all__ = ["TOP_LOGPROBS", "Phase15Request", "make_reading_request", "make_request", "request_of"]
