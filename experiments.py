# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Ideas for context recovery, each as train_sft.py with one part replaced; docs/experiments.md says what came of them.

    python experiments.py IDEA [flags of train_sft.py]

Strengths are in the environment: STRENGTH (weight of a loss, first bias of the gate, …), TEACHER (a folder).
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import modeling_phase15
import train_sft
from modeling_phase15 import SoftPrompt


STRENGTH = float(os.environ.get("STRENGTH", 1))


class Distill(train_sft.Phase15Trainer):
    """Loss (1 - w) CE + w KL(teacher || model) per answer token; the teacher is an LLM with full context."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        folder = os.environ.get("TEACHER")
        self.teacher = AutoModelForCausalLM.from_pretrained(folder).eval() if folder else self.model.llm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        outputs = model(**batch)
        is_target = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            teacher = self.teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            teacher = teacher[is_target].float().log_softmax(-1)
        student = outputs.logits[:, :-1][is_target].float().log_softmax(-1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="sum")
        ce = F.nll_loss(student, batch["labels"][:, 1:][is_target], reduction="sum")
        loss = ((1 - STRENGTH) * ce + STRENGTH * kl) / num_items_in_batch
        self.meters.add_loss(outputs.chunk_losses, outputs.chunk_tokens)
        return (loss, outputs) if return_outputs else loss


class Reconstruct(train_sft.Phase15Trainer):
    """Adds w · mean square error of the evicted embeddings, as a small decoder reads them off the new soft prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.model
        d, h = model.config.text_config.hidden_size, model.config.hypernet_hidden_size
        width = max(model.config.num_soft_tokens, model.config.max_query_length)
        torch.manual_seed(0)
        net = model.hypernet
        net.reconstruct_q = nn.Parameter(torch.randn(width, h) * 0.2)
        net.reconstruct_kv = nn.Linear(d, 2 * h)
        net.reconstruct_out = nn.Linear(h, d)
        self.errors = []
        net.register_forward_hook(self.add_error)

    def add_error(self, net, inputs, delta):
        carried, old, tokens, token_length = inputs
        if not net.training:
            return
        config = self.model.config
        n, s = config.num_soft_tokens, config.num_sink_tokens
        stream_length = old.length + token_length
        evicted = (stream_length - n).clamp(min=0)  # the stream's places s .. s + evicted
        if not int(evicted.max()):
            return
        place = s + torch.arange(int(evicted.max()))
        source = torch.where(place < old.length[:, None], place, place - old.length[:, None] + n)
        stream = torch.cat([old.embeds, tokens], 1)
        target = stream.gather(1, source.clamp(max=stream.shape[1] - 1)[..., None].expand(-1, -1, stream.shape[-1]))
        scale = net.embedding_scale
        key, value = net.reconstruct_kv((carried.embeds + delta) / scale).chunk(2, -1)
        query = net.reconstruct_q[: len(place)].expand(len(key), -1, -1)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=carried.mask[:, None, :])
        error = (net.reconstruct_out(read) - target.detach() / scale).square().mean(-1)
        real = (torch.arange(len(place)) < evicted[:, None]) & (token_length > 0)[:, None]
        self.errors.append((error * real).sum() / real.sum().clamp(min=1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.errors = []
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.errors and model.training:
            loss = loss + STRENGTH * torch.stack(self.errors).mean() / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Keep(train_sft.Phase15Trainer):
    """The gate starts at "keep": a bias of -STRENGTH in σ(G y + b)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        gate = self.model.hypernet.gate_proj
        gate.bias = nn.Parameter(torch.full((gate.out_features,), -STRENGTH))


def learned_carry(soft_prompt: SoftPrompt, tokens, token_length, num_sinks, scorer, scale):
    """
    As `carry`, but the slots behind the sinks keep the embeddings of highest priority, in the stream's order:
    -age / (N - S) + score(embedding), which is the window as long as the scorer gives zero. Gradient: straight through
    a sigmoid around the threshold.
    """
    batch_size, n, d = soft_prompt.embeds.shape
    length = soft_prompt.length + token_length  # of the stream
    width = n + tokens.shape[1]
    place = torch.arange(width).expand(batch_size, -1)
    old = place < soft_prompt.length[:, None]
    source = torch.where(old, place, place - soft_prompt.length[:, None] + n).clamp(max=width - 1)
    stream = torch.cat([soft_prompt.embeds, tokens], 1).gather(1, source[..., None].expand(-1, -1, d))
    real = place < length[:, None]
    age = (length[:, None] - 1 - place).float()
    priority = -age / (n - num_sinks) + scorer(stream / scale).squeeze(-1)
    sink = place < num_sinks
    ranked = priority.detach().masked_fill(sink, float("inf")).masked_fill(~real, -float("inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(real).scatter(1, order[:, :n], True) & real
    chosen = ranked.gather(1, order)
    threshold = (chosen[:, n - 1] + chosen[:, min(n, width - 1)]) / 2
    full = (length > n)[:, None]
    soft = torch.sigmoid((priority - threshold.nan_to_num(0, 0, 0)[:, None]) * 4)
    gate = torch.where(full & ~sink, 1 + soft - soft.detach(), torch.ones_like(soft))
    stream = stream * gate[..., None]
    index = (~kept).long().argsort(dim=1, stable=True)[:, :n]
    carried = SoftPrompt(stream.gather(1, index[..., None].expand(-1, -1, d)), length.clamp(max=n))
    return carried._replace(embeds=carried.embeds * carried.mask[..., None])


class Evict(train_sft.Phase15Trainer):
    """A learned choice of what falls out: see learned_carry; the scorer learns at α's rate."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        net = self.model.hypernet
        d = self.model.config.text_config.hidden_size
        torch.manual_seed(0)
        net.scorer = nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, 1))
        nn.init.zeros_(net.scorer[2].weight)
        nn.init.zeros_(net.scorer[2].bias)
        modeling_phase15.carry = lambda sp, tokens, token_length, sinks: learned_carry(
            sp, tokens, token_length, sinks, net.scorer, net.embedding_scale
        )


IDEAS = {
    "none": train_sft.Phase15Trainer,
    "distill": Distill,
    "reconstruct": Reconstruct,
    "keep": Keep,
    "evict": Evict,
}


if __name__ == "__main__":
    train_sft.Phase15Trainer = IDEAS[sys.argv[1]]
    trainer, model_args, recipe = train_sft.prepare(sys.argv[2:])
    train_sft.eval_sft.answer_in_new_process = lambda *args, **kwargs: []  # the code beside the weights lacks the idea
    train_sft.main(trainer, model_args, recipe)
