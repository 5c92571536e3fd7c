# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
tests/test_recall.py with one thing changed: how many steps until the facts are known over 32, 64, …, 512 tokens.

    python experiments_recall.py IDEA [--seed 0] [--learning_rate 1e-3] [--alpha_learning_rate 3e-2] [--joint] …
"""

import argparse
import json
import sys
import tempfile

import torch
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


sys.path.insert(0, "tests")
import test_recall as task
import train_sft
from experiments import IDEAS
from modeling_phase15 import Phase15ForCausalLM


parser = argparse.ArgumentParser()
parser.add_argument("idea", choices=list(IDEAS))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--alpha_learning_rate", type=float, default=3e-2)
parser.add_argument("--llm_learning_rate", type=float, default=1e-3)
parser.add_argument("--joint", action="store_true")
parser.add_argument("--max_steps", type=int, default=1500)
parser.add_argument("--sinks", type=int, default=8)
parser.add_argument("--slots", type=int, default=16)
parser.add_argument("--layers", type=int, default=1)
parser.add_argument("--start", type=int, default=32, help="the first distance")
parser.add_argument("--bptt_chunks", type=int)
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(args.seed)
folder = tempfile.mkdtemp()
config = LlamaConfig(
    vocab_size=task.FILLER + task.FILLERS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
stream = task.RecallStream(64, [0, 4, 8])
stream.generator.manual_seed(args.seed)
stream.longest = 8
settings = TrainingArguments(folder, max_steps=250, per_device_train_batch_size=64, learning_rate=2e-3, **task.QUIET)
base = LlamaForCausalLM(config)
Trainer(base, settings, train_dataset=stream, data_collator=task.without_query_lengths).train()
base.save_pretrained(folder)

model = Phase15ForCausalLM.from_base(
    folder, num_soft_tokens=args.slots, num_sink_tokens=args.sinks, chunk_length=16, hypernet_hidden_size=64,
    hypernet_num_hidden_layers=args.layers, hypernet_num_attention_heads=4, hypernet_intermediate_size=256,
)  # fmt: skip
model.llm.requires_grad_(args.joint)
distances = [d for d in (16, 32, 64, 128, 256, 512) if d >= args.start]
stream = task.RecallStream(32, distances)
stream.generator.manual_seed(args.seed + 100)
settings = train_sft.Phase15TrainingArguments(
    folder, max_steps=args.max_steps, per_device_train_batch_size=32, learning_rate=args.learning_rate,
    alpha_learning_rate=args.alpha_learning_rate, llm_learning_rate=args.llm_learning_rate,
    lr_scheduler_type="constant_with_warmup", warmup_steps=50, bptt_chunks=args.bptt_chunks, **task.QUIET,
)  # fmt: skip
trainer = IDEAS[args.idea](model, settings, train_dataset=stream, data_collator=default_collate)
curriculum = task.Curriculum(stream)
trainer.add_callback(curriculum)
trainer.train()
result = {"steps": trainer.state.global_step, "longest": stream.longest, "known_at_512": task.accuracy(model, 512)}
print(json.dumps(vars(args) | result))
