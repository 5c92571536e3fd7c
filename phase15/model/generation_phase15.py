# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Generation with a recursive soft prompt: the transformers loop, with the state of the recursion as its cache.

- `Phase15GenerationMixin` makes that cache, refuses modes that cannot work with it, and leaves the rest to
  [`~transformers.GenerationMixin`]; on CUDA it runs the compiled steps of decoding_phase15.py where it can.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, logging

from .cache_phase15 import Phase15Cache, check_cache
from .compat_phase15 import CACHE_NAME, pop_cache
from .decoding_phase15 import (
    Phase15Decoders,
    check_compile,
    compiles_by_default,
    generate_compiled,
    unsupported_reason,
)
from .recursion_phase15 import SoftPrompt
from .state_phase15 import Phase15State


logger = logging.get_logger(__name__)


_ROLLBACK = "candidate tokens would have to be rolled back, and a step of the recursion cannot be undone"
_ONE_CACHE = "the state of the recursion is a Phase15Cache, whose rows begin and end their chunks together"
UNKNOWN = -1  # in place of the id of an embedding
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
    """`generate` for a head whose body has `align` and `read_message` (see [`Phase15Model`])."""

    @property
    def generation_chunk_length(self) -> int:
        """Tokens of a chunk in `generate`, unless the call names another length."""
        return self.config.resolve_chunk_length(self.generation_config)

    spoken_chunk_length = generation_chunk_length  # the name before 0.7, for one version

    @property
    def decoders(self) -> Phase15Decoders:
        """Static buffers, graphs and compiled steps of this model, made when they are first used."""
        return vars(self).setdefault("_decoders", Phase15Decoders())

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        compile: bool | None = None,
        chunk_length: int | None = None,
        state: Phase15State | None = None,
        **kwargs,
    ):
        r"""
        Overrides [`~transformers.GenerationMixin.generate`], whose arguments it takes, to run at constant memory: the
        prompt is read into the soft prompt as the query, and every chunk of the answer steps the soft prompt.

        With `return_dict_in_generate=True` the output also has `state`, the [`Phase15State`] after each answer and its
        last token, from which another call can start.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts. Prompts of different lengths are padded on the left, with an `attention_mask`.
            state (`Phase15State`, *optional*):
                What was read before, as [`Phase15ForCausalLM.read`] returns it. `inputs` are then only the tokens
                after it. A state of one row serves all rows. It is not changed.
            cache (`Phase15Cache`, *optional*):
                Cache that an earlier call with `return_dict_in_generate=True` returned. `inputs` are then the whole
                conversation; the part that the cache has not seen is read as the next message. `past_key_values` is
                another name of it.
            compile (`bool`, *optional*):
                Greedy search and sampling on static buffers with compiled steps, on CUDA as CUDA graphs. The default
                is to do so on CUDA unless something forbids it. The first call compiles, which takes about a minute.
                True insists, also on a CPU (`torch.compile` needs a C++ compiler there). False refuses. Compiled
                sampling gives each row a seed, drawn from torch's default generator in the order of the rows, as
                `generate_batch` does: after one `torch.manual_seed` both sample the same tokens. The transformers loop
                draws others from the same distribution.
            chunk_length (`int`, *optional*):
                Tokens of a chunk of this answer. Precedence: this argument, the `generation_config` of the call,
                `model.generation_config`, the cache or the state, `config.chunk_length`. A longer chunk costs less:
                the LLM reads the N slots once a chunk, so it forwards (N + K) / K tokens for each generated token.

        Raises:
            ValueError: for assisted decoding, contrastive search, paged or other caches, and chunked prefill; for rows
                that end in padding; for `compile=True` with something that forbids it; for a `chunk_length` that the
                model has no positions for; for a state of another model. The message names it.
        """
        settings = merge_settings(kwargs, generation_config, self.generation_config)
        check_modes(settings, compile)
        if compile is None and settings.get("disable_compile"):
            compile = False
        kwargs["compile"] = compile
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        inputs_embeds = kwargs.get("inputs_embeds")
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        num_columns = 1 if prompt is None else prompt.shape[1]  # without a prompt the library starts from BOS
        cache = pop_cache(kwargs)
        if has_tuned_prompt(self):
            check_tuned_prompt(cache, settings, compile)
        check_prompt(num_columns, kwargs.get("attention_mask"), cache)
        check_state(state, prompt, cache)
        check_embeddings(inputs_embeds, input_ids, cache, settings, compile)
        repeats = max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
        state = self.model.match_state(state, prompt)
        if state is not None:
            state = state.select_rows([row for row in range(state.batch_size) for _ in range(repeats)])
        if cache is None and settings.get("use_cache", True):
            cache = Phase15Cache(self.config, state=state)
        if cache is not None and prompt is not None:
            widen(cache, len(prompt), repeats)
        chunk_length = self.config.resolve_chunk_length(
            chunk_length, generation_config, self.generation_config, cache=state if cache is None else cache
        )
        if cache is None:
            # under another name: the library would take `chunk_length` for a setting of its own
            kwargs["uncached_chunk_length"] = chunk_length
            kwargs["prompt_length"] = num_columns
            kwargs["state_before"] = state  # the library takes a `state` for a cache, that of RWKV
        else:
            cache.chunk_length = chunk_length
            kwargs[CACHE_NAME] = cache
            message_prompt = cache.message_prompt
        output = super().generate(inputs, generation_config, *args, **kwargs)
        if isinstance(output, ModelOutput) and cache is not None and prompt is not None:
            if cache.message_prompt is message_prompt:  # an answer that goes on: it began before this call
                num_columns = cache.message_end
            sequences = output.sequences
            if inputs_embeds is not None:  # the sequences hold no ids of the prompt
                sequences = F.pad(sequences, (num_columns, 0), value=UNKNOWN)
            mask = kwargs.get("attention_mask")
            output["state"] = self._state_after(sequences, mask, num_columns, cache, settings)
        return output

    def _state_after(
        self,
        sequences: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        prompt_length: int,
        cache: Phase15Cache,
        settings: dict[str, Any],
    ) -> Phase15State:
        """
        Returns the state after the answers. The rows of the cache are those of the search: beams are not in the order
        of the sequences, and rows that finished early have read padding. So the answers are read again.

        Args:
            sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, sequence_length)`): what
                `generate` returns; `UNKNOWN` for an embedding of the prompt.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_columns)`, *optional*): of the prompts.
            prompt_length (`int`): columns up to the end of the last message.
            cache (`Phase15Cache`): has the soft prompt after that.
            settings (`dict`): of the call.
        """
        num_rows = len(sequences)
        num_cached = len(cache.message_prompt.length)
        # Row r of the cache belongs to prompt r // repeats; each prompt has equally many sequences.
        row = torch.arange(num_rows, device=sequences.device) * num_cached // num_rows
        soft_prompt = SoftPrompt(*(tensor[row] for tensor in cache.message_prompt))
        answer = sequences[:, prompt_length:]
        length = answer_lengths(answer, settings)
        lengths = length.tolist()
        for chunk in answer.split(cache.chunk_length, dim=1):
            chunk_length = length.clamp(max=chunk.shape[1])
            soft_prompt = self.model.step(soft_prompt, self.get_input_embeddings()(chunk), chunk_length)
            length = length - chunk_length
        prompt_mask = torch.ones_like(sequences[:, :prompt_length], dtype=torch.bool)
        if attention_mask is not None:
            prompt_mask = attention_mask[:, :prompt_length].bool()
            prompt_mask = prompt_mask.repeat_interleave(num_rows // len(attention_mask), dim=0)
        texts = []
        num_virtual = cache.message_end - prompt_length  # tokens that PEFT has put before the prompt
        for ids, mask, answer_length in zip(sequences, prompt_mask, lengths, strict=True):
            prompt = [None if token == UNKNOWN else token for token in ids[:prompt_length][mask].tolist()]
            answer_ids = ids[prompt_length : prompt_length + answer_length].tolist()
            texts.append([None] * num_virtual + prompt + answer_ids)
        before = cache.state
        if before is not None:
            before = before.select_rows(row.tolist())
        return self.model.make_state(soft_prompt, texts, before, cache.chunk_length)

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
        if compile or (compile is None and compiles_by_default(self)):
            reason = unsupported_reason(self, *parts, synced_gpus, num_new, model_kwargs)
            check_compile(compile, reason)
            model_inputs = {}
            if reason is None:
                model_inputs = self.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=num_new, is_first_iteration=True, **model_kwargs
                )
            if model_inputs.get("inputs_embeds") is not None:  # given, or put before the prompt by PEFT
                check_compile(compile, "`inputs_embeds`")
            elif reason is None:
                mask = model_inputs.get("attention_mask")
                query_lengths = model_inputs.get("query_lengths")
                rows = self.model.align(model_inputs["input_ids"], mask, query_lengths, cache=cache)
                soft_prompt = self.model.read_message(rows, cache)
                output = generate_compiled(
                    self, soft_prompt, cache, input_ids, *parts, streamer, insists=compile is True
                )
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
        state_before: Phase15State | None = None,
        is_first_iteration: bool = False,
        compile: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Overrides the library to pass which tokens are the query: the prompt, which a cache reads once."""
        cache = pop_cache(kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        input_ids = model_inputs["input_ids"]
        # By the name that every version of PEFT reads, to know whether its tuned prompt is in the cache already.
        model_inputs["past_key_values"] = model_inputs.pop(CACHE_NAME, None)
        if cache is None:
            query_columns = slice(prompt_length)
            model_inputs["chunk_length"] = uncached_chunk_length
            model_inputs["state"] = state_before
        elif not is_first_iteration or (cache.seen_tokens and input_ids.shape[1] == 1):
            return model_inputs  # one more token of the answer
        elif not cache.seen_tokens and query_lengths is None:
            return model_inputs  # a new cache reads the row as the query, with what PEFT puts in front of it
        else:
            query_columns = slice(-input_ids.shape[1], None)
        if query_lengths is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
            query_lengths = mask[:, query_columns].sum(dim=1)
        return {**model_inputs, "query_lengths": query_lengths}


def answer_lengths(answer: torch.LongTensor, settings: dict[str, Any]) -> torch.LongTensor:
    """
    Returns the number of tokens of each answer, of shape `(batch_size,)`: up to its end token, or else without the
    padding that follows when another answer is longer.

    Args:
        answer (`torch.LongTensor` of shape `(batch_size, num_tokens)`): tokens and padding.
        settings (`dict`): of the call, for the end and padding tokens, and for what else can end a row.
    """
    end_tokens = as_list(settings.get("eos_token_id"))
    ends = torch.zeros_like(answer, dtype=torch.bool)
    for token in end_tokens:
        ends |= answer == token
    is_token = ends.cumsum(dim=1) - ends.long() == 0  # up to the first end token, which counts
    if end_tokens and (settings.get("stop_strings") or settings.get("stopping_criteria")):
        # Such a row has no end token before its padding. Without end tokens the library does not pad.
        padding = (as_list(settings.get("pad_token_id")) + end_tokens)[0]
        is_padding = (answer == padding) & ~ends
        is_token &= ~is_padding.flip(1).long().cumprod(dim=1).flip(1).bool()
    return is_token.sum(dim=1)


def as_list(token_ids: int | list[int] | torch.Tensor | None) -> list[int]:
    if token_ids is None:
        return []
    return torch.as_tensor(token_ids).flatten().tolist()


def check_embeddings(
    inputs_embeds: torch.Tensor | None,
    input_ids: torch.LongTensor | None,
    cache: Cache | None,
    settings: dict[str, Any],
    compile: bool | None,
):
    """Raises a ValueError for embeddings of a prompt with something that cannot work with them."""
    if inputs_embeds is None:
        return
    check_compile(compile, "`inputs_embeds`")
    for reason, is_given in {
        "`input_ids`: they are two forms of one argument": input_ids is not None,
        "a `cache`: give `input_ids`, the whole conversation": cache is not None,
        "`use_cache=False`: the next tokens come as ids": settings.get("use_cache") is False,
    }.items():
        if is_given:
            raise ValueError(f"`inputs_embeds` cannot be given with {reason}.")


def has_tuned_prompt(model) -> bool:
    """Returns `True` while PEFT generates with prompt tuning: it replaces this method of the model that it wraps."""
    method = vars(model).get("prepare_inputs_for_generation")
    return method is not None and getattr(method, "__self__", None) is not model


def check_tuned_prompt(cache: Cache | None, settings: dict[str, Any], compile: bool | None):
    """Raises a ValueError for what cannot work with virtual tokens before the prompt."""
    check_compile(compile, "a tuned prompt of PEFT")
    if settings.get("use_cache") is False:
        raise ValueError("`use_cache=False` does not work with a tuned prompt of PEFT: leave it out.")
    if cache is not None:
        raise ValueError(
            "`cache` does not work with a tuned prompt of PEFT, whose virtual tokens are not in `inputs`: go on from "
            "the output's `state`."
        )


def check_state(state: Phase15State | None, input_ids: torch.LongTensor | None, cache: Cache | None):
    """Raises a ValueError for a state without tokens after it, and for a state together with a cache."""
    if state is None:
        return
    if cache is not None:
        raise ValueError("`state` starts a new answer and `cache` continues one: give one of them.")
    if input_ids is None:
        raise ValueError("`state` needs `inputs`: the tokens after what it has read, such as a question.")


def merge_settings(kwargs: dict, *configs: GenerationConfig | None) -> dict[str, Any]:
    """Returns the settings of a call that are not `None`: keyword arguments first, then each config in turn."""
    settings = {}
    sources = [kwargs, *(vars(config) for config in configs if config is not None)]
    for source in reversed(sources):
        settings |= {name: value for name, value in source.items() if value is not None}
    return settings


def check_modes(settings: dict[str, Any], compile: bool | None):
    """Raises a ValueError for modes of generation that cannot work with the recursion or with `compile`."""
    for name, (mode, reason) in UNSUPPORTED_GENERATION.items():
        if settings.get(name):
            raise ValueError(f"Phase15 does not support {mode} (`{name}`): {reason}.")
    if settings.get("num_beams", 1) > 1:
        check_compile(compile, "beam search")


def widen(cache: Phase15Cache, batch_size: int, repeats: int):
    """Repeats each row of a cache as the library repeats the prompts, unless an earlier call has."""
    if cache.batch_size not in (-1, batch_size, batch_size * repeats):
        raise ValueError(
            f"the cache has {cache.batch_size} rows, but `inputs` has {batch_size}, each repeated {repeats} times."
        )
    if repeats > 1 and cache.batch_size == batch_size:
        cache.batch_repeat_interleave(repeats)


def supported_settings(generation_config: GenerationConfig) -> GenerationConfig:
    """Removes the settings of a base that a model of chunks cannot honour, logs their names, and returns the rest."""
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
