# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Generation with a recursive soft prompt: transformers' own loop, with the state of the recursion as its cache.

- `Phase15GenerationMixin` makes that cache, refuses modes that cannot work with it, and leaves the rest to
  [`~transformers.GenerationMixin`]; on CUDA it runs the compiled steps of decoding_phase15.py where it can.
"""

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .cache_phase15 import Phase15Cache, check_cache
from .compat_phase15 import CACHE_NAME, pop_cache
from .continuous_batching_phase15 import NUM_LANES, Phase15Lanes, Phase15LaneThread, generate_in_lanes
from .decoding_phase15 import is_compiled, sample_compiled


logger = logging.get_logger(__name__)


_ROLLBACK = "candidate tokens would have to be rolled back, and a step of the recursion cannot be undone"
_ONE_CACHE = "the state of the recursion is a Phase15Cache, whose rows begin and end their chunks together"
UNSUPPORTED_GENERATION = {
    "assistant_model": ("assisted decoding", _ROLLBACK),
    "prompt_lookup_num_tokens": ("assisted decoding", _ROLLBACK),
    "assistant_early_exit": ("assisted decoding", _ROLLBACK),
    "use_mtp": ("assisted decoding", _ROLLBACK),
    "penalty_alpha": ("contrastive search", _ROLLBACK),
    "cache_implementation": ("other caches, paged and continuous batching among them", _ONE_CACHE),
    "prefill_chunk_size": ("chunked prefill", "a prompt is read `max_query_length` tokens at a time already"),
}


class Phase15GenerationMixin(GenerationMixin):
    """`generate` for a model that has `left_align` and `read_message` (see [`Phase15Model`])."""

    @property
    def spoken_chunk_length(self) -> int:
        """Tokens of a chunk in `generate`, unless it is given another length."""
        return getattr(self.generation_config, "chunk_length", None) or self.config.chunk_length

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        compile: bool | None = None,
        chunk_length: int | None = None,
        **kwargs,
    ):
        r"""
        Overrides [`~transformers.GenerationMixin.generate`], whose arguments it takes, to run at constant memory: the
        prompt is read into the soft prompt as the query, and every chunk of the answer steps the soft prompt.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts. Prompts of different lengths are padded on the left, with an `attention_mask`.
            cache (`Phase15Cache`, *optional*):
                Cache that an earlier call with `return_dict_in_generate=True` returned. `inputs` are then the whole
                conversation; the part that the cache has not seen is read as the next message. `past_key_values` is
                another name of it.
            compile (`bool`, *optional*):
                Greedy search and sampling on static buffers with compiled steps, on CUDA as CUDA graphs. The default
                is to do so on CUDA unless something forbids it. The first call compiles, which takes about a minute.
                True insists, also on a CPU (`torch.compile` needs a C++ compiler there). False refuses.
            chunk_length (`int`, *optional*):
                Tokens of a chunk of this answer. By default `generation_config.chunk_length`, if that is set, then the
                cache's, then the config's, which is the one of training. A longer chunk costs less: the LLM reads the
                N slots once a chunk, so it forwards (N + K) / K tokens for each one that it says.

        Raises:
            ValueError: for assisted decoding, contrastive search, paged or other caches, and chunked prefill; for rows
                that end in padding; for `compile=True` with something that forbids it; for a `chunk_length` that the
                model has no positions for. The message names it.
        """
        sources = [{**kwargs, "chunk_length": chunk_length}]
        sources += [vars(config) for config in (generation_config, self.generation_config) if config]

        def setting(name):
            return next((source[name] for source in sources if source.get(name) is not None), None)

        for name, (mode, reason) in UNSUPPORTED_GENERATION.items():
            if setting(name):
                raise ValueError(f"Phase15 does not support {mode} (`{name}`): {reason}.")
        if compile and (setting("num_beams") or 1) > 1:
            raise ValueError("`compile=True` cannot be honoured with beam search.")
        kwargs["compile"] = False if compile is None and setting("disable_compile") else compile
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        num_columns = 1 if input_ids is None else input_ids.shape[-1]  # without a prompt the library starts from BOS
        cache = pop_cache(kwargs)
        check_prompt(num_columns, kwargs.get("attention_mask"), cache)
        chunk_length = setting("chunk_length")
        self.config.check_chunk_length(chunk_length)
        if cache is None and setting("use_cache") is not False:
            cache = Phase15Cache(self.config)
        if cache is not None and input_ids is not None:
            widen(cache, len(input_ids), max(setting("num_beams") or 1, setting("num_return_sequences") or 1))
        if cache is None:
            # under another name: the library would take `chunk_length` for a setting of its own
            kwargs |= {"prompt_length": num_columns, "uncached_chunk_length": chunk_length}
        else:
            cache.chunk_length = chunk_length or cache.chunk_length
            kwargs[CACHE_NAME] = cache
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor,
        stopping_criteria,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        compile: bool | None = None,
        **model_kwargs,
    ):
        """Overrides greedy search and sampling to run the compiled steps of decoding_phase15.py where it can."""
        parts = (logits_processor, stopping_criteria, generation_config)
        cache = model_kwargs.get(CACHE_NAME)
        num_new = None if cache is None or not cache.seen_tokens else input_ids.shape[1] - cache.seen_tokens
        output = None
        if is_compiled(compile, self, *parts, synced_gpus, num_new, model_kwargs):
            model_inputs = self.prepare_inputs_for_generation(
                input_ids, next_sequence_length=num_new, is_first_iteration=True, **model_kwargs
            )
            message, mask, query_lengths = (
                model_inputs.get(name) for name in ("input_ids", "attention_mask", "query_lengths")
            )
            rows = self.model.align(message, mask, query_lengths, cache=cache)
            soft_prompt = self.model.read_message(rows, cache)
            output = sample_compiled(self, soft_prompt, cache, input_ids, *parts, streamer, insist=bool(compile))
        if output is None:
            output = super()._sample(input_ids, *parts, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        prompt_length: int | None = None,
        uncached_chunk_length: int | None = None,
        is_first_iteration: bool = False,
        compile: bool | None = None,
        **kwargs,
    ) -> dict:
        """Overrides the library to say which tokens are the query: the prompt, which a cache reads once."""
        cache = pop_cache(kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        input_ids = model_inputs["input_ids"]
        if cache is None:
            query_columns = slice(prompt_length)
            model_inputs["chunk_length"] = uncached_chunk_length
        elif not is_first_iteration or (cache.seen_tokens and input_ids.shape[1] == 1):
            return model_inputs  # one more token of the answer
        else:
            query_columns = slice(-input_ids.shape[1], None)
        if query_lengths is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
            query_lengths = mask[:, query_columns].sum(dim=1)
        return {**model_inputs, "query_lengths": query_lengths}

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config=None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        num_lanes: int = NUM_LANES,
        compile: bool | None = None,
        return_logprobs: bool = False,
        chunk_length: int | None = None,
        **kwargs,
    ) -> dict[str, GenerationOutput]:
        r"""
        Overrides the library's continuous batching to run in lanes ([`Phase15Lanes`]): prompts of different lengths,
        without padding, and no answer waits for the longest. Its greedy tokens are those of `generate`.

        Args:
            inputs (`list[list[int]]`): token ids of the prompts.
            generation_config (`GenerationConfig`, *optional*): as for `generate`; `kwargs` (`max_new_tokens`,
                `do_sample`, …) override it.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*): of it `return_logprobs` and
                `max_requests_per_batch` count; the rest sizes pages, and lanes have none.
            persistent_manager, warmup (`bool`): have no effect: nothing is kept, and lanes warm up themselves.
            record_timestamps (`bool`): record `time.perf_counter()` at each token.
            progress_bar (`bool`): show one.
            num_lanes (`int`, defaults to 16): the most answers under way at a time. Memory grows with it.
            compile (`bool`, *optional*), chunk_length (`int`, *optional*): as for `generate`.
            return_logprobs (`bool`): give each token's log-probability, in nats.

        Returns:
            `dict[str, GenerationOutput]`: by request, in the order of `inputs`: "req_0", "req_1", …; with
            `num_return_sequences` the others of a prompt follow it as "req_0__child#0", …. `generated_tokens` hold the
            end token. As with `generate`, what samples depends on torch's random state alone.

        Raises:
            ValueError: for a prompt without tokens or with ids outside the vocabulary, by its index; for settings that
                lanes cannot honour.
            FloatingPointError: for an LLM whose output is not finite.
        """
        return_logprobs |= bool(getattr(continuous_batching_config, "return_logprobs", False))
        if (most := getattr(continuous_batching_config, "max_requests_per_batch", None)) is not None:
            num_lanes = most
        return generate_in_lanes(
            self,
            inputs,
            generation_config,
            kwargs,
            num_lanes=num_lanes,
            compile=compile,
            chunk_length=chunk_length,
            record_timestamps=record_timestamps,
            progress_bar=progress_bar,
            return_logprobs=return_logprobs,
        )

    def open_lanes(
        self,
        num_lanes: int = NUM_LANES,
        compile: bool | None = None,
        max_kept_conversations: int = 0,
        chunk_length: int | None = None,
    ) -> Phase15LaneThread:
        """
        Lanes for requests that come and go, advanced by a thread: see [`Phase15LaneThread`] and [`Phase15Lanes`].

        ```python
        >>> thread = model.open_lanes()
        >>> thread.start()
        >>> request = thread.lanes.request(prompt_ids, max_new_tokens=64, on_token=lambda request: ...)
        >>> thread.submit([request])
        ```"""
        return Phase15LaneThread(Phase15Lanes(self, num_lanes, compile, max_kept_conversations, chunk_length))

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(f"Phase15 does not support paged continuous batching: {_ONE_CACHE}. Call `generate_batch`.")


def widen(cache: Phase15Cache, batch_size: int, repeats: int):
    """Repeats each row of a cache as the library repeats the prompts, unless an earlier call has."""
    if cache.batch_size not in (-1, batch_size, batch_size * repeats):
        raise ValueError(
            f"the cache has {cache.batch_size} rows, but `inputs` has {batch_size}, each repeated {repeats} times."
        )
    if repeats > 1 and cache.batch_size == batch_size:
        cache.batch_repeat_interleave(repeats)


def supported_settings(generation_config: GenerationConfig) -> GenerationConfig:
    """The generation settings of a base without those that a model of chunks cannot honour, which the log names."""
    dropped = [name for name in UNSUPPORTED_GENERATION if getattr(generation_config, name, None)]
    for name in dropped:
        setattr(generation_config, name, None)
    if dropped:
        logger.warning(
            f"Generation settings of the base that Phase15 cannot honour are dropped: {', '.join(dropped)}."
        )
    return generation_config


def check_prompt(num_columns: int, attention_mask: torch.Tensor | None, cache: Cache | None):
    """Raises a ValueError for prompts that add nothing to their cache, and for rows that end in padding."""
    check_cache(cache)
    if cache is not None and num_columns <= cache.seen_tokens:
        raise ValueError(
            f"`inputs` has {num_columns} columns, but the cache has already seen {cache.seen_tokens}; give the whole "
            "conversation, old tokens first."
        )
    if attention_mask is not None:
        bad = attention_mask.any(dim=1) & (attention_mask[:, -1] == 0)
        if bad.any():
            raise ValueError(
                f"Row {int(bad.nonzero()[0])} of `attention_mask` ends in padding, but the last column predicts the "
                "next token: pad `inputs` on the left, and in a conversation give every row a message or none."
            )


__all__ = ["Phase15GenerationMixin", "supported_settings"]
