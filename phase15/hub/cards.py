# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The model card of a published model, read from the files of its run."""

import hashlib
import re
from pathlib import Path

import transformers
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import (
    HFValidationError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from phase15.data.records import EMBEDDED, READERS
from phase15.evaluation.losses import label
from phase15.evaluation.tables import cell, fence_of, recall_table, table
from phase15.hub.runs import Run, as_yaml
from phase15.model.compat_phase15 import TESTED
from phase15.model.modeling_phase15 import Phase15ForCausalLM


CARD = Path(__file__).parent / "model_card.md.jinja"
SIGNATURE = re.compile(r"\n<!-- push_to_hub\.py wrote this card, whose text has the SHA-256 (\w{64}) -->\n$")


def signed(card: str) -> str:
    """A card that says what its text was, so that the next push sees whether somebody has edited it."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- push_to_hub.py wrote this card, whose text has the SHA-256 {digest} -->\n"


def is_as_signed(card: str) -> bool:
    found = SIGNATURE.search(card)
    return found is not None and hashlib.sha256(card[: found.start()].encode()).hexdigest() == found[1]


def model_card(
    args, run: Run, model: Phase15ForCausalLM, tokenizer: PreTrainedTokenizerBase, pictures: list[str]
) -> ModelCard:
    """The model card. Training and results are read from the run."""
    recipe, measured = run.recipes[0] if run.recipes else {}, run.evaluation or run.results
    validation = measured.get("validation", {})
    ids = [recipe["dataset_name"] for recipe in run.recipes if is_hub_dataset(recipe["dataset_name"])]
    datasets = args.datasets or list(dict.fromkeys(ids)) or None
    base_model = args.base_model or model.config.text_config.name_or_path
    if not is_repo_id(base_model):
        base_model = None
    data = args.datasets[0] if args.datasets else recipe.get("dataset_name")
    measured_data = data
    if run.evaluation and Path(run.evaluation["dataset"]).name != Path(recipe.get("dataset_name", "")).name:
        measured_data = run.evaluation["dataset"]  # other data than the model was trained on
    name, recipe_text = args.repo_id.split("/")[1], as_yaml([recipe]).strip()
    metadata = ModelCardData(
        license=args.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets,
        tags=["phase15", "soft-prompt", "hypernetwork", "recursive-memory", "custom_code"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=measured_data,
                dataset_name=measured_data,
                dataset_split="validation",
                metric_type="loss",
                metric_name=f"nats per answer token, {label(variant)}",
                metric_value=round(result["loss"], 4),
            )
            for variant, result in validation.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(CARD),
        name=name,
        repo_id=args.repo_id,
        config=model.config,
        spoken=model.spoken_chunk_length,
        base_model=base_model,
        llm_class=type(model.llm).__name__,
        llm_parameters=model.llm.num_parameters(),
        hypernet_parameters=sum(parameter.numel() for parameter in model.hypernet.parameters()),
        is_trained=bool(model.hypernet.alpha.any()),
        has_chat_template=tokenizer.chat_template is not None,
        transformers_version=transformers.__version__,
        tested_versions=TESTED,
        recipe=recipe,
        recipe_text=recipe_text,
        fence=fence_of(recipe_text, 3),
        has_recipes_before=len(run.recipes) > 1,
        data=data,
        results=run.results,
        evaluated=run.evaluation.get("evaluated"),
        table=table(measured) if validation else "",
        recall=recall_table(run.results["recall"]) if run.results.get("recall") else "",
        cell=cell,
        pictures=pictures,
    )


def is_hub_dataset(name: str) -> bool:
    return name not in EMBEDDED and Path(name).suffix.lower() not in READERS and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


__all__ = ["is_as_signed", "model_card", "signed"]
