# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Supervised fine-tuning of a Phase15 model, chunk by chunk with teacher forcing.

    python train_sft.py                                   recipes/quickstart.yaml: minutes on two CPU cores, offline
    python train_sft.py recipes/tinyllama_stage1.yaml     HyperNetwork alone, the LLM frozen
    python train_sft.py recipes/tinyllama_stage2.yaml     then both, starting from stage 1's output
    python train_sft.py recipes/smollm2_gsm8k.yaml --model_name_or_path FILE.gguf --dataset_name gsm8k_train.jsonl
    python train_sft.py recipes/tinyllama_stage2.yaml --rival window      what the model has to beat, on the same data
    python train_sft.py --help                            every flag; flags override the recipe
    accelerate launch --config_file recipes/accelerate_ddp.yaml train_sft.py RECIPE     on several GPUs; or _fsdp2.yaml

A run that was killed resumes from its last complete checkpoint when the same command is given again. SIGTERM or Ctrl-C
ends it after the step under way, with a checkpoint.
"""

import atexit
import difflib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

import eval_sft
from checkpoint_sft import (
    Phase15CheckpointError,
    StopOnSignal,
    checkpoints_in,
    find_checkpoint,
    loading,
    sync,
    write_manifest,
    write_text,
    writing,
)
from configuration_phase15 import Phase15Config
from data_sft import (
    Phase15DataCollator,
    Phase15RecordError,
    Phase15Stream,
    load_records,
    load_tokenizer,
    split_stream,
    stream_encoder,
    stream_records,
    tokenize,
    train_tokenizer,
)
from modeling_phase15 import HyperNetwork, HyperNetworkLayer, Phase15ForCausalLM, SoftPrompt


logger = logging.get_logger("phase15.train")
QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"
RIVALS = {"window": "full", "full_context": "full", "prompt_tuning": "hypernet", "lora": "hypernet"}  # of which stage


@dataclass
class Phase15ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The base LLM (Hub id, folder or .gguf file), or a Phase15 model to go on with."},
    )
    base_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of a LlamaConfig: without model_name_or_path, the size of a new Llama and tokenizer."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights in training; use bf16 to compute in it."})
    stage: str = field(
        default="full",
        metadata={
            "help": "What is trained: hypernet (LLM frozen), full (both), lora (HyperNetwork and LoRA on the LLM).",
            "choices": ["hypernet", "full", "lora"],
        },
    )
    rival: str | None = field(
        default=None,
        metadata={
            "help": "Train a rival of the stage's model instead. Of full: window (the LLM behind the sliding window, "
            "Δ = 0) or full_context (the LLM as an ordinary causal LM). Of hypernet: prompt_tuning (num_soft_tokens "
            "virtual tokens, at learning_rate) or lora, both by PEFT with the full context.",
            "choices": list(RIVALS),
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapter."})
    num_soft_tokens: int | None = field(default=None, metadata={"help": "This and what follows: see Phase15Config."})
    num_sink_tokens: int | None = None
    chunk_length: int | None = None
    max_query_length: int | None = None
    max_answer_length: int | None = None
    hypernet_hidden_size: int | None = None
    hypernet_num_hidden_layers: int | None = None
    hypernet_num_attention_heads: int | None = None
    hypernet_intermediate_size: int | None = None

    @property
    def config_fields(self) -> dict:
        """The fields of [`Phase15Config`] that were given."""
        names = [f.name for f in fields(self) if f.name in Phase15Config.__annotations__]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class Phase15DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A JSONL, JSON, CSV or Parquet file, a Hub id, or python-docstrings (see data_sft.py)."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub data set to train on."})
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the records, the last, kept to validate."}
    )
    max_validation_records: int | None = field(
        default=None,
        metadata={"help": "Validate on so many of them; of a stream, which has no share, on the first so many."},
    )
    shuffle_records: bool = field(
        default=False,
        metadata={"help": "Shuffle the records before they are split; what a stream trains on, within a buffer."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the records while training, in their order and again and again, instead of before it: for "
            "JSONL, CSV or Parquet files ('data/*.jsonl') and Hub data sets that do not fit. Needs max_steps and "
            "max_validation_records."
        },
    )


@dataclass
class Phase15TrainingArguments(TrainingArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the HyperNetwork, or of prompt tuning."})
    llm_learning_rate: float = field(default=3e-5, metadata={"help": "Of the LLM, or of its LoRA."})
    alpha_learning_rate: float = field(
        default=1e-2, metadata={"help": "Of α, which scales Δ and starts at zero: at the others' it would stay there."}
    )
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Stop the gradient through the recursion after every so many chunks."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "torch.compile the layers of LLM and HyperNetwork (torch_compile: all)."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where output_dir holds a finished run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator decides what it needs."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every step uses all of them."})


class Phase15ProgressCallback(ProgressCallback):
    """Trainer's progress bar; the losses by chunk go to the trackers and `trainer_state.json` only."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {name: value for name, value in (logs or {}).items() if "loss_chunk" not in name}
        super().on_log(args, state, control, logs=logs, **kwargs)


class Phase15Meters:
    """Sums over the steps since the last reading: loss by chunk index, norms of Δ and of the soft prompt."""

    def __init__(self, num_chunks: int, device: torch.device):
        self.chunk_losses = torch.zeros(num_chunks, device=device)
        self.chunk_tokens = torch.zeros(num_chunks, device=device)
        self.norms = torch.zeros(2, device=device)
        self.started = time.perf_counter()

    def add_loss(self, losses: torch.Tensor, tokens: torch.Tensor):
        index = torch.arange(len(losses), device=losses.device).clamp(max=len(self.chunk_losses) - 1)
        self.chunk_losses.index_add_(0, index, losses)
        self.chunk_tokens.index_add_(0, index, tokens.float())

    def add_delta(self, delta: torch.Tensor, carried: SoftPrompt, old: SoftPrompt, tokens, token_length):
        """What a call of the HyperNetwork gave and was given; rows without a token do not step."""
        reads = (token_length > 0)[:, None, None]
        soft_prompt = carried.embeds.detach() + delta
        # of each row, so that the sums do not depend on which rows a process has in a batch
        norms = [(value * reads).float().flatten(1).norm(dim=1).sum() for value in (delta, soft_prompt)]
        self.norms += torch.stack(norms)

    def read(self, accelerator) -> dict[str, float]:
        """The metrics, over all processes."""
        losses, tokens, (delta, soft_prompt) = (
            accelerator.reduce(meter, "sum").tolist() for meter in (self.chunk_losses, self.chunk_tokens, self.norms)
        )
        return {
            "loss": sum(losses) / max(sum(tokens), 1),
            **{f"loss_chunk_{i:02}": x / n for i, (x, n) in enumerate(zip(losses, tokens, strict=True)) if n},
            "delta_share": delta / max(soft_prompt, 1e-12),
            "target_tokens_per_second": round(sum(tokens) / (time.perf_counter() - self.started), 1),
        }


class Phase15Trainer(Trainer):
    """
    A [`~transformers.Trainer`] whose loss unrolls the chunks of the answers. HyperNetwork and LLM have their own
    learning rates, and every log has the loss by chunk index (nats per answer token), the share of Δ in the soft
    prompt's norm, and target tokens per second.

    Args:
        config (`Phase15Config`, *optional*): says how long chunks and answers are; the model's own by default.

    Raises:
        FloatingPointError: when the loss is not finite, naming the step and the records of the batch.
    """

    def __init__(self, *args, config: Phase15Config | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.config = self.model.config if config is None else config
        if self.pop_callback(ProgressCallback):
            self.add_callback(Phase15ProgressCallback)
        self.meters = self._new_meters()
        self.steps_before = 0
        if self.is_fsdp_enabled:
            self._prepare_fsdp()
        for module in self.model.modules():
            if isinstance(module, HyperNetwork):
                module.register_forward_hook(lambda _, inputs, delta: self.meters.add_delta(delta.detach(), *inputs))

    def _prepare_fsdp(self):
        """
        Units are the LLM's layers alone. A unit gathers its parameters at every call, on all processes together, but
        how often the HyperNetwork is called depends on the process's own batch: with the rest of the model, it is
        gathered once for all steps.
        """
        plugin = self.accelerator.state.fsdp_plugin
        model = next(module for module in self.model.modules() if isinstance(module, Phase15ForCausalLM))
        layers = [module for module in model.llm.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"FSDP shards `GradientCheckpointingLayer`s, but {type(model.llm).__name__} has none.")
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        if policy := plugin.mixed_precision_policy:
            # accelerate's rounds gradients that are summed, the loss, and the number of tokens that divides it
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def gather_model(self) -> Phase15ForCausalLM | None:
        """
        The whole model, on the main process alone; all processes must call this. What FSDP has sharded cannot be saved
        as it is: its class is one that torch made, and the code beside the weights would be torch's.
        """
        weights = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return None
        config, dtype = self.model.config, self.model.dtype
        model = Phase15ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        model.generation_config = self.model.generation_config
        return model.to(self.args.device)

    def _new_meters(self) -> Phase15Meters:
        num_chunks = math.ceil(self.config.max_answer_length / self.config.chunk_length)
        return Phase15Meters(num_chunks, self.args.device)

    def model_kwargs(self, model) -> dict:
        """What the model is given besides the batch."""
        return {"skip_logits": True, "bptt_chunks": self.args.bptt_chunks if model.training else None}

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of target tokens, each of shape `(num_chunks,)`, by chunk index."""
        return outputs.chunk_losses, outputs.chunk_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, **self.model_kwargs(model)}
        records, labels = inputs.pop("records", None), inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not torch.isfinite(loss):
            numbers = "unknown" if records is None else ", ".join(map(str, records.tolist()))
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in a batch of the records {numbers}"
            )
        self.meters.add_loss(*self.chunk_sums(labels, outputs))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs = {**self.meters.read(self.accelerator), **logs}
            self.meters = self._new_meters()
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As Trainer's, but the loss is the mean over answer tokens instead of over batches."""
        training_meters, self.meters = self.meters, self._new_meters()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.meters.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.meters = training_meters
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As Trainer's, without the records that accelerate repeats so that every process has a last batch."""
        state, meters, num_rows = self.accelerator.gradient_state, self.meters, len(inputs["input_ids"])
        if state.end_of_dataloader and state.remainder > 0:
            first = self.args.process_index * self.args.eval_batch_size
            num_rows = min(max(state.remainder - first, 0), num_rows)
        if not num_rows:  # the others count theirs, and FSDP needs this process too
            self.meters, num_rows = self._new_meters(), 1
        inputs = {name: values[:num_rows] for name, values in inputs.items()}
        output = super().prediction_step(model, inputs, *args, **kwargs)
        self.meters = meters
        return output

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """
        HyperNetwork (or the prompt of prompt tuning), α and the LLM have learning rates of their own; weight decay
        spares norms and α.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            decays = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                is_prompt = not {"hypernet", "prompt_encoder"}.isdisjoint(name.split("."))
                is_alpha = name.endswith(".alpha")
                rate = self.args.learning_rate if is_prompt else self.args.llm_learning_rate
                rate = self.args.alpha_learning_rate if is_alpha else rate
                decay = self.args.weight_decay if name in decays and not is_alpha else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
            # Trainer logs the rate of the first group: the HyperNetwork's
            ordered = sorted(groups.items(), key=lambda group: group[0][0] != self.args.learning_rate)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in ordered],
                **kwargs,
            )
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Overrides Trainer to load no checkpoint as a pickle, and to take no step if the checkpoint has them all."""
        output_dir, folder = self.args.output_dir, resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(output_dir)
        before = TrainerState.load_from_json(Path(folder, "trainer_state.json")) if folder else TrainerState()
        self.steps_before = before.global_step
        with loading(folder or output_dir):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, *args, **kwargs) -> tuple:
        """
        Overrides Trainer to go through no epoch if the checkpoint has all steps. Trainer would take one more where an
        epoch is left: in the middle of one, and on a stream, for which it counts epochs without end.
        """
        num_train_epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self.steps_before >= max_steps:
            num_train_epochs = 0
        return num_train_epochs, *others, max_steps

    def save_model(self, output_dir: str | None = None, *args, **kwargs):
        """Overrides Trainer to leave out its arguments: a pickle, which nothing reads."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:  # FSDP's checkpoints do not have it
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        """Overrides Trainer to complete the checkpoint by a manifest before older ones are removed."""
        args, wait = self.args, self.accelerator.wait_for_everyone
        output_dir = Path(args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        with writing(output_dir, folder):
            if folder.exists() and args.should_save:
                shutil.rmtree(folder)
            wait()
            limit, args.save_total_limit = args.save_total_limit, None  # Trainer would remove them before
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.save_total_limit = limit
            wait()
            if args.should_save:
                write_manifest(folder)
                rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint)
            wait()


class FullContextTrainer(Phase15Trainer):
    """
    Trains a rival without chunks, an ordinary causal LM or an adapter on one, with the library's own loss. It is a
    [`Phase15Trainer`] so that logs, evaluation and learning rates are the same; needs that one's `config`.
    """

    def model_kwargs(self, model) -> dict:
        return {}

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return eval_sft.sums_by_chunk(outputs.logits.detach(), labels, self.config.chunk_length)


def parse_args(
    argv: list[str],
) -> tuple[Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments, dict]:
    """
    Arguments of a run: a recipe, `recipes/NAME.yaml` or `--config recipes/NAME.yaml`, then flags that override it.
    The recipe is the quickstart when there is neither a recipe nor a model or data set.

    Returns:
        the arguments, and the recipe that alone would give them: all values that are not the defaults.

    Raises:
        ValueError: for a recipe that is missing or not a mapping, or for a key of it that does not exist.
    """
    parser = Phase15Parser((Phase15ModelArguments, Phase15DataArguments, Phase15TrainingArguments))
    parser.add_argument("recipe", nargs="?", help="a YAML file with values for the flags below")
    parser.add_argument("--config", help="the same as recipe")
    defaults = vars(parser.parse_args([]))
    known, _ = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    recipe = known.recipe or known.config
    if recipe is None and known.model_name_or_path is None and known.dataset_name is None:
        recipe = QUICKSTART
    if recipe is not None:
        parser.set_defaults(**read_recipe(recipe, parser))
        try:
            parser.parse_args([])
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from error
    arguments = parser.parse_args(argv)
    if arguments.stage not in ("hypernet", "full", "lora"):  # argparse does not check defaults, and so recipes
        raise ValueError(f"`stage` is {arguments.stage!r}, but it must be hypernet, full or lora.")
    check_rival(arguments)
    check_values(arguments)
    if not 0 <= arguments.validation_split < 1:
        raise ValueError(f"`validation_split` is {arguments.validation_split}, but it must be from 0 to below 1.")
    outputs = []
    for cls in parser.dataclass_types:
        outputs.append(cls(**{f.name: getattr(arguments, f.name) for f in fields(cls) if f.init}))
    not_in_recipe = ("recipe", "config", "hub_token")  # a token is nobody else's business
    recipe = {name: value for name, value in vars(arguments).items() if value != defaults[name]}
    return *outputs, {name: value for name, value in recipe.items() if name not in not_in_recipe}


class Phase15Parser(HfArgumentParser):
    """An `HfArgumentParser` whose errors are a line, without the usage of more than a hundred flags."""

    def error(self, message: str):
        found = re.match(r"unrecognized arguments: --(\w+)", message)
        raise ValueError(message + (did_you_mean(found[1], argument_names(self)) if found else ""))


def argument_names(parser: HfArgumentParser) -> list[str]:
    return [f.name for cls in parser.dataclass_types for f in fields(cls) if f.init]


def did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def read_recipe(path: str | Path, parser: HfArgumentParser) -> dict:
    """The values of a recipe, for argparse to check as those of flags."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such recipe.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flags to values, not a {type(values).__name__}.")
    names = argument_names(parser)
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{path}: unknown key {name!r}{did_you_mean(name, names)}")
        kinds = {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
        if isinstance(value, list | dict) or value is None:
            if type(value) not in kinds:
                kind = "null" if value is None else f"a {type(value).__name__}"
                raise ValueError(f"{path}: `{name}` is {kind}, but one value was expected.")
        else:
            values[name] = str(value)  # which argparse converts, or refuses
    return values


LEAST = {
    "learning_rate": 0,
    "llm_learning_rate": 0,
    "alpha_learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "bptt_chunks": 1,
    "max_validation_records": 0,
}


def check_values(arguments):
    """Refuses values that the libraries would refuse too, but only when the run has begun, or not at all."""
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:  # nan is refused too
            raise ValueError(f"`{name}` is {value}, but it must be {least} or more.")
    if arguments.max_steps < 1 and not arguments.num_train_epochs > 0:
        raise ValueError(f"`num_train_epochs` is {arguments.num_train_epochs}, but it must be above 0.")
    if arguments.push_to_hub:
        raise ValueError(
            "`push_to_hub` would upload the arguments as a pickle, the token among them; when the run has ended: "
            f"python push_to_hub.py --model_dir {arguments.output_dir} --repo_id USER/NAME."
        )
    eval_sft.check_dtype(arguments.dtype)
    if arguments.output_dir is not None:
        eval_sft.check_output_dir(arguments.output_dir)
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` is {checkpoint}, but that is no folder of a checkpoint.")


def check_rival(args):
    """Refuses a rival that is none of the stage's."""
    if args.rival is None:
        return
    if args.rival not in RIVALS:
        raise ValueError(f"`rival` is {args.rival!r}, but it must be {', '.join(RIVALS)}.")
    if args.stage != RIVALS[args.rival]:
        raise ValueError(
            f"`rival` is {args.rival}, which goes with stage {RIVALS[args.rival]}, but `stage` is {args.stage}."
        )
    if args.merge_adapter:
        raise ValueError("`merge_adapter` is for stage lora; a rival's adapter is saved as it is.")


def load_model(args: Phase15ModelArguments, records) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """The model that `args` describe, ready for its stage, and its tokenizer."""
    name = args.model_name_or_path
    if name is None and not args.base_config:
        raise ValueError(
            "`model_name_or_path` is missing: a base LLM or a Phase15 model (or `base_config` for a new one)."
        )
    if name is None:
        try:
            base_config = json.loads(args.base_config) if isinstance(args.base_config, str) else args.base_config
        except ValueError as error:
            raise ValueError(f"`base_config` is not JSON: {error}") from error
        check_base_config(base_config)
        tokenizer = train_tokenizer(records, base_config.get("vocab_size", 2048))
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        text_config = LlamaConfig(**base_config | ids | {"vocab_size": len(tokenizer)})
        model = Phase15ForCausalLM(Phase15Config(text_config=text_config, **args.config_fields))
    elif name.endswith(".gguf") and not Path(name).is_file():
        raise ValueError(f"{name}: no such file.")
    elif is_phase15(name):
        model = Phase15ForCausalLM.from_pretrained(name, dtype=args.dtype)
        tokenizer = load_tokenizer(name, config=model.config)  # with it, no code of the folder is run
        for key, value in args.config_fields.items():
            if value != getattr(model.config, key):
                raise ValueError(f"`{key}` is {value}, but {name} was made with {getattr(model.config, key)}.")
    else:
        model = Phase15ForCausalLM.from_base(name, dtype=args.dtype, **args.config_fields)
        folder, gguf_file = os.path.split(os.path.abspath(name)) if name.endswith(".gguf") else (name, None)
        tokenizer = load_tokenizer(folder, gguf_file=gguf_file)
        if gguf_file:  # whose end token transformers 5.17 takes for the start token
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.text_config.eos_token_id)
    if args.stage == "hypernet":
        model.llm.requires_grad_(False)
    elif args.stage == "lora":
        model = get_peft_model(model, lora_config(args, target_modules=r"llm\..*_proj", modules_to_save=["hypernet"]))
    return model, tokenizer


def check_base_config(base_config: dict):
    """Refuses what is no field of a LlamaConfig, which would take it and not use it."""
    if not isinstance(base_config, dict):
        raise ValueError(
            f"`base_config` is a {type(base_config).__name__}, but fields of a LlamaConfig were expected."
        )
    names = [f.name for f in fields(LlamaConfig)]
    for name in base_config:
        if name not in names:
            raise ValueError(f"`base_config`: unknown field {name!r}{did_you_mean(name, names)}")
    if not isinstance(size := base_config.get("vocab_size", 2048), int) or size < 1:
        raise ValueError(f"`base_config`: `vocab_size` is {size!r}, but it must be a positive integer.")


def lora_config(args: Phase15ModelArguments, **kwargs) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, **kwargs
    )


def make_rival(model: Phase15ForCausalLM, args: Phase15ModelArguments) -> PreTrainedModel | PeftModel:
    """The rival that `args` ask for, made of `model`'s own weights."""
    if args.rival == "window":
        model.hypernet.requires_grad_(False)
        model.hypernet.alpha.data.zero_()
        # the Δ that α = 0 gives, without the work
        model.hypernet.forward = lambda carried, *_: torch.zeros_like(carried.embeds)
        return model
    if args.rival == "full_context":
        return model.llm
    if args.rival == "lora":
        return get_peft_model(model.llm, lora_config(args, target_modules=r".*_proj"))
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=model.config.num_soft_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",  # by default it starts far larger than embeddings are
    )
    return get_peft_model(model.llm, prompt)


def compile_layers(model: torch.nn.Module):
    """
    Compiles the layers of LLM and HyperNetwork, in place: one compilation each, since all layers of a kind share it,
    and none of what is between them, whose shapes change with the batch.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | HyperNetworkLayer):
            module.compile()


def is_phase15(name: str) -> bool:
    if name.endswith(".gguf"):
        return False
    return Phase15Config.get_config_dict(name)[0].get("model_type") == Phase15Config.model_type


def check_streaming(
    model_args: Phase15ModelArguments, data_args: Phase15DataArguments, training_args: Phase15TrainingArguments
):
    """Refuses what needs all records at once."""
    if training_args.max_steps < 1:
        raise ValueError("`max_steps` is missing: `streaming` data has no length that could give it.")
    if data_args.validation_split and data_args.max_validation_records is None:
        raise ValueError(
            "`max_validation_records` is missing: `streaming` data has no length to keep a share of. The first so "
            "many records validate; none do with 0."
        )
    if model_args.model_name_or_path is None and model_args.base_config:
        raise ValueError(
            "`base_config` trains a tokenizer on all records, which `streaming` data does not hold at once; give "
            "`model_name_or_path`."
        )
    if training_args.dataloader_num_workers > 1:
        raise ValueError(
            f"`dataloader_num_workers` is {training_args.dataloader_num_workers}, but `streaming` data is read in its "
            "order, by one at most."
        )


def check_processes(model_args: Phase15ModelArguments, training_args: Phase15TrainingArguments):
    """Refuses launches of several processes that would not train together."""
    if training_args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but there is no GPU, and each would train alone; "
            "add --use_cpu to train together on CPUs."
        )
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if training_args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise ValueError("accelerate has no FSDP without GPUs; use recipes/accelerate_ddp.yaml.")
        if model_args.stage == "lora":
            raise ValueError("`stage` is lora, which is not supported under FSDP; use recipes/accelerate_ddp.yaml.")
        if model_args.rival:
            raise ValueError("`rival` is not supported under FSDP; use recipes/accelerate_ddp.yaml.")


def prepare(argv: list[str]) -> tuple[Phase15Trainer, Phase15ModelArguments, dict]:
    """Everything that can fail because of the input, before the first step."""
    model_args, data_args, training_args, recipe = parse_args(argv)
    if data_args.dataset_name is None:
        raise ValueError(
            "`dataset_name` is missing: a JSONL, JSON, CSV or Parquet file, a Hub id, or python-docstrings."
        )
    finished = Path(training_args.output_dir) / "results.json"
    if finished.exists() and not training_args.overwrite_output_dir:
        raise ValueError(
            f"{training_args.output_dir} holds a finished run; give another --output_dir or --overwrite_output_dir."
        )
    if data_args.streaming:
        check_streaming(model_args, data_args, training_args)
        if training_args.accelerator_config.dispatch_batches is None:
            # or the main process would join the batches of all, which fails where they are padded to other lengths
            training_args.accelerator_config.dispatch_batches = False
    check_processes(model_args, training_args)
    if not training_args.should_log:  # one process on each machine is enough
        logging.get_logger("phase15").setLevel(logging.ERROR)
        disable_progress_bars()
    set_seed(training_args.seed)
    name, num_validation = data_args.dataset_name, data_args.max_validation_records
    with training_args.main_process_first(desc="data"):
        load = stream_records if data_args.streaming else load_records
        records = load(name, data_args.dataset_config, data_args.dataset_train_split)
        model, tokenizer = load_model(model_args, records)
        config = model.config
        if not data_args.streaming:
            dataset = tokenize(records, tokenizer, config.max_answer_length, name, config.text_config.vocab_size)
            if data_args.shuffle_records:  # after they were numbered
                dataset = dataset.shuffle(seed=training_args.seed)
    if model_args.rival:
        model = make_rival(model, model_args)
    if training_args.compile_layers:
        compile_layers(model)
    pad_token_id = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    if data_args.streaming:
        vocab_size = config.text_config.vocab_size
        encode = stream_encoder(records, tokenizer, config.max_answer_length, name, vocab_size)
        collator = Phase15DataCollator(pad_token_id, encode=encode)
        num_validation = num_validation if data_args.validation_split else 0
        seed = training_args.seed if data_args.shuffle_records else None
        train_dataset, eval_dataset = split_stream(records, num_validation, seed, name)
        if eval_dataset:
            collator(eval_dataset)  # what is wrong with one of them is said now
    else:
        collator = Phase15DataCollator(pad_token_id)
        share = math.ceil(len(dataset) * data_args.validation_split)
        num_training = len(dataset) - share
        if num_training < 1:
            raise ValueError(f"{name}: of {len(dataset)} records none is left to train on.")
        num_validation = share if num_validation is None else min(num_validation, share)
        train_dataset = dataset.select(range(num_training))
        rest = range(num_training, num_training + num_validation)
        eval_dataset = dataset.select(rest) if num_validation else None
    trainer_class = Phase15Trainer if model_args.rival in (None, "window") else FullContextTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        config=config,
    )
    return trainer, model_args, recipe


def save_recipe(recipe: dict, output_dir: Path):
    """Writes `recipe.yaml`, and `recipes_before.yaml` if the model that the run starts from has a recipe itself."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    if start := recipe.get("model_name_or_path"):
        before = [Path(start, name) for name in ("recipes_before.yaml", "recipe.yaml")]
        if before := [path.read_text("utf-8") for path in before if path.is_file()]:
            write_text(output_dir / "recipes_before.yaml", "---\n".join(before))


def main(trainer: Phase15Trainer, model_args: Phase15ModelArguments, recipe: dict):
    """Trains, saves, compares and reports, or stops on a signal."""
    with StopOnSignal(trainer) as stop:
        checkpoint = prepare_output(trainer, recipe)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.has_stopped:
            if trainer.is_world_process_zero():
                print(stop.report(), flush=True)
        else:
            finish(trainer, model_args, result)
    trainer.accelerator.end_training()


def prepare_output(trainer: Phase15Trainer, recipe: dict) -> str | None:
    """Makes the run's folder ready; returns the checkpoint to resume from, if there is one."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    found, problem = [None], None
    if trainer.is_world_process_zero():
        try:
            with writing(output_dir):
                if (output_dir / "results.json").exists():  # overwrite_output_dir
                    for checkpoint in checkpoints_in(output_dir):
                        shutil.rmtree(checkpoint)
                    (output_dir / "results.json").unlink()  # last: it says that those were another run's
                found = [find_checkpoint(output_dir, args.resume_from_checkpoint)]
                save_recipe(recipe, output_dir)
        except Phase15CheckpointError as error:
            problem = f"train_sft.py: {error}"
    stop_together(problem)
    broadcast_object_list(found)
    if found[0] is None:
        return None
    logger.warning(f"Resuming from {found[0]}.")
    return str(found[0])


def save_final_model(trainer: Phase15Trainer, output_dir: Path):
    """Saves what was trained, in files that are whole or not there; all processes must call this."""
    half = output_dir / ".saving"
    with writing(output_dir, half):
        if trainer.args.should_save and half.exists():  # left by a run that was killed here
            shutil.rmtree(half)
        if not trainer.is_fsdp_enabled:
            trainer.save_model(str(half))
        elif model := trainer.gather_model():
            trainer.model = model
            model.save_pretrained(half)
            trainer.processing_class.save_pretrained(half)
        if trainer.args.should_save:
            for path in half.iterdir():
                sync(path)
                os.replace(path, output_dir / path.name)
            half.rmdir()
        trainer.save_state()


def finish(trainer: Phase15Trainer, model_args: Phase15ModelArguments, result: TrainOutput):
    """Saves what was trained, compares and reports."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.stage == "lora":
        if model_args.merge_adapter:
            trainer.model = model.merge_and_unload()
        model = trainer.model if model_args.merge_adapter else model.get_base_model()
    save_final_model(trainer, output_dir)
    if not trainer.is_world_process_zero():
        return
    if trainer.is_fsdp_enabled:
        model = trainer.model
    with writing(output_dir):
        eval_sft.plot_training(trainer.state.log_history, output_dir / "training_curve.png")
    if isinstance(trainer.train_dataset, Phase15Stream):  # what was read of it, in each pass
        num_training = trainer.state.global_step * trainer.get_total_train_batch_size(args)
    else:
        num_training = len(trainer.train_dataset)
    results = {
        "train": result.metrics,
        "steps": trainer.state.global_step,
        "records": {"training": num_training, "validation": len(trainer.eval_dataset or [])},
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "versions": {package: version(package) for package in ("transformers", "torch", "datasets", "peft")},
        "validation": {},
    }
    if trainer.eval_dataset is not None:
        loader = DataLoader(trainer.eval_dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
        with trainer.accelerator.autocast():
            if name := model_args.rival:
                results |= eval_sft.compare_rival(model, f"rival: {name}", loader, trainer.config.chunk_length)
            else:
                results |= eval_sft.compare(model, loader)
        with writing(output_dir):
            eval_sft.plot(results["validation"], output_dir / "loss_by_chunk.png")
        print(f"\n{eval_sft.table(results)}\n")
    with writing(output_dir):
        (output_dir / "evaluation.json").unlink(missing_ok=True)  # eval_sft.py's, of an earlier run's model
        write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if model_args.rival in (None, "window") and (model_args.stage != "lora" or model_args.merge_adapter):
        print(f"Saved to {output_dir}. Loaded in a new process:")
        first = trainer.data_collator([next(iter(trainer.train_dataset))])
        query = first["input_ids"][first["labels"] == -100].tolist()
        answer = eval_sft.answer_in_new_process(output_dir, query, max_new_tokens=64)
        print("Q:", trainer.processing_class.decode(query, skip_special_tokens=True).strip())
        print("A:", trainer.processing_class.decode(answer, skip_special_tokens=True))


def stop_together(problem: str | None):
    """Ends all processes if one of them has a problem. Of those that have the same one, the first tells it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if problem:
            raise SystemExit(problem)
        return
    if not torch.distributed.is_initialized():  # the problem is in the arguments themselves
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
    problems = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if problem and problem not in problems[: torch.distributed.get_rank()]:
        print(problem, file=sys.stderr, flush=True)
    if any(problems):
        torch.distributed.barrier()  # the launcher ends the others at once when the first leaves
        raise SystemExit(1)


def leave():
    """
    Ends one of several processes without taking its interpreter apart. The threads of a process group outlive the
    group where anything still refers to it, as FSDP's meshes do; and one that then lets go of a tensor aborts the
    process (https://github.com/pytorch/pytorch/pull/179291), which the launcher takes for a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run, problem = None, None
    try:
        run = prepare(sys.argv[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:  # about the input: nothing was written
        problem = f"train_sft.py: {' '.join(str(error).split())}"
    stop_together(problem)
    try:
        main(*run)
    except (FloatingPointError, Phase15RecordError, Phase15CheckpointError) as error:
        message = str(error).rpartition("Phase15RecordError: ")[2]  # of a worker's traceback, in which torch puts it
        raise SystemExit(f"train_sft.py: {' '.join(message.split())}") from error
    except KeyboardInterrupt:  # the second
        raise SystemExit(130) from None
    if run[0].args.world_size > 1:
        leave()
