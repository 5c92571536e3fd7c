# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The card of a published model, written from the model and the files of its run, and signed to notice edits."""

import hashlib
import pprint
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from phase15.cli.files import read_yaml
from phase15.data.docstrings import DOCSTRINGS, docstring_records
from phase15.data.facts import FACTS, FactsArguments, fresh_chats
from phase15.data.records import EMBEDDED, READERS
from phase15.evaluation.losses import FULL_CONTEXT, MODEL, display_label
from phase15.evaluation.tables import cell, code_fence, losses_table, recall_table
from phase15.evaluation.verdict import verdict_sentence
from phase15.hub.runs import Run, dump_yaml
from phase15.model.compat_phase15 import TESTED
from phase15.model.configuration_phase15 import VERSION, Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


FALLBACK_DISTANCE = 32  # words between facts and questions
FALLBACK_NEW_TOKENS = 256
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


class CardExample(NamedTuple):
    """The example of a card. `prompt` is a text, or the messages of a chat."""

    prompt: str | list[dict]
    max_new_tokens: int
    answer: str | None  # `None` where the answer of this model is not known


def choose_example(run: Run, tokenizer: PreTrainedTokenizerBase) -> CardExample:
    """Returns the example that a run saved, else a question like those of its data."""
    saved = run.results.get("example")
    has_template = tokenizer.chat_template is not None
    if saved is not None and (has_template or isinstance(saved["prompt"], str)):
        return CardExample(saved["prompt"], saved["max_new_tokens"], saved["answer"])
    data = run.recipes[0]["dataset_name"] if run.recipes else None
    if data == FACTS and has_template:
        distances = run.recipes[0].get("facts_distances", FactsArguments().facts_distances)
        (chat,) = fresh_chats(min(max(distances), FALLBACK_DISTANCE), 1, FactsArguments().facts_per_chat, seed=1)
        return CardExample(chat.messages[:-1], FALLBACK_NEW_TOKENS, None)
    question = "What is a soft prompt?"
    if data == DOCSTRINGS:
        question = docstring_records()[0]["question"]
    if has_template:
        return CardExample([{"role": "user", "content": question}], FALLBACK_NEW_TOKENS, None)
    return CardExample("A soft prompt is", FALLBACK_NEW_TOKENS, None)


def example_code(repo_id: str, example: CardExample) -> str:
    """Returns the Python code of a card's example. Texts of others are Python literals, and so cannot be code."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name, revision = "{repo_id}", "main"  # better: the hash of a commit whose code you have read, see Security',
        "model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)",
    ]
    if isinstance(example.prompt, str):
        lines.append(f"prompt = {python_literal(example.prompt)}")
        lines.append('inputs = tokenizer(prompt, return_tensors="pt")')
    else:
        lines.append(f"chat = {python_literal(example.prompt)}")
        lines.append(
            "inputs = tokenizer.apply_chat_template("
            'chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        )
    lines.append(f"output = model.generate(**inputs, max_new_tokens={int(example.max_new_tokens)}, do_sample=False)")
    lines.append('print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return "\n".join(lines)


def python_literal(value: str | list[dict]) -> str:
    """Returns a Python literal on lines that fit on a page. Its strings hold no invisible character."""
    return pprint.pformat(value, width=110, sort_dicts=False)


def choose_metric(run: Run, data: str | None) -> EvalResult | None:
    """
    Returns the one result of this model for the `model-index` of the Hub: recall at the longest trained distance, else
    nats per answer token; `None` if nothing was measured. Controls and baselines are other models.
    """
    recipe = run.recipes[0] if run.recipes else {}
    measured = newest_results(run)
    if run.evaluation:
        is_own = Path(run.evaluation["dataset"]).name == Path(recipe.get("dataset_name", "")).name
        data = data if is_own else run.evaluation["dataset"]
    own_row = f"baseline_{recipe['baseline']}" if recipe.get("baseline") else MODEL
    if measured.get("recall"):
        trained = max(recipe.get("facts_distances", FactsArguments().facts_distances))
        at = min(measured["recall"], key=lambda row: abs(row["distance"] - trained))
        row = at["rows"].get(own_row) or at["rows"].get(FULL_CONTEXT)  # of a full-context baseline
        return EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type="accuracy",
            metric_name=f"facts recalled after {at['distance']} words",
            metric_value=round(row["right"], 4),
        )
    row = measured.get("validation", {}).get(own_row)
    if row is None:
        return None
    return EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split="validation",
        metric_type="loss",
        metric_name="nats per answer token",
        metric_value=round(row["loss"], 4),
    )


def newest_results(run: Run) -> dict:
    """Returns the results that a card shows: of the last evaluation, else of the run."""
    return run.evaluation or run.results


def read_license(config: Phase15Config) -> str | None:
    """Returns the licence that the base's card gives, from its folder or the cache of the Hub; `None` if not known."""
    base = config.base_model_name_or_path or config.text_config.name_or_path
    if not base:
        return None
    path = Path(base, "README.md")
    if not path.is_file():
        if not is_repo_id(base):
            return None
        path = try_to_load_from_cache(base, "README.md", revision=config.base_revision)
        if not isinstance(path, str):  # not in the cache
            return None
    metadata = metadata_load(path) or {}
    license = metadata.get("license")
    return license if isinstance(license, str) else None


def find_languages(run: Run) -> list[str] | None:
    """Returns the language of data that every machine has; `None` for other data, whose language is not known."""
    if not run.recipes:
        return None
    recipe = run.recipes[0]
    is_embedded = recipe["dataset_name"] in EMBEDDED and recipe.get("facts_text") is None
    return ["en"] if is_embedded else None


def read_project_url() -> str | None:
    """Returns the address of the project, from the installed package or CITATION.cff; `None` if neither has one."""
    try:
        for entry in metadata("phase15").get_all("Project-URL") or []:  # "Homepage, https://…"
            return entry.partition(",")[2].strip()
    except PackageNotFoundError:  # run from a checkout
        pass
    citation = Path(__file__).resolve().parents[2] / "CITATION.cff"
    if not citation.is_file():
        return None
    return read_yaml(citation)[0].get("repository-code")


def model_card(
    args,
    run: Run,
    model: Phase15ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pictures: list[str],
    example: CardExample | None = None,
    has_base: bool = True,
) -> ModelCard:
    """
    Returns the model card. Training and results are read from the run.

    Args:
        args (`PushArguments`): repository, licence, language and ids.
        run (`Run`): the files of the run.
        model (`Phase15ForCausalLM`): the model as it is published.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        pictures (`list[str]`): names of the pictures beside the card.
        example (`CardExample`, *optional*): with the answer of this model; by default that of [`choose_example`].
        has_base (`bool`): `False` for a repository that holds the HyperNetwork without its base.
    """
    name = args.repo_id.split("/")[1]
    recipe = run.recipes[0] if run.recipes else {}
    recipe_text = dump_yaml([recipe]).strip()
    newest = newest_results(run)
    # an evaluation of only facts or of only records leaves the other part to the run
    measured = newest if newest.get("validation") else run.results
    recalled = newest if newest.get("recall") else run.results
    validation = measured.get("validation", {})
    verdict = newest.get("verdict")
    candidates = (args.base_model, model.config.base_model_name_or_path, model.config.text_config.name_or_path)
    base_model = next((candidate for candidate in candidates if candidate and is_repo_id(candidate)), None)
    ids = [recipe["dataset_name"] for recipe in run.recipes if is_hub_dataset(recipe["dataset_name"])]
    datasets = args.datasets or list(dict.fromkeys(ids)) or None  # each id once, in order
    data = args.datasets[0] if args.datasets else recipe.get("dataset_name")
    metric = choose_metric(run, data)
    card_data = ModelCardData(
        language=args.language or find_languages(run),
        license=args.license or read_license(model.config),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=("finetune" if has_base else "adapter") if base_model else None,
        datasets=datasets,
        tags=["phase15", "soft-prompt", "hypernetwork", "recursive-memory", "custom_code"],
        model_name=name,
        eval_results=[metric] if metric else None,
    )
    example = example or choose_example(run, tokenizer)
    code = example_code(args.repo_id, example)
    return ModelCard.from_template(
        card_data,
        template_path=str(CARD),
        name=name,
        repo_id=args.repo_id,
        code=code,
        code_fence=code_fence(code, 3),
        answer=example.answer,
        project_url=read_project_url(),
        trained_with=run.results.get("phase15", {}),
        config=model.config,
        generation_chunk_length=model.generation_chunk_length,
        base_model=base_model,
        has_base=has_base,
        llm_class=type(model.llm).__name__,
        llm_parameters=model.llm.num_parameters(),
        hypernet_parameters=sum(parameter.numel() for parameter in model.hypernet.parameters()),
        version=VERSION,
        is_trained=bool(model.hypernet.alpha.any()),
        transformers_version=transformers.__version__,
        tested_versions=TESTED,
        recipe=recipe,
        recipe_text=recipe_text,
        fence=code_fence(recipe_text, 3),
        has_recipes_before=len(run.recipes) > 1,
        data=data,
        results=run.results,
        evaluated=measured.get("evaluated"),
        recall_evaluated=recalled.get("evaluated"),
        verdict=verdict_sentence(verdict, lambda key: cell(display_label(key))) if verdict else "",
        table=losses_table(measured) if validation else "",
        recall=recall_table(recalled["recall"]) if recalled.get("recall") else "",
        others=other_tables(run.evaluation),
        cell=cell,
        pictures=pictures,
    )


def other_tables(evaluation: dict) -> list[tuple[str, str]]:
    """Returns description and table of each evaluation of another data set."""
    tables = []
    for results in evaluation.get("other_datasets", {}).values():
        if results.get("validation"):
            tables.append((results["evaluated"], losses_table(results)))
    return tables


def is_hub_dataset(name: str) -> bool:
    return name not in EMBEDDED and Path(name).suffix.lower() not in READERS and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


__all__ = ["CardExample", "choose_example", "is_repo_id", "is_unmodified", "model_card", "sign_card"]
