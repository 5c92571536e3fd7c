# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""`Phase15Trainer`, whose loss unrolls the chunks, with its meters; and a trainer of full-context baselines."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from phase15.cli.files import sync
from phase15.evaluation.losses import sums_by_chunk
from phase15.model.adapter_phase15 import relative_base
from phase15.model.base_phase15 import SIZES
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import Phase15HyperNetwork, SoftPrompt
from phase15.training.checkpoints import (
    Phase15CheckpointError,
    explain_write_errors,
    load_tensors_only,
    write_manifest,
)


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
        self.delta_norm = torch.zeros((), device=device)
        self.soft_prompt_norm = torch.zeros((), device=device)
        self.started = time.perf_counter()

    def add_loss(self, losses: torch.Tensor, tokens: torch.Tensor):
        """Adds sums and target tokens by chunk index. Chunks after the last meter count in the last."""
        index = torch.arange(len(losses), device=losses.device).clamp(max=len(self.chunk_losses) - 1)
        self.chunk_losses.index_add_(0, index, losses)
        self.chunk_tokens.index_add_(0, index, tokens.float())

    def add_delta(self, delta: torch.Tensor, carried: SoftPrompt, old: SoftPrompt, tokens, token_length, *_):
        """Adds the norms of one call of the HyperNetwork, without rows that read no token, since they do not step."""
        is_stepping = (token_length > 0)[:, None, None]

        def sum_norms(value: torch.Tensor) -> torch.Tensor:
            # one norm for each row, so that the sum does not depend on the batches of a process
            return (value * is_stepping).float().flatten(1).norm(dim=1).sum()

        self.delta_norm += sum_norms(delta)
        self.soft_prompt_norm += sum_norms(carried.embeds.detach() + delta)

    def read(self, accelerator) -> dict[str, float]:
        """Returns the metrics over all processes."""
        losses = accelerator.reduce(self.chunk_losses, "sum").tolist()
        tokens = accelerator.reduce(self.chunk_tokens, "sum").tolist()
        delta_norm = accelerator.reduce(self.delta_norm, "sum").item()
        soft_prompt_norm = accelerator.reduce(self.soft_prompt_norm, "sum").item()
        metrics = {"loss": sum(losses) / max(sum(tokens), 1)}
        for index, (loss, num_tokens) in enumerate(zip(losses, tokens, strict=True)):
            if num_tokens:
                metrics[f"loss_chunk_{index:02}"] = loss / num_tokens
        metrics["delta_share"] = delta_norm / max(soft_prompt_norm, 1e-12)
        metrics["target_tokens_per_second"] = round(sum(tokens) / (time.perf_counter() - self.started), 1)
        return metrics


def check_optimizer(args: TrainingArguments, model: torch.nn.Module):
    """Raises a ValueError for an optimizer or a schedule that cannot be made. Trainer makes them too late."""
    settings = {"optim": getattr(args.optim, "value", args.optim), "optim_args": args.optim_args}
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
        schedule = args.lr_scheduler_type
        settings = {
            "lr_scheduler_type": getattr(schedule, "value", schedule),
            "lr_scheduler_kwargs": args.lr_scheduler_kwargs,
        }
        get_scheduler(schedule, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except Exception as error:  # of any package
        values = ", ".join(f"`{name}` is {value}" for name, value in settings.items() if value)
        raise ValueError(f"{values}: {error}") from error


class Phase15Trainer(Trainer):
    """
    A [`~transformers.Trainer`] whose loss unrolls the chunks of the answers. HyperNetwork and LLM have their own
    learning rates, and every log has the loss by chunk index (nats per answer token), the share of Δ in the soft
    prompt's norm, and target tokens per second.

    Args:
        config (`Phase15Config`, *optional*): chunk length and answer length; the model's config by default.

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
            if isinstance(module, Phase15HyperNetwork):
                module.register_forward_hook(lambda _, inputs, delta: self.meters.add_delta(delta.detach(), *inputs))

    def _prepare_fsdp(self):
        """
        Makes the LLM's layers the only units. All processes gather a unit's parameters together, at every call, but
        the number of calls of the HyperNetwork depends on the batch of a process. So it is gathered once a step, with
        the rest of the model.
        """
        plugin = self.accelerator.state.fsdp_plugin
        model = next(module for module in self.model.modules() if isinstance(module, Phase15ForCausalLM))
        layers = [module for module in model.llm.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"FSDP shards `GradientCheckpointingLayer`s, but {type(model.llm).__name__} has none.")
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        policy = plugin.mixed_precision_policy
        if policy:
            # accelerate's policy would round summed gradients, the loss, and its divisor
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def gather_model(self) -> Phase15ForCausalLM | None:
        """
        Returns the whole model on the main process, `None` on the others; all processes must call this. A sharded
        model cannot be saved: FSDP has replaced its class, and torch's code would be saved beside the weights.
        """
        weights = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return None
        model = Phase15ForCausalLM.from_pretrained(
            None, config=self.model.config, state_dict=weights, dtype=self.model.dtype
        )
        model.generation_config = self.model.generation_config
        model.saves_base = self.accelerator.unwrap_model(self.model).saves_base
        return model.to(self.args.device)

    def _new_meters(self) -> Phase15Meters:
        num_chunks = math.ceil(self.config.max_answer_length / self.config.chunk_length)
        return Phase15Meters(num_chunks, self.args.device)

    def model_kwargs(self, model) -> dict:
        """Returns the arguments of the model besides the batch."""
        return {"skip_logits": True, "bptt_chunks": self.args.bptt_chunks if model.training else None}

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns summed loss and number of target tokens by chunk index, each of shape `(num_chunks,)`."""
        return outputs.chunk_losses, outputs.chunk_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Overrides Trainer to fill the meters, and to raise an error for a loss that is not finite."""
        inputs = {**inputs, **self.model_kwargs(model)}
        records = inputs.pop("records", None)
        labels = inputs["labels"]
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
        """Overrides Trainer to give the mean loss over answer tokens instead of over batches."""
        training_meters = self.meters
        self.meters = self._new_meters()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.meters.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.meters = training_meters
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Overrides Trainer to leave out records that accelerate repeats to fill the last batches."""
        state = self.accelerator.gradient_state
        meters = self.meters
        num_rows = len(inputs["input_ids"])
        if state.end_of_dataloader and state.remainder > 0:  # `remainder` rows of the last global batch are new
            first = self.args.process_index * self.args.eval_batch_size
            num_rows = min(max(state.remainder - first, 0), num_rows)
        if not num_rows:  # FSDP needs a forward on every process; meters that are thrown away do not count its row
            self.meters = self._new_meters()
            num_rows = 1
        inputs = {name: values[:num_rows] for name, values in inputs.items()}
        output = super().prediction_step(model, inputs, *args, **kwargs)
        self.meters = meters
        return output

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """
        Overrides Trainer to give HyperNetwork (or the prompt of prompt tuning), α and LLM their own learning rates,
        and no weight decay to norms and α.
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
                if is_alpha:
                    rate = self.args.alpha_learning_rate
                elif is_prompt:
                    rate = self.args.learning_rate
                else:
                    rate = self.args.llm_learning_rate
                decay = self.args.weight_decay if name in decays and not is_alpha else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
            # the HyperNetwork's first: Trainer logs the rate of the first group
            ordered = sorted(groups.items(), key=lambda group: group[0][0] != self.args.learning_rate)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in ordered],
                **kwargs,
            )
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Overrides Trainer to load no checkpoint as a pickle, and to take no step if the checkpoint has them all."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self.steps_before = 0
        if folder:
            self.steps_before = TrainerState.load_from_json(Path(folder, "trainer_state.json")).global_step
            self.check_alpha(folder)
        with load_tensors_only(folder or self.args.output_dir):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_alpha(self, folder: str | Path):
        """Raises an error if the checkpoint's model used the sign of α and this one does not, or the reverse."""
        if not Path(folder, "config.json").is_file():  # an adapter, or shards
            return
        values, _ = Phase15Config.get_config_dict(folder)
        if values.get("model_type") != Phase15Config.model_type:
            return
        expected = Phase15Config.from_dict(values).hypernet_signed_alpha
        actual = self.config.hypernet_signed_alpha
        if actual != expected:
            raise Phase15CheckpointError(
                f"cannot resume from {folder}: it was trained with `hypernet_signed_alpha` {expected}, and the model "
                f"has {actual}. Give --hypernet_signed_alpha {str(expected).lower()}."
            )

    def set_initial_training_values(self, *args, **kwargs) -> tuple:
        """
        Overrides Trainer to run zero epochs if the checkpoint has all steps. Trainer would take one more step if an
        epoch is left: in the middle of an epoch, and on a stream, for which it counts epochs without end.
        """
        num_train_epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self.steps_before >= max_steps:
            num_train_epochs = 0
        return num_train_epochs, *others, max_steps

    def save_model(self, output_dir: str | None = None, *args, **kwargs):
        """Overrides Trainer to leave out its arguments, a pickle that nothing reads."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:  # not in FSDP's checkpoints
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            add_sizes(folder, self.accelerator.unwrap_model(self.model))

    def save_final_model(self, merge_adapter: bool = False):
        """
        Saves the trained model into the output folder, atomically. All processes must call this.

        Returns:
            the model in memory, without adapters' wrappers. With FSDP, only the main process gets the whole model.
        """
        output_dir = Path(self.args.output_dir)
        staging = output_dir / ".saving"
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and merge_adapter:
            model = model.merge_and_unload()
            self.model = model
        with explain_write_errors(output_dir, staging):
            if self.args.should_save and staging.exists():  # left by a run that was killed while it saved
                shutil.rmtree(staging)
            if not self.is_fsdp_enabled:
                self.save_model(str(staging))
            else:
                gathered = self.gather_model()
                if gathered is not None:
                    model = gathered
                    self.model = model
                    model.save_pretrained(staging)
                    self.processing_class.save_pretrained(staging)
            if self.args.should_save:
                make_base_relative(staging, output_dir)
                for path in staging.iterdir():
                    sync(path)
                    os.replace(path, output_dir / path.name)
                staging.rmdir()
            self.save_state()
        if isinstance(model, PeftModel) and isinstance(model.get_base_model(), Phase15ForCausalLM):
            return model.get_base_model()
        return model

    def _save_checkpoint(self, model, trial):
        """Overrides Trainer to complete the checkpoint by a manifest before older ones are removed."""
        args = self.args
        output_dir = Path(args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(output_dir, folder):
            if folder.exists() and args.should_save:
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            limit = args.save_total_limit
            args.save_total_limit = None  # otherwise Trainer removes older checkpoints before this one has a manifest
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if args.should_save:
                write_manifest(folder)
                rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()


def make_base_relative(staging: Path, output_dir: Path):
    """Names a base that lies inside the output folder by its path from there, so that both can move."""
    path = staging / "config.json"
    if not path.is_file():  # an adapter of PEFT
        return
    values = json.loads(path.read_text("utf-8"))
    if values.get("base_digest") is not None:
        values["base_model_name_or_path"] = relative_base(values["base_model_name_or_path"], output_dir)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_sizes(folder: Path, model: torch.nn.Module):
    """Puts the sizes of the recursion beside the weights of an adapter, which has no config of the model."""
    path = folder / "adapter_model.safetensors"
    if isinstance(model, PeftModel) and isinstance(model.get_base_model(), Phase15ForCausalLM) and path.is_file():
        sizes = torch.tensor([getattr(model.get_base_model().config, name) for name in SIZES])
        save_file(load_file(path) | {"base_model.model.model.hypernet.sizes": sizes}, path, metadata={"format": "pt"})


class FullContextTrainer(Phase15Trainer):
    """
    Trains a baseline without chunks, an ordinary causal LM or an adapter on one, with the transformers loss. Logs,
    evaluation and learning rates are those of [`Phase15Trainer`]. `config` is required.
    """

    def model_kwargs(self, model) -> dict:
        return {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Overrides Trainer to compute logits only in columns with a target."""
        inner = self.accelerator.unwrap_model(model)
        is_prompt = isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning
        if not is_prompt:  # prompt tuning adds columns in front, which would shift the indices
            columns, targets = target_columns(inputs["labels"])
            inputs = {**inputs, "logits_to_keep": columns, "shift_labels": targets}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def chunk_sums(self, labels: torch.LongTensor, outputs) -> tuple[torch.Tensor, torch.Tensor]:
        logits = outputs.logits.detach()
        columns, targets = target_columns(labels)
        if logits.shape[1] >= labels.shape[1]:  # of all columns, after those of a tuned prompt
            logits = logits[:, -labels.shape[1] :][:, columns]
        return sums_by_chunk(logits, targets, self.config.chunk_length)


def target_columns(labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Returns the columns that predict a target in some row, of shape `(num_columns,)`, and the tokens that they predict,
    of shape `(batch_size, num_columns)`, -100 for none. The last column is never among them.
    """
    # column t predicts the label of column t + 1
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    columns = (targets != -100).any(dim=0).nonzero()[:, 0]
    return columns, targets[:, columns]


__all__ = ["FullContextTrainer", "Phase15Trainer", "check_optimizer", "target_columns"]
