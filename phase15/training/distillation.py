# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Training with a teacher: a causal LM that sees the whole query and the answer so far."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phase15.evaluation.losses import sums_by_chunk
from phase15.loading import PHASE15, kind_of, load_any, load_phase15, load_tokenizer
from phase15.model.base_phase15 import split_gguf
from phase15.model.batch_phase15 import query_lengths_from_labels
from phase15.training.trainer import Phase15Trainer, target_columns


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> PreTrainedModel:
    """
    A frozen teacher.

    Args:
        name (`str`): a causal LM (folder, Hub id or `.gguf` file), a PEFT adapter on one, or a Phase15 model, of
            which the LLM is taken.
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        dtype (`str`): of the weights.

    Raises:
        ValueError: for a folder without a model, or one with another vocabulary than the student's.
    """
    try:
        if kind_of(name) == PHASE15:
            model, own = load_phase15(name, dtype)
            model = model.llm
        else:
            folder, gguf_file = split_gguf(name)
            model, own = load_any(name, dtype), load_tokenizer(folder, gguf_file=gguf_file)
    except (OSError, ValueError) as error:
        raise ValueError(f"`distill` is {name}, which cannot be loaded: {error}") from error
    if own.get_vocab() != tokenizer.get_vocab():
        same = len(own.get_vocab().items() & tokenizer.get_vocab().items())
        raise ValueError(
            f"`distill` is {name}, but its vocabulary is not the student's: {len(own):,} tokens and "
            f"{len(tokenizer):,}, of which {same:,} are the same."
        )
    return model.requires_grad_(False).eval()


def distillation_loss(
    outputs,
    labels: torch.LongTensor,
    teacher_logits: torch.Tensor,
    share: float,
    temperature: float,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    (1 − share) · cross-entropy + share · T² · KL(teacher ‖ student), both with logits divided by T in the second term
    (Hinton et al. 2015, arXiv 1503.02531); summed over target tokens and divided by their number.

    Args:
        outputs: of the student; its logits `(batch_size, num_columns, vocab_size)`, of the columns with a target.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 for none.
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_columns, vocab_size)`): of the same columns.
        share (`float`): from 0, cross-entropy alone, to 1, the teacher alone.
        temperature (`float`): T.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): the divisor; this batch's targets by default.
    """
    _, targets = target_columns(labels)
    is_target = targets != -100
    student, teacher = outputs.logits[is_target].float(), teacher_logits[is_target].float()
    losses = (1 - share) * F.cross_entropy(student, targets[is_target], reduction="none")
    students, teachers = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    divergence = F.kl_div(students, teachers, reduction="none", log_target=True).sum(dim=-1)
    losses = losses + share * temperature**2 * divergence
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


class DistillationTrainer(Phase15Trainer):
    """
    A [`Phase15Trainer`] whose model, or whose window, learns from a teacher too. Logs by chunk and evaluation are
    cross-entropy, as without a teacher.

    Args:
        teacher (`PreTrainedModel`): a causal LM with the student's vocabulary.
        share (`float`): of the loss that is the teacher's.
        temperature (`float`): of both distributions.
    """

    def __init__(self, *args, teacher: PreTrainedModel, share: float, temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.share, self.temperature = teacher.to(self.args.device), share, temperature

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Overrides Trainer to ask the teacher about the same tokens, through its own hook for losses."""
        self.compute_loss_func = None
        if model.training:
            ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
            columns, _ = target_columns(labels)
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.teacher(ids, attention_mask=mask, logits_to_keep=columns, use_cache=False).logits
            settings = {"share": self.share, "temperature": self.temperature}
            self.compute_loss_func = partial(distillation_loss, teacher_logits=logits, **settings)
            inputs = {**inputs, "query_lengths": query_lengths_from_labels(labels, mask), "logits_to_keep": columns}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def model_kwargs(self, model) -> dict:
        return {**super().model_kwargs(model), "skip_logits": not model.training}

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.compute_loss_func is None:
            return super().chunk_sums(labels, outputs)
        _, targets = target_columns(labels)
        return sums_by_chunk(outputs.logits.detach(), targets, self.config.chunk_length)


__all__ = ["DistillationTrainer", "load_teacher"]
