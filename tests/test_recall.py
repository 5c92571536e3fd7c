# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The recursion carries information: four facts are given at the start and asked for 512 tokens later, when the window
has long lost them. A tiny LLM that answers from its context is frozen, and the HyperNetwork alone is trained.

    python -m pytest -s tests/test_recall.py        minutes on a CPU; -m "not slow" leaves it out elsewhere
"""

import pytest
import torch
from torch.utils.data import IterableDataset, default_collate
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_phase15 import Phase15ForCausalLM
from phase15 import arguments, evaluation
from phase15.trainer import Phase15Trainer


SLOTS, SINKS, CHUNK = 16, 8, 16
FACTS, VALUES, FILLERS = 4, 16, 32  # each fact has one of 16 values of its own: chance is 1/16
START, ASK = 0, 1
NAME = torch.arange(2, 2 + FACTS)
VALUE = 2 + FACTS + torch.arange(FACTS * VALUES).view(FACTS, VALUES)
FILLER = 2 + FACTS + FACTS * VALUES
QUERY = SINKS + 2 * FACTS  # the sinks keep the stream's first tokens whatever happens, so no fact may be there
LAST, LONGEST = 3 * FACTS, 512
ANSWERS = slice(-LAST + 2, None, 3)  # where the values stand in what follows the filler: name, value; name, value; …


def recall_rows(num_rows: int, distance: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """
    `[start × 8, (name, value) × 4, filler × distance, (ask, name, value) × 4]`, both times in a random order. The
    query is what comes before the filler, the targets are the last four values.
    """

    def draw(high, *shape):
        return torch.randint(high, (num_rows, *shape), generator=generator)

    def shuffled(pairs):
        order = torch.rand(num_rows, FACTS, generator=generator).argsort(dim=1)
        return pairs.gather(1, order[..., None].expand_as(pairs))

    values = VALUE[torch.arange(FACTS), draw(VALUES, FACTS)]
    facts = torch.stack([NAME.expand_as(values), values], dim=2)
    questions = torch.stack([torch.full_like(values, ASK), *shuffled(facts).unbind(2)], dim=2)
    start = torch.full((num_rows, SINKS), START)
    parts = [start, shuffled(facts).flatten(1), FILLER + draw(FILLERS, distance), questions.flatten(1)]
    input_ids = torch.cat(parts, dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, ANSWERS] = input_ids[:, ANSWERS]
    return {"input_ids": input_ids, "labels": labels, "query_lengths": torch.full((num_rows,), QUERY)}


class RecallStream(IterableDataset):
    """Endless rows in blocks of a batch; half of them at the longest distance so far, the others at shorter ones."""

    def __init__(self, batch_size: int, distances: list[int]):
        self.batch_size, self.distances = batch_size, distances
        self.longest = distances[0]
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        while True:
            shorter = [distance for distance in self.distances if distance <= self.longest]
            index = torch.randint(2 * len(shorter), (), generator=self.generator).clamp(max=len(shorter) - 1)
            rows = recall_rows(self.batch_size, shorter[index], self.generator)
            yield from ({name: values[i] for name, values in rows.items()} for i in range(self.batch_size))


@torch.no_grad()
def accuracy(model: Phase15ForCausalLM, distance: int, num_rows: int = 256) -> float:
    """Share of the values that the model says; a guess is right one time in 16."""
    rows = recall_rows(num_rows, distance, torch.Generator().manual_seed(1))
    logits = model.eval()(rows["input_ids"], query_lengths=rows["query_lengths"], logits_to_keep=LAST + 1).logits
    said = logits[:, :-1][:, ANSWERS].argmax(dim=-1)
    return (said == rows["input_ids"][:, ANSWERS]).float().mean().item()


class Curriculum(TrainerCallback):
    """Doubles the distance when the model answers at the present one, and stops when it does at the longest."""

    def __init__(self, stream: RecallStream):
        self.stream = stream

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % 50 == 0:
            share = accuracy(model, self.stream.longest)
            print(f"step {state.global_step}: {share:.1%} at a distance of {self.stream.longest}")
            if share > (0.96 if self.stream.longest == LONGEST else 0.9):
                control.should_training_stop = self.stream.longest == LONGEST
                self.stream.longest = min(2 * self.stream.longest, LONGEST)
            model.train()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A Llama that answers such questions from its context, by ordinary training on short texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=FILLER + FILLERS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("base")
    stream = RecallStream(64, [0, 4, 8])
    stream.longest = 8
    args = TrainingArguments(folder, max_steps=250, per_device_train_batch_size=64, learning_rate=2e-3, **QUIET)
    model = LlamaForCausalLM(config)
    Trainer(model, args, train_dataset=stream, data_collator=without_query_lengths).train()
    model.save_pretrained(folder)
    return str(folder)


def without_query_lengths(rows):
    return default_collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])


QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000, "use_cpu": True}


@pytest.mark.slow
def test_recall_over_512_tokens(base, tmp_path):
    torch.manual_seed(0)
    model = Phase15ForCausalLM.from_base(
        base,
        num_soft_tokens=SLOTS,
        num_sink_tokens=SINKS,
        chunk_length=CHUNK,
        hypernet_hidden_size=64,
        hypernet_num_hidden_layers=1,
        hypernet_num_attention_heads=4,
        hypernet_intermediate_size=256,
    )
    frozen = {name: value.clone() for name, value in model.llm.requires_grad_(False).state_dict().items()}
    assert accuracy(model, 0) > 0.95, "the base must know what to do with facts that it sees"
    assert accuracy(model, LONGEST) < 0.12

    stream = RecallStream(32, [32, 64, 128, 256, 512])
    args = arguments.Phase15TrainingArguments(
        tmp_path,
        max_steps=1500,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        alpha_learning_rate=3e-2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        **QUIET,
    )
    trainer = Phase15Trainer(model, args, train_dataset=stream, data_collator=default_collate)
    trainer.add_callback(Curriculum(stream))
    trainer.train()

    assert all(torch.equal(value, frozen[name]) for name, value in model.llm.state_dict().items())
    share = accuracy(model, LONGEST, num_rows=512)
    with evaluation.no_delta(model):
        guessed = accuracy(model, LONGEST, num_rows=512)
    print(f"after {trainer.state.global_step} steps: {share:.1%}; without Δ {guessed:.1%}")
    assert share > 0.9
    assert guessed < 0.12, "without Δ it must be a guess"
