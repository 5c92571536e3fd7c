# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 eval-lm`: lm-evaluation-harness's Hugging Face model, scored and generated chunk by chunk."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from accelerate import find_executable_batch_size
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import pad_and_concat, stop_sequences_criteria
from lm_eval.utils import setup_logging
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig

from phase15.loading import StrictPhase15ForCausalLM, check_kind
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.continuous_batching_phase15 import Phase15Lanes
from phase15.model.requests_phase15 import request_of


AutoConfig.register(Phase15Config.model_type, Phase15Config)  # the code here, not the copy in the model's folder

PREDICTIONS = 4096  # logits computed at a time, so that memory stays bounded
REFILLS = 16  # lm_eval gets its answers after so many to a lane
QUERY_END = -1  # not the id of any token

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation


@register_model("phase15")
class Phase15LM(HFLM):
    """lm_eval's Hugging Face model, with its arguments (`pretrained`, `dtype`, `peft`, …) except `max_length`."""

    AUTO_MODEL_CLASS = StrictPhase15ForCausalLM
    max_length = 10**12  # the recursion reads a context of any length: nothing is cut, no window rolls

    def __init__(self, *args, **kwargs):
        # lm_eval recognises only transformers' own classes as causal
        super().__init__(*args, **kwargs | {"backend": "causal"})
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no end token (`eos_token`): lm_eval ends answers "
                "with it and, where there is no BOS token, puts it before text without a context."
            )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise ValueError("`enable_thinking` is for tasks that generate: here the continuation is given.")
        progress = tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm)
        rows = [(request.args, *self.encode(*request.args)) for request in progress]
        answers = iter(self.score([row for row in rows if row[2]], disable_tqdm))
        # a continuation without a token is certain, and what lm_eval's own models say of it
        return [next(answers) if continuation else (0.0, True) for *_, continuation in rows]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            prefix = self.prefix_token_id
            return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
        # White space at the end of the context may be the start of a token: lm_eval moves it to the continuation. A
        # line break is not, and queries from chat templates end in one: it stays, as in training.
        end = len(context) if context.endswith("\n") else len(context.rstrip())
        query = self.tok_encode(context[:end])
        return query, self.tok_encode(context + continuation)[len(query) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = [self.tok_encode(request.args[0]) for request in requests]
        rows = [(None, [self.prefix_token_id], tokens) for tokens in documents if tokens]
        answers = iter(self.score(rows, disable_tqdm))
        logprobs = [next(answers)[0] if tokens else 0.0 for tokens in documents]
        for request, logprob in zip(requests, logprobs, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return logprobs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        batch_size = self.batch_size_per_gpu
        self.num_lanes = self.batch_size
        if batch_size == "auto":  # generation needs the same memory at any length; HFLM would try `max_length`
            spoken = self.model.spoken_chunk_length
            longest = max(request.args[1].get("chunk_length") or spoken for request in requests)
            self.num_lanes = self.largest_batch_size((None, [0] * self.config.max_query_length, [0] * longest))
        uses_beams = any((request.args[1].get("num_beams") or 1) > 1 for request in requests)
        self.batch_size_per_gpu = self.num_lanes * (1 if uses_beams else REFILLS)
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch_size

    def _model_generate(self, context, max_length: int, stop: list[str], attention_mask=None, **kwargs):
        """Answers a batch in lanes, of which there are fewer than rows; beam search as HFLM does."""
        if (kwargs.get("num_beams") or 1) > 1:
            return super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **kwargs)
        if not kwargs.get("temperature") and not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)  # 0 is lm_eval's word for greedy search
            kwargs["do_sample"] = False
        kwargs |= {"max_new_tokens": max_length - context.shape[1], "pad_token_id": self.tokenizer.pad_token_id}
        dtype = self.mixed_precision_dtype
        asked = []
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            lanes = Phase15Lanes(
                self.model, min(self.num_lanes, len(context)), chunk_length=kwargs.get("chunk_length")
            )
            for ids, mask in zip(context, attention_mask, strict=True):
                prompt = ids[mask.bool()].tolist()
                ends = stop_sequences_criteria(self.tokenizer, stop, len(prompt), 1)
                asked.append(request_of(self.model, prompt, stopping_criteria=ends, **kwargs))
                lanes.submit(asked[-1])
            while lanes.advance():
                pass
        for request in asked:
            if request.error:
                raise request.error
        answers = [torch.tensor(request.generated_tokens, device=self.device) for request in asked]
        answers = pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, answers], dim=1)

    def score(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Requests that differ only in their last token share a row, if their queries end at the same position.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: [*request[1], QUERY_END, *request[2][:-1]],
        )
        is_auto = self.batch_size == "auto"
        self.batch_sizes = {}  # by length of the requests
        batches = order.get_batched(0 if is_auto else self.batch_size, self.batch_size_at if is_auto else None)
        answers = []
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
        for batch in batches:
            for (strings, context, continuation), scores in zip(batch, self._score(batch), strict=True):
                logprob, is_greedy, last = scores
                for key, tokens, _ in order.get_cache(strings, [*context, QUERY_END], continuation, last[None, None]):
                    is_best = bool(last.argmax() == tokens[-1])
                    answers.append((float(logprob + last[tokens[-1]]), bool(is_greedy) and is_best))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[-1])
                    progress.update()
        progress.close()
        return order.get_original(answers)

    @torch.no_grad()
    def _score(self, batch: list[Request]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each request: the log-probability of its continuation without the last token, whether that is greedy,
        and the log-probabilities `(vocab_size,)` of the last token."""
        rows = [torch.tensor(context + tokens[:-1], device=self.device) for _, context, tokens in batch]
        ones = [torch.ones_like(row) for row in rows]
        width = max(map(len, rows))
        input_ids, mask = (pad_and_concat(width, tensors, padding_side="left") for tensors in (rows, ones))
        query_lengths, lengths = torch.tensor([(len(c), len(t)) for _, c, t in batch], device=self.device).T
        kept = int(lengths.max())  # columns at the end that predict a continuation
        column = torch.arange(kept, device=self.device)
        targets = input_ids.roll(-1, dims=1)[:, -kept:]  # the token after each column
        is_target = (column >= kept - lengths[:, None]) & (column < kept - 1)  # the last token is scored by the caller
        arguments = {"attention_mask": mask, "query_lengths": query_lengths, "logits_to_keep": kept}
        logprob = 0
        is_greedy = True
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            hidden_states = self.model(input_ids, **arguments, skip_logits=True).last_hidden_state  # (B, kept, d)
        for part in column.split(max(1, PREDICTIONS // len(batch))):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = self.model.get_output_embeddings()(hidden_states[:, part])
            scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype or torch.float32)  # (B, part, V)
            chosen = scores.gather(2, targets[:, part, None]).squeeze(2)
            best = scores.argmax(dim=2) == targets[:, part]
            logprob += chosen.masked_fill(~is_target[:, part], 0).sum(dim=1)
            is_greedy &= (best | ~is_target[:, part]).all(dim=1)
        return zip(logprob, is_greedy, scores[:, -1], strict=True)

    def batch_size_at(self, position: int, requests: Sequence[Request]) -> int:
        """Searches `batch_schedule` times, since the requests grow shorter."""
        part = int(position * self.batch_schedule / len(requests))
        if part not in self.batch_sizes:
            self.batch_sizes[part] = self.largest_batch_size(requests[position])
        return self.batch_sizes[part]

    def largest_batch_size(self, request: Request) -> int:
        def fits(batch_size: int) -> int:
            self._score([request] * batch_size)
            return batch_size

        size = find_executable_batch_size(fits, self.max_batch_size)()
        logging.getLogger("lm_eval").info(f"Largest batch size: {size}")
        return size


def evaluate_model(model_dir: str, flags: list[str]):
    """Runs lm_eval's command on a model, with further flags of that command."""
    setup_logging()
    check_kind(model_dir)
    # JSON, so that lm_eval does not parse the folder's name; it adds the model_args in `flags`
    flags = [*flags, "--model", "phase15", "--model_args", json.dumps({"pretrained": model_dir})]
    sys.argv = ["eval_lm.py", "run", *flags]  # where lm_eval's command reads its flags
    cli_evaluate()


__all__ = ["Phase15LM", "evaluate_model"]
