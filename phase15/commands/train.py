# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Supervised fine-tuning of a Phase15 model, chunk by chunk with teacher forcing.

    phase15 train                                   recipes/quickstart.yaml: minutes on two CPU cores, offline
    phase15 train recipes/tinyllama_stage1.yaml     only the HyperNetwork, the LLM frozen
    phase15 train recipes/tinyllama_stage2.yaml     then both, starting from stage 1's output
    phase15 train recipes/smollm2_gsm8k.yaml --model_name_or_path FILE.gguf --dataset_name gsm8k_train.jsonl
    phase15 train recipes/tinyllama_stage2.yaml --baseline window      the baseline to beat
    phase15 train --help                            every flag; flags override the recipe
    accelerate launch --config_file recipes/accelerate_ddp.yaml train_sft.py RECIPE     on several GPUs; or _fsdp2.yaml

The same command resumes a run that was killed, from its last complete checkpoint. SIGTERM or Ctrl-C ends a run after
the current step, with a checkpoint. `python train_sft.py` is the same command in a checkout.
"""

import os
import sys

from phase15.cli.errors import one_line_errors
from phase15.training.arguments import check_names, print_help


def main(argv: list[str] | None = None, program: str = "phase15 train"):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print_help(program, __doc__)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # several processes agree on an error before one of them ends
        with one_line_errors(program):
            check_names(argv)
    from phase15.commands.training_run import train_all  # imports torch: seconds

    train_all(argv, program)


__all__ = ["main"]
