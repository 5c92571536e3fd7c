# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
What the soft prompt carries: loss on the same validation records, in nats per answer token and by chunk index, of

    the model              what was trained
    Δ = 0                  its LLM behind the sliding window alone
    soft prompt at sp_0    every chunk predicted from the query's soft prompt: no recursion
    full context           its LLM on the whole query and answer, as an ordinary causal LM
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_phase15 import HyperNetwork, Phase15ForCausalLM


@torch.no_grad()
def compare(model: Phase15ForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, dict]:
    """
    Measures the four variants, with the model in evaluation mode.

    Args:
        model (`Phase15ForCausalLM`): the trained model.
        batches (iterable of `dict`): of a [`Phase15DataCollator`].

    Returns:
        `dict`: for each variant `loss` (nats per answer token), `loss_by_chunk` (the same by chunk index) and
        `tokens_by_chunk`.
    """
    model.eval()
    sums = defaultdict(lambda: defaultdict(float))  # variant -> chunk index -> nats
    counts = defaultdict(lambda: defaultdict(int))
    for batch in tqdm(batches, desc="Comparing"):
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        variants = {"the model": chunk_losses(model, batch)}
        with no_delta(model):
            variants["Δ = 0"] = chunk_losses(model, batch)
        variants["soft prompt at sp_0"] = first_soft_prompt_losses(model, batch)
        variants["full context"] = full_context_losses(model.llm, batch, model.config.chunk_length)
        for variant, losses in variants.items():
            for chunk, nats, tokens in losses:
                sums[variant][chunk] += nats
                counts[variant][chunk] += tokens
    return {
        variant: {
            "loss": sum(sums[variant].values()) / sum(counts[variant].values()),
            "loss_by_chunk": [sums[variant][chunk] / tokens for chunk, tokens in sorted(counts[variant].items())],
            "tokens_by_chunk": [tokens for _, tokens in sorted(counts[variant].items())],
        }
        for variant in sums
    }


@contextmanager
def no_delta(model: Phase15ForCausalLM) -> Iterator[None]:
    """Sets Δ to zero, exactly: only the window of `carry` is left."""
    alphas = [module.alpha for module in model.modules() if isinstance(module, HyperNetwork)]
    kept = [alpha.detach().clone() for alpha in alphas]
    for alpha in alphas:
        alpha.data.zero_()
    try:
        yield
    finally:
        for alpha, value in zip(alphas, kept, strict=True):
            alpha.data.copy_(value)


def chunk_losses(model: Phase15ForCausalLM, batch: dict[str, torch.Tensor]) -> list[tuple[int, float, int]]:
    """The model's own loss: (chunk index, sum in nats, answer tokens) of each chunk index."""
    outputs = model(**batch, skip_logits=True)
    sums = zip(outputs.chunk_losses.tolist(), outputs.chunk_tokens.tolist(), strict=True)
    return [(chunk, nats, tokens) for chunk, (nats, tokens) in enumerate(sums)]


def first_soft_prompt_losses(
    model: Phase15ForCausalLM, batch: dict[str, torch.Tensor]
) -> list[tuple[int, float, int]]:
    """As `chunk_losses`, with every chunk put right behind the query, so that it is predicted from sp_0."""
    is_target = batch["labels"] != -100
    answer_index = is_target.cumsum(dim=1) - 1
    chunk = torch.where(is_target, answer_index // model.config.chunk_length, -1)
    losses = []
    for index in range(int(chunk.max()) + 1):
        has_chunk = (chunk == index).any(dim=1)
        mask = batch["attention_mask"].bool() & (~is_target | (chunk == index))  # query and this chunk
        outputs = model(
            batch["input_ids"][has_chunk],
            attention_mask=mask[has_chunk],
            labels=batch["labels"][has_chunk],
            skip_logits=True,
        )
        losses.append((index, outputs.chunk_losses.sum().item(), outputs.chunk_tokens.sum().item()))
    return losses


def full_context_losses(
    llm: PreTrainedModel, batch: dict[str, torch.Tensor], chunk_length: int
) -> list[tuple[int, float, int]]:
    """As `chunk_losses`, of an ordinary causal LM, or of an adapter on one, with query and answer in its context."""
    logits = llm(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    nats, tokens = (sums.tolist() for sums in sums_by_chunk(logits, batch["labels"], chunk_length))
    return list(zip(range(len(nats)), nats, tokens, strict=True))


def sums_by_chunk(
    logits: torch.Tensor, labels: torch.LongTensor, chunk_length: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Cross-entropy of an ordinary causal LM, by the index of the chunk that each answer token would be in.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_virtual_tokens + sequence_length, vocab_size)`):
            Of `labels` behind the virtual tokens of prompt tuning, or behind none.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 for no target.
        chunk_length (`int`): answer tokens of a chunk.

    Returns:
        sums in nats and numbers of answer tokens, each of shape `(num_chunks,)`.
    """
    logits, targets = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    is_target = targets != -100
    losses = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="none")
    chunk = ((is_target.cumsum(dim=1) - 1) // chunk_length)[is_target]
    return losses.new_zeros(int(chunk.max()) + 1).index_add_(0, chunk, losses), torch.bincount(chunk)


@torch.no_grad()
def measure_rival(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], chunk_length: int
) -> dict[str, float | list]:
    """A row as of `compare`: of a Phase15 model its own loss, of another causal LM that with full context."""
    model.eval()
    sums, counts = defaultdict(float), defaultdict(int)  # by chunk index
    for batch in tqdm(batches, desc="Measuring"):
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        is_phase15 = isinstance(model, Phase15ForCausalLM)
        losses = chunk_losses(model, batch) if is_phase15 else full_context_losses(model, batch, chunk_length)
        for chunk, nats, tokens in losses:
            sums[chunk] += nats
            counts[chunk] += tokens
    return {
        "loss": sum(sums.values()) / sum(counts.values()),
        "loss_by_chunk": [sums[chunk] / tokens for chunk, tokens in sorted(counts.items())],
        "tokens_by_chunk": [tokens for _, tokens in sorted(counts.items())],
    }


def table(results: dict[str, dict]) -> str:
    """The results in Markdown."""
    tokens = sum(next(iter(results.values()))["tokens_by_chunk"])
    rows = [f"| {variant} | {result['loss']:.4f} |" for variant, result in results.items()]
    return "\n".join([f"| validation, {tokens:,} answer tokens | nats per token |", "|---|---|", *rows])


def plot(results: dict[str, dict], path: str | Path):
    """Draws the loss by chunk index into a picture file."""
    with picture(path) as axes:
        for variant, result in results.items():
            axes.plot(result["loss_by_chunk"], marker="o", markersize=3, label=f"{variant} ({result['loss']:.3f})")
        axes.set(xlabel="chunk index", ylabel="nats per answer token", title="Validation loss by chunk")
        axes.legend()


def plot_training(log_history: list[dict], path: str | Path):
    """Draws the loss and the share of Δ in the soft prompt's norm, by step, into a picture file."""
    logs = [log for log in log_history if "loss" in log and "delta_share" in log]
    evaluations = [log for log in log_history if "eval_loss" in log]
    with picture(path) as axes:
        axes.plot([log["step"] for log in logs], [log["loss"] for log in logs], label="training loss")
        if evaluations:
            steps, losses = [log["step"] for log in evaluations], [log["eval_loss"] for log in evaluations]
            axes.plot(steps, losses, marker="o", label="validation loss")
        axes.set(xlabel="step", ylabel="nats per answer token", title="Training")
        share = axes.twinx()
        share.plot([log["step"] for log in logs], [log["delta_share"] for log in logs], "--", color="grey")
        share.set(ylabel="share of Δ in the soft prompt's norm (dashed)", ylim=(0, None))
        axes.legend(loc="center right")


@contextmanager
def picture(path: str | Path):
    """The axes of a new picture, which is saved when the block ends; the same drawing gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


LOAD_AND_ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, query, max_new_tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert torch.isfinite(model(query).logits).all(), "the logits are not finite"
mask = torch.ones_like(query)
output = model.generate(query, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
tokenizer.decode(output[0])
print(json.dumps(output[0, query.shape[1]:].tolist()))
"""


def answer_in_new_process(folder: str | Path, query: list[int], max_new_tokens: int) -> list[int]:
    """
    What a saved model answers, greedily, where nothing is known of this repository: in a new process, in another
    folder, with an empty module cache and no network.

    Args:
        folder (`str` or `Path`): where the model, its code and its tokenizer are.
        query (`list[int]`): token ids.
        max_new_tokens (`int`): tokens of the answer, at most.

    Returns:
        `list[int]`: the answer's token ids.

    Raises:
        ValueError: if the folder cannot be loaded or does not answer, with the last line of the process's error.
    """
    here = Path(__file__).resolve().parent
    python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with TemporaryDirectory() as elsewhere:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in python_path if Path(path).resolve() != here),
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
        }
        arguments = [str(Path(folder).resolve()), json.dumps(query), str(max_new_tokens)]
        command = [sys.executable, "-c", LOAD_AND_ANSWER, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{folder} cannot be loaded and used in a new process: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
