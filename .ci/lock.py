"""
requirements.lock has exact versions of everything that requirements.txt, requirements-extra.txt and
requirements-test.txt install, for Python 3.10 to 3.13. It is a file of constraints (`pip install -r requirements.txt
-c requirements.lock`): an installation leaves out packages that it does not need, such as CUDA's beside a CPU build of
torch.

    python .ci/lock.py make     writes the lock from the newest releases inside the ranges; needs uv and the registry
    python .ci/lock.py check    fails unless every installation with the lock is inside the ranges and inside the lock
"""

import os
import subprocess
import sys
from pathlib import Path


LOCK = "requirements.lock"
RANGES = ["requirements.txt", "requirements-extra.txt", "requirements-test.txt"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
LINUX, OTHERS = "x86_64-manylinux_2_28", ["aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"]
# The release of torch that the figures in docs/ were measured with; newer ones inside the range pass the tests too.
TORCH = "torch==2.13.0\n"


def uv(*arguments: str, stdin: str | None = None) -> str:
    # torch has wheels for macOS 14 and newer
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    command = ["uv", "pip", "compile", "-q", *arguments]
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, env=environment)
    if done.returncode:
        raise SystemExit(f"uv pip compile {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def make():
    header = ["--no-annotate", "--custom-compile-command", "python .ci/lock.py make"]
    every = ["--universal", "--python-version", PYTHONS[0], "--upgrade"]
    uv(*RANGES, "-c", "-", "-o", LOCK, *every, *header, stdin=TORCH)


def pins(text: str) -> set[str]:
    """`name==version` of each line, whatever its markers."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in text.splitlines())
    return {line for line in lines if line}


def check():
    locked = pins(Path(LOCK).read_text(encoding="utf-8"))
    for python, platform in [*((python, LINUX) for python in PYTHONS), *((PYTHONS[-1], other) for other in OTHERS)]:
        arguments = ["--python-version", python, "--python-platform", platform, "--no-header", "--no-annotate"]
        loose = pins(uv(*RANGES, "-c", LOCK, *arguments)) - locked
        if loose:
            raise SystemExit(f"{LOCK} leaves out, for Python {python} on {platform}: {', '.join(sorted(loose))}")
    print(f"{LOCK}: {len(locked)} pins, inside the ranges and closed for Python {', '.join(PYTHONS)}")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]]()
