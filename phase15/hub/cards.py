# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The card of a published model, written from the model and the files of its run, and signed to notice edits."""

import hashlib
import re
from pathlib import Path

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from phase15.data.records import EMBEDDED, READERS
from phase15.evaluation.losses import display_label
from phase15.evaluation.tables import cell, code_fence, losses_table, recall_table
from phase15.hub.runs import Run, dump_yaml
from phase15.model.compat_phase15 import TESTED
from phase15.model.configuration_phase15 import VERSION
from phase15.model.modeling_phase15 import Phase15ForCausalLM


CARD = Path(__file__).parent / "model_card.md.jinja"
SIGNATURE = re.compile(r"\n<!-- push_to_hub\.py wrote this card, whose text has the SHA-256 (\w{64}) -->\n$")


def sign_card(card: str) -> str:
    """Returns a card with the digest of its text, by which the next push notices edits."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- push_to_hub.py wrote this card, whose text has the SHA-256 {digest} -->\n"


def is_unmodified(card: str) -> bool:
    """Returns `True` for a card with a signature that fits its text."""
    signature = SIGNATURE.search(card)
    if signature is None:
        return False
    text = card[: signature.start()]
    return hashlib.sha256(text.encode()).hexdigest() == signature[1]


def model_card(
    args, run: Run, model: Phase15ForCausalLM, tokenizer: PreTrainedTokenizerBase, pictures: list[str]
) -> ModelCard:
    """Returns the model card. Training and results are read from the run."""
    name = args.repo_id.split("/")[1]
    recipe = run.recipes[0] if run.recipes else {}
    recipe_text = dump_yaml([recipe]).strip()
    measured = run.evaluation or run.results
    validation = measured.get("validation", {})
    base_model = args.base_model or model.config.text_config.name_or_path
    if not is_repo_id(base_model):
        base_model = None
    ids = [recipe["dataset_name"] for recipe in run.recipes if is_hub_dataset(recipe["dataset_name"])]
    datasets = args.datasets or list(dict.fromkeys(ids)) or None  # each id once, in order
    data = args.datasets[0] if args.datasets else recipe.get("dataset_name")
    measured_data = data
    if run.evaluation and Path(run.evaluation["dataset"]).name != Path(recipe.get("dataset_name", "")).name:
        measured_data = run.evaluation["dataset"]  # not the data that the model was trained on
    eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measured_data,
            dataset_name=measured_data,
            dataset_split="validation",
            metric_type="loss",
            metric_name=f"nats per answer token, {display_label(variant)}",
            metric_value=round(result["loss"], 4),
        )
        for variant, result in validation.items()
    ]
    metadata = ModelCardData(
        license=args.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets,
        tags=["phase15", "soft-prompt", "hypernetwork", "recursive-memory", "custom_code"],
        model_name=name,
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(CARD),
        name=name,
        repo_id=args.repo_id,
        config=model.config,
        generation_chunk_length=model.generation_chunk_length,
        base_model=base_model,
        llm_class=type(model.llm).__name__,
        llm_parameters=model.llm.num_parameters(),
        hypernet_parameters=sum(parameter.numel() for parameter in model.hypernet.parameters()),
        version=VERSION,
        is_trained=bool(model.hypernet.alpha.any()),
        has_chat_template=tokenizer.chat_template is not None,
        transformers_version=transformers.__version__,
        tested_versions=TESTED,
        recipe=recipe,
        recipe_text=recipe_text,
        fence=code_fence(recipe_text, 3),
        has_recipes_before=len(run.recipes) > 1,
        data=data,
        results=run.results,
        evaluated=run.evaluation.get("evaluated"),
        table=losses_table(measured) if validation else "",
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


__all__ = ["is_repo_id", "is_unmodified", "model_card", "sign_card"]
