# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
lm-evaluation-harness for a Phase15 model, in the form it was trained in: the context is the query, read into the soft
prompt, and the continuation is predicted from there, chunk by chunk.

    pip install -r requirements-extra.txt
    python eval_lm.py --model_dir outputs/quickstart --tasks hellaswag --limit 100 --batch_size 8
    python eval_lm.py --model_dir outputs/quickstart --tasks mine --include_path FOLDER --output_path results
    python eval_lm.py --help                              every flag: all but --model_dir are lm_eval's own

    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks hellaswag

The last command evaluates the same model without this file, as a causal LM over text: there the query is the first
token, and lm_eval cuts what is longer than the base's `max_position_embeddings`. Here nothing is cut.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import find_executable_batch_size
from lm_eval._cli.run import Run
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import pad_and_concat
from lm_eval.utils import setup_logging
from tqdm.auto import tqdm
from transformers import AutoConfig

from configuration_phase15 import Phase15Config
from modeling_phase15 import Phase15ForCausalLM


AutoConfig.register(Phase15Config.model_type, Phase15Config)  # the code here, not the copy in the model's folder

PREDICTIONS = 4096  # logits computed at a time: memory stays bounded, but each time the recursion runs anew
QUERY_END = -1  # no token's id

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation


@register_model("phase15")
class Phase15LM(HFLM):
    """lm_eval's Hugging Face model, with its arguments (`pretrained`, `dtype`, `peft`, …) except `max_length`."""

    AUTO_MODEL_CLASS = Phase15ForCausalLM
    max_length = 10**12  # the recursion reads a context of any length: nothing is cut, no window rolls

    def _get_backend(self, *args, **kwargs):
        pass  # it is "causal", but lm_eval knows that of transformers' own classes only

    def _create_tokenizer(self, *args, **kwargs):
        super()._create_tokenizer(*args, **kwargs)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no end token (`eos_token`): lm_eval ends answers "
                "with it and, where there is no BOS token, puts it before text without a context."
            )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context.endswith("\n"):
            return super()._encode_pair(context, continuation)
        # lm_eval moves white space from the context's end into the continuation, where it may begin a word's token. A
        # line break does not, and it ends the queries that chat templates make: there it stays, as in training.
        query = self.tok_encode(context)
        return query, self.tok_encode(context + continuation)[len(query) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = [self.tok_encode(request.args[0]) for request in requests]
        rows = [(None, [self.prefix_token_id], tokens) for tokens in documents if tokens]
        answers = iter(self._loglikelihood_tokens(rows, disable_tqdm))
        logprobs = [next(answers)[0] if tokens else 0.0 for tokens in documents]
        for request, logprob in zip(requests, logprobs, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return logprobs

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Requests that differ in their last token alone share a row. HFLM would also if their queries ended elsewhere.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: [*request[1], QUERY_END, *request[2][:-1]],
        )
        is_auto, self.batch_sizes = self.batch_size == "auto", {}  # found anew for the lengths of these requests
        batches = order.get_batched(0 if is_auto else self.batch_size, self._batch_scheduler if is_auto else None)
        answers, progress = [], tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
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
        """Of each request: log-probability of all its continuation but the last token, whether greedy decoding gives
        that, and the log-probabilities `(vocab_size,)` of the last token."""
        rows = [torch.tensor(context + tokens[:-1], device=self.device) for _, context, tokens in batch]
        ones, width = [torch.ones_like(row) for row in rows], max(map(len, rows))
        input_ids, mask = (pad_and_concat(width, tensors, padding_side="left") for tensors in (rows, ones))
        query_lengths, lengths = torch.tensor([(len(c), len(t)) for _, c, t in batch], device=self.device).T
        column, targets = torch.arange(width, device=self.device), input_ids.roll(-1, dims=1)
        is_target = (column >= width - lengths[:, None]) & (column < width - 1)  # the last column's is no input
        logprob, is_greedy = 0, True
        for kept in column[-int(lengths.max()) :].split(max(1, PREDICTIONS // len(batch))):
            with torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                outputs = self.model(input_ids, attention_mask=mask, query_lengths=query_lengths, logits_to_keep=kept)
            scores = F.log_softmax(outputs.logits, dim=-1, dtype=self.softmax_dtype or torch.float32)  # (B, kept, V)
            chosen = scores.gather(2, targets[:, kept, None]).squeeze(2)
            best = scores.argmax(dim=2) == targets[:, kept]
            logprob += chosen.masked_fill(~is_target[:, kept], 0).sum(dim=1)
            is_greedy &= (best | ~is_target[:, kept]).all(dim=1)
        return zip(logprob, is_greedy, scores[:, -1], strict=True)

    def _detect_batch_size(self, requests: list[Request] | None = None, pos: int = 0) -> int:
        # without requests it is asked for generation, whose memory does not grow with the length
        sizes = self.config.max_query_length, self.config.chunk_length
        probe = requests[pos] if requests else (None, *([0] * size for size in sizes))

        def fits(batch_size: int) -> int:
            self._score([probe] * batch_size)
            return batch_size

        return find_executable_batch_size(fits, self.max_batch_size)()


def main(argv: list[str]):
    commands = argparse.ArgumentParser().add_subparsers()
    Run.create(commands)
    parser = commands.choices["run"]
    parser.usage, parser.epilog = "python eval_lm.py --model_dir DIR --tasks TASK … [options of lm_eval]", None
    parser.add_argument("--model_dir", required=True, metavar="DIR", help="Folder or Hub id of a Phase15 model")
    args = parser.parse_args(argv)
    if args.model is not None:
        raise ValueError("`--model` cannot be given: it is phase15. For other models there is lm_eval itself.")
    if not Path(args.model_dir).is_dir() and args.model_dir.count("/") != 1:
        raise ValueError(f"{args.model_dir}: no such folder, and no USER/NAME on the Hub.")
    model_type = Phase15Config.get_config_dict(args.model_dir)[0].get("model_type")
    if model_type != Phase15Config.model_type:
        raise ValueError(f"{args.model_dir} is no Phase15 model, but of model_type {model_type!r}.")
    args.model, args.model_args = "phase15", {**(args.model_args or {}), "pretrained": args.model_dir}
    del args.model_dir  # lm_eval knows no such field
    args.func(args)


if __name__ == "__main__":
    setup_logging()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        logging.getLogger("lm_eval").debug("", exc_info=error)  # LMEVAL_LOG_LEVEL=DEBUG shows where it came from
        raise SystemExit(f"eval_lm.py: {' '.join(str(error).split())}") from error
