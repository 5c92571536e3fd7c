# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A request to continuous_batching_phase15.py: a query, how its tokens are picked, and the answer so far. The library itself makes the
processors and criteria of a request, of the settings that `generate` takes.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .decoding_phase15 import PROCESSORS


TOP_LOGPROBS = 20  # the most that can be asked for at each token
UNSUPPORTED_IN_LANES = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class Sampling(NamedTuple):
    """How a lane picks its tokens. Temperature 0 is greedy search."""

    temperature: float = 0.0
    top_k: int = 0  # 0: any number of tokens
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass
class Phase15Request:
    """
    One answer that is asked for. Make it with [`request_of`].

    Args:
        prompt_ids (`list[int]`): the query.
        max_new_tokens (`int`): the most tokens of the answer.
        sampling (`Sampling`): how tokens are picked.
        eos_token_ids (`frozenset[int]`): the tokens that end the answer.
        seed (`int`): of the numbers that sampling draws. The other lanes do not change them.
        processors (`LogitsProcessorList`): the library's, other than those in `sampling`.
        criteria (`list`): the library's, other than length and end tokens.
        num_logprobs (`int`, *optional*): give each token's log-probability and so many of the likeliest tokens'.
        on_token (`Callable`, *optional*): called with the request after every token, in the thread of `advance`.
        chunk_length (`int`, *optional*): tokens of a chunk, if the settings name them: lanes with others refuse it.
        on_step (`Callable`, *optional*): called after every step of the recursion with the carried soft prompt, the
            stepped one, each of one row, and how many tokens entered.
        on_finish (`Callable`, *optional*): called with the request at its end, in the thread that ends it.

    Attributes:
        generated_tokens (`list[int]`): the answer so far, an end token included.
        logprobs (`list[float]`): in nats, of each of them.
        top_logprobs (`list[list[tuple[int, float]]]`): ids and log-probabilities, the likeliest first.
        finish_reason (`str`, *optional*): "stop", "length", "cancelled", or "error"; None while the answer goes on.
        error (`Exception`, *optional*): why there is no answer.
        started, finished (`float`): `time.perf_counter()` when it got its lane, and at its end.
        num_kept_tokens (`int`): how many of the query's tokens a kept conversation had read.
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
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    started: float = -1.0
    finished: float = -1.0
    num_kept_tokens: int = 0

    @property
    def asks_every_token(self) -> bool:
        """Whether the host must see each token before the next is picked or said."""
        return bool(self.on_token or self.processors or self.criteria or self.num_logprobs is not None)

    def finish(self, reason: str, error: Exception | None = None):
        """Ends the request, from any thread. Its lane is free at the next boundary."""
        if self.finish_reason is None:
            self.error, self.finished, self.finish_reason = error, time.perf_counter(), reason
            if self.on_finish is not None:
                self.on_finish(self)


def request_of(
    model,
    prompt_ids: list[int],
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    num_logprobs: int | None = None,
    on_token: Callable | None = None,
    name: str = "prompt_ids",
    **kwargs,
) -> Phase15Request:
    """
    A request with the settings of a call of `generate`. The library itself makes its processors and criteria of them.

    Args:
        prompt_ids (`list[int]`): the query.
        generation_config, kwargs: as for `generate`, for one answer.
        seed (`int`, *optional*): of sampling; drawn from torch's own generator when not given.
        num_logprobs, on_token: see [`Phase15Request`].
        name (`str`): what errors call the query.

    Raises:
        ValueError: for a query without tokens or with ids outside the vocabulary, and for settings that `generate`
            refuses or lanes cannot honour.
    """
    vocab_size = model.config.text_config.vocab_size
    try:
        ids = None if isinstance(prompt_ids, str) else [int(token) for token in prompt_ids]
    except (TypeError, ValueError):
        ids = None
    if ids is None:
        raise ValueError(f"`{name}` must be a list of token ids, not {prompt_ids!r:.80}.")
    prompt_ids = ids
    if not prompt_ids:
        raise ValueError(f"`{name}` holds no token.")
    if bad := [index for index, token in enumerate(prompt_ids) if not 0 <= token < vocab_size]:
        raise ValueError(
            f"`{name}` holds {prompt_ids[bad[0]]} at position {bad[0]}, but ids must be from 0 to {vocab_size - 1}."
        )
    if num_logprobs is not None and not 0 <= num_logprobs <= TOP_LOGPROBS:
        raise ValueError(f"`num_logprobs` is {num_logprobs}, but it must be from 0 to {TOP_LOGPROBS}.")

    def prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return logits_processor, stopping_criteria, generation_config

    ids = torch.tensor([prompt_ids], device=model.device)
    kwargs = {"attention_mask": torch.ones_like(ids)} | kwargs | {"num_return_sequences": 1}
    if generation_config is not None:  # the library does not want both
        generation_config = copy.copy(generation_config)
        generation_config.num_return_sequences = kwargs.pop("num_return_sequences")
    parts = model.generate(ids, generation_config, custom_generate=prepared, compile=False, **kwargs)
    processors, criteria, settings = parts
    if (settings.num_beams or 1) > 1:
        raise ValueError("Lanes do not support beam search (`num_beams`).")
    for setting in UNSUPPORTED_IN_LANES:
        if getattr(settings, setting):
            raise ValueError(f"Lanes do not support `{setting}`: call `generate`.")
    warpers = {type(part): part for part in processors if type(part) in PROCESSORS}
    sampling = Sampling()
    if settings.do_sample:
        parts = zip(PROCESSORS, Sampling._fields, Sampling(temperature=1.0), strict=True)  # in one order
        sampling = Sampling(
            *(getattr(warpers[kind], name) if kind in warpers else neutral for kind, name, neutral in parts)
        )
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
    chunk_length = kwargs.get("chunk_length")
    if chunk_length is None:
        chunk_length = getattr(generation_config, "chunk_length", None)
    ends = [part.eos_token_id for part in criteria if isinstance(part, EosTokenCriteria)]
    limits = [part.max_length for part in criteria if isinstance(part, MaxLengthCriteria)]
    return Phase15Request(
        prompt_ids,
        max(min(limits) - len(prompt_ids), 1),
        sampling,
        frozenset(int(token) for tokens in ends for token in tokens),
        seed or 0,
        LogitsProcessorList(part for part in processors if type(part) not in PROCESSORS),
        [part for part in criteria if not isinstance(part, (EosTokenCriteria, MaxLengthCriteria))],
        num_logprobs,
        on_token,
        chunk_length,
    )


def sample_tokens(scores: torch.Tensor, settings: torch.Tensor, uniform: torch.Tensor, width: int) -> torch.LongTensor:
    """
    Draws a token in each row from what the library's warpers leave: temperature, top-k, top-p, min-p, in this order.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`): in float32.
        settings (`torch.Tensor` of shape `(batch_size, 4)`): a [`Sampling`] in each row.
        uniform (`torch.Tensor` of shape `(batch_size, 1)`): from 0 to 1, which token of the cumulated probabilities.
        width (`int`): how many of the likeliest tokens are sorted; no row's top-k is larger. 0: no row asks for top-k
            or top-p, which need sorting.
    """
    temperature, top_k, top_p, min_p = settings[..., None].unbind(dim=1)  # (B, 1) each
    greedy, scores = scores.argmax(dim=-1), scores / temperature.where(temperature > 0, 1)
    if width:
        best, order = scores.topk(width) if width < scores.shape[1] else scores.sort(dim=-1, descending=True)
        rank = torch.arange(width, device=scores.device)
        kept = best.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf).softmax(dim=-1)
        above = kept.cumsum(dim=-1) - kept  # the mass of likelier tokens
        kept = kept.where((above < top_p) | (rank == 0), 0)
        probabilities = torch.zeros_like(scores).scatter(1, order, kept)
    else:
        probabilities = scores.softmax(dim=-1)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True), 0)
    mass = probabilities.cumsum(dim=-1)  # in the vocabulary's order, so that a number draws the same at any width
    total = mass[:, -1:]
    target = (uniform * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    drawn = (mass <= target).sum(dim=-1)
    return drawn.where(temperature[:, 0] > 0, greedy)


def width_of(requests: list[Phase15Request], vocab_size: int) -> int | None:
    """`width` of `sample_tokens`, rounded up so that few values occur; None where all search greedily."""
    sampled = [request.sampling for request in requests if request.sampling.temperature]
    if not any(sampling.top_k or sampling.top_p < 1 for sampling in sampled):
        return 0 if sampled else None
    most = max(sampling.top_k or vocab_size for sampling in sampled)
    return min(1 << (int(most) - 1).bit_length(), vocab_size)


__all__ = ["TOP_LOGPROBS", "Phase15Request", "Sampling", "request_of", "sample_tokens", "width_of"]
