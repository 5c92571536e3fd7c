# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 push`: stages a repository, checks it in a new process, uploads it."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status

from phase15.hub.arguments import AGAIN, PushArguments
from phase15.hub.cards import choose_example, is_repo_id, is_unmodified, model_card, sign_card
from phase15.hub.runs import answer_in_new_process, dump_yaml, read_run, strip_folders
from phase15.loading import check_kind, load_phase15, resolve_source


PICTURES = ("training_curve.png", "loss_by_chunk.png", "recall.png")
MANAGED_FILES = (  # a push replaces or deletes these on the Hub, and touches no other file
    "*.safetensors",
    "*.safetensors.index.json",
    *PICTURES,
    "evaluation.json",
    "recipe.yaml",
    "recipes_before.yaml",
    "chat_template.jinja",
)


def push(args: PushArguments):
    """Stages, checks, and uploads unless it is a dry run."""
    check_kind(args.model_dir)
    if not args.dry_run:
        HfApi().whoami()  # raises without a login, before the work
    with TemporaryDirectory() as staged:
        stage(args, Path(staged))
        if args.dry_run:
            keep(Path(staged), Path(args.output_dir))
            print(f"Staged in {args.output_dir}; loaded and used by a new process; nothing was uploaded.")
        else:
            upload(args, staged)


def stage(args: PushArguments, folder: Path):
    """
    Writes the complete repository into an empty folder, and has a new process load and use it.

    Raises:
        ValueError: if the model is not complete, or the new process fails or does not give this one's answer.
    """
    source = Path(args.model_dir)
    model, tokenizer = load_phase15(source)
    for name in ("is_local", "local_files_only"):  # how it was loaded here is private
        tokenizer.init_kwargs.pop(name, None)
    # a base that is not on the Hub could not be fetched
    has_base = source_holds_base(source) or not is_repo_id(model.config.base_model_name_or_path)
    if has_base:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    else:
        model.save_hypernet(folder)
    tokenizer.save_pretrained(folder)
    run = read_run(source)
    if run.results and not run.recipes:
        raise ValueError(f"{source} holds results.json, but not the recipe.yaml that says of what.")
    run = run._replace(recipes=[strip_folders(recipe) for recipe in run.recipes])
    for recipes, name in ((run.recipes[:1], "recipe.yaml"), (run.recipes[1:], "recipes_before.yaml")):
        if recipes:
            (folder / name).write_text(dump_yaml(recipes), encoding="utf-8")
    for name in (*PICTURES, "evaluation.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    pictures = [name for name in PICTURES if (folder / name).is_file()]

    example = choose_example(run, tokenizer)
    if isinstance(example.prompt, str):
        query = tokenizer(example.prompt)["input_ids"]
    else:
        try:
            query = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        except Exception as error:  # templates can raise anything
            raise ValueError(f"{source}: the chat template cannot be used: {error}") from error
    inputs = {"input_ids": torch.tensor([query]), "attention_mask": torch.ones(1, len(query), dtype=torch.long)}
    try:
        output = model.generate(**inputs, max_new_tokens=example.max_new_tokens, do_sample=False)
    except FloatingPointError as error:
        raise FloatingPointError(f"{source}: {error}") from error
    here = output[0, len(query) :].tolist()
    # the answer of the model that is published, whatever the run saved
    example = example._replace(answer=tokenizer.decode(here, skip_special_tokens=True))
    card = model_card(args, run, model, tokenizer, pictures, example, has_base)
    (folder / "README.md").write_text(sign_card(str(card)), encoding="utf-8")
    try:
        there = answer_in_new_process(folder, query, example.max_new_tokens)
    except ValueError as error:  # the staged folder is gone when this is read
        raise ValueError(str(error).replace(str(folder), f"{source}, as staged,")) from error
    if there != here:
        raise ValueError(f"{source}: a new process, which loaded what was staged, gives another answer than this one.")


def source_holds_base(folder: Path) -> bool:
    """Returns `False` for a folder of a HyperNetwork without its base."""
    return resolve_source(folder).config.base_digest is None


def keep(staged: Path, folder: Path):
    """Moves the staged files into a folder that is new, empty, or holds an earlier stage and nothing else."""
    old = list(folder.glob("*"))
    names = {path.name for path in staged.iterdir()}
    others = [path for path in old if path.name not in names and not any(path.match(name) for name in MANAGED_FILES)]
    if others or (old and folder / "README.md" not in old):
        reason = f"holds {others[0].name}" if others else "has no model card"
        raise ValueError(
            f"{folder} was not written by an earlier dry run: it {reason}; give another --output_dir. Nothing was "
            "written."
        )
    for path in old:
        path.unlink()
    shutil.copytree(staged, folder, dirs_exist_ok=True)


def upload(args: PushArguments, staged: str):
    """Makes the repository and the branch if needed, and one commit of the files that differ."""
    api = HfApi()
    card = (Path(staged) / "README.md").read_text("utf-8")
    # before anything is made there; ModelCard.validate asks another host before hub 2.0
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json={"repoType": "model", "content": card})
    if answer.status_code == 400:
        raise ValueError(f"{api.endpoint} does not accept the model card: {answer.text}")
    hf_raise_for_status(answer)
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    if args.revision and not args.revision.startswith("refs/"):  # such as a pull request's
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    before = api.model_info(args.repo_id, revision=args.revision)
    if args.private and not before.private:
        raise ValueError(f"{args.repo_id} is there already and public. Nothing was uploaded.")
    if not args.overwrite_card:
        check_card(args, before)
    files = {path.relative_to(staged).as_posix(): path for path in Path(staged).rglob("*") if path.is_file()}
    stale = [s.rfilename for s in before.siblings if any(Path(s.rfilename).match(name) for name in MANAGED_FILES)]
    operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in stale if name not in files]
    try:
        commit = api.create_commit(  # not upload_folder, which may split what it uploads into several commits
            args.repo_id,
            operations,
            commit_message=args.commit_message,
            revision=args.revision,
            create_pr=args.create_pr,
            parent_commit=before.sha,
        )
    except RuntimeError as error:  # huggingface_hub's about a large file; the cause may be a race of its threads
        reason = error.__cause__ if isinstance(error.__cause__, HTTPError) else "the connection broke"
        raise OSError(f"{error} {reason}. {AGAIN}") from error
    if commit.oid == before.sha:
        print(f"Nothing has changed since commit {before.sha}: no commit was made.")
    else:
        print(f"Published: {commit.pr_url or commit.commit_url}")
    print(f'from_pretrained("{args.repo_id}", trust_remote_code=True, revision="{commit.oid}")')


def check_card(args: PushArguments, before: ModelInfo):
    """Refuses to replace a model card that somebody has edited on the Hub."""
    if any(sibling.rfilename == "README.md" for sibling in before.siblings):
        there = Path(hf_hub_download(args.repo_id, "README.md", revision=before.sha)).read_text("utf-8")
        if not is_unmodified(there):
            raise ValueError(
                f"README.md of {args.repo_id} is not as a push left it: somebody has edited it. "
                "`--overwrite_card true` replaces it. Nothing was uploaded."
            )


__all__ = ["push"]
