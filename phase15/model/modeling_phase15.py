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
  model with a sliding window and attention sinks;
- training runs the recursion first, then the LLM once over all chunks of all rows;
- generation (generation_phase15.py) is transformers' own loop: the state of the recursion is a `Cache`.

recursion_phase15.py has the step, batch_phase15.py the batch without its padding, cache_phase15.py the state of a
generation. This file has the language model around them: `Phase15Model` (body), then `Phase15ForCausalLM` (head).
"""

import inspect
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .adapter_phase15 import HUB_ARGUMENTS, Phase15HypernetMixin, describe_base, load_hypernet, relative_base
from .base_phase15 import check_sizes, load_base, rename_earlier_weights, weights_digest
from .batch_phase15 import IGNORED, Rows, add_query_lengths, as_batch, check_arguments, choose_tokens, take
from .cache_phase15 import Phase15Cache, check_cache
from .compat_phase15 import CACHE_NAME, one_cache, with_cache_alias
from .configuration_phase15 import VERSION, Phase15Config, auto_map
from .continuous_batching_phase15 import Phase15ContinuousBatchingMixin
from .generation_phase15 import Phase15GenerationMixin, supported_settings
from .recursion_phase15 import (
    HyperNetwork,
    Phase15HyperNetwork,
    Phase15RecursionMixin,
    SoftPrompt,
    carry,
    check_first_layers,
    formula_digest,
    make_hypernet,
    register_hypernet,
)
from .rules_phase15 import RULES
from .state_phase15 import (
    STATE_FORMAT_VERSION,
    Phase15State,
    check_digest,
    encode_turn,
    extend_digest,
    state_sizes,
)


logger = logging.get_logger("transformers.phase15")  # one name for all copies of this file: they warn once


@with_cache_alias
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
            The soft prompt of each row's last prediction.
        prediction (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The index of each column's prediction in its row; negative where a column predicts nothing.
    """

    soft_prompt: torch.Tensor | None = None
    prediction: torch.LongTensor | None = None


@with_cache_alias
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
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # float16 is too coarse for it, and quantizers convert only the LLM: as a part of the body, and of the head.
    _keep_in_fp32_modules = ["hypernet", "model.hypernet"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a step of the recursion cannot be undone, so candidate tokens cannot be rolled back

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """Overrides the library to initialise only what `from_pretrained` has not filled."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: Phase15Config | None = None,
        base: str | os.PathLike | None = None,
        check_base: bool = True,
        **kwargs,
    ):
        """
        Overrides the library to fetch the base of a folder that holds only a HyperNetwork.

        Args:
            pretrained_model_name_or_path, config, kwargs: as in the library.
            base (`str` or `os.PathLike`, *optional*): another place of the base than the folder names: a Hub id, a
                folder or a `.gguf` file.
            check_base (`bool`, defaults to `True`): refuse a base with other weights than those of training.

        Raises:
            ValueError: for a base that is missing or another, and for `base` with a folder that holds both.
        """
        name = pretrained_model_name_or_path
        own_config = config
        if own_config is None and name is not None:
            fetch = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "revision", "subfolder") if key in kwargs}
            own_config = Phase15Config.from_pretrained(name, **fetch)
        if own_config is None or own_config.base_digest is None or kwargs.get("state_dict") is not None:
            if base is not None:
                raise ValueError(f"`base` is {base}, but {name} holds its base: only a HyperNetwork needs one.")
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        model, info = load_hypernet(cls, name, own_config, base, check_base, **kwargs)
        return (model, info) if kwargs.get("output_loading_info") else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Overrides the library to write the class, the digest of the formula and the file of a registered HyperNetwork
        into the folder, and to keep settings of the generation config that are not the library's (`chunk_length`).
        Without the base (`saves_base`), config.json also gets the base's digest.
        """
        base = self.config.base_model_name_or_path
        if not getattr(self, "saves_base", True):  # a body has no such choice
            self.check_base_is_known()
            self.config.base_digest = self.llm_digest()
            self.config.base_model_name_or_path = relative_base(base, save_directory)
        else:
            self.config.base_digest = None
            if base is not None and os.path.isabs(base):
                self.config.base_model_name_or_path = None  # a path of this machine means nothing elsewhere
        try:
            self._save(save_directory, *args, **kwargs)
        finally:
            self.config.base_model_name_or_path = base
            self.config.base_digest = None

    def _save(self, save_directory: str | os.PathLike, *args, **kwargs):
        self.config.auto_map = auto_map(type(self).__name__)
        self.config.hypernet_digest = formula_digest(self.hypernet)
        self.config.phase15_version = VERSION
        if self.can_generate():
            # At loading the library drops foreign settings from a generation config that is marked as made of a
            # model's config: a new one is not marked.
            generation_config = self.generation_config
            settings = {k: v for k, v in generation_config.to_dict().items() if not k.startswith("_")}
            settings.pop("transformers_version", None)
            try:
                self.generation_config = GenerationConfig(**settings)
                super().save_pretrained(save_directory, *args, **kwargs)
            finally:
                self.generation_config = generation_config
        else:
            super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_rule(self.hypernet, Path(save_directory))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Phase15HyperNetwork):
            module.init_weights(self.config)


def save_rule(hypernet: nn.Module, folder: Path):
    """
    Copies the file of a registered HyperNetwork into a saved folder, whose rules_phase15.py then imports it. The
    default HyperNetwork travels with the model's own code.

    Raises:
        ValueError: if the class is not defined in a file, or the file imports from `phase15` other than by
            `from phase15.model.NAME import …`, which becomes `from .NAME import …` in the folder.
    """
    rule = next(type(module) for module in hypernet.modules() if isinstance(module, Phase15HyperNetwork))
    if rule.__module__ == Phase15HyperNetwork.__module__:
        return
    try:
        source = Path(inspect.getsourcefile(rule))
    except TypeError as error:
        raise ValueError(f"{rule.__name__} cannot be saved: define it in a file, which then travels along.") from error
    text = re.sub(r"^(\s*from )phase15\.model(\.\w+ import )", r"\1\2", source.read_text("utf-8"), flags=re.M)
    foreign = re.search(r"^\s*(from|import) phase15\b.*", text, flags=re.M)
    if foreign:
        raise ValueError(
            f"{source}: `{foreign[0].strip()}` would not work in a saved folder; write `from phase15.model.NAME "
            "import …`, as in `from phase15.model.recursion_phase15 import Phase15HyperNetwork`."
        )
    (folder / source.name).write_text(text, encoding="utf-8")
    (folder / "rules_phase15.py").write_text(
        '"""The registered HyperNetwork that this folder brings."""\n\n'
        f"from .{source.stem} import {rule.__name__}\n\n\nRULES = [{rule.__name__}]\n",
        encoding="utf-8",
    )


class Phase15Model(Phase15RecursionMixin, Phase15PreTrainedModel):
    """
    The body: the recursion and the LLM, up to the hidden states that predict.

    Args:
        config (`Phase15Config`): its `text_config` decides which LLM is built.
        llm (`PreTrainedModel`, *optional*): the LLM to wrap; built from `config.text_config` when not given.
    """

    def __init__(self, config: Phase15Config, llm: PreTrainedModel | None = None):
        config.check()  # `from_pretrained` sets fields after the config was made
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        check_first_layers(self.llm, config.hypernet_reads_layers)
        self.hypernet = make_hypernet(config)
        self._no_split_modules = [type(self.hypernet).__name__]  # it adds the outputs of its parts
        digest = config.hypernet_digest
        if digest is not None and digest != formula_digest(self.hypernet):
            logger.warning_once(
                f"{config.name_or_path or 'This model'} was saved by code with another formula of the step "
                f"(`hypernet_digest` {digest}), so its output may differ here. `trust_remote_code=True` runs the "
                "folder's own code."
            )
        self.register_load_state_dict_pre_hook(check_sizes)
        self.post_init()
        self._digest: tuple[tuple, str] | None = None  # of the weights, and what they were
        self.warns_untrained = True  # not yet, and Δ was not set to zero on purpose

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.llm.set_input_embeddings(value)

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
        batch_size, num_tokens, hidden_size = chunk.shape
        shortest, num_slots = torch.stack(torch.aminmax(soft_prompt.length)).tolist()  # one wait for the device
        num_past = 0 if llm_cache is None else llm_cache.get_seq_length()
        if num_past:
            num_slots = num_past - num_cached  # the row with the most slots may have left the batch since
        # Chunk token j has the position after the row's last used slot, plus j.
        first_position = soft_prompt.length[:, None] + num_cached
        position = first_position + torch.arange(num_tokens, device=chunk.device)  # (B, T)
        predicting = torch.arange(num_tokens, device=chunk.device).expand(batch_size, -1)  # columns that predict
        inputs_embeds = chunk
        if num_past == 0:
            slot = torch.arange(num_slots, device=chunk.device).expand(batch_size, -1)
            last_slot = soft_prompt.length[:, None] - 1
            inputs_embeds = torch.cat([soft_prompt.embeds[:, :num_slots], chunk], dim=1)  # (B, N + T, d)
            position = torch.cat([slot, position], dim=1)
            predicting = torch.cat([last_slot, num_slots + predicting], dim=1)  # (B, 1 + T)
        visible = None  # the LLM needs a mask only where shorter rows have unused slots
        if shortest < num_slots:
            visible = F.pad(soft_prompt.mask[:, :num_slots], (0, num_cached + num_tokens), value=True)
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
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
        use_cache: bool | None = None,
        predict_mask: torch.BoolTensor | None = None,
        bptt_chunks: int | None = None,
        past_key_values: Phase15Cache | None = None,
        chunk_length: int | None = None,
        state: Phase15State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> Phase15ModelOutputWithPast:
        r"""
        Reads each row's query into the soft prompt, and computes the hidden states that predict the tokens after it.

        Args:
            input_ids, attention_mask, cache, use_cache, bptt_chunks, past_key_values, chunk_length, state,
                inputs_embeds, kwargs: See [`Phase15ForCausalLM.forward`].
            query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Number of tokens of each row's query, padding not counted. Defaults to 1. With a cache to the row's
                length, or to 0 if the cache has seen tokens.
            predict_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Columns whose predictions are requested; all by default. Without a cache, chunks with none are skipped.
        """
        check_arguments(kwargs)
        tokens = choose_tokens(input_ids, inputs_embeds)
        state = self.match_state(state, tokens)
        cache = one_cache(cache, past_key_values)
        cache, chunk_length = self.resolve_cache(cache, use_cache, chunk_length, state)
        rows = self.align(tokens, attention_mask, query_lengths, cache=cache)
        states, soft_prompt, outputs = self.predict_rows(
            rows, cache, chunk_length, predict_mask, bptt_chunks, state, **kwargs
        )
        return Phase15ModelOutputWithPast(
            last_hidden_state=rows.to_columns(states),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            soft_prompt=soft_prompt,
            prediction=rows.prediction,
            **{CACHE_NAME: cache},
        )

    def resolve_cache(
        self,
        cache: Phase15Cache | None,
        use_cache: bool | None,
        chunk_length: int | None,
        state: Phase15State | None = None,
    ) -> tuple[Phase15Cache | None, int]:
        """Returns the cache of a call, a new one with `use_cache`, and the length of its chunks."""
        check_cache(cache)
        if cache is not None and state is not None:
            raise ValueError("`state` starts a new answer and `cache` continues one: give one of them.")
        if cache is None and use_cache:
            cache = Phase15Cache(self.config, chunk_length, state)
            return cache, cache.chunk_length
        resolved = self.config.resolve_chunk_length(chunk_length, cache=state if cache is None else cache)
        if cache is not None and resolved != cache.chunk_length:
            raise ValueError(f"`chunk_length` is {chunk_length}, but the cache's is {cache.chunk_length}.")
        return cache, resolved

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of ids, or the embeddings that were given."""
        return tokens if tokens.is_floating_point() else self.get_input_embeddings()(tokens)

    def align(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
    ) -> Rows:
        """Checks a batch and left-aligns its rows: see [`Rows.from_batch`]. Embeddings get the model's dtype."""
        if tokens is not None and tokens.dim() == 3 and tokens.is_floating_point():
            hidden_size = self.config.text_config.hidden_size
            if tokens.shape[2] != hidden_size:
                raise ValueError(
                    f"`inputs_embeds` are {tokens.shape[2]} wide, but the model's embeddings {hidden_size}."
                )
            tokens = tokens.to(self.dtype)
        vocab_size = self.config.text_config.vocab_size
        return Rows.from_batch(tokens, attention_mask, query_lengths, labels, vocab_size=vocab_size, cache=cache)

    def predict_rows(
        self,
        rows: Rows,
        cache: Phase15Cache | None,
        chunk_length: int,
        predict_mask: torch.BoolTensor | None = None,
        bptt_chunks: int | None = None,
        state: Phase15State | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, BaseModelOutputWithPast]:
        """
        Computes the predictions of aligned rows, in the training form without a cache, else in the cached form.

        Returns:
            the hidden states by prediction `(batch_size, num_predictions, hidden_size)`, the last soft prompt of each
            row `(batch_size, num_soft_tokens, hidden_size)`, and the LLM's output.
        """
        if cache is None:
            return self.unroll(rows, chunk_length, predict_mask, bptt_chunks, state, **kwargs)
        return self.resume(rows, cache, **kwargs)

    def unroll(
        self,
        rows: Rows,
        chunk_length: int,
        predict_mask: torch.BoolTensor | None = None,
        bptt_chunks: int | None = None,
        state: Phase15State | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, BaseModelOutputWithPast]:
        """
        Computes the training form: all steps of the recursion, then one call of the LLM over the requested chunks.
        Returns as `predict_rows`, with `num_chunks * chunk_length` predictions.
        """
        needed = rows.needed_chunks(chunk_length, predict_mask)  # (B, C)
        num_rows, num_chunks = needed.shape
        # Token j of a row's answer stands after its query; what lies beyond the row is never a target or read.
        answer = rows.query_length[:, None] + torch.arange(num_chunks * chunk_length, device=needed.device)
        answer = take(rows.tokens, answer.clamp(max=rows.tokens.shape[1] - 1))
        chunks = self.embed(answer).unflatten(1, (num_chunks, chunk_length))  # (B, C, K, d)
        num_full = (rows.length - rows.query_length) // chunk_length  # only full chunks are read

        # One call for all segments: FSDP gathers weights at every call, and all processes must call equally often.
        query = self.embed(rows.tokens[:, : int(rows.query_length.max())])
        query_states = self.first_layers(query, self.config.max_query_length)
        read_chunks = chunks[:, : max(num_chunks - 1, 1)]  # no step reads the last chunk
        chunk_states = self.first_layers(read_chunks.flatten(1, 2), chunk_length)

        soft_prompt = self.empty_soft_prompt(num_rows, query) if state is None else state.soft_prompt
        soft_prompt = self.read_segments(soft_prompt, query, rows.query_length, query_states)
        soft_prompts = [soft_prompt]
        for index in range(num_chunks - 1):
            if bptt_chunks and (index + 1) % bptt_chunks == 0:
                soft_prompt = soft_prompt._replace(embeds=soft_prompt.embeds.detach())
            token_length = (index < num_full) * chunk_length
            soft_prompt = self.step(soft_prompt, chunks[:, index], token_length, chunk_states[index])
            soft_prompts.append(soft_prompt)
        embeds = torch.stack([soft_prompt.embeds for soft_prompt in soft_prompts], dim=1)  # (B, C, N, d)
        length = torch.stack([soft_prompt.length for soft_prompt in soft_prompts], dim=1)  # (B, C)
        if self.config.hypernet_reads_layers:
            # FSDP needs the same number of backward calls on every process, also where a batch has no chunk to read.
            embeds = embeds + 0 * (query_states[0][:, None, :1] + chunk_states[0][:, None, :1])

        # The last token of a chunk predicts the first of the next chunk, which the next soft prompt does.
        fed = chunks[needed][:, :-1]
        predicted, outputs = self.predict(SoftPrompt(embeds[needed], length[needed]), fed, **kwargs)
        states = predicted.new_zeros(num_rows, num_chunks, *predicted.shape[1:])  # (B, C, K, d)
        states[needed] = predicted
        last_chunk = (needed * torch.arange(num_chunks, device=needed.device)).amax(dim=1)
        return states.flatten(1, 2), embeds[torch.arange(num_rows), last_chunk], outputs

    def resume(
        self, rows: Rows, cache: Phase15Cache, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, BaseModelOutputWithPast]:
        """
        Computes the cached form: reads a message if there is one, then feeds answer tokens to the open chunk. Returns
        as `predict_rows`, with the LLM's last output.
        """
        answer_length = rows.length - rows.query_length
        has_query = rows.query_length > 0
        if (answer_length != answer_length[0]).any() or (has_query != has_query[0]).any():
            raise ValueError(
                "In a cache the chunks of all rows begin and end together, but the rows have queries of "
                f"{rows.query_length.tolist()} tokens and {answer_length.tolist()} tokens after them; give "
                "`query_lengths` that leave equally many, or call forward without a cache."
            )
        calls = []
        if has_query[0]:
            calls.append(self.prefill(cache, self.read_message(rows, cache), **kwargs))
            if not torch.isfinite(calls[0][0]).all():  # one wait for the device per message
                raise FloatingPointError(
                    "The LLM's output after the query is not finite. The weights are damaged, or too large for "
                    f"{self.dtype}: load the model with another `dtype`."
                )
        answer = rows.query_length[:, None] + torch.arange(int(answer_length[0]), device=answer_length.device)
        answer = self.embed(take(rows.tokens, answer))  # (B, A, d)
        while answer.shape[1]:
            # `chunk_length` may have become shorter than the open chunk, which then ends with the next token.
            room = max(cache.chunk_length - cache.chunk.shape[1], 1)
            tokens = answer[:, :room]
            answer = answer[:, room:]
            is_full = tokens.shape[1] == room
            num_fed = tokens.shape[1] - is_full  # the last token of a chunk predicts nothing inside it
            if num_fed:
                calls.append(self.decode(cache, tokens[:, :num_fed], **kwargs))
            cache.chunk = torch.cat([cache.chunk, tokens], dim=1)
            if is_full:
                length = torch.full_like(rows.length, cache.chunk.shape[1])
                soft_prompt = self.step(cache.soft_prompt, cache.chunk, length)
                calls.append(self.prefill(cache, soft_prompt, **kwargs))
        cache.seen_tokens += rows.tokens.shape[1]
        states = torch.cat([states for states, _ in calls], dim=1)
        return states, cache.soft_prompt.embeds, calls[-1][1]

    def read_message(self, rows: Rows, cache: Phase15Cache) -> SoftPrompt:
        """Closes the open chunk, and returns the cache's soft prompt stepped over each row's query."""
        soft_prompt = cache.soft_prompt
        if soft_prompt is None:
            like = self.embed(rows.tokens[:, :1])
            soft_prompt = self.empty_soft_prompt(len(rows.length), like)
        if cache.chunk is not None and cache.chunk.shape[1]:
            soft_prompt = self.step(soft_prompt, cache.chunk, torch.full_like(rows.length, cache.chunk.shape[1]))
        query = rows.tokens[:, : int(rows.query_length.max())]
        self.warn_untrained(query.shape[1])
        cache.message_prompt = self.read_segments(soft_prompt, query, rows.query_length)
        num_answered = int(rows.length[0] - rows.query_length[0])  # equal in all rows
        cache.message_end = cache.seen_tokens + rows.position.shape[1] - num_answered
        return cache.message_prompt

    @torch.no_grad()
    def read(
        self,
        input_ids: torch.LongTensor | list[int] | list[list[int]],
        attention_mask: torch.Tensor | None = None,
        state: Phase15State | None = None,
        progress_bar: bool = True,
        chunk_length: int | None = None,
    ) -> Phase15State:
        """
        Reads texts of any length into a state of a fixed size. Only the HyperNetwork runs, and the LLM's first
        `config.hypernet_reads_layers` layers.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)` or `(sequence_length,)`, or lists):
                Token ids, padded on any side. A list of lists may be ragged.
            attention_mask (`torch.Tensor` of the shape of `input_ids`, *optional*): 1 for tokens, 0 for padding.
            state (`Phase15State`, *optional*): what was read before, of one row or of `batch_size` rows. It is not
                changed.
            progress_bar (`bool`, defaults to `True`): show one, if reading takes longer than a second.
            chunk_length (`int`, *optional*): tokens of a chunk of the answers; by default the state's or the config's.

        Returns:
            [`Phase15State`]: the state after the last token of each row.

        Raises:
            ValueError: for a row without a token, ids outside the vocabulary, and a state of another model.
        """
        input_ids, attention_mask = as_batch(input_ids, attention_mask, self.device)
        rows = self.align(input_ids, attention_mask)
        state = self.match_state(state, input_ids)
        batch_size, longest = rows.tokens.shape
        embeds = self.get_input_embeddings()(rows.tokens[:, :1])
        soft_prompt = self.empty_soft_prompt(batch_size, embeds) if state is None else state.soft_prompt
        self.warn_untrained(longest)
        size = self.config.max_query_length
        # A bar that appears after a second: most texts are read in less.
        with logging.tqdm(
            total=longest, desc="Reading", unit=" tokens", delay=1.0, leave=False, disable=not progress_bar
        ) as bar:
            for start in range(0, longest, size):
                segment = rows.tokens[:, start : start + size]
                segment_length = (rows.length - start).clamp(0, segment.shape[1])
                soft_prompt = self.read_segments(soft_prompt, segment, segment_length)
                bar.update(segment.shape[1])
        texts = [ids[:length].tolist() for ids, length in zip(rows.tokens, rows.length.tolist(), strict=True)]
        chunk_length = self.config.resolve_chunk_length(chunk_length, cache=state)
        return self.make_state(soft_prompt, texts, state, chunk_length)

    def make_state(
        self,
        soft_prompt: SoftPrompt,
        texts: list[list[int | None]],
        before: Phase15State | None,
        chunk_length: int,
    ) -> Phase15State:
        """
        Returns the state of a soft prompt.

        Args:
            soft_prompt (`SoftPrompt`): after the texts.
            texts (`list[list[int | None]]`): ids that each row has read since `before`; None for an embedding.
            before (`Phase15State`, *optional*): of as many rows; by default nothing was read before.
            chunk_length (`int`): tokens of a chunk of the answers.
        """
        num_tokens = torch.tensor([len(ids) for ids in texts])
        digests = [""] * len(texts)
        if before is not None:
            num_tokens = num_tokens + before.num_tokens
            digests = before.text_digests
        return Phase15State(
            soft_prompt=SoftPrompt(soft_prompt.embeds.detach(), soft_prompt.length),
            num_tokens=num_tokens,
            text_digests=tuple(extend_digest(digest, ids) for digest, ids in zip(digests, texts, strict=True)),
            model_digest=self.model_digest(),
            sizes=state_sizes(self.config),
            chunk_length=chunk_length,
            model=weakref.ref(self),
        )

    def match_state(self, state: Phase15State | None, tokens: torch.Tensor | None) -> Phase15State | None:
        """
        Returns a state with the number of rows of ids or embeddings, on the model's device and in its dtype. A state
        of one row serves all rows.

        Raises:
            ValueError: for something else than a state, a state of another model, or another number of rows.
        """
        if state is None:
            return None
        # A state may be of another copy of the class: of the package, or of a folder's code.
        if getattr(state, "format_version", None) != STATE_FORMAT_VERSION:
            raise ValueError(f"`state` must be a Phase15State of format {STATE_FORMAT_VERSION}, not {state!r:.80}.")
        sizes = state_sizes(self.config)
        if state.sizes != sizes:
            raise ValueError(f"`state` was read by a model with {state.sizes}, but this model has {sizes}.")
        if state.model is None or state.model() is not self:
            check_digest(state.model_digest, self)
        if tokens is None or tokens.dim() not in (2, 3):  # a shape that is refused later
            return state
        batch_size = len(tokens)
        if state.batch_size == 1:
            state = state.select_rows([0] * batch_size)
        if state.batch_size != batch_size:
            raise ValueError(f"`state` has {state.batch_size} rows, but `input_ids` has {batch_size}.")
        embeds = self.embed(tokens[:1, :1])  # the weight itself may be offloaded
        return state.to(embeds.device, embeds.dtype)

    def model_digest(self) -> str | None:
        """
        Returns a digest of the weights that a state depends on, the HyperNetwork and the input embeddings, which is
        equal in float32 and bfloat16. None for offloaded weights.
        """
        weights = dict(self.hypernet.state_dict())
        weights["embeddings"] = self.get_input_embeddings().weight.detach()
        if any(weight.is_meta for weight in weights.values()):
            return None
        # torch counts changes in place, except those through `.data`, with which evaluation sets α to zero.
        versions = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights.values()]
        key = (tuple(versions), tuple(self.hypernet_alpha().tolist()))
        if self._digest is None or self._digest[0] != key:
            self._digest = (key, weights_digest(weights.items()))
        return self._digest[1]

    def hypernet_alpha(self) -> torch.Tensor:
        """Returns the scale of Δ, of shape `(hidden_size,)`, whatever wraps the HyperNetwork."""
        rule = next(module for module in self.hypernet.modules() if isinstance(module, Phase15HyperNetwork))
        return rule.alpha.detach()

    def warn_untrained(self, num_tokens: int):
        """Warns once if more tokens are read than there are slots, and Δ, which is zero, keeps none of the rest."""
        num_slots = self.config.num_soft_tokens
        if num_tokens <= num_slots or not self.warns_untrained or self.training:
            return
        alpha = self.hypernet_alpha()
        if alpha.is_meta or alpha.any():
            return
        self.warns_untrained = False
        logger.warning(
            f"{num_tokens - num_slots:,} of {num_tokens:,} tokens lie outside the {num_slots} slots and are lost: the "
            "HyperNetwork is untrained (α = 0), so the soft prompt is a sliding window. Train it with `phase15 "
            "train`, or load a trained model."
        )

    def prefill(self, cache: Phase15Cache, soft_prompt: SoftPrompt, **kwargs):
        """Puts a new soft prompt into the cache and calls the LLM on it; returns as `predict`."""
        cache.start_chunk(soft_prompt)
        return self.decode(cache, cache.chunk, **kwargs)

    def decode(self, cache: Phase15Cache, tokens: torch.Tensor, **kwargs):
        """Calls the LLM on more tokens of the open chunk; returns as `predict`."""
        return self.predict(cache.soft_prompt, tokens, cache.llm_cache, cache.chunk.shape[1], **kwargs)


class Phase15ForCausalLM(
    Phase15PreTrainedModel, Phase15HypernetMixin, Phase15ContinuousBatchingMixin, Phase15GenerationMixin
):
    """
    A causal language model whose LLM sees a recursive soft prompt and the current chunk of 16 tokens: the body
    (`model`), and on it the LLM's own head.

    ```python
    >>> model = Phase15ForCausalLM.from_base("TinyLlama/TinyLlama-1.1B-Chat-v1.0")  # equals its base, until trained
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/repo", trust_remote_code=True)
    ```"""

    # PEFT renames the weights of adapters by it that were saved before 0.6.0, when the head was its own body.
    _checkpoint_conversion_mapping = {r"^(llm|hypernet)\.": r"model.\1."}

    def __init__(self, config: Phase15Config, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = Phase15Model(config, llm)
        self.register_load_state_dict_pre_hook(rename_earlier_weights)
        self.register_forward_pre_hook(add_query_lengths, with_kwargs=True)
        self.post_init()

    @classmethod
    def from_base(cls, base: str | os.PathLike, *, output_loading_info: bool = False, **kwargs):
        """
        Wraps a causal LM with a new HyperNetwork. Until it is trained, the model gives its base's output.

        Args:
            base (`str` or `os.PathLike`): Hub id, local folder, or `.gguf` file of a Llama-like LLM.
            output_loading_info (`bool`): return the base's loading info too, as `from_pretrained` does.
            kwargs: fields of [`Phase15Config`]; all others go to `AutoModelForCausalLM.from_pretrained` (`dtype`,
                `device_map`, `revision`, …). Weights that are pickles need `use_safetensors=False`.

        Raises:
            ValueError: for an LLM that cannot be given a soft prompt.
        """
        names = [name for name in kwargs if name in Phase15Config.__annotations__]
        config_kwargs = {name: kwargs.pop(name) for name in names}
        llm, loading_info = load_base(base, **kwargs)
        attention = llm.config._attn_implementation  # which making a config around it would set to the default
        config_kwargs = describe_base(base, **kwargs) | config_kwargs
        config = Phase15Config(text_config=llm.config, attn_implementation=attention, **config_kwargs)
        model = cls.from_llm(config, llm)
        embeddings = llm.get_input_embeddings().weight
        model.hypernet.embedding_scale.fill_(embeddings.detach().float().square().mean().sqrt())
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def from_llm(cls, config: Phase15Config, llm: PreTrainedModel):
        """Returns a model in evaluation mode around a loaded LLM, with a new HyperNetwork."""
        config._attn_implementation = llm.config._attn_implementation
        model = cls(config, llm=llm)
        embeddings = llm.get_input_embeddings().weight
        # The HyperNetwork's dtype is the one that it has when the model is loaded again (`_keep_in_fp32_modules`).
        dtype = torch.float32 if embeddings.dtype == torch.float16 else embeddings.dtype
        model.hypernet.to(device=embeddings.device, dtype=dtype)
        model.generation_config = supported_settings(llm.generation_config)
        if getattr(llm, "is_quantized", False):
            model.hf_quantizer = llm.hf_quantizer  # it saves the LLM's quantised weights
        return model.eval()

    @property
    def llm(self) -> PreTrainedModel:
        return self.model.llm

    @property
    def hypernet(self) -> Phase15HyperNetwork:
        return self.model.hypernet

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.llm.set_output_embeddings(new_embeddings)

    def empty_soft_prompt(self, batch_size: int, like: torch.Tensor | None = None) -> SoftPrompt:
        """See [`Phase15RecursionMixin.empty_soft_prompt`]."""
        return self.model.empty_soft_prompt(batch_size, like)

    def step(self, *args, **kwargs) -> SoftPrompt:
        """See [`Phase15RecursionMixin.step`]."""
        return self.model.step(*args, **kwargs)

    def read_segments(self, *args, **kwargs) -> SoftPrompt:
        """See [`Phase15RecursionMixin.read_segments`]."""
        return self.model.read_segments(*args, **kwargs)

    def read(
        self,
        input_ids: torch.LongTensor | list[int] | list[list[int]],
        attention_mask: torch.Tensor | None = None,
        state: Phase15State | None = None,
        progress_bar: bool = True,
        chunk_length: int | None = None,
    ) -> Phase15State:
        """
        Reads texts of any length into a state of a fixed size: see [`Phase15Model.read`].

        ```python
        >>> state = model.read(document_ids)
        >>> answer = model.generate(**question, state=state)
        ```"""
        chunk_length = self.config.resolve_chunk_length(chunk_length, self.generation_config, cache=state)
        return self.model.read(input_ids, attention_mask, state, progress_bar, chunk_length)

    def read_chat(
        self,
        messages: list[dict[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        state: Phase15State | None = None,
        progress_bar: bool = True,
    ) -> Phase15State:
        """
        Reads the turns of a chat into a state, as the chat template writes them.

        ```python
        >>> state = model.read_chat([{"role": "user", "content": document}], tokenizer)
        >>> question = state.next_turn([{"role": "user", "content": "Where do I live?"}], tokenizer)
        >>> answer = model.generate(**question, state=state)
        ```

        Args:
            messages (`list[dict]`): the turns, without a generation prompt after them.
            tokenizer (`PreTrainedTokenizerBase`): has the chat template.
            state (`Phase15State`, *optional*): has read the turns before these.
            progress_bar (`bool`): see [`Phase15Model.read`].

        Raises:
            ValueError: see [`encode_turn`].
        """
        ids = encode_turn(messages, tokenizer, is_first=state is None)
        return self.read(ids, state=state, progress_bar=progress_bar)

    def load_state(self, path: str | os.PathLike, **kwargs) -> Phase15State:
        """Loads a state that this model has read: see [`Phase15State.from_pretrained`]."""
        return Phase15State.from_pretrained(path, self, **kwargs)

    def predict(self, *args, **kwargs) -> tuple[torch.Tensor, BaseModelOutputWithPast]:
        """See [`Phase15Model.predict`]."""
        return self.model.predict(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
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
        state: Phase15State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> Phase15CausalLMOutputWithPast:
        r"""
        Reads each row's query into the soft prompt and predicts the tokens after it, chunk by chunk.

        Without a cache this is the training form: the recursion runs first, which depends only on the given tokens,
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
                Number of tokens of each row's query, padding not counted; overrides `labels`. Without both, the query
                is the first token: a causal LM over any text. With a cache it is the row, whose last column predicts
                the next token, or empty if the cache has seen tokens.
            cache (`Phase15Cache`, *optional*):
                State to continue from, updated in place. Its rows must have the same number of answer tokens.
            use_cache (`bool`, *optional*): make a `Phase15Cache` when none is given; unlike elsewhere not the default.
            logits_to_keep (`int` or `torch.Tensor` of shape `(num_columns,)`, defaults to 0):
                Compute logits only for the last N columns, or for these columns; 0 is all.
            skip_logits (`bool`, defaults to `False`):
                Save the memory of the logits: with `labels` compute only the loss, without them `last_hidden_state`.
            bptt_chunks (`int`, *optional*): stop the gradient through the recursion every N chunks.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Divisor of the loss: the target tokens of the accumulated batch. Defaults to this batch's.
            past_key_values (`Phase15Cache`, *optional*): the same as `cache`; its name before transformers 5.24.
            chunk_length (`int`, *optional*): tokens of a chunk; by default the cache's, the state's, or the config's.
            state (`Phase15State`, *optional*): what was read before `input_ids`, of one row or of each row.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings of query and answer, instead of `input_ids`.
            kwargs: go to the LLM (`output_hidden_states`, `output_attentions`).

        Raises:
            ValueError: for shapes that do not match, ids outside the vocabulary, rows without a token, a query longer
                than its row, rows that a cache cannot hold side by side, a cache of another class, a state of another
                model, or a `chunk_length` that is not the cache's or that the model has no positions for.
            FloatingPointError: if the LLM's output after a query that is read into a cache is not finite.
        """
        check_arguments(kwargs)
        tokens = choose_tokens(input_ids, inputs_embeds)
        state = self.model.match_state(state, tokens)
        cache = one_cache(cache, past_key_values)
        cache, chunk_length = self.model.resolve_cache(cache, use_cache, chunk_length, state)
        rows = self.model.align(tokens, attention_mask, query_lengths, labels, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        keeps_states = labels is None or not skip_logits
        predict_mask = torch.zeros_like(rows.position, dtype=torch.bool)  # (B, T)
        predict_mask[:, kept] = keeps_states
        if labels is not None:
            predict_mask |= rows.is_target()
        states, soft_prompt, outputs = self.model.predict_rows(
            rows, cache, chunk_length, predict_mask, bptt_chunks, state, **kwargs
        )
        losses = {}
        if labels is not None:
            losses = self.loss(states, rows.targets(states.shape[1]), chunk_length, num_items_in_batch)
        hidden_states = rows.to_columns(states, kept) if keeps_states else None
        return Phase15CausalLMOutputWithPast(
            logits=None if skip_logits else self.get_output_embeddings()(hidden_states),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=hidden_states,
            soft_prompt=soft_prompt,
            **{CACHE_NAME: cache},
            **losses,
        )

    def loss(
        self,
        states: torch.Tensor,
        targets: torch.LongTensor,
        chunk_length: int,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """
        Computes `loss`, `chunk_losses` and `chunk_tokens` of the output.

        Args:
            states (`torch.Tensor` of shape `(batch_size, num_predictions, hidden_size)`): by prediction.
            targets (`torch.LongTensor` of shape `(batch_size, num_predictions)`): -100 for no target.
            chunk_length (`int`): predictions of a chunk.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): divisor of the loss; the number of targets by
                default.
        """
        is_target = targets != IGNORED  # (B, P)
        if not is_target.any():
            raise ValueError("`labels` hold no target after any row's query, so there is nothing to predict.")
        logits = self.get_output_embeddings()(states[is_target])  # only where there is a target
        losses = F.cross_entropy(logits.float(), targets[is_target], reduction="none")
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        chunk = torch.arange(targets.shape[1], device=targets.device) // chunk_length
        chunk = chunk.expand_as(targets)[is_target]
        chunk_tokens = torch.bincount(chunk)
        chunk_losses = losses.new_zeros(len(chunk_tokens)).index_add_(0, chunk, losses.detach())
        return {"loss": loss, "chunk_losses": chunk_losses, "chunk_tokens": chunk_tokens}


Phase15Model.register_for_auto_class("AutoModel")
Phase15ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "RULES",
    "HyperNetwork",
    "Phase15Cache",
    "Phase15CausalLMOutputWithPast",
    "Phase15ForCausalLM",
    "Phase15HyperNetwork",
    "Phase15Model",
    "Phase15PreTrainedModel",
    "Phase15State",
    "SoftPrompt",
    "carry",
    "register_hypernet",
]
