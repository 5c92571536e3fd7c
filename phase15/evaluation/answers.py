# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loss by example and chunk for any model, its controls, and context recovery with bootstrap intervals."""

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phase15.evaluation.losses import label, pad
from phase15.model.modeling_phase15 import Phase15ForCausalLM


# Keys of the rows of results.json and evaluation.json.


@torch.no_grad()
def greedy_answers(
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """Greedy answers to queries, up to their end token, which cannot come before `min_new_tokens`."""
    ends, answers = tokenizer.eos_token_id, []
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": ends,
        "pad_token_id": ends,
    }
    if isinstance(model, Phase15ForCausalLM):
        settings["chunk_length"] = model.config.chunk_length  # the scores have it, too
        outputs = model.generate_batch(
            queries, max_batch_size=batch_size, progress_bar=len(queries) > batch_size, **settings
        )
        return [cut(output.generated_tokens, ends) for output in outputs.values()]
    is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if is_prompt:
        batch_size = 1  # PEFT puts virtual tokens in front of the padding, which then counts as positions
    starts = range(0, len(queries), batch_size)
    for start in tqdm(starts, desc=f"{label(name)}, answering", disable=len(starts) == 1):
        batch = queries[start : start + batch_size]
        ids, length = pad([query[::-1] for query in batch], model.device)
        position = torch.arange(ids.shape[1], device=model.device)
        output = model.generate(
            input_ids=ids.flip(1),  # padded on the left
            attention_mask=(position < length[:, None]).long().flip(1),
            use_cache=not is_prompt,  # PEFT 0.21 misses the cache of transformers 5.24
            **settings,
        )
        answers += [cut(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    return answers


def cut(answer: list[int], end: int) -> list[int]:
    """An answer up to its end token."""
    return answer[: answer.index(end)] if end in answer else answer


__all__ = ["greedy_answers"]
