# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Supervised fine-tuning of a Phase15 model, chunk by chunk with teacher forcing.

    python train_sft.py                                   recipes/quickstart.yaml: minutes on two CPU cores, offline
    python train_sft.py recipes/tinyllama_stage1.yaml     HyperNetwork alone, the LLM frozen
    python train_sft.py recipes/tinyllama_stage2.yaml     then both, starting from stage 1's output
    python train_sft.py recipes/smollm2_gsm8k.yaml --model_name_or_path FILE.gguf --dataset_name gsm8k_train.jsonl
    python train_sft.py recipes/tinyllama_stage2.yaml --baseline window      what the model has to beat
    python train_sft.py --help                            every flag; flags override the recipe
    accelerate launch --config_file recipes/accelerate_ddp.yaml train_sft.py RECIPE     on several GPUs; or _fsdp2.yaml

A run that was killed resumes from its last complete checkpoint when the same command is given again. SIGTERM or Ctrl-C
ends it after the step under way, with a checkpoint.
"""

import json
import math
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import (
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from phase15.arguments import Phase15ModelArguments, check_processes, check_streaming, parse_args
from phase15.checkpoints import Phase15CheckpointError, checkpoints_in, find_checkpoint, sync, write_text, writing
from phase15.evaluation import compare, compare_baseline
from phase15.examples import Phase15DataCollator, Phase15Stream, split_stream, stream_encoder, tokenize
from phase15.models import compile_layers, load_model, make_baseline
from phase15.records import Phase15RecordError, load_records, stream_records
from phase15.reports import plot, plot_training, table
from phase15.runs import answer_in_new_process, save_recipe
from phase15.shutdown import StopOnSignal, leave, stop_together
from phase15.trainer import FullContextTrainer, Phase15Trainer


logger = logging.get_logger("phase15.train")


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
    if model_args.baseline:
        model = make_baseline(model, model_args)
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
    trainer_class = Phase15Trainer if model_args.baseline in (None, "window") else FullContextTrainer
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
        plot_training(trainer.state.log_history, output_dir / "training_curve.png")
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
            if name := model_args.baseline:
                results |= compare_baseline(model, f"baseline: {name}", loader, trainer.config.chunk_length)
            else:
                results |= compare(model, loader)
        with writing(output_dir):
            plot(results["validation"], output_dir / "loss_by_chunk.png")
        print(f"\n{table(results)}\n")
    with writing(output_dir):
        (output_dir / "evaluation.json").unlink(missing_ok=True)  # py's, of an earlier run's model
        write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if model_args.baseline in (None, "window") and (model_args.stage != "lora" or model_args.merge_adapter):
        print(f"Saved to {output_dir}. Loaded in a new process:")
        first = trainer.data_collator([next(iter(trainer.train_dataset))])
        query = first["input_ids"][first["labels"] == -100].tolist()
        answer = answer_in_new_process(output_dir, query, max_new_tokens=64)
        print("Q:", trainer.processing_class.decode(query, skip_special_tokens=True).strip())
        print("A:", trainer.processing_class.decode(answer, skip_special_tokens=True))


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
