# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Training with a teacher: a causal LM that sees the whole query and the answer so far."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phase15.evaluation.losses import sums_by_chunk
from phase15.loading import PHASE15, load_any, load_tokenizer, resolve_source
from phase15.model.batch_phase15 import query_lengths_from_labels
from phase15.training.trainer import Phase15Trainer, target_columns


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> PreTrainedModel:
    """
    Returns a frozen teacher.

    Args:
        name (`str`): a causal LM (folder, Hub id or `.gguf` file), a PEFT adapter on one, or a Phase15 model, whose
            LLM is the teacher.
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        dtype (`str`): of the weights.

    Raises:
        ValueError: for a folder without a model, or one with another vocabulary than the student's.
    """
    try:
        source = resolve_source(name)
        model = load_any(source, dtype)
        if source.kind == PHASE15:
            model = model.llm
        vocabulary = load_tokenizer(source).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(f"`distill` is {name}, which cannot be loaded: {error}") from error
    student_vocabulary = tokenizer.get_vocab()
    if vocabulary != student_vocabulary:
        num_equal = len(vocabulary.items() & student_vocabulary.items())
        raise ValueError(
            f"`distill` is {name}, but its vocabulary is not the student's: {len(vocabulary):,} tokens and "
            f"{len(student_vocabulary):,}, of which {num_equal:,} are the same."
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
    Returns (1 − share) · cross-entropy + share · T² · KL(teacher ‖ student), where the KL has all logits divided by T
    (Hinton et al. 2015, arXiv 1503.02531); summed over target tokens and divided by their number.

    Args:
        outputs: of the student, with logits `(batch_size, num_columns, vocab_size)` of the columns with a target.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 for none.
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_columns, vocab_size)`): of the same columns.
        share (`float`): from 0, only cross-entropy, to 1, only the teacher.
        temperature (`float`): T.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): the divisor; this batch's targets by default.
    """
    _, targets = target_columns(labels)
    is_target = targets != -100
    student = outputs.logits[is_target].float()  # (num_targets, V)
    teacher = teacher_logits[is_target].float()
    losses = (1 - share) * F.cross_entropy(student, targets[is_target], reduction="none")
    student_log_probs = (student / temperature).log_softmax(dim=-1)
    teacher_log_probs = (teacher / temperature).log_softmax(dim=-1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(dim=-1)
    losses = losses + share * temperature**2 * divergence
    if num_items_in_batch is None:
        num_items_in_batch = len(losses)
    return losses.sum() / num_items_in_batch


class DistillationTrainer(Phase15Trainer):
    """
    A [`Phase15Trainer`] whose model or window baseline learns from a teacher too. Logs by chunk and evaluation are
    cross-entropy, as without a teacher.

    Args:
        teacher (`PreTrainedModel`): a causal LM with the student's vocabulary.
        share (`float`): the teacher's share of the loss, from 0 to 1.
        temperature (`float`): of both distributions.
    """

    def __init__(self, *args, teacher: PreTrainedModel, share: float, temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device)
        self.share = share
        self.temperature = temperature

    def compute_loss(self, model, inputs, *args, **kwargs):
        """
        Overrides Trainer to compute the teacher's logits of the same tokens. Trainer's `compute_loss_func` then takes
        the labels away from the model, which therefore needs `query_lengths`.
        """
        self.compute_loss_func = None
        if model.training:
            labels = inputs["labels"]
            mask = inputs["attention_mask"]
            columns, _ = target_columns(labels)
            with torch.no_grad(), self.accelerator.autocast():
                outputs = self.teacher(
                    inputs["input_ids"], attention_mask=mask, logits_to_keep=columns, use_cache=False
                )
            self.compute_loss_func = partial(
                distillation_loss,
                teacher_logits=outputs.logits,
                share=self.share,
                temperature=self.temperature,
            )
            inputs = {**inputs, "query_lengths": query_lengths_from_labels(labels, mask), "logits_to_keep": columns}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def model_kwargs(self, model) -> dict:
        return {**super().model_kwargs(model), "skip_logits": not model.training}

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.compute_loss_func is None:  # in evaluation, the model has returned the sums itself
            return super().chunk_sums(labels, outputs)
        _, targets = target_columns(labels)
        return sums_by_chunk(outputs.logits.detach(), targets, self.config.chunk_length)


__all__ = ["DistillationTrainer", "load_teacher"]
