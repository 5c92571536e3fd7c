# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A wheel, built offline, installed beside the libraries and used from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from phase15.model.configuration_phase15 import VERSION


pytest.importorskip("setuptools", minversion="77")  # the license as an SPDX expression
pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("requirements*.txt"))]

USE = """
import sys
import phase15
assert "torch" not in sys.modules
from phase15 import Phase15Config, Phase15ForCausalLM
from phase15.training.runs import QUICKSTART, RunParser, TrainingRun
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

sizes = dict(num_soft_tokens=24, num_sink_tokens=2, chunk_length=4, max_query_length=16)
sizes |= dict(hypernet_hidden_size=16, hypernet_num_attention_heads=2, hypernet_intermediate_size=32)
llm = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = Phase15ForCausalLM(Phase15Config(text_config=LlamaConfig(**llm), **sizes))
model.save_pretrained("saved")
loaded = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
run = TrainingRun.parse(["--use_cpu", "--output_dir", "run"])
before = run.run_before(RunParser())
print(phase15.__file__, phase15.__version__, run.path, before.path, sep="\\n")
"""


def run(command: list[str], folder: Path, **environment: str) -> str:
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in ("phase15", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."]
    run(pip, folder)
    (path,) = (folder / "dist").iterdir()
    return path


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("phase15/**/*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in ROOT.glob("phase15/**/*.jinja")}
    expected |= {f"phase15/recipes/{path.name}" for path in ROOT.glob("recipes/*.yaml")}
    assert names == expected and wheel.name.startswith(f"phase15-{VERSION}-")


def test_it_is_used_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    run(pip, tmp_path)
    environment = {"PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    module, version, recipe, before = run([sys.executable, "-c", USE], elsewhere, **environment).splitlines()
    assert Path(module).parent == site / "phase15" and version == VERSION
    assert Path(recipe) == site / "phase15" / "recipes" / "quickstart.yaml"
    assert Path(before) == site / "phase15" / "recipes" / "facts_base.yaml"
    assert "modeling_phase15.py" in os.listdir(elsewhere / "saved")
    for command in ([str(site / "bin" / "phase15")], [sys.executable, "-m", "phase15"]):
        assert "usage: phase15 COMMAND" in run([*command, "--help"], elsewhere, **environment)
