# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are whole or recognised as torn, files written atomically, and loading that runs no code."""

import hashlib
import json
import os
import pickle  # for an unpickler that knows a list of names and no other  # nosec B403
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from phase15.cli.files import sync, write_text


logger = logging.get_logger("phase15.checkpoint")
MANIFEST = "manifest.json"


class Phase15CheckpointError(ValueError):
    """A checkpoint or a model that cannot be written, or that may not be loaded. The message is one line."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path):
    """Completes a checkpoint: one whose files are later lost or changed is recognised as torn."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path == folder / MANIFEST:
            continue
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST, json.dumps(files, indent=2) + "\n")


def find_problem(folder: Path, contents: bool = True) -> str | None:
    """
    Returns the reason why a checkpoint is torn, or `None` for a complete one. Without `contents`, only the sizes of
    the files are checked.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, and so was not saved to its end"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        actual_size = path.stat().st_size
        if actual_size != size:
            return f"{name} has {actual_size} bytes instead of {size}"
        if contents and sha256(path) != digest:
            return f"{name} is not what was saved"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns all checkpoints, newest first."""
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            steps[path] = int(match[1])
    return sorted(steps, key=steps.get, reverse=True)


def last_complete(output_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint, by the sizes of its files."""
    for path in list_checkpoints(output_dir):
        if find_problem(path, contents=False) is None:
            return path
    return None


def find_checkpoint(output_dir: Path, named: str | None = None) -> Path | None:
    """
    Returns the checkpoint to resume from: the named one, or the newest complete one of a run. Torn checkpoints are
    reported and removed, so that the rotation does not keep one in place of a complete one.

    Raises:
        Phase15CheckpointError: if the named checkpoint is torn, or one cannot be read or may not be loaded.
    """
    try:
        checkpoint = find_complete(output_dir, named)
    except OSError as error:
        raise Phase15CheckpointError(f"cannot resume: {error}.") from error
    if checkpoint is not None:
        check_safe(checkpoint)
    return checkpoint


def find_complete(output_dir: Path, named: str | None) -> Path | None:
    """Returns the checkpoint of `find_checkpoint`, without checking that it is safe to load."""
    complete = None
    if named is not None:
        complete = Path(named)
        problem = find_problem(complete)
        if problem:
            raise Phase15CheckpointError(f"cannot resume from {named}: {problem}.")
    for folder in list_checkpoints(output_dir):
        # All bytes are checked only until a complete checkpoint is found. Sizes are checked of every checkpoint, since
        # an earlier removal may have been cut short.
        problem = find_problem(folder, contents=complete is None)
        if problem:
            logger.warning(f"Removing the torn checkpoint {folder}: {problem}.")
            shutil.rmtree(folder)
        elif complete is None:
            complete = folder
    return complete


class MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata that torch.distributed.checkpoint pickles beside shards, and no other class."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_safe(folder: Path):
    """
    Refuses a checkpoint whose loading could run code. Trainer and torch load some of its files as pickles with
    `weights_only`. This check names the file that they would refuse, before anything is loaded.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.name == ".metadata":
                with path.open("rb") as file:
                    MetadataUnpickler(file).load()
            elif path.suffix in (".pt", ".pth", ".bin"):
                with safe_globals():
                    torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged pickle can raise any
            raise Phase15CheckpointError(
                f"cannot resume from {folder}: {path.relative_to(folder)} holds more than tensors and plain values, "
                "and loading that could run code."
            ) from error


@contextmanager
def load_tensors_only(folder: str):
    """
    Makes torch load only tensors and plain values while the block runs. torch.distributed.checkpoint would load the
    plain values among its shards as pickles, which can run code.

    Raises:
        Phase15CheckpointError: if shards cannot be loaded, as when they hold code. `explain_write_errors` reports
            errors of saving.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    except CheckpointException as error:
        raise Phase15CheckpointError(
            f"cannot resume from {folder}: its shards are of another model, or hold values of which loading could run "
            "code."
        ) from error
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def explain_write_errors(output_dir: Path, unfinished: Path | None = None):
    """
    Explains errors of a block that writes into `output_dir`. The folder `unfinished` is removed if the block fails.

    Raises:
        Phase15CheckpointError: if something cannot be written, as on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno:
            reason = os.strerror(error.errno)
        elif type(error) is RuntimeError:
            if "PytorchStreamWriter" not in reason and "inline_container" not in reason:
                raise  # not about the disk
            reason = "torch failed without a reason"
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        disk = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
        free = shutil.disk_usage(disk).free / 2**20
        raise Phase15CheckpointError(
            f"{unfinished or output_dir} could not be written: {reason} ({free:,.0f} MiB are free there). Once it can "
            f"be, the same command {describe_restart(output_dir)}."
        ) from error


def describe_restart(output_dir: Path) -> str:
    """Returns the effect of the same command, given again, for messages."""
    if (output_dir / "results.json").exists():
        return "has nothing left to do: the run is finished"
    last = last_complete(output_dir)
    if last is None:
        return "starts again: no checkpoint is complete"
    return f"goes on from {last}, which is complete"


__all__ = [
    "Phase15CheckpointError",
    "describe_restart",
    "explain_write_errors",
    "find_checkpoint",
    "list_checkpoints",
    "load_tensors_only",
    "write_manifest",
]
