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
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor
from phase15.model.requests_phase15 import request_of


# Without this line transformers would run the code in the model's folder.
AutoConfig.register(Phase15Config.model_type, Phase15Config)

PREDICTIONS = 4096  # maximum number of predictions whose logits are in memory at once
REFILLS = 16  # requests per lane in a batch of generation: lanes that are free are filled again
QUERY_END = -1  # separates query and continuation in the keys of lm_eval's Collator. No token has this id.

# The strings of a request (lm_eval caches its answer under them), the ids of its context and of its continuation.
ScoreRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("phase15")
class Phase15LM(HFLM):
    """lm_eval's Hugging Face model, with its arguments (`pretrained`, `dtype`, `peft`, …) except `max_length`."""

    AUTO_MODEL_CLASS = StrictPhase15ForCausalLM
    max_length = 10**12  # the recursion reads a context of any length, so lm_eval must not cut it

    def __init__(self, *args, **kwargs):
        # lm_eval detects the kind of a model by its class, and knows only those of transformers
        kwargs["backend"] = "causal"
        super().__init__(*args, **kwargs)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no end token (`eos_token`): lm_eval ends answers "
                "with it and, where there is no BOS token, puts it before text without a context."
            )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding would generate it."""
        if self.enable_thinking:
            raise ValueError("`enable_thinking` is for tasks that generate: here the continuation is given.")
        rows = []
        for request in tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm):
            query, continuation = self.encode(*request.args)
            rows.append((request.args, query, continuation))
        scores = iter(self.score([row for row in rows if row[2]], disable_tqdm))
        # lm_eval's own models return this for an empty continuation
        certain = (0.0, True)
        return [next(scores) if continuation else certain for _, _, continuation in rows]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of query and continuation. Without a context the query is the BOS token."""
        if not context:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                return tokens[:1], tokens[1:]
            return [self.prefix_token_id], tokens
        # White space at the end of a context may be the first part of a token, so lm_eval moves it to the
        # continuation. A line break is not. Queries from chat templates end in one, which stays, as in training.
        if context.endswith("\n"):
            query_text = context
        else:
            query_text = context.rstrip()
        query = self.tok_encode(query_text)
        whole = self.tok_encode(context + continuation)
        return query, whole[len(query) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each document after the BOS token."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        rows = [(None, [self.prefix_token_id], tokens) for tokens in documents if tokens]
        scores = iter(self.score(rows, disable_tqdm))
        logprobs = []
        for request, tokens in zip(requests, documents, strict=True):
            logprob = 0.0
            if tokens:
                logprob, _ = next(scores)
            logprobs.append(logprob)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return logprobs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates the answers in lanes. lm_eval calls `_model_generate` with batches of several requests a lane."""
        batch_size = self.batch_size_per_gpu
        self.num_lanes = self.batch_size
        if batch_size == "auto":
            # The memory of a lane is the same at any length of its answer, but HFLM would try `max_length`.
            chunk_lengths = []
            for request in requests:
                chunk_length = request.args[1].get("chunk_length")
                chunk_lengths.append(chunk_length or self.model.generation_chunk_length)
            query = [0] * self.config.max_query_length
            self.num_lanes = self.largest_batch_size((None, query, [0] * max(chunk_lengths)))
        uses_beams = any(num_beams(request.args[1]) > 1 for request in requests)
        self.batch_size_per_gpu = self.num_lanes if uses_beams else self.num_lanes * REFILLS
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch_size

    def _model_generate(self, context, max_length: int, stop: list[str], attention_mask=None, **kwargs):
        """Answers a batch in lanes, with fewer lanes than rows. Lanes have no beam search, so HFLM does it."""
        if num_beams(kwargs) > 1:
            return super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **kwargs)
        if not kwargs.get("temperature") and not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)  # lm_eval's 0 means greedy search. `generate` refuses it.
            kwargs["do_sample"] = False
        kwargs["max_new_tokens"] = max_length - context.shape[1]
        kwargs["pad_token_id"] = self.tokenizer.pad_token_id
        requests = []
        with self.autocast():
            num_lanes = min(self.num_lanes, len(context))
            lanes = Phase15ContinuousBatchProcessor(self.model, num_lanes, chunk_length=kwargs.get("chunk_length"))
            for ids, mask in zip(context, attention_mask, strict=True):
                prompt = ids[mask.bool()].tolist()
                criteria = stop_sequences_criteria(self.tokenizer, stop, len(prompt), 1)
                request = request_of(self.model, prompt, stopping_criteria=criteria, **kwargs)
                requests.append(request)
                lanes.submit(request)
            while lanes.advance():
                pass
        answers = []
        for request in requests:
            if request.error is not None:
                raise request.error
            answers.append(torch.tensor(request.generated_tokens, device=self.device))
        answers = pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, answers], dim=1)

    def score(self, requests: list[ScoreRequest], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding would generate it."""
        # Long requests come first, so that an automatic batch size fails at once. Requests that differ only in their
        # last token share a row, if their queries end at the same position.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: [*request[1], QUERY_END, *request[2][:-1]],
        )
        self.batch_sizes = {}  # found by `batch_size_at`
        if self.batch_size == "auto":
            batches = order.get_batched(0, self.batch_size_at)
        else:
            batches = order.get_batched(self.batch_size, None)
        answers = []
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
        for batch in batches:
            for (strings, context, continuation), scores in zip(batch, self._score(batch), strict=True):
                logprob, is_greedy, last = scores
                row = [*context, QUERY_END]
                for key, tokens, _ in order.get_cache(strings, row, continuation, last[None, None]):
                    token = tokens[-1]
                    answer = (float(logprob + last[token]), bool(is_greedy) and bool(last.argmax() == token))
                    answers.append(answer)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    progress.update()
        progress.close()
        return order.get_original(answers)

    @torch.no_grad()
    def _score(self, batch: list[ScoreRequest]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        Scores a batch, left-padded.

        Returns:
            For each request, the log-probability of its continuation without the last token, whether that is greedy,
            and the log-probabilities of all tokens in place of the last, of shape `(vocab_size,)`.
        """
        device = self.device
        rows = [torch.tensor(context + continuation[:-1], device=device) for _, context, continuation in batch]
        ones = [torch.ones_like(row) for row in rows]  # before `pad_and_concat`, which changes its list
        width = max(len(row) for row in rows)
        input_ids = pad_and_concat(width, rows, padding_side="left")  # (B, T)
        attention_mask = pad_and_concat(width, ones, padding_side="left")  # (B, T)
        query_lengths = torch.tensor([len(context) for _, context, _ in batch], device=device)  # (B,)
        lengths = torch.tensor([len(continuation) for _, _, continuation in batch], device=device)  # (B,)
        # Rows end together, so the last columns predict the continuations: a row's own are the last `lengths`.
        num_columns = int(lengths.max())
        column = torch.arange(num_columns, device=device)
        targets = input_ids.roll(-1, dims=1)[:, -num_columns:]  # the next token; in the last column a wrong one
        # The caller scores the last token, since several requests that end differently share a row.
        is_target = (column >= num_columns - lengths[:, None]) & (column < num_columns - 1)  # (B, num_columns)
        with self.autocast():
            outputs = self.model(
                input_ids,
                attention_mask=attention_mask,
                query_lengths=query_lengths,
                logits_to_keep=num_columns,
                skip_logits=True,
            )
        hidden_states = outputs.last_hidden_state  # (B, num_columns, d)
        logprob = 0
        is_greedy = True
        for part in column.split(max(1, PREDICTIONS // len(batch))):  # all logits at once may not fit in memory
            with self.autocast():
                logits = self.model.get_output_embeddings()(hidden_states[:, part])
            scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype or torch.float32)  # (B, part, V)
            target_scores = scores.gather(2, targets[:, part, None]).squeeze(2)
            is_best = scores.argmax(dim=2) == targets[:, part]
            logprob += target_scores.masked_fill(~is_target[:, part], 0).sum(dim=1)
            is_greedy &= (is_best | ~is_target[:, part]).all(dim=1)
        return zip(logprob, is_greedy, scores[:, -1], strict=True)

    def autocast(self):
        """Returns the context of lm_eval's argument `mixed_precision_dtype`."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def batch_size_at(self, position: int, requests: Sequence[ScoreRequest]) -> int:
        """Returns the batch size from `position` on. Searches `batch_schedule` times, since requests get shorter."""
        part = int(position * self.batch_schedule / len(requests))
        if part not in self.batch_sizes:
            self.batch_sizes[part] = self.largest_batch_size(requests[position])
        return self.batch_sizes[part]

    def largest_batch_size(self, request: ScoreRequest) -> int:
        """Returns the largest batch size, up to `max_batch_size`, with which copies of a request fit in memory."""

        def try_batch_size(batch_size: int) -> int:
            self._score([request] * batch_size)
            return batch_size

        size = find_executable_batch_size(try_batch_size, self.max_batch_size)()
        logging.getLogger("lm_eval").info(f"Largest batch size: {size}")
        return size


def num_beams(settings: dict) -> int:
    return settings.get("num_beams") or 1


def evaluate_model(model_dir: str, flags: list[str]):
    """Runs lm_eval's command on a model, with further flags of that command."""
    setup_logging()
    check_kind(model_dir)
    # JSON, so that lm_eval does not parse the folder's name; it adds the model_args in `flags`
    flags = [*flags, "--model", "phase15", "--model_args", json.dumps({"pretrained": model_dir})]
    sys.argv = ["eval_lm.py", "run", *flags]  # where lm_eval's command reads its flags
    cli_evaluate()


__all__ = ["Phase15LM", "evaluate_model"]
