# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Phase15: a language model with a recursive soft prompt.

    sp_0     = step(empty, query)
    sp_{c+1} = step(sp_c, chunk_c)                     step(sp, tokens) = carry(sp, E[tokens]) + Δ(sp, E[tokens])
    p(chunk_c) = LLM([sp_c ; chunk_c])

- the LLM (any Llama-like causal LM) sees only the N slots of the soft prompt and the current chunk, so memory and
  time per token do not grow with the length;
- `carry` has no parameters: S sink slots keep the first tokens of the stream, the other slots hold the newest;
- Δ, the HyperNetwork's gated overwrite of the slots, is exactly zero when training starts: a new model *is* its base
  model behind a sliding window with attention sinks;
- training runs the recursion first, then the LLM once over all chunks of all rows;
- generation (generation_phase15.py) is transformers' own loop: the state of the recursion is a `Cache`.

recursion_phase15.py has the two parts of a step, batch_phase15.py a batch without its padding. This file is the
language model around them: body and head.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GgufConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .base_phase15 import check_base, check_sizes, reading_gguf, split_gguf
from .batch_phase15 import Rows, check_arguments, check_batch, left_align, query_lengths_of, shift_labels
from .cache_phase15 import Phase15Cache, check_cache
from .compat_phase15 import CACHE_NAME, both_cache_names, one_cache
from .configuration_phase15 import Phase15Config
from .continuous_batching_phase15 import Phase15ContinuousBatchingMixin
from .generation_phase15 import Phase15GenerationMixin, supported_settings
from .recursion_phase15 import FirstLayers, HyperNetwork, SoftPrompt, carry


@both_cache_names
@dataclass
class Phase15ModelOutputWithPast(BaseModelOutputWithPast):
    """
    A [`~transformers.modeling_outputs.BaseModelOutputWithPast`] with the recursion's state.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The hidden state that predicts the token after each column; zero inside the query and at padding.
        cache (`Phase15Cache`, *optional*): the one given, or made by `use_cache=True`; also as `past_key_values`.
        hidden_states, attentions (`tuple(torch.Tensor)`, *optional*):
            Of the LLM's last call, whose rows are chunks and whose positions are slots and chunk tokens.
        soft_prompt (`torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`):
            The soft prompt behind each row's last prediction.
        prediction (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The index of each column's prediction in its row; negative where a column predicts nothing.
    """

    soft_prompt: torch.Tensor | None = None
    prediction: torch.LongTensor | None = None


@both_cache_names
@dataclass
class Phase15CausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    A [`~transformers.modeling_outputs.CausalLMOutputWithPast`] with the recursion's state.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Cross-entropy in nats, summed over target tokens and divided by their number or by `num_items_in_batch`.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Scores of the token after each column. Inside the query and at padding, the head's output for zeros.
        cache, hidden_states, attentions, soft_prompt: as in [`Phase15ModelOutputWithPast`].
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            The head's input, in the columns of `logits`; not returned with `labels` and `skip_logits`.
        chunk_losses, chunk_tokens (`torch.Tensor` of shape `(num_chunks,)`, *optional*, returned with `labels`):
            By index of the chunk: summed cross-entropy in nats, without gradient, and number of target tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    soft_prompt: torch.Tensor | None = None
    chunk_losses: torch.Tensor | None = None
    chunk_tokens: torch.LongTensor | None = None


class Phase15PreTrainedModel(PreTrainedModel):
    config: Phase15Config
    config_class = Phase15Config
    base_model_prefix = "phase15"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyperNetwork"]  # it adds the outputs of its parts
    _keep_in_fp32_modules = ["hypernet"]  # in float16; and quantizers convert the LLM alone
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a step of the recursion cannot be undone, so candidate tokens cannot be rolled back

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """Overrides the library to initialise only what `from_pretrained` has not filled."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    def save_pretrained(self, *args, **kwargs):
        """
        Overrides the library, which at loading drops settings that are not its own (`chunk_length`) from a generation
        config that is marked as made of a model's config.
        """
        if not self.can_generate():
            return super().save_pretrained(*args, **kwargs)
        chosen = self.generation_config
        settings = {name: value for name, value in chosen.to_dict().items() if not name.startswith("_")}
        settings.pop("transformers_version", None)
        try:
            self.generation_config = GenerationConfig(**settings)
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.generation_config = chosen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HyperNetwork):
            # as large as the projections of embeddings at unit scale
            position_std = self.config.initializer_range * self.config.text_config.hidden_size**0.5
            init.normal_(module.position_embeddings.weight, mean=0.0, std=position_std)
            init.zeros_(module.alpha)
            # what it is for a base is measured by `from_base`; not every config has the field
            init.constant_(module.embedding_scale, getattr(self.config.text_config, "initializer_range", 0.02))


class Phase15Model(Phase15PreTrainedModel):
    """
    The body: the recursion and the LLM, up to the hidden states that predict.

    Args:
        config (`Phase15Config`): its `text_config` says which LLM is built.
        llm (`PreTrainedModel`, *optional*): the LLM to wrap; built from `config.text_config` when not given.
    """

    def __init__(self, config: Phase15Config, llm: PreTrainedModel | None = None):
        config.check()  # `from_pretrained` sets fields that it is given after the config was made
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        self.hypernet = HyperNetwork(config)
        self._first_layers = FirstLayers(self.llm.base_model, config) if config.hypernet_reads_layers else None
        self.register_load_state_dict_pre_hook(check_sizes)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.llm.set_input_embeddings(value)

    def empty_soft_prompt(self, batch_size: int, like: torch.Tensor | None = None) -> SoftPrompt:
        """The state before the first token: no slot is used. `like` is embeddings, if the weight may be elsewhere."""
        like = self.get_input_embeddings().weight if like is None else like
        return SoftPrompt(
            like.new_zeros(batch_size, self.config.num_soft_tokens, like.shape[-1]),
            torch.zeros(batch_size, dtype=torch.long, device=like.device),
        )

    def first_layers(self, tokens: torch.Tensor, segment_length: int) -> list[torch.Tensor | None]:
        """What the HyperNetwork reads of each segment besides its embeddings: see [`FirstLayers`], or None."""
        if self._first_layers is None:
            return [None] * -(-tokens.shape[1] // segment_length)
        return self._first_layers(tokens, segment_length)

    def step(
        self,
        soft_prompt: SoftPrompt,
        tokens: torch.Tensor,
        token_length: torch.LongTensor,
        hidden_states: torch.Tensor | None = None,
    ) -> SoftPrompt:
        """
        `step(sp, tokens) = carry(sp, tokens) + Δ(sp, tokens)`; a row without a token keeps its soft prompt.

        Args:
            soft_prompt (`SoftPrompt`): the state before.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings, left-aligned.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): how many of them are real in each row.
            hidden_states (`torch.Tensor` of the shape of `tokens`, *optional*): their `first_layers`, if known.
        """
        if hidden_states is None and tokens.shape[1]:
            (hidden_states,) = self.first_layers(tokens, tokens.shape[1])
        carried = carry(soft_prompt, tokens, token_length, self.config.num_sink_tokens)
        delta = self.hypernet(carried, soft_prompt, tokens, token_length, hidden_states)
        delta, reads = delta.to(tokens.device), (token_length > 0)[:, None, None]
        return carried._replace(embeds=torch.where(reads, carried.embeds + delta, soft_prompt.embeds))

    def read(
        self,
        soft_prompt: SoftPrompt,
        tokens: torch.Tensor,
        length: torch.LongTensor,
        hidden_states: list | None = None,
    ) -> SoftPrompt:
        """
        Steps over a message of any length, given by ids or by embeddings, `max_query_length` tokens at a time;
        `hidden_states`: their `first_layers`, if known.
        """
        segments = tokens.split(self.config.max_query_length, dim=1)
        for segment, read in zip(segments, hidden_states or [None] * len(segments), strict=True):
            segment_length = length.clamp(max=segment.shape[1])
            embeds = segment if segment.is_floating_point() else self.get_input_embeddings()(segment)
            soft_prompt = self.step(soft_prompt, embeds, segment_length, read)
            length = length - segment_length
        return soft_prompt

    def predict(
        self,
        soft_prompt: SoftPrompt,
        chunk: torch.Tensor,
        llm_cache: DynamicCache | None = None,
        num_cached: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPast]:
        """
        Calls the LLM on `[soft_prompt ; chunk]`.

        Args:
            soft_prompt (`SoftPrompt`): of `batch_size` chunks.
            chunk (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings of chunk tokens.
            llm_cache (`DynamicCache`, *optional*): keys and values of the soft prompt and of the chunk's `num_cached`
                tokens before these; filled with the soft prompt's first when empty.

        Returns:
            the hidden states that predict the tokens after the soft prompt (unless it was in the cache) and after each
            chunk token, of shape `(batch_size, (1 +) num_tokens, hidden_size)`, and the LLM's output.
        """
        shortest, used = torch.stack(torch.aminmax(soft_prompt.length)).tolist()
        batch_size, num_tokens, hidden_size = chunk.shape
        past = 0 if llm_cache is None else llm_cache.get_seq_length()
        if past:
            used = past - num_cached  # the longest row may have left since
        last_slot = soft_prompt.length[:, None] - 1
        position = last_slot + 1 + torch.arange(num_cached, num_cached + num_tokens, device=chunk.device)
        inputs_embeds, predicting = chunk, torch.arange(num_tokens, device=chunk.device).expand(batch_size, -1)
        if past == 0:
            inputs_embeds = torch.cat([soft_prompt.embeds[:, :used], chunk], dim=1)
            position = torch.cat([torch.arange(used, device=chunk.device).expand(batch_size, -1), position], dim=1)
            predicting = torch.cat([last_slot, used + predicting], dim=1)
        visible = None  # a mask is needed where shorter rows have unused slots
        if shortest < used:
            visible = F.pad(soft_prompt.mask[:, :used], (0, num_cached + num_tokens), value=True)
        outputs = self.llm.base_model(
            inputs_embeds=inputs_embeds,
            position_ids=position,
            attention_mask=visible,
            use_cache=llm_cache is not None,
            **{CACHE_NAME: llm_cache},
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state.to(chunk.device)
        return hidden_states.gather(1, predicting[..., None].expand(-1, -1, hidden_size)), outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
        use_cache: bool | None = None,
        predict_mask: torch.BoolTensor | None = None,
        bptt_chunks: int | None = None,
        past_key_values: Phase15Cache | None = None,
        chunk_length: int | None = None,
        **kwargs,
    ) -> Phase15ModelOutputWithPast:
        r"""
        Reads each row's query into the soft prompt, and gives the hidden states that predict the tokens after it.

        Args:
            input_ids, attention_mask, cache, use_cache, bptt_chunks, past_key_values, chunk_length, kwargs:
                See [`Phase15ForCausalLM.forward`].
            query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                How many tokens of each row are its query, padding not counted. The default is the first token, or none
                if the cache has seen tokens.
            predict_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Columns whose predictions are asked for; all by default. Without a cache, chunks with none are skipped.
        """
        check_arguments(kwargs)
        cache, chunk_length = self.cache_of(one_cache(cache, past_key_values), use_cache, chunk_length)
        rows = self.left_align(input_ids, attention_mask, query_lengths, cache)
        if cache is None:
            hidden_states, soft_prompt, outputs = self.unroll(rows, chunk_length, predict_mask, bptt_chunks, **kwargs)
        else:
            hidden_states, soft_prompt, outputs = self.resume(rows, cache, **kwargs)
        return Phase15ModelOutputWithPast(
            last_hidden_state=rows.to_columns(hidden_states),
            cache=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            soft_prompt=soft_prompt,
            prediction=rows.prediction,
        )

    def cache_of(
        self, cache: Phase15Cache | None, use_cache: bool | None, chunk_length: int | None
    ) -> tuple[Phase15Cache | None, int]:
        """The cache of a call, and the tokens of its chunks: as asked for, or the cache's, or the config's."""
        check_cache(cache)
        self.config.check_chunk_length(chunk_length)
        if cache is None and use_cache:
            cache = Phase15Cache(self.config, chunk_length)
        own = (self.config if cache is None else cache).chunk_length
        if cache is not None and chunk_length not in (None, own):
            raise ValueError(f"`chunk_length` is {chunk_length}, but the cache's is {own}.")
        return cache, chunk_length or own

    def left_align(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
    ) -> Rows:
        """Checks a batch and left-aligns its rows; `cache` is the one that it continues."""
        check_batch(input_ids, attention_mask, cache)
        vocab_size, seen_tokens = self.config.text_config.vocab_size, 0 if cache is None else cache.seen_tokens
        return left_align(input_ids, attention_mask, query_lengths, vocab_size, seen_tokens)

    def unroll(
        self,
        rows: Rows,
        chunk_length: int,
        predict_mask: torch.BoolTensor | None = None,
        bptt_chunks: int | None = None,
        **kwargs,
    ):
        """
        The training form: all steps of the recursion, then one call of the LLM over the chunks that are asked for.

        Returns:
            the hidden states of the predictions `(batch_size, num_chunks * chunk_length, hidden_size)`, the last soft
            prompt of each row `(batch_size, num_soft_tokens, hidden_size)`, and the LLM's output.
        """
        needed = rows.needed_chunks(chunk_length, predict_mask)  # (B, C)
        num_rows, num_chunks = needed.shape
        answer = rows.query_length[:, None] + torch.arange(num_chunks * chunk_length, device=needed.device)
        answer = rows.input_ids.gather(1, answer.clamp(max=rows.input_ids.shape[1] - 1))
        chunks = self.get_input_embeddings()(answer).unflatten(1, (num_chunks, chunk_length))  # (B, C, K, d)
        num_full = (rows.length - rows.query_length) // chunk_length

        # one call for all segments: FSDP gathers the weights at each, and all processes must do so equally often
        query = self.get_input_embeddings()(rows.input_ids[:, : int(rows.query_length.max())])
        of_query = self.first_layers(query, self.config.max_query_length)
        of_chunks = self.first_layers(
            chunks[:, : max(num_chunks - 1, 1)].flatten(1, 2), chunk_length
        )  # the last is not read
        soft_prompts = [self.read(self.empty_soft_prompt(num_rows, query), query, rows.query_length, of_query)]
        for index in range(num_chunks - 1):
            soft_prompt = soft_prompts[-1]
            if bptt_chunks and (index + 1) % bptt_chunks == 0:
                soft_prompt = soft_prompt._replace(embeds=soft_prompt.embeds.detach())
            token_length = (index < num_full) * chunk_length  # only a full chunk is read
            soft_prompts.append(self.step(soft_prompt, chunks[:, index], token_length, of_chunks[index]))
        embeds, length = (torch.stack(states, dim=1) for states in zip(*soft_prompts, strict=True))  # (B, C, …)
        if self._first_layers is not None:  # and equally often backward, also where no chunk was read
            embeds = embeds + 0 * (of_query[0][:, None, :1] + of_chunks[0][:, None, :1])

        predicted, outputs = self.predict(SoftPrompt(embeds[needed], length[needed]), chunks[needed][:, :-1], **kwargs)
        hidden_states = predicted.new_zeros(num_rows, num_chunks, *predicted.shape[1:])  # (B, C, K, d)
        hidden_states[needed] = predicted
        last = (needed * torch.arange(num_chunks, device=needed.device)).amax(dim=1)
        return hidden_states.flatten(1, 2), embeds[torch.arange(num_rows), last], outputs

    def resume(self, rows: Rows, cache: Phase15Cache, **kwargs):
        """
        The cached form: reads a message if there is one, then feeds answer tokens to the open chunk.

        Returns:
            as [`Phase15Model.unroll`], with the LLM's last output.
        """
        answer_length, has_query = rows.length - rows.query_length, rows.query_length > 0
        if (answer_length != answer_length[0]).any() or (has_query != has_query[0]).any():
            raise ValueError(
                "In a cache the chunks of all rows begin and end together, but the rows have queries of "
                f"{rows.query_length.tolist()} tokens and {answer_length.tolist()} tokens after them; give "
                "`query_lengths` that leave equally many, or call forward without a cache."
            )
        calls = []
        if has_query[0]:
            calls.append(self.prefill(cache, self.read_message(rows, cache), **kwargs))
            if not torch.isfinite(calls[0][0]).all():  # one device sync per message
                reason = (
                    f"The weights are damaged, or too large for {self.dtype}: load the model with another `dtype`."
                )
                raise FloatingPointError(f"The LLM's output behind the query is not finite. {reason}")
        answer = rows.query_length[:, None] + torch.arange(int(answer_length[0]), device=answer_length.device)
        answer = self.get_input_embeddings()(rows.input_ids.gather(1, answer))  # (B, A, d)
        while answer.shape[1]:
            room = max(cache.chunk_length - cache.chunk.shape[1], 1)  # it may have become shorter than the open chunk
            tokens, answer = answer[:, :room], answer[:, room:]
            is_full = tokens.shape[1] == room
            if num_fed := tokens.shape[1] - is_full:  # the last token of a chunk predicts nothing inside it
                calls.append(self.decode(cache, tokens[:, :num_fed], **kwargs))
            cache.chunk = torch.cat([cache.chunk, tokens], dim=1)
            if is_full:
                length = torch.full_like(rows.length, cache.chunk.shape[1])
                soft_prompt = self.step(cache.soft_prompt, cache.chunk, length)
                calls.append(self.prefill(cache, soft_prompt, **kwargs))
        cache.seen_tokens += rows.input_ids.shape[1]
        hidden_states = torch.cat([hidden_states for hidden_states, _ in calls], dim=1)
        return hidden_states, cache.soft_prompt.embeds, calls[-1][1]

    def read_message(self, rows: Rows, cache: Phase15Cache) -> SoftPrompt:
        """Closes the open chunk, and steps the cache's soft prompt over each row's query."""
        soft_prompt = cache.soft_prompt
        if soft_prompt is None:
            like = self.get_input_embeddings()(rows.input_ids[:, :1])
            soft_prompt = self.empty_soft_prompt(len(rows.length), like)
        if cache.chunk is not None and cache.chunk.shape[1]:
            soft_prompt = self.step(soft_prompt, cache.chunk, torch.full_like(rows.length, cache.chunk.shape[1]))
        query = rows.input_ids[:, : int(rows.query_length.max())]
        return self.read(soft_prompt, query, rows.query_length)

    def prefill(self, cache: Phase15Cache, soft_prompt: SoftPrompt, **kwargs):
        """Puts a new soft prompt into the cache and calls the LLM on it; returns as `predict`."""
        cache.start_chunk(soft_prompt)
        return self.decode(cache, cache.chunk, **kwargs)

    def decode(self, cache: Phase15Cache, tokens: torch.Tensor, **kwargs):
        """Calls the LLM on more tokens of the open chunk; returns as `predict`."""
        return self.predict(cache.soft_prompt, tokens, cache.llm_cache, cache.chunk.shape[1], **kwargs)


class Phase15ForCausalLM(Phase15Model, Phase15ContinuousBatchingMixin, Phase15GenerationMixin):
    """
    A causal language model whose LLM sees a recursive soft prompt and the current chunk of 16 tokens: the body, and on
    it the LLM's own head.

    ```python
    >>> model = Phase15ForCausalLM.from_base("TinyLlama/TinyLlama-1.1B-Chat-v1.0")  # equals its base, until trained
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/repo", trust_remote_code=True)
    ```"""

    @classmethod
    def from_base(cls, base: str | os.PathLike, *, output_loading_info: bool = False, **kwargs):
        """
        Wraps a causal LM with a new HyperNetwork. Until it is trained, the model gives its base's output. Raises a
        ValueError for an LLM that cannot be given a soft prompt.

        Args:
            base (`str` or `os.PathLike`): Hub id, local folder, or `.gguf` file of a Llama-like LLM.
            output_loading_info (`bool`): return the base's loading info too, as `from_pretrained` does.
            kwargs: fields of [`Phase15Config`]; all others go to `AutoModelForCausalLM.from_pretrained` (`dtype`,
                `device_map`, `revision`, …). Weights that are pickles need `use_safetensors=False`.
        """
        config_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name in Phase15Config.__annotations__}
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
            llm.config.name_or_path = ""  # a path says nothing where the model is loaded later
        attention = llm.config._attn_implementation
        model = cls(Phase15Config(text_config=llm.config, attn_implementation=attention, **config_kwargs), llm=llm)
        embeddings = llm.get_input_embeddings().weight
        dtype = torch.float32 if embeddings.dtype == torch.float16 else embeddings.dtype  # as when it is loaded again
        model.hypernet.to(device=embeddings.device, dtype=dtype)
        model.hypernet.embedding_scale.fill_(embeddings.detach().float().square().mean().sqrt())
        model.generation_config = supported_settings(llm.generation_config)
        if getattr(llm, "is_quantized", False):
            model.hf_quantizer = llm.hf_quantizer  # it saves the LLM's quantised weights
        model.eval()
        return (model, loading_info) if output_loading_info else model

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.llm.set_output_embeddings(new_embeddings)

    @property
    def base_model(self) -> Phase15Model:
        """The body: this model's modules without the head, and without a `forward` that a tool has put here."""
        body = object.__new__(Phase15Model)
        body.__dict__ = {name: value for name, value in vars(self).items() if name != "forward"}
        return body

    def __call__(self, *args, **kwargs):
        # TRL replaces `forward` by a function that calls `base_model` without the labels; they say which is the query
        if "forward" in vars(self) and kwargs.get("labels") is not None and kwargs.get("query_lengths") is None:
            kwargs["query_lengths"] = query_lengths_of(kwargs["labels"], kwargs.get("attention_mask"))
        return super().__call__(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        bptt_chunks: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Phase15Cache | None = None,
        chunk_length: int | None = None,
        **kwargs,
    ) -> Phase15CausalLMOutputWithPast:
        r"""
        Reads each row's query into the soft prompt and predicts the tokens after it, chunk by chunk.

        Without a cache this is the training form: the recursion runs first, which depends on the given tokens alone,
        then the LLM once over all chunks of all rows. With one it continues from the cache's state, and any split of
        the same tokens into calls gives the same logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Query and answer. Padding may be on any side; the rows are left-aligned.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding. With a cache it may also cover the tokens before.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Target ids aligned with `input_ids`, -100 for none. A row's query ends before its first label.
            query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                How many tokens of each row are its query, padding not counted; overrides `labels`. Without both, the
                query is the first token (none, if the cache has seen tokens): a causal LM over any text.
            cache (`Phase15Cache`, *optional*):
                State to continue from, updated in place. Its rows must have equally many answer tokens.
            use_cache (`bool`, *optional*): make a `Phase15Cache` when none is given; unlike elsewhere not the default.
            logits_to_keep (`int` or `torch.Tensor` of shape `(num_columns,)`, defaults to 0):
                Compute logits for so many last columns, or for these columns; 0 is all.
            skip_logits (`bool`, defaults to `False`):
                Save the memory of the logits: with `labels` compute the loss alone, without them `last_hidden_state`.
            bptt_chunks (`int`, *optional*): stop the gradient through the recursion after every so many chunks.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Divisor of the loss: the target tokens of the accumulated batch. Defaults to this batch's.
            past_key_values (`Phase15Cache`, *optional*): the same as `cache`; its name before transformers 5.24.
            chunk_length (`int`, *optional*): tokens of a chunk; by default the cache's, or the config's.
            kwargs: go to the LLM (`output_hidden_states`, `output_attentions`).

        Raises:
            ValueError: for shapes that do not match, ids outside the vocabulary, rows without a token, a query longer
                than its row, rows that a cache cannot hold side by side, a cache of another class, or a `chunk_length`
                that is not the cache's or that the model has no positions for.
            FloatingPointError: for a query, read into a cache, behind which the LLM's output is not finite.
        """
        cache, chunk_length = self.cache_of(one_cache(cache, past_key_values), use_cache, chunk_length)
        check_batch(input_ids, attention_mask, cache, labels)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        keeps_states, losses = labels is None or not skip_logits, {}
        predict_mask = torch.zeros_like(input_ids, dtype=torch.bool)  # (B, T)
        predict_mask[:, kept] = keeps_states
        if labels is not None:
            targets = shift_labels(labels, attention_mask, self.config.text_config.vocab_size)
            predict_mask |= targets != -100
            query_lengths = query_lengths_of(labels, attention_mask) if query_lengths is None else query_lengths
        kwargs |= {"predict_mask": predict_mask, "bptt_chunks": bptt_chunks, "chunk_length": chunk_length}
        kwargs["return_dict"] = True
        outputs = super().forward(input_ids, attention_mask, query_lengths, cache, **kwargs)
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            chunk = outputs.prediction // chunk_length
            losses = self.loss(hidden_states, targets, chunk, num_items_in_batch)
        hidden_states = hidden_states[:, kept] if keeps_states else None
        return Phase15CausalLMOutputWithPast(
            logits=None if skip_logits else self.get_output_embeddings()(hidden_states),
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=hidden_states,
            soft_prompt=outputs.soft_prompt,
            **losses,
        )

    def loss(
        self,
        hidden_states: torch.Tensor,
        targets: torch.LongTensor,
        chunk: torch.LongTensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """
        `loss`, `chunk_losses` and `chunk_tokens` of the output: cross-entropy of the targets that are predicted, given
        the index of each column's chunk `(batch_size, sequence_length)`, negative inside the query.
        """
        is_target = (targets != -100) & (chunk >= 0)  # (B, T)
        if not is_target.any():
            raise ValueError("`labels` hold no target after any row's query, so there is nothing to predict.")
        logits = self.get_output_embeddings()(hidden_states[is_target])  # (P, V): no logits where there is no target
        losses = F.cross_entropy(logits.float(), targets[is_target], reduction="none")
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        chunk = chunk[is_target]
        chunk_tokens = torch.bincount(chunk)
        chunk_losses = losses.new_zeros(len(chunk_tokens)).index_add_(0, chunk, losses.detach())
        return {"loss": loss, "chunk_losses": chunk_losses, "chunk_tokens": chunk_tokens}


Phase15ForCausalLM.register_for_auto_class("AutoModelForCausalLM")


__all__ = ["Phase15CausalLMOutputWithPast", "Phase15ForCausalLM", "Phase15Model", "Phase15PreTrainedModel"]
