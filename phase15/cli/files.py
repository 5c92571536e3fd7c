# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Files that are written atomically, folders that are tried before a run, and YAML."""

import os
import re
from pathlib import Path
from tempfile import TemporaryFile

import yaml


QUICKSTART = "outputs/quickstart"  # the folder that `phase15 train` without arguments writes


def write_text(path: Path, text: str):
    """Writes a file atomically, also if the process or the machine stops."""
    half = path.with_name(f".{path.name}.half")
    try:
        with half.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path):
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_dir(name: str | Path):
    """Raises a ValueError for a folder that cannot be written to. Makes nothing."""
    path = Path(name).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {name}, but {there} is a file.")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` is {name}, but {there} cannot be written to: {error.strerror}.") from error


class YamlLoader(yaml.SafeLoader):
    """Reads 1e-5 as the number that it is in YAML 1.2 and JSON, where PyYAML's YAML 1.1 asks for 1.0e-5."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> list:
    """The documents of a YAML file; JSON is YAML too."""
    try:
        return list(yaml.load_all(path.read_text("utf-8"), YamlLoader))  # a SafeLoader
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: not YAML: {' '.join(str(error).split())}") from error


__all__ = ["QUICKSTART", "check_output_dir", "read_yaml", "sync", "write_text"]
