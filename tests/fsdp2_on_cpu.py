# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
train_sft.py under FSDP2 on CPUs, for tests/training/test_distributed.py. accelerate shards a run on any kind of
accelerator, but not on CPUs, though torch's FSDP2 works there; so this declares the CPUs to be accelerators. Needs
`--use_cpu --accelerator_config '{"use_configured_state": true}'`, or Trainer would forget it.
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
script = str(Path(__file__).parent.parent / "train_sft.py")
sys.path[0] = str(Path(script).parent)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
