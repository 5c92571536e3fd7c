# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 train`: plans the runs, prepares a trainer, trains, compares, reports."""

import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from phase15.cli.errors import one_line_errors
from phase15.cli.files import write_text
from phase15.data.examples import Phase15Stream, prepare_data, read_first, split_record
from phase15.data.facts import Chat, fresh_chats
from phase15.data.records import Phase15RecordError, open_records, read_texts
from phase15.evaluation.plots import plot_losses, plot_recall, plot_training
from phase15.evaluation.recall import encode_chats, format_chat, recall
from phase15.evaluation.recovery import compare, compare_baseline
from phase15.evaluation.tables import losses_table, recall_table
from phase15.evaluation.verdict import judge_recall, next_command
from phase15.hub.runs import (
    answer_in_new_process,
    check_same_run,
    held_out_settings,
    read_commit,
    read_run,
    save_recipe,
)
from phase15.model.configuration_phase15 import VERSION
from phase15.training.arguments import Phase15ModelArguments
from phase15.training.checkpoints import (
    Phase15CheckpointError,
    explain_write_errors,
    find_checkpoint,
    list_checkpoints,
)
from phase15.training.compilation import compile_layers
from phase15.training.distillation import DistillationTrainer, load_teacher
from phase15.training.models import check_config, make_baseline, make_model
from phase15.training.runs import Phase15TrainingArguments, RunParser, TrainingRun, check_together
from phase15.training.shutdown import StopOnSignal, errors_together, leave
from phase15.training.trainer import FullContextTrainer, Phase15Trainer, check_optimizer


logger = logging.get_logger("phase15.train")
CARD_DISTANCE = 128  # maximum words between facts and questions in the example of a model card
CARD_NEW_TOKENS = 64  # of the answer in a model card


def prepare(run: TrainingRun) -> Phase15Trainer:
    """Does everything that can fail because of the input, before the first step. Returns the trainer of the run."""
    run = run.renewed()
    model_args = run.model
    data_args = run.data
    training_args = run.training
    check_together(model_args, data_args, training_args)
    check_not_finished(training_args)
    if not training_args.should_log:  # one process on each machine logs
        logging.get_logger("phase15").setLevel(logging.ERROR)
        disable_progress_bars()
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="data"):
        source = (data_args.dataset_name, data_args.dataset_config, data_args.dataset_train_split)
        records = open_records(*source, data_args.streaming, facts=data_args, seed=training_args.seed)
        read_first(records, data_args.dataset_name)
        check_config(model_args)
        model, tokenizer = make_model(model_args, records)
        config = model.config
        train_dataset, eval_dataset, collator = prepare_data(data_args, training_args, records, tokenizer, config)
    if config.chunk_length >= config.max_answer_length and model_args.baseline is None:
        logger.warning(
            f"`chunk_length` is {config.chunk_length} and `max_answer_length` {config.max_answer_length}: every "
            "answer is one chunk, so only queries train the recursion."
        )
    if model_args.baseline:
        model = make_baseline(model, model_args)
    if training_args.compile_layers:
        compile_layers(model)
    check_optimizer(training_args, model)
    trainer_class = Phase15Trainer if model_args.baseline in (None, "window") else FullContextTrainer
    if model_args.distill:
        teacher = load_teacher(model_args.distill, tokenizer, model_args.dtype)
        settings = {"share": model_args.distill_share, "temperature": model_args.distill_temperature}
        trainer_class = partial(DistillationTrainer, teacher=teacher, **settings)
    try:
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
            config=config,
        )
    except RuntimeError as error:  # raised for packages that `report_to` and others ask for
        raise ValueError(str(error)) from error
    return trainer


def check_not_finished(training_args: Phase15TrainingArguments):
    if is_finished(training_args.output_dir) and not training_args.overwrite_output_dir:
        raise ValueError(
            f"{training_args.output_dir} holds a finished run; give another --output_dir or --overwrite_output_dir."
        )


def is_finished(output_dir: str | Path) -> bool:
    return Path(output_dir, "results.json").exists()


def plan(argv: list[str], program: str = "phase15 train") -> list[TrainingRun]:
    """
    Returns the runs of a command line that are still to be done, in their order: those of `after` first. A run
    that the same recipe has finished is left out, unless the run that needs it starts anew.
    """
    parser = RunParser(program)
    return plan_run(TrainingRun.parse(argv, parser), parser)


def plan_run(run: TrainingRun, parser: RunParser) -> list[TrainingRun]:
    """Returns a run, after those that it needs."""
    check_together(run.model, run.data, run.training)
    check_not_finished(run.training)
    before = run.run_before(parser)
    if before is None:
        return [run]
    folder = before.training.output_dir
    is_reusable = is_finished(folder) and read_run(folder).recipes[:1] == [before.recipe]
    if is_reusable and not is_finished(run.training.output_dir):
        logger.warning(f"{folder} holds the finished run of {before.path}.")
        return [run]
    return [*plan_run(before, parser), run]


def train(trainer: Phase15Trainer, run: TrainingRun, program: str = "phase15 train") -> bool:
    """Trains, saves, compares and reports, or stops on a signal. Returns `True` if training completed."""
    recipe = run.recipe
    with StopOnSignal(trainer) as stop:
        checkpoint = prepare_output(trainer, recipe, program)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.has_stopped:
            if trainer.is_world_process_zero():
                print(stop.report(), flush=True)
        else:
            model = trainer.save_final_model(merge_adapter=run.model.merge_adapter)
            if trainer.is_world_process_zero():
                held_out = held_out_settings(run.data, run.training)
                texts = read_texts(recipe.get("facts_text"))
                results = evaluate_and_report(trainer, model, run.model, result, held_out, texts)
                example = show_answers(trainer, run, held_out, texts)
                if example is not None:
                    save_results(trainer, results | {"example": example})
                report_verdict(results, run)
    return not stop.has_stopped


def prepare_output(trainer: Phase15Trainer, recipe: dict, program: str) -> str | None:
    """Makes the folder of the run ready; returns the checkpoint to resume from, if there is one."""
    args = trainer.args
    output_dir = Path(args.output_dir)
    checkpoint = None
    with errors_together(program, Phase15CheckpointError):
        if trainer.is_world_process_zero():
            with explain_write_errors(output_dir):
                if (output_dir / "results.json").exists():  # overwrite_output_dir
                    logger.warning(f"{output_dir} holds a finished run, which is replaced (`overwrite_output_dir`).")
                    for checkpoint in list_checkpoints(output_dir):
                        shutil.rmtree(checkpoint)
                    (output_dir / "results.json").unlink()  # last: it marks the checkpoints as another run's
                checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
                if checkpoint is not None and not can_resume(trainer, recipe, checkpoint):
                    checkpoint = None
                save_recipe(recipe, output_dir)
    shared = [checkpoint]  # from the first process to all others
    broadcast_object_list(shared)
    checkpoint = shared[0]
    if checkpoint is None:
        return None
    logger.warning(f"Resuming from {checkpoint}.")
    if not list(checkpoint.glob("optimizer*")):
        logger.warning(
            f"{checkpoint} holds no optimizer (`save_only_model`): optimizer and learning rate start anew, so the run "
            "is not the one that would have been without the stop."
        )
    return str(checkpoint)


def can_resume(trainer: Phase15Trainer, recipe: dict, checkpoint: Path) -> bool:
    """
    Returns `True` for a checkpoint of the same run. Checkpoints of another run are removed with
    `overwrite_output_dir`, and refused without it.
    """
    args = trainer.args
    try:
        check_same_run(recipe, checkpoint, Path(args.output_dir), args.world_size)
    except ValueError as error:
        if not args.overwrite_output_dir or args.resume_from_checkpoint:
            raise Phase15CheckpointError(str(error)) from error
        logger.warning(f"Starting anew: {error}")
        for other in list_checkpoints(Path(args.output_dir)):
            shutil.rmtree(other)
        return False
    return True


def evaluate_and_report(
    trainer: Phase15Trainer,
    model,
    model_args: Phase15ModelArguments,
    result: TrainOutput,
    held_out: dict,
    texts: list[str] | None,
) -> dict:
    """Compares the model with its controls, and writes results.json and the pictures. Returns the results."""
    args = trainer.args
    output_dir = Path(args.output_dir)
    with explain_write_errors(output_dir):
        plot_training(trainer.state.log_history, output_dir / "training_curve.png")
    if isinstance(trainer.train_dataset, Phase15Stream):  # records read, again in each pass
        num_training = trainer.state.global_step * trainer.get_total_train_batch_size(args)
    else:
        num_training = len(trainer.train_dataset)
    results = {
        "train": result.metrics,
        "steps": trainer.state.global_step,
        "records": {"training": num_training, "validation": len(trainer.eval_dataset or [])},
        "held_out": held_out,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "versions": {package: version(package) for package in ("transformers", "torch", "datasets", "peft")},
        "phase15": {"version": VERSION, "commit": read_commit()},
        "validation": {},
    }
    if trainer.eval_dataset is not None:
        loader = DataLoader(trainer.eval_dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
        with trainer.accelerator.autocast():
            if model_args.baseline:
                results |= compare_baseline(
                    model, f"baseline_{model_args.baseline}", loader, trainer.config.chunk_length
                )
            else:
                results |= compare(model, loader)
        with explain_write_errors(output_dir):
            plot_losses(results["validation"], output_dir / "loss_by_chunk.png")
    if "facts_distances" in held_out:
        distances = {*held_out["facts_distances"]}
        if not model_args.baseline:
            distances.add(2 * max(distances))  # further than it was trained on
        settings = {"facts_per_chat": held_out["facts_per_chat"], "batch_size": args.per_device_eval_batch_size}
        with trainer.accelerator.autocast():
            results["recall"] = recall(model, trainer.processing_class, sorted(distances), texts=texts, **settings)
        longest = max(held_out["facts_distances"])
        verdict = judge_recall(next(row for row in results["recall"] if row["distance"] == longest))
        if verdict is not None:
            results["verdict"] = verdict
        results["chat"] = chat_to_show(held_out, texts).messages[:-1]
        with explain_write_errors(output_dir):
            plot_recall(results["recall"], output_dir / "recall.png")
    with explain_write_errors(output_dir):
        (output_dir / "evaluation.json").unlink(missing_ok=True)  # of an earlier run's model
    save_results(trainer, results)
    if results["validation"]:
        print(f"\n{losses_table(results)}\n")
    if "recall" in results:
        print(f"\n{recall_table(results['recall'])}\n")
    return results


def save_results(trainer: Phase15Trainer, results: dict):
    output_dir = Path(trainer.args.output_dir)
    with explain_write_errors(output_dir):
        write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


def report_verdict(results: dict, run: TrainingRun):
    """Prints whether Δ helped, and the next command, as the last lines of a run."""
    folder = run.training.output_dir
    if "verdict" in results:
        verdict = results["verdict"]
        print(f"\n{verdict['sentence']}")
        print(next_command(verdict, folder, run.data.dataset_name, run.recipe, results["steps"]), flush=True)
    elif run.model.baseline is None:
        print("\nNothing was validated, so that it is not known if Δ helps.")
        print(
            f"Next, evaluate other records: phase15 eval --model_dir {shlex.quote(folder)} --dataset FILE", flush=True
        )


def chat_to_show(held_out: dict, texts: list[str] | None) -> Chat:
    (chat,) = fresh_chats(max(held_out["facts_distances"]), 1, held_out["facts_per_chat"], seed=1, texts=texts)
    return chat


def show_one_chat(trainer: Phase15Trainer, held_out: dict, texts: list[str] | None) -> dict:
    """
    Prints a fresh chat at the longest distance, with the answers of the saved model in new processes. Returns the
    example of the model card, a chat that fits on a page, with the model's answer.
    """
    chat = chat_to_show(held_out, texts)
    distance = min(max(held_out["facts_distances"]), CARD_DISTANCE)
    (short_chat,) = fresh_chats(distance, 1, held_out["facts_per_chat"], seed=1, texts=texts)
    tokenizer = trainer.processing_class

    def answer(shown: Chat, no_delta: bool) -> str:
        (example,) = encode_chats([shown], tokenizer)
        output = answer_in_new_process(trainer.args.output_dir, example.query, 2 * len(example.answer), no_delta)
        return tokenizer.decode(output, skip_special_tokens=True)

    with ThreadPoolExecutor() as pool:  # side by side: each takes seconds to import
        futures = [pool.submit(answer, chat, False), pool.submit(answer, chat, True)]
        if distance != max(held_out["facts_distances"]):
            futures.append(pool.submit(answer, short_chat, False))
        answers = [future.result() for future in futures]
    print(f"Saved to {trainer.args.output_dir}. Loaded in new processes:\n\n{format_chat(chat, *answers[:2])}")
    (example,) = encode_chats([short_chat], tokenizer)
    return {
        "prompt": short_chat.messages[:-1],
        "max_new_tokens": 2 * len(example.answer),
        "answer": answers[2] if len(answers) == 3 else answers[0],
    }


def show_answers(trainer: Phase15Trainer, run: TrainingRun, held_out: dict, texts: list[str] | None) -> dict | None:
    """
    Prints an answer of the saved model in a new process, if a Phase15 folder was saved. Returns the example of the
    model card: `prompt`, a text or messages; `max_new_tokens`; and `answer`.
    """
    is_adapter = run.model.stage == "lora" and not run.model.merge_adapter
    if is_adapter or run.model.baseline not in (None, "window"):
        return None
    if "facts_distances" in held_out:
        return show_one_chat(trainer, held_out, texts)
    return answer_one_question(trainer, run)


def answer_one_question(trainer: Phase15Trainer, run: TrainingRun) -> dict:
    """Loads the saved model in a new process, and prints its answer to the first query. Returns both."""
    print(f"Saved to {trainer.args.output_dir}. Loaded in a new process:")
    first = trainer.data_collator([next(iter(trainer.train_dataset))])
    query = first["input_ids"][first["labels"] == -100].tolist()
    output = answer_in_new_process(trainer.args.output_dir, query, max_new_tokens=CARD_NEW_TOKENS)
    answer = trainer.processing_class.decode(output, skip_special_tokens=True)
    print("Q:", trainer.processing_class.decode(query, skip_special_tokens=True).strip())
    print("A:", answer)
    prompt = read_prompt(run, int(first["records"][0]))
    return {"prompt": prompt, "max_new_tokens": CARD_NEW_TOKENS, "answer": answer}


def read_prompt(run: TrainingRun, number: int) -> str | list[dict]:
    """Returns the query of a record as text or messages, before the chat template."""
    data = run.data
    records = open_records(data.dataset_name, data.dataset_config, data.dataset_train_split, data.streaming)
    _, fields = read_first(records, data.dataset_name)
    record = next(record for record in records if record["number"] == number)
    return split_record(record["fields"], fields, record["where"]).query


def train_all(argv: list[str], program: str):
    """Does the runs of a command line, one after the other."""
    with errors_together(program):
        runs = plan(argv, program)
    for run in runs:
        with errors_together(program):
            trainer = prepare(run)
        with one_line_errors(program, FloatingPointError, Phase15RecordError, Phase15CheckpointError):
            if not train(trainer, run, program):
                break
    trainer.accelerator.end_training()
    if trainer.args.world_size > 1:
        leave()


__all__ = ["plan", "prepare", "train", "train_all"]
