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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path):
    """Completes a checkpoint. If one of its files is lost or changes later, it is a torn one."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST, json.dumps(files, indent=2) + "\n")


def problem_of(folder: Path, contents: bool = True) -> str | None:
    """Why a checkpoint is torn, or `None` for a complete one. Without `contents`, only sizes are checked."""
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
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if contents and sha256(path) != digest:
            return f"{name} is not what was saved"
    return None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """All checkpoints, newest first."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for match, path in sorted(numbered, key=lambda x: -int(x[0][1]) if x[0] else 0) if match]


def last_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint, by the sizes of its files."""
    return next((path for path in checkpoints_in(output_dir) if not problem_of(path, contents=False)), None)


def find_checkpoint(output_dir: Path, named: str | None = None) -> Path | None:
    """
    The checkpoint to resume from: the one that was named, or the newest complete one of a run. Torn ones are reported
    and removed, so that no rotation keeps one in a complete one's place.

    Raises:
        Phase15CheckpointError: if the one that was named is torn, or one cannot be read or may not be loaded.
    """
    try:
        found = find_complete(output_dir, named)
    except OSError as error:
        raise Phase15CheckpointError(f"cannot resume: {error}.") from error
    if found is not None:
        check_safe(found)
    return found


def find_complete(output_dir: Path, named: str | None) -> Path | None:
    """Finds a checkpoint as `find_checkpoint` does, without the check of its contents."""
    if named is not None:
        if problem := problem_of(Path(named)):
            raise Phase15CheckpointError(f"cannot resume from {named}: {problem}.")
    found = named and Path(named)
    for folder in checkpoints_in(output_dir):
        # checks all bytes of the one in use, and the sizes of the others: an earlier removal may have been cut short
        if problem := problem_of(folder, contents=found is None):
            logger.warning(f"Removing the torn checkpoint {folder}: {problem}.")
            shutil.rmtree(folder)
        elif found is None:
            found = folder
    return found


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
def loading(folder: str):
    """
    While this is open, torch loads tensors and plain values only. torch.distributed.checkpoint would load the plain
    values among its shards as pickles, which can run code.

    Raises:
        Phase15CheckpointError: if shards cannot be loaded, as when they hold code. `writing` reports errors of
            saving.
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
def writing(output_dir: Path, half: Path | None = None):
    """
    For a block that writes into `half`. The folder is removed if the block fails.

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
            reason = "torch failed, and does not say why"
        if half is not None:
            shutil.rmtree(half, ignore_errors=True)
        disk = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
        free = shutil.disk_usage(disk).free / 2**20
        raise Phase15CheckpointError(
            f"{half or output_dir} could not be written: {reason} ({free:,.0f} MiB are free there). Once it can be, "
            f"the same command {goes_on(output_dir)}."
        ) from error


def goes_on(output_dir: Path) -> str:
    """The effect of the same command, given again."""
    if (output_dir / "results.json").exists():
        return "has nothing left to do: the run is finished"
    last = last_complete(output_dir)
    return f"goes on from {last}, which is complete" if last else "starts again: no checkpoint is complete"


__all__ = [
    "Phase15CheckpointError",
    "checkpoints_in",
    "find_checkpoint",
    "goes_on",
    "loading",
    "write_manifest",
    "writing",
]
