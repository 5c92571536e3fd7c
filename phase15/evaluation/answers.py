# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Greedy answers of any model to a list of queries."""

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phase15.evaluation.losses import display_label, pad_right
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@torch.no_grad()
def greedy_answers(
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    chunk_length: int | None = None,
) -> list[list[int]]:
    """
    Returns greedy answers to queries, each up to its end token.

    Args:
        name (`str`): the key of the row, for the progress bar.
        model (`PreTrainedModel` or `PeftModel`): a Phase15 model, a causal LM, or an adapter on one.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        queries (`list[list[int]]`): token ids.
        batch_size (`int`): queries at a time.
        max_new_tokens (`int`): maximum length of an answer.
        min_new_tokens (`int`): minimum length of an answer: the end token cannot come before.
        chunk_length (`int`, *optional*): the chunk length of a Phase15 model; its config's by default.
    """
    end = tokenizer.eos_token_id
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    if isinstance(model, Phase15ForCausalLM):
        # losses are measured with this length, and so not with that of the generation config
        settings["chunk_length"] = model.config.resolve_chunk_length(chunk_length)
        outputs = model.generate_batch(
            queries, max_batch_size=batch_size, progress_bar=len(queries) > batch_size, **settings
        )
        return [cut(output.generated_tokens, end) for output in outputs.values()]
    is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if is_prompt:
        batch_size = 1  # PEFT puts virtual tokens in front of the padding, which then counts as positions
    answers = []
    starts = range(0, len(queries), batch_size)
    for start in tqdm(starts, desc=f"{display_label(name)}, answering", disable=len(starts) == 1):
        batch = queries[start : start + batch_size]
        # `generate` needs padding on the left: pad reversed rows on the right, and reverse them again
        ids, length = pad_right([query[::-1] for query in batch], model.device)
        mask = torch.arange(ids.shape[1], device=model.device) < length[:, None]
        output = model.generate(
            input_ids=ids.flip(1),
            attention_mask=mask.long().flip(1),
            use_cache=not is_prompt,  # PEFT 0.21 misses the cache of transformers 5.24
            **settings,
        )
        answers += [cut(row, end) for row in output[:, ids.shape[1] :].tolist()]
    return answers


def cut(answer: list[int], end: int) -> list[int]:
    """Returns an answer up to its end token."""
    return answer[: answer.index(end)] if end in answer else answer


__all__ = ["greedy_answers"]
